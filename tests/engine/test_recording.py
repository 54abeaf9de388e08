import errno
import fcntl
import gc
import mmap
import os
from itertools import pairwise
from pathlib import Path

import pytest
from crc32c import crc32c

from streamfs.engine import recording as recording_module
from streamfs.engine.ranges import RangeSet
from streamfs.engine.recording import BLOCK, DIRECT, DamagedExtent, Extent, Header, Recording, disk_bytes
from tests.fakes import flip_byte, has_direct_writes, named_bytes

SIZE = 5 * BLOCK + 1234
DATA = named_bytes("recording", 7, SIZE)
HEADER = Header(key="recording", generation=7)
ENTRY = 32  # bytes of one index entry
ENTRIES = 8  # of a whole recording: six blocks, and END twice


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "1-7.data"


def index_of(path: Path) -> Path:
    return path.with_name(path.name + ".index")


def put(recording: Recording, start: int, stop: int) -> None:
    recording.publish(recording.append([(start, memoryview(DATA)[start:stop])]))


def get(recording: Recording, start: int, stop: int) -> bytes:
    """start..stop, which extents cover exactly."""
    out = bytearray(stop - start)
    assert recording.read(recording.extents(start, stop), memoryview(out), wait=True)
    return bytes(out)


def whole(path: Path) -> Recording:
    recording = Recording.create(path, HEADER)
    put(recording, 0, 3 * BLOCK)
    put(recording, 3 * BLOCK, SIZE)
    recording.complete(SIZE)
    return recording


def open_files() -> set[str]:
    gc.collect()
    found = set()
    for name in Path("/proc/self/fd").iterdir():
        try:
            found.add(f"{name.name} {name.readlink()}")
        except FileNotFoundError:
            continue  # the listing's own
    return {f for f in found if "/proc/" not in f}


def test_what_is_written_is_read_back_and_survives_loading(path):
    whole(path)
    recording = Recording.load(path)
    assert recording is not None
    assert recording.header == HEADER
    assert recording.size == SIZE
    assert recording.present() == RangeSet([(0, SIZE)])
    assert get(recording, 0, SIZE) == DATA


def test_the_data_file_is_plain_and_exactly_the_stream_once_complete(path):
    whole(path)
    assert path.read_bytes() == DATA
    assert path.stat().st_mode & 0o777 == 0o600
    assert index_of(path).stat().st_mode & 0o777 == 0o600


