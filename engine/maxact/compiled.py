"""A network as one graph of torch.compile, for batches of one size."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx, nn
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from maxact_kernels import output as reduction

_aten, _prims = torch.ops.aten, torch.ops.prims
# what a graph may do to a value that is no more than to clamp it -> the bounds, given its other arguments
_CLAMPS: dict[Any, Callable[..., tuple[float, float]]] = {
    _aten.relu.default: lambda: (0.0, math.inf),
    _aten.clamp_min.default: lambda low: (low, math.inf),
    _aten.clamp_max.default: lambda high: (-math.inf, high),
    _prims.convert_element_type.default: lambda _: (-math.inf, math.inf),  # where it loses nothing
}


def compile_for(network: nn.Module, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """A network as one graph.

    On a CPU weights are constants to Inductor, which takes normalisations into the convolutions before them and lays
    weights out for the processor; and a tap does the work of a rectifier behind it. On CUDA Inductor takes no kernel
    because it was the fastest when tried: another process would take another, whose sums differ in their last bits.
    On both, the operations stay in their order: moved to what reads its peaks, a tap would be at the end of a network.
    """
    run: Callable[[torch.Tensor], torch.Tensor] = torch.compile(network, fullgraph=True, dynamic=False)
    options: dict[str, Any] = {"reorder_for_locality": False}
    if device.type == "cpu":
        options |= {"freezing": True, "post_grad_custom_pre_pass": _Clamping()}
    else:
        options |= {"deterministic": True}

    def compiled(images: torch.Tensor) -> torch.Tensor:
        # as options of torch.compile they would come too late: Dynamo would have made weights inputs of the graph
        with torch._inductor.config.patch(options):
            return run(images)

    return compiled


class _Clamping(CustomGraphPass):
    """Joins the search of a tap for its peaks with the rectifier behind it, where that is all that reads the map: one
    operation that clamps the map in place. By itself the rectifier would be part of no other operation (the tap, too,
    reads what comes before it), and read and write a map that has left the near caches."""

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=reduction.PEAKS):
            _join(graph, node)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


def _join(graph: fx.Graph, peaks: fx.Node) -> None:
    maps, axis = cast("tuple[fx.Node, int]", peaks.args)
    if torch._debug_has_internal_overlap(maps.meta["val"]):  # expanded: what is one value in memory cannot be changed
        return
    chain, bounds = _clamps(maps, [node for node in maps.users if node is not peaks])
    if not chain:
        return
    low, high = bounds
    with graph.inserting_after(maps):
        # in this form, which changes nothing, Inductor sees to it that it only happens in place where it may
        both = graph.call_function(
            auto_functionalized,
            (reduction.PEAKS_THEN_CLAMP,),
            {"output": maps, "axis": axis, "low": low, "high": high},
        )
    both.meta["val"] = peaks.meta["val"], chain[-1].meta["val"]
    for index, node in enumerate((peaks, chain[-1])):
        with graph.inserting_after(both):
            item = graph.call_function(operator.getitem, (both, index))
        item.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(item)
    for node in (peaks, *reversed(chain)):
        graph.erase_node(node)


def _clamps(maps: fx.Node, readers: list[fx.Node]) -> tuple[list[fx.Node], tuple[float, float]]:
    """The operations that `maps` goes through that only clamp it, as long as nothing else reads what lies between
    them; and the bounds of them all. `readers` read the maps."""
    chain, bounds = [], (-math.inf, math.inf)
    found: tuple[list[fx.Node], tuple[float, float]] = [], bounds
    last, own = maps, maps.meta["val"].dtype
    while len(readers) == 1 and readers[0].target in _CLAMPS and readers[0].args[0] is last:
        (last,) = readers
        if torch.promote_types(own, last.meta["val"].dtype) != last.meta["val"].dtype != own:
            break  # values would be rounded, or cut to integers
        low, high = _CLAMPS[last.target](*last.args[1:])
        bounds = (min(max(bounds[0], low), high), min(max(bounds[1], low), high))
        chain.append(last)
        readers = list(last.users)
        if last.meta["val"].dtype == own:
            found = list(chain), bounds
    return found
