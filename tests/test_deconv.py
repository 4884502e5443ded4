"""Projections against plain autograd, an explicit deconvnet, and captum; every way to call an activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum import attr
from torch import nn
from torchvision import models

from maxact.config import Method
from maxact.deconv import Projected, Projector, share
from maxact.errors import MaxactError
from maxact.find import find
from maxact.models import Normalised
from maxact.preprocess import Preprocess
from maxact.tap import Tap
from support import BLANK, SMALL, lively

METHODS: tuple[Method, ...] = get_args(Method)
BENT: tuple[Method, ...] = ("deconvnet", "guided")


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn((4, 3, 64, 64), generator=torch.Generator().manual_seed(0))


def taps_of(network: nn.Module, layers: list[str] | None = None, at: Any = "norm") -> list[Tap]:
    network.eval().requires_grad_(False)
    return list(find(Normalised(network, SMALL), BLANK, layers or [], at).taps)


def some(tap: Tap, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Channels [N] and positions [N, 2] of some units of a tap, always the same."""
    draw = np.random.default_rng(tap.channels)
    positions = np.stack([draw.integers(0, size, count) for size in tap.map], 1)
    return torch.from_numpy(draw.integers(0, tap.channels, count)), torch.from_numpy(positions)


def project(
    network: nn.Module, tap: Tap, images: torch.Tensor, method: Method = "deconvnet", seed: Any = "one"
) -> Projected:
    """One unit on each image."""
    channels, positions = some(tap, len(images))
    with Projector(network, tap, method, seed) as projector:
        return projector(images, torch.arange(len(images)), channels, positions)


def close(mine: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal to float rounding, measured by the largest value of each signal."""
    assert mine.shape == theirs.shape and bool(torch.isfinite(mine).all())
    scale = theirs.abs().amax((1, 2, 3), keepdim=True) if theirs.ndim == 4 else theirs.abs().max()
    assert bool(((mine - theirs).abs() <= tolerance * scale).all())


def by_autograd(network: nn.Module, tap: Tap, images: torch.Tensor) -> torch.Tensor:
    """The gradients of `some` units, one image at a time, on the network as it is."""
    gradients = []
    for image, channel, (row, column) in zip(images, *some(tap, len(images)), strict=True):
        kept: list[torch.Tensor] = []
        handle = network.get_submodule(tap.module).register_forward_hook(lambda m, i, o, k=kept: k.append(o.clone()))
        network(leaf := image[None].clone().requires_grad_())
        handle.remove()
        maps = kept[tap.call].movedim(tap.axis, 1)[0, channel]
        unit = (maps, maps[row] if maps.ndim else maps, maps[row, column] if maps.ndim == 2 else maps)[maps.ndim]
        gradients.append(torch.autograd.grad(unit, leaf)[0])
    return torch.cat(gradients)


# Against an explicit deconvnet


def small_vgg(inplace: bool = True) -> models.VGG:
    """torchvision's own VGG, of a few channels, for images of 64 x 64."""
    torch.manual_seed(1)
    features = models.vgg.make_layers([8, 8, "M", 12, 12, "M", 16, "M", 16])
    network = models.VGG(features, num_classes=7, init_weights=False)
    network.avgpool = nn.AdaptiveAvgPool2d(8)
    network.classifier[0], network.classifier[3] = nn.Linear(16 * 64, 20), nn.Linear(20, 24)
    network.classifier[6] = nn.Linear(24, 7)
    for module in network.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = inplace
        elif isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.bias, std=0.1)
    return network


