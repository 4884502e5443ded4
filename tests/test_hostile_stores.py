"""Stores that mean harm, or that are broken: whatever reads one says so in one line, and takes no memory for it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import zarr
from hypothesis import given
from hypothesis import strategies as st
from numcodecs import Pickle

import maxact
from hostile import damaged, frugal, fuzz, refusal, twisted
from maxact.errors import MaxactError
from maxact.export import export
from maxact.files import replace_file
from maxact.info import describe
from maxact.partial import Partial
from maxact.render.gallery import write_gallery
from maxact.render.mosaic import write_mosaics
from maxact.settle import Exact
from maxact.store import Store
from maxact.thumbs import write_thumbs
from stores import interrupted, scan

KEEP = {"ranks": 2, "channels": [0, 1]}


@pytest.fixture(scope="module")
def photographs(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few, and where they cannot be changed by another test."""
    return Path(shutil.copytree(photos / "chelsea", tmp_path_factory.mktemp("few") / "chelsea"))


@pytest.fixture(scope="module")
def projected(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of one tap through both passes."""
    place = tmp_path_factory.mktemp("projected") / "x.zarr"
    maxact.project(scan(photographs, place, layers=("bn2",), top=3), **KEEP)
    return place


@pytest.fixture(scope="module")
def unfinished(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("unfinished") / "x.zarr"
    interrupted(photos, place, layers=("bn2",), top=3)
    return place


def copied(store: Path, place: Path) -> Path:
    shutil.rmtree(place, ignore_errors=True)
    return Path(shutil.copytree(store, place, symlinks=True))


def read(path: Path) -> None:
    """All that only reads a store."""
    store = maxact.open(path)
    json.dumps(describe(store))
    repr(store)
    for name in store:
        results = store[name]
        for score, end in results.lists:
            results.top(0, score, end)


def uses(path: Path, out: Path, images: Path) -> Iterator[Callable[[], object]]:
    """What can be done with a store."""
    yield lambda: read(path)
    yield lambda: export(path, out / "x.parquet")
    yield lambda: write_gallery(Store(path), out / "site")
    yield lambda: write_mosaics(Store(path), out / "sheets", across=2)
    yield lambda: maxact.project(path, **KEEP)
    yield lambda: scan(images, path, layers=("bn2",), top=3)


QUICK = 2  # of the uses


def try_all(path: Path, out: Path, images: Path, some: int) -> list[str | None]:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    return [refusal(use) for number, use in enumerate(uses(path, out, images)) if number < QUICK or number == some]


some_use = st.integers(QUICK, 9)


@fuzz(4)
@given(data=st.data(), some=some_use)
def test_what_a_store_says_of_itself(
    projected: Path, photographs: Path, tmp_path: Path, data: st.DataObject, some: int
) -> None:
    place = copied(projected, tmp_path / "x")
    values = json.loads((place / "zarr.json").read_text())
    values["attributes"]["maxact"] = data.draw(twisted(values["attributes"]["maxact"]))
    (place / "zarr.json").write_text(json.dumps(values))
    with frugal(300):
        try_all(place, tmp_path / "out", photographs, some)


def below(store: Path, name: str) -> list[str]:
    return sorted(str(path.relative_to(store)) for path in store.glob(f"bn2/**/{name}"))


@fuzz(4)
@given(data=st.data(), some=some_use)
def test_what_arrays_and_groups_say(
    projected: Path, photographs: Path, tmp_path: Path, data: st.DataObject, some: int
) -> None:
    place = copied(projected, tmp_path / "x")
    path = place / data.draw(st.sampled_from(below(projected, "zarr.json")))
    path.write_text(json.dumps(data.draw(twisted(json.loads(path.read_text())))))
    with frugal(300):
        try_all(place, tmp_path / "out", photographs, some)


@fuzz(4)
@given(data=st.data(), some=some_use)
def test_damaged_chunks_and_files(
    projected: Path, photographs: Path, tmp_path: Path, data: st.DataObject, some: int
) -> None:
    place = copied(projected, tmp_path / "x")
    files = sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file())
    path = place / data.draw(st.sampled_from([name for name in files if name not in ("run/log", "run/lock")]))
    path.write_bytes(data.draw(damaged(path.read_bytes(), 300) | st.just(b"")))
    with frugal(300):
        try_all(place, tmp_path / "out", photographs, some)


@fuzz(13)
@given(data=st.data())
def test_damaged_states(unfinished: Path, photos: Path, tmp_path: Path, data: st.DataObject) -> None:
    place = copied(unfinished, tmp_path / "x")
    (state,) = (place / "run").glob("state-*")
    state.write_bytes(data.draw(damaged(state.read_bytes(), 2000)))
    with frugal(300):
        refusal(lambda: read(place))
        refusal(lambda: export(place, tmp_path / "x.parquet"))


def rewrite(path: Path, **changes: Any) -> None:
    arrays = safetensors.numpy.load_file(path)
    notes = json.loads(arrays["notes"].tobytes()) | changes.pop("notes", {})
    arrays["notes"] = np.frombuffer(json.dumps(notes).encode(), np.uint8)
    arrays |= {name.replace("__", "/"): np.ascontiguousarray(value) for name, value in changes.items()}
    safetensors.numpy.save_file(arrays, path)


STATES: dict[str, dict[str, Any]] = {
    "fewer channels": {"top__max__top__image": np.zeros((2, 3), np.int64)},
    "more ranks": {
        f"top__max__top__{name}": np.zeros((7, 900), kind)
        for name, kind in (("score", "f4"), ("image", "i8"), ("position", "i4"))
    },
    "another kind": {"top__max__top__score": np.zeros((7, 3), np.float64)},
    "images that are not there": {"top__max__top__image": np.full((7, 3), 1 << 40)},
    "negative images": {"top__max__top__image": np.full((7, 3), -5)},
    "positions outside of the map": {"top__max__top__position": np.full((7, 3), 1 << 30, np.int32)},
    "another list": {
        f"top__mean__top__{name}": np.zeros((7, 3), kind)
        for name, kind in (("score", "f4"), ("image", "i8"), ("position", "i4"))
    },
    "a node beyond everything": {f"stats__{1 << 50}__0__{name}": np.zeros(7) for name in ("images", "total")},
    "statistics of fewer channels": {"stats__1__0__total": np.zeros(2)},
    "shards that are not there": {"shards": np.array([1 << 40])},
    "negative shards": {"shards": np.array([-1])},
    "bad images of another kind": {"notes": {"bad": [{"image": "x", "key": 5, "stage": None, "error": []}]}},
    "bad images that are not there": {"notes": {"bad": [{"image": 999, "key": "", "stage": "", "error": ""}]}},
    "grey shards of another kind": {"notes": {"grey": [["x", "y"]]}},
    "notes that are none": {"notes": {"held": 7}},
}


@pytest.mark.parametrize("name", STATES)
def test_states_that_cannot_be(unfinished: Path, photos: Path, tmp_path: Path, name: str) -> None:
    """The kernels that merge them look at no shape: one that is too small would be read beyond its end."""
    place = copied(unfinished, tmp_path / "x")
    (state,) = (place / "run").glob("state-*")
    rewrite(state, **dict(STATES[name]))
    said = refusal(lambda: read(place))
    assert said is not None and ("state" in said), said
    if name != "positions outside of the map":
        again = refusal(lambda: scan(photos, place, layers=("bn2",), top=3))
        assert again is not None and state.name in again


def test_notes_without_a_bottom(unfinished: Path, tmp_path: Path) -> None:
    place = copied(unfinished, tmp_path / "x")
    (state,) = (place / "run").glob("state-*")
    arrays = safetensors.numpy.load_file(state)
    arrays["notes"] = np.frombuffer(b"[" * 200_000, np.uint8)
    safetensors.numpy.save_file(arrays, state)
    said = refusal(lambda: read(place))
    assert said is not None and "not a state of a run" in said


def test_a_state_that_leads_nowhere(unfinished: Path, tmp_path: Path) -> None:
    place = copied(unfinished, tmp_path / "x")
    (place / "run" / "state-99").symlink_to(tmp_path / "nowhere")
    (place / "run" / "state-98").mkdir()
    read(place)


# No code runs


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_pickles_in_an_older_zarr_do_not_run(projected: Path, tmp_path: Path) -> None:
    """Zarr's second format has a codec that is a pickle; a store that says it is of that format would run it."""
    place, ran = tmp_path / "x", tmp_path / "ran"
    manifest = json.loads((projected / "zarr.json").read_text())["attributes"]["maxact"]
    root = zarr.open_group(place, mode="w", zarr_format=2, attributes={"maxact": manifest})
    tap = root.create_group("bn2", attributes={"unfit": 0})
    for name, kind in (("image", "i8"), ("score", "f4")):
        array = tap.create_array(
            f"max/top/{name}", shape=(7, 3), chunks=(7, 3), dtype=kind, filters=[Pickle()], compressors=None
        )
        Path(str(place), array.path, "0.0").write_bytes(pickle.dumps(Evil(ran)))
    shutil.copy(projected / "images.parquet", place / "images.parquet")
    said = refusal(lambda: read(place))
    assert said is not None and "not a maxact store" in said
    assert not ran.exists()
    # nor one array of a store that is of the third
    third = copied(projected, tmp_path / "y")
    shutil.rmtree(third / "bn2" / "max" / "top" / "image")
    shutil.copytree(place / "bn2" / "max" / "top" / "image", third / "bn2" / "max" / "top" / "image")
    assert "damaged" in str(refusal(lambda: read(third)))
    assert not ran.exists()


def test_pictures_are_no_programs(projected: Path, tmp_path: Path) -> None:
    """PIL hands PostScript to Ghostscript, which runs it."""
    place = copied(projected, tmp_path / "x")
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(ran) (w) file closefile\nshowpage\n"
    numbers = maxact.open(place).thumbs().numbers.tolist()
    write_thumbs(place / "thumbs.parquet", ((number, program) for number in numbers))
    for draw in (
        lambda: write_gallery(Store(place), tmp_path / "site"),
        lambda: write_mosaics(Store(place), tmp_path / "sheets", channels=[0]),
    ):
        assert "is damaged; project again" in str(refusal(draw))


# No path is left


@pytest.mark.parametrize("name", ["../../evil", "/etc", "..", ".", "", "a/b", "bn2\0"])
def test_names_of_taps_are_no_paths(projected: Path, tmp_path: Path, name: str) -> None:
    place = copied(projected, tmp_path / "x")
    values = json.loads((place / "zarr.json").read_text())
    values["attributes"]["maxact"]["taps"][0]["name"] = name
    (place / "zarr.json").write_text(json.dumps(values))
    for use in uses(place, tmp_path, tmp_path):
        assert "its attribute maxact is damaged" in str(refusal(use))


def test_links_that_lie_in_wait(projected: Path, tmp_path: Path) -> None:
    """What a store is given to write must not land in a file that a link of it leads to."""
    place, mine = copied(projected, tmp_path / "x"), tmp_path / "mine"
    mine.write_text("mine")
    (place / "run" / ".projected.json.part").symlink_to(mine)
    replace_file(place / "run" / "projected.json", lambda aside: aside.write_text("{}"))
    assert (place / "run" / "projected.json").read_text() == "{}" and mine.read_text() == "mine"
    (place / "run" / "lock").unlink()
    (place / "run" / "lock").symlink_to(mine)
    said = refusal(lambda: maxact.project(place, **KEEP))
    assert said is not None and "cannot be written" in said
    assert mine.read_text() == "mine"


# What memory is asked for


def resize(place: Path, array: str, **changes: Any) -> None:
    path = place / array / "zarr.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def grid(*chunks: int) -> dict[str, Any]:
    return {"name": "regular", "configuration": {"chunk_shape": list(chunks)}}


@pytest.mark.parametrize(
    ("array", "changes"),
    [
        ("bn2/max/top/image", {"shape": [7, 1 << 40]}),
        ("bn2/max/top/image", {"shape": [1 << 40, 3]}),
        ("bn2/max/top/image", {"chunk_grid": grid(1 << 30, 3)}),
        ("bn2/max/top/score", {"shape": [7, 1 << 33], "chunk_grid": grid(7, 1 << 33)}),
        ("bn2/stats/mean", {"shape": [1 << 40]}),
        ("bn2/stats/mean", {"data_type": "int8"}),
        ("bn2/max/top/score", {"data_type": "float64"}),
        ("bn2/max/top/box", {"shape": [7, 3, 1 << 40]}),
        ("bn2/max/top/crop", {"shape": [1 << 40, 3, 5, 5, 3]}),
        ("bn2/max/top/projection/deconvnet", {"chunk_grid": grid(7, 2, 1 << 20, 1 << 20, 3)}),
    ],
)
def test_arrays_that_are_larger_than_can_be(projected: Path, tmp_path: Path, array: str, changes: Any) -> None:
    place = copied(projected, tmp_path / "x")
    resize(place, array, **changes)
    with frugal(200):
        found = try_all(place, tmp_path / "out", tmp_path, QUICK)
    assert any(said is not None for said in found), found


def test_a_manifest_that_is_larger_than_can_be(projected: Path, tmp_path: Path) -> None:
    for change in (
        {"channels": 1 << 40},
        {"map": [1 << 20, 1 << 20]},
        {"channels": 0},
        {"channels": True},
        {"axis": 9},
    ):
        place = copied(projected, tmp_path / "x")
        values = json.loads((place / "zarr.json").read_text())
        values["attributes"]["maxact"]["taps"][0] |= change
        (place / "zarr.json").write_text(json.dumps(values))
        with frugal(200):
            assert "its attribute maxact is damaged" in str(refusal(lambda place=place: read(place)))  # type: ignore[misc]


def test_peaks_that_cannot_be(projected: Path, tmp_path: Path) -> None:
    for name, value in (("image", 10**6), ("image", -7), ("position", 1 << 20), ("position", -1)):
        place = copied(projected, tmp_path / "x")
        array = zarr.open_array(place, path=f"bn2/max/top/{name}", mode="r+")
        array[1, 0] = value
        for said in try_all(place, tmp_path / "out", tmp_path, 99):
            assert said is not None and "the tap bn2 is missing or damaged" in said


def test_a_layout_that_cannot_be(projected: Path, tmp_path: Path) -> None:
    for change in (
        {"shown": 0},
        {"shown": 99},
        {"frame": [1 << 20, 1 << 20]},
        {"frame": [0, 5]},
        {"channels": "x"},
        {"scale": 0},
        {"cut": "x"},
        {"more": 1},
        {"methods": ["../x"]},
    ):
        place = copied(projected, tmp_path / "x")
        path = place / "bn2" / "max" / "top" / "zarr.json"
        values = json.loads(path.read_text())
        values["attributes"]["winners"] |= change
        path.write_text(json.dumps(values))
        with pytest.raises(MaxactError, match="bn2/max/top"):
            Store(place).winners("bn2")
        refusal(lambda place=place: write_gallery(Store(place), tmp_path / "out"))  # type: ignore[misc]


# The files beside the arrays


@fuzz(4)
@given(data=st.data())
def test_what_a_pass_says_of_itself(projected: Path, tmp_path: Path, data: st.DataObject) -> None:
    place = copied(projected, tmp_path / "x")
    path = place / "run" / "projected.json"
    path.write_text(json.dumps(data.draw(twisted(json.loads(path.read_text())))))
    refusal(lambda: maxact.project(place, **KEEP))


def test_nested_beyond_measure(projected: Path, tmp_path: Path) -> None:
    for name in (
        "run/projected.json",
        "zarr.json",
        "bn2/zarr.json",
        "bn2/max/top/zarr.json",
        "bn2/stats/mean/zarr.json",
    ):
        place = copied(projected, tmp_path / "x")
        (place / name).write_text("[" * 200_000)
        try_all(place, tmp_path / "out", tmp_path, QUICK + 2)


@pytest.mark.parametrize(
    "about", ["x", "{", "[]", "5", '{"taps": 5}', '{"taps": ["bn2"], "ranks": "x"}', "[" * 100_000]
)
def test_states_of_settling(projected: Path, tmp_path: Path, about: str) -> None:
    place = copied(projected, tmp_path / "x")
    key: Any = ("max", "top")
    part = Exact(frozenset({0}), {key: np.zeros((7, 3), np.float32)}, {key: np.zeros((7, 3), np.int32)})
    part.save(place / "run" / "settling-0", about)
    assert list(Store(place).settling().values()) == [{}]
    maxact.project(place, **KEEP)
    rewrite(place / "run" / "settling-0", score__max__top=np.zeros((2, 2, 2)))
    with pytest.raises(MaxactError, match="settling-0: is damaged"):
        Exact.load(place / "run" / "settling-0", about)


def test_states_of_settling_another_store(projected: Path, tmp_path: Path) -> None:
    place = copied(projected, tmp_path / "x")
    key: Any = ("max", "top")
    part = Exact(frozenset({0}), {key: np.zeros((7, 3), np.float32)}, {key: np.zeros((7, 3), np.int32)})
    part.save(place / "run" / "settling-0", '{"taps": ["bn2", "../x"], "ranks": 2}')
    part.save(place / "run" / "settling-1", '{"taps": ["bn2"], "ranks": 2}')
    assert [*Store(place).settling().values()] == [{}, {"taps": ["bn2"], "ranks": 2}]
    maxact.project(place, **(KEEP | {"overwrite": True}))


@pytest.mark.parametrize(
    "change",
    [
        {"settled": "x"},
        {"settled": -1},
        {"settled": True},
        {"settled": [3]},
        {"deviation": "x"},
        {"deviation": {}},
        None,
    ],
)
def test_what_a_list_says_of_settling(projected: Path, tmp_path: Path, change: dict[str, Any] | None) -> None:
    place = copied(projected, tmp_path / "x")
    path = place / "bn2" / "max" / "top" / "zarr.json"
    values = json.loads(path.read_text())
    if change is None:
        path.unlink()
    else:
        path.write_text(json.dumps(values | {"attributes": values["attributes"] | change}))
    for use in (
        lambda: Store(place).settled("bn2", ("max", "top")),
        lambda: Store(place).is_settled("bn2", 2),
        lambda: Store(place).settled_deviation(),
    ):
        assert "x: bn2/max/top is missing or damaged; scan again with --overwrite" in str(refusal(use))


def test_partials_that_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "state-0").mkdir()
    assert "not a state of a run" in str(refusal(lambda: Partial.load(tmp_path / "state-0")))


