"""Show a plan in a terminal: what fits, what to take, how long it takes, and the tables behind that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from uft_ds.planning.alternatives import Alternative, larger_clusters
from uft_ds.planning.hardware import in_gb
from uft_ds.planning.plan import Plan
from uft_ds.planning.planner import Moved, Outcome
from uft_ds.planning.structure import Structure

_GPU_ROWS = {
    "weights_shard_bytes": "base weights, shard of a rank",
    "secondary_shard_bytes": "base weights, the node's copy",
    "gathered_bytes": "gathered layers, prefetch",
    "adapters_bytes": "trained weights, shard of a rank",
    "gradients_bytes": "gradients",
    "gradient_bucket_bytes": "gradient buckets",
    "optimizer_bytes": "optimiser, master weights",
    "saved_activations_bytes": "saved activations",
    "layer_bytes": "(a) inside a layer",
    "streams_bytes": "(b) reference at the head",
    "head_tile_bytes": "(b) a tile of logits",
    "reserve_bytes": "reserve: CUDA, fragments",
}
_HOST_ROWS = {
    "processes_bytes": "processes",
    "weights_bytes": "base weights",
    "reference_bytes": "the reference's copy of the base",
    "page_locking_bytes": "page-locked, rounded up",
    "optimizer_bytes": "optimiser, gradients",
    "activations_bytes": "saved activations",
    "checkpoint_bytes": "copy for a checkpoint",
}
_DISK_ROWS = {
    "base_bytes": "the base (read)",
    "checkpoints_bytes": "checkpoints that are kept",
    "merged_model_bytes": "merged model",
    "reference_cache_bytes": "reference cache",
}


def rendered(plan: Plan) -> RenderableType:
    """The answer first, then what it is drawn from; about one screen."""
    return Group(
        _heading(plan),
        _verdict(plan.outcome),
        *_answer(plan),
        Text(said_of(plan)),
        "",
        _memory(plan),
        "",
        _moved(plan.outcome),
        "",
        _alternatives("DeepSpeed file, recipe unchanged", plan.files, name=_file_name),
        *_ruled_out(plan),
        *_options(plan),
        "",
        Text("Assumed: " + "; ".join(plan.assumptions) + "."),
    )


def _heading(plan: Plan) -> Text:
    structure, setting = plan.structure, plan.outcome.setting
    cluster = setting.cluster
    assumed = f" ({cluster.assumed})" if cluster.assumed else ""
    return Text(
        f"{plan.recipe_name} on {cluster.nodes} x {cluster.gpus} {cluster.gpu.name}, {in_gb(cluster.gpu_memory_bytes)} "
        f"GB each{assumed}; deepspeed={setting.deepspeed}\n"
        f"{structure.num_base:,} parameters in {structure.num_layers} layers, {_active(structure)}"
        f"{structure.num_lora:,} trained; "
        "GB are 10^9 bytes, seconds are lower bounds"
    )


def _active(structure: Structure) -> str:
    """Of a mixture of experts: the parameters that a token passes."""
    return "" if structure.num_active == structure.num_base else f"{structure.num_active:,} of a token, "


def _verdict(outcome: Outcome) -> Text:
    verdicts = ["Ruled out: " + "; ".join(outcome.problems) + "."] if outcome.problems else []
    if outcome.lacking:
        verdicts.append("Does not fit: " + "; ".join(outcome.lacking) + ".")
    if verdicts:
        return Text(" ".join(verdicts), style="bold red")
    return Text(f"Fits: {_spare(outcome)}.", style="bold green")


def _spare(outcome: Outcome) -> str:
    host = "" if outcome.host_spare_bytes is None else f", {in_gb(outcome.host_spare_bytes)} GB of a node's host memory"
    return f"{in_gb(outcome.gpu_spare_bytes)} GB of each GPU to spare{host}"


def _answer(plan: Plan) -> Iterable[Text]:
    """What to take, unless it is the recipe as it is."""
    answer = plan.answer
    if answer is None:
        setting = plan.outcome.setting
        most = max((setting.cluster, *larger_clusters(setting)), key=lambda cluster: cluster.ranks)
        yield Text(f"Nothing that is known fits, on up to {most.nodes} x {most.gpus} GPUs.", style="bold red")
    elif answer.changes:
        step = f"a step takes at least {_of_a_step(answer.outcome.bound_seconds)}"
        if plan.outcome.fits:
            why = f"faster: {step}, not {_of_a_step(plan.outcome.bound_seconds)}"
        else:
            why = f"the cheapest change that fits: {_spare(answer.outcome)}, {step}"
        yield Text(f"Take {' '.join(answer.changes)}, {why}.", style="bold")


def said_of(plan: Plan) -> str:
    """One sentence: how much a run trains on, and how long that takes on the planned GPUs."""
    duration, outcome, workload = plan.duration, plan.runs, plan.runs.setting.workload
    amount, mfu = duration.amount, duration.mfu
    if amount is None or duration.bound_seconds is None:
        return (
            "How long a run takes is not known: the recipe gives neither train.steps nor `examples` of every source, "
            "and the cache has no tokens of them (`uft data preview` tokenises local data). "
            f"A step takes at least {_of_a_step(outcome.bound_seconds)}."
        )
    length = workload.tokens_per_response
    if amount.tokens is not None and length == amount.tokens_per_response:
        tokens = f", {amount.tokens:,} tokens"
    else:
        is_most = length == workload.max_length
        tokens = f" of {length:,} tokens{' (data.max_length, the most there can be)' if is_most else ''}"
    # Units are whole, so a step may hold more than examples_per_step; how many more only the data says.
    is_counted = amount.counted_from == "token cache"
    least = "at least " if amount.states_steps else ""
    most = "" if is_counted or amount.states_steps else "at most "
    steps = f"{most}{amount.steps:,} step{'s' * (amount.steps > 1)}"
    passes = "" if amount.epochs is None else f"{amount.epochs:.3g}"
    epochs = f", {least}{passes} epoch{'s' * (passes != '1')}" if passes else ""
    counted = "tokenised data" if is_counted else "recipe"
    found = f"A run by the {counted}: {least}{amount.responses:,} responses{tokens}, {steps}{epochs}. "
    takes = (
        "It takes" if plan.outcome.fits else "So changed it takes" if outcome.fits else "If it did fit, it would take"
    )
    found += f"{takes} at least {_time(duration.bound_seconds)}"
    if duration.forecast_seconds is None:
        return f"{found}; no forecast for {workload.dtype} without --tflops."
    if duration.forecast_seconds <= duration.bound_seconds:
        bound = _bounded_by(outcome.by_mode[outcome.mode])
        return f"{found}; an MFU of {mfu.value:.2f} is out of reach, {bound} bounds it."
    origin = {"option": "", "measured": f", which {mfu.run} measured", "assumed": ", which is assumed (--mfu)"}
    return f"{found}; {_time(duration.forecast_seconds)} at an MFU of {mfu.value:.2f}{origin[mfu.origin]}."


def _of_a_step(seconds: float) -> str:
    """Steps of small models take less than a hundredth of a second."""
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds:.2g} s"


def _time(seconds: float) -> str:
    """A time as text, in the unit that a reader would take."""
    if seconds >= 48 * 3600:
        return f"{seconds / 86400:.1f} days"
    if seconds >= 0.3 * 3600:
        return f"{seconds / 3600:.2g} h" if seconds < 10 * 3600 else f"{seconds / 3600:.0f} h"
    if seconds >= 60:
        return f"{seconds / 60:.2g} min"
    return f"{seconds:.2g} s"


def _memory(plan: Plan) -> Table:
    """The parts of a GPU's memory on the left, those of the host and of the disk on the right."""
    outcome = plan.outcome
    limit = outcome.setting.cluster.host_memory_bytes
    left = [
        *_rows(asdict(outcome.gpu), _GPU_ROWS),
        ("in all, larger of (a), (b)", in_gb(outcome.gpu.total_bytes)),
        ("available", in_gb(outcome.setting.cluster.gpu_memory_bytes)),
    ]
    right = [
        *_rows(asdict(outcome.host), _HOST_ROWS),
        ("in all", in_gb(outcome.host.total_bytes)),
        *([] if limit is None else [("available", in_gb(limit))]),
        ("disk", "GB"),
        *_rows(asdict(plan.disk), _DISK_ROWS),
    ]
    shown = _plain_table("a GPU", "GB", "host memory of a node", "GB")
    for row in range(max(len(left), len(right))):
        cells = [column[row] if row < len(column) else ("", "") for column in (left, right)]
        shown.add_row(*(Text(text, "bold" if cell == ("disk", "GB") else "") for cell in cells for text in cell))
    return shown


