"""Progress bars: on standard error where that is a terminal, nothing anywhere else."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TypeAlias

Progress: TypeAlias = Callable[[int, int | None], None]
"""Called with the bytes so far and the length, None while that is unknown."""
Count: TypeAlias = Callable[[int, int], None]
"""Called with how many are done, and of how many."""


@contextlib.contextmanager
def bytes_progress(title: str) -> Iterator[Progress]:
    """A bar of bytes with their rate and the time that is left."""
    if not sys.stderr.isatty():
        yield lambda done, size: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}", markup=False),
        *(BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn()),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(title, total=None)
        yield lambda done, size: bars.update(task, completed=done, total=size)


@contextlib.contextmanager
def count_progress(title: str) -> Iterator[Count]:
    """A bar of things done, of so many; it goes when it is over."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn
    from rich.progress import Progress as Bars

    with Bars(title, BarColumn(), MofNCompleteColumn(), console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(title, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
