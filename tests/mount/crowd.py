"""Many readers that are blocked on as many stalled streams, and what goes on beside them.

Run as a program, so that it can be run as another user: it mounts, starts the readers, does everything that must go
on, and prints one JSON object with what that took. It fails where anything does not go on. No time is judged here.

    python -m tests.mount.crowd --folder DIR --count 200 --mode cached
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from streamfs.catalog import Catalog
from streamfs.control.client import Client
from streamfs.home import Home
from streamfs.spec import CommandSource, StreamOptions, StreamSpec, UrlSource
from tests.faults.origin import content
from tests.mount.mounted import Mounted, checked, is_alive, wait_for

MIB = 1 << 20
SIZE = 2 * 10**6
"""Bytes a stalled reply declares."""
HEALTHY = 32 * MIB
ROUNDS = 100

Mode = Literal["cached", "direct"]


class StallingOrigin:
    """Replies with a head that declares the length, and then never a byte; any number of connections, one thread.
    Paths under /plays/ are served in full."""

    def __init__(self) -> None:
        self.requests = 0
        self.sent = 0
        """Bytes of body that clients asked for and got."""
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), name="origin")
        self._thread.start()
        self._ready.wait()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=4096)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        connections = asyncio.all_tasks(self._loop) - {asyncio.current_task(self._loop)}
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                self.requests += 1
                path = head.split(" ")[1].strip("/")
                asked = re.search(r"ange: bytes=(\d+)-(\d*)", head)
                start, stop = (int(asked[1]), min(int(asked[2] or SIZE) + 1, SIZE)) if asked else (0, SIZE)
                status = f"206 Part\r\nContent-Range: bytes {start}-{stop - 1}/{SIZE}" if asked else "200 OK"
                writer.write(f'HTTP/1.1 {status}\r\nContent-Length: {stop - start}\r\nETag: "1"\r\n\r\n'.encode())
                if path.startswith("plays/"):
                    self.sent += stop - start
                    writer.write(content(path, 0, start, stop))
                    await writer.drain()
                else:
                    await reader.read()  # until the client leaves
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}/{path}"

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()


class Crowd:
    """A mount with `count` stalled streams, s/0, s/1, …, and a healthy one."""

    def __init__(self, folder: Path, count: int, mode: Mode) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self.count = count
        self.readers: list[subprocess.Popen[bytes]] = []
        self.healthy = folder / "healthy"
        self.healthy.write_bytes(content("healthy", 0, 0, HEALTHY))
        self.origin = StallingOrigin()
        self.fs = Mounted(folder)
        self._register(mode)

    def _register(self, mode: Mode) -> None:
        quiet = StreamOptions(probe=False, stall_timeout=3600.0)  # or a slow machine sees them time out
        specs = [StreamSpec(name="ok/healthy", source=UrlSource(url=self.healthy.as_uri()))]
        for number in range(self.count):
            name = f"s/{number}"
            if mode == "cached":
                specs.append(StreamSpec(name=name, source=UrlSource(url=self.origin.url(name)), options=quiet))
            else:
                specs.append(StreamSpec(name=name, source=CommandSource(argv=("sleep", "100000"))))
        register(self.fs.home, specs)

    def block(self) -> None:
        """Start a reader for each stalled stream, and wait until all of them wait for bytes."""
        for number in range(self.count):
            path = self.fs.mountpoint / "s" / str(number)
            self.readers.append(self.fs.start(["cat", path], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        with self.client() as client:
            wait_for(lambda: self._blocked(client) == self.count, f"{self.count} blocked readers", within=120)

    @staticmethod
    def _blocked(client: Client) -> int:
        return sum(row["readers"] for row in client.call("list") if row["name"].startswith("s/"))

    @contextlib.contextmanager
    def client(self) -> Iterator[Client]:
        home = self.fs.home
        with Client(Home(home / "config", home / "state", home / "cache", home / "run", home).socket_path) as client:
            yield client

    def all_still_blocked(self) -> bool:
        return all(reader.poll() is None for reader in self.readers)

    def close(self) -> None:
        for reader in self.readers:
            reader.kill()
        self.fs.close()
        self.origin.stop()
        self.healthy.unlink(missing_ok=True)


def register(home: Path, specs: list[StreamSpec]) -> None:
    """Put streams into the catalogue of a home where no daemon runs."""
    place = Home(home / "config", home / "state", home / "cache", home / "run", home)
    place.prepare()
    with place.lock(), Catalog(place.catalog_path) as catalog:
        catalog.add_many(specs)


class Times:
    """How long each kind of operation took, in milliseconds."""

    def __init__(self) -> None:
        self._taken: dict[str, list[float]] = {}

    def of(self, what: str, operation: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = operation()
        self._taken.setdefault(what, []).append((time.perf_counter() - began) * 1000)
        return result

    def report(self) -> dict[str, dict[str, float]]:
        figures = {}
        for what, taken in self._taken.items():
            taken.sort()
            figures[what] = {
                "median": round(taken[len(taken) // 2], 2),
                "p99": round(taken[int(len(taken) * 0.99)], 2),
                "most": round(taken[-1], 2),
            }
        return figures


def go_on(crowd: Crowd, rounds: int = ROUNDS) -> dict[str, dict[str, float]]:
    """Everything that must not be held up by blocked readers, `rounds` times, and how long it took."""
    fs, times, place = crowd.fs, Times(), random.Random(1)
    healthy, folder = fs.mountpoint / "ok" / "healthy", fs.mountpoint / "ok"

    def read_some() -> None:
        offset = place.randrange(HEALTHY - 65536)
        with healthy.open("rb", buffering=0) as file:
            assert os.pread(file.fileno(), 65536, offset) == content("healthy", 0, offset, offset + 65536)

    def list_with_attributes() -> None:
        with os.scandir(folder) as entries:
            assert [entry.stat().st_size for entry in entries] == [HEALTHY]

    with crowd.client() as client:
        for _ in range(rounds):
            times.of("read", read_some)
            times.of("list", list_with_attributes)
            times.of("stat of a stalled one", (fs.mountpoint / "s" / "0").stat)
            times.of("statvfs", lambda: os.statvfs(fs.mountpoint))
            times.of("getxattr", lambda: os.getxattr(fs.mountpoint / "s" / "1", "user.streamfs.state"))
            times.of("control socket", lambda: client.call("status", names=["s/0", "ok/healthy"]))
    times.of("ls -l of all", lambda: checked(["ls", "-l", fs.mountpoint / "s"]))
    times.of("df", lambda: checked(["df", fs.mountpoint]))
    times.of("getfattr", lambda: checked(["getfattr", "-d", healthy]))
    times.of("streamfs status", lambda: fs.run("status", "ok/healthy"))

    def play_another() -> None:
        path = fs.add("ok/another", crowd.origin.url("plays/it"))
        assert checked(["cat", path]) == content("plays/it", 0, 0, SIZE)

    times.of("add and play another", play_another)
    return times.report()


def _memory(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) // 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--mode", choices=["cached", "direct"], required=True)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    asked = parser.parse_args()
    crowd = Crowd(asked.folder, asked.count, asked.mode)
    try:
        pid = crowd.fs.mount()
        crowd.block()
        figures: dict[str, Any] = {"ms": go_on(crowd, asked.rounds)}
        assert crowd.all_still_blocked(), "a reader of a stalled stream did not wait"
        figures["uid"] = os.geteuid()
        figures["blocked"] = len(crowd.readers)
        figures["daemon MiB"] = _memory(pid)
        figures["daemon descriptors"] = len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208
        for reader, number in zip(crowd.readers, (signal.SIGINT, signal.SIGTERM, signal.SIGKILL), strict=False):
            began = time.perf_counter()
            reader.send_signal(number)
            assert reader.wait(10) == -number
            figures[f"{number.name} took ms"] = round((time.perf_counter() - began) * 1000)
        assert all(reader.poll() is None for reader in crowd.readers[3:]), "a signal to one ended another"
        began = time.perf_counter()
        os.kill(pid, signal.SIGTERM)
        wait_for(lambda: not is_alive(pid), "the daemon ends")
        figures["end of the daemon ms"] = round((time.perf_counter() - began) * 1000)
        for reader in crowd.readers[3:]:
            assert reader.wait(10) == 1, "a blocked reader must get an error"
        print(json.dumps(figures))
    finally:
        crowd.close()


if __name__ == "__main__":
    main()
