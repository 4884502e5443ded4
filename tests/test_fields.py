"""Fields by arithmetic, against hand-worked and published ones, and against influence measured by running."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from torch import nn

from maxact import demo
from maxact.errors import MaxactError
from maxact.field import Field, Intervals
from maxact.fields import fields, of_taps
from maxact.fields.flow import Flow
from maxact.fields.influence import hulls, influence
from maxact.find import find
from maxact.models import Normalised
from maxact.preprocess import Preprocess
from maxact.tap import Tap

Forward = Callable[[torch.Tensor], torch.Tensor]


class Network(nn.Module):
    """A forward function, whose result is the tap "end"."""

    def __init__(self, run: Forward, *parts: nn.Module) -> None:
        super().__init__()
        self.run, self.parts, self.end = run, nn.ModuleList(parts), nn.Identity()
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.end(self.run(images))
        return found


def field_of(run: Forward, size: tuple[int, int], *parts: nn.Module) -> Field:
    """By arithmetic, what a function gives."""
    network = Network(run, *parts)
    with torch.no_grad():
        shape = network(torch.zeros(2, 3, *size)).shape
    rest = shape[2:] if len(shape) == 4 else shape[1:2] if len(shape) == 3 else ()
    tap = Tap("end", "end", 0, "end", "Identity", 1, (*rest, 1, 1)[:2], 1 if len(shape) == 4 else -1)
    return of_taps(network, [tap], size)["end"]


def measured(
    run: Callable[[torch.Tensor], Any], size: tuple[int, int], batch: int = 16
) -> list[tuple[Intervals, Intervals]]:
    """By running, (rows, columns) of everything that a function gives."""
    rows, columns = (influence(run, size, axis, batch)[0] for axis in range(2))
    return [(hulls(a.any(2)), hulls(b.any(1))) for a, b in zip(rows, columns, strict=True)]


def agrees(run: Forward, size: tuple[int, int]) -> Field:
    field = field_of(run, size)
    ((rows, columns),) = measured(run, size)
    assert np.array_equal(field.rows, rows), (field.rows.tolist(), rows.tolist())
    assert np.array_equal(field.cols, columns), (field.cols.tolist(), columns.tolist())
    return field


def pairs(values: Any) -> list[tuple[int, int]]:
    return [tuple(each) for each in values.tolist()]


def weights(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


# By hand.


def test_the_example_of_the_convention() -> None:
    field = field_of(lambda x: F.conv2d(x, weights(1, 3, 3, 3), padding=1, stride=2), (8, 8))
    assert pairs(field.rows) == pairs(field.local_cols) == [(0, 2), (1, 4), (3, 6), (5, 8)]
    assert pairs(field.outer_rows) == [(-1, 2), (1, 4), (3, 6), (5, 8)]
    assert field.regular == {"size": [3, 3], "start": [-1, -1], "stride": [2, 2]}
    assert (field.step, field.stride) == ((2, 2), (2.0, 2.0))


def test_a_pool_with_ceil_mode_ends_beyond_the_input() -> None:
    field = agrees(lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True), (8, 8))
    assert pairs(field.rows) == [(0, 3), (2, 5), (4, 7), (6, 8)]
    assert pairs(field.outer_rows)[-1] == (6, 9)


def test_kernels_smaller_than_the_stride_leave_gaps() -> None:
    field = agrees(lambda x: F.conv2d(x, weights(1, 3, 1, 2), stride=(3, 4)), (9, 11))
    assert pairs(field.rows) == [(0, 1), (3, 4), (6, 7)]
    assert pairs(field.cols) == [(0, 2), (4, 6), (8, 10)]


def test_dilation_reads_past_its_padding() -> None:
    """Kernel 2, dilation 3, padding 2: unit 0 reads -2 and 1, so of the input only 1."""
    field = agrees(lambda x: F.conv2d(x, weights(1, 3, 2, 2), dilation=3, padding=2), (5, 5))
    assert pairs(field.rows) == [(1, 2), (2, 3), (0, 4), (1, 5), (2, 3), (3, 4)]
    assert pairs(field.outer_rows) == [(at - 2, at + 2) for at in range(6)]


def test_padding_at_the_far_end_only() -> None:
    field = agrees(lambda x: F.conv2d(F.pad(x, (0, 3, 0, 1)), weights(1, 3, 3, 3), stride=2), (6, 6))
    assert pairs(field.rows) == [(0, 3), (2, 5), (4, 6)]
    assert pairs(field.cols) == [(0, 3), (2, 5), (4, 6), (0, 0)][: len(field.cols)]
    assert field.regular == {"size": [3, 3], "start": [0, 0], "stride": [2, 2]}


def test_a_unit_that_sees_only_padding_is_empty() -> None:
    field = agrees(lambda x: F.conv2d(x, weights(1, 3, 1, 1), padding=(1, 0)), (3, 3))
    assert pairs(field.rows) == [(0, 0), (0, 1), (1, 2), (2, 3), (0, 0)]
    assert pairs(field.outer_rows) == [(at - 1, at) for at in range(5)]
    assert field.box(0, 1) == (0, 1, 0, 2)


def test_a_transposed_convolution_with_gaps() -> None:
    field = agrees(lambda x: F.conv_transpose2d(x, weights(3, 2, 2, 3), stride=(3, 2), padding=(0, 1)), (3, 3))
    assert pairs(field.rows) == [(0, 1), (0, 1), (0, 0), (1, 2), (1, 2), (0, 0), (2, 3), (2, 3)]
    assert pairs(field.cols) == [(0, 1), (0, 2), (1, 2), (1, 3), (2, 3)]
    assert field.stride == (pytest.approx(1 / 3), 0.5) and field.step == (1, 1)


def test_steps_remember_the_largest_stride() -> None:
    """Down by 4 and up again, beside the input itself: the stride is 1, the step 4."""

    def run(x: torch.Tensor) -> torch.Tensor:
        return torch.cat((x, F.interpolate(F.avg_pool2d(x, 4), scale_factor=4)), 1)

    field = agrees(run, (16, 16))
    assert (field.step, field.stride) == ((4, 4), (1.0, 1.0)) and field.regular is None
    assert pairs(field.rows)[:5] == [(0, 4)] * 4 + [(4, 8)]


def test_branches_with_different_strides() -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        a = F.interpolate(F.max_pool2d(x, 2), scale_factor=2.0, mode="bilinear")
        return a + F.interpolate(F.max_pool2d(x, 3), scale_factor=3)

    assert agrees(run, (12, 18)).step == (6, 6)


def test_gates_leave_the_local_field() -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        x = F.conv2d(x, weights(3, 3, 3, 3), padding=1)
        return x * torch.sigmoid(x.mean((2, 3), keepdim=True))

    field = field_of(run, (6, 6))
    assert field.is_global and field.is_gated
    assert pairs(field.local_rows) == [(0, 2), (0, 3), (1, 4), (2, 5), (3, 6), (4, 6)]
    added = field_of(lambda x: x + x.mean((2, 3), keepdim=True), (6, 6))
    assert added.is_global and not added.is_gated


# Published sizes.


def test_vgg16_layer_by_layer() -> None:
    """conv1_1 to conv5_3: 3 x 3 convolutions and 2 x 2 pools by the recursion r += (k - 1) * j, j *= s."""
    network = torchvision.models.vgg16(weights=None).eval()
    found = fields(network, 224)
    sizes = [field.size for name, field in found.items() if name.startswith("features")]
    expected = (3, 5, 10, 14, 24, 32, 40, 60, 76, 92, 132, 164, 196)
    assert sizes == [(each, each) for each in expected]
    assert found["classifier.0"].is_global


def slim_resnet50() -> nn.Module:
    """TF-slim's: the stride at the end of a block instead of at its beginning, and none in the last."""
    network = build("resnet50")
    layers = [network.get_submodule(f"layer{number}") for number in (1, 2, 3, 4)]
    for layer in layers:
        layer[0].conv2.stride = layer[0].downsample[0].stride = (1, 1)
    for layer in layers[:3]:
        layer[-1].conv2.stride, layer[-1].downsample = (2, 2), nn.MaxPool2d(1, 2)
    return network


