"""Bad input ends with exit code 2 and one message that names it, before anything is launched or written."""

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from runs import TIMEOUT_SECONDS, forked, program, settings_of_run, uft, write_recipe, write_rows
from tiny import CHATML, VOCAB_SIZE, build_tiny_model, rope_of
from toy import saved_adapter

from uft_ds.errors import UserError
from uft_ds.host.ports import free_port
from uft_ds.run.prepare import prepare_run

ROW = {"prompt": "a", "response": "b"}

FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "no rows"),
    "malformed": (b'{"prompt": "a", "response": "b"}\n{"prompt": \n', "rows.jsonl:2"),
    "score above 1": (b'{"prompt": "a", "response": "b", "score": 1.5}\n', "rows.jsonl:1"),
    "score NaN": (b'{"prompt": "a", "response": "b", "score": NaN}\n', "NaN"),
    "score as text": (b'{"prompt": "a", "response": "b", "score": "0.7"}\n', "'0.7'"),
    "empty response": (b'{"prompt": "a", "response": "  "}\n', "'response' is empty"),
    "not UTF-8": (b'{"prompt": "a", "response": "b"}\n{"prompt": "\xff", "response": "b"}\n', "rows.jsonl:2"),
    "nothing fits": (b'{"prompt": "a", "response": "%s"}\n' % (b"b" * 200), "1 longer than max_length"),
}


def refused(recipe: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        prepare_run(settings_of_run(recipe, *overrides), overwrite=False)
    return str(caught.value)


@pytest.mark.parametrize("case", FILES)
def test_a_bad_file_is_refused_by_name_and_line(tiny_qwen2: Path, tmp_path: Path, case: str) -> None:
    """The message names the file and line and what was found; the output folder is never made."""
    content, expected = FILES[case]
    recipe = write_recipe(tmp_path, tiny_qwen2)
    (tmp_path / "rows.jsonl").write_bytes(content)
    message = refused(recipe, f"data.sources.0.path={tmp_path / 'rows.jsonl'}")
    assert "rows.jsonl" in message
    assert expected in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.sources.0.path=nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("data.sources.0.format=jsonline", "did you mean 'jsonl'"),
        ("data.sources.0.examples=17", "give only 16 responses"),
        ("model.base=nowhere", "model.base"),
        ("model.chat_template=nowhere.jinja", "model.chat_template"),
        ("deepspeed=zero4", "zero3_cpu"),
        ("reference.adapter=nowhere", "reference.adapter: nowhere: no such folder"),
        ("reference.adapter=.", "reference.adapter: "),
        ("reference.cache_dir=/proc/nowhere", "reference.cache_dir: /proc/nowhere cannot be written"),
    ],
)
def test_a_bad_recipe_value_is_refused_by_key(tiny_qwen2: Path, tmp_path: Path, override: str, expected: str) -> None:
    """The message names the key or path, and nothing is written."""
    assert expected in refused(write_recipe(tmp_path, tiny_qwen2), override)
    assert not (tmp_path / "run").exists()


def test_nothing_shared_may_lie_in_the_output(tiny_qwen2: Path, tmp_path: Path) -> None:
    """A run's folder may be emptied: a cache in it is refused before anything is made."""
    recipe = write_recipe(tmp_path, tiny_qwen2)
    message = refused(recipe, f"reference.cache_dir={tmp_path / 'run' / 'cache'}")
    assert "output: " in message
    assert "give another folder for the run" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_change_with_the_longest_sequence_are_refused(
    tiny_qwen2: Path, tmp_path: Path, kind: str
) -> None:
    """Past the model's own length such embeddings depend on the neighbours; up to it they do not."""
    base = tmp_path / "base"
    shutil.copytree(tiny_qwen2, base)
    config = json.loads((base / "config.json").read_text())
    config |= {"rope_parameters": rope_of(kind, 60), "max_position_embeddings": 60}
    (base / "config.json").write_text(json.dumps(config))
    recipe = write_recipe(tmp_path, base)
    assert f"data.max_length: 64 is past the 60 positions of this model, whose '{kind}'" in refused(recipe)
    prepare_run(settings_of_run(recipe, "data.max_length=60"), overwrite=False)[2].close()


def test_a_family_without_lockstep_is_refused_by_its_layers(tiny_qwen2: Path, tmp_path: Path) -> None:
    """Before the launch, by the class and with the way out, which is then taken."""
    from transformers import CohereConfig, CohereForCausalLM

    base = tmp_path / "base"
    shutil.copytree(tiny_qwen2, base)
    config = CohereConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, logit_scale=0.5,
    )  # fmt: skip
    CohereForCausalLM(config).save_pretrained(base)
    recipe = write_recipe(tmp_path, base)
    message = refused(recipe)
    assert "reference.mode: lockstep has not been shown to work with CohereForCausalLM" in message
    assert "CohereDecoderLayer" in message
    prepare_run(settings_of_run(recipe, "reference.mode=separate"), overwrite=False)[2].close()


def test_an_adapter_of_another_base_is_refused(tiny_qwen2: Path, tmp_path: Path) -> None:
    """Of the same shape it would load without a word. The same weights elsewhere are the same base."""
    one, other = tmp_path / "one", tmp_path / "other"
    shutil.copytree(tiny_qwen2, one)
    build_tiny_model(other, seed=7)
    adapter = f"reference.adapter={saved_adapter(one, tmp_path / 'adapter')}"
    message = refused(write_recipe(tmp_path, other), adapter)
    assert f"was trained on {one}, model.base is {other}" in message
    prepare_run(settings_of_run(write_recipe(tmp_path, tiny_qwen2), adapter), overwrite=False)[2].close()
    shutil.rmtree(one)
    assert f"was trained on {one}" in refused(write_recipe(tmp_path, other), adapter, f"output={tmp_path / 'again'}")


