"""What a patch gives is what the whole image gives, on networks of every kind; and where patches lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import models

from maxact import demo, patches
from maxact.config import At
from maxact.deconv import Projector
from maxact.field import Field
from maxact.fields import of_taps
from maxact.find import find
from maxact.models import Normalised
from maxact.patches import Cut, Windows, cut
from maxact.preprocess import Preprocess
from maxact.tap import Tap
from support import lively


class UNet(nn.Module):
    """Down twice and up again, with transposed convolutions and with interpolation; the last map is as large as the
    image."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.three, self.up = nn.Conv2d(8, 8, 3, padding=1), nn.ConvTranspose2d(8, 8, 2, 2)
        self.four, self.five = nn.Conv2d(16, 6, 3, padding=1), nn.Conv2d(12, 6, 3, padding=1)
        self.pool, self.larger = nn.MaxPool2d(2), nn.Upsample(scale_factor=2, mode="nearest")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one = self.one(x).relu()
        two = self.two(self.pool(one)).relu()
        three = self.three(self.pool(two)).relu()
        four = self.four(torch.cat([self.up(three), two], 1)).relu()
        return self.five(torch.cat([self.larger(four), one], 1))


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    options: dict[str, Any] = {"weights": None, "num_classes": 10}
    if name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": False, "transform_input": True}
    network = models.get_model(name, **options)
    if name == "inception_v3":  # too small an image for it, in `lively`
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        return network
    return lively(network)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, list[str]]] = {
    "vgg16": (lambda: built("vgg16"), 96, ["features.0", "features.7", "features.14"]),
    "resnet50": (lambda: built("resnet50"), 128, ["conv1", "layer1.1.conv2", "layer2.0.conv2", "layer2.0.down*"]),
    "inception_v3": (
        lambda: built("inception_v3"),
        155,
        ["Conv2d_2b_3x3.conv", "Conv2d_4a_3x3.conv", "Mixed_5b.branch_pool.conv"],
    ),
    "densenet121": (
        lambda: built("densenet121"),
        130,
        ["features.conv0", "features.denseblock1.denselayer2.conv2", "features.transition1.conv"],
    ),
    "googlenet": (lambda: built("googlenet"), 150, ["conv2.conv", "conv3.conv", "inception3a.branch3.1.conv"]),
    "mobilenet_v3": (lambda: built("mobilenet_v3_large"), 128, ["features.2.block.1.0", "features.4.block.1.0"]),
    "efficientnet_lite0": (demo.network, 112, ["_conv_stem", "_blocks.2._project_conv", "_blocks.4._depthwise_conv"]),
    "unet": (lambda: lively(UNet()), 64, ["two", "three", "four", "five"]),
}


def taps_and_fields(
    network: nn.Module, size: tuple[int, int], layers: list[str], at: At = "norm"
) -> list[tuple[Tap, Field]]:
    network.eval().requires_grad_(False)
    wrapped = Normalised(network, Preprocess(crop=size))
    taps = find(wrapped, torch.zeros((2, *size, 3), dtype=torch.uint8), layers, at).taps
    fields = of_taps(network, taps, size)
    return [(tap, fields[tap.name]) for tap in taps]


