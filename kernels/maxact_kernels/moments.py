"""Sums over the images of a batch, per channel, as a numba kernel that releases the GIL."""

import numpy as np
from numba import njit
from numpy.typing import NDArray


@njit(nogil=True, cache=True)
def add(
    images: NDArray[np.int64],
    unfit: NDArray[np.int64],
    total: NDArray[np.float64],
    square: NDArray[np.float64],
    low: NDArray[np.float32],
    high: NDArray[np.float32],
    active: NDArray[np.int64],
    batch_max: NDArray[np.float32],
    batch_min: NDArray[np.float32],
    batch_mean: NDArray[np.float32],
    batch_square: NDArray[np.float32],
    batch_active: NDArray[np.int32],
    numbers: NDArray[np.int64],
) -> None:
    """Adds a batch's peaks [N, C] to the running values [C], row after row; `numbers` < 0 leaves a row out.

    A map without a peak (maximum NaN) counts in `unfit` and nowhere else; other maps count in `images`.
    `total` and `square` add up the maps' means and mean squares.
    """
    for n in range(batch_max.shape[0]):
        if numbers[n] < 0:
            continue
        for c in range(batch_max.shape[1]):
            if np.isnan(batch_max[n, c]):
                unfit[c] += 1
                continue
            images[c] += 1
            total[c] += batch_mean[n, c]
            square[c] += batch_square[n, c]
            low[c] = min(low[c], batch_min[n, c])
            high[c] = max(high[c], batch_max[n, c])
            active[c] += batch_active[n, c]
