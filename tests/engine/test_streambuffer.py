import array
import gc
import io
import os
import signal
import sys
import threading
import time
import zipfile
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from streamfs.engine import streambuffer as module
from streamfs.engine.pool import LARGE
from streamfs.engine.recording import Recording
from streamfs.engine.streambuffer import StreamBuffer
from streamfs.errors import Closed, NoSpace, SourceFailed
from tests.fakes import WAIT, Crew, Gate, ScriptedStream, chunked, generated, named_bytes, numbered_lines, poll_until

DATA = numbered_lines(1000)
MANY = int(os.environ.get("STREAMFS_SOAK", "0"))


@pytest.fixture(params=[1, 4, 10, 64])
def chunk(request) -> int:
    return request.param


def scripted(data: bytes, size: int) -> ScriptedStream:
    return ScriptedStream(chunked(data, size))


# Reads by offset and size


def test_reads_forwards_and_again(chunk):
    with StreamBuffer(scripted(DATA, chunk)) as buffer:
        assert buffer.read(0, 5) == b"0\n1\n2"
        assert buffer.read(5, 5) == b"\n3\n4\n"
        assert buffer.read(0, 5) == b"0\n1\n2"
        assert buffer.read(0, 10) == b"0\n1\n2\n3\n4\n"


def test_a_longer_read_after_a_shorter_one(chunk):
    buffer = StreamBuffer(scripted(DATA, chunk))
    assert buffer.read(0, 5) == DATA[:5]
    assert buffer.read(0, 10) == DATA[:10]