NO_NODES = "deepspeed: zero3_node: zero_optimization.zero_hpz_partition_size: 8 found, expected a divisor of the 2"


def test_copies_in_nodes_that_are_no_nodes_are_refused(tiny_qwen2: Path, tmp_path: Path) -> None:
    """zero3_node is for nodes of 8 GPUs: `uft train` on 2 ranks ends before the model is read."""
    recipe = write_recipe(tmp_path, tiny_qwen2, deepspeed="zero3_node")
    result = uft("train", str(recipe))
    assert result.returncode == 2, result.stdout + result.stderr
    assert NO_NODES in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_ranks_refuse_copies_in_nodes_that_are_no_nodes(tiny_qwen2: Path, tmp_path: Path) -> None:
    """As `uft train` does, where another launcher has started them."""
    recipe = write_recipe(tmp_path, tiny_qwen2, deepspeed="zero3_node")
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        program("uft_ds.train", str(recipe), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", **here)
        for rank in range(2)
    ]
    try:
        assert NO_NODES in ranks[0].communicate(timeout=TIMEOUT_SECONDS)[1]
        assert ranks[0].returncode == 2
    finally:  # as a launcher ends the others
        for rank in ranks:
            rank.kill_group()


def test_a_misspelt_deepspeed_key_is_refused(tiny_qwen2: Path, tmp_path: Path) -> None:
    """DeepSpeed itself ignores it without a word."""
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimisation": {"stage": 3}, "zero_optimization": {"stage": 3}}')
    assert "did you mean 'zero_optimization'" in refused(write_recipe(tmp_path, tiny_qwen2), f"deepspeed={file}")


def test_a_tokenizer_without_chat_template_says_how_to_give_one(tiny_qwen2: Path, tmp_path: Path) -> None:
    """The message names the recipe key; with the key, the same base is accepted."""
    base = tmp_path / "base"
    shutil.copytree(tiny_qwen2, base)
    (base / "chat_template.jinja").unlink()
    recipe = write_recipe(tmp_path, base)
    assert "model.chat_template" in refused(recipe)
    (tmp_path / "chat.jinja").write_text(CHATML)
    given = settings_of_run(recipe, f"model.chat_template={tmp_path / 'chat.jinja'}")
    prepare_run(given, overwrite=False)[2].close()


def test_the_command_ends_with_2_and_no_traceback(tiny_qwen2: Path, tmp_path: Path) -> None:
    """`uft train` on a malformed line: one message on stderr, exit code 2, nothing left behind."""
    recipe = write_recipe(tmp_path, tiny_qwen2)
    (tmp_path / "instruction.jsonl").write_text('{"prompt": "a"\n')
    result = uft("train", str(recipe))
    assert result.returncode == 2
    assert "instruction.jsonl:1" in result.stderr
    assert "Traceback" not in result.stderr
    first, *others = result.stderr.strip().splitlines()
    assert first.startswith("error: ")
    assert "data.on_bad_row: quarantine" in others[-1]
    assert not (tmp_path / "run").exists()


def test_a_port_in_use_is_refused(tiny_qwen2: Path, tmp_path: Path) -> None:
    """By `uft train` before anything is written, and by a rank that a launcher started."""
    recipe = write_recipe(tmp_path, tiny_qwen2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = uft("train", str(recipe), MASTER_PORT=port)
        assert result.returncode == 2
        assert f"port {port} is in use" in result.stderr
        environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        result = forked("uft_ds.train", str(recipe), MASTER_PORT=port, **environment)
        assert result.returncode == 2
        assert port in result.stderr
        assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_response_that_does_not_fit_is_counted(tiny_qwen2: Path, tmp_path: Path) -> None:
    """One of two rows is too long: one is kept, one is reported with its place, none has an empty mask."""
    recipe = write_recipe(tmp_path, tiny_qwen2)
    rows: list[dict[str, Any]] = [ROW, {"prompt": "a", "response": "b" * 200}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    overrides = (f"data.sources.0.path={path}",)
    _, data, lock = prepare_run(settings_of_run(recipe, *overrides), overwrite=False)
    lock.close()
    selection = data.train[0].selection
    assert selection.num_responses == 1
    assert data.train[0].account.dropped == {"longer than max_length": 1}
    assert selection.store.places_of("longer than max_length") == (f"{path}:2",)
    assert all(r.num_tokens > 0 for s in selection.unit(0) for r in s.responses)


class Payload:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, (self.path,)  # type: ignore[return-value]


def test_code_in_pickled_base_weights_is_never_run(tiny_qwen2: Path, tmp_path: Path) -> None:
    """Invariant 8: a base whose only weights are a pickle with code in it is refused, and the code does not run."""
    import shutil

    import torch

    from uft_ds.streams.load import load_base

    base = tmp_path / "base"
    shutil.copytree(tiny_qwen2, base)
    (base / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Payload(tmp_path / "executed")}, base / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"model\.base"):
        load_base(str(base), revision=None, dtype=torch.float32, attention="sdpa", gradient_checkpointing=False)
    assert not (tmp_path / "executed").exists()


def test_a_base_with_code_of_its_own_is_refused(tiny_qwen2: Path, tmp_path: Path) -> None:
    """Invariant 8: `auto_map` in config.json asks to run a file of the base's folder."""
    import json
    import shutil

    base = tmp_path / "base"
    shutil.copytree(tiny_qwen2, base)
    config = json.loads((base / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_mine.Mine"}
    (base / "config.json").write_text(json.dumps(config))
    assert "auto_map" in refused(write_recipe(tmp_path, base))
