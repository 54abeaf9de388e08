"""Every fault, alone and in pairs: the bytes read are right for one version, or the error is the documented one."""

from __future__ import annotations

import itertools
import math

import pytest
import trio

from streamfs.errors import NotPermitted, SourceChanged, SourceFailed, SourceStalled, StreamfsError
from streamfs.sources.http import HttpSource
from streamfs.sources.httpbody import HttpBody
from streamfs.sources.transports import Transports
from streamfs.spec import StreamOptions, StreamSpec, UrlSource
from tests.faults.origin import DEFAULT_SIZE, Origin, content, whose

DEADLINE = 15.0  # seconds for any fault; the stall timeout of these tests is far below
Running = tuple[Origin, str]


def source(base: str, query: str, transports: Transports, **options: object) -> HttpSource:
    options.setdefault("stall_timeout", 2.0)
    made = StreamOptions(**options)  # type: ignore[arg-type]
    return HttpSource(StreamSpec(name="s", source=UrlSource(f"{base}/s?{query}"), options=made), transports)


async def read(body: HttpBody, most: int = 1 << 30) -> bytes:
    """All bytes of a body, at most `most`; the body is closed."""
    got = bytearray()
    view = memoryview(bytearray(30_000))
    try:
        while len(got) < most and (count := await body.receive_into(view)):
            got += view[:count]
    finally:
        await body.aclose()
    return bytes(got[:most])


def assert_right(got: bytes, start: int, stop: int, size: int = DEFAULT_SIZE, version: int = 0) -> None:
    expected = content("s", version, start, min(stop, size))
    if got != expected:
        wrong = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), None)
        assert wrong is None, f"byte {start + wrong} came from {whose(got[wrong:], 's', size)}"
        pytest.fail(f"{len(got)} bytes instead of {len(expected)}")


SURVIVED = [
    "",
    "fault=drip&size=30000",
    "fault=rst-body",
    "fault=cut-body",
    "fault=stall-body&size=120000",
    "fault=chunked",
    "fault=close-delimited",
    "fault=excess",
    "fault=ignore-range",
    "fault=http10",
    "fault=icy",
    "fault=no-validator",
    "fault=weak-validator",
    "fault=date-only",
    "fault=unknown-total",
    "fault=less-than-asked",
    "fault=more-than-asked",
    "fault=gzip",
    "fault=deflate",
    "fault=raw-deflate",
    "fault=gzip-parts",
    "fault=416",
    "fault=429&times=4",
    "fault=429-seconds&times=1",
    "fault=503&times=4",
    "fault=503-date&times=2",
    "fault=500&times=4",
    "fault=rst-head&times=4",
    "fault=cut-head&times=4",
    "fault=redirect-once",
    "fault=changes",
    "size=0",
    "size=1",
    # pairs
    "fault=no-validator&fault=cut-body&times=3",
    "fault=ignore-range&fault=cut-body&times=3",
    "fault=ignore-range&fault=rst-body&times=3",
    "fault=chunked&fault=cut-body",
    "fault=chunked&fault=rst-body",
    "fault=chunked&fault=drip&size=30000",
    "fault=chunked&fault=no-validator&fault=cut-body&times=3",
    "fault=close-delimited&fault=cut-body",
    "fault=close-delimited&fault=drip&size=30000",
    "fault=weak-validator&fault=rst-body",
    "fault=date-only&fault=cut-body",
    "fault=unknown-total&fault=cut-body",
    "fault=less-than-asked&fault=rst-body&at=70000",
    "fault=more-than-asked&fault=close-delimited",
    "fault=gzip&fault=cut-body&times=3",
    "fault=gzip&fault=chunked",
    "fault=gzip&fault=chunked&fault=rst-body&times=3",
    "fault=drip&fault=cut-body&size=30000&at=10000",
    "fault=ignore-range&fault=chunked",
    "fault=ignore-range&fault=close-delimited",
    "fault=cut-body&fault=excess",
]


@pytest.mark.parametrize("query", SURVIVED)
async def test_the_right_bytes_are_read_in_spite_of(query: str, origin: Running, transports: Transports) -> None:
    made = source(origin[1], query, transports)
    size = int(next((part[5:] for part in query.split("&") if part.startswith("size=")), DEFAULT_SIZE))
    with trio.fail_after(DEADLINE):
        assert_right(await read(await made.open(0, None, None)), 0, size, size, version=0)


