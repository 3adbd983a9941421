"""What is said of settings that a run does not read; and that nothing is said of those that it does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sources import write_rows
from tiny import build_tiny_tokenizer

from uft_ds.data.sources import PreparedData
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer
from uft_ds.data.tokens.tokenize import load_tokenizer
from uft_ds.errors import UserError
from uft_ds.recipe.file import recipe_from_tree
from uft_ds.recipe.rules import GivenObjective, kind_problems
from uft_ds.recipe.to_settings import settings_of
from uft_ds.recipe.unused import unused
from uft_ds.run.prepare import prepare_data

PROMPTS = [{"prompt": f"q{i}"} for i in range(4)]
ROWS: dict[str, list[dict[str, Any]]] = {
    "instruction": [row | {"response": "a"} for row in PROMPTS],
    "score": [row | {"response": "a", "score": 0.2 + i / 10} for i, row in enumerate(PROMPTS)],
    "good": [row | {"response": "good", "score": 0.6 + i / 10} for i, row in enumerate(PROMPTS)],
    "binary": [row | {"response": "a", "label": i % 2 == 0} for i, row in enumerate(PROMPTS)],
    "pair": [row | {"chosen": "a", "rejected": "b"} for row in PROMPTS],
    "scored_pair": [
        row | {"chosen": "a", "rejected": "b", "score_chosen": 0.9, "score_rejected": i / 10}
        for i, row in enumerate(PROMPTS)
    ],
    "scored_and_plain_pairs": [
        row | {"chosen": "a", "rejected": "b"} | ({"score_chosen": 0.9, "score_rejected": 0.1} if i % 2 else {})
        for i, row in enumerate(PROMPTS)
    ],
}


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return load_tokenizer(str(build_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


def test_split_pairs_are_told_how_to_stay(chat: ChatTokenizer, tmp_path: Path) -> None:
    """The remedy is the source's, not another loss."""
    with pytest.raises(UserError, match=r"'dpo' needs pairs, data\.sources\.0\.pairs: split .* take pairs: keep"):
        notes(chat, tmp_path, {"loss": "dpo"}, "pair", pairs="split")


def test_data_that_a_reward_model_cannot_learn_from_is_refused(chat: ChatTokenizer, tmp_path: Path) -> None:
    """Instructions have nothing worse beside them, and a margin of scores needs scores; nothing is said of beta."""
    head: dict[str, Any] = {"reward": "head", "loss": {"pair": "bradley_terry", "score": "bce", "instruction": "mse"}}
    with pytest.raises(UserError, match=r"reward: head learns which response is better, .* of kind 'instr"):
        notes(chat, tmp_path, head, "instruction")
    with pytest.raises(UserError, match="margin: scores given, but no row of"):
        notes(chat, tmp_path, head | {"margin": "scores"}, "pair")
    kept = head | {"loss": {"pair": "bradley_terry", "score": "bce"}}
    assert notes(chat, tmp_path, kept | {"margin": "scores"}, "scored_pair", "score") == []
    assert notes(chat, tmp_path, kept, "pair", "score") == []


def prepared(
    chat: ChatTokenizer, folder: Path, objective: dict[str, Any], *names: str, answers: int | None = None, **entry: Any
) -> tuple[GivenObjective, PreparedData]:
    """The objective and the data of a recipe with these sources; `entry` is of each.

    answers: how often the policy is asked each of a further source's prompts; None: there is no such source.
    """
    sources: list[dict[str, Any]] = [
        {"format": "jsonl", "path": str(write_rows(folder / f"{name}.jsonl", ROWS[name])), **entry} for name in names
    ]
    if answers is not None:
        path = write_rows(folder / "prompts.jsonl", PROMPTS)
        sources.append({"format": "prompts", "path": str(path), "answers": answers, "score_by": "regex:4"})
    data = {"sources": sources, "cache_dir": str(folder / "tokens"), "max_length": 64, "workers": 1}
    tree = {"name": "x", "model": {"base": "b"}, "data": data, "objective": objective, "output": "o"}
    generator = {} if answers is None else {"generator": {"max_new_tokens": 8}}
    settings = settings_of(recipe_from_tree(tree | generator, "x"))
    return settings.given, prepare_data(settings, chat)


def notes(chat: ChatTokenizer, folder: Path, objective: dict[str, Any], *names: str, **entry: Any) -> list[str]:
    return list(unused(*prepared(chat, folder, objective, *names, **entry)))


OWN = {"instruction": "mse", "score": "rloo"}


