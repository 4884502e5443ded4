"""Where taps sit, what they are called, and that their peaks are those of the maps that plain hooks see."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models
from torchvision.models.googlenet import BasicConv2d, InceptionAux
from torchvision.ops.misc import Permute

from maxact.config import At
from maxact.errors import MaxactError
from maxact.find import find
from maxact.models import Normalised
from maxact.preprocess import Preprocess
from maxact.tap import Tap, columns
from maxact.taps import Taps
from maxact_kernels.peaks import Peaks
from support import BLANK, SMALL, Place, all_maps, lively, photograph, same

AT: tuple[At, ...] = ("norm", "module", "activation")


def taps_of(network: nn.Module, layers: Sequence[str] = (), at: At = "norm") -> dict[str, Tap]:
    """The taps of a network by name, on 64-pixel images."""
    return {tap.name: tap for tap in find(Normalised(network.eval(), SMALL), BLANK, layers, at).taps}


def names(network: nn.Module, layers: Sequence[str] = (), at: At = "norm") -> list[str]:
    return list(taps_of(network, layers, at))


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Five photographs, uint8 [5, 64, 64, 3]."""
    return torch.from_numpy(np.stack([np.asarray(photograph(3 * number)) for number in range(5)]))


def peaks_of(
    network: nn.Module, images: torch.Tensor, layers: Sequence[str] = (), at: At = "norm", threads: int = 2
) -> dict[str, Peaks]:
    """One batch's peaks by tap."""
    wrapped = Normalised(copy.deepcopy(network).eval(), SMALL).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    found = find(wrapped, images[:2], layers, at)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with Taps(wrapped, found.taps, threads=threads) as taps:
        peaks = taps(images).result()
    torch.set_num_threads(before)
    return {tap.name: peaks.columns(start, stop) for tap, start, stop in columns(found.taps)}


def check(peaks: Peaks, maps: np.ndarray) -> None:
    """Peaks [N, C] are those of maps [N, C, P]."""
    np.testing.assert_array_equal(peaks.max, maps.max(2))
    np.testing.assert_array_equal(peaks.position, maps.argmax(2))
    np.testing.assert_array_equal(peaks.min, maps.min(2))
    np.testing.assert_array_equal(peaks.active, (maps > 0).sum(2))
    exact = maps.astype(np.float64)
    scale = np.abs(exact).max()
    np.testing.assert_allclose(peaks.mean, exact.mean(2), rtol=1e-5, atol=1e-6 * scale)
    np.testing.assert_allclose(peaks.square, (exact**2).mean(2), rtol=1e-5, atol=1e-6 * scale**2)


def check_network(
    network: nn.Module, images: torch.Tensor, places: dict[str, Place], layers: Sequence[str] = (), at: At = "norm"
) -> None:
    """The taps are exactly those places, and their peaks those of the maps there."""
    peaks = peaks_of(network, images, layers, at)
    assert set(peaks) == set(places)
    for name, maps in all_maps(network, images, places, len(images)).items():
        check(peaks[name], maps)


@cache
def resnet() -> nn.Module:
    """Nobody changes it."""
    return lively(models.resnet18())


@cache
def efficientnet() -> nn.Module:
    """The stem and the first block, with squeeze-excite."""
    network: nn.Module = lively(models.efficientnet_b0()).features[:2]
    return network


# Where: --at


def resnet_places(at: At) -> dict[str, Place]:
    """Written out: what follows the convolutions of a ResNet's basic block is norm, relu, conv, norm, addition."""
    blocks = [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]
    first = {"module": "conv1", "norm": "bn1", "activation": "relu"}[at]
    second = {"module": "conv2", "norm": "bn2", "activation": "bn2"}[at]
    down = {"module": "downsample.0", "norm": "downsample.1", "activation": "downsample.1"}[at]
    downs = [f"layer{i}.0.{down}" for i in (2, 3, 4)]
    return same(first, *(f"{block}.{path}" for block in blocks for path in (first, second)), *downs, "fc")


@pytest.mark.parametrize("at", AT)
def test_resnet(at: At, images: torch.Tensor) -> None:
    check_network(resnet(), images, resnet_places(at), at=at)


