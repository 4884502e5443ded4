"""Streaming top-k heaps, one for every channel, as numba kernels that release the GIL.

A heap set is four arrays: `score` float32 [C, K], `image` int64 [C, K], `position` int32 [C, K] and `size` int64 [C].
Row c is a binary heap over its first `size[c]` entries with the *worst* entry at index 0, so that a newcomer is
compared with one value. The order is total: a higher score is better, and of two equal scores the lower image
number is better. Which entries a heap keeps therefore never depends on the order in which they came.

Sorted rows (`sort_rows`) are in rank order, the best first; `merge_rows` works on those.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

# Channels are tested against their heaps' worst scores in groups of this many: the test is branch-free and
# vectorised, and nearly always says that nothing in the group has to be looked at.
_GROUP = 32


@njit(nogil=True, cache=True, inline="always")
def _worse(score_a: float, image_a: int, score_b: float, image_b: int) -> bool:
    return score_a < score_b or (score_a == score_b and image_a > image_b)


@njit(nogil=True, cache=True)
def _sift_down(
    score: NDArray[np.float32], image: NDArray[np.int64], position: NDArray[np.int32], at: int, size: int
) -> None:
    """Moves the entry at index `at` of one row down to its place among the first `size`."""
    s, i, p = score[at], image[at], position[at]
    child = 2 * at + 1
    while child < size:
        right = child + 1
        if right < size and _worse(score[right], image[right], score[child], image[child]):
            child = right
        if not _worse(score[child], image[child], s, i):
            break
        score[at], image[at], position[at] = score[child], image[child], position[child]
        at = child
        child = 2 * at + 1
    score[at], image[at], position[at] = s, i, p


@njit(nogil=True, cache=True)
def _sift_up(score: NDArray[np.float32], image: NDArray[np.int64], position: NDArray[np.int32], at: int) -> None:
    """Moves the entry at index `at` of one row up to its place."""
    s, i, p = score[at], image[at], position[at]
    while at > 0:
        parent = (at - 1) // 2
        if not _worse(s, i, score[parent], image[parent]):
            break
        score[at], image[at], position[at] = score[parent], image[parent], position[parent]
        at = parent
    score[at], image[at], position[at] = s, i, p


@njit(nogil=True, cache=True)
def add(
    score: NDArray[np.float32],
    image: NDArray[np.int64],
    position: NDArray[np.int32],
    size: NDArray[np.int64],
    worst: NDArray[np.float32],
    values: NDArray[np.float32],
    positions: NDArray[np.int32],
    numbers: NDArray[np.int64],
    sign: np.float32,
) -> None:
    """Offers one batch to every heap: `values` and `positions` [N, C], image numbers `numbers` [N].

    A row whose number is negative and a value that is NaN are left out. The heaps keep `sign * value`: 1 keeps the
    highest values, -1 the lowest. `worst` float32 [C] caches each full heap's worst score (-inf while not full).
    """
    channels, k = score.shape
    for n in range(values.shape[0]):
        number = numbers[n]
        if number < 0:
            continue
        row = values[n]
        for start in range(0, channels, _GROUP):
            stop = min(start + _GROUP, channels)
            if stop - start == _GROUP:
                # a fixed count of steps without a branch, or the compiler does not vectorise it;
                # `>=` and not `>`: among equal scores a lower image number still has to come in
                enters = False
                for i in range(_GROUP):
                    enters |= sign * row[start + i] >= worst[start + i]
                if not enters:
                    continue
            for c in range(start, stop):
                value = sign * row[c]
                if not value >= worst[c]:
                    continue
                if size[c] < k:
                    at = size[c]
                    score[c, at], image[c, at], position[c, at] = value, number, positions[n, c]
                    size[c] = at + 1
                    _sift_up(score[c], image[c], position[c], at)
                elif _worse(score[c, 0], image[c, 0], value, number):
                    score[c, 0], image[c, 0], position[c, 0] = value, number, positions[n, c]
                    _sift_down(score[c], image[c], position[c], 0, k)
                if size[c] == k:
                    worst[c] = score[c, 0]


@njit(nogil=True, cache=True)
def sort_rows(
    score: NDArray[np.float32], image: NDArray[np.int64], position: NDArray[np.int32], size: NDArray[np.int64]
) -> None:
    """Sorts every heap in place into rank order: the worst entry is moved to the end again and again."""
    for c in range(score.shape[0]):
        for last in range(size[c] - 1, 0, -1):
            score[c, 0], score[c, last] = score[c, last], score[c, 0]
            image[c, 0], image[c, last] = image[c, last], image[c, 0]
            position[c, 0], position[c, last] = position[c, last], position[c, 0]
            _sift_down(score[c], image[c], position[c], 0, last)


@njit(nogil=True, cache=True)
def merge_rows(
    score_a: NDArray[np.float32],
    image_a: NDArray[np.int64],
    position_a: NDArray[np.int32],
    score_b: NDArray[np.float32],
    image_b: NDArray[np.int64],
    position_b: NDArray[np.int32],
    score: NDArray[np.float32],
    image: NDArray[np.int64],
    position: NDArray[np.int32],
) -> None:
    """The best K of two sets of sorted rows into the rows of `score`, `image`, `position` [C, K].

    Empty places have image -1 and come last, in the inputs as in the result.
    """
    channels, k = score.shape
    for c in range(channels):
        a = b = 0
        for rank in range(k):
            has_a = a < image_a.shape[1] and image_a[c, a] >= 0
            has_b = b < image_b.shape[1] and image_b[c, b] >= 0
            if has_a and not (has_b and _worse(score_a[c, a], image_a[c, a], score_b[c, b], image_b[c, b])):
                score[c, rank], image[c, rank], position[c, rank] = (
                    score_a[c, a],
                    image_a[c, a],
                    position_a[c, a],
                )
                a += 1
            elif has_b:
                score[c, rank], image[c, rank], position[c, rank] = (
                    score_b[c, b],
                    image_b[c, b],
                    position_b[c, b],
                )
                b += 1
            else:
                score[c, rank], image[c, rank], position[c, rank] = -np.inf, -1, -1
