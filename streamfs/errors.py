"""Every error of streamfs, and the errno a program reading the mount gets for it.

This is the one errno map: `StreamfsError.errno` says what a FUSE reply carries, and `str(error)` is one line
for a person. Messages never hold a secret: sources redact before they raise.
"""

from __future__ import annotations

import errno as _errno
from typing import ClassVar


class StreamfsError(Exception):
    """Base of all errors raised on purpose. `errno` is a positive number from the errno module."""

    errno: ClassVar[int] = _errno.EIO


class SourceFailed(StreamfsError):
    """The source broke, refused or lied; bytes beyond what arrived cannot be had now (EIO)."""


class SourceStalled(SourceFailed):
    """The source sent nothing for the stall timeout (ETIMEDOUT)."""

    errno: ClassVar[int] = _errno.ETIMEDOUT


class SourceChanged(StreamfsError):
    """The source serves another version than the one this generation holds (ESTALE)."""

    errno: ClassVar[int] = _errno.ESTALE


class CommandFailed(SourceFailed):
    """A command ended with a non-zero status or by a signal (EIO).

    `status` is what a shell shows in `$?`: 0..255, and 128 + N for signal N.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class OutsideWindow(StreamfsError):
    """The bytes have left the window that an endless stream keeps (ENODATA)."""

    errno: ClassVar[int] = _errno.ENODATA


class NoSpace(StreamfsError):
    """Neither memory nor the cache directory can take this stream's next bytes (ENOSPC)."""

    errno: ClassVar[int] = _errno.ENOSPC


class TooManyFiles(SourceFailed):
    """The daemon may have no more files and connections open (ENFILE)."""

    errno: ClassVar[int] = _errno.ENFILE


class Damaged(StreamfsError):
    """Bytes in the cache failed their checksum and cannot be fetched again (EIO)."""


class Interrupted(StreamfsError):
    """The waiting program was told to stop (EINTR)."""

    errno: ClassVar[int] = _errno.EINTR


class Closed(StreamfsError):
    """The buffer, stream or daemon is shutting down (ESHUTDOWN)."""

    errno: ClassVar[int] = _errno.ESHUTDOWN


class Busy(StreamfsError):
    """Something else holds what was asked for, such as the home of a running daemon (EBUSY)."""

    errno: ClassVar[int] = _errno.EBUSY


class Unreachable(StreamfsError):
    """The daemon does not answer (ENOTCONN)."""

    errno: ClassVar[int] = _errno.ENOTCONN


class NotFound(StreamfsError):
    """No stream, folder or attribute of that name (ENOENT)."""

    errno: ClassVar[int] = _errno.ENOENT


class AlreadyExists(StreamfsError):
    """The name is taken (EEXIST)."""

    errno: ClassVar[int] = _errno.EEXIST


class NotPermitted(StreamfsError):
    """Not allowed to this user, or not by this way (EACCES)."""

    errno: ClassVar[int] = _errno.EACCES


class InvalidRequest(StreamfsError):
    """A name, option, URL or value is not acceptable (EINVAL)."""

    errno: ClassVar[int] = _errno.EINVAL


class NameTooLong(InvalidRequest):
    """A part of a name is over 255 bytes (ENAMETOOLONG)."""

    errno: ClassVar[int] = _errno.ENAMETOOLONG


class NotDirectory(StreamfsError):
    """A part of the path is a file (ENOTDIR)."""

    errno: ClassVar[int] = _errno.ENOTDIR


class IsDirectory(StreamfsError):
    """A folder stands where a file is needed (EISDIR)."""

    errno: ClassVar[int] = _errno.EISDIR


class NotEmpty(StreamfsError):
    """A folder that still holds names cannot go (ENOTEMPTY)."""

    errno: ClassVar[int] = _errno.ENOTEMPTY


class NoAttribute(StreamfsError):
    """No extended attribute of that name (ENODATA)."""

    errno: ClassVar[int] = _errno.ENODATA


def told(error: StreamfsError) -> StreamfsError:
    """What to keep of an error that was handled: its kind and text. Its traceback and causes would keep alive whatever
    the frames hold: buffers, descriptors."""
    copy = type(error).__new__(type(error))
    copy.args = error.args
    copy.__dict__.update(error.__dict__)
    return copy
