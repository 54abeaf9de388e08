"""mount(8) mounts the type streamfs, from a table and by hand; umount(8) takes it away.

Everything here happens in a mount namespace of its own, with the real mount(8), which finds the helper in /sbin.
"""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from pathlib import Path

import click
import pytest

from streamfs.cli.helper import parse_options
from streamfs.cli.mount import mount
from tests.mount.namespace import SCRATCH, run_in_namespace

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a mount namespace"),
    pytest.mark.xdist_group("ordinary-user"),
]
HELPER = Path(sys.prefix) / "bin" / "mount.streamfs"
GONE = """
gone() {
    i=0
    while [ -s "$1/state/lock" ] && [ $i -lt 300 ]; do sleep 0.1; i=$((i+1)); done
    [ ! -s "$1/state/lock" ]
}
"""
"""A daemon whose mount was taken away ends by itself, and gives its lock back."""


def test_a_line_in_fstab_is_mounted_and_unmounted_like_any_other() -> None:
    home, folder = f"{SCRATCH}/home", f"{SCRATCH}/my streams"
    line = (
        f"streamfs {folder.replace(' ', chr(92) + '040')} streamfs noauto,_netdev,nofail,x-systemd.automount,"
        f"home={home},memory=64MiB,cache_size=1GiB,log-level=debug,noatime 0 0\n"
    )
    script = f"""{GONE}
set -e
mkdir "{folder}"
export STREAMFS_HOME={home}
streamfs add numbers -- seq 1 100000
mount "{folder}"
seq 1 100000 | cmp - "{folder}/numbers"
findmnt -n -o FSTYPE,SOURCE "{folder}"
mount -a                            # noauto: nothing to do
streamfs ls
umount "{folder}"
gone {home}
ls "{folder}"
cd {SCRATCH} && mkdir streamfs      # mount(8) makes a path of the source where it finds one
mount -t streamfs streamfs "{folder}" -o home={home},ro && cat "{folder}/numbers" | tail -n 1
touch "{folder}/x" 2>&1 | grep -c 'Read-only' || true
umount "{folder}"
gone {home}
"""
    done = run_in_namespace(script, files={"/etc/fstab": line})
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["fuse.streamfs streamfs", "numbers", "100000", "1"]
    assert done.returncode == 0


def test_mount_all_mounts_once_from_a_table_of_its_own() -> None:
    home, folder = f"{SCRATCH}/home", f"{SCRATCH}/mnt"
    script = f"""{GONE}
set -e
mkdir {folder}
printf 'streamfs {folder} streamfs home={home} 0 0\\n' > {SCRATCH}/table
STREAMFS_HOME={home} streamfs add it -- echo it
mount -a --fstab {SCRATCH}/table
mount -a --fstab {SCRATCH}/table
cat {folder}/it
grep -c ' {folder} ' /proc/self/mountinfo
umount {folder}
gone {home}
"""
    done = run_in_namespace(script)
    assert (done.stderr, done.stdout, done.returncode) == ("", "it\n1\n", 0)


def test_root_mounts_for_a_user(user: str, folder: Path) -> None:
    account = pwd.getpwnam(user)
    script = f"""{GONE}
set -e
cd {folder}
setpriv --reuid={user} --regid={user} --clear-groups sh -ec 'mkdir mnt; export STREAMFS_HOME={folder}/home
streamfs add who -- sh -c "id -un; id -G; env"'
mount -t streamfs streamfs {folder}/mnt -o uid=$1,allow_other,home={folder}/home
head -n 2 mnt/who
grep -E '^(HOME|STREAMFS_HOME|SECRET|LC_ALL)=' mnt/who | sort
stat -c %U mnt/who home/state/catalog.db
umount {folder}/mnt
gone {folder}/home
"""
    for name in (user, str(account.pw_uid)):
        done = run_in_namespace(
            script.replace("$1", name).replace("mount -t", "SECRET=x mount -t"),
            files={"/etc/fuse.conf": "user_allow_other\n"},
        )
        assert done.stderr == ""
        expected = [
            user,
            str(account.pw_gid),
            f"HOME={account.pw_dir}",
            "LC_ALL=C.UTF-8",
            f"STREAMFS_HOME={folder}/home",
        ]
        assert done.stdout.splitlines() == [*expected, user, user]
        subprocess.run(["rm", "-rf", folder / "home", folder / "mnt"], check=True)


