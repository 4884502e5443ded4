"""What the taps add to the code that torch.compile generates for CUDA, shown without a CUDA device.

The network is compiled by Inductor, bare and with all its taps, both with a scan's options, for tensors that have a
device and a shape but no memory, and for a device that is described below instead of asked. What would be launched is
looked at as Inductor's scheduler gives it, and never run. So this counts kernels and the bytes that they move, by what
each reads and writes; it measures no time.

A tap is "shared" where its reductions lie in a kernel that the network has anyway, the one that makes its map or one
that reads it: then the map is not read again. It is "again" where a kernel of their own reads it. (One that only joins
the partial results of a map's rows does not.) Linear layers on vectors have one position and nothing to reduce, so they
are neither. Whatever else the taps cost shows in the bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._dynamo import device_interface
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import Scheduler
from torch._subclasses.fake_tensor import FakeTensorMode

import maxact_kernels
from common import arguments, finish
from maxact.compiled import compile_for
from maxact.config import Precision
from maxact.find import find_taps
from maxact.models import Normalised, load_model
from maxact.taps import DTYPES, Taps

# of an H200; Inductor asks for no more
PROPERTIES = SimpleNamespace(
    name="NVIDIA H200",
    gcnArchName="",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    max_threads_per_block=1024,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
    L2_cache_size=60 << 20,
    total_memory=141_000_000_000,
)


@dataclass(frozen=True)
class Kernel:
    """One launch: what it reads and writes in bytes, and the taps of which it reduces the map itself."""

    moved: int
    taps: frozenset[str]
    """Of which it reads, or makes, every value; not those of which it only joins partial results."""
    ours: bool
    """It does nothing but the taps' work."""


@dataclass(frozen=True)
class Generated:
    """What Inductor makes of one graph."""

    kernels: tuple[Kernel, ...]
    code: str
    """Empty where it was not asked for."""

    @property
    def moved(self) -> int:
        """Bytes that all kernels read and write."""
        return sum(kernel.moved for kernel in self.kernels)

    def again(self) -> set[str]:
        """The taps of which a kernel of the taps' own reads the map."""
        return {tap for kernel in self.kernels if kernel.ours for tap in kernel.taps}

    def shared(self) -> set[str]:
        """The other taps that are reduced."""
        return {tap for kernel in self.kernels for tap in kernel.taps} - self.again()


class _Done(Exception):
    """The code is there; nothing is to be compiled."""


class _Worker(device_interface.CudaInterface.Worker):
    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def get_device_properties(device: Any = None) -> Any:
        return PROPERTIES


class _Pretended(device_interface.CudaInterface):
    """What Dynamo and Inductor ask a device for."""

    Worker = _Worker

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def exchange_device(device: int) -> int:
        return device

    @staticmethod
    def maybe_exchange_device(device: int) -> int:
        return device

    @staticmethod
    def get_device_properties(device: Any = None) -> Any:
        return PROPERTIES

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def get_compute_capability(device: Any = None) -> int:
        return int(10 * PROPERTIES.major + PROPERTIES.minor)

    @staticmethod
    def is_triton_capable(device: Any = None) -> bool:
        return True

    @staticmethod
    def raise_if_triton_unavailable(device: Any = None) -> None:
        return None


@contextmanager
def pretended(found: list[Generated], text: bool = True) -> Iterator[None]:
    """Inside, torch.compile generates code for a CUDA device that is not there, puts it into `found`, and raises.

    text: with the code itself, and not only what is launched.
    """

    def schedule(scheduler: Scheduler) -> None:
        found.append(Generated(tuple(_kernels(scheduler)), ""))
        raise _Done

    def keep(graph: GraphLowering) -> None:
        code, _ = graph.codegen()
        kernels = tuple(_kernels(graph.scheduler))
        found.append(Generated(kernels, code.value if hasattr(code, "value") else str(code)))
        raise _Done

    instead = {
        "torch.cuda.get_device_properties": lambda device=None: PROPERTIES,
        "torch.cuda.get_device_capability": lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.is_bf16_supported": lambda *args, **options: True,
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,  # else autocast does nothing
        "torch.utils._triton.triton_hash_with_backend": lambda *args: "none",
    }
    device_interface.get_interface_for_device("cuda")  # all of them are registered when one is asked for
    devices = device_interface.device_interfaces
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(devices, {"cuda": _Pretended, "cuda:0": _Pretended}))
        stack.enter_context(mock.patch.object(GraphLowering, "compile_to_module", keep))
        if not text:
            stack.enter_context(mock.patch.object(Scheduler, "codegen", schedule))
        for name, function in instead.items():
            stack.enter_context(mock.patch(name, function))
        # these would compute constants on the device, and measure there whether to pad a matrix
        stack.enter_context(
            torch._inductor.config.patch(joint_graph_constant_folding=False, shape_padding=False, fx_graph_cache=False)
        )
        stack.enter_context(torch._functorch.config.patch(enable_autograd_cache=False))
        yield


