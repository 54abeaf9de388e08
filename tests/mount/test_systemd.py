"""The unit of an ordinary user under a live `systemd --user`: started by hand in namespaces and a cgroup of its own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.namespace import run_in_namespace

SYSTEMD = "/usr/lib/systemd/systemd"


@pytest.fixture
def cgroup() -> Iterator[str]:
    """The name of a control group, made by the test, that is gone after it."""
    name = f"streamfs-test-{os.getpid()}"
    try:
        yield name
    finally:
        gone = f"mount -t cgroup2 none /mnt && find /mnt/{name} -depth -type d -exec rmdir {{}} ';'"
        subprocess.run(["unshare", "--mount", "sh", "-c", gone], check=True, capture_output=True, timeout=30)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.skipif(not Path(SYSTEMD).exists(), reason="the package systemd is missing")
@pytest.mark.xdist_group("ordinary-user")
def test_a_users_unit_runs_under_a_live_systemd(user: str, folder: Path, cgroup: str) -> None:
    """Enabled and started it is active once the mount answers; killed it is back; stopped, the mount is gone."""
    as_user = f"""
set -e
export XDG_RUNTIME_DIR={folder}/run HOME={folder} PATH=/usr/sbin:/usr/bin
mkdir -m 700 run
{SYSTEMD} --user --log-target=console > log 2>&1 &
until systemctl --user is-active -q basic.target 2> /dev/null
do kill -0 $!; sleep 0.1; done
streamfs add it -- echo it
streamfs systemd {folder}/streams --install > told
systemctl --user daemon-reload
systemctl --user enable -q --now streamfs
systemctl --user is-active streamfs
cat streams/it
systemctl --user show -P SubState streamfs
first=$(systemctl --user show -P MainPID streamfs)
streamfs status | grep -c ' it'
systemctl --user kill -s KILL streamfs
until second=$(systemctl --user show -P MainPID streamfs)
systemctl --user is-active -q streamfs && [ $second != $first ]
do sleep 0.1; done
cat streams/it
before=$(date +%s%N)
systemctl --user stop streamfs
echo stopped within $((($(date +%s%N) - before) / 1000000000 / 5 * 5 + 5)) s
! mountpoint -q streams
systemctl --user show -P Result streamfs
[ ! -e /proc/$second ]
"""
    (folder / "script").write_text(as_user)
    manager = f"""
mkdir -p /mnt/cg /run/systemd
mount -t tmpfs tmpfs /run/systemd
mkdir /run/systemd/system
mount -t cgroup2 none /mnt/cg
mkdir /mnt/cg/{cgroup}
echo $$ > /mnt/cg/{cgroup}/cgroup.procs
chown -R {user} /mnt/cg/{cgroup}
umount /mnt/cg
cd {folder}
exec unshare --cgroup --mount --propagation=slave sh -ec '
mount -t cgroup2 none /sys/fs/cgroup
exec setpriv --reuid={user} --regid={user} --clear-groups timeout 100 sh script'
"""
    done = run_in_namespace(manager, within=110)
    log = (folder / "log").read_text() if (folder / "log").exists() else ""
    assert done.returncode == 0, done.stdout + done.stderr + log
    assert done.stdout.splitlines() == ["active", "it", "running", "1", "it", "stopped within 5 s", "success"]
