"""Playlists of lines: M3U, extended M3U, PLS."""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

from streamfs.errors import InvalidRequest
from streamfs.manifests.model import Manifest
from streamfs.spec import StreamOptions

_MOST_OF_PLS = 1_000_000  # numbers of entries beyond this one are no numbers
_ATTRIBUTE = re.compile(r'([A-Za-z0-9_-]+)="([^"]*)"')
_HLS_PIECES = ("#EXT-X-TARGETDURATION", "#EXT-X-MEDIA-SEQUENCE", "#EXT-X-BYTERANGE", "#EXT-X-MAP")
_HLS_CHOICE = ("#EXT-X-STREAM-INF", "#EXT-X-I-FRAME-STREAM-INF", "#EXT-X-MEDIA:")


def decode(data: bytes) -> str:
    """The text of a list: UTF-8 or UTF-16 as it says; else Windows' Latin letters, which old players write."""
    for mark, encoding in ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if data.startswith(mark):
            return data.decode(encoding, "replace")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


def lines_of(text: str) -> Iterator[tuple[int, str]]:
    """(number from 1, stripped line) of those that hold something."""
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1):
        if stripped := line.strip(" \t\ufeff"):
            yield number, stripped


def read_m3u(data: bytes, base: str) -> Manifest:
    """Raises InvalidRequest for a playlist of HLS, whose lines are the pieces of one stream."""
    found = Manifest()
    title, folder, options = "", "", StreamOptions()
    for number, line in lines_of(decode(data)):
        if not line.startswith("#"):
            groups = tuple(part for part in folder.split(";") if part.strip())
            found.add_url(line, base, number, title=title, folder=groups, options=options)
            title, folder, options = "", "", StreamOptions()
        elif line.startswith(_HLS_PIECES):
            raise InvalidRequest(
                "this is a media playlist of HLS, not a list of streams: its lines are the pieces of one stream; "
                "register that: streamfs add NAME -- ffmpeg -v error -i URL -c copy -f mpegts -"
            )
        elif line.startswith(_HLS_CHOICE):
            raise InvalidRequest(
                "this is a main playlist of HLS, not a list of streams: its lines are forms of one stream; "
                "register that: streamfs add NAME -- ffmpeg -v error -i URL -c copy -f mpegts -"
            )
        elif line.startswith("#EXTINF:"):
            title, attributes = _extinf(line[8:])
            folder = attributes.get("group-title", folder)
        elif line.startswith("#EXTGRP:"):
            folder = line[8:].strip()
        elif line.startswith("#PLAYLIST:"):
            found.title = line[10:].strip()
        elif line.startswith("#EXTVLCOPT:"):
            options = _with_player_option(options, line[11:])
    return found


def _extinf(rest: str) -> tuple[str, dict[str, str]]:
    """`123 key="value" …,Title`: the title is what follows the first comma outside of quotes."""
    attributes = {name.lower(): value for name, value in _ATTRIBUTE.findall(rest)}
    bare = _ATTRIBUTE.sub(lambda match: "_" * len(match[0]), rest)
    comma = bare.find(",")
    title = rest[comma + 1 :].strip() if comma >= 0 else ""
    return title or attributes.get("tvg-name", ""), attributes


def _with_player_option(options: StreamOptions, text: str) -> StreamOptions:
    key, _, value = text.partition("=")
    value = value.strip()
    match key.strip().lower():
        case "http-user-agent":
            return msgspec.structs.replace(options, user_agent=value)
        case "http-referrer" | "http-referer":
            return msgspec.structs.replace(options, headers=(("Referer", value),))
    return options


def read_pls(data: bytes, base: str) -> Manifest:
    """Entries in the order of their numbers."""
    found = Manifest()
    entries: dict[int, dict[str, tuple[int, str]]] = {}
    for number, line in lines_of(decode(data)):
        key = re.match(r"(file|title|length)(\d{1,9})\s*=\s*(.*)", line, re.IGNORECASE)
        if key is not None and int(key[2]) <= _MOST_OF_PLS:
            entries.setdefault(int(key[2]), {}).setdefault(key[1].lower(), (number, key[3]))
    for _, entry in sorted(entries.items()):
        if "file" in entry:
            number, reference = entry["file"]
            found.add_url(reference, base, number, title=entry.get("title", (0, ""))[1].strip())
        else:
            found.refuse(next(iter(entry.values()))[0], "an entry without its File")
    return found
