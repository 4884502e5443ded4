"""What tests of the whole loop share: photographs, and a reference that keeps every map of every image.

The reference knows nothing of maxact but the places to record, which tests write out by hand: plain hooks clone the
outputs of a copy of the network, numpy takes peaks and sums of them in float32 and float64, and a sort by (score
descending, image ascending) ranks them.
"""

from __future__ import annotations

import copy
import importlib.util
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset
from torchvision.transforms import v2

from maxact.catalog import Catalog, Shard
from maxact.config import RunConfig, ScanConfig
from maxact.find import find
from maxact.models import Normalised
from maxact.partial import BadImage, Partial
from maxact.preprocess import Preprocess
from maxact.process import Tick
from maxact.scan import Job, scan
from maxact.tap import Tap, columns

SIDE = 64
SMALL = Preprocess(resize=SIDE, crop=(SIDE, SIDE))
BLANK = torch.zeros((2, SIDE, SIDE, 3), dtype=torch.uint8)
NAMES = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "ihc.png", "motorcycle_left.png", "brick.png")
THREADS = 2


def photograph(number: int, side: int = SIDE) -> Image.Image:
    """A part of one of scikit-image's photographs, its short side `side`, no two alike."""
    found = importlib.util.find_spec("skimage")
    assert found is not None and found.origin is not None
    with Image.open(Path(found.origin).parent / "data" / NAMES[number % len(NAMES)]) as opened:
        picture = opened.convert("RGB")
    width, height = ((1, 1), (5, 4), (8, 11))[number % 3]  # square, wide and tall
    unit = side / min(width, height)
    size = round(width * unit), round(height * unit)
    draw = np.random.default_rng(number)
    part = 0.35 + 0.5 * draw.random()
    scale = part * min(picture.width / size[0], picture.height / size[1])
    box = [int(length * scale) for length in size]
    x, y = (int(draw.integers(0, whole - own)) for whole, own in zip(picture.size, box, strict=True))
    return picture.resize(size, Image.Resampling.LANCZOS, (x, y, x + box[0], y + box[1]))


def write_photographs(folder: Path, count: int) -> list[Path]:
    """Writes `count` JPEGs, in a folder for each photograph that they come from; in the catalog's order.

    Their short side is already the model's: so no decoder resizes them, and DALI's pixels are PIL's to the bit.
    """
    paths = []
    for number in range(count):
        path = folder / Path(NAMES[number % len(NAMES)]).stem / f"{number:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph(number).save(path, quality=92)
        paths.append(path)
    return sorted(paths)


def cut_short(folder: Path, *stems: str) -> None:
    """Takes the end marker from some photographs in a folder: bad files."""
    for stem in stems:
        (path,) = folder.rglob(f"{stem}.jpg")
        path.write_bytes(path.read_bytes()[:-2])


def pixels(paths: Iterable[Path], preprocess: Preprocess = SMALL) -> torch.Tensor:
    """What the network must see of some files: uint8 [N, H, W, 3], by PIL and torchvision."""
    mode = v2.InterpolationMode(preprocess.interpolation)
    fit = v2.Compose([v2.Resize(preprocess.resize, mode), v2.CenterCrop(list(preprocess.crop)), v2.PILToTensor()])
    images = []
    for path in paths:
        with Image.open(path) as picture:
            images.append(fit(picture.convert("RGB")).permute(1, 2, 0))
    return torch.stack(images).contiguous()


@dataclass(frozen=True)
class Place:
    """Where the reference records: the `call`-th call of the module at `path`, and the output's channel axis."""

    path: str
    call: int = 0
    axis: int = 1


def same(*paths: str) -> dict[str, Place]:
    """Places that bear their module's path as their name."""
    return {path: Place(path) for path in paths}


