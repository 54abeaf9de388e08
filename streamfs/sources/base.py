"""The protocol every source follows. Whoever fetches (streamfs.stream) needs no more than this.

A source is cheap to make and does nothing until opened. A body is one run of bytes from `start` on; it is used
by one task at a time. Both work under trio only and may be cancelled at any await: `aclose` then ends the
connection or the process and returns within seconds.
"""

from __future__ import annotations

from typing import Protocol

from streamfs.spec import Facts as Facts  # beside the specification, so that the catalogue needs no source


class Body(Protocol):
    """A run of bytes of one version."""

    @property
    def facts(self) -> Facts: ...

    @property
    def start(self) -> int:
        """Offset of the first byte this body gives. It is 0, whatever was asked, where the source turned out to
        be one-way."""

    async def receive_into(self, view: memoryview) -> int:
        """Put at least one byte at the front of `view` (not empty) and return how many; they are the next ones
        in order. As soon as something has arrived it is given: never waits to fill the view.

        0 means that the body ended and that this end is proven (declared length met, chunked terminator, exit
        status 0): the end of the stream, or `stop` of the open call. Retries and resumes happen inside.
        Raises SourceFailed (or a kind of it) where bytes are missing, SourceStalled after the stall timeout
        without a byte, SourceChanged when the version changed on the way. After a raise the body is dead: close it.
        """

    @property
    def end_proven(self) -> bool:
        """After 0: False where the end rests on a bare connection close that nothing confirms."""

    async def aclose(self) -> None:
        """Give back what the body holds (a connection, a process group). Safe to call again."""


class Prompt(Body, Protocol):
    """A body of which the request was sent, and whose bytes may come on the spot. It need not be waited for: first
    `receive_now` may be called until it gives 0, and then either `close_now`, or it is used as any other body."""

    def receive_now(self, view: memoryview) -> int:
        """As `receive_into`, but nobody else gets a turn until bytes have come, for some hundred microseconds at most;
        0 where they have not, or where there is more to do than to wait: whatever that is `receive_into` tells."""

    def close_now(self) -> None:
        """As `aclose`."""


class Source(Protocol):
    """Where the bytes of one stream come from."""

    async def open(self, start: int, stop: int | None, expect: Facts | None) -> Body:
        """A body from `start` to `stop` (None: to the end); 0 <= start < stop. It may go on past `stop` where to end
        there would cost more than to be closed.

        One-way sources answer with a body whose `start` is 0 and which goes on to the end, whatever `stop` is: it may
        be the only reading there is. `expect` holds the facts of the generation to
        continue: a source that serves another version raises SourceChanged. Without it any version will do.
        `start` at or past the end of the bytes raises SourceFailed, unless start is 0 (an empty body).
        Raises SourceFailed, SourceStalled, SourceChanged, NotPermitted (a forbidden address or redirect).
        """

    def begin(self, start: int, stop: int, expect: Facts) -> Prompt | None:
        """Ask for start..stop now, without waiting, of a source whose latest body was of the ranged version `expect`.
        None where that cannot be done, or where the reply is not expected to come on the spot: use `open`."""

    async def probe(self) -> Facts:
        """Facts without fetching content, for the catalogue; a command gives `Facts()` without running.
        Raises like `open`."""

    async def aclose(self) -> None:
        """Give back what the source holds besides its bodies."""
