"""The store on disk: its schema, reading it with other tools, and what may lie where a store is to be."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import threading
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import xarray
import zarr
from torch import nn

import maxact
import tiny
from maxact.arrays import write_array
from maxact.errors import MaxactError
from maxact.field import Field
from maxact.fields import of_taps
from maxact.store import Store
from stores import contents, names, scan
from support import pixels
from tiny import SIDE, Tiny

TAPS = {
    "bn1": (6, [32, 32], "conv1", "Conv2d"),
    "bn2": (7, [16, 16], "conv2", "Conv2d"),
    "fc": (5, [1, 1], "fc", "Linear"),
}
FIELDS = {  # size, start, stride, by hand: 3 x 3, then another at every second place, then all of these
    "bn1": {"size": [3, 3], "start": [-1, -1], "stride": [1, 1]},
    "bn2": {"size": [5, 5], "start": [-2, -2], "stride": [2, 2]},
    "fc": {"size": [35, 35], "start": [-2, -2], "stride": [32, 32]},
}
STATS = {"count": "int64"} | dict.fromkeys(("mean", "std", "min", "max", "active"), "float32")


def arrays(path: Path) -> dict[str, zarr.Array[Any]]:
    """Every array of a store by its path."""
    group = zarr.open_group(path, mode="r")
    return {name: node for name, node in group.members(max_depth=None) if isinstance(node, zarr.Array)}


def expected(score: str, end: str, k: int, channels: int, name: str = "rank") -> dict[str, tuple[Any, ...]]:
    """Path, and shape, type, fill value and dimensions, of the arrays of one list."""
    lists = {
        "image": ((channels, k), "int64", -1, ("channel", name)),
        "score": ((channels, k), "float32", np.nan, ("channel", name)),
    }
    if score == "max":
        lists["position"] = ((channels, k, 2), "int32", -1, ("channel", name, "axis"))
    return {f"{score}/{end}/{array}": facts for array, facts in lists.items()}


def facts(array: zarr.Array[Any]) -> tuple[Any, ...]:
    return (array.shape, str(array.dtype), array.fill_value.item(), array.metadata.dimension_names)


def test_the_schema_is_the_design_s(finished: Store) -> None:
    wanted = {}
    for tap, (channels, shape, *_) in TAPS.items():
        lists: dict[str, tuple[Any, ...]] = {}
        for name, length in zip(("rows", "cols"), shape, strict=True):
            interval = ((length, 2), "int32", -1, (f"unit_{name}", "edge"))
            lists |= {f"field/{name}": interval, f"field/local_{name}": interval}
        for score in ("max", "mean"):
            lists |= expected(score, "top", 5, channels) | expected(score, "bottom", 3, channels)
        for name, kind in STATS.items():
            lists[f"stats/{name}"] = ((channels,), kind, 0 if name == "count" else np.nan, ("channel",))
        wanted |= {f"{tap}/{name}": value for name, value in lists.items()}
    found = {name: facts(array) for name, array in arrays(finished.path).items()}
    assert repr(sorted(found.items())) == repr(sorted(wanted.items()))  # repr: NaN is not equal to itself
    assert names(finished.path) == {"zarr.json", "images.parquet", "errors.parquet", "run", *TAPS}
    assert names(finished.path / "run") == {"lock", "log"}


def test_attributes(finished: Store, photos: Path) -> None:
    group = zarr.open_group(finished.path, mode="r")
    for tap, (channels, shape, layer, kind) in TAPS.items():
        attributes = {"kind": kind, "layer": layer, "channels": channels, "map": shape, "unfit": 0}
        attributes |= {"field": FIELDS[tap], "global": tap == "fc"}
        assert dict(group[tap].attrs) == attributes
    said = group.attrs["maxact"]
    assert isinstance(said, dict)
    assert set(said) == {
        *("format", "finished", "model", "preprocessing", "images", "settings", "taps", "versions"),
        *("summary", "projected"),
    }
    assert (said["format"], said["finished"], said["projected"]) == (1, True, None)
    assert said["summary"] == {"images": 21, "scanned": 21, "bad": 0, "grey": 0}
    assert said["model"]["name"] == "tiny:network"
    assert len(said["model"]["sha256"]) == 64
    assert said["preprocessing"]["crop"] == [32, 32]
    assert said["images"] == {
        "source": str(photos),
        "where": [],
        "sample": None,
        "seed": 0,
        "limit": None,
        "count": 21,
    }
    settings = {"scores": ["max", "mean"], "top": 5, "bottom": 3, "batch": 2, "shard": 4, "precision": "fp32"}
    assert settings.items() <= said["settings"].items()
    assert said["settings"]["decoder"] in ("dali", "torchvision")  # what "auto" was here
    assert {"maxact", "torch", "torchvision", "numpy", "zarr", "python", "device"} <= set(said["versions"])


def test_tables(finished: Store) -> None:
    images = pq.read_table(finished.path / "images.parquet")
    assert {field.name: str(field.type) for field in images.schema} == {
        "image": "int64",
        "key": "string",
        "label": "string",
        "source": "binary",
        "offset": "int64",
        "length": "int64",
        "modified": "int64",
    }
    assert images["image"].to_pylist() == list(range(21))
    assert images["label"][0].as_py() == "astronaut"
    errors = pq.read_table(finished.path / "errors.parquet")
    kinds = {"image": "int64", "key": "string", "stage": "string", "error": "string"}
    assert {field.name: str(field.type) for field in errors.schema} == kinds
    assert len(errors) == 0


def test_plain_zarr_reads_it(finished: Store) -> None:
    group = zarr.open_group(finished.path, mode="r", use_consolidated=True)
    image, score = group["bn2/max/top/image"], group["bn2/max/top/score"]
    assert isinstance(image, zarr.Array) and isinstance(score, zarr.Array)
    lists = finished["bn2"].lists["max", "top"]
    assert np.array_equal(np.asarray(image[:]), lists[0])
    assert np.array_equal(np.asarray(score[:]), lists[1])


def test_xarray_reads_it(finished: Store) -> None:
    """With every warning an error."""
    with xarray.open_datatree(finished.path, engine="zarr") as tree:
        assert set(tree.children) == set(TAPS)
        top = tree["bn1/max/top"]
        assert top.dims == {"channel": 6, "rank": 5, "axis": 2}
        assert np.array_equal(top["score"].values, finished["bn1"].lists["max", "top"][1])
        assert tree["fc/stats/mean"].dims == ("channel",)
        assert tree["bn1/mean/top/image"].dtype in (np.int64, np.float64)  # xarray turns a fill value into NaN


@pytest.fixture(scope="module")
def halves(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store of a 16-bit scan."""
    place = tmp_path_factory.mktemp("halves") / "store.zarr"
    return scan(photos, place, precision="bf16", score=("max", "mean"), bottom=2)