def normalised(images: torch.Tensor, preprocess: Preprocess) -> torch.Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W], channels_last; one multiplication and one addition a pixel, in the
    form that maxact states, since the last bit of a score depends on it."""
    std = torch.tensor(preprocess.std, dtype=torch.float64).view(1, 3, 1, 1)
    mean = torch.tensor(preprocess.mean, dtype=torch.float64).view(1, 3, 1, 1)
    scale, shift = (1 / (255 * std)).float(), (-mean / std).float()
    return torch.addcmul(shift, images.permute(0, 3, 1, 2).float(), scale)


def all_maps(
    network: nn.Module,
    images: torch.Tensor,
    places: Mapping[str, Place],
    batch: int,
    preprocess: Preprocess = SMALL,
) -> dict[str, np.ndarray]:
    """Every map at some places, float32 [N, C, P]. `images` uint8 [N, H, W, 3] go in batches, the last one padded."""
    network = copy.deepcopy(network).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    modules = dict(network.named_modules())
    calls: dict[str, list[torch.Tensor]] = {}
    kept: dict[str, list[np.ndarray]] = {name: [] for name in places}

    def keep(path: str) -> Any:
        return lambda module, inputs, output: calls[path].append(output.clone())

    for path in {place.path for place in places.values()}:
        modules[path].register_forward_hook(keep(path))
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    with torch.no_grad():
        for part in images.split(batch):
            calls.update({place.path: [] for place in places.values()})
            padding = part.new_zeros((batch - len(part), *part.shape[1:]))
            network(normalised(torch.cat([part, padding]), preprocess))
            for name, place in places.items():
                maps = calls[place.path][place.call][: len(part)].movedim(place.axis, 1)
                kept[name].append(maps.reshape(*maps.shape[:2], -1).float().numpy())
    torch.set_num_threads(before)
    return {name: np.concatenate(parts) for name, parts in kept.items()}


@dataclass(frozen=True)
class Lists:
    """k images of each of C channels in rank order, as the store has them: empty places -1 and NaN."""

    image: np.ndarray
    score: np.ndarray
    position: np.ndarray

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Lists)
        return all(
            mine.dtype == theirs.dtype and np.array_equal(mine, theirs, equal_nan=mine.dtype.kind == "f")
            for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)
        )


def rank(maps: np.ndarray, numbers: Sequence[int], k: int, end: str = "top") -> Lists:
    """The k images with the highest (lowest) maximum of each channel: maps [N, C, P] of the images `numbers`."""
    fit = np.isfinite(maps).all(2)  # [N, C]
    score, position = maps.max(2), maps.argmax(2)
    key = np.where(fit, -score if end == "top" else score, np.inf)
    image = np.broadcast_to(np.array(numbers)[:, None], key.shape)
    order = np.lexsort((image, key), axis=0)[:k]  # [k, C], the last key counts first
    there = np.take_along_axis(fit, order, 0)

    def column(values: np.ndarray, kind: type, empty: float) -> np.ndarray:
        chosen = np.where(there, np.take_along_axis(values, order, 0), empty).astype(kind)
        missing = np.full((k - len(order), chosen.shape[1]), empty, kind)
        return np.ascontiguousarray(np.concatenate([chosen, missing]).T)

    return Lists(column(image, np.int64, -1), column(score, np.float32, np.nan), column(position, np.int32, -1))


def describe(maps: np.ndarray) -> dict[str, np.ndarray]:
    """The statistics [C] of maps [N, C, P] over images and positions, those with NaN or infinity left out."""
    fit = np.broadcast_to(np.isfinite(maps).all(2, keepdims=True), maps.shape)
    values = np.ma.masked_array(maps, ~fit)
    count = fit.sum((0, 2))
    mean = values.mean((0, 2), dtype=np.float64)
    found = {
        "mean": mean,
        "std": np.sqrt(((values - mean[:, None]) ** 2).mean((0, 2))),
        "min": values.min((0, 2)),
        "max": values.max((0, 2)),
        "active": (values > 0).mean((0, 2), dtype=np.float64),
    }
    return {"count": count} | {name: np.ma.filled(column.astype(np.float64), np.nan) for name, column in found.items()}


@dataclass(frozen=True)
class Scanned:
    """What a scan gave, and how to read it tap by tap."""

    partial: Partial
    taps: tuple[Tap, ...]
    ticks: list[Tick]

    def lists(self, name: str, score: str = "max", end: Any = "top") -> Lists:
        """One tap's peaks."""
        ranked = self.partial.tops[score, end]
        start, stop = self._columns(name)
        image, position = ranked.image[start:stop], ranked.position[start:stop]
        return Lists(image, ranked.values(end)[start:stop], position)

    def stats(self, name: str) -> dict[str, np.ndarray]:
        """One tap's statistics."""
        tap = next(tap for tap in self.taps if tap.name == name)
        return self.partial.total().columns(*self._columns(name)).describe(tap.positions)

    def unfit(self, name: str) -> np.ndarray:
        """[C]: how many of the tap's maps held NaN or infinity."""
        return self.partial.total().columns(*self._columns(name)).unfit

    @property
    def bad(self) -> tuple[BadImage, ...]:
        return self.partial.bad

    def bits(self) -> dict[str, bytes]:
        """Everything that it holds, but for the tree that the statistics were added along."""
        bits = {f"{key} {name}": a.tobytes() for key, top in self.partial.tops.items() for name, a in vars(top).items()}
        bits |= {f"stats {name}": a.tobytes() for name, a in vars(self.partial.total()).items()}
        return bits | {"bad": repr(self.partial.bad).encode()}

    def _columns(self, name: str) -> tuple[int, int]:
        return next((start, stop) for tap, start, stop in columns(self.taps) if tap.name == name)