def deconvnet(network: models.VGG, image: torch.Tensor, layer: str, unit: tuple[int, ...]) -> torch.Tensor:
    """Zeiler and Fergus by hand: forwards noting the switches, then unpooling, rectifying and filtering back up."""
    layers = dict(network.named_modules())
    path = [f"features.{i}" for i in range(len(network.features))]
    path += ["flatten"] + [f"classifier.{i}" for i in range(7)]
    switches: dict[str, tuple[torch.Tensor, torch.Size]] = {}
    signal = image[None]
    for name in path[: path.index(layer) + 1]:
        module = layers.get(name)
        if name == "flatten":
            flat = signal.shape
            signal = signal.flatten(1)
        elif isinstance(module, nn.MaxPool2d):
            pooled, indices = F.max_pool2d(signal, 2, 2, return_indices=True)
            switches[name] = indices, signal.shape
            signal = pooled
        elif isinstance(module, nn.ReLU):
            signal = signal.clamp(min=0)
        elif module is not None:
            signal = module(signal)
    signal = torch.zeros_like(signal)
    signal[(0, *unit)] = 1
    for name in reversed(path[: path.index(layer) + 1]):
        module = layers.get(name)
        if name == "flatten":
            signal = signal.view(flat)
        elif isinstance(module, nn.MaxPool2d):
            indices, size = switches[name]
            signal = F.max_unpool2d(signal, indices, 2, 2, output_size=size)
        elif isinstance(module, nn.ReLU):
            signal = signal.clamp(min=0)
        elif isinstance(module, nn.Conv2d):
            signal = F.conv_transpose2d(signal, module.weight, padding=1)
        elif isinstance(module, nn.Linear):
            signal = signal @ module.weight
    return signal


@pytest.mark.parametrize("at", ["norm", "activation"])
def test_is_a_deconvnet_of_transposed_convolutions_and_unpooling(at: str, images: torch.Tensor) -> None:
    network = small_vgg()
    taps = taps_of(network, at=at)
    assert len(taps) == 9
    for tap in taps:
        mine = project(network, tap, images)
        for place, (channel, position) in enumerate(zip(*some(tap, len(images)), strict=True)):
            unit = (int(channel), *position.tolist()) if tap.name.startswith("f") else (int(channel),)
            theirs = deconvnet(network, images[place], tap.name, unit)
            close(mine.signal[place : place + 1], theirs)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore::UserWarning:captum")
def test_is_what_captum_gives(method: Method, images: torch.Tensor) -> None:
    network = small_vgg(inplace=False)
    names = {
        "deconvnet": "NeuronDeconvolution",
        "guided": "NeuronGuidedBackprop",
        "gradient": "NeuronGradient",
    }
    for tap in taps_of(network)[3::2]:
        mine = project(network, tap, images, method).signal
        channels, positions = some(tap, len(images))
        for place, unit in enumerate(zip(channels.tolist(), *positions.T.tolist(), strict=True)):
            theirs = getattr(attr, names[method])(network, network.get_submodule(tap.module))
            chosen = unit if tap.name.startswith("f") else unit[:1]
            close(mine[place : place + 1], theirs.attribute(images[place : place + 1], chosen).detach())


# Against autograd


def small_resnet() -> nn.Module:
    torch.manual_seed(0)
    network = models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=9)
    return lively(network)


@pytest.mark.parametrize("build", [small_vgg, small_resnet, lambda: lively(models.shufflenet_v2_x0_5())])
def test_gradient_is_plain_autograd(build: Callable[[], nn.Module], images: torch.Tensor) -> None:
    network = build()
    for tap in taps_of(network)[1::5]:
        with Projector(network, tap, "gradient") as projector:
            mine = projector(images, range(4), *some(tap, 4))
        close(mine.signal, by_autograd(network, tap, images))
        assert projector.undefined == set()


class Mixed(nn.Module):
    """Maps with the channels last, tokens and vectors, and a layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last, self.twice = nn.Conv2d(3, 6, 8, 8), nn.Linear(6, 6), nn.Conv2d(6, 6, 3, padding=1)
        self.lines, self.tokens, self.head = nn.Conv1d(6, 6, 3), nn.Linear(6, 10), nn.Linear(10, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.twice(self.twice(self.stem(x)).relu())
        x = self.last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).relu_()
        x = self.lines(x.flatten(2)).relu()
        return self.head(self.tokens(x.transpose(1, 2)).relu().mean(1))


def test_axes_and_later_calls(images: torch.Tensor) -> None:
    torch.manual_seed(0)
    network = Mixed()
    taps = taps_of(network, ["stem", "twice", "last", "lines", "tokens", "head"])
    assert [tap.name for tap in taps] == ["stem", "twice", "twice:1", "last", "lines", "tokens", "head"]
    assert [tap.map for tap in taps] == [(8, 8)] * 4 + [(62, 1)] * 2 + [(1, 1)]
    for tap in taps:
        close(project(network, tap, images, "gradient").signal, by_autograd(network, tap, images))
        with Projector(network, tap) as projector:
            maps = projector.maps(images)
        assert maps.shape == (4, tap.channels, *tap.map)
        channels, positions = some(tap, 4)
        theirs = project(network, tap, images).score
        torch.testing.assert_close(maps[range(4), channels, positions[:, 0], positions[:, 1]], theirs)


# Rectifiers, however they are called


def chain(activation: Callable[[torch.Tensor], torch.Tensor], scale: float = 3) -> nn.Module:
    """Two convolutions with an activation between them, and one after."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second, self.third = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, stride=2), nn.Conv2d(8, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = activation(self.first(x) * scale)
            return self.third(activation(self.second(x) * scale))

    return Chain().eval().requires_grad_(False)


