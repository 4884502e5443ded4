"""One run of a network, watched: which module ran, and where its output went."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


@dataclass(eq=False)
class Call:
    """One call of a module: the `number`-th of the module at `path`, counted from 0, and its output.

    `consumers` are the calls that took the output as an input, in order; None stands for an operation that is not
    a module. `visible` is false where the output never leaves a module as such, so that a hook cannot see it.
    """

    path: str
    module: nn.Module
    number: int
    output: Any = None
    consumers: list[Call | None] = field(default_factory=list)
    visible: bool = True


def trace(network: nn.Module, run: Callable[[], object]) -> list[Call]:
    """Runs `network` once, by `run`, and gives the calls of all its modules, in the order in which they ended."""
    tracer = _Tracer()
    with torch.no_grad(), ExitStack() as stack:
        for path, module in network.named_modules():
            if path:
                stack.enter_context(_watched(module, path, tracer))
        with tracer:
            run()
    return tracer.calls


@contextmanager
def _watched(module: nn.Module, path: str, tracer: _Tracer) -> Iterator[None]:
    before = module.register_forward_pre_hook(
        lambda module, args, kwargs: tracer.enter(path, module, (args, kwargs)), with_kwargs=True
    )
    after = module.register_forward_hook(lambda module, args, output: tracer.leave(output))
    try:
        yield
    finally:
        before.remove()
        after.remove()


class _Tracer(TorchFunctionMode):
    """Follows values through modules, and through torch functions called outside them.

    A value belongs to the call that made it; a tensor that is changed in place is a new value in the same object.
    What happens inside a module without children, a convolution or a linear layer is that module's own business.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._stack: list[Call] = []
        self._numbers: dict[str, int] = {}
        self._makers: dict[int, Call | None] = {}  # id of a tensor -> the call that made its present value
        self._alive: list[torch.Tensor] = []  # an id is only good for as long as its tensor lives

    def enter(self, path: str, module: nn.Module, inputs: Any) -> None:
        number = self._numbers.get(path, 0)
        self._numbers[path] = number + 1
        call = Call(path, module, number)
        if not self._inside_atom() and _is_atom(module):
            self._consume(inputs, call)
        self._stack.append(call)

    def leave(self, output: Any) -> None:
        call = self._stack.pop()
        call.output = output
        self.calls.append(call)
        if not self._inside_atom() and _is_atom(call.module):
            self._make(output, call)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # a function that gives no tensor asked for a shape or a type, which takes nothing from the value
        if not self._inside_atom() and any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(result)):
            within = self._stack[-1] if self._stack else None
            norm = within if within and "norm" in type(within.module).__name__.lower() else None
            # a normalisation that has children (its activation) computes its own part with a function
            maker = Call(norm.path, norm.module, norm.number, result, visible=False) if norm else None
            self._consume((args, kwargs), maker)
            self._make(result, maker)
        return result

    def _inside_atom(self) -> bool:
        return any(_is_atom(call.module) for call in self._stack)

    def _consume(self, inputs: Any, consumer: Call | None) -> None:
        for leaf in tree_leaves(inputs):
            if isinstance(leaf, torch.Tensor) and (maker := self._makers.get(id(leaf))) is not None:
                maker.consumers.append(consumer)

    def _make(self, outputs: Any, maker: Call | None) -> None:
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, torch.Tensor):
                self._makers[id(leaf)] = maker
                self._alive.append(leaf)


def _is_atom(module: nn.Module) -> bool:
    layers = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Linear)
    return isinstance(module, layers) or next(module.children(), None) is None
