"""The second pass as a whole: what it leaves in a store, what it adds to, what it refuses."""

from __future__ import annotations

import logging
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
import xarray
import zarr
from PIL import Image
from torch import nn

import maxact
import tiny
from maxact import fetch
from maxact.errors import MaxactError, UsageError
from maxact.manifest import Manifest
from maxact.process import Interrupted, Progress
from maxact.store import Store
from stores import contents, names, scan
from support import Pictures, photograph

COUNT = 70  # more than are looked at to settle a few ranks
RANKS = 2
EMPTY = {"box": -1, "focus_box": -1, "crop_box": -1, "source_box": np.nan, "crop": 0, "map": np.nan}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that cannot be read are tried again at once."""
    monkeypatch.setattr(fetch._again, "sleep", lambda seconds: None)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    for number in range(COUNT):
        photograph(number, 32).save(folder / f"{number:03}.png", compress_level=1)
    return folder


@pytest.fixture(scope="module")
def halves(many: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A scan in bfloat16. Nobody changes it."""
    options: Any = {"precision": "bf16", "score": ("max", "mean"), "top": 5, "bottom": 3, "batch": 10, "shard": 20}
    return scan(many, tmp_path_factory.mktemp("halves") / "x", decoder="torchvision", **options)


@pytest.fixture(scope="module")
def exact(many: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The same images in float32, all in every list."""
    options: Any = {"score": ("max", "mean"), "top": COUNT, "bottom": COUNT, "batch": 10, "shard": 20}
    return scan(many, tmp_path_factory.mktemp("exact") / "x", decoder="torchvision", **options)


@pytest.fixture(scope="module")
def settled(halves: Store, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The 16-bit scan, projected. Nobody changes it."""
    return project(copied(halves, tmp_path_factory.mktemp("settled") / "x"))


@pytest.fixture(scope="module")
def projected(finished: Store, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The scan in float32, projected. Nobody changes it."""
    return project(copied(finished, tmp_path_factory.mktemp("projected") / "x"))


def copied(store: Store, place: Path) -> Path:
    shutil.copytree(store.path, place)
    return place


def project(store: Path | Store, **settings: Any) -> Store:
    return maxact.project(store, **({"ranks": RANKS, "threads": 1, "max_size": 32, "batch": 8} | settings))


class Arrays(NamedTuple):
    """Of one list of a store: its group, and what the second pass kept."""

    group: Any
    winners: dict[str, np.ndarray]


def arrays(store: Store, tap: str, score: str = "max", end: str = "top") -> Arrays:
    winners = store.winners(tap, score, end)
    group: Any = zarr.open_group(store.path, mode="r")[f"{tap}/{score}/{end}"]
    return Arrays(group, {name: winners.read(name, 0, winners.layout.channels) for name in winners.layout.arrays()})


def assert_same(store: Path, whole: Store) -> None:
    """To the byte, but for what the log says."""
    found, wanted = contents(store), contents(whole.path)
    assert found.keys() == wanted.keys()
    assert [name for name in found if found[name] != wanted[name]] == []
    assert names(store / "run") == names(whole.path / "run")


# Settling


def lists_of(store: Store) -> list[tuple[str, Any]]:
    return [(tap, key) for tap in store for key in store.manifest.lists()]


def test_settled_ranks_are_those_of_float32(halves: Store, settled: Store, exact: Store) -> None:
    certain_ones = differing = 0
    for tap, key in lists_of(settled):
        image, score, position = settled[tap].lists[key]
        before, true = halves[tap].lists[key], exact[tap].lists[key]
        group = arrays(settled, tap, *key).group
        certain = group["certain"][:]
        assert certain.dtype == bool and certain.shape == (settled[tap].tap.channels,)
        assert group.attrs["settled"] == RANKS
        for channel in range(len(image)):
            row = image[channel].tolist()
            assert len(set(row)) == len(row)
            place = [true.image[channel].tolist().index(number) for number in row[:RANKS]]
            assert np.allclose(score[channel, :RANKS], true.score[channel, place], rtol=1e-5, atol=1e-6)
            if position is not None and true.position is not None:
                assert np.array_equal(position[channel, :RANKS], true.position[channel, place])
            assert place == sorted(place)
            if certain[channel]:  # and then there is nothing better among all images
                assert place == list(range(RANKS))
                certain_ones += 1
            rest = [number for number in before.image[channel].tolist() if number not in row[:RANKS]]
            assert row[RANKS:] == rest[: len(row) - RANKS]
            differing += row != before.image[channel].tolist()
    assert certain_ones > 40 and differing > 3


def test_candidates_stay_as_they_were(halves: Store, settled: Store) -> None:
    for tap, key in lists_of(settled):
        assert repr(settled.candidates(tap, key)) == repr(halves.candidates(tap, key))


def test_everything_looked_at_is_certain(photos: Path, tmp_path: Path) -> None:
    store = project(scan(photos, tmp_path / "x", precision="bf16"), layers="bn2", ranks=9)
    group = arrays(store, "bn2").group
    assert group["certain"][:].all() and group.attrs["settled"] == 5  # there are no more
    image, score, _ = store["bn2"].lists["max", "top"]
    true = scan(photos, tmp_path / "y")["bn2"].lists["max", "top"]
    assert np.array_equal(image, true.image) and np.allclose(score, true.score, rtol=1e-5)


def test_images_without_a_number_in_16_bits_leave_nothing_certain(photos: Path, tmp_path: Path) -> None:
    """What overflowed is no candidate, whatever it is in float32."""

    def overflowing() -> nn.Module:
        network = tiny.network()
        network.get_parameter("bn1.weight").data[2] = 3e38
        network.get_buffer("bn1.running_mean").data[2] = -1.0
        return network

    store = scan(photos, tmp_path / "x", overflowing(), precision="bf16", layers="conv1", top=2)
    count = store["bn1"].stats["count"] // 1024
    assert count[2] < 21  # some overflowed
    project(store, network=overflowing(), layers="bn1")
    assert arrays(store, "bn1").group["certain"][:].tolist() == [channel != 2 for channel in range(6)]


def test_what_is_settled_is_not_settled_again(settled: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = copied(settled, tmp_path / "x")
    caplog.set_level(logging.INFO)
    project(store)
    assert "settling" not in caplog.text
    assert_same(store, settled)


def test_half_a_settled_list_is_not_read(halves: Store, settled: Store, tmp_path: Path) -> None:
    """Cut short, a list is that of 16 bits until it is settled again."""
    place = copied(settled, tmp_path / "x")
    store, (tap, key) = Store(place), lists_of(settled)[0]
    half = store[tap].lists[key]
    store.write_settled(tap, key, half._replace(image=half.image[:, ::-1]), np.ones(len(half.image), bool))
    for opened in (store, Store(place)):
        assert repr(opened[tap].lists[key]) == repr(halves[tap].lists[key])
        assert opened.settled(tap, key) == 0
    assert_same(project(place).path, settled)


def test_several_settling_runs_that_were_cut_short(
    halves: Store, settled: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One of some lists leaves what another has of others."""
    store = copied(halves, tmp_path / "x")
    caplog.set_level(logging.INFO)

    def stopped(progress: Progress) -> None:
        if progress.stage == "settling" and progress.done == COUNT:  # all, but nothing is written yet
            os.kill(os.getpid(), signal.SIGINT)

    def states() -> set[str]:
        return {name for name in names(store / "run") if name.startswith("settling")}

    with pytest.raises(Interrupted):
        project(store, report=stopped)
    assert "settling the first 2 ranks of all channels of 3 taps in float32 on 70 images" in caplog.text
    (first,) = states()
    with pytest.raises(Interrupted):
        project(store, layers="fc", report=stopped)
    assert len(states()) == 2 and first in states()
    project(store, layers="fc")
    assert states() == {first}
    projected = contents(store)
    said: list[Progress] = []
    project(store, report=said.append)
    assert "settling" not in {each.stage for each in said}  # there was nothing left to do but to write
    assert states() == set()
    # what was projected has the lists that it was projected from
    found = contents(store)
    assert [name for name in projected if name.startswith("fc/") and found[name] != projected[name]] == []
    for tap, key in lists_of(settled):
        assert repr(Store(store)[tap].lists[key].image) == repr(settled[tap].lists[key].image)
    assert names(store / "run") == names(settled.path / "run")


def test_more_ranks_are_settled_again(halves: Store, settled: Store, exact: Store, tmp_path: Path) -> None:
    store = copied(settled, tmp_path / "x")
    with pytest.raises(MaxactError, match=r"was projected otherwise \(ranks: 2, not 4\)"):
        project(store, ranks=4)
    assert_same(store, settled)
    again = project(store, ranks=4, overwrite=True)
    fresh = project(copied(halves, tmp_path / "y"), ranks=4)
    assert_same(again.path, fresh)
    group = arrays(again, "bn1").group
    assert group.attrs["settled"] == 4 and arrays(again, "bn1", "max", "bottom").group.attrs["settled"] == 3
    first = again["bn1"].lists["max", "top"].image[:, :4]
    assert np.array_equal(first[group["certain"]], exact["bn1"].lists["max", "top"].image[:, :4][group["certain"]])


def test_the_order_of_16_bits_can_stay(halves: Store, tmp_path: Path) -> None:
    store = project(copied(halves, tmp_path / "x"), settle=False, layers="bn2")
    assert repr(store["bn2"].lists) == repr(halves["bn2"].lists)
    group, winners = arrays(store, "bn2")
    assert "certain" not in group and "settled" not in group.attrs
    assert (winners["box"][:, :, 2:] > winners["box"][:, :, :2]).all()
    assert store.manifest.projected is not None and store.manifest.projected["settle"] is False
    assert 1e-5 < store.manifest.projected["deviation"] < 0.3  # between scores of 16 and of 32 bits


def test_deviations_are_kept(settled: Store, projected: Store) -> None:
    for store, low, high in ((settled, 1e-4, 0.1), (projected, 0, 0)):
        assert store.manifest.projected is not None
        assert low <= store.manifest.projected["settled"] <= high
        assert store.manifest.projected["deviation"] < 1e-5


# What there is afterwards


def test_the_manifest_says_what_was_done(projected: Store, finished: Store) -> None:
    said = projected.manifest.projected
    assert said is not None and set(said) >= {"deviation", "settled", "whole"}
    wanted = {"ranks": RANKS, "methods": ["deconvnet"], "seed": "one", "crop": "auto", "max_size": 32, "settle": True}
    assert wanted.items() <= said.items() and said["whole"] == []
    before = finished.manifest.to_json() | {"projected": said}
    assert projected.manifest == Manifest.from_json(before, projected.path)
    assert projected.errors().num_rows == 0
    assert names(projected.path / "run") == {"lock", "log", "projected.json"}


def test_a_scan_in_float32_keeps_its_lists(projected: Store, finished: Store) -> None:
    found, before = contents(projected.path), contents(finished.path)
    changed = {name for name in before if found[name] != before[name]}
    assert all(name == "zarr.json" or (name.count("/") == 3 and name.endswith("zarr.json")) for name in changed)


def test_other_tools_read_it(projected: Store) -> None:
    """With every warning an error."""
    with xarray.open_datatree(projected.path, engine="zarr", consolidated=True) as tree:
        for tap, channels in (("bn1", 6), ("bn2", 7), ("fc", 5)):
            part = tree[f"{tap}/max/top"]
            assert part["crop"].dims == ("channel", "rank", "y", "x", "colour")
            assert part["crop"].shape[:2] == (channels, 5)
            winners = projected.winners(tap)
            assert np.array_equal(part["crop"][:, :RANKS], winners.read("crop", 0, channels))
            own = tree[f"{tap}/max/top/projection"]["deconvnet"]
            assert np.array_equal(own[:, :RANKS], winners.read("projection/deconvnet", 0, channels))
            assert np.array_equal(part["image"], projected[tap].lists["max", "top"].image)
    group: Any = zarr.open_group(projected.path, mode="r", use_consolidated=True)
    assert group["bn2/mean/bottom/focus_box"].shape == (7, 3, 4)
    assert group["bn2/mean/bottom/projection_scale/deconvnet"].dtype == "float32"


def test_thumbs_are_the_inputs_of_the_winners(projected: Store) -> None:
    shown = [projected[tap].lists[key].image[:, :RANKS] for tap, key in lists_of(projected)]
    wanted = np.unique(np.concatenate([image.ravel() for image in shown]))
    table = pq.read_table(projected.path / "thumbs.parquet")
    assert table["image"].to_pylist() == wanted.tolist()
    assert all(data[:4] == b"RIFF" for data in table["webp"].to_pylist())
    assert wanted[0] in projected.thumbs()


# Going on


@pytest.mark.parametrize("which", ["finished", "halves"])
def test_channels_and_layers_are_added(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    source = request.getfixturevalue(which)
    store = copied(source, tmp_path / "x")
    first = project(store, layers="bn1", channels=[0, 1])
    former = arrays(first, "bn1").winners
    thumbs = {number: first.thumbs()[number] for number in first.thumbs().numbers.tolist()}
    assert first.winners("bn1").projected().tolist() == [True, True, False, False, False, False]
    with pytest.raises(MaxactError, match="bn2/max/top has not been projected; run `maxact project` on it"):
        first.winners("bn2")
    second = project(store, layers=["bn1"], channels=[3, 2, 3])
    assert second.winners("bn1").projected().tolist() == [True] * 4 + [False] * 2
    for name, values in arrays(second, "bn1").winners.items():
        assert np.array_equal(values[:2], former[name][:2], equal_nan=values.dtype.kind == "f")
    assert {number: second.thumbs()[number] for number in thumbs} == thumbs
    project(store)
    for _ in range(2):
        whole = request.getfixturevalue("settled" if which == "halves" else "projected")
        if which == "halves":  # the float32 runs were three, with other images in a batch
            mine, theirs = contents(store), contents(whole.path)
            assert mine.keys() == theirs.keys() and Store(store).winners("bn2").projected().all()
            assert repr(Store(store)["bn1"].lists["max", "top"].image) == repr(whole["bn1"].lists["max", "top"].image)
        else:
            assert_same(store, whole)
        project(store)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ranks": 3}, "ranks: 2, not 3"),
        ({"method": ("deconvnet", "guided")}, r"methods: \['deconvnet'\], not \['deconvnet', 'guided'\]"),
        ({"seed": "activation", "max_size": 64}, "seed: one, not activation; max_size: 32, not 64"),
        ({"crop": "focus"}, "crop: auto, not focus"),
        ({"settle": False}, "settle: True, not False"),
    ],
)
def test_other_settings_are_refused(settings: dict[str, Any], said: str, projected: Store, tmp_path: Path) -> None:
    store = copied(projected, tmp_path / "x")
    with pytest.raises(MaxactError, match=rf"x: was projected otherwise \({said}\); give the same .* --overwrite"):
        project(store, **settings)
    assert_same(store, projected)


def test_starting_again(projected: Store, finished: Store, tmp_path: Path) -> None:
    store = copied(projected, tmp_path / "x")
    other = project(store, overwrite=True, method=("guided", "gradient"), crop="focus", layers="bn?")
    assert set(other.winners("bn1").layout.methods) == {"guided", "gradient"}
    with pytest.raises(MaxactError, match="fc/max/top has not been projected"):
        other.winners("fc")
    fresh = copied(finished, tmp_path / "y")
    assert_same(store, project(fresh, method=("guided", "gradient"), crop="focus", layers="bn?"))
    assert_same(project(store, overwrite=True).path, projected)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stage", ["settling", "projecting"])
def test_a_signal_ends_it_in_good_order(
    signum: signal.Signals, stage: str, halves: Store, settled: Store, tmp_path: Path
) -> None:
    store, said = copied(halves, tmp_path / "x"), list[Progress]()

    def report(progress: Progress) -> None:
        said.append(progress)
        if progress.stage == stage and progress.done and len([each for each in said if each.stage == stage]) == 2:
            os.kill(os.getpid(), signum)

    with pytest.raises(Interrupted, match=f"stopped by {signum.name}: what is done is kept; run the same") as caught:
        project(store, report=report)
    assert caught.value.exit_code == 128 + signum
    assert {each.stage for each in said} == ({"settling"} if stage == "settling" else {"settling", "projecting"})
    assert Store(store).manifest.projected is None
    before = said.copy()
    assert_same(project(store, report=said.append).path, settled)
    if stage == "projecting":  # what was done is not done again
        last = [each for each in before if each.stage == stage][-1]
        (total,) = {each.total for each in said[len(before) :] if each.stage == stage}
        assert total + last.done == last.total and "settling" not in {each.stage for each in said[len(before) :]}


def test_progress(projected: Store, finished: Store, tmp_path: Path) -> None:
    said: list[Progress] = []
    project(copied(finished, tmp_path / "x"), report=said.append)
    stages = list(dict.fromkeys(each.stage for each in said))
    assert stages == ["projecting", "keeping pictures of"]
    winners = [each for each in said if each.stage == "projecting"]
    assert winners[-1].done == winners[-1].total == 4 * RANKS * (6 + 7 + 5)
    assert winners[0].unit == "winners" and [each.done for each in winners] == sorted(each.done for each in winners)


# Images that have gone


@pytest.fixture(scope="module")
def damaged(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str], Store]:
    """Makes scans of photographs of their own, of which one is bad from the start."""
    folder = tmp_path_factory.mktemp("damaged")
    shutil.copytree(photos, folder / "photos")
    (folder / "photos" / "brick" / "006.jpg").write_bytes(b"no picture")
    stores = {name: scan(folder / "photos", folder / name, precision=name) for name in ("fp32", "bf16")}

    def make(place: Path, precision: str) -> Store:
        shutil.copytree(folder / "photos", place / "photos", copy_function=shutil.copy2)
        return Store(copied(stores[precision], place / "x"))

    return make


