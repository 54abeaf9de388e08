"""What the package offers to a program that imports it."""

from __future__ import annotations

import subprocess
import sys

import streamfs


def test_the_library_names_are_there() -> None:
    assert " ".join(streamfs.__all__) == (
        "Board Bunzip2 Digest Gunzip Icy StreamBuffer StreamHandle StreamfsError Transform Unxz Unzstd"
        " __version__ transformed"
    )
    for name in streamfs.__all__:
        assert getattr(streamfs, name) is not None
    assert set(streamfs.__all__) <= set(dir(streamfs))


def test_the_library_needs_neither_fuse_nor_the_command_line_nor_a_network() -> None:
    heavy = "{'pyfuse3', 'click', 'rich', 'pycurl', 'h11', 'sqlite3'}"
    code = f"import sys; from streamfs import StreamBuffer, transformed; print({heavy} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "set()"


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, streamfs; print({'trio', 'pyfuse3', 'pycurl', 'click'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "set()"
