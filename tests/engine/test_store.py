import pytest

from streamfs.engine.pool import LARGE, SMALL, Pool
from streamfs.engine.recording import Recording
from streamfs.engine.store import Segment, Store
from tests.fakes import named_bytes

DATA = named_bytes("store", 1, 4 * LARGE)


def fill(store: Store, start: int, stop: int, step: int = 50_000) -> Segment:
    """Bring start..stop as one writer would; the last segment, not left."""
    segment, position = None, start
    while position < stop:
        segment = store.room(segment, position, position - start)
        assert segment is not None
        room = memoryview(segment.piece)[segment.base + segment.filled : segment.capacity]
        count = min(len(room), stop - position, step)
        room[:count] = DATA[position : position + count]
        store.wrote(segment, count)
        position += count
    assert segment is not None
    return segment


def read(store: Store, start: int, stop: int) -> bytes:
    gathered = store.gather(start, stop)
    assert gathered.read_disk(wait=True)
    return bytes(gathered.out)


def spill(store: Store, recording: Recording, most: int, **how: bool) -> int:
    segments = store.take_spillable(most, **how)
    runs = [(s.start, s.content(s.start, s.stop)) for s in segments]
    extents = recording.append(runs)
    store.spilled([(s, len(view)) for s, (_, view) in zip(segments, runs, strict=True)], extents)
    return sum(len(view) for _, view in runs)


def test_a_read_within_one_piece_is_a_view_of_it_without_a_copy():
    store = Store(Pool(LARGE))
    segment = fill(store, 0, 1000)
    view = store.view(100, 200)
    assert view is not None and view.obj is segment.piece
    assert view == DATA[100:200]


def test_a_read_across_pieces_is_gathered():
    store = Store(Pool(4 * LARGE))
    fill(store, 0, 5 * SMALL)
    assert store.view(SMALL - 1, SMALL + 1) is None
    assert read(store, SMALL - 5, 3 * SMALL + 5) == DATA[SMALL - 5 : 3 * SMALL + 5]


def test_pieces_grow_once_a_stream_is_read_on():
    pool = Pool(8 * LARGE)
    store = Store(pool)
    fill(store, 0, 10)
    assert pool.used == SMALL == store.memory
    other = Store(pool)
    segment = fill(other, 0, 2 * LARGE + 5)
    assert len(segment.piece) == LARGE and segment.start == 2 * LARGE


def test_pieces_end_at_aligned_offsets_wherever_a_writer_begins():
    store = Store(Pool(LARGE))
    segment = fill(store, 1000, 1010)
    assert segment.capacity == SMALL - 1000


def test_an_empty_segment_hides_no_bytes_and_goes_back_when_its_writer_leaves():
    pool = Pool(LARGE)
    store = Store(pool)
    waiting = store.room(None, 500, 0)
    assert waiting is not None
    left = fill(store, 0, 1000)
    assert store.view(600, 700) == DATA[600:700]
    assert read(store, 400, 1000) == DATA[400:1000]
    store.leave(waiting)
    assert pool.used == SMALL
    store.leave(left)
    assert pool.used == SMALL  # it holds bytes


def test_two_writers_at_the_same_place_keep_pieces_of_their_own():
    store = Store(Pool(LARGE))
    waiting = store.room(None, SMALL, 0)
    fill(store, 0, SMALL)
    arriving = store.room(None, SMALL, SMALL)
    assert waiting is not None and arriving is not None
    assert waiting.piece is not arriving.piece


def test_only_as_many_bytes_are_taken_as_there_was_room():
    store = Store(Pool(LARGE))
    segment = store.room(None, 0, 0)
    assert segment is not None
    for count in (SMALL + 1, -1):
        with pytest.raises(ValueError):
            store.wrote(segment, count)
    store.wrote(segment, 5)
    with pytest.raises(ValueError):
        store.wrote(segment, 5)  # no room was asked for


