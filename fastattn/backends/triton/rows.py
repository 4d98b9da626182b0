"""What the kernels of layer norm and softmax share: where rows begin."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl  # noqa: F401  # the interpreter looks for it
from torch import Tensor

from .kernel import Launch
from .philox import threshold


class Sizes(NamedTuple):
    """How many rows there are, and in the inner two of their three dimensions; None, where rows of
    every tensor are evenly spaced: then nothing is divided at run time."""

    rows: Any
    middle: Any
    inner: Any

    @classmethod
    def of(cls, sizes: Any) -> Sizes:
        n0, n1, n2 = sizes[:3]
        return cls(n2, None, None) if n0 == n1 == 1 else cls(n0 * n1 * n2, n1, n2)


class Rows(NamedTuple):
    """A tensor whose rows lie along up to three dimensions, as a kernel walks it. Strides count
    elements; where rows are evenly spaced, there is but the last.

    None stands for a whole tensor that is not there, never for a field: triton 3.6 could not tell.
    """

    ptr: Any
    outer: Any
    middle: Any
    stride: Any

    @classmethod
    def of(cls, x: Tensor | None, strides: tuple[int, ...] | None) -> Rows | None:
        return None if x is None or strides is None else cls(x, *strides)


class Lines(NamedTuple):
    """The same for softmax: ``along`` walks a line's numbers, ``across`` the lines of a row."""

    ptr: Any
    outer: Any
    middle: Any
    stride: Any
    along: Any
    across: Any

    @classmethod
    def of(cls, x: Tensor, strides: tuple[int, ...], across: int) -> Lines:
        outer, middle, stride, along = strides
        return cls(x, outer, middle, stride, along, across)

    @classmethod
    def contiguous(cls, x: Tensor, sizes: Any) -> Lines:
        _, n1, n2, width, inner = sizes
        step = width * inner
        return cls(x, n1 * n2 * step, n2 * step, step, inner, 1)


class Dropout(NamedTuple):
    seed: Any  # the tensor
    threshold: Any
    scale: Any  # of what is kept

    @classmethod
    def of(cls, p: float, seed: Tensor | None) -> Dropout | None:
        if p == 0.0 or seed is None:
            return None
        return cls(seed, threshold(p), 0.0 if p >= 1 else 1 / (1 - p))


@triton.jit
def row_address(x, row, sizes):
    """The addresses (R,) of the beginnings of rows (R,), which are int64."""
    if sizes.middle is None:
        return x.ptr + row * x.stride
    else:
        plane = row // sizes.inner
        at = plane // sizes.middle * x.outer + plane % sizes.middle * x.middle
        return x.ptr + at + row % sizes.inner * x.stride


def contiguous_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)


def launch_of(
    kernel: Any, grid: tuple[int, ...], given: dict[str, Any], tile: dict[str, Any], warps: int
) -> Launch:
    """A launch of ``kernel`` with those of the ``given`` arguments that it takes, in its order."""
    arguments = {name: given[name] for name in kernel.arg_names if name not in tile}
    return Launch(kernel, grid, arguments, tile, warps)
