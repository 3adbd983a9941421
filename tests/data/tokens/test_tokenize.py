"""Supervised spans: exactly the response and its end of turn, after exactly the prompt that generation would see."""

import copy
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import needs
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tiny import CHATML, IM_END, SPECIAL_TOKENS, build_tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from uft_ds.data.example import Example, Message, Pair, Sequence, keep_first
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer, with_placeholders
from uft_ds.data.tokens.tokenize import CONTROL, EQUAL, LONG, PLACEHOLDER, Tokenized, load_tokenizer, tokenize
from uft_ds.errors import UserError
from uft_ds.examples.smollm2 import NAME

OPEN = "{{ '<|im_start|>' + m['role'] + '\\n' }}"
CLOSE = "{{ '<|im_end|>' + '\\n' }}"
GENERATION = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
# Reasoning models: only the last turn keeps its thoughts.
FORGETS_THOUGHTS = (
    "{% for m in messages %}" + OPEN + "{% if m['role'] == 'assistant' and not loop.last %}"
    "{{ m['content'].split('</think>')[-1] }}{% else %}{{ m['content'] }}{% endif %}"
    + CLOSE
    + "{% endfor %}"
    + GENERATION
)
# Mistral: the system text moves to the last question.
MOVES_SYSTEM = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m['role'] != 'system' %}" + OPEN + "{% if loop.index0 == ns.last %}"
    "{{ messages[0]['content'] + '\\n' }}{% endif %}{{ m['content'] }}" + CLOSE + "{% endif %}{% endfor %}" + GENERATION
)
# Qwen3: the prompt opens a thought that the finished turn lacks.
OPENS_THOUGHT = (
    "{% for m in messages %}" + OPEN + "{{ m['content'] }}" + CLOSE + "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)
TRIMS = "{% for m in messages %}" + OPEN + "{{ m['content'] | trim }}" + CLOSE + "{% endfor %}" + GENERATION
INST = (
    "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}"
)


def build_sentencepiece_like(folder: Path) -> Path:
    """Characters, `▁` for a space and one before every text, a BOS that the tokenizer would add: as Mistral's."""
    specials = ["<s>", "</s>"]
    characters = ["▁", "\n", "\t", *(chr(code) for code in range(33, 127))]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*specials, *characters])}, merges=[]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = INST
    wrapped.save_pretrained(folder)
    return folder


