"""A reply of libcurl's: its body as it comes, and how its end is proven.

`ending`: "length" by libcurl's count and ours; "chunked" also for HTTP/2 without a Content-Length (END_STREAM; a stream
that is reset is an error) and for ftp without a size (the server's 226 reply); "close" where nothing but the closed
connection tells.
"""

from __future__ import annotations

import trio

from streamfs.sources.curl.failures import TIMED_OUT, failure_of
from streamfs.sources.curl.multi import CurlFailure, LoopClosed, Transfer
from streamfs.sources.curl.options import Target
from streamfs.sources.transport import Ending, TransportError

# After the last byte of an ftp or sftp file, in seconds; both are guesses. During the second libcurl may block the
# program, where the server is silent.
CLOSING_WORD_TIMEOUT = 0.1
FAREWELL_TIMEOUT = 0.25


class CurlResponse:
    """A reply, see `transport.Response`. Used by one task at a time; `aclose` from anywhere in the run."""

    def __init__(
        self,
        transfer: Transfer | None,
        target: Target,
        status: int,
        reason: str,
        http_version: str,
        headers: list[tuple[str, str]],
        ending: Ending,
        length: int | None,
    ) -> None:
        self.status = status
        self.reason = reason
        self.http_version = http_version
        self.headers = headers
        self.ending = ending
        self._transfer = transfer  # None: no body
        self._target = target
        self._length = length  # of the body, where declared
        self._closed = False

    async def receive_into(self, view: memoryview) -> int:
        """See `transport.Response.receive_into`. A cancelled call has taken no byte."""
        if self._closed:
            raise TransportError("reset", f"{self._target.shown}: the response is closed")
        transfer = self._transfer
        if transfer is None:
            await trio.lowlevel.checkpoint()
            return 0
        try:
            count = await transfer.receive_into(view)
            if count == 0:
                await self._settle(transfer)
        except (CurlFailure, LoopClosed) as error:
            raise failure_of(self._target, transfer, answered=True) from error
        if count == 0 and self._length is not None and transfer.received != self._length:
            text = f"the body has {transfer.received} bytes where {self._length} were declared"
            raise TransportError("truncated", f"{self._target.shown}: {text}")
        return count

    async def _settle(self, transfer: Transfer) -> None:
        """All bytes of a file are here: hear the server's closing word, if it comes soon. Its complaint counts, its
        silence costs the connection only."""
        await transfer.settle(CLOSING_WORD_TIMEOUT, FAREWELL_TIMEOUT)
        failure = transfer.failure
        if transfer.held and isinstance(failure, CurlFailure) and failure.code != TIMED_OUT:
            raise failure

    async def aclose(self, *, reuse: bool = True) -> None:
        """Take the transfer off libcurl at once; an unfinished one loses its connection. Without `reuse` the
        connection of a finished HTTP/1 transfer is shut down too, unless another transfer has it by now."""
        if self._closed:
            return
        self._closed = True
        transfer = self._transfer
        if transfer is not None:
            try:
                if reuse:
                    # A reader who knows the length need not have asked for the end.
                    await transfer.settle(CLOSING_WORD_TIMEOUT, FAREWELL_TIMEOUT)
                elif self.http_version != "2":
                    transfer.abandon_connection()
            finally:
                close(self._target, transfer)
        await trio.lowlevel.checkpoint_if_cancelled()


def bare_response(
    target: Target, status: int, reason: str, headers: list[tuple[str, str]] | None = None
) -> CurlResponse:
    """A reply without a body. Its headers speak of the file, as those of a HEAD do."""
    return CurlResponse(None, target, status, reason, "1.1", headers or [], "length", 0)


def start(transfer: Transfer, target: Target) -> None:
    """Raises TransportError("reset") where the loop is closed."""
    try:
        transfer.start()
    except LoopClosed as error:
        raise TransportError("reset", f"{target.shown}: {error}") from error


def close(target: Target, transfer: Transfer) -> None:
    """Take the transfer off libcurl. An sftp transfer that goes on is cut off: its farewell would block."""
    if target.scheme == "sftp":
        transfer.cut_connection()
    transfer.close()
