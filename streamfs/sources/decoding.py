"""Content codings of a reply that must be undone."""

from __future__ import annotations

import zlib

from streamfs.sources.transport import Response, TransportError


class Decoder:
    """Undoes gzip or deflate."""

    def __init__(self, coding: str) -> None:
        self._coding = coding
        self._engine = zlib.decompressobj(47 if coding == "gzip" else 15)  # 47: gzip or zlib, told by the header
        self._encoded = b""
        self._fresh = True  # nothing decoded yet
        self._begun = False  # nothing received yet: a body of no bytes is an empty one
        self._piece = memoryview(bytearray(64 * 1024))

    async def receive_into(self, response: Response, view: memoryview) -> int:
        while True:
            data = self._decode(len(view))
            if data:
                view[: len(data)] = data
                return len(data)
            got = await response.receive_into(self._piece)
            if got == 0:
                if self._begun and not self._engine.eof:
                    raise TransportError("truncated", f"the {self._coding} body ended before its end mark")
                return 0
            self._begun = True
            self._encoded += self._piece[:got]

    def _decode(self, room: int) -> bytes:
        """Some decoded bytes, at most `room`; empty where more input is needed."""
        while True:
            if self._engine.eof:
                rest = self._encoded.lstrip(b"\0")  # padding after a member is allowed by gzip(1)
                self._encoded = rest
                if not rest:
                    return b""
                self._engine = zlib.decompressobj(47 if self._coding == "gzip" else 15)
            try:
                data = self._engine.decompress(self._encoded, room)
            except zlib.error as error:
                if not (self._fresh and self._coding == "deflate"):
                    raise TransportError("protocol", f"the {self._coding} body cannot be decoded") from error
                self._engine = zlib.decompressobj(-15)  # many servers send raw deflate under that name
                self._fresh = False
                continue
            self._encoded = self._engine.unused_data if self._engine.eof else self._engine.unconsumed_tail
            if data:
                self._fresh = False
                return data
            if not self._engine.eof:
                return b""
