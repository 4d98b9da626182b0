"""The sanitizer finds what it is for, and nothing in a sound kernel."""

from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from sanitizer import sanitized


@pytest.fixture(autouse=True)
def watched():
    """Not by the one that watches all other tests."""


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, BUG: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if BUG == "twice":
        at = tl.arange(0, BLOCK)
    inside = at < n
    if BUG == "load":
        x = tl.load(x_ptr + at)
    elif BUG == "before":
        x = tl.load(x_ptr + at - 1, mask=inside)
    else:
        x = tl.load(x_ptr + at, mask=inside)
    if BUG == "store":
        tl.store(y_ptr + at, x, mask=at < n + 1)
    else:
        tl.store(y_ptr + at, x, mask=inside)


def run(bug):
    whole = torch.zeros(200)
    x, y = whole[50:150], torch.zeros(100)
    with sanitized():
        copy_kernel[(2,)](x, y, 100, bug, 64)


def test_a_sound_kernel_passes():
    run("")


FINDINGS = {  # bug: the line of the kernel, and what is said of it
    "load": ("tl.load(x_ptr + at)", "load out of bounds, program (1, 0, 0), lane (36,): 0 bytes after x_ptr"),
    "before": ("at - 1", "load out of bounds, program (0, 0, 0), lane (0,): 4 bytes before x_ptr"),
    "store": ("n + 1", "store out of bounds, program (1, 0, 0), lane (36,): 0 bytes after y_ptr"),
    "twice": ("tl.store(y_ptr + at, x, mask=inside)", "programs (0, 0, 0) and (1, 0, 0) write the same address"),
}  # fmt: skip


@pytest.mark.parametrize("bug", FINDINGS)
def test_finds(bug):
    code, finding = FINDINGS[bug]
    source = Path(__file__).read_text().splitlines()
    line = next(i for i, text in enumerate(source, start=1) if code in text)
    with pytest.raises((AssertionError, triton.runtime.errors.InterpreterError)) as error:
        run(bug)
    assert f"copy_kernel, line {line}: {finding}" in str(error.value)


def test_tensors_within_tuples_are_known():
    from fastattn import layer_norm

    x = torch.randn(3, 5, 40).transpose(0, 1)
    with sanitized():
        layer_norm(x, (40,), backend="triton")


def test_undone_afterwards():
    copy_kernel[(2,)](torch.zeros(128), torch.zeros(128), 128, "twice", 64)
