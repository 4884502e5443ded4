"""Taps: a network whose chosen outputs are reduced to one peak per channel and image as it runs.

`find` chooses the places; `Taps` hooks them and turns batches of images into peaks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import nn

from maxact.compiled import compile_for
from maxact.config import Precision
from maxact.errors import MaxactError, OutOfMemory, is_memory
from maxact.models import Normalised
from maxact.preprocess import one_line
from maxact.tap import Tap
from maxact_kernels import output as reduction
from maxact_kernels.peaks import Peaks

_GRAPHS = 1 << 20
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class CannotCompile(MaxactError):
    """A network that torch.compile does not take as one graph."""


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

    compiled: the network and its taps become one graph of torch.compile, for batches of one size, when the first
    batch comes. On CUDA the reductions are fused into the kernels that make the maps; on a CPU the convolutions
    take in the normalisation that follows them and weights are laid out for the processor.
    """

    def __init__(
        self,
        network: Normalised,
        taps: Sequence[Tap],
        precision: Precision = "fp32",
        threads: int = 1,
        compiled: bool = False,
    ) -> None:
        self._tapped = _Tapped(network, taps)
        self._dtype = DTYPES[precision]
        self._threads = threads
        self._compiled = compiled
        self.channels = sum(tap.channels for tap in taps)

    def __enter__(self) -> Taps:
        self._resources = ExitStack()
        self._resources.enter_context(self._tapped)
        self._resources.enter_context(reduction.threads(self._threads))
        self._side: torch.cuda.Stream | None = None
        self._ran = False
        self._run: Callable[[torch.Tensor], torch.Tensor] = self._tapped
        if self._compiled:  # after the hooks are there: later ones would not be in the graph
            # every network is one more graph of the same code, of which there may be any number
            self._resources.enter_context(torch._dynamo.config.patch(recompile_limit=_GRAPHS))
            self._run = compile_for(self._tapped, next(self._tapped.buffers()).device)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resources.close()

    def __call__(self, images: torch.Tensor) -> Pending:
        """Runs a batch: `images` as the network takes them, [N, ...], on its device.

        Raises MaxactError where a tap is not reached, because the network's way depends on the images; OutOfMemory
        where the memory does not suffice; CannotCompile.
        """
        with (
            torch.inference_mode(),
            torch.autocast(images.device.type, self._dtype, enabled=self._dtype != torch.float32),
        ):
            try:
                peaks = self._run(images)
            except Exception as error:  # torch.compile's errors have no common base
                if is_memory(error):
                    raise OutOfMemory(f"out of memory with batches of {len(images)}") from error
                if self._compiled and not self._ran and not isinstance(error, MaxactError):
                    raise CannotCompile(f"torch.compile cannot take this network ({one_line(error)})") from error
                raise
        self._ran = True
        return self._leave(peaks) if peaks.is_cuda else Pending(Peaks.of(peaks))

    def _leave(self, peaks: torch.Tensor) -> Pending:
        """Starts the copy of a GPU batch's peaks to pinned host memory, on a stream of its own so that the next
        batch's kernels do not stand behind it; waits for nothing."""
        self._side = self._side or torch.cuda.Stream(peaks.device)  # type: ignore[no-untyped-call]
        host = torch.empty(peaks.shape, dtype=torch.float32, pin_memory=True)
        self._side.wait_stream(torch.cuda.current_stream(peaks.device))  # which need not be the current device
        with torch.cuda.stream(self._side):
            host.copy_(peaks, non_blocking=True)
            # who waits for it leaves the core to others meanwhile
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            done.record(self._side)
        peaks.record_stream(self._side)  # its memory is not used again before the copy is done
        return Pending(Peaks.of(host), done)


class _Tapped(nn.Module):
    """The network with hooks, as a function of a batch: the peaks of all taps, float32 [6, N, C] (`Peaks.of`).

    What the hooks find lies in lists that are empty before and after, so that torch.compile can follow them.
    """

    def __init__(self, network: Normalised, taps: Sequence[Tap]) -> None:
        super().__init__()
        self.network = network
        self._taps = tuple(taps)
        self._slots = {(tap.module, tap.call): tap for tap in self._taps}
        self._calls: dict[str, int] = {}
        self._found: dict[str, torch.Tensor] = {}
        self.training = network.training

    def __enter__(self) -> _Tapped:
        modules = dict(self.network.network.named_modules())
        paths = dict.fromkeys(tap.module for tap in self._taps)
        self._hooks = [modules[path].register_forward_hook(self._hook(path)) for path in paths]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self._calls, self._found = {}, {}
        self.network(images)
        found, self._found = self._found, {}
        if missed := [tap.name for tap in self._taps if tap.name not in found]:
            raise MaxactError(
                f"tap {missed[0]!r}: was not run by this batch, though it was by others; leave it out with --layers"
            )
        return torch.cat([found[tap.name] for tap in self._taps], 2)

    def _hook(self, path: str) -> Callable[[nn.Module, Any, Any], None]:
        def record(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            call = self._calls.get(path, 0)
            self._calls[path] = call + 1
            if (path, call) in self._slots:
                tap = self._slots[path, call]
                self._found[tap.name] = reduction.peaks(output, tap.axis)

        return record