def halves(activation: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """In place, on two parts of the tensor one after the other."""

    def run(x: torch.Tensor) -> torch.Tensor:
        activation(x[:, :4])
        activation(x[:, 4:])
        return x

    return run


RELU: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "module": nn.ReLU(),
    "module in place": nn.ReLU(True),
    "F.relu": F.relu,
    "F.relu in place": lambda x: F.relu(x, True),
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "method": lambda x: x.relu(),
    "method in place": lambda x: x.relu_(),
    "aten": lambda x: torch.ops.aten.relu(x),
    "clamp": lambda x: x.clamp(min=0),
    "clamp_": lambda x: x.clamp_(min=0),
    "clamp with a tensor": lambda x: torch.clamp(x, min=torch.zeros(())),
    "clamp_min": lambda x: x.clamp_min(0),
    "clip": lambda x: torch.clip(x, 0),
    "threshold": lambda x: F.threshold(x, 0, 0),
    "threshold in place": nn.Threshold(0, 0, True),
    "maximum": lambda x: torch.maximum(torch.zeros(()), x),
    "hardtanh": lambda x: F.hardtanh(x, 0, 1e9),
    "flat view in place": lambda x: x.flatten(1).relu_().view(x.shape),
    "part views in place": halves(lambda x: x.relu_()),
    "part views, function in place": halves(lambda x: F.relu(x, inplace=True)),
    "part views, module in place": halves(nn.ReLU(inplace=True)),
    "part views, clamp_": halves(lambda x: x.clamp_(min=0)),
}
RELU6: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "module": nn.ReLU6(),
    "module in place": nn.ReLU6(True),
    "function": F.relu6,
    "hardtanh": nn.Hardtanh(0, 6),
    "hardtanh_": lambda x: F.hardtanh_(x, 0, 6),
    "clamp": lambda x: x.clamp(0, 6),
    "part views": halves(nn.ReLU6(True)),
}


def by_hand(method: Method, top: float, network: nn.Module, image: torch.Tensor, unit: tuple[int, ...]) -> torch.Tensor:
    """`chain` with a rectifier that cuts off at 0 and at `top`, there and back with no autograd."""
    network = network.requires_grad_(False)
    one = network.first(image[None]) * 3
    two = network.second(one.clamp(0, top)) * 3
    signal = torch.zeros_like(network.third(two.clamp(0, top)))
    signal[(0, *unit)] = 1
    for layer, met in ((network.third, two), (network.second, one), (network.first, None)):
        size = image[None].shape if met is None else met.shape
        signal = torch.nn.grad.conv2d_input(size, layer.weight, signal, layer.stride)
        if met is not None:
            mask = (met > 0) & (met < top) if method != "deconvnet" else torch.ones_like(met, dtype=torch.bool)
            signal = (signal if method == "gradient" else signal.clamp(min=0)) * mask * 3
    return signal


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("name", "six"), [(name, False) for name in RELU] + [(name, True) for name in RELU6], ids=lambda each: str(each)
)
def test_however_a_rectifier_is_called(name: str, six: bool, method: Method, images: torch.Tensor) -> None:
    network = chain((RELU6 if six else RELU)[name])
    tap = taps_of(network, ["third"])[0]
    images = images[:2] * (4 if six else 1)  # so that 6 is reached
    mine = project(network, tap, images, method)
    for place, (channel, position) in enumerate(zip(*some(tap, 2), strict=True)):
        unit = (int(channel), *position.tolist())
        theirs = by_hand(method, 6 if six else float("inf"), network, images[place], unit)
        close(mine.signal[place : place + 1], theirs)


