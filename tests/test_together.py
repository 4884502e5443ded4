"""Several networks over one decoding: each store is that of a scan of its own, whatever happens on the way."""

from __future__ import annotations

import logging
import os
import random
import re
import shutil
import signal
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

import maxact
import several
from maxact import fetch, schedule
from maxact.catalog import Catalog, Shard
from maxact.errors import MaxactError, UsageError
from maxact.models import load_model
from maxact.partial import BadImage, Partial, Tally
from maxact.process import Interrupted, Progress
from maxact.run import store_path
from maxact.scan import running
from maxact.store import Store
from maxact.together import Parts
from maxact_kernels.peaks import Peaks
from stores import ARGUMENTS, SETTINGS, Child, command, contents, scan, wait_for
from support import make_job, photograph

NAMES = ("several:first", "several:second", "several:third")
BOTH: dict[str, Any] = {"score": ("max", "mean"), "bottom": 3}
LIVES = 100  # more than any run here can need


@pytest.fixture(autouse=True)
def commit_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "COMMIT_SECONDS", 0)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that cannot be read are tried again at once."""
    monkeypatch.setattr(fetch._again, "sleep", lambda seconds: None)


def together(images: object, folder: Path, names: Any = NAMES, **options: Any) -> tuple[Store, ...]:
    return maxact.scan_together(names, images, folder, **(SETTINGS | options))


def alone(images: object, folder: Path, names: Any = NAMES, **options: Any) -> Path:
    """A scan for each network, of which stores of scans together must not differ."""
    for name in names:
        scan(images, store_path(folder, name), name, **options)
    return folder


def assert_same(folder: Path, other: Path) -> None:
    found, wanted = contents(folder), contents(other)
    found, wanted = ({name: each[name] for name in each if "/run/" not in name} for each in (found, wanted))
    assert found.keys() == wanted.keys()
    assert [name for name in found if found[name] != wanted[name]] == []


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Undisturbed scans of each network."""
    return alone(photos, tmp_path_factory.mktemp("whole"), **BOTH)


class Stop(Exception):
    pass


def after(images: int, act: Callable[[], object]) -> Callable[[Progress], None]:
    """A report that acts once so many images are through."""
    acted = []

    def report(progress: Progress) -> None:
        if progress.done >= images and not acted:
            acted.append(True)
            act()

    return report


def stop() -> None:
    raise Stop


def spoil(folder: Path, *stems: str) -> None:
    """Cuts some photographs in half."""
    for stem in stems:
        (path,) = folder.rglob(f"{stem}.jpg")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# What it gives


@pytest.mark.parametrize("decoder", ["dali", "torchvision"])
def test_each_store_is_that_of_a_scan_alone(decoder: Any, photos: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    stores = together(photos, tmp_path / "x", decoder=decoder, report=seen.append, **BOTH)
    assert [store.path for store in stores] == [tmp_path / "x" / f"{name}.zarr" for name in NAMES]
    assert_same(tmp_path / "x", alone(photos, tmp_path / "y", decoder=decoder, **BOTH))
    assert [progress.done for progress in seen] == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 21]


@pytest.mark.parametrize(
    "options",
    [{"layers": "bn1"}, {"skip_grey": True}, {"at": "module", "top": 30}, {"precision": "bf16"}, {"limit": 5}],
)
def test_settings_are_for_all_of_them(options: dict[str, Any], photos: Path, tmp_path: Path) -> None:
    stores = together(photos, tmp_path / "x", **options)
    assert_same(tmp_path / "x", alone(photos, tmp_path / "y", **options))
    for name in ("layers", "skip_grey"):
        if name in options:
            values = {str(store.manifest.settings[name]) for store in stores}
            assert len(values) == 1 and values != {str(None)}
    if "skip_grey" in options:
        assert {(store.manifest.summary or {})["grey"] for store in stores} == {3}  # the bricks


