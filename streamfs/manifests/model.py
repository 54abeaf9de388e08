"""What a list holds, whatever its format was."""

from __future__ import annotations

import os
import re
import string
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes, urljoin, urlsplit

from streamfs.errors import InvalidRequest
from streamfs.spec import URL_SCHEMES, AnySource, Facts, StreamOptions, UrlSource, check_url

_UNRESERVED = string.punctuation + string.ascii_letters + string.digits
NO_OPTIONS = StreamOptions()
NO_FACTS = Facts()
MOST_PROBLEMS = 1000
"""As many are kept; a file that is something else altogether has one in each line."""


@dataclass(frozen=True, slots=True)
class Item:
    """One stream of a list.

    `line`: where it stands, None where that cannot be said. `name`: exactly this one (parts joined by "/"); None: one
    is to be made of `folder` and `title`, or of the source where there is no title.
    """

    source: AnySource
    line: int | None = None
    name: str | None = None
    title: str = ""
    folder: tuple[str, ...] = ()
    options: StreamOptions = NO_OPTIONS
    facts: Facts = NO_FACTS  # what the list says of the bytes
    persist: bool | None = None


@dataclass(frozen=True, slots=True)
class Feed:
    """A feed that a list of feeds names; its episodes come from its URL."""

    url: str
    line: int | None = None
    title: str = ""
    folder: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Problem:
    """An entry that cannot be used, in words without secrets."""

    line: int | None
    text: str


@dataclass(slots=True)
class Manifest:
    """A list that was read. `title`: what it calls itself."""

    items: list[Item] = field(default_factory=list)
    feeds: list[Feed] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    title: str = ""

    def refuse(self, line: int | None, text: str) -> None:
        if len(self.problems) < MOST_PROBLEMS:
            self.problems.append(Problem(line, text))

    def add_url(self, reference: str, base: str, line: int | None, **more: object) -> None:
        """An item for what `reference` means in a list that came from `base`, or the problem with it."""
        try:
            url = resolve(reference, base)
        except InvalidRequest as error:
            self.refuse(line, str(error))
        else:
            self.items.append(Item(UrlSource(url), line, **more))  # type: ignore[arg-type]


def resolve(reference: str, base: str) -> str:
    """The URL that `reference` means in a list whose own URL is `base`: a URL, or a path beside the list. What a URL
    may not hold (spaces, letters beyond ASCII) is escaped. Raises InvalidRequest."""
    reference = reference.strip()
    if not reference:
        raise InvalidRequest("the URL is empty")
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", reference)
    if scheme is not None and (scheme[1].lower() in URL_SCHEMES or reference[scheme.end() :].startswith("//")):
        return check_url(_escaped(reference))
    try:
        if urlsplit(base).scheme == "file":
            folder = Path(os.fsdecode(unquote_to_bytes(urlsplit(base).path))).parent
            return check_url(Path(os.path.normpath(folder / reference)).as_uri())
        return check_url(urljoin(base, _escaped(reference)))
    except ValueError as error:
        raise InvalidRequest("not a URL, nor a path") from error


def _escaped(url: str) -> str:
    """`url` with what is neither ASCII nor visible as %XX, but for the host's name."""
    prefix = re.match(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?#]*", url)
    at = prefix.end() if prefix is not None else 0
    try:
        return url[:at] + quote(url[at:], safe=_UNRESERVED)
    except UnicodeEncodeError as error:  # lone surrogates
        raise InvalidRequest("the URL holds what is no character") from error