def _plain_table(title: str, *others: str) -> Table:
    """Columns without lines; numbers to the right."""
    shown = Table(box=None, pad_edge=False)
    shown.add_column(title)
    for name in others:
        is_text = name in ("host memory of a node", "fits")
        shown.add_column(name, justify="left" if is_text else "right", no_wrap=not is_text or name == "fits")
    return shown


def _rows(values: Mapping[str, int | None], names: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    for key, name in names.items():
        value = values[key]
        if value is None:
            yield name, "unknown"
        elif value:
            yield name, in_gb(value)


_STEP_ROWS: tuple[tuple[str, Callable[[Moved], float], str], ...] = (
    ("all-gathered on a rank, GB", lambda m: m.traffic.gathered_bytes, "GB"),
    ("gradients reduced, GB", lambda m: m.traffic.reduced_bytes, "GB"),
    ("from the node's GPUs, GB", lambda m: m.traffic.nvlink_bytes, "GB"),
    ("network, into a node, GB", lambda m: m.traffic.network_bytes, "GB"),
    ("PCIe, of a GPU, GB", lambda m: m.traffic.pcie_bytes, "GB"),
    ("PFLOPs, all ranks", lambda m: m.flops.total / 1e15, ".1f"),
    ("  of it recomputation", lambda m: m.flops.recomputation / 1e15, ".1f"),
    ("  of it attention", lambda m: m.flops.attention / 1e15, ".1f"),
    ("seconds: compute", lambda m: m.time.compute_seconds, ".2f"),
    ("seconds: memory", lambda m: m.time.hbm_seconds, ".2f"),
    ("seconds: the node's GPUs", lambda m: m.time.nvlink_seconds, ".2f"),
    ("seconds: network", lambda m: m.time.network_seconds, ".2f"),
    ("seconds: PCIe", lambda m: m.time.pcie_seconds, ".2f"),
    ("seconds at least", lambda m: m.time.bound_seconds, ".2f"),
)
"""What a step takes: a name, the value, and how it is written. Rows of zeros are left out."""


def _moved(outcome: Outcome) -> Table:
    names = [_mode_name(outcome, mode) for mode in outcome.by_mode]
    title = "a step (* as this recipe)" if any(name.endswith("*") for name in names) else "a step"
    shown = _plain_table(title, *names)
    modes = outcome.by_mode.values()
    for name, value, form in _STEP_ROWS:
        values = [value(moved) for moved in modes]
        if any(values):
            shown.add_row(name, *(in_gb(round(one)) if form == "GB" else format(one, form) for one in values))
    shown.add_row("bounded by", *(_bounded_by(moved) for moved in modes))
    return shown


def _bounded_by(moved: Moved) -> str:
    names = {"hbm": "memory", "nvlink": "the node's GPUs", "pcie": "PCIe"}
    return names.get(moved.time.bounded_by, moved.time.bounded_by)


def _mode_name(outcome: Outcome, mode: str) -> str:
    if mode == "cached" and outcome.setting.workload.reference == "none":
        return "no reference"
    return f"{mode} *" if mode == outcome.mode else mode


def _file_name(alternative: Alternative) -> str:
    others = [change for change in alternative.changes if not change.startswith("deepspeed=")]
    return " ".join([alternative.outcome.setting.deepspeed, *others])


def _options(plan: Plan) -> Iterable[RenderableType]:
    if plan.options:
        yield ""
        yield _alternatives("what to change, cheapest first", plan.options[:12], name=lambda one: " ".join(one.changes))


def _ruled_out(plan: Plan) -> Iterable[Text]:
    """Why other files of the table are ruled out, a line each; of the recipe's own the verdict says it."""
    for alternative in plan.files:
        if alternative.changes and alternative.outcome.problems:
            yield Text("ruled out: " + "; ".join(alternative.outcome.problems))


def _alternatives(title: str, alternatives: Iterable[Alternative], *, name: Callable[[Alternative], str]) -> Table:
    shown = _plain_table(title, "GPU GB", "spare", "host GB", "seconds", "fits")
    for alternative in alternatives:
        outcome = alternative.outcome
        shown.add_row(
            name(alternative),
            in_gb(outcome.gpu.total_bytes),
            in_gb(outcome.gpu_spare_bytes),
            in_gb(outcome.host.total_bytes),
            f"{outcome.bound_seconds:.2f}",
            "yes" if outcome.fits else "ruled out" if outcome.problems else "no",
        )
    return shown