@pytest.mark.parametrize("at", AT)
def test_resnet_layers_keep_their_names(at: At) -> None:
    """The tap bears the name of its place, and remembers its layer."""
    taps = taps_of(models.resnet18(), ["layer1.0.conv1", "fc"], at)
    block = next(iter(taps.values()))
    module = block.name.removeprefix("layer1.0.")
    assert module == {"module": "conv1", "norm": "bn1", "activation": "relu"}[at]
    assert (block.module, block.call, block.layer, block.kind) == (block.name, 0, "layer1.0.conv1", "Conv2d")
    assert (block.channels, block.map, block.positions, block.axis) == (64, (16, 16), 256, 1)
    assert (taps["fc"].kind, taps["fc"].channels, taps["fc"].map) == ("Linear", 1000, (1, 1))


def small_vgg(norm: bool = False, inplace: bool = True) -> nn.Module:
    """torchvision's own layers, of a few channels."""
    torch.manual_seed(0)
    features = models.vgg.make_layers([8, "M", 12, 12, "M", 16], norm)
    for module in features:
        if isinstance(module, nn.ReLU):
            module.inplace = inplace
    head = (nn.Linear(64, 10), nn.ReLU(inplace), nn.Dropout(), nn.Linear(10, 6))
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(2), nn.Flatten(), *head).eval()


@pytest.mark.parametrize(
    ("norm", "at", "expected"),
    [
        (False, "norm", ("0.0", "0.3", "0.5", "0.8", "3", "6")),
        (False, "module", ("0.0", "0.3", "0.5", "0.8", "3", "6")),
        (False, "activation", ("0.1", "0.4", "0.6", "0.9", "4", "6")),
        (True, "norm", ("0.1", "0.5", "0.8", "0.12", "3", "6")),
        (True, "module", ("0.0", "0.4", "0.7", "0.11", "3", "6")),
        (True, "activation", ("0.2", "0.6", "0.9", "0.13", "4", "6")),
    ],
)
def test_vgg(norm: bool, at: At, expected: tuple[str, ...], images: torch.Tensor) -> None:
    """Its rectifiers work in place, on what the taps before them show."""
    check_network(small_vgg(norm), images, same(*expected), at=at)


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        ("norm", ["0.1", "1.0.block.0.1", "1.0.block.1.fc1", "1.0.block.1.fc2", "1.0.block.2.1"]),
        ("module", ["0.0", "1.0.block.0.0", "1.0.block.1.fc1", "1.0.block.1.fc2", "1.0.block.2.0"]),
        # squeeze-excite's own activations count too; the projection has none
        (
            "activation",
            ["0.2", "1.0.block.0.2", "1.0.block.1.activation", "1.0.block.1.scale_activation", "1.0.block.2.1"],
        ),
    ],
)
def test_efficientnet(at: At, expected: list[str], images: torch.Tensor) -> None:
    check_network(efficientnet(), images, same(*expected), at=at)


@pytest.mark.parametrize(
    ("name", "at", "expected"),
    [
        ("resnet10t", "norm", {"conv1.1", "conv1.4", "bn1", "layer1.0.bn1", "layer1.0.bn2"}),
        ("resnet10t", "activation", {"conv1.2", "conv1.5", "act1", "layer1.0.act1", "layer1.0.bn2"}),
        ("test_efficientnet", "module", {"conv_stem", "blocks.0.0.conv", "blocks.1.0.conv_exp", "blocks.1.0.conv_pwl"}),
        # their batch norm has its activation inside, and shows its own output only to its child
        ("test_efficientnet", "norm", {"bn1.drop", "blocks.0.0.bn1.drop", "blocks.1.0.bn2.drop"}),
        ("test_efficientnet", "activation", {"bn1.act", "blocks.0.0.bn1.act", "blocks.1.0.bn2.drop"}),
        ("regnetx_002", "norm", {"stem.bn.drop", "s1.b1.conv1.bn.drop", "s1.b1.conv3.bn.drop"}),
    ],
)
def test_timm(name: str, at: At, expected: set[str], images: torch.Tensor) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = timm.create_model(name, pretrained=False).eval()
    taps = taps_of(network, at=at)
    assert expected <= set(taps)
    peaks = peaks_of(network, images, at=at)
    for path, maps in all_maps(network, images, same(*expected), len(images)).items():
        check(peaks[path], maps)