MIDDLES = [query for query in SURVIVED if "size" not in query and query not in ("fault=changes", "fault=416")]


@pytest.mark.parametrize("query", MIDDLES)
async def test_a_range_is_that_range_or_the_stream_from_its_start_in_spite_of(
    query: str, origin: Running, transports: Transports
) -> None:
    made = source(origin[1], query, transports)
    with trio.fail_after(DEADLINE):
        body = await made.open(100_001, 150_003, None)
        assert body.start in (0, 100_001)
        # What is one-way goes on to the end: the rest could only be had by reading all of it again.
        assert_right(await read(body), body.start, 150_003 if body.facts.ranged else DEFAULT_SIZE)


FATAL = [
    ("fault=range-off-by-one", SourceFailed, "bytes from"),
    ("fault=range-short-by-one", SourceFailed, "Content-Length"),
    ("fault=impossible-total", SourceFailed, "contradicts itself"),
    ("fault=wrong-total", SourceChanged, "length was"),
    ("fault=no-content-range", SourceFailed, "Content-Range"),
    ("fault=multipart", SourceFailed, "multipart"),
    ("fault=cut-body&at=0", SourceFailed, "gave up after 10 attempts"),
    ("fault=rst-body&at=0", SourceFailed, "gave up after 10 attempts"),
    ("fault=rst-head", SourceFailed, "gave up after 10 attempts"),
    ("fault=500", SourceFailed, "500.*gave up after 10 attempts"),
    ("fault=429", SourceFailed, "429.*gave up after 10 attempts"),
    ("fault=404", SourceFailed, "404"),
    ("fault=403", SourceFailed, "403"),
    ("fault=login", SourceFailed, "401"),
    ("fault=stall-head", SourceStalled, "sent nothing"),
    ("fault=stall-body&at=0", SourceStalled, "sent nothing"),
    ("fault=stall-body&fault=ignore-range", SourceStalled, "sent nothing"),
    ("fault=stall-body&fault=chunked&at=0", SourceStalled, "sent nothing"),
    ("fault=503-far-date", SourceStalled, "503"),
    ("fault=redirect-loop", SourceFailed, "loop"),
    ("fault=redirect-deeper", SourceFailed, "more than 5 redirects"),
    ("fault=redirect-nonsense", SourceFailed, "no URL"),
    ("fault=redirect-file", NotPermitted, "file"),
    ("fault=redirect-ftp", NotPermitted, "ftp"),
    ("fault=huge-head", SourceFailed, None),
    ("fault=no-http", SourceFailed, None),
    ("fault=bad-chunk&fault=ignore-range", SourceFailed, None),
    ("fault=gzip-broken", SourceFailed, "decoded"),
    ("fault=brotli", SourceFailed, "'br'"),
    ("fault=long-length", SourceFailed, "Content-Length"),
    ("fault=long-length&fault=ignore-range", SourceFailed, None),
    ("fault=cut-body&fault=changes", SourceChanged, "version"),
    ("fault=cut-body&fault=changes-size", SourceChanged, "version"),
    ("fault=cut-body&fault=changes-secretly", SourceChanged, "version"),
    ("fault=cut-body&fault=changes&fault=ignores-if-range", SourceChanged, "version"),
    ("fault=cut-body&fault=changes-secretly&fault=weak-validator", SourceChanged, "version"),
    ("fault=cut-body&fault=changes&fault=ignore-range", SourceChanged, "version"),
    ("fault=cut-body&fault=changes-secretly&fault=no-validator", SourceChanged, "have changed"),
    ("fault=rst-body&fault=changes&fault=no-validator&fault=chunked", SourceChanged, "have changed"),
    ("fault=rst-body&fault=live", SourceChanged, "have changed"),
    ("fault=no-validator&fault=less-than-asked", SourceFailed, "no byte from 50000 on"),
    ("fault=gzip&fault=cut-body&fault=changes&at=150000", SourceChanged, "version"),
]


@pytest.mark.parametrize(("query", "kind", "text"), FATAL)
async def test_an_error_and_never_a_wrong_byte_for(
    query: str, kind: type[StreamfsError], text: str | None, origin: Running, transports: Transports
) -> None:
    made = source(origin[1], query, transports)
    got = bytearray()
    view = memoryview(bytearray(30_000))
    with trio.fail_after(DEADLINE), pytest.raises(kind, match=text) as raised:
        body = await made.open(0, None, None)
        try:
            while count := await body.receive_into(view):
                got += view[:count]
        finally:
            await body.aclose()
    assert "\n" not in str(raised.value)
    assert_right(bytes(got), 0, len(got), size=len(got))


