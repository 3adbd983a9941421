"""Data from the command line to the ranks: every kind in one run, waiting without a time limit, other machines."""

import csv
import gzip
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from runs import settings_of_run, uft, write_recipe
from sources import write_rows

from uft_ds.engine.waiting import while_others_wait
from uft_ds.errors import UserError
from uft_ds.record.metrics_file import read_metrics
from uft_ds.run.prepare import ensure_data, open_data, prepare_run

COLLECTIVE_SECONDS = 3.0
PREPARING_SECONDS = 4.0


def wait_longer_than_a_collective(seconds: float) -> Any:
    """Rank 0 works while the other one waits; then they meet in a collective."""
    started = time.monotonic()
    result = while_others_wait("work", lambda: time.sleep(seconds) or "done", works=torch.distributed.get_rank() == 0)
    waited = time.monotonic() - started
    torch.distributed.barrier()
    return result, waited


def test_ranks_wait_as_long_as_it_takes() -> None:
    """The data's preparation is bounded by no collective's time-out: three seconds here, and four of work."""
    results = run_on_ranks(wait_longer_than_a_collective, 2, PREPARING_SECONDS, collective_seconds=COLLECTIVE_SECONDS)
    assert [result for result, _ in results] == ["done", None]
    assert all(waited > COLLECTIVE_SECONDS for _, waited in results)


def wait_for_the_other_machine(seconds: float) -> float:
    """Each rank is the first of its machine; rank 1's has more to do."""
    started = time.monotonic()
    while_others_wait("data", lambda: time.sleep(seconds * torch.distributed.get_rank()), works=True)
    waited = time.monotonic() - started
    torch.distributed.barrier()
    return waited


@pytest.mark.long
def test_a_machine_waits_for_a_slower_one() -> None:
    """The first rank of a machine that is done would otherwise meet the others in a collective that times out."""
    waited = run_on_ranks(wait_for_the_other_machine, 2, PREPARING_SECONDS, collective_seconds=COLLECTIVE_SECONDS)
    assert all(seconds > COLLECTIVE_SECONDS for seconds in waited)


def fail_on_rank_zero(kind: str) -> str:
    def work() -> None:
        raise UserError("f.jsonl:7: bad") if kind == "user" else KeyError("x")

    try:
        while_others_wait(kind, work, works=torch.distributed.get_rank() == 0)
    except (UserError, RuntimeError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("user", ["UserError: f.jsonl:7: bad"] * 3),
        ("bug", ["KeyError: 'x'"] + ["RuntimeError: KeyError: 'x'"] * 2),
    ],
)
def test_what_the_worker_raised_is_raised_by_all(kind: str, expected: list[str]) -> None:
    """Nobody is left waiting for a worker that has failed."""
    assert run_on_ranks(fail_on_rank_zero, 3, kind) == expected


def write_every_kind(folder: Path) -> list[dict[str, Any]]:
    """Sources of four kinds in four files: conversations in zst-less json, pairs, labels in csv.gz, scores."""
    conversations = [
        {"messages": [{"role": r, "content": f"{r[0]}{i}"} for r in ("user", "assistant") * 2]} for i in range(6)
    ]
    (folder / "chat.json").write_text(json.dumps(conversations, indent=1))
    pairs = [{"prompt": f"p{i}", "chosen": "good " * (i % 3 + 1), "rejected": "bad"} for i in range(6)]
    write_rows(folder / "pairs.jsonl", pairs)
    with gzip.open(folder / "labels.csv.gz", "wt", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "completion", "label"])
        writer.writerows([f"c{i}", "yes, of course", "true" if i % 2 else "false"] for i in range(6))
    write_rows(folder / "scores.jsonl", [{"prompt": f"s{i}", "response": "no", "score": i / 6} for i in range(6)])
    return [
        {"format": "ultrachat", "path": str(folder / "chat.json")},
        {"format": "jsonl", "path": str(folder / "pairs.jsonl"), "share": 0.3},
        {"format": "kto", "path": str(folder / "labels.csv.gz"), "epochs": 1.5},
        {"format": "jsonl", "path": str(folder / "scores.jsonl"), "share": [[0.0, 0.1], [1.0, 0.3]]},
    ]


