"""A row that is read as the wrong format is told which format it is of, by its columns."""

import pytest

from uft_ds.data.formats.guess import other_formats
from uft_ds.data.formats.table import FORMATS, PROMPTS, Row

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
ROWS: dict[str, tuple[Row, str]] = {
    "jsonl": ({"prompt": "q", "response": "a"}, "jsonl"),
    "jsonl score": ({"prompt": "q", "response": "a", "score": 0.5}, "jsonl"),
    "jsonl pair": ({"prompt": "q", "chosen": "a", "rejected": "b"}, "jsonl or trl"),
    "trl": ({"prompt": "q", "completion": "a"}, "trl"),
    "kto": ({"prompt": "q", "completion": "a", "label": True}, "trl or kto"),
    "ultrachat": ({"messages": TURNS}, "jsonl, trl or ultrachat"),
    "alpaca": ({"instruction": "q", "output": "a"}, "alpaca"),
    "sharegpt": ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "sharegpt"),
    "helpsteer2": (
        {"prompt": "q", "response": "a", "helpfulness": 4, "correctness": 4, "coherence": 4},
        "helpsteer2",
    ),
    "helpsteer2_preference": (
        {"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": 1},
        "helpsteer2_preference",
    ),
    "ultrafeedback": (
        {"instruction": "q", "completions": [{"response": "a", "overall_score": 7}]},
        "ultrafeedback",
    ),
    "ultrafeedback_binarized": (
        {"prompt": "q", "chosen": TURNS, "rejected": [*TURNS[:1], {"role": "assistant", "content": "b"}]}
        | {"score_chosen": 7, "score_rejected": 2, "messages": None},
        "trl or ultrafeedback_binarized",
    ),
    "hh_rlhf": ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}, "hh_rlhf"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_names_its_formats_to_every_other(name: str) -> None:
    """Each format's row, read as every format of the table: the formats that read it are named, but for the given."""
    row, either = ROWS[name]
    its_own = either.replace(" or ", ", ").split(", ")
    keys = ", ".join(key for key, value in row.items() if value is not None)
    # A row with an answer that is read as a prompt is told how to leave the answer out.
    for given in FORMATS.keys() - set(its_own) - {PROMPTS}:
        assert other_formats(row, given) == f"keys {keys}: this is format {either}"
    for given in its_own:
        assert given not in other_formats(row, given).rpartition("format ")[2].replace(" or ", ", ").split(", ")


def test_nothing_is_guessed_where_no_format_reads_the_row() -> None:
    """Nor of a format of another package, whose rows may look like anything."""
    assert other_formats({"text": "t"}, "jsonl") == ""
    assert other_formats({"prompt": "q", "response": ""}, "trl") == ""
    assert other_formats({"prompt": "q", "response": "a"}, "of_a_plug_in") == ""
    assert other_formats({}, "jsonl") == ""
