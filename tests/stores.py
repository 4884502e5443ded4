"""Whole runs for tests: stores of a tiny network, all that is in them, and runs in processes that can be killed.

Processes are forked from a server that has imported everything (warm.py), so that each takes a fraction of a second.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

import maxact
from maxact import cli, progress, schedule

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["warm"])

# 21 photographs are 6 shards of two batches each, and the last one of one image
ARGUMENTS = ("--top", "5", "--batch", "2", "--shard", "4", "--threads", "1", "--decode-threads", "1", "--readers", "4")
SETTINGS: dict[str, Any] = {
    "top": 5,
    "batch": 2,
    "shard": 4,
    "threads": 1,
    "decode_threads": 1,
    "readers": 4,
}


def scan(images: object, store: Path, network: Any = "tiny:network", **settings: Any) -> maxact.Store:
    """A scan of the tiny network, in this process."""
    return maxact.scan(network, images, store, **(SETTINGS | settings))


def interrupted(images: object, store: Path, count: int = 13, **settings: Any) -> None:
    """A scan that breaks off after so many images."""

    def stop(progress: maxact.Progress) -> None:
        if progress.done >= count:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan(images, store, report=stop, **settings)


def contents(store: Path) -> dict[str, Any]:
    """Every file of a finished store by its path: bytes, or the value of JSON. Without `run/`."""
    found = {}
    for path in store.rglob("*"):
        name = str(path.relative_to(store))
        if path.is_file() and not name.startswith("run/"):
            found[name] = json.loads(path.read_text()) if path.suffix == ".json" else path.read_bytes()
    return found


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class Child:
    """A process of its own that runs a function, whose result is its exit code; what it prints goes to files, its
    standard error to a terminal where one is given."""

    def __init__(self, function: Callable[[], object], terminal: Path | None = None) -> None:
        _start_server()
        self._folder = tempfile.TemporaryDirectory()
        self._streams = [Path(self._folder.name) / name for name in ("out", "err")]
        self.process = _context.Process(target=_child, args=(function, self._streams[0], terminal or self._streams[1]))
        self.process.start()

    def wait(self, seconds: float = 120) -> int:
        """The exit code, -9 after SIGKILL."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, "the child hangs"
        self.out, self.err = (stream.read_text() if stream.exists() else "" for stream in self._streams)
        code = self.process.exitcode
        self.process.close()
        self._folder.cleanup()
        return code

    def so_far(self) -> str:
        """What it has printed to standard error."""
        return self._streams[1].read_text() if self._streams[1].exists() else ""

    def kill(self, signum: int = signal.SIGKILL) -> None:
        if self.process.exitcode is None:
            assert self.process.pid is not None
            os.kill(self.process.pid, signum)


def command(
    *arguments: object, seconds: float = 0.0, dies_at: int | None = None, terminal: Path | None = None
) -> Child:
    """A command line in a process of its own, with `seconds` between two commits, and a line for every batch; it may
    kill itself at some call."""
    words = [os.fspath(argument) if isinstance(argument, Path) else str(argument) for argument in arguments]
    return Child(partial(_command, words, seconds, dies_at), terminal)


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> None:
    """Waits until something has happened."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


def die_at(number: int) -> Callable[[], int]:
    """Kills this process at the `number`-th call, from 1, that renames, syncs or deletes a file; gives a count."""
    count, lock = 0, threading.Lock()

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            with lock:  # files are synced on many threads
                count += 1
                here = count
            if here == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return instead

    for name in ("replace", "fsync", "unlink"):
        setattr(os, name, watched(getattr(os, name)))
    return lambda: count


@cache
def _start_server() -> None:
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)  # or the server does not find warm.py
        forkserver.ensure_running()


def _command(arguments: Sequence[str], seconds: float, dies_at: int | None) -> int:
    schedule.COMMIT_SECONDS = seconds
    progress.LINE_SECONDS = 0.0
    if dies_at is not None:
        die_at(dies_at)
    return cli.main(arguments)


def _child(function: Callable[[], object], *streams: Path) -> None:
    for number, stream in enumerate(streams, 1):
        os.dup2(os.open(stream, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_NOCTTY), number)
    for number, name in enumerate(("stdout", "stderr"), 1):  # as Python itself opens them
        errors = "strict" if name == "stdout" else "backslashreplace"
        stream = open(number, "w", buffering=1, closefd=False, errors=errors)  # noqa: SIM115
        setattr(sys, name, stream)
    result = function()
    sys.exit(result if isinstance(result, int) else 0)
