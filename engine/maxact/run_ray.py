"""Workers on a Ray cluster: an actor for each GPU, or for some CPU cores. Ray is imported only when it is needed.

The driver has one call of `listen` under way to each actor (`actor.py`), which returns as soon as the worker has said
something that waits for an answer; orders go by calls that nobody waits for. An actor for which there is no room is
waited for while the others work, and Ray places it when a node has come.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, TypeVar, cast

import numpy as np
import torch

from maxact.actor import Actor, Where
from maxact.config import RunConfig
from maxact.crew import Crew
from maxact.errors import MaxactError, UsageError
from maxact.process import Tick
from maxact.provenance import versions
from maxact.worker import Given, Gone, Message, Order, Work, pickled

T = TypeVar("T")
_TRIES = 3  # at a head that does not answer
_ANSWER = 5.0  # seconds in which a cluster has to answer
_WAIT = 1.0  # seconds, at most, from one time of listening to the next
_TAKEN = 4  # calls whose results are taken in at a time: they may be large
_GLANCE = 10.0  # seconds from one look at the cluster's nodes to the next
_ALIKE = ("maxact", "torch", "torchvision", "nvidia-dali-cuda130")  # versions that decide what comes out

log = logging.getLogger("maxact")


class HeadLost(MaxactError):
    """The head of a cluster is gone: asked for anything, Ray would wait for a minute and end this process."""


@contextmanager
def joined(run: RunConfig) -> Iterator[RunConfig]:
    """Inside, this process belongs to the cluster of `run`, whose kind of devices is said; without a cluster, nothing.

    `auto` is the cluster of RAY_ADDRESS or of this machine, or one that is started here and ends with the block. Raises
    UsageError where Ray is not installed, and MaxactError where there is no such cluster, or it lacks such devices.
    """
    if run.cluster is None:
        yield run
        return
    ray = _ray()
    ours = not ray.is_initialized()
    if ours:
        _connect(run.cluster)
    try:
        gpus = ray.cluster_resources().get("GPU", 0) >= 1
        if run.devices == "cuda" and not gpus:
            raise MaxactError(f"cluster: {run.cluster} has no GPUs; --devices cpu runs on its CPUs")
        yield replace(run, devices="cuda" if gpus and run.devices != "cpu" else "cpu")
    except HeadLost:
        ours = False
        raise
    finally:
        if ours:
            ray.shutdown()


def _ray() -> ModuleType:
    try:
        import ray
    except ImportError:
        raise UsageError("cluster: needs Ray: pip install 'maxact[ray]'") from None
    return ray


def _connect(cluster: str) -> None:
    ray = _ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or some versions warn of what changes there
    address = _address(cluster)
    if address is None:
        log.info("no Ray cluster found: starting one on this machine")
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = " ".join(str(error).split())
        raise MaxactError(
            f"cluster: {address or cluster} cannot be joined ({reason}); see that the versions of Ray and Python are "
            "its own, and so are RAY_AUTH_MODE and the token, where it asks for one"
        ) from error
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, handler)
    # or the end of any worker is told in many lines on standard output; what matters of it comes as Gone
    ray._private.worker._worker_logs_enabled = False


def _address(cluster: str) -> str | None:
    """Where a cluster answers, HOST:PORT; None where `auto` finds none. Raises MaxactError where none answers there."""
    named = os.environ.get("RAY_ADDRESS", "") if cluster == "auto" else cluster
    found = named
    if named in ("", "auto", "local"):
        named = found = ""
        with suppress(ConnectionError):  # it has none in its files
            found = _ray()._private.services.canonicalize_bootstrap_address("auto") or ""
    trouble = _trouble(found)  # Ray itself would try for minutes
    if trouble and named:
        raise MaxactError(f"cluster: no Ray answers at {named} ({trouble}); expected auto or HOST:PORT")
    return None if trouble else found


def _trouble(address: str) -> str | None:
    """Why nothing answers at HOST:PORT; None where something does."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER).close()
        return None
    except (OSError, ValueError, OverflowError) as error:
        return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


@dataclass(frozen=True)
class _Need:
    """What a worker takes of a node, and of which one."""

    cpus: int
    gpus: int
    node: str = ""

    def __str__(self) -> str:
        return f"{self.gpus} GPU and {self.cpus} CPUs" if self.gpus else f"{self.cpus} CPUs"


