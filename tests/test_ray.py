"""A real Ray cluster of several nodes on this machine: what they give is what one process gives, whatever dies."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import maxact
from maxact import run_ray
from maxact.config import RunConfig
from maxact.errors import MaxactError, UsageError
from maxact.local import attempts
from maxact.process import Tick
from maxact.run_ray import joined
from maxact.store import Store
from maxact.worker import Begin, Done, Give, Given, Message, Worker
from stores import ARGUMENTS, command, contents, scan, wait_for
from support import write_photographs
from toil import Piece, Squares, Toil, assert_whole, is_alive, workers

ray = pytest.importorskip("ray")
SMALL = 100 << 20  # bytes of a node's object store


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one CPU, and a head that does no work."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        made = Cluster()
        try:
            made.add_node(num_cpus=0, object_store_memory=SMALL, include_dashboard=False)
            for _ in range(2):
                made.add_node(num_cpus=1, object_store_memory=SMALL, wait=False)
            made.wait_for_nodes()
            yield made
        finally:
            made.shutdown()


@pytest.fixture(scope="module")
def run(cluster: Any) -> Iterator[RunConfig]:
    """How it is run there; this process belongs to the cluster."""
    with joined(RunConfig(cluster=cluster.address, cpus_per_worker=1)) as run:
        assert run.devices == "cpu"
        yield run


def gather(work: Toil, run: RunConfig, count: int) -> tuple[list[Squares], list[Tick]]:
    """What the pieces gave, and the ticks."""
    ticks: list[Tick] = []
    with attempts(work, run, threading.Event(), ticks.append) as (attempt, _):
        return list(attempt(map(Piece, range(count)))), ticks


@pytest.fixture(autouse=True)
def no_worker_stays(tmp_path: Path) -> Iterator[None]:
    yield
    wait_for(lambda: not any(map(is_alive, workers(tmp_path))))


def test_every_item_is_given_once_though_workers_die(
    run: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    work = Toil(tmp_path, {3: ("killed", 1), 7: ("raises", 1)}, slow={"cpu": 0.05}, patience=0.2)
    given, ticks = gather(work, run, 20)
    assert_whole(given, 20)
    assert {tick.shard for tick in ticks} == set(range(20))
    assert len(workers(tmp_path)) == 2 + 2 and os.getpid() not in workers(tmp_path)
    assert len({pid for each in given for pid in each.workers.values()}) >= 2
    died = [record.message for record in caplog.records if "the worker died" in record.message]
    assert len(died) == 2 and all("worker " in line for line in died)
    assert any("ZeroDivisionError: a mistake" in line for line in died)
    assert any("its worker process has died" in line for line in died)


def test_what_cannot_be_read_there_is_said_at_once(run: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(MaxactError, match=r"worker \d \(\S+\): the images cannot be read there \(a.jpg: No such"):
        gather(Toil(tmp_path, {0: ("blind", 1)}), run, 4)


def test_both_passes_give_the_stores_of_one_process(run: RunConfig, photos: Path, tmp_path: Path) -> None:
    alone, there = tmp_path / "alone", tmp_path / "there"
    wanted: dict[str, Any] = {"cluster": run.cluster, "cpus_per_worker": 1}
    scan(photos, alone, bottom=2, devices="cpu")
    names: set[str] = set()
    scan(photos, there, bottom=2, **wanted, report=lambda now: names.update(hand.name for hand in now.hands))
    assert_same(there, alone)
    assert all(name.startswith("worker ") for name in names) and names
    settings: dict[str, Any] = {"ranks": 2, "max_size": 32, "batch": 4, "threads": 1, "readers": 4}
    maxact.project(alone, **settings, devices="cpu")
    maxact.project(there, **settings, **wanted)
    assert_same(there, alone)


def test_a_killed_driver_costs_what_was_in_flight(cluster: Any, run: RunConfig, tmp_path: Path) -> None:
    write_photographs(tmp_path / "photos", 63)
    store, address = tmp_path / "x", ("--cluster", cluster.address, "--cpus-per-worker", "1")
    arguments = ("scan", "tiny:slow", tmp_path / "photos", store, *ARGUMENTS)
    child = command(*arguments, *address)
    wait_for(lambda: committed(store))
    child.kill()
    assert child.wait() == -signal.SIGKILL
    first = committed(store)
    assert 0 < len(first) < 16
    wait_for(lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"])
    child = command(*arguments, *address)
    assert child.wait() == 0, child.err
    assert f"going on after {4 * len(first)} of 63 images" in child.err
    assert_same(store, scan(tmp_path / "photos", tmp_path / "alone", network="tiny:slow").path)


def test_a_head_that_goes_ends_the_run_with_a_line(tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    write_photographs(tmp_path / "photos", 600)  # more than are scanned until somebody looks at the head again
    made, store = Cluster(), tmp_path / "x"
    try:
        head = made.add_node(num_cpus=0, object_store_memory=SMALL, include_dashboard=False)
        made.add_node(num_cpus=1, object_store_memory=SMALL)
        arguments = ("scan", "tiny:slow", tmp_path / "photos", store, *ARGUMENTS)
        address = made.address
        child = command(*arguments, "--cluster", address, "--cpus-per-worker", "1")
        wait_for(lambda: committed(store))
        made.remove_node(head, allow_graceful=False)
        assert child.wait() == 1
    finally:
        made.shutdown()
    assert f"cluster: its head at {address} is gone; run the same again when it is back" in child.err
    assert "Traceback" not in child.err
    assert committed(store) and not Store(store).manifest.finished


def committed(store: Path) -> set[int]:
    state = Store(store).state() if Store.exists(store) else None
    return set(state.shards) if state else set()


def assert_same(store: Path, other: Path) -> None:
    found, wanted = contents(store), contents(other)
    assert found.keys() == wanted.keys()
    assert [name for name in found if found[name] != wanted[name]] == []


def test_no_room_for_anyone_ends_the_run(run: RunConfig, tmp_path: Path) -> None:
    """Somebody else has all CPUs."""
    whole = int(ray.cluster_resources()["CPU"])

    class Idler:
        pass

    others = [ray.remote(Idler).options(num_cpus=1).remote() for _ in range(whole)]
    wait_for(lambda: not ray.available_resources().get("CPU"))
    with pytest.raises(MaxactError, match=r"no room for a worker \(1 CPUs\) for 1 s"):
        gather(Toil(tmp_path), replace(run, stall=1.0), 4)
    for other in others:
        ray.kill(other)


def test_one_call_gives_what_the_function_gives_or_raises(run: RunConfig) -> None:
    assert run_ray.call(run, lambda own: (own.devices, own.threads, own.cluster)) == ("cpu", 1, None)

    def refuse(own: RunConfig) -> None:
        raise UsageError("no such thing")

    once = run_ray._Once(refuse, run)
    (answer,) = once.run(iter([run_ray._Question()]), threading.Event(), lambda tick: None)
    assert isinstance(answer.error, UsageError)


def test_a_node_goes_and_another_one_comes(
    cluster: Any, run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was in hand there is done by others; of the new node's two places one is the lost one's, one is new."""
    monkeypatch.setattr(run_ray, "_GLANCE", 0.2)
    work, stop = Toil(tmp_path, slow={"cpu": 0.05}), threading.Event()
    given: list[Squares] = []
    seen: set[int] = set()
    with attempts(work, run, stop, lambda tick: None) as (attempt, crew):
        for each in attempt(map(Piece, range(4000))):
            given.append(each)
            before, seen = seen, seen | set(each.workers.values())
            if len(seen) == 2 > len(before):
                cluster.remove_node(sorted(cluster.worker_nodes, key=id)[0], allow_graceful=False)
                cluster.add_node(num_cpus=2, object_store_memory=SMALL, wait=False)
            if len(seen) == 4:
                stop.set()
        assert crew is not None and len(crew.hands) >= 3
    squares = [number for each in given for number in each.squares]
    assert len(squares) == len(set(squares))
    assert len(seen) == 4  # two, less one, and two more


