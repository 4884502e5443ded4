"""Taps: places in a network whose output is reduced to one peak per channel and image, as the network runs.

`find` chooses the places by running the network once and following which output is whose input; `Taps` hooks
them and turns images into peaks.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import nn

from maxact.config import At, Precision
from maxact.errors import MaxactError, UsageError
from maxact.models import Model, Normalised
from maxact.preprocess import one_line
from maxact.tap import Tap, columns
from maxact.trace import Call, trace
from maxact_kernels import peaks as kernel
from maxact_kernels.peaks import Peaks

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)
LAYERS = (*CONVOLUTIONS, nn.Linear)
_NO_MEMORY = "out of memory with batches of {}; start again with a smaller --batch (and --overwrite)"
_TAKEN = {"run", "pooled"}  # names in a store that are no tap's
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_SHARE = 1 << 20  # values of a tap for which waking another thread is worth it
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
    blank = torch.zeros((2, *preprocess.shape), dtype=dtype, device=weight.device)
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


class Pending:
    """Peaks that the device may still be working on; `result` waits for them. Any thread may wait."""

    def __init__(self, peaks: Peaks, done: torch.cuda.Event | None = None) -> None:
        self._peaks, self._done = peaks, done

    def result(self) -> Peaks:
        """The peaks [N, C], in host memory."""
        if self._done is not None:
            self._done.synchronize()
        return self._peaks


class Taps:
    """A network with hooks at its taps: called with a batch of images it gives their peaks.

    A context manager: the hooks come off when it is left, whatever happened. The columns of the peaks are the taps'
    channels, one tap after the other. Each map is reduced inside its hook, because a later operation may overwrite
    it in place. `threads` share the reduction on a CPU.
    """

    def __init__(
        self, network: Normalised, taps: Sequence[Tap], precision: Precision = "fp32", threads: int = 1
    ) -> None:
        self._network = network
        self._taps = tuple(taps)
        self._dtype = DTYPES[precision]
        self._threads = threads
        self._slots = {(tap.module, tap.call): (tap, start) for tap, start, _ in columns(self._taps)}
        self.channels = sum(tap.channels for tap in self._taps)
        self._calls: dict[str, int] = {}
        self._host: Peaks | None = None  # where a CPU batch's peaks go
        self._device: dict[int, torch.Tensor] = {}  # first column -> a tap's peaks [6, N, C] on a GPU

    def __enter__(self) -> Taps:
        modules = dict(self._network.network.named_modules())
        paths = dict.fromkeys(tap.module for tap in self._taps)
        self._hooks = [modules[path].register_forward_hook(self._hook(path)) for path in paths]
        self._pool = ThreadPoolExecutor(max(1, self._threads - 1), "maxact-peaks")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._pool.shutdown()

    def __call__(self, images: torch.Tensor) -> Pending:
        """Runs a batch: `images` as the network takes them, [N, ...], on its device.

        Raises MaxactError where a tap is not reached, because the network's way depends on the images, and where
        the memory does not suffice.
        """
        self._calls.clear()
        on_cpu = images.device.type == "cpu"
        self._host = Peaks.empty(len(images), self.channels) if on_cpu else None
        with (
            torch.inference_mode(),
            torch.autocast(images.device.type, self._dtype, enabled=self._dtype != torch.float32),
        ):
            try:
                self._network(images)
            except (torch.OutOfMemoryError, MemoryError) as error:
                raise MaxactError(_NO_MEMORY.format(len(images))) from error
            except RuntimeError as error:
                if "DefaultCPUAllocator" not in str(error):
                    raise
                raise MaxactError(_NO_MEMORY.format(len(images))) from error
        if missed := [tap.name for (path, call), (tap, _) in self._slots.items() if self._calls.get(path, 0) <= call]:
            raise MaxactError(
                f"tap {missed[0]!r}: was not run by this batch, though it was by others; leave it out with --layers"
            )
        if self._host is not None:
            return Pending(self._host)
        return self._collect()

    def _hook(self, path: str) -> Callable[[nn.Module, Any, Any], None]:
        def record(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            call = self._calls.get(path, 0)
            self._calls[path] = call + 1
            if (path, call) not in self._slots:
                return
            tap, start = self._slots[path, call]
            if self._host is not None:
                self._reduce(output.float(), tap, self._host, start)
            else:
                maps = output.movedim(tap.axis, 1).flatten(2) if output.ndim > 2 else output.unsqueeze(2)
                # one tensor, the integers as their bits, so that all of it leaves the device in one copy
                self._device[start] = torch.stack([p.view(torch.float32) for p in kernel.reference(maps)])

        return record

    def _reduce(self, output: torch.Tensor, tap: Tap, out: Peaks, column: int) -> None:
        """The peaks of one tap's float32 output on the CPU, into the columns of `out` from `column` on."""
        if output.ndim == 4 and tap.axis == 1 and output.is_contiguous(memory_format=torch.channels_last):
            output, last = output.permute(0, 2, 3, 1), True  # [N, H, W, C], the same memory
        else:
            output, last = output.contiguous(), tap.axis == -1 or output.ndim == 2
        shape = (len(output), tap.positions, tap.channels) if last else (len(output), tap.channels, tap.positions)
        maps = output.view(shape).numpy()
        turn = np.zeros(1, np.int64)
        work = (maps, last, out, column, turn)
        helpers = min(self._threads - 1, maps.size // _SHARE)
        others = [self._pool.submit(kernel.reduce, *work) for _ in range(helpers)]
        kernel.reduce(*work)
        for other in others:
            if not other.cancel():  # one that has not begun by now has nothing to do
                other.result()

    def _collect(self) -> Pending:
        """Starts the copy of a GPU batch's peaks to pinned host memory, without waiting for it."""
        peaks = torch.cat([self._device[start] for start in sorted(self._device)], 2)  # [6, N, C]
        self._device.clear()
        host = torch.empty(peaks.shape, dtype=torch.float32, pin_memory=True)
        host.copy_(peaks, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(peaks.device))  # which need not be the current device
        top, position, low, mean, square, active = host.numpy()
        return Pending(Peaks(top, position.view(np.int32), low, mean, square, active.view(np.int32)), done)
