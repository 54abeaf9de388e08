"""A stalled event loop is reported once, with the place where it stands."""

from __future__ import annotations

import threading

import pytest
import trio

from streamfs import watchdog
from streamfs.watchdog import Watchdog


async def test_a_loop_that_stands_still_is_reported_with_its_stack(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watchdog, "STALLED_AFTER", 0.1)
    monkeypatch.setattr(watchdog, "BEAT_EVERY", 0.01)
    reported = threading.Event()

    class Noticing(Watchdog):
        def _stack(self) -> str:
            reported.set()
            return super()._stack()

    dog = Noticing()

    def blocks_the_loop() -> bool:
        return reported.wait(30)

    with dog.watching():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(dog.beat)
            assert blocks_the_loop()
            nursery.cancel_scope.cancel()
    assert dog.stalls == 1
    assert "blocks_the_loop" in caplog.text


async def test_a_loop_that_lives_is_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    dog = Watchdog()
    with dog.watching():
        with trio.move_on_after(3 * watchdog.BEAT_EVERY):
            await dog.beat()
    assert dog.stalls == 0
    assert not caplog.records
