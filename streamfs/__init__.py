"""streamfs shows URLs and the output of commands as ordinary seekable files.

The map, from top to bottom; imports point downwards only:

cli           the commands; parses, asks, prints
daemon        the only trio.run: mount, signals, order of shutdown       mounting: the mountpoint
web           a page and metrics for Prometheus, from the board alone
fuse          the pyfuse3 adapter                                        control: requests over a unix socket
interrupts    readers that were told to stop                             watchdog: an event loop that stands still
turns         who reads the next request of the kernel
filesystem    names to streams, handles, attributes; no FUSE in it       tree, xattrs: its names and attributes
stream        one registered stream: current version, opening, persist
generation    one version of its bytes, and the fetches that fill it
catalog       the registered streams, and changes of them              database: its file, SQLite     entries: each one
importing     lists of streams: feeds fetched, what may be in them     manifests: every format read and written
settings, config    the configuration file, followed and read           options, tomllines: as people write them
cache         what is kept and what goes: memory, disk, age
sources       where bytes come from: commands, files, HTTP and its kin
board         what the daemon shows in a memory-mapped file, for any program to read
engine        the buffer: many readers, threads and trio, memory then disk
home, spec    where things are; what a stream is registered with       mounts, processes: what the kernel tells
news          what happens to streams, collected for the board           reporter: keeps the board
logs, notify  the daemon's log; how a service manager learns about it
errors        every error and its errno                                descriptors: how many are left

As a library: `StreamBuffer` gives random access to any iterable of bytes; `transformed` passes one through transforms,
`Gunzip` and its kin or your own (`Transform`). `Board` reads what a running daemon shows of its streams.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamfs.board import Board
    from streamfs.engine.streambuffer import StreamBuffer, StreamHandle
    from streamfs.engine.transforms import Bunzip2, Digest, Gunzip, Icy, Transform, Unxz, Unzstd, transformed
    from streamfs.errors import StreamfsError

__all__ = [
    "Board",
    "Bunzip2",
    "Digest",
    "Gunzip",
    "Icy",
    "StreamBuffer",
    "StreamHandle",
    "StreamfsError",
    "Transform",
    "Unxz",
    "Unzstd",
    "__version__",
    "transformed",
]

__version__ = "0.1.0"

_HOMES = {
    "Board": "streamfs.board",
    "StreamBuffer": "streamfs.engine.streambuffer",
    "StreamHandle": "streamfs.engine.streambuffer",
    "StreamfsError": "streamfs.errors",
    **dict.fromkeys(
        ("Bunzip2", "Digest", "Gunzip", "Icy", "Transform", "Unxz", "Unzstd", "transformed"),
        "streamfs.engine.transforms",
    ),
}


def __getattr__(name: str) -> Any:
    # Loaded when first used: a command such as `streamfs ls` needs neither the engine nor trio.
    import importlib

    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'streamfs' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
