"""Stateful byte-to-byte filters between a source and its buffer: decompression, radio metadata, digests.

A `Transform` does one bounded step of work at a time, and a `Chain` passes bytes through several of them, so that
neither a long input nor a decompression bomb is ever in memory at once. Sans-IO: whoever uses a chain feeds it.

    buffer = StreamBuffer(transformed(open(path, "rb"), Gunzip()))

What a decoder gives before it finds damage is what the library gives: most formats carry checksums at the end of
a block or of the whole, so a clean end means right bytes, and before it nothing is proven. The bytes of the very step
that finds the damage (at most STEP) are not given.
"""

from __future__ import annotations

import bz2
import hashlib
import lzma
import re
import sys
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Protocol

from streamfs.errors import SourceFailed

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

BytesLike = bytes | bytearray | memoryview
_END: Any = object()

STEP = 64 * 1024
"""Most bytes that one step of the transforms here takes or gives: well under a millisecond of work, but for the
heavy ones."""
MOST_HELD = 16 * 1024 * 1024
"""Bytes past its `minimum` that a transform may ask for at once before it is called broken."""
XZ_MEMORY = 256 * 1024 * 1024
"""Bytes that one xz decoder may use; `xz -9` needs 65 MiB. zstd's own limit is a window of 128 MiB."""


class Transform(ABC):
    """A filter of bytes that keeps its state between steps. One use, one stream."""

    minimum: int = 1
    """Fewest contiguous bytes of input a step wants, but for the last. It may change between steps."""
    pending: bool = False
    """There is output to give without any more input: the next step comes at once, whatever has arrived."""
    heavy: ClassVar[bool] = False
    """A step may take tens of milliseconds, so that an event loop should have it done in a thread."""

    @abstractmethod
    def step(self, data: memoryview, final: bool) -> tuple[int, BytesLike]:
        """Work on `data`, the next bytes in order: (how many were used up, the output, which must not change
        afterwards). What was not used up comes again, with more behind it.

        `final`: nothing comes after `data`, which may then be shorter than `minimum`, or empty. Such steps are made
        until `data` is used up and nothing is `pending`; that is the end. Empty output is never the end, and (0, b"")
        asks for at least one byte more. Give output in portions of about STEP bytes where it may be much larger than
        the input. Raises SourceFailed where the input is damaged or ends too early.
        """


class Chain:
    """Transforms one behind the other: `feed` it when it is `hungry`, `step` until it is again; `finish` at the end
    of the input, and `step` until it is `over`.

    Holds, for each transform, no more than the output of one step before it and what it left for later. The
    first error is raised by every later `step`. One thread at a time.
    """

    def __init__(self, *transforms: Transform) -> None:
        if not transforms:
            raise ValueError("a chain needs at least one transform")
        self.transforms = transforms
        self.heavy = any(transform.heavy for transform in transforms)
        self._stages = [_Stage(transform) for transform in transforms]
        self._failure: Exception | None = None

    @property
    def hungry(self) -> bool:
        """Nothing can be done until more is fed, or `finish` is called."""
        return self._failure is None and not self._stages[0].final and not any(stage.ready for stage in self._stages)

    @property
    def over(self) -> bool:
        """The input ended where it may end, and all output was given."""
        return self._stages[-1].over

    def feed(self, data: BytesLike) -> None:
        """The next input. What is not `bytes` is copied. Raises ValueError unless the chain is hungry."""
        if not self.hungry:
            raise ValueError("the chain has work to do before it takes more")
        self._stages[0].put(data if isinstance(data, bytes) else bytes(data))

    def finish(self) -> None:
        """The input has ended; the end is still to be worked through."""
        self._stages[0].final = True

    def step(self) -> BytesLike:
        """Do one step of the work that lies nearest to the output, and return what came out of the chain, perhaps
        nothing. Raises SourceFailed for input that is damaged or cut off."""
        if self._failure is not None:
            raise self._failure
        for index in reversed(range(len(self._stages))):
            stage = self._stages[index]
            if stage.ready:
                break
        else:
            return b""
        try:
            out = stage.step()
        except Exception as error:
            self._failure = error
            raise
        if index + 1 == len(self._stages):
            return out
        follower = self._stages[index + 1]
        follower.put(out)
        follower.final = stage.over
        return b""


