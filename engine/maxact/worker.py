"""A worker: items come in, what they gave goes out. The same in a process of this machine and in one of a cluster.

An item is a shard of the first pass or a block of the second. The driver (`crew.Crew`) and its workers exchange a few
kinds of messages, of which every one is here. A worker asks for its next item when it has room for one, so a fast
one gets more of them; it merges what it has for some seconds before it hands it over, so that the driver is not
drowned in results.
"""

from __future__ import annotations

import logging
import mmap
import os
import pickle
import socket
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Generic, Protocol, Self, TypeVar

import cloudpickle
import torch

from maxact import fetch
from maxact.config import RunConfig
from maxact.errors import MaxactError, UsageError
from maxact.process import Tick
from maxact.wire import Wire

_PULSE = 5.0  # seconds

log = logging.getLogger("maxact")


class Item(Protocol):
    """What a worker takes at a time."""

    @property
    def index(self) -> int:
        """Its number, which no other item has."""


class Part(Protocol):
    """What some items gave."""

    @property
    def touched(self) -> Collection[int]:
        """The numbers of these items."""


I = TypeVar("I", bound=Item)  # noqa: E741
P = TypeVar("P", bound=Part)
I_contra = TypeVar("I_contra", bound=Item, contravariant=True)


class Work(Protocol[I_contra, P]):
    """All that a worker needs for any item of a pass. It travels to the workers pickled."""

    @property
    def patience(self) -> float:
        """Seconds for which a worker merges what it has before it hands it over; 0 where it does not."""

    def on(self, run: RunConfig) -> Self:
        """The same for one worker, whose device and threads `run` says."""

    def run(self, items: Iterator[I_contra], stop: threading.Event, report: Callable[[Tick], None]) -> Iterator[P]:
        """What each item gives. `report` is called at least every few seconds, and shows that the worker lives."""

    @property
    def merge(self) -> Callable[[P, P], P] | None:
        """What makes one result of two; None where nobody asks for it, since `patience` is 0."""

    def look(self) -> None:
        """Raises MaxactError where what it reads cannot be read from this machine."""


# what a worker says


@dataclass(frozen=True)
class Want:
    """Another item, please: answered by one, or by None."""


@dataclass(frozen=True)
class Given(Generic[P]):
    """What some items gave."""

    part: P


@dataclass(frozen=True)
class Done:
    """All that was taken has been handed over, but for what `error` prevented; the worker waits to begin again."""

    error: MaxactError | None = None


@dataclass(frozen=True)
class Said:
    """A line for the log."""

    level: int
    text: str


@dataclass(frozen=True)
class Gone:
    """The worker is no more, and why."""

    reason: str


Message = Tick | Want | Given[Any] | Done | Said | Gone


# what it is told


@dataclass(frozen=True)
class Begin:
    """Ask for items, until there are none."""


@dataclass(frozen=True)
class Give(Generic[I]):
    """An item; None where there is none (any more)."""

    item: I | None


@dataclass(frozen=True)
class Stop:
    """Hand over what is finished, and drop the rest."""


Order = Begin | Give[Any] | Stop


class Worker(Generic[I, P]):
    """Does a work for a driver: `tell` takes the driver's orders, from any thread; `send` takes messages to it.

    While the driver `is_free` not to take another result, the worker goes on merging: a driver that is drowned in them
    gets fewer and larger ones.
    """

    def __init__(
        self, work: Work[I, P], send: Callable[[Message], None], is_free: Callable[[], bool] = lambda: True
    ) -> None:
        self._work, self._send, self._is_free = work, send, is_free
        self._begins: SimpleQueue[None] = SimpleQueue()
        self._items: SimpleQueue[I | None] = SimpleQueue()
        self._stop = threading.Event()

    def tell(self, order: Order) -> None:
        """Takes an order."""
        match order:
            case Begin():
                self._begins.put(None)
            case Give(item):
                self._items.put(item)
            case Stop():
                self._stop.set()

    def serve(self) -> None:
        """Works for ever. Leaves by an exception that is no MaxactError: then it has to be replaced."""
        threading.Thread(target=self._tell_of_reading, daemon=True).start()
        while True:
            self._begins.get()
            self._attempt()

    def _tell_of_reading(self) -> None:
        """Says that it lives while storage that has gone is asked again and again: that takes minutes a batch."""
        before = 0
        while True:
            time.sleep(_PULSE)
            if (now := fetch.asked_again()) != before:
                self._send(Said(logging.DEBUG, f"{now} reads have failed and were tried again"))
                before = now

    def _attempt(self) -> None:
        held: P | None = None
        error = None
        begun = time.monotonic()
        patience, merge = self._work.patience, self._work.merge
        at_once = not patience or merge is None
        try:
            for part in self._work.run(self._wanted(), self._stop, self._send):
                held = merge(held, part) if held is not None and merge else part
                if at_once or (time.monotonic() - begun >= patience and self._is_free()):
                    self._send(Given(held))
                    held, begun = None, time.monotonic()
        except MaxactError as failure:
            error = failure
        if held is not None:
            self._send(Given(held))
        self._send(Done(error))

    def _wanted(self) -> Iterator[I]:
        while True:
            self._send(Want())
            item = self._items.get()
            if item is None:
                return
            yield item