def make_job(
    network: nn.Module,
    catalog: Catalog,
    *,
    layers: Sequence[str] = (),
    preprocess: Preprocess = SMALL,
    threads: int = THREADS,
    decode_threads: int = 2,
    **settings: Any,
) -> Job:
    """A job for a copy of a network: batches of 4, the 5 strongest, float32 and torchvision's decoder."""
    wanted = ScanConfig(layers=tuple(layers), top=5, precision="fp32", batch=4, decoder="torchvision")
    wanted = replace(wanted, **settings).resolve(torch.device("cpu"))
    network = copy.deepcopy(network).eval().requires_grad_(False)
    blank = torch.zeros((2, *preprocess.shape), dtype=torch.float32 if preprocess.function else torch.uint8)
    taps = find(Normalised(network, preprocess), blank, layers, wanted.at).taps
    run = RunConfig(threads=threads, decode_threads=decode_threads, readers=4)
    return Job(network, preprocess, taps, catalog, wanted, run, torch.device("cpu"))


def scan_job(
    job: Job, shards: Iterator[Shard], stop: threading.Event, report: Callable[[Tick], None]
) -> Iterator[Partial]:
    """The loop with one job, as a scan has it."""
    for (partial,) in scan([job], shards, stop, report, lambda shard: [job.tally(shard)]):
        assert partial is not None
        yield partial


def scan_all(
    network: nn.Module,
    images: object,
    *,
    catalog: Catalog | None = None,
    order: Sequence[int] | None = None,
    **options: Any,
) -> Scanned:
    """Scans images through a copy of a network (`make_job`), its shards in `order`, and merges what they gave so."""
    job = make_job(network, catalog or Catalog.build(images), **options)
    assert job.settings.shard
    shards: list[Shard] = job.catalog.shards(job.settings.shard)
    chosen: Iterator[Shard] = iter(shards if order is None else [shards[index] for index in order])
    ticks: list[Tick] = []
    partials = list(scan_job(job, chosen, threading.Event(), ticks.append))
    return Scanned(reduce(Partial.merge, partials), job.taps, ticks)


def lively(network: nn.Module, seed: int = 0) -> nn.Module:
    """A random network whose maps look like those of a trained one: batch norms fit the data, some gains are below
    zero, and nothing dies out on the way."""
    torch.manual_seed(seed)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    for norm in norms:
        nn.init.normal_(norm.weight, 0.5, 1)
        nn.init.normal_(norm.bias, 0, 0.5)
        norm.momentum = None  # a plain average over the pass below
    for module in network.modules():
        module.training = module in norms
    with torch.no_grad():
        images = torch.from_numpy(np.stack([np.asarray(photograph(3 * number)) for number in range(8)]))
        network(normalised(images, SMALL))
    return network.eval()


class Pictures(Dataset[Any]):
    """Photographs as a map-style Dataset has them."""

    def __init__(self, count: int = 6) -> None:
        self.pictures = [photograph(number, 48) for number in range(count)]

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Image.Image:
        return self.pictures[index]