class _Contact:
    """An actor, as its driver reaches it."""

    def __init__(self, name: str, actor: Any, place: int) -> None:
        self.name, self.ready, self.gone = name, False, False
        self.actor, self.place = actor, place

    def tell(self, order: Order) -> None:
        """Sends an order."""
        if not self.gone:
            self.actor.tell.options(concurrency_group="orders", num_returns=0).remote(order)

    def kill(self) -> None:
        """Ends it at once."""
        self.gone = True
        _ray().kill(self.actor)


class Actors:
    """An actor at a work for each GPU of the cluster that this process has joined, or for every so many of its CPUs."""

    def __init__(self, work: Work[Any, Any], run: RunConfig, most: int | None = None) -> None:
        """At most `most` of them. Raises MaxactError where there is room for none."""
        self._work, self._run, self._most = work, run, most
        self._needs = _needs(run)[:most]
        if not self._needs:
            raise MaxactError(f"cluster: {run.cluster} has no node with {_Need(run.cpus_per_worker or 1, 0)}")
        self._head = _ray().get_runtime_context().gcs_address
        self._asked: dict[Any, _Contact] = {}  # what is being waited for, by what it is
        self._heard: list[_Contact] = []
        self._first = True  # nothing has been handed over yet
        self._looked = self._glanced = time.monotonic()
        self._unmanned = 0.0  # seconds of listening in which there was no worker
        self._missing = 0

    @property
    def places(self) -> list[str]:
        """The workers' names."""
        return [f"worker {number}" for number in range(len(self._needs))]

    def __enter__(self) -> Actors:
        self._load = _ray().put(np.frombuffer(pickled(self._work), np.uint8))  # once, whatever number of workers
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, HeadLost):  # nobody could be told
            return
        for contact in {*self._asked.values(), *self._heard}:
            contact.kill()

    def hire(self, place: int) -> _Contact:
        """Asks for an actor at a place: on the node that it was meant for, and elsewhere where that is gone."""
        ray, need = _ray(), self._needs[place]
        where = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(need.node, soft=True)
        kind = ray.remote(concurrency_groups={"orders": 1})(Actor)
        actor = kind.options(num_cpus=need.cpus, num_gpus=need.gpus, max_restarts=0, scheduling_strategy=where).remote()
        contact = _Contact(self.places[place], actor, place)
        self._asked[actor.hello.remote()] = contact
        return contact

    def wait(self, seconds: float) -> list[tuple[_Contact, Message]]:
        """What they have said."""
        ray = _ray()
        for contact in self._heard:  # not earlier: by now what they said is dealt with
            if not contact.gone:
                self._asked[contact.actor.listen.remote()] = contact
        self._heard = []
        self._asked = {ref: contact for ref, contact in self._asked.items() if not contact.gone}
        self._glance()
        if not self._asked:
            time.sleep(seconds)
            return []
        refs = list(self._asked)
        ready, _ = ray.wait(refs, timeout=seconds)
        if ready:
            ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        return [said for ref in ready[:_TAKEN] for said in self._receive(ref)]

    def _receive(self, ref: Any) -> list[tuple[_Contact, Message]]:
        contact = self._asked.pop(ref)
        try:
            given = _ray().get(ref)
        except _ray().exceptions.RayError as error:
            self._check_head()
            return [(contact, Gone(_reason(error)))]
        self._heard.append(contact)
        if isinstance(given, Where):
            self._begin(contact, given)
            return []
        head, buffers = given
        messages = pickle.loads(head, buffers=[bytearray(buffer) for buffer in buffers])
        self._first &= not any(isinstance(message, Given) for message in messages)
        return [(contact, message) for message in messages]

    def _begin(self, contact: _Contact, where: Where) -> None:
        """There is an actor: it gets the work. Raises MaxactError where its versions are not ours."""
        contact.name += f" ({where.host})"
        need = self._needs[contact.place] = replace(self._needs[contact.place], node=where.node)
        ours = versions(torch.device("cpu"))
        if other := [f"{name} {where.versions.get(name)}, not {ours.get(name)}" for name in _ALIKE
                     if where.versions.get(name) != ours.get(name)]:  # fmt: skip
            raise MaxactError(f"{contact.name}: has {'; '.join(other)}; install the same on every node")
        device = "cuda:0" if need.gpus else "cpu"  # Ray shows each worker its own GPU alone
        threads = max(1, need.cpus)
        run = replace(
            self._run,
            cluster=None,
            cpus_per_worker=None,
            devices=device,
            threads=self._run.threads or threads,
            decode_threads=self._run.decode_threads or threads,
        )
        paths = [path for path in sys.path if isinstance(path, str)]
        contact.actor.begin.options(num_returns=0).remote(self._load, run, paths, contact.name, self._first)
        contact.ready = True

    def _check_head(self) -> None:
        """Raises HeadLost."""
        for _ in range(_TRIES):
            if _trouble(self._head) is None:
                return
            time.sleep(1.0)
        raise HeadLost(f"cluster: its head at {self._head} is gone; run the same again when it is back")

    def _glance(self) -> None:
        """Looks for room. Raises MaxactError where for long there has been none for anyone."""
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, _WAIT), now  # not the time in which this process did not run
        self._unmanned = 0.0 if any(contact.ready for contact in self._asked.values()) else self._unmanned + passed
        if self._unmanned > self._run.stall:
            need = self._needs[next(iter(self._asked.values())).place if self._asked else 0]
            raise MaxactError(
                f"cluster: {self._run.cluster} had no room for a worker ({need}) for {self._run.stall:.0f} s; "
                "`ray status` says who has it; run the same again when there is some"
            )
        if now - self._glanced < _GLANCE:
            return
        self._glanced = now
        self._check_head()
        missing = sum(not contact.ready for contact in self._asked.values())
        if not missing and self._most is None:  # nodes may have joined
            self._needs += (Counter(_needs(self._run)) - Counter(self._needs)).elements()
        if missing != self._missing and missing:
            log.info("%d of %d workers are starting, or wait for room in the cluster", missing, len(self._needs))
        self._missing = missing


