import json
from pathlib import Path

import pytest
from tiny import IM_END, build_tiny_tokenizer
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase

from uft_ds.data.example import Message
from uft_ds.data.tokens import chat_template
from uft_ds.data.tokens.chat_template import end_of_turn_id, marks_generation, render, render_marked, special_tokens
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer, open_tokenizer
from uft_ds.errors import UserError

TURN = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}CLOSE{% endfor %}"


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(build_tiny_tokenizer(tmp_path))


def test_render_follows_the_template(tokenizer):
    """The text is the template's, with the opening of the assistant's turn where it is asked for."""
    messages = [{"role": "user", "content": "Hi"}]
    assert render(tokenizer, messages) == "<|im_start|>user\nHi<|im_end|>\n"
    assert render(tokenizer, messages, add_generation_prompt=True).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("close", ["<|im_end|>", "<|im_end|>\n", " <|im_end|>", "<|im_end|><|endoftext|>"])
def test_end_of_turn_comes_from_the_template(tokenizer, close):
    """The first special token after the assistant's text ends the turn, whatever eos is."""
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.chat_template = TURN.replace("CLOSE", close)
    assert end_of_turn_id(tokenizer) == IM_END


def test_the_longest_special_token_wins(tokenizer):
    """Where one special token begins another, the tokenizer reads the longer one, and so do we."""
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<end>", special=True), AddedToken("<end>!", special=True)]}
    )
    tokenizer.chat_template = TURN.replace("CLOSE", "<end>!")
    assert end_of_turn_id(tokenizer) == tokenizer("<end>!")["input_ids"][0] == special_tokens(tokenizer)["<end>!"]


@pytest.mark.parametrize("close", ["", "\n\n", "</s>", "\n<|im_end|"])
def test_a_turn_without_a_special_end_is_refused(tokenizer, close):
    """A model could not learn to stop by such a template; the message names the recipe key."""
    tokenizer.chat_template = TURN.replace("CLOSE", close).replace("<|im_start|>", "#")
    with pytest.raises(UserError, match=r"does not close.*model\.chat_template: path/to/template\.jinja"):
        end_of_turn_id(tokenizer)


def test_a_template_that_drops_the_assistant_is_refused(tokenizer):
    """Text that isn't in the rendered conversation cannot be learned."""
    tokenizer.chat_template = "{{ messages[0]['content'] }}<|im_end|>"
    with pytest.raises(UserError, match="leaves out the assistant's text"):
        end_of_turn_id(tokenizer)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{% for i in range(1000000) %}x{% endfor %}", "OverflowError: Range too big"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "RecursionError"),
        ("{{ messages[0].content.__class__.mro() }}", "unsafe"),
        ("{{ messages | sum }}", "TypeError"),
        ("{{ 'a'.encode('no such') }}", "LookupError"),
        ("{{ '\\ud800'.encode('utf-8') }}", "UnicodeEncodeError"),
        ("{% if %}", "Expected an expression"),
    ],
)
def test_whatever_a_template_fails_by_is_refused(tmp_path, template, reason):
    """A template is a program; each of its errors names the template and says what it was."""
    (tmp_path / "broken.jinja").write_text(template)
    folder = build_tiny_tokenizer(tmp_path / "model")
    with pytest.raises(UserError) as caught:
        open_tokenizer(str(folder), chat_template=str(tmp_path / "broken.jinja"))
    assert str(caught.value).startswith(f"model.chat_template: {tmp_path}/broken.jinja: The chat template of")
    assert reason in str(caught.value)


def test_no_template_is_refused_with_the_remedy(tokenizer):
    """Without a template the message says where to give one."""
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"has no chat template.*model\.chat_template"):
        end_of_turn_id(tokenizer)


def test_what_a_template_refuses_is_a_user_error(tokenizer):
    """A template without a system role says so by an exception; the user sees its text and the roles."""
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(UserError, match=r"\[system, user\].*System role not supported"):
        render(tokenizer, [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}])


def test_marked_characters_are_what_the_assistant_writes(tokenizer):
    """Marks are found in the text, which they don't change, with white space control or without."""
    messages = [{"role": "assistant", "content": "one"}, {"role": "assistant", "content": "two"}]
    plain = TURN.replace("CLOSE", "<|im_end|>")
    for opening, closing in (
        ("{% generation %}", "{% endgeneration %}"),
        ("{%- generation -%}", "{%- endgeneration %}"),
    ):
        said = "{{ m['content'] }}"
        tokenizer.chat_template = plain
        assert not marks_generation(tokenizer)
        expected = render(tokenizer, messages)
        tokenizer.chat_template = plain.replace(f"\n{said}", f"{{{{ '\\n' }}}}{opening}{said}{closing}")
        assert marks_generation(tokenizer)
        text, spans = render_marked(tokenizer, messages)
        assert text == render(tokenizer, messages) == expected
        assert [text[start:end] for start, end in spans] == ["one", "two"]


def test_tools_reach_the_template(tokenizer):
    """A template that writes tools has them; without any it takes its branch for none."""
    tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + TURN
    messages = [{"role": "user", "content": "Hi"}]
    assert render(tokenizer, messages, tools=[{"name": "f"}]).startswith('[{"name": "f"}]<|im_start|>')
    assert render(tokenizer, messages).startswith("<|im_start|>")


def test_a_template_is_a_program_with_limits(tokenizer, monkeypatch):
    """Of time and of memory: a downloaded template must not stop the machine."""
    long_work = "{% for a in range(3000) %}{% for b in range(3000) %}{% endfor %}{% endfor %}"
    tokenizer.chat_template = TURN.replace("CLOSE", "<|im_end|>") + long_work
    monkeypatch.setattr(chat_template, "_SECONDS", 0.05)
    with pytest.raises(UserError, match=r"takes more than 0\.05 seconds of CPU time"):
        render(tokenizer, chat_template.PROBE)
    monkeypatch.setattr(chat_template, "_SECONDS", 10)
    monkeypatch.setattr(chat_template, "_MEMORY", 50_000_000)
    tokenizer.chat_template = "{{ 'a' * 200000000 }}"
    with pytest.raises(UserError, match="takes more than 0 GB of memory, or more than there is"):
        render(tokenizer, chat_template.PROBE)


def test_equal_tools_that_are_written_otherwise_are_rendered_anew(tokenizer):
    """Keys in another order, and 1 for true: equal to Python, and other texts."""
    tokenizer.chat_template = "{{ tools | tojson }}<|im_start|>{{ messages[0]['content'] }}<|im_end|>"
    chat = ChatTokenizer(tokenizer, IM_END, ())
    question = (Message("user", "Which?"),)
    for tools in (({"a": 1, "b": 2},), ({"b": 2, "a": 1},), ({"b": 2, "a": True},)):
        text = chat.render(question, tools=tools, for_generation=True)
        assert text == chat.render(question, tools=tools, for_generation=True)
        assert text.startswith(json.dumps(list(tools)))
