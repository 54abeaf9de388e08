"""The command line: parses, asks, prints. Nothing here knows how a stream works.

    app.py       the group of commands, and what their errors look like
    types.py     sizes, durations, headers: texts of the command line to values
    registry.py  the same questions to a running daemon, or without one to the catalogue itself
    register.py  add, rm, mv, persist, unpersist
    lists.py     import, export
    configure.py config
    examples.py  examples for the help of the others
    show.py      ls, status
    top.py       top                         page.py, maps.py  its page, and the bars in it
    events.py    events
    looking.py   what the board tells, without asking the daemon
    watching.py  the same again and again
    waiting.py   persist --wait              progress.py  bars while something is copied, fetched, imported
    mount.py     mount, umount
    keep.py      save, evict, verify
    logs.py      logs
    systemd.py   systemd
    doctor.py    doctor                      checks.py  what it looks at
    completion.py  completion, for the shells
    helper.py    mount.streamfs, which mount(8) calls
    mounts.py    what the kernel says is mounted

Start-up time counts: what is heavy (the daemon with pyfuse3 and trio, rich) is imported by the command that needs it.
"""

from streamfs.cli.app import main

__all__ = ["main"]