def build_merging(folder: Path) -> Path:
    """The tiny tokenizer with merged tokens: two newlines, and `:` with a newline on either side."""
    build_tiny_tokenizer(folder)
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    merges = [("Ċ", "Ċ"), ("Ċ", ":"), (":", "Ċ")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    wrapped.chat_template = CHATML
    wrapped.save_pretrained(folder)
    return folder


Load = Callable[[str | None], ChatTokenizer]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return load_tokenizer(str(build_tiny_tokenizer(tmp_path_factory.mktemp("tiny"))))


@pytest.fixture(scope="module", params=["tiny", "merging", "sentencepiece-like", NAME])
def chat(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    """Four tokenizers; the last is real."""
    builders = {"tiny": build_tiny_tokenizer, "merging": build_merging, "sentencepiece-like": build_sentencepiece_like}
    if request.param in builders:
        return load_tokenizer(str(builders[request.param](tmp_path_factory.mktemp("tokenizer"))))
    return load_tokenizer(str(needs.smollm2()))


@pytest.fixture
def with_template(tmp_path: Path) -> Load:
    """The tiny tokenizer with another chat template, given as a file."""

    def load(template: str | None) -> ChatTokenizer:
        folder = build_tiny_tokenizer(tmp_path / "tokenizer")
        if template is None:
            return load_tokenizer(str(folder))
        (tmp_path / "template.jinja").write_text(template)
        return load_tokenizer(str(folder), chat_template=str(tmp_path / "template.jinja"))

    return load


def conversation(*contents: str, system: str | None = None) -> Example:
    """User and assistant in turn; the i-th assistant turn has score i / 10, from 0."""
    messages = [] if system is None else [Message("system", system)]
    for index, content in enumerate(contents):
        messages.append(Message("assistant", content, index // 2 / 10) if index % 2 else Message("user", content))
    return Example(tuple(messages), "instruction")


def tokenized(example: Example, chat: ChatTokenizer, *, merge: bool = True, max_length: int = 10_000) -> Tokenized:
    return tokenize(example, chat, max_length=max_length, merge=merge)


def spans(sequence: Sequence, chat: ChatTokenizer) -> list[str]:
    """The text of each supervised span."""
    ids = sequence.token_ids_T.tolist()
    return [chat.tokenizer.decode(ids[response.start : response.end]) for response in sequence.responses]


def end_of_turn(chat: ChatTokenizer) -> str:
    return chat.tokenizer.decode([chat.end_of_turn_id])


def check(example: Example, chat: ChatTokenizer) -> None:
    """Unfolded: prompts as at generation, spans as given. Merged: the same tokens, spans and scores."""
    turns = [index for index, message in enumerate(example.messages) if message.score is not None]
    unfolded = tokenized(example, chat, merge=False).sequences
    merged = tokenized(example, chat).sequences
    assert len(unfolded) == len(turns)
    lead = " " if chat.tokenizer.chat_template == INST else ""
    for turn, sequence in zip(turns, unfolded, strict=True):
        (response,) = sequence.responses
        prompt_ids = chat.encode(chat.render(example.messages[:turn], for_generation=True))
        assert sequence.token_ids_T[: response.start].tolist() == prompt_ids
        assert spans(sequence, chat) == [lead + example.messages[turn].content + end_of_turn(chat)]
        assert response.end == sequence.num_tokens
        assert response.score == example.messages[turn].score
    if len(merged) == 1:
        (whole,) = merged
        assert whole.num_tokens == unfolded[-1].num_tokens
        ends = [0, *(response.end for response in whole.responses)]
        for last_end, response, alone in zip(ends, whole.responses, unfolded, strict=False):
            assert last_end < response.start < response.end
            assert response == alone.responses[0]
            assert whole.token_ids_T[: response.end].tolist() == alone.token_ids_T.tolist()
        assert len(whole.responses) == len(turns)
    else:
        assert [s.token_ids_T.tolist() for s in merged] == [s.token_ids_T.tolist() for s in unfolded]
        assert [s.responses for s in merged] == [s.responses for s in unfolded]


def test_a_span_is_the_response_and_its_end(chat: ChatTokenizer) -> None:
    """The supervised tokens decode to the response and the end-of-turn token, and nothing else."""
    check(conversation("What is 17 + 25?", "It is 42."), chat)
    check(conversation("What is 17 + 25?", "It is 42.", "And  1,000 - 1?", " 999 \n", "Thanks", "*bows*"), chat)


def test_a_plain_conversation_is_one_sequence(chat: ChatTokenizer) -> None:
    """Three assistant turns are three responses of one sequence, so that they cost one forward."""
    example = conversation("q1", "a1", "q2", "a2", "q3", "a3")
    (sequence,) = tokenized(example, chat).sequences
    assert [response.score for response in sequence.responses] == [0.0, 0.1, 0.2]
    assert tokenized(example, chat).dropped == {}
    check(example, chat)


@pytest.mark.parametrize(
    "response", ["\nfoo", "\n\nfoo", "\n\n\nfoo", "  foo", "\t\nfoo", ":\nfoo", "foo\n\n", " foo "]
)
def test_white_space_at_the_edges_keeps_the_prompts_tokens(chat: ChatTokenizer, response: str) -> None:
    """No token straddles the start of a response: the prompt's tokens stay those of generation."""
    check(conversation("q1\n", response, "\nq2", response), chat)


def test_a_straddling_token_unfolds(tmp_path: Path) -> None:
    """Where one token would hold the prompt's last newline and the response's first, the texts are split there."""
    chat = load_tokenizer(str(build_merging(tmp_path)))
    example = conversation("q1", "\na1", "q2", "a2")
    straddled = chat.encode(chat.render(example.messages))
    first, second = tokenized(example, chat).sequences
    assert first.token_ids_T.tolist() != straddled[: first.num_tokens]
    assert spans(first, chat) == ["\na1<|im_end|>"]
    # The second prompt is read as a whole, as at generation.
    assert second.token_ids_T.tolist() == straddled[: second.num_tokens]


def test_a_sentencepiece_response_gets_no_second_space(tmp_path: Path) -> None:
    """SentencePiece puts a space before every text: a response encoded by itself would begin with two."""
    chat = load_tokenizer(str(build_sentencepiece_like(tmp_path)))
    for merge in (True, False):
        for sequence in tokenized(conversation("q", "a", "q", "a"), chat, merge=merge).sequences:
            assert set(spans(sequence, chat)) == {" a</s>"}
            assert sequence.token_ids_T.tolist().count(chat.tokenizer.bos_token_id) == 1


# SmolLM2's vocabulary lacks the bytes 4, 6, 19, 20, 22, 29, 241 and 242, and loses the characters that need them:
# some control characters, and those of planes 4 to 16 that are unassigned or private.
PRINTABLE = st.characters(exclude_categories=("Cs", "Cc", "Cn", "Co"))
TEXTS = st.text(PRINTABLE, max_size=12) | st.text(alphabet=" \n\t:.'0aé日🙂<|>/", min_size=1, max_size=12)


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4), st.none() | TEXTS)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_conversation_round_trips(chat: ChatTokenizer, turns: list[tuple[str, str]], system: str | None) -> None:
    """Any text in any number of turns: spans are disjoint and in order, and decode to what was given."""
    contents = [text for turn in turns for text in turn]
    assume(all(text.strip() for text in [*contents, system or "x"]))
    assume(not any(token in text for text in [*contents, system or ""] for token in chat.control_tokens))
    if chat.tokenizer.chat_template == INST:  # it knows neither system turns nor characters outside ASCII
        contents = [ascii(text)[1:-1].replace("\\n", "\n") for text in contents]
        system = None
    check(conversation(*contents, system=system), chat)


def test_earlier_turns_without_score_are_context(tiny: ChatTokenizer) -> None:
    """Only turns with a score are supervised."""
    messages = (
        Message("user", "q1"),
        Message("assistant", "a1"),
        Message("user", "q2"),
        Message("assistant", "a2", 0.5),
    )
    (sequence,) = tokenized(Example(messages, "score"), tiny).sequences
    assert spans(sequence, tiny) == ["a2<|im_end|>"]
    (response,) = sequence.responses
    assert (response.score, response.kind, response.pair_id) == (0.5, "score", None)


def test_tokens_by_hand(tiny: ChatTokenizer) -> None:
    """<|im_start|>user\\nq<|im_end|>\\n is 9 tokens, <|im_start|>assistant\\n 11: the span of `ab` is [20, 23)."""
    (sequence,) = tokenized(conversation("q", "ab"), tiny).sequences
    (response,) = sequence.responses
    assert (response.start, response.end, sequence.num_tokens) == (20, 23, 23)
    assert sequence.token_ids_T[-1] == IM_END


# Templates


def test_a_template_that_rewrites_earlier_turns_is_unfolded(with_template: Load) -> None:
    """Thoughts are supervised where the response is the last turn, and gone from later prompts, as at generation."""
    chat = with_template(FORGETS_THOUGHTS)
    example = conversation("q1", "<think>hm</think>a1", "q2", "<think>ah</think>a2")
    first, second = tokenized(example, chat).sequences
    assert spans(first, chat) == ["<think>hm</think>a1<|im_end|>"]
    assert spans(second, chat) == ["<think>ah</think>a2<|im_end|>"]
    assert "hm" not in chat.tokenizer.decode(second.token_ids_T.tolist())
    check(example, chat)


def test_the_same_template_merges_where_nothing_is_rewritten(with_template: Load) -> None:
    """Merging is decided for each conversation, not for the template."""
    chat = with_template(FORGETS_THOUGHTS)
    assert len(tokenized(conversation("q1", "a1", "q2", "<think>ah</think>a2"), chat).sequences) == 1


def test_a_template_that_moves_the_system_text_is_unfolded(with_template: Load) -> None:
    """Where the system text stands before the last question, earlier prompts are no prefixes of the whole."""
    chat = with_template(MOVES_SYSTEM)
    example = conversation("q1", "a1", "q2", "a2", system="S")
    assert len(tokenized(example, chat).sequences) == 2
    check(example, chat)


def test_a_template_that_trims_is_followed(with_template: Load) -> None:
    """What the template takes away is not learned."""
    (sequence,) = tokenized(conversation(" q ", "\n a \n"), with_template(TRIMS)).sequences
    assert spans(sequence, with_template(TRIMS)) == ["a<|im_end|>"]


@pytest.mark.parametrize("merge", [True, False])
def test_a_prompt_that_the_finished_turn_lacks_is_refused(with_template: Load, merge: bool) -> None:
    """If generation starts with other text than training, there is no span to supervise."""
    with pytest.raises(ValueError, match=r"is not a prefix of the finished turn.*model\.chat_template"):
        tokenized(conversation("q1", "a1", "q2", "a2"), with_template(OPENS_THOUGHT), merge=merge)


def test_a_prompt_that_opens_a_thought_goes_with_answers_that_think(with_template: Load) -> None:
    """Exact for answers that begin as its prompt ends: the opening is prompt, the rest of the thought is learned."""
    chat = with_template(OPENS_THOUGHT)
    (sequence,) = tokenized(conversation("q", "<think>\nhm\n</think>\n\na"), chat).sequences
    assert spans(sequence, chat) == ["hm\n</think>\n\na<|im_end|>"]


def test_a_given_template_replaces_the_tokenizers(with_template: Load) -> None:
    """`model.chat_template` wins over the template in the model's folder."""
    assert with_template(None).render([Message("user", "q")]) == "<|im_start|>user\nq<|im_end|>\n"
    assert with_template(CHATML.replace("\\n", "|")).render([Message("user", "q")]) == "<|im_start|>user|q<|im_end|>|"


def test_no_template_is_refused(tmp_path: Path) -> None:
    """The message says how to give one."""
    folder = build_tiny_tokenizer(tmp_path)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"has no chat template.*model\.chat_template: path/to/template\.jinja"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHATML.replace("'<|im_end|>' + ", ""), "does not close the assistant's turn with a special token"),
        ("{% for m in messages %}", "refuses a conversation"),
        ("{{ messages[0]['content'] }}<|im_end|>", "leaves out the assistant's text"),
    ],
)
def test_a_template_that_cannot_be_learned_from_is_refused(with_template: Load, template: str, message: str) -> None:
    """Turns that end in plain text, broken Jinja, or no answer at all: refused when it is loaded."""
    with pytest.raises(UserError) as caught:
        with_template(template)
    assert message in str(caught.value)
    assert "model.chat_template" in str(caught.value)


