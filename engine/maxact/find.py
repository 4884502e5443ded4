"""Finding taps: the places in a network that are recorded, chosen by a dry run that follows which output is whose
input."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from maxact.config import At
from maxact.errors import MaxactError, UsageError
from maxact.models import Model, Normalised
from maxact.preprocess import one_line
from maxact.tap import Tap
from maxact.trace import Call, trace

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)
LAYERS = (*CONVOLUTIONS, nn.Linear)
_TAKEN = {"run", "pooled"}  # names in a store that are no tap's
_ACTIVATION = re.compile(r"relu|elu|silu|gelu|mish|swish|sigmoid|tanh|softplus|activation", re.IGNORECASE)


@dataclass(frozen=True)
class Found:
    """The taps of a network, in the order in which they run, and the chosen modules that never ran."""

    taps: tuple[Tap, ...]
    idle: tuple[str, ...]

    @property
    def channels(self) -> int:
        """Channels of all taps together."""
        return sum(tap.channels for tap in self.taps)


def find(network: Normalised, images: torch.Tensor, layers: Sequence[str] = (), at: At = "norm") -> Found:
    """Chooses the taps of a network by a dry run on `images`, at least two, as the loader gives them.

    `layers` holds module paths, exact or as globs: a glob chooses the convolutions and linear layers that it
    matches, or where it matches none of them every module that it matches; nothing chooses every convolution and
    linear layer. `at` says where in the chain of a layer, its normalisation and its activation the tap sits: at the
    layer (`module`), after the normalisation that follows (`norm`), or after the activation (`activation`). The
    chain ends where an output goes to more than one place or to something that is not a module.

    Raises UsageError for a pattern that matches nothing, MaxactError for a network that cannot run on such images, a
    module named exactly that never runs, and an output that is not one tensor whose first axis is the batch.
    """
    modules = dict(network.network.named_modules())
    chosen, exact = _choose(modules, layers)
    try:
        calls = trace(network.network, lambda: network(images))
    except Exception as error:  # whatever the network's own code may raise
        shape = " x ".join(map(str, images.shape[1:]))
        raise MaxactError(f"the network cannot run on images of {shape}: {one_line(error)} (see --crop)") from error
    taps: dict[str, Tap] = {}
    for call in calls:
        if call.path in chosen:
            place = _follow(call, at) if isinstance(call.module, LAYERS) else call
            tap = _describe(call, place, len(images))
            if tap.name in _TAKEN or "/" in tap.name:
                raise MaxactError(f"tap {tap.name!r}: cannot bear this name in a store; choose others with --layers")
            taps.setdefault(tap.name, tap)
    ran = {call.path for call in calls}
    idle = tuple(path for path in chosen if path not in ran)
    if missing := [path for path in idle if path in exact]:
        raise MaxactError(f"layer {missing[0]!r}: is never run when the network is, so it cannot be tapped")
    if not taps:
        raise MaxactError(
            "no layer to tap: the network runs no convolution and no linear layer; name others with --layers"
        )
    return Found(tuple(taps.values()), idle)


def find_taps(model: Model, layers: Sequence[str] = (), at: At = "norm") -> Found:
    """The taps of a loaded model (`find`), on images of its own size."""
    preprocess = model.preprocess
    weight = next(model.network.parameters(), torch.empty(0))
    dtype = torch.float32 if preprocess.function else torch.uint8
    try:
        blank = torch.zeros((2, *preprocess.shape), dtype=dtype, device=weight.device)
    except (RuntimeError, MemoryError) as error:  # of torch's allocators
        size = " x ".join(map(str, preprocess.crop))
        raise MaxactError(f"no memory for images of {size} ({one_line(error)}); give a smaller --crop") from error
    return find(Normalised(model.network, preprocess).to(weight.device), blank, layers, at)


def _choose(modules: dict[str, nn.Module], layers: Sequence[str]) -> tuple[list[str], set[str]]:
    """The chosen module paths, in the network's order, and those of them that were named exactly."""
    usual = [path for path, module in modules.items() if isinstance(module, LAYERS)]
    if not layers:
        return usual, set()
    chosen: set[str] = set()
    exact: set[str] = set()
    for pattern in layers:
        if pattern in modules and pattern:
            exact.add(pattern)
            continue
        matches = fnmatch.filter(usual, pattern) or [path for path in fnmatch.filter(modules, pattern) if path]
        if not matches:
            near = difflib.get_close_matches(pattern, modules, n=5, cutoff=0.3)
            hint = f"; close to it: {', '.join(near)}" if near else ""
            raise UsageError(f"layers: nothing in the network matches {pattern!r}{hint} (`maxact layers` lists all)")
        chosen.update(matches)
    return [path for path in modules if path in chosen | exact], exact


def _follow(layer: Call, at: At) -> Call:
    """The call whose output is recorded for a layer: the layer's own, or one later in its chain."""
    if at == "module":
        return layer
    place, last, normed = layer, layer, False
    while len(last.consumers) == 1 and (following := last.consumers[0]) is not None:
        module = following.module
        if _is_norm(module) and not normed:
            normed, place = True, following
        elif isinstance(module, nn.Identity | nn.Dropout | nn.Dropout2d):
            # a normalisation with its activation inside shows its own output only here
            place = following if not place.visible else place
        elif at == "activation" and _is_activation(module):
            return following
        else:
            break
        last = following
    return place if place.visible else layer


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _is_activation(module: nn.Module) -> bool:
    known = type(module).__module__ == "torch.nn.modules.activation"
    return (known and not isinstance(module, nn.MultiheadAttention)) or bool(_ACTIVATION.search(type(module).__name__))


def _describe(layer: Call, place: Call, images: int) -> Tap:
    output = place.output
    if not isinstance(output, torch.Tensor):
        what = type(output).__name__
        raise MaxactError(f"tap {place.path!r}: its output is a {what}, not a tensor; name a module inside it")
    if output.ndim not in (2, 3, 4) or output.shape[0] != images:
        shape = list(output.shape)
        raise MaxactError(
            f"tap {place.path!r}: the first axis of its output {shape} is not the batch of {images}, "
            "or it is no vector, token or image map; choose other layers with --layers"
        )
    axis = _channel_axis(layer.module, output.ndim)
    rest = [size for dim, size in enumerate(output.shape) if dim not in (0, axis % output.ndim)]
    rows, columns = (*rest, 1, 1)[:2]
    name = f"{place.path}:{place.number}" if place.number else place.path
    return Tap(
        name,
        place.path,
        place.number,
        layer.path,
        type(layer.module).__name__,
        output.shape[axis],
        (rows, columns),
        axis,
    )


def _channel_axis(module: nn.Module, dims: int) -> int:
    if isinstance(module, CONVOLUTIONS):
        return 1
    # a LayerNorm2d is a LayerNorm that moves the channels to the end and back
    if isinstance(module, nn.Linear | nn.LayerNorm) and type(module).__name__ != "LayerNorm2d":
        return -1
    return -1 if dims == 3 else 1