def test_a_preprocessing_for_all_of_them(photos: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"resize": 20, "crop": (16, 18), "fit": "pad"}  # filled with the mean: two decodings
    together(photos, tmp_path / "x", **options)
    assert_same(tmp_path / "x", alone(photos, tmp_path / "y", **options))


def test_how_often_an_image_is_decoded_is_said(photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "maxact"):
        together(photos, tmp_path / "x")
        together(photos, tmp_path / "y", NAMES[:2])
    said = [record.getMessage() for record in caplog.records if "decoded" in record.getMessage()]
    assert said == [
        "every image is decoded 2 times, for they want other pixels: several:first, several:second (resize 32, "
        "crop [32, 32], interpolation bilinear); several:third (resize 40, crop [24, 28], interpolation bicubic)",
        "every image is decoded once for all of them",
    ]


def test_the_readme_s_networks_share_their_decoding() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    found = set(re.findall(r"maxact scan (\w+(?:,\w+)+) ", readme))
    assert found
    for names in found:
        ways = {load_model(name, weights="none").preprocess.without_normalisation() for name in names.split(",")}
        assert len(ways) == 1, names


def test_two_checkpoints_of_one_network(photos: Path, tmp_path: Path) -> None:
    networks = [several.First().eval() for _ in range(2)]
    for number, network in enumerate(networks):
        torch.save(network.state_dict(), tmp_path / f"{number}.pth")
    files = ",".join(f"{tmp_path}/{number}.pth" for number in range(2))
    names = "old=several:first,new=several:first"
    done = command("scan", names, photos, tmp_path / "x", *ARGUMENTS, "--weights", files)
    assert done.wait() == 0
    together(photos, tmp_path / "y", {"old": NAMES[0], "new": NAMES[0]}, weights=files.split(","))
    assert_same(tmp_path / "x", tmp_path / "y")
    for name, number in (("old", 0), ("new", 1)):
        scan(photos, tmp_path / "z" / f"{name}.zarr", NAMES[0], weights=tmp_path / f"{number}.pth")
    assert_same(tmp_path / "x", tmp_path / "z")


def test_nothing_is_overwritten_where_one_cannot_be(photos: Path, tmp_path: Path) -> None:
    together(photos, tmp_path / "x", NAMES[:2])
    (store_path(tmp_path / "x", NAMES[1]) / "thesis.tex").write_text("of the user")
    before = contents(tmp_path)
    with pytest.raises(MaxactError, match=r"thesis\.tex is not the store's"):
        together(photos, tmp_path / "x", NAMES[:2], overwrite=True)
    assert {name: each for name, each in contents(tmp_path).items() if "/run/" not in name} == {
        name: each for name, each in before.items() if "/run/" not in name
    }


def test_a_store_is_no_folder_for_stores(photos: Path, tmp_path: Path) -> None:
    scan(photos, tmp_path / "x", NAMES[0])
    before = contents(tmp_path)
    with pytest.raises(MaxactError, match="x: is a store itself; the stores of several networks go into a folder"):
        together(photos, tmp_path / "x")
    assert contents(tmp_path) == before


def test_weights_for_each_of_them(photos: Path, tmp_path: Path) -> None:
    torch.save(several.First().state_dict(), tmp_path / "first.pth")
    weights = [tmp_path / "first.pth", None]
    stores = together(photos, tmp_path / "x", NAMES[:2], weights=weights)
    assert stores[0].manifest.model["weights"] == f"file {tmp_path}/first.pth"
    for name, own in zip(NAMES, weights, strict=False):
        scan(photos, store_path(tmp_path / "y", name), name, weights=own)
    assert_same(tmp_path / "x", tmp_path / "y")


class Bold(several.First):
    """Named after its class."""