def test_a_missing_template_file_is_refused(tmp_path: Path) -> None:
    """The message names the recipe key and the file."""
    folder = build_tiny_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(UserError, match=r"model\.chat_template: .*missing\.jinja cannot be read"):
        load_tokenizer(str(folder), chat_template=str(tmp_path / "missing.jinja"))


def test_a_pipe_as_template_is_not_waited_for(tmp_path: Path) -> None:
    """Nobody may ever write to it."""
    folder = build_tiny_tokenizer(tmp_path / "tokenizer")
    os.mkfifo(tmp_path / "pipe.jinja")
    with pytest.raises(UserError, match=r"model\.chat_template: .*pipe\.jinja cannot be read .*not a regular file"):
        load_tokenizer(str(folder), chat_template=str(tmp_path / "pipe.jinja"))


def test_a_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    """A folder without a tokenizer, or a hub name without network, names model.base."""
    for base in (str(tmp_path), "nobody/no-such-model"):
        with pytest.raises(UserError, match=r"model\.base: no tokenizer could be loaded from"):
            load_tokenizer(base)


# Templates that mark what the assistant writes

MARKED = (
    "{% for m in messages %}"
    + OPEN
    + "{% if m['role'] == 'assistant' and not m['tool_calls'] %}{% generation %}{{ m['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{{ '\\n' }}{% else %}{{ m['tool_calls'] or m['content'] }}" + CLOSE + "{% endif %}{% endfor %}"
)
CALL = ({"type": "function", "function": {"name": "f", "arguments": {}}},)


