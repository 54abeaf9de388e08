"""An origin for each test, and every test over each transport."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from streamfs.sources import attempts
from streamfs.sources.transports import Transports
from tests.faults.origin import Origin, serving

TRANSPORTS = ["plain", "curl"]


@pytest.fixture
async def origin() -> AsyncIterator[tuple[Origin, str]]:
    async with serving() as running:
        yield running


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    monkeypatch.setenv("STREAMFS_TRANSPORT", name)
    return name


@pytest.fixture
async def transports(transport: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Transports]:
    # What matters here is how often and whether something is tried again, not the time between.
    monkeypatch.setattr(attempts, "BACKOFF_FIRST", 0.002)
    async with Transports() as made:
        yield made
