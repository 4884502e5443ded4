"""Deconvnet projections of a network's winners, beside Captum's NeuronDeconvolution.

For each tap some channels, evenly spaced, with nine winners each: random positions of different photographs. Both
sides give the same signals (checked first, for one winner of each tap). Captum is called as its users can best call it:
one winner per sample, its ReLU modules not in place, whichever of several batch sizes and memory layouts is the
fastest on a tap in the middle. maxact cuts patches and shares forward passes as the second pass does. The times of
the sampled winners are scaled to all channels of the tap; the overall ratio is that of these sums.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from captum.attr import NeuronDeconvolution  # type: ignore[import-untyped]
from numpy.typing import NDArray
from torch import nn

from common import arguments, finish, interleaved, median, photographs, seconds
from maxact import patches
from maxact.catalog import Catalog
from maxact.config import cores
from maxact.decode import make_decoder
from maxact.deconv import Projector, share
from maxact.field import Field
from maxact.fields import of_taps
from maxact.find import find_taps
from maxact.models import Model, Normalised, load_model
from maxact.numerics import kept_memory, numerics
from maxact.tap import Tap

RANKS = 9
ALONE = 0.75  # of the work: below it, winners of one image gain more by windows than by one forward pass for all
TOLERANCE = 1e-2  # of a signal's length: in float32 a switch of a pool may fall to either side
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Winners:
    """What is projected: N units of one tap, each on the image that `index` names."""

    images: torch.Tensor  # [U, 3, H, W]
    index: NDArray[np.int64]
    channel: NDArray[np.int64]
    position: NDArray[np.int64]  # [N, 2]

    def some(self, count: int) -> Winners:
        """The first ones."""
        return Winners(self.images, self.index[:count], self.channel[:count], self.position[:count])


def winners(images: torch.Tensor, tap: Tap, channels: int) -> Winners:
    """Nine of each of some evenly spaced channels; as few on one image as there are images for."""
    draw = np.random.default_rng(0)
    chosen = np.unique(np.linspace(0, tap.channels - 1, channels).astype(np.int64))
    count = len(chosen) * RANKS
    index = np.concatenate([draw.permutation(len(images)) for _ in range(count // len(images) + 1)])[:count]
    position = np.stack([draw.integers(0, size, count) for size in tap.map], 1)
    return Winners(images, index, chosen.repeat(RANKS), position)


def by_maxact(
    network: nn.Module, tap: Tap, field: Field, convolutions: list[tuple[Tap, Field]], batch: int
) -> Callable[[Winners], torch.Tensor]:
    """As the second pass does it: signals [N, 3, h, w], of patches or whole images, and where they lie."""
    cut = patches.cut(field)
    windows = patches.Windows(cut, tap, convolutions, network)
    height, width = cut.size
    many = max(1, batch * cut.shape[0] * cut.shape[1] // (height * width))  # as many pixels as whole images

    def run(mine: Winners) -> torch.Tensor:
        signal = torch.empty(len(mine.index), 3, height, width)
        with Projector(network, tap) as projector:
            if cut.is_whole and windows.work > ALONE:
                for part in share(mine.index, batch):
                    numbers, index = np.unique(mine.index[part], return_inverse=True)
                    projected = projector(mine.images[numbers], index, mine.channel[part], mine.position[part])
                    signal[part] = projected.signal
            else:
                for part in np.split(np.arange(len(mine.index)), range(many, len(mine.index), many)):
                    patch = cut.take(mine.images, mine.index[part], cut.corner(mine.position[part]))
                    unit = cut.unit(mine.position[part])
                    window = windows.at(mine.position[part])
                    signal[part] = projector(patch, range(len(part)), mine.channel[part], unit, window).signal
        return signal

    return run


def by_captum(
    network: nn.Module, tap: Tap, batch: int, layout: torch.memory_format
) -> Callable[[Winners], torch.Tensor]:
    """Signals [N, 3, H, W]; each sample of a batch has its own unit."""
    method = NeuronDeconvolution(network, network.get_submodule(tap.module))

    def run(mine: Winners) -> torch.Tensor:
        signals = []
        for part in np.split(np.arange(len(mine.index)), range(batch, len(mine.index), batch)):
            unit = [torch.from_numpy(each[part]) for each in (mine.channel, *mine.position.T)]

            def select(output: torch.Tensor, unit: list[torch.Tensor] = unit) -> torch.Tensor:
                chosen: torch.Tensor = output[(torch.arange(len(output)), *unit[: output.ndim - 1])]
                return chosen

            images = mine.images[mine.index[part]].contiguous(memory_format=layout)
            signals.append(method.attribute(images, select).detach())
        return torch.cat(signals)

    return run


def read(model: Model, folder: str, count: int) -> torch.Tensor:
    """Photographs as the network takes them, float32 [count, 3, H, W]."""
    catalog = Catalog.build(photographs(folder))
    every = range(0, len(catalog), max(1, len(catalog) // count))[:count]
    files = [catalog.read(entry) for number in every for entry in catalog.entries(number, number + 1)]
    decoder = make_decoder("torchvision", model.preprocess, batch=len(files), threads=cores())
    decoder.submit(files)
    pixels = torch.as_tensor(decoder.collect().images)
    decoder.close()
    return Normalised(nn.Identity(), model.preprocess)(pixels)  # type: ignore[no-any-return]


def settle(network: nn.Module) -> None:
    """Random weights under which nothing dies out or grows on the way, however deep the network."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 0.8)


