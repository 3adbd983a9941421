"""The steps of an online run: the policy answers a step's prompts, a scorer scores them, and the step trains on that.

    plan of step n -> is it recorded, by this very policy? -> read it
                   -> else: hand over the policy -> answer -> score -> write the record
    record -> Step

Every rank has a source and asks it for the same steps in the same order. Rank 0 alone talks to servers and scorers and
reads and writes the record; the others wait for it, and get from it what the step trains on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from uft_ds.data.asked import Asked
from uft_ds.data.example import ONLINE, SERVED, Response, Sequence, Unit
from uft_ds.data.mixture import Step, Steps
from uft_ds.data.own_answers import OwnAnswers
from uft_ds.data.pool import Pool
from uft_ds.data.source import SourceState
from uft_ds.engine.engine import Engine
from uft_ds.errors import CheckFailed, UserError
from uft_ds.objectives.objective import Objective
from uft_ds.record.report import Reporter
from uft_ds.rollouts.answers import Generator, Question
from uft_ds.rollouts.first_rank import on_first_rank
from uft_ds.rollouts.gate import check_served
from uft_ds.rollouts.handover import Handover, take_policy
from uft_ds.rollouts.made import made_of, problems_at_the_start
from uft_ds.rollouts.record import Group, RecordFolder, StepRecord
from uft_ds.rollouts.scoring import StepScoring
from uft_ds.rollouts.stream_scorer import StreamScorer
from uft_ds.streams.policy import Policy

_KL = "kl"
"""Key of the source's state."""


@dataclass(frozen=True)
class Rules:
    """What a step's content is decided and judged by, besides the plan, the policy and the scorers.

    seed: the run's. max_dropped: largest share of a step's prompts that may be left out; one prompt always may.
    dtype: of the base, which decides how far served log-probs may be from our own.
    objective: by which the answers are trained on.
    tokenizer: the hash of the tokenizer and chat template that prompts and answers are of.
    max_kl: nats; the run ends once the answers of a step are further from the reference in their mean; None: never.
    """

    seed: int
    max_dropped: float
    dtype: torch.dtype
    objective: Objective
    tokenizer: str
    max_kl: float | None = None


@dataclass(frozen=True)
class Live:
    """A run that generates.

    scoring: on rank 0; None on the others. stream_scorer: on every rank, if a reward model on the policy's base scores.
    """

    generator: Generator
    scoring: StepScoring | None
    stream_scorer: StreamScorer | None = None


@dataclass(frozen=True)
class Replayed:
    """A run that trains on what another one has recorded.

    is_of_this_base: whether that one had this run's base. Fresh adapters have one hash on any base of their shapes.
    """

    record: RecordFolder
    is_of_this_base: bool = True


