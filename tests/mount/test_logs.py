"""What the daemon logs, where, in which form, and how `streamfs logs` shows it."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
from pathlib import Path

from streamfs.logs import LOG_BYTES
from tests.mount.mounted import CLI, Mounted, is_mounted, wait_for


def test_the_log_is_there_while_the_daemon_runs_and_after(unmounted: Mounted) -> None:
    assert "no log" in unmounted.refused("logs")
    unmounted.mount()
    line = unmounted.run("logs").stdout.splitlines()[-1]
    assert re.fullmatch(r"\S+ \S+ INFO streamfs\.daemon: the mount on .* answers", line)
    unmounted.umount()
    assert line in unmounted.run("logs").stdout
    assert stat.S_IMODE((unmounted.home / "state" / "daemon.log").stat().st_mode) == 0o600


def test_only_so_many_lines(unmounted: Mounted) -> None:
    for _ in range(2):
        unmounted.mount()
        unmounted.umount()
    every = unmounted.run("logs").stdout.splitlines()
    assert len(every) >= 2
    assert unmounted.run("logs", "-n", "1").stdout.splitlines() == every[-1:]
    assert unmounted.run("logs", "-n", "0").stdout == ""


def test_the_least_level_that_is_logged(unmounted: Mounted) -> None:
    unmounted.mount("--log-level", "warning")
    unmounted.umount()
    assert "INFO" not in unmounted.log


def test_as_json(unmounted: Mounted) -> None:
    unmounted.mount("--log-format", "json")
    entries = [json.loads(line) for line in unmounted.run("logs").stdout.splitlines()]
    (entry,) = [entry for entry in entries if "answers" in entry["message"]]
    assert entry["level"] == "info"
    assert entry["logger"] == "streamfs.daemon"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", entry["time"])


def test_follow_goes_on_through_restarts_and_new_files(unmounted: Mounted) -> None:
    path = unmounted.home / "state" / "daemon.log"
    unmounted.mount()
    unmounted.umount()
    process = unmounted.start([*CLI, "logs", "--follow", "-n", "1"])
    assert process.stdout is not None
    assert process.stdout.readline()
    path.rename(path.with_name("daemon.log.1"))
    unmounted.mount()
    assert b"answers" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130


def test_a_full_log_begins_anew_and_one_older_file_stays(unmounted: Mounted) -> None:
    unmounted.mount()
    unmounted.umount()
    path = unmounted.home / "state" / "daemon.log"
    with open(path, "a") as file:
        file.write("x" * 79 + "\n" + "y" * LOG_BYTES + "\n")
    unmounted.mount()
    assert path.stat().st_size < 10_000
    assert path.with_name("daemon.log.1").stat().st_size > LOG_BYTES
    shown = unmounted.run("logs").stdout
    assert "x" * 79 in shown
    assert shown.index("yyy") < shown.rindex("answers")


def test_in_the_foreground_it_goes_to_standard_error_as_well(unmounted: Mounted) -> None:
    process = unmounted.start_foreground()
    wait_for(lambda: "answers" in unmounted.log, "it is logged")
    unmounted.umount()
    assert b"answers" in process.communicate(timeout=10)[1]


def test_the_journal_gets_priorities_instead_of_times(unmounted: Mounted, tmp_path: Path) -> None:
    with open(tmp_path / "journal", "wb") as journal:
        there = os.fstat(journal.fileno())
        unmounted.environment["JOURNAL_STREAM"] = f"{there.st_dev}:{there.st_ino}"
        process = unmounted.start([*CLI, "mount", unmounted.mountpoint, "--foreground"], stderr=journal)
        wait_for(lambda: "answers" in (tmp_path / "journal").read_text(), "it is logged")
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    lines = (tmp_path / "journal").read_text().splitlines()
    assert f"<6>streamfs.daemon: the mount on {unmounted.mountpoint} answers" in lines
    assert all(re.match(r"<[3467]>\S+: ", line) for line in lines)


def test_no_secret_reaches_the_log_at_any_level(unmounted: Mounted) -> None:
    secret = "geheim123"
    unmounted.add("url", f"http://me:{secret}@127.0.0.1:9/x?token={secret}", "--header", f"Authorization: {secret}")
    unmounted.add("command", "--env", f"PASSWORD={secret}", "--", "sh", "-c", f": {secret}; exit 3")
    unmounted.mount("--log-level", "debug")
    for name in ("url", "command"):
        subprocess.run(["cat", unmounted.mountpoint / name], capture_output=True, timeout=30, check=False)
    unmounted.umount()
    assert "answers" in unmounted.log
    assert secret not in unmounted.log


def test_a_read_only_mount_changes_nothing(unmounted: Mounted) -> None:
    unmounted.add("it", "--", "echo", "it")
    unmounted.mount("--read-only")
    file = unmounted.mountpoint / "it"
    assert file.read_bytes() == b"it\n"
    for argv in (
        ["rm", "-f", file],
        ["mv", file, f"{file}2"],
        ["setfattr", "-n", "user.streamfs.persist", "-v", "1", file],
    ):
        done = subprocess.run(argv, capture_output=True, timeout=10, check=False)
        assert b"Read-only file system" in done.stderr
    assert unmounted.run("ls").stdout == "it\n"
    unmounted.umount()
    assert not is_mounted(unmounted.mountpoint)
