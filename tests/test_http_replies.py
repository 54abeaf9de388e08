"""What replies mean, without sockets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamfs.sources.base import Facts
from streamfs.sources.overlap import Marks
from streamfs.sources.replies import (
    Again,
    Asked,
    AskWhole,
    Changed,
    Ended,
    Headers,
    Part,
    Refused,
    Verdict,
    Whole,
    judge,
    parse_content_range,
    precondition,
    validator_of,
)

DATE = "Tue, 14 Nov 2023 22:13:20 GMT"
NOW = 1_800_000_000.0


def reply(asked: Asked, status: int, **fields: str) -> Verdict:
    return judge(asked, status, Headers((name.replace("_", "-"), value) for name, value in fields.items()), NOW)


def part(asked: Asked, told: str, **fields: str) -> Verdict:
    return reply(asked, 206, **{"content_range": told, "etag": '"a"', **fields})


def test_a_part_is_believed_where_it_starts_as_asked() -> None:
    verdict = part(Asked(10, 20), "bytes 10-19/100", content_length="10")
    assert isinstance(verdict, Part)
    assert (verdict.start, verdict.end, verdict.facts.size, verdict.facts.ranged) == (10, 20, 100, True)


@pytest.mark.parametrize(
    "told",
    [
        "bytes 11-19/100",
        "bytes 9-19/100",
        "bytes 10-100/100",
        "bytes 10-9/100",
        "bytes */100",
        "10-19/100",
        "",
        "bytes 0-99/100",
    ],
)
def test_a_part_that_is_not_the_one_asked_for_is_refused(told: str) -> None:
    assert isinstance(part(Asked(10, 20), told), Refused)


def test_a_part_whose_two_lengths_differ_is_refused() -> None:
    assert isinstance(part(Asked(10, 20), "bytes 10-19/100", content_length="100"), Refused)


def test_the_content_length_of_a_chunked_part_is_ignored() -> None:
    fields = {"content_length": "3", "transfer_encoding": "chunked"}
    assert isinstance(part(Asked(10, 20), "bytes 10-19/100", **fields), Part)


def test_a_part_nobody_asked_for_is_refused() -> None:
    assert isinstance(part(Asked(0, None, ranged=False), "bytes 0-99/100"), Refused)


def test_a_part_without_validator_counts_only_from_the_start() -> None:
    assert reply(Asked(10, 20), 206, content_range="bytes 10-19/100") == AskWhole(
        "nothing tells this server's versions apart", ranged=True
    )
    verdict = reply(Asked(0, 20), 206, content_range="bytes 0-19/100")
    assert isinstance(verdict, Part) and not verdict.facts.ranged


def test_200_to_a_range_is_the_whole() -> None:
    verdict = reply(Asked(10, 20), 200, content_length="100", etag='"a"')
    assert verdict == Whole(Facts(size=100, validator='etag:"a"'), 100)


@pytest.mark.parametrize("status", [200, 206])
def test_another_validator_means_changed(status: int) -> None:
    expect = Facts(size=100, ranged=True, validator='etag:"b"')
    verdict = reply(Asked(10, 20, expect=expect), status, content_range="bytes 10-19/100", etag='"a"')
    assert isinstance(verdict, Changed)


def test_200_to_if_range_of_the_same_version_is_used_from_its_start() -> None:
    expect = Facts(size=100, ranged=True, validator='etag:"a"')
    assert isinstance(reply(Asked(10, 20, expect=expect), 200, content_length="100", etag='"a"'), Whole)


def test_a_version_that_loses_its_name_is_not_gone_on_with() -> None:
    expect = Facts(size=100, ranged=True, validator='etag:"a"')
    assert isinstance(reply(Asked(10, 20, expect=expect), 206, content_range="bytes 10-19/100"), Refused)


def test_one_version_has_one_length() -> None:
    expect = Facts(size=100, ranged=True, validator='etag:"a"')
    assert isinstance(part(Asked(10, 20, expect=expect), "bytes 10-19/100"), Part)
    assert isinstance(part(Asked(10, 20, expect=expect), "bytes 10-19/101"), Refused)
    unnamed = Facts(size=100, ranged=False)
    assert isinstance(reply(Asked(0, None, expect=unnamed), 200, content_length="100"), Whole)
    assert isinstance(reply(Asked(0, None, expect=unnamed), 200, content_length="101"), Changed)


def test_416_is_the_end_only_where_the_total_agrees() -> None:
    known = Facts(size=100, ranged=True, validator='etag:"a"')
    unknown = Facts(ranged=True, validator='etag:"a"')
    assert reply(Asked(0, None), 416, content_range="bytes */0") == Ended(Facts(size=0), proven=True)
    assert reply(Asked(100, None, expect=unknown), 416, content_range="bytes */100") == Ended(Facts(size=100), True)
    assert reply(Asked(100, None, expect=unknown), 416) == Ended(Facts(), proven=False)
    assert isinstance(reply(Asked(50, None, expect=known), 416, content_range="bytes */40"), Changed)
    assert isinstance(reply(Asked(50, None, expect=known), 416, content_range="bytes */100"), Refused)
    assert isinstance(reply(Asked(50, None), 416), Refused)
    assert isinstance(reply(Asked(0, None), 416), AskWhole)


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_a_passing_failure_is_asked_again(status: int) -> None:
    assert isinstance(reply(Asked(0, None), status), Again)


@pytest.mark.parametrize("status", [204, 304, 400, 401, 403, 404, 410, 412, 451])
def test_a_lasting_failure_is_not(status: int) -> None:
    assert isinstance(reply(Asked(0, None), status), Refused)


def test_retry_after_is_read_as_seconds_and_as_a_date() -> None:
    assert reply(Asked(0, None), 503, retry_after="17") == Again("the server answered 503", 17.0)
    later = reply(Asked(0, None), 503, retry_after="Fri, 15 Jan 2027 08:01:00 GMT")
    assert later == Again("the server answered 503", 60.0)
    assert reply(Asked(0, None), 503, retry_after=DATE) == Again("the server answered 503", 0.0)
    assert reply(Asked(0, None), 503, retry_after="soon") == Again("the server answered 503", None)


def test_an_encoded_whole_is_decoded_and_an_encoded_slice_is_not() -> None:
    assert reply(Asked(0, None), 200, content_encoding="gzip", content_length="9") == Whole(Facts(), 9, "gzip")
    assert isinstance(part(Asked(10, 20), "bytes 10-19/100", content_encoding="gzip"), AskWhole)
    assert isinstance(part(Asked(0, 20), "bytes 0-19/100", content_encoding="gzip"), AskWhole)
    assert isinstance(part(Asked(0, None), "bytes 0-99/100", content_encoding="gzip"), Whole)
    assert isinstance(reply(Asked(0, None), 200, content_encoding="br"), Refused)
    assert isinstance(reply(Asked(0, None), 200, content_encoding="gzip, gzip"), Refused)


@pytest.mark.parametrize(
    ("fields", "size", "validator"),
    [
        ({"etag": '"a"'}, None, 'etag:"a"'),
        ({"etag": 'W/"a"'}, 10, None),
        ({"etag": "unquoted"}, 10, None),
        ({"etag": '"a", "b"'}, 10, None),
        ({"last-modified": DATE}, 10, f"modified:{DATE};size:10"),
        ({"last-modified": DATE, "etag": 'W/"a"'}, 10, f'modified:{DATE};size:10;weak:W/"a"'),
        ({"last-modified": DATE}, None, None),
        ({"last-modified": "yesterday"}, 10, None),
        ({"last-modified": DATE, "date": DATE}, 10, None),
        ({"last-modified": DATE, "date": "Tue, 14 Nov 2023 22:13:21 GMT"}, 10, f"modified:{DATE};size:10"),
        ({}, 10, None),
    ],
)
def test_a_validator_is_what_names_one_version(fields: dict[str, str], size: int | None, validator: str | None) -> None:
    assert validator_of(Headers(fields.items()), size) == validator


def test_if_range_carries_a_strong_tag_and_nothing_else() -> None:
    assert precondition('etag:"a:b;size:"') == '"a:b;size:"'
    assert precondition(f'modified:{DATE};size:10;weak:W/"a"') is None
    assert precondition(None) is None


@given(st.text(max_size=40))
def test_no_content_range_makes_the_parser_fail(value: str) -> None:
    parse_content_range(value)


@given(
    st.binary(max_size=20_000), st.lists(st.integers(1, 6000), max_size=8), st.lists(st.integers(1, 6000), max_size=8)
)
def test_marks_do_not_depend_on_how_bytes_arrive(data: bytes, first: list[int], second: list[int]) -> None:
    assert marked(data, first).agrees(marked(data, second))


@given(st.binary(min_size=1, max_size=20_000), st.data())
def test_marks_find_a_changed_byte_within_twice_its_offset(data: bytes, draw: st.DataObject) -> None:
    place = draw.draw(st.integers(0, len(data) - 1))
    other = bytearray(data)
    other[place] ^= 1
    assert not marked(data, []).agrees(marked(bytes(other), [777]))
    reached = min(len(data), max(4096, 2 * (place + 1)))
    if reached < len(data):
        assert not marked(data, []).agrees(marked(bytes(other[:reached]), []))


def marked(data: bytes, sizes: list[int]) -> Marks:
    marks = Marks()
    view = memoryview(data)
    for size in sizes:
        marks.add(view[:size])
        view = view[size:]
    marks.add(view)
    return marks
