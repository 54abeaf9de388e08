import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from streamfs.engine.buffer import Buffer
from streamfs.engine.pool import LARGE, Pool
from streamfs.engine.recording import Header, Recording
from streamfs.engine.replies import KEPT, Replies
from tests.fakes import named_bytes

DATA = named_bytes("replies", 1, 2 * LARGE)


def test_memory_is_used_again_once_no_view_of_it_is_left():
    replies = Replies()
    view = replies.take(1000)
    view[:] = b"x" * 1000
    memory = id(view.obj)
    del view
    again = replies.take(1000)
    assert id(again.obj) == memory and len(again) == 1000


def _released(view: memoryview) -> memoryview:
    part = view[10:20]
    view.release()
    return part


@pytest.mark.parametrize(
    "keep",
    [
        pytest.param(lambda view: view, id="all of it"),
        pytest.param(lambda view: view[10:20], id="a slice"),
        pytest.param(_released, id="a slice of what was released"),
        pytest.param(lambda view: view.cast("H"), id="a cast"),
        pytest.param(lambda view: memoryview(view.obj), id="one made of its memory"),
    ],
)
def test_whoever_holds_a_view_never_sees_other_bytes(keep: Callable[[memoryview], memoryview]) -> None:
    replies = Replies()
    view = replies.take(1000)
    view[:] = b"x" * 1000
    kept = keep(view)
    before = bytes(kept)
    del view
    for size in (1, 1000, 64 * 1024, LARGE):
        others = [replies.take(size) for _ in range(3)]
        assert all(other.obj is not kept.obj for other in others)
        for other in others:
            other[:] = b"y" * size
    assert bytes(kept) == before


def test_two_that_take_at_once_never_share():
    replies = Replies()
    wrong: list[int] = []

    def work(mark: int) -> None:
        for _ in range(2000):
            view = replies.take(64)
            view[:] = bytes([mark]) * 64
            threading.Event().wait(0)  # lets others run
            if set(view) != {mark}:
                wrong.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_is_kept_is_bounded_and_given_back_when_idle():
    pool = Pool(4 * LARGE)
    replies = pool.replies
    views = [replies.take(LARGE) for _ in range(7)] + [replies.take(2 * KEPT)]
    assert replies.kept == KEPT
    del views
    while pool.trim(LARGE):
        pass
    assert replies.kept == KEPT  # asked for since the last trim
    while pool.trim(LARGE):
        pass
    assert replies.kept == 0


def test_a_reply_from_the_disk_that_is_held_on_to_stays_what_it_is(tmp_path: Path) -> None:
    buffer = Buffer(Pool(4 * LARGE), recording=Recording.create(tmp_path / "data", Header(key="k", generation=1)))
    writer = buffer.writer(0)
    writer.append(memoryview(DATA), lambda: pytest.fail("there is memory enough"))
    writer.close()
    while buffer.spill(all_of_it=True):
        pass
    held = []
    for offset in (0, 5, LARGE, LARGE - 70_000, 3, LARGE // 2):
        for size in (LARGE // 2, 4096, 100_000):
            found = buffer.look(offset, size)
            view = buffer.settle(found, wait=True)
            held.append((offset, view))
            for start, kept in held:
                assert kept == DATA[start : start + len(kept)]
    buffer.close()
