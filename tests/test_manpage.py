"""The man page is what the commands' help says now, and troff takes it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from streamfs.cli.app import cli

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "streamfs.1"


def test_the_page_is_up_to_date() -> None:
    made = subprocess.run(
        [sys.executable, ROOT / "scripts" / "manpage"], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert PAGE.read_text() == made, "run .venv/bin/python scripts/manpage > docs/streamfs.1"


def test_troff_has_nothing_to_say_about_it() -> None:
    done = subprocess.run(["groff", "-man", "-ww", "-z", PAGE], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_command_and_option_is_in_it() -> None:
    shown = subprocess.run(
        ["groff", "-man", "-Tascii", "-P-cbou", PAGE], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    words = set(shown.replace(",", " ").replace("[", " ").split())
    for name, command in cli.commands.items():
        assert f"streamfs {name}" in " ".join(shown.split())
        for parameter in command.params:
            assert not any(option.startswith("--") and option not in words for option in parameter.opts), parameter.opts
