"""Names of files, made from titles: safe to show and to type, each once in its folder.

1. A title becomes one part of a name: "/" becomes "-", space of any kind one blank, what is not to be seen goes, and
   so do dots, blanks and "-" at its start. Without a title, the last part of the URL's path serves, else its host.
2. It gets the ending of the URL's path, or of the type that the list tells, unless it ends so already.
3. It is cut to 255 bytes. Where another stream or folder of the list has it, whatever the case of letters, "(2)",
   "(3)", … come before the ending.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from urllib.parse import unquote, urlsplit

from streamfs.manifests.model import Item
from streamfs.spec import NAME_PART_BYTES, UrlSource, cut, numbered

_ENDINGS = {
    "application/json": ".json",
    "application/ogg": ".ogg",
    "application/pdf": ".pdf",
    "application/zip": ".zip",
    "audio/aac": ".aac",
    "audio/aacp": ".aac",
    "audio/flac": ".flac",
    "audio/mp4": ".m4a",
    "audio/mpeg": ".mp3",
    "audio/mp3": ".mp3",
    "audio/ogg": ".ogg",
    "audio/opus": ".opus",
    "audio/wav": ".wav",
    "audio/x-m4a": ".m4a",
    "audio/x-wav": ".wav",
    "video/mp2t": ".ts",
    "video/mp4": ".mp4",
    "video/quicktime": ".mov",
    "video/webm": ".webm",
    "video/x-m4v": ".m4v",
    "video/x-matroska": ".mkv",
}
_KEPT_MARKS = "\u200c\u200d"  # join letters and pictures, and change what is read


def part_of(title: str) -> str:
    """One part of a name, made of a title; may be empty."""
    shown = []
    for letter in unicodedata.normalize("NFC", title):
        kind = unicodedata.category(letter)
        if letter == "/":
            shown.append("-")
        elif letter.isspace() or kind in ("Zl", "Zp", "Zs"):
            shown.append(" ")
        elif kind[0] != "C" or letter in _KEPT_MARKS:
            shown.append(letter)
    text = re.sub(r" +", " ", "".join(shown)).lstrip(" .-" + _KEPT_MARKS).rstrip(" " + _KEPT_MARKS)
    return cut(text, NAME_PART_BYTES)


def name_of(item: Item) -> str:
    """The last part of the name that an item gets where nothing else has it."""
    title, ending = part_of(item.title), ""
    if isinstance(item.source, UrlSource):
        parts = urlsplit(item.source.url)
        last = part_of(unquote(parts.path.rstrip("/").rpartition("/")[2]))
        found = re.search(r"(?<=.)\.[A-Za-z0-9]{1,5}$", last)
        ending = found[0] if found is not None else _ENDINGS.get(item.facts.mime or "", "")
        title = title or last or part_of(parts.hostname or "")
    title = title or "stream"
    if title.lower().endswith(ending.lower()):
        return cut(title, NAME_PART_BYTES)
    return cut(title, NAME_PART_BYTES - len(ending)).rstrip(" ") + ending


def named(items: Iterable[Item], into: str = "") -> list[tuple[Item, str]]:
    """Each item with its whole name, below the folder `into`. Names that a list gives itself are not changed."""
    items = list(items)
    prefix = into + "/" if into else ""
    folders = {id(item): "".join(part + "/" for part in map(part_of, item.folder) if part) for item in items}
    taken = {key for path in set(folders.values()) for key in _prefixes(path)}
    taken |= {item.name.casefold() for item in items if item.name is not None}
    taken |= {key for item in items if item.name is not None for key in _prefixes(item.name + "/")}
    others: dict[str, Iterator[str]] = {}  # of a name that was wanted again: those that may follow
    result = []
    for item in items:
        name = item.name
        if name is None:
            wanted = name = folders[id(item)] + name_of(item)
            if name.casefold() in taken:
                following = others.setdefault(wanted, numbered(wanted))
                name = next(other for other in following if other.casefold() not in taken)
            taken.add(name.casefold())
        result.append((item, prefix + name))
    return result


def _prefixes(path: str) -> Iterable[str]:
    """The folders on the way of a path that ends in "/", in the form that is compared."""
    parts = path.casefold().split("/")
    return ("/".join(parts[:depth]) for depth in range(1, len(parts)))
