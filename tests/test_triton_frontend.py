"""Every launch that the case table leads to passes Triton's front end, which the interpreter does not
have: types that change in a loop, what a kernel cannot return. ``kernel_table`` compiles a choice of
them to the end.
"""

from importlib.util import find_spec

import pytest
import torch

from fastattn.backends.triton import INTERPRETED
from fastattn.cases import CASES

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(INTERPRETED, reason="this process interprets"),
    pytest.mark.slow,
]
SEEN = set()  # front ends that have passed, by everything that they depend on


def front_end(variant):
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend

    key = repr((variant.function.__name__, variant.signature, variant.constants))
    if key in SEEN:
        return
    target = GPUTarget("cuda", 90, 32)
    backend = make_backend(target)
    options = backend.parse_options({"num_warps": variant.num_warps})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = ASTSource(variant.function, variant.signature, variant.constants, variant.attributes)
    module = source.make_ir(
        target,
        options,
        backend.get_codegen_implementation(options),
        backend.get_module_map(),
        context,
    )
    assert module.verify()
    SEEN.add(key)


@pytest.fixture
def launches(monkeypatch):
    """What would be launched on a GPU, from tensors of the CPU."""
    from fastattn.backends import triton
    from fastattn.backends.triton import kernel

    found = []
    monkeypatch.setattr(kernel.Launch, "run", lambda self: found.append(self.variant("")))
    monkeypatch.setattr(triton.TritonBackend, "unavailable", lambda self: None)
    monkeypatch.setattr(triton.TritonBackend, "reasons", lambda self, request: [])
    for name in ("attention_forward", "attention_backward", "layer_norm", "softmax"):
        module = triton._module(name)
        monkeypatch.setattr(module, "architecture", lambda device: "sm_90")
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_front_end(case, launches):
    for dtype in (torch.bfloat16, torch.float32):
        case = case.with_dtype(dtype)
        inputs = case.make_inputs(requires_grad=True)
        outputs = case.run(inputs, "triton")
        leaves = [x for x in inputs.values() if x.requires_grad]
        torch.autograd.grad(outputs, leaves, [torch.zeros_like(y) for y in outputs])
    assert launches
    for variant in launches:
        front_end(variant)