def test_marks_give_the_spans_of_the_generation_prompt(with_template: Load) -> None:
    """By marks a template needs no generation prompt, and its spans are those that it would give."""
    example = conversation("q1", "a1", "q2", " a2\n")
    expected = tokenized(example, with_template(CHATML)).sequences
    chat = with_template(MARKED)
    assert chat.marked
    (sequence,) = tokenized(example, chat).sequences
    assert sequence.responses == expected[0].responses
    assert sequence.token_ids_T.tolist() == expected[0].token_ids_T.tolist()


@pytest.mark.parametrize("merge", [True, False])
def test_a_turn_without_marks_is_refused(with_template: Load, merge: bool) -> None:
    """A turn outside the marks is not given the span of an earlier one."""
    chat = with_template(MARKED)
    turns = (*conversation("q1", "a1", "q2").messages, Message("assistant", "", 1.0, tool_calls=CALL))
    for messages in (turns, turns[2:]):
        with pytest.raises(ValueError, match=r"blocks leave out this turn.*model\.chat_template"):
            tokenized(Example(messages, "instruction"), chat, merge=merge)


def test_several_marks_of_one_turn_are_one_span(with_template: Load) -> None:
    """A thought and an answer marked one after the other are both learned."""
    marks = (
        "{% generation %}{{ m['content'][:1] }}{% endgeneration %}"
        "{% generation %}{{ m['content'][1:] + '<|im_end|>' }}{% endgeneration %}"
    )
    chat = with_template(MARKED.replace(MARKED[MARKED.index("{% gen") : MARKED.index("{{ '\\n' }}{% else")], marks))
    (sequence,) = tokenized(conversation("q1", "a1", "q2", "a2"), chat).sequences
    assert spans(sequence, chat) == ["a1<|im_end|>", "a2<|im_end|>"]


def test_marks_without_the_assistant_are_refused(with_template: Load) -> None:
    """A template that marks other turns alone is refused when it is loaded."""
    with pytest.raises(UserError, match=r"cannot be learned from.*blocks leave out this turn.*model\.chat_template"):
        with_template(MARKED.replace("== 'assistant'", "== 'user'"))


# Pairs


def two(better: str, worse: str, *before: str) -> Pair:
    sides = (conversation(*before, "q", answer) for answer in (better, worse))
    return Pair(*(replace(side, kind="pair") for side in sides))