def test_what_was_written_is_never_written_again(path, monkeypatch):
    """A torn write can then cost nothing but what it was to add."""
    written: dict[int, RangeSet] = {}

    def note(fd: int, start: int, count: int) -> int:
        there = written.setdefault(fd, RangeSet())
        before = there.total
        there.add(start, start + count)
        assert there.total == before + count, f"{start} was written before"
        return count

    pwrite, write = os.pwrite, os.write
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: note(fd, at, pwrite(fd, data, at)))
    monkeypatch.setattr(os, "write", lambda fd, data: note(fd, os.lseek(fd, 0, os.SEEK_CUR), write(fd, data)))
    recording = Recording.create(path, HEADER)
    stops = [10, BLOCK // 2, BLOCK - 1, BLOCK + 5, 3 * BLOCK, SIZE - 1, SIZE]  # blocks that fill up little by little
    for start, stop in zip([0, *stops], stops, strict=False):
        put(recording, start, stop)
    recording.complete(SIZE)
    assert len(written) == 2 and SIZE in {there.total for there in written.values()}
    assert get(Recording.load(path), 0, SIZE) == DATA


def test_extents_end_at_block_boundaries(path):
    recording = Recording.create(path, HEADER)
    put(recording, 100, BLOCK + 50)
    assert [(e.start, e.stop) for e in recording.extents(0, SIZE)] == [(100, BLOCK), (BLOCK, BLOCK + 50)]


def test_ranges_in_any_order_are_kept_and_found(path):
    recording = Recording.create(path, HEADER)
    for start in (4 * BLOCK, 0, 2 * BLOCK):
        put(recording, start, start + 10)
    for loaded in (recording, Recording.load(path)):
        assert [e.start for e in loaded.extents(0, SIZE)] == [0, 2 * BLOCK, 4 * BLOCK]
        assert [e.start for e in loaded.extents(5, 2 * BLOCK)] == [0]
        assert loaded.extents(10, 2 * BLOCK) == []
        assert get(loaded, 2 * BLOCK, 2 * BLOCK + 10) == DATA[2 * BLOCK : 2 * BLOCK + 10]


def test_an_index_cut_at_any_byte_loads_as_an_exact_prefix(path):
    """Never zeros, never a claim of bytes that the cut entry described."""
    whole(path)
    raw = index_of(path).read_bytes()
    blocks = [min((i + 1) * BLOCK, SIZE) for i in range(6)]  # where each DATA entry ends
    head = len(raw) - ENTRIES * ENTRY
    for cut in range(head, len(raw)):
        index_of(path).write_bytes(raw[:cut])
        recording = Recording.load(path)
        entries = (cut - head) // ENTRY
        end = blocks[min(entries, 6) - 1] if entries else 0
        assert recording.present() == (RangeSet([(0, end)]) if end else RangeSet())
        assert recording.size == (SIZE if entries > 6 else None)
        assert recording.unread == (cut - head) % ENTRY
        if cut % 5 == 0 and end:
            assert get(recording, 0, end) == DATA[:end]
            put(recording, end, SIZE)  # and it can be continued
            assert get(Recording.load(path), 0, SIZE) == DATA
    index_of(path).write_bytes(raw[: head // 2 - 1])
    assert Recording.load(path) is None


@pytest.mark.parametrize("tail", [bytes(ENTRY), bytes(7), b"\xff" * 100])
def test_a_torn_tail_of_zeros_or_noise_is_no_entry_and_the_next_takes_its_place(path, tail):
    whole(path)
    before = index_of(path).read_bytes()
    with index_of(path).open("ab") as index:
        index.write(tail)
    for _ in range(2):
        recording = Recording.load(path)
        assert recording.size == SIZE and recording.present() == RangeSet([(0, SIZE)])
        assert recording.unread == len(tail)
    recording.drop(BLOCK, 2 * BLOCK)
    recording.log_drops()
    assert index_of(path).read_bytes()[:-ENTRY] == before
    assert Recording.load(path).unread == 0


def test_a_flipped_bit_anywhere_in_the_index_costs_one_block_at_most(path):
    """And is told, but for the bytes that mean nothing. One of them makes the head that of an older format."""
    whole(path)
    raw = index_of(path).read_bytes()
    head = len(raw) - ENTRIES * ENTRY
    for offset in range(len(raw)):
        index_of(path).write_bytes(raw[:offset] + bytes([raw[offset] ^ 1]) + raw[offset + 1 :])
        recording = Recording.load(path)
        assert recording.header == HEADER and recording.size == SIZE
        entry, place = divmod(offset - head, ENTRY)
        lost = RangeSet()
        if offset < head:
            assert recording.unread == head // 2
        elif place < 28:
            assert recording.unread == ENTRY
            if entry < 6:
                lost.add(entry * BLOCK, min((entry + 1) * BLOCK, SIZE))
        assert recording.present().total == SIZE - lost.total
        assert recording.durable == (not lost)
        if place == 0:  # and it can be mended
            for start, stop in lost:
                assert recording.extents(start, stop) == []
                put(recording, start, stop)
            recording.complete(SIZE)
            assert get(Recording.load(path), 0, SIZE) == DATA and Recording.load(path).durable


def test_a_flipped_byte_of_data_is_found_and_only_its_extent_is_damaged(path):
    whole(path)
    flip_byte(path, BLOCK + 5)
    recording = Recording.load(path)
    with pytest.raises(DamagedExtent) as caught:
        get(recording, 0, SIZE)
    assert (caught.value.start, caught.value.stop) == (BLOCK, 2 * BLOCK)
    assert get(recording, 0, BLOCK) == DATA[:BLOCK]
    assert get(recording, 2 * BLOCK, SIZE) == DATA[2 * BLOCK :]


def test_data_that_never_reached_the_disk_is_damaged_not_zeros(path):
    whole(path)
    os.truncate(path, BLOCK + 10)
    recording = Recording.load(path)
    with pytest.raises(DamagedExtent) as caught:
        get(recording, 0, SIZE)
    # The whole extent, although a part of it was read: the table knows whole extents only.
    assert (caught.value.start, caught.value.stop) == (BLOCK, 2 * BLOCK)
    os.truncate(path, SIZE)
    with pytest.raises(DamagedExtent):
        get(recording, BLOCK, 2 * BLOCK)


def test_an_unreadable_disk_is_damage_of_the_extent_that_could_not_be_read(path, monkeypatch):
    recording = whole(path)

    real = os.preadv

    def broken(fd, buffers, offset, flags=0):
        if offset >= BLOCK + 100:
            raise OSError(errno.EIO, "broken")
        return real(fd, [buffers[0][: BLOCK + 100 - offset]], offset, flags)

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(DamagedExtent) as caught:
        get(recording, 0, SIZE)
    assert (caught.value.start, caught.value.stop) == (BLOCK, 2 * BLOCK)


@pytest.mark.parametrize("other", [Header(key="recording", generation=8), Header(key="another", generation=7)])
def test_entries_of_another_stream_or_generation_are_refused(tmp_path, path, other, monkeypatch):
    """Even where index entries and data fit each other: the checksum covers key and generation."""
    monkeypatch.setattr(os, "urandom", bytes)  # by the salt alone each recording would be told apart
    whole(path)
    stranger = tmp_path / "stranger.data"
    recording = Recording.create(stranger, other)
    recording.publish(recording.append([(0, memoryview(DATA))]))
    recording.complete(SIZE)
    assert get(Recording.load(stranger), 0, SIZE) == DATA
    head = index_of(path).read_bytes()[: -ENTRIES * ENTRY]
    index_of(path).write_bytes(head + index_of(stranger).read_bytes()[-ENTRIES * ENTRY :])
    loaded = Recording.load(path)
    assert not loaded.present() and loaded.size is None, "entries of another index were believed"
    loaded.publish(recording.extents(0, SIZE))
    for start in range(0, SIZE, BLOCK):
        with pytest.raises(DamagedExtent):
            get(loaded, start, min(start + BLOCK, SIZE))


def test_entries_of_a_removed_recording_of_the_same_generation_are_refused(path):
    whole(path)
    entries = index_of(path).read_bytes()[-ENTRIES * ENTRY :]
    Recording.create(path, HEADER)
    with index_of(path).open("ab") as index:
        index.write(entries)
    path.write_bytes(DATA)
    loaded = Recording.load(path)
    assert not loaded.present() and loaded.size is None and loaded.unread == len(entries)


def test_a_checksum_is_of_its_offset_too(path):
    """Were an entry and its data both taken for those of another place."""
    recording = whole(path)
    (first,) = recording.extents(0, 1)
    with path.open("r+b") as file:
        file.seek(BLOCK)
        file.write(DATA[:BLOCK])
    moved = Extent(BLOCK, 2 * BLOCK, first.crc)
    with pytest.raises(DamagedExtent):
        recording.read([moved], memoryview(bytearray(BLOCK)), wait=True)


def test_data_at_another_offset_is_refused(path):
    whole(path)
    with path.open("r+b") as file:
        file.seek(BLOCK)
        file.write(DATA[:BLOCK])
    with pytest.raises(DamagedExtent):
        get(Recording.load(path), BLOCK, 2 * BLOCK)


def test_a_dropped_extent_stays_dropped_after_loading(path):
    recording = whole(path)
    assert [(e.start, e.stop) for e in recording.drop(BLOCK + 5, BLOCK + 6)] == [(BLOCK, 2 * BLOCK)]
    recording.log_drops()
    recording.log_drops()
    for loaded in (recording, Recording.load(path)):
        assert loaded.present() == RangeSet([(0, BLOCK), (2 * BLOCK, SIZE)])
    put(recording, BLOCK, 2 * BLOCK)
    assert get(Recording.load(path), 0, SIZE) == DATA


def test_a_drop_that_was_not_logged_is_logged_before_the_next_bytes(path):
    recording = whole(path)
    recording.drop(BLOCK, 2 * BLOCK)
    put(recording, BLOCK, BLOCK + 10)
    loaded = Recording.load(path)
    assert loaded.present() == RangeSet([(0, BLOCK + 10), (2 * BLOCK, SIZE)])
    assert get(loaded, BLOCK, BLOCK + 10) == DATA[BLOCK : BLOCK + 10]


def test_bytes_written_twice_load_as_one_extent(path):
    recording = Recording.create(path, HEADER)
    put(recording, 0, BLOCK)
    recording.append([(0, memoryview(DATA)[:BLOCK])])  # interrupted before it was published
    loaded = Recording.load(path)
    assert len(loaded.extents(0, BLOCK)) == 1
    assert get(loaded, 0, BLOCK) == DATA[:BLOCK]


def test_complete_syncs_data_and_names_before_it_says_end(path, monkeypatch):
    recording = Recording.create(path, HEADER)
    put(recording, 0, SIZE)
    order = []
    real = os.fsync

    def note(fd: int) -> None:
        size_logged = index_of(path).stat().st_size
        order.append((str(Path(f"/proc/self/fd/{fd}").readlink()), size_logged))
        real(fd)

    before = index_of(path).stat().st_size
    monkeypatch.setattr(os, "fsync", note)
    recording.complete(SIZE)
    assert [name for name, _ in order] == [str(path), str(path.parent), str(index_of(path))]
    assert [logged - before for _, logged in order] == [0, 0, 2 * ENTRY]


def test_what_an_older_streamfs_called_complete_is_made_durable_when_it_is_loaded(path, monkeypatch):
    """It said END before it synced the folder, and may have been killed between the two. It had one head."""
    whole(path)
    raw = index_of(path).read_bytes()
    length = (len(raw) - ENTRIES * ENTRY) // 2
    magic, rest = b"streamfs recording 2\n", raw[length + 21 : 2 * length]
    check = crc32c(rest[8:])
    index_of(path).write_bytes(magic + rest[:4] + check.to_bytes(4, "little") + rest[8:] + raw[2 * length : -ENTRY])
    synced = []
    real = os.fsync

    def note(fd: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{fd}").readlink()))
        real(fd)

    monkeypatch.setattr(os, "fsync", note)
    recording = Recording.load(path)
    assert recording.durable and recording.unread == 0
    assert get(recording, 0, SIZE) == DATA
    assert synced == [str(index_of(path)), str(path.parent)]


@pytest.mark.parametrize("gone", ["data", "index"])
@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_recording_whose_files_were_taken_away_is_not_complete(path, gone, how):
    recording = Recording.create(path, HEADER)
    put(recording, 0, SIZE)
    file = path if gone == "data" else index_of(path)
    file.unlink()
    if how == "replaced":
        file.write_bytes(DATA)
    with pytest.raises(FileNotFoundError):
        recording.complete(SIZE)
    assert not recording.durable and recording.size is None


def test_disk_space_counts_what_is_allocated_ahead_and_the_index(path):
    recording = Recording.create(path, HEADER)
    recording.ahead = 64 * BLOCK
    put(recording, 0, BLOCK)
    put(recording, BLOCK, 4 * BLOCK)
    assert recording.disk_bytes == disk_bytes(path)
    assert recording.disk_bytes >= 5 * BLOCK, "what is allocated ahead is not counted"
    data = path.stat().st_blocks * 512
    assert recording.disk_bytes - data == index_of(path).stat().st_blocks * 512 > 0
    recording.complete(4 * BLOCK)
    assert recording.disk_bytes < data, "what was allocated ahead is not given back"


def test_nothing_is_allocated_past_a_size_that_is_known(path):
    recording = Recording.create(path, HEADER)
    recording.ahead, recording.expected = 64 * BLOCK, 5 * BLOCK
    put(recording, 0, BLOCK)
    put(recording, BLOCK, 4 * BLOCK)
    assert path.stat().st_size == 5 * BLOCK
    put(recording, 4 * BLOCK, 5 * BLOCK)
    assert path.stat().st_size == 5 * BLOCK


@pytest.mark.parametrize("beyond", [False, True])
def test_what_was_allocated_ahead_can_be_given_back_and_no_byte_with_it(path, beyond):
    """`beyond`: there are bytes past it, as after a seek."""
    data = named_bytes("ahead", 1, 21 * BLOCK)

    def bring(start: int, stop: int) -> None:
        recording.publish(recording.append([(start * BLOCK, memoryview(data)[start * BLOCK : stop * BLOCK])]))

    recording = Recording.create(path, HEADER)
    recording.ahead = 64 * BLOCK
    bring(0, 1)
    bring(1, 4)
    written = 4 * BLOCK
    if beyond:
        bring(20, 21)
        written += BLOCK
    taken = path.stat().st_blocks * 512
    assert taken > written
    unused = recording.unused()
    assert unused is not None
    recording.give_back_ahead(*unused)
    assert path.stat().st_blocks * 512 < taken
    assert path.stat().st_blocks * 512 <= written + BLOCK
    assert recording.unused() is None
    again = Recording.load(path)
    assert again is not None
    for recorded in (recording, again):
        assert recorded.present().total == written
        for start, stop in recorded.present():
            assert get(recorded, start, stop) == data[start:stop]
    bring(4, 20)  # it goes on
    assert get(recording, 0, 20 * BLOCK) == data[: 20 * BLOCK]


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_failed_sync_is_raised_and_claims_nothing(path, monkeypatch, failing):
    recording = Recording.create(path, HEADER)
    put(recording, 0, SIZE)
    calls = []

    def broken(fd: int) -> None:
        calls.append(fd)
        if len(calls) > failing:
            raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError):
        recording.complete(SIZE)
    assert recording.size is None


def test_writes_that_take_few_bytes_at_a_time_are_continued(path, monkeypatch):
    write, pwrite = os.write, os.pwrite
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:5]))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:999], offset))
    whole(path)
    monkeypatch.undo()
    assert get(Recording.load(path), 0, SIZE) == DATA


