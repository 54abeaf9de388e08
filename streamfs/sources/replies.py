"""What one HTTP reply means for the range that was asked: pure functions, no I/O.

`judge` is the one place where status, Content-Range, lengths and validators are believed or not. The rule above
all: bytes are taken for a position only where the reply proves it; whatever contradicts itself is refused.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from streamfs.sources.base import Facts

REFRESHABLE = frozenset({401, 403, 404, 410})  # answers to a URL that has expired
RETRYABLE = frozenset({408, 425, 429})  # and every 5xx

_CONTENT_RANGE = re.compile(r"\s*bytes\s+(?:(\d{1,18})\s*-\s*(\d{1,18})|\*)\s*/\s*(\d{1,18}|\*)\s*", re.I)
_STRONG_ETAG = re.compile(r'"[\x21\x23-\x7e\x80-\xff]*"')


@dataclass(frozen=True, slots=True)
class Asked:
    """The request a reply answers. `ranged`: a Range header was sent. `expect`: the version it must be of."""

    start: int
    stop: int | None
    ranged: bool = True
    expect: Facts | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """The body is exactly the bytes [start, end) of the stream, `start` being the one asked for."""

    start: int
    end: int
    facts: Facts


@dataclass(frozen=True, slots=True)
class Whole:
    """The body is the stream from its first byte. `decode`: the coding that must be undone first.
    `length`: how many bytes of body the head promises, None where it does not."""

    facts: Facts
    length: int | None
    decode: str | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """Nothing at `start` or after it. `proven`: the server named this very length."""

    facts: Facts
    proven: bool


@dataclass(frozen=True, slots=True)
class Again:
    """No answer yet, but there may be one later. `after`: seconds the server asks us to wait, None: not said."""

    why: str
    after: float | None = None


@dataclass(frozen=True, slots=True)
class AskWhole:
    """This server's ranges are of no use here: ask from the first byte, with Range `bytes=0-` if `ranged`."""

    why: str
    ranged: bool


@dataclass(frozen=True, slots=True)
class Changed:
    why: str


@dataclass(frozen=True, slots=True)
class Refused:
    """Not what was asked for, and asking again will not help. `status` tells expired URLs from lies."""

    why: str
    status: int = 0


Verdict = Part | Whole | Ended | Again | AskWhole | Changed | Refused


class Headers:
    """Header values by lower-case name."""

    def __init__(self, fields: Iterable[tuple[str, str]]) -> None:
        self._fields: dict[str, str] = {}
        for name, value in fields:
            held = self._fields.get(name)
            self._fields[name] = value.strip() if held is None else f"{held}, {value.strip()}"

    def get(self, name: str) -> str | None:
        return self._fields.get(name)


def judge(asked: Asked, status: int, headers: Headers, now: float) -> Verdict:
    """What the reply to `asked` is good for. `now`: seconds since the epoch, for Retry-After dates."""
    if status == 206:
        return _judge_part(asked, headers)
    if status in (200, 203):
        return _judge_whole(asked, headers)
    if status == 416:
        return _judge_unsatisfied(asked, headers)
    if status in RETRYABLE or 500 <= status <= 599:
        return Again(f"the server answered {status}", _retry_after(headers, now))
    if status == 407:
        return Refused("the proxy refuses the login (407)", status)
    return Refused(f"the server answered {status}", status)


def _judge_part(asked: Asked, headers: Headers) -> Verdict:
    if not asked.ranged:
        return Refused("the server sent a part where the whole was asked for")
    kind = (headers.get("content-type") or "").lower()
    if kind.startswith("multipart/"):
        return Refused("the server answered one range with a multipart body")
    told = parse_content_range(headers.get("content-range"))
    if told is None or told.first is None or told.last is None:
        return Refused("the server sent a part without saying which (no valid Content-Range)")
    first, last, total = told.first, told.last, told.total
    if last < first or (total is not None and last >= total):
        return Refused(f"the server's Content-Range contradicts itself ({headers.get('content-range')})")
    if first != asked.start:
        return Refused(f"asked for bytes from {asked.start}, the server sent bytes from {first}")
    length = content_length(headers)
    coding = _coding(headers)
    facts = facts_of(headers, total, ranged=coding is None)
    changed = compare(asked.expect, facts)
    if changed is not None:
        return changed
    if coding is not None:
        # A slice of an encoded stream cannot be decoded; its beginning can.
        if first != 0 or (total is None or last != total - 1):
            return AskWhole("the server encodes its parts", ranged=False)
        return _decodable(coding, facts_of(headers, None, ranged=False), length)
    if length is not None and length != last - first + 1:
        return Refused(f"the server promises {last - first + 1} bytes by Content-Range, {length} by Content-Length")
    if not facts.ranged and asked.start > 0:
        return AskWhole("nothing tells this server's versions apart", ranged=True)
    return Part(first, last + 1, facts)


def _judge_whole(asked: Asked, headers: Headers) -> Verdict:
    coding = _coding(headers)
    length = content_length(headers)
    plain_size = length if coding is None else None
    facts = facts_of(headers, plain_size, ranged=False)
    changed = compare(asked.expect, facts)
    if changed is not None:
        return changed
    if coding is not None:
        return _decodable(coding, facts, length)
    return Whole(facts, length)


def _decodable(coding: str, facts: Facts, length: int | None) -> Verdict:
    if coding not in ("gzip", "deflate"):
        return Refused(f"the server encodes the body as {coding!r} though it was asked not to")
    return Whole(facts, length, coding)


