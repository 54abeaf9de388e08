"""scripts/soak for a short while; STREAMFS_SOAK=N runs it for N minutes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = int(os.environ.get("STREAMFS_SOAK", "1"))
MINUTES = float(SOAK) if SOAK > 1 else 1 / 3
ROOT = Path(__file__).parents[2]


@pytest.mark.soak
@pytest.mark.timeout(MINUTES * 60 + 240)
def test_no_wrong_byte_no_hang_and_nothing_left() -> None:
    command = [sys.executable, ROOT / "scripts" / "soak", "--minutes", str(MINUTES)]
    if SOAK <= 1:
        command += ["--readers", "48", "--streams", "24"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=MINUTES * 60 + 200, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    figures = json.loads(done.stdout)
    assert figures["MiB read"] > 0
    for event in ("kills", "evictions", "versions", "renames"):
        assert figures["events"].get(event), f"the soak did nothing of this kind: {event}"