def test_a_full_disk_while_logging_leaves_no_torn_entry(path, monkeypatch):
    recording = Recording.create(path, HEADER)
    put(recording, 0, BLOCK)
    good = index_of(path).read_bytes()
    write = os.write
    budget = [40]

    def full(fd, data):
        if not budget[0]:
            raise OSError(errno.ENOSPC, "full")
        count = write(fd, data[: min(7, budget[0])])
        budget[0] -= count
        return count

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError):
        recording.append([(BLOCK, memoryview(DATA)[BLOCK : 3 * BLOCK])])
    monkeypatch.undo()
    assert index_of(path).read_bytes() == good
    put(recording, BLOCK, SIZE)
    assert get(Recording.load(path), 0, SIZE) == DATA


def test_a_full_disk_while_writing_data_counts_nothing(path, monkeypatch):
    recording = Recording.create(path, HEADER)
    pwrite = os.pwrite

    def full(fd, data, offset):
        if offset:
            raise OSError(errno.ENOSPC, "full")
        return pwrite(fd, data[:1000], offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError):
        recording.append([(0, memoryview(DATA))])
    monkeypatch.undo()
    assert recording.present().total == 0
    assert Recording.load(path).present().total == 0
    put(recording, 0, SIZE)
    assert get(recording, 0, SIZE) == DATA


