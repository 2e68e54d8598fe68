"""Rows of a table in which every pair of choices stands at least once; what may not be combined is left out."""

import functools
import itertools
from collections.abc import Iterable, Sequence

from allpairspy import AllPairs

Choices = dict[str, dict[str, dict]]
"""What can be chosen, by axis and by name: flags."""
Pair = set[tuple[str, str]]
"""Two choices, each an axis and a name."""


def pairs_of(choices: Choices, refused: Sequence[Pair] = ()) -> list[Pair]:
    """All pairs that are not refused."""
    return [
        {(first, one), (second, other)}
        for first, second in itertools.combinations(choices, 2)
        for one in choices[first]
        for other in choices[second]
        if {(first, one), (second, other)} not in refused
    ]


def rows_of(choices: Choices, refused: Sequence[Pair] = ()) -> list[tuple[str, ...]]:
    """The library's rows, and more for the pairs that its filter lets fall through, as many in each as go together."""

    def is_allowed(chosen: Iterable[str]) -> bool:
        found = set(zip(choices, chosen, strict=False))
        return not any(pair <= found for pair in refused)

    def fits(row: dict[str, str], pair: Pair) -> bool:
        found = {*row.items(), *pair}
        return len(dict(found)) == len(found) and not any(other <= found for other in refused)

    def filled(row: dict[str, str]) -> tuple[str, ...]:
        for axis in [axis for axis in choices if axis not in row]:
            row |= {axis: next(option for option in choices[axis] if fits(row, {(axis, option)}))}
        return tuple(row[axis] for axis in choices)

    choices, order = dict(sorted(choices.items(), key=lambda item: -len(item[1]))), list(choices)  # fewer rows so
    rows = [tuple(row) for row in AllPairs([list(options) for options in choices.values()], filter_func=is_allowed)]
    covered = [set(zip(choices, row, strict=True)) for row in rows]
    left = [pair for pair in pairs_of(choices, refused) if not any(pair <= row for row in covered)]
    while left:
        row = {}
        for pair in left:
            row |= dict(pair) if fits(row, pair) else {}
        rows.append(filled(row))
        left = [pair for pair in left if not pair <= row.items()]
    return [tuple(dict(zip(choices, row, strict=True))[axis] for axis in order) for row in rows]


def flags_of(choices: Choices, row: tuple[str, ...]) -> dict:
    """The flags of a row."""
    return functools.reduce(dict.__or__, (choices[axis][choice] for axis, choice in zip(choices, row, strict=True)))


def assert_covers(choices: Choices, refused: Sequence[Pair], rows: list[tuple[str, ...]]) -> None:
    """Every allowed pair is in a row, and no refused one is."""
    found = [set(zip(choices, row, strict=True)) for row in rows]
    for pair in pairs_of(choices, refused):
        assert any(pair <= row for row in found), pair
    for pair in refused:
        assert not any(pair <= row for row in found), pair
