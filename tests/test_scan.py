"""The loop from files to peaks, against a reference that keeps every map (support.py).

"Identical" means to the bit, for images, positions and scores of maxima: the reference runs the same padded batches
with as many threads. Means are float64 sums in the reference and blockwise float32 sums in maxact: MEAN says how
far they may be apart, relative to the largest value of the channel, and two images may change places only where
their means are that close.
"""

from __future__ import annotations

import itertools
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import models

import maxact
from maxact.catalog import Catalog
from maxact.config import ScanConfig
from maxact.demo import network as lite0
from maxact.fetch import Unreadable
from maxact.numerics import numerics
from maxact.preprocess import Preprocess
from maxact.process import Tick
from support import (
    SIDE,
    THREADS,
    Place,
    all_maps,
    describe,
    lively,
    make_job,
    photograph,
    pixels,
    rank,
    same,
    scan_all,
    scan_job,
    write_photographs,
)

MEAN = 1e-5
both = pytest.mark.parametrize("decoder", ["dali", "torchvision"])


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def vgg() -> nn.Module:
    """vgg11's features with a small classifier: its own has 120 million weights."""
    with torch.device("meta"):
        network = models.vgg11()
    network.features.to_empty(device="cpu")
    for module in network.features:
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.bias)
    network.avgpool = nn.AdaptiveAvgPool2d(2)
    network.classifier = nn.Sequential(nn.Linear(2048, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, 10))
    return lively(network)


def vit() -> nn.Module:
    torch.manual_seed(0)
    network = models.VisionTransformer(SIDE, 16, 2, 2, 32, 64, num_classes=8)
    nn.init.normal_(network.heads.head.weight)  # which starts as zeros
    return network.eval()


def swin() -> nn.Module:
    torch.manual_seed(0)
    return models.SwinTransformer([4, 4], 16, [2, 2], [2, 2], [4, 4], num_classes=8).eval()


VGG = same(*(f"features.{i}" for i in (0, 3, 6, 8, 11, 13, 16, 18)), "classifier.0", "classifier.3")
RESNET = same(
    "bn1",
    *(f"layer{i}.{j}.bn{k}" for i in (1, 2, 3, 4) for j in (0, 1) for k in (1, 2)),
    *(f"layer{i}.0.downsample.1" for i in (2, 3, 4)),
    "fc",
)
VIT = same("conv_proj", "heads.head") | {
    f"encoder.layers.encoder_layer_{i}.mlp.{j}": Place(f"encoder.layers.encoder_layer_{i}.mlp.{j}", axis=-1)
    for i in (0, 1)
    for j in (0, 3)
}
SWIN = same("features.0.0", "head") | {
    path: Place(path, axis=-1)
    for path in (*(f"features.{i}.{j}.mlp.{k}" for i in (1, 3) for j in (0, 1) for k in (0, 3)), "features.2.reduction")
}


def lite(network: nn.Module) -> dict[str, Place]:
    places = ["_bn0", "_bn1", "_fc"]
    for i in range(16):
        places += [f"_blocks.{i}._bn{j}" for j in range(3)] if i else ["_blocks.0._bn1", "_blocks.0._bn2"]
    return same(*places)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "vgg11": (vgg, lambda network: VGG),
    "resnet18": (lambda: lively(models.resnet18()), lambda network: RESNET),
    "efficientnet_lite0": (lite0, lite),
    "vit": (vit, lambda network: VIT),
    "swin": (swin, lambda network: SWIN),
}


