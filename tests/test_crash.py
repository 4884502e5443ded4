"""Runs that are killed, full disks, and two runs at once: the same command goes on, and the final store is that of a
run that nothing disturbed, file for file."""

from __future__ import annotations

import os
import random
import re
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

import tiny
from maxact import schedule
from maxact.errors import MaxactError
from maxact.field import Field
from maxact.fields import of_taps
from maxact.info import describe
from maxact.store import Store
from stores import ARGUMENTS, Child, command, contents, die_at, scan, wait_for
from support import cut_short

LIVES = 200  # more than any run here can need


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """An undisturbed run, with bad files in two shards."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(photos, folder / "photos")
    cut_short(folder / "photos", "005", "010")
    return scan(folder / "photos", folder / "x")


@pytest.fixture
def images(whole: Store) -> Path:
    return whole.path.parent / "photos"


def assert_same(store: Path, whole: Store) -> None:
    found, wanted = contents(store), contents(whole.path)
    assert found.keys() == wanted.keys()
    assert [name for name in found if found[name] != wanted[name]] == []


def committed(store: Path) -> set[int]:
    """The shards that a store has, whatever state it is in. It must always be a good one, or none yet."""
    if not Store.exists(store):
        return set()
    opened = Store(store)
    describe(opened)
    if opened.manifest.finished:
        return set(range(6))
    state = opened.state()
    if state is None:
        return set()
    assert opened["bn1"].top(0).num_rows == min(5, 4 * len(state.shards) - len(state.bad))
    return set(state.shards)


def test_killed_at_random_moments(whole: Store, images: Path, in_memory: Path) -> None:
    store, draw, before, code, killed = in_memory / "x", random.Random(7), set[int](), -1, 0
    for life in range(LIVES):
        child = command("scan", "tiny:slow", images, store, *ARGUMENTS)
        child.process.join(draw.uniform(0.1, 0.6 + 0.1 * life))
        child.kill()
        code = child.wait()
        after = committed(store)
        assert before <= after  # what was committed stays
        before = after
        if code == 0:
            break
        assert code == -signal.SIGKILL, child.err
        killed += 1
    assert code == 0 and killed >= 3
    other = scan(images, in_memory / "y", "tiny:slow")
    assert_same(store, other)


def test_killed_at_every_step(whole: Store, images: Path, in_memory: Path, step: int = 12) -> None:
    """One life after the other is killed when it renames, syncs or deletes a file, each some times later than the one
    before: in the middle of everything that is ever written, commits and the end of the pass among it."""
    store, before, code = in_memory / "x", set[int](), -1
    for life in range(LIVES):
        child = command("scan", "tiny:network", images, store, *ARGUMENTS, dies_at=1 + life * step)
        code = child.wait()
        after = committed(store)
        assert before <= after
        before = after
        if code == 0:
            break
        assert code == -signal.SIGKILL, child.err
    assert code == 0 and life >= 5
    assert_same(store, whole)


@pytest.fixture
def almost(whole: Store, images: Path, in_memory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store in which every shard is done, and that is not finished."""

    def cut(self: Store, *results: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Store, "finish", cut)
        scan(images, in_memory / "almost")
    return in_memory / "almost"


def fields_of(store: Store) -> dict[str, Field]:
    return of_taps(tiny.network().eval(), store.manifest.taps, (tiny.SIDE, tiny.SIDE))


def finish(store: Path, dies_at: int) -> int:
    """Finishes a store, in a process that kills itself at some step; 0 where it came to the end before that."""
    opened = Store(store)
    state = opened.state()
    assert state is not None
    die_at(dies_at)
    opened.finish(state, fields_of(opened))
    return 0


def test_killed_while_it_finishes(almost: Path, whole: Store, in_memory: Path) -> None:
    step = 2
    while True:
        store = in_memory / str(step)
        shutil.copytree(almost, store)
        code = Child(partial(finish, store, step)).wait()
        assert code in (0, -signal.SIGKILL)
        opened = Store(store)
        assert opened.manifest.finished == (code == 0) or step > 50
        assert repr(opened["bn2"].lists) == repr(whole["bn2"].lists)
        state = opened.state()
        assert state is not None  # it has bad images, which can be scanned again
        opened.finish(state, fields_of(opened))
        assert_same(store, whole)
        shutil.rmtree(store)
        if code == 0:
            break
        step += 16
    assert step > 100


