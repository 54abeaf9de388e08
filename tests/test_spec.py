"""What a stream may be registered with."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamfs.errors import InvalidRequest, NameTooLong, StreamfsError
from streamfs.spec import (
    CommandSource,
    MountOptions,
    ShellSource,
    StreamOptions,
    StreamSpec,
    UrlSource,
    check_name,
    check_spec,
    check_url,
    from_json,
    is_name,
    parse_duration,
    parse_size,
    parse_window,
    redact_text,
    redact_url,
    to_json,
)


def url_spec(url: str = "http://h/x", **options: Any) -> StreamSpec:
    return StreamSpec(name="n", source=UrlSource(url), options=StreamOptions(**options))


def command_spec(*argv: str, **options: Any) -> StreamSpec:
    return StreamSpec(name="n", source=CommandSource(argv), options=StreamOptions(**options))


@pytest.mark.parametrize("name", ["a", "a b", "a/b.c", "...", "-", "ü", "\udcff", "x" * 255, "new\nline"])
def test_names_that_can_be(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", "/", "/a", "a/", "a//b", ".", "..", "a/../b", "a/.", "a\0", "\ud800"])
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(InvalidRequest):
        check_name(name)


@pytest.mark.parametrize("name", ["x" * 256, "ü" * 128, "a/" + "x" * 256, "/".join(["d" * 250] * 20)])
def test_names_that_are_too_long(name: str) -> None:
    with pytest.raises(NameTooLong):
        check_name(name)


@given(st.text())
def test_every_name_passes_or_is_refused_and_what_passes_stays_below_the_mount(name: str) -> None:
    try:
        check_name(name)
    except InvalidRequest:
        return
    raw = name.encode("utf-8", "surrogateescape")
    assert all(part not in (b"", b".", b"..") and len(part) <= 255 and b"\0" not in part for part in raw.split(b"/"))


@pytest.mark.parametrize(
    "url",
    ["http://h/x", "HTTPS://h:1/x?y=z", "ftp://u:p@h/f", "sftp://h/f", "file:///etc/x", "http://[::1]:8/x"],
)
def test_urls_that_can_be_opened(url: str) -> None:
    assert check_url(url) == url


@pytest.mark.parametrize(
    "url",
    [
        *("", "x", "/etc/x", "h/x", "gopher://h/", "javascript:alert(1)", "http://", "http:///x", "http://h:0/"),
        *("http://h:99999/", "http://h/a b", "http://h/\n", "file://other/x", "file:x", "http://[::1/x", "//h/x"),
    ],
)
def test_urls_that_cannot(url: str) -> None:
    with pytest.raises(InvalidRequest):
        check_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "gopher://me:canary@h/?t=canary",
        "//me:canary@h/?t=canary",
        "http://me:canary@/x?t=canary#canary",
        "http://me:canary@h:0/?canary",
        "http://me:canary@h:99999/?t=canary",
        "http://me:canary@h/a b?t=canary",
    ],
)
def test_errors_and_descriptions_hold_no_secret(url: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_url(url)
    assert "canary" not in str(caught.value)
    assert "canary" not in redact_url(url)


def test_descriptions_hide_what_urls_hide() -> None:
    assert (
        url_spec("https://u:canary@h/p/x?token=canary&b=canary#canary").described()
        == "https://***@h/p/x?token=***&b=***#***"
    )
    assert command_spec("curl", "-s", "https://u:canary@h/x?k=canary").described() == "curl -s 'https://***@h/x?k=***'"
    shell = StreamSpec(name="n", source=ShellSource("curl http://u:canary@h/ | gzip"))
    assert shell.described() == "curl http://***@h/ | gzip"
    assert command_spec("sh", "-c", "a 'b'").described() == """sh -c 'a '"'"'b'"'"''"""
    assert redact_text("no address") == "no address"


@given(st.text())
def test_redaction_never_fails(text: str) -> None:
    redact_url(text)
    redact_text(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("7", 7),
        ("5MiB", 5 << 20),
        ("10 GiB", 10 << 30),
        ("64k", 64000),
        ("1.5KiB", 1536),
        ("2tb", 2 * 10**12),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "-1", "1 2", "5XiB", "1e3", "0x10", "MiB", "½", "٣ü"])
def test_what_is_no_size_nor_duration(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_size(text)
    with pytest.raises(InvalidRequest):
        parse_duration(text)


@pytest.mark.parametrize(("text", "seconds"), [("30s", 30), ("2h", 7200), ("1.5m", 90), ("250ms", 0.25), ("3", 3)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "window"),
    [
        ("2GiB", ("bytes", 2 << 30)),
        ("30m", ("seconds", 1800.0)),
        ("5M", ("bytes", 5_000_000)),
        ("100", ("bytes", 100)),
        ("90s", ("seconds", 90.0)),
    ],
)
def test_windows(text: str, window: tuple[str, float]) -> None:
    assert parse_window(text) == window


@pytest.mark.parametrize("text", ["", "0", "0s", "x", "-1s", "1y", "m"])
def test_what_is_no_window(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_window(text)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (StreamSpec(name="../x", source=UrlSource("http://h/")), "means a folder"),
        (url_spec("x"), "not a URL"),
        (command_spec(), "empty"),
        (command_spec(""), "empty"),
        (command_spec("a", "b\0"), "NUL"),
        (StreamSpec(name="n", source=ShellSource(" ")), "empty"),
        (StreamSpec(name="n", source=ShellSource("a\0b")), "NUL"),
        (command_spec("a", headers=(("A", "b"),)), "--header is for URLs"),
        (command_spec("a", cookie_file="/x"), "--cookie-file is for URLs"),
        (command_spec("a", insecure=True), "--insecure is for URLs"),
        (command_spec("a", allow_private=True), "--allow-private is for URLs"),
        (url_spec(cwd="/"), "--cwd is for commands"),
        (url_spec(env={"A": "b"}), "--env is for commands"),
        (url_spec(headers=(("A B", "c"),)), "not a header name"),
        (url_spec(headers=(("A", "c\r\nEvil: x"),)), "control character"),
        (url_spec(user_agent="a\nb"), "control character"),
        (command_spec("a", env={"A=B": "c"}), "environment variable"),
        (command_spec("a", env={"A": "\0"}), "NUL"),
        (url_spec(cookie_file="relative"), "absolute"),
        (command_spec("a", cwd="relative"), "absolute"),
        (url_spec(proxy="h:8080"), "proxy"),
        (url_spec(proxy="ftp://h"), "proxy"),
        (url_spec(stall_timeout=0.0), "more than 0"),
        (url_spec(window="0"), "more than 0"),
        (url_spec(refresh_command=()), "refresh command is empty"),
    ],
)
def test_specs_that_cannot_be_registered(spec: StreamSpec, text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        check_spec(spec)


def test_specs_that_can_be_registered() -> None:
    for spec in (
        url_spec(headers=(("X-A", "b\tc"),), proxy="socks5h://u:p@h:1", stall_timeout=None, window="30m", size=0),
        command_spec("ls", "", "-l", cwd="/", env={"A": ""}),
        StreamSpec(name="n", source=ShellSource("a | b")),
    ):
        assert check_spec(spec) is spec


def test_the_stall_timeout_is_a_urls_by_default() -> None:
    assert url_spec().stall_timeout == 60
    assert command_spec("a").stall_timeout is None
    assert url_spec(stall_timeout=None).stall_timeout is None
    assert command_spec("a", stall_timeout=2.0).stall_timeout == 2


TEXT = st.text(
    alphabet=st.one_of(
        st.characters(exclude_categories=["Cs"]), st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF)
    )
)


@given(name=TEXT, argv=st.lists(TEXT).map(tuple), env=st.dictionaries(TEXT, TEXT), stall=st.none() | st.floats(0, 9))
def test_every_spec_survives_json(name: str, argv: tuple[str, ...], env: dict[str, str], stall: float | None) -> None:
    spec = StreamSpec(name=name, source=CommandSource(argv), options=StreamOptions(env=env, stall_timeout=stall))
    assert from_json(to_json(spec), StreamSpec) == spec


def test_json_keeps_unset_apart_from_none() -> None:
    assert b"stall_timeout" not in to_json(url_spec())
    assert from_json(to_json(url_spec(stall_timeout=None)), StreamSpec).options.stall_timeout is None


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b'{"name": 1}', b"[" * 100_000])
def test_json_that_is_no_spec_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequest, match="not a valid StreamSpec"):
        from_json(data, StreamSpec)


def test_the_defaults_of_a_mount_are_the_documented_ones() -> None:
    options = MountOptions()
    assert (options.memory, options.spill_threshold, options.cache_size) == (256 << 20, 5 << 20, 10 << 30)
    assert (options.ttl, options.read_ahead, options.allow_other, options.cache_dir) == (3600, 8 << 20, False, None)


@given(st.lists(st.sampled_from([b"a", b".", b"/", b"\0", b"\xff", b"x" * 255, b"..", "é".encode()]), max_size=6))
def test_the_fast_look_at_a_name_agrees_with_the_careful_one(parts: list[bytes]) -> None:
    raw = b"".join(parts)
    try:
        check_name(raw.decode("utf-8", "surrogateescape"))
    except StreamfsError:
        assert not is_name(raw)
    else:
        assert is_name(raw)