def assert_same_means(found: Any, maps: np.ndarray, sign: int) -> None:
    """The ranked means are the reference's to MEAN, and so are the images but for means as close as that."""
    means = maps.astype(np.float64).mean(2)  # [N, C]
    k = found.image.shape[1]
    near = MEAN * np.abs(maps).max((0, 2))[:, None]  # [C, 1]
    expected = sign * np.sort(sign * means, 0)[:k].T  # [C, k]
    assert (np.diff(np.sort(found.image)) > 0).all() and found.image.min() >= 0
    assert (np.abs(found.score - expected) <= near).all()
    assert (np.abs(np.take_along_axis(means.T, found.image, 1) - expected) <= near).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_gives_what_the_reference_gives(name: str, photos: Path) -> None:
    make, places_of = NETWORKS[name]
    network = make()
    places = places_of(network)
    found = scan_all(network, photos, scores=("max", "mean"), top=6, bottom=3, batch=8, shard=16)
    images = pixels(files(photos))
    maps = all_maps(network, images, places, batch=8)  # 21 = 8 + 8 + 5: no batch spans two shards
    assert {tap.name for tap in found.taps} == set(places)
    for tap in found.taps:
        own = maps[tap.name]
        assert own.shape == (21, tap.channels, tap.positions)
        assert found.lists(tap.name) == rank(own, range(21), 6), tap.name
        assert found.lists(tap.name, end="bottom") == rank(own, range(21), 3, "bottom"), tap.name
        assert_same_means(found.lists(tap.name, "mean"), own, -1)
        assert_same_means(found.lists(tap.name, "mean", "bottom"), own, 1)
        stats, expected = found.stats(tap.name), describe(own)
        for column in ("count", "min", "max"):
            np.testing.assert_array_equal(stats[column], expected[column], err_msg=f"{tap.name} {column}")
        np.testing.assert_array_equal(stats["active"], expected["active"].astype(np.float32))
        largest = np.abs(own).max()
        np.testing.assert_allclose(stats["mean"], expected["mean"], rtol=0, atol=MEAN * largest)
        # a deviation is the root of a difference, and may be a thousand times smaller than the mean
        np.testing.assert_allclose(stats["std"], expected["std"], rtol=1e-3, atol=1e-3 * largest)


@both
def test_from_the_files_to_the_store(decoder: Any, photos: Path, tmp_path: Path) -> None:
    """The function that users call, with either decoder, to the store and back."""
    network = Small()
    maps = all_maps(network, pixels(files(photos)), SMALLS, batch=8)
    options: dict[str, Any] = {"resize": SIDE, "crop": SIDE, "batch": 8, "threads": THREADS}
    store = maxact.scan(network, photos, tmp_path / "x.zarr", top=4, bottom=2, decoder=decoder, **options)
    assert list(store) and set(store) == set(SMALLS)
    for name in store:
        for end, k in (("top", 4), ("bottom", 2)):
            image, score, position = store[name].lists["max", end]
            expected = rank(maps[name], range(21), k, end)
            assert position is not None
            np.testing.assert_array_equal(image, expected.image)
            np.testing.assert_array_equal(score, expected.score)
            np.testing.assert_array_equal(
                position[..., 0] * store[name].tap.map[1] + position[..., 1], expected.position
            )
    best = store["head"].top(0).to_pylist()
    keys = [str(path.relative_to(photos)) for path in files(photos)]
    assert [row["key"] for row in best] == [keys[row["image"]] for row in best]


def test_resized_images_are_torchvisions(photos: Path) -> None:
    preprocess = Preprocess(
        resize=40, crop=(32, 36), interpolation="bicubic", mean=(0.5, 0.4, 0.3), std=(0.3, 0.2, 0.1)
    )
    network = Small()
    maps = all_maps(network, pixels(files(photos), preprocess), SMALLS, 4, preprocess)
    found = scan_all(network, photos, preprocess=preprocess)
    for name in SMALLS:
        assert found.lists(name) == rank(maps[name], range(21), 5)