def test_killed_while_it_starts_again(whole: Store, images: Path, in_memory: Path) -> None:
    """--overwrite, killed in the middle of deleting the old store: either command goes on from there."""
    for step in range(1, 110, 15):
        store = in_memory / str(step)
        shutil.copytree(whole.path, store)
        child = command("scan", "tiny:network", images, store, *ARGUMENTS, "--bottom", "2", "--overwrite", dies_at=step)
        assert child.wait() == -signal.SIGKILL
        if Store.exists(store) and Store(store).manifest.settings["bottom"] == 0:
            opened = Store(store)
            describe(opened)
            if opened.manifest.finished:  # nothing is deleted before it is marked as not
                assert repr(opened["bn2"].lists) == repr(whole["bn2"].lists)
            scan(images, store)
            assert_same(store, whole)
        else:
            assert scan(images, store, bottom=2).manifest.finished


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals(signum: signal.Signals, images: Path, in_memory: Path) -> None:
    store = in_memory / "x"
    arguments = ("scan", "tiny:slow", images, store, *ARGUMENTS)
    child = command(*arguments, seconds=1000)  # nothing is committed before the signal
    wait_for(lambda: " 10 of 21 images" in child.so_far())
    assert not list(store.glob("run/state-*"))
    child.kill(signum)
    assert child.wait() == 128 + signum
    assert child.out == ""
    done = committed(store)
    assert 0 < len(done) < 6
    *_, last = child.err.splitlines()
    count = sum(min(21, 4 * index + 4) - 4 * index for index in done)
    assert last == (
        f"maxact: stopped by {signum.name}: {count} of 21 images are committed; "
        "run the same again (without --overwrite) to go on"
    )
    assert "Traceback" not in child.err
    again = command(*arguments)
    assert again.wait() == 0
    assert f"going on after {count} of 21 images" in again.err
    assert_same(store, scan(images, in_memory / "y", "tiny:slow"))


def test_one_run_at_a_time(images: Path, in_memory: Path) -> None:
    store = in_memory / "x"
    arguments = ("scan", "tiny:stuck", images, store, *ARGUMENTS)
    first = command(*arguments)
    wait_for(lambda: list(store.glob("run/state-*")))
    second = command(*arguments, "--quiet")
    assert second.wait() == 1
    assert second.err == (
        f"maxact: {store}: in use by process {first.process.pid} on {os.uname().nodename}; "
        "wait for it or stop it first\n"
    )
    for name in ("info", "export"):  # reading goes on
        reader = command(name, store, *[in_memory / "out.parquet"][: name == "export"])
        assert reader.wait() == 0 and reader.err == ""
    first.kill()
    assert first.wait() == -signal.SIGKILL
    with Store.lock(store):  # it has gone with its holder
        pass


# A full disk


@dataclass(frozen=True)
class Disk:
    """A place whose disk can be filled, and emptied again."""

    folder: Path
    fill: Callable[[], object]
    free: Callable[[], object]


@pytest.fixture
def disk(in_memory: Path) -> Iterator[Disk]:
    """A small file system in memory; where none may be mounted, a limit on the size of files."""
    folder = in_memory / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    mounted = shutil.which("mount") is not None and subprocess.run(mount, capture_output=True).returncode == 0
    if not mounted:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE)
        yield Disk(folder, partial(limit, (0, hard)), partial(limit, (soft, hard)))
        limit((soft, hard))
        return

    def fill() -> None:
        with open(folder / "ballast", "wb", buffering=0) as ballast:
            try:
                while ballast.write(b"\0" * 4096):
                    pass
            except OSError:
                return

    yield Disk(folder, fill, lambda: (folder / "ballast").unlink())
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_between_commits(
    disk: Disk, whole: Store, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "COMMIT_SECONDS", 0)
    store = disk.folder / "x"
    full: list[set[int]] = []

    def report(progress: object) -> None:
        if not full and list(store.glob("run/state-*")):
            full.append(committed(store))
            disk.fill()

    with pytest.raises(MaxactError) as caught:
        scan(images, store, report=report)
    text = str(caught.value)
    assert text.startswith(f"{store}/run/state-") and "\n" not in text
    assert ": cannot be written (" in text
    assert re.search(r"; it needs \d+ kB; make room there and run the same again \(without --overwrite\)", text)
    assert full and full[0] and committed(store) == full[0]
    assert not list(store.glob("run/.state*"))  # no half of one stays, to take up room
    disk.free()
    scan(images, store)
    assert_same(store, whole)


def test_a_disk_that_is_full_when_the_run_finishes(disk: Disk, almost: Path, whole: Store, images: Path) -> None:
    store = disk.folder / "x"
    shutil.copytree(almost, store)
    disk.fill()
    with pytest.raises(MaxactError) as caught:
        scan(images, store)
    assert str(caught.value).startswith(f"{store}: cannot be written (") and "\n" not in str(caught.value)
    assert committed(store) == set(range(6)) and not Store(store).manifest.finished
    disk.free()
    scan(images, store)
    assert_same(store, whole)


def test_a_disk_that_is_full_when_the_run_starts(disk: Disk, whole: Store, images: Path) -> None:
    store = disk.folder / "x"
    disk.fill()
    with pytest.raises(MaxactError) as caught:
        scan(images, store)
    assert "cannot be written (" in str(caught.value) or "cannot write" in str(caught.value)
    assert "\n" not in str(caught.value)
    disk.free()
    scan(images, store)
    assert_same(store, whole)
