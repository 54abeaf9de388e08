"""The same questions to a running daemon, or, while none runs, to the catalogue and the cache themselves."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import msgspec

from streamfs.config import FILE_NAME, Config, load
from streamfs.control import Client
from streamfs.control.client import DEFAULT_TIMEOUT
from streamfs.errors import Busy, InvalidRequest, NotPermitted, StreamfsError, Unreachable
from streamfs.home import Home, recording_of
from streamfs.spec import IfTaken, Registration, StreamSpec

if TYPE_CHECKING:
    from streamfs.catalog import Catalog
    from streamfs.engine.recording import Recording
    from streamfs.entries import Entry

Row: TypeAlias = dict[str, Any]
"""One element of "streams" in the JSON shape: name, source, state, size, buffered, readers, persist, error, …"""

WAIT = 10.0  # seconds for another command, or a daemon that starts or ends, to make way
COMPLETE_WITHIN = 1.0  # seconds that somebody who pressed the tab key waits for a daemon
_RETRY = 0.1  # seconds; between two looks at who holds the home


class Outcome(NamedTuple):
    """What became of an entry of a list: "added", "unchanged", "skipped", "replaced" or "renamed"; the name it came
    with, and the one it has."""

    outcome: str
    wanted: str
    name: str


class Registry(Protocol):
    """What the commands need. Errors are StreamfsErrors; a change is done when a method returns."""

    live: bool
    """Whether a daemon answers."""

    def add(self, spec: StreamSpec, replace: bool) -> None: ...
    def register(
        self, items: Sequence[Registration], taken: IfTaken, *, probe: bool, dry_run: bool
    ) -> list[Outcome]: ...
    def registered(self) -> list[Registration]: ...
    def remove(self, names: Sequence[str]) -> None: ...
    def rename(self, old: str, new: str) -> None: ...
    def everything(self) -> list[Row]: ...
    def status(self, names: Sequence[str]) -> list[Row]: ...
    def disk_error(self) -> str | None:
        """Why the daemon's cache directory cannot take bytes now; None while it can."""

    def persist(self, names: Sequence[str], on: bool) -> None: ...
    def evict(self, names: Sequence[str], every: bool) -> None: ...
    def verify(self, names: Sequence[str]) -> list[Row]: ...


@contextlib.contextmanager
def open_registry(home: Home, cache_directory: Path | None = None) -> Iterator[Registry]:
    """The daemon of `home`; the offline registry, with the home locked, where none runs. `cache_directory` is where
    the daemon keeps its recordings when it runs, None: where the configuration says. Raises Busy after `WAIT`
    seconds."""
    home.prepare()
    deadline = time.monotonic() + WAIT
    while True:
        client = connect(home)
        if client is not None:
            with client:
                yield Live(client)
            return
        try:
            lock = home.lock(wait=_RETRY)
        except Busy:
            if time.monotonic() >= deadline:
                raise
            continue
        with lock:
            from streamfs.catalog import Catalog

            with Catalog(home.catalog_path) as catalog:
                config = load(home.config / FILE_NAME)
                directory = config.mount_options().cache_dir
                yield Offline(catalog, cache_directory or (Path(directory) if directory else home.cache), config)
        return


def connect(home: Home, timeout: float = DEFAULT_TIMEOUT) -> Client | None:
    """A connection to the daemon of `home`; None where none listens. `timeout` as for Client."""
    holder = home.holder()
    recorded = [] if holder is None or holder.socket is None else [holder.socket]
    for path in dict.fromkeys((*recorded, home.socket_path)):
        with contextlib.suppress(Unreachable):
            return Client(path, timeout)
    return None


def names_for_completion(prefix: str) -> list[str]:
    """The names of streams that begin so, in their order, without those that a shell could not take in one line; none
    where they cannot be had at once."""
    return [name for name in _names_at_once(prefix) if name.isprintable()]


def _names_at_once(prefix: str) -> list[str]:
    try:
        home = Home.locate()
        if not home.catalog_path.exists():
            return []
        client = connect(home, COMPLETE_WITHIN)
        if client is not None:
            with client:
                return [str(name) for name in client.call("names", prefix=prefix)]
        with home.lock():
            from streamfs.catalog import Catalog

            with Catalog(home.catalog_path) as catalog:
                return catalog.names(prefix)
    except (StreamfsError, OSError):
        return []  # a shell that completes has no place for errors


class Live:
    live = True

    def __init__(self, client: Client) -> None:
        self._client = client

    def add(self, spec: StreamSpec, replace: bool) -> None:
        self._client.call("add", spec=spec, **({"replace": True} if replace else {}))

    def register(self, items: Sequence[Registration], taken: IfTaken, *, probe: bool, dry_run: bool) -> list[Outcome]:
        done = self._client.call("register", items=items, taken=taken, probe=probe, dry_run=dry_run)
        return [Outcome(*one) for one in done]

    def registered(self) -> list[Registration]:
        return msgspec.convert(self._client.call("export"), list[Registration])

    def remove(self, names: Sequence[str]) -> None:
        self._client.call("remove", names=names)

    def rename(self, old: str, new: str) -> None:
        self._client.call("rename", old=old, new=new)

    def everything(self) -> list[Row]:
        return _rows(self._client.call("list"))

    def status(self, names: Sequence[str]) -> list[Row]:
        return _rows(self._client.call("status", names=names)) if names else self.everything()

    def disk_error(self) -> str | None:
        error: str | None = self._client.call("ping").get("disk_error")
        return error

    def persist(self, names: Sequence[str], on: bool) -> None:
        self._client.call("persist", names=names, on=on)

    def evict(self, names: Sequence[str], every: bool) -> None:
        self._client.call("evict", names=names, all=every)

    def verify(self, names: Sequence[str]) -> list[Row]:
        return _rows(self._client.call("verify", names=names))