def test_a_16_bit_scan_keeps_candidates(halves: Store) -> None:
    found = {name: facts(array) for name, array in arrays(halves.path).items() if name.startswith("bn2/")}
    wanted: dict[str, tuple[Any, ...]] = {}
    for score in ("max", "mean"):
        for end, k in (("top", 5), ("bottom", 2)):
            wanted |= expected(score, end, k, 7)
            candidates = expected(score, f"{end}/candidates", k + 32, 7, "candidate")
            wanted |= candidates
    assert repr(sorted((n, f) for n, f in found.items() if not n.startswith(("bn2/stats", "bn2/field")))) == repr(
        sorted((f"bn2/{name}", value) for name, value in wanted.items())
    )
    for place, k in (("max/top", 5), ("mean/bottom", 2)):
        for name in ("image", "score"):
            shown, candidates = (arrays(halves.path)[f"bn2/{p}/{name}"][:] for p in (place, f"{place}/candidates"))
            assert np.array_equal(np.asarray(shown), np.asarray(candidates)[:, :k])
    with xarray.open_datatree(halves.path, engine="zarr", consolidated=True) as tree:
        assert tree["bn2/max/top/candidates/position"].sizes == {"channel": 7, "candidate": 37, "axis": 2}
    assert halves["bn2"].lists["max", "top"][0].shape == (7, 5)


