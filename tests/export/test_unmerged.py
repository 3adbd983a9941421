"""What answers unmerged: one tokenizer and template, one identity and one model for benchmarks and for generation."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import files_below, whole_checkpoint
from peft import LoraConfig, get_peft_model
from runs import settings_of_run, write_recipe
from safetensors.torch import load_file
from tiny import CHATML, build_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from uft_ds.checkpoint.manifest import write_manifest
from uft_ds.cli import app
from uft_ds.errors import UserError
from uft_ds.evaluation.generate import prompt_ids
from uft_ds.evaluation.models import open_subject
from uft_ds.export.convert import convert_to_adapter
from uft_ds.export.unmerged import opened_unmerged
from uft_ds.run.prepare import prepare_run

CPU = torch.device("cpu")
ASKED = [{"role": "user", "content": "How many?"}]


def adapter_of(base: Path, folder: Path) -> Path:
    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, a chat template of the run's own, and a run with one checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    base = build_tiny_model(folder / "base", "qwen2", tied=False)
    (folder / "chat.jinja").write_text(f"Be kind. {CHATML}")
    recipe = write_recipe(folder, base, data__workers=1)
    settings = settings_of_run(recipe, f"model.chat_template={folder / 'chat.jinja'}")
    prepare_run(settings, overwrite=False)[2].close()
    checkpoint = whole_checkpoint(folder / "run" / "checkpoints" / "step-000002")
    shutil.rmtree(checkpoint / "adapter")
    adapter_of(base, checkpoint / "adapter")
    write_manifest(checkpoint, files_below(checkpoint))
    return folder


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def prompts(source: Path, chat_template: Path | None = None) -> tuple[list[int], list[int]]:
    """Of `uft generate` and of `uft eval --chat-template`."""
    subject = open_subject(str(source), chat_template=chat_template)
    with opened_unmerged(str(source), None, chat_template=chat_template) as found:
        of_eval = found.tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False)
        assert found.identity() == subject.identity
        assert found.name == subject.name
    return prompt_ids(subject.chat.tokenizer, ASKED), list(of_eval)


def kind_of(ids: list[int], base: Path) -> bool:
    """Whether a prompt was written by the run's template."""
    return str(AutoTokenizer.from_pretrained(base).decode(ids)).startswith("Be kind. ")


def test_both_commands_write_one_prompt(trained: Path, tmp_path: Path) -> None:
    """Of a run its own template, of an adapter that beside it, else the base's; a file in place of any of them."""
    base = trained / "base"
    converted = convert_to_adapter(trained / "run", tmp_path / "converted").folder
    bare = adapter_of(base, tmp_path / "bare")
    other = tmp_path / "other.jinja"
    other.write_text(CHATML)
    for source, template, is_kind in (
        (trained / "run", None, True),
        (converted, None, True),
        (bare, None, False),
        (base, None, False),
        (trained / "run", other, False),
        (converted, other, False),
    ):
        of_generate, of_eval = prompts(source, template)
        assert of_generate == of_eval
        assert kind_of(of_generate, base) == is_kind


def test_a_run_whose_template_was_edited_answers_to_none(trained: Path, tmp_path: Path) -> None:
    """Nor with a file in its place: what the run was trained with is checked first."""
    template, other = trained / "chat.jinja", tmp_path / "other.jinja"
    other.write_text(CHATML)
    text = template.read_text()
    template.write_text(f"Be brief. {CHATML}")
    try:
        for given in (None, other):
            with pytest.raises(UserError, match="not the one that the run was trained with"):
                open_subject(str(trained / "run"), chat_template=given)
            with pytest.raises(UserError, match="not the one that the run was trained with"):
                opened_unmerged(str(trained / "run"), None, chat_template=given).__enter__()
    finally:
        template.write_text(text)


