"""O_NONBLOCK on files whose bytes still come in: it is what the descriptor says now that counts."""

from __future__ import annotations

import sys

from tests.mount.mounted import Mounted, Tap

_AS_PLAYERS_DO = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY | os.O_NONBLOCK)
fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)
print("asks", flush=True)
sys.stdout.buffer.write(os.read(fd, 5))
"""
_STAYING_SO = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY | os.O_NONBLOCK)
try:
    print(os.read(fd, 5))
except BlockingIOError:
    print("nothing yet")
"""


def test_a_program_that_took_o_nonblock_back_waits_for_its_bytes(fs: Mounted, tap: Tap) -> None:
    path = fs.add("live", *tap.argv)
    player = fs.start([sys.executable, "-c", _AS_PLAYERS_DO, path])
    assert player.stdout is not None
    assert player.stdout.readline() == b"asks\n"
    tap.write(b"hello")
    assert player.communicate(timeout=20)[0] == b"hello"


def test_a_program_that_kept_o_nonblock_does_not_wait(fs: Mounted, tap: Tap) -> None:
    path = fs.add("live", *tap.argv)
    looker = fs.start([sys.executable, "-c", _STAYING_SO, path])
    assert looker.communicate(timeout=20)[0] == b"nothing yet\n"
