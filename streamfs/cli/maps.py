"""Buffer maps as bars of characters: where a stream's bytes are, and who is where in them. Knows no terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, TypeAlias

from streamfs.cli.looking import Row

Cell: TypeAlias = Literal["memory", "disk", "part", "missing"]
"""What a cell's bytes are: all here (most of them in memory, or on disk), some of them, or none."""


def extent(row: Row) -> tuple[int, int]:
    """The bytes that a map of this row spans, [start, stop): all of them where the length is known, else from the first
    that is kept to the furthest that anybody has anything to do with."""
    if row.get("size") is not None:
        return 0, row["size"]
    runs = _runs(row, "memory") + _runs(row, "disk")
    places = [*positions(row), *fetching(row), *(stop for _, stop in runs)]
    start = min((start for start, _ in runs), default=0)
    return min([start, *places]), max([start, *places])


def cells(row: Row, width: int) -> list[Cell]:
    """The map in `width` cells."""
    low, high = extent(row)
    if row.get("map") is None and row.get("state") == "complete":
        return ["disk"] * width  # nobody has used it since the daemon began
    if high <= low:
        return ["missing"] * width
    memory, disk = _runs(row, "memory"), _runs(row, "disk")
    shares = [_covered(runs, low, high, width) for runs in (memory, disk, memory + disk)]
    return [_cell(*each, high - low) for each in zip(shares[0], shares[1], shares[2], strict=True)]


def marks(row: Row, places: Iterable[int], width: int) -> set[int]:
    """The cells in which these bytes are; for one at the very end, the last."""
    low, high = extent(row)
    if high <= low:
        return set()
    return {min(width - 1, (at - low) * width // (high - low)) for at in places if low <= at <= high}


def positions(row: Row) -> list[int]:
    """Where readers are."""
    return [reader["at"] for reader in row.get("positions", ())]


def fetching(row: Row) -> list[int]:
    """Where bytes come in, or would."""
    return [fetch["at"] for fetch in row.get("fetches", ())]


def _runs(row: Row, place: str) -> list[list[int]]:
    return list((row.get("map") or {}).get(place, ()))


def _covered(runs: Sequence[list[int]], low: int, high: int, width: int) -> list[int]:
    """How much of each cell the runs, which may overlap, cover: `high - low` is all of it."""
    whole = high - low
    shares = [0] * width
    done = 0
    for start, stop in sorted(runs):
        first, last = max(done, (start - low) * width), min(width * whole, (stop - low) * width)
        for cell in range(first // whole, min(width, -(-last // whole))):
            shares[cell] += max(0, min(last, (cell + 1) * whole) - max(first, cell * whole))
        done = max(done, last)
    return shares


def _cell(memory: int, disk: int, either: int, whole: int) -> Cell:
    if not either:
        return "missing"
    if either < whole:
        return "part"
    return "memory" if memory >= disk else "disk"