def test_a_pair_is_a_unit_of_two_sequences(chat: ChatTokenizer) -> None:
    """The chosen side first, each as it would be by itself, with one number for both."""
    pair = two("good", "not so good")
    (unit,) = tokenize(pair, chat, max_length=10_000, merge=True).units
    for side, example in zip(unit, (pair.chosen, pair.rejected), strict=True):
        (alone,) = tokenized(example, chat).sequences
        assert side.token_ids_T.tolist() == alone.token_ids_T.tolist()
        assert side.responses[0].start == alone.responses[0].start
    assert [side.pair_id for side in unit] == [0, 0]


def test_a_pair_fits_as_a_whole(tiny: ChatTokenizer) -> None:
    """The longer side decides: at its length both stay, one token less and both are counted."""
    pair = two("ab", "abcdef")  # 23 and 27 tokens
    assert len(tokenize(pair, tiny, max_length=27, merge=True).sequences) == 2
    assert tokenize(pair, tiny, max_length=26, merge=True) == Tokenized((), {LONG: 2}, {})


def test_sides_with_the_same_tokens_are_dropped(with_template: Load) -> None:
    """Answers that the template makes equal say nothing: both are counted."""
    chat = with_template(TRIMS)
    assert tokenize(two("a", " a "), chat, max_length=99, merge=True) == Tokenized((), {EQUAL: 2}, {})


def test_a_control_token_on_one_side_drops_the_pair(tiny: ChatTokenizer) -> None:
    """A pair is never halved."""
    for answers in (("a", "<|im_end|>"), ("<|im_end|>", "a")):
        assert tokenize(two(*answers), tiny, max_length=99, merge=True) == Tokenized((), {CONTROL: 2}, {})


CALL = {"type": "function", "function": {"name": "look_up", "arguments": {}}}
# Calls end by another token than answers do, as in gpt-oss and Llama 3.
CALLS = (
    "{% for m in messages %}"
    + OPEN
    + "{% if m['role'] == 'assistant' %}BEGIN{{ m['content'] }}"
    + "{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}CLOSE_CALL{% else %}<|im_end|>{% endif %}END"
    + "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
    + GENERATION
)
TOOL_TURNS = (
    Message("user", "q"),
    Message("assistant", "", 1.0, tool_calls=(CALL,)),
    Message("tool", "42"),
    Message("assistant", "it is 42", 1.0),
)


def calls(close: str, *, marked: bool) -> str:
    """The template whose calls are closed by a token, with generation blocks or without."""
    begin, end = ("{% generation %}", "{% endgeneration %}") if marked else ("", "")
    return CALLS.replace("CLOSE_CALL", close).replace("BEGIN", begin).replace("END", end)


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("merge", [False, True])
def test_a_call_that_ends_like_an_answer_is_supervised(with_template: Load, marked: bool, merge: bool) -> None:
    """Two spans, the call and the answer; the tool's result is in neither."""
    chat = with_template(calls("<|im_end|>", marked=marked))
    result = tokenized(Example(TOOL_TURNS, "instruction"), chat, merge=merge)
    found = [span for sequence in result.sequences for span in spans(sequence, chat)]
    assert found == ["look_up<|im_end|>", "it is 42<|im_end|>"]


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("merge", [False, True])
def test_a_call_that_ends_otherwise_never_supervises_what_follows(
    with_template: Load, marked: bool, merge: bool
) -> None:
    """No end-of-turn token of its own: the next one would be the tool's. Refused, merged or not, marked or not."""
    chat = with_template(calls("<|endoftext|>", marked=marked))
    with pytest.raises(ValueError, match=r"ends this turn by another token than '<\|im_end\|>'"):
        tokenized(Example(TOOL_TURNS, "instruction"), chat, merge=merge)
    context = (TOOL_TURNS[0], replace(TOOL_TURNS[1], score=None), *TOOL_TURNS[2:])
    (sequence,) = tokenized(Example(context, "instruction"), chat, merge=merge).sequences
    assert spans(sequence, chat) == ["it is 42<|im_end|>"]


def test_calls_that_the_template_leaves_out_are_refused(tiny: ChatTokenizer) -> None:
    """ChatML alone writes no tool calls: the model would learn to answer nothing."""
    with pytest.raises(ValueError, match=r"does not write the tool calls of turn 1.*model\.chat_template"):
        tokenized(Example(TOOL_TURNS, "instruction"), tiny)
    tools = ({"type": "function", "function": {"name": "look_up"}},)
    with pytest.raises(ValueError, match="does not write the tools"):
        tokenized(replace(conversation("q", "a"), tools=tools), tiny)