class _Stage:
    """One transform and the input it has not used up."""

    __slots__ = ("_enough", "_held", "final", "over", "transform")

    def __init__(self, transform: Transform) -> None:
        self.transform = transform
        self.final = False
        self.over = False
        self._held = memoryview(b"")  # always over bytes that do not change
        self._enough = 1  # fewer bytes were not enough the last time

    def put(self, data: BytesLike) -> None:
        # INVARIANT: only stages that are not ready are fed, so that what is copied here is less than they want at once.
        self._held = memoryview(b"".join((self._held, data)) if self._held else data).cast("B")

    @property
    def ready(self) -> bool:
        if self.over:
            return False
        return self.final or self.transform.pending or len(self._held) >= max(self._enough, self.transform.minimum)

    def step(self) -> BytesLike:
        transform, held = self.transform, self._held
        was_pending = transform.pending
        used, out = transform.step(held, self.final)
        if not 0 <= used <= len(held):
            raise ValueError(f"{type(transform).__name__} says it used {used} of {len(held)} bytes")
        self._held = held[used:]
        self._enough = 1
        if transform.pending:
            return out
        if self.final and not self._held:
            self.over = True
        elif not used and not out and not was_pending:
            self._enough = len(held) + 1
            if self.final or self._enough > transform.minimum + MOST_HELD:
                raise SourceFailed(f"{type(transform).__name__} can do nothing with the {len(held)} bytes it was given")
        return out


def transformed(chunks: Iterable[BytesLike], *transforms: Transform) -> Iterator[bytes]:
    """The chunks of `chunks` passed through the transforms, pulled as they are needed. Has `close`, which closes
    `chunks` where that has a `close`. Raises what `chunks` raises, and SourceFailed, again whenever it is
    asked for more."""
    return _Transformed(chunks, Chain(*transforms))


class _Transformed(Iterator[bytes]):
    """A class, since closing a generator that was never started does nothing."""

    def __init__(self, chunks: Iterable[BytesLike], chain: Chain) -> None:
        self._source = chunks
        self._chunks = iter(chunks)
        self._chain = chain
        self._broken: BaseException | None = None

    def __next__(self) -> bytes:
        if self._broken is not None:
            raise self._broken
        chain = self._chain
        while not chain.over:
            if not chain.hungry:
                out = chain.step()
                if out:
                    return bytes(out)
                continue
            try:
                chunk = next(self._chunks, _END)
            except BaseException as error:
                # A generator that raised looks ended afterwards; what it gave so far must not pass for the whole.
                self._broken = error
                raise
            if chunk is _END:
                chain.finish()
            else:
                chain.feed(chunk)
        raise StopIteration

    def close(self) -> None:
        for closable in (self._chunks, self._source):
            close = getattr(closable, "close", None)
            if callable(close):
                close()
                break


# Decompression


class _Engine(Protocol):
    """What bz2, lzma and zstd offer for one member of a compressed stream."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: BytesLike, max_length: int = -1, /) -> bytes: ...


class _Decoder(Transform):
    """Members one after the other, each undone by an engine of its own. At least one, all of them whole."""

    format: ClassVar[str]

    def __init__(self) -> None:
        self._engine: _Engine | None = None  # None: between two members
        self._rest: BytesLike = b""  # input that comes before the next: what an engine did not need
        self._members = 0
        self._padding = 0  # zero bytes since the last member

    def step(self, data: memoryview, final: bool) -> tuple[int, BytesLike]:
        used = 0 if self.pending else min(len(data), STEP)
        piece: BytesLike = self._rest if self.pending else data[:used]
        self._rest = b""
        if self._engine is None and self._members:
            piece = self._skip_padding(piece)
        out = self._decode(piece) if self._engine is not None or piece else b""
        self.pending = bool(self._rest) or (self._engine is not None and not self._engine.needs_input)
        if final and used == len(data) and not self.pending:
            if not out:
                self._check_end()
            self.pending = bool(out)  # the check is made when this output is out: it may raise
        return used, out

    def _decode(self, piece: BytesLike) -> bytes:
        try:
            if self._engine is None:
                self._end_padding()
                self._engine = self._begin()
            out = self._engine.decompress(piece, STEP)
        except (zlib.error, lzma.LZMAError, zstd.ZstdError, OSError, ValueError, EOFError) as error:
            raise SourceFailed(f"damaged, or not {self.format}: {error}") from error
        if self._engine.eof:
            self._rest = self._engine.unused_data
            self._engine = None
            self._members += 1
            self._padding = 0
        return out

    def _check_end(self) -> None:
        if self._engine is not None or not self._members:
            raise SourceFailed(f"the {self.format} data ends before its end mark")
        self._end_padding()

    @abstractmethod
    def _begin(self) -> _Engine: ...

    def _skip_padding(self, piece: BytesLike) -> BytesLike:
        """`piece` without the padding that may stand between members."""
        return piece

    def _end_padding(self) -> None:
        """The padding is over. Raises SourceFailed where that cannot be."""


class _ZeroPadded(_Decoder):
    def _skip_padding(self, piece: BytesLike) -> BytesLike:
        rest = bytes(piece).lstrip(b"\0")
        self._padding += len(piece) - len(rest)
        return rest


class _GzipMember:
    """zlib with the interface of the others."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(16 + zlib.MAX_WBITS)  # gzip alone, checksum and length checked
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    def decompress(self, data: BytesLike, max_length: int = -1, /) -> bytes:
        out = self._zlib.decompress(self._zlib.unconsumed_tail or data, max_length)
        self.needs_input = not self._zlib.eof and not self._zlib.unconsumed_tail and len(out) < max_length
        return out


