"""A source's `columns`: the data's names become the format's."""

import pytest

from uft_ds.data.rows.csv_rows import CsvRow
from uft_ds.data.rows.renaming import renamed


def test_columns_get_the_formats_names() -> None:
    """Names may change places, a column may be left out, and one that this row lacks is lacking."""
    row = {"question": "q", "prompt": "p", "system": "s", "id": 1}
    columns = [("prompt", "question"), ("meta", "prompt"), ("system", None), ("score", "stars")]
    assert renamed(row, columns) == {"prompt": "q", "meta": "p", "id": 1}
    assert renamed(row, ()) is row


def test_two_values_for_one_column_are_refused() -> None:
    """Neither is silently lost; null says nothing."""
    with pytest.raises(ValueError, match="holds 'prompt', and 'question', which `columns` gives the same name"):
        renamed({"prompt": "p", "question": "q"}, [("prompt", "question")])
    assert renamed({"prompt": None, "question": "q"}, [("prompt", "question")]) == {"prompt": "q"}


def test_a_cell_becomes_a_number_by_its_new_name() -> None:
    """As if the csv file had named the column so; text of other files stays text, and is refused by the format."""
    columns = [("score", "stars")]
    assert renamed(CsvRow(stars="0.5"), columns) == {"score": 0.5}
    assert renamed({"stars": "0.5"}, columns) == {"score": "0.5"}
    with pytest.raises(ValueError, match="column 'score' holds 'good'"):
        renamed(CsvRow(stars="good"), columns)