def test_an_empty_rest_of_a_thought_is_prompt(with_template: Load) -> None:
    """Where generation opens the thought, an answer without one begins after its end."""
    chat = with_template(OPENS_THOUGHT)
    (sequence,) = tokenized(conversation("q", "<think>\n\n</think>\n\nyes"), chat).sequences
    assert spans(sequence, chat) == ["yes<|im_end|>"]
    (sequence,) = tokenized(conversation("q", "<think>\nhm</think>\n\nyes"), chat).sequences
    assert spans(sequence, chat) == ["hm</think>\n\nyes<|im_end|>"]


def test_the_answers_own_indentation_is_learned(tiny: ChatTokenizer) -> None:
    """Behind an empty thought, only the white space that templates write is taken for theirs."""
    (sequence,) = tokenized(conversation("q", "<think>\n\n</think>\n\n    return 1"), tiny).sequences
    assert spans(sequence, tiny) == ["    return 1<|im_end|>"]


@pytest.mark.parametrize("writes", ["strftime_now ('%d')", "strftime_now\n('%d')", "today('%d')"])
def test_the_date_is_found_however_it_is_written(with_template: Load, writes: str) -> None:
    """By another name, or with a space before its argument."""
    alias = "{% set today = strftime_now %}" if "today" in writes else ""
    with pytest.raises(UserError, match="refuses a conversation"):
        with_template(f"{alias}{{{{ {writes} }}}}{CHATML}")
    asks = "{% if strftime_now is defined %}{% set known = true %}{% endif %}"
    assert with_template(asks + CHATML).tokenizer.chat_template == asks + CHATML


def test_a_byte_order_mark_is_no_part_of_a_template(with_template: Load) -> None:
    """Windows editors write one before the text."""
    assert with_template("\ufeff" + CHATML).tokenizer.chat_template == CHATML


def test_tokens_do_not_depend_on_the_day(with_template: Load) -> None:
    """A template that writes today's date is refused; one that knows a date_string gets a fixed one."""
    today = CHATML.replace("{{ '<|im_start|>' +", "{{ strftime_now('%d') + '<|im_start|>' +")
    with pytest.raises(UserError, match=r"the date of the day.*fixed date by model\.chat_template"):
        with_template(today)
    given = "{% if not date_string is defined %}{% set date_string = strftime_now('%d') %}{% endif %}{{ date_string }}"
    (sequence,) = tokenized(conversation("q", "a"), with_template(given + CHATML)).sequences
    assert with_template(given + CHATML).tokenizer.decode(sequence.token_ids_T.tolist()).startswith("26 Jul 2024<|im_")


ONLY = (
    "{% for m in messages %}{% if m['role'] in ROLES %}"
    + OPEN
    + "{{ m['content'] }}"
    + CLOSE
    + "{% endif %}{% endfor %}"
)
ONLY_USER_AND_ASSISTANT = ONLY.replace("ROLES", "['user', 'assistant']") + GENERATION
MARKED_ONLY = ONLY_USER_AND_ASSISTANT.replace(
    OPEN + "{{ m['content'] }}" + CLOSE,
    OPEN + "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ m['content'] }}" + CLOSE + "{% endif %}",
)


@pytest.mark.parametrize("system", ["Answer in French.", "q1", "use"])
@pytest.mark.parametrize("template", [ONLY_USER_AND_ASSISTANT, MARKED_ONLY], ids=["plain", "marked"])
@pytest.mark.parametrize("merge", [False, True])
def test_a_system_turn_that_the_template_leaves_out_is_refused(
    with_template: Load, template: str, merge: bool, system: str
) -> None:
    """Whether its words occur elsewhere or not, in each form of an example; a template that writes it is fine."""
    chat = with_template(template)
    example = conversation("q1", "a1", "q2", "a2", system=system)
    with pytest.raises(ValueError, match=r"does not write the system turn 0; .*model\.chat_template"):
        tokenized(example, chat, merge=merge)
    last = replace(example, messages=example.messages[:3])
    with pytest.raises(ValueError, match="does not write the system turn 0"):
        tokenize(Pair(last, replace(last, kind="pair")), chat, max_length=99, merge=merge)
    assert tokenized(replace(example, messages=example.messages[1:]), chat, merge=merge).sequences
    assert tokenized(example, with_template(None), merge=merge).sequences