def test_timm_norm_inside_is_the_norm(images: torch.Tensor) -> None:
    """Against the definition: before its activation, BatchNormAct2d's output is the plain batch norm's."""
    from timm.layers.norm_act import BatchNormAct2d

    torch.manual_seed(0)
    norm = BatchNormAct2d(8)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.running_mean)
    conv = nn.Conv2d(3, 8, 3)
    plain = nn.BatchNorm2d(8)
    plain.load_state_dict(norm.state_dict())
    expected = all_maps(nn.Sequential(conv, plain), images, same("1"), 5)["1"]
    (peaks,) = peaks_of(nn.Sequential(conv, norm), images).values()
    check(peaks, expected)
    assert (expected.max(2) < 0).any() or (expected.min(2) < 0).all()


class Wired(nn.Module):
    """A convolution, and whatever else, connected by `wire`."""

    def __init__(self, wire: Callable[[Wired, torch.Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        for name, module in modules.items():
            self.add_module(name, module)
        self.wire = wire

    def forward(self, x: torch.Tensor) -> Any:
        return self.wire(self, x)


def norm_relu() -> dict[str, nn.Module]:
    return {"norm": nn.BatchNorm2d(8), "relu": nn.ReLU()}


@pytest.mark.parametrize(
    ("wire", "norm", "activation"),
    [
        (lambda n, x: n.relu(n.norm(n.conv(x))), "norm", "relu"),
        (lambda n, x: n.norm(n.relu(n.conv(x))), "conv", "relu"),
        (lambda n, x: n.norm(n.conv(x) + 1), "conv", "conv"),
        (lambda n, x: n.relu(n.norm(n.conv(x)) + 1), "norm", "norm"),
        (lambda n, x: torch.relu(n.norm(n.conv(x))), "norm", "norm"),
        (lambda n, x: n.relu(F.max_pool2d(n.norm(n.conv(x)), 2)), "norm", "norm"),
        # the output goes to two places
        (lambda n, x: (lambda y: n.relu(n.norm(y)) + y)(n.conv(x)), "conv", "conv"),
        (lambda n, x: (lambda y: n.relu(y) + y)(n.norm(n.conv(x))), "norm", "norm"),
        (lambda n, x: (lambda y: (n.norm(y), n.relu(y)))(n.conv(x)), "conv", "conv"),
        # what is done in place ends the chain as well
        (lambda n, x: n.relu(n.norm(n.conv(x).mul_(2))), "conv", "conv"),
        (lambda n, x: n.relu(n.norm(n.conv(x)).relu_()), "norm", "norm"),
    ],
)
def test_where_a_chain_ends(wire: Any, norm: str, activation: str) -> None:
    network = Wired(wire, **norm_relu())
    assert names(network, at="module") == ["conv"]
    assert names(network, at="norm") == [norm]
    assert names(network, at="activation") == [activation]


@pytest.mark.parametrize(
    ("modules", "norm", "activation"),
    [
        ([nn.Identity(), nn.BatchNorm2d(8), nn.Dropout2d(), nn.SiLU()], "2", "4"),
        ([nn.GroupNorm(2, 8), nn.GELU()], "1", "2"),
        ([nn.InstanceNorm2d(8), nn.LeakyReLU()], "1", "2"),
        ([nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.ReLU()], "1", "1"),
        ([nn.MaxPool2d(2), nn.BatchNorm2d(8), nn.ReLU()], "0", "0"),
        ([nn.Hardswish()], "0", "1"),
        ([nn.PReLU(8)], "0", "1"),
        ([nn.Conv2d(8, 8, 1)], "0", "0"),
        ([], "0", "0"),
    ],
)
def test_what_belongs_to_a_chain(modules: list[nn.Module], norm: str, activation: str) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), *modules)
    assert names(network, ["0"], "norm") == [norm]
    assert names(network, ["0"], "activation") == [activation]


# In place


@pytest.mark.parametrize(
    "wire",
    [
        lambda n, x: n.relu(n.conv(x)),
        lambda n, x: n.relu(n.norm(n.conv(x))),
        lambda n, x: n.conv(x).relu_(),
        lambda n, x: F.hardtanh_(n.norm(n.conv(x))),
        lambda n, x: n.norm(n.conv(x)).zero_(),
        lambda n, x: n.conv(x)[:, :, 2:].fill_(7),
    ],
)
def test_what_comes_after_in_place_does_not_reach_the_tap(wire: Any, images: torch.Tensor) -> None:
    network = Wired(wire, norm=nn.BatchNorm2d(8), relu=nn.ReLU(inplace=True))
    for name, peaks in peaks_of(network, images).items():
        alone = Wired(lambda n, x, name=name: n.norm(n.conv(x)) if name == "norm" else n.conv(x), norm=network.norm)
        alone.load_state_dict(network.state_dict())
        maps = all_maps(alone, images, same(name), 5)[name]
        assert (maps < 0).any()
        check(peaks, maps)


def test_networks_with_and_without_in_place_agree(images: torch.Tensor) -> None:
    with_, without = (peaks_of(small_vgg(inplace=inplace), images) for inplace in (True, False))
    for name, peaks in with_.items():
        for mine, theirs in zip(vars(peaks).values(), vars(without[name]).values(), strict=True):
            np.testing.assert_array_equal(mine, theirs)


# Shared modules


class Shared(nn.Module):
    """One convolution used three times, each time followed by the one rectifier."""

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.relu = nn.Conv2d(3, 3, size, padding=size // 2), nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = self.relu(self.conv(x))
        return x


def test_shared_modules_give_a_tap_for_every_call(images: torch.Tensor) -> None:
    places = {"conv": Place("conv"), "conv:1": Place("conv", 1), "conv:2": Place("conv", 2)}
    check_network(Shared(), images, places)
    check_network(Shared(), images, places, ["conv"], at="module")
    places = {"relu": Place("relu"), "relu:1": Place("relu", 1), "relu:2": Place("relu", 2)}
    check_network(Shared(), images, places, at="activation")
    assert [tap.layer for tap in taps_of(Shared(), at="activation").values()] == ["conv"] * 3


def test_calls_that_are_not_chosen_are_counted_all_the_same(images: torch.Tensor) -> None:
    """The rectifier's second call follows a layer that is not chosen; the third is still `:2`."""

    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second, self.third = (nn.Conv2d(3, 3, 3) for _ in range(3))
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for conv in (self.first, self.second, self.third):
                x = self.relu(conv(x))
            return x

    places = {"relu": Place("relu"), "relu:2": Place("relu", 2)}
    check_network(Three(), images, places, ["first", "third"], "activation")


def test_a_shared_module_with_maps_of_different_sizes(images: torch.Tensor) -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.pool = nn.Conv2d(3, 6, 3), nn.AvgPool2d(2)

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [self.conv(x), self.conv(self.pool(x)), self.conv(self.pool(self.pool(x)))]

    check_network(Pyramid(), images, {name: Place("conv", i) for i, name in enumerate(("conv", "conv:1", "conv:2"))})
    assert [tap.map for tap in taps_of(Pyramid()).values()] == [(62, 62), (30, 30), (14, 14)]


def test_a_network_that_calls_less_often_than_it_did_is_refused(images: torch.Tensor) -> None:
    """A tap that a batch does not reach must not give the peaks of another batch, or nothing at all."""

    class Depends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.other = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            return x if bool((x.std((2, 3)) > 1e-3).any()) else self.other(x)

    network = Normalised(Depends().eval(), SMALL)
    found = find(network, BLANK)
    assert [tap.name for tap in found.taps] == ["conv", "other"]
    with Taps(network, found.taps) as taps, pytest.raises(MaxactError, match=r"'other'.*not run"):
        taps(images)


# The channel axis, and maps of 4, 3 and 2 dimensions


def test_convnext(images: torch.Tensor) -> None:
    torch.manual_seed(0)
    network = models.ConvNeXt([models.convnext.CNBlockConfig(12, 24, 1), models.convnext.CNBlockConfig(24, None, 1)])
    linear = [f"features.{i}.0.block.{j}" for i in (1, 3) for j in (3, 5)]
    # the stem's LayerNorm2d moves the channels to the end and back
    places = same("features.0.1", "features.1.0.block.0", "features.2.1", "features.3.0.block.0", "classifier.2")
    check_network(network, images, places | {path: Place(path, axis=-1) for path in linear})
    taps = taps_of(network)
    assert [taps[path].channels for path in linear] == [48, 12, 96, 24]
    assert taps["features.1.0.block.3"].map == (16, 16)


def test_norms_by_name(images: torch.Tensor) -> None:
    """LayerNorm over the last axis, LayerNorm2d over the first."""
    torch.manual_seed(0)
    network = models.ConvNeXt([models.convnext.CNBlockConfig(12, 24, 1), models.convnext.CNBlockConfig(24, None, 1)])
    chosen = ["features.0.1", "features.1.0.block.2"]
    check_network(network, images, {chosen[0]: Place(chosen[0]), chosen[1]: Place(chosen[1], axis=-1)}, chosen)


def test_swin(images: torch.Tensor) -> None:
    torch.manual_seed(0)
    network = models.SwinTransformer([4, 4], 8, [1, 1], [2, 2], [4, 4], num_classes=5)
    last = ["features.1.0.mlp.0", "features.1.0.mlp.3", "features.2.reduction", "features.3.0.mlp.0"]
    last += ["features.3.0.mlp.3"]
    check_network(network, images, same("features.0.0", "head") | {path: Place(path, axis=-1) for path in last})
    found = find(Normalised(network.eval(), SMALL), BLANK)
    # their weights are used by functions, so they never run as modules
    assert set(found.idle) == {f"features.{i}.0.attn.{name}" for i in (1, 3) for name in ("qkv", "proj")}


def test_vit(images: torch.Tensor) -> None:
    torch.manual_seed(0)
    network = models.VisionTransformer(64, 16, 1, 2, 8, 12, num_classes=5)
    nn.init.normal_(network.heads.head.weight)
    block = "encoder.layers.encoder_layer_0"
    tokens = {path: Place(path, axis=-1) for path in (f"{block}.mlp.0", f"{block}.mlp.3")}
    check_network(network, images, same("conv_proj", "heads.head") | tokens)
    taps = taps_of(network)
    assert (taps[f"{block}.mlp.0"].map, taps[f"{block}.mlp.0"].channels) == ((17, 1), 12)  # 16 patches and a class
    assert taps["conv_proj"].map == (4, 4)
    norms = taps_of(network, ["*ln*"])
    assert [(tap.channels, tap.map) for tap in norms.values()] == [(8, (17, 1))] * 3


@pytest.mark.parametrize(
    ("layers", "channels", "maps"),
    [
        ([nn.Flatten(), nn.Linear(192, 5)], 5, (1, 1)),
        ([nn.Flatten(), nn.LayerNorm(192)], 192, (1, 1)),
        ([nn.Flatten(), nn.BatchNorm1d(192)], 192, (1, 1)),
        ([nn.Flatten(2), nn.Conv1d(3, 6, 3)], 6, (62, 1)),
        ([nn.Flatten(2), nn.BatchNorm1d(3)], 64, (3, 1)),  # three axes count as tokens, but for convolutions
        ([nn.ConvTranspose2d(3, 6, 2, 2)], 6, (16, 16)),
        ([nn.Conv2d(3, 6, 3, padding=1)], 6, (8, 8)),
        ([Permute([0, 2, 3, 1]), nn.Linear(3, 5)], 5, (8, 8)),
        ([Permute([0, 2, 3, 1]), nn.LayerNorm(3)], 3, (8, 8)),
        ([nn.AdaptiveAvgPool2d(1)], 3, (1, 1)),
        ([nn.MaxPool2d((1, 8))], 3, (8, 1)),
    ],
)
def test_axes(layers: list[nn.Module], channels: int, maps: tuple[int, int], images: torch.Tensor) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.AvgPool2d(8), *layers).eval()
    name = str(len(layers))
    tap = taps_of(network, [name])[name]
    assert (tap.channels, tap.map) == (channels, maps)
    check(peaks_of(network, images, [name])[name], all_maps(network, images, {name: Place(name, 0, tap.axis)}, 5)[name])


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "transposed", "expanded", "negative"])
def test_memory_layouts_all_give_the_same(layout: str, last: bool, threads: int) -> None:
    """[N, C, H, W] or, with the channels last, [N, H, W, C], however it lies in memory; any number of threads."""
    maps = torch.randn((5, 4, 6, 7), generator=torch.Generator().manual_seed(0)).round(decimals=1)  # with ties
    if layout == "expanded":
        maps = maps[:, :, :, :1].expand(-1, -1, -1, 7)
    output = maps.permute(0, 2, 3, 1) if last else maps
    laid: torch.Tensor = {
        "contiguous": lambda: output.contiguous(),
        "channels_last": lambda: output.contiguous(memory_format=torch.channels_last),
        "sliced": lambda: torch.cat([output, output], 3)[..., : output.shape[3]],
        "transposed": lambda: output.transpose(2, 3).contiguous().transpose(2, 3),
        "expanded": lambda: output,
        "negative": lambda: (output * -2).neg() / 2,
    }[layout]()
    assert torch.equal(laid, output)

    class Fixed(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return laid[: len(x)]

    layer: nn.Module = Fixed(1, 1) if last else nn.Identity()
    network = Normalised(nn.Sequential(layer), SMALL)
    if not last:
        layer.forward = lambda x: laid[: len(x)]  # type: ignore[method-assign]
    found = find(network, BLANK, ["0"])
    assert (found.taps[0].channels, found.taps[0].map) == (4, (6, 7))
    with Taps(network, found.taps, threads=threads) as taps:
        peaks = taps(torch.zeros((5, 64, 64, 3), dtype=torch.uint8)).result()
    check(peaks, maps.flatten(2).numpy())


@pytest.mark.parametrize("threads", [2, 3, 5, 7])
def test_the_number_of_threads_does_not_change_a_bit(threads: int, images: torch.Tensor) -> None:
    network = resnet()
    one, several = (peaks_of(network, images, threads=count) for count in (1, threads))
    for name in one:
        for mine, theirs in zip(vars(one[name]).values(), vars(several[name]).values(), strict=True):
            assert mine.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bit_maps_are_reduced_in_float32(precision: Any, images: torch.Tensor) -> None:
    network = Normalised(small_vgg(), SMALL)
    found = find(network, images[:2])
    kept: list[torch.Tensor] = []
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    with Taps(network, found.taps, precision) as taps:
        handle = network.network[0][0].register_forward_hook(lambda m, i, output: kept.append(output.clone()))
        peaks = taps(images).result().columns(0, 8)
        handle.remove()
    assert kept[0].dtype == dtype
    check(peaks, kept[0].float().flatten(2).numpy())


# Which: patterns, modules that never run, outputs that are no maps


def test_the_default_is_every_convolution_and_linear_layer() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.ConvTranspose2d(4, 4, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(4356, 2)
    )
    assert names(network) == ["0", "2", "5"]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (["layer1.*"], ["layer1.0.bn1", "layer1.0.bn2", "layer1.1.bn1", "layer1.1.bn2"]),
        (["layer[12].0.conv1"], ["layer1.0.bn1", "layer2.0.bn1"]),
        (["fc", "conv1"], ["bn1", "fc"]),  # in the order in which they run
        (["fc", "fc", "f*"], ["fc"]),
        (["conv1", "bn1"], ["bn1"]),  # the same place twice
        (["relu"], ["relu"]),
        (["layer1.*.relu"], ["layer1.0.relu", "layer1.0.relu:1", "layer1.1.relu", "layer1.1.relu:1"]),
        (["layer4", "avgpool"], ["layer4", "avgpool"]),
    ],
)
def test_patterns(layers: list[str], expected: list[str]) -> None:
    assert names(models.resnet18(), layers) == expected


