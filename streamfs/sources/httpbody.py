"""The body of a URL: bytes of one version, over as many replies as it takes.

After a break it goes on where it was, if the server vouches for the version; else what was given before is read again
and compared.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import trio

from streamfs.errors import SourceChanged, SourceFailed, SourceStalled
from streamfs.sources.attempts import ATTEMPTS, Attempts
from streamfs.sources.base import Facts
from streamfs.sources.decoding import Decoder
from streamfs.sources.ftp import FtpResponse
from streamfs.sources.overlap import Marks
from streamfs.sources.plain import PlainResponse
from streamfs.sources.replies import Asked, Ended, Part, Whole
from streamfs.sources.transport import Response, TransportError
from streamfs.sources.transports import close
from streamfs.spec import redact_url

SCRATCH = 256 * 1024  # bytes re-read at once while coming back to a position


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply that can be used, and what it was asked."""

    asked: Asked
    verdict: Part | Whole | Ended
    response: Response
    icy_metaint: int  # bytes between two blocks of radio metadata; 0: there are none

    async def aclose(self, *, reuse: bool = True) -> None:
        await close(self.response, reuse=reuse)


class Settles(Protocol):
    """Who can ask for the rest of a body."""

    async def settle(self, asked: Asked, attempts: Attempts) -> Answer:
        """An answer that can be used, to be closed by the caller. Raises SourceFailed, SourceChanged, NotPermitted."""


