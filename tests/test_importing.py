"""From lists to streams: what a stranger's list may not hold, what its feeds bring, and where references start."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio
import trio.testing

from streamfs.errors import InvalidRequest, SourceFailed
from streamfs.importing import FEEDS_AT_A_TIME, MOST_BYTES, MOST_SECONDS, Found, Rules, download, gather
from streamfs.sources.base import Body, Facts, Source
from streamfs.sources.credentials import resolved

PUBLIC = "http://lists.example/list"
HOME = "file:///home/me/list"


class FakeBody:
    facts = Facts()
    start = 0
    end_proven = True

    def __init__(self, data: bytes, net: Net, repeat: int) -> None:
        self._data, self._net, self._left = data, net, repeat

    async def receive_into(self, view: memoryview) -> int:
        if not self._left:
            return 0
        self._left -= 1
        view[: len(self._data)] = self._data
        return len(self._data)

    async def aclose(self) -> None:
        self._net.open -= 1


class FakeSource:
    def __init__(self, url: str, net: Net) -> None:
        self._url, self._net = url, net

    async def open(self, start: int, stop: int | None, expect: Facts | None) -> Body:
        self._net.asked.append(self._url)
        if self._url not in self._net.pages:
            raise SourceFailed("404 Not Found")
        self._net.open += 1
        self._net.most = max(self._net.most, self._net.open)
        return FakeBody(self._net.pages[self._url], self._net, self._net.repeat)

    def begin(self, start: int, stop: int, expect: Facts) -> None:
        """It never answers on the spot."""

    async def probe(self) -> Facts:
        raise AssertionError("nobody asks for that")

    async def aclose(self) -> None:
        self._net.closed += 1


class Net:
    """Pages by URL."""

    def __init__(self, pages: dict[str, bytes] | None = None, repeat: int = 1) -> None:
        self.pages = pages or {}
        self.repeat = repeat  # how often each gives its bytes
        self.asked: list[str] = []
        self.open = self.most = self.closed = 0

    def __call__(self, url: str) -> Source:
        return FakeSource(url, self)


async def found(text: str, base: str = PUBLIC, net: Net | None = None, **rules: Any) -> Found:
    return await gather(text.encode(), base, "LIST", Rules(**rules), net or Net())


def feed(title: str, *urls: str) -> bytes:
    items = "".join(f'<item><title>E</title><enclosure url="{url}"/></item>' for url in urls)
    return f"<rss><channel><title>{title}</title>{items}</channel></rss>".encode()


def opml(*urls: str) -> str:
    return "<opml><body>\n" + "\n".join(f'<outline text="t" xmlUrl="{url}"/>' for url in urls) + "\n</body></opml>"


PRIVATE = ["http://127.0.0.1/x", "http://localhost:8/x", "https://192.168.1.1/", "ftp://[::1]/x", "http://0x7f.1/x"]


@pytest.mark.parametrize("url", PRIVATE)
async def test_a_public_list_names_no_private_address(url: str) -> None:
    listing = f"#EXTM3U\n{url}\nhttp://other.example/y.mp3\n"
    strict = await found(listing)
    assert [(where, "private address" in text) for where, text in strict.problems] == [("LIST:2", True)]
    assert [item.spec.name for item in strict.streams] == ["y.mp3"]
    assert (await found(listing, allow_private=True)).problems == []
    assert (await found(listing, HOME)).problems == [], "one of your own may"
    assert (await found(listing, "http://192.168.7.7/list")).problems == [], "and one from within"
    feeds = Net({url: feed("S", "http://h.example/a.mp3")})
    refused = await found(opml(url), net=feeds)
    assert [where for where, _ in refused.problems] == ["LIST:2"]
    assert feeds.asked == []


async def test_a_list_from_the_net_names_no_files_nor_what_reads_them() -> None:
    for url in ("file:///etc/passwd", "FILE:///etc/passwd"):
        assert (await found(f"#EXTM3U\n{url}\n")).streams == []
    records = [
        {"name": key, "url": "http://h.example/", "options": {key: value}}
        for key, value in {
            "netrc": "/n",
            "cookie_file": "/c",
            "cert": "/c",
            "key": "/k",
            "cacert": "/c",
            "secret_headers": {"A": "${file:/etc/shadow}"},
        }.items()
    ]
    strict = await found(json.dumps(records))
    assert (len(strict.problems), strict.streams) == (len(records), [])
    assert len((await found(json.dumps(records), HOME)).streams) == len(records)


async def test_a_list_from_the_net_does_not_say_whom_this_machine_trusts() -> None:
    records = [
        {"name": key, "url": "https://h.example/", "options": {key: value}}
        for key, value in {"proxy": "http://p.example:8080", "insecure": True, "allow-private": True}.items()
    ]
    strict = await found(json.dumps(records))
    assert (len(strict.problems), strict.streams) == (3, [])
    assert [item.spec.name for item in (await found(json.dumps(records), allow_private=True)).streams] == [
        "allow-private"
    ]
    assert len((await found(json.dumps(records), HOME)).streams) == 3


async def test_commands_need_the_word_of_the_user() -> None:
    records = json.dumps(
        [
            {"name": "a", "command": ["x"]},
            {"name": "b", "shell": "x"},
            {"name": "c", "url": "http://h.example/", "options": {"refresh_command": ["x"]}},
        ]
    )
    for base in (PUBLIC, HOME):
        strict = await found(records, base)
        assert (strict.streams, len(strict.problems)) == ([], 3)
        assert len((await found(records, base, allow_commands=True)).streams) == 3


async def test_feeds_are_fetched_a_few_at_a_time_and_each_fails_alone() -> None:
    urls = [f"http://h.example/{n}" for n in range(40)]
    net = Net({url: feed(f"Show {n}", f"{n}.mp3") for n, url in enumerate(urls)})
    del net.pages[urls[3]]
    net.pages[urls[5]] = b'<!DOCTYPE r [<!ENTITY x "y">]><rss/>'
    told: list[tuple[int, int]] = []
    result = await gather(
        opml(*urls).encode(), HOME, "LIST", Rules(into="pods"), net, lambda done, total: told.append((done, total))
    )
    assert [where for where, _ in result.problems] == ["LIST:5", "LIST:7"]
    assert len(result.streams) == 38
    assert result.streams[0].spec.name == "pods/Show 0/E.mp3"
    assert told[-1] == (40, 40)
    assert net.most <= FEEDS_AT_A_TIME
    assert (net.open, net.closed) == (0, 40)


async def test_a_feed_of_a_public_host_names_nothing_private() -> None:
    net = Net({"http://h.example/f": feed("S", "http://10.0.0.1/a.mp3", "file:///etc/passwd", "ok.mp3")})
    result = await found(opml("http://h.example/f"), HOME, net)
    assert [item.spec.name for item in result.streams] == ["S/E.mp3"]
    assert len(result.problems) == 2


async def test_equal_titles_of_feeds_share_a_folder_without_clashes() -> None:
    urls = ("http://h.example/1", "http://h.example/2")
    net = Net({url: feed("Same", f"{url}.mp3") for url in urls})
    result = await found(opml(*urls), HOME, net)
    assert [item.spec.name for item in result.streams] == ["Same/E.mp3", "Same/E (2).mp3"]


async def test_a_list_without_an_end_is_given_up() -> None:
    net = Net({PUBLIC: b"x" * (256 << 10)}, repeat=10 * (MOST_BYTES >> 18))
    with pytest.raises(SourceFailed, match="longer than"):
        await download(net, PUBLIC)
    assert (net.open, net.closed) == (0, 1)


async def test_a_list_that_drips_is_given_up(autojump_clock: trio.testing.MockClock) -> None:
    class Drip(FakeBody):
        async def receive_into(self, view: memoryview) -> int:
            await trio.sleep(5)
            view[:1] = b"x"
            return 1

    class Slow(FakeSource):
        async def open(self, start: int, stop: int | None, expect: Facts | None) -> Body:
            net.open += 1
            return Drip(b"x", net, 1)

    net = Net()
    with pytest.raises(SourceFailed, match=f"did not come within {MOST_SECONDS:g} s"):
        await download(lambda url: Slow(url, net), PUBLIC)
    assert (net.open, net.closed) == (0, 1)
    assert trio.current_time() < 2 * MOST_SECONDS


async def test_what_is_no_list_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="--format"):
        await found("hello")


def test_secrets_are_read_from_where_they_are(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("abc\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    monkeypatch.setenv("WORD", "def")
    assert resolved(f"Bearer ${{file:{tmp_path}/token}}-${{env:WORD}}") == "Bearer abc-def"
    assert resolved("${file:~/token}${credential:token}") == "abcabc"


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ("${file:/nowhere/at/all}", "No such file"),
        ("${file:~nobodyatall/x}", "cannot be read"),
        ("${env:NOT_SET_AT_ALL}", "is not set"),
        ("${credential:x}", "no credential"),
        ("${credential:../x}", "no credential"),
        ("${file:LONG}", "one line"),
        ("${file:LINES}", "one line"),
    ],
)
def test_secrets_that_cannot_be_had_are_an_error_that_shows_nothing(
    value: str, word: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    (tmp_path / "LONG").write_text("hush" * 10_000)
    (tmp_path / "LINES").write_text("hush\nhush")
    with pytest.raises(SourceFailed, match=word) as caught:
        resolved(value.replace("LONG", f"{tmp_path}/LONG").replace("LINES", f"{tmp_path}/LINES"))
    assert "hush" not in str(caught.value)
