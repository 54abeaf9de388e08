"""What ls and status print. Loads next to nothing: see streamfs.cli.quick."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence

from streamfs.cli.looking import Row, Seen

JSON_VERSION = 1


def listing(rows: Sequence[Row], *, long: bool, as_json: bool) -> str:
    """As `streamfs ls`. Names are shown as they are, but on a terminal."""
    if as_json:
        return document(rows)
    if long:
        return table(rows, ("state", "size", "cached", "", "name", "source"))
    return "\n".join(visible(row["name"]) if sys.stdout.isatty() else row["name"] for row in rows)


def overview(seen: Seen, *, as_json: bool) -> str:
    """As `streamfs status`."""
    if as_json:
        return document(seen.rows, disk_error=seen.disk_error)
    text = table(seen.rows, ("state", "size", "cached", "rate", "readers", "", "name", "error"))
    text = text or "(no streams: 'streamfs add NAME URL' registers one)"
    if seen.disk_error is not None:
        text += f"\n(cache: {visible(seen.disk_error)}; memory goes on serving)"
    return text if seen.live else f"{text}\n(no daemon runs: see 'streamfs mount')"


def put(text: str) -> None:
    """Print it, names that are no UTF-8 as their bytes; nothing where it is empty. Raises OSError."""
    if text:
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape") + b"\n")
        sys.stdout.buffer.flush()


def document(rows: Sequence[Row], **more: object) -> str:
    """The machine-readable shape, on one line, in ASCII. `more`: what is said of all streams together."""
    return json.dumps({"version": JSON_VERSION, "streams": rows, **more})


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Lines under a head; the last column is as wide as it is. An empty text without rows."""
    if not rows:
        return ""
    cells = [[column.upper() for column in columns], *([_cell(row, column) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = {columns.index(name) for name in ("size", "cached", "rate", "readers") if name in columns}
    return "\n".join(
        "  ".join(
            text.rjust(width) if at in right else text.ljust(width)
            for at, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


def _cell(row: Row, column: str) -> str:
    match column:
        case "size":
            return human_size(row.get("size"))
        case "cached":
            return human_size(row.get("buffered"))
        case "rate":
            return f"{human_size(row['rate'])}/s" if row.get("rate") else ""
        case "":
            return "P" if row.get("persist") else ""
        case _:
            value = row.get(column)
            return "" if value is None else visible(str(value))


def human_size(size: int | None) -> str:
    """ "1.5 MiB"; "?" for an unknown one."""
    if size is None:
        return "?"
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def visible(text: str) -> str:
    """`text` without control characters, which could change what a terminal shows."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\udc80-\udcff]", lambda found: f"\\x{ord(found[0]) & 0xFF:02x}", text)
