"""Workers on this machine: one process for each device, and what goes on in a process of its own.

A process is started as `python -c`, not forked, for neither CUDA nor threads survive that, and not by multiprocessing,
which would run a user's script a second time. What it is to do lies pickled in a file in memory that all of them map.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from maxact.config import RunConfig
from maxact.crew import Crew
from maxact.errors import MaxactError
from maxact.process import Tick
from maxact.run_ray import Actors
from maxact.worker import Done, Gone, I, Message, Order, P, Said, Work, answer, pickled, serve

T = TypeVar("T")
_ENDING = 5.0  # seconds for a process to end after its connection was closed
_CODE = (
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
    """A Python process that runs `function(connection, ...)`, and this end of the connection."""

    ready = True

    def __init__(self, name: str, load: int) -> None:
        self.name = name
        ours, theirs = socket.socketpair()
        with theirs:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
            code = _CODE.format(theirs.fileno(), load)
            command = [sys.executable, "-c", code, json.dumps([path for path in sys.path if isinstance(path, str)])]
            self._process = subprocess.Popen(command, pass_fds=(theirs.fileno(), load), stdin=subprocess.DEVNULL)
        self.connection = Connection(ours.detach())

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    def tell(self, order: Order) -> None:
        """Sends an order."""
        with suppress(OSError):  # gone: its connection says so to whoever listens
            self.connection.send(order)

    def messages(self) -> list[Message]:
        """What it has said. Its end is said here, too."""
        heard: list[Message] = []
        try:
            while self.connection.poll():
                heard.append(self.connection.recv())
        except (EOFError, OSError):
            if not any(isinstance(message, Gone) for message in heard):
                heard.append(Gone(self._fate()))
            self.kill()
        except (pickle.UnpicklingError, AttributeError, ImportError) as error:
            heard.append(Gone(f"it said what nobody understands: {error}"))
        return heard

    def _fate(self) -> str:
        """How it ended."""
        try:
            code = self._process.wait(_ENDING)
        except subprocess.TimeoutExpired:
            return "its connection is closed"
        if code == -signal.SIGKILL:
            return "killed, perhaps for want of memory"
        return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def kill(self) -> None:
        """Ends it at once."""
        self._process.kill()
        self._process.wait()
        self.connection.close()

    def close(self) -> None:
        """Lets it end, which it does where its connection is closed."""
        self.connection.close()
        try:
            self._process.wait(_ENDING)
        except subprocess.TimeoutExpired:
            self.kill()


class Processes:
    """A process at a work for each of some places, each on the device and with the threads of its `run`."""

    def __init__(self, work: Work[Any, Any], runs: Sequence[RunConfig]) -> None:
        names = [run.devices for run in runs]
        self.places = [
            f"{name}#{names[:i].count(name)}" if names.count(name) > 1 else name for i, name in enumerate(names)
        ]
        self._work, self._runs = work, runs
        self._processes: list[_Process] = []

    def __enter__(self) -> Processes:
        self._load = _in_memory(partial(serve, self._work))
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.connection.close()
        for process in self._processes:
            process.close()
        os.close(self._load)

    def hire(self, place: int) -> _Process:
        """Starts a process at a place."""
        self._processes = [process for process in self._processes if not process.connection.closed]
        process = _Process(self.places[place], self._load)
        process.connection.send(self._runs[place])
        self._processes.append(process)
        return process

    def wait(self, seconds: float) -> list[tuple[_Process, Message]]:
        """What they have said."""
        there = {process.connection: process for process in self._processes if not process.connection.closed}
        ready = wait(list(there), seconds)
        return [(there[each], message) for each in ready for message in there[each].messages()]  # type: ignore[index]


def call(name: str, function: Callable[..., T], *arguments: Any) -> T:
    """What a function gives in a process of its own, which ends with it: memory of a device, too, is free then.

    `name` is whose lines its log's are. Raises the MaxactError that it raises, and MaxactError where it dies.
    """
    load = _in_memory(partial(answer, function, arguments))
    process = _Process(name, load)
    try:
        while True:
            wait([process.connection])
            for message in process.messages():
                match message:
                    case Said(level, text):
                        log.log(level, "%s", text)
                    case Done(error) if error is not None:
                        raise error
                    case Gone(reason):
                        raise MaxactError(f"{name}: the process that was to try it died ({reason})")
                    case _:
                        return message  # type: ignore[return-value]
    finally:
        process.close()
        os.close(load)


def _in_memory(function: Callable[[Connection], None]) -> int:
    """A file in memory that holds a pickled function. Raises UsageError for what cannot be pickled."""
    data = pickled(function)
    load = os.memfd_create("maxact")
    with open(load, "wb", closefd=False) as file:
        file.write(data)
    return load