def test_a_container_is_a_place(images: torch.Tensor) -> None:
    """Also one that works in place on what it returns."""
    network = resnet()
    check_network(network, images, same("layer1", "layer2.0"), ["layer1", "layer2.0"])


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [("layer1.0.conv3", "close to it: layer1.0.conv"), ("Layer1.*", "maxact layers"), ("fcc", "close to it: fc")],
)
def test_a_pattern_that_matches_nothing_lists_near_misses(pattern: str, hint: str) -> None:
    with pytest.raises(MaxactError, match="nothing in the network matches") as caught:
        names(models.resnet18(), ["layer2.*", pattern])
    assert repr(pattern) in str(caught.value) and hint in str(caught.value)
    assert "\n" not in str(caught.value)


def googlenet() -> nn.Module:
    """With its auxiliary heads, which only run in training."""

    class Aux(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.aux = BasicConv2d(3, 8, kernel_size=3), InceptionAux(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            return self.aux(x) if self.training else x

    return Aux().eval()


def test_modules_that_never_run_are_listed() -> None:
    found = find(Normalised(googlenet(), SMALL), BLANK)
    assert [tap.name for tap in found.taps] == ["stem.bn"]
    assert found.idle == ("aux.conv.conv", "aux.fc1", "aux.fc2")
    found = find(Normalised(googlenet(), SMALL), BLANK, ["*conv*"])
    assert [tap.name for tap in found.taps] == ["stem.bn"] and found.idle == ("aux.conv.conv",)


@pytest.mark.parametrize("layers", [["aux.fc1"], ["*", "aux.fc1"], ["aux.fc1", "stem.conv"]])
def test_a_module_that_never_runs_named_exactly_is_an_error(layers: list[str]) -> None:
    with pytest.raises(MaxactError, match=r"'aux\.fc1'.*never run"):
        names(googlenet(), layers)


@pytest.mark.parametrize("layers", [[], ["aux*"]])
def test_nothing_to_tap(layers: list[str]) -> None:
    network = googlenet() if layers else nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))
    with pytest.raises(MaxactError, match="--layers"):
        names(network, layers)


