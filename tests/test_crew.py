"""Workers in processes of their own: each item is given once, whatever happens to the worker that had it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import toil
from maxact.config import RunConfig
from maxact.errors import MaxactError, UsageError
from maxact.fetch import Unreadable
from maxact.local import attempts, call
from maxact.process import Tick
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


def test_what_cannot_be_pickled_is_refused(tmp_path: Path) -> None:
    work = Toil(tmp_path, {0: (threading.Lock(), 1)})  # type: ignore[dict-item]
    with pytest.raises(UsageError, match=r"cannot be sent to other processes .*lock.*"):
        gather(work)


def test_workers_end_with_their_driver(tmp_path: Path) -> None:
    script = f"""
import sys, threading
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from maxact.config import RunConfig
from maxact.local import attempts
from toil import Piece, Toil
work = Toil(Path({str(tmp_path)!r}), {{0: ("silent", 9), 1: ("silent", 9)}})
with attempts(work, RunConfig("cpu:2"), threading.Event(), lambda tick: print("at work", flush=True)) as (attempt, _):
    list(attempt(map(Piece, range(2))))
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() and driver.stdout.readline()
        assert sum(map(is_alive, workers(tmp_path))) == 2
        driver.kill()
    deadline = time.monotonic() + 30
    while any(map(is_alive, workers(tmp_path))) and time.monotonic() < deadline:
        time.sleep(0.05)


def test_a_call_gives_what_the_function_gives_or_raises() -> None:
    assert call("here", 60.0, toil.power, 3, 4) == 81
    assert call("here", 60.0, lambda: {"a": 1}) == {"a": 1}
    with pytest.raises(Unreadable, match="the disk is gone"):
        call("here", 60.0, toil.unreadable)
    with pytest.raises(MaxactError, match=r"here: .* died .*killed"):
        call("here", 60.0, toil.killed)
