"""What is built can be installed, and what is installed works."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_wheel_made_from_the_source_archive_works_in_a_new_environment() -> None:
    done = subprocess.run(
        [ROOT / "scripts" / "install-check", "--here"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        env={key: value for key, value in os.environ.items() if not key.startswith("STREAMFS_")}
        | {"PYTHON": sys.executable},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "install-check: ok"


def test_every_library_that_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [
        *project["dependencies"],
        *(name for extra in ("tui", "web") for name in project["optional-dependencies"].get(extra, [])),
    ]
    declared = {re.split(r"[><=;\[ ]", line)[0].lower() for line in required}
    by_module = importlib.metadata.packages_distributions()
    for path in (ROOT / "streamfs").rglob("*.py"):
        for module in re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), flags=re.MULTILINE):
            owners = {name.lower() for name in by_module.get(module, [])} - {"streamfs"}
            if module not in sys.stdlib_module_names and owners:
                assert owners & declared, f"{path.name} imports {module} of {owners}"


@pytest.mark.parametrize("block", ["install", "first-mount", "helper"])
def test_the_steps_that_are_tried_in_chroots_are_in_the_page(block: str) -> None:
    page = (ROOT / "docs" / "installing.md").read_text()
    assert page.count(f"```sh {block}\n") == 1
    assert f"block {block})" in (ROOT / "scripts" / "chroot-check").read_text()


def test_the_packages_of_the_page_are_those_that_setup_installs() -> None:
    page = (ROOT / "docs" / "installing.md").read_text()
    named = set(re.findall(r"apt-get install -y --no-install-recommends (.*)", page)[0].split())
    setup = (ROOT / "scripts" / "setup").read_text().split("base_packages()")[1].split("}")[0]
    needed = set(re.findall(r"need (\S+)", setup)) - {"ca-certificates"}
    assert needed | {"pipx", "python3-dev"} == named
