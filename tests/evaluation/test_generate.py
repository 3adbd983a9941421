import copy
import json
import os
from pathlib import Path

import pytest
import torch
from tiny import IM_END, IM_START, MAX_LENGTH, build_tiny_model
from transformers import PreTrainedModel
from wrappers import build_wrapper

from uft_ds.errors import UserError
from uft_ds.evaluation import generate
from uft_ds.evaluation.generate import (
    LEAST_TEMPERATURE,
    Printer,
    chat,
    generate_responses,
    generation_config,
    left_pad,
    load_for_generation,
    prompt_ids,
    stop_token_ids,
    until_stop,
)

QUESTIONS = ["Hi", "A much longer question, about nothing at all", "héllo", "1 + 1 = ?", "x" * 70]
PROMPTS = [[{"role": "user", "content": question}] for question in QUESTIONS]


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def tiny(request, tmp_path_factory):
    """Model and tokenizer, loaded on the CPU whatever the machine has."""
    folder = build_tiny_model(tmp_path_factory.mktemp("model"), request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        return load_for_generation(folder)


def greedy(model: PreTrainedModel, ids: list[int], stop_ids: list[int], max_new_tokens: int) -> list[int]:
    """The obvious loop: one row, no padding, no cache."""
    new: list[int] = []
    with torch.no_grad():
        while len(new) < max_new_tokens:
            token = int(model(torch.tensor([ids + new])).logits[0, -1].argmax())
            if token in stop_ids:
                break
            new.append(token)
    return new


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_answers_equal_the_obvious_loop_whatever_the_batch(tiny, batch_size):
    """Padding, sorting and the cache change nothing, in the prompts' order, though eos is pad."""
    model, tokenizer = tiny
    stop_ids = stop_token_ids(model, tokenizer)
    expected = [
        tokenizer.decode(greedy(model, prompt_ids(tokenizer, prompt), stop_ids, 12), skip_special_tokens=True)
        for prompt in PROMPTS
    ]
    done: list[int] = []
    responses = generate_responses(
        model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=batch_size, on_batch=done.append
    )
    assert responses == expected
    assert len(set(responses)) > 1
    assert sum(done) == len(PROMPTS)
    assert max(done) <= batch_size


def test_an_answer_ends_at_the_end_of_turn(tiny, monkeypatch):
    """Other rows of the batch go on; what follows the end token in a finished row is not in its text."""
    model, tokenizer = tiny
    whole = greedy(model, prompt_ids(tokenizer, PROMPTS[0]), [], 8)
    stop = whole[3]
    monkeypatch.setattr(generate, "end_of_turn_id", lambda tokenizer: stop)
    responses = generate_responses(model, tokenizer, PROMPTS, max_new_tokens=8)
    expected = tokenizer.decode(whole[: whole.index(stop)], skip_special_tokens=True)
    assert responses[0] == expected


def test_the_checkpoints_own_sampling_is_not_inherited(tiny, capfd, caplog, monkeypatch):
    """Sampling flags and penalties of the checkpoint change no answer, warn of nothing, and stay."""
    model, tokenizer = tiny
    plain = generate_responses(model, tokenizer, PROMPTS, max_new_tokens=8)
    own = generation_config([IM_END], IM_END, max_new_tokens=3, temperature=0.7)
    own.update(repetition_penalty=50.0, top_k=20, top_p=0.8)
    monkeypatch.setattr(model, "generation_config", own)
    model.train()
    capfd.readouterr()
    assert generate_responses(model, tokenizer, PROMPTS, max_new_tokens=8) == plain
    assert model.generation_config is own
    assert model.training
    model.eval()
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_temperature_samples_by_torchs_seed(tiny, capfd):
    """The same seed gives the same answers, another one gives others; no warning is printed."""
    model, tokenizer = tiny
    answers = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        answers.append(generate_responses(model, tokenizer, PROMPTS, max_new_tokens=8, temperature=1.5))
    assert answers[0] == answers[1] != answers[2]
    assert capfd.readouterr() == ("", "")


def test_a_temperature_next_to_nothing_is_greedy(tiny):
    """A logit divided by 1e-320 is infinite, and nothing can be drawn from that."""
    model, tokenizer = tiny
    greedy = generate_responses(model, tokenizer, PROMPTS, max_new_tokens=4)
    for temperature in (1e-320, 1e-40, 1e-5):
        assert generate_responses(model, tokenizer, PROMPTS, max_new_tokens=4, temperature=temperature) == greedy
    torch.manual_seed(0)
    coldest = generate_responses(model, tokenizer, PROMPTS, max_new_tokens=4, temperature=LEAST_TEMPERATURE)
    assert coldest == greedy


def test_no_prompts_no_answers(tiny):
    """An empty list is an answer, not an error."""
    assert generate_responses(*tiny, [], max_new_tokens=4) == []


def test_a_prompt_beyond_the_models_positions_is_refused(tiny):
    """510 + letters cannot fit 512 positions with the template: refused before anything is generated."""
    prompts = [*PROMPTS, [{"role": "user", "content": "x" * (MAX_LENGTH - 2)}]]
    with pytest.raises(UserError, match=r"Prompt 5 has \d+ tokens; with max_new_tokens=4"):
        generate_responses(*tiny, prompts, max_new_tokens=4)


def test_positions_of_a_wrapper_are_its_language_models(tmp_path: Path):
    """A model of images and text has the number in the config of its language model alone."""
    model, tokenizer = load_for_generation(build_wrapper(tmp_path, "mistral3"))
    with pytest.raises(UserError, match=r"beyond the 512 positions of the model"):
        generate_responses(model, tokenizer, PROMPTS, max_new_tokens=500)


def test_a_prompt_beyond_the_models_embedding_is_refused(tiny):
    """A tokenizer with added tokens that the model was not given: named, and not an error of an index."""
    model, tokenizer = tiny
    rows = model.config.vocab_size
    other = copy.deepcopy(tokenizer)
    other.add_tokens([f"<{index}>" for index in range(rows - len(other) + 1)])
    prompt = [{"role": "user", "content": f"a <{rows - len(tokenizer)}>"}]
    with pytest.raises(UserError, match=rf"Prompt 0 holds the token id {rows}, and the .* has only {rows} rows"):
        generate_responses(model, other, [prompt], max_new_tokens=4)


def test_left_pad_masks_by_length_not_by_id():
    """A row that holds the pad token itself keeps it visible."""
    ids_BT, mask_BT = left_pad([[7, IM_END], [1, IM_END, 3, IM_END]], IM_END)
    assert ids_BT.tolist() == [[IM_END, IM_END, 7, IM_END], [1, IM_END, 3, IM_END]]
    assert mask_BT.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]