@pytest.mark.parametrize("name", ["errors.parquet", "thumbs.parquet", "images.parquet"])
def test_tables_with_other_columns(projected: Path, tmp_path: Path, name: str) -> None:
    table = pq.read_table(projected / name)
    columns = table.column_names
    broken = [
        pa.table({"x": [1]}),
        table.drop_columns(columns[1:]),
        table.rename_columns([columns[0], *columns[:1], *columns[2:]]) if len(columns) > 1 else table,
        pa.table({column: pa.nulls(40, table.schema.field(column).type) for column in columns}),
        pa.table({column: pa.array([3] * 40) for column in columns}),
        pa.table({column: pa.array([[1]] * 4) for column in columns}),
    ]
    for each in broken:
        place = copied(projected, tmp_path / "x")
        pq.write_table(each, place / name)
        try_all(place, tmp_path / "out", tmp_path, QUICK if name == "thumbs.parquet" else 99)


def test_a_lock_of_somebody_else(projected: Path, tmp_path: Path) -> None:
    place = copied(projected, tmp_path / "x")
    (place / "run" / "lock").write_bytes(b"\xff\n\x1b[31m" + bytes(10_000))
    with Store.lock(place):
        (place / "run" / "lock").write_bytes(b"\xff\n\x1b[31m" + bytes(10_000))
        said = refusal(lambda: Store.lock(place).__enter__())
    assert said is not None and "in use by " in said and os.linesep not in said
