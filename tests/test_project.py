"""What the second pass writes, winner by winner, against whole images, plain autograd and hand-made fields.

The reference: hooks on a copy of the network rectify gradients at its ReLUs; the fields are worked out by hand below;
numpy and PIL cut and scale.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from PIL import Image
from torch import nn

import maxact
from maxact.preprocess import Preprocess
from maxact.store import Store
from stores import scan
from support import SIDE, SMALL, lively, normalised, pixels

METHODS = ("deconvnet", "guided", "gradient")
RANKS = 3


class Deep(nn.Module):
    """Maps with strides, pools and borders, a map of 16 tokens, and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 4, 5, stride=2, padding=2), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
            *(nn.Conv2d(4, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(inplace=True)),
            *(nn.Conv2d(5, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
        )
        self.pool, self.mix, self.relu, self.fc = nn.AvgPool2d(4), nn.Linear(4, 3), nn.ReLU(), nn.Linear(48, 4)
        self.preprocess: Preprocess = SMALL

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.mix(self.pool(self.features(images)).flatten(2).transpose(1, 2))  # [N, 16, 3]
        scores: torch.Tensor = self.fc(self.relu(tokens).flatten(1))
        return scores


def deep() -> nn.Module:
    torch.manual_seed(0)
    return lively(Deep())


# size, start and stride of the fields before clipping; the tokens lie in rows of four, and see all columns together
FIELDS = {"features.1": (5, -2, 2), "features.5": (17, -8, 4), "features.8": (25, -12, 4), "mix": (37, -12, 16)}
MAPS = {"features.1": (32, 32), "features.5": (16, 16), "features.8": (16, 16), "mix": (16, 1), "fc": (1, 1)}


def fields_of(tap: str, position: np.ndarray) -> tuple[list[int], list[int]]:
    """The box of a unit before clipping and after it."""
    if tap == "fc":
        outer = [-12, -12, 73, 73]
    else:
        size, start, stride = FIELDS[tap]
        row, column = position.tolist()
        y, x = start + stride * (row // 4 if tap == "mix" else row), start + stride * column
        outer = [y, x, y + size, start + 3 * stride + size if tap == "mix" else x + size]
    return outer, np.clip(outer, 0, SIDE).tolist()


@dataclass
class Reference:
    """Whole images, one at a time, through a copy of the network."""

    images: np.ndarray
    network: nn.Module = field(default_factory=lambda: copy.deepcopy(deep()))
    known: dict[Any, Any] = field(default_factory=dict)

    def __call__(
        self, tap: str, method: str, image: int, channel: int, position: np.ndarray | None, seed: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """The signal [H, W, 3] and the map [h, w] of a channel."""
        key = (tap, method, image, channel, None if position is None else tuple(position), seed)
        if key not in self.known:
            self.known[key] = self.project(tap, method, image, channel, position, seed)
        found: tuple[np.ndarray, np.ndarray] = self.known[key]
        return found

    def project(self, tap: str, method: str, image: int, channel: int, position: Any, seed: str) -> Any:
        handles, kept = [], []
        rules: dict[str, Callable[..., Any]] = {
            "deconvnet": lambda module, before, after: (after[0].clamp(min=0),),
            "guided": lambda module, before, after: (before[0].clamp(min=0),),
        }
        for module in self.network.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False
                if method in rules:
                    handles.append(module.register_full_backward_hook(rules[method]))
        record = self.network.get_submodule(tap)
        handles.append(record.register_forward_hook(lambda module, given, output: kept.append(output)))
        leaf = normalised(torch.from_numpy(self.images[image])[None], SMALL).requires_grad_()
        self.network(leaf)
        for handle in handles:
            handle.remove()
        (output,) = kept
        maps = (output.movedim(-1, 1) if tap in ("mix", "fc") else output)[0, channel]
        maps = maps.reshape(MAPS[tap])
        start = maps.sum() if position is None else maps[tuple(position.tolist())]
        value = float(start.detach()) / (maps.numel() if position is None else 1)
        if seed == "activation" and value > 0:
            start = start * value
        (signal,) = torch.autograd.grad(start, leaf)
        return signal[0].permute(1, 2, 0).numpy(), maps.detach().numpy()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Images this small go through the network in a millisecond, by one thread; two wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def scanned(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    place = tmp_path_factory.mktemp("scanned") / "x"
    options = {"score": ("max", "mean"), "top": 4, "bottom": 2, "decoder": "torchvision"}
    return scan(photos, place, "test_project:deep", **options)


@pytest.fixture(scope="module")
def reference(photos: Path) -> Reference:
    return Reference(pixels(sorted(photos.rglob("*.jpg"))).numpy())


@pytest.fixture(scope="module")
def auto(scanned: Store, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """As it comes, with every method."""
    return projected(scanned, tmp_path_factory.mktemp("auto") / "x", method=METHODS)


def projected(scanned: Store, place: Path, **options: Any) -> Store:
    shutil.copytree(scanned.path, place)
    return maxact.project(place, **({"ranks": RANKS, "threads": 1} | options))


@dataclass
class Winner:
    tap: str
    channel: int
    rank: int
    image: int
    position: np.ndarray | None
    found: dict[str, np.ndarray]


def winners(store: Store, tap: str | None = None, score: str | None = None, each: int = 1) -> Iterator[Winner]:
    """All winners of some lists, or every `each`-th."""
    count = 0
    for name in [tap] if tap else store:
        for key, (image, _, position) in store[name].lists.items():
            if score is not None and key[0] != score:
                continue
            shown = store.winners(name, *key)
            arrays = {array: shown.read(array, 0, len(image)) for array in shown.layout.arrays()}
            for channel, rank in np.ndindex(len(image), min(RANKS, image.shape[1])):
                count += 1
                if count % each == 0:
                    found = {array: values[channel, rank] for array, values in arrays.items()}
                    place = None if position is None else position[channel, rank]
                    yield Winner(name, channel, rank, int(image[channel, rank]), place, found)


def cut(image: np.ndarray, box: np.ndarray) -> np.ndarray:
    """What an image [H, W, 3] has in a box; 0 outside of it."""
    far = 200
    padded = np.pad(image, ((far, far), (far, far), (0, 0)))
    y0, x0, y1, x1 = (box + far).tolist()
    return padded[y0:y1, x0:x1]


def scaled(image: np.ndarray, frame: tuple[int, ...]) -> np.ndarray:
    """By PIL, in floats, if it is not of that size."""
    if image.shape[:2] == tuple(frame):
        return image.astype(np.float32)
    channels = [
        Image.fromarray(np.ascontiguousarray(each), "F") for each in image.astype(np.float32).transpose(2, 0, 1)
    ]
    return np.stack([np.asarray(each.resize(frame[::-1], Image.Resampling.BILINEAR)) for each in channels], -1)


def assert_pictures(winner: Winner, reference: Reference, methods: tuple[str, ...], seed: str) -> None:
    """The crop and the projections of one winner, in the frame that its crop box says."""
    found = winner.found
    frame, box = found["crop"].shape[:2], found["crop_box"]
    wanted = scaled(cut(reference.images[winner.image], box), frame)
    assert np.abs(found["crop"].astype(float) - wanted).max() <= (0 if frame == tuple(box[2:] - box[:2]) else 0.6)
    for method in methods:
        signal, _ = reference(winner.tap, method, winner.image, winner.channel, winner.position, seed)
        wanted = scaled(cut(signal, box), frame)
        levels, scale = found[f"projection/{method}"], float(found[f"projection_scale/{method}"])
        assert scale == pytest.approx(np.abs(wanted).max(), rel=2e-4, abs=1e-12)
        back = (levels.astype(np.float64) - 128) / 127 * scale
        assert np.abs(back - wanted).max() <= scale * (0.5 / 127 + 1e-3) + 1e-12
        outside = scaled(cut(np.ones_like(signal), box), frame) == 0
        assert (levels[outside] == 128).all() and (found["crop"][outside] == 0).all()


def smallest_area(energy: np.ndarray, share: float) -> int:
    """The area of the smallest box in which more than the share lies; all boxes are tried."""
    sums = np.pad(energy.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    wanted, best = share * sums[-1, -1], energy.size
    for height in range(1, energy.shape[0] + 1):
        bands = sums[height:] - sums[:-height]
        for width in range(1, min(energy.shape[1], best // height) + 1):
            if (bands[:, width:] - bands[:, :-width]).max() >= wanted:
                best = min(best, height * width)
    return best


def test_boxes_of_units(auto: Store) -> None:
    borders = set()
    for winner in winners(auto, score="max"):
        assert winner.position is not None
        outer, clipped = fields_of(winner.tap, winner.position)
        assert winner.found["box"].tolist() == clipped
        layout = auto.winners(winner.tap).layout
        assert layout.cut == ("focus" if winner.tap in ("mix", "fc") else "field")
        if layout.cut == "field":
            assert winner.found["crop_box"].tolist() == outer
            borders.add(tuple(np.array(outer) == clipped))
    assert len(borders) >= 6 and (True,) * 4 in borders  # edges, corners, and the middle


def test_boxes_of_whole_maps(auto: Store) -> None:
    for winner in winners(auto, score="mean"):
        assert winner.found["box"].tolist() == [0, 0, SIDE, SIDE]
        assert auto.winners(winner.tap, "mean").layout.cut == "focus"


@pytest.mark.parametrize("tap", MAPS)
def test_pictures(tap: str, auto: Store, reference: Reference) -> None:
    for winner in winners(auto, tap):
        assert_pictures(winner, reference, METHODS, "one")


@pytest.mark.parametrize("tap", MAPS)
def test_focus_boxes(tap: str, auto: Store, reference: Reference) -> None:
    """The smallest box with 95 % of the first method's energy; squares of pictures lie around it."""
    for winner in winners(auto, tap, each=3):
        signal, _ = reference(tap, "deconvnet", winner.image, winner.channel, winner.position, "one")
        energy = (signal.astype(np.float64) ** 2).sum(2)
        focus, frame = winner.found["focus_box"], winner.found["crop_box"]
        y0, x0, y1, x1 = focus.tolist()
        if not energy.any():
            assert (y1 - y0) * (x1 - x0) == 0
            continue
        assert energy[y0:y1, x0:x1].sum() >= energy.sum() * 0.9499
        box = winner.found["box"]
        assert (focus[:2] >= box[:2]).all() and (focus[2:] <= box[2:]).all()
        inside = energy[box[0] : box[2], box[1] : box[3]]
        if inside.size <= 25 * 25:
            assert smallest_area(inside, 0.9499) <= (y1 - y0) * (x1 - x0) <= smallest_area(inside, 0.9501)
        assert (frame[:2] <= focus[:2]).all() and (frame[2:] >= focus[2:]).all()
        if auto.winners(tap).layout.cut == "focus":
            side = frame[2:] - frame[:2]
            assert side[0] == side[1] >= 32 and (frame[:2] >= 0).all() and (frame[2:] <= SIDE).all()


@pytest.mark.parametrize("tap", MAPS)
def test_maps(tap: str, auto: Store, reference: Reference) -> None:
    for winner in winners(auto, tap, each=2):
        if tap == "fc":
            assert "map" not in winner.found
            continue
        _, maps = reference(tap, "deconvnet", winner.image, winner.channel, winner.position, "one")
        assert winner.found["map"].shape == MAPS[tap] and winner.found["map"].dtype == np.float16
        assert np.abs(winner.found["map"].astype(np.float32) - maps).max() <= 2e-3 * np.abs(maps).max()
        if winner.position is not None:
            assert maps[tuple(winner.position.tolist())] == pytest.approx(maps.max(), abs=1e-6)


def test_source_boxes(auto: Store) -> None:
    """These pictures were not resized: the input is their middle."""
    for winner in winners(auto, each=7):
        entry = auto.catalog.entry(winner.image)
        with Image.open(Path(entry.source.decode())) as picture:
            start = [int(round((length - SIDE) / 2.0)) for length in (picture.height, picture.width)]  # noqa: RUF046
        assert np.allclose(winner.found["source_box"], winner.found["crop_box"] + np.array(start * 2))


def test_fields_that_are_larger_than_the_pictures_are_scaled(
    scanned: Store, reference: Reference, tmp_path: Path
) -> None:
    store = projected(scanned, tmp_path / "x", crop="field", max_size=16, method="guided", seed="activation")
    sizes = {tap: store.winners(tap).layout.frame for tap in store}
    assert sizes == {
        "features.1": (5, 5),
        "features.5": (16, 16),
        "features.8": (16, 16),
        "mix": (round(37 * 16 / 85), 16),
        "fc": (16, 16),
    }
    assert store.winners("features.8").layout.scale == 16 / 25
    assert store.winners("features.8", "mean").layout.frame == (16, 16)  # of the whole input
    for winner in winners(store, each=2):
        if winner.position is not None:
            assert winner.found["crop_box"].tolist() == fields_of(winner.tap, winner.position)[0]
        else:
            assert winner.found["crop_box"].tolist() == [0, 0, SIDE, SIDE]
        assert_pictures(winner, reference, ("guided",), "activation")


def test_focus_everywhere(scanned: Store, reference: Reference, tmp_path: Path) -> None:
    store = projected(scanned, tmp_path / "x", crop="focus", max_size=24, method="gradient", layers=["features.*"])
    for winner in winners(store, "features.5", "max", each=2):
        assert winner.found["crop"].shape == (24, 24, 3)
        side = winner.found["crop_box"][2:] - winner.found["crop_box"][:2]
        assert side.tolist() == [32, 32]
        assert_pictures(winner, reference, ("gradient",), "one")


def test_batches_change_nothing(auto: Store, scanned: Store, tmp_path: Path) -> None:
    for batch in (1, 5):
        other = projected(scanned, tmp_path / str(batch), batch=batch, layers=["features.5", "fc"])
        for mine, theirs in zip(winners(other, "features.5"), winners(auto, "features.5"), strict=True):
            for name, values in mine.found.items():
                kind = values.dtype.kind
                wanted = theirs.found[name]
                if name.startswith("projection/"):  # a value between two levels may round either way
                    assert np.abs(values.astype(int) - wanted.astype(int)).max() <= 1
                else:
                    assert np.allclose(values, wanted, rtol=1e-4 if kind == "f" else 0, atol=0)


def test_ranks_beyond_those_shown_are_empty(auto: Store) -> None:
    group: Any = zarr.open_group(auto.path, mode="r")
    for name, empty in (("box", -1), ("crop", 0), ("projection/guided", 128), ("crop_box", -1)):
        array = group[f"features.5/max/top/{name}"]
        assert array.shape[:2] == (5, 4)
        assert (array[:, RANKS:] == empty).all() and not (array[:, :RANKS] == empty).all()
    assert group["features.5/max/bottom/box"].shape[:2] == (5, 2)
    assert auto.winners("features.5", "max", "bottom").layout.shown == 2
