"""Sentences of docs/semantics.md that no other test proves, without a mount."""

from __future__ import annotations

import getpass
from pathlib import Path

import pytest
import trio

from streamfs import filesystem
from streamfs.errors import CommandFailed, StreamfsError
from streamfs.sources import Transports, make_source
from streamfs.sources.base import Source
from streamfs.spec import StreamOptions, StreamSpec, UrlSource
from streamfs.stream import FRESH
from tests import servers
from tests.fakes import data_on_disk
from tests.sourcefakes import KIB, MIB, Origin, a_filesystem, a_house, spec_of, until

SSH_FILE = bytes(range(256)) * 1000


async def read_all(stream_filesystem: filesystem.FileSystem, name: str) -> bytes:
    opened = await stream_filesystem.open_named(name)
    found = bytearray()
    try:
        while piece := await stream_filesystem.read(opened.handle, len(found), MIB):
            found += piece
    finally:
        stream_filesystem.release(opened.handle)
    return bytes(found)


@pytest.mark.parametrize("more", [0, 1])
async def test_streams_added_without_a_daemon_are_asked_at_its_start_unless_they_are_many(
    more: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystem, "PROBES_AT_START", 3)
    names = [f"s{number}" for number in range(3 + more)]
    served = {name: Origin(name, size=4321) for name in names}
    async with a_filesystem(tmp_path, served) as fs:
        await fs.add([spec_of(name, probe=True) for name in names], probe=False)
    assert [origin.probes for origin in served.values()] == [0] * len(names)
    async with a_filesystem(tmp_path, served) as fs:
        if more:
            await read_all(fs, "s0")  # whatever runs at the start has begun by now
            assert [origin.probes for origin in list(served.values())[1:]] == [0] * (len(names) - 1)
        else:
            await until(lambda: all(row["size"] == 4321 for row in fs.streams()))
        assert all(origin.opens == [] for origin in list(served.values())[1:])


async def test_the_version_is_not_asked_for_while_somebody_has_it_open_and_the_answer_is_fresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = Origin()
    async with a_house(tmp_path) as house:
        stream = house.stream(origin)
        first = await stream.open()
        for _ in range(3):
            (await stream.open()).close()
        assert origin.probes == 0
        first.generation.validated -= FRESH + 0.1
        (await stream.open()).close()
        assert origin.probes == 1
        first.close()
        (await stream.open()).close()  # nobody had it open
        assert origin.probes == 2


@pytest.mark.parametrize("kind", ["ranged url", "command", "url without versions"])
async def test_only_a_partial_recording_of_a_ranged_url_with_a_version_survives_an_orderly_restart(
    kind: str, tmp_path: Path
) -> None:
    ranged, command = kind == "ranged url", kind == "command"
    origin = Origin("x", size=8 * MIB, ranged=ranged, told=not command, named=ranged)
    limits = {"spill_threshold": 256 * KIB, "read_ahead": MIB}
    async with a_filesystem(tmp_path, {"x": origin}, **limits) as fs:
        await fs.add([spec_of("x", command=command)])
        opened = await fs.open_named("x")
        for offset in range(0, 4 * MIB, 64 * KIB):
            await fs.read(opened.handle, offset, 64 * KIB)
        await until(lambda: _on_disk(tmp_path) > 0)
        fs.release(opened.handle)
    first = origin.sent
    async with a_filesystem(tmp_path, {"x": origin}, **limits) as fs:
        assert await read_all(fs, "x") == origin.content()
    again = origin.sent - first
    assert again < origin.size if ranged else again == origin.size