def test_own_answers_are_a_source_of_scores(chat: ChatTokenizer, tmp_path: Path) -> None:
    """Of a run whose policy answers prompts nothing is said to be unused; of one on data alone, rloo and center are."""
    own = {"loss": OWN, "beta": {"instruction": 0.01, "score": 0.05}}
    assert notes(chat, tmp_path, own, "instruction", answers=4) == []
    assert notes(chat, tmp_path, own, "instruction") == [
        "objective.loss.score: rloo given, but no source holds responses of kind 'score'",
        "objective.beta.score: 0.05 given, but no source holds responses of kind 'score'",
    ]
    assert notes(chat, tmp_path, {"center": "prompt"}, "instruction", answers=4) == []
    assert notes(chat, tmp_path, {"center": "prompt"}, "instruction") == [
        "objective.center: prompt given, but nothing is trained on that has scores to compare"
    ]


@pytest.mark.parametrize(
    ("objective", "problem"),
    [
        (
            {"loss": OWN},
            "objective.loss: 'rloo' compares the answers to one prompt with each other, but data.sources.1",
        ),
        ({"center": "prompt"}, "objective.center: prompt compares the answers to one prompt with each other, but data"),
        ({"loss": {"instruction": "mse", "score": "reinforce"}}, None),
        ({"loss": "mse"}, None),
    ],
)
def test_one_answer_has_no_other_to_be_compared_with(
    objective: dict[str, Any], problem: str | None, chat: ChatTokenizer, tmp_path: Path
) -> None:
    """Two answers to a prompt where they are compared; any number where each meets its own score."""
    prepared(chat, tmp_path, objective, "instruction", answers=2)
    if problem is None:
        prepared(chat, tmp_path, objective, "instruction", answers=1)
        return
    with pytest.raises(UserError) as refusal:
        prepared(chat, tmp_path, objective, "instruction", answers=1)
    assert str(refusal.value).startswith(problem)
    assert str(refusal.value).endswith(".answers is 1; take 2 or more")


def test_own_answers_need_a_loss(chat: ChatTokenizer, tmp_path: Path) -> None:
    """They are of kind score, as the message says."""
    with pytest.raises(UserError, match=r"loss: no loss for kind 'score', which data\.sources\.1 .* holds"):
        prepared(chat, tmp_path, {"loss": {"instruction": "mse"}}, "instruction", answers=4)


def test_answers_of_data_are_not_the_policys(chat: ChatTokenizer, tmp_path: Path) -> None:
    """rloo cannot train on them, whoever answers beside them; held out they have no loss, and are welcome."""
    for answers in (None, 4):
        with pytest.raises(
            UserError, match=r"loss: 'rloo' trains on the policy's own answers, but data\.sources\.1 .* holds"
        ):
            prepared(chat, tmp_path, {"loss": OWN}, "instruction", "score", answers=answers)
    given, data = prepared(chat, tmp_path, {"loss": OWN}, "instruction", answers=4)
    _, others = prepared(chat, tmp_path, {"loss": "mse"}, "score")
    assert list(kind_problems(given, replace(data, held_out=others.train))) == []


@pytest.mark.parametrize(
    ("objective", "names", "entry", "expected"),
    [
        (
            {"loss": {"instruction": "nll", "pair": "dpo"}},
            ["instruction"],
            {},
            ["objective.loss.pair: dpo given, but no source holds responses of kind 'pair'"],
        ),
        (
            {"beta": {"score": 0.1, "binary": 0.2}, "weights": {"pair": 2.0}},
            ["score"],
            {},
            [
                "objective.beta.binary: 0.2 given, but no source holds responses of kind 'binary'",
                "objective.weights.pair: 2.0 given, but no source holds responses of kind 'pair'",
            ],
        ),
        ({"loss": "nll", "beta": 0.1}, ["instruction"], {}, ["objective.beta: 0.1 given, but nll has no beta"]),
        (
            {"loss": {"instruction": "nll", "pair": "dpo"}, "beta": {"instruction": 0.1}},
            ["instruction", "pair"],
            {},
            [
                "objective.beta.instruction: 0.1 given, but nll has no beta",
                "objective.beta: not given for pair, which has the default 0.01",
            ],
        ),
        (
            {"loss": "nll", "beta_schedule": "linear", "beta_end": 2.0},
            ["instruction"],
            {},
            ["objective.beta_schedule: linear given, but nll has no beta"],
        ),
        (
            {"loss": {"pair": "dpo", "score": "mse"}, "reward_shift": "ema", "beta": 0.1},
            ["pair"],
            {},
            [
                "objective.loss.score: mse given, but no source holds responses of kind 'score'",
                "objective.reward_shift: ema given, but no training source has a pointwise loss; others ignore it",
            ],
        ),
        (
            {"loss": "l1", "undesirable_weight": 0.5},
            ["score"],
            {},
            [
                "objective.beta: not given; l1 has the default 0.01, which is UFT's own",
                "objective.undesirable_weight: 0.5 given, but kind 'binary', which it is for, is held by no source",
            ],
        ),
        (
            {"loss": "nll", "undesirable_weight": 0.5},
            ["binary"],
            {},
            ["objective.undesirable_weight: 0.5 given, but kind 'binary', which it is for, has no pointwise loss"],
        ),
        (
            {"loss": {"instruction": "mse", "pair": "dpo"}, "beta": {"pair": 0.1}},
            ["instruction", "pair"],
            {},
            ["objective.beta: not given for instruction, which has the default 0.01"],
        ),
        (
            {"loss": "l1", "reward_shift": "kl", "beta": 0.1},
            ["good", "instruction"],
            {},
            ["objective.reward_shift: kl (KTO) given, but no response is undesirable (a score below 0.5)"],
        ),
        (
            {},
            ["score"],
            {"score": 0.9},
            ["data.sources.0.score: 0.9 given, which is for rows of kind 'instruction'; F/score.jsonl holds score"],
        ),
        (
            {"loss": "dpo", "beta": 0.1},
            ["pair"],
            {"score_map": [0.5, 0.25]},
            ["data.sources.0.score_map: [0.5, 0.25] given, but dpo reads no scores"],
        ),
        (
            {},
            ["instruction"],
            {"mixed_kinds": True, "score_range": [1, 10]},
            [
                "data.sources.0.mixed_kinds: true given, but all rows are of kind 'instruction'",
                "data.sources.0.score_range: [1, 10] given, but no row has a score",
            ],
        ),
    ],
)
def test_what_plays_no_part_is_said(
    chat: ChatTokenizer,
    tmp_path: Path,
    objective: dict[str, Any],
    names: list[str],
    entry: dict[str, Any],
    expected: list[str],
) -> None:
    """The key, what it is, and what is missing."""
    found = notes(chat, tmp_path, objective, *names, **entry)
    assert [note.replace(str(tmp_path), "F") for note in found] == expected