def test_results_of_tools_and_text_beside_calls_must_be_written(with_template: Load) -> None:
    """By role and turn; a result that the template escapes as JSON is written."""
    writes_calls = CALLS.replace("CLOSE_CALL", "<|im_end|>").replace("BEGIN", "").replace("END", "")
    chat = with_template(writes_calls.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}"))
    with pytest.raises(ValueError, match="does not write the tool turn 2"):
        tokenized(Example(TOOL_TURNS, "instruction"), chat)
    result = (*TOOL_TURNS[:2], Message("tool", 'the "result" is 42'), TOOL_TURNS[3])
    escapes = with_template(
        writes_calls.replace("{{ m['content'] }}<|im_end|>", "{{ m['content'] | tojson }}<|im_end|>")
    )
    assert tokenized(Example(result, "instruction"), escapes).sequences
    silent = with_template(
        writes_calls.replace("{{ m['content'] }}{% if", "{{ '' if m.tool_calls else m['content'] }}{% if")
    )
    spoken = (TOOL_TURNS[0], replace(TOOL_TURNS[1], content="I look it up."), *TOOL_TURNS[2:])
    assert tokenized(Example(TOOL_TURNS, "instruction"), silent).sequences
    with pytest.raises(ValueError, match="does not write the text beside the calls of turn 1"):
        tokenized(Example(spoken, "instruction"), silent)


def test_the_own_thought_of_a_response_must_be_written(with_template: Load) -> None:
    """Earlier turns may lose theirs by design; as context or not."""
    thought = "{{ m.get('reasoning_content', '') }}{{ m['content'] }}"
    keeps = FORGETS_THOUGHTS.replace("{{ m['content'] }}", thought)
    turns = (
        Message("user", "q1"),
        Message("assistant", "a1", None, extras=(("reasoning_content", "an early thought"),)),
        Message("user", "q2"),
        Message("assistant", "a2", 1.0, extras=(("reasoning_content", "a late thought"),)),
    )
    example = Example(turns, "instruction")
    chat = with_template(keeps)
    (sequence,) = tokenized(example, chat).sequences
    assert spans(sequence, chat) == ["a late thoughta2<|im_end|>"]
    assert "early" not in chat.tokenizer.decode(sequence.token_ids_T.tolist())
    both = replace(example, messages=(turns[0], replace(turns[1], score=1.0), *turns[2:]))
    assert len(tokenized(both, chat).sequences) == 2
    for merge in (False, True):
        with pytest.raises(
            ValueError, match=r"does not write the reasoning_content of turn [13]; .*model\.chat_template"
        ):
            tokenized(both, with_template(FORGETS_THOUGHTS), merge=merge)


THINKS = "<think>\nSo, a thought.\n</think>\n\nThe answer."


@pytest.mark.parametrize(
    ("written", "is_whole"),
    [
        ("m['content']", True),
        ("m['content'] | trim", True),
        ("(m['content'] | tojson)[1:-1]", True),
        ("m['content'] | replace('\\n', '')", True),
        ("m['content'].split('</think>')[-1]", False),  # DeepSeek-R1's
        ("m['content'].split('</think>')[-1] if '</think>' in m['content'] else m['content']", False),
        ("m['content'][:20]", False),
    ],
)
def test_the_whole_text_of_an_answer_must_be_written(with_template: Load, written: str, is_whole: bool) -> None:
    """A template that cuts a thought out of the answer would teach the answer without it; white space may change."""
    chat = with_template(CHATML.replace("message['content']", f"({written.replace('m[', 'message[')})"))
    turns = (Message("user", "q"), Message("assistant", THINKS, 1.0))
    if is_whole:
        (sequence,) = tokenized(Example(turns, "instruction"), chat).sequences
        assert "a thought." in spans(sequence, chat)[0]
        return
    with pytest.raises(ValueError, match="does not write the whole text of an answer"):
        tokenized(Example(turns, "instruction"), chat)


def test_a_thought_of_an_earlier_answer_may_be_left_out(with_template: Load) -> None:
    """Only the answer that is learned must be whole; so the conversation becomes two sequences."""
    last = "message['content'] if loop.last else message['content'].split('</think>')[-1]"
    chat = with_template(CHATML.replace("message['content']", f"({last})"))
    turns = (Message("user", "q"), Message("assistant", THINKS, 1.0), Message("user", "r"))
    example = Example((*turns, Message("assistant", "<think>\n\n</think>\n\nNo thought.", 1.0)), "instruction")
    assert [spans(sequence, chat) for sequence in tokenized(example, chat).sequences] == [
        [f"{THINKS}<|im_end|>"],
        ["No thought.<|im_end|>"],
    ]


def test_what_else_a_template_wants_of_a_turn_reaches_it(with_template: Load) -> None:
    """Reasoning, and the names of calls, are handed on; a control token in them is found like in the content."""
    template = CHATML.replace("+ message['content']", "+ message.get('reasoning_content', '') + message['content']")
    chat = with_template(template)
    turns = (Message("user", "q"), Message("assistant", "a", 1.0, extras=(("reasoning_content", "hm "),)))
    (sequence,) = tokenized(Example(turns, "instruction"), chat).sequences
    assert spans(sequence, chat) == ["hm a<|im_end|>"]
    bad = (turns[0], replace(turns[1], extras=(("reasoning_content", "x<|im_end|>"),)))
    assert tokenized(Example(bad, "instruction"), chat).dropped == {CONTROL: 1}


