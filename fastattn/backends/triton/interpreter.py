"""Corrections of Triton's interpreter, without which its bfloat16 is wrong and says nothing.

The interpreter keeps bfloat16 as uint16 and, up to triton 3.9, computes with the bits as if they
were integers; it truncates where the hardware rounds; and it lets a NaN through ``tl.maximum``,
which drops it. It is slow beside: what costs two thirds of the time and changes no number is
corrected too. ``tests/interpreted/test_interpreter.py`` holds every one of these to torch, and
shows that it would notice if the correction were gone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as module
from triton.runtime.interpreter import (
    InterpretedFunction,
    InterpreterBuilder,
    ReduceOps,
    TensorHandle,
    _get_np_dtype,
    _ir,
)

_BEFORE: list[tuple[Any, str, Any]] = []  # what was replaced, to put it back
_PATCHED: list[Any] = []  # the same, kept by the interpreter, of triton.language


def correct() -> None:
    """Corrects the interpreter of this process, once."""
    if _BEFORE:
        return
    for owner, names in _CORRECTIONS.items():
        for name, replacement in names.items():
            _BEFORE.append((owner, name, owner.__dict__.get(name)))
            setattr(owner, name, replacement)


def undo() -> None:
    """The interpreter as it came: for the test of the tests."""
    while _PATCHED:
        _PATCHED.pop().restore()
    while _BEFORE:
        owner, name, member = _BEFORE.pop()
        if member is None:
            delattr(owner, name)
        else:
            setattr(owner, name, member)


# --------------------------------------------------------------------------------------- numbers


def widen_bf16(bits: np.ndarray) -> np.ndarray:
    """The numbers of bfloat16's bits as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow_to_bf16(x: np.ndarray, to_nearest: bool = True) -> np.ndarray:
    """The bits of bfloat16, rounded to nearest even; a NaN stays one."""
    with np.errstate(over="ignore", invalid="ignore"):
        x = np.ascontiguousarray(x, dtype=np.float32).reshape(np.shape(x))
    bits = x.view(np.uint32)
    if to_nearest:
        bits = bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)
    return np.where(np.isnan(x), 0x7FC0, bits >> 16).astype(np.uint16)


def round_to_tf32(x: np.ndarray) -> np.ndarray:
    """float32 with the 10 bits of mantissa that a tensor core reads; infinities and NaN stay."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + (0xFFF + ((bits >> 13) & 1)).astype(np.uint32)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(x), rounded.view(np.float32), x)


def _is_bf16(handle: TensorHandle) -> bool:
    """Not so what a comparison of bfloat16 returns: bools, under bfloat16's name."""
    return handle.data.dtype == np.uint16 and handle.dtype.scalar == tl.bfloat16