@pytest.mark.parametrize(
    ("objective", "names", "entry"),
    [
        ({}, ["instruction", "score", "pair", "binary"], {}),
        ({"loss": "mse", "beta": {"instruction": 0.1}}, ["instruction"], {"score": 0.9}),
        ({"loss": "l1", "reward_shift": "kl", "undesirable_weight": 0.5, "beta": 0.1}, ["binary"], {}),
        ({"loss": "l1", "reward_shift": "kl", "beta": 0.1}, ["good", "score"], {}),
        ({"loss": "rpo_sq", "beta": 0.1}, ["pair"], {"score_map": [0.5, 0.25]}),
        ({"loss": "simpo", "beta": 2.0}, ["pair"], {}),
        ({"loss": "mse", "reward_shift": "kl"}, ["good"], {}),
        ({"loss": "nll", "beta": 0.01}, ["instruction"], {}),
        ({"loss": {"pair": "orpo", "score": "mse"}, "beta": 0.1}, ["pair", "score"], {}),
        ({"loss": "mse", "length_normalized": True, "beta": {"instruction": 2.0}}, ["instruction"], {}),
        ({}, ["scored_and_plain_pairs"], {"mixed_kinds": True}),
        ({}, ["scored_and_plain_pairs"], {"mixed_kinds": True, "pairs": "split"}),
    ],
)
def test_nothing_is_said_of_what_is_read(
    chat: ChatTokenizer, tmp_path: Path, objective: dict[str, Any], names: list[str], entry: dict[str, Any]
) -> None:
    """A note that is there every time is read no more."""
    assert not notes(chat, tmp_path, objective, *names, **entry)


@pytest.mark.parametrize(
    ("objective", "names", "expected"),
    [
        (
            {"loss": "mse", "length_normalized": True, "beta": {"pair": 2.0}},
            ["instruction"],
            "objective.beta: not given for instruction: the default 0.01 is per nat",
        ),
        (
            {"loss": {"pair": "dpo"}},
            ["pair", "score"],
            "objective.loss: no loss for kind 'score', which data.sources.1 FOLDER/score.jsonl holds",
        ),
        ({"weights": {"pair": 0.0}}, ["pair"], "objective.weights: 0 for pair, which is all that is trained on"),
        (
            {"loss": "dpo"},
            ["score", "pair", "instruction"],
            "objective.loss: 'dpo' needs pairs, data.sources.0 FOLDER/score.jsonl holds responses of kind 'score': "
            "give a loss for each kind, as in {pair: dpo, score: mse}\n"
            "objective.loss: 'dpo' needs pairs, data.sources.2 FOLDER/instruction.jsonl holds",
        ),
    ],
)
def test_what_cannot_be_is_refused_when_the_kinds_are_known(
    chat: ChatTokenizer, tmp_path: Path, objective: dict[str, Any], names: list[str], expected: str
) -> None:
    """All of it at once."""
    with pytest.raises(UserError) as caught:
        notes(chat, tmp_path, objective, *names)
    assert str(caught.value).replace(str(tmp_path), "FOLDER").startswith(expected)
