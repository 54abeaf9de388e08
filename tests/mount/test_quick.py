"""ls and status, as they are asked most, load little and say what they say in full."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.mount.mounted import Mounted

HEAVY = {
    *("click", "msgspec", "rich", "textual", "trio", "pyfuse3", "pycurl", "ssl", "sqlite3", "socket"),
    *("dataclasses", "inspect", "platform", "logging", "subprocess"),
    *("streamfs.catalog", "streamfs.cli.app", "streamfs.cli.types", "streamfs.config", "streamfs.control"),
    *("streamfs.engine", "streamfs.options", "streamfs.sources", "streamfs.spec"),
}
_LOADED = f"""
import sys
before = set(sys.modules)
from streamfs.cli import main
code = main(sys.argv[1:])
print(sorted((set(sys.modules) - before) & {HEAVY!r}), file=sys.stderr)
sys.exit(code)
"""
_IN_FULL = "import sys; from streamfs.cli.app import main; sys.exit(main(sys.argv[1:]))"
AT_ONCE = (
    ["ls"],
    ["ls", "-l"],
    ["ls", "--json"],
    ["ls", "--json", "-l"],
    ["status"],
    ["status", "b"],
    ["status", "b", "caf\udce9"],
    ["status", "--json", "b"],
    ["status", "b", "--json"],
)

IN_FULL = (["status", "nobody"], ["status", ""], ["ls", "b"], ["ls", "--what"], ["status", "-"], ["status", "--help"])


@pytest.fixture
def streams(fs: Mounted) -> Mounted:
    fs.add("b", "--no-probe", "http://user:secret@127.0.0.1:9/b")
    fs.add("caf\udce9", "--", "true")
    return fs


def done(fs: Mounted, script: str, *words: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    argv = [sys.executable, "-c", script, *words]
    return subprocess.run(argv, env=fs.environment | environment, capture_output=True, check=False, timeout=30)


def test_looking_loads_nothing_that_it_does_not_need_and_says_the_same(streams: Mounted) -> None:
    for words in AT_ONCE:
        found = done(streams, _LOADED, *words)
        assert (words, found.returncode, found.stderr) == (words, 0, b"[]\n")
        in_full = done(streams, _IN_FULL, *words)
        assert (words, found.stdout, in_full.stderr) == (words, in_full.stdout, b"")
        assert b"b" in found.stdout


def test_everything_else_is_said_in_full(streams: Mounted) -> None:
    for words in IN_FULL:
        found, in_full = done(streams, _LOADED, *words), done(streams, _IN_FULL, *words)
        assert (words, found.returncode, found.stdout) == (words, in_full.returncode, in_full.stdout)
        assert found.stderr.startswith(in_full.stderr)


def test_options_in_the_environment_hold(streams: Mounted) -> None:
    found = done(streams, _LOADED, "ls", STREAMFS_LS_JSON="1")
    assert len(json.loads(found.stdout)["streams"]) == 2


def test_an_output_that_takes_nothing_is_told(streams: Mounted) -> None:
    with open("/dev/full", "wb") as full:
        argv = [sys.executable, "-c", _LOADED, "ls"]
        failed = subprocess.run(
            argv, env=streams.environment, stdout=full, stderr=subprocess.PIPE, check=False, timeout=30
        )
    assert failed.returncode == 1
    assert failed.stderr.startswith(b"streamfs: No space left on device\n")