class HttpBody:
    """Bytes of one version, over as many replies as it takes: see base.Body.

    INVARIANT: `_position` is the offset of the next byte to give; `_skip` bytes of the current reply come before it.
    """

    def __init__(
        self,
        source: Settles,
        url: str,
        answer: Answer,
        facts: Facts,
        start: int,
        stop: int | None,
        stall_timeout: float | None,
    ) -> None:
        self.facts = facts
        self.start = start
        self.end_proven = False
        self._source = source
        self._url = url
        self._stop = stop
        self._stall_timeout = stall_timeout
        self._waited = 0.0  # seconds spent in receive_into since the last byte came
        self._attempts = Attempts(url, ATTEMPTS, ATTEMPTS)
        self._position = start
        self._skip = 0
        self._flow: _Flow | None = None
        # Only where no validator names the version must a second reading be compared with the first.
        self._given = Marks() if facts.validator is None else None
        self._again: Marks | None = None  # the second reading, up to `_position`
        self._ended = False
        self._scratch: memoryview | None = None
        self.reply_seconds = answer.response.reply_seconds if isinstance(answer.response, FtpResponse) else None
        """What one reply took, where its opening was more than one question; None: it was one."""
        self.icy_metaint = answer.icy_metaint
        """Bytes between two blocks of radio metadata; 0: there are none."""
        self._take(answer)

    async def receive_into(self, view: memoryview) -> int:
        if self._ended:
            return 0
        if count := self.receive_ready(view):
            self._waited = 0.0
            return count
        began = trio.current_time()
        try:
            count = await self._receive_patiently(view, began)
        except trio.Cancelled:
            self._waited += trio.current_time() - began
            raise
        self._waited = 0.0
        return count

    async def aclose(self) -> None:
        await self._drop()

    def close_now(self) -> None:
        """As `aclose`, where nothing was awaited but `receive_ready` gave all there is."""
        flow, self._flow = self._flow, None
        if flow is not None:
            assert isinstance(flow.response, PlainResponse)
            flow.response.close()

    @property
    def _name(self) -> str:
        return redact_url(self._url)

    # -- patience

    async def _receive_patiently(self, view: memoryview, began: float) -> int:
        if self._stall_timeout is None:
            return await self._receive(view)
        self._deadline = began + self._stall_timeout - self._waited
        # A connection can die without a word. Where going on elsewhere is cheap, that is tried half way.
        tries = (self._stall_timeout / 2, 0.0) if self.facts.ranged else (0.0,)
        for reserve in tries:
            with trio.CancelScope(deadline=self._deadline - reserve) as self._scope:
                self._reserve = reserve
                return await self._receive(view)
            await self._drop(reuse=False)
        raise SourceStalled(f"{self._name} sent nothing for {self._stall_timeout:g} s{self._attempts.last}")

    def _heard(self) -> None:
        """Bytes came that are not to be given (again): not what was waited for, but no stall either."""
        if self._stall_timeout is not None:
            self._deadline = trio.current_time() + self._stall_timeout
            self._scope.deadline = self._deadline - self._reserve

    # -- the loop

    async def _receive(self, view: memoryview) -> int:
        while not self._ended:
            try:
                if self._flow is None:
                    await self._resume()
                elif self._skip:
                    await self._reread(self._flow)
                else:
                    count = await self._receive_from(self._flow, view)
                    if count:
                        return count
            except TransportError as error:
                await self._drop(reuse=False)
                if not error.passing:
                    raise SourceFailed(f"{self._name}: {error}") from error
                await self._attempts.failed(str(error), connecting=error.kind == "connect")
        await self._drop()
        return 0

    def _limit(self) -> int | None:
        """The first offset not to give, None while unknown."""
        known = [end for end in (self._stop, self.facts.size) if end is not None]
        return min(known) if known else None

    async def _receive_from(self, flow: _Flow, view: memoryview) -> int:
        """Bytes from the current reply. 0 where it has none left: then either `_ended` is set or `_flow` is None."""
        limit = self._limit()
        reach = self._reach(flow, limit)
        if reach is not None and self._position >= reach:
            if reach == limit:
                await self._end_at(flow, reach)
            else:
                await self._drop()  # the server gave less than was asked: ask for the rest
                if not flow.fruitful:
                    await self._attempts.failed(f"the server gives no byte from {reach} on")
            return 0
        if reach is not None and len(view) > reach - self._position:
            view = view[: reach - self._position]
        count = await flow.receive_into(view)
        if count == 0:
            if reach is not None:
                raise TransportError("truncated", f"the body ended at byte {self._position} of {reach}")
            self._end(proven=flow.response.ending != "close")
            return 0
        self._gave(flow, view[:count])
        return count

    def receive_ready(self, view: memoryview, until: float = 0.0) -> int:
        """Bytes that the current reply has ready to be given, or has by `until`, as Connection.receive_by; 0 where
        there is more to do than to give them. Most reads of a fast source end here, without what waiting takes."""
        flow = self._flow
        if flow is None or self._skip:
            return 0
        reach = self._reach(flow, self._limit())
        room = len(view) if reach is None else min(len(view), reach - self._position)
        if room <= 0:
            return 0
        try:
            count = flow.receive_ready(view[:room], until)
        except TransportError:
            return 0  # the connection says so again to who waits for it
        if count:
            self._gave(flow, view[:count])
        return count

    @staticmethod
    def _reach(flow: _Flow, limit: int | None) -> int | None:
        """The offset that the current reply's bytes are given up to; None: until it ends."""
        return limit if flow.end is None else flow.end if limit is None else min(limit, flow.end)

    def _gave(self, flow: _Flow, piece: memoryview) -> None:
        if self._given is not None:
            self._given.add(piece)
        self._position += len(piece)
        flow.fruitful = True
        self._attempts.progress()

    async def _end_at(self, flow: _Flow, limit: int) -> None:
        """End where it was known to be. Where only the user said so, one more byte contradicts it."""
        only_declared = limit == self.facts.size != self._stop and flow.end is None and not flow.told_size
        if only_declared and await flow.receive_into(self._scratch_view()[:1]):
            raise SourceFailed(f"{self._name} goes on after its declared size of {limit} bytes")
        self._end(proven=True)

    def _end(self, *, proven: bool) -> None:
        self._ended = True
        self.end_proven = proven
        if proven and self.facts.size is None and (self._stop is None or self._position < self._stop):
            self.facts = replace(self.facts, size=self._position)

    # -- going on after a break, or after a reply that gave only part

    async def _resume(self) -> None:
        comparable = self.facts.validator is not None
        start = self._position if comparable and not self._decoded else 0
        stop = None if self._decoded else self._stop
        expect = self.facts if comparable else replace(self.facts, size=self._served_size)
        self._take(await self._source.settle(Asked(start, stop, not self._decoded, expect), self._attempts))

    def _take(self, answer: Answer) -> None:
        """Go on with this reply."""
        verdict = answer.verdict
        self._flow = _Flow(answer.response, verdict)
        if answer.icy_metaint != self.icy_metaint:
            raise SourceChanged(f"{self._name} now sends its metadata at other places")
        self._served_size = verdict.facts.size
        self._decoded = isinstance(verdict, Whole) and verdict.decode is not None
        if isinstance(verdict, Ended):
            if answer.asked.start != self._position:
                raise SourceChanged(f"{self._name} had {self._position} bytes and now has none")
            self._skip = 0
            self._end(proven=verdict.proven)
            return
        self._skip = self._position - (verdict.start if isinstance(verdict, Part) else 0)
        self._again = Marks() if self._given is not None and self._skip else None

    async def _reread(self, flow: _Flow) -> None:
        """Read up to `_position` what was given before, comparing where no validator vouches for it."""
        piece = self._scratch_view()[: self._skip]
        count = await flow.receive_into(piece)
        if count == 0:
            raise TransportError("truncated", f"the body ended before byte {self._position}, where it was before")
        self._heard()
        self._skip -= count
        if self._again is not None and self._given is not None:
            self._again.add(piece[:count])
            if not self._given.agrees(self._again):
                raise SourceChanged(f"{self._name} was read again after a break and its bytes have changed")

    def _scratch_view(self) -> memoryview:
        if self._scratch is None:
            self._scratch = memoryview(bytearray(SCRATCH))
        return self._scratch

    async def _drop(self, *, reuse: bool = True) -> None:
        flow, self._flow = self._flow, None
        if flow is not None:
            await close(flow.response, reuse=reuse)


class _Flow:
    """The bytes of one reply, decoded where need be. `end`: the offset its bytes reach, None: until it ends."""

    def __init__(self, response: Response, verdict: Part | Whole | Ended) -> None:
        self.response = response
        self.end = verdict.end if isinstance(verdict, Part) else None
        self.told_size = verdict.facts.size is not None
        self.fruitful = False  # it has brought a byte that was not there before
        self._decoder = Decoder(verdict.decode) if isinstance(verdict, Whole) and verdict.decode else None

    def receive_ready(self, view: memoryview, until: float) -> int:
        """As HttpBody's. Raises TransportError."""
        if self._decoder is None and isinstance(self.response, PlainResponse):
            return self.response.receive_ready(view, until)
        if self._decoder is None and isinstance(self.response, FtpResponse):
            return self.response.receive_ready(view)
        return 0

    async def receive_into(self, view: memoryview) -> int:
        if self._decoder is None:
            return await self.response.receive_into(view)
        return await self._decoder.receive_into(self.response, view)
