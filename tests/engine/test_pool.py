import ctypes
import errno
import mmap
import weakref

import pytest

from streamfs.engine.pool import LARGE, SMALL, Pool
from tests.fakes import Crew


def test_pieces_stay_within_the_budget():
    pool = Pool(LARGE + SMALL)
    assert len(pool.take(LARGE)) == LARGE
    assert len(pool.take(SMALL)) == SMALL
    assert pool.used == LARGE + SMALL
    assert pool.take(SMALL) is None
    assert pool.take_fails()


def test_a_piece_that_was_given_back_is_handed_out_again():
    pool = Pool(2 * LARGE)
    piece = pool.take(LARGE)
    pool.give(piece)
    assert pool.used == 0
    assert pool.take(LARGE) is piece


def test_idle_pieces_make_place_for_pieces_of_the_other_size():
    pool = Pool(LARGE)
    small = [pool.take(SMALL) for _ in range(LARGE // SMALL)]
    assert pool.take(LARGE) is None
    for piece in small:
        pool.give(piece)
    assert not pool.take_fails()
    assert pool.take(LARGE) is not None
    assert pool.take(SMALL) is None


def test_trim_lets_memory_go_that_was_idle_since_the_trim_before():
    pool = Pool(2 * LARGE)
    used, idle = pool.take(SMALL), pool.take(SMALL)
    lost = weakref.ref(idle)
    pool.give(idle, used)
    del idle
    assert not pool.trim(LARGE)  # just given back: it may be asked for again
    assert lost() is not None
    assert pool.take(SMALL) is used
    pool.give(used)
    assert not pool.trim(LARGE)
    assert lost() is None
    assert pool.take(SMALL) is used
    pool.give(used)


def test_trim_goes_on_in_steps():
    pool = Pool(4 * LARGE)
    pieces = [pool.take(LARGE) for _ in range(4)]
    lost = [weakref.ref(piece) for piece in pieces]
    pool.give(*pieces)
    del pieces
    assert not pool.trim(LARGE)
    kept = []
    while pool.trim(LARGE):
        kept.append(sum(piece() is not None for piece in lost))
    assert kept == [3, 2, 1]
    assert not any(piece() for piece in lost)


def test_pieces_begin_at_a_page():
    pool = Pool(2 * LARGE)
    for size in (SMALL, LARGE):
        address = ctypes.addressof(ctypes.c_char.from_buffer(pool.take(size)))
        assert address % mmap.PAGESIZE == 0


def test_a_budget_that_holds_no_piece_is_refused():
    with pytest.raises(ValueError):
        Pool(LARGE - 1)


def test_on_give_runs_without_the_lock_so_it_may_take():
    taken = []
    pool = Pool(LARGE)
    piece = pool.take(SMALL)
    pool.on_give = lambda: taken.append(pool.take(SMALL))
    pool.give(piece)
    assert taken == [piece]


def test_no_piece_is_handed_out_twice_to_many_threads():
    pool = Pool(LARGE)

    def work(name: int) -> None:
        for _ in range(300):
            piece = pool.take(SMALL)
            if piece is not None:
                piece[:4] = name.to_bytes(4, "little")
                assert pool.used <= pool.budget
                assert piece[:4] == name.to_bytes(4, "little")
                pool.give(piece)

    with Crew() as crew:
        for name in range(8):
            crew.start(work, name)
    assert pool.used == 0


def test_where_the_system_has_no_memory_the_pool_is_spent(monkeypatch):
    def none_left(*_: object, **__: object) -> mmap.mmap:
        raise OSError(errno.ENOMEM, "no memory")

    pool = Pool(4 * LARGE)
    piece = pool.take(SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(mmap, "mmap", none_left)
        assert pool.take(LARGE) is None
        with pytest.raises(MemoryError, match="no memory left"):
            pool.take(SMALL, beyond=True)
        assert pool.used == SMALL
        assert pool.take_fails()
        pool.give(piece)
        assert not pool.take_fails()  # it is tried again
        assert pool.take(SMALL) is piece
    assert pool.take(LARGE) is not None