def test_a_user_mounts_what_fstab_lets_users_mount(user: str, folder: Path) -> None:
    script = f"""{GONE}
set -e
cd {folder}
setpriv --reuid={user} --regid={user} --clear-groups sh -ec '
export STREAMFS_HOME={folder}/home
mkdir mnt
streamfs add it -- echo it
mount {folder}/mnt
cat mnt/it
stat -c %U mnt/it
streamfs umount'
gone {folder}/home
"""
    table = f"streamfs {folder}/mnt streamfs noauto,user,home={folder}/home 0 0\n"
    done = run_in_namespace(script, files={"/etc/fstab": table})
    assert (done.stderr, done.stdout.splitlines(), done.returncode) == ("", ["it", user], 0)


def test_what_is_wrong_is_said_in_one_line_and_nothing_is_mounted(user: str, folder: Path) -> None:
    table = f"streamfs {SCRATCH} streamfs noauto,uid={user},home={folder}/home 0 0\n"
    script = f"""
set +e
mount -t streamfs streamfs {SCRATCH} -o memry=1MiB; echo $?
mount -t streamfs streamfs {SCRATCH}/nowhere -o home={SCRATCH}/home; echo $?
mount -t streamfs streamfs {SCRATCH} -o memory=lots,home={SCRATCH}/home; echo $?
mount {SCRATCH}; echo $?
grep -c "{SCRATCH} .*fuse.streamfs" /proc/self/mountinfo
"""
    done = run_in_namespace(script, files={"/etc/fstab": table})
    assert done.stdout.splitlines()[-1] == "0"
    errors = [line for line in done.stderr.splitlines() if not line.startswith("       ")]
    assert len(errors) == 4, done.stderr
    assert "memry=1MiB" in errors[0]
    assert "lots" in errors[2]
    assert "cannot mount" in errors[3]


def helper(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([HELPER, *words], capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["streamfs"], "usage"),
        (["none", "/tmp"], "must be 'streamfs'"),
        (["streamfs", "/tmp", "-q"], "usage"),
        (["streamfs", "/tmp", "-o", "colour=red"], "unknown option 'colour=red'"),
        (["streamfs", "/tmp", "-o", "memory"], "needs a value"),
        (["streamfs", "/tmp", "-o", "home=here"], "begins with /"),
        (["streamfs", "/tmp", "-o", "uid=nobody-at-all"], "no user"),
        (["streamfs", "/tmp", "-o", "remount,ro"], "unmount it"),
        (["streamfs", "/tmp", "-o", 'memory="1MiB'], "quote"),
        (["streamfs", "/tmp", "-N", "/proc/1/ns/mnt"], "namespace"),
    ],
)
def test_what_makes_no_sense_is_refused(words: list[str], said: str) -> None:
    done = helper(*words)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("mount.streamfs: ")
    assert said in line


def test_a_trial_says_what_would_be_done() -> None:
    options = 'rw,memory=1MiB,cache_dir="/srv/a,b",allow_other,ro,_netdev,x-gvfs-hide,user'
    done = helper("streamfs", "/srv/streams", "-fv", "-o", options)
    assert done.returncode == 0
    assert done.stdout.strip().endswith(
        "as root: streamfs mount /srv/streams --memory=1MiB --cache-dir=/srv/a,b --allow-other --read-only"
    )


def test_every_option_of_mount_can_stand_in_fstab() -> None:
    for parameter in mount.params:
        if isinstance(parameter, click.Option) and "--foreground" not in parameter.opts:
            (name,) = (option.removeprefix("--") for option in parameter.opts)
            special = {"allow-other": "allow_other", "read-only": "ro"}
            known = parse_options(special.get(name) or f"{name}=x")
            assert known.arguments == ([f"--{name}"] if parameter.is_flag else [f"--{name}=x"])


def test_sloppy_passes_over_what_it_does_not_know() -> None:
    done = helper("streamfs", "/srv/streams", "-fvs", "-o", "colour=red,ttl=1h")
    assert done.stdout.strip().endswith("streamfs mount /srv/streams --ttl=1h")