def test_reading_without_waiting_gives_all_or_says_no(path):
    recording = whole(path)
    out = bytearray(SIZE)
    extents = recording.extents(0, SIZE)
    if recording.read(extents, memoryview(out), wait=False):  # the page cache has what was just written
        assert out == DATA
    recording._nowait = False
    assert recording.read(extents, memoryview(out), wait=False) is False
    assert recording.read(extents, memoryview(out), wait=True)
    assert out == DATA


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EOPNOTSUPP])
def test_a_file_system_that_would_block_or_cannot_say_is_asked_in_a_thread(path, monkeypatch, code):
    recording = whole(path)
    real = os.preadv

    def blocking(fd, buffers, offset, flags=0):
        if flags:
            raise OSError(code, "would block")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", blocking)
    out = bytearray(SIZE)
    assert recording.read(recording.extents(0, SIZE), memoryview(out), wait=False) is False
    assert recording.read(recording.extents(0, SIZE), memoryview(out), wait=True)
    assert out == DATA
    assert recording._nowait == (code == errno.EAGAIN)


def test_descriptors_live_as_long_as_the_recording_and_no_longer(path):
    before = open_files()
    recording = whole(path)
    assert len(open_files() - before) == 2
    recording.unlink()
    recording.unlink()
    assert not path.exists() and not index_of(path).exists()
    assert get(recording, 0, SIZE) == DATA
    del recording
    assert open_files() == before


