"""Both passes on several workers: the store is, file for file, that of one; killed workers and drivers change
nothing."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import Dataset

import maxact
from maxact import schedule
from maxact.errors import MaxactError
from maxact.process import Interrupted, Progress
from maxact.store import Store
from stores import ARGUMENTS, command, contents, scan, wait_for
from support import cut_short, photograph
from toil import is_alive

PROJECT: dict[str, Any] = {"ranks": 2, "max_size": 32, "batch": 4, "threads": 1, "readers": 4}


@pytest.fixture(scope="module")
def images(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs, two of them damaged."""
    folder = tmp_path_factory.mktemp("images") / "photos"
    shutil.copytree(photos, folder)
    cut_short(folder, "005", "010")
    return folder


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """By this process alone; 16 bits, so that the second pass settles."""
    return scan(images, tmp_path_factory.mktemp("whole") / "x", precision="bf16", bottom=2)


def assert_same(store: Path, other: Path) -> None:
    found, wanted = contents(store), contents(other)
    assert found.keys() == wanted.keys()
    assert [name for name in found if found[name] != wanted[name]] == []


def children() -> list[int]:
    """The processes that this one has started."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        found += [int(pid) for pid in (task / "children").read_text().split()]
    return [pid for pid in found if b"maxact" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_any_number_of_workers_and_any_way_there_gives_the_same_store(
    images: Path, whole: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three workers, stopped after some batches; then two, of which one is killed; then this process."""
    store, settings = tmp_path / "x", {"precision": "bf16", "bottom": 2}
    batches = 0

    def stopping(progress: Progress) -> None:
        nonlocal batches
        batches += 1
        if batches == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        scan(images, store, devices="cpu:3", report=stopping, **settings)
    first = len(committed(store))
    assert first < 6
    killed: list[int] = []

    def killing(progress: Progress) -> None:
        nonlocal batches
        batches += 1
        if not killed:
            killed.append(children()[0])
            os.kill(killed[0], signal.SIGKILL)
        elif progress.before + progress.done >= 10:
            raise KeyboardInterrupt  # as if the driver failed

    with pytest.raises(KeyboardInterrupt):
        scan(images, store, devices="cpu:2", report=killing, **settings)
    assert not children()
    assert first <= len(committed(store))
    scan(images, store, **settings)
    assert_same(store, whole.path)


def committed(store: Path) -> set[int]:
    state = Store(store).state()
    return set(state.shards) if state else set()