def _rows(result: Any) -> list[Row]:
    if isinstance(result, dict):
        result = result.get("streams")
    if not isinstance(result, list):
        raise InvalidRequest("the daemon's answer makes no sense: is it of another version?")
    return result


class Offline:
    """For the holder of the home's lock."""

    live = False

    def __init__(self, catalog: Catalog, cache_directory: Path, config: Config | None = None) -> None:
        self._config = config or Config()
        self._catalog = catalog
        self._cache = cache_directory

    def add(self, spec: StreamSpec, replace: bool) -> None:
        entry = self._catalog.add(spec, replace)
        if self._config.persists(spec):
            self._catalog.set_persist(entry.id, True)

    def register(self, items: Sequence[Registration], taken: IfTaken, *, probe: bool, dry_run: bool) -> list[Outcome]:
        items = [
            msgspec.structs.replace(item, persist=self._config.persists(item.spec)) if item.persist is None else item
            for item in items
        ]
        done = self._catalog.register(items, taken, dry_run=dry_run)
        return [Outcome(outcome, wanted, entry.name) for outcome, wanted, entry in done]

    def registered(self) -> list[Registration]:
        return [Registration(spec=entry.spec, persist=entry.persist) for entry in self._catalog.all()]

    def remove(self, names: Sequence[str]) -> None:
        removed = self._catalog.remove(names)
        self._drop(entry.id for entry in removed)

    def rename(self, old: str, new: str) -> None:
        self._catalog.rename(old, new)

    def everything(self) -> list[Row]:
        return self._describe(self._catalog.all())

    def status(self, names: Sequence[str]) -> list[Row]:
        return self._describe(self._chosen(names))

    def disk_error(self) -> str | None:
        return None  # nobody tries

    def persist(self, names: Sequence[str], on: bool) -> None:
        for entry in self._chosen(names):
            self._catalog.set_persist(entry.id, on)

    def evict(self, names: Sequence[str], every: bool) -> None:
        entries = self._catalog.all() if every else self._chosen(names)
        kept = [entry.name for entry in entries if entry.persist]
        if kept and not every:
            raise NotPermitted(f"{kept[0]!r} is persisted: 'streamfs unpersist' it first")
        self._drop(entry.id for entry in entries if not entry.persist)

    def verify(self, names: Sequence[str]) -> list[Row]:
        recordings = self._recordings()
        entries = [entry for entry in self._chosen(names) if names or entry.id in recordings]
        return [_verify(entry, recordings.get(entry.id, [])) for entry in entries]

    def _chosen(self, names: Sequence[str]) -> list[Entry]:
        """The streams of these names, all of them for none."""
        if not names:
            return self._catalog.all()
        return [self._catalog.get(name) for name in dict.fromkeys(names)]

    def _describe(self, entries: Sequence[Entry]) -> list[Row]:
        recordings = self._recordings()
        return [_describe(entry, recordings.get(entry.id, [])) for entry in entries]

    def _recordings(self) -> dict[int, list[Path]]:
        """The data files in the cache directory by stream, oldest generation first."""
        found: dict[int, list[tuple[int, Path]]] = {}
        with contextlib.suppress(FileNotFoundError):
            for path in self._cache.iterdir():
                if named := recording_of(path.name):
                    stream_id, number = named
                    found.setdefault(stream_id, []).append((number, path))
        return {stream_id: [path for _, path in sorted(numbered)] for stream_id, numbered in found.items()}

    def _drop(self, ids: Iterable[int]) -> None:
        from streamfs.engine.recording import unlink_recording

        recordings = self._recordings()
        for stream_id in ids:
            for path in recordings.get(stream_id, ()):
                unlink_recording(path)


def _describe(entry: Entry, recordings: Sequence[Path]) -> Row:
    row: Row = entry.described()
    recording = _load(entry, recordings)
    if recording is not None:
        row["buffered"] = recording.present().total
        if recording.size is not None and row["buffered"] == recording.size:
            row |= {"state": "complete", "size": recording.size}
    return row


def _load(entry: Entry, recordings: Sequence[Path]) -> Recording | None:
    """The newest recording, if there is one of this stream that can be read."""
    if not recordings:
        return None
    from streamfs.engine.recording import Recording

    try:
        recording = Recording.load(recordings[-1])
    except OSError:
        return None
    if recording is None or not recording.header.key.startswith(f"{entry.id}:"):
        return None
    return recording


def _verify(entry: Entry, recordings: Sequence[Path]) -> Row:
    """Read every cached byte of the stream and check it."""
    if not recordings:
        return {"name": entry.name, "ok": True, "detail": "nothing cached"}
    recording = _load(entry, recordings)
    if recording is None:
        return {"name": entry.name, "ok": False, "detail": "the recording's index cannot be read"}
    from streamfs.engine.ranges import RangeSet
    from streamfs.engine.recording import DamagedExtent

    checked, damaged = 0, RangeSet()
    for start, stop in recording.present():
        for extent in recording.extents(start, stop):
            buffer = memoryview(bytearray(extent.stop - extent.start))
            try:
                recording.read([extent], buffer, wait=True)
                checked += len(buffer)
            except DamagedExtent:
                damaged.add(extent.start, extent.stop)
    said = [f"{checked} bytes are right"]
    if damaged:
        places = [f"{start}-{stop}" for start, stop in damaged]
        more = ", …" if len(places) > 4 else ""
        said.append(f"{damaged.total} are damaged, at bytes {', '.join(places[:4])}{more}")
    if recording.unread:
        said.append(f"{recording.unread} bytes of the index are damaged or torn")
    return {"name": entry.name, "ok": len(said) == 1, "detail": "; ".join(said)}
