"""The six numbers of `maxact_kernels.peaks` on a CUDA device: Triton kernels that read every map once.

For networks that do not compile as one graph, where nothing fuses `reference` into what produces the map: run
operation by operation it reads the map, or a copy of it, nine times and writes three more of its size.

Triton comes with torch's CUDA builds for Linux; it compiles when a kernel is first called, and wants a C compiler for
that. Without Triton this module can be imported, `AVAILABLE` is False, and `peaks` must not be called; `trouble` says
whether all of it works. Where TRITON_INTERPRET=1 is set before Triton is first imported, the same kernels run in
its interpreter, on tensors of the CPU. Shapes are named as there: N images, C channels, P positions of a map.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch

from maxact_kernels.peaks import reference

try:
    import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
    import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]
except ImportError:
    AVAILABLE = False
else:
    AVAILABLE = True

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PLANES = 6  # the numbers of a map, in the order of `Peaks`

# These sizes are reasoned and read off the compiled code; none has been timed on a device yet.
#
# What decides is how much is on its way from memory at any time. An H200 that gives 4.3 TB/s with, say, 0.7 us between
# asking and having has 3 MB on its way: 23 KB for each of its 132 multiprocessors.
#
# A program is one warp, so that nothing in it waits for others: where maps are 7 x 7, reductions across warps would
# take longer than the maps. It takes a tile of 256 values at a time, 8 for each thread: in 16 bits one load of 16
# bytes, the widest there is. Running values are kept for each place of the tile and meet only at the end. They and
# 4 loads, issued before the first is used, fit into 96 registers (as Triton 3.6 and 3.9 compile for it): up to 21
# programs on a multiprocessor, with 42 KB on their way.
_WARPS = 1
_TILE = 256
_LOADS = 4
# Of arithmetic there is not plenty either: 4.3 TB/s are 2.1e12 values of 16 bits a second, and for each the device can
# issue 14 instructions. There are 11.5 here where nothing is masked, so nothing is that need not be.
#
# In channels_last a row of the tile is 64 channels: in 16 bits the 128 bytes of one line, four rows a load.
_CHANNELS = 64
# 128 images of 64 channels are 128 such programs, and the device holds 2,772. So the positions of a map are shared
# among programs until there are about as many, but never so that a program loads fewer than 8 times _LOADS tiles:
# what it writes for the second kernel, which joins the parts, is then a tenth of what it read.
_PROGRAMS = 2048
_LEAST = 8
_SPLITS = 16  # what the second kernel joins at one go
_JOIN_WARPS = 4
# no loop is pipelined through shared memory; squares are added in one instruction
_OPTIONS = {"num_stages": 1, "enable_fp_fusion": True}


def _jit(*integers: str) -> Callable[[Callable[..., None]], Any]:
    """triton.jit, which compiles nothing anew because of the values of these arguments; nothing without Triton."""

    def wrap(function: Callable[..., None]) -> Any:
        return triton.jit(function, do_not_specialize=list(integers)) if AVAILABLE else function

    return wrap


@dataclass(frozen=True)
class Plan:
    """How maps are shared among programs.

    A program takes tiles of `tile` positions x `block` channels, and `rounds` times _LOADS of them: one of `splits`
    parts of the positions. `vector` divides the length of a contiguous row of values in memory; Triton loads so many
    at once only where it can see that every row is aligned.
    """

    block: int
    tile: int
    rounds: int
    splits: int
    vector: int


def plan(images: int, positions: int, channels: int, channels_last: bool) -> Plan:
    """The plan for maps of these sizes; it depends on nothing else, so equal shapes give equal bits."""
    if channels_last:
        block = min(_CHANNELS, _power_of_two(channels))
        tile = _TILE // block
    else:
        tile = min(_TILE, _power_of_two(positions))
        block = _TILE // tile
    rounds = ceil(positions / (tile * _LOADS))
    wanted = ceil(_PROGRAMS / (images * ceil(channels / block)))
    splits = max(1, min(wanted, rounds // _LEAST, _SPLITS))
    each = ceil(rounds / splits)
    inner = channels if channels_last else positions
    return Plan(block, tile, each, ceil(rounds / each), min(16, inner & -inner))


def peaks(maps: torch.Tensor, channels_last: bool, out: torch.Tensor, column: int = 0) -> None:
    """The peaks of maps [N, P, C] (`channels_last`) or [N, C, P], into C columns of `out` from `column` on.

    `maps` are float16, bfloat16 or float32, contiguous, on a CUDA device; sums are float32. `out` is float32
    [6, N, columns], contiguous, on the same device, its planes in the order of `Peaks`; the two of integers hold the
    bits of int32. Waits for nothing: the work is queued on the device's current stream.

    Raises ValueError where the tensors are not such.
    """
    images, *rest = maps.shape
    positions, channels = rest if channels_last else rest[::-1]
    if maps.dtype not in DTYPES or not maps.is_contiguous() or not maps.numel() or positions * channels >= 2**31:
        raise ValueError(f"maps: expected contiguous floats, some and under 2**31 an image, got {_words(maps)}")
    fits = out.shape[:2] == (PLANES, images) and 0 <= column <= out.shape[2] - channels
    if not fits or out.dtype != torch.float32 or not out.is_contiguous() or out.device != maps.device:
        raise ValueError(
            f"out: expected contiguous torch.float32 [{PLANES}, {images}, at least {column + channels}] "
            f"on {maps.device}, got {_words(out)}"
        )
    how = plan(images, positions, channels, channels_last)
    # Triton starts kernels on the current device, which need not be that of the maps
    with torch.cuda.device(maps.device) if maps.is_cuda else nullcontext():
        alone = how.splits == 1
        parts = out if alone else out.new_empty((how.splits, PLANES, images, channels))
        _part[(images * ceil(channels / how.block), how.splits)](
            maps,
            parts,
            parts.stride(-2),
            parts.stride(-3),
            column if alone else 0,
            positions // how.vector if not channels_last else positions,
            channels // how.vector if channels_last else channels,
            how.rounds,
            LAST=channels_last,
            VECTOR=how.vector,
            BLOCK=how.block,
            TILE=how.tile,
            LOADS=_LOADS,
            ALONE=alone,
            num_warps=_WARPS,
            **_OPTIONS,
        )
        if not alone:
            _join[(images, ceil(channels / _CHANNELS))](
                parts,
                out,
                out.stride(-2),
                out.stride(-3),
                column,
                images,
                positions,
                channels,
                how.splits,
                SPLITS=_SPLITS,
                BLOCK=_CHANNELS,
                num_warps=_JOIN_WARPS,
                **_OPTIONS,
            )


def trouble(device: torch.device) -> str | None:
    """Why the kernels are of no use on a device: None where they give what `reference` gives there.

    It compiles them for float16 in channels_last, some seconds unless Triton has kept what it compiled before.
    """
    if not AVAILABLE:
        return "Triton is not installed"
    for positions in (49, 300):  # 300 are shared among programs
        maps = (torch.arange(2 * positions * 72, device=device) % 1009 % 13 - 6).half().view(2, positions, 72)
        maps[1, 3, 5] = torch.nan
        out = torch.empty((PLANES, 2, 72), device=device)
        try:
            peaks(maps, True, out)
        except Exception as error:  # whatever a compiler or a driver may raise
            return f"{type(error).__name__}: {error}"
        for mine, theirs in zip(out, reference(maps.mT), strict=True):
            if theirs.dtype == torch.int32:
                mine = mine.view(torch.int32)
            if not torch.allclose(mine, theirs, rtol=1e-5, atol=1e-5, equal_nan=True):
                return "what the kernels give is wrong"
    return None


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _words(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())} on {tensor.device}"


# The kernels. Argument names in capitals are constants of the compilation, everything else is a value of the device.


@_jit()
def _better(
    high: tl.tensor, low: tl.tensor, place: tl.tensor, best: tl.tensor, at: tl.tensor, least: tl.tensor
) -> tl.tensor:
    """The running maximum, its position and the minimum after one more value for each place of the tile."""
    # not for an equal one: it comes later. NaN, which no comparison holds for, shows in the sum of squares.
    at = tl.where(high > best, place, at)
    return tl.maximum(high, best), at, tl.minimum(low, least)


@_jit()
def _meet(
    best: tl.tensor,
    at: tl.tensor,
    least: tl.tensor,
    total: tl.tensor,
    squares: tl.tensor,
    count: tl.tensor,
    AXIS: tl.constexpr,
) -> tl.tensor:
    """The six along an axis into one; of equal maxima the lowest position."""
    top = tl.max(best, AXIS)
    at = tl.min(tl.where(best == tl.expand_dims(top, AXIS), at, 2147483647), AXIS)
    return top, at, tl.min(least, AXIS), tl.sum(total, AXIS), tl.sum(squares, AXIS), tl.sum(count, AXIS)


@_jit()
def _store(
    place: tl.tensor,
    plane: tl.tensor,
    real: tl.tensor,
    top: tl.tensor,
    at: tl.tensor,
    least: tl.tensor,
    total: tl.tensor,
    squares: tl.tensor,
    count: tl.tensor,
) -> None:
    """Writes the six, the integers as their bits."""
    tl.store(place, top, mask=real)
    tl.store(place + plane, at.to(tl.float32, bitcast=True), mask=real)
    tl.store(place + 2 * plane, least, mask=real)
    tl.store(place + 3 * plane, total, mask=real)
    tl.store(place + 4 * plane, squares, mask=real)
    tl.store(place + 5 * plane, count.to(tl.float32, bitcast=True), mask=real)


@_jit()
def _settle(
    place: tl.tensor,
    plane: tl.tensor,
    real: tl.tensor,
    positions: tl.tensor,
    top: tl.tensor,
    at: tl.tensor,
    least: tl.tensor,
    total: tl.tensor,
    squares: tl.tensor,
    count: tl.tensor,
) -> None:
    """Writes the six of whole maps; a map that holds NaN or infinity has none."""
    # a sum of squares is NaN exactly if one of its terms is
    fit = (top < float("inf")) & (least > float("-inf")) & (squares == squares)
    top = tl.where(fit, top, float("nan"))
    least = tl.where(fit, least, float("nan"))
    mean = tl.where(fit, total / positions, float("nan"))
    square = tl.where(fit, squares / positions, float("nan"))
    _store(place, plane, real, top, tl.where(fit, at, -1), least, mean, square, tl.where(fit, count, 0))


@_jit("row", "plane", "column", "positions", "channels", "rounds")
def _part(
    maps: tl.tensor,  # [N, P, C] or [N, C, P]
    out: tl.tensor,  # ALONE: [6, N, columns], of which this is the peaks; otherwise [splits, 6, N, C]
    row: tl.tensor,  # from an image to the next in `out`
    plane: tl.tensor,  # from one of the six to the next in `out`
    column: tl.tensor,
    positions: tl.tensor,  # or this over VECTOR
    channels: tl.tensor,  # or, with LAST, this
    rounds: tl.tensor,
    LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    LOADS: tl.constexpr,
    ALONE: tl.constexpr,
) -> None:
    """A program: one image, one block of channels, one part of the positions. Grid: (N x blocks, splits)."""
    if LAST:
        channels = channels * VECTOR
    else:
        positions = positions * VECTOR
    # blocks of one image beside each other: programs that run at the same time read whole rows together
    blocks = tl.cdiv(channels, BLOCK)
    image = (tl.program_id(0) // blocks).to(tl.int64)  # a batch may hold more than 2**31 values
    start_channel = tl.program_id(0) % blocks * BLOCK
    maps += image * positions * channels
    first = tl.program_id(1) * rounds * (LOADS * TILE)
    stop = tl.minimum(first + rounds * (LOADS * TILE), positions)
    whole = stop - (stop - first) % (LOADS * TILE)

    AXIS: tl.constexpr = 0 if LAST else 1  # of the positions in a tile
    if LAST:
        lane = tl.expand_dims(tl.arange(0, TILE), 1)
        channel = tl.expand_dims(start_channel + tl.arange(0, BLOCK), 0)
        offsets = lane * channels + channel
        stride = channels
    else:
        lane = tl.expand_dims(tl.arange(0, TILE), 0)
        channel = tl.expand_dims(start_channel + tl.arange(0, BLOCK), 1)
        offsets = channel * positions + lane
        stride = 1
    real = channel < channels  # what stands at other channels is never written

    best = tl.zeros(offsets.shape, tl.float32) - float("inf")
    least = tl.zeros(offsets.shape, tl.float32) + float("inf")
    total = tl.zeros(offsets.shape, tl.float32)
    squares = tl.zeros(offsets.shape, tl.float32)
    at = tl.zeros(offsets.shape, tl.int32)
    count = tl.zeros(offsets.shape, tl.int32)
    for start in range(first, whole, LOADS * TILE):
        # summed by themselves first, so that the long sums have fewer terms to round
        some = tl.zeros(offsets.shape, tl.float32)
        some_squares = tl.zeros(offsets.shape, tl.float32)
        for load in tl.static_range(LOADS):
            begin = start + load * TILE
            x = tl.load(maps + begin * stride + offsets, mask=real).to(tl.float32)
            best, at, least = _better(x, x, begin + lane, best, at, least)
            count += (x > 0).to(tl.int32)
            some += x
            some_squares += x * x
        total += some
        squares += some_squares
    for begin in range(whole, stop, TILE):
        inside = begin + lane < stop
        x = tl.load(maps + begin * stride + offsets, mask=real & inside, other=0).to(tl.float32)
        high = tl.where(inside, x, float("-inf"))
        low = tl.where(inside, x, float("inf"))
        best, at, least = _better(high, low, begin + lane, best, at, least)
        count += (x > 0).to(tl.int32)
        total += x
        squares += x * x

    top, at, least, total, squares, count = _meet(best, at, least, total, squares, count, AXIS)
    channel = start_channel + tl.arange(0, BLOCK)
    real = channel < channels
    plane = plane.to(tl.int64)
    place = out + image * row + column + channel
    if ALONE:
        _settle(place, plane, real, positions, top, at, least, total, squares, count)
    else:
        place += tl.program_id(1) * 6 * plane
        _store(place, plane, real, top, at, least, total, squares, count)


@_jit("row", "plane", "column", "images", "positions", "channels", "splits")
def _join(
    parts: tl.tensor,  # [splits, 6, N, C]
    out: tl.tensor,  # [6, N, columns]
    row: tl.tensor,
    plane: tl.tensor,
    column: tl.tensor,
    images: tl.tensor,
    positions: tl.tensor,
    channels: tl.tensor,
    splits: tl.tensor,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A program: one image, one block of channels, all parts of the positions at once. Grid: (N, blocks)."""
    image = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    split = tl.expand_dims(tl.arange(0, SPLITS), 1)
    inside = (split < splits) & tl.expand_dims(channel < channels, 0)
    apart = images.to(tl.int64) * channels  # from one of the six to the next in `parts`
    place = parts + split * 6 * apart + image * channels + tl.expand_dims(channel, 0)
    best = tl.load(place, mask=inside, other=float("-inf"))
    at = tl.load(place + apart, mask=inside, other=0).to(tl.int32, bitcast=True)
    least = tl.load(place + 2 * apart, mask=inside, other=float("inf"))
    total = tl.load(place + 3 * apart, mask=inside, other=0)
    squares = tl.load(place + 4 * apart, mask=inside, other=0)
    count = tl.load(place + 5 * apart, mask=inside, other=0).to(tl.int32, bitcast=True)
    top, at, least, total, squares, count = _meet(best, at, least, total, squares, count, 0)
    place = out + image * row + column + channel
    _settle(place, plane.to(tl.int64), channel < channels, positions, top, at, least, total, squares, count)
