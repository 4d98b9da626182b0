"""torch.library, torch.compile, torch.export, fake and meta tensors, and functorch."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

import fastattn

OPS = torch.ops.fastattn


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def leaves(*shapes, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g, dtype=dtype).requires_grad_() for s in shapes]


def detached(arguments):
    return tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments)


# ----------------------------------------------------------------------------------------- opcheck

SEED = torch.tensor(1234567890123456789)


def attention_arguments(variant, backend):
    q, k, v, bias, sinks = leaves((2, 4, 6, 8), (2, 2, 7, 8), (2, 2, 7, 5), (4, 1, 7), (4,))
    if variant == "plain":
        return q, k, v, None, None, None, None, 0.3, 0.0, -1, -1, 1, 0.0, backend
    if variant == "layout":  # (B, S, H, D) in memory
        q = q.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        return q, k, v, None, None, None, None, 0.3, 0.0, -1, 0, 1, 0.0, backend
    return q, k, v, bias, torch.rand(4), sinks, SEED, 0.3, 2.0, 3, 0, 1, 0.1, backend


def test_opcheck_attention_forward(backend):
    opcheck(OPS.attention_forward.default, detached(attention_arguments("plain", backend)))
    opcheck(OPS.attention_forward.default, attention_arguments("layout", backend))
    opcheck(OPS.attention_forward.default, attention_arguments("all", backend))


def test_opcheck_attention_backward(backend):
    arguments = attention_arguments("all", backend)
    out, lse, low = (x.detach() for x in OPS.attention_forward(*arguments))
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    opcheck(OPS.attention_backward.default, (dout, dlse, out, lse, low, [True] * 5, *arguments))
    few = [False, True, False, False, True]
    opcheck(OPS.attention_backward.default, (dout, None, out, lse, low, few, *detached(arguments)))


@pytest.mark.parametrize("variant", ["layer", "rms", "add"])
def test_opcheck_layer_norm(backend, variant):
    x, residual, weight, bias = leaves((3, 4, 8), (3, 4, 8), (8,), (8,))
    arguments = {
        "layer": (x, None, weight, bias, None, 8, 1e-5, False, 0.0, backend),
        "rms": (x, None, weight, None, None, 8, 1e-5, True, 0.0, backend),
        "add": (x, residual, weight, bias, SEED, 8, 1e-5, False, 0.1, backend),
    }[variant]
    opcheck(OPS.layer_norm_forward.default, arguments)
    y, new_residual, mean, rstd = (t.detach() for t in OPS.layer_norm_forward(*arguments))
    add = variant == "add"
    source = (new_residual if add else x.detach()).requires_grad_()
    needs = [True, add, True, variant != "rms"]
    dnew = torch.randn_like(y) if add else None
    backward = (torch.randn_like(y), dnew, source, mean, rstd, needs, add, *arguments[2:])
    opcheck(OPS.layer_norm_backward.default, backward if add else detached(backward))


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("mask", [None, torch.tensor([True] * 3 + [False] * 5)])
def test_opcheck_softmax(backend, log, mask):
    (x, dy) = leaves((3, 4, 8), (3, 4, 8))
    arguments = (x, 2, mask, 0.5, log, torch.float32, backend)
    opcheck(OPS.softmax_forward.default, arguments)
    y = OPS.softmax_forward(*arguments).detach().requires_grad_()
    opcheck(OPS.softmax_backward.default, (y, dy, 2, 0.5, log, torch.float32, backend))


def test_ops_called_by_themselves_are_differentiable(backend):
    arguments = attention_arguments("plain", backend)
    q, k, v = arguments[:3]
    direct = OPS.attention_forward(*arguments)[0].square().sum()
    public = fastattn.attention(q, k, v, scale=0.3, backend=backend).square().sum()
    for mine, theirs in zip(
        torch.autograd.grad(direct, (q, k, v)), torch.autograd.grad(public, (q, k, v)), strict=True
    ):
        assert torch.equal(mine, theirs)


# ----------------------------------------------------------------------------------------- compile

LENGTHS = (16, 24, 33, 40, 64)


def same_compiled(function, inputs_of_length, backend="aot_eager", **options):
    """Compiles the function, calls it at every length, forward and backward; how many compiles."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, fullgraph=True, backend=counter, **options)
    for length in LENGTHS:
        inputs = inputs_of_length(length)
        results = []
        for call in (compiled, function):
            torch.manual_seed(0)
            loss = call(*inputs)
            wanted = [x for x in inputs if x.requires_grad]
            results.append((loss.detach(), *torch.autograd.grad(loss, wanted)))
        torch.testing.assert_close(*results)
    return counter.frame_count