def _needs(run: RunConfig) -> list[_Need]:
    """What each of the workers takes that the nodes have room for: a GPU and its part of the node's CPUs, or as many
    CPUs as are said, or all of a node's."""
    found = []
    for node in _ray().nodes():
        has = node["Resources"]
        cpus, gpus = int(has.get("CPU", 0)), int(has.get("GPU", 0))
        if not node["Alive"]:
            continue
        if run.devices == "cuda" and gpus:
            each = run.cpus_per_worker or cpus // gpus
            found += [_Need(each, 1, node["NodeID"])] * (min(gpus, cpus // each) if each else gpus)
        elif run.devices == "cpu" and cpus:
            each = run.cpus_per_worker or cpus
            found += [_Need(each, 0, node["NodeID"])] * (cpus // each)
    return found


def _reason(error: Exception) -> str:
    """What Ray says in many lines."""
    words = str(error)
    if isinstance(error, _ray().exceptions.ActorUnavailableError):
        return "its node does not answer"
    if "low on memory" in words:
        return "killed, for its node ran low on memory"
    lines = [line.strip() for line in words.splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1].removeprefix("The actor is dead because ").split(". ")[0]


# One call


@dataclass(frozen=True)
class _Answer:
    """What a function gave, or the error that it raised."""

    value: Any
    error: MaxactError | None = None
    touched: tuple[int] = (0,)


@dataclass(frozen=True)
class _Question:
    """The only item of its work."""

    index: int = 0

    def __str__(self) -> str:
        return "the first batch"


@dataclass(frozen=True)
class _Once:
    """A work that calls a function once, with how the worker runs."""

    function: Callable[[RunConfig], Any]
    own: RunConfig
    patience: float = 0.0
    merge: None = None

    def on(self, run: RunConfig) -> _Once:
        """The same for one worker."""
        return replace(self, own=run)

    def run(
        self, items: Iterator[_Question], stop: threading.Event, report: Callable[[Tick], None]
    ) -> Iterator[_Answer]:
        """Calls it."""
        for _ in items:
            try:
                yield _Answer(self.function(self.own))
            except MaxactError as error:
                yield _Answer(None, error)

    def look(self) -> None:
        """It reads what it reads."""


def call(run: RunConfig, function: Callable[[RunConfig], T]) -> T:
    """What a function gives on one of the cluster's workers, whose way of running it is told.

    Raises the MaxactError that it raises, and MaxactError where the workers die of it.
    """
    with Actors(_Once(function, run), run, most=1) as actors:
        stop = threading.Event()
        crew = Crew[_Question, _Answer](actors, stop=stop, report=lambda tick: None, stall=3 * run.stall)
        (answer,) = crew.run(iter([_Question()]))
    if answer.error:
        raise answer.error
    return cast(T, answer.value)