class Gunzip(_ZeroPadded):
    """Undoes gzip: members one after the other, zero bytes after them skipped. Anything else behind them is damage."""

    format = "gzip"

    def _begin(self) -> _Engine:
        return _GzipMember()


class Bunzip2(_Decoder):
    """Undoes bzip2, streams one after the other. A block (up to 900 kB of output) is decoded at once."""

    format = "bzip2"
    heavy = True

    def _begin(self) -> _Engine:
        return bz2.BZ2Decompressor()


class Unxz(_ZeroPadded):
    """Undoes xz: streams one after the other, with stream padding. The older .lzma, which has neither a magic number
    nor a checksum, is refused, and so is what needs more than XZ_MEMORY."""

    format = "xz"
    heavy = True

    def _begin(self) -> _Engine:
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY)

    def _end_padding(self) -> None:
        if self._padding % 4:
            raise SourceFailed("the xz data is damaged: its padding is not a multiple of four bytes")


class Unzstd(_Decoder):
    """Undoes Zstandard: frames one after the other, skippable ones too. Damage shows only where frames carry a
    checksum, as those of zstd(1) do."""

    format = "zstd"

    def _begin(self) -> _Engine:
        return zstd.ZstdDecompressor()


# Radio metadata


class Icy(Transform):
    """Takes SHOUTcast/Icecast metadata out: after each `metaint` bytes of sound comes a length byte and 16 times as
    many bytes of text. With `metaint` None or 0 the bytes pass unchanged."""

    def __init__(self, metaint: int | None) -> None:
        if metaint is not None and metaint < 0:
            raise ValueError("metaint is a distance: it cannot be negative")
        self._metaint = metaint or 0
        self._sound = self._metaint  # bytes of sound before the next length byte
        self.title: str | None = None
        """What plays now: the last StreamTitle; None before the first, empty where the server sent an empty one."""

    def step(self, data: memoryview, final: bool) -> tuple[int, BytesLike]:
        if not self._metaint:
            return len(data), data
        if self._sound:
            used = min(self._sound, len(data))
            self._sound -= used
            self.minimum = 1
            return used, data[:used]
        if not data:
            return 0, b""
        self.minimum = 1 + 16 * data[0]
        if len(data) < self.minimum:
            if final:
                raise SourceFailed("the radio stream ends within its metadata")
            return 0, b""
        self._note(bytes(data[1 : self.minimum]))
        used, self.minimum = self.minimum, 1
        self._sound = self._metaint
        return used, b""

    def _note(self, metadata: bytes) -> None:
        found = re.search(rb"StreamTitle='(.*?)'(?:;|\0|$)", metadata, re.S)  # a title may hold apostrophes
        if found is None:
            return
        try:
            text = found[1].decode("utf-8")
        except UnicodeDecodeError:
            text = found[1].decode("latin-1")  # many stations never left it
        self.title = "".join(c if c.isprintable() else " " for c in text).strip()


# Digests


class Digest(Transform):
    """Passes bytes on unchanged and takes their SHA-256."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.sha256: str | None = None
        """In hexadecimal, once the end has passed; None before."""

    def step(self, data: memoryview, final: bool) -> tuple[int, BytesLike]:
        piece = data[:STEP]
        self._hash.update(piece)
        if final and len(piece) == len(data):
            self.sha256 = self._hash.hexdigest()
        return len(piece), piece