def test_fewer_images_than_places(photos: Path, tmp_path: Path) -> None:
    store = scan(photos, tmp_path / "x", limit=3)
    image, score, position = store["bn1"].lists["max", "top"]
    assert position is not None
    assert sorted(image[0, :3].tolist()) == [0, 1, 2]
    assert (image[:, 3:] == -1).all() and np.isnan(score[:, 3:]).all() and (position[:, 3:] == -1).all()
    assert np.isfinite(score[:, :3]).all() and (position[:, :3] >= 0).all()
    assert store["bn1"].top(0)["rank"].to_pylist() == [0, 1, 2]


def test_lists_agree_with_the_statistics(finished: Store) -> None:
    for name in finished:
        results = finished[name]
        image, score, position = results.lists["max", "top"]
        bottom = results.lists["max", "bottom"][1]
        assert position is not None and results.stats["count"][0] == 21 * results.tap.positions
        assert np.array_equal(score[:, 0], results.stats["max"])
        assert (np.diff(score) <= 0).all() and (np.diff(bottom) >= 0).all()
        assert (position >= 0).all() and (position < results.tap.map).all()
        assert (image >= 0).all() and all(len(set(row)) == 5 for row in image.tolist())
        assert results.lists["mean", "top"][2] is None


@pytest.mark.parametrize(
    ("shape", "kind", "chunk"),
    [
        ((4096, 50), np.int64, 4096),  # 1.6 MB
        ((30_000, 100), np.float32, 5242),  # 12 MB
        ((64, 100_000, 2), np.int32, 2),  # 0.8 MB for each channel
        ((3, 700_000), np.float32, 1),  # more than a chunk may have, but channels are not cut
        ((0, 5), np.int64, 1),
    ],
)
def test_chunks_are_whole_channels_of_bounded_size(
    shape: tuple[int, ...], kind: type, chunk: int, tmp_path: Path
) -> None:
    group = zarr.create_group(tmp_path / "x")
    write_array(group, "a/b", np.ones(shape, kind), ("channel", "rank", "axis")[: len(shape)], -1)
    array = group["a/b"]
    assert isinstance(array, zarr.Array)
    assert array.chunks == (chunk, *shape[1:])
    assert array.chunks[0] == 1 or np.prod(array.chunks) * array.dtype.itemsize <= 2 << 20
    assert np.array_equal(np.asarray(array[:]), np.ones(shape, kind))


def test_a_table_of_one_channel(finished: Store) -> None:
    table = finished["bn2"].top(3)
    names_and_types = {field.name: str(field.type) for field in table.schema}
    assert names_and_types == {
        "rank": "int64",
        "image": "int64",
        "key": "string",
        "label": "string",
        "score": "float",
        "row": "int32",
        "column": "int32",
    }
    image, score, position = finished["bn2"].lists["max", "top"]
    assert position is not None
    assert table["image"].to_pylist() == image[3].tolist()
    assert table["score"].to_pylist() == score[3].tolist()
    assert list(zip(table["row"].to_pylist(), table["column"].to_pylist(), strict=True)) == [
        tuple(place) for place in position[3].tolist()
    ]
    keys = finished.catalog.table["key"].to_pylist()
    assert table["key"].to_pylist() == [keys[number] for number in image[3]]
    assert list(table.to_pandas().columns) == table.column_names
    assert "row" not in finished["bn2"].top(3, "mean").column_names
    assert finished["bn2"].top(3, end="bottom").num_rows == 3


def test_what_is_not_there(finished: Store, tmp_path: Path) -> None:
    with pytest.raises(MaxactError, match=r"has no tap 'bn3'; it has bn1, bn2, fc$"):
        finished["bn3"]
    for channel in (-1, 7):
        with pytest.raises(MaxactError, match=rf"^bn2: expected a channel from 0 to 6, got {channel}$"):
            finished["bn2"].top(channel)
    with pytest.raises(MaxactError, match=r"^bn2: has no median/top; it has max/top, max/bottom, mean/top, mean/bott"):
        finished["bn2"].top(0, "median")
    assert list(finished) == list(TAPS) and len(finished) == 3 and "bn1" in finished