def test_modules_of_the_user_s(photos: Path, tmp_path: Path) -> None:
    networks = [Bold(), several.Second(), "several:third"]
    stores = together(photos, tmp_path / "x", networks)
    assert [store.path.name for store in stores] == ["Bold.zarr", "Second.zarr", "several:third.zarr"]
    assert_same(tmp_path / "x", alone(photos, tmp_path / "y", networks))
    hooks = [
        module._forward_hooks for network in networks if isinstance(network, nn.Module) for module in network.modules()
    ]
    assert not any(hooks)


def test_one_network_alone(whole: Path, photos: Path, tmp_path: Path) -> None:
    together(photos, tmp_path, NAMES[:1], **BOTH)
    assert_same(tmp_path / "several:first.zarr", whole / "several:first.zarr")


# Reading and decoding


class Counted(Dataset[Any]):
    """Pictures that note which of them were asked for; some fail so many times."""

    def __init__(self, count: int = 12, failures: dict[int, int] | None = None) -> None:
        self.pictures = [photograph(number) for number in range(count)]
        self.failures = failures or {}
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Image.Image:
        self.asked.append(index)
        if self.failures.get(index, 0):
            self.failures[index] -= 1
            raise RuntimeError("the database\nhas gone")
        return self.pictures[index]


def test_every_image_is_read_once(tmp_path: Path) -> None:
    dataset = Counted()
    together(dataset, tmp_path / "x")
    assert sorted(dataset.asked) == list(range(12))
    assert_same(tmp_path / "x", alone(Counted(), tmp_path / "y"))


def test_decoded_once_where_only_the_normalisation_differs(photos: Path, tmp_path: Path) -> None:
    """A preprocess function, whose calls are counted, is part of the decoding."""
    several.calls.clear()
    together(photos, tmp_path / "x", NAMES[:2], preprocess="several:counted")
    assert len(several.calls) == 21
    assert_same(tmp_path / "x", alone(photos, tmp_path / "y", NAMES[:2], preprocess="several:counted"))


@pytest.mark.parametrize("decoder", ["dali", "torchvision"])
def test_networks_share_what_they_can_share(decoder: Any, photos: Path) -> None:
    catalog = Catalog.build(photos)
    networks = [several.third(), several.first(), several.Third(), several.second()]
    jobs = [
        make_job(network, catalog, preprocess=network.preprocess, decoder=decoder)  # type: ignore[arg-type]
        for network in networks
    ]
    with running(jobs, iter(catalog.shards(8))) as (loaded, taps):
        assert [decoding for decoding, _ in taps] == [0, 1, 0, 1]
        for batches in loaded:
            assert [tuple(batch.images.shape) for batch in batches] == [(4, 24, 28, 3), (4, 32, 32, 3)]
            assert len({(batch.shard, batch.numbers.tobytes(), batch.ends_shard) for batch in batches}) == 1


# Runs that are cut short


def ended(child: Child) -> bool:
    return child.process.exitcode is not None


def test_killed_at_random_moments(photos: Path, in_memory: Path) -> None:
    names = ("several:slow", "several:slow_third")
    folder, draw, code, killed = in_memory / "x", random.Random(5), -1, 0
    for life in range(LIVES):
        child = command("scan", ",".join(names), photos, folder, *ARGUMENTS)
        batches = draw.randint(1, 2 + life)
        wait_for(lambda child=child, batches=batches: ended(child) or child.so_far().count("img/s") >= batches)
        child.process.join(draw.uniform(0, 0.1))
        child.kill()
        code = child.wait()
        if code == 0:
            break
        assert code == -signal.SIGKILL, child.err
        killed += 1
    assert code == 0 and killed >= 2
    assert_same(folder, alone(photos, in_memory / "y", names))


def test_killed_at_every_step(whole: Path, photos: Path, in_memory: Path, step: int = 101) -> None:
    """One life after the other is killed when it renames, syncs or deletes a file, each some times later than the one
    before."""
    code = -1
    arguments = (*ARGUMENTS, "--score", "max", "--score", "mean", "--bottom", "3")
    for life in range(LIVES):
        child = command("scan", ",".join(NAMES[:2]), photos, in_memory, *arguments, dies_at=1 + life * step)
        code = child.wait()
        if code == 0:
            break
        assert code == -signal.SIGKILL, child.err
    assert code == 0 and life >= 2
    for name in NAMES[:2]:
        assert_same(store_path(in_memory, name), store_path(whole, name))


