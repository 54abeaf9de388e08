"""How many file descriptors are left: streams take none of the last ones, which the daemon needs for itself, to answer
the control socket, to write the catalogue, to look at programs and to end."""

from __future__ import annotations

import errno
import os
import resource

from streamfs.errors import TooManyFiles

RESERVE = 64
"""Descriptors that streams leave to the daemon; a quarter of all where the limit is low. What it opens itself at a time
is a dozen."""
SPENT = (errno.EMFILE, errno.ENFILE)
"""What the kernel says where there is none left."""


def take_one_more() -> None:
    """Call right before a stream takes descriptors, with nothing in between that gives others a turn. Raises
    TooManyFiles where there are no more left than the reserve."""
    if are_short():
        raise too_many()


def too_many() -> TooManyFiles:
    return TooManyFiles("too many files and connections are open for the daemon's limit: see 'streamfs doctor'")


def are_short() -> bool:
    """Whether there are no more left than the reserve."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return False
    try:
        lowest = os.open(os.devnull, os.O_PATH | os.O_CLOEXEC)  # the lowest that is free, so all below are taken
    except OSError as error:
        if error.errno not in SPENT:
            raise
        return True
    os.close(lowest)
    return lowest >= limit - min(RESERVE, limit // 4)
