"""Tells the service manager how the daemon is: systemd's notify protocol, sd_notify(3)."""

from __future__ import annotations

import logging
import os
import socket

log = logging.getLogger(__name__)

SOCKET_VARIABLE = "NOTIFY_SOCKET"
_PATIENCE = 1.0  # seconds for a manager whose queue is full; it reads on at once, or is of no help


class Notifier:
    """Where the environment names no socket, all of this does nothing. What cannot be told is logged, and the mount
    works without."""

    def __init__(self) -> None:
        """Takes the socket's name out of the environment: the commands of streams are not to speak for us."""
        self._address = _address(os.environ.pop(SOCKET_VARIABLE, ""))

    def ready(self, status: str) -> None:
        """The mount answers; `status` is what `systemctl status` shows."""
        self._send("READY=1", f"MAINPID={os.getpid()}", f"STATUS={status}")

    def stopping(self, status: str) -> None:
        self._send("STOPPING=1", f"STATUS={status}")

    def _send(self, *assignments: str) -> None:
        if self._address is None:
            return
        message = "\n".join(" ".join(text.splitlines()) for text in assignments).encode("utf-8", "backslashreplace")
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as line:
                line.settimeout(_PATIENCE)
                line.connect(self._address)
                line.sendall(message)
        except OSError as error:
            log.warning("cannot tell the service manager %r: %s", assignments[0], error)


def _address(name: str) -> str | None:
    """The address of a socket in the file system, or of an abstract one, which is written with an @."""
    if name.startswith("/"):
        return name
    if name.startswith("@") and len(name) > 1:
        return "\0" + name[1:]
    if name:
        log.warning("%s=%s is no address of a unix socket: not used", SOCKET_VARIABLE, name)
    return None