class Rollouts:
    """The steps of an online run, as a `StepSource`."""

    def __init__(
        self,
        plan: Steps,
        pools: Seq[Pool],
        rules: Rules,
        made_by: Live | Replayed,
        record: RecordFolder,
        engine: Engine,
        policy: Policy,
        reporter: Reporter,
    ) -> None:
        """
        Args:
            plan: which prompts and which fixed data each step takes.
            pools: the training sources that the plan draws from; the online ones are `Asked`.
            record: of this run.
        """
        self._plan, self._pools, self._rules, self._made_by = plan, pools, rules, made_by
        self._record, self._engine, self._policy, self._reporter = record, engine, policy, reporter
        self._has_looked = self._has_said_whose = self._has_compared = False
        self._kl = math.nan

    def __len__(self) -> int:
        return len(self._plan)

    def state(self) -> SourceState:
        """That of the plan, and the last step's divergence: what was generated is in the record."""
        return {**self._plan.state(), **({} if math.isnan(self._kl) else {_KL: self._kl})}

    def restore(self, state: SourceState) -> None:
        """Return to the position at which `state` was taken; see `Steps.restore`."""
        self._plan.restore({key: value for key, value in state.items() if key != _KL})
        self._kl = float(state.get(_KL, math.nan))

    @property
    def ended(self) -> str:
        """That the answers of the last step were further from the reference than `generator.max_kl`."""
        limit = self._rules.max_kl
        if limit is None or not self._kl > limit:
            return ""
        return (
            f"the policy's answers are {self._kl:.3g} nats from the reference in the mean of the last step, more than "
            f"generator.max_kl {limit:g}"
        )

    def step(self, n: int) -> Step:
        """Step n, counted from 0. Every rank must call it, in the order of the steps.

        Raises:
            CheckFailed: too many prompts lack an answer, the generator is lost, or a record is of other prompts.
            UserError: the record or a scorer cannot be used. Stopped: the run is to stop.
        """
        asked = self._asked(n)
        if not asked:
            return self._plan.step(n)
        started = time.perf_counter()
        handover = take_policy(self._engine, self._policy, n)
        if isinstance(self._made_by, Replayed):
            record = self._of_other_run(self._made_by, n, asked)
            is_replayed, is_of_this_base = True, self._made_by.is_of_this_base
        else:
            found = self._own(n, asked, handover)
            is_replayed, is_of_this_base = found is not None, True
            record = self._generated(self._made_by, n, asked, handover) if found is None else found
        is_own = is_of_this_base and record.policy == handover.version.digest
        if not is_own and not self._has_said_whose:
            self._has_said_whose = True
            self._reporter.warn(
                f"step {n + 1}: another policy than the one that is trained now has given the recorded answers; from "
                "here on they are scored data, as those of any other source"
            )
        groups = iter(record.groups)

        def unit_of(source: int, unit: int, pair_id: int) -> Unit:
            pool = self._pools[source]
            return sequences_of(next(groups), is_own=is_own) if isinstance(pool, Asked) else pool.unit(unit, pair_id)

        step = self._plan.step_of(n, unit_of)
        made = made_of(record.groups, record.seconds, time.perf_counter() - started, is_replayed=is_replayed)
        if not is_replayed and not self._has_looked:
            self._has_looked = True
            for problem in problems_at_the_start(made, self._rules.objective):
                self._reporter.warn(problem)
        return Step(step.index, step.sequences, made)

    def accept(self, n: int, answers: OwnAnswers | None) -> Mapping[str, float]:
        """Measure how far the policy has gone, and compare the generator's log-probs with our own.

        Raises:
            CheckFailed: they differ by more than rounding. The record of the step is put aside then.
        """
        if answers is None:
            return {}
        self._kl = float(np.mean(answers.policy_R - answers.reference_R))  # NaN without a reference
        divergence = {} if math.isnan(self._kl) else {"rollouts/kl": self._kl}
        told_R = ~np.isnan(answers.served_R)
        if not told_R.any():
            return divergence
        own_R, served_R, tokens_R = (
            torch.from_numpy(values_R[told_R]) for values_R in (answers.policy_R, answers.served_R, answers.tokens_R)
        )
        try:
            gap = check_served(own_R, served_R, tokens_R, dtype=self._rules.dtype)
        except CheckFailed as error:
            if self._engine.rank == 0:
                self._record.refuse(n + 1, str(error))
            raise CheckFailed(str(error), by_all=True) from None  # all ranks have the same numbers
        return {**divergence, "rollouts/served_gap": gap.worst, "rollouts/served_gap_mean": gap.mean}

    def close(self) -> None:
        """End what generator and scorers have started."""
        if isinstance(self._made_by, Live):
            self._made_by.generator.close()
            if self._made_by.scoring is not None:
                self._made_by.scoring.close()

    def _asked(self, n: int) -> list[tuple[int, int]]:
        """(source, prompt) of each prompt of step n, in order."""
        return [(source, unit) for source, unit in self._plan.drawn(n) if isinstance(self._pools[source], Asked)]

    def _own(self, n: int, asked: Seq[tuple[int, int]], handover: Handover) -> StepRecord | None:
        """What an earlier start of this run has recorded of step n, if this very policy has answered these prompts."""
        record = on_first_rank(self._engine, f"record {n}", lambda: self._record.read(n + 1))
        if record is None:
            return None
        if record.policy != handover.version.digest:
            other = "of another policy (other settings or ranks since the checkpoint)"
        elif self._other_prompts(record, asked):
            other = "of other prompts (another number of steps or epochs since)"
        else:
            return record
        self._reporter.warn(f"step {n + 1}: its record is {other}; it is put aside, and the step is generated anew")
        return None

    def _check_scorers(self, live: Live, n: int) -> None:
        """Compare the scorers with those of the newest step that is recorded before step n; rank 0 alone.

        Raises:
            UserError: they are others: the run would learn two things.
        """
        assert live.scoring is not None
        now, then = live.scoring.identity(), self._record.scorers_before(n + 1)
        for number in now:
            if number in then and _what_scores(now[number]) != _what_scores(then[number]):
                raise UserError(
                    f"data.sources.{number}.score_by: the scorer is another one than in the steps before "
                    f"({now[number]} now, {then[number]} then); undo the change, or start a new run"
                )

    def _of_other_run(self, replayed: Replayed, n: int, asked: Seq[tuple[int, int]]) -> StepRecord:
        def copied() -> StepRecord:
            folder = replayed.record
            record = folder.read(n + 1)
            if record is None:
                raise UserError(f"generator.run: {folder.path}: holds no record of step {n + 1}; lower train.steps")
            problem = self._other_prompts(record, asked)
            if problem:
                raise CheckFailed(
                    f"generator.run: {folder.path}: step {n + 1}: {problem}; replay it with the recipe, the data and "
                    "the seed that it was made with"
                )
            if self._record.read(n + 1) != record:
                self._record.write(record)
            return record

        return on_first_rank(self._engine, f"replay {n}", copied)

    def _other_prompts(self, record: StepRecord, asked: Seq[tuple[int, int]]) -> str:
        """How the record's prompts differ from those that this run's plan asks in that step; empty if they do not."""
        if len(record.groups) != len(asked):
            return f"the record has answers to {len(record.groups)} prompts, the recipe draws {len(asked)}"
        for (source, unit), group in zip(asked, record.groups, strict=True):
            if group.prompt_ids != self._prompt_ids(source, unit):
                return f"the record has answers to {group.origin}, the recipe draws {self._prompt(source, unit)}"
            answers = self._online(source).answers
            if group.tokenizer != self._rules.tokenizer:
                return f"the record of {group.origin} is of another tokenizer or chat template"
            if not group.left_out and len(group.answers) != answers:
                return f"the record has {len(group.answers)} answers to {group.origin}, the recipe has {answers}"
        return ""

    def _generated(self, live: Live, n: int, asked: list[tuple[int, int]], handover: Handover) -> StepRecord:
        questions = list(self._questions(n, asked))
        generator, engine = live.generator, self._engine
        if not self._has_compared:
            on_first_rank(engine, f"scorers {n}", lambda: self._check_scorers(live, n))
            self._has_compared = True  # while this start goes on, a scorer cannot change
        total = sum(question.answers for question in questions)
        with self._reporter.phase(f"step {n + 1}: answering {len(questions)} prompts, {total} answers", announce=False):
            started = time.perf_counter()
            if generator.needs_adapter:
                on_first_rank(engine, f"publish {n}", lambda: generator.publish(handover.version, handover.tensors))
            if generator.on_all_ranks:
                answers, identity = generator.answer(questions), dict(generator.identity())
            else:
                # The identity before the scoring: a server that is asked for it later may be gone by then.
                answers, identity = on_first_rank(
                    engine, f"answers {n}", lambda: (generator.answer(questions), dict(generator.identity()))
                )
            seconds = {"generation": time.perf_counter() - started}
        rewards: dict[int, tuple[float, ...]] = {}

        def recorded() -> StepRecord:
            assert live.scoring is not None
            prompts = [(source, unit, self._prompt(source, unit)) for source, unit in asked]
            groups = live.scoring.scored(prompts, questions, answers, rewards)
            record = StepRecord(
                n + 1,
                handover.version.digest,
                identity,
                live.scoring.identity(),
                groups,
                seconds | {"scoring": time.perf_counter() - began},
            )
            self._record.write(record)
            problem = self._too_many_dropped(record)
            if problem is not None:
                self._record.refuse(n + 1, problem)
                raise CheckFailed(problem)
            return record

        with self._reporter.phase(f"step {n + 1}: scoring {total} answers", announce=False):
            began = time.perf_counter()
            if live.stream_scorer is not None:
                rewards |= live.stream_scorer.rewards([source for source, _ in asked], questions, answers)
            return on_first_rank(engine, f"scores {n}", recorded)

    def _questions(self, n: int, asked: Seq[tuple[int, int]]) -> Iterator[Question]:
        for place, (source, unit) in enumerate(asked):
            # By the place in the step too: a small source may give the same prompt twice.
            seed = int(np.random.SeedSequence([self._rules.seed, n, place]).generate_state(1)[0])
            yield Question(self._prompt_ids(source, unit), self._online(source).answers, seed)

    def _online(self, source: int) -> Asked:
        pool = self._pools[source]
        assert isinstance(pool, Asked)
        return pool

    def _prompt(self, source: int, unit: int) -> str:
        return self._online(source).origin(unit)

    def _too_many_dropped(self, record: StepRecord) -> str | None:
        left_out = [group for group in record.groups if group.left_out]
        allowed = max(1, int(self._rules.max_dropped * len(record.groups)))
        is_empty = len(left_out) == len(record.groups) == len(self._plan.drawn(record.number - 1))
        if len(left_out) <= allowed and not is_empty:
            return None
        first = left_out[0]
        return (
            f"step {record.number}: {len(left_out)} of {len(record.groups)} prompts would be left out, because an "
            f"answer or a score is missing; the first is {first.origin}: {first.left_out}. generator.max_dropped "
            f"allows {self._rules.max_dropped:g}"
        )

    def _prompt_ids(self, source: int, unit: int) -> tuple[int, ...]:
        return tuple(self._online(source).prompt(unit).token_ids_T.tolist())


def _what_scores(scorer: Any) -> Any:
    """A scorer's recorded identity without the address at which a judge is asked, which may change."""
    if not isinstance(scorer, dict):
        return scorer
    return {key: _what_scores(value) for key, value in scorer.items() if key != "url"}


def sequences_of(group: Group, *, is_own: bool) -> Unit:
    """The answers to one prompt as sequences; none if the prompt is left out.

    Args:
        is_own: whether the policy that is trained has given them.
    """
    numbers = range(0 if group.left_out else len(group.answers))
    return tuple(_sequence(group, number, is_own=is_own) for number in numbers)


def _sequence(group: Group, number: int, *, is_own: bool) -> Sequence:
    answer = group.answers[number]
    assert answer.score is not None, "the prompt of an answer without a score is left out"
    told = {} if answer.logp is None else {SERVED: answer.logp}
    facts = {ONLINE: 1.0, **told} if is_own else {}
    start = len(group.prompt_ids)
    response = Response(
        start,
        start + len(answer.ids),
        answer.score,
        "score",
        f"{group.origin} answer {number + 1}",
        other_facts=facts,
    )
    return Sequence(np.array([*group.prompt_ids, *answer.ids], dtype=np.int32), (response,))
