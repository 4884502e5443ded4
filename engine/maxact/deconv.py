"""Winning units carried back to pixels: deconvnet, guided and plain gradients, for many units at once.

All three are the gradient of a unit by the pixels, but for what happens at rectifiers on the way back. A signal arrives
at the output of one; what leaves at its input is

- `gradient`: the signal where the forward pass was not cut off, as autograd has it;
- `deconvnet` (Zeiler and Fergus, Visualizing and Understanding Convolutional Networks, 2013): the positive part of the
  signal, wherever the forward pass was;
- `guided` (Springenberg et al., Striving for Simplicity, 2014): the positive part of the signal where the forward pass
  was not cut off.

Rectifiers are ReLU, and what cuts off at 0 and again at some higher value: ReLU6, hardtanh and clamp from 0 on,
threshold at 0, the maximum with zeros; as modules, functions, methods or in place, because they are found in the graph
that autograd records. Both methods define nothing else. Leaky and smooth activations (leaky ReLU, PReLU, ELU, GELU,
SiLU, sigmoid, ...), hardtanh and clamp from elsewhere, and custom autograd functions, of which nobody knows what they
are, get their true gradient and are listed in `Projector.undefined`. A rectifier that is not written as one (as a
product with a mask, say) cannot be told from other products and silently gets its true gradient; a hard swish
that is written with ReLU6 is rectified there, one that is a function of its own is not.

Every other operation gets its gradient. For convolutions that is the transposed convolution with the same weights, for
batch normalisation in evaluation mode the scale, for max-pooling the way back through the switches of the forward
pass. Where pools overlap and one value is the maximum of several, the signals of all of them add; max-unpooling
(`torch.nn.functional.max_unpool2d`) would write one over the other. Pools that do not overlap give the same either way.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

from maxact.config import Method, Seed
from maxact.convolve import Window, Windows, convolve
from maxact.errors import MaxactError, is_memory
from maxact.models import Normalised
from maxact.tap import Tap

_ACTIVATION = re.compile(
    "(LeakyRelu|Prelu|Rrelu|Elu|Celu|Gelu|Silu|Hardswish|Hardsigmoid|Hardtanh|Sigmoid|LogSigmoid|Tanh|Softplus|Mish|Glu"
    "|Softshrink|Hardshrink|Threshold|Clamp|ClampMin|ClampMax)(Kernel|WithNoise)?$"
)
_IN_PLACE = re.compile(
    r"(relu|clamp|clip|threshold|elu|celu|leaky_relu|rrelu|hardtanh|sigmoid|tanh|silu)(_min|_max)?_$"
)
_NO_MEMORY = "out of memory with {} images of {} x {}; start again with a smaller --batch"


@dataclass(frozen=True)
class Projected:
    """What N winners gave.

    `signal` float32 [N, 3, h, w] lies in the pixels of the winner's image. `score` float32 [N] is the activation of the
    winning unit, or the mean of its map. `unlit` bool [N] are the winners whose score could not be their seed. `map`
    [N, H, W] is the winner's whole map.
    """

    signal: torch.Tensor
    score: torch.Tensor
    unlit: torch.Tensor
    map: torch.Tensor


class Projector:
    """Projects units of one tap. A context manager: its hook comes off when it is left, whatever happened.

    The network runs in float32 and only as far as the tap. `undefined` fills with the names of the operations that
    the method has no rule for, as they are met.

    `seed` is what the signal starts with: "one", or the unit's "activation"; where that is not above zero it starts
    with 1, and the winner is one of `Projected.unlit`. All of it is linear in a seed above zero.
    """

    def __init__(self, network: nn.Module, tap: Tap, method: Method = "deconvnet", seed: Seed = "one") -> None:
        self._network, self._tap, self._method, self._seed = network, tap, method, seed
        self._inner = network.network if isinstance(network, Normalised) else network
        self._calls = 0
        self.undefined: set[str] = set()

    def __enter__(self) -> Projector:
        self._hook = self._inner.get_submodule(self._tap.module).register_forward_hook(self._reach)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hook.remove()

    def __call__(
        self, images: torch.Tensor, index: Any, channels: Any, positions: Any = None, windows: Windows | None = None
    ) -> Projected:
        """Projects N winners on U images, float32 [U, 3, h, w] as the network takes them, on its device.

        `index` [N] says which image each winner is on, `channels` [N] and `positions` [N, 2] (row and column in the
        tap's map) which unit it is. Without positions the winner is a whole map: the signal starts at every position
        of it, and the score is its mean.

        `windows` says which part of the maps of some convolutions the winners need (`patches.Windows.at`): the rest is
        zeros, there and back. For that each winner has an image of its own: `index` is 0, 1, ... N - 1.

        All images share one forward pass, and go back as many times as one of them has winners: see `share`.

        Raises MaxactError where the tap is not reached, does not hang on the input by operations that autograd can
        follow, or the memory does not suffice.
        """
        index, channels = (torch.as_tensor(each, dtype=torch.int64).cpu() for each in (index, channels))
        if positions is not None:
            positions = torch.as_tensor(positions, dtype=torch.int64).cpu()
        device = images.device
        with torch.inference_mode(False), torch.enable_grad(), _memory(images):
            leaf = images.detach().clone(memory_format=torch.channels_last).requires_grad_()
            output = self._forward(leaf, windows)  # [U, C, h, w], [U, h, w, C], [U, T, C], [U, C, T] or [U, C]
            if not output.requires_grad:
                raise MaxactError(f"tap {self._tap.name!r}: autograd cannot follow it to the input; leave it out")
            if self._method != "gradient" and output.grad_fn is not None:
                self._bend(output.grad_fn)
            maps = output.detach().movedim(self._tap.axis, 1)  # [U, C, ...]
            units = _units(maps, index, channels, positions)
            values = maps[units]  # [N], or [N, ...] of whole maps
            score = values.flatten(1).mean(1) if values.ndim > 1 else values
            unlit = score <= 0 if self._seed == "activation" else torch.zeros_like(score, dtype=torch.bool)
            start = torch.where(unlit, 1, score) if self._seed == "activation" else torch.ones_like(score)

            size = len(index), *images.shape[1:]
            signal = torch.empty(size, dtype=images.dtype, device=device, memory_format=torch.channels_last)
            turns = torch.from_numpy(_turn(index.numpy()))
            last = int(turns.max()) if len(turns) else -1
            for round in range(last + 1):
                mine = torch.nonzero(turns == round)[:, 0]
                seed = torch.zeros_like(output)
                unit = tuple(each[mine] for each in units)
                started = start[mine.to(device)]
                seed.movedim(self._tap.axis, 1)[unit] = started.view(-1, *(1 for _ in values.shape[1:]))
                (grad,) = torch.autograd.grad(output, leaf, seed, retain_graph=round < last)
                signal[mine.to(device)] = grad[index[mine].to(device)]
            whole = maps[index, channels]
        return Projected(signal, score, unlit, whole.reshape(len(whole), *(*whole.shape[1:], 1, 1)[:2]))

    def maps(self, images: torch.Tensor) -> torch.Tensor:
        """The tap's maps of U images: [U, C, H, W], with the tap's map as H x W."""
        with torch.inference_mode(), _memory(images):
            output = self._forward(images).movedim(self._tap.axis, 1)
        return output.reshape(*output.shape[:2], *(*output.shape[2:], 1, 1)[:2])

    def _forward(self, images: torch.Tensor, windows: Windows | None = None) -> torch.Tensor:
        self._calls = 0
        try:
            with torch.autocast(images.device.type, enabled=False), _Changed(self._inner, windows or {}, self._method):
                self._network(images.clone())  # the network may work on its input in place
        except _Reached as reached:
            return reached.output
        raise MaxactError(f"tap {self._tap.name!r}: was not run by this batch, though it was by others")

    def _reach(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._calls += 1
        if self._calls > self._tap.call:
            raise _Reached(output)

    def _bend(self, output: Node) -> None:
        """Changes what the rectifiers between the input and `output` do to the signal; lists what has no rule."""
        rule = _deconvnet if self._method == "deconvnet" else None
        for node in _nodes(output):
            if not _rectifies(node):
                self.undefined.update(_undefined(node))
            elif rule is not None:
                node.register_hook(rule)
            else:
                node.register_prehook(_guided)


class _Reached(BaseException):
    """The tap has given its output: what comes after it need not run. No network's own code catches it."""

    def __init__(self, output: torch.Tensor) -> None:
        self.output = output


class _Changed(TorchFunctionMode):
    """A forward pass with some operations done otherwise, to the same effect.

    Those that work in place on a view run apart from it, and their result is copied into the view: autograd hides an
    operation that changes a part of a tensor inside a node that cannot be looked into. Convolutions with a window work
    out what is in it. ReLU keeps nothing for a mask that the deconvnet does not ask for.
    """

    def __init__(self, network: nn.Module, windows: Windows, method: Method) -> None:
        super().__init__()
        self._network, self._windows, self._method = network, windows, method
        self._window: Window | None = None  # of the convolution that is running

    def __enter__(self) -> _Changed:
        with ExitStack() as stack:
            for path in dict.fromkeys(path for path, _ in self._windows):
                module = self._network.get_submodule(path)
                stack.callback(module.register_forward_pre_hook(self._begin(path)).remove)
                stack.callback(module.register_forward_hook(self._end).remove)
            super().__enter__()  # type: ignore[no-untyped-call]
            self._hooks = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.close()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def _begin(self, path: str) -> Callable[..., None]:
        numbers = count()

        def begin(module: nn.Module, inputs: Any) -> None:
            self._window = self._windows.get((path, next(numbers)))

        return begin

    def _end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._window = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.conv2d and self._window is not None:
            return convolve(self._window, *args, **kwargs)
        if args and isinstance(value := args[0], torch.Tensor) and value.requires_grad:
            name = getattr(func, "__name__", "")
            in_place = bool(_IN_PLACE.match(name)) or _asks_in_place(func, args, kwargs)
            if in_place and value._is_view():
                func(changed := value.clone(), *args[1:], **kwargs)
                return value.copy_(changed)
            if self._method == "deconvnet" and name in ("relu", "relu_"):
                return _Rectified.apply(value, in_place)
        return func(*args, **kwargs)


class _Rectified(torch.autograd.Function):
    """ReLU by the deconvnet's rule, which is also that of `_deconvnet`; a third of the memory's work."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, in_place: bool) -> torch.Tensor:
        if not in_place:
            return value.relu()
        ctx.mark_dirty(value)
        return value.relu_()

    @staticmethod
    def backward(ctx: Any, *signal: torch.Tensor) -> Any:
        return signal[0].clamp(min=0), None


def _asks_in_place(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call is one such as `F.relu(x, inplace=True)`."""
    code = getattr(func, "__code__", None)
    if code is None or "inplace" not in code.co_varnames[: code.co_argcount]:
        return False
    return bool(inspect.signature(func).bind(*args, **kwargs).arguments.get("inplace"))


def _nodes(output: Node) -> Iterator[Node]:
    """The graph from `output` back to the input, each node once."""
    seen, left = {output}, [output]
    while left:
        yield (node := left.pop())
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                left.append(following)


def _kind(node: Node) -> str:
    """The operation that a node is the gradient of: "Relu", "MaxPool2DWithIndices", ..."""
    return re.sub(r"Backward\d*$", "", node.name())


def _rectifies(node: Any) -> bool:
    """Whether a node is that of a rectifier; its first gradient is that of the rectified value."""
    match _kind(node):
        case "Relu":
            return True
        case "Threshold":
            return bool(node._saved_threshold == 0)
        case "Hardtanh":
            return bool(node._saved_min_val == 0)
        case "Clamp" | "ClampMin":
            # the bounds of clamp may be tensors, and then have gradients
            free = all(bound is None for bound, _ in node.next_functions[1:])
            return free and node._saved_min is not None and bool((torch.as_tensor(node._saved_min) == 0).all())
        case "Maximum":
            constants = [place for place, (operand, _) in enumerate(node.next_functions) if operand is None]
            values = [(node._saved_self, node._saved_other)[place] for place in constants]
            return len(values) == 1 and not bool(values[0].any())
    return False


def _undefined(node: Node) -> Iterator[str]:
    if isinstance(node, BackwardCFunction) and node.name() not in ("_WindowedBackward", "_RectifiedBackward"):
        yield f"{_kind(node)} (a custom function)"
    elif _ACTIVATION.match(kind := _kind(node)):
        yield kind


def _deconvnet(grad_inputs: tuple[Any, ...], grad_outputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """What leaves a rectifier, given the true gradients and the signal that arrives: its positive part."""
    signal = grad_outputs[0].clamp(min=0)
    return tuple(None if each is None else signal for each in grad_inputs)


def _guided(grad_outputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """What arrives at a rectifier, before the mask of the forward pass: the positive part of the signal."""
    return (grad_outputs[0].clamp(min=0),)


def _units(
    maps: torch.Tensor, index: torch.Tensor, channels: torch.Tensor, positions: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """What picks each winner's unit, or its whole map, out of maps [U, C, ...]."""
    if positions is None:
        return index, channels
    return index, channels, *(positions[:, axis] for axis in range(maps.ndim - 2))


@contextmanager
def _memory(images: torch.Tensor) -> Iterator[None]:
    """Says in a user's words that the memory does not suffice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_memory(error):
            raise
        raise MaxactError(_NO_MEMORY.format(len(images), *images.shape[2:])) from error


def share(images: Sequence[int] | NDArray[np.int64], batch: int, rounds: int = 8) -> list[NDArray[np.int64]]:
    """Deals winners out to calls of a projector: the winners [n] of each call.

    `images` [N] says which image each winner is on. A call has at most `batch` images and `rounds` winners on each.
    Images with equally many winners come together, because a call goes back through the network as many times, with
    all of its images, as its most popular image has winners.
    """
    images = np.asarray(images, np.int64)
    turns = _turn(images)
    calls = []
    for first in range(0, int(turns.max(initial=-1)) + 1, rounds):
        winners = np.flatnonzero((turns >= first) & (turns < first + rounds))
        _, own, counts = np.unique(images[winners], return_inverse=True, return_counts=True)
        order = np.lexsort((own, -counts[own]))  # the most popular image's first, each image's side by side
        number = np.cumsum(np.diff(own[order], prepend=-1) != 0) - 1  # of the image, in this order
        calls += np.split(winners[order], np.flatnonzero(np.diff(number // batch)) + 1)
    return calls


def _turn(images: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each winner how many before it are on the same image, [N] for [N]."""
    order = np.argsort(images, kind="stable")
    ordered = images[order]
    fresh = np.ones(len(images), np.bool_)
    fresh[1:] = ordered[1:] != ordered[:-1]
    numbers = np.arange(len(images))
    turns = np.empty(len(images), np.int64)
    turns[order] = numbers - np.maximum.accumulate(np.where(fresh, numbers, 0))
    return turns
