"""From a list's bytes to streams that can be registered: its feeds are fetched, what it may not hold is refused, and
every stream gets its name.

Lists come from strangers. One from the net names neither files of this machine nor options that read them or say whom
to trust, and one from a public host no address that is visibly private; commands are taken only where that was asked
for.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlsplit

import trio

from streamfs.errors import InvalidRequest, SourceFailed, StreamfsError
from streamfs.manifests.model import Feed, Item, Manifest, Problem
from streamfs.manifests.names import named, part_of
from streamfs.manifests.reading import parse, recognise
from streamfs.options import FILES
from streamfs.sources.addresses import is_private_name
from streamfs.sources.base import Body, Source
from streamfs.sources.http import HttpSource
from streamfs.spec import CommandSource, Registration, ShellSource, StreamSpec, UrlSource, check_spec, redact_url

MOST_BYTES = 128 << 20  # of one list or feed
MOST_SECONDS = 600.0
"""For one list or feed: MOST_BYTES at 220 KB/s. A server that drips never stalls, and would never end."""
FEEDS_AT_A_TIME = 8


Opener = Callable[[str], Source]
"""The source of the URL of a list or a feed."""


@dataclass(frozen=True, slots=True)
class Rules:
    """`format`: None, it is to be recognised. `into`: the folder that names go below."""

    format: str | None = None
    into: str = ""
    allow_commands: bool = False
    allow_private: bool = False


@dataclass(slots=True)
class Found:
    """What a list gives. `problems`: (where, text)."""

    streams: list[Registration] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)


async def download(opener: Opener, url: str) -> tuple[bytes, str]:
    """All bytes of `url`, and the URL that it led to. Raises StreamfsError; SourceFailed past MOST_BYTES, and past
    MOST_SECONDS."""
    source = opener(url)
    try:
        with trio.move_on_after(MOST_SECONDS):
            body = await source.open(0, None, None)
            try:
                return await _read_all(body, url), source.landed if isinstance(source, HttpSource) else url
            finally:
                await body.aclose()
        raise SourceFailed(f"{redact_url(url)} did not come within {MOST_SECONDS:g} s")
    finally:
        await source.aclose()


async def _read_all(body: Body, url: str) -> bytes:
    data = bytearray()
    piece = memoryview(bytearray(256 << 10))
    while count := await body.receive_into(piece):
        data += piece[:count]
        if len(data) > MOST_BYTES:
            raise SourceFailed(f"{redact_url(url)} is longer than the {MOST_BYTES >> 20} MiB of a list")
    return bytes(data)


async def gather(
    data: bytes, base: str, where: str, rules: Rules, opener: Opener, told: Callable[[int, int], None] = lambda *_: None
) -> Found:
    """The streams of the list `data`, which came from the URL `base` and is called `where` in problems. Feeds that it
    names are fetched; `told` hears how many of how many are done. Raises InvalidRequest for what is no list."""
    folder = Path(os.fsdecode(unquote_to_bytes(urlsplit(base).path))).parent if _is_local(base) else None
    kind = rules.format or recognise(data, urlsplit(base).path)
    manifest = parse(data, base, kind, folder)
    found = Found()
    items = _permitted(manifest, base, where, rules, found)
    feeds = [feed for feed in manifest.feeds if _is_permitted_feed(feed, base, where, rules, found)]
    fetched = await _episodes(feeds, where, rules, opener, told)
    for feed, episodes in zip(feeds, fetched, strict=True):
        found.problems += episodes.problems
        top = (*feed.folder, part_of(episodes.title) or part_of(feed.title) or urlsplit(feed.url).hostname or "feed")
        items += [replace(item, folder=(*top, *item.folder)) for item in episodes.items]
    if kind == "feed" and manifest.title:
        items = [replace(item, folder=(manifest.title, *item.folder)) for item in items]
    for item, name in named(items, rules.into):
        spec = StreamSpec(name=name, source=item.source, options=item.options)
        try:
            check_spec(spec)
        except InvalidRequest as error:
            found.problems.append((_place(where, item.line), str(error)))
        else:
            found.streams.append(Registration(spec=spec, facts=item.facts, persist=item.persist))
    return found


@dataclass(slots=True)
class _Episodes:
    title: str = ""
    items: list[Item] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)


async def _episodes(
    feeds: list[Feed], where: str, rules: Rules, opener: Opener, told: Callable[[int, int], None]
) -> list[_Episodes]:
    """What each feed holds, in order; one that cannot be had has a problem and no more."""
    results = [_Episodes() for _ in feeds]
    turn = trio.CapacityLimiter(FEEDS_AT_A_TIME)
    done = 0

    async def fetch(feed: Feed, result: _Episodes) -> None:
        nonlocal done
        async with turn:
            try:
                data, landed = await download(opener, feed.url)
                manifest = parse(data, landed, "feed")
            except StreamfsError as error:
                result.problems.append((_place(where, feed.line), f"the feed {redact_url(feed.url)}: {error}"))
            else:
                own = Found()
                result.items = _permitted(manifest, landed, redact_url(feed.url), rules, own)
                result.title, result.problems = manifest.title, own.problems
        done += 1
        told(done, len(feeds))

    async with trio.open_nursery() as nursery:
        for feed, result in zip(feeds, results, strict=True):
            nursery.start_soon(fetch, feed, result)
    return results


def _permitted(manifest: Manifest, base: str, where: str, rules: Rules, found: Found) -> list[Item]:
    """The items that the list may hold; what is refused goes to the problems, in the order of lines."""
    problems = list(manifest.problems)
    allowed = []
    for item in manifest.items:
        reason = _objection(item, base, rules)
        if reason is None:
            allowed.append(item)
        else:
            problems.append(Problem(item.line, reason))
    found.problems += [(_place(where, p.line), p.text) for p in sorted(problems, key=lambda p: p.line or 0)]
    return allowed


def _objection(item: Item, base: str, rules: Rules) -> str | None:
    command = _command_of(item)
    if command is not None and not rules.allow_commands:
        return f"{command} is run only with --allow-commands"
    if isinstance(item.source, UrlSource):
        if not _is_local(base) and _is_local(item.source.url):
            return "a list from the net may not name files of this machine"
        if _is_private_here(item.source.url, base, rules):
            return "a list from a public host may not name a private address (--allow-private)"
    if not _is_local(base):
        for option in (*FILES, "secret_headers"):
            if getattr(item.options, option):
                return f"a list from the net may not use the option {option}, which reads files of this machine"
        for option in ("proxy", "insecure"):
            if getattr(item.options, option):
                # The configuration may have secrets for this host, which would go there.
                return f"a list from the net may not use the option {option}, which says whom this machine trusts"
        if item.options.allow_private and not rules.allow_private:
            return "a list from the net may not use the option allow_private (--allow-private)"
    return None


def _is_permitted_feed(feed: Feed, base: str, where: str, rules: Rules, found: Found) -> bool:
    reason = None
    if not _is_local(base) and _is_local(feed.url):
        reason = "a list from the net may not name files of this machine"
    elif _is_private_here(feed.url, base, rules):
        reason = "a list from a public host may not name a private address (--allow-private)"
    if reason is not None:
        found.problems.append((_place(where, feed.line), reason))
    return reason is None


def _command_of(item: Item) -> str | None:
    match item.source:
        case CommandSource():
            return "a command"
        case ShellSource():
            return "a shell line"
    return "a command that refreshes a URL" if item.options.refresh_command is not None else None


def _is_local(url: str) -> bool:
    return urlsplit(url).scheme.lower() == "file"


def _is_private_here(url: str, base: str, rules: Rules) -> bool:
    """Whether `url` is visibly private, and the list it is in is not."""
    if rules.allow_private or _is_local(base) or _is_local(url):
        return False
    host, own = urlsplit(url).hostname or "", urlsplit(base).hostname or ""
    return is_private_name(host) and not is_private_name(own)


def _place(where: str, line: int | None) -> str:
    return where if line is None else f"{where}:{line}"
