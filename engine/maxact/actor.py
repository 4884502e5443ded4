"""A worker in a process of a Ray cluster. What takes memory is imported when the process has become one.

Ray keeps some processes ready, in which nothing is loaded yet: so this imports next to nothing by itself.
"""

from __future__ import annotations

import logging
import pickle
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from maxact.environment import prepare
from maxact.errors import MaxactError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from maxact.config import RunConfig
    from maxact.worker import Message, Order

_PACE = 0.5  # seconds for which ticks wait for company


@dataclass(frozen=True)
class Where:
    """What an actor says of itself: its host's name, the node of the cluster, and the versions of what it has."""

    host: str
    node: str
    versions: dict[str, str]


class Actor:
    """A `worker.Worker` on a thread of its own, with an outbox from which the driver takes what it says."""

    def __init__(self) -> None:
        prepare()
        self._outbox: SimpleQueue[Message] = SimpleQueue()
        self._free = threading.Event()  # nothing in the outbox but words
        self._free.set()
        self._begun = threading.Event()

    def hello(self) -> Where:
        """Called first: answered when there is room for the actor."""
        import ray
        import torch

        from maxact.provenance import versions

        node = ray.get_runtime_context().get_node_id()
        return Where(socket.gethostname(), node, versions(torch.device("cpu")))

    def begin(self, load: NDArray[np.uint8], run: RunConfig, paths: list[str], name: str, first: bool) -> None:
        """Takes the work, pickled: once, before anything else. What goes wrong is said: it ends the run where nothing
        has been done yet (`first`), and later this worker."""
        from maxact.worker import Done, Gone, Telling, Work, Worker, describe

        sys.path += [path for path in paths if path not in sys.path]
        log = logging.getLogger("maxact")
        log.setLevel(logging.INFO)
        log.addHandler(Telling(self._send))
        try:
            work: Work[Any, Any] = pickle.loads(load.data)
            work.look()
            self._worker = Worker(work.on(run), self._send, self._free.is_set)
        except MaxactError as error:
            self._send(Done(MaxactError(f"{name}: {error}")) if first else Gone(str(error)))
        except Exception as error:
            self._send(Gone(describe(error)))
        else:
            threading.Thread(target=self._serve, daemon=True).start()
            self._begun.set()

    def tell(self, order: Order) -> None:
        """Takes an order."""
        self._begun.wait()
        self._worker.tell(order)

    def listen(self) -> tuple[bytes, list[pickle.PickleBuffer]]:
        """What the worker has said since: waits for it. Pickled, for what Ray gives lies in its store, and stays there
        as long as any array of it lives."""
        from maxact.process import Tick
        from maxact.worker import Given

        said, until = [self._outbox.get()], time.monotonic() + _PACE
        with suppress(Empty):
            while True:
                if not isinstance(said[-1], Tick):
                    until = 0.0  # it waits for an answer
                said.append(self._outbox.get(timeout=max(0.0, until - time.monotonic())))
        if any(isinstance(message, Given) for message in said):
            self._free.set()
        buffers: list[pickle.PickleBuffer] = []
        return pickle.dumps(said, protocol=5, buffer_callback=buffers.append), buffers

    def _send(self, message: Message) -> None:
        from maxact.worker import Given

        if isinstance(message, Given):
            self._free.clear()
        self._outbox.put(message)

    def _serve(self) -> None:
        from maxact.worker import Gone, describe

        try:
            self._worker.serve()
        except BaseException as error:
            self._send(Gone(describe(error)))
