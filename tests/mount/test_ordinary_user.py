"""An ordinary user mounts, reads and unmounts without privilege, and is told where FUSE may not be used.

Root runs this in a mount namespace of its own: the device, the interpreter and the package are shown there with the
rights that the test is about, and all of it is gone when the last process in it ends.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mount.namespace import run_in_namespace

PACKAGE = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user"),
    pytest.mark.xdist_group("ordinary-user"),
]


def as_user(user: str, folder: Path, script: str, *, device: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script as the user. In it `streamfs` is the command; `device` is the mode of /dev/fuse, or
    "missing"."""
    prefix, package = Path(sys.prefix), PACKAGE
    prepare = f"""
set -e
mount -t tmpfs -o mode=755 tmpfs /mnt
mkdir /mnt/venv /mnt/package /mnt/python
mount --bind {shlex.quote(str(prefix))} /mnt/venv
mount --bind {shlex.quote(str(package))} /mnt/package
mount --bind {shlex.quote(sys.base_prefix)} /mnt/python
if [ {device} = missing ]; then
    mkdir -p /mnt/dev && touch /mnt/dev/null && mount --bind /dev/null /mnt/dev/null
    mount --rbind /mnt/dev /dev
else
    mknod -m {device if device != "missing" else "0"} /mnt/fuse c 10 229
    mount --bind /mnt/fuse /dev/fuse
fi
cd {shlex.quote(str(folder))}
exec setpriv --reuid={user} --regid={user} --clear-groups --inh-caps=-all env -i \\
    PATH=/usr/bin:/bin:/usr/sbin:/sbin LC_ALL=C.UTF-8 STREAMFS_HOME={shlex.quote(str(folder / "home"))} \\
    PYTHONPATH=/mnt/package:/mnt/venv/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages \\
    PYTHONDONTWRITEBYTECODE=1 LD_LIBRARY_PATH=/mnt/python/lib sh -c "$0"
"""
    command = f'streamfs() {{ {_interpreter()} -m streamfs "$@"; }}\n{script}'
    return subprocess.run(
        ["unshare", "--mount", "--propagation=slave", "sh", "-c", prepare, command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _interpreter() -> str:
    """Where the interpreter is in the namespace; the link in the environment may lead where others cannot go."""
    real = Path(sys.executable).resolve()
    base = Path(sys.base_prefix).resolve()
    return f"/mnt/python/{real.relative_to(base)}" if real.is_relative_to(base) else str(real)


def test_a_user_mounts_reads_changes_and_unmounts(user: str, folder: Path) -> None:
    script = """
set -e
mkdir mnt
streamfs add numbers -- seq 1 100000
streamfs add who --shell 'id -un'
streamfs mount mnt
seq 1 100000 | cmp - mnt/numbers
cat mnt/who
stat -c '%U %a' mnt/numbers
setfattr -n user.streamfs.persist -v 1 mnt/numbers
streamfs mv who folder/me
cat mnt/folder/me
rm mnt/folder/me
streamfs ls
streamfs umount
! grep fuse.streamfs /proc/self/mountinfo | grep "$PWD"
ls mnt
test -z "$(ls home/run | grep -v "^board$")"
i=0
while ps -u "$(id -u)" -o stat=,comm= | grep -v ^Z | grep -q python && [ $i -lt 300 ]; do sleep 0.1; i=$((i+1)); done
ps -u "$(id -u)" -o stat=,comm= | grep -v ^Z | grep python || echo none runs
"""
    done = as_user(user, folder, script, device="0666")
    assert done.stderr == ""
    assert done.stdout.splitlines() == [user, f"{user} 644", user, "numbers", "none runs"]
    assert done.returncode == 0


def test_a_mount_is_the_users_alone_unless_others_are_allowed(user: str, folder: Path) -> None:
    script = """
mkdir mnt
streamfs add it -- echo it
streamfs mount mnt --allow-other
echo "exit code $?"
streamfs mount mnt && cat mnt/it && streamfs umount
streamfs mount /usr
"""
    done = as_user(user, folder, script, device="0666")
    assert done.stdout.splitlines() == ["exit code 1", "it"]
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("streamfs: cannot mount on") and "user_allow_other" in lines[0]
    assert lines[1] == "streamfs: cannot mount on /usr (you must be allowed to write there): fuse_session_mount failed"


def test_a_dead_mount_of_a_user_is_cleared_by_the_next_one(user: str, folder: Path) -> None:
    script = """
set -e
mkdir mnt
streamfs add it -- echo it
streamfs mount mnt
kill -9 $(sed 's/.*"pid": \\([0-9]*\\).*/\\1/' home/state/lock)
streamfs mount mnt
cat mnt/it
streamfs umount
"""
    done = as_user(user, folder, script, device="0666")
    assert (done.stdout, done.returncode) == ("it\n", 0)
    assert done.stderr.startswith("clearing away the dead mount")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(("device", "advice"), [("0600", "you may not open /dev/fuse"), ("missing", "modprobe fuse")])
def test_fuse_that_may_not_be_used_is_said_at_once(device: str, advice: str, user: str, folder: Path) -> None:
    done = as_user(user, folder, "mkdir mnt; streamfs mount mnt", device=device)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("streamfs: ")
    assert advice in line


def test_a_whole_life_in_the_users_own_directories(user: str, folder: Path) -> None:
    """From the first command to what is left behind, without STREAMFS_HOME and without any privilege."""
    script = f"""
exec setpriv --reuid={user} --regid={user} --clear-groups --inh-caps=-all --ambient-caps=-all env -i \\
    PATH="$PATH" LC_ALL=C.UTF-8 HOME={folder} USER={user} bash -ec '
cd
mkdir web streams
head -c 700000 /dev/urandom > web/data.bin
python3 -u -m http.server 0 --bind 127.0.0.1 --directory web > web.log 2>&1 &
server=$!
until grep -qs port web.log; do sleep 0.1; done
port=$(sed -n "s/.* port \\([0-9]*\\).*/\\1/p" web.log)
grep CapEff /proc/self/status | tr -d "\\t"
streamfs doctor | grep PROBLEM || echo "the doctor finds no problem"
streamfs add url/data.bin http://127.0.0.1:$port/data.bin
streamfs add numbers -- seq 1 200000
streamfs mount streams --memory 16MiB
cmp web/data.bin streams/url/data.bin
seq 1 200000 | cmp - streams/numbers
cp streams/numbers copy && seq 1 200000 | cmp - copy
streamfs persist url/data.bin
streamfs save url/data.bin saved.bin && cmp web/data.bin saved.bin
kept=$(getfattr --only-values -n user.streamfs.persisted_path streams/url/data.bin)
until [ "$(getfattr --only-values -n user.streamfs.state streams/url/data.bin)" = complete ]; do sleep 0.1; done
streamfs umount
kill $server
cmp web/data.bin "$kept"
streamfs mount streams
cmp web/data.bin streams/url/data.bin
kill -9 $(sed "s/.*\\"pid\\": \\([0-9]*\\).*/\\1/" .local/state/streamfs/lock)
streamfs mount streams 2>&1 | cut -c 1-26
cmp web/data.bin streams/url/data.bin
streamfs verify | sed "s, [0-9]* blocks.*,,"
streamfs mv url/data.bin data && streamfs rm numbers && streamfs ls
streamfs umount
streamfs logs | grep -c answers
find .cache .local .config -not -type l \\( -perm /077 -o -not -user {user} \\) -path "*/streamfs*" | sort
ls -d .cache/streamfs .config/streamfs .local/state/streamfs'
"""
    done = run_in_namespace(script)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "CapEff:0000000000000000",
        "the doctor finds no problem",
        "clearing away the dead mou",
        "ok       numbers ",
        "ok       url/data.bin ",
        "data",
        "3",
        ".cache/streamfs",
        ".config/streamfs",
        ".local/state/streamfs",
    ]
    assert done.returncode == 0
