"""Lists of every format: what they hold, what is wrong with them, and that no bytes whatever upset the readers."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamfs import tomllines
from streamfs.errors import InvalidRequest, StreamfsError
from streamfs.manifests import FORMATS, WRITTEN
from streamfs.manifests.export import holds_secrets, without_secrets, write
from streamfs.manifests.model import Item, Manifest, resolve
from streamfs.manifests.names import named, part_of
from streamfs.manifests.reading import parse, recognise
from streamfs.spec import (
    NAME_PART_BYTES,
    CommandSource,
    Facts,
    Registration,
    ShellSource,
    StreamOptions,
    StreamSpec,
    UrlSource,
    check_name,
    check_spec,
)

BASE = "http://h.example/lists/all.m3u"
LOCAL = "file:///home/me/lists/all.m3u"


def read(text: str | bytes, base: str = BASE, kind: str | None = None) -> Manifest:
    data = text.encode() if isinstance(text, str) else text
    return parse(data, base, kind or recognise(data, base), Path("/home/me/lists") if base == LOCAL else None)


def urls(found: Manifest) -> list[str]:
    return [item.source.url for item in found.items if isinstance(item.source, UrlSource)]


def names(found: Manifest, into: str = "") -> list[str]:
    return [name for _, name in named(found.items, into)]


def refusal(text: str | bytes, base: str = BASE, kind: str | None = None) -> str:
    with pytest.raises(InvalidRequest) as caught:
        read(text, base, kind)
    return str(caught.value)


# ── playlists ────────────────────────────────────────────────────────────────────────────────────────────────────

M3U = """#EXTM3U
#PLAYLIST:All of it
#EXTINF:-1 tvg-id="x" group-title="News, of the world",Channel, One
http://a.example/one?token=1