def test_a_template_file_that_cannot_be_used_is_named(trained: Path, tmp_path: Path) -> None:
    """By the option: the command has no recipe."""
    with pytest.raises(UserError, match=r"^--chat-template: .*none\.jinja cannot be read"):
        open_subject(str(trained / "base"), chat_template=tmp_path / "none.jinja")
    (tmp_path / "open.jinja").write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    with pytest.raises(UserError, match=r"^--chat-template: .*open\.jinja: "):
        open_subject(str(trained / "base"), chat_template=tmp_path / "open.jinja")


def test_an_adapter_is_not_rounded_to_its_bases_type(trained: Path, tmp_path: Path) -> None:
    """On a base in bfloat16: every tensor as it is stored, in float32, as training and generation have it."""
    adapter = adapter_of(trained / "base", tmp_path / "adapter")
    with opened_unmerged(str(adapter), None) as found:
        model = found.load(torch.bfloat16, CPU)
    parameters = dict(model.named_parameters())
    assert {one.dtype for name, one in parameters.items() if "lora_" not in name} == {torch.bfloat16}
    stored = load_file(adapter / "adapter_model.safetensors")
    assert len(stored) == sum("lora_" in name for name in parameters)
    for name, tensor in stored.items():
        own = name.removeprefix("base_model.model.").replace(".weight", ".default.weight")
        assert torch.equal(parameters[own], tensor)
        assert not torch.equal(tensor.bfloat16().float(), tensor)


def test_an_identity_is_content(trained: Path, tmp_path: Path) -> None:
    """A copied base is the same model; another template or special token is another one, each under its own name."""
    copy = tmp_path / "copy"
    shutil.copytree(trained / "base", copy)
    with opened_unmerged(str(trained / "base"), None) as first, opened_unmerged(str(copy), None) as second:
        before = first.identity()
        assert second.identity() == before
        assert (first.origin()["base"], second.origin()["base"]) == (str(trained / "base"), str(copy))
        second.tokenizer.chat_template += " "
        assert {key for key, value in second.identity().items() if value != before[key]} == {"chat_template"}
        second.tokenizer.chat_template = first.tokenizer.chat_template
        second.tokenizer.eos_token = "<|im_end|>" if second.tokenizer.eos_token != "<|im_end|>" else "<|endoftext|>"
        assert {key for key, value in second.identity().items() if value != before[key]} == {"special_tokens"}


def test_the_working_directory_has_a_name(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's folder, and an adapter's."""
    adapter_of(trained / "base", tmp_path / "mine")
    for folder in (trained / "base", tmp_path / "mine"):
        monkeypatch.chdir(folder)
        with opened_unmerged(".", None) as found:
            assert found.name == folder.name


def test_more_tokens_than_rows_are_refused_by_both(trained: Path, tmp_path: Path) -> None:
    """When it is loaded, whether or not a prompt holds such a token."""
    base = tmp_path / "base"
    shutil.copytree(trained / "base", base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(base)
    with pytest.raises(UserError, match="has 260 tokens and the model's embedding 259 rows"):
        open_subject(str(base))
    with opened_unmerged(str(base), None) as found, pytest.raises(UserError, match="embedding 259 rows"):
        found.load(torch.float32, CPU)


def test_a_deepspeed_folder_is_told_how_to_convert(tmp_path: Path) -> None:
    """The commands have no --adapter-config, which only a conversion takes."""
    (tmp_path / "theirs" / "global_step5").mkdir(parents=True)
    (tmp_path / "theirs" / "global_step5" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    (tmp_path / "q.json").write_text('[{"instruction": "hi"}]')
    generate = ["--benchmark", "alpaca_eval", "--questions", str(tmp_path / "q.json"), "--out", str(tmp_path / "a")]
    with pytest.raises(UserError, match=r"convert it first with uft convert .* --to adapter --base BASE --adapter-con"):
        opened_unmerged(str(tmp_path / "theirs"), None).__enter__()
    result = CliRunner().invoke(app, ["generate", str(tmp_path / "theirs"), *generate])
    assert isinstance(result.exception, UserError)
    assert "convert it first with uft convert" in str(result.exception)
