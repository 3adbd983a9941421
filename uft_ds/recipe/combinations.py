"""Keys of a recipe that are right alone and impossible together, and options that are not available."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from uft_ds.data.formats.table import format_names
from uft_ds.recipe.answer_rules import sampling_problems
from uft_ds.recipe.best import best_problem, is_of_task
from uft_ds.recipe.names import unknown_name
from uft_ds.recipe.online import Problem, online_problems
from uft_ds.recipe.rules import objective_problems
from uft_ds.recipe.tasks import task_problems

if TYPE_CHECKING:
    from uft_ds.recipe.schema import Recipe, SourceSection


def impossible(recipe: Recipe) -> list[Problem]:
    """(key, problem) for every fault that involves several keys, and for options that are not available."""
    found: list[Problem] = []
    data, train = recipe.data, recipe.train
    together = recipe.launch.sequence_parallel
    if data.max_length > train.tokens_per_micro_batch * together:
        by = f" times launch.sequence_parallel {together}" if together > 1 else ""
        found.append(
            (
                "train.tokens_per_micro_batch",
                f"{train.tokens_per_micro_batch}{by} is less than data.max_length {data.max_length}: "
                "a sequence would not fit; raise it or lower data.max_length",
            )
        )
    if recipe.model.attention == "flash_attention_2" and recipe.model.dtype == "float32":
        found.append(("model.attention", "flash_attention_2 has no float32; take model.dtype: bfloat16, or auto"))
    if recipe.model.activation_offload and recipe.model.gradient_checkpointing is not True:
        found.append(
            (
                "model.activation_offload",
                "true needs model.gradient_checkpointing: true; without it all activations would cross to the host",
            )
        )
    found += _with_nf4(recipe)
    seen: set[tuple[Any, ...]] = set()
    for prefix, sources in (("data.sources", data.sources), ("data.held_out", data.held_out)):
        for index, source in enumerate(sources):
            rows = (source.path, source.split, tuple(sorted(source.where.items())))
            if rows in seen:
                found.append(
                    (f"{prefix}.{index}.path", f"{source.path!r} is a source already; no row may be used twice")
                )
            seen.add(rows)
    if recipe.start.adapter is not None and recipe.reference.adapter is not None:
        found.append(
            (
                "start.adapter",
                "given together with reference.adapter, from which the policy starts too; give start.adapter alone if "
                "the base is the reference, reference.adapter alone if the adapter is",
            )
        )
    found += [("train.keep_best", problem) for problem in _best(recipe)]
    if train.samples and not data.held_out:
        found.append(("train.samples", f"{train.samples} given, but data.held_out, which has the prompts, is empty"))
    if recipe.lora is not None and recipe.lora.dropout != 0.0:
        found.append(("lora.dropout", f"{recipe.lora.dropout} given, must be 0: it would make log-ratios noise"))
    for prefix, sources in (("data.sources", data.sources), ("data.held_out", data.held_out)):
        for index, source in enumerate(sources):
            if source.format not in format_names():
                found.append((f"{prefix}.{index}.format", unknown_name(source.format, format_names())))
            found += [(f"{prefix}.{index}.{key}", problem) for key, problem in _portion(source, prefix)]
            found += [(f"{prefix}.{index}.{key}", problem) for key, problem in _scores(source)]
    found += _with_head(recipe)
    found += task_problems(
        recipe.evaluate.tasks,
        [(source.path, source.split) for source in data.sources],
        reward=recipe.objective.reward,
    )
    found += online_problems(
        data.sources,
        data.held_out,
        recipe.generator,
        max_length=data.max_length,
        reward=recipe.objective.reward,
        has_tasks=bool(recipe.evaluate.tasks),
    )
    objective, generator = recipe.objective.given, recipe.generator
    found += [
        (f"generator.{key}", problem)
        for key, problem in sampling_problems(objective, generator.temperature, generator.top_p)
    ]
    of_objective = objective_problems(objective, examples_per_step=train.examples_per_step)
    found += [(f"objective.{key}", problem) for key, problem in of_objective]
    if recipe.lora is None:
        return found + list(_without_adapters(recipe))
    return found + (list(_with_experts(recipe)) if recipe.lora.experts else [])


def _with_experts(recipe: Recipe) -> Iterator[Problem]:
    """(key, problem) for what adapters of routed experts cannot do."""
    if recipe.objective.reward == "head":
        yield "lora.experts", "true given, but a reward model has no adapters of experts; leave it out"
    if any(source.answers is not None for source in recipe.data.sources):
        yield (
            "lora.experts",
            "true given, but the policy also answers itself: every new token would add the adapters to the weights "
            "of all experts, and servers take no such adapters; leave it out, or the online sources",
        )


def _without_adapters(recipe: Recipe) -> Iterator[Problem]:
    """(key, problem) for keys that need adapters."""
    trains_all = "given, but with lora: null all parameters are trained"
    for key, folder in (("reference", recipe.reference.adapter), ("start", recipe.start.adapter)):
        if folder is not None:
            yield f"{key}.adapter", f"{folder} {trains_all}; merge the adapter (uft convert) and take it as model.base"
    if recipe.objective.reward == "head":
        yield "objective.reward", f"head {trains_all}; a reward model is trained with adapters: leave lora out"
    if recipe.generator.by == "vllm":
        yield "generator.by", f"vllm {trains_all}, and a server is sent adapters alone; take builtin"


def _with_nf4(recipe: Recipe) -> list[Problem]:
    """(key, problem) for what cannot be on a base in 4 bits."""
    given = recipe.model.quantization
    if given is None:
        return []
    found = []
    if recipe.lora is None:
        found.append(
            (
                "model.quantization",
                f"{given} given, but with lora: null all parameters are trained, and weights in 4 bits cannot be; use "
                "adapters",
            )
        )
    if recipe.generator.by == "vllm":
        found.append(
            (
                "generator.by",
                f"vllm serves the base in 16 bits, and with model.quantization: {given} the policy is another model; "
                "take builtin",
            )
        )
    return found


def _with_head(recipe: Recipe) -> list[Problem]:
    """(key, problem) for keys outside the objective that a reward model does not read, or that only it reads."""
    if recipe.objective.reward == "implicit":
        lr = recipe.train.head_lr
        return [] if lr is None else [("train.head_lr", f"{lr} given, but only objective.reward: head has a head")]
    found = []
    for key, default in type(recipe.reference)().model_dump().items():
        given = getattr(recipe.reference, key)
        if given != default:
            found.append(
                (f"reference.{key}", f"{given} given, but objective.reward: head has no reference; leave it out")
            )
    if recipe.train.samples:
        found.append(
            ("train.samples", f"{recipe.train.samples} given, but a reward model answers no prompts; leave it out")
        )
    best = recipe.train.keep_best or ""
    if best.startswith(("held_out/logp_chosen", "held_out/implicit_reward_chosen")):
        found.append(
            ("train.keep_best", f"{best!r} given, which a reward model lacks; take held_out/pair_accuracy/pair")
        )
    if recipe.model.logits_mib is not None:
        found.append(
            ("model.logits_mib", f"{recipe.model.logits_mib} given, but a reward model has no logits; leave it out")
        )
    return found


def _best(recipe: Recipe) -> list[str]:
    """The reasons why `train.keep_best` could never choose a checkpoint."""
    train = recipe.train
    if train.keep_best is None:
        return []
    problem = best_problem(train.keep_best, [task.name for task in recipe.evaluate.tasks])
    if problem is not None:
        return [problem]
    if not recipe.data.held_out and not is_of_task(train.keep_best):
        return ["needs data.held_out, which is empty"]
    if train.checkpoint_every % train.evaluate_every and train.evaluate_every % train.checkpoint_every:
        return [
            f"needs evaluations where checkpoints are: train.evaluate_every {train.evaluate_every} and "
            f"train.checkpoint_every {train.checkpoint_every} must be multiples of each other"
        ]
    return []


def _portion(source: SourceSection, prefix: str) -> list[Problem]:
    """(key, problem) for the keys that say how much of a source is taken."""
    found = []
    given = [key for key in ("examples", "epochs", "share") if getattr(source, key) is not None]
    if prefix == "data.held_out":
        found += [(key, "held-out data is gone through once; use `examples`") for key in given if key != "examples"]
    elif "epochs" in given and "share" in given:
        found.append(("share", "given together with `epochs`; how often a source is repeated follows from its share"))
    if isinstance(source.share, list):
        points = [progress for progress, _ in source.share]
        if points != sorted(set(points)) or not points or (points[0], points[-1]) != (0.0, 1.0):
            found.append(("share", f"a schedule's progress must rise from 0 to 1, found {points}"))
    shares = [share for _, share in source.share] if isinstance(source.share, list) else [source.share]
    if shares and not any(share is None or share > 0 for share in shares):
        found.append(("share", "0 takes nothing; leave the source out"))
    return found


def _scores(source: SourceSection) -> list[Problem]:
    """(key, problem) for the keys that say what a source's scores mean."""
    found = []
    if source.score_range is not None and not source.score_range[0] < source.score_range[1]:
        low, high = source.score_range
        found.append(("score_range", f"[{low:g}, {high:g}] given, expected [lowest, highest], such as [1, 10]"))
    if source.mixed_kinds and source.score_map == "quantile":
        found.append(
            (
                "score_map",
                "quantile would rank the scores of one kind among those of others; leave mixed_kinds out, or take "
                "[scale, offset]",
            )
        )
    return found
