"""Spans with the tokenizers and templates of real models, on real rows: exactly what the model would have to write."""

from __future__ import annotations

import json
import logging
import random
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import needs
import pytest
from real_tokenizers import (
    QWEN_PATTERN,
    mistral_tokenizer,
    qwen3_tokenizer,
    qwen25_tokenizer,
    qwen_ranks,
    template_of,
    with_generation_marks,
)
from sentencepiece import SentencePieceProcessor
from suites import long_but
from transformers import AutoTokenizer

from uft_ds.data.example import Example, Message, Pair, Sequence
from uft_ds.data.formats.table import format_named
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer, save_tokenizer
from uft_ds.data.tokens.padding import save_for_scoring
from uft_ds.data.tokens.tokenize import CONTROL, load_tokenizer, tokenize

log = logging.getLogger(__name__)
loaded = cache(load_tokenizer)

ROWS_PER_SOURCE = 50
MAX_LENGTH = 100_000


@dataclass(frozen=True)
class Real:
    """A model's tokenizer, plain and with a template that marks what the assistant writes."""

    name: str
    chat: ChatTokenizer
    marked: ChatTokenizer


FOLDERS = {"qwen2.5": qwen25_tokenizer, "mistral-v0.1": mistral_tokenizer, "smollm2": needs.smollm2}


@pytest.fixture(scope="module", params=long_but(["mistral-v0.1"], FOLDERS))
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Real:
    name = request.param
    folder = str(FOLDERS[name]())
    chat = loaded(folder)
    file = tmp_path_factory.mktemp("marked") / "template.jinja"
    file.write_text(with_generation_marks(name, chat.tokenizer.chat_template))
    marked = load_tokenizer(folder, chat_template=str(file))
    assert marked.marked
    assert not chat.marked
    return Real(name, chat, marked)


