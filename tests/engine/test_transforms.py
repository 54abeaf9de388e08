"""Transforms: what they make of any chunking, of damage, of a cut-off end, and how little they hold at once."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import random
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamfs.engine import transforms
from streamfs.engine.streambuffer import StreamBuffer
from streamfs.engine.transforms import (
    STEP,
    Bunzip2,
    BytesLike,
    Chain,
    Digest,
    Gunzip,
    Icy,
    Transform,
    Unxz,
    Unzstd,
    transformed,
)
from streamfs.errors import SourceFailed
from tests.fakes import ScriptedStream, chunked

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


def _zstd(data: bytes) -> bytes:
    return zstd.compress(data, options={zstd.CompressionParameter.checksum_flag: 1})


FORMATS: dict[str, tuple[Callable[[bytes], bytes], Callable[[], Transform]]] = {
    "gzip": (lambda data: gzip.compress(data, mtime=0), Gunzip),
    "bzip2": (bz2.compress, Bunzip2),
    "xz": (lambda data: lzma.compress(data, check=lzma.CHECK_CRC64), Unxz),
    "zstd": (_zstd, Unzstd),
}
every_format = pytest.mark.parametrize("format", FORMATS)

contents = st.one_of(
    st.binary(max_size=300),
    st.builds(lambda unit, count: unit * count, st.binary(min_size=1, max_size=50), st.integers(0, 20_000)),
    st.builds(lambda seed, size: random.Random(seed).randbytes(size), st.integers(0, 99), st.integers(0, 200_000)),
)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """`data` in chunks that end at these places (taken modulo its length), some of them empty."""
    ends = sorted(place % (len(data) + 1) for place in places)
    return [data[a:b] for a, b in zip([0, *ends], [*ends, len(data)], strict=True)]


cuts = st.lists(st.integers(0, 1 << 20), max_size=12)


def decoded(chunks: list[bytes], *made: Transform) -> tuple[bytes, SourceFailed | None]:
    """What comes out, and the error that ended it."""
    out = bytearray()
    stream = transformed(chunks, *made)
    try:
        for piece in stream:
            out += piece
    except SourceFailed as error:
        with pytest.raises(SourceFailed):
            next(stream)  # it never looks like a clean end afterwards
        return bytes(out), error
    return bytes(out), None


# Transforms of users' own


class AddOne(Transform):
    def step(self, data: memoryview, final: bool) -> tuple[int, BytesLike]:
        return len(data), bytes(byte + 1 for byte in data)


class PairSum(Transform):
    minimum = 2

    def step(self, data: memoryview, final: bool) -> tuple[int, BytesLike]:
        assert final or len(data) >= 2
        pairs = len(data) // 2
        return 2 * pairs, bytes(data[2 * i] + data[2 * i + 1] for i in range(pairs))


class CountOnes(Transform):
    def __init__(self) -> None:
        self.count = 0

    def step(self, data: memoryview, final: bool) -> tuple[int, BytesLike]:
        self.count += bytes(data).count(1)
        return len(data), bytes([self.count]) if final else b""


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_add_one_gives_each_byte_plus_one(size: int) -> None:
    assert decoded(chunked(bytes(range(1, 9)), size), AddOne()) == (bytes(range(2, 10)), None)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_pair_sum_gets_two_contiguous_bytes_at_least(size: int) -> None:
    assert decoded(chunked(bytes(range(1, 9)), size), PairSum()) == (bytes([3, 7, 11, 15]), None)


def test_a_count_is_readable_once_the_input_has_ended() -> None:
    with StreamBuffer(transformed(chunked(bytes([1, 0, 0, 1, 0, 0, 0, 1]), 3), CountOnes())) as buffer:
        assert buffer.read(0, 10) == b"\x03"
        assert buffer.size == 1


def test_bytes_that_a_transform_cannot_use_at_the_end_are_an_error_and_not_dropped() -> None:
    out, error = decoded([b"\1\2\3"], PairSum())
    assert out == b"\3" and "1 bytes" in str(error)


def test_a_transform_that_returns_nothing_yet_is_not_the_end() -> None:
    class Late(Transform):
        def __init__(self) -> None:
            self.kept = b""

        def step(self, data: memoryview, final: bool) -> tuple[int, BytesLike]:
            self.kept += bytes(data)
            out, self.kept = (self.kept, b"") if final or len(self.kept) > 5 else (b"", self.kept)
            return len(data), out

    assert decoded(chunked(b"0123456789", 2), Late(), AddOne()) == (b"123456789:", None)


def test_a_transform_that_uses_nothing_gets_more_bytes_the_next_time() -> None:
    seen: list[int] = []

    class Fives(Transform):
        def step(self, data: memoryview, final: bool) -> tuple[int, BytesLike]:
            seen.append(len(data))
            used = len(data) if final else 5 * (len(data) // 5)
            return used, bytes(data[:used])

    assert decoded(chunked(b"abcdefghijkl", 1), Fives()) == (b"abcdefghijkl", None)
    assert seen[:6] == [1, 2, 3, 4, 5, 1]


def test_a_transform_that_never_uses_anything_is_called_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms, "MOST_HELD", 5000)

    class Stuck(Transform):
        def step(self, data: memoryview, final: bool) -> tuple[int, BytesLike]:
            return 0, b""

    endless = iter(lambda: b"x" * 1000, None)
    with pytest.raises(SourceFailed, match="Stuck"):
        next(transformed(endless, Stuck()))


def test_a_transform_that_says_it_used_more_than_there_was_is_caught() -> None:
    class Liar(Transform):
        def step(self, data: memoryview, final: bool) -> tuple[int, BytesLike]:
            return len(data) + 1, b""

    with pytest.raises(ValueError, match="Liar"):
        next(transformed([b"abc"], Liar()))


def test_a_minimum_that_changes_is_kept() -> None:
    class Records(Transform):
        """A length byte, then so many bytes."""

        def step(self, data: memoryview, final: bool) -> tuple[int, BytesLike]:
            assert final or len(data) >= self.minimum
            need = 1 + data[0] if data else 1
            if len(data) < need:
                self.minimum = need
                return 0, b""
            self.minimum = 1
            return need, bytes(data[1:need]) + b"."

    assert decoded(chunked(b"\3abc\0\5defgh", 2), Records()) == (b"abc..defgh.", None)


# The chain


def test_a_chain_takes_no_more_before_its_work_is_done() -> None:
    chain = Chain(Gunzip())
    chain.feed(gzip.compress(bytes(STEP * 3)))
    assert not chain.hungry
    with pytest.raises(ValueError, match="work to do"):
        chain.feed(b"more")


def test_a_chain_without_transforms_is_refused() -> None:
    with pytest.raises(ValueError):
        Chain()


def test_a_chain_keeps_its_own_copy_of_memory_that_may_change() -> None:
    chain = Chain(PairSum())
    lent = bytearray(b"\1")
    chain.feed(lent)
    lent[:] = b"\x40"
    chain.feed(b"\2")
    assert bytes(chain.step()) == b"\3"


def test_no_step_of_a_decompression_bomb_gives_much_at_once() -> None:
    size = 200 << 20
    engine = zlib.compressobj(9, zlib.DEFLATED, 31)
    inner = b"".join([*(engine.compress(bytes(1 << 20)) for _ in range(size >> 20)), engine.flush()])
    chain = Chain(Gunzip(), Gunzip())
    chain.feed(gzip.compress(inner))
    chain.finish()
    total = 0
    while not chain.over:
        out = chain.step()
        assert len(out) <= STEP
        total += len(out)
        held = sum(len(stage._held) for stage in chain._stages)
        assert held <= len(inner) // 100 + 2 * STEP  # what was fed, and one step between the two
    assert total == size


def test_input_is_pulled_only_as_far_as_output_is_read() -> None:
    stream = ScriptedStream(chunked(gzip.compress(random.Random(1).randbytes(1_000_000)), 10_000))
    with StreamBuffer(transformed(stream, Gunzip())) as buffer:
        buffer.read(0, 1000)
        assert stream.pulled == 1
    assert stream.closed == 1


def test_a_stream_that_was_never_read_is_closed_with_its_buffer() -> None:
    file = io.BytesIO(gzip.compress(b"abc"))
    StreamBuffer(transformed(file, Gunzip())).close()
    assert file.closed


def test_an_error_of_the_input_is_not_an_end() -> None:
    def broken() -> Iterator[bytes]:
        yield gzip.compress(b"x" * 1000)
        raise OSError("the disk is gone")

    stream = transformed(broken(), Gunzip())
    assert next(stream) == b"x" * 1000
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            next(stream)


def test_a_file_can_be_read_through_a_decoder_at_any_offset(tmp_path: Path) -> None:
    content = random.Random(3).randbytes(300_000)
    path = tmp_path / "content.gz"
    path.write_bytes(gzip.compress(content))
    with StreamBuffer(transformed(path.open("rb"), Gunzip(), Digest())) as buffer:
        assert buffer[250_000:250_010] == content[250_000:250_010]
        assert buffer[:] == content


# Decompression


@every_format
@given(members=st.lists(contents, min_size=1, max_size=3), places=cuts)
@settings(max_examples=60, deadline=None)
def test_any_chunking_gives_what_was_compressed(format: str, members: list[bytes], places: list[int]) -> None:
    compress, make = FORMATS[format]
    packed = b"".join(map(compress, members))
    assert decoded(cut(packed, places), make()) == (b"".join(members), None)


@every_format
@given(content=contents, place=st.floats(0, 1, exclude_max=True), places=cuts)
@settings(max_examples=60, deadline=None)
def test_a_cut_off_end_raises_after_all_that_came_before_it(
    format: str, content: bytes, place: float, places: list[int]
) -> None:
    compress, make = FORMATS[format]
    packed = compress(content)
    kept = packed[: int(len(packed) * place)]
    out, error = decoded(cut(kept, places), make())
    assert error is not None
    assert out == one_shot_prefix(format, kept)
    assert content.startswith(out)


def one_shot_prefix(format: str, kept: bytes) -> bytes:
    """What the library itself can make of the beginning of one member."""
    engines: dict[str, Callable[[], Any]] = {
        "gzip": lambda: zlib.decompressobj(31),
        "bzip2": bz2.BZ2Decompressor,
        "xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ),
        "zstd": zstd.ZstdDecompressor,
    }
    out: bytes = engines[format]().decompress(kept)
    return out


@every_format
@given(
    members=st.lists(contents, min_size=1, max_size=2),
    place=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
    places=cuts,
)
@settings(max_examples=150, deadline=None)
def test_damage_never_ends_cleanly_with_wrong_bytes(
    format: str, members: list[bytes], place: float, bit: int, places: list[int]
) -> None:
    compress, make = FORMATS[format]
    packed = bytearray(b"".join(map(compress, members)))
    packed[int(len(packed) * place)] ^= 1 << bit
    out, error = decoded(cut(bytes(packed), places), make())
    assert error is not None or out == b"".join(members)


@every_format
@given(seed=st.integers(0, 1000), place=st.floats(0.5, 1, exclude_max=True))
@settings(max_examples=25, deadline=None)
def test_members_before_the_damaged_one_are_given_whole(format: str, seed: int, place: float) -> None:
    compress, make = FORMATS[format]
    first, second = random.Random(seed).randbytes(150_000), random.Random(seed + 1).randbytes(150_000)
    sound, packed = compress(first), bytearray(compress(second))
    packed[int(len(packed) * place)] ^= 0xFF
    out, error = decoded(chunked(sound + bytes(packed), 4096), make())
    assert out.startswith(first)
    assert error is not None or out == first + second


@every_format
def test_what_is_not_of_the_format_is_refused_and_so_is_nothing_at_all(format: str) -> None:
    _, make = FORMATS[format]
    for wrong in (b"just some text, nothing compressed", b""):
        out, error = decoded([wrong], make())
        assert out == b"" and error is not None and format in str(error)


@every_format
def test_other_bytes_behind_the_last_member_are_damage(format: str) -> None:
    compress, make = FORMATS[format]
    out, error = decoded([compress(b"content"), b"garbage"], make())
    assert out == b"content" and error is not None


@pytest.mark.parametrize("zeros", [1, 3, 511, 512, STEP + 5])
def test_zeros_behind_gzip_members_are_skipped(zeros: int) -> None:
    packed = gzip.compress(b"one") + bytes(zeros) + gzip.compress(b"two") + bytes(zeros)
    for size in (1000, len(packed)):
        assert decoded(chunked(packed, size), Gunzip()) == (b"onetwo", None)


def test_xz_padding_comes_in_fours() -> None:
    packed = lzma.compress(b"one") + bytes(8) + lzma.compress(b"two") + bytes(4)
    assert decoded(chunked(packed, 3), Unxz()) == (b"onetwo", None)
    for wrong in (packed + bytes(1), lzma.compress(b"one") + bytes(6) + lzma.compress(b"two")):
        _, error = decoded([wrong], Unxz())
        assert error is not None and "padding" in str(error)


def test_the_older_lzma_format_is_refused() -> None:
    out, error = decoded([lzma.compress(b"content" * 100, lzma.FORMAT_ALONE)], Unxz())
    assert out == b"" and error is not None


def test_xz_that_wants_more_memory_than_allowed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = lzma.compress(bytes(1000), preset=9)
    assert decoded([packed], Unxz()) == (bytes(1000), None)
    monkeypatch.setattr(transforms, "XZ_MEMORY", 32 << 20)
    out, error = decoded([packed], Unxz())
    assert out == b"" and "emory" in str(error)


def test_skippable_zstd_frames_are_skipped() -> None:
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"
    packed = skippable + _zstd(b"one") + skippable + _zstd(b"two")
    assert decoded(chunked(packed, 2), Unzstd()) == (b"onetwo", None)


# Radio metadata


def interleaved(sound: bytes, metaint: int, titles: list[bytes]) -> bytes:
    """`sound` as a radio server sends it, with the titles one after the other and then none."""
    out = bytearray()
    queue = iter(titles)
    for block in chunked(sound, metaint):
        out += block
        if len(block) == metaint:
            text = next(queue, None)
            body = b"" if text is None else b"StreamTitle='" + text + b"';StreamUrl='';"
            body += bytes(-len(body) % 16)
            out += bytes([len(body) // 16]) + body
    return bytes(out)


@given(
    sound=st.binary(max_size=2000),
    metaint=st.integers(1, 300),
    titles=st.lists(st.binary(max_size=40).filter(lambda t: b"'" not in t), max_size=5),
    places=cuts,
)
@settings(deadline=None)
def test_radio_metadata_is_taken_out_of_any_chunking(
    sound: bytes, metaint: int, titles: list[bytes], places: list[int]
) -> None:
    packed = interleaved(sound, metaint, titles)
    assert decoded(cut(packed, places), Icy(metaint)) == (sound, None)


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        (b"Artist - Song", "Artist - Song"),
        ("Björk".encode(), "Björk"),
        ("Björk".encode("latin-1"), "Björk"),
        (b"Don't Stop 'Til You Get Enough", "Don't Stop 'Til You Get Enough"),
        (b"a\nb\0", "a b"),
        (b"", ""),
    ],
)
def test_the_title_is_the_last_one_sent(sent: bytes, shown: str) -> None:
    icy = Icy(10)
    assert icy.title is None
    decoded([interleaved(bytes(40), 10, [b"the one before", sent])], icy)
    assert icy.title == shown


def test_metadata_without_a_title_leaves_the_title() -> None:
    icy = Icy(2)
    decoded([b"ab\2" + b"StreamTitle='x';".ljust(32, b"\0") + b"cd\1" + b"StreamUrl='y';".ljust(16, b"\0")], icy)
    assert icy.title == "x"


@pytest.mark.parametrize("metaint", [None, 0])
def test_without_a_distance_the_bytes_pass_unchanged(metaint: int | None) -> None:
    assert decoded(chunked(b"\1StreamTitle='x';", 5), Icy(metaint)) == (b"\1StreamTitle='x';", None)


def test_a_radio_stream_that_ends_within_its_metadata_is_cut_off() -> None:
    out, error = decoded([b"abcd\2StreamTitle="], Icy(4))
    assert out == b"abcd" and error is not None


# Digests


@given(content=contents, places=cuts)
@settings(max_examples=40, deadline=None)
def test_a_digest_passes_bytes_on_and_has_their_sha256_at_the_end(content: bytes, places: list[int]) -> None:
    digest = Digest()
    assert decoded(cut(content, places), digest) == (content, None)
    assert digest.sha256 == hashlib.sha256(content).hexdigest()


def test_a_digest_tells_nothing_before_the_end() -> None:
    digest = Digest()
    stream = transformed([b"one", b"two"], digest)
    assert next(stream) == b"one"
    assert digest.sha256 is None


def test_a_digest_behind_damage_tells_nothing() -> None:
    digest = Digest()
    _, error = decoded([gzip.compress(b"content")[:-1]], Gunzip(), digest)
    assert error is not None and digest.sha256 is None


@given(content=contents, places=cuts)
@settings(max_examples=30, deadline=None)
def test_transforms_can_follow_one_another(content: bytes, places: list[int]) -> None:
    outer, inner = Digest(), Digest()
    packed = _zstd(gzip.compress(content))
    assert decoded(cut(packed, places), outer, Unzstd(), Gunzip(), inner) == (content, None)
    assert outer.sha256 == hashlib.sha256(packed).hexdigest()
    assert inner.sha256 == hashlib.sha256(content).hexdigest()
