"""Work for a crew's workers that has no network in it: squares of numbers, with every misfortune in its place.

What happened before is told by files in a folder, for the processes that it happens to do not live long.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from maxact.config import RunConfig
from maxact.errors import MaxactError, OutOfMemory, UsageError
from maxact.fetch import Unreadable
from maxact.process import Tick


@dataclass(frozen=True)
class Piece:
    index: int

    def __str__(self) -> str:
        return f"piece {self.index}"


@dataclass(frozen=True)
class Squares:
    """The squares of some numbers, and the processes that they come from."""

    squares: Mapping[int, int]
    workers: Mapping[int, int]

    @property
    def touched(self) -> frozenset[int]:
        return frozenset(self.squares)


@dataclass(frozen=True)
class Toil:
    """Squares numbers. `fates` says what befalls a piece, and how many times it does: killed, raises, silent, unread,
    memory; `slow` is how many seconds each device takes for a piece."""

    folder: Path
    fates: Mapping[int, tuple[str, int]] = field(default_factory=dict)
    slow: Mapping[str, float] = field(default_factory=dict)
    patience: float = 0.0
    device: str = ""

    def on(self, run: RunConfig) -> Toil:
        (self.folder / f"pid-{os.getpid()}").touch()
        if 0 in self.fates and self.fates[0][0] == "stillborn":
            raise ValueError("no such device")
        if 0 in self.fates and self.fates[0][0] == "gone":
            try:
                (self.folder / "the only one").touch(exist_ok=False)
            except FileExistsError:
                raise UsageError("devices: there is no second one here") from None
        return replace(self, device=run.devices)

    def run(self, items: Iterator[Piece], stop: threading.Event, report: object) -> Iterator[Squares]:
        unread = None
        for item in items:
            time.sleep(self.slow.get(self.device, 0.0))
            if stop.is_set():
                return
            report(Tick(item.index, True, 1, (), 0, 0.0))  # type: ignore[operator]
            fate, times = self.fates.get(item.index, ("", 0))
            met = len(list(self.folder.glob(f"met-{item.index}-*")))
            if met < times:
                (self.folder / f"met-{item.index}-{met}").touch()
                match fate:
                    case "killed":
                        os.kill(os.getpid(), signal.SIGKILL)
                    case "raises":
                        raise ZeroDivisionError("a mistake")
                    case "silent":
                        time.sleep(3600)
                    case "unread":
                        unread = Unreadable(f"{item} cannot be read")
                        break
                    case "memory":
                        raise OutOfMemory("out of memory with batches of 4")
            yield Squares({item.index: item.index**2}, {item.index: os.getpid()})
        if unread:
            raise unread

    def merge(self, mine: Squares, theirs: Squares) -> Squares:
        return Squares({**mine.squares, **theirs.squares}, {**mine.workers, **theirs.workers})

    def look(self) -> None:
        if 0 in self.fates and self.fates[0][0] == "blind":
            raise MaxactError("the images cannot be read there (a.jpg: No such file or directory)")


def power(base: int, exponent: int) -> int:
    return base**exponent


def unreadable() -> None:
    raise Unreadable("the disk is gone")


def asleep(folder: Path) -> None:
    (folder / f"pid-{os.getpid()}").touch()
    time.sleep(3600)


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def assert_whole(given: Sequence[Squares], count: int) -> None:
    """Every piece was given, and given once."""
    squares = [pair for each in given for pair in each.squares.items()]
    assert sorted(squares) == [(number, number**2) for number in range(count)]


def workers(folder: Path) -> list[int]:
    """The processes that have worked."""
    return [int(path.name.removeprefix("pid-")) for path in folder.glob("pid-*")]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
