"""A fork server that kills the engine: at any call that changes the disk, or at any moment.

    python -m tests.crash.killer --folder DIR --count 1000 --seed 1

Prints one JSON object: how many were killed, where, and what was found wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from streamfs.engine import recording
from streamfs.engine.recording import DIRECT
from tests.crash.life import Claims, Life, check

CALLS = ("open", "write", "pwrite", "pwritev", "fsync", "ftruncate", "unlink", "posix_fallocate")
MOST_CALLS = 60  # a life is killed at one of so many calls
LONGEST = 0.01  # seconds, for kills by the clock
ROUNDS = 4  # kills and restarts over one folder


def patch(around: Callable[..., Any]) -> None:
    """Pass every call that changes the disk to `around(name, real, arguments)`, in this process, for good."""

    def passing(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **named: around(name, lambda *a: real(*a, **named), arguments)

    for name in CALLS:
        setattr(os, name, passing(name, getattr(os, name)))
    recording._punch_hole = passing("punch", recording._punch_hole)


class Fault:
    """SIGKILL at the `at`th call: before it, after it, or in the middle of what it writes."""

    def __init__(self, at: int, when: str, seed: int, report: int) -> None:
        self._left, self._when, self._random, self._report = at, when, random.Random(seed), report
        self._write = os.write

    def __call__(self, name: str, real: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if arguments and arguments[0] == self._report:
            return real(*arguments)
        self._left -= 1
        if self._left:
            return real(*arguments)
        if self._when == "torn" and name in ("write", "pwrite"):
            fd, data, *rest = arguments
            real(fd, memoryview(data)[: self._random.randrange(len(data))], *rest)
        elif self._when == "torn" and name == "pwritev":
            fd, views, offset = arguments
            whole = self._random.randrange(len(views[0]) // DIRECT) * DIRECT
            real(fd, [views[0][:whole]], offset)
        elif self._when == "after":
            with contextlib.suppress(OSError):  # a name that was not there to be unlinked
                real(*arguments)
        self._write(self._report, json.dumps([name]).encode() + b"\n")
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("a killed process goes on")


def child(folder: Path, seed: int, generation: int, fault: tuple[int, str] | None, report: int) -> None:
    write = os.write

    def tell(words: list[int]) -> None:
        write(report, json.dumps(words).encode() + b"\n")

    if fault is not None:
        patch(Fault(*fault, seed, report))
    life = Life(folder, seed, tell, generation)
    while True:
        life.go_on()


def kill_one(folder: Path, seed: int, claims: Claims, chance: random.Random) -> str:
    """One life to its end; gives where it ended. Raises RuntimeError where it ended by itself."""
    fault = (
        None if chance.random() < 0.2 else (chance.randint(1, MOST_CALLS), chance.choice(["before", "after", "torn"]))
    )
    reading, report = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reading)
            child(folder, seed, claims.generation, fault, report)
        except BaseException as error:
            os.write(report, json.dumps(repr(error)).encode() + b"\n")
        finally:
            os._exit(1)
    os.close(report)
    if fault is None:
        time.sleep(chance.random() * LONGEST)
        os.kill(pid, signal.SIGKILL)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(pid, 0)
    where = "moment"
    for line in said.splitlines():
        words = json.loads(line)
        if isinstance(words, str):
            raise RuntimeError(words)
        if isinstance(words[0], str):
            where = words[0]
        else:
            claims.hear(words)
    if not os.WIFSIGNALED(status):
        raise RuntimeError(f"it ended by itself: {status}")
    return where


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    asked = parser.parse_args()
    fired: Counter[str] = Counter()
    wrong: list[str] = []
    chance = random.Random(asked.seed)
    number = 0
    gc.collect()
    gc.freeze()  # or each child would copy every page of what was imported as its collector passes
    while fired.total() < asked.count and len(wrong) < 5:
        folder = asked.folder / "cache"
        folder.mkdir(mode=0o700)
        claims = Claims()
        for _ in range(ROUNDS):
            number += 1
            try:
                fired[kill_one(folder, asked.seed * 1_000_000 + number, claims, chance)] += 1
                check(folder, claims, power_cut=False)
            except (AssertionError, RuntimeError) as error:
                wrong.append(f"seed {asked.seed}, life {number}: {error}")
                break
        shutil.rmtree(folder)
    print(json.dumps({"fired": dict(fired), "wrong": wrong}))


if __name__ == "__main__":
    main()
