import pytest

from streamfs.engine.state import BufferState, Waiter, Want
from streamfs.errors import Closed, CommandFailed, Damaged, NoSpace, OutsideWindow, SourceChanged, SourceFailed


class Bell:
    def __init__(self) -> None:
        self.rung = 0

    def __call__(self) -> None:
        self.rung += 1


def waiting(state: BufferState, start: int, size: int) -> Bell:
    want = state.want(start, size)
    assert want.missing is not None
    bell = Bell()
    state.wait(Waiter(want.missing, want.stop, bell))
    return bell


def test_a_read_is_ready_once_all_its_bytes_are_present():
    state = BufferState()
    state.received(0, 5)
    state.received(7, 9)
    assert state.want(0, 5) == Want(5, None)
    assert state.want(0, 6) == Want(6, 5)
    assert state.want(4, 4) == Want(8, 5)
    assert state.want(7, 2) == Want(9, None)
    assert state.want(100, 1) == Want(101, 100)


def test_a_known_size_clips_a_read_and_nothing_lies_past_it():
    state = BufferState(size=10)
    assert state.want(8, 5) == Want(10, 8)
    assert state.want(10, 5) == Want(10, None)
    assert state.want(50, 5) == Want(50, None)
    state.received(0, 10)
    assert state.want(8, 5) == Want(10, None)
    assert state.complete


def test_size_zero_is_answered_at_once_anywhere():
    assert BufferState().want(1000, 0) == Want(1000, None)


def test_arrival_wakes_exactly_the_readers_it_satisfies():
    state = BufferState()
    first, second, far = waiting(state, 0, 5), waiting(state, 0, 8), waiting(state, 100, 1)
    state.received(0, 5)
    assert (first.rung, second.rung, far.rung) == (1, 0, 0)
    state.received(5, 7)
    assert (first.rung, second.rung, far.rung) == (1, 0, 0)
    state.received(7, 8)
    assert (first.rung, second.rung, far.rung) == (1, 1, 0)
    assert state.waiting == 1


def test_arrival_around_a_gap_does_not_wake():
    state = BufferState()
    bell = waiting(state, 0, 10)
    state.received(5, 10)
    assert bell.rung == 0
    state.received(0, 5)
    assert bell.rung == 1


def test_the_end_wakes_everybody_once():
    state = BufferState()
    bells = [waiting(state, 0, 5), waiting(state, 50, 5)]
    state.received(0, 3)
    state.sized(3)
    assert [bell.rung for bell in bells] == [1, 1]
    assert state.want(0, 5) == Want(3, None)
    assert state.waiting == 0


def test_a_forgotten_waiter_is_not_woken():
    state = BufferState()
    bell = Bell()
    waiter = Waiter(0, 5, bell)
    state.wait(waiter)
    state.forget(waiter)
    state.forget(waiter)
    state.received(0, 5)
    state.wake_all()
    assert bell.rung == 0


def test_wake_one_wakes_who_waited_longest():
    state = BufferState()
    first, second = waiting(state, 0, 5), waiting(state, 0, 5)
    state.wake_one()
    assert (first.rung, second.rung) == (1, 0)
    state.wake_one()
    state.wake_one()
    assert (first.rung, second.rung) == (1, 1)


def test_a_size_that_contradicts_what_is_known_is_refused_and_changes_nothing():
    declared = BufferState(size=10)
    with pytest.raises(SourceFailed, match="had declared 10"):
        declared.sized(9)
    assert declared.size == 10
    longer = BufferState()
    longer.received(0, 10)
    with pytest.raises(SourceFailed):
        longer.sized(9)
    assert longer.size is None
    longer.sized(10)
    longer.sized(10)


def test_failure_raises_for_missing_bytes_every_time_and_leaves_present_ones_readable():
    state = BufferState()
    state.received(0, 5)
    bell = waiting(state, 5, 1)
    state.fail(SourceFailed("gone"))
    assert bell.rung == 1
    for _ in range(3):
        with pytest.raises(SourceFailed, match="gone"):
            state.want(3, 5)
    assert state.want(0, 5) == Want(5, None)
    state.retry()
    assert state.want(3, 5).missing == 5


def test_doom_takes_present_bytes_too():
    state = BufferState(size=5)
    state.received(0, 5)
    state.doom(SourceChanged("another version"))
    with pytest.raises(SourceChanged):
        state.want(0, 1)
    assert state.available(0, 5) == 0


@pytest.mark.parametrize("error", [Closed("closed"), CommandFailed("exit 3", 3), NoSpace("full")])
def test_each_reader_raises_an_exception_of_its_own(error):
    state = BufferState()
    state.doom(error)
    seen = []
    for _ in range(2):
        with pytest.raises(type(error)) as caught:
            state.want(0, 1)
        seen.append(caught.value)
    assert seen[0] is not seen[1] and error not in seen
    assert [str(e) for e in seen] == [str(error)] * 2
    assert [vars(e) for e in seen] == [vars(error)] * 2
    assert error.__traceback__ is None


def test_the_cause_of_a_failure_reaches_every_reader():
    state = BufferState()
    cause = OSError("cable")
    failure = SourceFailed("broke")
    failure.__cause__ = cause
    state.fail(failure)
    for _ in range(2):
        with pytest.raises(SourceFailed) as caught:
            state.want(0, 1)
        assert caught.value.__cause__ is cause


def test_bytes_lost_for_good_are_damaged_and_others_are_missing():
    state = BufferState(size=20)
    state.received(0, 20)
    state.lost(5, 8, for_good=True)
    state.lost(10, 12, for_good=False)
    with pytest.raises(Damaged):
        state.want(0, 6)
    assert state.want(0, 5) == Want(5, None)
    assert state.want(9, 5).missing == 10
    assert not state.complete
    state.received(5, 8)
    assert state.want(0, 10) == Want(10, None)


def test_bytes_behind_the_window_are_gone_and_those_ahead_notice_nothing():
    state = BufferState()
    state.received(0, 100)
    bell = waiting(state, 90, 20)
    state.raise_floor(50)
    state.raise_floor(40)
    assert bell.rung == 1  # to look again
    with pytest.raises(OutsideWindow):
        state.want(49, 5)
    assert state.want(50, 5) == Want(55, None)
    assert state.available(0, 100) == 0
    assert state.floor == 50


def test_is_waited_for_looks_at_the_next_missing_byte_only():
    state = BufferState()
    waiting(state, 10, 10)
    assert state.is_waited_for(10, 11)
    assert state.is_waited_for(0, None)
    assert not state.is_waited_for(11, None)
    state.received(10, 15)
    assert state.is_waited_for(15, 16)
    assert not state.is_waited_for(0, 15)