def test_a_reward_model_scores_the_text_that_it_was_trained_on(real: Real, tmp_path: Path) -> None:
    """What Hugging Face's template writes with the saved tokenizer is the training's tokens, to the last one; padding
    is another token."""
    messages = [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "It is 5."}]
    example = Example((Message("user", messages[0]["content"]), Message("assistant", "It is 5.", 1.0)), "score")
    ((sequence,),) = tokenize(example, real.chat, max_length=MAX_LENGTH, merge=True).units
    save_for_scoring(real.chat, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.apply_chat_template(messages)["input_ids"] == sequence.token_ids_T.tolist()
    assert sequence.token_ids_T[-1] == real.chat.end_of_turn_id != loaded.pad_token_id


@pytest.fixture(scope="module")
def qwen25() -> ChatTokenizer:
    return loaded(str(qwen25_tokenizer()))


@pytest.fixture(scope="module")
def qwen3() -> ChatTokenizer:
    return loaded(str(qwen3_tokenizer()))


@pytest.fixture(scope="module")
def examples(test_data: Path) -> list[Example]:
    """Dolly and Alpaca rows; both sides of pairs, among them conversations, of which every answer is supervised."""
    sources = (
        ("jsonl", _lines(test_data / "dolly_hhrlhf" / "train_small.jsonl")),
        ("alpaca", json.loads((test_data / "llama_factory" / "alpaca_en_demo.json").read_text())),
        ("sharegpt", json.loads((test_data / "llama_factory" / "dpo_en_demo.json").read_text())),
    )
    found = []
    for name, rows in sources:
        for row in random.Random(0).sample(rows, ROWS_PER_SOURCE):
            for item in format_named(name)(row, score=None):
                sides = (item.chosen, item.rejected) if isinstance(item, Pair) else (item,)
                found += [_all_scored(side) for side in sides]
    multi_turn = sum(example.num_responses > 1 for example in found)
    assert multi_turn > 20
    log.info("%d conversations, %d of several turns", len(found), multi_turn)
    return found


def _lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _all_scored(example: Example) -> Example:
    turns = (replace(turn, score=1.0) if turn.role == "assistant" else turn for turn in example.messages)
    return replace(example, messages=tuple(turns))


def with_system(example: Example, text: str = "Answer as a pirate would.") -> Example:
    turns = example.messages[1:] if example.messages[0].role == "system" else example.messages
    return replace(example, messages=(Message("system", text), *turns))


def sequences_of(example: Example, chat: ChatTokenizer, *, merge: bool = True) -> tuple[Sequence, ...]:
    result = tokenize(example, chat, max_length=MAX_LENGTH, merge=merge)
    assert result.dropped == {}
    return result.sequences


def decode(chat: ChatTokenizer, ids: list[int]) -> str:
    return chat.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def span_texts(sequence: Sequence, chat: ChatTokenizer) -> list[str]:
    """What each span adds to the text before it: a span by itself would lose SentencePiece's leading space."""
    ids = sequence.token_ids_T.tolist()
    return [
        decode(chat, ids[: response.end])[len(decode(chat, ids[: response.start])) :] for response in sequence.responses
    ]


def as_read(text: str, chat: ChatTokenizer) -> str:
    """The text as the tokenizer keeps it: Qwen's composes characters (NFC)."""
    normalizer = chat.tokenizer.backend_tokenizer.normalizer
    return text if normalizer is None else normalizer.normalize_str(text)


def check(example: Example, chat: ChatTokenizer) -> None:
    """Every span of a conversation: the response and its end, after the prompt as generation would see it."""
    end = decode(chat, [chat.end_of_turn_id])
    turns = [index for index, message in enumerate(example.messages) if message.score is not None]
    spans = [(sequence, response) for sequence in sequences_of(example, chat) for response in sequence.responses]
    texts = [text for sequence in sequences_of(example, chat) for text in span_texts(sequence, chat)]
    assert texts == [as_read(example.messages[turn].content, chat) + end for turn in turns]
    control = set(chat.tokenizer.convert_tokens_to_ids(list(chat.control_tokens)))
    for (sequence, response), turn in zip(spans, turns, strict=True):
        ids = sequence.token_ids_T.tolist()
        prompt = chat.render(example.messages[:turn], tools=example.tools, for_generation=True)
        assert ids[: response.start] == chat.encode(prompt)
        assert ids[response.end - 1] == chat.end_of_turn_id
        assert not control & set(ids[response.start : response.end - 1])
        check_bos(ids, chat)


def check_bos(ids: list[int], chat: ChatTokenizer) -> None:
    bos = chat.tokenizer.bos_token
    if bos is None:
        assert chat.tokenizer.pad_token_id not in ids
    elif bos == "<|im_start|>":  # SmolLM2: it opens every turn
        assert ids[0] == chat.tokenizer.bos_token_id != ids[1]
    else:
        assert [index for index, token in enumerate(ids) if token == chat.tokenizer.bos_token_id] == [0]


def spoken(real: Real, examples: list[Example]) -> list[Example]:
    """Those that the template takes: Mistral's has no system turn."""
    if real.name != "mistral-v0.1":
        return examples
    return [example for example in examples if example.messages[0].role != "system"]


# Real rows


def test_spans_of_real_rows(real: Real, examples: list[Example]) -> None:
    """Each span is the response and its end, each prompt is that of generation, whatever the row."""
    rows = spoken(real, examples)
    for example in rows:
        check(example, real.chat)
    log.info("%s: %d of %d conversations", real.name, len(rows), len(examples))
    assert len(rows) >= 0.8 * len(examples)


def test_spans_under_a_system_turn(real: Real, examples: list[Example]) -> None:
    """A system turn is prompt, in place of the template's own; a template that has none says so for the row."""
    for example in examples[::6]:
        if real.name == "mistral-v0.1":
            with pytest.raises(ValueError, match=r"refuses a conversation of roles \[system, user"):
                tokenize(with_system(example), real.chat, max_length=MAX_LENGTH, merge=True)
            continue
        check(with_system(example), real.chat)
        (first, *_) = sequences_of(with_system(example), real.chat)
        start = decode(real.chat, first.token_ids_T[: first.responses[0].start].tolist())
        assert start.startswith("<|im_start|>system\nAnswer as a pirate would.<|im_end|>\n<|im_start|>user\n")


def test_a_saved_tokenizer_reads_the_same(real: Real, examples: list[Example], tmp_path: Path) -> None:
    """What `uft convert` writes beside the weights gives the tokens that were trained on, by either template."""
    for number, chat in enumerate((real.chat, real.marked)):
        (tmp_path / str(number)).mkdir()
        save_tokenizer(chat, tmp_path / str(number))
        saved = load_tokenizer(str(tmp_path / str(number)))
        assert (saved.marked, saved.end_of_turn_id) == (chat.marked, chat.end_of_turn_id)
        for example in examples[:60]:
            ours, theirs = (tokenize(example, c, max_length=MAX_LENGTH, merge=True) for c in (chat, saved))
            for one, other in zip(ours.sequences, theirs.sequences, strict=True):
                assert one.token_ids_T.tolist() == other.token_ids_T.tolist()


def test_most_conversations_are_one_sequence(real: Real, examples: list[Example]) -> None:
    """These templates rewrite nothing: conversations unfold only where a token straddles a response's start."""
    several = [example for example in spoken(real, examples) if example.num_responses > 1]
    merged = sum(len(sequences_of(example, real.chat)) == 1 for example in several)
    log.info("%s: %d of %d conversations are one sequence", real.name, merged, len(several))
    assert merged >= 0.9 * len(several)


def test_spans_by_generation_marks(real: Real, examples: list[Example]) -> None:
    """A template that marks what the assistant writes gives the same tokens and spans as its generation prompt."""
    for example in spoken(real, examples):
        assert real.marked.render(example.messages) == real.chat.render(example.messages)
        for merge in (True, False):
            plain = sequences_of(example, real.chat, merge=merge)
            marked = sequences_of(example, real.marked, merge=merge)
            assert [s.token_ids_T.tolist() for s in marked] == [s.token_ids_T.tolist() for s in plain]
            assert [s.responses for s in marked] == [s.responses for s in plain]


def test_spans_against_the_mask_of_transformers(real: Real, examples: list[Example]) -> None:
    """transformers' own mask of a marked template is the union of the spans, wherever a conversation is not split."""
    rows, compared = spoken(real, examples), 0
    for example in rows:
        sequences = sequences_of(example, real.chat)
        turns = [{"role": turn.role, "content": turn.content} for turn in example.messages]
        theirs = real.marked.tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
        ids = theirs["input_ids"]
        if len(sequences) > 1 or sequences[0].token_ids_T.tolist() != ids[: sequences[0].num_tokens]:
            continue  # a token straddles a response's start: theirs is in the mask, prompt and all
        compared += 1
        ours = {token for r in sequences[0].responses for token in range(r.start, r.end)}
        assert ours == {token for token, supervised in enumerate(theirs["assistant_masks"]) if supervised}
    log.info("%s: %d of %d masks compared", real.name, compared, len(rows))
    assert compared >= 0.95 * len(rows)


AWKWARD = [
    "(a)",
    ")a",
    "[1, 2]",
    "\nfoo",
    "\n\nfoo",
    "  foo ",
    " foo\n",
    "\t",
    "...",
    "42",
    "日本語🙂",
    "<b>",
    "e\u0301t",
]


@pytest.mark.parametrize("answer", AWKWARD)
def test_an_awkward_beginning_changes_no_prompt(real: Real, answer: str) -> None:
    """Brackets, white space, digits: the prompt's tokens are those of generation, and the span is the answer alone.

    `[/INST]` and `(` are one token of Mistral's vocabulary, `](`, which no model could write after the prompt.
    """
    first = (Message("user", "What is 17 + 25?"), Message("assistant", answer, 1.0))
    check(Example(first, "instruction"), real.chat)
    check(Example((*first, Message("user", "Again\n"), Message("assistant", answer, 0.5)), "score"), real.chat)


def test_control_tokens_in_the_data_are_left_out(real: Real) -> None:
    """Text that reads as one of the model's own special tokens is counted, not trained on."""
    for token in real.chat.control_tokens:
        example = Example((Message("user", "q"), Message("assistant", f"a{token}b", 1.0)), "instruction")
        assert tokenize(example, real.chat, max_length=MAX_LENGTH, merge=True).dropped == {CONTROL: 1}


# Tools

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def call(city: str) -> dict[str, object]:
    return {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}


def written_call(city: str) -> str:
    return f'<tool_call>\n{{"name": "weather", "arguments": {{"city": "{city}"}}}}\n</tool_call>'


TOOL_TALK = Example(
    (
        Message("user", "Is it warmer in Jakarta or in 東京?"),
        Message("assistant", "", 1.0, tool_calls=(call("Jakarta"), call("東京"))),
        Message("tool", "31 degrees"),
        Message("tool", "12 degrees"),
        Message("assistant", "In Jakarta.", 0.5),
        Message("user", "And Bandung?"),
        Message("assistant", "Let me see.", 0.25, tool_calls=(call("Bandung"),)),
        Message("tool", "24 degrees"),
        Message("assistant", "24 degrees.", 0.75),
    ),
    "score",
    (WEATHER,),
)
TOOL_SPANS = [
    f"{written_call('Jakarta')}\n{written_call('東京')}<|im_end|>",
    "In Jakarta.<|im_end|>",
    f"Let me see.\n{written_call('Bandung')}<|im_end|>",
    "24 degrees.<|im_end|>",
]


def test_qwen25_learns_calls_and_not_results(qwen25: ChatTokenizer, tmp_path: Path) -> None:
    """Calls are supervised as the template writes them; tools and results are prompt; one sequence; marks agree."""
    (sequence,) = sequences_of(TOOL_TALK, qwen25)
    assert span_texts(sequence, qwen25) == TOOL_SPANS
    assert [response.score for response in sequence.responses] == [1.0, 0.5, 0.25, 0.75]
    prompt = decode(qwen25, sequence.token_ids_T[: sequence.responses[0].start].tolist())
    assert f"<tools>\n{json.dumps(WEATHER)}\n</tools>" in prompt
    assert prompt.startswith("<|im_start|>system\nYou are Qwen, created by Alibaba Cloud.")
    check_tool_results(sequence, qwen25)
    (tmp_path / "marked.jinja").write_text(with_generation_marks("qwen2.5", template_of("qwen2.5")))
    marked = load_tokenizer(str(qwen25_tokenizer()), chat_template=str(tmp_path / "marked.jinja"))
    assert marked.render(TOOL_TALK.messages, tools=TOOL_TALK.tools) == qwen25.render(
        TOOL_TALK.messages, tools=TOOL_TALK.tools
    )
    (by_marks,) = sequences_of(TOOL_TALK, marked)
    assert by_marks.responses == sequence.responses
    assert by_marks.token_ids_T.tolist() == sequence.token_ids_T.tolist()


def check_tool_results(sequence: Sequence, chat: ChatTokenizer) -> None:
    """The results are in the text, and outside every span."""
    ids = sequence.token_ids_T.tolist()
    outside = list(ids)
    for response in reversed(sequence.responses):
        del outside[response.start : response.end]
    inside = "".join(span_texts(sequence, chat))
    for result in ("31 degrees", "12 degrees"):
        assert f"<tool_response>\n{result}\n</tool_response>" in decode(chat, outside)
        assert result not in inside


def test_tools_under_a_system_turn(qwen25: ChatTokenizer) -> None:
    """The system text comes before the tools, in one turn."""
    (sequence,) = sequences_of(with_system(TOOL_TALK), qwen25)
    assert span_texts(sequence, qwen25) == TOOL_SPANS
    assert decode(qwen25, sequence.token_ids_T.tolist()).startswith(
        "<|im_start|>system\nAnswer as a pirate would.\n\n# Tools\n\n"
    )


# Qwen3: thoughts

EMPTY_THOUGHT = "<think>\n\n</think>\n\n"


@pytest.mark.long
def test_an_empty_thought_is_prompt(qwen3: ChatTokenizer) -> None:
    """The template writes one before an answer without thoughts: it is in the tokens, and not supervised."""
    (sequence,) = sequences_of(Example((Message("user", "q"), Message("assistant", "a", 1.0)), "instruction"), qwen3)
    (response,) = sequence.responses
    assert span_texts(sequence, qwen3) == ["a<|im_end|>"]
    prompt = f"<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n{EMPTY_THOUGHT}"
    assert sequence.token_ids_T[: response.start].tolist() == qwen3.encode(prompt)
    assert qwen3.tokenizer.apply_chat_template(
        [{"role": "user", "content": "q"}], add_generation_prompt=True, enable_thinking=False, tokenize=False
    ) == prompt  # fmt: skip


@pytest.mark.long
def test_thoughts_are_supervised(qwen3: ChatTokenizer) -> None:
    """What the answer thinks is learned, from the token that opens the thought."""
    answer = "<think>\nSeven is prime.\n</think>\n\nYes."
    turns = (Message("user", "Is 7 prime?"), Message("assistant", answer, 1.0))
    (sequence,) = sequences_of(Example(turns, "instruction"), qwen3)
    assert span_texts(sequence, qwen3) == [f"{answer}<|im_end|>"]
    (response,) = sequence.responses
    assert sequence.token_ids_T[response.start] == qwen3.tokenizer.convert_tokens_to_ids("<think>")
    assert sequence.token_ids_T[: response.start].tolist() == qwen3.encode(qwen3.render(turns[:1], for_generation=True))


@pytest.mark.long
@pytest.mark.parametrize("thoughts", [(True, True), (True, False), (False, True), (False, False)])
def test_conversations_with_thoughts_unfold(qwen3: ChatTokenizer, thoughts: tuple[bool, bool]) -> None:
    """Later prompts lack the earlier thoughts, empty ones too, as at generation: each answer has its own sequence."""
    texts = [f"<think>\nhm{turn}\n</think>\n\na{turn}" if has else f"a{turn}" for turn, has in enumerate(thoughts)]
    turns = (
        Message("user", "q0"),
        Message("assistant", texts[0], 1.0),
        Message("user", "q1"),
        Message("assistant", texts[1], 1.0),
    )
    first, second = sequences_of(Example(turns, "instruction"), qwen3)
    assert span_texts(first, qwen3) == [f"{texts[0]}<|im_end|>"]
    assert span_texts(second, qwen3) == [f"{texts[1]}<|im_end|>"]
    before = "<|im_start|>user\nq0<|im_end|>\n<|im_start|>assistant\na0<|im_end|>\n<|im_start|>user\nq1<|im_end|>\n"
    opening = "" if thoughts[1] else EMPTY_THOUGHT
    start = second.responses[0].start
    assert second.token_ids_T[:start].tolist() == qwen3.encode(f"{before}<|im_start|>assistant\n{opening}")


@pytest.mark.long
def test_qwen3_learns_calls_and_not_results(qwen3: ChatTokenizer) -> None:
    """As Qwen2.5; an answer that is not the last turn after its question is written without an empty thought."""
    sequences = sequences_of(TOOL_TALK, qwen3)
    assert [text for sequence in sequences for text in span_texts(sequence, qwen3)] == TOOL_SPANS
    assert len(sequences) == 4
    check_tool_results(sequences[-1], qwen3)
    assert "<think>" not in decode(qwen3, sequences[-1].token_ids_T[: sequences[-1].responses[0].start - 4].tolist())


@pytest.mark.long
def test_real_rows_with_qwen3(qwen3: ChatTokenizer, examples: list[Example]) -> None:
    """Without thoughts in the data nothing of a thought is learned; of each conversation all answers are, unfolded."""
    thought = set(qwen3.tokenizer.convert_tokens_to_ids(["<think>", "</think>"]))
    for example in examples[::3]:
        answers = [turn.content for turn in example.messages if turn.score is not None]
        sequences = sequences_of(example, qwen3)
        assert len(sequences) == len(answers)
        assert [text for s in sequences for text in span_texts(s, qwen3)] == [
            as_read(answer, qwen3).lstrip("\n") + "<|im_end|>" for answer in answers
        ]
        for sequence in sequences:
            (response,) = sequence.responses
            assert not thought & set(sequence.token_ids_T[response.start :].tolist())


# The rebuilt tokenizers themselves

FROZEN = {
    "qwen2.5": (
        qwen25_tokenizer,
        {
            "Hello, world!": [9707, 11, 1879, 0],
            "It's 1234.5 °C\n\n": [2132, 594, 220, 16, 17, 18, 19, 13, 20, 36286, 34, 271],
            "<|im_start|>user\n": [151644, 872, 198],
        },
    ),
    "mistral-v0.1": (
        mistral_tokenizer,
        {
            "Hello, world!": [22557, 28725, 1526, 28808],
            "<s>[INST] Hi [/INST]": [1, 733, 16289, 28793, 15359, 733, 28748, 16289, 28793],
            "日🙂": [28705, 29142, 29340],
        },
    ),
}


@pytest.mark.parametrize("name", FROZEN)
def test_known_ids(name: str) -> None:
    """The ids of a few texts, as the models' own tokenizers give them."""
    build, expected = FROZEN[name]
    chat = loaded(str(build()))
    assert {text: chat.encode(text) for text in expected} == expected


def texts_of(examples: list[Example]) -> list[str]:
    return sorted({message.content for example in examples for message in example.messages})


def test_qwen_against_tiktoken(qwen25: ChatTokenizer, examples: list[Example]) -> None:
    """The merges rebuilt from the ranks read real texts as tiktoken does, by which Qwen's tokenizer was made."""
    tiktoken = needs.package("tiktoken")
    ranks = qwen_ranks()
    theirs = tiktoken.Encoding("qwen", pat_str=QWEN_PATTERN, mergeable_ranks=ranks, special_tokens={})
    texts = texts_of(examples)
    for text in texts:
        assert qwen25.encode(text) == theirs.encode(as_read(text, qwen25), disallowed_special=())
    log.info("%d texts", len(texts))


def test_mistral_against_sentencepiece(examples: list[Example]) -> None:
    """The rebuilt tokenizer reads real texts as SentencePiece itself does."""
    folder = mistral_tokenizer()
    chat = loaded(str(folder))
    theirs = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in texts_of(examples):
        assert chat.encode(text) == theirs.encode(text)