def corners_edges_middle(size: tuple[int, int]) -> np.ndarray:
    """The positions of a map at its corners, at its edges, in its middle and beside them, [N, 2]."""
    rows, cols = ([0, length // 3, length // 2, length - 2, length - 1] for length in size)
    pairs = {(max(row, 0), max(col, 0)) for row in rows for col in cols}
    return np.array(sorted(pairs))[::2]


def pasted(cut: Cut, corners: np.ndarray, signal: torch.Tensor) -> torch.Tensor:
    whole = torch.zeros((len(signal), 3, *cut.shape), dtype=signal.dtype)
    for place, (y, x) in enumerate(corners.tolist()):
        whole[place, :, y : y + cut.size[0], x : x + cut.size[1]] = signal[place]
    return whole


@pytest.mark.parametrize("name", NETWORKS)
def test_a_patch_gives_what_the_whole_image_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In double precision, so that a rectifier on the edge does not fall to either side by rounding. And with windows,
    however little they save."""
    monkeypatch.setattr(patches, "_BALANCE", 0)
    monkeypatch.setattr(patches, "_LEAST", 0)
    build, side, layers = NETWORKS[name]
    network, size = build().double(), (side, side + 12)
    images = torch.randn((2, 3, *size), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    convolutions = [(tap, field) for tap, field in taps_and_fields(network.float(), size, [], "module")]
    convolutions = [each for each in convolutions if isinstance(network.get_submodule(each[0].module), nn.Conv2d)]
    smaller = 0
    for tap, field in taps_and_fields(network.float(), size, layers):
        network.double()
        found = cut(field)
        smaller += not found.is_whole
        positions = corners_edges_middle(tap.map)
        index = np.arange(len(positions)) % 2
        channels = np.random.default_rng(0).integers(0, tap.channels, len(positions))
        with Projector(network, tap) as projector:
            whole = projector(images, index, channels, positions)
            corners = found.corner(positions)
            patch = found.take(images, index, corners)
            part = projector(patch, range(len(positions)), channels, found.unit(positions))
            windows = Windows(found, tap, convolutions, network)
            less = projector(patch, range(len(positions)), channels, found.unit(positions), windows.at(positions))
        assert 0 < windows.work < 1 or tap.layer == convolutions[0][0].layer
        assert not any("Window" in name for name in projector.undefined)
        torch.testing.assert_close(less.score, part.score, rtol=1e-9, atol=1e-12)
        assert bool(((less.signal - part.signal).abs() <= 1e-9 * part.signal.abs().amax()).all()), tap.name
        assert part.signal.shape[2:] == found.size
        torch.testing.assert_close(part.score, whole.score, rtol=1e-9, atol=1e-12)
        signal = pasted(found, corners, part.signal)
        scale = whole.signal.abs().amax((1, 2, 3), keepdim=True)
        assert bool((scale > 0).all())
        assert bool(((signal - whole.signal).abs() <= 1e-9 * scale).all()), tap.name
        for place, (y0, x0, y1, x1) in enumerate(found.box(positions).tolist()):
            assert 0 <= y0 <= y1 <= found.size[0] and 0 <= x0 <= x1 <= found.size[1]
            outside = part.signal[place].clone()
            outside[:, y0:y1, x0:x1] = 0
            assert not outside.any(), "the signal stays inside the field"
    assert smaller == len(layers)


def test_a_gate_needs_the_whole_image() -> None:
    """Squeeze-excite: the local field is small, the exact one everything."""
    for tap, field in taps_and_fields(built("mobilenet_v3_large"), (64, 64), ["features.4.block.3.0"]):
        assert field.is_gated and tap.map != (1, 1)
        found = cut(field)
        assert (
            found.is_whole and found.corner([[3, 5]]).tolist() == [[0, 0]] and found.unit([[3, 5]]).tolist() == [[3, 5]]
        )


def chain(shape: tuple[int, int], *layers: tuple[int, int, int]) -> Field:
    """The field of a chain of (kernel, stride, padding), worked out one unit at a time."""
    axes, step = [], 1
    for _, stride, _ in layers:
        step *= stride
    for length in shape:
        sizes = [length]
        for kernel, stride, padding in layers:
            sizes.append((sizes[-1] + 2 * padding - kernel) // stride + 1)
        outer = []
        for unit in range(sizes[-1]):
            start, stop = unit, unit + 1
            for kernel, stride, padding in reversed(layers):
                start, stop = start * stride - padding, (stop - 1) * stride - padding + kernel
            outer.append((start, stop))
        axes.append(np.array(outer, np.int32))
    clipped = [each.clip(0, length) for each, length in zip(axes, shape, strict=True)]
    return Field(shape, *clipped, *clipped, *axes, (step, step), (float(step), float(step)))  # type: ignore[arg-type,call-arg]


def test_the_example_of_the_docstring() -> None:
    found = cut(chain((33, 33), (3, 1, 0), (2, 2, 0), (3, 1, 0)))
    assert found.field.regular == {"size": [8, 8], "start": [0, 0], "stride": [2, 2]}
    assert found.size == (9, 9) and not found.is_whole
    assert found.field.rows[4].tolist() == [8, 16]
    assert found.corner([[4, 12]]).tolist() == [[8, 24]]
    assert found.unit([[4, 12]]).tolist() == [[0, 0]]


@pytest.mark.parametrize("shape", [(64, 64), (65, 63), (70, 41), (33, 300)])
@pytest.mark.parametrize(
    "layers", [[(3, 1, 1)], [(7, 2, 3), (3, 2, 1), (3, 1, 1)], [(3, 1, 1), (2, 2, 0)] * 3, [(11, 4, 2), (3, 2, 0)]]
)
def test_the_rule(shape: tuple[int, int], layers: list[tuple[int, int, int]]) -> None:
    field = chain(shape, *layers)
    found = cut(field)
    rows, cols = len(field.rows), len(field.cols)
    positions = np.stack(np.meshgrid(range(rows), range(cols), indexing="ij"), -1).reshape(-1, 2)
    corners, units = found.corner(positions), found.unit(positions)
    patch = chain(found.size, *layers)
    for axis, (intervals, outer) in enumerate(((field.rows, field.outer_rows), (field.cols, field.outer_cols))):
        size, whole, step = found.size[axis], shape[axis], field.step[axis]
        at, corner, unit = positions[:, axis], corners[:, axis], units[:, axis]
        assert (size - whole) % step == 0 and size <= whole
        assert size == whole or size < field.size[axis] + 2 * step
        assert ((corner >= 0) & (corner + size <= whole)).all()
        assert ((corner <= intervals[at, 0]) & (intervals[at, 1] <= corner + size)).all()
        # what the unit sees of the patch, padding included, is what it sees of the image
        mine = (patch.rows, patch.cols)[axis][unit] + corner[:, None]
        assert (mine == intervals[at]).all()
        assert ((patch.outer_rows, patch.outer_cols)[axis][unit] + corner[:, None] == outer[at]).all()
        assert ((outer[at, 0] >= 0) | (corner == 0)).all()
        assert ((outer[at, 1] <= whole) | (corner + size == whole)).all()


def test_rows_and_columns_have_their_own_size() -> None:
    field = chain((20, 200), *[(3, 1, 1), (2, 2, 0)] * 2, (3, 1, 1))
    found = cut(field)
    assert found.size[0] == 20 and found.size[1] < 40


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_take(layout: torch.memory_format) -> None:
    field = chain((40, 50), (5, 1, 0), (2, 2, 0))
    found = cut(field)
    images = torch.arange(2 * 3 * 40 * 50).view(2, 3, 40, 50).contiguous(memory_format=layout)
    positions = np.array([[0, 0], [17, 22], [5, 9], [9, 5]])
    corners, index = found.corner(positions), [1, 0, 0, 1]
    taken = found.take(images, index, corners)
    assert taken.shape == (4, 3, *found.size) and taken.is_contiguous(memory_format=torch.channels_last)
    for place, (y, x) in enumerate(corners.tolist()):
        assert torch.equal(taken[place], images[index[place], :, y : y + found.size[0], x : x + found.size[1]])


def test_windows_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three convolutions of 3 x 3 with padding: a unit of the third needs 3 x 3 of the second, 5 x 5 of the first."""
    network = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)))
    found = taps_and_fields(network, (40, 50), [], "module")
    tap, field = found[-1]
    assert cut(field).size == (7, 7) and cut(field).corner([[10, 12]]).tolist() == [[7, 9]]
    windows = Windows(cut(field), tap, found, network)
    assert windows.at([[10, 12]]) == {} and windows.work == 1  # too little to be worth it
    monkeypatch.setattr(patches, "_BALANCE", 0)
    monkeypatch.setattr(patches, "_LEAST", 0)
    windows = Windows(cut(field), tap, found, network)
    at = windows.at([[10, 12], [0, 0], [39, 49]])
    assert {name: (starts.tolist(), size) for name, (starts, size) in at.items()} == {
        ("0", 0): ([[1, 1], [0, 0], [2, 2]], (5, 5)),
        ("1", 0): ([[2, 2], [0, 0], [4, 4]], (3, 3)),
        ("2", 0): ([[3, 3], [0, 0], [6, 6]], (1, 1)),
    }
    assert windows.work == (25 + 9 + 1) / (3 * 49)