def test_dead_channels(photos: Path, tmp_path: Path) -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            nn.init.zeros_(self.conv.weight)
            self.conv.bias.data[:] = torch.tensor([-1.0, 0.0, 1.0])  # type: ignore[union-attr]

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.conv(images)
            return result

    store = scan(photos, tmp_path / "x", Dead(), limit=3, crop=16)
    assert store["conv"].dead.tolist() == [True, True, False]
    assert store["conv"].stats["active"].tolist() == [0, 0, 1]
    assert store["conv"].lists["max", "top"][0][2, :3].tolist() == [0, 1, 2]  # ties go to the lower number


def test_maps_that_are_left_out_are_counted(photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)
            self.conv.weight.data[1] = torch.nan

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.conv(images)
            return result

    store = scan(photos, tmp_path / "x", Broken(), limit=3, crop=16)
    assert store["conv"].unfit == 3
    assert store["conv"].top(1).num_rows == 0
    assert np.isnan(store["conv"].stats["mean"]).tolist() == [False, True]
    assert [record.getMessage() for record in caplog.records] == ["conv: 3 maps with NaN or infinity were left out"]


# What is no store


def test_what_cannot_be_opened(finished: Store, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    zarr.create_group(tmp_path / "group")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "zarr.json").write_text('{"zarr_format": 3,')
    for name in ("missing", "folder", "file", "file/below", "group", "torn"):
        with pytest.raises(MaxactError, match=rf"{name}: not a maxact store \(make one with `maxact scan`\)$"):
            Store(tmp_path / name)
    shutil.copytree(finished.path, tmp_path / "newer")
    values = json.loads((tmp_path / "newer" / "zarr.json").read_text())
    values["attributes"]["maxact"]["format"] = 2
    (tmp_path / "newer" / "zarr.json").write_text(json.dumps(values))
    with pytest.raises(MaxactError, match=r"newer: expected a store of format 1, got 2; read it with the version"):
        Store(tmp_path / "newer")