def test_compile_attention(backend):
    def function(q, k, v):
        return fastattn.attention(q, k, v, causal=True, backend=backend).square().sum()

    def inputs(length):
        return leaves((2, 4, length, 8), (2, 2, length, 8), (2, 2, length, 8))

    assert same_compiled(function, inputs) <= 2


def test_compile_attention_with_everything(backend):
    slopes = torch.rand(4)

    def function(q, k, v, bias, sinks):
        out, lse = fastattn.attention(
            q,
            k,
            v,
            causal="top_left",
            window=(9, 3),
            softcap=3.0,
            alibi_slopes=slopes,
            bias=bias,
            sinks=sinks,
            dropout_p=0.1,
            return_lse=True,
            backend=backend,
        )
        return out.square().sum() + lse.sum()

    def inputs(length):
        keys = length + 3
        return leaves((2, 4, length, 8), (2, 2, keys, 8), (2, 2, keys, 6), (4, 1, keys), (4,))

    assert same_compiled(function, inputs) <= 2


def test_compile_scaled_dot_product_attention(backend):
    def function(q, k, v):
        return (
            fastattn.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True, backend=backend
            )
            .square()
            .sum()
        )

    def inputs(length):
        return leaves((2, 3, 4, length, 8), (2, 3, 2, length, 8), (2, 3, 2, length, 8))

    assert same_compiled(function, inputs) <= 2


def test_compile_layer_norm_and_softmax(backend):
    def function(x, residual, weight, bias):
        y, new = fastattn.add_layer_norm(
            x, residual, (16,), weight, bias, dropout_p=0.1, backend=backend
        )
        z = fastattn.rms_norm(new, (16,), weight, backend=backend)
        z = z + fastattn.layer_norm(x, (16,), weight, bias, backend=backend)
        z = z + fastattn.softmax(y, scale=2.0, backend=backend)
        return fastattn.log_softmax(z, 1, backend=backend).square().mean()

    def inputs(length):
        return leaves((2, length, 16), (2, length, 16), (16,), (16,))

    assert same_compiled(function, inputs) <= 2


def test_compile_decoding(backend):
    """One query against a cache that grows; no backend named."""

    def function(q, k, v):
        return fastattn.attention(q, k, v, causal=True).square().sum()

    def inputs(length):
        return leaves((2, 4, 1, 8), (2, 2, length, 8), (2, 2, length, 8))

    assert same_compiled(function, inputs) <= 2


def test_compile_batch_and_length_dynamic(backend):
    def function(q, k, v):
        return fastattn.attention(q, k, v, causal=True, backend=backend).square().sum()

    def inputs(length):
        return leaves(*[(length % 3 + 2, 4, length, 8)] * 3)

    assert same_compiled(function, inputs, dynamic=True) <= 2


def test_compile_with_inductor(backend):
    def function(x, weight):
        q = fastattn.layer_norm(x, (32,), weight, backend=backend).unflatten(-1, (4, 8))
        q = q.transpose(1, 2)
        out = fastattn.attention(q, q, q, causal=True, backend=backend)
        return fastattn.softmax(out.transpose(1, 2).flatten(2), backend=backend).square().sum()

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for length in (16, 24):
        inputs = leaves((2, length, 32), (32,))
        results = [torch.autograd.grad(call(*inputs), inputs) for call in (compiled, function)]
        torch.testing.assert_close(*results)


