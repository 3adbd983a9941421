"""Prompts that are too long keep their end: as much of it as fits, with the response whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import CHATML, build_tiny_tokenizer

from uft_ds.data.example import Example, Message, Pair, Sequence
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer
from uft_ds.data.tokens.tokenize import LONG, TRIMMED, Tokenized, load_tokenizer, tokenize
from uft_ds.data.tokens.trimming import common_prompt, fitting_prompt

# Thoughts of earlier turns are gone from later prompts, so a later sequence may be the shorter one.
FORGETS_THOUGHTS = CHATML.replace(
    "message['content'] +", "(message['content'] if loop.last else message['content'].split('</think>')[-1]) +"
)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    """A byte is a token, and a turn costs 3 tokens and its role: <|im_start|>, two newlines, <|im_end|>."""
    return load_tokenizer(str(build_tiny_tokenizer(tmp_path_factory.mktemp("tiny"))))


@pytest.fixture(scope="module")
def forgetful(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    folder = tmp_path_factory.mktemp("forgetful")
    (folder / "template.jinja").write_text(FORGETS_THOUGHTS)
    return load_tokenizer(str(build_tiny_tokenizer(folder)), chat_template=str(folder / "template.jinja"))


def conversation(*contents: str, system: str | None = None) -> Example:
    """User and assistant in turn, every answer supervised."""
    turns = [] if system is None else [Message("system", system)]
    for index, content in enumerate(contents):
        turns.append(Message("assistant", content, 1.0) if index % 2 else Message("user", content))
    return Example(tuple(turns), "instruction")


def answered(*contents: str, system: str | None = None) -> Example:
    """The same, the last answer alone supervised."""
    whole = conversation(*contents, system=system).messages
    return Example((*(replace(turn, score=None) for turn in whole[:-1]), whole[-1]), "instruction")


def trimmed(item: Example | Pair, chat: ChatTokenizer, max_length: int, *, merge: bool = True) -> Tokenized:
    return tokenize(item, chat, max_length=max_length, merge=merge, trim_prompt=True)


def length(item: Example, chat: ChatTokenizer) -> int:
    (sequence,) = tokenize(item, chat, max_length=10**6, merge=True).sequences
    return sequence.num_tokens


def text(sequence: Sequence, chat: ChatTokenizer) -> str:
    return chat.tokenizer.decode(sequence.token_ids_T.tolist())


def written(chat: ChatTokenizer, example: Example) -> str:
    """What the template makes of a conversation, up to the end of its last turn."""
    return chat.render(example.messages).rstrip("\n")


# One answer


def test_a_prompt_that_fits_is_left_alone(chat: ChatTokenizer) -> None:
    """At exactly max_length nothing is trimmed or counted; with one token less, one character goes."""
    example = answered("0123456789", "ab", system="S")
    fits = length(example, chat)
    result = trimmed(example, chat, fits)
    assert (result.changed, result.dropped) == ({}, {})
    assert text(result.sequences[0], chat) == written(chat, example)
    result = trimmed(example, chat, fits - 1)
    assert (result.changed, result.dropped) == ({TRIMMED: 1}, {})
    assert text(result.sequences[0], chat) == written(chat, answered("123456789", "ab", system="S"))


def test_the_oldest_exchanges_go_first(chat: ChatTokenizer) -> None:
    """Whole exchanges go before the question is touched, the system turn stays, and no more go than must."""
    contents = ("q1", "a1", "q2", "a2", "q3", "a3")
    candidates = [answered(*contents[start:], system="Be brief") for start in (0, 2, 4)]
    for kept in (1, 2):
        for max_length in range(length(candidates[kept], chat), length(candidates[kept - 1], chat)):
            (sequence,) = trimmed(candidates[0], chat, max_length).sequences
            assert text(sequence, chat) == written(chat, candidates[kept])


def test_the_question_is_cut_from_its_beginning(chat: ChatTokenizer) -> None:
    """For every max_length below the last exchange: the longest end of the question that fits; then nothing is left."""
    question = "0123456789"
    shortest = length(answered("9", "ab", system="S"), chat)
    for kept in range(1, len(question)):
        result = trimmed(answered("q", "a", question, "ab", system="S"), chat, shortest + kept - 1)
        assert result.changed == {TRIMMED: 1}
        assert text(result.sequences[0], chat) == written(chat, answered(question[-kept:], "ab", system="S"))
    assert trimmed(answered("q", "a", question, "ab", system="S"), chat, shortest - 1) == Tokenized((), {LONG: 1}, {})


def test_a_response_too_long_by_itself_is_dropped(chat: ChatTokenizer) -> None:
    """A response is never cut; it is counted as too long, and not as trimmed."""
    example = answered("A question", "b" * 100)
    assert trimmed(example, chat, 100) == Tokenized((), {LONG: 1}, {})


def test_without_trimming_a_long_prompt_is_dropped(chat: ChatTokenizer) -> None:
    """Trimming is a choice of the source."""
    example = answered("0123456789", "ab")
    result = tokenize(example, chat, max_length=length(example, chat) - 1, merge=True)
    assert result == Tokenized((), {LONG: 1}, {})


def test_white_space_at_the_cut_goes(chat: ChatTokenizer) -> None:
    """A question that is cut between words begins with a word."""
    example = answered("one   two", "ab")
    shortest = length(answered("two", "ab"), chat)
    for extra in range(4):
        (sequence,) = trimmed(example, chat, shortest + extra).sequences
        assert text(sequence, chat) == written(chat, answered("two", "ab"))


def test_results_of_tools_stay_with_their_question(chat: ChatTokenizer) -> None:
    """What follows the last question is needed for the answer: the question is cut instead."""
    turns = (
        Message("user", "0123456789"),
        Message("assistant", "look"),
        Message("tool", "found"),
        Message("assistant", "ab", 1.0),
    )
    example = Example(turns, "instruction")
    (sequence,) = trimmed(example, chat, length(example, chat) - 3).sequences
    assert text(sequence, chat) == written(chat, Example((Message("user", "3456789"), *turns[1:]), "instruction"))


# Pairs


def pair(question: str, better: str, worse: str) -> Pair:
    return Pair(answered("q", "a", question, better), answered("q", "a", question, worse))


def test_both_sides_of_a_pair_keep_one_prompt(chat: ChatTokenizer) -> None:
    """The longer side decides, whichever it is: the prompts stay equal, the answers whole, and both are counted."""
    for better, worse in (("ab", "c" * 20), ("c" * 20, "ab")):
        whole = length(answered("0123456789", "c" * 20), chat)
        for cut in range(10):
            result = trimmed(pair("0123456789", better, worse), chat, whole - cut)
            (unit,) = result.units
            assert result.changed == {TRIMMED: 2}
            expected = [answered("0123456789"[cut:], answer) for answer in (better, worse)]
            assert [text(side, chat) for side in unit] == [written(chat, example) for example in expected]
            assert [side.pair_id for side in unit] == [0, 0]
        assert trimmed(pair("0123456789", better, worse), chat, whole - 10) == Tokenized((), {LONG: 2}, {})


def test_a_pair_is_dropped_as_a_whole(chat: ChatTokenizer) -> None:
    """One side that cannot fit drops both."""
    assert trimmed(pair("q", "ab", "c" * 100), chat, 100) == Tokenized((), {LONG: 2}, {})


def test_common_prompt_ends_where_the_sides_part() -> None:
    """The turns that both begin with, and never an answer."""
    same = (Message("user", "q"), Message("assistant", "a"))
    chosen, rejected = (Example((*same, Message("user", q), Message("assistant", "b", 1.0)), "pair") for q in "xy")
    assert common_prompt(Pair(chosen, rejected)) == same
    assert common_prompt(Pair(chosen, chosen)) == chosen.messages[:-1]


# Conversations


@pytest.mark.parametrize("merge", [True, False])
def test_later_responses_get_sequences_of_their_own(chat: ChatTokenizer, merge: bool) -> None:
    """Responses that fit stay as they are, merged or not; each that doesn't has its own trimmed prompt."""
    contents = ("q1", "a1", "q2", "a2", "q3", "a3", "q4", "a4")
    example = conversation(*contents)
    result = trimmed(example, chat, length(conversation(*contents[:4]), chat), merge=merge)
    texts = [text(sequence, chat) for sequence in result.sequences]
    first = [written(chat, conversation(*contents[:4]))]
    assert texts[:-2] == (first if merge else [written(chat, conversation(*contents[:2])), *first])
    assert texts[-2:] == [written(chat, conversation(*contents[start : start + 4])) for start in (2, 4)]
    assert [len(sequence.responses) for sequence in result.sequences[-2:]] == [1, 1]
    assert result.changed == {TRIMMED: 2}
    assert result.dropped == {}


