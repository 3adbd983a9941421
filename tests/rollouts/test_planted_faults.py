"""Every fault that a server was given, one step of a run each, and by what words the user is told of it.

A step publishes a version, asks, and compares served log-probs with PEFT's own, as a run does. A fault ends it by an
exception, or it is waited for and told, and the answers are those of a server without it. How each is caught, and how
fast, is in `test_served_faults.py`; what bfloat16 lets pass, in `test_gate.py`.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from policies import TinyPolicy, answered, generator_of, tiny_questions
from stand_in_server import ALWAYS, FAULTS, StandIn, stand_in

from uft_ds.errors import CheckFailed, GeneratorLost
from uft_ds.rollouts import server as server_module
from uft_ds.rollouts.answers import Answers, Unanswered
from uft_ds.rollouts.gate import check_served
from uft_ds.rollouts.served import Limits, ServedGenerator
from uft_ds.scoring import pacing

OTHER_POLICY = "policy that answered is not the one that is trained"


@dataclass
class Scene:
    """A run at its second version. published: whether the server has it; faults are planted before or after that."""

    server: StandIn
    policy: TinyPolicy
    generator: ServedGenerator
    events: list[str]

    def step(self, plant: Callable[[Scene], None], *, late: bool) -> list[Answers]:
        """One step, with a fault from before the version is published, or from after it."""
        version, tensors = self.policy.version(2)
        if not late:
            plant(self)
        self.generator.publish(version, tensors)
        if late:
            plant(self)
        questions = tiny_questions(3, answers=2)
        found = self.generator.answer(questions)
        for one in found:
            if isinstance(one, Unanswered):
                raise CheckFailed(one.reason)  # a run counts these, and ends by too many
        own, served, tokens = self.policy.own(tensors, answered(questions, found))
        check_served(own, served, tokens, dtype=torch.float32)
        return found


@dataclass(frozen=True)
class Planted:
    """A fault. end: the exception by which the step ends; None: it does not, and the words are an event's.

    late: whether it begins after the version was published. patience: seconds that a lost server is waited for; short
    where it never comes back. at_once: questions of the step's six.
    """

    plant: Callable[[Scene], None]
    words: str
    end: type[Exception] | None = CheckFailed
    late: bool = True
    patience: float = 4.0
    at_once: int = 4


def lost(plant: Callable[[Scene], None], words: str) -> Planted:
    """A server that does not come back."""
    return Planted(plant, words, GeneratorLost, patience=1.0)


def switched_on(fault: str, times: int = ALWAYS) -> Callable[[Scene], None]:
    def plant(scene: Scene) -> None:
        scene.server.faults[fault] = times

    return plant


def gone(scene: Scene) -> None:
    scene.server.stop()


def started_again(scene: Scene) -> None:
    scene.server.stop()
    threading.Timer(0.3, scene.server.start).start()


def started_again_on_another_base(scene: Scene) -> None:
    """The parameters of this server's own copy of the model."""
    scene.server.stop()
    with torch.no_grad():
        for parameter in scene.server.model.parameters():
            parameter.mul_(1.5)
    scene.server.start()


def started_again_without_adapters(scene: Scene) -> None:
    scene.server.takes_adapters = False
    scene.server.stop()
    scene.server.start()


def started_again_for_smaller_ranks(scene: Scene) -> None:
    scene.server.max_rank = 2
    scene.server.stop()
    scene.server.start()


def without_the_disk(scene: Scene) -> None:
    scene.server.sees_disk = False


