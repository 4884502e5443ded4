"""Follows one forward pass and knows for every tensor in it which input pixels its elements can depend on.

`Flow` sees every operation that the network really runs, below modules, functions and methods (aten operations, by a
TorchDispatchMode), and applies the rule for it from `RULES`. What no rule covers counts as depending on everything
that its operands depend on, and is named once in the log: too large a field, never too small a one.

Values are real, but zeros: constants (an index, a mask) keep their meaning, and what is expensive is not computed.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from maxact.fields import intervals as iv
from maxact.fields.call import Call, Unknown
from maxact.fields.intervals import NONE, Reach
from maxact.fields.rules import RULES, elementwise, view

log = logging.getLogger("maxact")

_SKIPPED = {"convolution", "mm", "addmm", "bmm", "baddbmm"}  # only the shape of what they give is worked out
_LEAVING = {"numpy", "tolist", "__array__", "__dlpack__", "data_ptr"}  # values go where they cannot be followed


class Flow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context in which the reach of every tensor that depends on `image` is known.

    flow = Flow(image)
    with flow.leaving, flow:
        output = network(image)
    flow.reach(output)
    """

    def __init__(self, image: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.leaked: list[Reach] = []  # what left for Python: from then on everything may depend on it
        self.leaving = _Leaving(self)
        self._known: dict[int, list[weakref.ref[torch.Tensor]]] = {}  # storage -> tensors on it whose reach is known
        self._shared: dict[int, _Storage] = {}
        self._named: set[str] = set()
        self._origin = iv.pixels(image.shape)
        self._attach(image, self._origin)

    def reach(self, tensor: torch.Tensor) -> Reach | None:
        """What the present values of a tensor depend on; None where it is a constant."""
        key = _key(tensor)
        if (shared := self._shared.get(key)) is not None:
            return shared.read(tensor)
        found: Reach | None = getattr(tensor, "_maxact_reach", None)
        if found is None and (aliases := self._aliases(key)):  # `.data`, for one, makes a tensor behind our back
            return self._share(tensor, aliases).read(tensor)
        return found

    def leak(self, tensors: Sequence[torch.Tensor], how: str) -> None:
        """Values become Python's, and from then on anything can depend on them."""
        if reaches := [reach for tensor in tensors if (reach := self.reach(tensor)) is not None]:
            self._name(how, "the network reads values of the image with it")
            self.leaked.append(iv.everything((), [*reaches, *self.leaked]))

    def _name(self, what: str, why: str) -> None:
        if what not in self._named:
            self._named.add(what)
            log.warning("fields: %s: %s; fields that depend on it may be shown too large", what, why)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        operands = {
            id(leaf): reach
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, torch.Tensor) and (reach := self.reach(leaf)) is not None
        }
        if not operands and not self.leaked:
            return func(*args, **kwargs)
        call = Call(func, args, kwargs, operands)
        if call.name in _SKIPPED and not call.written:
            result = func(*tree_map(_on_meta, args), **tree_map(_on_meta, kwargs))
            result = torch.zeros_like(result, device=call.tensors[0].device)
        elif call.name not in RULES and not call.is_elementwise and not func.is_view and not call.written:
            # one that torch can put together from others
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
            result = func(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        if call.name == "_local_scalar_dense":
            self.leak(call.tensors, "item()")
            return result
        call.results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        reaches = self._follow(call)
        if self.leaked:
            reaches = [
                iv.union(leaf.shape, [*filter(None, [reach]), *self.leaked])
                for leaf, reach in zip(call.results, reaches, strict=True)
            ]
        changed = {id(tensor): tensor for tensor in call.written}
        for tensor, reach in zip(call.results, reaches, strict=True):
            if changed.pop(id(tensor), None) is not None and not call.is_turning:
                self._write(tensor, reach)
            elif reach is not None:
                self._attach(tensor, reach)
        for tensor in changed.values():  # an operation that gives nothing back
            self._write(tensor, iv.everything(tensor.shape, [*call.reaches, *self.leaked]))
        return result

    def _follow(self, call: Call) -> list[Reach | None]:
        if not call.reaches:
            return [None] * len(call.results)
        if call.name == "as_strided":
            return [self._strided(call)]
        try:
            if call.func.is_view or call.is_turning:
                return list(view(call))
            if call.name in RULES:
                return list(RULES[call.name](call))
            if call.is_elementwise:
                return list(elementwise(call))
            why = "no rule for this operation"
        except Unknown:
            why = "no rule for this way of calling it"
        except Exception as error:  # a mistake in a rule must not stop a run: the larger field is right too
            why = f"its rule failed with {type(error).__name__}: {error}"
        self._name(str(call.func), why)
        return [iv.everything(leaf.shape, call.reaches) for leaf in call.results]

    def _attach(self, tensor: torch.Tensor, reach: Reach) -> None:
        assert tuple(tensor.shape) == reach.shape, (tensor.shape, reach.shape)
        tensor._maxact_reach = reach  # type: ignore[attr-defined]
        known = [ref for ref in self._known.get(_key(tensor), ()) if ref() is not None and ref() is not tensor]
        self._known[_key(tensor)] = [*known, weakref.ref(tensor)]

    def _aliases(self, key: int) -> list[torch.Tensor]:
        return [tensor for ref in self._known.get(key, ()) if (tensor := ref()) is not None]

    def _write(self, tensor: torch.Tensor, reach: Reach | None) -> None:
        """New values in the memory of `tensor`, which other tensors may share."""
        key = _key(tensor)
        before = self.reach(tensor)
        if before is reach or (before is not None and reach is not None and before.same(reach)):
            return
        aliases = self._aliases(key)
        # the usual rectifier in place; where a constant is written to, other tensors on its memory are not known
        whole = before is not None and tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
        if key not in self._shared and whole and all(alias is tensor for alias in aliases):
            if reach is None:
                del tensor._maxact_reach  # type: ignore[attr-defined]
                del self._known[key]
            else:
                self._attach(tensor, reach)
            return
        self._share(tensor, aliases).write(tensor, reach)

    def _share(self, tensor: torch.Tensor, aliases: Sequence[torch.Tensor]) -> _Storage:
        key = _key(tensor)
        if key not in self._shared:
            self._shared[key] = _Storage(tensor, self._origin)
            for alias in sorted(aliases, key=torch.Tensor.numel):
                self._shared[key].write(alias, alias._maxact_reach)  # type: ignore[attr-defined]
        return self._shared[key]

    def _strided(self, call: Call) -> Reach | None:
        source, result = call.args[0], call.results[0]
        reach = call.operands[id(source)]
        if result.shape == reach.shape:
            sizes = zip(result.shape, result.stride(), source.stride(), strict=True)
            if result is source or all(size == 1 or new == old for size, new, old in sizes):
                return reach
        return self._share(source, self._aliases(_key(source))).read(result)


class _Leaving(TorchFunctionMode):
    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self._flow = flow

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in _LEAVING:
            self._flow.leak([arg for arg in args if isinstance(arg, torch.Tensor)], f"{func.__name__}()")
        return func(*args, **(kwargs or {}))


class _Storage:
    """What every element of a memory depends on, for tensors that share it and are changed in place."""

    def __init__(self, tensor: torch.Tensor, origin: Reach) -> None:
        self._memory = tensor.untyped_storage()  # kept, so that no other tensor gets the same address
        self._origin = origin
        size = self._memory.nbytes() // tensor.element_size()
        self._planes = torch.full((2, 6, size), NONE, dtype=torch.float64)
        self._step = (1, 1)

    def _like(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._planes.as_strided(
            (2, 6, *tensor.shape), (*self._planes.stride()[:2], *tensor.stride()), tensor.storage_offset()
        )

    def write(self, tensor: torch.Tensor, reach: Reach | None) -> None:
        place = self._like(tensor)
        if reach is None:
            place.fill_(NONE)
            return
        for axis in range(2):
            place[axis] = reach.expanded(axis)
        self._step = (math.lcm(self._step[0], reach.step[0]), math.lcm(self._step[1], reach.step[1]))

    def read(self, tensor: torch.Tensor) -> Reach | None:
        rows, columns = (iv.compact(planes.clone()) for planes in self._like(tensor))
        if bool((rows == NONE).all()):
            return None
        return iv.spaced(Reach(tuple(tensor.shape), self._origin.image, (rows, columns), (), self._step))


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _on_meta(leaf: Any) -> Any:
    return leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf
