"""What people type: examples for the help of commands that do not show any of their own."""

from __future__ import annotations

import click

EXAMPLES = {
    "umount": """
streamfs umount
streamfs umount --lazy              # also while programs have files open
streamfs umount ~/streams           # a mount whose daemon has died""",
    "rm": """
streamfs rm song.flac logs/web
streamfs export old/ && streamfs rm old/one old/two""",
    "mv": """
streamfs mv song.flac music/song.flac
streamfs mv music archive/music     # a folder, with all that is in it""",
    "ls": """
streamfs ls
streamfs ls -l
streamfs ls --json | jq -r '.streams[] | select(.state == "failed") | .name'""",
    "status": """
streamfs status
streamfs status radio.mp3 --watch
streamfs status --json | jq '.streams[].buffered'""",
    "top": """
streamfs top
STREAMFS_HOME=~/other streamfs top   # of another home""",
    "events": """
streamfs events --follow
streamfs events --follow --listener notifier --json | while read -r event; do …; done""",
    "web": """
streamfs web                        # then open http://127.0.0.1:9717/
ssh -L 9717:127.0.0.1:9717 server   # looked at from elsewhere
curl -s http://127.0.0.1:9717/metrics | grep streamfs_stream_state""",
    "persist": """
streamfs persist films/tour.mp4
streamfs persist --wait films/tour.mp4 && systemctl poweroff
setfattr -n user.streamfs.persist -v 1 ~/streams/films/tour.mp4""",
    "unpersist": """
streamfs unpersist films/tour.mp4
streamfs unpersist films/tour.mp4 && streamfs evict films/tour.mp4""",
    "save": """
streamfs save dump.sql /backup/dump.sql
streamfs save logs/web web.log && gzip web.log""",
    "evict": """
streamfs evict logs/web             # the next reader starts its command again
streamfs evict --all""",
    "verify": """
streamfs verify
streamfs verify films/tour.mp4 || streamfs evict films/tour.mp4""",
    "doctor": """
streamfs doctor
streamfs doctor --json | jq '.findings[] | select(.state != "ok")'""",
    "logs": """
streamfs logs
streamfs logs -n 20 --follow""",
}


def with_examples(command: click.Command, name: str) -> click.Command:
    """`command`, whose help ends with examples where it has none yet."""
    if name in EXAMPLES and f"streamfs {name}" not in f"{command.help}{command.epilog}":
        lines = "\n".join(f"    {line}" for line in EXAMPLES[name].strip().splitlines())
        command.epilog = f"{command.epilog or ''}\n\nExamples:\n\n\b\n{lines}\n"
    return command
