"""How a run shows itself: how far it is, signals that end it in good order, and the log beside its result."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from maxact.decode import native_stderr
from maxact.errors import MaxactError
from maxact.files import writing
from maxact.partial import BadImage

log = logging.getLogger("maxact")


class Interrupted(MaxactError):
    """The run was stopped by a signal, after a commit."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


@dataclass(frozen=True)
class Tick:
    """One batch of a shard is through, and whether it was the first: how many of its images there were, the bad ones,
    those left out as grey, and the seconds that the loop waited for it. (Of several decodings, the one with the most
    bad images.)"""

    shard: int
    begins: bool
    images: int
    bad: tuple[BadImage, ...]
    grey: int
    waited: float


@dataclass
class Hand:
    """One of several workers: where it is, what it is at, and the images that have been through it since it began."""

    name: str
    state: str = "starting"
    images: int = 0
    begun: float | None = None

    def tick(self, images: int) -> None:
        """Some more images are through."""
        if self.begun is None:
            self.begun = time.monotonic()  # not earlier: the first batch takes long
        else:
            self.images += images

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.images / max(time.monotonic() - self.begun, 1e-9) if self.begun is not None else 0.0


@dataclass(frozen=True)
class Progress:
    """How far a run is: how much there is in all (0: not known yet), was done when it started, and is done in it;
    bad and grey images among that; the seconds that it has waited for images, and those that it has taken; what it
    does, in what unit; its workers, where it has several."""

    total: int
    before: int
    done: int = 0
    bad: int = 0
    grey: int = 0
    waited: float = 0.0
    seconds: float = 0.0
    stage: str = "scanning"
    unit: str = "images"
    hands: tuple[Hand, ...] = ()


def listing(report: Callable[[Progress], None]) -> Callable[[int], None]:
    """What tells `report` how many images have been found, while nobody knows how many there are."""
    begun = time.monotonic()
    return lambda count: report(Progress(0, 0, count, seconds=time.monotonic() - begun, stage="listing"))


@contextmanager
def signals(stop: threading.Event) -> Iterator[list[int]]:
    """SIGINT and SIGTERM set `stop` and are listed; a second one ends the process at once, as it would have."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def handle(signum: int, frame: FrameType | None) -> None:
        caught.append(signum)
        stop.set()
        for number, previous in before.items():
            signal.signal(number, previous)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


class _LogFile(logging.Handler):
    """Appends messages to a file."""

    def __init__(self, path: Path) -> None:
        super().__init__(logging.INFO)
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW  # a link may lead anywhere
        self.file = open(os.open(path, flags, 0o666), "ab", buffering=0)  # noqa: SIM115 (as long as the handler is)

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # a full disk: the next commit will say so
            self.file.write(f"{self.format(record)}\n".encode(errors="backslashreplace"))


@contextmanager
def log_file(path: Path, native: bool) -> Iterator[None]:
    """Inside, messages go to a file too, and where `native` also what C libraries print to standard error."""
    with writing(path):
        handler = _LogFile(path)
    # without any handler Python prints warnings by itself; this one must not stop that
    added: list[logging.Handler] = [handler]
    if logging.lastResort and not log.hasHandlers():
        added.append(logging.lastResort)
    for each in added:
        log.addHandler(each)
    try:
        with native_stderr(handler.file.fileno()) if native else nullcontext():
            yield
    except BaseException as error:
        handler.handle(log.makeRecord(log.name, logging.ERROR, "", 0, "%s", (str(error) or repr(error),), None))
        raise
    finally:
        for each in added:
            log.removeHandler(each)
        handler.file.close()


def show_bytes(count: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
