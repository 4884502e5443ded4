"""The peak kernels against plain numpy."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from maxact_kernels import peaks
from maxact_kernels.peaks import Peaks


def by_numpy(maps: np.ndarray) -> dict[str, np.ndarray]:
    """Peaks of maps [N, C, P], from their definition."""
    finite = np.isfinite(maps).all(-1)
    exact = np.where(finite[..., None], maps, 0).astype(np.float64)
    return {
        "max": np.where(finite, exact.max(-1), np.nan),
        "position": np.where(finite, exact.argmax(-1), -1),
        "min": np.where(finite, exact.min(-1), np.nan),
        "mean": np.where(finite, exact.mean(-1), np.nan),
        "square": np.where(finite, (exact**2).mean(-1), np.nan),
        "active": np.where(finite, (exact > 0).sum(-1), 0),
    }


def by_kernel(maps: np.ndarray, channels_last: bool) -> Peaks:
    out = Peaks.empty(*maps.shape[:2])
    laid = np.ascontiguousarray(maps.transpose(0, 2, 1)) if channels_last else maps
    peaks.reduce(laid, channels_last, out)
    return out


def check(got: dict[str, np.ndarray], maps: np.ndarray) -> None:
    expected = by_numpy(maps)
    for name in ("max", "position", "min", "active"):
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)
    scale = np.nanmax(np.abs(np.where(np.isfinite(maps), maps, 0)), initial=0)
    # of the smallest values half a step is more than that
    tiny = np.finfo(np.float32).tiny
    np.testing.assert_allclose(got["mean"], expected["mean"], rtol=1e-6, atol=max(1e-6 * scale, tiny))
    # a square below what float32 can hold is 0
    np.testing.assert_allclose(got["square"], expected["square"], rtol=1e-5, atol=1e-37)


# few different values, so that ties are everywhere
values = st.one_of(
    st.integers(-3, 3).map(float),
    st.floats(-1000, 1000, width=32),
    st.sampled_from([np.nan, np.inf, -np.inf]),
)
maps = st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 70)).flatmap(
    lambda shape: hnp.arrays(np.float32, shape, elements=values, fill=st.integers(-2, 2).map(float))
)


@settings(deadline=None)
@given(maps, st.booleans())
def test_kernels_give_what_numpy_gives(maps: np.ndarray, channels_last: bool) -> None:
    check(vars(by_kernel(maps, channels_last)), maps)


@settings(deadline=None)
@given(maps)
def test_the_torch_reference_gives_what_numpy_gives(maps: np.ndarray) -> None:
    got = peaks.reference(torch.from_numpy(maps))
    check(dict(zip(vars(Peaks.empty(1, 1)), (t.numpy() for t in got), strict=True)), maps)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("positions", [1, 7, 8, 15, 16, 17, 49, 12544])
def test_the_lowest_position_wins_a_tie(positions: int, channels_last: bool) -> None:
    rng = np.random.default_rng(positions)
    maps = rng.integers(0, 2, (2, 33, positions)).astype(np.float32)
    np.testing.assert_array_equal(by_kernel(maps, channels_last).position, maps.argmax(-1))


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 5, 48])
def test_one_bad_value_takes_only_its_own_map_out(value: float, place: int, channels_last: bool) -> None:
    rng = np.random.default_rng(0)
    maps = rng.standard_normal((2, 5, 49)).astype(np.float32)
    clean = by_kernel(maps, channels_last)
    maps[1, 3, place] = value
    got = by_kernel(maps, channels_last)
    assert np.isnan(got.max[1, 3]) and np.isnan(got.mean[1, 3]) and got.position[1, 3] == -1
    others = np.ones((2, 5), bool)
    others[1, 3] = False
    for name, array in vars(got).items():
        np.testing.assert_array_equal(array[others], getattr(clean, name)[others])


def test_a_half_precision_map_is_reduced_in_float32() -> None:
    maps = torch.full((1, 1, 4096), 0.1, dtype=torch.float16)
    _, _, _, mean, square, _ = peaks.reference(maps)
    value = float(torch.tensor(0.1, dtype=torch.float16))
    assert mean.item() == pytest.approx(value, rel=1e-6)
    assert square.item() == pytest.approx(value**2, rel=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 40)),
    st.booleans(),
    st.booleans(),
    st.sampled_from([(0.0, np.inf), (0.0, 6.0), (-np.inf, 0.1), (-1.0, 1.0), (2.0, 2.0)]),
    st.integers(0, 2**31),
)
def test_maps_are_clamped_once_their_peaks_are_found(
    shape: tuple[int, int, int], channels_last: bool, half: bool, bounds: tuple[float, float], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    values = torch.from_numpy(rng.standard_normal(shape).astype(np.float32) * 4)
    for value in (torch.nan, torch.inf, -torch.inf):
        if rng.random() < 0.3:
            values.view(-1)[rng.integers(values.numel())] = value
    laid = values.mT.contiguous() if channels_last else values
    laid = laid.bfloat16() if half else laid
    wanted = laid.clamp(*bounds)
    clean, found = Peaks.empty(*shape[:2]), Peaks.empty(*shape[:2])
    maps = laid.view(torch.uint16).numpy() if half else laid.numpy()
    peaks.reduce(maps.copy(), channels_last, clean)
    peaks.reduce(maps, channels_last, found, bounds=bounds)
    torch.testing.assert_close(laid, wanted, rtol=0, atol=0, equal_nan=True)
    for name, array in vars(clean).items():
        np.testing.assert_array_equal(getattr(found, name), array, err_msg=name)


@pytest.mark.parametrize("channels_last", [True, False])
def test_nothing_beside_the_rows_and_the_maps_is_written(channels_last: bool) -> None:
    values = np.random.default_rng(0).standard_normal((4, 5, 19)).astype(np.float32)
    memory = np.full(values.size + 200, 77, np.float32)
    laid = memory[100:-100].reshape(4, 19, 5) if channels_last else memory[100:-100].reshape(values.shape)
    laid[:] = values.transpose(0, 2, 1) if channels_last else values
    out = Peaks.empty(6, 5)
    for array in vars(out).values():
        array[:] = 77
    peaks.reduce(laid, channels_last, out.rows(1, 5), bounds=(-0.5, 0.5))
    np.testing.assert_array_equal(out.max[1:5], values.max(2))
    np.testing.assert_array_equal(out.position[1:5], values.argmax(2))
    for array in vars(out).values():
        assert (array[[0, 5]] == 77).all()
    assert (memory[:100] == 77).all() and (memory[-100:] == 77).all()
    assert np.abs(laid).max() == 0.5


@pytest.mark.parametrize("channels_last", [True, False])
def test_threads_that_share_the_images_give_what_one_gives(channels_last: bool) -> None:
    maps = np.random.default_rng(0).standard_normal((200, 33, 50)).astype(np.float32)
    alone = by_kernel(maps, channels_last)
    laid = np.ascontiguousarray(maps.transpose(0, 2, 1)) if channels_last else maps
    shared, turn = Peaks.empty(200, 33), np.zeros(1, np.int64)
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(peaks.reduce, laid, channels_last, shared, turn) for _ in range(4)]:
            done.result()
    assert turn[0] == 200 + 4  # every image was taken once, and every thread found none left once
    for name, array in vars(shared).items():
        np.testing.assert_array_equal(array, getattr(alone, name), err_msg=name)
