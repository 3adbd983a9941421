"""The steps of an online run on real ranks: the same on each, recorded before they are trained on, replayed exactly."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import engine_of
from ranks import run_on_ranks
from sources import rules, write_rows
from tiny import build_tiny_tokenizer
from torch import Tensor
from toy import UFT

from uft_ds.data.asked import AskedSource
from uft_ds.data.mixture import Portion, Step, plan_steps
from uft_ds.data.own_answers import OwnAnswers
from uft_ds.data.sources import AskedSettings, PreparedSource, SourceSettings, Tolerance, prepare_source
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer
from uft_ds.data.tokens.tokenize import load_tokenizer
from uft_ds.engine.engine import Engine
from uft_ds.errors import CheckFailed, GeneratorLost, UserError
from uft_ds.recipe.settings import ScorerSettings
from uft_ds.record.report import SilentReporter
from uft_ds.rollouts.answers import Answer, Answers, PolicyVersion, Question, Unanswered
from uft_ds.rollouts.prompts import read_prompts
from uft_ds.rollouts.record import RecordFolder
from uft_ds.rollouts.scorers import SourceScorer
from uft_ds.rollouts.scoring import StepScoring
from uft_ds.rollouts.source import Live, Replayed, Rollouts, Rules

ANSWERS, PROMPTS, SEED = 3, 12, 5


@dataclass
class MadeUp:
    """A generator on rank 0: tokens drawn from each answer's seed, and faults by the step's first prompt.

    published: the digests that were handed over. fail: what every answer is replaced by.
    """

    fail: str = ""
    on_all_ranks: bool = False
    needs_adapter: bool = True
    published: list[str] = field(default_factory=list)
    asked: int = 0

    def identity(self) -> Mapping[str, Any]:
        return {"generator": "made up"}

    def publish(self, version: PolicyVersion, tensors: Mapping[str, Tensor]) -> None:
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
        assert any("lora_B" in name for name in tensors)
        self.published.append(version.digest)

    def answer(self, questions: list[Question]) -> list[Answers]:
        self.asked += len(questions)
        if self.fail == "lost":
            raise GeneratorLost("http://nowhere: no answer for 30 minutes")
        return [self._answers(number, question) for number, question in enumerate(questions)]

    def _answers(self, number: int, question: Question) -> Answers:
        if self.fail == "all" or (self.fail == "one" and number == 0):
            return Unanswered("timed out twice")
        return tuple(_drawn(seed) for seed in question.seeds)

    def close(self) -> None:
        """Nothing to end."""


def _drawn(seed: int) -> Answer:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, 200, size=int(rng.integers(1, 6))).tolist()
    return Answer((*tokens, 2), True)


@dataclass(frozen=True)
class World:
    """What a test's ranks share: a mixture of one online and one fixed source, and a folder for the record."""

    folder: Path
    engine: Engine
    chat: ChatTokenizer
    online: PreparedSource
    fixed: PreparedSource

    def source(
        self, generator: MadeUp | None, record: str = "run", replays: str = "", max_kl: float | None = None
    ) -> Rollouts:
        mixed = [AskedSource.of(self.online), self.fixed]
        plan = plan_steps(mixed, seed=SEED, examples_per_step=12, epochs=1, steps=3)
        made_by: Live | Replayed = Replayed(RecordFolder(self.folder / replays))
        if generator is not None:
            scorer = SourceScorer(ScorerSettings("length", "affine:0,1000", 10.0, 1, None), "data.sources.0.score_by")
            scoring = StepScoring(
                {0: scorer}, {0: read_prompts(self.online)}, lambda ids: str(list(ids)), "score", "hash"
            )
            made_by = Live(generator, scoring if self.engine.rank == 0 else None)
        return Rollouts(
            plan,
            [source.selection for source in mixed],
            Rules(SEED, 0.1, torch.float32, UFT, "hash", max_kl),
            made_by,
            RecordFolder(self.folder / record),
            self.engine,
            self.engine.module.policy,  # type: ignore[union-attr, arg-type]
            SilentReporter(),
        )