class Small(nn.Module):
    """Quick, and with a little of everything: a convolution, a norm, an activation in place, a stride, a head."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Conv2d(8, 16, 3, stride=2)
        self.head = nn.Linear(16, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(self.relu(self.norm(self.conv(x))))
        return self.head(x.mean((2, 3)))


SMALLS = same("norm", "down", "head")


# What the result must not depend on


def test_shards_and_their_order_change_nothing(photos: Path) -> None:
    network, everything = Small(), {"scores": ("max", "mean"), "top": 3, "bottom": 2}
    kinds = {}
    for shard in (4, 8, 12, 1000):
        orders = list(itertools.permutations(range(-(-21 // shard))))
        for order in orders[:: max(1, len(orders) // 6)]:
            kinds[shard, order] = scan_all(network, photos, shard=shard, order=order, **everything).bits()
    assert len(kinds) == 6 + 6 + 2 + 1
    first, *others = kinds.values()
    assert all(bits == first for bits in others)


def test_the_same_again_is_the_same(photos: Path) -> None:
    first, second = (scan_all(Small(), photos, scores=("max", "mean"), batch=8) for _ in range(2))
    assert first.bits() == second.bits()


@both
@pytest.mark.parametrize("threads", [1, 3])
def test_decoding_threads_change_nothing(decoder: Any, threads: int, photos: Path) -> None:
    network = Small()
    found = scan_all(network, photos, decoder=decoder, decode_threads=threads)
    for name, maps in all_maps(network, pixels(files(photos)), SMALLS, 4).items():
        assert found.lists(name) == rank(maps, range(21), 5)


# Numbers of images


@pytest.mark.parametrize(
    ("count", "batch", "shard"), [(8, 4, 8), (9, 4, 8), (9, 4, 4), (3, 4, 4), (1, 4, 4), (1, 1, 1)]
)
def test_counts_that_do_and_do_not_fill_a_batch(
    count: int, batch: int, shard: int, photos: Path, tmp_path: Path
) -> None:
    """N mod batch of 0 and 1, and fewer images than a batch; k is 5, so also fewer images than k."""
    for number, path in enumerate(files(photos)[:count]):
        shutil.copy(path, tmp_path / f"{number}.jpg")
    network = Small()
    maps = all_maps(network, pixels(files(tmp_path)), SMALLS, batch)
    found = scan_all(network, tmp_path, batch=batch, shard=shard, bottom=5)
    for name, own in maps.items():
        assert found.lists(name) == rank(own, range(count), 5)
        assert found.lists(name, end="bottom") == rank(own, range(count), 5, "bottom")
        assert (found.stats(name)["count"] == count * own.shape[2]).all()
    assert sum(tick.images for tick in found.ticks) == count


def test_fewer_images_than_k_leave_places_empty(photos: Path) -> None:
    found = scan_all(Small(), photos, top=30).lists("norm")
    assert (found.image[:, 21:] == -1).all() and np.isnan(found.score[:, 21:]).all()
    assert (np.sort(found.image[:, :21]) == np.arange(21)).all()


# Ties


def test_equal_images_rank_by_number(photos: Path, tmp_path: Path) -> None:
    first, second = files(photos)[0], files(photos)[5]
    for number in range(11):
        shutil.copy(second if number in (3, 7) else first, tmp_path / f"{number:02}.jpg")
    network = Small()
    # one batch, because a batch's places need not all give the same bits
    found = scan_all(network, tmp_path, batch=11, top=11, bottom=11, scores=("max", "mean"))
    for name, maps in all_maps(network, pixels(files(tmp_path)), SMALLS, 11).items():
        assert found.lists(name) == rank(maps, range(11), 11)
        assert found.lists(name, end="bottom") == rank(maps, range(11), 11, "bottom")
    order = [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert found.lists("norm").image[0].tolist() in ([*order, 3, 7], [3, 7, *order])


class Saturating(nn.Module):
    """Nearly every map reaches 6 somewhere, most in many places."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(3, 8, 5, padding=2)
        self.act = nn.ReLU6()
        nn.init.normal_(self.conv.weight, 0, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.conv(x))


@pytest.mark.parametrize("shard", [4, 12, 24])
def test_saturated_maps_tie(shard: int, photos: Path) -> None:
    network = Saturating()
    maps = all_maps(network, pixels(files(photos)), same("act"), 4)["act"]
    best = maps.max(2)
    assert ((best == 6).sum(0) > 10).any()  # more than are kept have the same score
    found = scan_all(network, photos, at="activation", shard=shard, bottom=5)
    assert [tap.name for tap in found.taps] == ["act"]
    assert found.lists("act") == rank(maps, range(21), 5)
    assert found.lists("act", end="bottom") == rank(maps, range(21), 5, "bottom")


