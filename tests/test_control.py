"""The control socket: requests and replies over real unix sockets."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import socket
import stat
import struct
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from streamfs.control import Client, server, wire
from streamfs.errors import (
    AlreadyExists,
    CommandFailed,
    InvalidRequest,
    NameTooLong,
    NotFound,
    NotPermitted,
    SourceFailed,
    StreamfsError,
    Unreachable,
)
from streamfs.home import Home
from streamfs.spec import StreamSpec, UrlSource

NOBODY = 65534


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "config", tmp_path / "state", tmp_path / "cache", tmp_path / "run", tmp_path)
    home.prepare()
    return home


class Running:
    """A server in a thread of its own, with a way into its loop."""

    def __init__(self, home: Home, handlers: dict[str, server.Handler], **options: Any) -> None:
        self._home, self._handlers, self._options = home, handlers, options
        self._ready = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._main,))
        self.cancelled = threading.Event()

    async def _main(self) -> None:
        with self._home.lock() as lock:
            listener = server.listen(self._home.socket_path, lock)
            self.token = trio.lowlevel.current_trio_token()
            with trio.CancelScope() as self._scope:
                async with trio.open_nursery() as nursery:
                    await nursery.start(lambda **kw: server.serve(listener, self._handlers, **self._options, **kw))
                    self._ready.set()

    def __enter__(self) -> Running:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def stop_soon(self) -> None:
        """From within the loop, or from another thread."""
        self.token.run_sync_soon(self._scope.cancel)

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            self.stop_soon()
        self._thread.join(10)
        assert not self._thread.is_alive()


async def echo(params: dict[str, Any]) -> Any:
    return params


def raising(error: BaseException) -> server.Handler:
    async def handler(params: dict[str, Any]) -> Any:
        raise error

    return handler


@pytest.fixture
def serving(home: Home) -> Iterator[Callable[..., Running]]:
    running: list[Running] = []

    def start(handlers: dict[str, server.Handler], **options: Any) -> Running:
        one = Running(home, handlers, **options)
        running.append(one)
        return one.__enter__()

    yield start
    for one in running:
        one.__exit__()


def test_a_call_gives_the_handlers_result(home: Home, serving: Callable[..., Running]) -> None:
    serving({"echo": echo})
    with Client(home.socket_path) as client:
        assert client.call("echo", text="é\udce9", list=[1, None, {"a": 2.5}]) == {
            "text": "é\udce9",
            "list": [1, None, {"a": 2.5}],
        }
        assert client.call("echo") == {}  # the same connection serves again


def test_structs_travel(home: Home, serving: Callable[..., Running]) -> None:
    serving({"echo": echo})
    with Client(home.socket_path) as client:
        spec = StreamSpec(name="a", source=UrlSource("http://h/x"))
        assert msgspec.convert(client.call("echo", spec=spec)["spec"], StreamSpec) == spec


@pytest.mark.parametrize("kind", [NotFound, AlreadyExists, NameTooLong, SourceFailed, NotPermitted])
def test_an_error_arrives_as_its_own_kind(
    home: Home, serving: Callable[..., Running], kind: type[StreamfsError]
) -> None:
    serving({"fail": raising(kind("what happened"))})
    with Client(home.socket_path) as client:
        with pytest.raises(kind, match=r"^what happened$") as caught:
            client.call("fail")
        assert type(caught.value) is kind


def test_the_status_of_a_failed_command_arrives(home: Home, serving: Callable[..., Running]) -> None:
    serving({"fail": raising(CommandFailed("it ended with 7", 7))})
    with Client(home.socket_path) as client, pytest.raises(CommandFailed) as caught:
        client.call("fail")
    assert caught.value.status == 7


def test_a_kind_of_error_that_is_not_known_here_arrives_as_the_base_that_is() -> None:
    class Special(NotFound):
        pass

    failure = wire.to_failure(Special("gone"))
    assert failure.kinds == ("Special", "NotFound", "StreamfsError")
    assert type(wire.to_error(failure)) is NotFound
    assert type(wire.to_error(wire.Failure(("os", "Any", "Unheard"), "x"))) is StreamfsError


def test_a_bug_in_a_handler_is_logged_hides_its_text_and_harms_nobody(
    home: Home, serving: Callable[..., Running], caplog: pytest.LogCaptureFixture
) -> None:
    serving({"bug": raising(ValueError("secret")), "echo": echo, "group": raising(ExceptionGroup("g", [OSError()]))})
    with Client(home.socket_path) as client, Client(home.socket_path) as other:
        with pytest.raises(StreamfsError, match="ValueError") as caught:
            client.call("bug")
        assert "secret" not in str(caught.value)
        with pytest.raises(StreamfsError, match="OSError"):
            client.call("group")
        assert client.call("echo", a=1) == other.call("echo", a=1) == {"a": 1}
    assert [record.levelno for record in caplog.records] == [logging.ERROR, logging.ERROR]


def test_an_error_alone_in_a_group_is_that_error(home: Home, serving: Callable[..., Running]) -> None:
    serving({"group": raising(ExceptionGroup("g", [ExceptionGroup("h", [NotFound("that")])]))})
    with Client(home.socket_path) as client, pytest.raises(NotFound, match=r"^that$"):
        client.call("group")


def test_an_unknown_method_and_a_result_that_is_not_json_are_errors(
    home: Home, serving: Callable[..., Running], caplog: pytest.LogCaptureFixture
) -> None:
    async def odd(params: dict[str, Any]) -> Any:
        return object()

    serving({"odd": odd})
    with Client(home.socket_path) as client:
        with pytest.raises(NotFound, match="no request 'nix'"):
            client.call("nix")
        with pytest.raises(StreamfsError, match="TypeError"):
            client.call("odd")


def test_a_streaming_method_gives_items_as_they_come_and_its_error_last(
    home: Home, serving: Callable[..., Running]
) -> None:
    async def count(params: dict[str, Any]) -> AsyncIterator[Any]:
        for number in range(params["to"]):
            yield number
        if params.get("fail"):
            raise NotFound("no more")

    serving({"count": count})
    with Client(home.socket_path) as client:
        assert list(client.stream("count", to=5)) == [0, 1, 2, 3, 4]
        assert list(client.stream("count", to=0)) == []
        seen = []
        with pytest.raises(NotFound, match="no more"):
            for item in client.stream("count", to=2, fail=True):
                seen.append(item)
        assert seen == [0, 1]


def test_a_streaming_handler_is_cancelled_when_its_client_leaves(home: Home, serving: Callable[..., Running]) -> None:
    ended = threading.Event()

    async def forever(params: dict[str, Any]) -> AsyncIterator[Any]:
        try:
            yield 1
            await trio.sleep_forever()
        finally:
            ended.set()

    serving({"forever": forever})
    client = Client(home.socket_path)
    items = client.stream("forever")
    assert next(items) == 1
    client.close()
    assert ended.wait(10)


def test_an_ordinary_handler_runs_to_its_end_though_its_client_left(
    home: Home, serving: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "HEARTBEAT", 0.01)
    begun, finished = threading.Event(), threading.Event()
    proceed = trio.Event()

    async def change(params: dict[str, Any]) -> Any:
        begun.set()
        await proceed.wait()
        finished.set()

    running = serving({"change": change, "echo": echo})
    with Client(home.socket_path) as client:
        client._socket.sendall(wire.pack(wire.Request("change"), wire.MAX_REQUEST))
        assert begun.wait(10)
    with Client(home.socket_path) as client:
        client.call("echo")  # the loop went round since
    assert not finished.is_set()
    running.token.run_sync_soon(proceed.set)
    assert finished.wait(10)


def test_a_long_method_does_not_time_out_while_the_daemon_lives(
    home: Home, serving: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "HEARTBEAT", 0.05)

    async def slow(params: dict[str, Any]) -> Any:
        await trio.sleep(1.0)
        return "done"

    serving({"slow": slow})
    with Client(home.socket_path, timeout=0.5) as client:
        assert client.call("slow") == "done"


def test_a_daemon_that_stopped_is_reported_after_the_timeout(home: Home) -> None:
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(home.socket_path))
        deaf.listen()
        with Client(home.socket_path, timeout=0.2) as client, pytest.raises(Unreachable, match="did not answer"):
            client.call("ping")


def test_a_daemon_that_dies_is_reported(home: Home) -> None:
    with socket.socket(socket.AF_UNIX) as dying:
        dying.bind(str(home.socket_path))
        dying.listen()
        with Client(home.socket_path) as client:
            connection, _ = dying.accept()
            connection.close()
            with pytest.raises(Unreachable, match="connection to the daemon broke"):
                client.call("ping")


def test_no_daemon_is_reported(home: Home) -> None:
    with pytest.raises(Unreachable, match="no daemon listens"):
        Client(home.socket_path)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(home.socket_path))
    with pytest.raises(Unreachable, match="no daemon listens"):
        Client(home.socket_path)


def test_an_idle_client_is_dropped(home: Home, serving: Callable[..., Running]) -> None:
    serving({"echo": echo}, idle_timeout=0.05)
    with Client(home.socket_path, timeout=10) as client:
        assert client._socket.recv(1) == b""


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (b"\xff\xff\xff\xff", "over the limit"),
        (struct.pack(">I", 3) + b"{x}", "not a valid Request"),
        (struct.pack(">I", 2) + b"[]", "not a valid Request"),
        (struct.pack(">I", 27) + b'{"method":"e","version":99}', "protocol 99"),
        (struct.pack(">I", 14) + b'{"method":"e"}', "protocol 0"),
    ],
)
def test_what_is_not_a_request_gets_an_error_and_the_connection_closes(
    home: Home, serving: Callable[..., Running], message: bytes, text: str
) -> None:
    serving({"echo": echo})
    with Client(home.socket_path) as client:
        client._socket.sendall(message)
        size = wire.body_size(client._receive(4), wire.MAX_REPLY)
        reply = wire.unpack_reply(client._receive(size))
        assert reply.last and reply.error is not None and text in reply.error.text
        assert client._socket.recv(1) == b""
    with Client(home.socket_path) as client:
        assert client.call("echo", a=1) == {"a": 1}


def test_a_half_sent_request_and_a_reset_harm_nobody(
    home: Home, serving: Callable[..., Running], caplog: pytest.LogCaptureFixture
) -> None:
    serving({"echo": echo})
    for part in (b"\0", b"\0\0\0\x10", b"\0\0\0\x10{"):
        with Client(home.socket_path) as client:
            client._socket.sendall(part)
    with Client(home.socket_path) as client:
        client._socket.sendall(wire.pack(wire.Request("echo", {"x": "y" * 5_000_000}), wire.MAX_REQUEST))
        # leaves without reading the reply
    with Client(home.socket_path) as client:
        assert client.call("echo", a=1) == {"a": 1}
    assert not caplog.records


def test_a_reply_over_the_limit_is_an_error(
    home: Home, serving: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "MAX_REPLY", 1000)
    serving({"echo": echo})
    with Client(home.socket_path) as client, pytest.raises(InvalidRequest, match="over the limit"):
        client.call("echo", text="x" * 2000)


def test_a_hundred_thousand_streams_are_listed_in_one_reply(home: Home, serving: Callable[..., Running]) -> None:
    rows = [{"name": f"folder/stream-{i}", "source": "http://127.0.0.1/" + "x" * 60, "size": i} for i in range(100_000)]

    async def listing(params: dict[str, Any]) -> Any:
        return rows

    serving({"list": listing})
    with Client(home.socket_path) as client:
        assert client.call("list") == rows


def test_the_socket_is_private_under_any_umask(home: Home, serving: Callable[..., Running]) -> None:
    for umask in (0o000, 0o077, 0o777):
        before = os.umask(umask)
        try:
            with Running(home, {"echo": echo}), Client(home.socket_path) as client:
                mode = home.socket_path.stat().st_mode
                assert client.call("echo") == {}
        finally:
            os.umask(before)
        assert stat.S_IMODE(mode) == 0o600
        assert not home.socket_path.exists()


async def test_only_the_holder_of_the_home_may_replace_a_stale_socket(home: Home) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(home.socket_path))
    lock = home.lock()
    with server.listen(home.socket_path, lock):
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(home.socket_path))
        lock.release()
        with pytest.raises(ValueError, match="not locked"):
            server.listen(home.socket_path, lock)


async def test_what_is_no_socket_is_never_removed(home: Home) -> None:
    home.socket_path.write_text("precious")
    with home.lock() as lock, pytest.raises(InvalidRequest, match="in the way"):
        server.listen(home.socket_path, lock)
    assert home.socket_path.read_text() == "precious"


async def test_closing_does_not_remove_anothers_socket(home: Home) -> None:
    with home.lock() as lock:
        first = server.listen(home.socket_path, lock)
        second = server.listen(home.socket_path, lock)
        first.close()
        assert home.socket_path.exists()
        second.close()
        assert not home.socket_path.exists()


def test_a_path_longer_than_a_socket_address_works(tmp_path: Path) -> None:
    root = tmp_path / ("d" * 150)
    home = Home(root / "config", root / "state", root / "cache", root / "run", root)
    home.prepare()
    with Running(home, {"echo": echo}), Client(home.socket_path) as client:
        assert len(str(home.socket_path)) > 107
        assert client.call("echo", a=1) == {"a": 1}
    assert not home.socket_path.exists()


def _ask_as(uid: int, path: Path, answer: Any) -> None:
    os.setgid(uid)
    os.setuid(uid)
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(str(path))
            with contextlib.suppress(BrokenPipeError):  # the refusal may come before the request
                connection.sendall(wire.pack(wire.Request("echo"), wire.MAX_REQUEST))
            answer.put(connection.recv(65536))
    except OSError as error:
        answer.put(type(error).__name__)


def _from_another_uid(path: Path) -> Any:
    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()
    child = context.Process(target=_ask_as, args=(NOBODY, path, answer))
    child.start()
    result = answer.get()
    child.join(10)
    assert child.exitcode == 0
    return result


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_another_user_is_kept_out_by_the_rights_of_the_file_and_again_by_the_check_of_the_peer(home: Home) -> None:
    called = []

    async def record(params: dict[str, Any]) -> Any:
        called.append(params)

    with Running(home, {"echo": record}):
        assert _from_another_uid(home.socket_path) == "PermissionError"
        opened = [home.socket_path.parent, *home.socket_path.parent.parents]
        modes = [path.stat().st_mode for path in opened]
        try:
            for path, mode in zip(opened, modes, strict=True):
                path.chmod(mode | 0o555)
            home.socket_path.chmod(0o666)
            reply = _from_another_uid(home.socket_path)
        finally:
            for path, mode in zip(opened, modes, strict=True):
                path.chmod(mode)
        assert isinstance(reply, bytes)
        error = msgspec.json.decode(reply[4:])["error"]
        assert error["kinds"][0] == "NotPermitted"
        assert not called


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_a_client_trusts_no_daemon_of_another_user(home: Home) -> None:
    def run(ready: Any, stop: Any) -> None:
        with socket.socket(socket.AF_UNIX) as trap:
            trap.bind(str(home.socket_path))
            os.setuid(NOBODY)
            trap.listen()
            ready.put(True)
            stop.wait(20)

    context = multiprocessing.get_context("fork")
    ready, stop = context.SimpleQueue(), context.Event()
    child = context.Process(target=run, args=(ready, stop))
    child.start()
    assert ready.get()
    # As the trapped user sees it: neither of us is root, and the listener is neither us nor root.
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "geteuid", lambda: 12345)
            with pytest.raises(NotPermitted, match=f"uid {NOBODY} listens"):
                Client(home.socket_path)
    finally:
        stop.set()
        child.join(10)
    assert child.exitcode == 0


def test_a_hundred_clients_at_once_are_all_answered(home: Home, serving: Callable[..., Running]) -> None:
    serving({"echo": echo})
    clients = [Client(home.socket_path) for _ in range(100)]
    try:
        for number, client in enumerate(clients):
            assert client.call("echo", n=number) == {"n": number}
    finally:
        for client in clients:
            client.close()


def test_more_clients_than_places_wait_for_one(
    home: Home, serving: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MAX_CLIENTS", 2)
    serving({"echo": echo})
    first, second = Client(home.socket_path), Client(home.socket_path)
    assert first.call("echo") == second.call("echo") == {}
    with Client(home.socket_path, timeout=10) as third:
        third._socket.sendall(wire.pack(wire.Request("echo"), wire.MAX_REQUEST))
        third._socket.settimeout(0.2)
        with pytest.raises(TimeoutError):
            third._socket.recv(1)
        first.close()
        third._socket.settimeout(10)
        assert third._socket.recv(1)
    second.close()
