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

from streamfs.cli.app import main

__all__ = ["main"]
