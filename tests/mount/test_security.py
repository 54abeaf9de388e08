# ruff: noqa: PTH108, PTH208 (system calls as they are)
"""What the mount, the home and the control socket keep from others, one line of the safety rules after the other."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shlex
import shutil
import socket
import stat
import string
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamfs.cli import main
from streamfs.control import wire
from streamfs.errors import AlreadyExists, InvalidRequest, NotFound, NotPermitted, StreamfsError
from streamfs.sources import addresses, make_source
from streamfs.sources.transports import Transports
from streamfs.spec import CommandSource, ShellSource, StreamSpec, UrlSource
from tests.mount.mounted import CLI, WAIT, Mounted, wait_for
from tests.mount.posix_redirects import BODY, Redirector
from tests.mount.posix_tools import STRANGER, Posix, fails, outcome

DATA = random.Random(6).randbytes(300_001)
CANARY = "c4n4ry" + "".join(random.Random(7).choices(string.ascii_lowercase, k=12))

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="acting as another user takes root")


@pytest.fixture(scope="module")
def shared() -> Iterator[Posix]:
    """Mounted with --allow-other."""
    made = Posix("--allow-other")
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder whose path any user may walk."""
    folder = Path(tempfile.mkdtemp(prefix="streamfs-security-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def unsafe(place: Path) -> Iterator[Mounted]:
    """A home that must not be used, in `place`."""
    made = Mounted(place)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def redirector() -> Iterator[Redirector]:
    made = Redirector()
    try:
        yield made
    finally:
        made.close()


# A second user

CALLS = {
    "list the mount": "os.listdir(A[0])",
    "stat the mount": "os.stat(A[0]).st_mode",
    "stat a stream": "os.stat(A[0] + '/secret').st_size",
    "read a stream": "os.open(A[0] + '/secret', os.O_RDONLY)",
    "set an attribute": "os.setxattr(A[0] + '/secret', 'user.streamfs.persist', b'1')",
    "read an attribute": "os.getxattr(A[0] + '/secret', 'user.streamfs.source')",
    "remove a stream": "os.unlink(A[0] + '/secret')",
    "rename a stream": "os.rename(A[0] + '/secret', A[0] + '/stolen')",
    "list the home's state": "os.listdir(A[1] + '/state')",
    "list the cache": "os.listdir(A[1] + '/cache')",
    "list the run-time files": "os.listdir(A[1] + '/run')",
    "read the catalogue": "os.open(A[1] + '/state/catalog.db', os.O_RDONLY)",
    "read the log": "os.open(A[1] + '/state/daemon.log', os.O_RDONLY)",
    "connect to the socket": "socket.socket(socket.AF_UNIX).connect(A[1] + '/run/control.sock')",
    "kill the daemon": "os.kill(A[2], signal.SIGTERM)",
    "look at its environment": "pathlib.Path(f'/proc/{A[2]}/environ').read_text()",
    "look at its memory": "os.open(f'/proc/{A[2]}/mem', os.O_RDONLY)",
}


@needs_root
@pytest.mark.parametrize("call", CALLS)
def test_another_user_is_denied_everything(call: str, posix: Posix) -> None:
    if not (posix.mountpoint / "secret").exists():
        posix.file("secret", DATA)
    arguments = (posix.mountpoint, posix.fs.home, posix.fs.pid)
    assert outcome(CALLS[call], *arguments, uid=STRANGER) in ("EACCES", "EPERM")
    assert (posix.mountpoint / "secret").read_bytes() == DATA
    assert posix.fs.xattr("secret", "persist") == "0"


@needs_root
def test_the_socket_asks_for_the_peer_even_where_its_mode_lets_everybody_in(posix: Posix) -> None:
    home = posix.fs.home
    opened = (home, home / "run", home / "run" / "control.sock")
    modes = [path.stat().st_mode & 0o7777 for path in opened]
    request = wire.pack(wire.Request("add", {"spec": _spec("pwned", "touch", str(posix.folder / "pwned"))}), 1 << 20)
    call = (
        "(lambda s: (s.connect(A[0] + '/run/control.sock'), A[1] and s.sendall(bytes.fromhex(A[1])), "
        "b''.join(iter(lambda: s.recv(65536), b'')).decode('latin1')))(socket.socket(socket.AF_UNIX))[2]"
    )
    try:
        for path in opened:
            path.chmod(0o777)
        answers = [outcome(call, home, sent, uid=STRANGER) for sent in ("", request.hex())]
    finally:
        for path, mode in zip(opened, modes, strict=True):
            path.chmod(mode)
    assert "NotPermitted" in answers[0]
    assert answers[1] in ("EPIPE", "ECONNRESET") or "NotPermitted" in answers[1]
    assert b"pwned" not in posix.names()


def _spec(name: str, *argv: str) -> object:
    return json.loads(json.dumps({"name": name, "source": {"type": "command", "argv": argv}}))


DENIED_BESIDES_READING = {
    "write": "os.open(A[0], os.O_WRONLY)",
    "truncate": "os.truncate(A[0], 0)",
    "chmod": "os.chmod(A[0], 0o777)",
    "chown": "os.chown(A[0], A[1], A[1])",
    "touch": "os.utime(A[0])",
    "persist": "os.setxattr(A[0], 'user.streamfs.persist', b'1')",
    "persist by its other name": "os.setxattr(A[0], 'user.persist', b'1')",
    "remove an attribute": "os.removexattr(A[0], 'user.streamfs.persist')",
    "unlink": "os.unlink(A[0])",
    "rename": "os.rename(A[0], A[0] + 'x')",
    "rename the folder": "os.rename(os.path.dirname(A[0]), os.path.dirname(A[0]) + 'x')",
    "rename over": "os.rename(A[0], os.path.dirname(A[0]) + '/other')",
    "rmdir": "os.rmdir(os.path.dirname(A[0]))",
    "rmdir what is empty": "os.rmdir(os.path.dirname(A[0]) + '/empty')",
    "create": "os.open(os.path.dirname(A[0]) + '/new', os.O_WRONLY | os.O_CREAT)",
    "mkdir": "os.mkdir(os.path.dirname(A[0]) + '/new')",
    "link": "os.link(A[0], os.path.dirname(A[0]) + '/new')",
    "symlink": "os.symlink('x', os.path.dirname(A[0]) + '/new')",
    "register": "os.symlink('http://127.0.0.1:9/x', os.path.dirname(A[0]) + '/new')",
    "the socket": "socket.socket(socket.AF_UNIX).connect(A[2] + '/run/control.sock')",
    "the cache": "os.listdir(A[2] + '/cache')",
}


@needs_root
@pytest.mark.parametrize("call", DENIED_BESIDES_READING)
def test_with_allow_other_another_user_changes_nothing(call: str, shared: Posix) -> None:
    path = _shared_file(shared)
    assert outcome(DENIED_BESIDES_READING[call], path, STRANGER, shared.fs.home, uid=STRANGER) in ("EACCES", "EPERM")
    assert shared.names() == {b"folder/file", b"folder/other"}
    assert sorted(os.listdir(path.parent)) == ["empty", "file", "other"]
    assert shared.fs.xattr("folder/file", "persist") == "0"


def _shared_file(shared: Posix) -> Path:
    path = shared.mountpoint / "folder" / "file"
    if not path.exists():
        shared.file("folder/file", DATA)
        shared.file("folder/other", DATA)
        os.unlink(shared.file("folder/empty/file", DATA))
    return path


@needs_root
def test_with_allow_other_another_user_reads(shared: Posix) -> None:
    path = _shared_file(shared)
    assert outcome("pathlib.Path(A[0]).read_bytes()", path, uid=STRANGER) == DATA.hex()
    assert outcome("os.stat(A[0]).st_size", path, uid=STRANGER) == len(DATA)
    assert outcome("sorted(os.listdir(A[0]))", path.parent, uid=STRANGER) == ["empty", "file", "other"]
    assert outcome("os.getxattr(A[0], 'user.streamfs.persist')", path, uid=STRANGER) == b"0".hex()


# Registering is running code


@pytest.mark.parametrize("name", ["source", "command", "url", "shell", "argv", "options", "refresh_command"])
def test_no_attribute_registers_or_changes_a_source(name: str, posix: Posix) -> None:
    path = posix.file(f"attributes-{name}", DATA)
    touched = posix.folder / "touched"
    source = posix.fs.xattr(path.name, "source")
    before = posix.names()
    for where in (path, posix.mountpoint):
        for attribute in (f"user.streamfs.{name}", f"user.{name}", f"trusted.{name}"):
            with fails(errno.EACCES, errno.ENODATA, errno.EPERM):
                os.setxattr(where, attribute, f"touch {shlex.quote(str(touched))}".encode())
    for value in (b"yes", b"2", b"", b"touch /x", b"1" * 60000):
        with fails(errno.EINVAL):
            os.setxattr(path, "user.streamfs.persist", value)
    assert posix.names() == before
    assert posix.fs.xattr(path.name, "source") == source
    assert not touched.exists()


METACHARACTERS = [
    *("$(touch X)", "`touch X`", "; touch X", "| touch X", "&& touch X", "|| touch X", "& touch X", "> X", ">> X"),
    *("$HOME", "${IFS}", "*", "?", "[a-z]", "~", "'; touch X; '", '"; touch X; "', "\\", "\n touch X\n", "#", "!"),
    *("%s%n", "-c", "--", "-n", "", " ", "\t", "{a,b}", "<(touch X)", "A=B", "\x01\x02", "\u2028touch X"),
]


def test_shell_metacharacters_in_a_command_are_inert(posix: Posix) -> None:
    trap = posix.folder / "trap"
    trap.mkdir()
    words = [word.replace("X", str(trap / "sprung")) for word in METACHARACTERS]
    path = posix.command("inert", "printf", "%s\\0", *words)
    assert path.read_bytes() == b"".join(word.encode() + b"\0" for word in words)
    posix.fs.run("add", "inert-cli", "--", "printf", "%s\\0", *words)
    assert (posix.mountpoint / "inert-cli").read_bytes() == path.read_bytes()
    for number, word in enumerate(words):
        with contextlib.suppress(StreamfsError):  # names with "/" or empty ones
            posix.add(f"inert-{number}{word}", CommandSource(("echo", "x")), cwd=str(trap), env={"V": word})
    for name in posix.names():
        if name.startswith(b"inert-"):
            (posix.mountpoint / os.fsdecode(name)).read_bytes()
    assert not any(trap.iterdir())
    # ... and a shell, where one is asked for, is one.
    posix.add("shell", ShellSource(f"touch {shlex.quote(str(trap / 'asked'))}; echo done"))
    assert (posix.mountpoint / "shell").read_bytes() == b"done\n"
    assert (trap / "asked").exists()


# Modes and owners


def test_everything_is_for_the_owner_alone_whatever_the_umask(place: Path) -> None:
    fs = Mounted(place)
    try:
        done = subprocess.run(
            [*CLI, "mount", str(fs.mountpoint), "--spill-threshold", "64KiB"],
            env=fs.environment, umask=0, stdin=subprocess.DEVNULL, capture_output=True, timeout=WAIT, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        fs._daemons.append(fs.pid)
        original = place / "original"
        original.write_bytes(DATA * 10)
        for name, source in (("file", original.as_uri()), ("kept", original.as_uri())):
            subprocess.run([*CLI, "add", name, source], env=fs.environment, umask=0, timeout=WAIT, check=True)
        with open(fs.mountpoint / "file", "rb") as file:
            assert file.read() == DATA * 10
            os.setxattr(fs.mountpoint / "kept", "user.streamfs.persist", b"1")
            fs.wait_for_state("kept", "complete")
            wait_for(lambda: len(fs.data_files) == 2, "both are on disk")
            modes = {path: path.lstat().st_mode for path in (fs.home, *fs.home.rglob("*"))}
        assert {path.name for path in modes} >= {"daemon.log", "catalog.db", "control.sock", "lock", "cache", "state"}
        wrong = {
            str(path): oct(mode)
            for path, mode in modes.items()
            if stat.S_IMODE(mode) != (0o700 if stat.S_ISDIR(mode) else 0o600)
        }
        assert not wrong
    finally:
        fs.close()


def test_the_daemon_leaves_no_core(posix: Posix) -> None:
    limits = Path(f"/proc/{posix.fs.pid}/limits").read_text()
    (line,) = [line for line in limits.splitlines() if line.startswith("Max core file size")]
    assert line.split()[4:6] == ["0", "0"]
    # A core_pattern that is a pipe pays no heed to the limit: what is dumped there holds no memory.
    assert int(Path(f"/proc/{posix.fs.pid}/coredump_filter").read_text(), 16) == 0


@needs_root
@pytest.mark.parametrize("part", ["home", "home/cache", "home/state", "home/run", "home/config"])
@pytest.mark.parametrize("kind", ["foreign", "foreign-link", "writable"])
def test_an_unsafe_home_is_refused(kind: str, part: str, place: Path, unsafe: Mounted) -> None:
    (place / "home").mkdir(0o700) if part != "home" else None
    path = place / part
    if kind == "foreign-link":
        (place / "mine").mkdir(0o700)
        path.symlink_to(place / "mine")
        os.lchown(path, STRANGER, STRANGER)
    else:
        path.mkdir(0o700)
        if kind == "foreign":
            os.chown(path, STRANGER, STRANGER)
        else:
            path.chmod(0o777)
    for arguments in (("mount", unsafe.mountpoint), ("add", "x", "--", "true"), ("ls",)):
        assert str(path) in unsafe.refused(*arguments)
    assert not list((place / "mine").iterdir() if kind == "foreign-link" else path.iterdir())


@needs_root
@pytest.mark.parametrize("kind", ["foreign", "foreign-link", "writable", "readable", "below-foreign", "file"])
def test_an_unsafe_cache_directory_is_refused(kind: str, place: Path, unsafe: Mounted) -> None:
    path = place / "elsewhere"
    if kind == "foreign-link":
        (place / "mine").mkdir(0o700)
        path.symlink_to(place / "mine")
        os.lchown(path, STRANGER, STRANGER)
    elif kind == "below-foreign":
        path.mkdir()
        path.chmod(0o777)
        path = path / "cache"
        path.mkdir(0o700)
    elif kind == "file":
        path.write_bytes(b"")
    else:
        path.mkdir(0o700)
        path.chmod({"writable": 0o777, "readable": 0o755}.get(kind, 0o700))
        if kind == "foreign":
            os.chown(path, STRANGER, STRANGER)
    told = unsafe.refused("mount", unsafe.mountpoint, "--cache-dir", path)
    assert str(place / "elsewhere") in told


def test_a_missing_cache_directory_is_made_for_the_owner_alone(place: Path) -> None:
    fs = Mounted(place)
    try:
        fs.mount("--cache-dir", str(place / "a" / "b"))
        assert [stat.S_IMODE((place / name).stat().st_mode) for name in ("a", "a/b")] == [0o700, 0o700]
    finally:
        fs.close()


# Names

LONGEST = b"/".join([b"y" * 255] * 16)  # 4095 bytes
PARTS = st.one_of(
    st.binary(min_size=0, max_size=12),
    st.text(max_size=8).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.sampled_from([b".", b"..", b"...", b"", b"a" * 255, b"a" * 256, "é".encode() * 128, b"\0", b"\n", b"-", b"a b"]),
)
NAMES = st.lists(PARTS, min_size=1, max_size=5).map(b"/".join) | st.sampled_from(
    [b"/" + b"x", b"x/", b"a//b", b"b/" * 40 + b"c", b"../../etc/passwd", LONGEST, LONGEST + b"/z"]
)


def _possible(name: bytes) -> bool:
    """What the rules of names say, written down once more."""
    parts = name.split(b"/")
    proper = all(part not in (b"", b".", b"..") and len(part) <= 255 for part in parts)
    return proper and b"\0" not in name and len(name) <= 4095


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(names=st.lists(NAMES, min_size=1, max_size=6), moves=st.lists(st.tuples(st.integers(0, 5), NAMES), max_size=4))
def test_a_name_is_refused_or_shown_exactly(names: list[bytes], moves: list[tuple[int, bytes]], posix: Posix) -> None:
    posix.remove(*(os.fsdecode(name) for name in posix.names()))
    shown: set[bytes] = set()
    for name in names:
        try:
            posix.call("add", spec=StreamSpec(name=os.fsdecode(name), source=CommandSource(("true",))))
        except AlreadyExists:
            assert _in_the_way(name, shown)
        except InvalidRequest as error:
            assert not _possible(name)
            assert "\n" not in str(error) and str(error)
        else:
            assert _possible(name)
            shown.add(name)
        assert _walked(posix, shown) == shown
    for index, new in moves:
        old = names[index % len(names)]
        try:
            posix.call("rename", old=os.fsdecode(old), new=os.fsdecode(new))
        except (AlreadyExists, NotFound, InvalidRequest):
            pass
        else:
            assert _possible(new)
            moved = {name for name in shown if name == old or name.startswith(old + b"/")}
            shown = (shown - moved) | {new + name[len(old) :] for name in moved}
        assert _walked(posix, shown) == shown
    for name in names:
        with contextlib.suppress(NotFound, InvalidRequest):
            posix.remove(os.fsdecode(name))
            shown.remove(name)
    assert _walked(posix, shown) == shown


def _in_the_way(name: bytes, shown: set[bytes]) -> bool:
    return any(other == name or other.startswith(name + b"/") or name.startswith(other + b"/") for other in shown)


def _walked(posix: Posix, expected: set[bytes]) -> set[bytes]:
    """What the mount shows. Names too deep for a path of PATH_MAX below the mountpoint are believed."""
    room = 4000 - len(os.fsencode(posix.mountpoint))
    return posix.names() | {name for name in expected if len(name) > room}


@pytest.fixture
def cli(posix: Posix, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("STREAMFS_HOME", str(posix.fs.home))
    yield


@pytest.mark.usefixtures("cli")
@pytest.mark.parametrize(
    "name",
    [b"", b".", b"..", b"a/..", b"./a", b"a/./b", b"/a", b"a/", b"a//b", b"n\0l", b"x" * 256, b"x/" * 2048 + b"x"],
    ids=lambda name: repr(name)[:20],
)
def test_the_command_line_refuses_a_name_that_cannot_be(
    name: bytes, posix: Posix, capsys: pytest.CaptureFixture[str]
) -> None:
    before = posix.names()
    text = os.fsdecode(name)
    posix.file("there", b"x") if b"there" not in before else None
    for arguments in (["add", text, "--", "true"], ["rm", "--", text], ["mv", "there", text]):
        assert main(arguments) in (1, 2)
        told = capsys.readouterr().err
        assert told.startswith("streamfs: ") and len(told.splitlines()) == 1
    assert posix.names() == before | {b"there"}


@pytest.mark.usefixtures("cli")
@pytest.mark.parametrize("name", [b"caf\xe9", b"new\nline", b" ", b"$(id)", b"x" * 255, b"d/" * 50 + b"x"])
def test_the_command_line_takes_any_name_that_can_be(
    name: bytes, posix: Posix, capfd: pytest.CaptureFixture[str]
) -> None:
    text = os.fsdecode(name)
    assert main(["add", text, "--", "true"]) == 0
    assert name in posix.names()
    assert main(["mv", "--", text, "plain name"]) == 0
    assert main(["mv", "--", "plain name", text]) == 0
    assert name in posix.names()
    assert main(["ls", "--json"]) == 0
    told = capfd.readouterr().out
    assert name in {os.fsencode(row["name"]) for row in json.loads(told)["streams"]}
    assert main(["rm", "--", text]) == 0
    assert name not in posix.names()


# Redirects and addresses


@pytest.mark.parametrize(
    "target",
    [
        "file:///etc/passwd", "file://localhost/etc/passwd", "FILE:///etc/passwd", "ftp://127.0.0.1/x",
        "sftp://127.0.0.1/x", "ftps://127.0.0.1/x", "gopher://127.0.0.1/x", "data:,x", "javascript:1", "dict://x/",
        "//", "http://", "http://[::1", "http://127.0.0.1:99999/", "http://127.0.0.1:0/",
    ],
)  # fmt: skip
def test_a_redirect_to_anything_but_http_is_refused(target: str, posix: Posix, redirector: Redirector) -> None:
    name = f"redirected-{quote(target, safe='')}"
    path = posix.add(name, UrlSource(f"{redirector.url}/to/{quote(target, safe='')}"), probe=False)
    with fails(errno.EACCES, errno.EIO):
        path.read_bytes()
    assert len(redirector.paths) == 1
    assert "root:" not in (posix.fs.xattr(name, "error") or "")
    posix.remove(name)


@pytest.mark.parametrize(("hops", "works"), [(1, True), (5, True), (6, False), (50, False)])
def test_at_most_five_redirects_are_followed(hops: int, works: bool, posix: Posix, redirector: Redirector) -> None:
    path = posix.add(f"hops-{hops}", UrlSource(f"{redirector.url}/hops/{hops}"), probe=False)
    if works:
        assert path.read_bytes() == BODY
    else:
        with fails(errno.EIO):
            path.read_bytes()
        assert len(redirector.paths) == 6
        assert "redirects" in (posix.fs.xattr(path.name, "error") or "")
    posix.remove(path.name)


def test_a_loop_of_redirects_ends(posix: Posix, redirector: Redirector) -> None:
    path = posix.add("loop", UrlSource(f"{redirector.url}/loop"), probe=False)
    with fails(errno.EIO):
        path.read_bytes()
    assert len(redirector.paths) == 2
    assert "loop" in (posix.fs.xattr("loop", "error") or "")


def test_a_private_url_may_redirect_to_private_addresses(posix: Posix, redirector: Redirector) -> None:
    for number, host in enumerate(("2130706433", "0x7f000001", "017700000001", "127.1", "[::ffff:127.0.0.1]")):
        target = f"http://{host}:{redirector.port}/body"
        path = posix.add(f"dress-{number}", UrlSource(f"{redirector.url}/to/{quote(target, safe='')}"), probe=False)
        assert path.read_bytes() == BODY


async def _read_through(
    url: str, answers: dict[str, list[list[str]]], monkeypatch: pytest.MonkeyPatch, **options: bool
) -> bytes:
    """The bytes of `url`, where 127.0.0.1 counts as public, and names have the addresses `answers` gives, one list
    at each look, the last for good."""
    truly, truly_resolve = addresses.is_private, addresses.Resolver.resolve
    monkeypatch.setattr(addresses, "is_private", lambda address: address != "127.0.0.1" and truly(address))

    async def resolve(self: addresses.Resolver, url: str) -> list[str]:
        await trio.lowlevel.checkpoint()
        host = addresses.Origin.of(url).host
        if host not in answers:
            return await truly_resolve(self, url)
        return answers[host].pop(0) if len(answers[host]) > 1 else answers[host][0]

    monkeypatch.setattr(addresses.Resolver, "resolve", resolve)
    spec = StreamSpec(name="x", source=UrlSource(url))
    spec = StreamSpec(name="x", source=spec.source, options=type(spec.options)(**options))  # type: ignore[arg-type]
    async with Transports() as transports:
        body = await make_source(spec, transports).open(0, None, None)
        received, piece = bytearray(), memoryview(bytearray(65536))
        try:
            while count := await body.receive_into(piece):
                received += piece[:count]
        finally:
            await body.aclose()
    return bytes(received)


PRIVATE = ["127.0.0.2", "10.0.0.1", "169.254.169.254", "::1", "::ffff:10.0.0.1", "fe80::1", "100.64.0.1", "0.0.0.0"]


@pytest.mark.parametrize("address", PRIVATE)
async def test_a_public_url_reaches_no_private_address_by_a_name(
    address: str, redirector: Redirector, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"http://public.test:{redirector.port}/to/" + quote("http://inner.test:9/x", safe="")
    with pytest.raises(NotPermitted):
        await _read_through(url, {"public.test": [["127.0.0.1"]], "inner.test": [[address]]}, monkeypatch)
    assert len(redirector.paths) == 1


@pytest.mark.parametrize(
    "host",
    ["127.0.0.2", "2130706434", "0x7f000002", "017700000002", "127.2", "0x7f.2", "[::ffff:7f00:2]", "[::1]", "0"],
)
async def test_a_public_url_reaches_no_private_address_however_it_is_written(
    host: str, redirector: Redirector, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"http://public.test:{redirector.port}/to/" + quote(f"http://{host}:9/x", safe="")
    with pytest.raises(NotPermitted):
        await _read_through(url, {"public.test": [["127.0.0.1"]]}, monkeypatch)
    assert len(redirector.paths) == 1


async def test_a_name_that_changes_its_address_in_between_gains_nothing(
    redirector: Redirector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rebinding: public when it is first looked at, private at the next look."""
    url = f"http://public.test:{redirector.port}/to/" + quote(f"http://other.test:{redirector.port}/hops/2", safe="")
    answers = {"public.test": [["127.0.0.1"]], "other.test": [["127.0.0.1"], ["127.0.0.2"]]}
    with pytest.raises(NotPermitted):
        await _read_through(url, answers, monkeypatch)
    assert redirector.paths[-1] == "/hops/2"


async def test_a_public_name_with_a_private_address_besides_stays_public(
    redirector: Redirector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else whoever answers for the name could open the way to every private address."""
    mixed = {"public.test": [["127.0.0.1", "10.0.0.1"]], "inner.test": [["127.0.0.2"]]}
    url = f"http://public.test:{redirector.port}/to/" + quote("http://inner.test:9/x", safe="")
    with pytest.raises(NotPermitted):
        await _read_through(url, mixed, monkeypatch)
    assert await _read_through(f"http://public.test:{redirector.port}/hops/3", mixed, monkeypatch) == BODY


# Secrets


def test_no_secret_shows_anywhere(place: Path, redirector: Redirector) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, but nobody listens
        dead = f"127.0.0.1:{closed.getsockname()[1]}"
        secret_files = {
            "netrc": f"machine 127.0.0.1 login user password {CANARY}\n",
            "broken.netrc": f"machine 127.0.0.1 login user passwort {CANARY}\n",
            "cookies": f"# Netscape HTTP Cookie File\n127.0.0.1\tFALSE\t/\tFALSE\t0\tsession\t{CANARY}\n",
            "broken.cookies": f"{CANARY}\n",
        }
        for name, text in secret_files.items():
            (place / name).write_text(text)
        posix = Posix()
        try:
            _register_secrets(posix, place, redirector, dead)
            _check_secrets(posix)
        finally:
            posix.close()


def _register_secrets(posix: Posix, place: Path, redirector: Redirector, dead: str) -> None:
    here = redirector.url.removeprefix("http://")
    urls: dict[str, tuple[str, dict[str, object]]] = {}
    for place_name, address in (("works", here), ("refused", dead)):
        urls |= {
            f"{place_name}-userinfo": (f"http://user:{CANARY}@{address}/body", {}),
            f"{place_name}-user": (f"http://{CANARY}@{address}/body", {}),
            f"{place_name}-query": (f"http://{address}/body?token={CANARY}&{CANARY}", {}),
            f"{place_name}-fragment": (f"http://{address}/body#{CANARY}", {}),
            f"{place_name}-header": (f"http://{address}/body", {"headers": (("X-Token", CANARY),)}),
            f"{place_name}-bearer": (f"http://{address}/body", {"headers": (("Authorization", CANARY),)}),
            f"{place_name}-cookie": (f"http://{address}/body", {"cookie_file": str(place / "cookies")}),
            f"{place_name}-netrc": (f"http://{address}/body", {"netrc": str(place / "netrc")}),
            f"{place_name}-bad-cookie": (f"http://{address}/body", {"cookie_file": str(place / "broken.cookies")}),
            f"{place_name}-bad-netrc": (f"http://{address}/body", {"netrc": str(place / "broken.netrc")}),
            f"{place_name}-proxy": ("http://192.0.2.1/x", {"proxy": f"http://user:{CANARY}@{address}"}),
            f"{place_name}-socks": ("http://192.0.2.1/x", {"proxy": f"socks5h://user:{CANARY}@{address}"}),
            f"{place_name}-loop": (f"http://user:{CANARY}@{address}/loop?token={CANARY}", {}),
            f"{place_name}-to-file": (f"http://{address}/to/file%3A%2F%2F%2Fx?t={CANARY}", {}),
            f"{place_name}-refresh": (f"http://{address}/to/x%3A?t={CANARY}", {"refresh_command": ("echo", CANARY)}),
        }
    for scheme in ("ftp", "ftps", "sftp", "https"):
        urls[f"refused-{scheme}"] = (f"{scheme}://user:{CANARY}@{dead}/x", {})
    urls["missing-file"] = (f"file:///nonexistent?token={CANARY}", {})
    for name, (url, options) in urls.items():
        posix.add(name, UrlSource(url), stall_timeout=5.0, **options)
    posix.add("env", CommandSource(("sh", "-c", "echo ready; exec sleep 60")), env={"TOKEN": CANARY})
    posix.add("env-fails", CommandSource(("false",)), env={"TOKEN": CANARY})
    posix.add("argument", CommandSource(("false", f"https://user:{CANARY}@h.test/?t={CANARY}")))
    with ThreadPoolExecutor(16) as readers:
        list(readers.map(_try_to_read, (posix.mountpoint / name for name in (*urls, "env-fails", "argument"))))


def _try_to_read(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.read_bytes()


def _check_secrets(posix: Posix) -> None:
    with open(posix.mountpoint / "env", "rb", buffering=0) as running:
        assert running.read(6) == b"ready\n"
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                assert CANARY.encode() not in (folder / "cmdline").read_bytes(), folder
        assert CANARY.encode() not in Path(f"/proc/{posix.fs.pid}/environ").read_bytes()
    shown = {"log": posix.fs.log}
    for name in sorted(os.listdir(posix.mountpoint)):
        path = posix.mountpoint / name
        for attribute in os.listxattr(path):
            shown[f"{name} {attribute}"] = os.getxattr(path, attribute).decode()
    for arguments in (("ls",), ("ls", "-l"), ("ls", "--json"), ("status",), ("status", "--json"), ("doctor",), *SAVES):
        done = posix.fs.run(*arguments, check=False)
        shown[" ".join(arguments)] = done.stdout + done.stderr
    shown |= {
        path.name: path.read_bytes().decode("latin-1") for path in (posix.fs.home / "run").iterdir() if path.is_file()
    }
    assert any("works-userinfo" in text for where, text in shown.items() if "board" in where)
    assert any("user.streamfs.error" in where for where in shown)
    assert [where for where, text in shown.items() if CANARY in text] == []


SAVES = [("save", name, os.devnull) for name in ("refused-query", "refused-ftp", "works-loop", "refused-proxy")]
BAD_USAGE: list[list[str]] = [
    ["add", "x", f"http://user:{CANARY}@[bad/"],
    ["add", "x", f"http://user:{CANARY}@host:port/?t={CANARY}"],
    ["add", "x", f"http://user:{CANARY}@host:0/?t={CANARY}"],
    ["add", "x", f"http://user:{CANARY}@/?t={CANARY}"],
    ["add", "x", f"http://user:{CANARY}@host/ ?t={CANARY}"],
    ["add", "x", f"gopher://user:{CANARY}@host/?t={CANARY}"],
    ["add", "x", f"file://user:{CANARY}@host/?t={CANARY}"],
    ["add", "x", f"file:relative?t={CANARY}"],
    ["add", "x", f"//user:{CANARY}@host/?t={CANARY}"],
    ["add", "x", "http://h.test/", "--header", f"Not A Header: {CANARY}"],
    ["add", "x", "http://h.test/", "--header", f"{CANARY}"],
    ["add", "x", "http://h.test/", "--header", f"X-Token: {CANARY}\x01"],
    ["add", "x", "http://h.test/", "--proxy", f"gopher://user:{CANARY}@host"],
    ["add", "x", "http://h.test/", "--proxy", f"http://user:{CANARY}@host:port"],
    ["add", "x", "--env", f"={CANARY}", "--", "true"],
    ["add", "x", "--env", f"{CANARY}", "--", "true"],
    ["add", "x", "--env", f"T={CANARY}", "http://h.test/"],
]


@pytest.mark.usefixtures("cli")
@pytest.mark.parametrize("arguments", BAD_USAGE, ids=range(len(BAD_USAGE)))
def test_no_error_of_the_command_line_quotes_a_secret(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    told = capsys.readouterr()
    assert told.err.startswith("streamfs: ")
    assert CANARY not in told.err + told.out