def test_a_worker_runs_on_the_node_that_it_was_sized_for(cluster: Any, run: RunConfig, tmp_path: Path) -> None:
    """The small ones would fit on the large node, too, and then there would be no room for the large one."""
    large = cluster.add_node(num_cpus=4, object_store_memory=SMALL)
    cluster.wait_for_nodes()
    try:
        with run_ray.Actors(Toil(tmp_path), replace(run, cpus_per_worker=None)) as actors:
            wanted = {need.node: need.cpus for need in actors._needs}
            small_first = sorted(range(len(actors.places)), key=lambda place: actors._needs[place].cpus)
            contacts = [actors.hire(place) for place in small_first]
            wait_for(lambda: not actors.wait(0.1) and all(contact.ready for contact in contacts))
            assert {need.node: need.cpus for need in actors._needs} == wanted
            assert sorted(wanted.values())[-1] == 4 and len(wanted) == len(contacts) >= 3
    finally:
        cluster.remove_node(large)


def test_gpus_are_places_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def node(alive: bool = True, **resources: float) -> dict[str, Any]:
        return {"Alive": alive, "Resources": resources, "NodeID": "a node"}

    nodes = [node(CPU=64.0, GPU=8.0), node(False, CPU=64.0, GPU=8.0), node(CPU=6.0), node(CPU=0.0, GPU=1.0), node()]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)

    def needs(devices: str, cpus: int | None = None) -> list[tuple[int, int]]:
        wanted = RunConfig(devices, cluster="auto", cpus_per_worker=cpus)
        return [(need.cpus, need.gpus) for need in run_ray._needs(wanted)]

    assert needs("cuda") == [(8, 1)] * 8 + [(0, 1)]
    assert needs("cuda", 20) == [(20, 1)] * 3
    assert needs("cpu") == [(64, 0), (6, 0)]
    assert needs("cpu", 4) == [(4, 0)] * 17


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cluster": "ray://head:10001"}, "cluster: expected auto or HOST:PORT"),
        (
            {"cluster": "auto", "devices": "cuda:0-3"},
            "devices: expected auto, cpu or cuda on a cluster, got 'cuda:0-3'",
        ),
        ({"cluster": "auto", "cpus_per_worker": 0}, "cpus_per_worker: expected at least 1"),
        ({"cpus_per_worker": 2}, "cpus_per_worker: expected none without a cluster"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        RunConfig(**settings)


def test_a_worker_goes_on_merging_while_the_driver_has_no_time(tmp_path: Path) -> None:
    said: list[Message] = []
    worker = Worker(Toil(tmp_path, patience=1e-9), said.append, is_free=lambda: len(said) < 4)
    for order in (Begin(), *(Give(Piece(number)) for number in range(9)), Give(None)):
        worker.tell(order)
    threading.Thread(target=worker.serve, daemon=True).start()
    wait_for(lambda: said and said[-1] == Done())
    given = [message.part for message in said if isinstance(message, Given)]
    assert [len(part.squares) for part in given] == [1, 8]


@pytest.mark.parametrize("address", ["127.0.0.1:1", "no.such.host.invalid:6379", "http://127.0.0.1:8265"])
def test_a_cluster_that_does_not_answer(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(MaxactError, match=f"cluster: no Ray answers at {address} "):
        run_ray._address("auto")


def test_without_ray_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, photos: Path, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"cluster: needs Ray: pip install 'maxact\[ray\]'"):
        scan(photos, tmp_path / "x", cluster="auto")
    assert not (tmp_path / "x").exists()
