"""The board as Prometheus counts it. docs/web.md says what each metric means."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from streamfs.web.watch import Seen

STATES = ("idle", "live", "paused", "complete", "failed")
FAILURES = "failed", "stalled"
"""Events of a source that failed, or sent nothing for too long."""
Row = dict[str, Any]
Sample = tuple[list[str], float]
"""Values of the labels, and the number."""


class BoardCollector(Collector):
    """Looks when it is asked, and only then."""

    def __init__(self, look: Callable[[], Seen]) -> None:
        self._look = look

    def collect(self) -> Iterator[Metric]:
        seen = self._look()
        yield _one("streamfs_up", "Whether the daemon runs.", seen.up)
        if seen.up:
            yield from _daemon(seen)
            yield from _totals(seen.rows)
            yield from _streams(seen.rows)


class Metrics:
    """The text that a scrape gets."""

    def __init__(self, look: Callable[[], Seen]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(BoardCollector(look))

    def text(self, accept: str) -> tuple[bytes, str]:
        """The document and its media type: OpenMetrics for those whose Accept header asks for it."""
        encode, media_type = choose_encoder(accept)
        document: bytes = encode(self._registry)
        return document, media_type


def _daemon(seen: Seen) -> Iterator[Metric]:
    facts = seen.facts
    about = {key: _text(str(facts.get(key, ""))) for key in ("version", "mountpoint")}
    yield InfoMetricFamily("streamfs_daemon", "The daemon that runs.", value=about)
    if "started" in facts:
        yield _one("streamfs_daemon_start_time_seconds", "When the daemon began, since the epoch.", facts["started"])
    yield _one("streamfs_board_written_timestamp_seconds", "When the daemon last told something new.", seen.written)
    yield _one("streamfs_board_whole", "Whether every stream is told of; not just after a large start.", seen.whole)
    for name, key, what in (
        ("streamfs_memory_limit_bytes", "memory", "What all streams may keep in memory."),
        ("streamfs_cache_limit_bytes", "cache_size", "What the cache directory may hold besides kept streams."),
    ):
        if isinstance(facts.get(key), int):
            yield _one(name, what, facts[key])
    error = facts.get("disk_error") is not None
    yield _one("streamfs_cache_error", "Whether the cache directory takes nothing now.", error)
    yield from _counters(facts.get("counts", {}))


def _counters(counts: dict[str, int]) -> Iterator[Metric]:
    """Since the daemon began. Those that tell of failures are there before the first."""
    for name, key, what in (
        ("streamfs_refused_opens", "refused", "Opens of files that failed."),
        ("streamfs_disk_errors", "disk_error", "Bytes that the cache directory did not take: times it was tried."),
    ):
        yield CounterMetricFamily(name, what, value=counts.get(key, 0))
    events = CounterMetricFamily("streamfs_events", "What happened to streams.", labels=["event"])
    for event in dict.fromkeys((*FAILURES, *counts)):
        if event not in ("refused", "disk_error"):
            events.add_metric([event], counts.get(event, 0))
    yield events


def _totals(rows: Sequence[Row]) -> Iterator[Metric]:
    states = Counter(row["state"] for row in rows)
    counted: list[Sample] = [([state], states[state]) for state in dict.fromkeys((*STATES, *states))]
    yield _gauge("streamfs_streams", "Registered streams, by state.", ["state"], counted)
    failing = sum(1 for row in rows if row["error"] is not None)
    yield _one("streamfs_streams_with_errors", "Streams with an error.", failing)
    memory = sum(_number(row, "memory") for row in rows)
    disk = sum(_on_disk(row) for row in rows)
    places: list[Sample] = [(["memory"], memory), (["disk"], disk)]
    yield _gauge("streamfs_buffered_bytes", "Bytes of all streams that are here, by place.", ["place"], places)
    for name, what, number in _MOVING:
        yield _one(f"streamfs_{name}", f"{what}, of all streams.", sum(number(row) for row in rows))


def _streams(rows: Sequence[Row]) -> Iterator[Metric]:
    names = _labels(rows)
    pairs = list(zip(names, rows, strict=True))
    by_stream = ["stream"]
    sizes: list[Sample] = [([name], row["size"]) for name, row in pairs if row["size"] is not None]
    yield _gauge("streamfs_stream_size_bytes", "Length; absent while unknown.", by_stream, sizes)
    states: list[Sample] = [([name, row["state"]], 1) for name, row in pairs]
    yield _gauge("streamfs_stream_state", "1 for the state the stream is in.", ["stream", "state"], states)
    errors: list[Sample] = [([name], row["error"] is not None) for name, row in pairs]
    yield _gauge("streamfs_stream_error", "Whether bytes are missing or the source fails.", by_stream, errors)
    kept: list[Sample] = [([name], bool(row["persist"])) for name, row in pairs]
    yield _gauge("streamfs_stream_persist", "Whether its whole is to be kept.", by_stream, kept)
    places: list[Sample] = []
    for name, row in pairs:
        places += [([name, "memory"], _number(row, "memory")), ([name, "disk"], _on_disk(row))]
    what = "Bytes of the stream that are here, by place."
    yield _gauge("streamfs_stream_buffered_bytes", what, ["stream", "place"], places)
    for name, what, number in _MOVING:
        samples: list[Sample] = [([label], number(row)) for label, row in pairs]
        yield _gauge(f"streamfs_stream_{name}", f"{what}.", by_stream, samples)
    for name, key, what in (
        ("received", "received", "Bytes that came from the source, for this version of its bytes."),
        ("read", "served", "Bytes that readers were given."),
    ):
        counter = CounterMetricFamily(f"streamfs_stream_{name}_bytes", what, labels=by_stream)
        for label, row in pairs:
            if key in row:
                counter.add_metric([label], row[key])
        yield counter


def _number(row: Row, key: str) -> int:
    """0 for a stream that nobody has used since the daemon began."""
    value = row.get(key)
    return value if isinstance(value, int) else 0


def _on_disk(row: Row) -> int:
    """Bytes on disk alone: what is in memory, too, counts there."""
    return max(0, _number(row, "buffered") - _number(row, "memory"))


_MOVING: tuple[tuple[str, str, Callable[[Row], int]], ...] = (
    ("readers", "Open files", lambda row: _number(row, "readers")),
    ("fetches", "Places where bytes come in", lambda row: len(row.get("fetches", ()))),
    ("receive_bytes_per_second", "Bytes a second from the source", lambda row: _number(row, "rate")),
    ("read_bytes_per_second", "Bytes a second to readers", lambda row: _number(row, "read_rate")),
)
"""Name, meaning and number of what is told of each stream and of all together."""


def _one(name: str, what: str, value: float) -> Metric:
    return GaugeMetricFamily(name, what, value=value)


def _gauge(name: str, what: str, labels: Sequence[str], samples: Iterable[Sample]) -> Metric:
    family = GaugeMetricFamily(name, what, labels=labels)
    for values, number in samples:
        family.add_metric(values, number)
    return family


def _labels(rows: Sequence[Row]) -> list[str]:
    """The streams' names as labels, which are UTF-8: bytes that are not become `\\xNN`. No two are the same, as that
    would spoil the whole scrape."""
    taken = {row["name"] for row in rows}
    labels = []
    for row in rows:
        label = _text(row["name"])
        while label != row["name"] and label in taken:
            label += "'"
        taken.add(label)
        labels.append(label)
    return labels


def _text(name: str) -> str:
    raw = name.encode("utf-8", "surrogateescape")
    return raw.decode("utf-8", "backslashreplace")
