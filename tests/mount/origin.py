"""An HTTP origin in threads of the test itself, so that a test sees what was asked and sent, and can stall, change or
kill it in the middle of things. (`tests.faults.origin` is the one that lies.)"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.faults.origin import content

PIECE = 64 * 1024


@dataclass
class Document:
    """What one path serves. Every attribute may change at any time; requests under way see it."""

    name: str
    url: str
    size: int
    data: bytes | None = None  # instead of content(name, version, ...)
    ranged: bool = True
    chunked: bool = False
    version: int = 0
    mime: str = "application/octet-stream"
    stall_at: int | None = None
    """Nothing from this offset on is sent until `go` is set."""
    die_at: int | None = None
    """Connections are reset here, and requests from here on too."""
    status: int | None = None
    """Instead of an answer, this error."""
    go: threading.Event = field(default_factory=threading.Event)
    stalled: threading.Event = field(default_factory=threading.Event)
    """Set once a reply has come to `stall_at`."""
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    """(method, Range header) of each."""
    sent: int = 0
    """Bytes of body handed to the kernel."""

    def bytes(self, start: int = 0, stop: int | None = None, version: int | None = None) -> bytes:
        stop = self.size if stop is None else min(stop, self.size)
        if self.data is not None:
            return self.data[start:stop]
        return content(self.name, self.version if version is None else version, start, stop)

    @property
    def bodies(self) -> int:
        """Requests for bytes; one for the first byte alone only asks what the origin can do."""
        return sum(method == "GET" and asked != "bytes=0-0" for method, asked in self.requests)


class ScriptedOrigin:
    """The server: documents by path."""

    def __init__(self) -> None:
        self.documents: dict[str, Document] = {}
        self.stopping = threading.Event()
        origin = self

        class Handler(_Handler):
            owner = origin

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="origin")
        self._thread.start()

    def add(self, name: str, size: int = 0, *, data: bytes | None = None, **settings: Any) -> Document:
        url = f"http://127.0.0.1:{self._server.server_port}/{name}"
        document = Document(name, url, len(data) if data is not None else size, data, **settings)
        self.documents[name] = document
        return document

    def stop(self) -> None:
        """Switch it off: connections end, new ones are refused. Safe to call again."""
        if not self.stopping.is_set():
            self.stopping.set()
            self._server.shutdown()
            self._thread.join()
            self._server.close_connections()
            self._server.server_close()


class _Server(ThreadingHTTPServer):
    block_on_close = True
    daemon_threads = False
    request_queue_size = 128

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._connections: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients leave in the middle; that is no error here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: ScriptedOrigin

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        document = self.owner.documents.get(self.path.strip("/"))
        if document is None:
            self._refuse(404)
            return
        asked = self.headers.get("Range")
        document.requests.append((self.command, asked))
        if document.status is not None:
            self._refuse(document.status)
            return
        version, tag = document.version, f'"{document.name}-{document.version}"'
        start, stop = 0, document.size
        if_range = self.headers.get("If-Range")
        obeyed = document.ranged and asked is not None and if_range in (None, tag)
        if obeyed and asked is not None:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1 if last else document.size, document.size)
            if start >= document.size:
                self._refuse(416, f"bytes */{document.size}")
                return
        if document.die_at is not None and start >= document.die_at:
            self._reset()
            return
        self.send_response(206 if obeyed else 200)
        self.send_header("ETag", tag)
        self.send_header("Content-Type", document.mime)
        if obeyed:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{document.size}")
        if document.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if body:
            self._send(document, version, start, stop)

    def _send(self, document: Document, version: int, start: int, stop: int) -> None:
        for piece in _pieces(document, version, start, stop, self.owner.stopping):
            if piece is None:
                self._reset()
                return
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if document.chunked else piece)
            document.sent += len(piece)
        if document.chunked:
            self.wfile.write(b"0\r\n\r\n")

    def _refuse(self, status: int, content_range: str | None = None) -> None:
        self.send_response(status)
        if content_range is not None:
            self.send_header("Content-Range", content_range)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()


def _pieces(
    document: Document, version: int, start: int, stop: int, stopping: threading.Event
) -> Iterator[bytes | None]:
    """The body in pieces; None where the connection is to die."""
    position = start
    while position < stop:
        stall, die = document.stall_at, document.die_at
        if stall is not None and position >= stall and not document.go.is_set():
            document.stalled.set()
            while not document.go.wait(0.02):
                if stopping.is_set():
                    yield None
                    return
            continue
        if stopping.is_set() or (die is not None and position >= die):
            yield None
            return
        limit = min(x for x in (stop, position + PIECE, die, stall if not document.go.is_set() else None) if x)
        until = limit if limit > position else min(stop, position + PIECE)
        yield document.bytes(position, until, version)
        position = until
