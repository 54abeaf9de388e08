"""`streamfs doctor` finds what is wrong, each of it made to happen, and says what to do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
from pathlib import Path

import pytest

from streamfs.cli import checks
from streamfs.cli.checks import Finding
from tests.mount.mounted import Mounted, wait_for
from tests.mount.namespace import SCRATCH, run_in_namespace

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a mount namespace")
one_at_a_time = pytest.mark.xdist_group("ordinary-user")


def found(output: str, check: str) -> Finding:
    (finding,) = [item for item in json.loads(output)["findings"] if item["check"] == check]
    return Finding(**finding)


def diagnosed(unmounted: Mounted, check: str, code: int) -> Finding:
    done = unmounted.run("doctor", "--json", check=False)
    assert done.returncode == code, done.stdout
    return found(done.stdout, check)


def in_namespace(before: str, check: str, user: str | None = None, code: int = 1, command: str = "") -> Finding:
    """What the doctor finds after the script `before`, as root or as `user`."""
    become = f"setpriv --reuid={user} --regid={user} --clear-groups" if user else ""
    script = f"""
umask 022
mkdir {SCRATCH}/tmp
chown {user or "root"} {SCRATCH}/tmp
{before}
cd {SCRATCH}/tmp
{become} env STREAMFS_HOME={SCRATCH}/tmp/home {command or "streamfs doctor --json"} || code=$?
[ "${{code:-0}}" = {code} ]
"""
    done = run_in_namespace(script)
    assert done.returncode == 0, done.stdout + done.stderr
    return found(done.stdout, check)


def test_a_system_that_is_well_has_no_problems(unmounted: Mounted) -> None:
    done = unmounted.run("doctor", "--json")
    states = {item["check"]: item["state"] for item in json.loads(done.stdout)["findings"]}
    assert {"home", "catalogue", "libcurl", "pyfuse3", "certificates", "clock", "daemon", "run-time files"} <= set(
        states
    )
    assert set(states.values()) <= {"ok", "warning"}
    unmounted.mount()
    assert str(unmounted.mountpoint) in diagnosed(unmounted, "daemon", 0).detail


@as_root
@one_at_a_time
class TestFuse:
    def test_a_device_that_is_closed(self, user: str) -> None:
        finding = in_namespace("chmod 600 /mnt/fuse", "/dev/fuse", user)
        assert (finding.state, finding.detail) == ("problem", "Permission denied")
        assert "chmod 666 /dev/fuse" in finding.advice

    def test_a_device_that_is_missing(self) -> None:
        finding = in_namespace(
            "mkdir /mnt/dev; touch /mnt/dev/null; mount --bind /dev/null /mnt/dev/null;mount --rbind /mnt/dev /dev",
            "/dev/fuse",
        )
        assert (finding.state, finding.detail) == ("problem", "missing")
        assert "modprobe fuse" in finding.advice

    def test_fusermount3_that_is_missing(self, user: str) -> None:
        command = 'sh -c \'python=$(readlink -f "$(command -v streamfs)"); PATH=/mnt/few exec "$python" doctor --json\''
        few = 'mkdir /mnt/few; ln -s "$(command -v stat)" /mnt/few/'
        finding = in_namespace(few, "fusermount3", user, command=command)
        assert finding.state == "problem"
        assert "apt-get install fuse3" in finding.advice

    def test_fusermount3_that_is_not_setuid(self, user: str) -> None:
        copy = f"mkdir {SCRATCH}/bin; cp /usr/bin/fusermount3 {SCRATCH}/bin/; chmod 755 {SCRATCH}/bin/fusermount3"
        finding = in_namespace(f"{copy}; export PATH={SCRATCH}/bin:$PATH", "fusermount3", user)
        assert finding.state == "problem"
        assert "chmod u+s" in finding.advice

    def test_a_system_without_mtab(self, user: str) -> None:
        without = """
mkdir /mnt/upper /mnt/work; mount -t overlay -o lowerdir=/etc,upperdir=/mnt/upper,workdir=/mnt/work overlay /etc
rm /etc/mtab
"""
        finding = in_namespace(without, "fusermount3", user)
        assert finding.state == "problem"
        assert "ln -s /proc/self/mounts /etc/mtab" in finding.advice
        script = f"""{without}