@pytest.mark.parametrize(
    ("name", "place", "size"),
    [
        *(("alexnet", "features.12", 195), ("vgg16", "features.30", 212), ("inception_v3", "Mixed_7c", 1311)),
        *(("slim", "layer4", 483), ("resnet50", "layer4", 427)),
    ],
)
def test_published_sizes(name: str, place: str, size: int) -> None:
    """195, 212, 1311, and 483 for TF-slim's resnet_v1_50: the table of Araujo, Norris and Sim, "Computing Receptive
    Fields of Convolutional Neural Networks", Distill 2019, in its library (google-research/receptive_field).

    torchvision's ResNet-50, whose strides come at the beginning of a layer, is not in it. By hand: 11 after the pool,
    then 3 blocks add 2 * 4 each; of the others the first adds two units of the stride before, the rest two of its
    own: 11 + 3 * 8 + (8 + 3 * 16) + (16 + 5 * 32) + (32 + 2 * 64) = 427.
    """
    network = slim_resnet50() if name == "slim" else build(name)
    wanted = find(*model_and_images(network, 96), layers=[place]).taps
    field = of_taps(network, wanted, (96, 96))[place]
    assert (field.size, field.stride, field.step) == ((size, size), (32.0, 32.0), (32, 32))


# Both methods.


