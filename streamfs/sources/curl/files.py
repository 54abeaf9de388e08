"""Files of ftp, ftps and sftp servers, dressed as HTTP.

200 or 206 with exact Content-Length, Content-Range and Last-Modified; 416 past the end; 404 for a missing file, 401
for a refused login, 403 for a refused file, 503 for a server that is busy. Sizes and dates come from an exchange
without a body, and the one that carries the body must tell the same, or the file was replaced between the two.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace
from email.utils import formatdate, parsedate_to_datetime
from typing import Literal

import pycurl

from streamfs.sources.curl.failures import SSH, Refusal, refusal_or_raise
from streamfs.sources.curl.multi import CurlFailure, Transfer, TransferLoop
from streamfs.sources.curl.options import Target, prepare_file
from streamfs.sources.curl.response import CurlResponse, bare_response, close, start
from streamfs.sources.transport import Ending, Request, TransportError

UNSIZED_RESPONSE_TIMEOUT = 10
"""Seconds for every reply of an ftp server that names no size; a guess. After the last byte libcurl may block the
program for as long, where the server is silent."""


async def exchange_file(loop: TransferLoop, target: Target) -> CurlResponse:
    """The reply to a request for a file. Raises TransportError."""
    if target.parts.path.endswith("/") or not target.parts.path:
        raise TransportError("refused", f"{target.shown}: the URL names a folder, not a file")
    known = await _stat(loop, target)
    if isinstance(known, Refusal):
        return bare_response(target, known.status, known.text)
    chosen = _choose(target.request, known)
    headers = known.headers()
    if chosen is None:
        return bare_response(target, 416, "past the end", [("content-range", f"bytes */{known.size}"), *headers])
    status, length = 200, known.size
    if isinstance(chosen, _Span):
        status, length = 206, chosen.length
        headers.append(("content-range", f"bytes {chosen.first}-{chosen.last}/{known.size}"))
    if length is not None:
        headers.append(("content-length", str(length)))
    if target.request.method == "HEAD" or length == 0:
        return bare_response(target, status, "OK", headers)
    transfer = Transfer(loop)
    try:
        refusal = await _begin_file(loop, target, transfer, known, chosen if isinstance(chosen, _Span) else None)
        if refusal is not None:
            close(target, transfer)
            return bare_response(target, refusal.status, refusal.text)
        if length is None and transfer.done and transfer.failure is None and transfer.received == 0:
            length = 0  # sftp names no size for an empty file
            headers.append(("content-length", "0"))
        ending: Ending = "length" if length is not None else "chunked"
        return CurlResponse(transfer, target, status, "OK", "1.1", headers, ending, length)
    except BaseException:
        close(target, transfer)
        raise


async def _stat(loop: TransferLoop, target: Target) -> _FileFacts | Refusal:
    """Size and modification time, by an exchange without a body; it leaves its connection for the next one."""
    transfer = Transfer(loop)
    try:
        verdict = prepare_file(target, transfer.easy)
        transfer.easy.setopt(pycurl.NOBODY, 1)
        start(transfer, target)
        await transfer.wait_until(lambda: False)
        if transfer.failure is not None:
            return refusal_or_raise(target, transfer, verdict)
        return _FileFacts.told_by(transfer.easy)
    finally:
        close(target, transfer)


async def _begin_file(
    loop: TransferLoop, target: Target, transfer: Transfer, known: _FileFacts, span: _Span | None
) -> Refusal | None:
    """Start the body; None once its first bytes, or its end, are there and the file is still the known one."""
    easy = transfer.easy
    verdict = prepare_file(target, transfer.easy)
    if span is not None and span.last + 1 == known.size:
        easy.setopt(pycurl.RESUME_FROM_LARGE, span.first)  # ends in order, so the connection can be reused
    elif span is not None:
        easy.setopt(pycurl.RANGE, f"{span.first}-{span.last}")
    transfer.hold_at = known.size if span is None else span.length
    if transfer.hold_at is None:
        # No telling which piece is the last, so libcurl waits for the server's closing word by itself.
        easy.setopt(pycurl.FTP_RESPONSE_TIMEOUT, UNSIZED_RESPONSE_TIMEOUT)
    start(transfer, target)
    await transfer.wait_until(lambda: transfer.received > 0)
    if transfer.failure is not None and transfer.received == 0:
        if await _is_folder(loop, target, transfer.failure):
            raise TransportError("refused", f"{target.shown}: the URL names a folder, not a file")
        return refusal_or_raise(target, transfer, verdict)
    now = _FileFacts.told_by(easy)
    expected = known.size if span is None else span.length
    # An empty file has no length to tell (libcurl says -1): that it ended without a byte says it.
    same_length = now.size == expected or (not expected and transfer.done and transfer.received == 0)
    if not same_length or now.modified != known.modified:
        raise TransportError("reset", f"{target.shown}: the file changed while it was being opened")
    return None


async def _is_folder(loop: TransferLoop, target: Target, failure: BaseException) -> bool:
    """Whether that is why a file could not be read. An sftp server opens a folder like a file, and then fails to
    read it in the words of any other failure: only a folder can be listed."""
    if target.scheme != "sftp" or not isinstance(failure, CurlFailure) or failure.code != SSH:
        return False
    parts = target.parts._replace(path=target.parts.path + "/")
    listed = Target.of(replace(target.request, url=parts.geturl()))
    transfer = Transfer(loop)
    try:
        prepare_file(listed, transfer.easy)
        transfer.easy.setopt(pycurl.DIRLISTONLY, 1)
        start(transfer, listed)
        await transfer.wait_until(lambda: transfer.received > 0)
        return transfer.received > 0  # each has at least the names "." and ".."
    finally:
        close(listed, transfer)


@dataclass(frozen=True, slots=True)
class _FileFacts:
    size: int | None
    modified: int | None  # seconds since the epoch

    @classmethod
    def told_by(cls, easy: pycurl.Curl) -> _FileFacts:
        size, modified = easy.getinfo(pycurl.CONTENT_LENGTH_DOWNLOAD_T), easy.getinfo(pycurl.FILETIME_T)
        return cls(size if size >= 0 else None, modified if modified >= 0 else None)

    def headers(self) -> list[tuple[str, str]]:
        told = [("date", formatdate(time.time(), usegmt=True))]
        if self.modified is not None:
            told.append(("last-modified", formatdate(self.modified, usegmt=True)))
        if self.size is not None:
            told.append(("accept-ranges", "bytes"))
        return told


@dataclass(frozen=True, slots=True)
class _Span:
    """The bytes first..last, both included, of a file whose size is known."""

    first: int
    last: int

    @property
    def length(self) -> int:
        return self.last - self.first + 1


def _choose(request: Request, known: _FileFacts) -> _Span | Literal["whole"] | None:
    """What to send for the Range header, as RFC 9110 has it; None: nothing of the file is in the range."""
    asked = _header(request, "range")
    match = re.fullmatch(r"\s*bytes\s*=\s*(\d{0,18})\s*-\s*(\d{0,18})\s*", asked or "", re.I)
    if match is None or known.size is None or not (match[1] or match[2]) or not _range_applies(request, known):
        return "whole"
    if not match[1]:
        first, last = max(0, known.size - int(match[2])), known.size - 1
    else:
        first, last = int(match[1]), min(int(match[2]) if match[2] else known.size, known.size - 1)
        if match[2] and int(match[2]) < first:
            return "whole"
    return _Span(first, last) if first < known.size and first <= last else None


def _range_applies(request: Request, known: _FileFacts) -> bool:
    """Whether If-Range, which can only be a date here, names the modification time exactly."""
    condition = _header(request, "if-range")
    if condition is None:
        return True
    try:
        return known.modified is not None and parsedate_to_datetime(condition).timestamp() == known.modified
    except ValueError:
        return False


def _header(request: Request, name: str) -> str | None:
    return next((value for key, value in (*request.headers, *request.varying) if key.lower() == name), None)
