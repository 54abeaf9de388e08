"""Files behind ftp, sftp and a proxy, read through the mount by ordinary programs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import servers
from tests.mount.mounted import Mounted, checked, wait_for

DATA = random.Random(5).randbytes(9_000_017)


@pytest.fixture
def served(tmp_path: Path) -> Path:
    return servers.old_file(tmp_path / "served", "data", DATA)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


@pytest.mark.parametrize("kind", ["ftp", "sftp", "http-proxy"])
def test_programs_read_a_file_behind_other_protocols_and_proxies(
    kind: str, served: Path, stack: ExitStack, unmounted: Mounted, tmp_path: Path
) -> None:
    match kind:
        case "ftp":
            words = [f"ftp://{stack.enter_context(servers.vsftpd(served)).authority}/data"]
        case "sftp":
            server = stack.enter_context(servers.sshd(served))
            unmounted.environment["STREAMFS_KNOWN_HOSTS"] = str(server.files["known_hosts"])
            words = ["--key", str(server.files["key"]), f"sftp://{server.authority}{served}/data"]
        case _:
            proxy = stack.enter_context(servers.http_proxy())
            url = f"http://{stack.enter_context(servers.nginx(served)).authority}/data"
            words = ["--proxy", f"http://{proxy.authority}", url]
    unmounted.mount()
    try:
        path = unmounted.add("file", *words)
        wait_for(lambda: path.stat().st_size == len(DATA), "the probe has told the size")
        assert checked(["ls", "-l", path]).split()[4] == str(len(DATA)).encode()
        assert checked(["tail", "-c", "1000", path]) == DATA[-1000:]
        checked(["cp", path, tmp_path / "copy"])
        assert (tmp_path / "copy").read_bytes() == DATA
    finally:
        unmounted.umount()  # before its server ends


@pytest.mark.parametrize("kind", ["ftp", "sftp"])
def test_a_file_server_is_logged_in_to_once_for_a_file_that_is_read_in_order(
    kind: str, served: Path, stack: ExitStack, unmounted: Mounted
) -> None:
    """An exchange that ends in the middle of a file costs its login."""
    if kind == "ftp":
        server = stack.enter_context(servers.vsftpd(served))
        words, login = [f"ftp://{server.authority}/data"], "OK LOGIN"
    else:
        server = stack.enter_context(servers.sshd(served))
        unmounted.environment["STREAMFS_KNOWN_HOSTS"] = str(server.files["known_hosts"])
        words = ["--key", str(server.files["key"]), f"sftp://{server.authority}{served}/data"]
        login = "Accepted publickey"
    unmounted.mount()
    try:
        path = unmounted.add("file", "--no-probe", *words)
        assert checked(["cat", path]) == DATA
        assert server.log().count(login) == 1
    finally:
        unmounted.umount()  # before its server ends
