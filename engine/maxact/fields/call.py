"""One operation as a network runs it: its name, its arguments by name, and what is known of them."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from maxact.fields.intervals import Reach

# elementwise, though torch does not mark them so
ELEMENTWISE = {"hardswish", "_to_copy", "copy", "prelu", "_prelu_kernel", "native_dropout", "lift_fresh", "bernoulli"}


class Unknown(Exception):
    """A rule does not cover this call."""


class Call:
    """One operation as it is run: its arguments by name, and what is known of them."""

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], operands: dict[int, Reach]) -> None:
        self.func, self.args, self.kwargs, self.operands = func, args, kwargs, operands
        schema = func._schema
        self.given: dict[str, Any] = {
            each.name: each.default_value for each in schema.arguments if each.has_default_value()
        }
        self.given |= {each.name: value for each, value in zip(schema.arguments, args, strict=False)} | kwargs
        writes = [each.name for each in schema.arguments if each.alias_info is not None and each.alias_info.is_write]
        self.written: list[torch.Tensor] = [
            leaf for name in writes for leaf in tree_leaves(self.given.get(name)) if isinstance(leaf, torch.Tensor)
        ]
        name = schema.name.split("::")[-1]
        self.name: str = name[:-1] if name.endswith("_") and not name.startswith("__") and self.written else name
        if not schema.name.startswith("aten::"):
            self.name = schema.name
        self.results: list[torch.Tensor] = []

    @property
    def is_elementwise(self) -> bool:
        return torch.Tag.pointwise in self.func.tags or self.name in ELEMENTWISE

    @property
    def is_turning(self) -> bool:
        """Whether it changes the shape of a tensor in place, and no values."""
        return torch.Tag.inplace_view in self.func.tags

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, torch.Tensor)]

    @property
    def reaches(self) -> list[Reach]:
        return list(self.operands.values())

    def reach(self, name: str) -> Reach | None:
        return self.operands.get(id(self.given.get(name)))

    def only(self, name: str) -> Reach:
        """The reach of an argument, where no other argument depends on the image."""
        reach = self.reach(name)
        if reach is None or len(self.operands) > 1:
            raise Unknown
        return reach
