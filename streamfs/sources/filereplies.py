"""Files of ftp, ftps and sftp servers, dressed as HTTP: pure functions, no I/O.

200 or 206 with exact Content-Length, Content-Range and Last-Modified; 416 past the end; 404 for a missing file, 401
for a refused login, 403 for a refused file, 503 for a server that is busy.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from email.utils import formatdate, parsedate_to_datetime
from typing import Literal

from streamfs.sources.transport import Request

BUSY_REPLIES = frozenset({421, 425, 450, 451, 452})  # of ftp


@dataclass(frozen=True, slots=True)
class Refusal:
    """A file server's no, in HTTP's terms."""

    status: int
    text: str


@dataclass(frozen=True, slots=True)
class FileFacts:
    size: int | None
    modified: int | None  # seconds since the epoch


@dataclass(frozen=True, slots=True)
class Span:
    """The bytes first..last, both included, of a file of `size` bytes."""

    first: int
    last: int
    size: int

    @property
    def length(self) -> int:
        return self.last - self.first + 1

    @property
    def to_end(self) -> bool:
        return self.last + 1 == self.size


@dataclass(frozen=True, slots=True)
class FileHead:
    """What a reply says before its body. `length`: of that body, None where the server names no size; `span`: what of
    the file it is, None: all."""

    status: int
    reason: str
    headers: list[tuple[str, str]]
    length: int | None
    span: Span | None = None


def head_of(request: Request, facts: FileFacts, *, ranged: bool = True) -> FileHead:
    """The head of the reply to `request` for a file of these facts. `ranged`: the server can begin anywhere in it."""
    headers = [("date", formatdate(time.time(), usegmt=True))]
    if facts.modified is not None:
        headers.append(("last-modified", formatdate(facts.modified, usegmt=True)))
    if facts.size is not None and ranged:
        headers.append(("accept-ranges", "bytes"))
    chosen = _choose(request, facts) if ranged else "whole"
    if chosen is None:
        return FileHead(416, "past the end", [("content-range", f"bytes */{facts.size}"), *headers], 0)
    if chosen == "whole":
        if facts.size is not None:
            headers.append(("content-length", str(facts.size)))
        return FileHead(200, "OK", headers, facts.size)
    headers.append(("content-range", f"bytes {chosen.first}-{chosen.last}/{facts.size}"))
    headers.append(("content-length", str(chosen.length)))
    return FileHead(206, "OK", headers, chosen.length, chosen)


def _choose(request: Request, facts: FileFacts) -> Span | Literal["whole"] | None:
    """What to send for the Range header, as RFC 9110 has it; None: nothing of the file is in the range."""
    asked = _header(request, "range")
    match = re.fullmatch(r"\s*bytes\s*=\s*(\d{0,18})\s*-\s*(\d{0,18})\s*", asked or "", re.I)
    if match is None or facts.size is None or not (match[1] or match[2]) or not _range_applies(request, facts):
        return "whole"
    if not match[1]:
        first, last = max(0, facts.size - int(match[2])), facts.size - 1
    else:
        first, last = int(match[1]), min(int(match[2]) if match[2] else facts.size, facts.size - 1)
        if match[2] and int(match[2]) < first:
            return "whole"
    return Span(first, last, facts.size) if first < facts.size and first <= last else None


def _range_applies(request: Request, facts: FileFacts) -> bool:
    """Whether If-Range, which can only be a date here, names the modification time exactly."""
    condition = _header(request, "if-range")
    if condition is None:
        return True
    try:
        return facts.modified is not None and parsedate_to_datetime(condition).timestamp() == facts.modified
    except ValueError:
        return False


def _header(request: Request, name: str) -> str | None:
    return next((value for key, value in (*request.headers, *request.varying) if key.lower() == name), None)