@pytest.mark.long
def test_every_kind_trains_in_one_run(tiny_qwen2: Path, tmp_path: Path) -> None:
    """Conversations, pairs, labels and scores, by shares, passes and a schedule, each by losses of its own."""
    losses = {"instruction": "nll", "score": "mse", "binary": "l1", "pair": {"dpo": 1.0, "nll": 0.2}}
    objective = {"loss": losses, "beta": {"pair": 0.2}, "reward_shift": "kl", "weights": {"pair": 2.0}}
    recipe = write_recipe(
        tmp_path,
        tiny_qwen2,
        data__sources=write_every_kind(tmp_path),
        data__held_out=[],
        train__steps=6,
        objective=objective,
    )
    result = uft("train", str(recipe))
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "grad_norm" in line]
    counts = {
        kind: sum(line.get(f"responses/{kind}", 0) for line in lines)
        for kind in ("instruction", "pair", "binary", "score")
    }
    assert all(count > 0 for count in counts.values())
    assert counts["pair"] % 2 == 0
    last = {name: value for line in lines for name, value in line.items()}
    assert last["loss/pair"] == pytest.approx(last["loss/pair/dpo"] + 0.2 * last["loss/pair/nll"])
    assert {"reward_shift", "pair_accuracy/pair", "logp_chosen/pair", "score_error/score"} <= set(last)
    assert lines[0]["loss/pair/dpo"] == pytest.approx(math.log(2)), "margins are 0 before the first step"
    assert lines[0]["loss/binary"] == pytest.approx(0.5)
    state = json.loads((tmp_path / "run" / "latest" / "trainer.json").read_text())
    shift = 0.01 * state["log_ratio_shift"]  # of scores and labels, whose beta is the default
    assert shift == pytest.approx(last["reward_shift"], rel=1e-6), "the shift is in the checkpoint"
    assert 0.2 < counts["pair"] / sum(counts.values()) < 0.4
    report = json.loads((tmp_path / "run" / "data" / "report.json").read_text())
    assert [row["responses"] for row in report["train"]] == [12, 12, 6, 6]


def test_preview_shows_masks_and_what_is_left_out(tiny_qwen2: Path, tmp_path: Path) -> None:
    """Supervised text between brackets, scores and counts, the table of reasons; nothing is written for a run."""
    rows = [{"prompt": "ask", "response": "answer", "score": 0.25}] * 3 + [
        {"prompt": "x", "response": "y<|im_end|>", "score": 0.5}
    ]
    sources = [{"format": "jsonl", "path": str(write_rows(tmp_path / "rows.jsonl", rows))}]
    recipe = write_recipe(tmp_path, tiny_qwen2, data__sources=sources)
    result = uft("data", "preview", str(recipe), "--rows", "1")
    assert result.returncode == 0, result.stderr
    assert "<|im_start|>assistant\n⟦answer<|im_end|>⟧" in result.stdout
    assert "score 0.25" in result.stdout
    assert "special token in the text" in result.stdout
    assert "rows.jsonl:4" in result.stdout
    assert "4 steps of at least 8 responses" in result.stdout
    assert not (tmp_path / "run").exists()
    refused = uft("data", "preview", str(recipe), "data.sources.0.format=alpaca")
    assert refused.returncode == 2
    assert (
        "rows.jsonl:1: keys prompt, response, score: this is format jsonl (read as alpaca: 'instruction': expected "
        "text, found nothing)"
    ) in refused.stderr


def test_bad_rows_of_a_run_lie_in_its_folder(tiny_qwen2: Path, tmp_path: Path) -> None:
    """With quarantine, the run's folder names each row that was left out, and why."""
    rows = [{"prompt": f"ask {i}", "response": "answer" if i else ""} for i in range(8)]
    sources = [{"format": "jsonl", "path": str(write_rows(tmp_path / "rows.jsonl", rows))}]
    path = write_recipe(tmp_path, tiny_qwen2, data__sources=sources)
    settings = settings_of_run(path, "data.on_bad_row=quarantine", "data.max_quarantined=0.2")
    folder, data, lock = prepare_run(settings, overwrite=False)
    lock.close()
    (line,) = folder.quarantine().read_text().splitlines()
    assert json.loads(line)["place"] == f"{tmp_path / 'rows.jsonl'}:1"
    assert data.train[0].account.quarantined == 1