class Swish(torch.autograd.Function):
    """As packages write it to save memory."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return grad * x.sigmoid() * (1 + x * (1 - x.sigmoid()))


UNDEFINED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "LeakyRelu": nn.LeakyReLU(0.1, inplace=True),
    "Prelu": lambda x: F.prelu(x, torch.full((1,), 0.2)),
    "Elu": F.elu,
    "Celu": F.celu,
    "Gelu": nn.GELU(),
    "Silu": lambda x: F.silu(x, inplace=True),
    "Hardswish": nn.Hardswish(inplace=True),
    "Hardsigmoid": F.hardsigmoid,
    "Sigmoid": torch.sigmoid,
    "Tanh": lambda x: x.tanh_(),
    "Mish": F.mish,
    "Softplus": F.softplus,
    "Hardtanh": F.hardtanh,
    "Clamp": lambda x: x.clamp(-1, 1),
    "Threshold": lambda x: F.threshold(x, 0.5, 0.5),
    "Swish (a custom function)": Swish.apply,
}


@pytest.mark.parametrize("method", BENT)
@pytest.mark.parametrize("name", UNDEFINED)
def test_an_activation_without_a_rule_has_its_gradient_and_is_named(
    name: str, method: Method, images: torch.Tensor
) -> None:
    network = chain(UNDEFINED[name])
    tap = taps_of(network, ["third"])[0]
    with Projector(network, tap, method) as projector:
        mine = projector(images, range(4), *some(tap, 4))
    close(mine.signal, by_autograd(network, tap, images))
    assert {each.replace("PreluKernel", "Prelu") for each in projector.undefined} == {name}


def test_overlapping_pools_add(images: torch.Tensor) -> None:
    """One value that is the maximum of several windows gets the sum of their signals."""
    network = nn.Sequential(nn.MaxPool2d(3, 1), nn.Conv2d(3, 2, 3))
    tap = taps_of(network, ["1"])[0]
    image = torch.zeros((1, 3, 64, 64))
    image[0, 0, 10, 10] = 5
    with Projector(network, tap) as projector:
        signal = projector(image, [0], [1], [[8, 8]]).signal
    torch.testing.assert_close(signal[0, 0, 10, 10], network[1].weight[1, 0].sum())


# Seeds, means, batches


@pytest.mark.parametrize("method", METHODS)
def test_linear_in_the_seed(method: Method, images: torch.Tensor) -> None:
    network = lively(small_resnet())
    for tap in taps_of(network)[::4]:
        one, own = (project(network, tap, images, method, seed) for seed in ("one", "activation"))
        assert torch.equal(own.unlit, own.score <= 0) and not one.unlit.any()
        factor = torch.where(own.unlit, 1, own.score).view(-1, 1, 1, 1)
        close(own.signal, one.signal * factor)
    assert bool(own.unlit.any()) or bool((own.score > 0).all())


def test_an_activation_of_zero_or_less_seeds_one(images: torch.Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    tap = taps_of(network, at="activation")[0]
    network[0].bias.fill_(-100)
    own = project(network, tap, images, "deconvnet", "activation")
    assert own.unlit.all() and not own.score.any()
    close(own.signal, project(network, tap, images).signal)
    assert bool((own.signal.abs().amax((1, 2, 3)) > 0).all())


@pytest.mark.parametrize("name", ["stem", "last", "tokens", "lines", "head"])
def test_means_start_everywhere(name: str, images: torch.Tensor) -> None:
    network = Mixed()
    tap = taps_of(network, [name])[0]
    with Projector(network, tap, "gradient") as projector:
        found = projector(images, [0, 1, 2, 3], [0, 1, 2, 3])
        every = [[row, column] for row in range(tap.map[0]) for column in range(tap.map[1])]
        for place in range(4):
            single = projector(images[place : place + 1], [0] * len(every), [place] * len(every), every)
            close(found.signal[place : place + 1], single.signal.sum(0, keepdim=True))
            torch.testing.assert_close(found.score[place], single.score.mean())


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_images_and_channels_is_each_by_itself(method: Method, images: torch.Tensor) -> None:
    network, images = small_resnet().double(), images.double()
    index = torch.tensor([2, 0, 2, 3, 2, 0])  # image 1 has no winner
    for tap in taps_of(small_resnet())[::5]:
        channels, positions = some(tap, len(index))
        with Projector(network, tap, method, "activation") as projector:
            whole = projector(images, index, channels, positions)
            for place, image in enumerate(index):
                row = slice(place, place + 1)
                alone = projector(images[image][None], [0], channels[row], positions[row])
                close(whole.signal[row], alone.signal, 1e-9)
                torch.testing.assert_close(whole.score[row], alone.score)


def test_share() -> None:
    images = np.random.default_rng(0).zipf(1.6, 200) % 60
    calls = share(images, batch=7, rounds=3)
    assert sorted(np.concatenate(calls).tolist()) == list(range(200))
    for call in calls:
        own, counts = np.unique(images[call], return_counts=True)
        assert len(own) <= 7 and counts.max() <= 3
    work = sum(len(np.unique(images[call])) * np.unique(images[call], return_counts=True)[1].max() for call in calls)
    assert work <= 1.2 * 200  # little goes back for nothing
    assert share([], 4) == []


def test_images_stay_as_they_are(images: torch.Tensor) -> None:
    """Also where the network works in place on what it is given."""

    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x.sub_(0.5))

    network = Centred()
    before = images.clone()
    with torch.inference_mode():
        project(network, taps_of(network)[0], images.clone())
    project(network, taps_of(network)[0], images)
    assert torch.equal(images, before)


# The network


def test_nothing_after_the_tap_runs(images: torch.Tensor) -> None:
    class Never(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert not torch.is_grad_enabled(), "only the dry run comes here"
            return x

    network = nn.Sequential(nn.Conv2d(3, 4, 3), Never())
    tap = taps_of(network)[0]
    project(network, tap, images)
    with pytest.raises(AssertionError, match="dry run"):
        network(images.requires_grad_())
    images.requires_grad_(False)


def test_normalised_networks_too(images: torch.Tensor) -> None:
    network = small_vgg()
    tap = taps_of(network)[2]
    wrapped = Normalised(network, Preprocess(crop=(64, 64)))
    torch.testing.assert_close(project(wrapped, tap, images).signal, project(network, tap, images).signal)


def hooks(network: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules())


def test_hooks_come_off(images: torch.Tensor) -> None:
    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) == 3:
                raise KeyError("no batches of three")
            return x

    network = nn.Sequential(Fails(), nn.Conv2d(3, 4, 3), nn.ReLU())
    tap = taps_of(network, at="activation")[0]
    before = torch.relu
    with Projector(network, tap) as projector:
        assert hooks(network) == 1
        expected = projector(images, [0], [1], [[0, 0]])
        with pytest.raises(KeyError, match="three"):
            projector(images[:3], [0], [1], [[0, 0]])
        assert torch.overrides._get_current_function_mode_stack() == []
        assert torch.equal(projector(images, [0], [1], [[0, 0]]).signal, expected.signal)
    assert hooks(network) == 0 and torch.relu is before
    with pytest.raises(ZeroDivisionError), Projector(network, tap):
        raise ZeroDivisionError
    assert hooks(network) == 0
    leaf = images.clone().requires_grad_()
    plain = torch.autograd.grad(network(leaf)[0, 1, 0, 0], leaf)[0]  # the network is as it was
    close(plain[:1], by_autograd_at(network, images[:1]))


def by_autograd_at(network: nn.Module, image: torch.Tensor) -> torch.Tensor:
    value = network[1](image)
    leaf = image.clone().requires_grad_()
    (grad,) = torch.autograd.grad(network[1](leaf)[0, 1, 0, 0], leaf)
    return grad * (value[0, 1, 0, 0] > 0)


def test_a_tap_that_is_not_reached(images: torch.Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3))
    tap = taps_of(network)[0]
    later = Tap.from_json(tap.to_json() | {"name": "0:1", "call": 1})
    with pytest.raises(MaxactError, match="'0:1': was not run"):
        project(network, later, images)


def test_a_tap_that_autograd_cannot_follow(images: torch.Tensor) -> None:
    class Detached(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.detach()

    network = nn.Sequential(Detached(), nn.Conv2d(3, 4, 3))
    with pytest.raises(MaxactError, match="'1': autograd cannot follow"):
        project(network, taps_of(network)[0], images)