def test_a_store_is_made_where_nothing_else_is(finished: Store, tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    zarr.create_group(tmp_path / "group")
    for name in ("data", "runs/run", "words/run"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("data/images.parquet", "runs/run/model.pth", "words/run/state-dict"):
        (tmp_path / name).write_text("of the user")
    (tmp_path / "words" / "run" / "lock").write_text("")
    taken = [(name, "something else") for name in ("foreign", "data", "runs", "words")]
    for name, reason in (*taken, ("file", "is a file"), ("group", "not a maxact store")):
        before = contents(tmp_path)
        with pytest.raises(MaxactError, match=reason), Store.lock(tmp_path / name):
            pass
        with pytest.raises(MaxactError, match=reason):
            Store.create(tmp_path / name, finished.manifest, finished.catalog)
        assert contents(tmp_path) == before  # not even a lock
    with pytest.raises(MaxactError, match="not a maxact store"):
        Store.remove(tmp_path / "foreign")
    assert names(tmp_path / "foreign") == {"thesis.tex"}


def test_a_module_that_is_called_like_a_leftover(photos: Path, tmp_path: Path) -> None:
    network = nn.Sequential(OrderedDict(partial=nn.Conv2d(3, 2, 3)))
    for wrapped in (network, nn.Sequential(OrderedDict(block=network))):
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        store = scan(photos, place, wrapped.eval())
        assert all(name.endswith("partial") for name in store) and len(Store(place)) == 1


def test_a_start_that_was_cut_short_is_no_hindrance(finished: Store, tmp_path: Path) -> None:
    place = tmp_path / "a" / "b" / "x"
    (place / "run").mkdir(parents=True)
    left = ("run/lock", "run/log", "run/state-7", "run/.state-8.part")
    for name in ("images.parquet", ".images.parquet.part", "zarr.0123.partial", *left):
        (place / name).write_text("half")
    with Store.lock(place):
        store = Store.create(place, replace(finished.manifest, finished=False), finished.catalog)
    assert store.state() is None
    assert names(place) == {"run", "images.parquet", "zarr.json"}
    assert len(store.catalog) == 21


def test_remove_leaves_room_for_a_new_store(finished: Store, tmp_path: Path) -> None:
    shutil.copytree(finished.path, tmp_path / "x")
    with Store.lock(tmp_path / "x"):
        Store.remove(tmp_path / "x")
        assert names(tmp_path / "x") == {"run", "images.parquet"}
        assert not Store.exists(tmp_path / "x")
        Store.create(tmp_path / "x", finished.manifest, finished.catalog)


def test_what_is_not_the_store_s_is_not_removed_with_it(finished: Store, tmp_path: Path) -> None:
    shutil.copytree(finished.path, tmp_path / "x")
    (tmp_path / "x" / "notes").mkdir()
    (tmp_path / "x" / "notes" / "thesis.tex").write_text("of the user")
    before = contents(tmp_path)
    with pytest.raises(MaxactError, match="x: notes is not the store's; move it elsewhere"):
        Store.remove(tmp_path / "x")
    assert contents(tmp_path) == before


# The lock


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with Store.lock(tmp_path / "x"):
        with pytest.raises(MaxactError) as caught, Store.lock(tmp_path / "x"):
            pass
        assert str(caught.value) == (
            f"{tmp_path}/x: in use by process {os.getpid()} on {os.uname().nodename}; wait for it or stop it first"
        )
    with Store.lock(tmp_path / "x"):
        pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(handle: object, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with Store.lock(tmp_path / "x"):
        pass
    assert caplog.messages == [f"{tmp_path}/x: cannot be locked here; see to it that no second run uses it"]


# States


@pytest.fixture
def unfinished(finished: Store, photos: Path, tmp_path: Path) -> Store:
    """The store of a run that was stopped after three of its six shards."""
    place = tmp_path / "unfinished"

    def stop(progress: maxact.Progress) -> None:
        if progress.done > 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan(photos, place, report=stop)
    return Store(place)


def test_commits_replace_each_other(unfinished: Store) -> None:
    run = unfinished.path / "run"
    state = unfinished.state()
    assert state is not None and state.shards
    (number,) = (int(path.name[6:]) for path in run.glob("state-*"))
    unfinished.commit(state)
    assert {path.name for path in run.glob("*state-*")} == {f"state-{number + 1}"}
    # cut short between writing the new and deleting the old; while writing; and a name that is none
    shutil.copy(run / f"state-{number + 1}", run / "state-99")
    (run / f"state-{number + 1}").write_text("the old one")
    (run / ".state-100.part").write_text("half")
    (run / "state-x").write_text("")
    found = unfinished.state()
    assert found is not None and found.shards == state.shards
    unfinished.commit(state)
    assert {path.name for path in run.glob("state-*")} == {"state-100", "state-x"}


def test_an_old_state_that_cannot_be_deleted(unfinished: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    state = unfinished.state()
    assert state is not None

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(MaxactError, match=r"state-\d: cannot be written \(Input/output error\)"):
        unfinished.commit(state)


def test_attributes_are_synced_before_states_go(
    finished: Store, unfinished: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = unfinished.state()
    assert state is not None
    done: list[tuple[str, bytes]] = []
    fsync, unlink = os.fsync, Path.unlink

    def watched(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        done.append((path.name, path.read_bytes() if path.is_file() else b""))
        fsync(handle)

    def watched_unlink(path: Path, missing_ok: bool = False) -> None:
        done.append(("unlink", b""))
        unlink(path, missing_ok)

    monkeypatch.setattr(os, "fsync", watched)
    Store.create(tmp_path / "new", finished.manifest, finished.catalog)
    assert [name for name, _ in done[-2:]] == ["zarr.json", "new"]
    monkeypatch.setattr(Path, "unlink", watched_unlink)
    unfinished.finish(state)
    *_, (name, synced), (folder, _), (last, _) = done
    assert (name, folder, last) == ("zarr.json", "unfinished", "unlink")
    assert synced == (unfinished.path / "zarr.json").read_bytes() and b'"finished": true' in synced


def test_a_finished_store_that_is_damaged_says_so(finished: Store, tmp_path: Path) -> None:
    place = tmp_path / "x"
    shutil.copytree(finished.path, place)
    (place / "errors.parquet").write_bytes(b"half")
    with pytest.raises(MaxactError, match=r"errors\.parquet is damaged, or not what its name says: "):
        Store(place).errors()
    (place / "errors.parquet").unlink()
    with pytest.raises(MaxactError, match=r"^cannot read .*/errors\.parquet: .*No such file or directory") as caught:
        Store(place).errors()
    assert "\n" not in str(caught.value)
    shutil.rmtree(place / "bn1")
    shutil.rmtree(place / "bn2" / "max" / "top" / "score")
    (place / "fc" / "max" / "top" / "score" / "c" / "0" / "0").write_bytes(b"half")
    for name in TAPS:
        with pytest.raises(MaxactError) as caught:
            Store(place)[name]
        assert str(caught.value) == f"{place}: the tap {name} is missing or damaged; scan again with --overwrite"


def test_a_damaged_state_is_named(unfinished: Store) -> None:
    unfinished.path.joinpath("run", "state-99").write_bytes(b"half a state")
    with pytest.raises(MaxactError, match=r"state-99: not a state of a run"):
        unfinished.state()


def test_a_state_is_read_while_others_are_written(unfinished: Store) -> None:
    state = unfinished.state()
    assert state is not None
    end = threading.Event()

    def commit() -> None:
        while not end.is_set():
            unfinished.commit(state)

    writer = threading.Thread(target=commit)
    writer.start()
    try:
        for _ in range(100):
            read = Store(unfinished.path).state()
            assert read is not None and read.shards == state.shards
    finally:
        end.set()
        writer.join()


def fields_of(store: Store) -> dict[str, Field]:
    return of_taps(tiny.network().eval(), store.manifest.taps, (SIDE, SIDE))


def test_a_state_gives_what_the_arrays_will(
    finished: Store, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(self: Store, *results: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Store, "finish", cut)
        scan(photos, tmp_path / "x", score=("max", "mean"), bottom=3)
    store = Store(tmp_path / "x")
    state = store.state()
    assert state is not None and state.shards == frozenset(range(6)) and not store.manifest.finished
    for name in finished:
        ours, theirs = store[name], finished[name]
        assert repr(ours.lists) == repr(theirs.lists)
        assert repr(sorted(ours.stats.items())) == repr(sorted(theirs.stats.items()))
        assert ours.top(2).equals(theirs.top(2))
    assert store.errors().num_rows == 0
    for _ in range(2):  # it can be done again
        store.finish(state, fields_of(store))
        assert contents(store.path) == contents(finished.path)
        assert names(store.path / "run") == {"lock", "log"}


def test_a_store_that_is_opened_again_reads_its_state(finished: Store, tmp_path: Path) -> None:
    shutil.copytree(finished.path, tmp_path / "x")
    store = Store(tmp_path / "x")
    assert store["bn1"].tap.channels == 6
    store.reopen()
    with pytest.raises(MaxactError, match="x: nothing is committed yet; wait for the first commit or start"):
        store["bn1"]
    assert not Store(tmp_path / "x").manifest.finished


# Pixels


def test_pixels_are_those_of_the_scan(finished: Store, photos: Path) -> None:
    numbers = [20, 0, 7]
    wanted = pixels([finished_path(finished, number) for number in numbers], Tiny().preprocess)
    found = finished.pixels(numbers)
    assert found.shape == (3, SIDE, SIDE, 3) and found.dtype == torch.uint8
    inside = (found.int() - wanted.int()).abs()[:, 1:-1, 1:-1]  # DALI repeats a picture's edge, PIL does not
    assert inside.max() <= 1


def finished_path(store: Store, number: int) -> Path:
    return Path(os.fsdecode(store.catalog.entry(number).source))


def test_pixels_that_are_gone(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    store = scan(tmp_path / "photos", tmp_path / "x", limit=3)
    path = finished_path(store, 1)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(MaxactError, match=r"x: .* cannot be read any more \(changed: .* bytes, but had"):
        store.pixels([0, 1])
    path.unlink()
    with pytest.raises(MaxactError, match=r"x: .* cannot be read any more \(.*No such file"):
        store.input(1)
    with pytest.raises(IndexError):
        store.pixels([3])