def test_a_machine_without_the_tokens_makes_its_own(tiny_qwen2: Path, tmp_path: Path) -> None:
    """Prepared on one machine, opened on another: tokenised again where the cache is not shared, equal by content."""
    settings = settings_of_run(write_recipe(tmp_path, tiny_qwen2))
    folder, _, lock = prepare_run(settings, overwrite=False)
    lock.close()
    settings = settings_of_run(folder.recipe)
    before = [source.selection.num_tokens for source in open_data(settings, folder).all]
    shutil.rmtree(tmp_path / "tokenized")
    with pytest.raises(UserError, match="its tokens are not in"):
        open_data(settings, folder)
    ensure_data(settings, folder, has_prepared=False)
    assert [source.selection.num_tokens for source in open_data(settings, folder).all] == before
    shutil.rmtree(tmp_path / "tokenized")
    write_rows(tmp_path / "scored.jsonl", [{"prompt": "other", "response": "row", "score": 0.1}] * 9)
    with pytest.raises(UserError, match=r"scored\.jsonl: on .* its content, the tokenizer"):
        ensure_data(settings, folder, has_prepared=False)


@pytest.mark.parametrize(
    ("together", "found"), [(1, "64 given, but"), (2, "64 given, times launch.sequence_parallel 2 is 128, but")]
)
def test_a_pair_longer_than_a_micro_batch_is_refused(
    tiny_qwen2: Path, tmp_path: Path, together: int, found: str
) -> None:
    """Its sides fit one by one, not both: said before anything is launched, with the key to change and the numbers that
    the recipe gives."""
    rows = [{"prompt": "p" * (40 * together - 20), "chosen": "good", "rejected": "bad"}]
    sources = [{"format": "jsonl", "path": str(write_rows(tmp_path / "pairs.jsonl", rows))}]
    settings = settings_of_run(
        write_recipe(tmp_path, tiny_qwen2, data__sources=sources, train__tokens_per_micro_batch=64),
        f"data.max_length={64 * together}",
        f"launch.sequence_parallel={together}",
    )
    with pytest.raises(UserError) as refused:
        prepare_run(settings, overwrite=False)
    message = str(refused.value)
    assert message.startswith(f"train.tokens_per_micro_batch: {found} the pair of {tmp_path / 'pairs.jsonl'}:1 has")
    assert message.endswith(f"; raise it, or lower data.max_length {64 * together}")


def test_shares_that_make_no_whole_are_refused_by_key(tiny_qwen2: Path, tmp_path: Path) -> None:
    """What only the data can tell about a mixture is told before the launch."""
    settings = settings_of_run(write_recipe(tmp_path, tiny_qwen2))
    shares = ("data.sources.0.share=0.5", "data.sources.1.share=0.4")
    settings = settings_of_run(tmp_path / "recipe.yaml", *shares)
    with pytest.raises(UserError, match=r"data\.sources: the shares of all sources add up to 0\.9"):
        prepare_run(settings, overwrite=False)


def test_a_copy_of_a_source_is_found(tiny_qwen2: Path, tmp_path: Path) -> None:
    """The same rows held out under another name: no number on them would mean anything."""
    recipe = write_recipe(tmp_path, tiny_qwen2)
    shutil.copy(tmp_path / "scored.jsonl", tmp_path / "other.jsonl")
    override = f"data.held_out.0.path={tmp_path / 'other.jsonl'}"
    with pytest.raises(UserError, match=r"other\.jsonl: holds the rows of .*scored\.jsonl; no row may be used twice"):
        prepare_run(settings_of_run(recipe, override), overwrite=False)


def test_a_kind_without_a_loss_is_refused(tiny_qwen2: Path, tmp_path: Path) -> None:
    """A map of losses must name every kind that the data holds."""
    settings = settings_of_run(write_recipe(tmp_path, tiny_qwen2), "objective.loss={instruction: mse}")
    with pytest.raises(UserError, match=r"objective\.loss: no loss for kind 'score', which data\.sources\.1"):
        prepare_run(settings, overwrite=False)