def test_until_stop():
    """The first of several stop tokens counts, and it is left out."""
    assert until_stop([5, 6, 2, 7, 1], [1, 2]) == [5, 6]
    assert until_stop([5, 6], [1, 2]) == [5, 6]


def test_stop_tokens_join_template_tokenizer_and_model(tiny, monkeypatch):
    """The template's comes first; none is named twice."""
    model, tokenizer = tiny
    monkeypatch.setattr(model.generation_config, "eos_token_id", [IM_START, IM_END])
    assert stop_token_ids(model, tokenizer) == [IM_END, IM_START]


def test_what_is_no_model_folder_is_refused(tmp_path: Path):
    """The message says what the path is instead."""
    with pytest.raises(UserError, match="is not a folder"):
        load_for_generation(tmp_path / "missing")
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_for_generation(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"an adapter.*uft convert"):
        load_for_generation(tmp_path)


def test_a_broken_model_folder_is_refused(tmp_path: Path):
    """A config of an unknown architecture and missing weights are the user's errors, not tracebacks."""
    folder = build_tiny_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded as a model"):
        load_for_generation(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "nonesuch"}))
    with pytest.raises(UserError, match="cannot be loaded as a model"):
        load_for_generation(folder)


def test_a_folder_without_a_chat_template_is_refused(tmp_path: Path):
    """The remedy is in the message."""
    folder = build_tiny_model(tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"has no chat template.*chat_template\.jinja"):
        load_for_generation(folder)


