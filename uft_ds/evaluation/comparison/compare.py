"""Differences between models, in pairs over the same items, and the alignment tax."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from uft_ds.errors import UserError
from uft_ds.evaluation.columns import Column, board_averages, columns_for
from uft_ds.evaluation.comparison.contestants import Contestant, cut_prompts, pairs_of, unlike_settings
from uft_ds.evaluation.comparison.paired import Difference, holm, paired_difference


@dataclass(frozen=True)
class Comparison:
    """All that the tables show.

    values: by model and column, as reported; None where a model has no such number. averages: of a board's columns, by
        model; only where the model has them all. against: the model that the others are compared with.
    differences: model minus `against`, by model and column; None where they did not answer the same items, or where the
        number is no mean over items. Their p-values are adjusted for the number of columns (Holm).
    taxes: by model and origin (base, SFT): what alignment has cost there. judges: by column. cut: of which tasks
        prompts lost their beginning, in words.
    """

    names: tuple[str, ...]
    columns: tuple[Column, ...]
    values: Mapping[str, Mapping[str, float | None]]
    averages: Mapping[str, Mapping[str, float]]
    against: str
    differences: Mapping[str, Mapping[str, Difference | None]]
    taxes: Mapping[str, Mapping[str, Tax]]
    judges: Mapping[str, str]
    unlike: tuple[str, ...]
    cut: tuple[str, ...]


@dataclass(frozen=True)
class Tax:
    """What a model has lost against the model that it was trained from.

    differences: by column, model minus origin; None without pairs. Their p-values are not adjusted.
    lost: the mean over the taxed columns of what was lost, where a gain counts as nothing lost.
    changed: the plain mean, gains included. Both are shares; None where no column is in both.
    columns: how many they are the mean of.
    lost_by_chance: `lost` of two models whose items differ as much, but by a coin; None where no column has pairs.
    paired: the columns with pairs, of which that is the mean.
    """

    origin: str
    differences: Mapping[str, Difference | None]
    lost: float | None
    changed: float | None
    columns: int
    lost_by_chance: float | None
    paired: int


def compare(
    contestants: Sequence[Contestant], *, against: str | None, origins: Sequence[str] = (), allow_unlike: bool = False
) -> Comparison:
    """Put models side by side.

    Args:
        against: the model that the others are compared with; the first where None.
        origins: models that the others were trained from (the base, the SFT model), for the alignment tax.
        allow_unlike: numbers that were made under other conditions may stand beside each other; said with them.

    Raises:
        UserError: a name is unknown, models were evaluated under other conditions, or they share no task.
    """
    by_name = {one.name: one for one in contestants}
    against = contestants[0].name if against is None else against
    for name in (against, *origins):
        if name not in by_name:
            raise UserError(f"no model is called {name!r}; expected one of {', '.join(by_name)}")
    columns = columns_for(_tasks_of(contestants), _parts_of(contestants))
    shared = [column for column in columns if sum(one.value(column) is not None for one in contestants) > 1]
    if not shared:
        raise UserError(
            "no task is in the evaluations of two models: "
            + "; ".join(f"{one.name} has {', '.join(one.results)}" for one in contestants)
        )
    unlike = unlike_settings(contestants, columns)
    if unlike and not allow_unlike:
        raise UserError(
            "the models were evaluated under other conditions, so their numbers cannot stand beside each other:\n  "
            + "\n  ".join(unlike)
            + "\nevaluate them alike, or give --allow-unlike: the table then says it"
        )
    return Comparison(
        tuple(by_name),
        tuple(columns),
        {one.name: {column.name: one.value(column) for column in columns} for one in contestants},
        {one.name: board_averages(one.value) for one in contestants},
        against,
        {one.name: _differences(one, by_name[against], columns) for one in contestants if one.name != against},
        {
            one.name: {origin: _tax(one, by_name[origin], columns) for origin in _origins_of(one.name, origins)}
            for one in contestants
        },
        _judges(contestants, columns),
        tuple(unlike),
        tuple(cut_prompts(contestants, columns)),
    )


def _origins_of(name: str, origins: Sequence[str]) -> Sequence[str]:
    """What a model was trained from: all origins, or, of an origin itself, those named before it."""
    return origins[: origins.index(name)] if name in origins else origins


def _tasks_of(contestants: Sequence[Contestant]) -> list[tuple[str, list[str]]]:
    """In the order in which they first come; a metric counts where one model has it."""
    found: dict[str, dict[str, None]] = {}
    for one in contestants:
        for task, (_, _, result) in one.results.items():
            found.setdefault(task, {}).update(dict.fromkeys(result.metrics))
    return [(task, list(metrics)) for task, metrics in found.items()]


def _parts_of(contestants: Sequence[Contestant]) -> set[str]:
    """Tasks that a group is the mean of, and groups of a part of another group's tasks: mmlu has 57 and 4 of them."""
    groups = [(task, frozenset(result.parts)) for one in contestants for task, (_, _, result) in one.results.items()]
    inner = {task for task, own in groups if own and any(own < of_other for _, of_other in groups)}
    return inner.union(*(parts for _, parts in groups))


def _differences(one: Contestant, other: Contestant, columns: Sequence[Column]) -> dict[str, Difference | None]:
    """By column, with p-values that are adjusted for the number of columns."""
    found = _unadjusted(one, other, columns)
    known = {name: difference for name, difference in found.items() if difference is not None}
    adjusted = holm([difference.p for difference in known.values()])
    return found | {
        name: replace(difference, p=p) for (name, difference), p in zip(known.items(), adjusted, strict=True)
    }


def _unadjusted(one: Contestant, other: Contestant, columns: Sequence[Column]) -> dict[str, Difference | None]:
    found: dict[str, Difference | None] = {}
    for column in columns:
        pairs = pairs_of(one.item_values(column), other.item_values(column))
        found[column.name] = paired_difference(*pairs) if pairs else None
    return found


def _tax(one: Contestant, origin: Contestant, columns: Sequence[Column]) -> Tax:
    taxed = [column for column in columns if column.is_taxed]
    changes = [
        ours - theirs
        for column in taxed
        if (ours := one.value(column)) is not None and (theirs := origin.value(column)) is not None
    ]
    differences = _unadjusted(one, origin, taxed)
    if not changes:
        return Tax(origin.name, differences, None, None, 0, None, 0)
    lost = sum(max(0.0, -change) for change in changes) / len(changes)
    # A coin makes a loss as often as a gain of the same size, so half of the size is lost.
    by_chance = [difference.by_chance / 2 for difference in differences.values() if difference is not None]
    lost_by_chance = sum(by_chance) / len(by_chance) if by_chance else None
    changed = sum(changes) / len(changes)
    return Tax(origin.name, differences, lost, changed, len(changes), lost_by_chance, len(by_chance))


def _judges(contestants: Sequence[Contestant], columns: Sequence[Column]) -> dict[str, str]:
    found = {}
    for column in columns:
        names = {
            judge for one in contestants if column.task in one.results and (judge := one.results[column.task][2].judge)
        }
        if names:
            found[column.name] = ", ".join(sorted(names))
    return found