def test_an_anonymous_recording_leaves_no_name(tmp_path, monkeypatch):
    before = open_files()
    recording = Recording.anonymous(tmp_path)
    put(recording, 0, SIZE)
    recording.complete(SIZE)
    assert get(recording, 0, SIZE) == DATA
    assert list(tmp_path.iterdir()) == []
    del recording
    assert open_files() == before


def test_a_folder_that_knows_no_unnamed_files_serves_too(tmp_path, monkeypatch):
    real = os.open

    def old(path, flags, *rest):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "not supported")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", old)
    recording = Recording.anonymous(tmp_path)
    put(recording, 0, SIZE)
    assert get(recording, 0, SIZE) == DATA
    assert list(tmp_path.iterdir()) == []


def test_creating_replaces_what_was_there(path):
    whole(path)
    Recording.create(path, Header(key="recording", generation=8))
    loaded = Recording.load(path)
    assert loaded.header.generation == 8
    assert loaded.present().total == 0 and path.stat().st_size == 0


def test_what_is_not_a_recording_is_not_loaded(path):
    assert Recording.load(path) is None
    path.write_bytes(DATA)
    assert Recording.load(path) is None
    for noise in (b"", b"streamfs recording 1\n", b"\0" * 200, os.urandom(300)):
        index_of(path).write_bytes(noise)
        assert Recording.load(path) is None
    assert path.read_bytes() == DATA