def _kernels(scheduler: Scheduler) -> Iterator[Kernel]:
    """What the scheduler would launch; its nodes that launch nothing are left out."""
    for kernel in scheduler.nodes:
        if type(kernel).__name__ == "NopKernelSchedulerNode":
            continue
        parts = kernel.get_nodes()
        read = {part: _ours(part) for part in parts}
        taps = frozenset(path for part, path in read.items() if path is not None and _reads_maps(part))
        ours = all(path is not None or _joins(part) for part, path in read.items())
        yield Kernel(int(kernel.get_read_write_buffers_sizes()), taps, ours)


def _operations(part: Any) -> list[Any]:
    """The operations of the graph that a part of a kernel stands for: the last one where it is known."""
    if part.node is None:
        return []
    last = part.node.get_origin_node()
    return [last] if last is not None else list(part.node.get_origins())


def _ours(part: Any) -> str | None:
    """The path of the tapped module of which a part of a kernel reduces the map; None where it does not."""
    folder = str(Path(maxact_kernels.__file__).parent)
    for operation in _operations(part):
        if folder in str(operation.meta.get("stack_trace")):
            path, _ = list(operation.meta["nn_module_stack"].values())[-1]
            return str(path).split("network.")[-1]  # after Tapped's and Normalised's
    return None


def _joins(part: Any) -> bool:
    """Whether a part of a kernel only lays results side by side."""
    return all(operation.name.startswith(("cat", "stack")) for operation in _operations(part))


def _reads_maps(part: Any) -> bool:
    """Whether a part of a kernel reduces maps, and not the partial results of others: only then something of the
    network is among what it computes or reads at once."""
    if not part.is_reduction():
        return False
    folder = str(Path(maxact_kernels.__file__).parent)
    operations = set(part.node.get_origins())
    inputs = {node for operation in operations for node in operation.all_input_nodes} | operations
    return any(folder not in str(node.meta.get("stack_trace")) for node in inputs)


def without_memory(network: nn.Module) -> None:
    """Puts tensors of the same shape in the place of all the network's, on a device that need not be there.

    To be called where a FakeTensorMode is active.
    """

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")

    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(fake(parameter), requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, fake(buffer))


def generate(name: str, batch: int, precision: Precision, tapped: bool, text: bool = True) -> tuple[Generated, int]:
    """What Inductor makes of a network with random weights, with all its taps or without; and how many they are."""
    model = load_model(name, weights="none" if ":" not in name else None)
    taps = find_taps(model).taps
    network = Normalised(model.network, model.preprocess).to(memory_format=torch.channels_last)
    found: list[Generated] = []
    torch._dynamo.reset()
    with FakeTensorMode():
        without_memory(network)
        images = torch.empty(batch, *model.preprocess.shape, dtype=torch.uint8, device="cuda")
        with ExitStack() as stack:
            stack.enter_context(pretended(found, text))
            if tapped:
                run: Any = stack.enter_context(Taps(network, taps, precision, compiled=True))
            else:
                run = compile_for(network, images.device)
                stack.enter_context(torch.inference_mode())
                stack.enter_context(torch.autocast("cuda", DTYPES[precision], enabled=precision != "fp32"))
            try:
                run(images)
            except Exception:
                if not found:
                    raise
    return found[0], len(taps)


def main() -> None:
    """Generates and reports."""
    args = arguments(
        __doc__ or "",
        models="resnet18,resnet50,vgg16,maxact.demo:network",
        batch=128,
        precision="fp16",
        code="",
    )
    rows = []
    for name in args.models.split(","):
        bare, _ = generate(name, args.batch, args.precision, False, bool(args.code))
        full, taps = generate(name, args.batch, args.precision, True, bool(args.code))
        if args.code:  # a folder for the generated code
            Path(args.code).mkdir(parents=True, exist_ok=True)
            for kind, generated in (("bare", bare), ("taps", full)):
                (Path(args.code) / f"{name.split(':')[0]}-{kind}.py").write_text(generated.code)
        moved = [generated.moved / args.batch / 1e6 for generated in (bare, full)]
        launches = [len(generated.kernels) for generated in (bare, full)]
        ours = [kernel for kernel in full.kernels if kernel.ours]
        shared, again = full.shared(), full.again()
        rows.append((name, taps, len(shared), len(again), *launches, len(ours), *moved, moved[1] / moved[0] - 1))
    columns = (
        *("network", "taps", "shared", "again", "kernels bare", "with taps", "of the taps alone"),
        *("MB/image bare", "MB/image with taps", "more"),
    )
    finish("fusion", columns, rows, {"batch": args.batch, "precision": args.precision}, args.json)


if __name__ == "__main__":
    main()