def test_chat_answers_one_prompt(tiny, capsys):
    """What is streamed is what the batched function gives, and a line end."""
    model, tokenizer = tiny
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    expected = generate_responses(model, tokenizer, [prompt], max_new_tokens=6)[0]
    chat(model, tokenizer, prompt="Hi", max_new_tokens=6, temperature=0.0, system="Be brief.")
    assert capsys.readouterr().out == expected + "\n"


def hold_conversation(tiny, monkeypatch, lines, answer) -> list[list[str]]:
    """Run `chat` on the user's `lines`; the contents of the messages that each reply was asked with."""
    remaining = iter(lines)
    asked: list[list[str]] = []

    def next_line(_: str) -> str:
        line = next(remaining, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    def stream_answer(model, tokenizer, messages, printer, **_):
        asked.append([message["content"] for message in messages])
        answer(len(asked), printer)

    monkeypatch.setattr("builtins.input", next_line)
    monkeypatch.setattr(generate, "stream_answer", stream_answer)
    chat(*tiny, prompt=None, max_new_tokens=6, temperature=0.0, system="S")
    return asked


def test_chat_keeps_the_history_until_reset(tiny, monkeypatch, capsys):
    """Answers join the history; /reset leaves the system message; an empty line asks nothing; /exit ends."""

    def answer(number: int, printer: Printer) -> None:
        printer.on_finalized_text(f"a{number}", stream_end=True)

    lines = ["q1", "", "q2", "/reset", "q3", "/exit", "never"]
    asked = hold_conversation(tiny, monkeypatch, lines, answer)
    assert asked == [["S", "q1"], ["S", "q1", "a1", "q2"], ["S", "q3"]]


@pytest.mark.parametrize("option", ["prompt", "system"])
def test_a_text_that_is_not_utf_8_is_refused(tiny, option: str):
    """The command line gives such bytes as half of a surrogate pair, which no tokenizer reads."""
    texts = {"prompt": "Hi", "system": None} | {option: os.fsdecode(b"caf\xe9")}
    with pytest.raises(UserError, match=rf"--{option}: .*udce9.* is not UTF-8; convert the text"):
        chat(*tiny, max_new_tokens=2, temperature=0.0, **texts)


def test_a_line_that_is_not_utf_8_ends_no_chat(tiny, monkeypatch, capsys):
    """It is told, and the next line is answered."""
    asked = hold_conversation(tiny, monkeypatch, [os.fsdecode(b"caf\xe9"), "q", EOFError()], lambda *_: None)
    assert asked == [["S", "q"]]
    assert "is not UTF-8" in capsys.readouterr().out


def test_ctrl_c_stops_the_answer_and_not_the_chat(tiny, monkeypatch, capsys):
    """What was said before Ctrl-C stays in the history; a turn without an answer leaves no trace."""

    def answer(number: int, printer: Printer) -> None:
        if number == 1:
            printer.on_finalized_text("half")
            raise KeyboardInterrupt
        if number == 2:
            raise KeyboardInterrupt
        if number == 3:
            raise UserError("The conversation has 600 tokens.")

    lines = ["q1", KeyboardInterrupt(), "q2", "q3", "q4", EOFError()]
    asked = hold_conversation(tiny, monkeypatch, lines, answer)
    assert asked == [["S", "q1"], *(["S", "q1", "half", question] for question in ("q2", "q3", "q4"))]
    assert "600 tokens. /reset starts anew." in capsys.readouterr().out
