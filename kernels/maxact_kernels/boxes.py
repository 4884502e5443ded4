"""The smallest box that holds a share of an image's energy, as a numba kernel that releases the GIL."""

import numpy as np
from numba import njit
from numpy.typing import NDArray


def smallest_boxes(energy: NDArray[np.float32], share: float) -> NDArray[np.int32]:
    """For each of N images the box (y0, x0, y1, x1) of the smallest area in which at least `share` of its energy lies.

    energy: [N, H, W], not negative; gives int32 [N, 4], half-open. Of equal areas the first one from the top, then
    the flattest, then the first from the left. An image without energy has no such box: zeros. Exact, H * H * W
    steps at worst; bands that cannot hold the share, or in which the box would have to be larger than the best one so
    far, are passed over.
    """
    return _smallest_boxes(np.ascontiguousarray(energy, np.float32), share)


@njit(nogil=True, cache=True)
def _smallest_boxes(energy: NDArray[np.float32], share: float) -> NDArray[np.int32]:
    images, height, width = energy.shape
    boxes = np.zeros((images, 4), np.int32)
    below = np.zeros((height + 1, width), np.float64)  # sums of columns from the top
    rows = np.zeros(height + 1, np.float64)  # sums of rows from the top
    for n in range(images):
        for y in range(height):
            total = 0.0
            for x in range(width):
                below[y + 1, x] = below[y, x] + energy[n, y, x]
                total += energy[n, y, x]
            rows[y + 1] = rows[y] + total
        wanted = rows[height] * share
        if not rows[height] > 0:
            continue
        # sums taken in another order differ in the last bits: what is within them counts as enough
        wanted -= rows[height] * 1e-9
        best = height * width + 1
        for y0 in range(height):
            if rows[height] - rows[y0] < wanted:
                break
            for y1 in range(y0 + 1, height + 1):
                if rows[y1] - rows[y0] < wanted:
                    continue
                # columns narrower than this would beat the best box; two pointers find the narrowest that suffices
                limit = (best - 1) // (y1 - y0)
                if limit < 1:
                    break
                held = 0.0
                left = 0
                for right in range(width):
                    held += below[y1, right] - below[y0, right]
                    while held - (below[y1, left] - below[y0, left]) >= wanted and left < right:
                        held -= below[y1, left] - below[y0, left]
                        left += 1
                    if held >= wanted and (right + 1 - left) <= limit:
                        best = (y1 - y0) * (right + 1 - left)
                        limit = (best - 1) // (y1 - y0)
                        boxes[n, 0], boxes[n, 1], boxes[n, 2], boxes[n, 3] = y0, left, y1, right + 1
                        if limit < 1:
                            break
    return boxes
