"""The command line: parses, asks, prints. Nothing here knows how a stream works.

app         the group of commands, and what their errors look like
types       sizes, durations, headers: texts of the command line to values
registry    the same questions to a running daemon, or without one to the catalogue itself
register    add, rm, mv, persist, unpersist
lists       import, export
configure   config
examples    examples for the help of the others
show        ls, status
top         top                              page, maps: its page, and the bars in it
events      events
web         web
quick       ls and status as they are asked most           tables: what they print
looking     what the board tells, without asking the daemon
watching    the same again and again
waiting     persist --wait                   progress: bars while something is copied, fetched, imported
signals     what a command does when it is told to end
mount       mount, umount
keep        save, evict, verify
logs        logs
systemd     systemd
doctor      doctor                           checks: what it looks at
completion  completion, for the shells
helper      mount.streamfs, which mount(8) calls

Start-up time counts: what is heavy (the daemon with pyfuse3 and trio, rich) is imported by the command that needs it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (None: the process' own) and give its exit code: 0, 1 failure, 2 usage,
    130 interrupt."""
    from streamfs.cli import quick, tables

    words = list(sys.argv[1:] if arguments is None else arguments)
    ended: BaseException | None = None
    try:
        text = quick.answer(words)
        if text is not None:
            tables.put(text)
            return 0
    except (OSError, KeyboardInterrupt) as error:
        ended = error
    from streamfs.cli import app  # it takes longer to load than all of the above

    return app.main(words) if ended is None else app.told(ended)
