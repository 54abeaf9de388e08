"""Any source with its bytes passed through transforms (streamfs.engine.transforms): one-way, of unknown size.

Decoding is done in portions: light ones in the event loop, for a few milliseconds at a time; those of heavy
decoders in a worker thread.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import trio

from streamfs.engine.transforms import Bunzip2, BytesLike, Chain, Digest, Gunzip, Icy, Transform, Unxz, Unzstd
from streamfs.errors import Closed, SourceChanged, StreamfsError
from streamfs.sources.base import Body, Facts, Source

SCRATCH = 256 * 1024  # bytes of input received at once
TURN = 0.002  # seconds of work in the event loop before other tasks get their turn
THREAD_TURN = 0.02  # seconds of work in a thread: a hop costs some 0.6 ms
_KEEP_TYPE = frozenset({"digest", "icy"})  # transforms that leave the bytes what they are

_DECODERS: dict[str, Callable[[], Transform]] = {
    "bunzip2": Bunzip2,
    "digest": Digest,
    "gunzip": Gunzip,
    "unxz": Unxz,
    "unzstd": Unzstd,
}

_limiter: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("streamfs transforms")


def _threads() -> trio.CapacityLimiter:
    """Of one trio run: threads that compute are worth no more than there are processors."""
    try:
        return _limiter.get()
    except LookupError:
        limiter = trio.CapacityLimiter(os.cpu_count() or 1)
        _limiter.set(limiter)
        return limiter


class TransformedSource:
    """`inner` through the transforms of these names (streamfs.spec.TRANSFORMS), in order: see base.Source.

    Always one-way, from the first byte. The validator is the inner one with the names before it: equal input gives
    equal output. Owns `inner`."""

    def __init__(self, inner: Source, names: tuple[str, ...]) -> None:
        self._inner = inner
        self._names = names
        self._prefix = ",".join(names) + ":"

    async def open(self, start: int, stop: int | None, expect: Facts | None) -> TransformedBody:
        """A body from 0 to the end, whatever `start` and `stop` say. Raises as the inner source's."""
        inner = await self._inner.open(0, None, None if expect is None else self._expected_inside(expect))
        return TransformedBody(inner, self._outside(inner.facts), self._chain(inner))

    def begin(self, start: int, stop: int, expect: Facts) -> None:
        """What comes has to be transformed first."""

    async def probe(self) -> Facts:
        return self._outside(await self._inner.probe())

    async def aclose(self) -> None:
        await self._inner.aclose()

    def _chain(self, inner: Body) -> Chain:
        metaint: int | None = getattr(inner, "icy_metaint", None)  # of HTTP alone
        return Chain(*(Icy(metaint) if name == "icy" else _DECODERS[name]() for name in self._names))

    def _outside(self, facts: Facts) -> Facts:
        return Facts(
            validator=None if facts.validator is None else self._prefix + facts.validator,
            mime=facts.mime if _KEEP_TYPE.issuperset(self._names) else None,
            modified=facts.modified,
        )

    def _expected_inside(self, expect: Facts) -> Facts:
        if expect.validator is None:
            return Facts()
        if not expect.validator.startswith(self._prefix):
            raise SourceChanged("the bytes were made by other transforms")
        return Facts(validator=expect.validator.removeprefix(self._prefix))


class TransformedBody:
    """The output of a chain: see base.Body. Also tells what the inner body tells of its command.

    INVARIANT: the inner body is only read when the chain is hungry, so all that can be made of its bytes has been
    given before it is waited for, or its failure raised.
    """

    start = 0

    def __init__(self, inner: Body, facts: Facts, chain: Chain) -> None:
        """Takes over `inner`."""
        self.facts = facts
        self.end_proven = False
        self._inner = inner
        self._chain = chain
        self._scratch: memoryview | None = memoryview(bytearray(SCRATCH))  # None once closed
        self._left: BytesLike = b""  # output that did not fit
        self._failure: StreamfsError | None = None
        self._icy = next((t for t in chain.transforms if isinstance(t, Icy)), None)
        self._digest = next((t for t in reversed(chain.transforms) if isinstance(t, Digest)), None)

    async def receive_into(self, view: memoryview) -> int:
        """As the protocol says. 0 is given where the inner end came and every transform ended as it should.
        Raises SourceFailed where the input is damaged or cut off, and what the inner body raises."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            if self._scratch is None:
                raise Closed("the transformed body was closed")
            if self._left or not (self._chain.hungry or self._chain.over):
                count = await self._worked(view)
                if count:
                    return count
            elif self._failure is not None:
                raise self._failure
            elif self._chain.over:
                self._end()
                return 0
            else:
                await self._receive(self._scratch)

    async def _receive(self, scratch: memoryview) -> None:
        try:
            count = await self._inner.receive_into(scratch)
        except StreamfsError as error:
            self._failure = error
            raise
        if count:
            self._chain.feed(scratch[:count])
        else:
            self._chain.finish()

    def _end(self) -> None:
        if not self.end_proven:
            self.end_proven = self._inner.end_proven

    async def _worked(self, view: memoryview) -> int:
        """Bytes put into `view` by one turn of work, perhaps none. What was worked out reaches the caller even when it
        is being cancelled."""
        if self._chain.heavy:
            return await trio.to_thread.run_sync(self._work, view, THREAD_TURN, limiter=_threads())
        count = self._work(view, TURN)
        if count:
            await trio.lowlevel.cancel_shielded_checkpoint()
        else:
            await trio.lowlevel.checkpoint()
        return count

    def _work(self, view: memoryview, seconds: float) -> int:
        """Fill `view` from the chain until it is full, the chain is hungry or over, or time is up."""
        until = time.perf_counter() + seconds
        filled = 0
        while filled < len(view):
            if not self._left:
                if self._chain.hungry or self._chain.over or (filled and time.perf_counter() >= until):
                    break
                try:
                    self._left = self._chain.step()
                except StreamfsError:
                    if filled:
                        break  # the chain raises it again, once these are out
                    raise
            count = min(len(self._left), len(view) - filled)
            view[filled : filled + count] = self._left[:count]
            self._left = memoryview(self._left)[count:]
            filled += count
            if not filled and time.perf_counter() >= until:
                break
        return filled

    async def aclose(self) -> None:
        self._scratch = None
        self._left = b""
        await self._inner.aclose()

    # What is told besides the bytes

    @property
    def title(self) -> str | None:
        """What a radio stream plays at the last byte received; None where nothing told."""
        return self._icy.title if self._icy is not None else None

    @property
    def sha256(self) -> str | None:
        """What `digest` found, the last of them where there are several; None before the end."""
        return self._digest.sha256 if self._digest is not None else None

    @property
    def exit_status(self) -> int | None:
        """How the inner body's command ended; None before, and where there is none."""
        status: int | None = getattr(self._inner, "exit_status", None)
        return status

    @property
    def stderr_tail(self) -> str:
        """The last words of the inner body's command."""
        said: str = getattr(self._inner, "stderr_tail", "")
        return said
