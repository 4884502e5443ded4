"""Receptive fields: which input pixels can influence each unit of each tap, exactly, for any network.

For a module the fields are worked out by interval arithmetic over the operations of one forward pass (`flow`,
`intervals`); for a bare callable they are measured (`influence`). Both give hulls: the smallest interval of rows, and
of columns, that holds every pixel that enters a unit's computation, whatever the weights are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from maxact.errors import MaxactError
from maxact.field import Field
from maxact.fields.flow import Flow
from maxact.fields.influence import measure
from maxact.fields.intervals import NONE, Reach
from maxact.find import find
from maxact.models import Normalised
from maxact.preprocess import Preprocess, one_line
from maxact.tap import Tap

_BATCH = 2  # as in `find`: code that squeezes its tensors treats a batch of one otherwise


def fields(network: nn.Module | Callable[[torch.Tensor], Any], size: int | tuple[int, int]) -> Any:
    """The fields of a network for images of `size` (height, width) pixels; one number is both.

    A module gives {tap name: Field} for every convolution and linear layer. Anything else that takes float images
    [N, 3, H, W] and gives a tensor, or tuples, lists and dicts of tensors, gives the same structure of Fields, by
    the slower measured method: a tensor is [N, C, rows, columns], [N, tokens, features] or [N, features].

    Raises MaxactError for a network that cannot run on such images.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if not isinstance(network, nn.Module):
        return measure(network, (height, width))
    training = network.training
    network.eval()
    try:
        weight = next(network.parameters(), torch.empty(0))
        wrapped = Normalised(network, Preprocess(crop=(height, width))).to(weight.device)
        blank = torch.zeros((_BATCH, height, width, 3), dtype=torch.uint8, device=weight.device)
        found = find(wrapped, blank)
        return of_taps(network, found.taps, (height, width))
    finally:
        network.train(training)


def of_taps(network: nn.Module, wanted: Sequence[Tap], size: tuple[int, int]) -> dict[str, Field]:
    """The field of each tap, by its name, for a network that takes float [N, 3, H, W]; `size` is (H, W).

    One forward pass. What an operation without a rule gives counts as depending on all that its operands depend on,
    and the log names it. Raises MaxactError where the network cannot run, or does not reach a tap.
    """
    modules = dict(network.named_modules())
    weight = next(network.parameters(), torch.empty(0))
    image = torch.zeros((_BATCH, 3, *size), dtype=torch.float32, device=weight.device)
    flow = Flow(image)
    numbers: dict[str, int] = {}
    wanted_at = {(tap.module, tap.call): tap for tap in wanted}
    found: dict[str, Field] = {}

    def hook(path: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def record(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            number = numbers.get(path, 0)
            numbers[path] = number + 1
            if tap := wanted_at.get((path, number)):
                found[tap.name] = as_field(flow.reach(output), tap, size)

        return record

    with torch.no_grad(), ExitStack() as stack:
        for path in dict.fromkeys(tap.module for tap in wanted):
            stack.callback(modules[path].register_forward_hook(hook(path)).remove)
        try:
            with flow.leaving, flow:
                network(image)
        except Exception as error:  # whatever the network's own code may raise
            shape = f"{size[0]} x {size[1]}"
            raise MaxactError(f"fields: the network cannot run on images of {shape}: {one_line(error)}") from error
    if missing := [tap.name for tap in wanted if tap.name not in found]:
        raise MaxactError(f"fields: tap {missing[0]!r} is not reached; leave it out with --layers")
    return {tap.name: found[tap.name] for tap in wanted}


def as_field(reach: Reach | None, tap: Tap, size: tuple[int, int]) -> Field:
    """The field of a tap's map, hulls over its channels; a constant (None) depends on nothing."""
    height, width = tap.map
    if reach is None:
        rows, columns = np.zeros((3, height, 2), np.int32), np.zeros((3, width, 2), np.int32)
        return Field(size, rows[0], columns[0], rows[1], columns[1], rows[2], columns[2], (1, 1), (0.0, 0.0))
    ndim = len(reach.shape)
    places = [dim for dim in range(ndim) if dim not in (0, tap.axis % ndim)]
    # [6, rows, columns] with size 1 where nothing changes, for the rows and for the columns of the image
    maps = []
    for planes in reach.planes:
        hull = planes.amax([1, tap.axis % ndim + 1], keepdim=True)
        maps.append(hull.reshape(6, *([hull.shape[dim + 1] for dim in places] + [1, 1])[:2]))
    empty = [(each > NONE / 2).logical_not()[1::2] for each in maps]  # [3, rows, columns]
    nothing = (empty[0] | empty[1]).repeat_interleave(2, 0)
    if bool(nothing.any()):
        maps = [torch.where(nothing, NONE, each) for each in maps]
    for each in maps:  # what a reflection shows need not lie in the interval that was carried on beyond the border
        each[4:] = torch.where(each[2:4] > NONE / 2, each[2:4].maximum(each[4:]), each[4:])
    intervals = [_as_intervals(maps[axis].amax(2 - axis), length) for axis, length in enumerate((height, width))]
    units = [float(reach.unit(axis, places[axis])) if axis < len(places) else float(size[axis]) for axis in range(2)]
    rows, columns = intervals
    return Field(size, rows[0], columns[0], rows[1], columns[1], rows[2], columns[2], reach.step, (units[0], units[1]))


def _as_intervals(planes: torch.Tensor, length: int) -> NDArray[np.int32]:
    """Planes [6, length or 1] -> exact, local and outer intervals [3, length, 2]; empty ones at 0."""
    values = planes.expand(6, length).numpy().reshape(3, 2, length)
    starts, stops = -values[:, 0], values[:, 1]
    pairs = np.stack((starts, stops), -1)
    pairs[(stops <= NONE / 2) | (stops <= starts)] = 0
    return np.ascontiguousarray(pairs.astype(np.int32))
