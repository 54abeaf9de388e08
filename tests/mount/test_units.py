"""The units that `streamfs systemd` writes: systemd takes them, and what they start and bound works."""

from __future__ import annotations

import configparser
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.mount.mounted import Mounted
from tests.mount.namespace import run_in_namespace

VERIFY = shutil.which("systemd-analyze")
ODD = "str eams %n $HOME \"x'\\"


def verified(text: str, folder: Path, *options: str) -> None:
    """Fails the test unless systemd takes the unit without a word about it."""
    assert VERIFY is not None, "the package systemd is missing"
    path = folder / "streamfs.service"
    path.write_text(text)
    done = subprocess.run(
        [VERIFY, *options, "--man=no", "--recursive-errors=no", "verify", path],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"XDG_RUNTIME_DIR": str(folder), "HOME": str(folder)},
    )
    about = [line for line in done.stderr.splitlines() if "streamfs" in line]
    assert about == []
    assert done.returncode == 0, done.stderr


def settings(text: str) -> dict[str, str]:
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(text)
    return dict(parser["Service"])


@pytest.mark.parametrize("name", ["streams", ODD])
def test_systemd_takes_the_units(name: str, unmounted: Mounted, tmp_path: Path) -> None:
    place = tmp_path / name
    verified(unmounted.run("systemd", place, "--memory", "1GiB").stdout, tmp_path, "--user")
    verified(unmounted.run("systemd", place, "--system").stdout, tmp_path)
    verified(unmounted.run("systemd", place, "--system", "--run-as", "games", "--allow-other").stdout, tmp_path)


def test_what_a_unit_starts_is_the_daemon_in_this_home(unmounted: Mounted, tmp_path: Path) -> None:
    text = unmounted.run("systemd", unmounted.mountpoint, "--cache-size", "1GiB", "--log-format", "json").stdout
    service = settings(text)
    assert service["Type"] == "notify"
    assert service["Environment"] == f"STREAMFS_HOME={unmounted.home}"
    process = unmounted.start(shlex.split(service["ExecStart"]))
    assert process.stderr is not None
    assert b"answers" in process.stderr.readline()
    process.terminate()
    assert process.wait(10) == 0


@pytest.mark.parametrize("option", ["--system", "--user"])
def test_nothing_in_a_unit_hides_the_mount(option: str, unmounted: Mounted) -> None:
    run_as = ["--system", "--run-as", "nobody"] if option == "--system" else []
    names = settings(unmounted.run("systemd", "/srv/streams", *run_as).stdout)
    assert not [name for name in names if re.match("Private|Protect|Restrict(?!.*art)|SystemCall|NoNew|ReadOnly", name)]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.xdist_group("ordinary-user")
def test_a_user_mounts_within_the_bounds_of_the_system_unit(user: str, folder: Path) -> None:
    script = f"""
unit=$(streamfs systemd {folder}/mnt --system --run-as {user})
bounds=$(echo "$unit" | sed -n 's/^CapabilityBoundingSet=//p' | tr A-Z a-z | sed 's/cap_/+/g; s/ /,/g')
[ -n "$bounds" ]
cd {folder}
setpriv --reuid={user} --regid={user} --clear-groups --bounding-set="-all,$bounds" sh -ec '
export STREAMFS_HOME={folder}/home
mkdir mnt
streamfs add it -- echo it
streamfs mount mnt
cat mnt/it
grep CapBnd /proc/$(sed "s/.*pid\\": \\([0-9]*\\).*/\\1/" home/state/lock)/status | tr -d "\\t"
streamfs umount
! mountpoint -q mnt
fusermount3 -uqz mnt || echo "not mounted any more"'
"""
    done = run_in_namespace(script)
    assert done.stderr == ""
    bounds = 1 << 21 | 1 << 7 | 1 << 6 | 1 << 2  # CAP_SYS_ADMIN, CAP_SETUID, CAP_SETGID, CAP_DAC_READ_SEARCH
    assert done.stdout.splitlines() == ["it", f"CapBnd:{bounds:016x}", "not mounted any more"]
    assert done.returncode == 0


def test_installing_writes_the_unit_where_systemd_looks(unmounted: Mounted, tmp_path: Path) -> None:
    unmounted.environment["XDG_CONFIG_HOME"] = str(tmp_path / "config")
    path = tmp_path / "config" / "systemd" / "user" / "streamfs.service"
    for options in ([], ["--memory", "1GiB"]):
        told = unmounted.run("systemd", "/srv/streams", *options, "--install").stdout
        assert str(path) in told
        assert "systemctl --user enable --now streamfs" in told
        assert path.read_text() == unmounted.run("systemd", "/srv/streams", *options).stdout
    assert path.stat().st_mode & 0o777 == 0o644
    path.write_text("[Service]\n")
    assert "did not write it" in unmounted.refused("systemd", "/srv/streams", "--install")
    assert path.read_text() == "[Service]\n"
    unmounted.run("systemd", "/srv/streams", "--install", "--name", "other")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["/srv", "--memory", "lots"], "lots"),
        (["/srv", "--no-such-option"], "--no-such-option"),
        (["/srv", "--run-as", "nobody"], "--system"),
        (["/srv", "--name", "a/b"], "no name"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: list[str], said: str, unmounted: Mounted) -> None:
    assert said in unmounted.refused("systemd", *arguments, code=2)


def test_a_user_that_is_not_there_is_said(unmounted: Mounted) -> None:
    assert "no user" in unmounted.refused("systemd", "/srv", "--system", "--run-as", "nobody-at-all")