# What is dropped


@pytest.mark.parametrize("place", ["system", "question", "answer"])
def test_special_tokens_in_the_text_are_dropped_and_counted(chat: ChatTokenizer, place: str) -> None:
    """Text that reads as a control token could end a turn or open another: all the responses are left out.

    Among them are tokens that are only marked as special, such as Llama 3's `<|eot_id|>`, or `<|endoftext|>` here.
    """
    specials = {token.content for token in chat.tokenizer.added_tokens_decoder.values() if token.special}
    assert set(chat.control_tokens) >= specials | {end_of_turn(chat)}
    for token in chat.control_tokens:
        text = {place: f"x{token}y"}
        example = conversation(
            text.get("question", "q"), "a1", "q2", text.get("answer", "a2"), system=text.get("system")
        )
        assert tokenized(example, chat) == Tokenized((), {CONTROL: 2}, {})


@pytest.mark.parametrize("place", ["system", "question", "answer"])
def test_placeholders_of_images_are_dropped_and_counted_apart(tiny: ChatTokenizer, place: str) -> None:
    """Where a model reads an image, a text would train it to see what is not there. Of the ids in a config only those
    of added tokens count, special or not: of another tokenizer's config they may be ordinary words."""
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.add_tokens(["<image>"])
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ("<image>", "<|endoftext|>", "a")]
    chat = with_placeholders(replace(tiny, tokenizer=tokenizer), [*ids, 10**6])
    assert chat.placeholders == ("<image>", "<|endoftext|>")
    for token in chat.placeholders:
        text = {place: f"x{token}y"}
        example = conversation(
            text.get("question", "q"), "a1", "q2", text.get("answer", "a2"), system=text.get("system")
        )
        assert tokenized(example, chat) == Tokenized((), {PLACEHOLDER: 2}, {})
    assert with_placeholders(tiny, ()).placeholders == ()


def test_a_response_is_never_cut(tiny: ChatTokenizer) -> None:
    """A response that ends at max_length stays whole; one token less, and it is dropped and counted."""
    example = conversation("q", "ab")  # 23 tokens
    (sequence,) = tokenized(example, tiny, max_length=23).sequences
    assert spans(sequence, tiny) == ["ab<|im_end|>"]
    assert tokenized(example, tiny, max_length=22) == Tokenized((), {LONG: 1}, {})


@pytest.mark.parametrize("merge", [True, False])
def test_what_fits_of_a_conversation_is_kept(tiny: ChatTokenizer, merge: bool) -> None:
    """For every max_length: the responses that end before it, whole, no sequence without any, the rest counted."""
    example = conversation("q1", "a1", "q2", "a2", "q3", "a3")
    ends = [s.num_tokens for s in tokenized(example, tiny, merge=False).sequences]
    for max_length in range(1, ends[-1] + 2):
        result = tokenized(example, tiny, merge=merge, max_length=max_length)
        kept = sum(end <= max_length for end in ends)
        texts = [text for sequence in result.sequences for text in spans(sequence, tiny)]
        assert texts == [f"a{i + 1}<|im_end|>" for i in range(kept)]
        assert result.dropped == ({LONG: 3 - kept} if kept < 3 else {})
        for sequence in result.sequences:
            assert sequence.responses
            assert sequence.num_tokens == sequence.responses[-1].end <= max_length


def test_keep_first_ends_with_the_last_kept_response(tiny: ChatTokenizer) -> None:
    """What follows the last kept response cannot influence it, and is gone; none kept leaves nothing."""
    (sequence,) = tokenized(conversation("q1", "a1", "q2", "a2"), tiny).sequences
    one = keep_first(sequence, 1)
    assert one.responses == sequence.responses[:1]
    assert one.token_ids_T.tolist() == sequence.token_ids_T[: sequence.responses[0].end].tolist()
    assert keep_first(sequence, 0).num_tokens == 0


def test_a_text_longer_than_the_tokenizer_likes_is_no_warning(
    chat: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers says once a process that such a text leads to indexing errors; `max_length` decides here."""
    said: list[str] = []
    monkeypatch.setattr("transformers.tokenization_utils_base.logger.warning", lambda text, *_: said.append(text))
    monkeypatch.setattr(chat.tokenizer, "model_max_length", 8)
    chat.tokenizer.deprecation_warnings.clear()
    text = "a longer text, in words. " * 4
    assert len(chat.encode(text)) > 8
    assert said == []
    chat.tokenizer(text)
    assert len(said) == 1, "the warning that this test is about"