def _widened(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(widen_bf16(handle.data), tl.float32) if _is_bf16(handle) else handle


def _result(handle: TensorHandle) -> TensorHandle:
    """What was computed in float32, as bfloat16; a comparison as it is."""
    if handle.data.dtype == np.bool_:
        return TensorHandle(handle.data, tl.int1)
    return TensorHandle(narrow_to_bf16(handle.data), tl.bfloat16)


# ----------------------------------------------------------------------------------- corrections


def _elementwise(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """``original(self, *handles, op)`` in float32 where a handle is bfloat16."""

    def corrected(self: Any, *arguments: Any) -> TensorHandle:
        for x in arguments:  # a loop: this runs at every operation
            if isinstance(x, TensorHandle) and _is_bf16(x):
                break
        else:
            return original(self, *arguments)
        wide = (_widened(x) if isinstance(x, TensorHandle) else x for x in arguments)
        return _result(original(self, *wide))

    return corrected


def _cast(self: Any, src: TensorHandle, dst_type: Any, to_nearest: bool = True) -> TensorHandle:
    dst = dst_type.scalar
    data = _widened(src).data
    if dst == tl.bfloat16 and not _is_bf16(src):
        return TensorHandle(narrow_to_bf16(data, to_nearest), dst)
    with np.errstate(over="ignore", invalid="ignore"):
        return TensorHandle(
            src.data if src.dtype.scalar == dst else data.astype(_np_dtype(dst_type)), dst
        )


_fp_to_fp = InterpreterBuilder.create_fp_to_fp


def _cast_float(self: Any, src: TensorHandle, dst_type: Any, rounding: Any) -> TensorHandle:
    if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
        return _cast(self, src, dst_type, rounding != _ir.ROUNDING_MODE.RTZ)
    return _fp_to_fp(self, src, dst_type, rounding)


_dot = InterpreterBuilder.create_dot


def _dot_of(
    self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, precision: Any, most: Any
) -> TensorHandle:
    """A GPU sums along a row of a in one order, whatever the shapes; numpy's BLAS does not, so
    that q . k and k . q differ. Summed in float64 they are the same."""
    a, b = _widened(a), _widened(b)
    if a.data.dtype != np.float32 or d.data.dtype != np.float32:
        return _dot(self, a, b, d, precision, most)
    if precision == _ir.INPUT_PRECISION.TF32:
        a, b = (TensorHandle(round_to_tf32(x.data), tl.float32) for x in (a, b))
    with np.errstate(over="ignore", invalid="ignore"):
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
        return TensorHandle((product + d.data).astype(np.float32), d.dtype.scalar)


_sum, _min_max = ReduceOps.sum, ReduceOps.min_max


def _in_float32(original: Callable[..., Any]) -> Callable[..., Any]:
    """A reduction of bfloat16: in float32, its numbers rounded at the end."""

    def corrected(self: Any, input: Any, *rest: Any, **more: Any) -> Any:
        x = input[0] if isinstance(input, tuple) else input
        if not _is_bf16(x.handle):
            return original(self, input, *rest, **more)
        wide = self.to_tensor(widen_bf16(x.handle.data), tl.float32)
        found = original(self, wide, *rest, **more)

        def narrowed(y: Any) -> Any:
            if y.dtype != tl.float32:
                return y  # the index of the largest
            kind = tl.block_type(tl.bfloat16, y.type.shape) if y.type.is_block() else tl.bfloat16
            return tl.tensor(TensorHandle(narrow_to_bf16(y.handle.data), tl.bfloat16), kind)

        return tuple(map(narrowed, found)) if isinstance(found, tuple) else narrowed(found)

    return corrected


def _with_ufunc(ufunc: Any) -> Callable[..., TensorHandle]:
    return lambda self, a, b: self.binary_op(a, b, ufunc)


_patch_tensor = module._patch_lang_tensor


def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
    """With numbers that ``range`` takes: triton 3.6 makes them in a way that numpy 2.4 refuses."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


# ------------------------------------------------------------- what is slow, and changes no number

_patch_lang = module._patch_lang


def _patch_lang_once(fn: Any) -> Any:
    """The interpreter looks through all of triton.language at every call of a device function, to
    replace what it has replaced before: a third of its time."""
    if not _PATCHED:
        everything = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
        _PATCHED.append(_patch_lang(everything))
    return module._LangPatchScope()  # of no changes, so that nothing is put back after a launch


# Every sum and product of integers was made once more in 64 bits, for an assertion that only debug
# mode has: two fifths of the time.
_WITHOUT_DEBUG = dataclasses.replace(module.interpreter_builder.options, sanitize_overflow=False)


_NP_DTYPES: dict[str, np.dtype] = {}


def _np_dtype(kind: Any) -> np.dtype:
    """The original makes its table of types anew at every call."""
    kind = kind.element_ty if isinstance(kind, tl.block_type) else kind
    found = _NP_DTYPES.get(kind.name)
    if found is None:
        found = _NP_DTYPES[kind.name] = _get_np_dtype(kind)
    return found


_make_block_type, _make_tensor = tl.block_type.__init__, tl.tensor.__init__
_BLOCK_TYPES: dict[tuple[Any, ...], dict[str, Any]] = {}
_SHAPES: dict[tuple[int, ...], tuple[Any, Any]] = {}


def _block_type(self: Any, element_ty: Any, shape: Any) -> None:
    """A type is made for every result; the same one, once it has been."""
    key = (element_ty.name, *(getattr(n, "value", n) for n in shape))
    found = _BLOCK_TYPES.get(key)
    if found is None:
        _make_block_type(self, element_ty, shape)
        _BLOCK_TYPES[key] = dict(vars(self))
    else:
        vars(self).update(found, element_ty=element_ty)


def _tensor(self: Any, handle: Any, type: Any) -> None:
    """The same of a tensor's shape."""
    key = tuple(type.shape) if type.is_block() else ()
    found = _SHAPES.get(key)
    if found is None:
        _make_tensor(self, handle, type)
        _SHAPES[key] = self.shape, self.numel
    else:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = found


_run = InterpretedFunction.run


def _run_quietly(self: Any, *arguments: Any, **keywords: Any) -> Any:
    """Infinities and NaN are what kernels compute with, nothing for numpy to warn of."""
    with np.errstate(all="ignore"):
        return _run(self, *arguments, **keywords)


_CORRECTIONS: dict[Any, dict[str, Any]] = {
    InterpreterBuilder: {
        "binary_op": _elementwise(InterpreterBuilder.binary_op),
        "unary_op": _elementwise(InterpreterBuilder.unary_op),
        "create_clampf": _elementwise(InterpreterBuilder.create_clampf),
        "create_fma": _elementwise(InterpreterBuilder.create_fma),
        "create_rsqrt": _elementwise(InterpreterBuilder.create_rsqrt),
        "create_maxnumf": _with_ufunc(np.fmax),  # a number, where one of two is NaN
        "create_minnumf": _with_ufunc(np.fmin),
        "cast_impl": _cast,
        "create_fp_to_fp": _cast_float,
        "create_dot": _dot_of,
        "get_bf16": lambda self, x: TensorHandle(narrow_to_bf16(np.array([x])), tl.bfloat16),
    },
    module: {
        "_patch_lang_tensor": _patch_lang_tensor,
        "_patch_lang": _patch_lang_once,
        "_get_np_dtype": _np_dtype,
    },
    module.interpreter_builder: {"options": _WITHOUT_DEBUG},
    tl.block_type: {"__init__": _block_type},
    tl.tensor: {"__init__": _tensor},
    InterpretedFunction: {"run": _run_quietly},
    ReduceOps: {"sum": _in_float32(_sum), "min_max": _in_float32(_min_max)},
}
