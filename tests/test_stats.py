"""Running statistics against numpy over all maps at once."""

import numpy as np
import pytest

from maxact.stats import Stats
from maxact_kernels import peaks
from maxact_kernels.peaks import Peaks


def add(stats: Stats, maps: np.ndarray, numbers: np.ndarray) -> None:
    out = Peaks.empty(*maps.shape[:2])
    peaks.reduce(maps, False, out)
    stats.add(out, numbers)


@pytest.fixture
def maps() -> np.ndarray:
    """[N, C, P]: 50 images, 6 channels of different scale, 30 positions."""
    rng = np.random.default_rng(3)
    maps = (
        rng.standard_normal((50, 6, 30)) * np.array([1, 10, 0.1, 1, 1, 0])[:, None]
        + np.array([0, 5, 0, -9, 0, 2])[:, None]
    )
    return maps.astype(np.float32)


def test_equals_numpy_over_images_and_positions(maps: np.ndarray) -> None:
    stats = Stats.empty(6)
    for start in range(0, 50, 8):
        add(stats, maps[start : start + 8], np.arange(start, min(start + 8, 50)))
    got = stats.describe(30)
    exact = maps.astype(np.float64)
    np.testing.assert_array_equal(got["count"], 1500)
    np.testing.assert_allclose(got["mean"], exact.mean((0, 2)), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(got["std"], exact.std((0, 2)), rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(got["min"], maps.min((0, 2)))
    np.testing.assert_array_equal(got["max"], maps.max((0, 2)))
    np.testing.assert_allclose(got["active"], (maps > 0).mean((0, 2)), rtol=1e-6)


def test_masked_rows_and_maps_with_nan_stay_out(maps: np.ndarray) -> None:
    clean = Stats.empty(6)
    add(clean, maps[:10], np.arange(10))
    dirty = Stats.empty(6)
    maps[10] = 1e9  # masked
    maps[11, 2, 7] = np.nan
    numbers = np.arange(12)
    numbers[10] = -1
    add(dirty, maps[:12], numbers)
    np.testing.assert_array_equal(dirty.unfit, [0, 0, 1, 0, 0, 0])
    np.testing.assert_array_equal(dirty.images, [11, 11, 10, 11, 11, 11])
    for name in ("total", "square", "min", "max", "active"):
        assert getattr(dirty, name)[2] == getattr(clean, name)[2]


def test_merge_adds_up(maps: np.ndarray) -> None:
    parts = []
    for start in (0, 20):
        parts.append(Stats.empty(6))
        add(parts[-1], maps[start : start + 20], np.arange(20))
    got = parts[0].merge(parts[1]).describe(30)
    exact = maps[:40].astype(np.float64)
    np.testing.assert_array_equal(got["count"], 1200)
    np.testing.assert_allclose(got["mean"], exact.mean((0, 2)), rtol=1e-5, atol=1e-7)


def test_nothing_seen_is_nan() -> None:
    got = Stats.empty(2).describe(10)
    assert (got["count"] == 0).all()
    for name in ("mean", "std", "min", "max", "active"):
        assert np.isnan(got[name]).all()