def test_the_head_of_another_file_is_not_believed(path):
    """After a power cut a new index may hold the blocks of one that was removed, head and all."""
    whole(path)
    assert Recording.load(path) is not None
    other = path.with_name("1-8.data")
    path.rename(other)
    index_of(path).rename(index_of(other))
    assert Recording.load(other) is None


def test_the_past_is_given_back_in_whole_extents_and_the_rest_stays_at_its_offsets(path):
    recording = Recording.create(path, HEADER)
    put(recording, 0, SIZE)
    before = recording.disk_bytes
    past = recording.forget_before(2 * BLOCK + 5)
    assert past == 2 * BLOCK
    recording.punch(past)
    assert recording.disk_bytes <= before
    for loaded in (recording, Recording.load(path)):
        assert loaded.present() == RangeSet([(2 * BLOCK, SIZE)])
        assert get(loaded, 2 * BLOCK, SIZE) == DATA[2 * BLOCK :]


def test_far_offsets_are_sparse_on_disk(path):
    far = 3 << 40
    recording = Recording.create(path, HEADER)
    recording.publish(recording.append([(far, memoryview(DATA))]))
    assert recording.disk_bytes < 2 << 20
    loaded = Recording.load(path)
    assert loaded.extents(far, far + 1) == [Extent(far, far + BLOCK, recording.extents(far, far + 1)[0].crc)]
    assert get(loaded, far, far + SIZE) == DATA


# What the kernel keeps of it


