"""What libcurl's failures mean: a TransportError, or a file server's refusal as HTTP would put it."""

from __future__ import annotations

import errno
from typing import Literal

import pycurl

from streamfs.sources.curl.multi import CurlFailure, Transfer
from streamfs.sources.curl.options import HTTP, KNOWN_HOST_MISMATCH, KNOWN_HOST_OK, HostKeyVerdict, Target
from streamfs.sources.filereplies import BUSY_REPLIES, Refusal
from streamfs.sources.transport import TransportError

_Kind = Literal["connect", "tls", "reset", "truncated", "protocol", "refused"]

# CURLE_ numbers; pycurl names only some of them.
_CONNECT = frozenset({5, 6, 7, 15, 45, 89, 96, 97})  # names, refusals, interfaces, QUIC, the proxy's own handshake
_TLS = frozenset({35, 53, 54, 58, 59, 60, 64, 66, 77, 80, 82, 83, 90, 91, 98})
_REFUSED = frozenset({3, 4, 43, 48})  # malformed URL, option or scheme this libcurl does not have
_BROKEN = frozenset({16, 18, 28, 52, 55, 56, 81, 92, 95})  # the connection or HTTP/2 stream ended too early
_LOGIN_DENIED, _ACCESS_DENIED, _FILE_NOT_FOUND, _RETR_FAILED, SSH, TIMED_OUT = 67, 9, 78, 19, 79, 28
_SSL_CONNECT = 35
_FTP_DATA = frozenset({10, 12, 13, 14, 17, 30, 31})  # data connection or a command before RETR refused
_WRONG_FTP_REPLY = 8


def refusal_or_raise(target: Target, transfer: Transfer, verdict: HostKeyVerdict) -> Refusal:
    """The HTTP status for a file server's refusal; raises TransportError for everything else."""
    failure = transfer.failure
    if isinstance(failure, CurlFailure):
        text = target.redact(failure.text)
        reply = transfer.easy.getinfo(pycurl.RESPONSE_CODE) if target.scheme != "sftp" else 0
        if reply in BUSY_REPLIES:
            return Refusal(503, f"the server is busy ({reply}): {text}")
        if failure.code == _LOGIN_DENIED:
            return Refusal(401, f"the login is refused ({text})")
        if failure.code == _FILE_NOT_FOUND:
            or_folder = "" if target.scheme == "sftp" else ", or it is a folder"  # which has no size for ftp either
            return Refusal(404, f"no such file{or_folder} ({text})")
        if failure.code in (_ACCESS_DENIED, _RETR_FAILED):
            if reply == 550:  # FTP says so of what is missing and of what is forbidden
                return Refusal(404, f"no such file, or it may not be read ({text})")
            return Refusal(403, f"the file may not be read ({text})")
        if verdict.match not in (None, KNOWN_HOST_OK) and not target.identity.insecure:
            raise TransportError("tls", _host_key_text(target, verdict)) from failure
    raise failure_of(target, transfer, answered=False) from failure


def _host_key_text(target: Target, verdict: HostKeyVerdict) -> str:
    if verdict.match == KNOWN_HOST_MISMATCH:
        return (
            f"{target.shown}: the server's host key is another than the one in {verdict.file}: somebody may be in "
            "between; remove the old key if you know why it changed"
        )
    return f"{target.shown}: the server's host key is not in {verdict.file}: connect once with ssh to check and add it"


def failure_of(target: Target, transfer: Transfer, *, answered: bool) -> TransportError:
    """The TransportError for the way `transfer` ended. `answered`: the reply's head had been given out."""
    failure = transfer.failure
    if not isinstance(failure, CurlFailure):
        text = str(failure) if failure is not None else "the exchange ended without a reply"
        return TransportError("truncated" if answered else "reset", f"{target.shown}: {text}")
    text = target.redact(failure.text) or pycurl.easy_strerror(failure.code)
    if target.identity.proxy is not None and not answered:
        refusal = transfer.easy.getinfo(pycurl.HTTP_CONNECTCODE)
        if refusal in (401, 407):  # tinyproxy says 401
            return TransportError("refused", f"{target.shown}: the proxy refuses the login ({refusal})")
        if 400 <= refusal < 500:
            return TransportError("refused", f"{target.shown}: the proxy refuses to connect ({refusal})")
    return TransportError(_kind(target, transfer, failure, answered), f"{target.shown}: {text}")


def _kind(target: Target, transfer: Transfer, failure: CurlFailure, answered: bool) -> _Kind:
    code = failure.code
    broken: _Kind = "truncated" if answered else "reset"
    if code in _REFUSED:
        return "refused"
    if code == _SSL_CONNECT and _cut_off(transfer, failure):
        return broken
    if code in _TLS:
        return "tls"
    if code in _CONNECT:
        return "connect"
    if code == TIMED_OUT and transfer.easy.getinfo(pycurl.CONNECT_TIME) == 0:
        return "connect"
    if code in _BROKEN:
        return "protocol" if "chunk" in failure.text and "malformed" in failure.text.lower() else broken
    if target.scheme not in HTTP and code in (*_FTP_DATA, SSH, _WRONG_FTP_REPLY, _RETR_FAILED, _ACCESS_DENIED):
        return broken
    return "protocol"


def _cut_off(transfer: Transfer, failure: CurlFailure) -> bool:
    """Whether a TLS handshake failed because the connection went away: worth another try, unlike other failures."""
    gone = (errno.ECONNRESET, errno.EPIPE, errno.ETIMEDOUT)
    return transfer.easy.getinfo(pycurl.OS_ERRNO) in gone or any(
        sign in failure.text for sign in ("SSL_ERROR_SYSCALL", "unexpected eof", "Connection reset")
    )
