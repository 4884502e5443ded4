"""The peaks of outputs of every kind, on the CPU, against plain numpy."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maxact_kernels import output
from maxact_kernels.output import peaks
from maxact_kernels.peaks import Peaks

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def by_numpy(values: torch.Tensor, axis: int) -> dict[str, np.ndarray]:
    """The six numbers [N, C] of an output [N, ...], in float64, from their definition."""
    maps = np.moveaxis(values.detach().double().numpy(), axis, 1)
    maps = maps.reshape(*maps.shape[:2], -1)
    fit = np.isfinite(maps).all(2)
    maps = np.where(fit[..., None], maps, 0)
    return {
        "max": np.where(fit, maps.max(2), np.nan),
        "position": np.where(fit, maps.argmax(2), -1),
        "min": np.where(fit, maps.min(2), np.nan),
        "mean": np.where(fit, maps.mean(2), np.nan),
        "square": np.where(fit, (maps**2).mean(2), np.nan),
        "active": np.where(fit, (maps > 0).sum(2), 0),
    }


def check(found: torch.Tensor, values: torch.Tensor, axis: int) -> None:
    wanted = by_numpy(values, axis)
    assert found.dtype == torch.float32 and found.shape == (6, *wanted["max"].shape) and found.is_contiguous()
    got = Peaks.of(found)
    for name in ("max", "position", "min", "active"):
        np.testing.assert_array_equal(getattr(got, name), wanted[name], err_msg=name)
    scale = np.sqrt(np.nanmax(wanted["square"], initial=0))
    np.testing.assert_allclose(got.mean, wanted["mean"], rtol=2e-6, atol=2e-6 * scale)
    np.testing.assert_allclose(got.square, wanted["square"], rtol=1e-5, atol=1e-37)


def made(*shape: int, dtype: torch.dtype = torch.float32, levels: int = 40) -> torch.Tensor:
    """Random values of which many are equal."""
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randint(-levels, levels, shape, generator=generator) / 8).to(dtype)


# Ways in which an output may lie in memory, and its channel axis
LAYOUTS: dict[str, tuple[Callable[[torch.dtype], torch.Tensor], int]] = {
    "contiguous": (lambda dtype: made(3, 5, 7, 6, dtype=dtype), 1),
    "channels_last": (lambda dtype: made(3, 5, 7, 6, dtype=dtype).to(memory_format=torch.channels_last), 1),
    "transposed": (lambda dtype: made(3, 5, 7, 6, dtype=dtype).transpose(2, 3), 1),
    "images along the last axis": (lambda dtype: made(5, 7, 6, 3, dtype=dtype).permute(3, 0, 1, 2), 1),
    "every second value": (lambda dtype: made(3, 5, 14, 12, dtype=dtype)[:, :, ::2, 1::2], 1),
    "some channels of channels_last": (
        lambda dtype: made(3, 9, 7, 6, dtype=dtype).to(memory_format=torch.channels_last)[:, 2:7],
        1,
    ),
    "flipped": (lambda dtype: made(3, 5, 7, 6, dtype=dtype).flip(3), 1),
    "expanded over positions": (lambda dtype: made(3, 5, 1, 1, dtype=dtype).expand(-1, -1, 4, 6), 1),
    "expanded over images": (lambda dtype: made(1, 5, 7, 6, dtype=dtype).expand(3, -1, -1, -1), 1),
    "one position": (lambda dtype: made(3, 5, 1, 1, dtype=dtype), 1),
    "one channel": (lambda dtype: made(3, 1, 7, 6, dtype=dtype), 1),
    "one channel of channels_last": (
        lambda dtype: made(3, 1, 7, 6, dtype=dtype).to(memory_format=torch.channels_last),
        1,
    ),
    "one image": (lambda dtype: made(1, 5, 7, 6, dtype=dtype), 1),
    "a sequence": (lambda dtype: made(3, 5, 17, dtype=dtype), 1),
    "volumes": (lambda dtype: made(2, 5, 3, 4, 5, dtype=dtype), 1),
    "vectors": (lambda dtype: made(3, 5, dtype=dtype), -1),
    "vectors, channels second": (lambda dtype: made(3, 5, dtype=dtype), 1),
    "vectors in columns": (lambda dtype: made(5, 3, dtype=dtype).T, -1),
    "tokens": (lambda dtype: made(3, 17, 5, dtype=dtype), -1),
    "tokens, transposed": (lambda dtype: made(3, 5, 17, dtype=dtype).transpose(1, 2), -1),
    "tokens but the first": (lambda dtype: made(3, 18, 5, dtype=dtype)[:, 1:], -1),
    "maps with channels last": (lambda dtype: made(3, 7, 6, 5, dtype=dtype), -1),
    "maps with channels last, permuted": (lambda dtype: made(3, 5, 7, 6, dtype=dtype).permute(0, 2, 3, 1), -1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str, dtype: torch.dtype) -> None:
    make, axis = LAYOUTS[layout]
    values = make(dtype)
    before = values.clone()
    check(peaks(values, axis), values, axis)
    assert torch.equal(values, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "expanded" not in name])
def test_every_layout_can_be_clamped_in_place(layout: str, dtype: torch.dtype) -> None:
    make, axis = LAYOUTS[layout]
    values = make(dtype)
    before = values.clone()
    check(output.PEAKS_THEN_CLAMP(values, axis, -0.5, 2.0), before, axis)
    assert torch.equal(values, before.clamp(-0.5, 2.0))


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 35), st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from(DTYPES),
    st.permutations(range(4)),
    st.sampled_from([1, -1]),
    st.randoms(use_true_random=False),
)
def test_any_shape_any_order_in_memory(
    shape: tuple[int, ...], dtype: torch.dtype, order: list[int], axis: int, random: object
) -> None:
    laid = made(*(shape[i] for i in order), dtype=dtype, levels=4)
    values = laid.permute(*(order.index(i) for i in range(4)))
    assert values.shape == shape
    number = random.randrange(values.numel() * 2)  # type: ignore[attr-defined]
    if number < values.numel():
        laid.view(-1)[number] = random.choice([np.nan, np.inf, -np.inf])  # type: ignore[attr-defined]
    check(peaks(values, axis), values, axis)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("axis", [1, -1])
def test_a_bad_value_takes_only_its_own_map_out(axis: int, value: float, dtype: torch.dtype) -> None:
    values = made(2, 4, 9, 5, dtype=dtype)
    values[1, 2, 8, 3] = value
    found = Peaks.of(peaks(values, axis))
    channel = (1, 2) if axis == 1 else (1, 3)
    assert np.argwhere(np.isnan(found.max)).tolist() == [list(channel)]
    assert (found.position[channel], found.active[channel]) == (-1, 0)
    assert np.isnan([found.min[channel], found.mean[channel], found.square[channel]]).all()
    check(peaks(values, axis), values, axis)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_finite_values_are_peaks(dtype: torch.dtype) -> None:
    """What overflows is the map, not the reduction: in float32 the largest float16 squared is still a number."""
    most = torch.finfo(torch.float16).max if dtype == torch.float16 else 1e18
    values = made(2, 3, 4, 4, dtype=dtype)
    values[0, 1] = most
    values[1, 2] = -most
    found = Peaks.of(peaks(values, 1))
    assert found.position[0, 1] == 0 and found.max[0, 1] == float(torch.tensor(most, dtype=dtype))
    assert found.active[1, 2] == 0 and found.max[1, 2] == found.min[1, 2] < 0
    check(peaks(values, 1), values, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [1, -1])
def test_of_equal_values_the_first_position(axis: int, dtype: torch.dtype) -> None:
    values = torch.zeros(2, 6, 11, 6, dtype=dtype)
    values[0] = -0.0  # which equals 0
    values[:, 3, 5:, 2:] = 1
    check(peaks(values, axis), values, axis)
    found = Peaks.of(peaks(values, 1))
    assert found.position[:, 3].tolist() == [5 * 6 + 2] * 2
    assert (found.position[:, :3] == 0).all()


def test_doubles_and_integers_are_read_as_float32() -> None:
    values = made(2, 3, 4, 5)
    for other in (values.double(), (8 * values).int(), values > 0):
        check(peaks(other, 1), other.float(), 1)


def test_what_needs_a_gradient_is_read_all_the_same() -> None:
    values = made(2, 3, 4, 5).requires_grad_()
    found = peaks(values * 1, 1)
    check(found.detach(), values, 1)


@pytest.mark.parametrize("shape, axis", [((0, 3, 4, 5), 1), ((0, 4, 5, 3), -1), ((0, 3), -1), ((0, 4, 3), -1)])
def test_no_images(shape: tuple[int, ...], axis: int) -> None:
    assert peaks(torch.zeros(shape), axis).shape == (6, 0, 3)


# Threads


@pytest.fixture
def large() -> torch.Tensor:
    """An output of more than two shares, so that up to three threads take part."""
    return made(12, 24, 96, 96).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_threads_that_share_an_output_give_what_one_gives(count: int, large: torch.Tensor) -> None:
    assert large.numel() > 2 * output._SHARE
    alone = peaks(large, 1)
    with output.threads(count):
        shared = [peaks(large, 1) for _ in range(5)]
    check(alone, large, 1)
    for each in shared:
        assert torch.equal(each.view(torch.int32), alone.view(torch.int32))


def helping() -> int:
    return sum(thread.name.startswith("maxact-peaks") for thread in threading.enumerate())


def test_blocks_of_threads_can_be_nested_and_leave_nothing_behind(large: torch.Tensor) -> None:
    alone = peaks(large, 1)
    before = output._helpers, helping()
    with output.threads(3):
        outer = output._helpers
        with output.threads(2):
            assert output._helpers is not outer
            assert torch.equal(peaks(large, 1)[0], alone[0])
        assert output._helpers is outer
        assert torch.equal(peaks(large, 1)[0], alone[0])
        with pytest.raises(RuntimeError, match="mine"), output.threads(2):
            peaks(large, 1)
            raise RuntimeError("mine")
        assert output._helpers is outer
    assert (output._helpers, helping()) == before
    assert torch.equal(peaks(large, 1)[0], alone[0])


# As an operator of torch's


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape, axis, last",
    [((2, 3, 4, 5), 1, False), ((2, 3, 4, 5), 1, True), ((2, 7, 3), -1, False), ((2, 3), -1, False)],
)
def test_the_operators_are_good_ones(shape: tuple[int, ...], axis: int, last: bool, dtype: torch.dtype) -> None:
    values = made(*shape, dtype=dtype)
    if last:
        values = values.to(memory_format=torch.channels_last)
    for operator, bounds in ((output.PEAKS, ()), (output.PEAKS_THEN_CLAMP, (0.0, 6.0))):
        done = torch.library.opcheck(operator, (values, axis, *bounds))
        assert set(done.values()) == {"SUCCESS"}


class Both(torch.nn.Module):
    """A map as it is, and what an in-place operation after it leaves."""

    def forward(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        maps = values * 2
        first = peaks(maps, 1)
        maps.relu_()
        return first, peaks(maps, 1), peaks(maps.flatten(2).transpose(1, 2), -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inside_a_compiled_graph(dtype: torch.dtype) -> None:
    network = Both()
    compiled = torch.compile(network, fullgraph=True, dynamic=False)
    values = made(3, 5, 7, 6, dtype=dtype)
    values[1, 2, 3, 4] = torch.nan
    with torch.inference_mode():
        for found, wanted in zip(compiled(values), network(values), strict=True):
            assert torch.equal(found.view(torch.int32), wanted.view(torch.int32))
    check(compiled(values)[0], values * 2, 1)
