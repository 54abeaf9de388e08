"""What tests of several modules stand on."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

from streamfs.engine import recording
from tests import servers
from tests.crash.killer import CALLS, patch
from tests.crash.powercut import Disk
from tests.servers import Certificates

settings.register_profile("streamfs", deadline=None)  # a busy machine proves nothing
settings.load_profile("streamfs")
# Shells start what runs in the background with this ignored, and every program started here would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return servers.make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def disks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Disk]]:
    """The disk in it, if there is one, sees every call that changes a file."""
    holder: list[Disk] = []
    for name in (*CALLS, "_punch_hole"):
        owner = recording if name == "_punch_hole" else os
        monkeypatch.setattr(owner, name, getattr(owner, name))  # to be put back
    patch(lambda name, real, arguments: holder[0].around(name, real, arguments) if holder else real(*arguments))
    yield holder
    holder.clear()