@pytest.mark.parametrize("how", ["plain", "persisted", "windowed", "eager", "url"])
async def test_what_a_killed_daemon_left_of_a_commands_run_is_a_finished_generation(how: str, tmp_path: Path) -> None:
    """Its bytes are read, its end is an error, and only an eviction starts another run. Who asked for the whole, for
    what is live, or for a start with the daemon gets the new run at once."""
    command = how != "url"
    first = Origin("x", size=8 * MIB, ranged=False, told=False, named=False)
    options = {"window": "4MiB"} if how == "windowed" else {"eager": True} if how == "eager" else {}
    limits = {"spill_threshold": 256 * KIB, "read_ahead": MIB}
    async with a_filesystem(tmp_path, {"x": first}, **limits) as fs:
        await fs.add([spec_of("x", command=command, **options)])
        opened = await fs.open_named("x")
        number = _number(fs)
        for offset in range(0, 4 * MIB, 64 * KIB):
            await fs.read(opened.handle, offset, 64 * KIB)
        await until(lambda: _on_disk(tmp_path) > 0)
        await until(lambda: fs._streams[2].generation.buffer.memory < MIB)
        left = {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
        fs.release(opened.handle)
        if how == "persisted":
            first.stalls[5 * MIB] = trio.Event()
            await fs.persist("x", True)
    for path, data in left.items():
        path.write_bytes(data)  # as after kill -9: nobody put it in order
    second = Origin("x", size=8 * MIB, ranged=False, told=False, named=False, version=2)
    async with a_filesystem(tmp_path, {"x": second}, **limits) as fs:
        if how != "plain":
            assert await read_all(fs, "x") == second.content()
            assert _number(fs) > number, "a number was used twice"
            return
        for _ in range(2):
            opened = await fs.open_named("x")
            kept = next(iter(fs.streams()))["buffered"]
            assert kept >= MIB
            assert bytes(await fs.read(opened.handle, 0, kept)) == first.content()[:kept]
            for _ in range(2):
                with pytest.raises(CommandFailed, match="evict"):
                    await fs.read(opened.handle, kept, 1)
            fs.release(opened.handle)
        assert next(iter(fs.streams()))["state"] == "failed"
        assert _number(fs) == number
        assert second.opens == []
        fs.evict("x")
        assert await read_all(fs, "x") == second.content()
        assert _number(fs) > number, "a number was used twice"


async def test_numbers_of_runs_are_not_used_again_though_the_run_before_was_evicted_unread(tmp_path: Path) -> None:
    origin = Origin("x", size=2 * MIB, ranged=False, told=False, named=False)
    async with a_filesystem(tmp_path, {"x": origin}, spill_threshold=256 * KIB) as fs:
        await fs.add([spec_of("x", command=True)])
        for number in (1, 2):
            assert await read_all(fs, "x") == origin.content()
            assert _number(fs) == number
            await until(lambda: _on_disk(tmp_path) > 0)
            left = {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
            fs.evict("x")
            await fs.removed()
    for path, data in left.items():
        path.write_bytes(data)
    async with a_filesystem(tmp_path, {"x": origin}) as fs:
        fs.evict("x")
        assert await read_all(fs, "x") == origin.content()
        assert _number(fs) == 3


def _number(fs: filesystem.FileSystem) -> int:
    return next(iter(fs.streams()))["generation"]


def _on_disk(home: Path) -> int:
    """Bytes of data that went to disk."""
    return data_on_disk(home / "cache")


# sftp


def sftp_source(server: servers.Server, transports: Transports, home: Path) -> Source:
    url = f"sftp://{getpass.getuser()}@127.0.0.1:{server.port}{home}/file.bin"
    options = StreamOptions(key=str(server.files["key"]), stall_timeout=10.0)
    return make_source(StreamSpec(name="s", source=UrlSource(url), options=options), transports)


@pytest.mark.parametrize("known", ["known", "unknown", "changed"])
async def test_an_sftp_host_is_believed_only_by_its_known_key(
    known: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file.bin").write_bytes(SSH_FILE)
    with servers.sshd(tmp_path) as server:
        hosts = tmp_path / "hosts"
        right = server.files["known_hosts"].read_text()
        stranger = server.files["stranger"].with_suffix(".pub").read_text().split()
        line = f"[127.0.0.1]:{server.port} {stranger[0]} {stranger[1]}\n"
        hosts.write_text({"known": right, "unknown": "", "changed": line}[known])
        monkeypatch.setenv("STREAMFS_KNOWN_HOSTS", str(hosts))
        async with Transports() as transports:
            source = sftp_source(server, transports, tmp_path)
            if known == "known":
                assert await _first_bytes(source) == SSH_FILE[: 64 * KIB]
            else:
                with pytest.raises(StreamfsError, match="key"):
                    await _first_bytes(source)
            await source.aclose()


async def _first_bytes(source: Source) -> bytes:
    with trio.fail_after(30):
        body = await source.open(0, None, None)
        view, filled = memoryview(bytearray(64 * KIB)), 0
        try:
            while filled < len(view) and (count := await body.receive_into(view[filled:])):
                filled += count
        finally:
            await body.aclose()
    return bytes(view[:filled])
