"""Short tasks with answers that code can check, and `grade`, the only definition of a response's score.

Every prompt reads `<instruction>: <payload>`, and no instruction contains `: `, so a task needs no field for
its payload. A small model can solve the kinds but, before training, answers in the wrong form (with chatter, or with
the question restated), so the effect of training is visible within tens of steps.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NOUNS = _words(
    """apple arrow badge bag ball bank barn basket bean bear bed bee bell belt bench bike bird blanket
    board boat bone book boot bottle bowl box branch bread brick bridge broom brush bucket bus butter
    button cabin cake camel camera candle candy canoe car carpet carrot castle cat cave chain chair
    chalk cheese cherry chicken church circle clay cliff clock cloud coach coat coffee coin comb cookie
    copper corn cotton cow crab crane cream crown cup curtain deer desert desk dish dog doll door dragon
    dream dress drum duck eagle egg engine farm feather fence field finger fire fish flag flame floor
    flower flute forest fork fox frog fruit garden gate ghost giant glass glove goat gold goose grape
    grass guitar hammer harbor hat hawk helmet hill honey horn horse hotel house ice ink iron island
    jacket jar jewel juice kettle king kitchen kite knife ladder lake lamp leaf lemon lion lock machine
    map market mask meadow melon milk mirror monkey moon mountain mouse mushroom nail needle nest night
    ocean olive onion orange oven owl paint palace panda paper park parrot peach pearl pencil pepper
    piano picture pillow pilot pirate planet plate pocket pond potato prince pumpkin queen rabbit radio
    rain ribbon rice ring river road robot rocket roof rope rose salt sand scarf school sea seed shadow
    sheep shell ship shirt shoe silver sky snake snow soap sock soup spider spoon star station stone
    storm street sugar summer sun table tea tent ticket tiger tower town toy train tree truck turtle
    valley village violin wagon wall watch water whale wheel wind window winter wolf wood wool zebra"""
)
ADJECTIVES = _words(
    """angry big black blue brave bright brown busy calm cheap clean clever cold cool dark deep dry early
    empty fast fresh gentle golden gray green happy hard heavy hot huge kind large lazy light little
    long loud lucky narrow new noisy old pale pink poor proud purple quick quiet red rich rough round
    sad sharp short shy slow small smart smooth soft strong sweet tall thick thin tiny warm wet white
    wide wild wise yellow young"""
)
NAMES = _words(
    """Adam Alice Amy Anna Ben Bella Carl Carol Clara Dan David Diana Ella Emma Eric Eva Fiona Frank George
    Grace Hannah Harry Helen Henry Ivan Jack James Jane John Julia Karen Kate Kevin Laura Leo Linda
    Lucas Lucy Maria Mark Martin Mary Max Mia Nina Noah Oliver Olivia Oscar Paul Peter Rachel Robert
    Rosa Ruth Sam Sara Simon Sophie Steve Susan Thomas Tina Tom Victor Vera Walter Wendy William Zoe"""
)
SURNAMES = _words(
    """Adams Allen Baker Bell Brooks Brown Carter Clark Cole Cook Cooper Davis Dixon Edwards Evans Fisher
    Ford Foster Grant Gray Green Hall Harris Hill Howard Hughes Hunt Jackson Johnson Jones Kelly King
    Lee Lewis Long Mason Miller Moore Morgan Morris Nelson Owen Parker Perry Price Reed Roberts Rogers
    Ross Scott Shaw Smith Stone Taylor Turner Walker Ward Watson White Wilson Wood Wright Young"""
)
CITIES = _words(
    """Athens Berlin Boston Cairo Chicago Dallas Delhi Denver Dublin Geneva Lima Lisbon London Madrid Miami
    Milan Moscow Oslo Paris Prague Rome Seattle Seoul Tokyo Toronto Vienna Warsaw"""
)
NUMBER_WORDS = {"one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}


@dataclass(frozen=True)
class Task:
    """A prompt and its one complete answer; `grade` scores any other text."""

    kind: str
    prompt: str
    answer: str


def payload(task: Task) -> str:
    """The part of the prompt to work on: everything after the first `: `."""
    return task.prompt.partition(": ")[2]


def _task(kind: str, rng: random.Random, instructions: tuple[str, ...], given: str, answer: str) -> Task:
    return Task(kind, f"{rng.choice(instructions)}: {given}", answer)


def _phrase(rng: random.Random) -> str:
    return f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"


def _capitals(rng: random.Random) -> Task:
    phrase = _phrase(rng)
    instructions = ("Write in capital letters", "Reply with this in upper case only")
    return _task("capitals", rng, instructions, phrase, phrase.upper())


def _lower_case(rng: random.Random) -> Task:
    phrase = _phrase(rng)
    instructions = ("Write in lower case", "Reply with this in small letters only")
    return _task("lower_case", rng, instructions, phrase.upper(), phrase)


def _json_fields(rng: random.Random) -> Task:
    name = rng.choice(NAMES)
    if rng.random() < 0.7:
        age = rng.randint(18, 89)
        given, fields = f"{name} is {age}.", {"name": name, "age": age}
    else:
        city = rng.choice(CITIES)
        given, fields = f"{name} lives in {city}.", {"name": name, "city": city}
    keys = " and ".join(fields)
    instructions = (f"Write as JSON with keys {keys}", f"Reply with only JSON, keys {keys}")
    return _task("json_fields", rng, instructions, given, json.dumps(fields))


def _first_word(rng: random.Random) -> Task:
    words = rng.sample(NOUNS, rng.randint(3, 4))
    instructions = ("Reply with only the first word", "Write the first word and nothing else")
    return _task("first_word", rng, instructions, " ".join(words), words[0])


def _last_word(rng: random.Random) -> Task:
    words = rng.sample(NOUNS, rng.randint(3, 4))
    instructions = ("Reply with only the last word", "Write the last word and nothing else")
    return _task("last_word", rng, instructions, " ".join(words), words[-1])


def _quotes(rng: random.Random) -> Task:
    phrase = _phrase(rng)
    instructions = ("Repeat in double quotes", "Reply with only this in double quotes")
    return _task("quotes", rng, instructions, phrase, f'"{phrase}"')


def _pipes(rng: random.Random) -> Task:
    words = rng.sample(NOUNS, 3)
    instructions = ('Join the words with " | "', 'Reply with the words separated by " | "')
    return _task("pipes", rng, instructions, ", ".join(words), " | ".join(words))


def _bullets(rng: random.Random) -> Task:
    words = rng.sample(NOUNS, rng.randint(2, 3))
    instructions = ('Write as a list, each line starting with "- "', 'List one per line after "- "')
    return _task("bullets", rng, instructions, ", ".join(words), "\n".join(f"- {word}" for word in words))


def _bold(rng: random.Random) -> Task:
    phrase = _phrase(rng)
    instructions = ("Wrap in <b></b> tags", "Reply with only this inside <b></b>")
    return _task("bold", rng, instructions, phrase, f"<b>{phrase}</b>")


def _initials(rng: random.Random) -> Task:
    name, surname = rng.choice(NAMES), rng.choice(SURNAMES)
    instructions = ("Write only the initials, like A.B.", "Reply with the initials in the form A.B.")
    return _task("initials", rng, instructions, f"{name} {surname}", f"{name[0]}.{surname[0]}.")


def _count_word(rng: random.Random) -> Task:
    word, *others = rng.sample(NOUNS, 3)
    count = rng.randint(1, 4)
    words = [word] * count + others
    rng.shuffle(words)
    instructions = (
        f'How often is "{word}" here? Reply with a digit',
        f'Count the word "{word}". Write the digit only',
    )
    return _task("count_word", rng, instructions, " ".join(words), str(count))


TASK_KINDS: dict[str, Callable[[random.Random], Task]] = {
    "capitals": _capitals,
    "lower_case": _lower_case,
    "json_fields": _json_fields,
    "first_word": _first_word,
    "last_word": _last_word,
    "quotes": _quotes,
    "pipes": _pipes,
    "bullets": _bullets,
    "bold": _bold,
    "initials": _initials,
    "count_word": _count_word,
}

# --------------------------------------------------------------------------------------------------------
# Grades

SCORE_MEANINGS = {
    1.0: "the answer, exactly (trailing white space aside; JSON by value)",
    0.7: "the answer, with only punctuation or white space around it",
    0.5: "the answer, once, with chatter before or after it",
    0.3: "the right content in the wrong form (case, separator, quotes, tags) and nothing else",
    0.2: "the right content in the wrong form, among other words",
    0.1: "the answer's words, not told apart: the payload given back, another order, several answers",
    0.0: "wrong, empty or off the task",
}
EXACT, PUNCTUATED, CHATTY, MISFORMATTED, MISFORMATTED_CHATTY, WORDS_ONLY, WRONG = SCORE_MEANINGS

PICKING_KINDS = frozenset({"first_word", "last_word", "count_word"})
"""Kinds whose answer is one of a few candidates: naming a second candidate is hedging, not chatter."""

_SECOND_ANSWER = {
    "capitals": r"[A-Z]{2,}",
    "json_fields": r"\{",
    "pipes": r"\|",
    "bullets": r"(?m)^\s*[-*] ",
    "bold": r"<b>",
    "initials": r"\b[A-Z]\.",
}
"""By kind, a pattern that shows in the rest of the text that there is a second answer, or a longer one."""


def grade(task: Task, response: str) -> float:
    """The score of a response, one of `SCORE_MEANINGS`; a pure function and the only place that decides it."""
    text = _with_canonical_json(task, response.rstrip())
    if text == task.answer:
        return EXACT
    # The payload of a picking task contains the answer: repeating the payload must not count as an answer.
    own_text = _without_echo(task, text) if task.kind in PICKING_KINDS else text.replace(task.prompt, " ")
    rest = _without_answer(task, own_text)
    if rest is not None and not re.search(_second_answer(task), rest):
        return PUNCTUATED if own_text == text and not re.search(r"\w", rest) else CHATTY
    return _grade_content(task, text)


def is_correct(task: Task, response: str) -> bool:
    return grade(task, response) == EXACT


def _grade_content(task: Task, text: str) -> float:
    """The score of a response that does not contain the answer in the requested form."""
    own_text = _without_echo(task, text)
    hedged = task.kind in PICKING_KINDS and re.search(_second_answer(task), own_text, re.IGNORECASE)
    wanted, own_words = _content_words(task, task.answer), _content_words(task, own_text)
    if not hedged and "".join(own_words) == "".join(wanted):
        return MISFORMATTED
    if not hedged and _spells(own_words, "".join(wanted)):
        return MISFORMATTED_CHATTY
    return WORDS_ONLY if set(wanted) <= set(_content_words(task, text)) else WRONG


def _with_canonical_json(task: Task, text: str) -> str:
    """`text` in which each JSON object equal to the answer (in any spacing or key order) is written like the answer."""
    if task.kind != "json_fields":
        return text
    wanted = _json_fields_of(task.answer)

    def respelt(found: re.Match[str]) -> str:
        return task.answer if _json_fields_of(found[0]) == wanted else found[0]

    return re.sub(r"\{[^{}]*\}", respelt, text)


def _json_fields_of(text: str) -> list[tuple[str, str]] | None:
    """A flat object's fields, sorted; values by their JSON text, so that 31, 31.0 and "31" differ."""
    try:
        return json.loads(text, object_pairs_hook=lambda fields: sorted((k, json.dumps(v)) for k, v in fields))
    except (ValueError, RecursionError):
        return None