def _judge_unsatisfied(asked: Asked, headers: Headers) -> Verdict:
    if not asked.ranged:
        return Refused("the server answered 416 though no range was asked for", 416)
    told = parse_content_range(headers.get("content-range"))
    total = told.total if told is not None else None
    expected = asked.expect.size if asked.expect is not None else None
    if total is not None and expected is not None and total != expected:
        if asked.start < expected:
            return Changed(f"the length was {expected} and is now {total}")
        return Refused(f"the length was said to be {expected}, and now {total}", 416)
    if total == asked.start:
        return Ended(Facts(size=total), proven=True)  # all else in this reply is about its error page
    if asked.start == 0:
        return AskWhole("the server refuses a range from the first byte", ranged=False)
    if total is None and expected is None and asked.expect is not None:
        return Ended(Facts(), proven=False)
    if total is not None:
        return Refused(f"nothing at byte {asked.start}: the server's file has {total}", 416)
    return Refused(f"the server has nothing at byte {asked.start}", 416)


# -- versions


def facts_of(headers: Headers, size: int | None, *, ranged: bool) -> Facts:
    """The facts a reply tells. `ranged`: whether ranges were served; kept only where versions can be told apart."""
    get = headers.get
    told = get("etag"), get("last-modified"), get("date")
    return _facts(*told, kind=get("content-type") or "", size=size, ranged=ranged)


@functools.lru_cache(256)  # the replies of one version say the same, but for Date, and that for a second
def _facts(etag: str | None, date: str | None, sent: str | None, *, kind: str, size: int | None, ranged: bool) -> Facts:
    validator = _validator(etag, date, sent, size)
    modified = parse_date(date)
    mime = kind.split(";")[0].split(",")[0].strip().lower()
    return Facts(
        size=size,
        ranged=ranged and validator is not None,
        validator=validator,
        mime=mime if re.fullmatch(r"[!-~]+/[!-~]+", mime) else None,
        modified=modified.timestamp() if modified is not None else None,
    )


def validator_of(headers: Headers, size: int | None) -> str | None:
    """The canonical name of the version: `etag:"…"` for a strong entity tag, `modified:<date>;size:<n>` (and the
    weak tag, if there is one: where it changes, something did) for a date with a length, else None."""
    return _validator(headers.get("etag"), headers.get("last-modified"), headers.get("date"), size)


def _validator(etag: str | None, date: str | None, sent_date: str | None, size: int | None) -> str | None:
    if etag is not None and _STRONG_ETAG.fullmatch(etag):
        return f"etag:{etag}"
    modified = parse_date(date)
    if date is None or modified is None or size is None:
        return None
    sent = parse_date(sent_date)
    if sent is not None and (sent - modified).total_seconds() < 1:
        return None  # it may change again within the second that the date names (RFC 9110, 8.8.2.2)
    return f"modified:{date};size:{size}" + (f";weak:{etag}" if etag is not None else "")


def precondition(validator: str | None) -> str | None:
    """The If-Range value that pins this version, None where nothing does. Dates are not sent: a server may then leave
    Last-Modified off its reply (RFC 9110, 15.3.7), which is what `compare` needs to see."""
    kind, _, tag = (validator or "").partition(":")
    return tag if kind == "etag" else None


def compare(expect: Facts | None, facts: Facts) -> Changed | Refused | None:
    """None where the reply may be of the expected version: where it names that version, or names none."""
    if expect is None:
        return None
    if expect.validator is not None and facts.validator != expect.validator:
        if facts.validator is None and facts.size in (None, expect.size):
            return Refused("the server no longer says which version it sends")
        return Changed("the version changed")
    if None not in (expect.size, facts.size) and expect.size != facts.size:
        if expect.validator is not None:
            return Refused(f"one version with two lengths: {expect.size}, and now {facts.size}")
        return Changed(f"the length was {expect.size} and is now {facts.size}")
    return None


# -- header values


@dataclass(frozen=True, slots=True)
class ContentRange:
    first: int | None
    last: int | None
    total: int | None


def parse_content_range(value: str | None) -> ContentRange | None:
    """`bytes 0-9/100`, `bytes 0-9/*`, `bytes */100`; None for anything else."""
    match = _CONTENT_RANGE.fullmatch(value or "")
    if match is None:
        return None
    return ContentRange(
        int(match[1]) if match[1] else None,
        int(match[2]) if match[2] else None,
        int(match[3]) if match[3] != "*" else None,
    )


def content_length(headers: Headers) -> int | None:
    """The length of the body on the wire, None where the framing does not rest on it."""
    value = headers.get("content-length")
    if value is None or headers.get("transfer-encoding") is not None:
        return None
    return int(value) if re.fullmatch(r"\d{1,18}", value) else None


def _coding(headers: Headers) -> str | None:
    value = (headers.get("content-encoding") or "").strip().lower()
    if value in ("", "identity"):
        return None
    return "gzip" if value == "x-gzip" else value


def _retry_after(headers: Headers, now: float) -> float | None:
    value = headers.get("retry-after")
    if value is None:
        return None
    if re.fullmatch(r"\d{1,9}", value):
        return float(value)
    date = parse_date(value)
    return max(0.0, date.timestamp() - now) if date is not None else None


@functools.lru_cache(256)  # each reply repeats Last-Modified, and Date within its second
def parse_date(value: str | None) -> datetime | None:
    if value is None:
        return None
    try:
        date = parsedate_to_datetime(value)
    except (ValueError, IndexError, TypeError, OverflowError):
        return None
    return date if date.tzinfo is not None else date.replace(tzinfo=UTC)