class Telling(logging.Handler):
    """Sends the log's lines to the driver."""

    def __init__(self, send: Callable[[Message], None]) -> None:
        super().__init__(logging.INFO)
        self._tell = send

    def emit(self, record: logging.LogRecord) -> None:
        self._tell(Said(record.levelno, record.getMessage()))


def describe(error: BaseException) -> str:
    """An error that nobody expected, and where it came from, in a line."""
    place = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" ({os.path.basename(place[0].filename)}, line {place[0].lineno})" if place else ""
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}{where}"


def pickled(what: object) -> bytes:
    """What a worker is to have. Raises UsageError for what cannot be pickled."""
    try:
        with torch.inference_mode():
            return cloudpickle.dumps(what)  # type: ignore[no-any-return]
    except (pickle.PicklingError, TypeError, AttributeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise UsageError(
            f"devices: what is to be scanned cannot be sent to other processes ({' '.join(str(error).split())}); "
            "leave out what cannot be pickled (open files: open them when they are first used), or run it on "
            'devices="cpu", which needs no other process'
        ) from error


class _Outbox:
    """Sends messages on a thread of its own, in their order: large ones take time, and the worker goes on."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._waiting: SimpleQueue[Message | None] = SimpleQueue()
        self._free = threading.Event()  # no part is on its way
        self._free.set()
        self._thread = threading.Thread(target=self._post, daemon=True)
        self._thread.start()

    def send(self, message: Message) -> None:
        """Sends it, some time."""
        if isinstance(message, Given):
            self._free.clear()
        self._waiting.put(message)

    def is_free(self) -> bool:
        """Whether a part that was sent has gone."""
        return self._free.is_set()

    def flush(self) -> None:
        """Waits until everything has gone."""
        self._waiting.put(None)
        self._thread.join()

    def _post(self) -> None:
        with suppress(OSError):  # the driver has ended: `serve` hears that
            while (message := self._waiting.get()) is not None:
                self._wire.send(message)
                if isinstance(message, Given):
                    self._free.set()


def serve(work: Work[Any, Any], wire: Wire) -> None:
    """Works in this process until the driver at the other end ends, or something unexpected happens.

    The first that comes from there is how this worker is to run: a RunConfig.
    """
    outbox = _Outbox(wire)

    def listen() -> None:
        try:
            while True:
                worker.tell(wire.receive())
        except (EOFError, OSError):
            os._exit(1)  # whatever the worker is at: nobody waits for it any more

    log.setLevel(logging.INFO)
    log.addHandler(Telling(outbox.send))
    try:
        worker = Worker(work.on(wire.receive()), outbox.send, outbox.is_free)
        threading.Thread(target=listen, daemon=True).start()
        worker.serve()
    except EOFError:
        os._exit(1)
    except MaxactError as error:  # its device, which was there when the driver looked
        outbox.send(Gone(str(error)))
    except Exception as error:
        traceback.print_exc()
        outbox.send(Gone(describe(error)))
    outbox.flush()
    os._exit(1)


def answer(function: Callable[..., Any], arguments: tuple[Any, ...], wire: Wire) -> None:
    """Sends what a function gives, or the MaxactError that it raises, and ends this process; earlier where the driver
    ends."""

    def listen() -> None:
        with suppress(EOFError, OSError):
            wire.receive()
        os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    log.setLevel(logging.INFO)
    log.addHandler(Telling(wire.send))
    try:
        wire.send(function(*arguments))
    except MaxactError as error:
        wire.send(Done(error))
    except Exception as error:
        traceback.print_exc()
        wire.send(Gone(describe(error)))
    os._exit(0)


def main(end: int, load: int) -> None:
    """A worker process: file descriptors of the socket to the driver, and of the pickled function of its wire."""
    wire = Wire(socket.socket(fileno=end))
    try:
        with mmap.mmap(load, 0, access=mmap.ACCESS_READ) as packed:
            function = pickle.loads(packed)
    except Exception as error:  # a class whose module this process does not find, say
        wire.send(Gone(describe(error)))
        os._exit(1)
    os.close(load)
    function(wire)
