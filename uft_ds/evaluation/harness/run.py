"""An evaluation from its first request to its results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lm_eval.evaluator import evaluate as harness_evaluate

from uft_ds.errors import UserError
from uft_ds.evaluation.harness import package
from uft_ds.evaluation.harness.answered import Answers
from uft_ds.evaluation.harness.folder import Begun
from uft_ds.evaluation.harness.found import item_results, task_results, write_samples
from uft_ds.evaluation.harness.model import Agreed
from uft_ds.evaluation.harness.planned import Backend, OnAnswered, Place, Planned, ShareAnswered
from uft_ds.evaluation.harness.suites import Suite
from uft_ds.evaluation.harness.tasks import Loaded, Options
from uft_ds.evaluation.results import Evaluation, write_evaluation
from uft_ds.export.unmerged import Unmerged


def begun_of(model: Unmerged, suite: Suite, tasks: Loaded, options: Options) -> Begun:
    """What an evaluation is begun with: all that its numbers depend on."""
    size = options.size
    settings = {
        "by": "lm-evaluation-harness",
        "suite": suite.name,
        "tasks": {
            name: {
                "shots": tasks.shots[name],
                "version": tasks.versions[name],
                "rows": tasks.rows.sources[name],
                "content": tasks.content[name],
            }
            for name in tasks.shots
        },
        "limit": options.limit,
        "chat_template": options.chat_template,
        "fewshot_as_multiturn": options.multiturn,
        "seeds": list(options.seeds),
        "dtype": options.dtype,
        "softmax_dtype": "float32" if options.server is None else "the server's",
        "max_new_tokens": options.max_new_tokens,
        "batch_size": "auto" if size is None else size.rows,
        "server": options.server,
        "data": dict(tasks.rows.content),
        "versions": package.versions(),
    }
    return Begun(model.identity(), settings, model.origin())


def evaluate(
    name: str,
    begun: Begun,
    folder: Path,
    tasks: Loaded,
    options: Options,
    *,
    backend: Callable[[Agreed], Backend],
    place: Place,
    on_answered: OnAnswered,
) -> Evaluation | None:
    """Ask the model all that has not been answered yet, and write the results.

    Args:
        name: how tables call the model.
        backend: makes what answers, when the answers that are there have been read.
    Returns:
        the evaluation; None on another rank than the first.
    Raises:
        UserError: a task does not fit the model.
        CheckFailed: the model's numbers overflow, or another rank is lost.
    """
    answers = Answers(begun.answers(folder), place.rank)
    try:
        model = backend(answers.agreed)
        kinds = {str(task.OUTPUT_TYPE) for task in tasks.as_asked["tasks"].values()}
        results = harness_evaluate(
            Planned(model, answers, place, kinds, on_answered),
            tasks.as_asked,
            limit=options.limit,
            bootstrap_iters=0,
            apply_chat_template=options.chat_template,
            fewshot_as_multiturn=options.multiturn,
        )
    except ShareAnswered:
        return None
    finally:
        answers.close()
    if results is None:
        return None
    cut = {task: count for task, count in sorted(model.cut_prompts.items()) if count}
    found = Evaluation(name, {**begun.origin, **begun.model, "cut_prompts": cut}, begun.settings, task_results(results))
    try:
        write_samples(folder, results)
        write_evaluation(folder, found, item_results(results))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from None
    return found