def gone(store: Store) -> tuple[int, int]:
    """Makes the pictures of two winners unreadable; they are the image that most channels share, and another."""
    image = store["bn2"].lists["max", "top"].image[:, :RANKS]
    first, second = np.unique(image)[[0, -1]].tolist()
    for number, lost in ((first, True), (second, False)):
        path = Path(store.catalog.entry(number).source.decode())
        data, status = path.read_bytes(), path.stat()
        path.unlink()
        _MENDING.append((path, data, status))
        if not lost:
            path.write_bytes(data + b"more")
    return first, second


_MENDING: list[tuple[Path, bytes, os.stat_result]] = []


@pytest.fixture
def mended() -> Any:
    """Puts pictures back after a test."""
    yield
    while _MENDING:
        path, data, status = _MENDING.pop()
        path.write_bytes(data)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_images_that_have_gone(
    precision: str, damaged: Callable[[Path, str], Store], mended: None, tmp_path: Path
) -> None:
    whole = project(damaged(tmp_path / "whole", precision))
    scans = whole.errors().to_pylist()
    assert [row["key"] for row in scans] == ["brick/006.jpg"] and scans[0]["stage"] == "decode"
    store = damaged(tmp_path / "less", precision)
    lost = gone(store)
    project(store)
    bad = store.errors().to_pylist()
    assert bad[0] == scans[0]
    assert [(row["image"], row["stage"]) for row in bad[1:]] == [(number, "project") for number in sorted(lost)]
    assert "No such file" in bad[1]["error"] and "bytes, but had" in bad[2]["error"]
    for tap in store:
        image, mine = store[tap].lists["max", "top"].image[:, :RANKS], arrays(store, tap).winners
        if precision == "fp32":
            theirs = arrays(whole, tap).winners
            assert np.array_equal(image, whole[tap].lists["max", "top"].image[:, :RANKS])
        missing = np.isin(image, lost)
        for name, values in mine.items():
            fill = EMPTY.get(name, 128 if name.startswith("projection/") else np.nan)
            empty = np.full_like(values[missing], fill)
            assert np.array_equal(values[missing], empty, equal_nan=values.dtype.kind == "f")
            if precision == "fp32":
                assert values[~missing].tobytes() == theirs[name][~missing].tobytes()
    assert not np.isin(store.thumbs().numbers, lost).any()
    if precision == "fp32":
        assert set(whole.thumbs().numbers.tolist()) - set(store.thumbs().numbers.tolist()) == set(lost)
    else:
        certain = arrays(store, "bn2").group["certain"][:]
        candidates = store.candidates("bn2", ("max", "top")).image
        assert not certain[np.isin(candidates, lost).any(1)].any()
    before = contents(store.path)
    project(store)  # nothing is left to do
    assert contents(store.path) == before


