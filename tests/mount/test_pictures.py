"""The pictures of the README are made of the real thing, and can be made again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SHOWN = ("films/zoom.mkv", "radio.mp3", "song.wav", "complete", "failed", "persist", "▼", "▲", "█", "▓", "·")


def pixels(picture: Path) -> tuple[tuple[int, int], bytes]:
    """Width and height, and three bytes a pixel."""
    head = picture.read_bytes()[:24]
    size = int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
    argv = ["ffmpeg", "-v", "error", "-i", picture, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    return size, subprocess.run(argv, capture_output=True, check=True, timeout=60).stdout


def test_the_pictures_in_the_docs_can_be_made_again(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "screenshot", tmp_path],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for folder in (tmp_path, ROOT / "docs"):
        drawn = (folder / "top.svg").read_text()
        assert all(text in drawn for text in SHOWN)
        (width, height), rgb = pixels(folder / "player.png")
        assert (width, height) == (1280, 800) and len(rgb) == width * height * 3
        for left, top, right, bottom in ((0, 30, 800, 420), (840, 10, 1200, 100), (0, 480, 1270, 600)):
            rows = (rgb[(y * width + left) * 3 : (y * width + right) * 3] for y in range(top, bottom, 2))
            colours = {row[at : at + 3] for row in rows for at in range(0, len(row), 3)}
            assert len(colours) > 8, f"nothing is shown from {left},{top} to {right},{bottom}"
