"""Many opens of one stream whose source does not answer end together, not one after another."""

from __future__ import annotations

from pathlib import Path

import trio

from streamfs.errors import SourceStalled
from tests.sourcefakes import FakeSource, Origin, a_house


async def test_who_waits_in_line_shares_the_failure_of_an_attempt_that_began_later(
    tmp_path: Path, autojump_clock: object
) -> None:
    class Silent(FakeSource):
        async def open(self, *_: object) -> None:  # type: ignore[override]
            self.origin.opens.append((0, None))
            await trio.sleep(5)
            raise SourceStalled("nothing in 5 s")

    failed = []
    async with a_house(tmp_path / "cache") as house:
        stream = house.stream(Origin())
        stream.source = Silent(house.origins[0])

        async def opener() -> None:
            try:
                await stream.open()
            except SourceStalled as error:
                failed.append(error)

        with trio.fail_after(11):
            async with trio.open_nursery() as nursery:
                for _ in range(50):
                    nursery.start_soon(opener)
        assert len(failed) == 50
        assert len(house.origins[0].opens) <= 2