def test_scanning_again_keeps_everything(
    damaged: Callable[[Path, str], Store], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = project(damaged(tmp_path, "fp32"))
    before, images = contents(store.path), Path(store.manifest.images["source"])
    caplog.set_level(logging.INFO)
    again = scan(images, store.path, precision="fp32")
    assert "done already" in caplog.text and again.manifest == store.manifest
    assert contents(store.path) == before


def test_scanning_errors_again_voids_what_was_projected(
    damaged: Callable[[Path, str], Store], mended: None, tmp_path: Path
) -> None:
    source = damaged(tmp_path / "a", "bf16")
    images = Path(source.manifest.images["source"])
    bad = images / "brick" / "006.jpg"
    _MENDING.append((bad, bad.read_bytes(), bad.stat()))
    store = project(source)
    scan(images, store.path, precision="bf16", retry_errors=True)  # it is still bad
    plain = contents(damaged(tmp_path / "b", "bf16").path)
    assert contents(store.path) == plain
    assert "projected.json" not in names(store.path / "run")
    assert Store(store.path).manifest.projected is None
    with pytest.raises(MaxactError, match="has not been projected"):
        Store(store.path).winners("bn1")
    assert project(store.path).winners("bn1").projected().all()


# Where images and networks come from


def test_a_dataset(tmp_path: Path) -> None:
    store = scan(Pictures(), tmp_path / "x")
    with pytest.raises(MaxactError, match=r"item/[0-9] is an item of a Dataset: give that again"):
        project(store.path, layers="bn2")
    found = project(store.path, layers="bn2", images=Pictures())
    assert found.winners("bn2").projected().all() and found.errors().num_rows == 0
    crops, boxes = found.winners("bn2").read("crop", 0, 7), found.winners("bn2").read("box", 0, 7)
    image = found["bn2"].lists["max", "top"].image
    y0, x0, y1, x1 = boxes[3, 0].tolist()
    pixels = found.pixels([image[3, 0]], Pictures()).numpy()[0]
    outer = found.winners("bn2").read("crop_box", 0, 7)[3, 0]
    inside = crops[3, 0][y0 - outer[0] : y1 - outer[0], x0 - outer[1] : x1 - outer[1]]
    assert np.array_equal(inside, pixels[y0:y1, x0:x1])


def test_a_module(photos: Path, tmp_path: Path) -> None:
    store = scan(photos, tmp_path / "x", tiny.network())
    with pytest.raises(MaxactError, match=r"x: was scanned with a module of yours \(Tiny\); give it as network"):
        project(store)
    other = tiny.network()
    other.get_parameter("fc.bias").data += 1
    with pytest.raises(MaxactError, match=r"x: was scanned with other weights .* than those of Tiny now"):
        project(store, network=other)
    assert project(store, network=tiny.network(), layers="bn1").winners("bn1").projected().all()


def test_a_network_with_weights_of_a_file(photos: Path, tmp_path: Path) -> None:
    network = tiny.network()
    network.get_parameter("conv1.weight").data += 0.1
    weights = tmp_path / "w.safetensors"
    safetensors.torch.save_file(network.state_dict(), weights)
    store = scan(photos, tmp_path / "x", weights=weights)
    assert project(store, layers="bn1").winners("bn1").projected().all()
    weights.rename(tmp_path / "moved.safetensors")
    with pytest.raises(MaxactError, match=r"w\.safetensors"):
        project(store, layers="bn2")
    with pytest.raises(MaxactError, match=r"x: was scanned with other weights .*w\.safetensors.* give the ones that"):
        safetensors.torch.save_file(tiny.network().state_dict(), tmp_path / "other.safetensors")
        project(store, layers="bn2", weights=tmp_path / "other.safetensors")
    assert project(store, layers="bn2", weights=tmp_path / "moved.safetensors").winners("bn2").projected().all()


def shifted(picture: Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(picture.resize((32, 32)), np.float32)).permute(2, 0, 1)
    return pixels / 100 - 1


def test_a_preprocess_function(photos: Path, tmp_path: Path) -> None:
    store = scan(photos, tmp_path / "x", preprocess="test_run_project:shifted")
    store = project(store, layers="bn2")
    found = arrays(store, "bn2").winners
    assert np.isnan(found["source_box"]).all() and (found["crop_box"] >= -2).all()
    image = store["bn2"].lists["max", "top"].image[0, 0]
    pixels = store.pixels([image]).numpy()[0]
    low, high = pixels.min(), pixels.max()
    wanted = np.rint((pixels - low) * (255 / (high - low))).transpose(1, 2, 0)
    (y0, x0, y1, x1), outer = found["box"][0, 0].tolist(), found["crop_box"][0, 0]
    inside = found["crop"][0, 0][y0 - outer[0] : y1 - outer[0], x0 - outer[1] : x1 - outer[1]]
    assert np.abs(inside - wanted[y0:y1, x0:x1]).max() <= 1
    assert store.manifest.projected is not None and store.manifest.projected["deviation"] < 1e-5


# What is refused


def test_layers_and_channels_that_are_not_there(projected: Store, tmp_path: Path) -> None:
    store = copied(projected, tmp_path / "x")
    with pytest.raises(UsageError, match=r"layers: .*/x has no tap that matches 'bn3'; close to it: bn[12]"):
        project(store, layers=["bn1", "bn3"])
    with pytest.raises(UsageError, match=r"channels: expected some from 0 to 6"):
        project(store, channels=[7, -1])
    assert project(store, channels=[6, 0], overwrite=True).winners("bn1").projected().tolist() == [True] + [False] * 5
    with pytest.raises(UsageError, match=r"channels: .*/x has no tap 'bn4' \(near: bn"):
        project(store, channels={"bn1": [0], "bn4": [1]})
    some = project(store, channels={"bn1": [2, 4], "fc": [1]}, overwrite=True)
    assert np.flatnonzero(some.winners("bn1").projected()).tolist() == [2, 4]
    with pytest.raises(MaxactError, match="bn2/max/top has not been projected"):
        some.winners("bn2")
    for settings, said in (({"ranks": 0}, "ranks"), ({"method": "magic"}, "methods"), ({"max_size": 4}, "max_size")):
        with pytest.raises(UsageError, match=f"^{said}: expected "):
            project(store, **settings)


def test_a_store_in_use(projected: Store, tmp_path: Path) -> None:
    store = copied(projected, tmp_path / "x")
    with Store.lock(store), pytest.raises(MaxactError, match=r"x: in use by process \d+ on .*; wait for it"):
        project(store)


def test_an_unfinished_scan(finished: Store, tmp_path: Path) -> None:
    store = Store(copied(finished, tmp_path / "x"))
    store.reopen()
    with pytest.raises(MaxactError, match="x: the scan is not finished; run `maxact scan` again first"):
        project(store.path)


def test_too_little_room(finished: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        total: int
        used: int
        free: int

    store = copied(finished, tmp_path / "x")
    before = contents(store)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 1 << 40, (16 << 20) + 1000))
        with pytest.raises(MaxactError, match=r"x: needs up to 17 MB, and 17 MB are free; make room, or choose"):
            project(store)
    assert contents(store) == before
    assert project(store, max_size=64, overwrite=True).winners("fc").projected().all()