def world(folder: Path, base: Path) -> World:
    """Each rank prepares its own copy of the same data; the record's folder is shared."""
    engine = engine_of(base, b_std=0.05)
    own = Path(tempfile.mkdtemp(dir=folder))
    chat = load_tokenizer(str(build_tiny_tokenizer(own / "tokenizer")))

    def prepared(name: str, rows: list[dict[str, Any]], asked: AskedSettings | None, form: str) -> PreparedSource:
        path = write_rows(own / name, rows)
        portion = Portion(share=((0.0, 0.75),)) if asked else Portion()
        settings = SourceSettings(str(path), None, rules(format=form), portion=portion, asked=asked)
        return prepare_source(settings, chat, own / "cache", seed=SEED, tolerance=Tolerance())

    online = prepared("p.jsonl", [{"prompt": f"q{i}"} for i in range(PROMPTS)], AskedSettings(ANSWERS, 8), "prompts")
    fixed = prepared("f.jsonl", [{"prompt": f"f{i}", "response": "yes"} for i in range(PROMPTS)], None, "jsonl")
    return World(folder, engine, chat, online, fixed)


def content(step: Step) -> list[Any]:
    """All that training reads of a step; places without their folders."""
    return [
        (s.token_ids_T.tolist(), r.start, r.end, r.score, r.kind, r.origin.rpartition("/")[2], dict(r.other_facts))
        for s in step.sequences
        for r in s.responses
    ]


def tried(work: Any) -> str:
    try:
        work()
    except (UserError, CheckFailed) as error:
        return f"{type(error).__name__} {error.by_all}: {error}"
    return "nothing raised"


def run_of_steps(folder: Path, base: Path) -> dict[str, Any]:
    here = world(folder, base)
    generator = MadeUp()
    first = [here.source(generator).step(n) for n in range(3)]
    silent = MadeUp(fail="lost")  # asked again, it would fail
    again = [here.source(silent).step(n) for n in range(3)]
    replayed = [here.source(None, "other", "run").step(n) for n in range(3)]
    with torch.no_grad():
        moved = next(p for p in here.engine.module.parameters() if p.requires_grad)
        import deepspeed

        with deepspeed.zero.GatheredParameters([moved], modifier_rank=0):
            moved += 1e-3
    of_another_policy = here.source(None, "moved", "run").step(1)
    other = MadeUp()
    anew = here.source(other).step(1)
    return {
        "first": [content(step) for step in first],
        "again": [content(step) for step in again],
        "replayed": [content(step) for step in replayed],
        "of_another_policy": content(of_another_policy),
        "made": [step.made["rollouts/replayed"] for step in (*first, *again, *replayed, anew)],
        "metrics": dict(first[0].made),
        "published": generator.published,
        "of_other_policy": other.published,
        "asked": generator.asked,
        "files": sorted(path.name for path in (folder / "run" / "steps").iterdir()),
        "left": here.source(None, "third", "run").step(0) is not None,
    }


