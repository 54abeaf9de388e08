"""Which format a list has, and what is in it."""

from __future__ import annotations

import re
from pathlib import Path

from streamfs.errors import InvalidRequest
from streamfs.manifests import FORMATS
from streamfs.manifests.feeds import read_feed, read_opml, read_xspf
from streamfs.manifests.model import Manifest
from streamfs.manifests.playlists import decode, lines_of, read_m3u, read_pls
from streamfs.manifests.records import read_json, read_toml
from streamfs.manifests.xmltree import parse_xml

_ENDINGS = {
    "m3u8": "m3u",
    "jsonl": "json",
    "ndjson": "json",
    "rss": "feed",
    "atom": "feed",
} | {name: name for name in FORMATS}
_ROOTS = {"playlist": "xspf", "opml": "opml", "rss": "feed", "RDF": "feed", "feed": "feed"}


def recognise(data: bytes, name: str = "") -> str:
    """The format of a list: by what it begins with, else by the ending of `name`. Raises InvalidRequest."""
    head = decode(data[:65536]).lstrip(" \t\r\n\ufeff")
    if head.startswith("#EXTM3U"):
        return "m3u"
    if head[:10].lower() == "[playlist]":
        return "pls"
    if head.startswith("<"):
        if re.match(r"<(!doctype\s+)?html", head, re.IGNORECASE):
            raise InvalidRequest("this is a web page, not a list of streams")
        root = parse_xml(data).local
        if root not in _ROOTS:
            raise InvalidRequest(f"this XML is a {root!r}, not a list of streams")
        return _ROOTS[root]
    if re.search(r"^\s*\[\[\s*stream\s*\]\]", head, re.MULTILINE):
        return "toml"
    if head.startswith(("{", "[")):
        return "json"
    known = _ENDINGS.get(name.rpartition(".")[2].lower())
    if known is not None:
        return known
    lines = [line for _, line in lines_of(head[:4096]) if not line.startswith("#")]
    if lines and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", lines[0]):
        return "m3u"  # nothing but URLs
    raise InvalidRequest(f"what kind of list this is cannot be told: say --format ({', '.join(FORMATS)})")


def parse(data: bytes, base: str, kind: str, folder: Path | None = None) -> Manifest:
    """What a list of the format `kind` holds. `base`: the URL it came from; references in it start there. `folder`:
    where relative paths in options of records start; None: they must be absolute. Raises InvalidRequest."""
    match kind:
        case "m3u":
            return read_m3u(data, base)
        case "pls":
            return read_pls(data, base)
        case "xspf":
            return read_xspf(data, base)
        case "opml":
            return read_opml(data, base)
        case "feed":
            return read_feed(data, base)
        case "json":
            return read_json(data, folder)
        case "toml":
            return read_toml(data, folder)
    raise InvalidRequest(f"no format is called {kind!r}; there are {', '.join(FORMATS)}")
