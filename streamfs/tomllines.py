"""Where things stand in a TOML text: the standard library's reader does not tell."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from typing import Any

_MOST_LINES = 1000  # of one value; a longer one is not followed, as each of its lines is read with all before it

Path = tuple[str, ...]


def statements(text: str) -> Iterator[tuple[int, bool, Path]]:
    """Of each header and each key of `text`, a valid TOML document: its line (from 1), whether it is a header, and its
    path, that of a key with the header's before it. Stops early where a value goes over very many lines."""
    lines = text.splitlines()
    table: Path = ()
    at = 0
    while at < len(lines):
        begin, found = at, None
        while found is None and at < len(lines) and at - begin < _MOST_LINES:
            at += 1
            found = _parsed("\n".join(lines[begin:at]))
        if found is None:
            return
        if not found:
            continue  # empty, or a comment
        path = _path(found)
        if lines[begin].lstrip().startswith("["):
            table = path
            yield begin + 1, True, path
        else:
            yield begin + 1, False, table + path


def line_of(text: str, path: Path, occurrence: int = 1) -> int | None:
    """The line of the key or header `path` (its n-th `occurrence`); else of what makes it by the way, or the nearest
    that it stands in; None where none is found. `text` is a valid TOML document."""
    best: tuple[int, int] | None = None  # how close, line
    seen = 0
    for line, _, found in statements(text):
        if found == path:
            seen += 1
            if seen == occurrence:
                return line
        if found[: len(path)] == path:
            close = len(path)
        elif path[: len(found)] == found:
            close = len(found)
        else:
            continue
        if best is None or close > best[0]:
            best = close, line
    return None if best is None else best[1]


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        return tomllib.loads(text + "\n")
    except (tomllib.TOMLDecodeError, RecursionError):
        return None


def _path(found: Any) -> Path:
    """The keys that lead to the one value, or the empty table, of a single statement."""
    path: list[str] = []
    while True:
        if isinstance(found, list) and len(found) == 1 and isinstance(found[0], dict) and not found[0]:
            found = found[0]
        if not isinstance(found, dict) or len(found) != 1:
            return tuple(path)
        ((key, found),) = found.items()
        path.append(key)
