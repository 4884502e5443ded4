"""Workers on this machine: one process for each device, and what goes on in a process of its own.

A process is started as `python -c`, not forked, for neither CUDA nor threads survive that, and not by multiprocessing,
which would run a user's script a second time. What it is to do lies pickled in a file in memory that all of them map.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from maxact.config import RunConfig
from maxact.crew import Crew
from maxact.errors import MaxactError
from maxact.process import Tick
from maxact.run_ray import Actors
from maxact.wire import Wire
from maxact.worker import Done, Given, Gone, I, Message, P, Said, Work, answer, describe, pickled, serve

T = TypeVar("T")
_ENDING = 5.0  # seconds for a process to end after its connection was closed
_LOOK = 0.5  # seconds
_CODE = (  # signals are sent to a whole group of processes: the driver says what to do
    "import signal; [signal.signal(each, signal.SIG_IGN) for each in (signal.SIGINT, signal.SIGTERM)]; "
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from maxact import environment; environment.prepare(); "
    "from maxact import worker; worker.main({}, {})"
)

log = logging.getLogger("maxact")


@contextmanager
def attempts(
    work: Work[I, P], run: RunConfig, stop: threading.Event, report: Callable[[Tick], None]
) -> Iterator[tuple[Callable[[Iterator[I]], Iterator[P]], Crew[I, P] | None]]:
    """What does a work on the devices of `run`: takes items and gives what they gave, as often as it is called.

    A single CPU is this very process; anything else has one process for each device, which are the Crew. On a cluster
    these are actors.
    """
    if run.alone:
        yield lambda items: work.on(run).run(items, stop, report), None
        return
    hirer = Processes(work, run.each()) if run.cluster is None else Actors(work, run)
    with hirer:
        crew = Crew[I, P](hirer, stop=stop, report=report, stall=run.stall)
        yield crew.run, crew


class _Process:
    """A Python process that runs a function of a wire. What it says goes into an inbox, and in the end None."""

    ready = True

    def __init__(self, name: str, load: int, inbox: SimpleQueue[tuple[_Process, Message | None]]) -> None:
        self.name = name
        self.taken = threading.Event()  # the last part that it handed over: the next one may be read
        ours, theirs = socket.socketpair()
        with theirs:
            code = _CODE.format(theirs.fileno(), load)
            command = [sys.executable, "-c", code, json.dumps([path for path in sys.path if isinstance(path, str)])]
            self._process = subprocess.Popen(command, pass_fds=(theirs.fileno(), load), stdin=subprocess.DEVNULL)
        self._wire = Wire(ours)
        self._listener = threading.Thread(target=self._listen, args=(inbox,), daemon=True)
        self._listener.start()

    def _listen(self, inbox: SimpleQueue[tuple[_Process, Message | None]]) -> None:
        """On a thread of its own: a process may stop in the middle of a message, and the others must go on."""
        try:
            while True:
                message = self._wire.receive()
                self.taken.clear()
                inbox.put((self, message))
                if isinstance(message, Given):
                    self.taken.wait()
        except (EOFError, OSError):
            inbox.put((self, None))
        except Exception as error:  # whatever unpickling may raise
            inbox.put((self, Gone(f"it said what nobody understands: {describe(error)}")))

    def tell(self, order: object) -> None:
        """Sends an order."""
        with suppress(OSError):  # gone: its end is said to whoever listens
            self._wire.send(order)

    def fate(self) -> str:
        """How it ended."""
        try:
            code = self._process.wait(_ENDING)
        except subprocess.TimeoutExpired:
            return "its connection is closed"
        if code == -signal.SIGKILL:
            return "killed, perhaps for want of memory"
        return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def hang_up(self) -> None:
        """It ends where its connection does."""
        with suppress(OSError):  # it was the first
            self._wire.hang_up()
        self.taken.set()

    def kill(self) -> None:
        """Ends it at once. One that the system does not let go ends when it does."""
        self.hang_up()
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_ENDING)

    def close(self) -> None:
        """Lets it end."""
        self.hang_up()
        try:
            self._process.wait(_ENDING)
        except subprocess.TimeoutExpired:
            self.kill()
        self._listener.join(_ENDING)
        self._wire.close()


class Processes:
    """A process at a work for each of some places, each on the device and with the threads of its `run`."""

    def __init__(self, work: Work[Any, Any], runs: Sequence[RunConfig]) -> None:
        names = [run.devices for run in runs]
        self.places = [
            f"{name}#{names[:i].count(name)}" if names.count(name) > 1 else name for i, name in enumerate(names)
        ]
        self._work, self._runs = work, runs
        self._inbox: SimpleQueue[tuple[_Process, Message | None]] = SimpleQueue()
        self._processes: list[_Process] = []
        self._heard: list[_Process] = []

    def __enter__(self) -> Processes:
        self._load = _in_memory(partial(serve, self._work))
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.hang_up()
        for process in self._processes:
            process.close()
        os.close(self._load)

    def hire(self, place: int) -> _Process:
        """Starts a process at a place."""
        process = _Process(self.places[place], self._load, self._inbox)
        process.tell(self._runs[place])
        self._processes.append(process)
        return process

    def wait(self, seconds: float) -> list[tuple[_Process, Message]]:
        """What they have said."""
        for process in self._heard:  # not earlier: by now what they said is dealt with
            process.taken.set()
        found = _drain(self._inbox, seconds)
        self._heard = [process for process, _ in found]
        return [(process, Gone(process.fate()) if message is None else message) for process, message in found]


def _drain(
    inbox: SimpleQueue[tuple[_Process, Message | None]], seconds: float
) -> list[tuple[_Process, Message | None]]:
    """All that is in an inbox; waits so long for the first."""
    found = []
    with suppress(Empty):
        found.append(inbox.get(timeout=seconds))
        while True:
            found.append(inbox.get_nowait())
    return found


def call(name: str, seconds: float, function: Callable[..., T], *arguments: Any) -> T:
    """What a function gives in a process of its own, which ends with it: memory of a device, too, is free then.

    `name` is where it runs, for people. Raises the MaxactError that it raises, and MaxactError where it dies, or is
    silent for so many seconds.
    """
    load = _in_memory(partial(answer, function, arguments))
    inbox: SimpleQueue[tuple[_Process, Message | None]] = SimpleQueue()
    process = _Process(name, load, inbox)
    try:
        silent = 0.0  # seconds in which this process has listened
        while True:
            try:
                _, message = inbox.get(timeout=_LOOK)
            except Empty:
                silent += _LOOK
                if silent > seconds:
                    words = f"no answer for {seconds:.0f} s (--stall says how long it may take)"
                    raise MaxactError(f"{name}: {words}") from None
                continue
            silent = 0.0
            match message:
                case Said(level, text):
                    log.log(level, "%s", text)
                case Done(error) if error is not None:
                    raise error
                case Gone(reason):
                    raise MaxactError(f"{name}: the process that was to try it died ({reason})")
                case None:
                    raise MaxactError(f"{name}: the process that was to try it died ({process.fate()})")
                case _:
                    return message  # type: ignore[return-value]
    finally:
        process.close()
        os.close(load)


def _in_memory(function: Callable[[Wire], None]) -> int:
    """A file in memory that holds a pickled function. Raises UsageError for what cannot be pickled."""
    data = pickled(function)
    load = os.memfd_create("maxact")
    with open(load, "wb", closefd=False) as file:
        file.write(data)
    return load
