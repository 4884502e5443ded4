"""Workers in processes of their own: each item is given once, whatever happens to the worker that had it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import toil
from maxact.config import RunConfig
from maxact.crew import Crew
from maxact.errors import MaxactError, UsageError
from maxact.fetch import Unreadable
from maxact.local import Processes, attempts, call
from maxact.process import Tick
from stores import wait_for
from toil import Piece, Squares, Toil, assert_whole, is_alive, workers

PIECES = 12


def gather(
    work: Toil, count: int = PIECES, devices: str = "cpu:2", stall: float = 60.0
) -> tuple[list[Squares], list[Tick]]:
    """What the pieces gave, and the ticks."""
    ticks: list[Tick] = []
    with attempts(work, RunConfig(devices, stall=stall), threading.Event(), ticks.append) as (attempt, _):
        return list(attempt(map(Piece, range(count)))), ticks


@pytest.fixture(autouse=True)
def no_process_stays(tmp_path: Path) -> Iterator[None]:
    yield
    assert not [pid for pid in workers(tmp_path) if is_alive(pid)]


@pytest.mark.parametrize(("devices", "count"), [("cpu:1", 1), ("cpu:3", 3)])
def test_every_item_is_given_once_by_as_many_processes_as_devices(tmp_path: Path, devices: str, count: int) -> None:
    work = Toil(tmp_path, slow={"cpu": 0.1})
    given, ticks = gather(work, devices=devices)
    assert_whole(given, PIECES)
    assert sorted(tick.shard for tick in ticks) == list(range(PIECES))
    used = {pid for each in given for pid in each.workers.values()}
    assert used <= set(workers(work.folder)) and os.getpid() not in used and len(workers(work.folder)) == count


def test_one_cpu_is_this_process(tmp_path: Path) -> None:
    given, _ = gather(Toil(tmp_path), devices="cpu")
    assert_whole(given, PIECES)
    assert {pid for each in given for pid in each.workers.values()} == {os.getpid()}
    (tmp_path / f"pid-{os.getpid()}").unlink()


def test_results_are_merged_before_they_are_handed_over(tmp_path: Path) -> None:
    given, _ = gather(Toil(tmp_path, patience=3600), devices="cpu:1")
    assert_whole(given, PIECES)
    assert len(given) == 1


def test_a_slow_worker_does_not_hold_up_the_rest(tmp_path: Path) -> None:
    """The process that is stopped has what it has asked for; all else is done by the other one."""
    ticks: list[Tick] = []
    work = Toil(tmp_path, slow={"cpu": 0.05})
    with attempts(work, RunConfig("cpu:2"), threading.Event(), ticks.append) as (attempt, _):
        given, stopped, before = [], None, 0
        for each in attempt(map(Piece, range(40))):
            given.append(each)
            (pid,) = each.workers.values()
            if stopped is None and len(workers(work.folder)) == 2:
                stopped, before = pid, len(given)
                os.kill(stopped, signal.SIGSTOP)
            if len(given) == 38:
                os.kill(stopped or 0, signal.SIGCONT)
    assert_whole(given, 40)
    assert sum(stopped in each.workers.values() for each in given[before:]) <= 5  # what was on its way


def test_workers_that_die_are_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    work = Toil(tmp_path, {3: ("killed", 2), 6: ("raises", 1), 9: ("memory", 1), 10: ("silent", 1)})
    assert_whole(gather(work, stall=12.0)[0], PIECES)
    assert len(workers(work.folder)) == 2 + 5
    lines = [record.message for record in caplog.records if "the worker died" in record.message]
    for reason, count in (
        ("killed", 2),
        ("ZeroDivisionError: a mistake", 1),
        ("out of memory", 1),
        ("silent for 1", 1),
    ):
        assert sum(reason in line for line in lines) == count


def test_an_item_that_workers_die_of_is_named_and_all_others_are_given(tmp_path: Path) -> None:
    work = Toil(tmp_path, {4: ("killed", 1000)})
    given: list[Squares] = []
    with (
        attempts(work, RunConfig("cpu:2"), threading.Event(), lambda tick: None) as (attempt, _),
        pytest.raises(MaxactError, match=r"3 workers died at piece 4, the last one: killed.*run the same again"),
    ):
        given.extend(attempt(map(Piece, range(PIECES))))
    found = {number for each in given for number in each.squares}
    assert found == set(range(PIECES)) - {4}


def test_what_cannot_be_read_ends_the_attempt_and_the_next_one_goes_on(tmp_path: Path) -> None:
    work = Toil(tmp_path, {2: ("unread", 1)}, slow={"cpu": 0.05})
    given: list[Squares] = []
    with attempts(work, RunConfig("cpu:2"), threading.Event(), lambda tick: None) as (attempt, _):
        with pytest.raises(Unreadable, match="piece 2"):
            given.extend(attempt(map(Piece, range(PIECES))))
        done = {number for each in given for number in each.squares}
        assert 2 not in done
        given.extend(attempt(Piece(number) for number in range(PIECES) if number not in done))
    assert_whole(given, PIECES)
    assert len(workers(work.folder)) == 2


def test_a_stop_keeps_what_is_finished(tmp_path: Path) -> None:
    work, stop = Toil(tmp_path, slow={"cpu": 0.1}, patience=3600), threading.Event()
    ticks: list[Tick] = []

    def report(tick: Tick) -> None:
        ticks.append(tick)
        if len(ticks) == 4:
            stop.set()

    with attempts(work, RunConfig("cpu:2"), stop, report) as (attempt, _):
        given = list(attempt(map(Piece, range(100))))
    assert 3 <= sum(len(each.squares) for each in given) < 20


def test_workers_that_never_begin_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(MaxactError, match=r"workers died one after the other, the last one: .*no such device"):
        gather(Toil(tmp_path, {0: ("stillborn", 1)}), devices="cpu:1")


def test_a_device_that_is_gone_is_given_up_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    work, stop, given = Toil(tmp_path, {0: ("gone", 1)}, slow={"cpu": 0.05}), threading.Event(), list[Squares]()
    with attempts(work, RunConfig("cpu:2"), stop, lambda tick: None) as (attempt, _):
        for each in attempt(map(Piece, range(4000))):
            given.append(each)
            if "given up, the others go on" in caplog.text:
                stop.set()
    assert_whole(given, len(given))
    assert caplog.text.count("the worker died (devices: there is no second one here)") == 3


class Absent:
    """A worker that waits for room in a cluster, for ever."""

    name, ready = "absent", False

    def tell(self, order: object) -> None:
        raise AssertionError("there is nobody to tell")

    def kill(self) -> None:
        pass


class Half(Processes):
    """There is room at the first place alone."""

    def hire(self, place: int) -> Any:
        return Absent() if place else super().hire(place)


@pytest.mark.parametrize("fates", [{1: ("killed", 1)}, {0: ("killed", 2), 1: ("killed", 2)}])
def test_a_worker_that_may_never_come_is_not_counted_on(tmp_path: Path, fates: dict[int, tuple[str, int]]) -> None:
    """What a worker died of goes to the same place again, where there is no other; and that place is not given up."""
    with Half(Toil(tmp_path, fates), RunConfig("cpu:2").each()) as hirer:
        crew = Crew[Piece, Squares](hirer, stop=threading.Event(), report=lambda tick: None, stall=60.0)
        assert_whole(list(crew.run(map(Piece, range(2)))), 2)


def test_what_cannot_be_pickled_is_refused(tmp_path: Path) -> None:
    work = Toil(tmp_path, {0: (threading.Lock(), 1)})  # type: ignore[dict-item]
    with pytest.raises(UsageError, match=r"cannot be sent to other processes .*lock.*"):
        gather(work)


AT_WORK = """
work = Toil(folder, {0: ("silent", 9), 1: ("silent", 9)})
with attempts(work, RunConfig("cpu:2"), threading.Event(), lambda tick: None) as (attempt, _):
    list(attempt(map(Piece, range(2))))
"""


@pytest.mark.parametrize(("doing", "count"), [(AT_WORK, 2), ("call('here', 600.0, asleep, folder)", 1)])
def test_workers_end_with_their_driver(tmp_path: Path, doing: str, count: int) -> None:
    script = f"""
import sys, threading
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from maxact.config import RunConfig
from maxact.local import attempts, call
from toil import Piece, Toil, asleep
folder = Path({str(tmp_path)!r})
{doing}
"""
    with subprocess.Popen([sys.executable, "-c", script]) as driver:
        wait_for(lambda: sum(map(is_alive, workers(tmp_path))) == count)
        driver.kill()
    wait_for(lambda: not any(map(is_alive, workers(tmp_path))), 30)


def test_a_call_gives_what_the_function_gives_or_raises() -> None:
    assert call("here", 60.0, toil.power, 3, 4) == 81
    assert call("here", 60.0, lambda: {"a": 1}) == {"a": 1}
    with pytest.raises(Unreadable, match="the disk is gone"):
        call("here", 60.0, toil.unreadable)
    with pytest.raises(MaxactError, match=r"here: .* died .*killed"):
        call("here", 60.0, toil.killed)