@pytest.fixture
def advised(monkeypatch) -> list[tuple[int, int]]:
    """Small steps, patience, and a disk that is written through pages; gives where the kernel was told to let pages go,
    as (start, stop)."""
    monkeypatch.setattr(recording_module, "DIRECT", 1 << 62)
    monkeypatch.setattr(recording_module, "PAGES_STAY", 4 * BLOCK)
    monkeypatch.setattr(recording_module, "_HINT_PATIENCE", float("inf"))
    told: list[tuple[int, int]] = []
    real = os.posix_fadvise

    def fadvise(fd: int, offset: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_DONTNEED
        told.append((offset, offset + length))
        real(fd, offset, length, advice)

    monkeypatch.setattr(os, "posix_fadvise", fadvise)
    return told


def in_page_cache(recording: Recording, start: int, stop: int) -> bool:
    return recording.read(recording.extents(start, stop), memoryview(bytearray(stop - start)), wait=False)


def append_blocks(recording: Recording, count: int) -> bytes:
    data = named_bytes("pages", 7, count * BLOCK)
    for at in range(0, count * BLOCK, BLOCK):
        recording.publish(recording.append([(at, memoryview(data)[at : at + BLOCK])]))
        os.fsync(
            recording._data.fd
        )  # only what is written can be let go, and a test does not wait for the disk by chance
    return data


def test_pages_that_readers_have_passed_make_room_for_the_next(path, advised):
    recording = Recording.create(path, HEADER)
    recording.passed = 1 << 62
    data = append_blocks(recording, 16)
    assert advised == [(at, at + BLOCK) for at in range(0, 12 * BLOCK, BLOCK)]  # all but the PAGES_STAY written last
    assert get(recording, 0, 16 * BLOCK) == data
    assert Recording.load(path).present() == RangeSet([(0, 16 * BLOCK)])


def test_pages_that_are_let_go_leave_the_memory(path, advised):
    recording = Recording.create(path, HEADER)
    append_blocks(recording, 12)
    if not in_page_cache(recording, 0, 12 * BLOCK):
        pytest.skip("this file system does not say what is in the page cache")
    os.posix_fadvise(recording._data.fd, 0, BLOCK, os.POSIX_FADV_DONTNEED)
    if in_page_cache(recording, 0, BLOCK):
        pytest.skip("this file system keeps everything in memory")
    other = Recording.create(path.with_name("2-7.data"), HEADER)
    other.passed = 1 << 62
    append_blocks(other, 12)
    assert not in_page_cache(other, 0, BLOCK)


def test_pages_that_a_reader_is_still_to_pass_stay(path, advised):
    recording = Recording.create(path, HEADER)
    recording.passed = 3 * BLOCK
    data = append_blocks(recording, 12)
    assert advised == [(at, at + BLOCK) for at in range(0, 3 * BLOCK, BLOCK)]
    recording.passed = 6 * BLOCK  # it went on
    recording.publish(recording.append([(12 * BLOCK, memoryview(data)[:BLOCK])]))
    assert advised[-1] == (3 * BLOCK, 6 * BLOCK)  # in one call
    assert get(recording, 0, 12 * BLOCK) == data


def test_where_nobody_says_what_readers_have_passed_all_pages_stay(path, advised):
    append_blocks(Recording.create(path, HEADER), 12)
    assert advised == []


def test_what_a_slow_reader_has_not_passed_is_not_followed_for_ever(path, advised, monkeypatch):
    monkeypatch.setattr(recording_module, "_PAGES_FOLLOWED", 8 * BLOCK)
    recording = Recording.create(path, HEADER)
    recording.passed = 1
    append_blocks(recording, 64)
    assert advised == []
    assert recording._paged == 8 * BLOCK == sum(stop - start for start, stop in recording._pages)


def take_every_disk_for_slow(monkeypatch: pytest.MonkeyPatch, *, looked_at: int, left: int) -> None:
    """A disk is timed over `looked_at` bytes, and then left alone for `left` bytes."""
    monkeypatch.setattr(recording_module, "_HINTS_OVER", looked_at)
    monkeypatch.setattr(recording_module, "_PAGES_FOLLOWED", left)
    monkeypatch.setattr(recording_module, "_HINT_PATIENCE", -1)  # seconds: each step takes longer


def test_a_disk_that_keeps_hints_waiting_gets_none_for_a_while(path, advised, monkeypatch):
    """What comes in faster than the disk takes it gathers in the kernel's memory, as without hints."""
    take_every_disk_for_slow(monkeypatch, looked_at=8 * BLOCK, left=8 * BLOCK)
    recording = Recording.create(path, HEADER)
    recording.passed = 1 << 62
    data = append_blocks(recording, 40)
    # With hints are the blocks 0 to 7, 15 to 22 and 30 to 37; each lets the one four before it go.
    assert [start // BLOCK for start, _ in advised] == [0, 1, 2, 3, *range(11, 19), *range(26, 34)]
    assert get(recording, 0, 40 * BLOCK) == data


def test_a_refused_hint_costs_no_byte(path, advised, monkeypatch):
    def refusing(fd: int, offset: int, length: int, advice: int) -> None:
        raise OSError(errno.EINVAL, "no hints here")

    monkeypatch.setattr(os, "posix_fadvise", refusing)
    recording = Recording.create(path, HEADER)
    recording.passed = 1 << 62
    data = append_blocks(recording, 12)
    assert get(recording, 0, 12 * BLOCK) == data


def paged_memory(data: bytes, shift: int = 0) -> memoryview:
    """As the pool's pieces are: it begins at a page, or `shift` bytes behind one."""
    memory = memoryview(mmap.mmap(-1, len(data) + shift))[shift:]
    memory[:] = data
    return memory


@pytest.fixture
def direct(path, monkeypatch) -> list[tuple[int, int, int]]:
    """Gives what was written past the page cache, as (offset, bytes asked, bytes written)."""
    written: list[tuple[int, int, int]] = []
    real = os.pwritev

    def pwritev(fd: int, views: list[memoryview], offset: int) -> int:
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT
        count = real(fd, views, offset)
        written.append((offset, sum(map(len, views)), count))
        return count

    monkeypatch.setattr(os, "pwritev", pwritev)
    if not has_direct_writes(path.parent):
        pytest.skip("this file system has no writes past the page cache")
    return written


def test_what_readers_have_passed_is_written_past_the_page_cache(path, direct):
    recording = Recording.create(path, HEADER)
    recording.passed = 4 * BLOCK
    data = named_bytes("direct", 7, 6 * BLOCK)
    memory = paged_memory(data)
    recording.publish(recording.append([(at, memory[at : at + BLOCK]) for at in range(0, 4 * BLOCK, BLOCK)]))
    recording.publish(recording.append([(4 * BLOCK, memory[4 * BLOCK :])]))  # a reader is still to come here
    assert direct == [(0, 4 * BLOCK, 4 * BLOCK)]
    assert get(recording, 0, 6 * BLOCK) == data
    assert path.read_bytes()[: len(data)] == data
    assert get(Recording.load(path), 0, 6 * BLOCK) == data


def test_pages_written_through_the_cache_and_past_it_make_one_file(path, direct):
    """Runs of all kinds side by side: odd lengths, odd offsets, odd addresses, bytes written over those of before."""
    recording = Recording.create(path, HEADER)
    recording.passed = 1 << 62
    data = named_bytes("mixed", 7, 8 * BLOCK)
    old = paged_memory(named_bytes("old", 7, 8 * BLOCK))
    recording.publish(recording.append([(0, old[: 2 * BLOCK])]))
    assert get(recording, 0, 2 * BLOCK) == bytes(old[: 2 * BLOCK])  # its pages are in memory now
    recording.drop(0, 2 * BLOCK)
    edges = [0, BLOCK, BLOCK + 100, 2 * BLOCK, 2 * BLOCK + DIRECT, 4 * BLOCK, 4 * BLOCK + 1, 5 * BLOCK, 8 * BLOCK]
    for number, (start, stop) in enumerate(pairwise(edges)):
        shift = 0 if number % 2 else start % DIRECT
        recording.publish(recording.append([(start, paged_memory(data[start:stop], shift))]))
    assert get(recording, 0, 8 * BLOCK) == data
    assert path.read_bytes()[: len(data)] == data
    assert {asked % DIRECT for _, asked, _ in direct} == {0}
    assert len(direct) >= 4


def test_a_write_past_the_cache_that_is_cut_short_goes_on_the_usual_way(path, direct, monkeypatch):
    pwritev = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, views, offset: pwritev(fd, [views[0][: 3 * DIRECT]], offset))
    recording = Recording.create(path, HEADER)
    recording.passed = 1 << 62
    data = named_bytes("short", 7, 4 * BLOCK)
    memory = paged_memory(data)
    recording.publish(recording.append([(at, memory[at : at + BLOCK]) for at in range(0, 4 * BLOCK, BLOCK)]))
    assert direct == [(0, 3 * DIRECT, 3 * DIRECT)]
    assert get(recording, 0, 4 * BLOCK) == data


@pytest.mark.parametrize("error", [errno.EINVAL, errno.EOPNOTSUPP, errno.EMFILE])
def test_where_there_are_no_writes_past_the_cache_the_usual_ones_serve(path, monkeypatch, error):
    def refuse(*_: object) -> int:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "pwritev", refuse)
    recording = Recording.create(path, HEADER)
    recording.passed = 1 << 62
    data = named_bytes("refused", 7, 4 * BLOCK)
    recording.publish(recording.append([(0, paged_memory(data))]))
    assert get(recording, 0, 4 * BLOCK) == data