def test_an_output_that_is_no_tensor_says_so() -> None:
    network = models.VisionTransformer(64, 16, 1, 2, 8, 12)
    path = "encoder.layers.encoder_layer_0.self_attention"
    with pytest.raises(MaxactError, match=rf"'{path}'.*tuple, not a tensor"):
        names(network, [path])


def test_outputs_whose_first_axis_is_not_the_batch_are_refused_by_name() -> None:
    class Windows(nn.Module):
        """Cuts maps into 4 x 4 windows, which become the batch."""

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.attention = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x).unfold(2, 4, 4).unfold(3, 4, 4)  # [N, C, 4, 4, 4, 4]
            return self.attention(x.permute(0, 2, 3, 4, 5, 1).reshape(-1, 16, 8))

    with pytest.raises(MaxactError, match=r"'attention'.*\[32, 16, 8\] is not the batch of 2.*--layers"):
        names(Windows())
    assert names(Windows(), ["stem"]) == ["stem"]

    timm = pytest.importorskip("timm")
    swin = timm.models.swin_transformer.SwinTransformer(
        img_size=64, window_size=4, embed_dim=8, depths=(1,), num_heads=(2,), num_classes=2
    )
    with pytest.raises(MaxactError, match=r"'layers\.0\.blocks\.0\.attn\.qkv'.*first axis"):
        names(swin)
    assert "layers.0.blocks.0.mlp.fc1" in names(swin, ["*mlp*"])


