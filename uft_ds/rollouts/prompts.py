"""The texts of online sources' prompts, which scorers read: turns, tools and all that a row says besides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from uft_ds.data.example import Message
from uft_ds.data.rows.reading import find_data
from uft_ds.data.sources import PreparedSource, SourceSettings
from uft_ds.errors import UserError
from uft_ds.scoring.item import Item
from uft_ds.scoring.rows import Reading, Rows


@dataclass(frozen=True)
class PromptText:
    """A prompt as its row holds it. meta: the columns that the format does not read."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...]
    meta: Mapping[str, Any]

    def item(self, response: str, place: str, row: int) -> Item:
        """An answer to this prompt, as a scorer takes it. row: the number of its group."""
        return Item(place, self.messages, response, self.meta, self.tools, row)


def read_prompts(source: PreparedSource) -> dict[str, PromptText]:
    """All prompts of a source by their place, `file:line`.

    Raises:
        UserError: the data is no longer what it was when it was tokenised, or cannot be read.
    """
    settings = source.settings
    selection = source.selection
    wanted = {selection.store.origin(int(unit)) for unit in selection.units_U}
    rows = Rows(_reading_of(settings))
    own, names = find_data(settings.path, settings.split, settings.path_key).names, selection.store.names
    found = {
        _renamed(row.place, own, names): PromptText(item.messages, item.tools, item.meta)
        for row in rows.rows()
        if not row.fault
        for item in row.items
    }
    lacking = sorted(wanted - found.keys())
    if lacking:
        raise UserError(
            f"{lacking[0]}: the prompt is no longer there ({len(lacking)} of {len(wanted)} are missing): the data of "
            f"{source.label} has changed since it was tokenised; bring it back, or start a new run"
        )
    return {place: found[place] for place in wanted}


def _reading_of(settings: SourceSettings) -> Reading:
    # Bad rows are those that the tokens were made without.
    return Reading(
        settings.path,
        settings.rules.format,
        settings.split,
        settings.rules.columns,
        max_quarantined=1.0,
        path_key=settings.path_key,
    )


def _renamed(place: str, own: tuple[str, ...], names: tuple[str, ...]) -> str:
    """The place by the name that the store has for its file: the data may have moved since it was tokenised."""
    for here, then in zip(own, names, strict=True):
        after = place.removeprefix(here)
        if after != place and after[:1] in (":", "["):
            return f"{then}{after}"
    return place
