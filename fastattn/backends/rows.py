"""Rows and columns of tensors of any strides: how the backends' layer norm and softmax see them.

A tensor is walked where it lies when its rows are evenly spaced along at most three dimensions; any
other layout is copied first.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import Tensor


def rows_of(width: int, *tensors: Tensor | None) -> Any:
    """(rows along three dimensions, the tensors to read, their three strides): tensors of one
    shape, whose trailing ``width`` numbers make a row. The first is not None."""
    if _contiguous(tensors):
        rows = tensors[0].numel() // width  # type: ignore[union-attr]
        return (1, 1, rows), tensors, ((0, 0, width),) * len(tensors)
    shape = tuple(tensors[0].shape)  # type: ignore[union-attr]
    lead, size = len(shape), 1
    while size < width:
        lead -= 1
        size *= shape[lead]
    held = tuple(x if x is None or _dense(x, lead) else x.contiguous() for x in tensors)
    dims, merged = _merge(shape[:lead], [x.stride() for x in held if x is not None])
    if len(dims) > 3:
        return rows_of(width, *(None if x is None else x.contiguous() for x in held))
    found = iter(merged)
    return _pad(dims), held, tuple(None if x is None else next(found) for x in held)


def columns_of(dim: int, tensors: tuple[Tensor, ...], mask: Tensor | None = None) -> Any:
    """((n0, n1, n2, width, inner), the tensors to read, their strides, the mask's inner stride):
    tensors of one shape, seen as rows x width x inner columns. Strides are those of the three
    dimensions of rows and of ``dim``; columns are adjacent, in the mask (the last of the tensors,
    where there is one) adjacent or, for an inner stride of 0, one."""
    shape = tuple(tensors[0].shape)  # torch.Size is slow to slice
    width, inner = shape[dim], prod(shape[dim + 1 :])
    if mask is None and _contiguous(tensors):
        step = width * inner
        sizes = (1, 1, tensors[0].numel() // step, width, inner)
        return sizes, tensors, ((0, 0, step, inner),) * len(tensors), 1
    # Numbers that are neighbours in a row, or across columns, must be neighbours in memory.
    adjacent = dim if inner == 1 else dim + 1
    held = tuple(x if _dense(x, adjacent) else x.contiguous() for x in tensors)
    mask_inner = 1
    if mask is not None:
        if not any(
            s for n, s in zip(shape[dim + 1 :], mask.stride()[dim + 1 :], strict=True) if n > 1
        ):
            mask_inner = 0
        elif not _dense(mask, dim + 1):
            mask = mask.contiguous()
        held += (mask,)
    dims, merged = _merge(shape[:dim], [x.stride() for x in held])
    if len(dims) > 3:
        tensors = tuple(x.contiguous() for x in tensors)
        return columns_of(dim, tensors, None if mask is None else mask.contiguous())
    strides = tuple((*outer, x.stride(dim)) for x, outer in zip(held, merged, strict=True))
    return (*_pad(dims), width, inner), held, strides, mask_inner


def _contiguous(tensors: tuple[Tensor | None, ...]) -> bool:
    for x in tensors:  # noqa: SIM110 -- faster than all(), and runs at every call
        if x is not None and not x.is_contiguous():
            return False
    return True


def _dense(x: Tensor, lead: int) -> bool:
    """The dimensions from ``lead`` on are contiguous among themselves."""
    expected = 1
    for size, stride in zip(reversed(x.shape[lead:]), reversed(x.stride()[lead:]), strict=True):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _merge(
    sizes: Sequence[int], strides: list[tuple[int, ...]]
) -> tuple[list[int], list[tuple[int, ...]]]:
    """The fewest dimensions that walk every one of the tensors: neighbours are joined where all
    allow it. The strides come back as three numbers a tensor, when there are three at most."""
    dims: list[int] = []
    steps: list[list[int]] = []  # one for each dimension: a stride for each tensor
    for i, size in enumerate(sizes):
        if size == 1:
            continue
        step = [stride[i] for stride in strides]
        if dims and all(a == b * size for a, b in zip(steps[-1], step, strict=True)):
            dims[-1] *= size
            steps[-1] = step
        else:
            dims.append(size)
            steps.append(step)
    lead = [[0] * len(strides)] * (3 - len(dims))
    return dims, list(zip(*lead, *steps, strict=True))


def _pad(dims: list[int]) -> tuple[int, ...]:
    return (*(1,) * (3 - len(dims)), *dims)
