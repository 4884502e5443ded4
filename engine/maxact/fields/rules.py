"""What each operation makes of intervals: a rule for every aten operation that is known.

A rule takes a Call and gives the Reach of each of its results, None for a constant; it raises Unknown where it does
not cover the way in which the operation is called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map

from maxact.fields import axes, tables
from maxact.fields import intervals as iv
from maxact.fields.axes import Dim
from maxact.fields.call import ELEMENTWISE, Call, Unknown
from maxact.fields.intervals import NONE, Reach

_CONSTANT = {"zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"} | {
    f"new_{kind}" for kind in ("zeros", "ones", "full", "empty", "empty_strided")
}
_OVERWRITING = {"zero", "fill", "copy", "bernoulli", "normal", "uniform"}
_REDUCTIONS = {
    *("mean", "sum", "amax", "amin", "max", "min", "aminmax", "var", "std", "var_mean", "std_mean", "prod", "median"),
    *("linalg_vector_norm", "norm", "argmax", "argmin", "logsumexp", "any", "all", "nansum"),
}
_ALONG = {"_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp", "sort", "topk", "kthvalue", "glu"}
_REPLAYED = {
    *("roll", "flip", "index", "index_select", "gather", "index_put", "scatter", "slice_scatter", "select_scatter"),
    *("repeat", "im2col", "tril", "triu", "rot90"),
}


Rule = Callable[[Call], Sequence[Reach | None]]


def view(call: Call) -> Sequence[Reach]:
    source = call.args[0]
    rest, kwargs = call.args[1:], call.kwargs
    reach = call.operands[id(source)]
    if call.name in ("view", "_unsafe_view", "_reshape_alias") and not isinstance(rest[0], torch.dtype):
        return [iv.viewed(reach, call.results[0].shape)]
    if call.name == "unsqueeze":
        return [iv.inserted(reach, call.given["dim"] % (len(reach.shape) + 1))]
    func = getattr(torch.ops.aten, call.name) if call.written else call.func
    try:
        return iv.moved(reach, call.results, lambda plane: func(plane, *rest, **kwargs))
    except (RuntimeError, TypeError):
        raise Unknown from None


def elementwise(call: Call) -> Sequence[Reach | None]:
    if call.name in _OVERWRITING and call.written:
        source = call.reach("src") or call.reach("value")
        return [None if source is None else iv.union(call.written[0].shape, [source])]
    shape = call.results[0].shape
    if call.name == "mul" and len(call.operands) == 2:
        one, two = call.reaches
        gates = _is_gate(one, two), _is_gate(two, one)
        if gates == (True, False):
            return [iv.gated(shape, two, one)]
        if gates == (False, True):
            return [iv.gated(shape, one, two)]
    reach = iv.union(shape, call.reaches)
    for tensor in call.tensors:
        if id(tensor) not in call.operands and _changes_along(tensor, reach):
            reach = iv.bound_to_place(reach)  # a position embedding, a mask
    return [reach if leaf.shape == shape else iv.everything(leaf.shape, [reach]) for leaf in call.results]


def _is_gate(gate: Reach, inside: Reach) -> bool:
    """Whether one operand of a product is a number for each channel that depends on the whole image."""
    if not gate.is_uniform or not gate.is_global:
        return False
    missing = len(inside.shape) - len(gate.shape)
    return all(
        dim - missing < 0 or gate.shape[dim - missing] == 1
        for dim in range(len(inside.shape))
        if inside.varies(dim) or inside.is_place(dim)
    )


def _changes_along(constant: torch.Tensor, reach: Reach) -> bool:
    missing = len(reach.shape) - constant.ndim
    return any(
        size > 1 and reach.varies(dim) and reach.is_place(dim) for dim, size in enumerate(constant.shape, missing)
    )


def _constant(call: Call) -> Sequence[None]:
    return [None] * len(call.results)


def _reduction(call: Call) -> Sequence[Reach | None]:
    if "other" in call.given:  # the larger of two tensors
        return elementwise(call)
    reach = call.only(call.func._schema.arguments[0].name)
    dims = call.given.get("dim")
    if dims is None or dims == []:
        dims = range(len(reach.shape))
    dims = [dims] if isinstance(dims, int) else list(dims)
    reach = iv.collapse(reach, dims)
    return [_fitted(reach, leaf, dims) for leaf in call.results]


def _along(call: Call) -> Sequence[Reach]:
    dims = [call.given["dim"]]
    reach = iv.collapse(call.only("self"), dims)
    return [_fitted(reach, leaf, dims) for leaf in call.results]


def _fitted(reach: Reach, result: torch.Tensor, dims: Sequence[int]) -> Reach:
    """A reach that was collapsed along `dims`, which the result no longer has, or has in another size."""
    if result.ndim < len(reach.shape):
        reach = iv.drop(reach, dims)
    elif reach.shape:
        for dim in dims:
            if result.shape[dim] != reach.shape[dim]:
                reach = iv.resized(reach, dim, result.shape[dim])
    if tuple(result.shape) != reach.shape:
        raise Unknown
    return reach


def _replayed(call: Call) -> Sequence[Reach]:
    """Does the same to the planes, constants among the operands being planes of nothing."""
    reaches = call.reaches
    if any(not leaf.is_floating_point() for leaf in call.tensors if id(leaf) in call.operands):
        raise Unknown  # an index that depends on the image
    func = getattr(torch.ops.aten, call.name) if call.written else call.func
    # what comes again along a dimension without change need not be repeated for these
    thin = call.name in ("roll", "flip") and bool(call.given["dims"])
    planes = []
    for axis in range(2):
        made = []
        for number in range(6):

            def plane(leaf: Any, axis: int = axis, number: int = number) -> Any:
                if not isinstance(leaf, torch.Tensor):
                    return leaf
                if (reach := call.operands.get(id(leaf))) is not None:
                    # from zero, because zero is what such operations fill gaps with
                    return (reach.planes[axis] if thin else reach.expanded(axis))[number] - NONE
                return torch.zeros(leaf.shape, dtype=torch.float64) if leaf.is_floating_point() else leaf.cpu()

            args, kwargs = tree_map(plane, (call.args, call.kwargs))
            made.append(iv.leaves(func(*args, **kwargs))[0] + NONE)
        planes.append(iv.compact(torch.stack(made)))
    shape = tuple((call.written or call.results)[0].shape)
    found = Reach(shape, reaches[0].image, (planes[0], planes[1]), (), iv.joint_step(reaches))
    if reaches[0].shape == shape:
        return [iv.bound_to_place(replace(found, dims=reaches[0].dims))]
    return [iv.spaced(found)]


def _shuffled(call: Call) -> Sequence[Reach]:
    """Channels become positions, or positions channels."""
    source = call.only("self")
    reach = _replayed(call)[0]
    assert reach is not None
    factor = Fraction(source.shape[-1], reach.shape[-1])
    dims: list[Dim] = []
    for dim, size in enumerate(reach.shape):
        old = source.dims[dim]
        if size != source.shape[dim] and source.is_place(dim):
            dims.append(((size, source.unit(0, dim) * factor, source.unit(1, dim) * factor),))
        else:
            dims.append(old if size == source.shape[dim] else axes.still(size))
    return [iv.stepped(replace(reach, dims=tuple(dims), step=source.step))]


def _joined(call: Call) -> Sequence[Reach]:
    """cat and stack, without taking planes to their full size."""
    tensors = call.given["tensors"]
    shape = tuple(call.results[0].shape)
    dim = call.given["dim"] % len(shape)
    parts, sizes = [], []
    for tensor in tensors:
        if call.name == "cat" and tensor.ndim == 1 and tensor.numel() == 0 and len(shape) > 1:
            continue  # torch lets these pass
        reach = call.operands.get(id(tensor))
        if reach is None:
            reach = iv.nothing(tensor.shape, call.reaches[0].image)
        if call.name == "stack":
            reach = iv.inserted(reach, dim)
        parts.append(reach)
        sizes.append(reach.shape[dim])
    joined = []
    for axis in range(2):
        owns = [part.planes[axis] for part in parts]
        common = [max(own.shape[each] for own in owns) for each in range(len(shape) + 1)]
        pieces = []
        for own, size in zip(owns, sizes, strict=True):
            common[dim + 1] = size
            pieces.append(own.expand(common))
        joined.append(iv.compact(torch.cat(pieces, dim + 1)))
    dims = []
    for each, size in enumerate(shape):
        same = [part.dims[each] for part in parts if part.is_place(each) and part.shape[each] == size]
        places = [(size, part.unit(0, each), part.unit(1, each)) for part in parts if part.is_place(each)]
        dims.append(same[0] if same else (places[0],) if places and each == dim else axes.still(size))
    found = Reach(shape, parts[0].image, (joined[0], joined[1]), tuple(dims), iv.joint_step(parts))
    return [iv.bound_to_place(found) if found.is_place(dim) else found]


def _matmul(call: Call) -> Sequence[Reach]:
    """Products of matrices, batched or not: element [i, j] depends on row i and column j; plus what is added."""
    first, second = ("batch1", "batch2") if call.name == "baddbmm" else ("mat1", "mat2")
    if call.name in ("mm", "bmm", "mv", "dot"):
        first, second = "self", "mat2"
    result = call.results[0]
    parts = []
    if (left := call.reach(first)) is not None:
        parts.append(iv.resized(iv.collapse(left, [-1]), -1, result.shape[-1]))
    if (right := call.reach(second)) is not None:
        parts.append(iv.resized(iv.collapse(right, [-2]), -2, result.shape[-2]))
    if call.name in ("addmm", "baddbmm") and (added := call.reach("self")) is not None:
        parts.append(added)
    return [iv.union(result.shape, parts)]


def _attention(call: Call) -> Sequence[Reach]:
    """softmax(Q K^T) V: an output depends on its query, and on all keys and values."""
    queries, keys, values = (call.reach(name) for name in ("query", "key", "value"))
    parts = []
    output = call.results[0]
    if queries is not None:
        parts.append(iv.resized(iv.collapse(queries, [-1]), -1, output.shape[-1]))
    for reach, dims in ((keys, [-1, -2]), (values, [-2])):
        if reach is not None:
            parts.append(iv.resized(iv.resized(iv.collapse(reach, dims), -2, output.shape[-2]), -1, output.shape[-1]))
    rest = [reach for reach in call.reaches if all(reach is not each for each in (queries, keys, values))]
    first = iv.union(output.shape, [*parts, *(iv.everything((), [each]) for each in rest)])
    return [first, *(iv.everything(leaf.shape, call.reaches) for leaf in call.results[1:])]


def _convolution(call: Call) -> Sequence[Reach]:
    reach = call.reach("input")
    others = [each for each in call.reaches if each is not reach]
    weight = call.given["weight"]
    result = call.results[0]
    if reach is None:
        raise Unknown
    spatial = weight.ndim - 2
    stride, padding, dilation = (_each(call.given[name], spatial) for name in ("stride", "padding", "dilation"))
    reach = iv.groups(reach, 1, call.given["groups"], result.shape[1])
    for axis in range(spatial):
        dim, kernel = axis + 2, weight.shape[axis + 2]
        make = tables.transposed_table if call.given["transposed"] else tables.kernel_table
        table = make(result.shape[dim], kernel, stride[axis], padding[axis], dilation[axis])
        ratio = Fraction(1, stride[axis]) if call.given["transposed"] else Fraction(stride[axis])
        reach = iv.window(reach, dim, table, ratio)
    if others:  # weights that depend on the image
        reach = iv.union(result.shape, [reach, iv.everything((), others)])
    return [reach]


def _each(value: Any, count: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * count if len(values) == 1 else values


def _pool(call: Call) -> Sequence[Reach]:
    reach = call.only("self")
    spatial = int(next(char for char in call.name if char.isdigit()))
    kernel = _each(call.given["kernel_size"], spatial)
    stride = _each(call.given.get("stride") or kernel, spatial)
    padding = _each(call.given.get("padding", 0), spatial)
    dilation = _each(call.given.get("dilation", 1), spatial)
    for axis in range(spatial):
        dim = axis - spatial + len(reach.shape)
        table = tables.kernel_table(
            call.results[0].shape[dim], kernel[axis], stride[axis], padding[axis], dilation[axis]
        )
        reach = iv.window(reach, dim, table, Fraction(stride[axis]))
    return [reach for _ in call.results]


def _adaptive_pool(call: Call) -> Sequence[Reach]:
    reach = call.only("self")
    spatial = int(next(char for char in call.name if char.isdigit()))
    for dim in range(len(reach.shape) - spatial, len(reach.shape)):
        outputs = call.results[0].shape[dim]
        reach = iv.window(reach, dim, tables.adaptive_table(reach.shape[dim], outputs), None)
    return [reach for _ in call.results]


def _padding(call: Call) -> Sequence[Reach]:
    reach = call.only("self")
    pads = call.given["pad" if call.name == "constant_pad_nd" else "padding"]
    for number in range(len(pads) // 2):
        dim = len(reach.shape) - 1 - number
        inputs = reach.shape[dim]
        table = beyond = tables.shifted_table(inputs, pads[2 * number], pads[2 * number + 1])
        if call.name.startswith("reflection"):
            table = tables.reflected(table, inputs)
        elif call.name.startswith("replication"):
            table = np.clip(table, 0, inputs - 1)
        reach = iv.window(reach, dim, table, Fraction(1), beyond)
    return [reach]


def _upsample(call: Call) -> Sequence[Reach]:
    reach = call.only("self")
    kind = call.name.lstrip("_").removeprefix("upsample_")
    spatial = int(next(char for char in kind if char.isdigit()))
    corners = bool(call.given.get("align_corners", False))
    names = ("scales_d", "scales_h", "scales_w")[-spatial:] if spatial > 1 else ("scales",)
    for axis in range(spatial):
        dim = len(reach.shape) - spatial + axis
        inputs, outputs = reach.shape[dim], call.results[0].shape[dim]
        scale = call.given.get(names[axis])
        if inputs == outputs and not scale:
            continue
        ratio: Fraction | None = None
        if corners:
            pass
        elif scale:
            ratio = Fraction(1 / scale).limit_denominator(64)
        elif outputs % inputs == 0 or inputs % outputs == 0:
            ratio = Fraction(inputs, outputs)
        if kind.startswith("nearest"):
            table = beyond = tables.nearest_table(inputs, outputs, scale, "exact" in call.name)
        else:
            reads, clamp = ((-1, 2), False) if "cubic" in kind else ((0, 1), True)
            table = tables.interpolation_table(inputs, outputs, scale, corners, reads, clamp)
            beyond = tables.interpolation_table(inputs, outputs, scale, corners, reads, False)
            table = np.clip(table, 0, inputs - 1)
        reach = iv.window(reach, dim, table, ratio, beyond)
    return [reach]


def _batch_norm(call: Call) -> Sequence[Reach]:
    reach = call.only("input")
    if call.given.get("training"):
        reach = iv.collapse(reach, [dim for dim in range(len(reach.shape)) if dim != 1])
    return [reach, *(iv.everything(leaf.shape, [reach]) for leaf in call.results[1:])]


def _layer_norm(call: Call) -> Sequence[Reach]:
    reach = call.only("input")
    reach = iv.collapse(reach, range(-len(call.given["normalized_shape"]), 0))
    return [reach, *(iv.everything(leaf.shape, [reach]) for leaf in call.results[1:])]


def _group_norm(call: Call) -> Sequence[Reach]:
    reach = call.only("input")
    channels = reach.shape[1]
    reach = iv.collapse(iv.groups(reach, 1, call.given["group"], channels), range(2, len(reach.shape)))
    return [reach, *(iv.everything(leaf.shape, [reach]) for leaf in call.results[1:])]


def _all(call: Call) -> Sequence[Reach]:
    return [iv.everything(leaf.shape, call.reaches) for leaf in call.results]


RULES: dict[str, Rule] = {
    "convolution": _convolution,
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle", "channel_shuffle"), _shuffled),
    **dict.fromkeys(_CONSTANT, _constant),
    **dict.fromkeys(_REDUCTIONS, _reduction),
    **dict.fromkeys(_ALONG, _along),
    **dict.fromkeys(_REPLAYED, _replayed),
    **dict.fromkeys(("cat", "stack"), _joined),
    **dict.fromkeys(ELEMENTWISE | _OVERWRITING, elementwise),
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm"), _matmul),
    **dict.fromkeys(("max_pool2d_with_indices", "max_pool3d_with_indices", "max_pool1d", "max_pool2d"), _pool),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "avg_pool3d"), _pool),
    **dict.fromkeys((f"_adaptive_avg_pool{n}d" for n in (2, 3)), _adaptive_pool),
    **dict.fromkeys((f"adaptive_{kind}_pool{n}d" for n in (1, 2, 3) for kind in ("avg", "max")), _adaptive_pool),
    **dict.fromkeys(
        ("constant_pad_nd", *(f"{kind}_pad{n}d" for n in (1, 2, 3) for kind in ("reflection", "replication"))), _padding
    ),
    **dict.fromkeys(
        (f"{exact}{n}d" for n in (1, 2, 3) for exact in ("upsample_nearest", "_upsample_nearest_exact")), _upsample
    ),
    **dict.fromkeys(
        ("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d"), _upsample
    ),
    **dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"), _batch_norm),
    "native_layer_norm": _layer_norm,
    "_fused_rms_norm": _layer_norm,
    "native_group_norm": _group_norm,
    **dict.fromkeys(
        (
            *("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention"),
            *("_scaled_dot_product_flash_attention", "_scaled_dot_product_attention_math"),
        ),
        _attention,
    ),
    **dict.fromkeys(("_native_multi_head_attention", "_transformer_encoder_layer_fwd"), _all),
}
RULES["_unsafe_view"] = view