def test_no_more_than_needed_is_pulled(chunk):
    stream = scripted(DATA, chunk)
    buffer = StreamBuffer(stream)
    assert stream.pulled == 0
    needed = 0
    for offset, size, expected in [(0, 5, b"0\n1\n2"), (4, 4, b"2\n3\n"), (0, 8, DATA[:8])]:
        assert buffer.read(offset, size) == expected
        needed = max(needed, -(-(offset + size) // chunk))
        assert stream.pulled == needed
        assert buffer.buffered == min(needed * chunk, len(DATA))


def test_a_fresh_read_ahead_skips_what_lies_before(chunk):
    stream = scripted(DATA, chunk)
    buffer = StreamBuffer(stream)
    assert buffer.read(8, 3) == b"4\n5"
    assert stream.pulled == -(-11 // chunk)
    assert buffer.read(0, 8) == DATA[:8]


def test_size_zero_pulls_nothing(chunk):
    stream = scripted(DATA, chunk)
    buffer = StreamBuffer(stream)
    assert buffer.read(0, 0) == buffer.read(500, 0) == buffer.read(10**30, 0) == b""
    assert buffer[5:5] == buffer[7:3] == b""
    assert stream.pulled == 0


def test_a_read_at_or_past_the_end_is_empty_and_one_over_it_is_cut(chunk):
    buffer = StreamBuffer(scripted(DATA, chunk))
    assert buffer.read(len(DATA), 10) == b""
    assert buffer.read(len(DATA) + 1, 1) == buffer.read(2**80, 2**80) == b""
    assert buffer.read(len(DATA) - 3, 10) == DATA[-3:]
    assert buffer.read(0, 2**80) == DATA
    assert buffer.size == len(DATA) == buffer.buffered and buffer.complete


def test_a_read_that_ends_exactly_at_the_end_needs_no_proof_of_it(chunk):
    data = DATA[: 64 * 4 * 5]
    stream = scripted(data, chunk)
    buffer = StreamBuffer(stream)
    assert buffer.read(0, len(data)) == data
    assert buffer.size is None and not buffer.complete
    assert buffer.read(len(data), 1) == b""
    assert buffer.size == len(data)


def test_an_empty_stream():
    buffer = StreamBuffer([])
    assert buffer[:] == buffer[-3:] == buffer.read(0, 5) == b""
    assert buffer.size == 0 and buffer.complete
    with pytest.raises(IndexError):
        buffer[0]


@pytest.mark.parametrize("offset, size", [(-1, 5), (0, -1), (-2, -2)])
def test_negative_arguments_are_refused(offset, size):
    stream = scripted(DATA, 4)
    with pytest.raises(ValueError):
        StreamBuffer(stream).read(offset, size)
    assert stream.pulled == 0


def test_arguments_that_are_no_integers_are_refused():
    buffer = StreamBuffer([DATA])
    for arguments in [(1.0, 2), (0, "5"), (None, 1)]:
        with pytest.raises(TypeError):
            buffer.read(*arguments)
    with pytest.raises(ValueError):
        StreamBuffer([], size=-1)
    with pytest.raises(ValueError):
        StreamBuffer([], max_size=-1)
    with pytest.raises(TypeError):
        StreamBuffer(5)


# Slices and indexes


BOUNDS = [None, 0, 1, 5, 41, 42, 43, 1000, -1, -5, -41, -42, -43, -1000]


def test_slices_mean_what_they_mean_for_bytes(chunk):
    data = DATA[:42]
    for start in BOUNDS:
        for stop in BOUNDS:
            buffer = StreamBuffer(chunked(data, chunk))
            assert buffer[start:stop] == data[start:stop], (start, stop)
            assert buffer[start:stop:1] == data[start:stop]


def test_a_slice_with_plain_bounds_pulls_only_what_it_needs():
    stream = scripted(DATA, 4)
    buffer = StreamBuffer(stream)
    assert buffer[2:7] == DATA[2:7]
    assert stream.pulled == 2
    assert buffer[1:] == DATA[1:]
    assert buffer.complete


@pytest.mark.parametrize("step", [0, 2, -1])
def test_a_step_other_than_one_is_refused(step):
    with pytest.raises(ValueError):
        StreamBuffer([DATA])[0:5:step]


def test_indexes_mean_what_they_mean_for_bytes(chunk):
    data = DATA[:42]
    for index in (0, 5, 41, -1, -42):
        assert StreamBuffer(chunked(data, chunk))[index] == data[index]
    for index in (42, -43, 10**20, -(10**20)):
        with pytest.raises(IndexError):
            StreamBuffer(chunked(data, chunk))[index]
    assert bytes(StreamBuffer(chunked(data, chunk))) == data


# Kinds of streams and chunks


def test_any_bytes_like_chunk_is_taken_and_empty_ones_are_not_the_end():
    wide = array.array("I", [1, 2, 3])
    steps = [b"", bytearray(b"ab"), b"", memoryview(b"xcdx")[1:3], wide, memoryview(b""), b"", b"e"]
    with StreamBuffer(steps) as buffer:
        assert buffer[:] == b"abcd" + wide.tobytes() + b"e"


def test_a_chunk_may_be_reused_and_resized_by_its_stream():
    def reusing():
        piece = bytearray()
        for value in range(50):
            piece[:] = bytes([value]) * (value + 1)
            yield piece
            piece.clear()  # fails while anybody holds a view

    assert StreamBuffer(reusing())[:] == b"".join(bytes([v]) * (v + 1) for v in range(50))


def test_a_file_is_a_stream(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(DATA)
    file = path.open("rb")
    with StreamBuffer(file) as buffer:
        assert buffer[-10:] == DATA[-10:]
    assert file.closed


@pytest.mark.parametrize("wrong", [None, 5, "text", [1, 2], memoryview(b"abcdef")[::2]])
@pytest.mark.parametrize("make", [ScriptedStream, generated])
def test_what_is_not_bytes_breaks_the_stream_there(wrong, make):
    buffer = StreamBuffer(make([b"abc", wrong, b"def"]))
    assert buffer.read(0, 3) == b"abc"
    for _ in range(2):
        with pytest.raises(SourceFailed) as caught:
            buffer.read(2, 2)
        assert isinstance(caught.value.__cause__, TypeError)
    assert buffer.read(0, 3) == b"abc"


# Failures


@pytest.mark.parametrize("make", [ScriptedStream, generated])
def test_a_source_error_is_raised_every_time_and_never_looks_like_the_end(make, chunk):
    broken = OSError("cable")
    buffer = StreamBuffer(make([*chunked(DATA, chunk), broken]))
    for _ in range(3):
        for read in (
            lambda: buffer.read(len(DATA) - 1, 2),
            lambda: buffer.read(len(DATA), 1),
            lambda: buffer.read(10**6, 1),
            lambda: buffer[-1:],
            lambda: buffer[5:],
            lambda: buffer[len(DATA)],
            lambda: buffer.open().seek(0, io.SEEK_END),
        ):
            with pytest.raises(SourceFailed, match=f"byte {len(DATA)}.*cable") as caught:
                read()
            assert caught.value.__cause__ is broken
        assert buffer.read(0, len(DATA)) == DATA
    assert buffer.size is None and not buffer.complete


def test_an_error_of_streamfs_passes_as_it_is():
    buffer = StreamBuffer(generated([b"abc", NoSpace("full")]))
    for _ in range(2):
        with pytest.raises(NoSpace, match="full"):
            buffer.read(0, 4)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_interrupt_inside_the_stream_is_passed_on_and_is_not_the_end_for_others(kind):
    buffer = StreamBuffer(generated([b"abc", kind()]))
    with pytest.raises(kind):
        buffer.read(0, 4)
    with pytest.raises(SourceFailed):
        buffer.read(0, 4)
    assert buffer.read(0, 3) == b"abc"
    assert buffer.size is None


def test_a_signal_while_a_pull_waits_changes_no_byte():
    came = []
    before = signal.signal(signal.SIGALRM, lambda *_: came.append(1))
    reading, writing = os.pipe()
    try:
        with Crew() as crew:
            crew.start(_write_once, writing, came)
            signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
            buffer = StreamBuffer(iter(partial(os.read, reading, 1000), b""))
            assert buffer[:] == DATA
            signal.setitimer(signal.ITIMER_REAL, 0)
        assert buffer[:] == DATA and buffer.size == len(DATA)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        os.close(reading)


def _write_once(fd: int, came: list[int]) -> None:
    """Write DATA in three parts, each after another signal has come."""
    third = len(DATA) // 3
    for number, at in enumerate((0, third, 2 * third)):
        poll_until(lambda number=number: len(came) > number)
        os.write(fd, DATA[at : at + third] if number < 2 else DATA[at:])
    os.close(fd)


def test_a_source_that_was_interrupted_is_an_error_and_never_zeros():
    buffer = StreamBuffer(ScriptedStream([b"abc", InterruptedError(4, "Interrupted system call"), b"def"]))
    for _ in range(2):
        with pytest.raises(SourceFailed, match="Interrupted"):
            buffer.read(0, 6)
    assert buffer.read(0, 3) == b"abc"


def test_a_source_error_reaches_every_waiting_thread():
    gate = Gate()
    buffer = StreamBuffer(generated([b"abc", gate, OSError("cable")]))

    def read(offset: int) -> str:
        try:
            buffer.read(offset, 5)
        except SourceFailed as error:
            return str(error)
        return "no error"

    crew = Crew()
    for offset in range(8):
        crew.start(read, offset)
    gate.await_reached()
    poll_until(lambda: buffer._buffer.waiting == 7)
    gate.open()
    assert all("cable" in text for text in crew.join())


# A declared size


def test_a_declared_size_is_the_size_from_the_start():
    stream = scripted(DATA, 4)
    buffer = StreamBuffer(stream, size=len(DATA))
    assert buffer.size == len(DATA) and not buffer.complete
    assert buffer.read(len(DATA), 5) == b""
    assert stream.pulled == 0
    assert buffer.read(len(DATA) - 2, 5) == DATA[-2:]
    assert buffer.complete
    assert buffer[:] == DATA


def test_a_stream_shorter_than_declared_fails_where_bytes_are_missing(chunk):
    buffer = StreamBuffer(chunked(DATA, chunk), size=len(DATA) + 1)
    assert buffer.read(0, len(DATA)) == DATA
    for _ in range(2):
        with pytest.raises(SourceFailed, match=f"ended at byte {len(DATA)}"):
            buffer.read(len(DATA) - 1, 5)
    with pytest.raises(SourceFailed):
        buffer[:]


def test_a_stream_longer_than_declared_never_gives_more(chunk):
    buffer = StreamBuffer(chunked(DATA, chunk), size=101)
    assert buffer.read(0, 200) == DATA[:101] == buffer[:]
    assert buffer[-1] == DATA[100]
    assert buffer.size == 101 == buffer.buffered


def test_declared_as_empty():
    stream = scripted(DATA, 4)
    assert StreamBuffer(stream, size=0)[:] == b""
    assert stream.pulled == 0


# Spilling


BIG = named_bytes("spill", 1, 7 * LARGE + 4321)


@pytest.mark.parametrize("size", [4096, 65_536, 1_000_003, len(BIG)])
def test_what_goes_past_memory_moves_to_disk_in_pieces(size, monkeypatch, tmp_path):
    steps = []
    real = Recording.append

    def append(self, runs):
        steps.append(sum(len(view) for _, view in runs))
        return real(self, runs)

    monkeypatch.setattr(Recording, "append", append)
    monkeypatch.setattr(module.tempfile, "gettempdir", lambda: str(tmp_path))
    buffer = StreamBuffer(chunked(BIG, size), max_size=2 * LARGE)
    assert buffer.read(LARGE - 5, 10) == BIG[LARGE - 5 : LARGE + 5]
    for offset in (len(BIG) - 10, 0, 3 * LARGE - 5, 2 * LARGE, 65_530):
        assert buffer.read(offset, 100) == BIG[offset : offset + 100]
        assert buffer._buffer.memory <= 2 * LARGE
    assert buffer[:] == BIG
    assert sum(steps) >= len(BIG) - 2 * LARGE
    assert max(steps) < 2 * LARGE  # about 1 MiB in whole pieces: never all of it in one stall
    assert list(tmp_path.iterdir()) == []  # no name that could be left behind
    buffer.close()


def test_below_max_size_nothing_is_written(monkeypatch):
    monkeypatch.setattr(Recording, "anonymous", lambda folder: pytest.fail("wrote to disk"))
    assert StreamBuffer(chunked(BIG[: 4 * LARGE], 50_000))[:] == BIG[: 4 * LARGE]


def test_five_mib_stay_in_memory_unless_told_otherwise(monkeypatch):
    made = []
    anonymous = Recording.anonymous
    monkeypatch.setattr(Recording, "anonymous", lambda folder: made.append(folder) or anonymous(folder))
    data = named_bytes("default", 1, 7 * 1024**2)
    with StreamBuffer(chunked(data, 1 << 16)) as buffer:
        assert buffer.read(0, 5 * 1024**2) == data[: 5 * 1024**2] and not made
        assert buffer.read(0, len(data)) == data and made


def test_a_full_disk_is_no_space_for_bytes_that_did_not_fit_and_arrived_ones_stay(monkeypatch):
    def full(fd, data, offset):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    buffer = StreamBuffer(chunked(BIG, 50_000), max_size=LARGE)
    for _ in range(2):
        with pytest.raises(NoSpace, match="No space left"):
            buffer.read(2 * LARGE, 10)
    there = buffer.buffered
    assert LARGE // 2 < there <= LARGE
    assert buffer.read(0, there) == BIG[:there]


# Many readers


def test_bytes_that_arrived_do_not_wait_for_a_slow_pull():
    gate = Gate()
    stream = ScriptedStream([b"abcdef", gate, b"ghi"])
    buffer = StreamBuffer(stream)
    crew = Crew()
    crew.start(buffer.read, 0, 9)
    gate.await_reached()
    assert buffer.read(0, 6) == b"abcdef"
    assert buffer[1:3] == b"bc" and buffer[2] == ord("c")
    gate.open()
    assert crew.join() == [b"abcdefghi"]


def test_a_byte_that_has_arrived_does_not_wait_for_the_rest_of_a_burst():
    gate = Gate()
    stream = ScriptedStream([b"a", gate, b"b" * 100_000])
    buffer = StreamBuffer(stream)
    assert buffer.read(0, 1) == b"a"
    assert stream.pulled == 1
    gate.open()
    assert buffer.read(1, 1) == b"b"


def test_work_grows_with_the_bytes_and_not_faster():
    def calls(count: int) -> int:
        """How many functions are called to bring and to read so many chunks."""
        made = 0

        def counting(frame: object, event: str, argument: object) -> None:
            nonlocal made
            made += event in ("call", "c_call")

        with StreamBuffer(chunked(bytes(count * 1000), 1000)) as buffer:
            sys.setprofile(counting)
            try:
                for offset in range(0, count * 1000, 1000):
                    assert len(buffer.read(offset, 1000)) == 1000
            finally:
                sys.setprofile(None)
        return made

    assert calls(4000) < 4.4 * calls(1000)


def test_a_waiter_is_served_as_soon_as_its_bytes_arrive_though_the_puller_goes_on():
    first, second = Gate(), Gate()
    buffer = StreamBuffer(ScriptedStream([first, b"abc", second, b"def"]))
    long, short = Crew(), Crew()
    long.start(buffer.read, 0, 6)
    first.await_reached()
    short.start(buffer.read, 0, 2)
    poll_until(lambda: buffer._buffer.waiting == 1)
    first.open()
    assert short.join() == [b"ab"]
    second.open()
    assert long.join() == [b"abcdef"]


def test_a_waiter_takes_over_when_the_puller_has_enough():
    gate = Gate()
    buffer = StreamBuffer(ScriptedStream([gate, b"abc", b"def", b"ghi"]))
    crew = Crew()
    crew.start(buffer.read, 0, 3)
    gate.await_reached()
    for size in (6, 9, 20):
        crew.start(buffer.read, 0, size)
    poll_until(lambda: buffer._buffer.waiting == 3)
    gate.open()
    assert crew.join() == [b"abc", b"abcdef", b"abcdefghi", b"abcdefghi"]


def test_waiting_costs_no_processor_time():
    gate = Gate()
    buffer = StreamBuffer(ScriptedStream([gate, b"abc"]))
    crew = Crew()
    for _ in range(20):
        crew.start(buffer.read, 0, 3)
    gate.await_reached()
    poll_until(lambda: buffer._buffer.waiting == 19)
    before = time.process_time()
    threading.Event().wait(0.3)
    assert time.process_time() - before < 0.05
    gate.open()
    assert crew.join() == [b"abc"] * 20


def test_many_threads_read_everything_from_one_run_of_the_source(chunk):
    stream = scripted(DATA, chunk)
    buffer = StreamBuffer(stream)

    def read(seed: int) -> bytes:
        if seed % 3 == 0:
            return buffer[:]
        parts, position = [], 0
        while part := buffer.read(position, seed * 7 + 1):
            parts.append(part)
            position += len(part)
        return b"".join(parts)

    crew = Crew()
    for seed in range(12):
        crew.start(read, seed)
    assert crew.join() == [DATA] * 12
    assert stream.starts == 1 and not stream.together


def read_by_many(readers: int, size: int) -> None:
    data = named_bytes("readers", readers, size)
    stream = scripted(data, 1_000_003)
    buffer = StreamBuffer(stream)

    def read(seed: int) -> None:
        handle = buffer.open()
        position, piece = 0, bytearray(200_000 + seed * 1001)
        while count := handle.readinto(piece):
            if piece[:count] != data[position : position + count]:
                raise AssertionError(f"wrong bytes at {position}")
            position += count
        assert position == size

    with Crew() as crew:
        for seed in range(readers):
            crew.start(read, seed)
    assert stream.starts == 1
    buffer.close()


@pytest.mark.parametrize("readers, size", [(20, 8_000_000), (256, 10_000_000)])
def test_many_readers_of_a_stream_that_spills_all_get_its_bytes(readers, size):
    read_by_many(readers, size)


@pytest.mark.soak
@pytest.mark.skipif(not MANY, reason="set STREAMFS_SOAK=1")
@pytest.mark.parametrize("readers, size", [(20, 50_000_000), (256, 50_000_000)])
def test_very_many_readers_of_a_long_stream_all_get_its_bytes(readers, size):
    read_by_many(readers, size)


# Handles


def test_handles_have_positions_of_their_own():
    buffer = StreamBuffer(bytes([i]) for i in range(1, 9))
    first, second = buffer.open(), buffer.open()
    assert first.read(3) == bytes([1, 2, 3])
    assert second.read(5) == bytes([1, 2, 3, 4, 5])
    assert first.read(5) == bytes([4, 5, 6, 7, 8])
    assert second.read() == bytes([6, 7, 8])
    assert first.read(1) == second.read() == b""


def test_seeking_from_start_end_and_current():
    handle = StreamBuffer(bytes([i]) for i in range(1, 9)).open()
    assert handle.seek(3) == 3
    assert handle.read(2) == bytes([4, 5])
    assert handle.seek(-3, io.SEEK_END) == 5
    assert handle.read(1) == bytes([6])
    assert handle.seek(-2, io.SEEK_CUR) == 4 == handle.tell()
    assert handle.read() == bytes([5, 6, 7, 8])
    assert handle.seek(100) == 100 and handle.read(5) == b""
    with pytest.raises(ValueError):
        handle.seek(-101, io.SEEK_CUR)
    with pytest.raises(ValueError):
        handle.seek(0, 7)
    assert handle.tell() == 100


def test_a_handle_is_a_raw_binary_file():
    buffer = StreamBuffer(chunked(DATA, 7))
    with buffer.open() as handle:
        assert handle.readable() and handle.seekable() and not handle.writable()
        assert handle.readinto(bytearray()) == 0
        lines = io.BufferedReader(handle).readlines()
    assert b"".join(lines) == DATA
    for use in (handle.tell, partial(handle.seek, 0), partial(handle.read, 1)):
        with pytest.raises(ValueError):
            use()
    assert buffer.read(0, 1) == b"0"


def test_a_zip_file_reads_out_of_a_one_way_stream():
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", DATA)
        archive.writestr("b.bin", BIG[:100_000])
    with zipfile.ZipFile(StreamBuffer(chunked(packed.getvalue(), 999)).open()) as archive:
        assert archive.read("b.bin") == BIG[:100_000]
        assert archive.read("a.txt") == DATA


# Closing


def test_after_close_every_use_raises_closed_and_the_stream_is_closed_once():
    stream = scripted(DATA, 4)
    with StreamBuffer(stream) as buffer:
        buffer.read(0, 5)
        handle = buffer.open()
    buffer.close()
    assert stream.closed == 1
    for use in (
        partial(buffer.read, 0, 1),
        partial(buffer.read, 0, 0),
        lambda: buffer[0],
        lambda: buffer[-1:],
        lambda: buffer[:],
        lambda: handle.read(1),
    ):
        with pytest.raises(Closed):
            use()
    assert buffer._buffer.memory == 0


def test_close_of_a_complete_buffer_takes_slices_to_the_end_too():
    buffer = StreamBuffer([DATA])
    assert buffer[:] == DATA
    buffer.close()
    with pytest.raises(Closed):
        buffer[-5:]


def test_close_while_another_thread_pulls_ends_its_read_and_closes_the_stream_after_it():
    gate = Gate()
    stream = ScriptedStream([b"abc", gate, b"def"])
    buffer = StreamBuffer(stream)
    outcomes = []

    def read(size: int) -> None:
        try:
            outcomes.append(buffer.read(0, size))
        except Closed:
            outcomes.append(Closed)

    crew = Crew()
    crew.start(read, 6)
    gate.await_reached()
    crew.start(read, 5)
    poll_until(lambda: buffer._buffer.waiting == 1)
    buffer.close()
    poll_until(lambda: outcomes == [Closed])  # the waiting one, at once
    assert stream.closed == 0
    gate.open()
    crew.join()
    assert outcomes == [Closed, Closed]
    assert stream.closed == 1
    assert buffer._buffer.memory == 0


def test_close_at_any_moment_of_a_pull_closes_the_stream_exactly_once():
    for _ in range(300):
        stream = ScriptedStream([b"a", b"b"])
        buffer = StreamBuffer(stream)

        def read(buffer: StreamBuffer = buffer) -> None:
            try:
                buffer.read(0, 2)
            except Closed:
                return

        with Crew() as crew:
            crew.start(read)
            crew.start(buffer.close)
        assert stream.closed == 1
        assert buffer._buffer.memory == 0


def test_the_last_puller_closes_a_stream_that_was_closed_as_it_left():
    """`close` comes after the puller's last look and before it gives the turn back."""
    stream = ScriptedStream([b"abc"])
    buffer = StreamBuffer(stream)
    turn = buffer._turn

    class Turn:
        def __init__(self) -> None:
            self.left = False

        def acquire(self, blocking: bool = True) -> bool:
            return turn.acquire(blocking=blocking)

        def locked(self) -> bool:
            return turn.locked()

        def release(self) -> None:
            if not self.left:
                self.left = True
                buffer.close()
            turn.release()

    buffer._turn = Turn()  # type: ignore[assignment]
    with pytest.raises(Closed):
        buffer.read(0, 3)
    assert stream.closed == 1
    assert buffer._buffer.memory == 0


def test_a_stream_whose_close_raises_leaves_no_turn_taken():
    class Stubborn(ScriptedStream):
        def close(self) -> None:
            super().close()
            raise OSError("stubborn")

    stream = Stubborn([b"abc"])
    buffer = StreamBuffer(stream)
    buffer.read(0, 1)
    with pytest.raises(OSError, match="stubborn"):
        buffer.close()
    buffer.close()
    assert stream.closed == 1
    with pytest.raises(Closed):
        buffer.read(0, 1)
    assert not buffer._turn.locked()


def test_a_generator_is_closed_so_that_its_cleanup_runs():
    cleaned = []

    def source():
        try:
            yield b"abc"
            yield b"def"
        finally:
            cleaned.append(True)

    buffer = StreamBuffer(source())
    buffer.read(0, 1)
    buffer.close()
    assert cleaned == [True]


def test_memory_and_disk_go_with_the_owner():
    def descriptors() -> int:
        gc.collect()
        return len(list(Path("/proc/self/fd").iterdir()))

    before = descriptors()
    buffer = StreamBuffer(chunked(BIG, 100_000), max_size=LARGE)
    assert buffer[-5:] == BIG[-5:]
    assert descriptors() == before + 1
    del buffer
    assert descriptors() == before


# trio


async def test_async_reads_give_what_reads_give(chunk):
    buffer = StreamBuffer(scripted(DATA, chunk))
    assert await buffer.aread(8, 3) == b"4\n5"
    assert await buffer.aread(0, 5) == b"0\n1\n2"
    assert await buffer.aread(len(DATA) - 3, 10) == DATA[-3:]
    assert await buffer.aread(len(DATA), 10) == b""
    with pytest.raises(ValueError):
        await buffer.aread(-1, 1)


async def test_an_async_read_of_bytes_on_disk():
    buffer = StreamBuffer(chunked(BIG, 100_000), max_size=LARGE)
    assert await buffer.aread(0, len(BIG)) == BIG
    assert await buffer.aread(5, 100) == BIG[5:105]


async def test_async_errors_are_as_sticky():
    buffer = StreamBuffer(generated([b"abc", OSError("cable")]))
    for _ in range(2):
        with pytest.raises(SourceFailed, match="cable"):
            await buffer.aread(0, 4)
    assert await buffer.aread(0, 3) == b"abc"


async def test_the_event_loop_runs_while_a_pull_blocks_and_arrived_bytes_do_not_wait():
    gate = Gate()
    buffer = StreamBuffer(ScriptedStream([b"abc", gate, b"def"]))
    with trio.fail_after(WAIT):
        async with trio.open_nursery() as nursery:
            found = []

            async def read() -> None:
                found.append(await buffer.aread(0, 6))

            nursery.start_soon(read)
            await trio.to_thread.run_sync(gate.await_reached)
            assert await buffer.aread(0, 3) == b"abc"
            assert found == []
            gate.open()
    assert found == [b"abcdef"]


async def test_a_cancelled_pull_leaves_the_stream_usable_and_pulls_no_further():
    gate = Gate()
    stream = ScriptedStream([b"abc", gate, b"def", b"ghi", b"jkl"])
    buffer = StreamBuffer(stream)
    with trio.fail_after(WAIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(buffer.aread, 0, 100)
            await trio.to_thread.run_sync(gate.await_reached)
            nursery.cancel_scope.cancel()
        assert await buffer.aread(0, 3) == b"abc"
        gate.open()
        assert await buffer.aread(0, 6) == b"abcdef"
        await trio.to_thread.run_sync(poll_until, lambda: not buffer._turn.locked())
        assert stream.pulled == 2  # the read that wanted more is gone
        assert await buffer.aread(0, 100) == b"abcdefghijkl"


async def test_a_cancelled_waiter_leaves_nothing_behind():
    gate = Gate()
    buffer = StreamBuffer(ScriptedStream([gate, b"abc"]))
    with Crew() as crew:
        crew.start(buffer.read, 0, 3)
        await trio.to_thread.run_sync(gate.await_reached)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(buffer.aread, 0, 2)
            await trio.testing.wait_all_tasks_blocked()
            assert buffer._buffer.waiting == 1
            nursery.cancel_scope.cancel()
        assert buffer._buffer.waiting == 0
        gate.open()


async def test_the_woken_successor_of_a_puller_hands_on_when_it_is_cancelled():
    """The puller leaves and wakes the task; the task is cancelled before it can run; the thread must not hang."""
    gate = Gate()
    buffer = StreamBuffer(ScriptedStream([gate, b"abc", b"def"]))
    crew = Crew()
    crew.start(buffer.read, 0, 3)
    await trio.to_thread.run_sync(gate.await_reached)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(buffer.aread, 0, 5)
        await trio.testing.wait_all_tasks_blocked()
        crew.start(buffer.read, 0, 6)
        poll_until(lambda: buffer._buffer.waiting == 2)
        gate.open()
        # Without an await: the task is woken from the puller's thread, but cannot run.
        poll_until(lambda: buffer._buffer.waiting == 1 and not buffer._turn.locked())
        nursery.cancel_scope.cancel()
    assert await trio.to_thread.run_sync(crew.join) == [b"abc", b"abcdef"]


async def test_tasks_and_threads_read_one_stream_together(chunk):
    stream = scripted(DATA, chunk)
    buffer = StreamBuffer(stream)

    async def read(seed: int) -> None:
        parts, position = [], 0
        while part := await buffer.aread(position, seed * 13 + 1):
            parts.append(part)
            position += len(part)
        assert b"".join(parts) == DATA

    with trio.fail_after(WAIT), Crew() as crew:
        for _ in range(4):
            crew.start(lambda: buffer[:])
        async with trio.open_nursery() as nursery:
            for seed in range(1, 8):
                nursery.start_soon(read, seed)
    assert stream.starts == 1 and not stream.together


async def test_close_fails_waiting_tasks():
    gate = Gate()
    stream = ScriptedStream([gate, b"abc"])
    buffer = StreamBuffer(stream)
    seen = []

    async def read() -> None:
        with pytest.raises(Closed):
            await buffer.aread(0, 3)
        seen.append(True)

    with trio.fail_after(WAIT):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(read)
            await trio.to_thread.run_sync(gate.await_reached)
            await trio.to_thread.run_sync(poll_until, lambda: buffer._buffer.waiting == 2)
            buffer.close()
            await trio.to_thread.run_sync(poll_until, lambda: buffer._buffer.waiting == 0)
            gate.open()
    assert seen == [True] * 3
    assert stream.closed == 1


def test_pulls_abandoned_by_many_runs_of_trio_do_not_use_up_the_threads_of_the_next():
    """A pull that hangs keeps its thread past the end of the run that began it."""
    gates = [Gate() for _ in range(10)]
    buffer = StreamBuffer(ScriptedStream([x for i, gate in enumerate(gates) for x in (gate, bytes([i]))]))

    async def abandon(gate: Gate) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(buffer.aread, 0, 10)
            await trio.to_thread.run_sync(gate.await_reached)
            nursery.cancel_scope.cancel()

    for gate in gates[:-1]:
        trio.run(abandon, gate)
        gate.open()
        poll_until(lambda: not buffer._turn.locked())
    gates[-1].open()

    async def read() -> bytes:
        with trio.fail_after(WAIT):
            return await buffer.aread(0, 10)

    assert trio.run(read) == bytes(range(10))