@pytest.mark.parametrize("shape", [(2,), (2, 3, 4, 5, 6), ()])
def test_outputs_that_are_no_maps_are_refused(shape: tuple[int, ...]) -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros(shape)

    with pytest.raises(MaxactError, match="'0'"):
        names(nn.Sequential(Odd()), ["0"])


# Hooks


def hooks(network: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules())


class Fails(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] == 3:
            raise KeyError("no batches of three")
        return x


def test_hooks_come_off(images: torch.Tensor) -> None:
    network = Normalised(nn.Sequential(nn.Conv2d(3, 4, 3), Fails()).eval(), SMALL)
    found = find(network, BLANK)
    assert hooks(network) == 0
    with Taps(network, found.taps) as taps:
        assert hooks(network) == 1
        taps(images)
    assert hooks(network) == 0
    with pytest.raises(KeyError, match="three"), Taps(network, found.taps) as taps:
        taps(images[:3])
    assert hooks(network) == 0
    with pytest.raises(MaxactError, match=r"cannot run on images of 64 x 64 x 3: .*three"):
        find(network, images[:3])
    assert hooks(network) == 0
    with pytest.raises(ZeroDivisionError), Taps(network, found.taps):
        raise ZeroDivisionError
    assert hooks(network) == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("maxact-peaks")]


