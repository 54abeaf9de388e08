"""XML from strangers, as a small tree: no entities are declared or fetched, depth and number are bounded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from xml.parsers import expat

from streamfs.errors import InvalidRequest

MOST_DEPTH = 64
MOST_ELEMENTS = 1_000_000
_MOST_TEXT = 64 << 10  # characters of one element; what is longer is no title or URL, and is dropped


@dataclass(slots=True)
class Element:
    """`name` as it is written, prefix and all. `text`: what stands directly in it, without that of its children."""

    name: str
    attributes: dict[str, str]
    line: int
    pieces: list[str] = field(default_factory=list)
    children: list[Element] = field(default_factory=list)

    @property
    def local(self) -> str:
        return self.name.rpartition(":")[2]

    @property
    def text(self) -> str:
        return " ".join("".join(self.pieces).split())

    def all(self, name: str) -> Iterator[Element]:
        """The children of that name."""
        return (child for child in self.children if child.name == name)

    def first(self, name: str) -> Element | None:
        return next(self.all(name), None)

    def text_of(self, *names: str) -> str:
        """The text of the first child that has one of these names and any text."""
        return next((child.text for name in names for child in self.all(name) if child.text), "")

    def get(self, attribute: str) -> str:
        """The value, without space around it; empty where there is none. Letters may be of any case."""
        value = self.attributes.get(attribute)
        if value is None:
            value = next((v for k, v in self.attributes.items() if k.lower() == attribute.lower()), "")
        return value.strip()


class _Builder:
    def __init__(self) -> None:
        self.parser = expat.ParserCreate()
        self.parser.buffer_text = True
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self._characters
        self.parser.EntityDeclHandler = self._refuse_entity
        self.parser.ExternalEntityRefHandler = self._refuse_external
        self.root: Element | None = None
        self._open: list[Element] = []
        self._count = 0

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        self._count += 1
        if len(self._open) >= MOST_DEPTH or self._count > MOST_ELEMENTS:
            raise InvalidRequest("this XML is nested too deep, or has too many elements")
        element = Element(name, attributes, self.parser.CurrentLineNumber)
        if self._open:
            self._open[-1].children.append(element)
        else:
            self.root = element
        self._open.append(element)

    def _end(self, name: str) -> None:
        element = self._open.pop()
        if sum(map(len, element.pieces)) > _MOST_TEXT:
            element.pieces.clear()

    def _characters(self, data: str) -> None:
        self._open[-1].pieces.append(data)

    def _refuse_entity(self, *declaration: Any) -> None:
        raise InvalidRequest("this XML declares entities, which no list needs: not read")

    def _refuse_external(self, *reference: Any) -> int:
        raise InvalidRequest("this XML refers to other files: not read")


def parse_xml(data: bytes) -> Element:
    """The root. Raises InvalidRequest for what is no XML, or not to be read."""
    builder = _Builder()
    try:
        builder.parser.Parse(data, True)
    except expat.ExpatError as error:
        raise InvalidRequest(f"not valid XML, line {error.lineno}: {expat.ErrorString(error.code)}") from error
    except (ValueError, LookupError) as error:  # an encoding that nobody knows
        raise InvalidRequest("not valid XML: its encoding is not known") from error
    if builder.root is None:
        raise InvalidRequest("not valid XML: it is empty")
    return builder.root