def test_a_long_response_before_one_that_fits(forgetful: ChatTokenizer) -> None:
    """Where later prompts lack earlier thoughts, an early response may be the long one: each is examined by itself."""
    thinks = f"<think>{'h' * 30}</think>a1"
    example = conversation("0123456789", thinks, "q2", "a2")
    alone = length(answered("9", thinks), forgetful)
    second = written(forgetful, conversation("0123456789", "a1", "q2", "a2"))
    assert length(answered("0123456789", "a1", "q2", "a2"), forgetful) < alone
    for max_length, others in ((alone, [written(forgetful, answered("9", thinks))]), (alone - 1, [])):
        result = trimmed(example, forgetful, max_length)
        assert [text(sequence, forgetful) for sequence in result.sequences] == [second, *others]
        assert (result.changed, result.dropped) == (({TRIMMED: 1}, {}) if others else ({}, {LONG: 1}))


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(0, 30)), min_size=1, max_size=4),
    system=st.none() | st.integers(1, 20),
    max_length=st.integers(1, 250),
    merge=st.booleans(),
    forgets=st.booleans(),
)
def test_every_response_is_kept_whole_or_counted(
    chat: ChatTokenizer,
    forgetful: ChatTokenizer,
    lengths: list[tuple[int, int, int]],
    system: int | None,
    max_length: int,
    merge: bool,
    forgets: bool,
) -> None:
    """Any lengths of questions, answers and thoughts: nothing is lost, doubled, cut or longer than max_length."""
    which = forgetful if forgets else chat
    contents: list[str] = []
    for turn, (question, answer, thought) in enumerate(lengths):
        contents.append("q" * question)
        contents.append((f"<think>{'h' * thought}</think>" if thought else "") + str(turn) * answer)
    example = conversation(*contents, system=None if system is None else "S" * system)
    result = trimmed(example, which, max_length, merge=merge)
    untrimmed = tokenize(example, which, max_length=max_length, merge=merge)
    spans = [
        which.tokenizer.decode(sequence.token_ids_T[response.start : response.end].tolist())
        for sequence in result.sequences
        for response in sequence.responses
    ]
    assert set(spans) <= {f"{answer}<|im_end|>" for answer in contents[1::2]}
    assert len(set(spans)) == len(spans)
    assert len(spans) + result.dropped.get(LONG, 0) == len(lengths)
    kept_before = sum(len(sequence.responses) for sequence in untrimmed.sequences)
    assert result.changed.get(TRIMMED, 0) == len(spans) - kept_before
    assert all(sequence.num_tokens <= max_length for sequence in result.sequences)
    shortest = [length(answered("q", answer, system=system and "S" * system), which) for answer in contents[1::2]]
    for answer, least in zip(contents[1::2], shortest, strict=True):
        assert (f"{answer}<|im_end|>" in spans) == (least <= max_length)


@settings(max_examples=150, deadline=None)
@given(
    turns=st.lists(st.text("ab \n", min_size=1, max_size=12).filter(str.strip), min_size=1, max_size=7),
    budget=st.integers(0, 60),
    has_system=st.booleans(),
)
def test_no_longer_prompt_fits(turns: list[str], budget: int, has_system: bool) -> None:
    """Whatever the budget of characters, the next longer candidate exceeds it: an exchange, or a character."""
    odd = turns if len(turns) % 2 else turns[1:]
    prompt = tuple(Message("assistant" if index % 2 else "user", text) for index, text in enumerate(odd))
    system = (Message("system", "SS"),) if has_system else ()
    assume(prompt)

    def size(messages: tuple[Message, ...]) -> int:
        return sum(len(message.content) for message in messages)

    whole = (*system, *prompt)
    assume(size(whole) > budget)
    found = fitting_prompt(whole, lambda messages: size(messages) <= budget)
    candidates = [(*system, *prompt[start:]) for start in range(2, len(prompt), 2)]
    question = prompt[-1].content
    for start in range(1, len(question.rstrip())):
        candidates.append((*system, Message("user", question[start:].lstrip())))
    assert found == next((messages for messages in candidates if size(messages) <= budget), None)