def test_constant_images(tmp_path: Path) -> None:
    """Without padding a constant image gives constant maps: each is a tie of all its positions."""
    for number, level in enumerate((10, 200, 90, 200, 0, 255, 10)):
        Image.new("RGB", (SIDE, SIDE), (level, level, level)).save(tmp_path / f"{number}.png")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 6, 1))
    maps = all_maps(network, pixels(files(tmp_path)), same("0"), 7)["0"]
    found = scan_all(network, tmp_path, batch=7, bottom=7, top=7).lists("0")
    assert found == rank(maps, range(7), 7)
    order = [5, 1, 3, 2, 0, 6, 4]  # by level, and by number among equals
    falling = [order, [4, 0, 6, 2, 1, 3, 5]]
    assert all(row in falling for row in found.image.tolist())
    assert (maps.min(2) < maps.max(2)).any() or (found.position == 0).all()


# NaN and infinity


class Unfit(nn.Module):
    """Makes `value` at one position of every other channel of the darker half of the images, as an overflow would.
    (Blank places are dark too.)"""

    def __init__(self, value: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.value = value
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dark = x.mean((1, 2, 3)) < -0.07
        x = self.conv(x)
        x[dark, ::2, 5, 7] = self.value
        return self.norm(x)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_maps_that_are_not_finite_are_left_out_and_counted(value: float, photos: Path) -> None:
    network = Unfit(value)
    options: dict[str, Any] = {"top": 21, "bottom": 21, "scores": ("max", "mean"), "layers": ("norm",)}
    maps = all_maps(network, pixels(files(photos)), same("norm"), 4)["norm"]
    unfit = ~np.isfinite(maps).all(2)  # [N, C]
    assert 2 < unfit[:, 0].sum() < 19 and not unfit[:, 1].any()
    found = scan_all(network, photos, **options)
    assert found.lists("norm") == rank(maps, range(21), 21)
    assert found.lists("norm", end="bottom") == rank(maps, range(21), 21, "bottom")
    for score, end in itertools.product(("max", "mean"), ("top", "bottom")):
        lists = found.lists("norm", score, end)
        filled = lists.image >= 0
        assert np.isfinite(lists.score[filled]).all()
        assert (filled.sum(1) == 21 - unfit.sum(0)).all()
        for channel in range(8):
            assert set(lists.image[channel][filled[channel]]) == set(np.flatnonzero(~unfit[:, channel]))
    np.testing.assert_array_equal(found.unfit("norm"), unfit.sum(0))
    for name, values in describe(maps).items():
        np.testing.assert_allclose(found.stats("norm")[name], values, rtol=1e-4, atol=1e-5)
    # the images and channels beside them give what they give when nothing breaks
    whole = scan_all(Unfit(0.0), photos, **options)
    for channel in range(1, 8, 2):
        assert (found.lists("norm").image[channel] == whole.lists("norm").image[channel]).all()
        assert (found.lists("norm").score[channel] == whole.lists("norm").score[channel]).all()


def test_a_network_that_gives_only_nan(photos: Path) -> None:
    network = Small()
    nn.init.constant_(network.norm.weight, float("nan"))
    found = scan_all(network, photos)
    assert (found.lists("norm").image == -1).all() and np.isnan(found.lists("norm").score).all()
    assert (found.stats("norm")["count"] == 0).all() and np.isnan(found.stats("norm")["mean"]).all()
    assert (found.unfit("norm") == 21).all()


# Bad files


def spoil(kind: str, path: Path) -> None:
    """Makes a bad file of the photograph at `path`, of one of the kinds that data sets hold."""
    whole = path.read_bytes()
    if kind == "gif":
        Image.open(path).save(path, "GIF")
    else:
        path.write_bytes(
            {
                "empty": b"",
                "truncated": whole[: len(whole) // 2],
                "no end marker": whole[:-2],
                "random": np.random.default_rng(0).bytes(3000),
                "html": b"<!DOCTYPE html><html><body>404 not found</body></html>",
            }[kind]
        )


KINDS = ("empty", "truncated", "no end marker", "random", "html", "gif")


def without(found: Any, bad: set[int], maps: dict[str, np.ndarray]) -> None:
    """The scan gave exactly what the reference gives for the images that are not bad."""
    good = [number for number in range(21) if number not in bad]
    for name, own in maps.items():
        assert found.lists(name) == rank(own[good], good, 21)
        np.testing.assert_allclose(found.stats(name)["mean"], describe(own[good])["mean"], rtol=1e-4, atol=1e-6)
        assert (found.stats(name)["count"] == len(good) * own.shape[2]).all()
    assert [image.image for image in found.bad] == sorted(bad)
    assert {number for tick in found.ticks for number in (image.image for image in tick.bad)} == bad


@both
@pytest.mark.parametrize("kind", [*KINDS, "together"])
def test_bad_files_cost_only_themselves(kind: str, decoder: Any, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    shutil.copytree(photos, folder)
    paths = files(folder)
    images = pixels(paths)
    spoiled = dict(zip((0, 5, 6, 7, 13, 20), KINDS, strict=True)) if kind == "together" else {6: kind}
    for number, own in spoiled.items():
        spoil(own, paths[number])
        images[number] = 0  # the place of a bad image is blank, which its neighbours may see
    network = Small()
    found = scan_all(network, folder, top=21, decoder=decoder, batch=4, shard=12)
    without(found, set(spoiled), all_maps(network, images, SMALLS, 4))
    for image in found.bad:
        assert (image.stage, image.key) == ("decode", str(paths[image.image].relative_to(folder)))
        assert image.error and "\n" not in image.error


@both
def test_a_batch_of_nothing_but_bad_files(decoder: Any, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    shutil.copytree(photos, folder)
    paths = files(folder)
    images = pixels(paths)
    for number in (4, 5, 6, 7, 20):  # the second batch, and the last, which is one image
        spoil("random", paths[number])
        images[number] = 0
    network = Small()
    found = scan_all(network, folder, top=21, decoder=decoder, batch=4, shard=8)
    without(found, {4, 5, 6, 7, 20}, all_maps(network, images, SMALLS, 4))


@both
def test_neighbours_do_not_change_by_a_bit(decoder: Any, photos: Path, tmp_path: Path) -> None:
    """A bad file against a good one in the same place: all others rank with the same scores."""
    shutil.copytree(photos, tmp_path / "images")
    paths = files(tmp_path / "images")
    network = lively(models.resnet18(), 3)
    whole = scan_all(network, photos, top=21, decoder=decoder)
    spoil("truncated", paths[9])
    found = scan_all(network, tmp_path / "images", top=21, decoder=decoder)
    for tap in whole.taps:
        before, after = whole.lists(tap.name), found.lists(tap.name)
        for channel in range(tap.channels):
            others = before.image[channel] != 9
            assert before.image[channel][others].tolist() == after.image[channel][:20].tolist()
            assert before.score[channel][others].tolist() == after.score[channel][:20].tolist()


def test_grey_images_are_left_out_and_counted(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "images")
    paths = files(tmp_path / "images")
    assert all("brick" in str(path) for path in paths[3:6])  # a grey photograph
    network = Small()
    found = scan_all(network, tmp_path / "images", top=21, skip_grey=True, shard=8)
    numbers = set(range(21)) - {3, 4, 5}
    maps = all_maps(network, pixels(paths), SMALLS, 4)
    for name, own in maps.items():
        good = sorted(numbers)
        assert found.lists(name) == rank(own[good], good, 21)
    assert sum(tick.grey for tick in found.ticks) == sum(found.partial.grey.values()) == 3
    assert sum(tick.images for tick in found.ticks) == 21 and not found.bad


# 16 bits


def test_16_bit_candidates_hold_the_true_winners(tmp_path: Path) -> None:
    """bf16 ranks coarsely, and so keeps more: of a real network the float32 winners are among those.

    That can only be where they stand out: some channels are the same for nearly all images, down to a step of bf16.
    And bf16's errors grow with depth, most on images as small as these, so one channel in a thousand may lose one.
    """
    paths = write_photographs(tmp_path, 90)
    network = lite0()
    maps = all_maps(network, pixels(paths), lite(network), batch=18)
    found = scan_all(network, tmp_path, precision="bf16", batch=18, top=3)
    outstanding, lost, moved = 0, 0, 0
    for name, own in maps.items():
        best, exact, candidates = own.max(2), rank(own, range(90), 3), found.lists(name)
        assert candidates.image.shape[1] == 3 + 32
        clear = exact.score[:, -1] - np.median(best, 0) > 0.02 * np.abs(best).max(0)
        missing = ~(exact.image[:, :, None] == candidates.image[:, None]).any(2).all(1)
        outstanding, lost = outstanding + clear.sum(), lost + (missing & clear).sum()
        moved += (exact.image != candidates.image[:, :3]).any(1).sum()
        # the candidates' scores are the network's own in bf16: near to the true ones
        truth = np.take_along_axis(best.T, candidates.image, 1)
        assert np.median(np.abs(truth - candidates.score)) < 0.02 * np.abs(own).max()
    channels = sum(tap.channels for tap in found.taps)
    assert outstanding > 0.9 * channels
    assert lost <= 0.001 * outstanding
    assert moved > 0.1 * channels  # the candidates are there for a reason


def test_how_many_candidates_are_kept() -> None:
    for precision, top, kept in [
        ("fp32", 50, 50),
        ("bf16", 50, 100),
        ("bf16", 9, 41),
        ("fp16", 32, 64),
        ("fp16", 1, 33),
    ]:
        assert ScanConfig(precision=precision, top=top).kept() == {("max", "top"): kept}  # type: ignore[arg-type]


# The rest of the loop


@pytest.mark.parametrize(("shard", "finished"), [(4, [0, 1, 2]), (8, [0])])
def test_a_stop_gives_what_is_finished(shard: int, finished: list[int], photos: Path) -> None:
    """It comes in the third batch: of shards of two batches, the second has one to go and is dropped."""
    job = make_job(Small(), Catalog.build(photos), shard=shard)
    stop, ticks = threading.Event(), []

    def report(tick: Tick) -> None:
        ticks.append(tick)
        if len(ticks) == 3:
            stop.set()

    partials = list(scan_job(job, iter(job.catalog.shards(shard)), stop, report))
    assert [sorted(partial.shards) for partial in partials] == [[index] for index in finished]
    assert len(ticks) == 3


class Gone(torch.utils.data.Dataset[Any]):
    """Photographs, but those from `start` on cannot be read."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __len__(self) -> int:
        return 21

    def __getitem__(self, index: int) -> Image.Image:
        if index >= self.start:
            raise LookupError("gone")
        return photograph(index)


@pytest.mark.parametrize("start", [0, 8, 16])
def test_what_is_finished_is_given_before_the_unreadable_ends_it(start: int) -> None:
    job = make_job(Small(), Catalog.build(Gone(start)), shard=8)
    given = []
    with pytest.raises(Unreadable, match="gone"):
        for partial in scan_job(job, iter(job.catalog.shards(8)), threading.Event(), lambda tick: None):
            given += sorted(partial.shards)
    assert given == list(range(start // 8))


def test_leaving_the_loop_leaves_nothing_behind(photos: Path) -> None:
    """However a scan ends, the network has no hooks, the process no threads and torch the settings of before."""
    job = make_job(Small(), Catalog.build(photos), shard=4, threads=1)
    shards = job.catalog.shards(4)
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    running = scan_job(job, iter(shards), threading.Event(), lambda tick: None)
    next(running)
    assert torch.get_num_threads() == 1
    running.close()  # type: ignore[attr-defined]
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in job.network.modules())

    def fail(tick: Tick) -> None:
        raise RuntimeError("the caller's own")

    with pytest.raises(RuntimeError, match="the caller's own"):
        list(scan_job(job, iter(shards), threading.Event(), fail))
    assert not any(module._forward_hooks for module in job.network.modules())
    for thread in threading.enumerate():
        if thread.name.startswith(("maxact", "decode")):
            thread.join(10)
            assert not thread.is_alive()


def test_numerics_are_restored_after_an_error() -> None:
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    with pytest.raises(ValueError), numerics(1):
        assert torch.get_num_threads() == 1 and torch.get_float32_matmul_precision() == "highest"
        raise ValueError
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == before
