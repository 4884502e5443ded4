"""Three instructions of the processor that numba has no function for, for use inside kernels."""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

_BYTE, _INT32 = ir.IntType(8).as_pointer(), ir.IntType(32)


def _prefetch(typing: Any, array: Any, index: Any) -> Any:
    """`prefetch(array, index)`: starts to fetch a place of a contiguous array [N]; it need not be inside of it."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = builder.gep(context.make_array(array)(context, builder, values[0]).data, [values[1]])
        kind = ir.FunctionType(ir.VoidType(), [_BYTE, _INT32, _INT32, _INT32])
        function = builder.module.declare_intrinsic("llvm.prefetch", [_BYTE], kind)
        read, keep, data = (ir.Constant(_INT32, value) for value in (0, 3, 1))
        builder.call(function, [builder.bitcast(place, _BYTE), read, keep, data])
        return context.get_dummy_value()

    return types.void(array, index), emit


def _take(typing: Any, counter: Any) -> Any:
    """`take(counter)`: the number in a counter int64 [1], which goes up by one; no two threads get the same."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = context.make_array(counter)(context, builder, values[0]).data
        return builder.atomic_rmw("add", place, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), emit


def _widen(typing: Any, value: Any) -> Any:
    """`widen(value)`: a float32 as it is, or the float32 that the 16 bits of a bfloat16 (as uint16) stand for."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        if value == types.float32:
            return values[0]
        bits = builder.shl(builder.zext(values[0], _INT32), ir.Constant(_INT32, 16))
        return builder.bitcast(bits, ir.FloatType())

    return (types.float32(value), emit) if value in (types.float32, types.uint16) else None


# what numba gives takes one argument fewer than the function that it was made of
prefetch: Any = intrinsic(_prefetch)
take: Any = intrinsic(_take)
widen: Any = intrinsic(_widen)