def test_a_batch_after_one_that_failed(images: torch.Tensor) -> None:
    network = Normalised(nn.Sequential(Shared(), Fails()).eval(), SMALL)
    found = find(network, BLANK)
    with Taps(network, found.taps) as taps:
        expected = taps(images).result()
        with pytest.raises(KeyError, match="three"):
            taps(images[:3])
        again = taps(images).result()
    for mine, theirs in zip(vars(expected).values(), vars(again).values(), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_batches_do_not_touch_each_other(images: torch.Tensor) -> None:
    """Peaks stay as they are while later batches run."""
    network = Normalised(small_vgg(), SMALL)
    found = find(network, BLANK)
    with Taps(network, found.taps, threads=2) as taps:
        first = taps(images).result()
        before = copy.deepcopy(first)
        taps(images.flip(0))
    for mine, theirs in zip(vars(first).values(), vars(before).values(), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_float_images_from_a_preprocess_function() -> None:
    network = Normalised(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), Preprocess(function="a:b", crop=(20, 24)))
    images = torch.randn((3, 3, 20, 24), generator=torch.Generator().manual_seed(0))
    found = find(network, images)
    assert found.taps[0].map == (18, 22)
    with torch.no_grad():
        maps = network.network(images)
    with Taps(network, found.taps) as taps:
        check(taps(images).result(), maps.flatten(2).numpy())
