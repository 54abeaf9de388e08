"""Files of ftp, ftps and sftp servers: `filereplies` says how they are dressed as HTTP.

Sizes and dates come from an exchange without a body, and the one that carries the body must tell the same, or the file
was replaced between the two.
"""

from __future__ import annotations

from dataclasses import replace

import pycurl

from streamfs.sources.curl.failures import SSH, refusal_or_raise
from streamfs.sources.curl.multi import CurlFailure, Transfer, TransferLoop
from streamfs.sources.curl.options import Target, prepare_file
from streamfs.sources.curl.response import CurlResponse, bare_response, close, start
from streamfs.sources.filereplies import FileFacts, FileHead, Refusal, head_of
from streamfs.sources.transport import Ending, TransportError

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
    head = head_of(target.request, known)
    if target.request.method == "HEAD" or head.length == 0:
        return bare_response(target, head.status, head.reason, head.headers)
    length, headers = head.length, head.headers
    transfer = Transfer(loop)
    try:
        refusal = await _begin_file(loop, target, transfer, known, head)
        if refusal is not None:
            close(target, transfer)
            return bare_response(target, refusal.status, refusal.text)
        if length is None and transfer.done and transfer.failure is None and transfer.received == 0:
            length = 0  # sftp names no size for an empty file
            headers.append(("content-length", "0"))
        ending: Ending = "length" if length is not None else "chunked"
        return CurlResponse(transfer, target, head.status, head.reason, "1.1", headers, ending, length)
    except BaseException:
        close(target, transfer)
        raise


async def _stat(loop: TransferLoop, target: Target) -> FileFacts | Refusal:
    """Size and modification time, by an exchange without a body; it leaves its connection for the next one."""
    transfer = Transfer(loop)
    try:
        verdict = prepare_file(target, transfer.easy)
        transfer.easy.setopt(pycurl.NOBODY, 1)
        start(transfer, target)
        await transfer.wait_until(lambda: False)
        if transfer.failure is not None:
            return refusal_or_raise(target, transfer, verdict)
        return _facts_told_by(transfer.easy)
    finally:
        close(target, transfer)


async def _begin_file(
    loop: TransferLoop, target: Target, transfer: Transfer, known: FileFacts, head: FileHead
) -> Refusal | None:
    """Start the body; None once its first bytes, or its end, are there and the file is still the known one."""
    easy, span = transfer.easy, head.span
    verdict = prepare_file(target, transfer.easy)
    if span is not None and span.to_end:
        easy.setopt(pycurl.RESUME_FROM_LARGE, span.first)  # ends in order, so the connection can be reused
    elif span is not None:
        easy.setopt(pycurl.RANGE, f"{span.first}-{span.last}")
    transfer.hold_at = head.length
    if transfer.hold_at is None:
        # No telling which piece is the last, so libcurl waits for the server's closing word by itself.
        easy.setopt(pycurl.FTP_RESPONSE_TIMEOUT, UNSIZED_RESPONSE_TIMEOUT)
    start(transfer, target)
    await transfer.wait_until(lambda: transfer.received > 0)
    if transfer.failure is not None and transfer.received == 0:
        if await _is_folder(loop, target, transfer.failure):
            raise TransportError("refused", f"{target.shown}: the URL names a folder, not a file")
        return refusal_or_raise(target, transfer, verdict)
    now = _facts_told_by(easy)
    # An empty file has no length to tell (libcurl says -1): that it ended without a byte says it.
    same_length = now.size == head.length or (not head.length and transfer.done and transfer.received == 0)
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


def _facts_told_by(easy: pycurl.Curl) -> FileFacts:
    size, modified = easy.getinfo(pycurl.CONTENT_LENGTH_DOWNLOAD_T), easy.getinfo(pycurl.FILETIME_T)
    return FileFacts(size if size >= 0 else None, modified if modified >= 0 else None)
