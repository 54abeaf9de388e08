"""The configuration file: what it says, what is wrong with it, and what counts for a stream."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamfs.cli.configure import TEMPLATE
from streamfs.config import _MOUNT, STREAM_KEYS, Config, load, read
from streamfs.errors import InvalidRequest
from streamfs.options import field_name
from streamfs.spec import CommandSource, MountOptions, StreamOptions, StreamSpec, UrlSource


def config_of(text: str) -> Config:
    config, problems = read(text)
    assert problems == []
    return config


def stream(name: str = "f/g/x", url: str = "http://h.example:8080/x", **options: Any) -> StreamSpec:
    return StreamSpec(name=name, source=UrlSource(url), options=StreamOptions(**options))


LAYERS = """
[defaults]
user-agent = "defaults"
headers = { A = "defaults", B = "defaults" }
[host."*.example"]
user-agent = "domain"
[host."h.example"]
user-agent = "host"
headers = { a = "host" }
[host."h.example:8080"]
user-agent = "port"
[folder.f]
user-agent = "outer"
[folder."f/g"]
user-agent = "inner"
[stream."f/g/x"]
user-agent = "stream"
secret-headers = { B = "${env:X}" }
"""
ORDER = ["option", "stream", "inner", "outer", "port", "host", "domain", "defaults", None]


@pytest.mark.parametrize("first", range(len(ORDER)))
def test_what_is_closest_to_the_stream_counts(first: int) -> None:
    """Without the `first` ones, the next has the say."""
    text = LAYERS
    for left_out in ORDER[:first]:
        text = text.replace(f'user-agent = "{left_out}"', "")
    spec = stream(user_agent="option") if first == 0 else stream()
    assert config_of(text).effective(spec).options.user_agent == ORDER[first]


def test_headers_are_joined_name_by_name() -> None:
    config = config_of(LAYERS)
    options = config.effective(stream(headers=(("C", "own"),))).options
    assert sorted(options.headers) == [("C", "own"), ("a", "host")]
    assert options.secret_headers == (("B", "${env:X}"),)
    assert sorted(config.effective(stream("other", "http://else.test/")).options.headers) == [
        ("A", "defaults"),
        ("B", "defaults"),
    ]


def test_commands_get_what_is_not_about_requests() -> None:
    config = config_of('[defaults]\nuser-agent = "x"\nstall-timeout = "5s"\n[folder.c]\nwindow = "1h"\n')
    spec = StreamSpec(name="c/x", source=CommandSource(("x",)), options=StreamOptions(cwd="/", env={"A": "b"}))
    options = config.effective(spec).options
    assert options == StreamOptions(cwd="/", env={"A": "b"}, stall_timeout=5.0, window="1h")


@pytest.mark.parametrize("host", ["[::1]", "[::1]:8080", "::1"])
def test_hosts_may_be_addresses(host: str) -> None:
    config = config_of(f'[host."{host}"]\nuser-agent = "x"\n')
    assert config.effective(stream(url="http://[::1]:8080/")).options.user_agent == "x"


def test_a_window_excludes_waiting_and_keeping() -> None:
    config = config_of('[defaults]\nsize-policy = "wait"\npersist = true\n[folder.r]\nwindow = "1h"\n')
    assert config.effective(stream("r/x")).options.size_policy == "zero"
    assert config.effective(stream("x")).options.size_policy == "wait"
    assert (config.persists(stream("r/x")), config.persists(stream("x"))) == (False, True)
    assert not config.persists(stream("x", window="1h"))


def test_options_of_the_mount() -> None:
    config = config_of('[mount]\nmemory = "1MiB"\ncache-size = "none"\nttl = "2h"\nallow_other = true\n')
    assert config.mount_options() == MountOptions(memory=1 << 20, cache_size=None, ttl=7200.0, allow_other=True)


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        ("x = 1", 1, "no table is called 'x'"),
        ("\nmount = 1", 2, "'mount' is a table"),
        ("[mount]\n\nmemroy = 1", 3, "'memroy'"),
        ('[mount]\nmemory = "big"', 2, "not a size"),
        ('[mount]\ncache-dir = "rel"', 2, "absolute"),
        ('[mount]\nlog-level = "loud"', 2, "one of"),
        ("[defaults]\nsize = 5", 2, "'size'"),
        ('[defaults]\ntransform = "gunzip"', 2, "'transform'"),
        ('[defaults]\nsecret-headers = { A = "${env:X}" }', 2, "every server"),
        ('[host."h.example"]\n# a\nheaders = { "a b" = "x" }', 3, "not a header name"),
        ('[host."h.example"]\nsecret-headers = { A = "plain" }', 2, "refers to its secret"),
        ('[host."h.example"]\ncookie-file = "rel"', 2, "absolute"),
        ('[host."http://h/"]\n', 1, "is no host"),
        ('[host]\nuser-agent = "x"', 2, "a table is needed"),
        ('[folder."a//b"]\n', 1, "empty part"),
        ('[folder.a]\nwindow = "soon"', 2, "window"),
        ('[folder.a]\npersist = "yes"', 2, "true or false"),
        ("[stream.a]\nstall-timeout = 0", 2, "more than 0"),
        ('[defaults]\nproxy = "gopher://x"', 2, "proxy"),
        ("[defaults]\ninsecure = 1", 2, "true or false"),
        ("[mount]\nx =\n", None, "line 2"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(text: str, line: int | None, word: str, tmp_path: Path) -> None:
    _, (problem,) = read(text)
    assert problem.line == line
    assert word in problem.text
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(InvalidRequest) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert line is None or f"config.toml line {line}: " in str(caught.value)


def test_all_problems_are_found_and_the_rest_counts() -> None:
    config, problems = read("[mount]\nx = 1\nmemory = 5\n[folder.a]\ny = 1\neager = true\n")
    assert [problem.line for problem in problems] == [2, 5]
    assert (config.mount, config.folders) == ({"memory": 5}, {"a": {"eager": True}})


def test_no_file_says_nothing_and_an_unreadable_one_is_an_error(tmp_path: Path) -> None:
    assert load(tmp_path / "none") == Config()
    with pytest.raises(InvalidRequest, match="cannot read"):
        load(tmp_path)


def test_the_template_sets_nothing_and_names_every_key() -> None:
    assert config_of(TEMPLATE) == Config()
    used = re.sub(r"^# (?=\[|[a-z-]+ = )", "", TEMPLATE, flags=re.MULTILINE)
    config = config_of(used)
    assert set(config.mount) == set(_MOUNT)
    named = {field_name(key) for key in re.findall(r"^([a-z-]+) = ", used, re.MULTILINE)}
    assert named == set(_MOUNT) | set(STREAM_KEYS)
    assert config.mount_options() == MountOptions(cache_dir="/srv/cache/streamfs")


def test_every_option_of_the_mount_can_be_configured() -> None:
    assert set(_MOUNT) == set(MountOptions.__struct_fields__)


@given(
    st.one_of(
        st.text(max_size=80),
        st.lists(
            st.sampled_from(
                ["[mount]\n", "[host.a]\n", "[[folder]]\n", "headers = ", "{a=1}\n", "[1]\n", "x", "=", '"\n']
            )
        ).map("".join),
    )
)
def test_no_text_upsets_the_reader(text: str) -> None:
    config, problems = read(text)
    assert all("\n" not in problem.text for problem in problems) or "not valid TOML" in problems[0].text
    config.effective(stream())