@pytest.mark.parametrize("count", [0, 5, 13, 21])
def test_one_store_is_ahead(count: int, whole: Path, photos: Path, tmp_path: Path) -> None:
    """So many images of one network were scanned before, alone; and of another, fewer."""
    for name, images in ((NAMES[1], count), (NAMES[2], count // 2)):
        if images == 21:
            scan(photos, store_path(tmp_path, name), name, **BOTH)
        elif images:
            with pytest.raises(Stop):
                scan(photos, store_path(tmp_path, name), name, report=after(images, stop), **BOTH)
    seen: list[Progress] = []
    together(photos, tmp_path, report=seen.append, **BOTH)
    assert seen[0].before == 0 and seen[-1].done == 21  # the first network lacks everything
    assert_same(tmp_path, whole)


def test_what_a_store_has_is_not_read_again_for_it_alone(tmp_path: Path) -> None:
    for name in NAMES:
        with pytest.raises(Stop):
            scan(Counted(), store_path(tmp_path / "x", name), name, report=after(9, stop))
    counts = [len(state.shards) for store in NAMES if (state := Store(store_path(tmp_path / "x", store)).state())]
    assert len(counts) == 3 and min(counts) >= 1
    dataset = Counted()
    together(dataset, tmp_path / "x")
    assert sorted(dataset.asked) == list(range(4 * min(counts), 12))
    assert_same(tmp_path / "x", alone(Counted(), tmp_path / "y"))


def test_together_alone_and_together_again(whole: Path, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        together(photos, tmp_path, report=after(7, stop), **BOTH)
    with pytest.raises(Stop):
        scan(photos, store_path(tmp_path, NAMES[1]), NAMES[1], report=after(5, stop), **BOTH)
    scan(photos, store_path(tmp_path, NAMES[2]), NAMES[2], **BOTH)
    with pytest.raises(Stop):
        together(photos, tmp_path, [NAMES[1], NAMES[0]], report=after(5, stop), **BOTH)  # in another order
    together(photos, tmp_path, **BOTH)
    assert_same(tmp_path, whole)


def test_a_finished_run_is_not_scanned_again(
    whole: Path, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(whole, tmp_path / "x")
    with caplog.at_level(logging.INFO, "maxact"):
        stores = together(photos, tmp_path / "x", report=lambda progress: stop(), **BOTH)
    assert caplog.messages == [f"{store.path}: done already, 21 images" for store in stores]
    assert_same(tmp_path / "x", whole)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_commit_what_is_finished(signum: signal.Signals, whole: Path, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted) as caught:
        together(photos, tmp_path, report=after(10, lambda: os.kill(os.getpid(), signum)), **BOTH)
    assert caught.value.exit_code == 128 + signum
    states = [Store(store_path(tmp_path, name)).state() for name in NAMES]
    counts = {len(state.shards) for state in states if state}
    assert None not in states and len(counts) == 1
    assert str(caught.value) == (
        f"stopped by {signum.name}: {4 * counts.pop()} of 21 images are committed; "
        "run the same again (without --overwrite) to go on"
    )
    scan(photos, store_path(tmp_path, NAMES[0]), NAMES[0], **BOTH)
    together(photos, tmp_path, **BOTH)
    assert_same(tmp_path, whole)


def test_the_command_line(photos: Path, in_memory: Path) -> None:
    names = ("several:slow", "several:slow_third")
    arguments = ("scan", ",".join(names), photos, in_memory / "x", *ARGUMENTS)
    child = command(*arguments, seconds=1000)  # nothing is committed before the signal
    wait_for(lambda: " 10 of 21 images" in child.so_far())
    child.kill(signal.SIGINT)
    assert child.wait() == 130
    assert child.out == "" and "Traceback" not in child.err
    assert "stopped by SIGINT: " in child.err.splitlines()[-1]
    again = command(*arguments)
    assert again.wait() == 0, again.err
    assert "going on after" in again.err
    paths = [store_path(in_memory / "x", name) for name in names]
    assert [line.split(": ")[0] for line in again.out.splitlines()] == [
        ":".join(str(path).split(": ")) for path in paths
    ]
    assert all(f"`maxact info {path}`" in again.out for path in paths)
    assert_same(in_memory / "x", alone(photos, in_memory / "y", names))
    for words, code, said in (
        (("several:first,several:first",), 2, "networks: expected different names"),
        (("=several:first,several:second",), 2, "networks: expected NAME=MODEL, got '=several:first'"),
        (
            ("several:first,several:second,several:third", "--weights", "none,none"),
            2,
            "weights: expected one or 3, got 2",
        ),
    ):
        model, *rest = words
        wrong = command("scan", model, photos, in_memory / "z", *rest)
        assert wrong.wait() == code
        assert said in wrong.err and len(wrong.err.splitlines()) == 1
    assert not (in_memory / "z").exists()


# Bad images


@pytest.mark.parametrize("decoder", ["dali", "torchvision"])
def test_bad_files_are_bad_for_all_of_them(decoder: Any, photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    spoil(tmp_path / "photos", "005", "010")
    seen: list[Progress] = []
    stores = together(tmp_path / "photos", tmp_path / "x", decoder=decoder, report=seen.append)
    assert seen[-1].bad == 2
    assert [store.errors().num_rows for store in stores] == [2, 2, 2]
    assert_same(tmp_path / "x", alone(tmp_path / "photos", tmp_path / "y", decoder=decoder))


def test_each_bad_image_counts_once(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    spoil(tmp_path / "photos", "000", "007", "013")
    together(tmp_path / "photos", tmp_path / "x", max_bad=3)
    with pytest.raises(MaxactError, match="3 images are bad, more than the 2 that --max-bad allows"):
        together(tmp_path / "photos", tmp_path / "y", max_bad=2)
    together(tmp_path / "photos", tmp_path / "y", max_bad=3)
    assert_same(tmp_path / "y", tmp_path / "x")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("count", [5, 13])
def test_bad_files_in_shards_that_one_store_has(count: int, photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    images = tmp_path / "photos"
    spoil(images, *(path.stem for path in sorted(images.rglob("*.jpg"))[3:20:8]))
    with pytest.raises(Stop):
        scan(images, store_path(tmp_path / "x", NAMES[0]), NAMES[0], report=after(count, stop))
    together(images, tmp_path / "x")
    assert_same(tmp_path / "x", alone(images, tmp_path / "y"))


@pytest.mark.timeout(20)
def test_errors_are_tried_again(tmp_path: Path) -> None:
    """Some are errors of one store, some of two, and some have not gone yet."""
    undisturbed = alone(Counted(16), tmp_path / "y", shard=4)
    dataset = Counted(16, {2: 1, 9: 2, 13: 4})
    first, others = NAMES[0], NAMES[1:]
    scan(dataset, store_path(tmp_path / "x", first), first)
    together(dataset, tmp_path / "x", others)

    def errors() -> list[list[int]]:
        stores = [Store(store_path(tmp_path / "x", name)) for name in NAMES]
        return [store.errors()["image"].to_pylist() for store in stores]

    assert errors() == [[2, 9, 13], [9, 13], [9, 13]]
    dataset.asked.clear()
    together(dataset, tmp_path / "x", retry_errors=True)
    assert errors() == [[13]] * 3
    assert sorted(dataset.asked) == [*range(4), *range(8, 16)]
    together(dataset, tmp_path / "x", retry_errors=True)
    assert errors() == [[13]] * 3
    together(dataset, tmp_path / "x", retry_errors=True)
    assert errors() == [[]] * 3
    for name in NAMES:
        store, other = Store(store_path(tmp_path / "x", name)), Store(store_path(undisturbed, name))
        for tap in other:
            assert repr(store[tap].lists) == repr(other[tap].lists)
            assert {key: np.asarray(value).tobytes() for key, value in store[tap].stats.items()} == {
                key: np.asarray(value).tobytes() for key, value in other[tap].stats.items()
            }


# What is refused


def test_mistakes_leave_nothing_behind(photos: Path, tmp_path: Path) -> None:
    for names, options, said in (
        ([NAMES[0], NAMES[0]], {}, "networks: expected different names"),
        ([several.First(), several.First()], {}, "networks: expected different names"),
        (NAMES, {"weights": [None, None]}, "weights: expected one or 3, got 2"),
        ([], {}, "networks: "),
        ([NAMES[0], "several:fourth"], {}, "several has no fourth"),
        (NAMES[:2], {"layers": "conv9"}, "conv9"),
    ):
        with pytest.raises(UsageError, match=said) as caught:
            together(photos, tmp_path / "x", names, **options)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match=r"scan_together\(\) got an unexpected keyword argument 'tops'"):
        together(photos, tmp_path / "x", tops=3)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "own, said",
    [
        ({"batch": 3, "shard": 3}, "batches or shards"),
        ({"shard": 6}, "batches or shards"),
        ({"limit": 20}, "images"),
        ({"sample": 21, "limit": 20}, "images"),
    ],
)
def test_stores_that_do_not_go_together(own: dict[str, Any], said: str, photos: Path, tmp_path: Path) -> None:
    scan(photos, store_path(tmp_path, NAMES[0]), NAMES[0])
    scan(photos, store_path(tmp_path, NAMES[1]), NAMES[1], **own)
    with pytest.raises(MaxactError) as caught:
        together(photos, tmp_path, NAMES[:2], batch=None, shard=None)
    first, second = (store_path(tmp_path, name) for name in NAMES[:2])
    assert str(caught.value) == f"{second}: has other {said} than {first}; scan these networks apart"


def test_a_store_of_another_scan_is_refused(photos: Path, tmp_path: Path) -> None:
    place = store_path(tmp_path, NAMES[1])
    scan(photos, place, NAMES[1], top=4)
    before = contents(place)
    with pytest.raises(MaxactError, match=r"several:second.zarr: was made otherwise \(top: 4, not 5\)"):
        together(photos, tmp_path)
    assert contents(place) == before
    assert not any(Store.exists(store_path(tmp_path, name)) for name in (NAMES[0], NAMES[2]))


def test_a_store_that_is_in_use(photos: Path, tmp_path: Path) -> None:
    place = store_path(tmp_path, NAMES[1])
    place.mkdir()
    with Store.lock(place), pytest.raises(MaxactError, match=r"several:second.zarr: in use by process"):
        together(photos, tmp_path)
    assert all(store.manifest.finished for store in together(photos, tmp_path))  # the other locks are free


def test_overwrite_starts_all_of_them_again(whole: Path, photos: Path, tmp_path: Path) -> None:
    together(photos, tmp_path, NAMES[:2], top=4, batch=3, limit=9)
    together(photos, tmp_path, overwrite=True, **BOTH)
    assert_same(tmp_path, whole)


# Parts


def partial(shard: int, seed: int, bad: bool, grey: int) -> Partial:
    """What a shard of two batches of two might give."""
    draw = np.random.default_rng([shard, seed])
    tally = Tally(Shard(shard, 4 * shard, 4 * shard + 4), 3, {("max", "top"): 3})
    for start in (4 * shard, 4 * shard + 2):
        values = [draw.integers(0, 9, (2, 3)).astype(kind) for kind in ("f4", "i4", "f4", "f4", "f4", "i4")]
        tally.add(Peaks(*values), np.arange(start, start + 2))
    image = BadImage(4 * shard, f"{shard}.jpg", "decode", "truncated")
    return tally.close([image] if bad else [], grey)


def bits(part: Partial | None) -> object:
    if part is None:
        return None
    tops = {key: [array.tobytes() for array in vars(top).values()] for key, top in part.tops.items()}
    total = [array.tobytes() for array in vars(part.total()).values()]
    return part.shards, tops, total, part.bad, sorted(part.grey.items()), sorted(part.held)


SHARDS, NETWORKS = 6, 3
some = st.lists(st.tuples(*[st.booleans()] * NETWORKS), min_size=1, max_size=SHARDS)


def pieces(has: list[tuple[bool, ...]]) -> list[Parts]:
    """What every shard gave those networks that lacked it."""
    return [
        Parts(tuple(partial(shard, n, shard % 3 == n, shard % 2) if there else None for n, there in enumerate(each)))
        for shard, each in enumerate(has)
    ]


@settings(deadline=None, max_examples=50)
@given(some, st.randoms(use_true_random=False))
def test_parts_merge_in_any_order(has: list[tuple[bool, ...]], random: random.Random) -> None:
    parts = pieces(has)
    merged = reduce(Parts.merge, parts)
    shuffled = list(parts)
    random.shuffle(shuffled)
    while len(shuffled) > 1:  # along any tree
        left = shuffled.pop(random.randrange(len(shuffled)))
        index = random.randrange(len(shuffled))
        shuffled[index] = left.merge(shuffled[index])
    assert [bits(each) for each in shuffled[0].each] == [bits(each) for each in merged.each]
    for n in range(NETWORKS):
        own = [each for part in parts if (each := part.each[n])]
        assert bits(merged.each[n]) == bits(reduce(Partial.merge, own) if own else None)
    assert merged.shards == {shard for shard, each in enumerate(has) if all(each)}
    assert merged.held == {shard for shard, each in enumerate(has) if shard % 3 < NETWORKS and each[shard % 3]}
    assert [bad.image for bad in merged.bad] == [4 * shard for shard in sorted(merged.held)]
    assert merged.grey == {shard: 1 for shard, each in enumerate(has) if any(each) and shard % 2}


@settings(deadline=None, max_examples=50)
@given(some, st.data())
def test_what_a_network_has_stays_as_it_was(has: list[tuple[bool, ...]], data: st.DataObject) -> None:
    merged = reduce(Parts.merge, pieces(has))
    shard = data.draw(st.integers(0, len(has) - 1))
    again = merged.merge(Parts(tuple(partial(shard, 10 + n, True, 2) for n in range(NETWORKS))))
    for n, there in enumerate(has[shard]):
        if there:
            assert again.each[n] is merged.each[n]
        else:
            assert shard in again.each[n].shards  # type: ignore[union-attr]
    assert shard in again.shards


@settings(deadline=None, max_examples=50)
@given(some, st.data())
def test_a_shard_can_be_taken_out_where_it_is_held(has: list[tuple[bool, ...]], data: st.DataObject) -> None:
    parts = pieces(has)
    merged = reduce(Parts.merge, parts)
    index = data.draw(st.integers(0, len(has) - 1))
    less = merged.without(Shard(index, 4 * index, 4 * index + 4))
    for n in range(NETWORKS):
        held = has[index][n] and index % 3 == n
        assert held or less.each[n] is merged.each[n]
        if held:
            assert index not in less.each[n].shards and index not in less.held  # type: ignore[union-attr]
    restored = less.merge(parts[index])
    assert restored.shards == merged.shards and restored.bad == merged.bad and restored.held == merged.held
    totals = [
        [part and [a.tobytes() for a in vars(part.total()).values()] for part in each.each]
        for each in (restored, merged)
    ]
    assert totals[0] == totals[1]
