"""Interval arithmetic: which input pixels each element of a tensor can depend on, and what operations make of that.

A `Reach` describes one tensor. For each of the two axes of the image (rows, columns) it holds six planes, numbers for
every element of the tensor: (-start, stop) three times, of the exact interval, of the local one (which ignores
multiplicative global gates) and of the outer one (local, before clipping to the image: see `field`). As starts are
negated, the hull of intervals is the maximum of planes, and NONE, below every number, stands for "depends on nothing".

A plane has the tensor's dimensions, of size 1 where nothing changes along them. So operations that only move values
about are followed by doing the very same to the planes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from maxact.fields.axes import Dim, moves, pooled, regrouped, still, unchanged
from maxact.fields.tables import NOWHERE, Table

NONE = -float(1 << 24)
Pair = tuple[int, int]


@dataclass(frozen=True)
class Reach:
    """What the elements of one tensor depend on.

    `planes` are [6, *dims] for rows and for columns. `dims` say how far apart the elements along each dimension of the
    tensor are in the image; `step` is that of a Field.
    """

    shape: tuple[int, ...]
    image: Pair
    planes: tuple[torch.Tensor, torch.Tensor]
    dims: tuple[Dim, ...]
    step: Pair

    @property
    def is_uniform(self) -> bool:
        """Whether all elements depend on the same."""
        return all(planes[0].numel() == 1 for planes in self.planes)

    @property
    def is_global(self) -> bool:
        """Whether all elements depend on the whole image, gates ignored."""
        return all(
            bool((planes[2] >= 0).all() and (planes[3] >= size).all())
            for planes, size in zip(self.planes, self.image, strict=True)
        )

    def unit(self, axis: int, dim: int) -> Fraction:
        """Pixels from one element to the next along a dimension, in rows (axis 0) or columns (1); 0 where there is no
        such number."""
        units = [(factor[1], factor[2])[axis] for factor in self.dims[dim]]
        return units[-1] if not any(units[:-1]) else Fraction(0)

    def is_place(self, dim: int) -> bool:
        """Whether elements along a dimension are elsewhere in the image."""
        return moves(self.dims[dim])

    def varies(self, dim: int) -> bool:
        """Whether elements along a dimension depend on different pixels."""
        return any(planes.shape[dim + 1] > 1 for planes in self.planes)

    def same(self, other: Reach) -> bool:
        """Whether two tensors of one shape depend on the same."""
        return self.shape == other.shape and all(
            a.shape == b.shape and torch.equal(a, b) for a, b in zip(self.planes, other.planes, strict=True)
        )

    def expanded(self, axis: int) -> torch.Tensor:
        """The planes of rows (0) or columns (1), [6, *shape]."""
        return self.planes[axis].expand(6, *self.shape)


def pixels(shape: Sequence[int]) -> Reach:
    """The image itself, [N, C, H, W]: every element depends on its own pixel."""
    height, width = shape[2:]
    planes = []
    for size, axes in ((height, (6, 1, 1, height, 1)), (width, (6, 1, 1, 1, width))):
        start = torch.arange(size, dtype=torch.float64)
        planes.append(torch.stack((-start, start + 1) * 3).view(axes))
    zero, one = Fraction(0), Fraction(1)
    dims: tuple[Dim, ...] = (still(shape[0]), still(shape[1]), ((height, one, zero),), ((width, zero, one),))
    return Reach(tuple(shape), (height, width), (planes[0], planes[1]), dims, (1, 1))


def nothing(shape: Sequence[int], image: Pair) -> Reach:
    """A constant."""
    planes = torch.full((6, *(1 for _ in shape)), NONE, dtype=torch.float64)
    return Reach(tuple(shape), image, (planes, planes), tuple(still(size) for size in shape), (1, 1))


def joint_step(reaches: Sequence[Reach]) -> Pair:
    """The least common multiple."""
    return math.lcm(*(reach.step[0] for reach in reaches)), math.lcm(*(reach.step[1] for reach in reaches))


def bound_to_place(reach: Reach) -> Reach:
    """The same where a shifted image does not give shifted maps: no step short of the whole image."""
    step = (math.lcm(reach.step[0], reach.image[0]), math.lcm(reach.step[1], reach.image[1]))
    return replace(reach, step=step)


def union(shape: Sequence[int], reaches: Sequence[Reach]) -> Reach:
    """Elementwise, with broadcasting: an element depends on what any of its operands depends on."""
    shape = tuple(shape)
    planes = []
    dims = [still(size) for size in shape]
    for axis in range(2):
        hull = torch.full((6, *(1 for _ in shape)), NONE, dtype=torch.float64)
        for reach in reaches:
            own = reach.planes[axis]
            missing = len(shape) - len(reach.shape)
            hull = torch.maximum(hull, own.view(6, *(1,) * missing, *own.shape[1:]))
        planes.append(hull)
    for reach in reaches:
        for at, dim in enumerate(reach.dims, len(shape) - len(reach.shape)):
            if reach.is_place(at - len(shape)) and reach.shape[at - len(shape)] == shape[at] and not moves(dims[at]):
                dims[at] = dim
    return Reach(shape, reaches[0].image, (planes[0], planes[1]), tuple(dims), joint_step(reaches))


def everything(shape: Sequence[int], reaches: Sequence[Reach]) -> Reach:
    """Every element depends on all that any element of the operands depends on: any function at all."""
    parts = [collapse(reach, range(len(reach.shape))) for reach in reaches]
    flat = [replace(part, shape=(), planes=_scalars(part), dims=()) for part in parts]
    return bound_to_place(union(shape, flat))


def _scalars(reach: Reach) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = (planes.reshape(6) for planes in reach.planes)
    return rows, columns


def gated(shape: Sequence[int], inside: Reach, gate: Reach) -> Reach:
    """The product of a map and a global gate: what is local stays that of the map."""
    product = union(shape, (inside, gate))
    alone = union(shape, (inside,))
    planes = []
    for axis in range(2):
        exact = product.planes[axis][:2]
        rest = alone.planes[axis][2:].expand(4, *exact.shape[1:])
        planes.append(torch.cat((exact, rest)))
    return replace(alone, planes=(planes[0], planes[1]))


def collapse(reach: Reach, dims: Sequence[int]) -> Reach:
    """Along some dimensions every element depends on all: a softmax, a sum that keeps its dimensions."""
    axes = [dim % len(reach.shape) + 1 for dim in dims] if reach.shape else []
    planes, step = [], list(reach.step)
    for axis in range(2):
        own = reach.planes[axis]
        if any(own.shape[dim] > 1 for dim in axes):
            if any(factor[axis + 1] for dim in axes for factor in reach.dims[dim - 1]):
                step[axis] = math.lcm(step[axis], reach.image[axis])
            own = own.amax(axes, keepdim=True)
        planes.append(own)
    return replace(reach, planes=(planes[0], planes[1]), step=(step[0], step[1]))


def drop(reach: Reach, dims: Sequence[int]) -> Reach:
    """Without dimensions along which it does not vary."""
    gone = {dim % len(reach.shape) for dim in dims} if reach.shape else set()
    keep = [at for at in range(len(reach.shape)) if at not in gone]
    planes = [own.reshape(6, *(own.shape[at + 1] for at in keep)) for own in reach.planes]
    shape, kept = tuple(reach.shape[at] for at in keep), tuple(reach.dims[at] for at in keep)
    return replace(reach, shape=shape, planes=(planes[0], planes[1]), dims=kept)


def inserted(reach: Reach, dim: int) -> Reach:
    """With a dimension of one element before a dimension."""
    planes = [own.unsqueeze(dim + 1) for own in reach.planes]
    shape, dims = (*reach.shape[:dim], 1, *reach.shape[dim:]), (*reach.dims[:dim], still(1), *reach.dims[dim:])
    return replace(reach, shape=shape, planes=(planes[0], planes[1]), dims=dims)


def resized(reach: Reach, dim: int, size: int) -> Reach:
    """With another size along a dimension along which it does not vary: another number of channels."""
    at = dim % len(reach.shape)
    shape = (*reach.shape[:at], size, *reach.shape[at + 1 :])
    dims = (*reach.dims[:at], pooled(reach.dims[at]) if size == 1 else still(size), *reach.dims[at + 1 :])
    return replace(reach, shape=shape, dims=dims)


def groups(reach: Reach, dim: int, count: int, size: int) -> Reach:
    """Along a dimension (channels), each of `count` groups of the `size` outputs depends on its group of inputs."""
    planes = []
    for own in reach.planes:
        if own.shape[dim + 1] > 1:
            split = (*own.shape[: dim + 1], count, -1, *own.shape[dim + 2 :])
            own = own.reshape(split).amax(dim + 2)
            if count > 1:
                own = own.repeat_interleave(size // count, dim + 1)
        planes.append(own)
    return resized(replace(reach, planes=(planes[0], planes[1])), dim, size)


def window(reach: Reach, dim: int, table: Table, ratio: Fraction | None, beyond: Table | None = None) -> Reach:
    """Along a dimension, output i depends on the inputs table[i]; those outside the map are padding.

    `ratio` is inputs per output, None where that depends on the image's size (an adaptive pool). `beyond` is the
    table for the outer intervals, where that differs: a reflection is not followed there. NOWHERE reads nothing.
    """
    inputs, outputs = reach.shape[dim], len(table)
    beyond = table if beyond is None else beyond
    planes, units, step = [], [], list(reach.step)
    for axis in range(2):
        own, unit = reach.planes[axis], reach.unit(axis, dim)
        if own.shape[dim + 1] == 1 and not unit and bool((_inside(table, inputs)).any(1).all()):
            planes.append(own)  # all outputs read the same
        else:
            inner = _read(own[:4], dim, table, inputs, Fraction(0), 1, on=False)
            outer = _read(own[4:], dim, beyond, inputs, unit, reach.step[axis], on=reach.is_place(dim))
            planes.append(torch.cat((inner, outer)))
        after = unit * (ratio if ratio is not None else Fraction(inputs, max(outputs, 1)))
        units.append(after)
        if unit:
            step[axis] = math.lcm(step[axis], reach.image[axis] if ratio is None else after.numerator)
    shape = (*reach.shape[:dim], outputs, *reach.shape[dim + 1 :])
    dims = (*reach.dims[:dim], ((outputs, units[0], units[1]),), *reach.dims[dim + 1 :])
    return Reach(shape, reach.image, (planes[0], planes[1]), dims, (step[0], step[1]))


def _inside(table: Table, inputs: int) -> NDArray[np.bool_]:
    return (table >= 0) & (table < inputs)


def _read(
    planes: torch.Tensor, dim: int, table: Table, inputs: int, unit: Fraction, step: int, on: bool
) -> torch.Tensor:
    """The hulls over what each output reads. Beyond the border the map goes `on` by units and steps, or is nothing."""
    inside = _inside(table, inputs)
    shift = np.zeros((2, *table.shape), np.int64)  # of -start and of stop
    reads, index = inside, np.where(inside, table, 0)
    if on:
        reads, index = table != NOWHERE, np.clip(table, 0, inputs - 1)
    if unit:
        # Whole steps first, because within one a map may be irregular; then whatever is left of a tiny map.
        period = int(step / unit) if (step / unit).denominator == 1 else 1 << 40
        below, above = np.minimum(table, 0), np.maximum(table - (inputs - 1), 0)
        steps = (-above // period) - (below // period)  # to add, to come inside
        moved = table + steps * period
        fits = (moved >= 0) & (moved < inputs)
        index = np.where(fits, moved, np.clip(table, 0, inputs - 1))
        left = (table - index) * unit.numerator
        shift[0] = -(left // unit.denominator)
        shift[1] = -(-left // unit.denominator)
        index, shift = np.where(reads, index, 0), np.where(reads, shift, 0)
    if planes.shape[dim + 1] == 1:
        index = np.zeros_like(index)
    read = planes.index_select(dim + 1, torch.from_numpy(index.ravel()))
    read = read.reshape(*planes.shape[: dim + 1], *table.shape, *planes.shape[dim + 2 :])
    ends = [1] * (dim + 1), [1] * (planes.ndim - dim - 2)
    if unit:
        moves = torch.from_numpy(shift).view(2, *ends[0][1:], *table.shape, *ends[1])
        read = torch.where(read > NONE / 2, read + moves, NONE)
    read = read.masked_fill(~torch.from_numpy(reads).view(*ends[0], *table.shape, *ends[1]), NONE)
    return read.amax(dim + 2) if table.shape[1] else torch.full_like(planes, NONE).amax(dim + 1, keepdim=True)


def moved(reach: Reach, results: Sequence[torch.Tensor], view: Callable[[torch.Tensor], Any]) -> list[Reach]:
    """After a view that gave `results`: `view` is the same view, applied here to the planes and to a mark."""
    outputs: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = [([], []) for _ in results]
    for axis in range(2):
        for plane in reach.expanded(axis):
            for output, leaf in zip(outputs, leaves(view(plane)), strict=True):
                output[axis].append(_thin(leaf))
    found = []
    for number, (result, output) in enumerate(zip(results, outputs, strict=True)):
        rows, columns = (compact(torch.stack(axis)) for axis in output)
        dims = _marked(reach, number, view)
        found.append(Reach(tuple(result.shape), reach.image, (rows, columns), dims or (), reach.step))
        found[-1] = stepped(found[-1]) if dims else spaced(found[-1])
    return found


def viewed(reach: Reach, shape: Sequence[int]) -> Reach:
    """Another shape for the same elements in the same order: dimensions merge and split."""
    planes = []
    same = unchanged(reach.shape, shape)
    for own in reach.planes:
        # a dimension that stays and along which nothing changes need not be taken to its full size
        thin = {old: new for old, new in same.items() if own.shape[old + 1] == 1}
        full = own.expand(6, *(1 if dim in thin else size for dim, size in enumerate(reach.shape)))
        stays = set(thin.values())
        planes.append(compact(full.reshape(6, *(1 if dim in stays else size for dim, size in enumerate(shape)))))
    dims = regrouped([factor for dim in reach.dims for factor in dim], shape)
    found = Reach(tuple(shape), reach.image, (planes[0], planes[1]), dims or (), reach.step)
    return stepped(found) if dims or not shape else spaced(found)


def _marked(reach: Reach, number: int, view: Callable[[torch.Tensor], Any]) -> tuple[Dim, ...] | None:
    """The dims after a view: those of a tensor whose strides they are. None where it does not fit the strides."""
    common = math.lcm(*(factor[axis + 1].denominator for dim in reach.dims for factor in dim for axis in range(2)))
    merged = {(1 << 50) + number: dim for number, dim in enumerate(reach.dims) if len(dim) > 1}
    codes = {dim: code for code, dim in merged.items()}
    strides = []
    for axis in range(2):
        marks = [codes.get(dim, int(dim[0][axis + 1] * common)) for dim in reach.dims]
        mark = torch.empty_strided(reach.shape, marks, device="meta")
        try:
            leaf = leaves(view(mark))[number]
        except RuntimeError:
            return None
        strides.append(leaf.stride())
    dims = []
    for size, rows, columns in zip(leaf.shape, *strides, strict=True):
        if rows in merged and math.prod(factor[0] for factor in merged[rows]) == size:
            dims.append(merged[rows])
        elif max(rows, columns) >= 1 << 50:
            return None  # a part of a merged dimension
        else:
            dims.append(((size, Fraction(rows, common), Fraction(columns, common)),))
    return tuple(dims)


def stepped(reach: Reach) -> Reach:
    """After a view, which may have left out rows, or gathered them in windows."""
    units = [[factor[axis + 1] for dim in reach.dims for factor in dim] for axis in range(2)]
    rows, columns = (math.lcm(reach.step[axis], *(u.numerator for u in units[axis] if u)) for axis in range(2))
    return replace(reach, step=(rows, columns))


def _thin(plane: torch.Tensor) -> torch.Tensor:
    for dim, stride in enumerate(plane.stride()):
        if stride == 0 and plane.shape[dim] > 1:
            plane = plane.narrow(dim, 0, 1)
    return plane


def compact(planes: torch.Tensor) -> torch.Tensor:
    """Planes [6, *dims], with size 1 along every dimension where nothing changes."""
    for dim in range(1, planes.ndim):
        if planes.shape[dim] > 1:
            first = planes.narrow(dim, 0, 1)
            if bool((planes == first).all()):
                planes = first
    return planes.contiguous()


def spaced(reach: Reach) -> Reach:
    """With the dims that the outer intervals show, where they are regular; and bound to its place, to be sure."""
    dims = []
    for dim, size in enumerate(reach.shape, 1):
        units = []
        for planes in reach.planes:
            unit = Fraction(0)
            if planes.shape[dim] > 1:
                steps = planes[4:].movedim(dim, 0).reshape(size, 2, -1)[:, :, 0].diff(dim=0)
                if bool((steps == steps[0]).all()) and steps[0, 1] == -steps[0, 0] and abs(steps[0, 1]) < -NONE / 2:
                    unit = Fraction(int(steps[0, 1]))
            units.append(unit)
        dims.append(((size, units[0], units[1]),))
    return bound_to_place(replace(reach, dims=tuple(dims)))


def leaves(value: Any) -> list[torch.Tensor]:
    """The tensors in a result, which is one or a list of them."""
    return [value] if isinstance(value, torch.Tensor) else [leaf for leaf in value if isinstance(leaf, torch.Tensor)]