#EXTGRP:Music;Old
#EXTVLCOPT:http-user-agent=VLC/3
#EXTINF:212,AC/DC - Thunder
songs/Thunder struck.mp3
/rooted.ogg
# a remark
https://a.example/x.flac
"""


def test_an_extended_m3u_has_titles_groups_and_relative_urls() -> None:
    found = read(M3U)
    assert urls(found) == [
        "http://a.example/one?token=1",
        "http://h.example/lists/songs/Thunder%20struck.mp3",
        "http://h.example/rooted.ogg",
        "https://a.example/x.flac",
    ]
    assert names(found) == ["News, of the world/Channel, One", "Music/Old/AC-DC - Thunder.mp3", "rooted.ogg", "x.flac"]
    assert [item.line for item in found.items] == [4, 9, 10, 12]
    assert found.items[1].options.user_agent == "VLC/3"
    assert (found.title, found.problems) == ("All of it", [])


def test_a_list_in_a_file_names_files_beside_it() -> None:
    found = read("#EXTM3U\nsub/ä b.mp3\n../up.mp3\n/abs.mp3\nC:\\Music\\x.mp3\n", LOCAL)
    assert urls(found) == [
        "file:///home/me/lists/sub/%C3%A4%20b.mp3",
        "file:///home/me/up.mp3",
        "file:///abs.mp3",
        "file:///home/me/lists/C%3A%5CMusic%5Cx.mp3",
    ]


def test_bad_entries_are_told_with_their_lines_and_spoil_no_others() -> None:
    found = read("#EXTM3U\nrtmp://h/x\nhttp://\nhttp://good.example/\nhttp://h:0/\n")
    assert [problem.line for problem in found.problems] == [2, 3, 5]
    assert urls(found) == ["http://good.example/"]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:9.9,\npiece0.ts\n#EXT-X-ENDLIST\n", "media playlist of HLS"),
        ("#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\nlow.m3u8\n", "main playlist of HLS"),
    ],
)
def test_a_playlist_of_hls_is_no_list_of_streams_and_says_so(text: str, word: str) -> None:
    line = refusal(text)
    assert word in line and "ffmpeg" in line


def test_old_playlists_are_in_old_letters() -> None:
    assert names(read("#EXTINF:1,Müller\nhttp://h.example/a.mp3\n".encode("cp1252"), kind="m3u")) == ["Müller.mp3"]
    assert names(read("\ufeff#EXTM3U\r\n#EXTINF:1,ü\r\nhttp://h.example/a.mp3\r\n".encode())) == ["ü.mp3"]


def test_pls_entries_come_in_the_order_of_their_numbers() -> None:
    found = read("[playlist]\nFile2=b.mp3\ntitle1=One\nFILE1=http://h.example/a\nLength1=-1\nTitle3=x\nVersion=2\n")
    assert names(found) == ["One", "b.mp3"]
    assert [problem.line for problem in found.problems] == [6]


# ── XML ──────────────────────────────────────────────────────────────────────────────────────────────────────────

XSPF = """<?xml version="1.0" encoding="UTF-8"?>
<playlist version="1" xmlns="http://xspf.org/ns/0/"><title>Mine</title><trackList>
<track><location>a%20b.ogg</location><creator>Who</creator><title>What &amp; why</title></track>
<track><title>nowhere</title></track>
</trackList></playlist>"""

RSS = """<?xml version="1.0"?>
<!DOCTYPE rss PUBLIC "-//Netscape Communications//DTD RSS 0.91//EN" "http://my.netscape.com/publish/formats/rss.dtd">
<rss version="2.0" xmlns:itunes="http://www.itunes.com/dtds/podcast-1.0.dtd"><channel><title>The &amp;amp; Show</title>
<item><title>No. 1: a/b</title><enclosure url="e1.mp3" length="1234" type="audio/mpeg"/></item>
<item><title>only words</title></item>
<item><itunes:title>Two</itunes:title><enclosure url="http://h.example/get?id=2" length="0" type="audio/mp4"/></item>
<item><title>Two</title><enclosure url="http://h.example/get?id=3" length="x" type="audio/mp4; a=b"/></item>
<item><title>bad</title><enclosure url="rtsp://h.example/x" type="video/mp4"/></item>
</channel></rss>"""

OPML = """<opml version="2.0"><head><title>Pods</title></head><body>
<outline text="Tech"><outline type="rss" text="A show" xmlUrl="http://h.example/a.xml"/></outline>
<outline text="B" xmlUrl="b.xml"/>
<outline text="Bad" xmlUrl="gopher://h/"/>
<outline text="Song" type="audio" url="song.mp3"/>
</body></opml>"""

ATOM = """<feed xmlns="http://www.w3.org/2005/Atom"><title>Atoms</title>
<entry><title>E</title><link rel="alternate" href="/page"/>
<link rel="enclosure" href="/e.mp3" length="77" type="audio/mpeg"/></entry></feed>"""


def test_xspf_tracks_have_creators_and_titles() -> None:
    found = read(XSPF)
    assert names(found) == ["Who - What & why.ogg"]
    assert urls(found) == ["http://h.example/lists/a%20b.ogg"]
    assert [problem.line for problem in found.problems] == [4]


def test_episodes_of_a_feed_have_titles_lengths_and_types() -> None:
    found = read(RSS)
    assert found.title == "The & Show"
    assert names(found, "pods") == ["pods/No. 1: a-b.mp3", "pods/Two.m4a", "pods/Two (2).m4a"]
    assert [item.facts for item in found.items] == [
        Facts(size=1234, mime="audio/mpeg"),
        Facts(mime="audio/mp4"),
        Facts(mime="audio/mp4"),
    ]
    assert [problem.line for problem in found.problems] == [8]


def test_episodes_of_atom_are_enclosed() -> None:
    found = read(ATOM)
    assert (found.title, names(found), urls(found)) == ("Atoms", ["E.mp3"], ["http://h.example/e.mp3"])
    assert found.items[0].facts == Facts(size=77, mime="audio/mpeg")


def test_opml_names_feeds_in_folders() -> None:
    found = read(OPML)
    assert [(feed.title, feed.folder, feed.url) for feed in found.feeds] == [
        ("A show", ("Tech",), "http://h.example/a.xml"),
        ("B", (), "http://h.example/lists/b.xml"),
    ]
    assert names(found) == ["Song.mp3"]
    assert [problem.line for problem in found.problems] == [4]


LAUGHS = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
BOMB = f'<!DOCTYPE rss [<!ENTITY l0 "ha">{LAUGHS}]><rss><channel><title>&l9;</title></channel></rss>'


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (BOMB, "entities"),
        (
            '<!DOCTYPE r [<!ENTITY x SYSTEM "file:///etc/passwd">]><rss><channel><title>&x;</title></channel></rss>',
            "ent",
        ),
        ('<!DOCTYPE r [<!ENTITY % x SYSTEM "http://h.example/x">%x;]><rss/>', "entities"),
        ("<rss>" + "<a>" * 100 + "</a>" * 100 + "</rss>", "too deep"),
        ("<rss><channel>", "not valid XML, line 1"),
        ("<svg/>", "a 'svg', not a list"),
        ("<!doctype HTML><p>", "web page"),
        ("<html><body/></html>", "web page"),
        ('<?xml version="1.0" encoding="nonsense"?><rss/>', "not valid XML"),
        ("hello", "--format"),
    ],
)
def test_what_is_no_list_or_not_to_be_read_is_refused(text: str, word: str) -> None:
    assert word in refusal(text, "http://h.example/list")


# ── records ──────────────────────────────────────────────────────────────────────────────────────────────────────

RECORDS: list[dict[str, Any]] = [
    {"name": "a/b.mp3", "url": "http://h.example/", "options": {"size": "5MiB", "headers": {"A": "b"}}},
    {"name": "c", "command": ["echo", "x"], "options": {"env": {"K": "V"}, "cwd": "/"}},
    {"name": "d", "shell": "echo | cat", "persist": True},
]


@pytest.mark.parametrize("style", ["array", "indented", "lines", "toml"])
def test_records_in_json_and_toml_mean_the_same(style: str) -> None:
    text = {
        "array": json.dumps(RECORDS),
        "indented": json.dumps(RECORDS, indent=2),
        "lines": "\n".join(map(json.dumps, RECORDS)),
        "toml": """
            [[stream]]
            name = "a/b.mp3"
            url = "http://h.example/"
            options = { size = "5MiB", header = ["A: b"] }
            [[stream]]
            name = "c"
            command = ["echo", "x"]
            [stream.options]
            cwd = "/"
            env.K = "V"
            [[stream]]
            name = "d"
            shell = "echo | cat"
            persist = true
            """,
    }[style]
    found = read(text)
    assert found.problems == []
    assert [(item.name, item.source, item.persist) for item in found.items] == [
        ("a/b.mp3", UrlSource("http://h.example/"), None),
        ("c", CommandSource(("echo", "x")), None),
        ("d", ShellSource("echo | cat"), True),
    ]
    assert found.items[0].options == StreamOptions(size=5 << 20, headers=(("A", "b"),))
    assert found.items[1].options == StreamOptions(cwd="/", env={"K": "V"})


@pytest.mark.parametrize(
    ("record", "word"),
    [
        ({"name": "a"}, "one of url"),
        ({"url": "http://h.example/"}, "without its name"),
        ({"name": "a", "url": "http://h.example/", "shell": "x"}, "one of url"),
        ({"name": "..", "url": "http://h.example/"}, "means a folder"),
        ({"name": "a", "url": "x"}, "not a URL"),
        ({"name": "a", "url": 5}, "not a text"),
        ({"name": "a", "command": "ls"}, "list of texts"),
        ({"name": "a", "url": "http://h.example/", "wrong": 1}, "'wrong'"),
        ({"name": "a", "url": "http://h.example/", "options": {"sise": 1}}, "'sise'"),
        ({"name": "a", "url": "http://h.example/", "options": {"size": "x"}}, "'size'"),
        ({"name": "a", "url": "http://h.example/", "options": {"window": "x"}}, "'window'"),
        ({"name": "a", "url": "http://h.example/", "options": {"stall-timeout": -1}}, "'stall-timeout'"),
        ({"name": "a", "url": "http://h.example/", "options": {"netrc": "rel"}}, "absolute"),
        ({"name": "a", "url": "http://h.example/", "options": {"env": {"A": "b"}}}, "commands only"),
        ({"name": "a", "url": "http://h.example/", "options": {"secret_headers": {"A": "b"}}}, "refers to its secret"),
        ({"name": "good", "url": "http://h.example/"}, "there already, in line 1"),
        (7, "not a record"),
    ],
)
def test_a_bad_record_is_told_with_its_line(record: Any, word: str) -> None:
    text = json.dumps({"name": "good", "url": "http://h.example/"}) + "\n\n" + json.dumps(record)
    found = read(text)
    assert [item.name for item in found.items] == ["good"]
    ((line, said),) = [(problem.line, problem.text) for problem in found.problems]
    assert line == 3
    assert word in said


def test_lines_of_arrays_and_tables_are_told() -> None:
    found = read('[\n {"name": "a", "url": "http://h.example/"},\n {\n"name": "b"}\n]')
    assert [problem.line for problem in found.problems] == [3]
    found = read('[[stream]]\nname = "a"\n\n[[stream]]\nname="b"\nurl="http://h.example/"\n[other]\nx=1\n')
    assert sorted((problem.line, problem.text[:8]) for problem in found.problems) == [(1, "a record"), (7, "no key i")]


@pytest.mark.parametrize("text", ["[1,", "[1 2]", "[{}] x", "{} {}", "{", "[" * 100_000, "[" + "9" * 9999 + "]"])
def test_what_is_no_json_is_refused_with_its_line(text: str) -> None:
    assert "line 1" in refusal(text, kind="json")


def test_relative_files_of_options_start_where_the_list_is() -> None:
    text = '[[stream]]\nname="a"\nurl="http://h.example/"\noptions={netrc="my/netrc"}\n'
    assert read(text, LOCAL).items[0].options.netrc == "/home/me/lists/my/netrc"


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("title", "part"),
    [
        ("AC/DC", "AC-DC"),
        ("  a \t\n b  ", "a b"),
        (".hidden", "hidden"),
        ("..", ""),
        ("-rf x", "rf x"),
        ("e\u0301", "é"),
        ("a\x1b[31mb\x7f\u202eevil\u200b", "a[31mbevil"),
        ("x" * 300, "x" * 255),
        ("ü" * 300, "ü" * 127),
    ],
)
def test_a_title_becomes_one_safe_part_of_a_name(title: str, part: str) -> None:
    assert part_of(title) == part


def item(title: str = "", url: str = "http://h.example/", folder: tuple[str, ...] = (), **more: Any) -> Item:
    return Item(UrlSource(url), title=title, folder=folder, **more)


def test_names_have_endings_and_are_there_once_whatever_the_case() -> None:
    items = [
        item("Song", "http://h.example/x.mp3?y"),
        item("song.MP3", "http://h.example/y.mp3"),
        item("", "http://h.example/My%20file.ogg"),
        item("", "http://radio.example/"),
        item("News", folder=("A",)),
        item("A"),
        item("v1.0"),
        item("Ep", facts=Facts(mime="video/mp4")),
        item("y" * 300, "http://h.example/x.mp3"),
        item("y" * 300, "http://h.example/z.mp3"),
    ]
    made = [name for _, name in named(items)]
    assert made[:8] == [
        *("Song.mp3", "song (2).MP3", "My file.ogg", "radio.example", "A/News", "A (2)", "v1.0", "Ep.mp4"),
    ]
    assert [len(name) for name in made[8:]] == [255, 255]
    assert made[9].endswith("y (2).mp3")


def test_thousands_of_equal_titles_are_numbered_at_once() -> None:
    made = [name for _, name in named([item("Episode", "http://h.example/x.mp3") for _ in range(20_000)])]
    assert made[-1] == "Episode (20000).mp3"
    assert len(set(made)) == 20_000


@given(st.lists(st.tuples(st.text(), st.text(), st.lists(st.text(max_size=5), max_size=3)), max_size=12), st.booleans())
def test_names_of_any_titles_can_be_registered_together(raw: list[Any], deep: bool) -> None:
    items = []
    for title, end, folder in raw:
        url = "http://h.example/" + "".join(letter for letter in end if letter in string.ascii_letters + ".")
        items.append(item(title, url, tuple(folder)))
    made = [name for _, name in named(items, "into/x" if deep else "")]
    for name in made:
        check_name(name)
        assert all(len(part.encode()) <= NAME_PART_BYTES for part in name.split("/"))
        assert not any(other.startswith(name + "/") for other in made)
    assert len(set(made)) == len(made)


# ── any bytes ────────────────────────────────────────────────────────────────────────────────────────────────────

PIECES = [
    *(
        "#EXTM3U\n",
        "#EXTINF:1,",
        'group-title="',
        "[playlist]\n",
        "File1=",
        "Title1=",
        "http://h/",
        "\n",
        "\0",
        "\ufeff",
    ),
    *("<rss>", "</rss>", "<channel>", "<item>", "<enclosure url='", "'/>", "<opml><body>", "<outline xmlUrl='x'/>"),
    *("<playlist>", "<trackList>", "<track>", "<location>", "<!DOCTYPE a [", "<!ENTITY b 'c'>", "&b;", "<?xml ", "]]>"),
    *(
        "[[stream]]\n",
        'name="a"\n',
        "options={",
        "}",
        "[",
        "]",
        "{",
        '"name":',
        '"url":',
        ",",
        "1e999",
        "\\ud800",
        "//[",
    ),
]
JUNK = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.lists(st.sampled_from(PIECES), max_size=25).map(lambda parts: "".join(parts).encode()),
)


@settings(max_examples=400, deadline=None)
@given(JUNK, st.sampled_from(FORMATS), st.sampled_from([BASE, LOCAL, "file:///-"]))
@example(b"[playlist]\nFile999999999=x\n", "pls", BASE)
@example(b"http://[::1\n//[\n", "m3u", BASE)
@example(b"\xff\xfe\x00", "m3u", LOCAL)
def test_no_bytes_upset_a_reader(data: bytes, kind: str, base: str) -> None:
    for chosen in (kind, None):
        try:
            found = parse(data, base, chosen or recognise(data, base), Path("/x"))
        except StreamfsError as error:
            assert "\n" not in str(error)
            continue
        for one, name in named(found.items):
            check_spec(StreamSpec(name=name, source=one.source, options=one.options))


@given(st.text(max_size=60), st.sampled_from([BASE, LOCAL]))
def test_a_reference_is_a_url_or_refused(reference: str, base: str) -> None:
    try:
        url = resolve(reference, base)
    except InvalidRequest:
        return
    check_spec(StreamSpec(name="x", source=UrlSource(url)))
    assert url.isascii() or not url.partition("/")[2].isascii()


# ── export ───────────────────────────────────────────────────────────────────────────────────────────────────────

STREAMS = [
    Registration(
        spec=StreamSpec(
            name="a/ü \x7f\"'.mp3",
            source=UrlSource("https://me:pw@h.example/x?token=t#f"),
            options=StreamOptions(
                size=5, headers=(("A", 'b"\\'),), stall_timeout=None, window="30m", transforms=("icy",), netrc="/n"
            ),
        ),
        persist=True,
    ),
    Registration(spec=StreamSpec(name="b", source=CommandSource(("curl", "https://u:p@h.example/?k=v", "")))),
    Registration(
        spec=StreamSpec(
            name="c",
            source=ShellSource("a | b 'c'\n"),
            options=StreamOptions(cwd="/", env={"K x": "V"}, stall_timeout=1.5, eager=True),
        )
    ),
]


@pytest.mark.parametrize("kind", ["json", "jsonl", "toml"])
def test_an_export_is_read_as_what_it_was(kind: str) -> None:
    found = read(write(STREAMS, kind))
    assert found.problems == []
    again = [
        Registration(spec=StreamSpec(name=one.name or "", source=one.source, options=one.options), persist=one.persist)
        for one in found.items
    ]
    assert [(one.spec, bool(one.persist)) for one in again] == [(one.spec, bool(one.persist)) for one in STREAMS]


def test_an_exported_playlist_has_urls_titles_and_folders() -> None:
    found = read(write(STREAMS, "m3u"))
    assert urls(found) == ["https://me:pw@h.example/x?token=t#f"]
    assert named(found.items)[0][1].startswith("a/ü")


def test_names_that_are_not_utf8_survive_json_and_are_refused_by_toml() -> None:
    odd = [Registration(spec=StreamSpec(name="\udce9", source=UrlSource("http://h.example/")))]
    assert read(write(odd, "json")).items[0].name == "\udce9"
    with pytest.raises(InvalidRequest, match="not UTF-8"):
        write(odd, "toml")
    assert "�" in write(odd, "m3u")


@pytest.mark.parametrize("kind", WRITTEN)
def test_an_export_without_secrets_shows_none(kind: str) -> None:
    assert [holds_secrets(one.spec) for one in STREAMS] == [True, True, True]
    bare = [Registration(spec=without_secrets(one.spec)) for one in STREAMS]
    text = write(bare, kind)
    assert not any(secret in text for secret in ("pw", "token", "u:p", "k=v", "b\\", '"V"'))
    assert "https://h.example/x" in text
    assert not any(holds_secrets(one.spec) for one in bare)


# ── lines of TOML ────────────────────────────────────────────────────────────────────────────────────────────────


def test_keys_of_toml_are_found_wherever_they_stand() -> None:
    text = 'a = 1\n\n[b]\n# [c]\nx = """\n[d]\ny = 1\n"""\n"q k".z = [\n 1,\n]\n[[t]]\nu = {v = 1}\n[[t]]\nu = 2\n'
    found = [(line, path) for line, _, path in tomllines.statements(text)]
    assert [line for line, _ in found] == [1, 3, 5, 9, 12, 13, 14, 15]
    assert tomllines.line_of(text, ("b", "q k", "z")) == 9
    assert tomllines.line_of(text, ("t",), occurrence=2) == 14
    assert tomllines.line_of(text, ("b", "x")) == 5
    assert tomllines.line_of(text, ("t", "u", "v", "w")) == 13
    assert tomllines.line_of(text, ("nowhere",)) is None


def test_the_lines_of_keys_that_are_none_are_found_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger's list may have very many, and to look for each from the start takes minutes."""
    looks = []
    real = tomllines.statements
    monkeypatch.setattr(tomllines, "statements", lambda text: looks.append(text) or real(text))
    found = read("".join(f"k{number} = 1\n" for number in range(500)), kind="toml")
    assert [problem.line for problem in found.problems] == list(range(1, 501))
    assert len(looks) == 1
