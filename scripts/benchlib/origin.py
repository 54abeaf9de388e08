"""The origin: one file in memory (tmpfs), served by nginx (plain, TLS, HTTP/2) and vsftpd on loopback."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests import servers

ROUND_TRIP = 0.05  # seconds, of the slow link
LINK_RATE = 100e6  # bytes a second and connection, of the slow link

KINDS = ("plain", "tls", "http2", "ftp", "far")
_SENT = re.compile(r'" \d{3} (\d+) "')


class Missing(Exception):
    """Something that cannot be run here; the message says what to install."""


@dataclass(frozen=True)
class Origin:
    """`big` is the name of the whole file, `part` of its first bytes, `part_size` of them."""

    size: int
    part_size: int
    root: Path
    certificates: servers.Certificates
    plain: servers.Server
    tls: servers.Server
    http2: servers.Server
    ftp: servers.Server
    far_port: int | None
    """None: there is no compiler for the relay."""
    big: str = "big"
    part: str = "part"

    def url(self, kind: str, name: str) -> str:
        """`kind`: one of KINDS. Raises Missing."""
        if kind == "far":
            if self.far_port is None:
                raise Missing("no C compiler for the slow link: apt-get install gcc")
            return f"http://{servers.HOST}:{self.far_port}/{name}"
        if kind == "ftp":
            return f"ftp://{servers.HOST}:{self.ftp.port}/{name}"
        server = {"plain": self.plain, "tls": self.tls, "http2": self.http2}[kind]
        return f"{'http' if kind == 'plain' else 'https'}://{servers.HOST}:{server.port}/{name}"

    def path(self, name: str) -> Path:
        return self.root / name

    def bytes_sent(self) -> int:
        """Body bytes that the plain server has sent so far."""
        text = (self.plain.home / "access.log").read_text()
        return sum(int(sent) for sent in _SENT.findall(text))


@contextmanager
def origin(size: int, part_size: int) -> Iterator[Origin]:
    memory = Path("/dev/shm")
    with ExitStack() as stack:
        folder = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="streamfs-bench-", dir=memory if memory.is_dir() else None)
        )
        root = Path(folder)
        root.chmod(0o755)
        _write(root / "big", size)
        _write(root / "part", part_size)
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="streamfs-bench-tls-")))
        certificates = servers.make_certificates(home)
        # httpfs2 wants Accept-Ranges in every reply, and nginx leaves it off partial ones.
        options = "autoindex on; keepalive_requests 1000000; add_header Accept-Ranges bytes;"
        plain = stack.enter_context(servers.nginx(root, options=options))
        yield Origin(
            size=size,
            part_size=part_size,
            root=root,
            certificates=certificates,
            plain=plain,
            tls=stack.enter_context(servers.nginx(root, tls=certificates, options=options)),
            http2=stack.enter_context(servers.nginx(root, tls=certificates, http2=True, options=options)),
            ftp=stack.enter_context(servers.vsftpd(root)),
            far_port=stack.enter_context(_relay(plain.port, home / "relay")),
        )


def _write(path: Path, size: int) -> None:
    """Bytes of which no two megabytes are alike."""
    step = 1 << 20
    block = bytearray(os.urandom(step))
    with open(path, "wb") as file:
        for position in range(0, size, step):
            block[:8] = position.to_bytes(8, "little")
            file.write(block[: min(step, size - position)])


@contextmanager
def _relay(port: int, program: Path) -> Iterator[int | None]:
    if shutil.which("gcc") is None:
        yield None
        return
    source = Path(__file__).with_name("relay.c")
    subprocess.run(["gcc", "-O2", "-pthread", "-o", str(program), str(source)], timeout=60, check=True)
    argv = [str(program), str(port), str(ROUND_TRIP), str(LINK_RATE)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline())
        finally:
            process.kill()