EITHER = ["fault=bad-length", "fault=two-lengths", "fault=part-whole-body", "fault=416-lying", "fault=short-length"]


@pytest.mark.parametrize("query", EITHER)
async def test_a_lie_that_transports_meet_differently_gives_right_bytes_or_an_error(
    query: str, origin: Running, transports: Transports
) -> None:
    made = source(origin[1], query, transports)
    with trio.fail_after(DEADLINE):
        for start in (0, 100_001):
            try:
                body = await made.open(start, None, None)
                got = await read(body)
            except SourceFailed:
                continue
            assert_right(got, body.start, DEFAULT_SIZE)


async def test_a_range_of_a_server_without_versions_costs_one_reading(origin: Running, transports: Transports) -> None:
    made = source(origin[1], "fault=no-validator", transports)
    with trio.fail_after(DEADLINE):
        assert_right(await read(await made.open(0, 1000, None)), 0, DEFAULT_SIZE)
    assert [headers["range"] for _, headers in origin[0].log] == ["bytes=0-999", "bytes=0-"]


async def test_a_part_that_holds_the_whole_file_is_not_taken_for_the_part(
    origin: Running, transports: Transports
) -> None:
    made = source(origin[1], "fault=part-whole-body", transports)
    with trio.fail_after(DEADLINE), pytest.raises(SourceFailed, match="Content-Length"):
        await read(await made.open(100_001, 150_003, None))


async def test_a_version_is_pinned_by_a_new_open(origin: Running, transports: Transports) -> None:
    made = source(origin[1], "fault=changes", transports)
    with trio.fail_after(DEADLINE):
        first = await made.open(0, 1000, None)
        assert_right(await read(first), 0, 1000)
        with pytest.raises(SourceChanged):
            await made.open(1000, None, first.facts)
        fresh = await made.open(1000, None, None)
        assert_right(await read(fresh), 1000, DEFAULT_SIZE, version=1)
    assert fresh.facts.validator != first.facts.validator


async def test_an_endless_body_can_be_left(origin: Running, transports: Transports) -> None:
    made = source(origin[1], "fault=infinite", transports)
    with trio.fail_after(DEADLINE):
        got = await read(await made.open(0, None, None), most=1_000_000)
    assert_right(got, 0, 1_000_000, size=1_000_000)


async def test_offsets_beyond_four_gigabytes_are_exact(origin: Running, transports: Transports) -> None:
    size = (5 << 30) + 17
    made = source(origin[1], f"size={size}", transports)
    start = (4 << 30) + 12_345
    with trio.fail_after(DEADLINE):
        assert (await made.probe()).size == size
        assert_right(await read(await made.open(start, start + 100_000, None)), start, start + 100_000, size)
        assert_right(await read(await made.open(size - 100, None, None)), size - 100, size, size)


@pytest.mark.parametrize(
    ("query", "size", "proven"),
    [
        ("fault=chunked&fault=ignore-range", DEFAULT_SIZE, True),
        ("fault=close-delimited&fault=ignore-range", None, False),
        ("fault=icy", None, False),
        ("fault=ignore-range", DEFAULT_SIZE, True),
        ("fault=gzip", DEFAULT_SIZE, True),
        ("fault=unknown-total", DEFAULT_SIZE, True),
        ("", DEFAULT_SIZE, True),
    ],
)
async def test_an_end_is_called_proven_only_where_it_is(
    query: str, size: int | None, proven: bool, origin: Running, transports: Transports
) -> None:
    made = source(origin[1], query, transports)
    with trio.fail_after(DEADLINE):
        body = await made.open(0, None, None)
        await read(body)
    assert (body.end_proven, body.facts.size) == (proven, size)