def check(mine: torch.Tensor, theirs: torch.Tensor, field: Field, first: Winners, tap: Tap) -> None:
    """Raises AssertionError where the two sides do not give the same."""
    cut = patches.cut(field)
    whole = torch.zeros_like(theirs)
    for place, (y, x) in enumerate(cut.corner(first.position).tolist()):
        whole[place, :, y : y + cut.size[0], x : x + cut.size[1]] = mine[place]
    difference = float((whole - theirs).norm() / theirs.norm())
    assert difference <= TOLERANCE, f"{tap.name}: maxact and captum differ by {difference:.1e}"


def main() -> None:
    """Measures and reports."""
    args = arguments(
        __doc__ or "", images="", networks="vgg16,resnet50", channels=8, batch=16, rounds=3, threads=cores(), taps=":"
    )
    warnings.filterwarnings("ignore", module="captum")
    rows: list[tuple[object, ...]] = []
    details: dict[str, object] = {"sampled channels": args.channels, "ranks": RANKS}
    with numerics(args.threads), kept_memory():
        for name in args.networks.split(","):
            model = load_model(name, weights="none")
            settle(model.network)
            plain = copy.deepcopy(model.network)
            for module in plain.modules():
                if isinstance(module, nn.ReLU):
                    module.inplace = False
            network = model.network.to(memory_format=torch.channels_last)
            found = find_taps(model)
            fields = of_taps(network, found.taps, model.preprocess.crop)
            inner = [tap for tap in find_taps(model, at="module").taps if tap.kind == "Conv2d"]
            each = of_taps(network, inner, model.preprocess.crop)
            convolutions = [(tap, each[tap.name]) for tap in inner]
            images = read(model, args.images, args.channels * RANKS)
            middle = found.taps[len(found.taps) // 2]
            probe = winners(images, middle, 1).some(8)
            fastest: tuple[float, str, int] = (float("inf"), "", 0)
            for layout, kind in LAYOUTS.items():
                plain.to(memory_format=kind)
                for batch in (1, 4, 8):
                    run = by_captum(plain, middle, batch, kind)
                    run(probe)
                    fastest = min(fastest, (seconds(partial(run, probe)), layout, batch))
            _, layout, batch = fastest
            details[f"captum, {name}"] = f"batch {batch}, {layout}"
            plain.to(memory_format=LAYOUTS[layout])
            start, stop = (int(each) if each else None for each in args.taps.split(":"))
            sums = {"all layers": [0.0, 0.0], "convolutions": [0.0, 0.0]}
            for tap in found.taps[start:stop]:
                mine = winners(images, tap, args.channels)
                runs = {
                    "captum": by_captum(plain, tap, batch, LAYOUTS[layout]),
                    "maxact": by_maxact(network, tap, fields[tap.name], convolutions, args.batch),
                }
                first = mine.some(1)
                check(runs["maxact"](first), runs["captum"](first), fields[tap.name], first, tap)
                times = interleaved(
                    {side: partial(seconds, partial(run, mine)) for side, run in runs.items()},
                    args.rounds,
                )
                captum, maxact = (median(times[side]) / len(mine.index) for side in ("captum", "maxact"))
                size = " x ".join(map(str, patches.cut(fields[tap.name]).size))
                rows.append((name, tap.name, tap.channels, size, 1000 * captum, 1000 * maxact, captum / maxact))
                for group, total in sums.items():
                    if group == "all layers" or tap.kind == "Conv2d":
                        total[0] += captum * tap.channels * RANKS
                        total[1] += maxact * tap.channels * RANKS
            for group, (captum, maxact) in sums.items():
                rows.append((name, group, "scaled to all", "", captum, maxact, captum / maxact))
    columns = ("network", "tap", "channels", "patch", "captum ms a winner", "maxact ms a winner", "ratio")
    print(f"rows of sums: seconds for all channels at k = {RANKS}, from {args.channels} channels of each layer")
    finish("deconv", columns, rows, details, args.json)


if __name__ == "__main__":
    main()