def _without_answer(task: Task, text: str) -> str | None:
    """`text` without the answer; None if the answer does not occur exactly once: a repetition is not an answer."""
    parts = re.split(rf"(?<!\w){re.escape(task.answer)}(?!\w)", text)
    return "".join(parts) if len(parts) == 2 else None


def _without_echo(task: Task, text: str) -> str:
    """`text` without restatements of the prompt and the payload.

    Except for picking tasks, a payload inside quotes, stars or tags stays, because it is an attempt at a form.
    """
    text = text.replace(task.prompt, " ")
    if task.kind in PICKING_KINDS:
        return text.replace(payload(task), " ")
    return re.sub(rf"(?<![\w\"'`*_>(\[]){re.escape(payload(task))}(?![\w\"'`*_<)\]])", " ", text)


def _second_answer(task: Task) -> str:
    """A pattern for a second answer in the rest of the text; `(?!)` matches nothing."""
    if task.kind == "count_word":
        others = [r"\d+", *NUMBER_WORDS]
        own = {word for word, digit in NUMBER_WORDS.items() if digit == task.answer}
        return rf"(?!\b{task.answer}\b)\b(?:{'|'.join(o for o in others if o not in own)})\b"
    if task.kind in PICKING_KINDS:
        return rf"\b(?:{'|'.join(word for word in payload(task).split() if word != task.answer)})\b"
    return _SECOND_ANSWER.get(task.kind, "(?!)")


def _content_words(task: Task, text: str) -> list[str]:
    """Words and numbers in lower case, without tags and list numbers: the content without its form."""
    bare = re.sub(r"</?\w+>|^\s*\d+[.)]\s(?=\s*[A-Za-z])", " ", text, flags=re.MULTILINE)
    words = re.findall(r"[^\W_]+", bare.casefold())
    return [NUMBER_WORDS.get(word, word) for word in words] if task.kind == "count_word" else words


def _spells(words: list[str], wanted: str) -> bool:
    """Whether some consecutive words, joined, are `wanted` ("M S" and "MS" both match M.S.)."""
    for start in range(len(words)):
        run = ""
        for word in words[start:]:
            run += word
            if run == wanted:
                return True
            if not wanted.startswith(run):
                break
    return False