def test_both_passes_on_two_workers(images: Path, whole: Store, tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    shutil.copytree(whole.path, alone)
    scan(images, shared, precision="bf16", bottom=2, devices="cpu:2")
    assert_same(shared, alone)
    hands: list[Progress] = []
    maxact.project(alone, **PROJECT)
    maxact.project(shared, **PROJECT, devices="cpu:2", report=hands.append)
    assert_same(shared, alone)
    assert {hand.name for progress in hands for hand in progress.hands} == {"cpu#0", "cpu#1"}


def test_killed_drivers_and_workers(images: Path, tmp_path: Path, whole: Store) -> None:
    """The command line with two workers: workers are killed at random, then the driver; the same command goes on."""
    draw, store, code, lives = random.Random(3), tmp_path / "x", -1, 0
    while code != 0:
        lives += 1
        assert lives < 10
        child = command("scan", "tiny:slow", images, store, *ARGUMENTS, "--devices", "cpu:2")
        if lives < 3:
            wait_for(lambda child=child: "img/s" in child.so_far() or child.process.exitcode is not None)
            driver = child.process.pid
            tasks = Path(f"/proc/{driver}/task")
            workers = [int(pid) for task in tasks.iterdir() for pid in (task / "children").read_text().split()]
            os.kill(draw.choice(workers), signal.SIGKILL)
            wait_for(lambda child=child: "the worker died" in child.so_far() or child.process.exitcode is not None)
            child.kill()
            for pid in workers:
                wait_for(lambda pid=pid: not is_alive(pid))
        code = child.wait()
        assert code in (0, -signal.SIGKILL), child.err
    reference = scan(images, tmp_path / "reference", network="tiny:slow")
    assert_same(store, reference.path)


class Deadly(Dataset[Any]):
    """Photographs; who reads number 9 dies while `poison` is there."""

    def __init__(self, poison: Path) -> None:
        self.poison = poison

    def __len__(self) -> int:
        return 21

    def __getitem__(self, index: int) -> Any:
        if index == 9 and self.poison.exists():
            os._exit(77)
        return photograph(index)


def test_a_shard_that_ends_its_workers_is_named_and_the_rest_is_committed(tmp_path: Path) -> None:
    dataset = Deadly(tmp_path / "poison")
    dataset.poison.touch()
    store = tmp_path / "x"
    with pytest.raises(
        MaxactError, match=r"3 workers died at shard 2 \(images 8 to 11\), the last one: ended with exit code 77"
    ):
        scan(dataset, store, devices="cpu:2")
    assert committed(store) == {0, 1, 3, 4, 5}
    dataset.poison.unlink()
    scan(dataset, store)
    assert_same(store, scan(dataset, tmp_path / "whole").path)


def test_storage_that_goes_and_comes_back(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is away when the workers begin, and back when the run has paused for it."""
    monkeypatch.setattr(schedule, "PAUSES", (0.5,) * 20)
    images, store = tmp_path / "photos", tmp_path / "x"
    shutil.copytree(photos, images)

    def stop(progress: Progress) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        scan(images, store, network="tiny:slow", report=stop)
    images.rename(tmp_path / "away")

    def bring_back() -> None:
        wait_for(lambda: any("trying again in" in record.message for record in caplog.records))
        (tmp_path / "away").rename(images)

    helper = threading.Thread(target=bring_back)
    helper.start()
    scan(images, store, network="tiny:slow", devices="cpu:2")
    helper.join()
    assert_same(store, scan(images, tmp_path / "whole", network="tiny:slow").path)


def test_a_network_of_a_script_needs_no_guard(photos: Path, tmp_path: Path) -> None:
    """What is defined in a script or a notebook reaches the workers; the script is not run a second time."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import torch
import maxact
from maxact.preprocess import Preprocess

print("once")

class Mine(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.preprocess = Preprocess(resize=32, crop=(32, 32))

    def forward(self, images):
        return self.conv(images)

torch.manual_seed(0)
network = Mine()
settings = {{"batch": 4, "shard": 8, "threads": 1, "top": 3}}
stores = [maxact.scan(network, {str(photos)!r}, f"{{devices}}.zarr", devices=devices, **settings)
          for devices in ("cpu", "cpu:1")]
assert stores[0]["conv"].top(0).equals(stores[1]["conv"].top(0))
""")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "once\n"), done.stderr


@pytest.fixture(autouse=True)
def no_process_stays() -> Iterator[None]:
    yield
    assert not children()


def test_other_threads_give_the_same_winners_but_for_near_ties(photos: Path, tmp_path: Path) -> None:
    """Sums may be taken in another order, so scores may differ by rounding; images may only change places where their
    scores differ by no more than that, or drop out where they are last."""
    one = scan(photos, tmp_path / "one", devices="cpu:2", threads=1)
    other = scan(photos, tmp_path / "other", devices="cpu", threads=2)
    for tap in one:
        for key, mine in one[tap].lists.items():
            theirs = other[tap].lists[key]
            np.testing.assert_allclose(mine.score, theirs.score, rtol=1e-5, atol=1e-6)
            for channel in range(len(mine.image)):
                ranks = {image: rank for rank, image in enumerate(theirs.image[channel].tolist())}
                for rank, image in enumerate(mine.image[channel].tolist()):
                    near = theirs.score[channel, ranks.get(image, -1)]
                    np.testing.assert_allclose(mine.score[channel, rank], near, rtol=1e-5, atol=1e-6)
                    if mine.position is not None and theirs.position is not None and image in ranks:
                        assert (mine.position[channel, rank] == theirs.position[channel, ranks[image]]).all()


def test_an_interrupt_while_workers_start_is_quiet(photos: Path, tmp_path: Path) -> None:
    """It goes to all processes of the terminal, as Ctrl-C does; they are importing what they need."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import maxact
from maxact.process import Interrupted
try:
    maxact.scan("tiny:slow", {str(photos)!r}, {str(tmp_path / "x")!r}, devices="cpu:2")
except Interrupted as error:
    print(error)
"""
    driver = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with driver:
        children = Path(f"/proc/{driver.pid}/task/{driver.pid}/children")

        def import_torch() -> bool:
            pids = children.read_text().split()
            return len(pids) == 2 and all("libtorch" in Path(f"/proc/{pid}/maps").read_text() for pid in pids)

        wait_for(import_torch)
        os.killpg(driver.pid, signal.SIGINT)
        out, err = driver.communicate(timeout=60)
    assert out.startswith("stopped by SIGINT") and err == ""