# ------------------------------------------------------------------------- export, fake and meta


class Model(torch.nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.backend = backend

    def forward(self, q, k, v):
        out = fastattn.attention(q, k, v, causal=True, backend=self.backend)
        return fastattn.layer_norm(fastattn.softmax(out), (8,), backend=self.backend)


@pytest.mark.parametrize("strict", [False, True])
def test_export(backend, strict):
    model = Model(backend)
    q_len, k_len = torch.export.Dim("q_len", min=2), torch.export.Dim("k_len", min=2)
    program = torch.export.export(
        model,
        detached(leaves((2, 4, 6, 8), (2, 4, 9, 8), (2, 4, 9, 8))),
        dynamic_shapes=({2: q_len}, {2: k_len}, {2: k_len}),
        strict=strict,
    )
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert OPS.attention_forward.default in targets
    inputs = detached(leaves((2, 4, 11, 8), (2, 4, 13, 8), (2, 4, 13, 8)))
    torch.testing.assert_close(program.module()(*inputs), model(*inputs))
    torch.testing.assert_close(program.run_decompositions().module()(*inputs), model(*inputs))


def shapes_of_a_step(device):
    def new(*shape):
        return torch.empty(shape, device=device, requires_grad=True)

    q, k, v, bias, sinks = new(2, 4, 6, 8), new(2, 2, 7, 8), new(2, 2, 7, 5), new(4, 1, 7), new(4)
    out, lse = fastattn.attention(
        q, k, v, bias=bias, sinks=sinks, causal=True, dropout_p=0.1, return_lse=True
    )
    x, residual, weight = new(3, 8), new(3, 8), new(8)
    y, total = fastattn.add_layer_norm(x, residual, (8,), weight, dropout_p=0.1)
    z = fastattn.softmax(y, mask=torch.ones(8, dtype=torch.bool, device=device))
    leaves = (q, k, v, bias, sinks, x, residual, weight)
    loss = out.sum() + lse.sum() + z.sum() + total.sum()
    grads = torch.autograd.grad(loss, leaves)
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves]
    assert all(grad.device.type == torch.device(device).type for grad in grads)
    return out, lse, y, z


def test_meta_tensors_give_shapes():
    out, lse, y, z = shapes_of_a_step("meta")
    assert out.is_meta and out.shape == (2, 4, 6, 5) and lse.shape == (2, 4, 6)
    assert y.shape == z.shape == (3, 8)


def test_fake_tensors():
    with FakeTensorMode():
        out, lse, *_ = shapes_of_a_step("cpu")
        assert out.shape == (2, 4, 6, 5) and lse.dtype is torch.float32


# --------------------------------------------------------------------------------------- functorch


FUNCTIONS = {
    "attention": lambda x, backend: fastattn.attention(x, x, x.cos(), causal=True, backend=backend),
    "layer_norm": lambda x, backend: fastattn.layer_norm(x, (4,), backend=backend),
    "softmax": lambda x, backend: fastattn.softmax(x, 1, backend=backend),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_functorch(backend, function):
    (x,) = leaves((3, 1, 2, 3, 4), dtype=torch.float64)
    loss = lambda x: function(x, backend).square().sum()
    grad = torch.func.grad(loss)
    (expected,) = torch.autograd.grad(sum(loss(one) for one in x), x)
    x = x.detach()
    torch.testing.assert_close(
        torch.func.vmap(lambda x: function(x, backend))(x),
        torch.stack([function(one, backend) for one in x]),
    )
    torch.testing.assert_close(grad(x[0]), expected[0])
    torch.testing.assert_close(torch.func.vmap(grad)(x), expected)
    one = x[0, :, :1, :2]
    hessian = torch.func.jacrev(grad)(one)
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(loss, one))
