"""Runs in this process: the same arguments again, other ones, bad files, signals, places that cannot be written."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

import maxact
import tiny
from maxact import fetch, schedule
from maxact.errors import MaxactError, UsageError
from maxact.find import find_taps
from maxact.process import Interrupted, Progress
from maxact.store import Store
from stores import contents, interrupted, names, scan
from support import photograph


@pytest.fixture(autouse=True)
def commit_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "COMMIT_SECONDS", 0)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that cannot be read are tried again at once."""
    monkeypatch.setattr(fetch._again, "sleep", lambda seconds: None)


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """An undisturbed run."""
    return scan(photos, tmp_path_factory.mktemp("whole") / "x")


def after(images: int, act: Callable[[], object]) -> Callable[[Progress], None]:
    """A report that acts once so many images are through."""
    acted = []

    def report(progress: Progress) -> None:
        if progress.done >= images and not acted:
            acted.append(True)
            act()

    return report


def same(store: Path, other: Store) -> bool:
    found, wanted = contents(store), contents(other.path)
    assert found.keys() == wanted.keys()
    assert [name for name in found if found[name] != wanted[name]] == []
    return True


# The same again


def test_a_finished_run_is_not_scanned_again(
    whole: Store, photos: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    place = tmp_path / "x"
    shutil.copytree(whole.path, place)
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*") if "run" not in path.parts}
    with caplog.at_level(logging.INFO, "maxact"):
        store = scan(photos, place, report=lambda progress: pytest.fail("it was scanned again"))
    assert caplog.messages == [f"{place}: done already, 21 images"]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert repr(store["bn1"].lists) == repr(whole["bn1"].lists)


def test_an_interrupted_run_goes_on(
    whole: Store, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    interrupted(photos, tmp_path / "x")
    seen: list[Progress] = []
    with caplog.at_level(logging.INFO, "maxact"):
        scan(photos, tmp_path / "x", report=seen.append)
    first, last = seen[0], seen[-1]
    assert first.before == last.before > 0 and first.before % 4 == 0
    assert (last.total, last.before + last.done, last.bad, last.grey) == (21, 21, 0, 0)
    assert caplog.messages == [f"{tmp_path}/x: going on after {first.before} of 21 images"]
    assert same(tmp_path / "x", whole)
    assert names(tmp_path / "x" / "run") == {"lock", "log"}


@pytest.mark.parametrize("decoder", ["dali", "torchvision"])
def test_batch_shard_and_precision_that_are_left_out_are_those_of_the_store(
    photos: Path, tmp_path: Path, decoder: Any
) -> None:
    chosen: dict[str, Any] = {"batch": 3, "shard": 5, "precision": "bf16", "decoder": decoder}
    scan(photos, tmp_path / "x", **chosen)
    interrupted(photos, tmp_path / "y", **chosen)
    store = scan(photos, tmp_path / "y", batch=None, shard=None, decoder=decoder)
    assert (store.manifest.settings["batch"], store.manifest.settings["shard"]) == (3, 6)
    assert store.manifest.settings["precision"] == "bf16"
    assert same(tmp_path / "y", Store(tmp_path / "x"))


def test_the_catalog_is_frozen(whole: Store, photos: Path, tmp_path: Path) -> None:
    """What came into the folder since is not in it, and what changed since is bad."""
    shutil.copytree(photos, tmp_path / "photos")
    interrupted(tmp_path / "photos", tmp_path / "x", 9)
    photograph(99).save(tmp_path / "photos" / "aaa.jpg")
    last = Path(os.fsdecode(Store(tmp_path / "x").catalog.entry(20).source))
    last.write_bytes(last.read_bytes() + b"\0")
    store = scan(tmp_path / "photos", tmp_path / "x")
    assert store.catalog.table["key"].to_pylist() == whole.catalog.table["key"].to_pylist()
    (error,) = store.errors().to_pylist()
    assert (error["image"], error["stage"]) == (20, "read")
    assert error["error"].startswith("changed: ")


# Other arguments


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"top": 6}, r"top: 5, not 6"),
        ({"bottom": 1}, r"bottom: 0, not 1"),
        ({"batch": 4}, r"batch: 2, not 4"),
        ({"shard": 6}, r"shard: 4, not 6"),
        ({"precision": "bf16"}, r"precision: fp32, not bf16"),
        ({"score": ("mean",)}, r'scores: \["max"\], not \["mean"\]'),
        ({"layers": ("fc",)}, r'layers: \[\], not \["fc"\]'),
        ({"at": "module"}, r"at: norm, not module"),
        ({"crop": 24}, r"crop: \[32, 32\], not \[24, 24\]"),
        ({"limit": 20}, r"limit: null, not 20"),
        ({"skip_grey": True}, r"skip_grey: false, not true"),
        ({"decoder": "torchvision", "top": 6}, r"top: 5, not 6; decoder: dali, not torchvision"),
        ({"network": "tiny:slow"}, r"name: tiny:network, not tiny:slow"),
    ],
)
def test_another_scan_is_refused_and_says_why(settings: dict[str, Any], named: str, whole: Store, photos: Path) -> None:
    before = contents(whole.path)
    with pytest.raises(MaxactError) as caught:
        scan(photos, whole.path, **settings)
    assert str(caught.value).startswith(f"{whole.path}: was made otherwise (")
    assert str(caught.value).endswith("); give the same arguments, another store, or --overwrite")
    assert "\n" not in str(caught.value)
    assert re.search(named, str(caught.value))
    assert contents(whole.path) == before


