"""Watches the interpreter's loads and stores: lanes that leave the tensors of their launch, and two
programs that write one address. On a GPU neither need show."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import triton
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, _get_np_dtype

_TRITON = str(Path(triton.__file__).parent)


class Launch:
    """One launch: where its tensors lie, and who has written what."""

    def __init__(self, kernel: str, arguments: dict[str, Any]) -> None:
        self.kernel = kernel
        self.tensors = list(_tensors(arguments))  # (name, first byte, byte after the last)
        self.writes: list[tuple[tuple[int, ...], int, np.ndarray]] = []  # program, line, addresses

    def check(self, what: str, program: Any, ptrs: Any, mask: Any, size: int) -> None:
        address, mask = np.broadcast_arrays(ptrs.data, mask.data)
        active = address[mask]
        inside = self._inside(active, size)
        if not inside.all():
            lane = tuple(int(i) for i in np.argwhere(mask)[np.argmin(inside)])
            near = int(active[np.argmin(inside)])
            name, begin, end = min(self.tensors, key=lambda t: max(t[1] - near, near - t[2]))
            where = f"{begin - near} bytes before" if near < begin else f"{near - end} bytes after"
            raise AssertionError(
                f"{self.kernel}, line {_line()}: {what} out of bounds, program {program}, "
                f"lane {lane}: {where} {name}"
            )
        if what == "store":
            self.writes.append((program, _line(), active))

    def _inside(self, active: np.ndarray, size: int) -> Any:
        """Which accesses lie in a tensor; seen at once where one of them has the first and last."""
        if active.size:
            first, last = int(active.min()), int(active.max()) + size
            if any(begin <= first and last <= end for _, begin, end in self.tensors):
                return np.True_
        inside = np.zeros(active.shape, dtype=bool)
        for _, begin, end in self.tensors:
            inside |= (active >= begin) & (active + np.uint64(size) <= end)
        return inside

    def check_writes(self) -> None:
        if len({program for program, _, _ in self.writes}) < 2:
            return
        address = np.concatenate([active for _, _, active in self.writes])
        store = np.repeat(np.arange(len(self.writes)), [len(a) for _, _, a in self.writes])
        programs = {p: i for i, p in enumerate(dict.fromkeys(p for p, _, _ in self.writes))}
        number = np.array([programs[p] for p, _, _ in self.writes])[store]
        order = np.lexsort((number, address))
        address, store, number = address[order], store[order], number[order]
        twice = np.flatnonzero((address[1:] == address[:-1]) & (number[1:] != number[:-1]))
        if len(twice):
            (one, line, _), (other, _, _) = (self.writes[store[twice[0] + i]] for i in (0, 1))
            raise AssertionError(
                f"{self.kernel}, line {line}: programs {one} and {other} write the same address"
            )


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, int, int]]:
    if isinstance(value, dict):
        for key, x in value.items():
            yield from _tensors(x, key)
    elif isinstance(value, tuple):
        for key, x in zip(getattr(value, "_fields", range(len(value))), value, strict=True):
            yield from _tensors(x, f"{name}.{key}")
    elif hasattr(value, "base") and hasattr(value, "block_shape"):
        yield from _tensors(value.base, name)
    elif isinstance(value, Tensor) and value.numel():
        last = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
        begin = value.data_ptr()
        yield name, begin, begin + (last + 1) * value.element_size()


def _line() -> int:
    """Of the kernel's source that is being run."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename.startswith((_TRITON, __file__)) and frame.f_back:
        frame = frame.f_back
    return frame.f_lineno


@contextlib.contextmanager
def sanitized() -> Iterator[None]:
    """Every launch within is watched; an AssertionError names kernel, line, program and lane."""
    launch: list[Launch] = []  # the one that runs
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    run = GridExecutor.__call__

    def checked_load(self: Any, ptrs: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        size = _get_np_dtype(ptrs.get_element_ty()).itemsize
        launch[-1].check("load", self.grid_idx, ptrs, mask, size)
        return load(self, ptrs, mask, *rest, **named)

    def checked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        launch[-1].check("store", self.grid_idx, ptrs, mask, value.data.itemsize)
        return store(self, ptrs, value, mask, *rest, **named)

    def watched(self: Any, *args: Any, **kwargs: Any) -> None:
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        launch.append(Launch(self.fn.__name__, arguments))
        try:
            run(self, *args, **kwargs)
            launch[-1].check_writes()
        finally:
            launch.pop()

    InterpreterBuilder.create_masked_load = checked_load
    InterpreterBuilder.create_masked_store = checked_store
    GridExecutor.__call__ = watched
    try:
        yield
    finally:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store
        GridExecutor.__call__ = run
