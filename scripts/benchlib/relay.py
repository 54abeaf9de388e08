"""A link with delay: relays TCP connections, each byte half a round trip later, each connection at a limited rate.

In place of tc's netem, which many kernels are built without. A new connection costs one more round trip before its
first byte goes through, as a handshake over such a link would.

    python relay.py TARGET_PORT ROUND_TRIP_SECONDS BYTES_PER_SECOND     (prints its own port)
"""

from __future__ import annotations

import contextlib
import queue
import socket
import sys
import threading
import time

CHUNK = 128 * 1024
IN_FLIGHT = 512  # chunks on the way: 64 MiB, far more than a window needs


def _receive(source: socket.socket, way: queue.Queue[tuple[float, bytes]], delay: float, extra: float) -> None:
    data = b"-"
    while data:
        try:
            data = source.recv(CHUNK)
        except OSError:
            data = b""
        way.put((time.monotonic() + delay + extra, data))
        extra = 0.0


def _send(target: socket.socket, way: queue.Queue[tuple[float, bytes]], rate: float) -> None:
    free = 0.0  # when the line is free again
    broken = False
    while True:
        due, data = way.get()
        if not data:
            break
        begin = max(due, free)
        wait = begin - time.monotonic()
        if wait > 0:
            time.sleep(wait)
        free = begin + len(data) / rate
        try:
            if not broken:
                target.sendall(data)
        except OSError:
            broken = True  # go on emptying the way, so that the receiving thread ends
    with contextlib.suppress(OSError):  # it may be closed already
        target.shutdown(socket.SHUT_WR)


def _relay(client: socket.socket, port: int, delay: float, rate: float) -> None:
    with client, socket.create_connection(("127.0.0.1", port)) as server:
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        there: queue.Queue[tuple[float, bytes]] = queue.Queue(IN_FLIGHT)
        back: queue.Queue[tuple[float, bytes]] = queue.Queue(IN_FLIGHT)
        threads = [
            threading.Thread(target=_receive, args=(client, there, delay, 2 * delay)),
            threading.Thread(target=_send, args=(server, there, rate)),
            threading.Thread(target=_receive, args=(server, back, delay, 0.0)),
            threading.Thread(target=_send, args=(client, back, rate)),
        ]
        for thread in threads:
            thread.daemon = True
            thread.start()
        threads[3].join()
        client.close()
        server.close()


def main() -> None:
    port, delay, rate = int(sys.argv[1]), float(sys.argv[2]) / 2, float(sys.argv[3])
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            client, _ = listener.accept()
            threading.Thread(target=_relay, args=(client, port, delay, rate), daemon=True).start()


if __name__ == "__main__":
    main()