PLANTED = {
    # weights of another policy, in replies that look right
    "stale": Planted(switched_on("stale"), OTHER_POLICY),
    "base": Planted(switched_on("base"), OTHER_POLICY),
    "other_ids": Planted(switched_on("other_ids"), OTHER_POLICY),
    "scale": Planted(switched_on("scale"), OTHER_POLICY, late=False),
    "missing_layers": Planted(switched_on("missing_layers"), OTHER_POLICY, late=False),
    # replies that cannot be
    "nan_adapter": Planted(switched_on("nan_adapter"), "log-prob is nan", late=False),
    "nan_logps": Planted(switched_on("nan_logps"), "log-prob is nan"),
    "fewer_logps": Planted(switched_on("fewer_logps"), r"\d token_ids and \d log-probs"),
    "clamped_logps": Planted(switched_on("clamped_logps"), r"log-prob is -9999\.0"),
    "positive_logps": Planted(switched_on("positive_logps"), r"log-prob is 0\.5"),
    "finish_lies": Planted(switched_on("finish_lies"), "finish_reason is"),
    "cut_short": Planted(switched_on("cut_short"), "finish_reason is 'length' after"),
    "other_prompt": Planted(switched_on("other_prompt"), "answers another prompt"),
    "other_name": Planted(switched_on("other_name"), "answers by 'base'"),
    "no_tokens": Planted(switched_on("no_tokens"), "expected at least one"),
    # requests that are refused, or too slow
    "error_400": Planted(switched_on("error_400"), "refuses a prompt of .* maximum context length"),
    "slow": Planted(switched_on("slow"), r"no answer within 1\.5 s, asked 2 times", at_once=6),
    # a server that comes back
    "cut, for a while": Planted(switched_on("cut", 4), "the connection was cut .* waited for", None),
    "error_500, for a while": Planted(switched_on("error_500", 4), "EngineCore encountered .* waited for", None),
    "aborts, for a while": Planted(switched_on("aborts", 4), "aborted the request.* waited for", None),
    "restarts": Planted(switched_on("restarts", 2), "does not exist.* waited for", None),
    "started again, without the adapter": Planted(started_again, "no connection.* waited for", None),
    "gone between two steps, for a while": Planted(started_again, "no connection.* waited for", None, late=False),
    "slow_load": Planted(switched_on("slow_load", 1), "no answer within .* waited for", None, late=False),
    # a server that does not, or that comes back as another one
    "gone": lost(gone, "no answer for .*no connection.*--resume"),
    "hangs": lost(switched_on("hangs"), "no answer for .*no answer within.*--resume"),
    "cut": lost(switched_on("cut"), "no answer for .*connection was cut.*--resume"),
    "error_500": lost(switched_on("error_500"), "no answer for .*EngineCore.*--resume"),
    "aborts": lost(switched_on("aborts"), "no answer for .*aborted the request.*--resume"),
    "restarts, always": lost(switched_on("restarts"), "no answer for .*does not exist.*--resume"),
    "another base": Planted(started_again_on_another_base, "come back as another one"),
    "another base, between two steps": Planted(started_again_on_another_base, OTHER_POLICY, late=False),
    "no adapters": Planted(started_again_without_adapters, "VLLM_ALLOW_RUNTIME_LORA_UPDATING", GeneratorLost),
    "no adapters, between two steps": Planted(
        started_again_without_adapters, "VLLM_ALLOW_RUNTIME_LORA_UPDATING", GeneratorLost, late=False
    ),
    "a smaller --max-lora-rank": Planted(started_again_for_smaller_ranks, "greater than max_lora_rank", GeneratorLost),
    "half_written": Planted(switched_on("half_written"), "does not take .* deserializing", GeneratorLost, late=False),
    "another disk": Planted(without_the_disk, "No adapter found .* disk that the server", GeneratorLost, late=False),
}


@pytest.fixture(scope="module")
def policy(tiny_qwen2: Path) -> TinyPolicy:
    return TinyPolicy(tiny_qwen2)


@pytest.fixture
def scene(
    name: str, policy: TinyPolicy, tiny_qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Scene]:
    """Of the fault by its name."""
    monkeypatch.setattr(pacing, "FIRST_WAIT_SECONDS", 0.02)
    monkeypatch.setattr(server_module, "_QUESTION_SECONDS", 1.0)
    monkeypatch.setattr(server_module, "_LOAD_SECONDS", 1.5)
    with stand_in(tiny_qwen2, slow_seconds=2.5) as server:
        events: list[str] = []
        limits = Limits(PLANTED[name].at_once, 1.5, PLANTED[name].patience)
        generator = generator_of(server.url, policy, tmp_path, limits=limits, events=events)
        generator.publish(*policy.version(1))
        yield Scene(server, policy, generator, events)


@pytest.fixture(scope="module")
def expected(policy: TinyPolicy, tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Answers]:
    """The answers of a server without faults."""
    with stand_in(tiny_qwen2) as server:
        events: list[str] = []
        generator = generator_of(server.url, policy, tmp_path_factory.mktemp("good"), events=events)
        found = Scene(server, policy, generator, events).step(lambda scene: None, late=False)
    assert not events
    return found


@pytest.mark.parametrize("name", PLANTED)
def test_it_is_caught_and_named(scene: Scene, expected: list[Answers], name: str) -> None:
    """By the exception or the event of the table, in its words; no step with a fault passes in silence."""
    planted = PLANTED[name]
    if planted.end is None:
        assert scene.step(planted.plant, late=planted.late) == expected
        (lost, back) = scene.events
        assert scene.server.url in lost
        assert re.search(planted.words, lost)
        assert "answers again" in back
        return
    with pytest.raises(planted.end, match=f"(?s){planted.words}") as raised:
        scene.step(planted.plant, late=planted.late)
    assert type(raised.value) is planted.end


def test_all_faults_of_the_stand_in_are_planted() -> None:
    """Each that it can do is in the table, under its name, and the table has no fewer than it had."""
    assert len(FAULTS) == 24
    assert {name.split(",")[0] for name in PLANTED} >= set(FAULTS)
    assert len(PLANTED) == 37
