"""`streamfs web` over a real mount: what is answered and to whom, metrics, and the page in a real browser."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from tests.fakes import named_bytes
from tests.mount.mounted import CLI, Mounted, Tap, end_within, wait_for
from tests.mount.origin import ScriptedOrigin
from tests.mount.test_board import row_when, stopped

MIB = 1 << 20
CANARY = "canary-7f3a"
EVIL = "<b onclick=x>&amp;\"' \udcff"
"""A name that would be markup, with a byte that is no UTF-8."""


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: str


class Site:
    """A running `streamfs web`."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        self.process = process
        self.url = process.stdout.readline().decode().strip()
        assert self.url, process.stderr and process.stderr.read()
        self.port = urlsplit(self.url).port

    def ask(self, path: str, *, method: str = "GET", host: str | None = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection(urlsplit(self.url).hostname or "", self.port, timeout=20)
        with contextlib.closing(connection):
            connection.request(method, path, headers=headers | ({} if host is None else {"Host": host}))
            reply = connection.getresponse()
            return Answer(
                reply.status, {key.lower(): value for key, value in reply.getheaders()}, reply.read().decode()
            )

    def document(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.ask("/streams.json").body)
        return found

    def row(self, name: str) -> dict[str, Any]:
        return next(row for row in self.document()["streams"] if row["name"] == name)

    def metrics(self) -> dict[tuple[str, ...], float]:
        """The value by the name of the sample and the values of its labels, in the order of the labels' names."""
        found = {}
        for family in text_string_to_metric_families(self.ask("/metrics").body):
            assert family.documentation
            for sample in family.samples:
                key = (sample.name, *(sample.labels[label] for label in sorted(sample.labels)))
                assert key not in found
                found[key] = sample.value
        return found


def start(fs: Mounted, *options: str) -> Site:
    return Site(fs.start([*CLI, "web", "--port", "0", *options]))


@pytest.fixture
def site(fs: Mounted) -> Iterator[Site]:
    made = start(fs)
    yield made
    assert made.process.poll() is None, "it must not end by itself"


def file_of(folder: Path, name: str, size: int) -> str:
    path = folder / name
    path.write_bytes(named_bytes(name, 0, size))
    return path.as_uri()


# What is told


def test_the_metrics_tell_what_the_streams_do(fs: Mounted, site: Site, tmp_path: Path, tap: Tap) -> None:
    fs.add("file", file_of(tmp_path, "a", 3 * MIB)).read_bytes()
    fs.add("unused", file_of(tmp_path, "b", 10), "--no-probe")
    path = fs.add("live", *tap.argv)
    with open(path, "rb", buffering=0) as file:
        tap.write(b"x" * 5000)
        assert file.read(1)
        row_when(fs, "live", buffered=5000, readers=1)
        row_when(fs, "file", readers=0, state="complete")
        found = site.metrics()
        assert found["streamfs_up",] == 1
        assert found["streamfs_board_whole",] == 1
        assert found["streamfs_daemon_info", str(fs.mountpoint), "0.1.0"] == 1
        assert found["streamfs_stream_size_bytes", "file"] == 3 * MIB
        assert ("streamfs_stream_size_bytes", "live") not in found
        assert found["streamfs_stream_state", "complete", "file"] == 1
        assert found["streamfs_stream_state", "live", "live"] == 1
        assert found["streamfs_stream_buffered_bytes", "memory", "live"] == 5000
        assert found["streamfs_stream_received_bytes_total", "live"] == 5000
        assert found["streamfs_stream_read_bytes_total", "file"] >= 3 * MIB
        assert ("streamfs_stream_read_bytes_total", "unused") not in found
        assert found["streamfs_stream_readers", "live"] == 1
        assert found["streamfs_stream_fetches", "live"] == 1
        assert found["streamfs_readers",] == 1
        assert found["streamfs_streams", "complete"] == 1
        assert found["streamfs_streams", "failed"] == 0
        held = sum(row["buffered"] for row in site.document()["streams"])
        assert sum(found["streamfs_buffered_bytes", place] for place in ("memory", "disk")) == held
        tap.write(b"x" * 5000)
        wait_for(lambda: site.metrics()["streamfs_receive_bytes_per_second",] > 0, "a rate")


def test_bytes_on_disk_and_kept_streams_are_counted(fs: Mounted, site: Site, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(6 * MIB))
    fs.add("big", "--", "cat", tmp_path / "big").read_bytes()
    fs.run("persist", "big")
    wait_for(lambda: site.metrics().get(("streamfs_stream_buffered_bytes", "disk", "big"), 0) > 0, "bytes on disk")
    assert site.metrics()["streamfs_stream_persist", "big"] == 1


def test_an_error_is_counted(fs: Mounted, site: Site) -> None:
    with pytest.raises(OSError):
        fs.add("broken", "--shell", "echo a; exit 3").read_bytes()
    row_when(fs, "broken", state="failed")
    found = site.metrics()
    assert found["streamfs_stream_error", "broken"] == 1
    assert found["streamfs_streams_with_errors",] == 1
    assert found["streamfs_streams", "failed"] == 1


def test_failures_are_counted_and_the_counts_never_go_down(fs: Mounted, site: Site, tmp_path: Path) -> None:
    def counted(*key: str) -> float:
        return site.metrics().get(key, -1)

    assert counted("streamfs_events_total", "failed") == counted("streamfs_refused_opens_total") == 0
    path = fs.add("broken", (tmp_path / "not there").as_uri(), "--no-probe")
    for number in range(1, 3):
        with pytest.raises(OSError):
            path.read_bytes()
        wait_for(lambda: counted("streamfs_refused_opens_total") >= number, "it is counted")  # noqa: B023
    assert counted("streamfs_refused_opens_total") == 2
    assert counted("streamfs_events_total", "failed") == 2
    (tmp_path / "not there").write_bytes(b"there")
    assert path.read_bytes() == b"there"
    wait_for(lambda: counted("streamfs_stream_error", "broken") == 0, "the gauge goes back")
    fs.run("rm", "broken")
    wait_for(lambda: counted("streamfs_events_total", "removed") == 1, "other events are counted, too")
    assert counted("streamfs_events_total", "failed") == counted("streamfs_refused_opens_total") == 2
    assert counted("streamfs_disk_errors_total") == 0


def test_openmetrics_are_given_to_who_asks_for_them(fs: Mounted, site: Site) -> None:
    fs.add("a", "--", "true")
    answer = site.ask("/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert "streamfs_up" in {family.name for family in openmetrics(answer.body)}


def test_names_that_are_no_text_are_labels_of_their_own(fs: Mounted, site: Site) -> None:
    raw = os.fsdecode(b"x\xff")
    names = [raw, "x\\xff", "x\\xff'", 'quo"te\\']
    for name in names:
        fs.add(name, "--", "true")
    labels = [key[1] for key in site.metrics() if key[0] == "streamfs_stream_readers"]
    assert sorted(labels) == sorted(["x\\xff''", "x\\xff", "x\\xff'", 'quo"te\\'])
    assert {row["name"] for row in site.document()["streams"]} == set(names)


def test_the_document_is_that_of_status(fs: Mounted, site: Site, tmp_path: Path) -> None:
    fs.add("a", file_of(tmp_path, "a", MIB)).read_bytes()
    row_when(fs, "a", state="complete", readers=0, rate=0, read_rate=0)
    document = site.document()
    daemon = document.pop("daemon")
    assert document == json.loads(fs.run("status", "--json").stdout)
    assert (daemon["up"], daemon["pid"], daemon["mountpoint"]) == (True, fs.pid, str(fs.mountpoint))


def test_it_answers_while_the_daemon_is_stopped(fs: Mounted, site: Site) -> None:
    fs.add("a", "--", "true")
    with stopped(fs):
        assert site.metrics()["streamfs_up",] == 1
        assert site.row("a")["state"] == "idle"


def test_it_outlives_daemons_and_sees_the_next_one(fs: Mounted, site: Site, tmp_path: Path) -> None:
    fs.add("a", file_of(tmp_path, "a", 10))
    assert site.row("a")["state"] == "idle"
    fs.umount()
    assert site.metrics() == {("streamfs_up",): 0}
    assert (site.document()["streams"], site.document()["daemon"]["why"]) == ([], "no daemon runs")
    fs.run("add", "b", "--", "true")
    fs.mount()
    assert {row["name"] for row in site.document()["streams"]} == {"a", "b"}
    fs.kill()
    assert site.metrics() == {("streamfs_up",): 0}


def test_it_starts_before_the_daemon(unmounted: Mounted) -> None:
    site = start(unmounted)
    assert site.metrics() == {("streamfs_up",): 0}
    unmounted.mount()
    assert site.metrics()["streamfs_up",] == 1


def test_a_board_that_is_none_is_said_and_no_end(unmounted: Mounted) -> None:
    site = start(unmounted)
    run = unmounted.home / "run"
    run.mkdir(parents=True, exist_ok=True)
    (run / "board").write_bytes(bytes(8192))
    assert "is no board" in site.document()["daemon"]["why"]
    assert site.metrics() == {("streamfs_up",): 0}
    unmounted.mount()
    assert site.document()["daemon"]["why"] is None


def test_secrets_are_nowhere(fs: Mounted, site: Site, tmp_path: Path, origin: ScriptedOrigin) -> None:
    secret = tmp_path / "secret"
    secret.write_text(f"{CANARY}-header")
    url = origin.add("x", 1000).url.replace("http://", f"http://user:{CANARY}-password@")
    options = ("--header", f"Authorization: Bearer {CANARY}-bearer", "--secret-header", f"X-Key: ${{file:{secret}}}")
    fs.add("secret", f"{url}?token={CANARY}-token", *options)
    with contextlib.suppress(OSError):
        (fs.mountpoint / "secret").read_bytes()
    wait_for(lambda: site.row("secret").get("positions") == [], "the stream was used")
    for path in ("/", "/metrics", "/streams.json"):
        for accept in ("*/*", "application/openmetrics-text"):
            answer = site.ask(path, Accept=accept)
            assert answer.status == 200
            assert CANARY not in answer.body + str(answer.headers)
    assert "token=***" in site.row("secret")["source"]


# Who is answered


def test_names_of_others_are_refused(fs: Mounted, site: Site) -> None:
    fs.add("private", "--", "true")
    assert "private" in site.ask("/streams.json").body
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil:80", "10.0.0.1", "", "[::2]", "127.1"):
        for path in ("/", "/metrics", "/streams.json", "/nowhere"):
            answer = site.ask(path, host=host)
            assert answer.status == 403, host
            assert "private" not in answer.body


def test_this_machines_names_are_answered(site: Site) -> None:
    for host in ("localhost", f"localhost:{site.port}", "127.0.0.1:1", "[::1]:80", "LOCALHOST"):
        assert site.ask("/streams.json", host=host).status == 200


def test_a_request_without_a_host_is_refused(site: Site) -> None:
    with socket.create_connection(("127.0.0.1", site.port), 20) as raw:
        raw.sendall(b"GET /streams.json HTTP/1.0\r\n\r\n")
        assert raw.makefile("rb").readline().split()[1] == b"403"


def test_there_is_only_looking(site: Site) -> None:
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        answer = site.ask("/streams.json", method=method)
        assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")
    head, whole = site.ask("/", method="HEAD"), site.ask("/")
    assert (head.status, head.body, head.headers["content-length"]) == (200, "", str(len(whole.body.encode())))
    assert site.ask("/../etc/passwd").status == 404


def test_the_page_is_alone_with_itself(site: Site) -> None:
    answer = site.ask("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert not re.search(r"(src|href)=[\"']?(https?:)?//|@import|url\(", answer.body)
    assert "innerHTML" not in answer.body
    assert "access-control-allow-origin" not in answer.headers


def test_other_addresses_are_refused(unmounted: Mounted) -> None:
    for host in ("0.0.0.0", "192.0.2.7", "::", "example.org", "::ffff:127.0.0.1", ""):
        assert "no loopback address" in unmounted.refused("web", "--host", host, code=2)


def test_loopback_addresses_are_taken(unmounted: Mounted) -> None:
    for host in ("localhost", "127.0.0.5", "::1"):
        assert start(unmounted, "--host", host).ask("/streams.json").status == 200


def test_a_port_that_is_taken_is_said(unmounted: Mounted) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} cannot be had" in unmounted.refused("web", "--port", str(port))


@pytest.mark.parametrize("missing", ["waitress", "prometheus_client"])
def test_without_its_packages_it_says_what_to_install(unmounted: Mounted, tmp_path: Path, missing: str) -> None:
    (tmp_path / f"{missing}.py").write_text(f"raise ModuleNotFoundError('no', name={missing!r})")
    unmounted.environment["PYTHONPATH"] = str(tmp_path)
    said = unmounted.refused("web")
    assert missing in said
    assert "pip install 'streamfs[web]'" in said


# The end


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_it_ends_when_it_is_told(unmounted: Mounted, number: signal.Signals) -> None:
    site = start(unmounted)
    with socket.create_connection(("127.0.0.1", site.port), 20) as half:
        half.sendall(b"GET / HT")  # a client that never goes on holds up nothing
        assert site.ask("/").status == 200
        site.process.send_signal(number)
        assert end_within(site.process, 10) == 0
    assert site.process.stderr is not None
    assert site.process.stderr.read() == b""


# In a browser

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed")


def browse(url: str, folder: Path, *options: str) -> tuple[str, str]:
    """Standard output and error of a headless Chromium that looked at the page for some (virtual) seconds."""
    assert CHROMIUM is not None
    argv = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    argv += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={folder / 'profile'}"]
    argv += ["--enable-logging=stderr", "--virtual-time-budget=4000", *options, url]
    environment = os.environ | {"HOME": str(folder)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    with subprocess.Popen(argv, env=environment, start_new_session=True, text=True, **pipes) as process:
        try:
            shown, said = process.communicate(timeout=90)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its own session, with all that it started
    assert process.returncode == 0, said
    return shown, said


@needs_chromium
def test_a_browser_shows_the_streams(fs: Mounted, site: Site, tmp_path: Path, tap: Tap) -> None:
    path = fs.add("radio.mp3", *tap.argv)
    (fs.add("film", file_of(tmp_path, "film", MIB))).read_bytes()
    fs.add(EVIL, "--", "true")
    with pytest.raises(OSError):
        fs.add("broken", "--shell", "echo '<i>sorry' >&2; exit 3").read_bytes()
    with open(path, "rb", buffering=0) as file:
        tap.write(b"x" * 5000)
        assert file.read(1000)
        row_when(fs, "radio.mp3", buffered=5000, readers=1)
        row_when(fs, "film", state="complete", readers=0)
        row_when(fs, "broken", state="failed")
        shown, said = browse(site.url, tmp_path, "--dump-dom")
    assert "CONSOLE" not in said, said  # no error of the script's, nothing that the policy forbids
    assert f"{fs.mountpoint} · 4 streams" in shown
    sections = {
        found[1]: found[0] for found in re.finditer(r'<section class="stream">.*?name">(.*?)</bdi>.*?</section>', shown)
    }
    assert set(sections) == {"radio.mp3", "film", "broken", "&lt;b onclick=x&gt;&amp;amp;\"' \\xff"}
    radio = sections["radio.mp3"]
    assert "1 reader (python" in radio
    assert 'class="memory" d="M0.00 0h1000.00v16' in radio  # as far as is known, everything is here
    assert re.search(r'class="reader" d="M\d', radio)
    assert re.search(r'class="fetch" d="M9\d\d', radio)
    assert 'aria-label="1.0 MiB of 1.0 MiB"' in sections["film"]
    assert 'class="reader" d=""' in sections["film"]
    assert "failed" in sections["broken"]
    assert re.search(r'class="error bad">[^<]*3', sections["broken"])


@needs_chromium
def test_a_browser_shows_that_no_daemon_runs(fs: Mounted, site: Site, tmp_path: Path) -> None:
    fs.umount()
    shown, said = browse(site.url, tmp_path, "--dump-dom")
    assert "CONSOLE" not in said, said
    assert re.search(r'id="trouble"[^>]*>no daemon runs', shown)
    assert "<section" not in shown