def test_a_full_disk_is_told_also_past_the_cache(path, direct, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "pwritev", full)
    recording = Recording.create(path, HEADER)
    recording.passed = 1 << 62
    with pytest.raises(OSError, match="full"):
        recording.append([(0, paged_memory(bytes(BLOCK)))])
    assert recording.empty


def test_a_disk_that_takes_long_is_written_through_the_cache_for_a_while(path, direct, monkeypatch):
    """The kernel then takes in as much as it likes, and what comes in does not wait for the disk."""
    take_every_disk_for_slow(monkeypatch, looked_at=2 * BLOCK, left=3 * BLOCK)
    recording = Recording.create(path, HEADER)
    recording.passed = 1 << 62
    data = named_bytes("slow", 7, 10 * BLOCK)
    memory = paged_memory(data)
    for at in range(0, 10 * BLOCK, BLOCK):
        recording.publish(recording.append([(at, memory[at : at + BLOCK])]))
    assert [offset // BLOCK for offset, _, _ in direct] == [0, 1, 5, 9]
    assert get(recording, 0, 10 * BLOCK) == data


def test_a_file_that_took_the_recordings_name_is_never_written(path, direct):
    recording = Recording.create(path, HEADER)
    recording.passed = 1 << 62
    path.unlink()
    path.write_bytes(b"somebody else's")
    data = named_bytes("moved", 7, 2 * BLOCK)
    recording.publish(recording.append([(0, paged_memory(data))]))
    assert direct
    assert path.read_bytes() == b"somebody else's"
    assert get(recording, 0, 2 * BLOCK) == data