async def test_a_declared_size_proves_the_end_or_is_contradicted(origin: Running, transports: Transports) -> None:
    query = "fault=close-delimited&fault=ignore-range"
    with trio.fail_after(DEADLINE):
        body = await source(origin[1], query, transports, size=DEFAULT_SIZE).open(0, None, None)
        assert body.facts.size == DEFAULT_SIZE
        assert_right(await read(body), 0, DEFAULT_SIZE)
        assert body.end_proven
        with pytest.raises(SourceFailed, match="goes on after its declared size"):
            await read(await source(origin[1], query, transports, size=1000).open(0, None, None))
        with pytest.raises(SourceFailed, match="ended at byte"):
            await read(await source(origin[1], query, transports, size=DEFAULT_SIZE + 1).open(0, None, None))
        with pytest.raises(SourceFailed, match="goes on after its declared size"):
            await source(origin[1], "fault=unknown-total", transports, size=1000).open(0, None, None)
        with pytest.raises(SourceFailed, match="declared size is 1000"):
            await source(origin[1], "", transports, size=1000).open(0, None, None)


@pytest.mark.parametrize(
    ("query", "size", "ranged", "validator"),
    [
        ("", DEFAULT_SIZE, True, 'etag:"s-0"'),
        ("fault=ignore-range", DEFAULT_SIZE, False, 'etag:"s-0"'),
        ("fault=no-validator", DEFAULT_SIZE, False, None),
        ("fault=date-only", DEFAULT_SIZE, True, f"modified:Tue, 14 Nov 2023 22:13:20 GMT;size:{DEFAULT_SIZE}"),
        ("fault=unknown-total", None, True, 'etag:"s-0"'),
        ("fault=gzip", None, False, 'etag:"s-0"'),
        ("fault=chunked&fault=ignore-range", None, False, 'etag:"s-0"'),
        ("size=0", 0, False, 'etag:"s-0"'),
    ],
)
async def test_a_probe_tells_what_the_server_proves(
    query: str, size: int | None, ranged: bool, validator: str | None, origin: Running, transports: Transports
) -> None:
    with trio.fail_after(DEADLINE):
        facts = await source(origin[1], query, transports).probe()
    assert (facts.size, facts.ranged) == (size, ranged)
    if query != "size=0":
        assert facts.validator == validator
    if facts.size and "no-validator" not in query:
        assert facts.mime == "audio/flac"
        assert facts.modified == 1_700_000_000


async def test_starting_at_or_past_the_end_is_an_error(origin: Running, transports: Transports) -> None:
    made = source(origin[1], "", transports)
    with trio.fail_after(DEADLINE):
        for start in (DEFAULT_SIZE, DEFAULT_SIZE + 1):
            with pytest.raises(SourceFailed):
                await made.open(start, None, None)


async def test_a_resumed_read_asks_only_for_what_is_missing(origin: Running, transports: Transports) -> None:
    made = source(origin[1], "fault=cut-body&at=60000", transports)
    with trio.fail_after(DEADLINE):
        assert_right(await read(await made.open(0, None, None)), 0, DEFAULT_SIZE)
    asked = [(headers["range"], headers.get("if-range")) for _, headers in origin[0].log]
    assert asked == [
        ("bytes=0-", None),
        ("bytes=60000-", '"s-0"'),
        ("bytes=120000-", '"s-0"'),
        ("bytes=180000-", '"s-0"'),
    ]


async def test_retry_after_is_honoured_in_seconds(origin: Running, transports: Transports) -> None:
    made = source(origin[1], "fault=429-seconds&times=1", transports)
    with trio.fail_after(DEADLINE):
        began = trio.current_time()
        await read(await made.open(0, None, None))
        assert trio.current_time() - began >= 1


async def test_a_reader_that_pauses_does_not_stall(origin: Running, transports: Transports) -> None:
    made = source(origin[1], "size=20000000", transports, stall_timeout=0.5)
    view = memoryview(bytearray(1000))
    with trio.fail_after(DEADLINE):
        body = await made.open(0, None, None)
        got = bytes(view[: await body.receive_into(view)])
        await trio.sleep(1)  # the pause under test, longer than the stall timeout
        got += bytes(view[: await body.receive_into(view)])
        await body.aclose()
    assert_right(got, 0, len(got), size=len(got))


async def test_a_cancelled_receive_loses_no_byte(origin: Running, transports: Transports) -> None:
    made = source(origin[1], "fault=drip&size=30000", transports)
    got = bytearray()
    view = memoryview(bytearray(4000))
    with trio.fail_after(DEADLINE):
        body = await made.open(0, None, None)
        for patience in itertools.cycle((0.0, 0.0005, 0.001, math.inf)):
            count = -1
            with trio.move_on_after(patience):
                count = await body.receive_into(view)
            if count > 0:
                got += view[:count]
            elif count == 0:
                break
        await body.aclose()
    assert_right(bytes(got), 0, 30_000, size=30_000)
