"""Any two faults together, drawn by seed: what is given is the beginning of one version, or nothing.

STREAMFS_SOAK=N draws N times as many."""

from __future__ import annotations

import os
import random

import pytest
import trio

from streamfs.errors import StreamfsError
from streamfs.sources.http import HttpSource
from streamfs.sources.httpbody import HttpBody
from streamfs.sources.transports import Transports
from streamfs.spec import StreamOptions, StreamSpec, UrlSource
from tests.faults.origin import DEFAULT_SIZE, FAULTS, Origin, content, whose

DRAWS = 60 * int(os.environ.get("STREAMFS_SOAK", "1"))
VERSIONS = 40  # more than there are requests in one read
DEADLINE = 20.0
# Slow, about other files, or not about content: they have tests of their own.
ELSEWHERE = {"echo", "429-seconds", "503-far-date", "infinite", "redirect-loop", "redirect-back", "redirect-deeper"}
ELSEWHERE |= {"gzip-broken"}  # its checksum comes after the bytes that it covers, so they are given before the error
# Each of these hides what would tell the lie of the other: nothing on the wire shows it.
UNKNOWABLE = [
    {"part-whole-body", "chunked"},
    {"part-whole-body", "close-delimited"},
    {"part-whole-body", "bad-chunk"},
    {"part-whole-body", "bad-length"},
    {"date-only", "changes-secretly"},
    {"excess", "http10"},
    {"excess", "icy"},
]


def draw(seed: int) -> str:
    dice = random.Random(seed)
    names = sorted(FAULTS.keys() - ELSEWHERE)
    while True:
        pair = dice.sample(names, 2)
        if set(pair) not in UNKNOWABLE:
            break
    times = dice.choice([0, 0, 1, 2, 5])
    at = dice.choice([0, 4095, 50_000, 150_001])
    return "&".join(f"fault={name}" for name in pair) + f"&times={times}&at={at}"


def assert_one_version(got: bytes, start: int) -> None:
    if not any(content("s", version, start, start + len(got)) == got for version in range(VERSIONS)):
        origins = [f"+{offset}: {whose(got[offset:], 's', DEFAULT_SIZE)}" for offset in range(0, len(got), 20_000)]
        pytest.fail(f"{len(got)} bytes from {start} are of no one version: {'; '.join(origins)}")


async def read(body: HttpBody, most: int, got: bytearray) -> None:
    view = memoryview(bytearray(30_000))
    try:
        while len(got) < most and (count := await body.receive_into(view)):
            got += view[:count]
    finally:
        await body.aclose()


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(DRAWS))
async def test_two_faults_give_one_version_or_an_error(
    seed: int, origin: tuple[Origin, str], transports: Transports
) -> None:
    base = origin[1]
    options = StreamOptions(stall_timeout=0.5, headers=(("X-Target", f"{base}/s"),))
    url = f"{base}/s?{draw(seed)}"
    made = HttpSource(StreamSpec(name="s", source=UrlSource(url), options=options), transports)
    expect = None
    with trio.fail_after(DEADLINE):
        for start, stop in ((0, None), (100_001, 150_003), (50_000, None)):
            got = bytearray()
            try:
                body = await made.open(start, stop, expect)
                expect = body.facts
                assert body.start in (0, start)
                await read(body, DEFAULT_SIZE, got)
            except StreamfsError as error:
                assert "\n" not in str(error)
            if got:
                assert_one_version(bytes(got), body.start)