mkdir {SCRATCH}/tmp; chown {user} {SCRATCH}/tmp
setpriv --reuid={user} --regid={user} --clear-groups env STREAMFS_HOME={SCRATCH}/tmp/home streamfs mount {SCRATCH}/tmp
"""
        done = run_in_namespace(script)
        assert done.returncode == 1
        assert "ln -s /proc/self/mounts /etc/mtab" in done.stderr

    def test_whether_others_may_be_let_in(self, user: str) -> None:
        closed = in_namespace(
            "touch /mnt/conf; mount --bind /mnt/conf /etc/fuse.conf",
            "--allow-other",
            user,
            code=0,
        )
        assert "user_allow_other to /etc/fuse.conf" in closed.advice
        opened = in_namespace(
            "echo user_allow_other > /mnt/conf; mount --bind /mnt/conf /etc/fuse.conf", "--allow-other", user, code=0
        )
        assert (opened.detail, opened.advice) == ("may be used", "")

    def test_limits_that_only_root_can_raise(self, user: str) -> None:
        finding = in_namespace(
            "mount -t tmpfs tmpfs /sys/fs; mkdir -p /sys/fs/fuse/connections", "background reads", user, code=0
        )
        assert finding.state == "warning"
        assert "mount -t fusectl" in finding.advice
        few = "mount -t fusectl fusectl /sys/fs/fuse/connections 2>/dev/null; echo 12 > /mnt/few;"
        finding = in_namespace(
            f"{few} mount --bind /mnt/few /sys/module/fuse/parameters/max_user_bgreq", "background reads", user, code=0
        )
        assert (finding.state, finding.detail) == ("warning", "at most 12 for ordinary users")

    def test_few_descriptors(self) -> None:
        finding = in_namespace("", "open files", code=0, command="prlimit --nofile=1000:1000 streamfs doctor --json")
        assert (finding.state, finding.detail) == ("warning", "at most 1000")
        assert "limits.conf" in finding.advice

    def test_a_small_disk(self) -> None:
        finding = in_namespace(
            f"mkdir {SCRATCH}/tmp/home; chmod 700 {SCRATCH}/tmp/home;"
            f"mount -t tmpfs -o size=10m,mode=700 tmpfs {SCRATCH}/tmp/home",
            "disk",
            code=0,
        )
        assert (finding.state, finding.detail[:6]) == ("warning", "10.0 M")
        assert "--cache-dir" in finding.advice

    def test_a_mount_helper_that_leads_nowhere(self, tmp_path: Path) -> None:
        (tmp_path / "helper").symlink_to(tmp_path / "nowhere")
        (finding,) = checks.check_mount_helper(tmp_path / "helper")
        assert (finding.state, "ln -sf" in finding.advice) == ("warning", True)
        assert in_namespace("", "mount helper", code=0).detail.count("/sbin/mount.streamfs") == 1

    def test_a_mount_helper_that_somebody_else_may_change(self, folder: Path, tmp_path: Path) -> None:
        (folder / "mount.streamfs").touch()
        (tmp_path / "helper").symlink_to(folder / "mount.streamfs")
        (finding,) = checks.check_mount_helper(tmp_path / "helper")
        assert finding.state == "warning"
        assert f"{folder} is not root's alone" in finding.detail


@pytest.mark.parametrize(
    ("module", "content", "check", "state", "said"),
    [
        ("pyfuse3", "raise ImportError('no fuse')", "pyfuse3", "problem", "libfuse3-dev"),
        ("pycurl", "raise ImportError('no curl')", "pycurl", "problem", "pip install pycurl"),
        ("pycurl", "CURL = ('8.20.0', ['http', 'https', 'ftp', 'ftps', 'sftp'])", "libcurl", "problem", "upgrade"),
        ("pycurl", "CURL = ('8.5.0', ['http', 'https', 'ftp', 'ftps'])", "libcurl", "warning", "has all"),
    ],
)
def test_libraries(
    module: str, content: str, check: str, state: str, said: str, unmounted: Mounted, tmp_path: Path
) -> None:
    (tmp_path / "lib").mkdir()
    version = "\ndef version_info(): return (0, CURL[0], 0, '', 0, '', 0, '', tuple(CURL[1]), None, 0, None)\n"
    (tmp_path / "lib" / f"{module}.py").write_text(content + version)
    unmounted.environment["PYTHONPATH"] = str(tmp_path / "lib")
    finding = diagnosed(unmounted, check, 1 if state == "problem" else 0)
    assert finding.state == state
    assert said in finding.advice


def test_no_authorities(unmounted: Mounted, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    unmounted.environment |= {"SSL_CERT_FILE": str(tmp_path / "missing.pem"), "SSL_CERT_DIR": str(tmp_path / "none")}
    finding = diagnosed(unmounted, "certificates", 0)
    assert finding.state == "warning"
    assert "ca-certificates" in finding.advice


def test_a_clock_that_was_never_set() -> None:
    (finding,) = checks.check_clock(now=86_400.0)
    assert finding.state == "warning"
    assert "1970-01-02" in finding.detail
    (finding,) = checks.check_clock()
    assert finding.state == "ok"


class TestHome:
    def test_one_that_others_may_write(self, unmounted: Mounted) -> None:
        unmounted.run("ls")
        (unmounted.home / "cache").chmod(0o777)
        finding = diagnosed(unmounted, "home", 1)
        assert "others may write" in finding.detail
        assert "STREAMFS_HOME" in finding.advice

    def test_a_run_time_directory_that_is_not_ones_own(self, unmounted: Mounted, tmp_path: Path) -> None:
        del unmounted.environment["STREAMFS_HOME"]
        (tmp_path / "runtime").mkdir()
        (tmp_path / "runtime").chmod(0o777)
        unmounted.environment |= {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path / "runtime")}
        finding = diagnosed(unmounted, "run-time files", 0)
        assert finding.state == "warning"
        assert "chmod 700" in finding.advice
        (tmp_path / "runtime").chmod(0o700)
        assert diagnosed(unmounted, "run-time files", 0).detail == f"in {tmp_path}/runtime/streamfs"

    def test_a_catalogue_that_is_damaged(self, unmounted: Mounted) -> None:
        unmounted.run("ls")
        (unmounted.home / "state" / "catalog.db").write_bytes(b"no database" * 1000)
        finding = diagnosed(unmounted, "catalogue", 1)
        assert ".recover" in finding.detail or "move" in finding.detail

    def test_one_of_a_newer_version(self, unmounted: Mounted) -> None:
        unmounted.run("ls")
        with sqlite3.connect(unmounted.home / "state" / "catalog.db") as database:
            database.execute("PRAGMA user_version = 99")
        database.close()
        assert "newer streamfs" in diagnosed(unmounted, "catalogue", 1).detail


def test_a_daemon_that_hangs(unmounted: Mounted) -> None:
    pid = unmounted.mount()
    os.kill(pid, signal.SIGSTOP)
    try:
        finding = diagnosed(unmounted, "daemon", 1)
        assert "did not answer" in finding.detail
        assert "umount --lazy" in finding.advice
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_dead_mount_and_the_advice_clears_it(unmounted: Mounted) -> None:
    os.kill(unmounted.mount(), signal.SIGKILL)

    def dead() -> list[str]:
        items = json.loads(unmounted.run("doctor", "--json", check=False).stdout)["findings"]
        return [
            item["advice"]
            for item in items
            if item["check"] == "mounts" and str(unmounted.mountpoint) in item["detail"]
        ]

    (advice,) = wait_for(dead, "the doctor sees it")
    command = advice.split("'")[1].split()
    assert command[:2] == ["streamfs", "umount"]
    unmounted.run(*command[1:])
    assert dead() == []
    assert shutil.which("mountpoint")
    assert subprocess.run(["mountpoint", "-q", unmounted.mountpoint], timeout=10, check=False).returncode != 0