def model_and_images(network: nn.Module, size: int) -> tuple[Normalised, torch.Tensor]:
    blank = torch.zeros((2, size, size, 3), dtype=torch.uint8)
    return Normalised(network.eval(), Preprocess(crop=(size, size))), blank


def recorder(network: nn.Module, wanted: tuple[Tap, ...]) -> Callable[[torch.Tensor], list[torch.Tensor]]:
    """The network as a function that gives what its taps see, channels first, tokens as maps of one column."""
    at = {(tap.module, tap.call): tap for tap in wanted}

    def run(images: torch.Tensor) -> list[torch.Tensor]:
        calls: dict[str, int] = {}
        found: dict[str, torch.Tensor] = {}

        def hook(path: str) -> Callable[..., None]:
            def record(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
                call = calls.get(path, 0)
                calls[path] = call + 1
                if tap := at.get((path, call)):
                    maps = output.isnan().any(tap.axis % output.ndim, keepdim=True).movedim(tap.axis, 1)
                    maps = torch.where(maps, math.nan, 0.0)
                    found[tap.name] = maps.unsqueeze(3) if maps.ndim == 3 else maps

            return record

        modules = dict(network.named_modules())
        hooks = [modules[path].register_forward_hook(hook(path)) for path in {tap.module for tap in wanted}]
        try:
            network(images)
        finally:
            for each in hooks:
                each.remove()
        return [found[tap.name] for tap in wanted]

    return run


class UNet(nn.Module):
    """Down by pools and a stride, up by a transposed convolution, nearest and bilinear interpolation, with skips."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.three, self.deep = nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, padding=2, dilation=2)
        self.up, self.join = nn.ConvTranspose2d(4, 4, 2, 2), nn.Conv2d(8, 4, 3, padding=1)
        self.last, self.out = nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(7, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.two(F.relu(self.one(x), inplace=True)).relu_()
        b = F.max_pool2d(a, 2)
        c = self.deep(self.three(b))
        b = self.join(torch.cat((b, self.up(c)), 1))
        d = F.interpolate(b, size=a.shape[-2:], mode="bilinear")
        d = self.last(torch.cat((a, d), 1))
        e = F.interpolate(F.avg_pool2d(d, 2), scale_factor=2, mode="nearest")
        result: torch.Tensor = self.out(torch.cat((x, e), 1))
        return result


def build(name: str) -> nn.Module:
    if name == "efficientnet_lite0":
        return demo.network()
    if name == "unet":
        return UNet()
    extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with torch.device("meta"):  # random weights take a while to draw; any will do
        network = torchvision.models.get_model(name, weights=None, **extra)
    network = network.to_empty(device="cpu")
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data.zero_()
    return network


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *(("vgg16", 40), ("resnet50", 48), ("inception_v3", 80), ("densenet121", 36), ("googlenet", 48)),
        *(("mobilenet_v3_small", 64), ("efficientnet_lite0", 52), ("unet", 40)),
    ],
)
def test_both_methods_agree(name: str, size: int, caplog: pytest.LogCaptureFixture) -> None:
    network = build(name).eval()
    wanted = find(*model_and_images(network, size)).taps
    with caplog.at_level(logging.WARNING, "maxact"):
        found = of_taps(network, wanted, (size, size))
    assert not caplog.records
    for tap, (rows, columns) in zip(wanted, measured(recorder(network, wanted), (size, size)), strict=True):
        assert np.array_equal(found[tap.name].rows, rows), tap.name
        assert np.array_equal(found[tap.name].cols, columns), tap.name


@pytest.mark.parametrize(("name", "size"), [("swin_t", 64), ("vit", 48)])
def test_with_attention_no_field_is_too_small(name: str, size: int, caplog: pytest.LogCaptureFixture) -> None:
    """A field that is no box of rows and columns is shown as its hull."""
    network = torchvision.models.VisionTransformer(size, 16, 2, 2, 8, 16) if name == "vit" else build(name)
    network.eval()
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.constant_(layer.weight, 0.01)
    wanted = find(*model_and_images(network, size)).taps
    with caplog.at_level(logging.WARNING, "maxact"):
        found = of_taps(network, wanted, (size, size))
    assert not caplog.records
    exact = 0
    for tap, each in zip(wanted, measured(recorder(network, wanted), (size, size)), strict=True):
        for ours, theirs in zip((found[tap.name].rows, found[tap.name].cols), each, strict=True):
            assert (ours[:, 0] <= theirs[:, 0]).all() and (ours[:, 1] >= theirs[:, 1]).all(), tap.name
            exact += np.array_equal(ours, theirs)
    assert exact == 2 * len(wanted)


def test_gated_networks_have_the_local_fields_of_themselves_without_gates() -> None:
    network = build("mobilenet_v3_small").eval()
    wanted = tuple(tap for tap in find(*model_and_images(network, 64)).taps if ".fc" not in tap.name)
    gated = of_taps(network, wanted, (64, 64))
    for module in network.modules():
        if isinstance(module, torchvision.ops.SqueezeExcitation):
            module.forward = lambda x: x
    plain = of_taps(network, wanted, (64, 64))
    assert sum(field.is_gated for field in gated.values()) > 8
    for name, field in gated.items():
        assert np.array_equal(field.local_rows, plain[name].rows) and np.array_equal(field.local_cols, plain[name].cols)
        assert np.array_equal(field.outer_rows, plain[name].outer_rows)
        assert (field.step, field.stride, field.regular) == (plain[name].step, plain[name].stride, plain[name].regular)


small = st.integers(1, 3)
STEPS: dict[str, st.SearchStrategy[Forward]] = {
    "conv": st.builds(
        lambda k, s, p, d: lambda x: F.conv2d(x, weights(3, 3, *k), stride=s, padding=p, dilation=d),
        *(st.tuples(small, small), small, st.integers(0, 2), small),
    ),
    "depthwise": st.builds(
        lambda k, s: lambda x: F.conv2d(x, weights(3, 1, k, k), stride=s, padding=k // 2, groups=3), small, small
    ),
    "pool": st.builds(
        lambda k, s, ceil: lambda x: F.max_pool2d(x, k, s, k // 2, ceil_mode=ceil), small, small, st.booleans()
    ),
    "average": st.builds(
        lambda k, s, ceil: lambda x: F.avg_pool2d(x, k, s, ceil_mode=ceil), small, small, st.booleans()
    ),
    "pad": st.builds(
        lambda a, b, mode: lambda x: F.pad(x, (a, b, b, a), mode=mode),
        *(st.integers(0, 2), st.integers(0, 2), st.sampled_from(["constant", "reflect", "replicate", "circular"])),
    ),
    "up": st.builds(
        lambda scale, mode: lambda x: F.interpolate(x, scale_factor=scale, mode=mode),
        *(st.sampled_from([2, 3, 1.5, 0.5]), st.sampled_from(["nearest", "nearest-exact", "bilinear", "bicubic"])),
    ),
    "resize": st.builds(
        lambda h, w, corners: lambda x: F.interpolate(x, size=(h, w), mode="bilinear", align_corners=corners),
        *(st.integers(1, 17), st.integers(1, 17), st.booleans()),
    ),
    "adaptive": st.builds(
        lambda h, w: lambda x: F.adaptive_avg_pool2d(x, (h, w)), st.integers(1, 9), st.integers(1, 9)
    ),
    "transposed": st.builds(
        lambda k, s, o: lambda x: F.conv_transpose2d(x, weights(3, 3, k, k), stride=s, output_padding=min(o, s - 1)),
        *(small, small, st.integers(0, 2)),
    ),
    "slice": st.builds(lambda a, s: lambda x: x[:, :, a::s, : x.shape[3] - a], st.integers(0, 2), st.integers(1, 2)),
    "flip": st.just(lambda x: x.flip(2)),
    "roll": st.just(lambda x: x.roll((1, -2), (2, 3))),
    "shuffle": st.just(lambda x: F.pixel_shuffle(x.repeat_interleave(4, 1), 2)),
    "nhwc": st.just(lambda x: F.linear(x.permute(0, 2, 3, 1), weights(3, 3)).permute(0, 3, 1, 2)),
    "tokens": st.just(lambda x: F.linear(x.flatten(2).transpose(1, 2), weights(3, 3)).transpose(1, 2).view(x.shape)),
    "skip": st.just(lambda x: x + F.avg_pool2d(x, 3, 1, 1)),
    "cat": st.just(lambda x: torch.cat((x[:, :1], F.avg_pool2d(x, 3, 1, 1)[:, 1:]), 1)),
    "norm": st.just(lambda x: F.layer_norm(x.movedim(1, -1), (3,)).movedim(-1, 1)),
    "softmax": st.just(lambda x: x.softmax(1)),
    "sums": st.just(lambda x: x + x.mean(3, keepdim=True)),
}


def chain(steps: list[Forward]) -> Forward:
    """One after the other, as far as they go: a map can become too small for the next, or too large for a test."""

    def run(x: torch.Tensor) -> torch.Tensor:
        for step in steps:
            try:
                following = step(x)
            except RuntimeError:  # smaller than its kernel
                continue
            x = following if following.numel() and max(following.shape[2:]) < 60 else x
        return x

    return run


@given(st.lists(st.one_of(*STEPS.values()), min_size=1, max_size=5), st.integers(7, 14), st.integers(7, 14))
@settings(max_examples=150, deadline=None)
def test_both_methods_agree_on_any_chain(steps: list[Forward], height: int, width: int) -> None:
    field = agrees(chain(steps), (height, width))
    for inner, outer in ((field.local_rows, field.outer_rows), (field.local_cols, field.outer_cols)):
        some = inner[:, 1] > inner[:, 0]
        assert (outer[some, 0] <= inner[some, 0]).all() and (outer[some, 1] >= inner[some, 1]).all()


# Steps.


@given(st.lists(st.one_of(*(STEPS[name] for name in STEPS if name != "pad")), min_size=1, max_size=5))
@settings(max_examples=100, deadline=None)
def test_outer_intervals_come_again_a_step_further_on(steps: list[Forward]) -> None:
    """Before `as_field` widens them to what an interpolation reads at the border."""
    image = torch.zeros(2, 3, 24, 24)
    flow = Flow(image)
    with torch.no_grad(), flow.leaving, flow:
        output = chain(steps)(image)
    reach = flow.reach(output)
    assert reach is not None
    for axis in range(2):
        start, stop = reach.planes[axis][4:].amax((1, 2, 4 - axis)).expand(2, output.shape[axis + 2]).numpy()
        step, stride = reach.step[axis], reach.unit(axis, axis + 2)
        if step < 24 and stride:
            units = int(step / stride)
            assert units * stride == step
            some = stop[:-units] > -start[:-units]
            assert np.array_equal(start[:-units][some] - step, start[units:][some])
            assert np.array_equal(stop[:-units][some] + step, stop[units:][some])


@pytest.mark.parametrize("name", ["vgg16", "shufflenet_v2_x0_5", "efficientnet_lite0", "unet"])
def test_a_shift_by_the_step_shifts_the_map(name: str) -> None:
    torch.manual_seed(0)
    network = (
        build(name) if name in ("unet", "efficientnet_lite0") else torchvision.models.get_model(name, weights=None)
    ).eval()
    size = 96
    at = {
        "vgg16": "features.14",
        "shufflenet_v2_x0_5": "stage2.0.branch1.3",
        "efficientnet_lite0": "_blocks.3",
        "unet": "out",
    }
    wanted = find(*model_and_images(network, size), layers=[f"{at[name]}*"]).taps[-1:]
    field = of_taps(network, wanted, (size, size))[wanted[0].name]
    maps = []
    big = torch.rand(1, 3, size + field.step[0], size + field.step[1], generator=torch.Generator().manual_seed(1))
    module = network.get_submodule(wanted[0].module)
    hook = module.register_forward_hook(lambda m, i, output: maps.append(output.clone()))
    with torch.no_grad():
        network(big[:, :, : -field.step[0], : -field.step[1]])
        network(big[:, :, field.step[0] :, field.step[1] :])
    hook.remove()
    first, second = maps
    units = int(field.step[0] / field.stride[0]), int(field.step[1] / field.stride[1])
    outer = field.outer_rows
    inner = np.flatnonzero((outer[:, 0] >= field.step[0]) & (outer[:, 1] <= size))
    low, high = int(inner[0]), int(inner[-1]) + 1
    assert high - low >= 2
    here = first[:, :, low:high, low:high]
    there = second[:, :, low - units[0] : high - units[0], low - units[1] : high - units[1]]
    assert torch.allclose(here, there, atol=1e-5)
    if field.step[0] > 1:  # and by less than a step it does not
        assert not torch.allclose(here, second[:, :, low - units[0] + 1 :, low:high][:, :, : high - low], atol=1e-3)


# What cannot be followed.


def test_an_operation_without_a_rule_is_named_once_and_sees_everything(caplog: pytest.LogCaptureFixture) -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        grid = torch.zeros(len(x), 4, 4, 2)
        return F.grid_sample(F.grid_sample(x[:, :, :5], grid, align_corners=False), grid, align_corners=False)

    with caplog.at_level(logging.WARNING, "maxact"):
        field = field_of(run, (8, 8))
    assert pairs(field.rows) == [(0, 5)] * 4 and pairs(field.cols) == [(0, 8)] * 4
    assert [record.name for record in caplog.records] == ["maxact"]
    assert "grid_sampler_2d" in caplog.text


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.max().item(),
        lambda x: float(x.mean()),
        lambda x: x.tolist()[0][0][0][0],
        lambda x: x.detach().numpy().max().item(),
        lambda x: 1.0 if (x > 0).any() else 0.0,
    ],
)
def test_numbers_that_the_network_reads_reach_everything(
    read: Callable[[torch.Tensor], float], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "maxact"):
        field = field_of(lambda x: x[:, :, ::2] * 1 + read(x), (8, 8))
    assert field.is_global and "fields: " in caplog.text
    before = field_of(lambda x: (x[:, :, ::2], read(x))[0], (8, 8))
    assert pairs(before.rows) == [(0, 1), (2, 3), (4, 5), (6, 7)]


def test_memory_that_is_shared_and_changed_in_place() -> None:
    def stale(x: torch.Tensor) -> torch.Tensor:
        y = x * 1
        view = y.view(len(x), 3, -1)
        y += F.avg_pool2d(x, 3, 1, 1)
        return view.view(x.shape)

    def parts(x: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(x)
        result[:, :, 1:] = x[:, :, :-1]
        result[:, 1, 0] = x[:, 1, 4]
        return result

    def behind(x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(x, 2).data + 0

    def turned(x: torch.Tensor) -> torch.Tensor:
        y = (x * 1).unsqueeze(0)
        return y.squeeze_(0).transpose_(2, 3).clone()

    assert pairs(agrees(stale, (6, 6)).rows)[:2] == [(0, 2), (0, 3)]
    assert pairs(agrees(parts, (6, 6)).rows)[:3] == [(4, 5), (0, 1), (1, 2)]
    assert pairs(agrees(behind, (6, 6)).rows) == [(0, 2), (2, 4), (4, 6)]
    assert agrees(turned, (6, 4)).is_global


def test_constants_see_nothing() -> None:
    field = field_of(lambda x: torch.ones_like(x), (4, 4))
    assert pairs(field.rows) == [(0, 0)] * 4 and pairs(field.outer_cols) == [(0, 0)] * 4


def test_what_depends_on_the_place_has_no_step() -> None:
    embedding = torch.rand(1, 3, 8, 8)
    assert field_of(lambda x: F.avg_pool2d(x + embedding, 2), (8, 8)).step == (8, 8)
    assert field_of(lambda x: F.avg_pool2d(x, 2) * 2, (8, 8)).step == (2, 2)


# The public function.


def test_a_function_is_measured() -> None:
    network = nn.Conv2d(3, 2, 3, padding=1, stride=2)
    by_running = fields(lambda x: network(x), (9, 8))
    by_name = fields(nn.Sequential(network), (9, 8))["0"]
    assert pairs(by_running.rows) == pairs(by_name.rows) and pairs(by_running.cols) == pairs(by_name.cols)
    assert (by_running.step, by_running.regular) == (by_name.step, by_name.regular)


def test_a_network_is_left_as_it_was() -> None:
    network = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2))
    assert list(fields(network, 8)) == ["1"]
    assert network.training and all(layer._forward_hooks == {} for layer in network)
    assert network[1].num_batches_tracked == 0


def test_networks_that_cannot_run_are_named() -> None:
    with pytest.raises(MaxactError, match="cannot run on images of"):
        fields(nn.Sequential(nn.Conv2d(3, 4, 9)), 8)
    network = nn.Sequential(nn.Conv2d(3, 4, 3))
    tap = Tap("0:1", "0", 1, "0", "Conv2d", 4, (6, 6), 1)
    with pytest.raises(MaxactError, match="'0:1' is not reached"):
        of_taps(network, [tap], (8, 8))