def test_bytes_read_the_same_from_memory_from_disk_and_from_both(tmp_path):
    pool = Pool(8 * LARGE)
    store = Store(pool, Recording.anonymous(tmp_path))
    store.leave(fill(store, 0, 2 * LARGE + 777))
    store.leave(fill(store, 3 * LARGE - 5, 3 * LARGE + 5))
    while True:
        for start, stop in [(0, 10), (SMALL - 3, SMALL + 3), (0, 2 * LARGE + 777), (LARGE, LARGE + 1)]:
            assert read(store, start, stop) == DATA[start:stop]
        assert read(store, 3 * LARGE - 5, 3 * LARGE + 5) == DATA[3 * LARGE - 5 : 3 * LARGE + 5]
        if not spill(store, store.recording, SMALL):
            break
    assert store.empty and pool.used == 0 == store.memory


def test_spilling_takes_whole_pieces_lowest_first_and_leaves_what_is_being_filled(tmp_path):
    store = Store(Pool(8 * LARGE), Recording.anonymous(tmp_path))
    fill(store, 0, 2 * SMALL + 10)
    assert spill(store, store.recording, 1) == SMALL
    assert store.view(0, 1) is None and store.view(SMALL, SMALL + 1) is not None
    assert spill(store, store.recording, LARGE) == SMALL
    assert spill(store, store.recording, LARGE) == 0
    assert spill(store, store.recording, LARGE, all_of_it=True) == 10
    assert store.empty


def test_a_piece_whose_writer_is_filling_it_is_not_given_back(tmp_path):
    pool = Pool(LARGE)
    store = Store(pool, Recording.anonymous(tmp_path))
    segment = fill(store, 0, 100)
    assert store.room(segment, 100, 100) is segment
    assert store.take_spillable(LARGE, all_of_it=True) == []
    room = memoryview(segment.piece)[100:200]
    assert spill(store, store.recording, LARGE, all_of_it=True, lent=True) == 100
    assert pool.used == SMALL and store.empty
    room[:] = DATA[100:200]
    store.wrote(segment, 100)
    assert (segment.start, segment.stop) == (100, 200)
    assert read(store, 0, 200) == DATA[:200]
    store.leave(segment)
    assert spill(store, store.recording, LARGE) == 100
    assert pool.used == 0
    assert read(store, 0, 200) == DATA[:200]


def test_bytes_that_arrive_while_a_piece_goes_to_disk_stay_in_memory(tmp_path):
    pool = Pool(LARGE)
    store = Store(pool, Recording.anonymous(tmp_path))
    segment = fill(store, 0, 100)
    store.room(segment, 100, 100)
    [taken] = store.take_spillable(LARGE, all_of_it=True, lent=True)
    view = taken.content(0, 100)
    memoryview(segment.piece)[100:SMALL] = DATA[100:SMALL]
    store.wrote(segment, SMALL - 100)
    assert segment.sealed
    store.spilled([(taken, 100)], store.recording.append([(0, view)]))
    assert store.view(100, SMALL) == DATA[100:SMALL]
    assert read(store, 0, SMALL) == DATA[:SMALL]
    assert spill(store, store.recording, LARGE) == SMALL - 100
    assert pool.used == 0


def test_clearing_waits_for_pieces_that_are_being_written(tmp_path):
    pool = Pool(LARGE)
    store = Store(pool, Recording.anonymous(tmp_path))
    store.leave(fill(store, 0, 3 * SMALL))
    first = store.take_spillable(1)
    second = store.take_spillable(1)
    store.clear()
    assert pool.used == 2 * SMALL
    store.clear()
    store.not_spilled(first)
    store.recording = None
    store.spilled([(s, s.filled) for s in second], [])
    assert pool.used == 0 == store.memory


def test_giving_a_piece_back_twice_is_noticed():
    store = Store(Pool(LARGE))
    store.leave(fill(store, 0, SMALL))
    segments = store.take_spillable(LARGE)
    store.drop_memory(segments)
    with pytest.raises(RuntimeError):
        store.drop_memory(segments)


def test_bytes_that_are_nowhere_are_never_zeros(tmp_path):
    store = Store(Pool(LARGE), Recording.anonymous(tmp_path))
    fill(store, 0, 10)
    with pytest.raises(RuntimeError, match="nowhere"):
        store.gather(5, 20)
    store.recording.publish(store.recording.append([(15, memoryview(b"abcde"))]))
    with pytest.raises(RuntimeError, match="nowhere"):
        store.gather(5, 20)
