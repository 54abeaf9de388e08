"""What is answered, and to whom. WSGI, so that it can be called without a server."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterable
from importlib.resources import files
from typing import TYPE_CHECKING, Any, NamedTuple

from streamfs.web.metrics import Metrics
from streamfs.web.watch import Seen

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

PLAIN = "text/plain; charset=utf-8"
_OURS = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?", re.IGNORECASE | re.ASCII)
"""What a Host header says of somebody who meant this machine. A page elsewhere whose name was made to resolve to a
loopback address (DNS rebinding) still says its own name. Any port: it may be forwarded through ssh."""
_DAEMON_FACTS = ("pid", "version", "mountpoint", "started", "memory", "cache_size")


class Answer(NamedTuple):
    status: str
    media_type: str
    body: bytes


class Application:
    """`look` tells what is so; `document(rows, **more)` makes the machine-readable shape of it. For one thread."""

    def __init__(self, look: Callable[[], Seen], document: Callable[..., str]) -> None:
        self._look = look
        self._document = document
        self._metrics = Metrics(look)
        self._page = files("streamfs.web").joinpath("page.html").read_bytes()
        self._headers = [
            ("Content-Security-Policy", _policy(self._page.decode())),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("Cross-Origin-Opener-Policy", "same-origin"),
            ("Cache-Control", "no-store"),
        ]

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        answer = self._answer(environ)
        headers = [
            *self._headers,
            ("Content-Type", answer.media_type),
            ("Content-Length", str(len(answer.body))),
        ]
        if answer.status.startswith("405"):
            headers.append(("Allow", "GET, HEAD"))
        start_response(answer.status, headers)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [answer.body]

    def _answer(self, environ: WSGIEnvironment) -> Answer:
        if not _OURS.fullmatch(environ.get("HTTP_HOST", "")):
            return Answer("403 Forbidden", PLAIN, b"streamfs answers to this machine's own names only\n")
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return Answer("405 Method Not Allowed", PLAIN, b"there is only something to look at: GET, HEAD\n")
        match environ.get("PATH_INFO", ""):
            case "/":
                return Answer("200 OK", "text/html; charset=utf-8", self._page)
            case "/streams.json":
                return Answer("200 OK", "application/json", self._streams())
            case "/metrics":
                body, media_type = self._metrics.text(environ.get("HTTP_ACCEPT", ""))
                return Answer("200 OK", media_type, body)
            case _:
                return Answer("404 Not Found", PLAIN, b"there are /, /metrics and /streams.json\n")

    def _streams(self) -> bytes:
        seen = self._look()
        daemon: dict[str, Any] = {"up": seen.up, "why": seen.why}
        if seen.up:
            daemon |= {key: seen.facts.get(key) for key in _DAEMON_FACTS}
            daemon |= {"written": seen.written, "whole": seen.whole}
        return self._document(seen.rows, disk_error=seen.facts.get("disk_error"), daemon=daemon).encode()


def _policy(page: str) -> str:
    """Only this page's own script and style run, only this server is asked, nobody frames it."""
    script, style = (_hashes(page, element) for element in ("script", "style"))
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hashes(page: str, element: str) -> str:
    found = re.findall(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
    digests = (hashlib.sha256(text.encode()).digest() for text in found)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
