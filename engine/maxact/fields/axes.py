"""What the dimensions of a tensor are in the image: how far apart the elements along each of them lie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

Factor = tuple[int, Fraction, Fraction]  # a size, and the pixels from one element to the next, in rows and columns
Dim = tuple[Factor, ...]  # what was merged into a dimension, outermost first; mostly one


def still(size: int) -> Dim:
    """A dimension whose elements are at the same place of the image: channels, images."""
    return ((size, Fraction(0), Fraction(0)),)


def pooled(dim: Dim) -> Dim:
    """A dimension of one element that stands for all those of another."""
    size, rows, columns = dim[-1]
    return ((1, rows * size, columns * size),) if len(dim) == 1 else still(1)


def moves(dim: Dim) -> bool:
    """Whether elements along a dimension are elsewhere in the image."""
    return any(factor[1] or factor[2] for factor in dim)


def unchanged(old: Sequence[int], new: Sequence[int]) -> dict[int, int]:
    """The dimensions that a view leaves as they are, by their places before and after."""
    ends = {math.prod(new[: dim + 1]): dim for dim in range(len(new)) if new[dim] > 1}
    found = {}
    for dim, size in enumerate(old):
        after = ends.get(math.prod(old[: dim + 1]))
        if size > 1 and after is not None and new[after] == size:
            found[dim] = after
    return found


def regrouped(factors: list[Factor], shape: Sequence[int]) -> tuple[Dim, ...] | None:
    """The factors of all dimensions, dealt out to the sizes of a new shape; None where they do not fit."""
    factors = factors[::-1]  # the next one is the last
    dims: list[Dim] = []
    for size in shape:
        dim: list[Factor] = []
        need = size
        while need > 1 or (not dim and factors and factors[-1][0] == 1):
            if not factors:
                return None
            length, rows, columns = factors.pop()
            if length <= need:
                if need % length:
                    return None
                dim.append((length, rows, columns))
                need //= length
            else:
                if length % need:
                    return None
                inner = length // need
                dim.append((need, rows * inner, columns * inner))
                factors.append((inner, rows, columns))
                need = 1
        dims.append(_joined([factor for factor in dim if factor[0] > 1] or dim[:1]) or still(size))
    return tuple(dims)


def _joined(factors: Sequence[Factor]) -> Dim:
    """Factors of one dimension, with those made one that go on as one."""
    joined: list[Factor] = []
    for length, rows, columns in factors:
        if joined and joined[-1][1:] == (rows * length, columns * length):
            length *= joined.pop()[0]
        joined.append((length, rows, columns))
    return tuple(joined)