@pytest.fixture(scope="module")
def ranks(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on_ranks(run_of_steps, 2, tmp_path_factory.mktemp("rollouts"), tiny_qwen2)


def test_every_rank_gets_the_same_step(ranks: list[dict[str, Any]]) -> None:
    """With the answers as they were sampled, their scores, and the fixed data in its place."""
    one, two = ranks
    assert one["first"] == two["first"]
    kinds = [kind for step in one["first"] for *_, kind, _, _ in step]
    assert kinds.count("score") == one["asked"] * ANSWERS
    assert kinds.count("instruction") >= 3
    online = [facts for step in one["first"] for *_, kind, _, facts in step if kind == "score"]
    assert all(facts == {"online": 1.0} for facts in online)


def test_the_adapter_is_handed_over_once_a_step(ranks: list[dict[str, Any]]) -> None:
    """On rank 0 alone; its name is the hash of its content."""
    one, two = ranks
    assert len(one["published"]) == 3
    assert len(set(one["published"])) == 1  # nothing has been trained between the steps
    assert two["published"] == []
    assert one["of_other_policy"] != one["published"][:1]


def test_a_recorded_step_is_not_generated_again(ranks: list[dict[str, Any]]) -> None:
    """A restart reads it, and so does another run that replays this one: the same tokens and scores."""
    for rank in ranks:
        assert rank["again"] == rank["first"]
        assert rank["replayed"] == rank["first"]
        assert rank["made"] == [0.0] * 3 + [1.0] * 3 + [1.0] * 3 + [0.0]


def test_a_record_of_another_policy_is_not_trained_on(ranks: list[dict[str, Any]]) -> None:
    """The step is generated anew by the present policy, and the old record is kept under another name."""
    names = ranks[0]["files"]
    assert {"000001.json", "000002.json", "000003.json"} < set(names)
    assert len(names) == 4


def test_a_replay_by_another_policy_trains_on_scored_data(ranks: list[dict[str, Any]]) -> None:
    """The same tokens and scores, but nothing says that the policy of the step has given them."""
    for rank in ranks:
        then, now = rank["first"][1], rank["of_another_policy"]
        assert [row[:-1] for row in now] == [row[:-1] for row in then]
        assert any(row[-1] == {"online": 1.0} for row in then)
        assert all(row[-1] == {} for row in now)


def test_metrics_say_how_the_step_was_made(ranks: list[dict[str, Any]]) -> None:
    metrics = ranks[0]["metrics"]
    assert metrics["rollouts/dropped"] == 0
    assert metrics["rollouts/truncated"] == 0
    assert 0 < metrics["rollouts/score"] < 1
    assert metrics["rollouts/answer_tokens"] > 1
    assert metrics["rollouts/generation_seconds"] >= 0


def run_of_faults(folder: Path, base: Path) -> dict[str, Any]:
    here = world(folder, base)
    found = {
        "lost": tried(lambda: here.source(MadeUp(fail="lost"), "lost").step(0)),
        "all": tried(lambda: here.source(MadeUp(fail="all"), "all").step(0)),
        "absent": tried(lambda: here.source(None, "copy", "nothing").step(0)),
    }
    one = here.source(MadeUp(fail="one"), "one").step(0)
    whole = here.source(MadeUp(), "whole").step(0)
    found["one"] = len(whole.responses) - len(one.responses)
    found["dropped"] = one.made["rollouts/dropped"]
    found["all_files"] = sorted(path.name for path in (folder / "all").rglob("*") if path.is_file())
    own, tokens = np.array([-3.0, -5.0]), np.array([4.0, 6.0])
    served = OwnAnswers(own, own - 2.0, own + np.array([0.5, np.nan]), tokens)
    untold = OwnAnswers(own, own - 2.0, np.full(2, np.nan), tokens)
    near, far = here.source(MadeUp(), "near"), here.source(MadeUp(), "far", max_kl=1.5)
    found["near"] = (dict(near.accept(0, untold)), near.ended)
    found["far"] = (dict(far.accept(0, untold)), far.ended)
    resumed, allowed = here.source(MadeUp(), "far", max_kl=1.5), here.source(MadeUp(), "far", max_kl=3.0)
    for source in (resumed, allowed):
        source.restore(far.state())
    found["resumed"] = (resumed.ended, allowed.ended)
    found["gate"] = tried(lambda: here.source(MadeUp(), "whole").accept(0, served))
    torch.distributed.barrier()  # rank 0 alone puts the record aside
    found["after_gate"] = [path.name for path in sorted((folder / "whole" / "steps").iterdir())]
    torch.distributed.barrier()
    return found


@pytest.fixture(scope="module")
def faults(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on_ranks(run_of_faults, 2, tmp_path_factory.mktemp("faults"), tiny_qwen2)


def test_a_lost_generator_ends_all_ranks_together(faults: list[dict[str, Any]]) -> None:
    """So that they can save what has been trained."""
    assert [rank["lost"] for rank in faults] == ["CheckFailed True: http://nowhere: no answer for 30 minutes"] * 2


def test_one_prompt_may_be_left_out_but_not_most(faults: list[dict[str, Any]]) -> None:
    """Whole groups, and counted; a step of which most is missing is refused, and its record is put aside."""
    for rank in faults:
        assert rank["one"] == ANSWERS
        assert rank["dropped"] == 1
        assert "3 of 3 prompts would be left out" in rank["all"]
        assert "timed out twice" in rank["all"]
    assert any(name.endswith(".txt") for name in faults[0]["all_files"])
    assert "000001.json" not in faults[0]["all_files"]


def test_a_replay_needs_the_record_of_each_step(faults: list[dict[str, Any]]) -> None:
    assert all("holds no record of step 1" in rank["absent"] for rank in faults)


def test_the_adapter_that_answered_is_the_adapter_that_is_trained(faults: list[dict[str, Any]]) -> None:
    """Half a nat between the generator's log-prob and our own ends the run, and the record is not used again."""
    for rank in faults:
        assert rank["gate"].startswith("CheckFailed")
        assert "000001.json" not in rank["after_gate"]


def test_a_policy_that_has_gone_too_far_ends_the_run(faults: list[dict[str, Any]]) -> None:
    """By the mean log-ratio of a step's answers, here 2 nats; also if the run is killed then, and resumed."""
    for rank in faults:
        metrics, ended = rank["near"]
        assert metrics == {"rollouts/kl": 2.0}
        assert ended == ""
        metrics, ended = rank["far"]
        assert metrics == {"rollouts/kl": 2.0}
        assert "2 nats from the reference" in ended
        assert "generator.max_kl 1.5" in ended
        assert rank["resumed"] == (ended, "")
