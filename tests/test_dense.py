"""Every image's value of every channel: against a forward pass of its own, through kills and full disks, and read back
by Zarr itself, xarray, DuckDB, pandas and Polars."""

from __future__ import annotations

import logging
import pickle
import shutil
import signal
import threading
from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pandas
import polars
import pyarrow.parquet as pq
import pytest
import torch
import xarray
import zarr
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

import maxact
import tiny
from maxact import schedule
from maxact.dense import Grid, Target, file_name, place
from maxact.errors import MaxactError, UsageError
from maxact.export import export_pooled
from maxact.info import describe
from maxact.pooled import create, disk_bytes
from maxact.run import store_path
from maxact.store import Store
from maxact.tap import Tap
from maxact.together import Scanning
from stores import ARGUMENTS, SETTINGS, command, contents, interrupted, names, scan, wait_for
from support import all_maps, cut_short, make_job, pixels, same, scan_job

TAPS = {"bn1": 6, "bn2": 7, "fc": 5}
SMALL = tiny.Tiny().preprocess


@pytest.fixture(scope="module")
def images(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photographs, two of them bad and one grey, as those of bricks are."""
    folder = tmp_path_factory.mktemp("images") / "photos"
    shutil.copytree(photos, folder)
    cut_short(folder, "005", "010")
    (path,) = folder.rglob("003.jpg")
    with Image.open(path) as picture:
        picture.convert("L").save(path, quality=92)
    return folder


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return scan(images, tmp_path_factory.mktemp("whole") / "x", pooled="max")


def reference(folder: Path, keys: list[str], kind: str) -> dict[str, np.ndarray]:
    """The values of some images, float32 [N, C], from a plain forward pass of a network of its own."""
    maps = all_maps(tiny.network(), pixels([folder / key for key in keys], SMALL), same(*TAPS), 2, SMALL)
    return {name: values.max(2) if kind == "max" else values.mean(2) for name, values in maps.items()}


@pytest.mark.parametrize("kind", ["max", "mean"])
def test_values(kind: str, images: Path, tmp_path: Path) -> None:
    store = scan(images, tmp_path / "x", pooled=kind, skip_grey=True, decoder="torchvision")
    keys = store.catalog.table["key"].to_pylist()
    left_out = [number for number, key in enumerate(keys) if "brick" in key or Path(key).stem in ("005", "010", "003")]
    there = np.setdiff1d(np.arange(21), left_out)
    wanted = reference(images, [keys[number] for number in there], kind)
    for name, channels in TAPS.items():
        pooled = store.pooled(name)
        values = pooled[:]
        assert (pooled.shape, len(pooled), pooled.kind) == ((21, channels), 21, kind)
        assert values.dtype == np.float16 and values.shape == (21, channels)
        assert np.isnan(values[left_out]).all()
        np.testing.assert_allclose(values[there], wanted[name], rtol=2**-11, atol=1e-5)
        for a, b, c, d in ((0, 0, 0, 1), (3, 9, 1, 4), (20, 30, 0, channels), (-3, None, 2, None), (5, 4, 0, 1)):
            assert np.array_equal(pooled[a:b, c:d], values[a:b, c:d], equal_nan=True)
            assert np.array_equal(pooled[a:b], values[a:b], equal_nan=True)
        assert values[there].astype(np.float32).std(0).min() > 0  # it is no constant that was compared


def test_they_are_the_scores_of_the_lists(whole: Store) -> None:
    """And nothing else of the store differs from that of a scan without them."""
    for name in TAPS:
        values, (image, score, _) = whole.pooled(name)[:], whole[name].lists["max", "top"]
        expected = score.astype(np.float16)
        assert np.array_equal(np.take_along_axis(values.T, image, 1), expected)


def test_the_rest_of_the_store_is_the_same(whole: Store, images: Path, tmp_path: Path) -> None:
    plain = contents(scan(images, tmp_path / "x").path)
    found = {name: value for name, value in contents(whole.path).items() if not name.startswith("pooled/")}
    assert found.keys() == plain.keys()
    assert [name for name in found if name != "zarr.json" and found[name] != plain[name]] == []


def test_zarr_s_own_files(tmp_path: Path) -> None:
    """Zarr reads what was written here, and writes the same bytes (but for the order of chunks that lie side by
    side)."""
    draw = np.random.default_rng(0)
    parts = {"narrow": slice(0, 3), "wide": slice(3, 2103)}
    taps = [Tap(name, name, 0, name, "Conv2d", len(range(2103)[part]), (1, 1), 1) for name, part in parts.items()]
    values = draw.normal(0, 100, (2548, 2103)).astype(np.float16)
    values[7] = np.nan
    theirs = zarr.create_group(tmp_path / "theirs")
    for group in (zarr.create_group(tmp_path / "ours"), theirs):
        create(group, taps, "max", 2548, 2048)
    for shard, rows in enumerate((slice(0, 2048), slice(2048, 2548))):
        Target(tmp_path / "ours", "max", taps, 2548, 2048).write(shard, values[rows])
        for name, part in parts.items():
            theirs[place(name, "max")][rows] = values[rows, part]  # type: ignore[index]
    for name, part in parts.items():
        array = zarr.open_array(tmp_path / "ours" / place(name, "max"), mode="r")
        assert np.array_equal(array[:], values[:, part], equal_nan=True)  # type: ignore[arg-type]
        for shard in range(2):
            ours, other = (tmp_path / who / place(name, "max") / file_name(shard) for who in ("ours", "theirs"))
            assert name == "wide" or ours.read_bytes() == other.read_bytes()
            assert ours.stat().st_size == other.stat().st_size
        assert names(ours.parent) == {"zarr.json", "c.0.0", "c.1.0"}


@given(st.integers(1, 20_000), st.integers(1, 30_000))
def test_chunks(images: int, channels: int) -> None:
    grid = Grid(images, channels)
    assert images % grid.rows == 0 and grid.rows >= min(images, 1024)
    assert 0 <= grid.columns * grid.across - channels < grid.columns  # no chunk is empty
    assert grid.rows * grid.columns * 2 <= max(1 << 19, 2 * grid.rows)


def test_usual_chunks() -> None:
    assert [(grid.rows, grid.columns, grid.across) for grid in (Grid(4096, 2048), Grid(4100, 25088), Grid(4, 6))] == [
        (1024, 256, 8),
        (1025, 254, 99),
        (4, 6, 1),
    ]


def test_a_value_that_float16_cannot_hold(photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            nn.init.zeros_(self.conv.weight)
            self.conv.bias.data[:] = torch.tensor([65504.0, 65520.0, -1e9, torch.nan])  # type: ignore[union-attr]

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.conv(images)
            return result

    with caplog.at_level(logging.WARNING):
        store = scan(photos, tmp_path / "x", Large(), limit=9, crop=16, pooled="max")
    assert np.array_equal(store.pooled("conv")[2:4], [[65504, np.inf, -np.inf, np.nan]] * 2, equal_nan=True)
    told = [record.message for record in caplog.records if "float16" in record.message]
    assert told == ["conv: 8 values in shard 0 are beyond float16 and infinite in pooled"]  # once, not for each shard


def test_a_job_can_be_sent_away(whole: Store, tmp_path: Path) -> None:
    """All that another process needs to write a shard is in the job; it writes that shard's files and no other."""
    job = make_job(tiny.network(), whole.catalog, preprocess=SMALL, batch=2, shard=4, pooled="max", threads=1)
    job = replace(job, settings=replace(job.settings, decoder=whole.manifest.settings["decoder"]))
    create(zarr.create_group(tmp_path / "x"), job.taps, "max", 21, 4)
    job = pickle.loads(pickle.dumps(replace(job, store=tmp_path / "x")))
    (shard,) = job.catalog.shards(4)[3:4]
    (partial,) = scan_job(job, iter([shard]), threading.Event(), lambda tick: None)
    assert partial.shards == {3}
    for name in TAPS:
        folder = tmp_path / "x" / place(name, "max")
        assert names(folder) == {"zarr.json", "c.3.0"}
        assert (folder / "c.3.0").read_bytes() == (whole.path / place(name, "max") / "c.3.0").read_bytes()


# Runs that are cut short


def assert_same(store: Path, whole: Store) -> None:
    found, wanted = contents(store), contents(whole.path)
    assert found.keys() == wanted.keys()
    assert [name for name in found if found[name] != wanted[name]] == []


def committed(store: Path, whole: Store) -> frozenset[int]:
    """The shards that a store has; their values are there, and no others."""
    if not Store.exists(store) or not (state := Store(store).state()):
        return frozenset()
    rows = np.isin(np.arange(21) // 4, list(state.shards))
    for name in TAPS:
        values = Store(store).pooled(name)[:]
        assert np.array_equal(values[rows], whole.pooled(name)[:][rows], equal_nan=True)
        assert Store(store).manifest.finished or np.isnan(values[~rows]).all()
    return state.shards


def test_killed(whole: Store, images: Path, in_memory: Path) -> None:
    """At three moments at which some files of values are there, then when it renames, syncs or deletes a file."""
    store, before = in_memory / "x", frozenset[int]()
    arguments = ("scan", "tiny:network", images, store, *ARGUMENTS, "--pooled", "max")
    for files, dies_at in ((4, None), (0, 31), (8, None), (0, 53)):
        child = command(*arguments, dies_at=dies_at)
        if dies_at is None:
            wait_for(lambda: len(list(store.glob("pooled/*/*/c.*"))) >= files)  # noqa: B023 (called at once)
            child.kill()
        assert child.wait() == -signal.SIGKILL, child.err
        after = committed(store, whole)
        assert before <= after  # what was committed stays
        before = after
    assert not Store(store).manifest.finished
    (store / "pooled" / "fc" / "max" / ".c.3.0.abc.part").write_text("half of one")
    scan(images, store, pooled="max")
    assert_same(store, whole)  # and nothing is left of writes that were cut short


def test_other_settings_and_starting_again(whole: Store, images: Path, tmp_path: Path) -> None:
    store = tmp_path / "x"
    shutil.copytree(whole.path, store)
    for other in (None, "mean"):
        with pytest.raises(MaxactError, match=r"was made otherwise \(pooled: max, not"):
            scan(images, store, pooled=other)
    assert scan(images, store, pooled="max").manifest.finished
    scan(images, store, pooled="mean", overwrite=True)
    assert names(store / "pooled" / "fc") == {"zarr.json", "mean"}
    scan(images, store, overwrite=True)
    assert not (store / "pooled").exists()
    with pytest.raises(MaxactError, match="was scanned without --pooled"):
        Store(store).pooled("fc")
    with pytest.raises(MaxactError, match="has no tap 'fd'"):
        whole.pooled("fd")
    with pytest.raises(UsageError, match="pooled: expected max or mean, got 'min'"):
        scan(images, store, pooled="min")


def test_errors_are_tried_again(whole: Store, images: Path, tmp_path: Path) -> None:
    """The shard of a file that was missing for a while, and came back, is written again."""
    folder, store = tmp_path / "photos", tmp_path / "x"
    shutil.copytree(images, folder)

    def stop(progress: maxact.Progress) -> None:
        raise KeyboardInterrupt

    undisturbed = scan(folder, tmp_path / "undisturbed", pooled="max")
    with pytest.raises(KeyboardInterrupt):
        scan(folder, store, pooled="max", report=stop)
    (path,) = folder.rglob("002.jpg")
    (number,) = (n for n, key in enumerate(whole.catalog.table["key"].to_pylist()) if path.stem in key)
    path.rename(tmp_path / path.name)
    lacking = scan(folder, store, pooled="max")
    assert len(lacking.bad_in_scan()) == 3 and np.isnan(lacking.pooled("fc")[number : number + 1]).all()
    (tmp_path / path.name).rename(path)
    scan(folder, store, pooled="max", retry_errors=True)
    assert_same(store, undisturbed)
    assert np.isfinite(Store(store).pooled("fc")[number : number + 1]).all()


def test_a_shard_that_became_worse_keeps_its_values(whole: Store, images: Path, tmp_path: Path) -> None:
    """One image of it has come back and another is gone, so its result does not count (`Schedule`)."""
    folder, store = tmp_path / "photos", tmp_path / "x"
    shutil.copytree(images, folder)
    keys = whole.catalog.table["key"].to_pylist()
    spoilt = {image.image // 4 for image in whole.bad_in_scan()}
    first = 4 * next(shard for shard in range(5) if shard not in spoilt)
    one, other = folder / keys[first], folder / keys[first + 1]

    def stop(progress: maxact.Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan(folder, store, pooled="max", report=stop)
    one.rename(tmp_path / "away")
    scan(folder, store, pooled="max")
    before = contents(store)
    (tmp_path / "away").rename(one)
    other.rename(tmp_path / "away")
    retried = scan(folder, store, pooled="max", retry_errors=True)
    assert [image.image for image in retried.bad_in_scan() if image.image // 4 not in spoilt] == [first]
    after = contents(store)
    assert [name for name in before if after[name] != before[name]] == []
    for name in TAPS:
        values = retried.pooled(name)[first : first + 4]
        assert np.isnan(values[0]).all()
        assert np.array_equal(values[1:], whole.pooled(name)[first + 1 : first + 4])
    (tmp_path / "away").rename(other)
    mended = scan(folder, store, pooled="max", retry_errors=True)
    assert np.array_equal(mended.pooled("fc")[:], whole.pooled("fc")[:], equal_nan=True)


class Coming(Dataset[Image.Image]):
    """Pictures that differ, of which some cannot be had the first time, or ever."""

    def __init__(self) -> None:
        self.bad: set[int] = set()

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> Image.Image:
        if index in self.bad:
            raise ValueError("not yet")
        return Image.new("RGB", (70, 70), (20 * index, 255 - 20 * index, 90))


def test_errors_of_one_store_whose_shard_the_other_lacks(tmp_path: Path) -> None:
    """What the other one counts for the first time is written whatever is bad in it."""
    both, dataset = ("tiny:network", "tiny:slow"), Coming()
    settings = SETTINGS | {"pooled": "max"}
    dataset.bad = {1}
    maxact.scan(both[0], dataset, store_path(tmp_path, both[0]), **settings)
    dataset.bad = {2}
    stores = maxact.scan_together(both, dataset, tmp_path, retry_errors=True, **settings)
    assert [[image.image for image in store.bad_in_scan()] for store in stores] == [[1], [2]]
    good = maxact.scan(both[0], Coming(), tmp_path / "good", **settings).pooled("fc")[:]
    for store, bad in zip(stores, (1, 2), strict=True):
        for name in TAPS:
            assert np.flatnonzero(np.isnan(store.pooled(name)[:]).any(1)).tolist() == [bad]
    rest = np.arange(9) != 1
    assert np.array_equal(stores[0].pooled("fc")[:][rest], good[rest])


def test_a_store_that_a_worker_does_not_see(whole: Store, tmp_path: Path) -> None:
    job = make_job(tiny.network(), whole.catalog, preprocess=SMALL, batch=2, shard=4, pooled="max", threads=1)
    for store in (None, whole.path):
        Scanning((replace(job, store=store),), (frozenset(),), ({},)).look()
    with pytest.raises(MaxactError, match="x: is not there; with --pooled the store must be on a file system that"):
        Scanning((job, replace(job, store=tmp_path / "x")), (frozenset(),) * 2, ({},) * 2).look()


def test_a_store_that_lacks_a_file(whole: Store, images: Path, tmp_path: Path) -> None:
    store = tmp_path / "x"
    shutil.copytree(whole.path, store)
    path = store / place("bn2", "max") / "c.2.0"
    data = path.read_bytes()
    for damage in (None, b"", data[:-9], data[:30] + bytes(20) + data[50:]):
        path.unlink() if damage is None else path.write_bytes(damage)
        pooled = Store(store).pooled("bn2")
        assert np.isfinite(pooled[:4]).all()
        with pytest.raises(MaxactError, match="x/pooled/bn2/max: is missing or damaged; scan again with --overwrite"):
            pooled[7:9]
    shutil.rmtree(store / "pooled" / "fc")
    with pytest.raises(MaxactError, match="x/pooled: the values of fc are gone; scan again with --overwrite"):
        scan(images, store, pooled="max")


def test_what_can_be_asked_for(whole: Store) -> None:
    pooled = whole.pooled("fc")
    assert repr(pooled) == "<maxact.Pooled 'fc': max, 21 images, 5 channels>"
    for key in (3, (slice(2), 1), slice(0, 9, 2), [1, 2], (slice(2), slice(2), slice(2))):
        with pytest.raises(IndexError, match=r"fc: expected \[a:b\] or \[a:b, c:d\]"):
            pooled[key]  # type: ignore[index]


class Many(Dataset[Image.Image]):
    """Hundreds of thousands of pictures."""

    def __len__(self) -> int:
        return 300_000

    def __getitem__(self, index: int) -> Image.Image:
        return Image.new("RGB", (8, 8))


def test_too_little_room(tmp_path: Path) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 4_000_000)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.fc(images.mean((2, 3)))
            return result

    with pytest.raises(MaxactError) as caught:
        scan(Many(), tmp_path / "x", Wide(), resize=8, crop=8, pooled="max")
    text = str(caught.value)
    assert text.startswith(f"{tmp_path}/x: the pooled values of the images to scan take up to 2400.0 GB and ")
    assert text.endswith("make room, choose fewer --layers or leave --pooled out") and "\n" not in text
    assert not Store.exists(tmp_path / "x")


def test_too_little_room_for_one_of_two(tmp_path: Path) -> None:
    class Narrow(nn.Module):
        def __init__(self, channels: int = 2) -> None:
            super().__init__()
            self.fc = nn.Linear(3, channels)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.fc(images.mean((2, 3)))
            return result

    class Wide(Narrow):
        def __init__(self) -> None:
            super().__init__(4_000_000)

    with pytest.raises(MaxactError) as caught:
        maxact.scan_together([Narrow(), Wide()], Many(), tmp_path, resize=8, crop=8, pooled="max")
    said = "the pooled values of the images to scan, and those of the other networks, take up to 2400.0 GB and "
    assert str(caught.value).startswith(f"{tmp_path}/Wide.zarr: {said}")


def test_room_that_is_written_again(
    whole: Store, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of shards that were written and not committed make room for themselves."""

    store = tmp_path / "x"
    interrupted(images, store, pooled="max")
    left = set(range(6)) - committed(store, whole)
    folders = [store / place(name, "max") for name in TAPS]
    for file in [folder / file_name(shard) for folder in folders for shard in left]:
        file.unlink(missing_ok=True)
    full = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(MaxactError, match="x: the pooled values of the images to scan take up to"):
        scan(images, store, pooled="max")
    for name, folder in zip(TAPS, folders, strict=True):
        for shard in left:
            shutil.copy(whole.path / place(name, "max") / file_name(shard), folder)
    assert disk_bytes(store, left) == sum(path.stat().st_size for shard in left for path in store.rglob(f"c.{shard}.0"))
    scan(images, store, pooled="max")
    assert_same(store, whole)


def test_a_disk_that_fills_up(whole: Store, images: Path, in_memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here: the folder of a tap is gone, and a file has its name."""
    monkeypatch.setattr(schedule, "COMMIT_SECONDS", 0)
    store = in_memory / "x"
    folder, moved = store / place("bn2", "max"), in_memory / "moved"

    def report(progress: maxact.Progress) -> None:
        if not moved.exists() and list(store.glob("run/state-*")):
            folder.rename(moved)
            folder.write_text("")

    with pytest.raises(MaxactError) as caught:
        scan(images, store, pooled="max", report=report)
    assert str(caught.value) == (
        f"{store}: cannot be written (Not a directory); the pooled values of all images take up to 756 B; "
        "make room there and run the same again (without --overwrite) to go on"
    )
    folder.unlink()
    moved.rename(folder)
    assert 0 < len(committed(store, whole)) < 6
    scan(images, store, pooled="max")
    assert_same(store, whole)


def test_two_networks(images: Path, whole: Store, tmp_path: Path) -> None:
    both = ("tiny:network", "tiny:slow")
    stores = maxact.scan_together(both, images, tmp_path, **(SETTINGS | {"pooled": "max"}))
    assert [store.path for store in stores] == [store_path(tmp_path, name) for name in both]
    assert_same(stores[0].path, whole)
    for name in TAPS:
        assert np.array_equal(stores[1].pooled(name)[:], whole.pooled(name)[:], equal_nan=True)


# What it is read with


def test_xarray(whole: Store) -> None:
    with xarray.open_datatree(whole.path, engine="zarr", consolidated=True) as tree:
        for name, channels in TAPS.items():
            values = tree[f"pooled/{name}/max"]
            assert values.sizes == {"image": 21, "channel": channels} and values.dtype == np.float16
            assert np.array_equal(values.values, whole.pooled(name)[:], equal_nan=True)
        assert tree["bn1/max/top/score"].sizes == {"channel": 6, "rank": 5}


def test_info(whole: Store, finished: Store) -> None:
    about = describe(whole)["pooled"]
    files = list((whole.path / "pooled").rglob("c.*"))
    assert about == {
        "value": "max",
        "images": 21,
        "without_value": round(2 / 21, 6),
        "bytes": sum(path.stat().st_size for path in files),
        "uncompressed": 21 * 18 * 2,
    }
    assert len(files) == 18 and about["bytes"] > 0
    assert describe(finished)["pooled"] == "not kept (maxact scan --pooled)"


def test_export(whole: Store, tmp_path: Path) -> None:
    out = tmp_path / "out"
    told: list[tuple[int, int]] = []
    assert export_pooled(whole, out, report=lambda done, total: told.append((done, total))) == 19
    assert told == [(done, 18) for done in range(1, 19)]
    assert names(out) == {"images.parquet", "tap=bn1", "tap=bn2", "tap=fc"}
    assert names(out / "tap=fc") == {f"part-{shard:05}.parquet" for shard in range(6)}
    values = whole.pooled("bn2")[:]
    frame = pandas.read_parquet(out / "tap=bn2").sort_values("image")
    assert frame["image"].tolist() == list(range(21)) and frame["c0"].dtype == np.float16
    assert np.array_equal(frame[[f"c{channel}" for channel in range(7)]].to_numpy(), values, equal_nan=True)
    table = polars.read_parquet(out / "tap=bn2" / "*.parquet").sort("image")
    assert table["c6"].null_count() == 2 and table["c6"].dtype == polars.Float16
    assert np.array_equal(table["c6"].to_numpy(), values[:, 6], equal_nan=True)
    rows = duckdb.sql(
        f"select key, c3 from '{out}/tap=bn2/*.parquet' join '{out}/images.parquet' using (image) "
        "order by c3 desc nulls last, image limit 5"
    ).fetchall()
    assert [key for key, _ in rows] == whole["bn2"].top(3)["key"].to_pylist()
    (mean,) = duckdb.sql(f"select avg(c3), count(c3) from '{out}/tap=bn2/*.parquet'").fetchall()
    assert mean == (pytest.approx(np.nanmean(values[:, 3], dtype=np.float64)), 19)
    each = duckdb.sql(f"select tap, count(*) from read_parquet('{out}/*/*.parquet', union_by_name=true) group by tap")
    assert dict(each.fetchall()) == dict.fromkeys(TAPS, 21)


def test_export_goes_on(whole: Store, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export_pooled(whole, out, layers=["conv*"]) == 13  # by their layers, as elsewhere
    paths = sorted((out / "tap=bn2").iterdir())
    before = [path.stat().st_mtime_ns for path in paths]
    gone, kept = paths[1].read_bytes(), before[:1] + before[2:]
    paths[1].unlink()
    (out / ".part-00001.parquet.part").write_text("half of one")
    assert export_pooled(whole, out) == 19
    assert paths[1].read_bytes() == gone
    assert [path.stat().st_mtime_ns for path in paths if path != paths[1]] == kept
    other = scan(images, tmp_path / "other", pooled="mean")
    with pytest.raises(MaxactError, match="out: there is something else here"):
        export_pooled(other, out)
    (tmp_path / "file").write_text("")
    with pytest.raises(MaxactError, match="file: is not a folder"):
        export_pooled(whole, tmp_path / "file")
    with pytest.raises(MaxactError, match="there is something else here"):
        export_pooled(whole, images)


def test_export_of_another_scan_to_the_same_place(whole: Store, images: Path, tmp_path: Path) -> None:
    """Of the same network: with fewer images, other shards, or images of the same names that have changed."""
    out, moved = tmp_path / "out", tmp_path / "moved"
    assert export_pooled(whole, out, layers=["fc"]) == 7
    shutil.copytree(whole.path, moved)
    assert export_pooled(moved, out, layers=["conv*"]) == 13  # a copy is the same store
    pq.write_table(pq.read_table(moved / "images.parquet").replace_schema_metadata(), moved / "images.parquet")
    others = [
        moved,
        *(scan(images, tmp_path / str(n), pooled="max", **{n: v}) for n, v in (("limit", 20), ("shard", 6))),
    ]
    for other in others:
        with pytest.raises(MaxactError, match="out: there is something else here"):
            export_pooled(other, out)
    for note in (b"{", b"\xff", b"[" * 100_000):
        table = pq.read_table(out / "images.parquet").replace_schema_metadata({b"maxact": note})
        pq.write_table(table, out / "images.parquet")
        with pytest.raises(MaxactError, match=r"images\.parquet is damaged, or not what its name says") as caught:
            export_pooled(whole, out)
        assert "\n" not in str(caught.value)


def test_export_of_an_unfinished_store(images: Path, whole: Store, tmp_path: Path) -> None:
    interrupted(images, tmp_path / "x", pooled="max")
    store = Store(tmp_path / "x")
    done = committed(store.path, whole)
    assert 0 < len(done) < 6
    about = describe(store)["pooled"]
    assert about["images"] == 4 * len(done) and about["uncompressed"] == 4 * len(done) * 36
    assert export_pooled(store, tmp_path / "out") == 1 + 3 * len(done)
    scan(images, tmp_path / "x", pooled="max")
    assert export_pooled(store.path, tmp_path / "out") == 19
    values = pq.read_table(tmp_path / "out" / "tap=fc" / "part-00005.parquet")
    assert values["image"].to_pylist() == [20]


def test_the_command_line(images: Path, whole: Store, in_memory: Path) -> None:
    child = command("scan", "tiny:network", images, in_memory / "x", *ARGUMENTS, "--pooled", "max", "--quiet")
    assert child.wait() == 0 and child.err == ""
    assert_same(in_memory / "x", whole)
    child = command("export", in_memory / "x", in_memory / "out", "--pooled", "--layers", "fc", "--quiet")
    assert child.wait() == 0 and (child.out, child.err) == (f"{in_memory}/out: 7 files\n", "")
    child = command("export", in_memory / "x", in_memory / "out", "--layers", "fc")
    assert child.wait() == 2 and child.err == "maxact: --layers is for --pooled; give it, too\n"
