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


@pytest.mark.parametrize("bias_shape", [(70_000, 2, 40, 50), (1, 1, 40, 50), (70_000, 2, 1, 50)])
def test_more_heads_than_a_grid_has_rows(bias_shape):
    """CUDA takes 65,535 programs in all dimensions of a grid but the first."""
    from fastattn.backends.base import AttentionCall
    from fastattn.backends.triton import attention_backward, attention_forward

    with torch.device("meta"):
        q = torch.empty(70_000, 2, 40, 16, dtype=torch.bfloat16)
        k = torch.empty(70_000, 1, 50, 16, dtype=torch.bfloat16)
        bias, lse = torch.empty(bias_shape, dtype=q.dtype), torch.empty(70_000, 2, 40)
    call = AttentionCall(
        q, k, k, bias.expand(70_000, 2, 40, 50), None, None, None, 0.25, 0.0, -1, -1, 0, 0.0
    )
    decode = call._replace(q=q[:, :, :1], bias=bias[:, :, :1].expand(70_000, 2, 1, 50))
    needs = (True, True, True, True, False)
    launches = [
        *attention_forward.forward_launches(call, q, lse, "sm_90"),
        *attention_forward.forward_launches(decode, decode.q, lse[:, :, :1], "sm_90"),
        *attention_backward.BackwardPlan(call, q, None, q, lse, needs, "sm_90").launches,
    ]
    for launch in launches:
        assert all(n <= 65_535 for n in launch.grid[1:]), launch.function
