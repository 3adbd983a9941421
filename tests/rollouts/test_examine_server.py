"""The examination of a server: a good one passes, and each lack is a problem with the flag that mends it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from policies import SAMPLING, TinyPolicy
from stand_in_server import ALWAYS, Loaded, StandIn, stand_in, with_adapter
from tiny import VOCAB_SIZE

from uft_ds.doctor.finding import Finding
from uft_ds.errors import UserError
from uft_ds.rollouts.adapter_versions import Adapters, write_version
from uft_ds.rollouts.answers import Sampling
from uft_ds.rollouts.examine import Examined, Needed, examine_server, refuse_problems
from uft_ds.rollouts.gate import check_served
from uft_ds.rollouts.server import Server


@pytest.fixture(scope="module")
def policy(tiny_qwen2: Path) -> TinyPolicy:
    return TinyPolicy(tiny_qwen2)


@pytest.fixture
def server(tiny_qwen2: Path) -> Iterator[StandIn]:
    with stand_in(tiny_qwen2) as running:
        yield running


def needed(policy: TinyPolicy, folder: Path, **changes: Any) -> Needed:
    shapes = {name: tuple(tensor.shape) for name, tensor in policy.version(0)[1].items()}
    adapters = Adapters(folder / "adapters", policy.config, "toy")
    defaults = {
        "sampling": SAMPLING, "adapters": adapters, "shapes": shapes, "vocab_size": VOCAB_SIZE, "tokens": 128,
        "dtype": torch.float32,
    }  # fmt: skip
    return Needed(**defaults | changes)


def problem(examined: Examined) -> str:
    """The only problem, as a user reads it."""
    assert [one.state for one in examined.findings].count("problem") == 1
    with pytest.raises(UserError) as raised:
        refuse_problems(examined)
    return str(raised.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_good_server_passes(tiny_qwen2: Path, policy: TinyPolicy, tmp_path: Path, dtype: torch.dtype) -> None:
    """Nothing stays on the server or on the disk, the doctor can show each line, and the base's answer is its own."""
    with stand_in(tiny_qwen2, dtype=dtype) as server:
        examined = examine_server(Server(server.url), needed(policy, tmp_path, dtype=dtype))
        assert not server.adapters
        assert len(server.loads) == 2
    assert not list((tmp_path / "adapters").iterdir())
    refuse_problems(examined)
    assert {one.state for one in examined.findings} == {"ok"}
    for one in examined.findings:
        assert Finding(one.name, one.state, one.found, one.remedy).found
    assert examined.answer is not None
    row = torch.tensor([examined.prompt + examined.answer.token_ids])
    with torch.no_grad(), policy.model.disable_adapter():
        logps = policy.model(input_ids=row).logits[0, :-1].float().log_softmax(-1)
    own = logps.gather(-1, row[0, 1:, None])[len(examined.prompt) - 1 :].sum()
    served = torch.tensor(examined.answer.logps).sum()
    check_served(own[None], served[None], torch.tensor([len(examined.answer.token_ids)]), dtype=dtype)


def test_a_server_that_is_not_there(policy: TinyPolicy, tmp_path: Path) -> None:
    """The command that starts one, with the run's rank."""
    said = problem(examine_server(Server("http://127.0.0.1:1"), needed(policy, tmp_path)))
    for words in (
        "http://127.0.0.1:1", "no connection", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve MODEL",
        "--enable-lora", "--max-lora-rank 8", "--max-loras 1 --max-cpu-loras 2",
        "--generation-config vllm", "--dtype float32",
    ):  # fmt: skip
        assert words in said


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"takes_adapters": False}, "environment lacks VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"),
        ({"max_rank": 2}, "its --max-lora-rank is below 4"),
        ({"max_length": 64}, "--max-model-len 128"),
    ],
)
def test_a_server_with_other_flags(
    tiny_qwen2: Path, policy: TinyPolicy, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    """The flag that is missing."""
    with stand_in(tiny_qwen2, **settings) as server:
        assert words in problem(examine_server(Server(server.url), needed(policy, tmp_path)))


def test_another_model_name_is_refused(policy: TinyPolicy, server: StandIn, tmp_path: Path) -> None:
    """With the names that the server has."""
    said = problem(examine_server(Server(server.url, "qwen"), needed(policy, tmp_path)))
    assert "'qwen' given" in said
    assert "'base'" in said
    refuse_problems(examine_server(Server(server.url, "base"), needed(policy, tmp_path)))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("base", "changes nothing: base answers in its place"),
        ("nan_adapter", "log-prob is nan"),
        ("fewer_logps", "token_ids and"),
        ("error_400", "maximum context"),
    ],
)
def test_a_server_that_does_something_else(
    policy: TinyPolicy, server: StandIn, tmp_path: Path, fault: str, words: str
) -> None:
    """Adapters that are passed over are seen by the one that must change the answers."""
    server.faults[fault] = ALWAYS
    assert words in problem(examine_server(Server(server.url), needed(policy, tmp_path)))
    assert not server.adapters


def test_an_adapter_of_zeros_must_change_nothing(policy: TinyPolicy, server: StandIn, tmp_path: Path) -> None:
    """A server that answers by an adapter that it was given before."""
    path = write_version(Adapters(tmp_path / "other", policy.config, "other"), *policy.version(5))
    server.loads.append(Loaded(str(path), with_adapter(server, path)))
    server.faults["stale"] = ALWAYS
    assert "an adapter of zeros changes the log-probs" in problem(
        examine_server(Server(server.url), needed(policy, tmp_path))
    )


def test_log_probs_after_temperature_matter_where_there_is_one(
    policy: TinyPolicy, server: StandIn, tmp_path: Path
) -> None:
    """At temperature 1 and top_p 1 both kinds are the same numbers."""
    server.is_raw = False
    refuse_problems(examine_server(Server(server.url), needed(policy, tmp_path)))
    cold = needed(policy, tmp_path, sampling=Sampling(0.7, 1.0, 8, ()))
    assert "--logprobs-mode processed_logprobs" in problem(examine_server(Server(server.url), cold))
