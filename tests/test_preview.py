"""What the preview shows: exactly the mask, also where a long text is cut."""

from dataclasses import replace

import pytest
from tiny import build_tiny_tokenizer
from toy import toy_sequences

from uft_ds.data.chat_tokenizer import ChatTokenizer
from uft_ds.data.example import Example, Message, Sequence
from uft_ds.data.tokenize import load_tokenizer, tokenize
from uft_ds.preview import CLOSE, OPEN, PROMPT, SUPERVISED, rendered


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return load_tokenizer(str(build_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


def conversation(chat: ChatTokenizer, *contents: str) -> Sequence:
    turns = (Message("assistant", c, 0.5) if i % 2 else Message("user", c) for i, c in enumerate(contents))
    (sequence,) = tokenize(Example(tuple(turns), "score"), chat, max_length=100_000, merge=True).sequences
    return replace(sequence, responses=tuple(replace(r, origin="f.jsonl:3") for r in sequence.responses))


def test_marks_and_colours_are_the_mask(chat: ChatTokenizer) -> None:
    """What stands between the marks, and what is green, is what is supervised: text and end of turn, of every turn."""
    text = rendered(conversation(chat, "q1", "a1", "q2", "a2"), chat, full=True)
    shown = text.plain
    assert shown.startswith("f.jsonl:3: ")
    assert "supervised; score 0.5, score 0.5" in shown
    marked = [part.split(CLOSE)[0] for part in shown.split(OPEN)[1:]]
    assert marked == ["a1<|im_end|>", "a2<|im_end|>"]
    green = [shown[span.start : span.end] for span in text.spans if span.style == SUPERVISED]
    assert green == [f"{OPEN}{part}{CLOSE}" for part in marked]
    dim = [shown[span.start : span.end] for span in text.spans if span.style == PROMPT]
    assert dim[0] == "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n"


def test_a_long_text_is_cut_and_says_so(chat: ChatTokenizer) -> None:
    """Of a long answer both ends are shown, with the number of tokens between; --full shows all of it."""
    sequence = conversation(chat, "q", "x" * 1000 + "end")
    assert "[... 804 tokens ...]" in rendered(sequence, chat, full=False).plain
    assert "xend<|im_end|>" + CLOSE in rendered(sequence, chat, full=False).plain
    assert "x" * 1000 in rendered(sequence, chat, full=True).plain


def test_any_sequence_is_shown(chat: ChatTokenizer) -> None:
    """Tokens that are no text do not break it."""
    for sequence in toy_sequences(20):
        assert rendered(sequence, chat, full=False).plain.count(OPEN) == len(sequence.responses)
