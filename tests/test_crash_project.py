"""Second passes that are killed: the same command goes on, and the store is that of a pass that nothing disturbed."""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path

import pytest

from maxact.store import Store
from stores import Child, command, contents, names, scan, wait_for

LIVES = 100  # more than any pass here can need
ARGUMENTS = ("--ranks", "2", "--max-size", "32", "--batch", "4", "--threads", "1", "--readers", "4")


@pytest.fixture(scope="module")
def halves(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A scan in bfloat16 with a bad file and a file that goes afterwards. Nobody changes it."""
    folder = tmp_path_factory.mktemp("halves")
    shutil.copytree(photos, folder / "photos")
    bad, gone = sorted((folder / "photos").rglob("*.jpg"))[3:5]
    bad.write_bytes(b"no picture")
    store = scan(folder / "photos", folder / "x", precision="bf16", shard=2)
    gone.write_bytes(b"another picture")
    return store


@pytest.fixture(scope="module")
def whole(halves: Store, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The undisturbed pass."""
    store = copied(halves, tmp_path_factory.mktemp("whole") / "x")
    assert run(store).wait() == 0
    return Store(store)


def copied(store: Store, place: Path) -> Path:
    shutil.copytree(store.path, place)
    return place


def run(store: Path, *more: object, dies_at: int | None = None) -> Child:
    return command("project", store, *ARGUMENTS, *more, dies_at=dies_at)


def assert_same(store: Path, whole: Store) -> None:
    found, wanted = contents(store), contents(whole.path)
    assert found.keys() == wanted.keys()
    assert [name for name in found if found[name] != wanted[name]] == []
    assert names(store / "run") == names(whole.path / "run")


def assert_readable(store: Path) -> None:
    """Whatever happened, the scan is there."""
    opened = Store(store)
    assert opened.manifest.finished
    for tap in opened:
        assert opened[tap].top(0).num_rows == 5
    assert opened.errors()["stage"].to_pylist()[0] == "decode"


def test_an_undisturbed_pass(whole: Store) -> None:
    assert [row["stage"] for row in whole.errors().to_pylist()] == ["decode", "project"]
    assert whole.manifest.projected is not None and whole.manifest.projected["settled"] > 1e-4


def test_killed_at_every_step(halves: Store, whole: Store, in_memory: Path, step: int = 9) -> None:
    """One life after the other is killed when it renames, syncs or deletes a file, each some times later than the one
    before: while it settles, while it projects, and at the end."""
    store, code, stages = copied(halves, in_memory / "x"), -1, set[tuple[bool, bool]]()
    for life in range(LIVES):
        child = run(store, dies_at=1 + life * step)
        code = child.wait()
        assert_readable(store)
        stages.add((any((store / "run").glob("settling-*")), (store / "run" / "projected.json").exists()))
        if code == 0:
            break
        assert code == -signal.SIGKILL, child.err
    assert code == 0 and life >= 5 and len(stages) >= 3
    assert_same(store, whole)


def test_killed_at_random_moments(halves: Store, whole: Store, in_memory: Path) -> None:
    store, draw, code, killed = copied(halves, in_memory / "x"), random.Random(5), -1, 0
    for life in range(LIVES):
        child = run(store)
        child.process.join(draw.uniform(0.2, 0.8 + 0.2 * life))
        child.kill()
        code = child.wait()
        assert_readable(store)
        if code == 0:
            break
        assert code == -signal.SIGKILL, child.err
        killed += 1
    assert code == 0 and killed >= 1
    assert_same(store, whole)


@pytest.mark.parametrize("dies_at", [2, 9, 20])
def test_killed_while_it_starts_again(dies_at: int, halves: Store, whole: Store, in_memory: Path) -> None:
    """A pass of other settings is deleted; killed in the middle of that, nothing of it counts any more."""
    store = copied(whole, in_memory / "x")
    child = run(store, "--overwrite", "--method", "guided", dies_at=dies_at)
    assert child.wait() == -signal.SIGKILL, child.err
    assert_readable(store)
    again = run(store)
    code = again.wait()
    assert code == 0, again.err
    assert_same(store, whole)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(signum: int, code: int, halves: Store, whole: Store, in_memory: Path) -> None:
    store = copied(halves, in_memory / "x")
    child = run(store)
    wait_for(lambda: "settling" in child.so_far())
    child.kill(signum)
    assert child.wait() == code
    name = signal.Signals(signum).name
    assert child.err.splitlines()[-1] == f"maxact: stopped by {name}: what is done is kept; run the same again to go on"
    again = run(store)
    assert again.wait() == 0
    assert again.out == f"{store}: projected (`maxact render {store} OUT` shows it)\n"
    assert_same(store, whole)


def test_two_at_once(halves: Store, whole: Store, in_memory: Path) -> None:
    store = copied(halves, in_memory / "x")
    children = [run(store), run(store)]
    codes = [child.wait() for child in children]
    assert 0 in codes
    for child, code in zip(children, codes, strict=True):
        if code:
            assert code == 1 and "in use by " in child.err.splitlines()[-1]  # it may not have said its name yet
    assert_same(store, whole)