def test_other_weights_and_images_are_refused(whole: Store, photos: Path, tmp_path: Path) -> None:
    network = tiny.network()
    network.fc.bias.data[0] += 1  # type: ignore[union-attr, operator, index]
    safetensors.torch.save_file(network.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(MaxactError, match=r"sha256: [0-9a-f]{57}\.\.\., not [0-9a-f]{57}\.\.\."):
        scan(photos, whole.path, weights=tmp_path / "w.safetensors")
    with pytest.raises(MaxactError, match=rf"source: .*photos0, not .*{photos.name}/coffee; count: 21, not 3|source: "):
        scan(photos / "coffee", whole.path)


# Places


def test_overwrite_starts_again(whole: Store, photos: Path, tmp_path: Path) -> None:
    store = scan(photos / "coffee", tmp_path / "x", layers=("bn*",), score=("mean",), at="module")
    assert store.manifest.summary and store.manifest.summary["images"] == 3
    scan(photos, tmp_path / "x", overwrite=True)
    assert same(tmp_path / "x", whole)
    scan(photos, tmp_path / "y", overwrite=True)  # nothing is there to overwrite
    assert same(tmp_path / "y", whole)


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_store_is_left_alone(photos: Path, tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    before = contents(tmp_path)
    with pytest.raises(MaxactError, match=r"folder: there is something else here; choose another place for the store$"):
        scan(photos, tmp_path / "folder", overwrite=overwrite)
    with pytest.raises(MaxactError, match=r"file: is a file, not a folder; choose another place for the store$"):
        scan(photos, tmp_path / "file", overwrite=overwrite)
    assert contents(tmp_path) == before


def test_missing_parents_are_made(photos: Path, tmp_path: Path) -> None:
    assert scan(photos, tmp_path / "a" / "b" / "x", limit=2).manifest.finished


@contextmanager
def nobody() -> Iterator[None]:
    """As a user without rights, where the tests run as root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_places_that_cannot_be_written(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(MaxactError) as caught:
        scan(photos, tmp_path / "file" / "x")
    assert str(caught.value) == (
        f"{tmp_path}/file/x: cannot be written (Not a directory); make its folder first, or choose another place"
    )
    with pytest.raises(MaxactError, match=r"^/proc/x/y: cannot be written \("):
        scan(photos, Path("/proc/x/y"))


def test_a_folder_without_rights(photos: Path) -> None:
    place = Path("/tmp") / f"maxact-rights-{os.getpid()}"  # pytest's own folders are closed to other users
    place.mkdir(mode=0o755)
    shutil.copytree(photos, place / "photos")
    (place / "photos").chmod(0o755)
    (place / "closed").mkdir(mode=0o555)
    try:
        with nobody(), pytest.raises(MaxactError, match=r"closed/x: cannot be written \(Permission denied\)"):
            scan(place / "photos", place / "closed" / "x")
        assert names(place / "closed") == set()
    finally:
        shutil.rmtree(place)


def test_mistakes_leave_nothing_behind(photos: Path, tmp_path: Path) -> None:
    mistakes: list[tuple[dict[str, Any], type[MaxactError]]] = [
        ({"top": 0}, UsageError),
        ({"network": "tiny:missing"}, UsageError),
        ({"devices": "cuda:77"}, UsageError),
        ({"layers": ("bn9",)}, MaxactError),
        ({"images": tmp_path / "missing"}, MaxactError),
        ({"where": ("giraffe",)}, MaxactError),
    ]
    for settings, kind in mistakes:
        with pytest.raises(kind) as caught:
            scan(**({"images": photos, "store": tmp_path / "x"} | settings))
        assert "\n" not in str(caught.value)
        assert names(tmp_path) == set()


# Bad files


def spoil(folder: Path, *stems: str) -> None:
    """Cuts some photographs in half."""
    for stem in stems:
        (path,) = folder.rglob(f"{stem}.jpg")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("decoder", ["dali", "torchvision"])
def test_bad_files_cost_only_themselves(photos: Path, tmp_path: Path, decoder: Any) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    spoil(tmp_path / "photos", "005", "010")
    seen: list[Progress] = []
    store = scan(tmp_path / "photos", tmp_path / "x", decoder=decoder, report=seen.append, top=25)
    keys = store.catalog.table["key"].to_pylist()
    errors = store.errors().to_pylist()
    assert [error["key"] for error in errors] == sorted(key for key in keys if "005" in key or "010" in key)
    assert all(keys[error["image"]] == error["key"] and error["stage"] == "decode" for error in errors)
    assert all("truncated" in error["error"] for error in errors)
    assert store.manifest.summary == {"images": 21, "scanned": 19, "bad": 2, "grey": 0}
    assert seen[-1].bad == 2 and seen[-1].done == 21
    good = scan(photos, tmp_path / "good", decoder=decoder, top=25)
    gone = [error["image"] for error in errors]
    for name in store:
        image, score, _ = store[name].lists["max", "top"]
        ours, theirs = good[name].lists["max", "top"][:2]
        for channel in range(len(image)):
            kept = ~np.isin(ours[channel, :21], gone)
            assert image[channel, :19].tolist() == ours[channel, :21][kept].tolist()
            assert score[channel, :19].tobytes() == theirs[channel, :21][kept].tobytes()
        assert (image[:, 19:] == -1).all()


def test_too_many_bad_files_stop_the_run(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    spoil(tmp_path / "photos", "000", "007", "004", "006", "013")  # 000, 007: the first shard; 006, 013: of "brick"
    with pytest.raises(MaxactError) as caught:
        scan(tmp_path / "photos", tmp_path / "x", max_bad=3)
    text = str(caught.value)
    assert text.startswith("4 images are bad, more than the 3 that --max-bad allows (") and "\n" not in text
    assert text.count("truncated") == 3 and caught.value.exit_code == 1
    done = Store(tmp_path / "x").state()
    assert done is not None and 0 < len(done.shards) < 6
    with pytest.raises(MaxactError, match=r"images are bad, more than the 3 that --max-bad allows"):
        scan(tmp_path / "photos", tmp_path / "x", max_bad=3)
    seen: list[Progress] = []
    store = scan(tmp_path / "photos", tmp_path / "x", max_bad=5, report=seen.append)
    assert seen[0].before == sum(4 for _ in done.shards)
    assert seen[-1].bad == 5
    assert len(store.errors()) == 5
    scan(tmp_path / "photos", tmp_path / "y")  # ten are borne by default
    assert same(tmp_path / "x", Store(tmp_path / "y"))


def test_errors_are_tried_again(photos: Path, tmp_path: Path) -> None:
    """Files that were missing for a while, and came back as they were."""
    moved = tmp_path / "photos"
    shutil.copytree(photos, moved)
    other = scan(moved, tmp_path / "undisturbed")
    interrupted(moved, tmp_path / "x", 1)
    away = [next(moved.rglob(f"{stem}.jpg")) for stem in ("003", "020")]
    for path in away:
        path.rename(tmp_path / path.name)
    store = scan(moved, tmp_path / "x", max_bad=2)
    assert sorted(store.errors()["stage"].to_pylist()) == ["read", "read"]
    assert any((store.path / "run").glob("state-*"))
    for path in away:
        (tmp_path / path.name).rename(path)
    assert scan(moved, tmp_path / "x").errors().num_rows == 2  # not unless it is said
    seen: list[Progress] = []
    store = scan(moved, tmp_path / "x", retry_errors=True, report=seen.append)
    assert store.errors().num_rows == 0
    assert sum(progress.done - (seen[i - 1].done if i else 0) for i, progress in enumerate(seen)) == 8
    assert same(tmp_path / "x", other)
    assert names(store.path / "run") == {"lock", "log"}
    assert scan(moved, tmp_path / "x", retry_errors=True).manifest.finished  # there is nothing more to try


class Flaky(Dataset[Any]):
    """Pictures of which some fail the first times."""

    def __init__(self, failures: dict[int, int], count: int = 12) -> None:
        self.failures = failures
        self.pictures = [photograph(number) for number in range(count)]
        self.targets = [number % 3 for number in range(count)]
        self.classes = ["cat", "dog", "owl"]

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if self.failures.get(index, 0):
            self.failures[index] -= 1
            raise RuntimeError("the database\nhas gone")
        return self.pictures[index], self.targets[index]


def test_a_dataset_with_passing_errors(tmp_path: Path) -> None:
    undisturbed = scan(Flaky({}), tmp_path / "x")
    assert undisturbed.catalog.table["label"].to_pylist()[:4] == ["cat", "dog", "owl", "cat"]
    dataset = Flaky({2: 1, 9: 2}, 12)
    store = scan(dataset, tmp_path / "y", shard=12)
    assert store.errors().to_pylist() == [
        {"image": number, "key": f"item/{number}", "stage": "read", "error": "the database has gone"}
        for number in (2, 9)
    ]
    assert scan(dataset, tmp_path / "y", shard=12, retry_errors=True).errors()["image"].to_pylist() == [9]
    store = scan(dataset, tmp_path / "y", shard=12, retry_errors=True)
    assert store.errors().num_rows == 0
    for name in store:
        assert repr(store[name].lists) == repr(undisturbed[name].lists)


def test_another_dataset_is_refused(tmp_path: Path) -> None:
    scan(Flaky({}), tmp_path / "x")
    with pytest.raises(
        MaxactError, match=r"source: sha256 \w{16}: test_run\.Flaky of 12, not .* test_run\.Flaky of 11"
    ):
        scan(Flaky({}, 11), tmp_path / "x")
    other = Flaky({})
    other.targets[3] += 1
    with pytest.raises(MaxactError, match=r"source: sha256 \w{16}: test_run\.Flaky of 12, not sha256 \w{16}: test"):
        scan(other, tmp_path / "x")
    assert scan(Flaky({}), tmp_path / "x").manifest.finished


@pytest.mark.parametrize("name", ["samples", "imgs"])
def test_a_dataset_of_other_files_is_refused(name: str, tmp_path: Path) -> None:
    def make(file: str) -> Flaky:
        dataset = Flaky({}, 4)
        setattr(dataset, name, [(f"/a/{number}.jpg", 0, object()) for number in range(3)] + [(file, 0, object())])
        return dataset

    scan(make("/a/3.jpg"), tmp_path / "x")
    assert scan(make("/a/3.jpg"), tmp_path / "x").manifest.finished
    with pytest.raises(MaxactError, match=r"source: sha256 \w{16}: test_run\.Flaky of 4, not sha256 \w{16}: test"):
        scan(make("/b/3.jpg"), tmp_path / "x")


def test_many_paths_are_kept_as_a_hash(photos: Path, tmp_path: Path) -> None:
    paths = sorted(photos.rglob("*.jpg"))
    few = scan(paths[:20], tmp_path / "few")
    assert few.manifest.images["source"] == [str(path) for path in paths[:20]]
    store = scan(paths, tmp_path / "many")
    assert re.fullmatch(r"21 paths, sha256 \w{16}", store.manifest.images["source"])
    assert scan(paths, tmp_path / "many").manifest.finished
    with pytest.raises(MaxactError, match=r"source: 21 paths, sha256 \w{16}, not 21 paths, sha256 \w{16}"):
        scan(paths[::-1], tmp_path / "many")


def test_text_is_one_item_and_what_comes_twice_counts_once(photos: Path, tmp_path: Path) -> None:
    store = scan(photos, tmp_path / "x", where="co*", layers="bn*", score="mean")
    assert list(store) == ["bn1", "bn2"] and len(store.catalog) == 3
    again = scan(photos, tmp_path / "x", where=["co*"] * 2, layers=("bn*", "bn*"), score=("mean", "mean"))
    assert again.manifest == store.manifest
    twice = scan(photos, tmp_path / "y", limit=2, layers=("fc", "bn*", "fc"), score=("mean", "max", "mean"))
    assert twice.manifest.settings["layers"] == ["fc", "bn*"]
    assert twice.manifest.settings["scores"] == ["mean", "max"]


def test_storage_that_goes_away(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The run pauses, and goes on when it is back; or stops, and the same again goes on."""
    moved = tmp_path / "photos"
    shutil.copytree(photos, moved)
    other = scan(moved, tmp_path / "undisturbed")
    interrupted(moved, tmp_path / "x", 9)
    shutil.copytree(tmp_path / "x", tmp_path / "y")
    moved.rename(tmp_path / "away")
    monkeypatch.setattr(schedule.Schedule.run, "__defaults__", ((0.01, 0.01),))
    with pytest.raises(MaxactError) as caught:
        scan(moved, tmp_path / "x")
    assert "images from " in str(caught.value) and "No such file or directory (ENOENT)" in str(caught.value)
    assert str(caught.value).endswith("see that the disk is there, then run the same again")
    assert len([record for record in caplog.records if "(trying again in 0 s)" in record.getMessage()]) == 2

    monkeypatch.setattr(schedule.Schedule.run, "__defaults__", ((0.5,),))
    back = threading.Timer(0.3, lambda: (tmp_path / "away").rename(moved))
    back.start()
    seen: list[Progress] = []
    for name in ("x", "y"):
        scan(moved, tmp_path / name, report=seen.append)
        back.join()
        assert same(tmp_path / name, other)
        assert seen[-1].before + seen[-1].done == 21  # nothing counts twice


def test_grey_pictures_are_left_out(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    for stem in ("001", "012"):
        (path,) = (tmp_path / "photos").rglob(f"{stem}.jpg")
        with Image.open(path) as picture:
            grey = picture.convert("L").convert("RGB")
        grey.save(path)
    seen: list[Progress] = []
    interrupted(tmp_path / "photos", tmp_path / "x", 9, skip_grey=True)
    store = scan(tmp_path / "photos", tmp_path / "x", skip_grey=True, report=seen.append)
    grey_ones = {number for number in range(21) if any(s in store.catalog.entry(number).key for s in ("001", "012"))}
    brick = {number for number in range(21) if store.catalog.entry(number).label == "brick"}  # it has no colour
    assert store.manifest.summary == {"images": 21, "scanned": 16, "bad": 0, "grey": len(grey_ones | brick)}
    assert seen[-1].grey == 5
    assert not (grey_ones | brick) & set(store["bn1"].lists["max", "top"][0].ravel().tolist())


# Reading an unfinished store


def test_an_unfinished_store_shows_its_last_commit(photos: Path, tmp_path: Path) -> None:
    interrupted(photos, tmp_path / "x", 13)
    store = maxact.open(tmp_path / "x")
    state = store.state()
    assert state is not None
    seen = set(store["bn1"].lists["max", "top"][0].ravel().tolist())
    assert seen <= {number for shard in state.shards for number in range(4 * shard, 4 * shard + 4)}
    assert store["bn1"].top(0).num_rows == 5
    assert store["bn1"].stats["count"][0] == 4 * len(state.shards) * 32 * 32
    assert store.input(3).shape == (3, 32, 32)


# Signals, threads, messages


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_commit_what_is_finished(signum: signal.Signals, whole: Store, photos: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signum)
    with pytest.raises(Interrupted) as caught:
        scan(photos, tmp_path / "x", report=after(10, lambda: os.kill(os.getpid(), signum)))
    assert caught.value.exit_code == 128 + signum
    state = Store(tmp_path / "x").state()
    assert state is not None and 8 <= 4 * len(state.shards) < 21
    assert str(caught.value) == (
        f"stopped by {signum.name}: {4 * len(state.shards)} of 21 images are committed; "
        "run the same again (without --overwrite) to go on"
    )
    assert signal.getsignal(signum) is before
    scan(photos, tmp_path / "x")
    assert same(tmp_path / "x", whole)


def test_the_second_signal_ends_it_at_once(photos: Path, tmp_path: Path) -> None:
    def twice() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        scan(photos, tmp_path / "x", report=after(17, twice))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert Store(tmp_path / "x").state() is not None


def test_it_runs_outside_the_main_thread(whole: Store, photos: Path, tmp_path: Path) -> None:
    thread = threading.Thread(target=scan, args=(photos, tmp_path / "x"))
    thread.start()
    thread.join()
    assert same(tmp_path / "x", whole)


def test_the_log_of_a_run(photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("maxact")
    level, handlers = logger.level, list(logger.handlers)
    logger.setLevel(logging.INFO)
    try:
        interrupted(photos, tmp_path / "x")
        scan(photos, tmp_path / "x")
        with pytest.raises(MaxactError):
            scan(photos, tmp_path / "x", top=6)
    finally:
        logger.setLevel(level)
    assert logger.handlers == handlers
    lines = (tmp_path / "x" / "run" / "log").read_text().splitlines()
    messages = [line.split(" ", 2)[2] for line in lines]  # after day and time
    assert messages[0].startswith("tiny:network (weights as tiny:network returns them), 3 taps with 18 channels, 21 im")
    assert messages[1] == "KeyboardInterrupt()"
    assert messages[2].startswith(f"{tmp_path}/x: going on after ")
    assert messages[3].startswith(f"{tmp_path}/x: was made otherwise (top: 5, not 6)")
    assert len(messages) == 4
    assert capfd.readouterr() == ("", "")  # from Python, nothing is said


def test_warnings_are_seen_where_nobody_set_logging_up(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger("maxact"), "propagate", False)  # pytest has handlers of its own at the root
    network = tiny.network()
    network.fc.weight.data[0] = torch.nan  # type: ignore[union-attr, operator, index]
    scan(photos, tmp_path / "x", network, limit=2)
    message = "fc: 2 maps with NaN or infinity were left out\n"
    assert capfd.readouterr() == ("", message)
    assert (tmp_path / "x" / "run" / "log").read_text().endswith(message)


def test_find_taps() -> None:
    from maxact.models import load_model

    found = find_taps(load_model("tiny:network"), ("conv*",), "module")
    assert [(tap.name, tap.map) for tap in found.taps] == [("conv1", (32, 32)), ("conv2", (16, 16))]


def test_a_module_of_the_user_s(whole: Store, photos: Path, tmp_path: Path) -> None:
    network = tiny.network()
    threads = torch.get_num_threads()
    store = scan(photos, tmp_path / "x", network)
    assert repr(store["fc"].lists) == repr(whole["fc"].lists)
    assert store.manifest.model["name"] == "Tiny" and store.manifest.model["weights"] == "as given"
    assert not any(module._forward_hooks for module in network.modules())
    assert torch.get_num_threads() == threads
    assert isinstance(network, nn.Module) and not network.training
