"""The daemon's log: a file in the state directory, and standard error too while it runs in the foreground.

Nothing here knows secrets; who logs names streams by their numbers and sources in their redacted form.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import time
from pathlib import Path
from typing import TextIO

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("text", "json")

LOG_BYTES = 4 << 20
"""The log starts anew at this size; one older file is kept."""
JOURNAL_VARIABLE = "JOURNAL_STREAM"  # device:inode of what systemd connected standard error to
_PRIORITIES = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))  # as in sd-daemon(3)
_DEBUG_PRIORITY = 7


def files(path: Path) -> tuple[Path, Path]:
    """The older file, which may be missing, and the current one."""
    return path.with_name(path.name + ".1"), path


def set_up(path: Path, level: str = "info", form: str = "text", *, stderr: TextIO | None = None) -> None:
    """Log to the file `path`, made with the rights that the umask leaves, and to `stderr` if it is given; journald,
    where that is what `stderr` leads to, gets priorities instead of times. Raises OSError."""
    handlers: list[logging.Handler] = [
        logging.handlers.RotatingFileHandler(path, maxBytes=LOG_BYTES, backupCount=1, encoding="utf-8", errors=_KEEP)
    ]
    if stderr is not None:
        handlers.append(logging.StreamHandler(stderr))
    for handler in handlers:
        handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter(_TEXT))
    if stderr is not None and is_journal(stderr):
        inner = JsonFormatter() if form == "json" else logging.Formatter("%(name)s: %(message)s")
        handlers[-1].setFormatter(JournalFormatter(inner))
    root = logging.getLogger()
    for handler in root.handlers:
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(max(logging.INFO, _number(level)))  # the libraries' own details help nobody here
    logging.getLogger("streamfs").setLevel(_number(level))


_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_KEEP = "backslashreplace"  # names that are not UTF-8


def _number(level: str) -> int:
    return int(logging.getLevelNamesMapping()[level.upper()])


class JsonFormatter(logging.Formatter):
    """One object a line: time (ISO 8601, UTC), level, logger, message; traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)


class JournalFormatter(logging.Formatter):
    """Each line with the priority that journald reads from its beginning."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        priority = next((number for level, number in _PRIORITIES if record.levelno >= level), _DEBUG_PRIORITY)
        return "\n".join(f"<{priority}>{line}" for line in self._inner.format(record).splitlines())


def is_journal(stream: TextIO) -> bool:
    """Whether systemd connected `stream` to its journal."""
    said = os.environ.get(JOURNAL_VARIABLE)
    if not said:
        return False
    try:
        there = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return said == f"{there.st_dev}:{there.st_ino}"
