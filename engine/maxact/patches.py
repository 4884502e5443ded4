"""The part of an image that a unit's field needs, cut so that the network does to it what it does to the whole image.

A network that strides over its input in steps of S pixels (the least common multiple of all strides on the way to a
tap) gives the same values for a part of the image as for the whole image if that part starts at a multiple of S, ends
at a multiple of S before the image's end, and holds the whole field; a field that reaches the image's border needs a
part that ends there, so that padding falls as it does in the whole image. One shape serves all units of a tap: patches
of P pixels, where P is the smallest number that is at least the longest field plus S - 1 and leaves H - P a multiple of
S. They begin at min(floor(start of the field / S) * S, H - P), so they never leave the image; where P would reach H
the patch is the whole image. Rows and columns have their own P.

An example: conv 3x3, max-pool 2, conv 3x3 has fields of 8 pixels, S = 2. In 33 rows P = 9: the unit at row 6 has the
field [9, 17), its patch is [8, 17) and its row in the patch's map is 6 - 8 / 2 = 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from maxact.field import Field, Intervals
from maxact.tap import Tap

Integers = NDArray[np.int64]
_BALANCE = 50  # multiplications in the time in which the memory gives one number
_LEAST = 1e7  # multiplications in the time that it takes to begin


@dataclass(frozen=True)
class Cut:
    """How images are cut into patches for the units of one map.

    `shape` is the image's height and width, `size` the patch's. Positions are [N, 2], rows and columns in the map of
    the whole image.
    """

    field: Field
    size: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the image."""
        return self.field.shape

    @property
    def is_whole(self) -> bool:
        """Whether a patch is the whole image."""
        return self.size == self.shape

    def corner(self, positions: Any) -> Integers:
        """The first row and column of each unit's patch, [N, 2] for positions [N, 2]."""
        positions = np.asarray(positions, np.int64)
        corners = np.empty(positions.shape, np.int64)
        for axis, intervals in enumerate((self.field.rows, self.field.cols)):
            starts, step = intervals[positions[:, axis], 0].astype(np.int64), self.field.step[axis]
            corners[:, axis] = np.minimum(starts // step * step, self.shape[axis] - self.size[axis])
        return corners

    def unit(self, positions: Any) -> Integers:
        """Where each unit lies in the map of its patch, [N, 2] for positions [N, 2]."""
        corners = self.corner(positions)
        shift = np.zeros(corners.shape, np.int64)
        for axis, stride in enumerate(self.field.stride):
            if self.size[axis] < self.shape[axis]:  # a map of one unit may have no stride
                shift[:, axis] = np.rint(corners[:, axis] / stride)
        units: Integers = np.asarray(positions, np.int64) - shift
        return units

    def box(self, positions: Any) -> Integers:
        """The local field of each unit in the pixels of its patch: y0, x0, y1, x1, [N, 4] for positions [N, 2]."""
        positions, corners = np.asarray(positions), self.corner(positions)
        rows = self.field.local_rows[positions[:, 0]] - corners[:, :1]
        cols = self.field.local_cols[positions[:, 1]] - corners[:, 1:]
        return np.stack([rows[:, 0], cols[:, 0], rows[:, 1], cols[:, 1]], 1)

    def take(self, images: torch.Tensor, index: Any, corners: Any) -> torch.Tensor:
        """The patches [N, C, h, w] at `corners` [N, 2] of the images [U, C, H, W] that `index` [N] names.

        Their memory is channels_last.
        """
        (height, width), device = self.size, images.device
        index, corners = torch.as_tensor(index, device=device), torch.as_tensor(corners, device=device)
        windows = images.unfold(2, height, 1).unfold(3, width, 1)  # a view [U, C, y, x, h, w]
        taken = windows.permute(0, 2, 3, 4, 5, 1)[index, corners[:, 0], corners[:, 1]]  # [N, h, w, C]
        return taken.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def cut(field: Field) -> Cut:
    """The smallest patches that serve all units of a map. A global gate needs the whole image."""
    sizes = []
    for axis, (exact, outer) in enumerate(((field.rows, field.outer_rows), (field.cols, field.outer_cols))):
        whole, step, stride = field.shape[axis], field.step[axis], field.stride[axis]
        # clipped at both ends no exact field may be as long as one that had room
        longest = max(_longest(exact), _longest(outer))
        size = longest + step - 1
        size += (whole - size) % step
        fits = size < whole and stride > 0 and step / stride == round(step / stride)
        sizes.append(size if fits else whole)
    return Cut(field, (sizes[0], sizes[1]))


def _longest(intervals: Intervals) -> int:
    return int((intervals[:, 1] - intervals[:, 0]).max(initial=1))


class Windows:
    """Which part of each convolution's map the units of a tap need: the rest of the map need not be computed.

    A unit of a convolution feeds a unit of the tap only if its field lies inside that unit's field. So the rows and
    columns between the first and the last such are all that count. One size serves all units of the tap, as with the
    patches themselves. `work` is the share of the multiplications that is left, between 0 and 1, of those that the
    patches need; convolutions where that saves less than the copying
    costs are done whole.
    """

    def __init__(self, cut: Cut, tap: Tap, convolutions: Sequence[tuple[Tap, Field]], network: nn.Module) -> None:
        """`convolutions` are taps at nn.Conv2d modules (`find.find` with at="module") in the order in which they run,
        with their fields; those after the tap do not matter. `network` holds the modules."""
        self.cut = cut
        self._axes: dict[tuple[str, int], tuple[_Needed, _Needed]] = {}
        done = left = 0.0
        for convolution, field in convolutions:
            module = network.get_submodule(convolution.module)
            assert isinstance(module, nn.Conv2d), "windows are of two-dimensional convolutions"
            rows, columns = needed = _needed(cut, field, 0), _needed(cut, field, 1)
            everything, part = rows.whole * columns.whole, rows.size * columns.size
            cost = module.weight.numel()  # multiplications a position
            moved = (module.in_channels + module.out_channels) * (everything + 2 * part)  # to clear it and to copy
            saved = cost * (everything - part)
            if saved > max(_BALANCE * moved, _LEAST) and not cut.field.is_gated:
                self._axes[convolution.module, convolution.call] = needed
            else:
                part = everything
            done, left = done + cost * everything, left + cost * part
            if (convolution.layer, convolution.call) == (tap.layer, tap.call):
                break
        self.work = left / done if done else 1.0

    def at(self, positions: Any) -> dict[tuple[str, int], tuple[Integers, tuple[int, int]]]:
        """For each convolution (path and call) the first row and column [N, 2] of each unit's window in the map of its
        patch, and the windows' height and width."""
        positions, corners = np.asarray(positions, np.int64), self.cut.corner(positions)
        found = {}
        for name, needed in self._axes.items():
            starts = np.empty(positions.shape, np.int64)
            for axis, each in enumerate(needed):
                shifted = each.start[positions[:, axis]] - np.rint(corners[:, axis] / each.stride).astype(np.int64)
                starts[:, axis] = shifted.clip(0, each.whole - each.size)
            found[name] = starts, (needed[0].size, needed[1].size)
        return found


@dataclass(frozen=True)
class _Needed:
    """Along one axis of a convolution's map: the first unit [positions of the tap] that each unit of the tap needs, how
    many at most, of how many in a patch, and the pixels from one to the next."""

    start: Integers
    size: int
    whole: int
    stride: float


def _needed(cut: Cut, field: Field, axis: int) -> _Needed:
    of_tap = (cut.field.outer_rows, cut.field.outer_cols)[axis]
    own = (field.outer_rows, field.outer_cols)[axis]
    stride = field.stride[axis]
    spare = (cut.shape[axis] - cut.size[axis]) / stride if stride else 0
    whole = len(own) - round(spare)
    start = np.searchsorted(own[:, 0], of_tap[:, 0], "left")
    size = int((np.searchsorted(own[:, 1], of_tap[:, 1], "right") - start).max(initial=0))
    ordered = bool((np.diff(own, axis=0) >= 0).all())
    if stride == 0 or spare != round(spare) or not ordered or not 0 < size < whole:
        return _Needed(np.zeros(len(of_tap), np.int64), whole, whole, stride or 1.0)
    return _Needed(start.astype(np.int64), size, whole, stride)
