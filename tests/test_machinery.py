"""Patched models under PyTorch's own machinery."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from small_models import classes, models, randn, translation, vision
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
from fastattn import torch_calls


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_of_a_patched_model(way, calls):
    model, x = vision(), randn(2, 7, 16)
    before, expected = classes(model), model(x)
    fastattn.patch(model)
    copied = way(model)
    assert classes(copied) == classes(model)
    calls.clear()
    torch.testing.assert_close(copied(x), expected)
    assert calls.count("attention") == 2
    assert not {id(p) for p in copied.parameters()} & {id(p) for p in model.parameters()}
    fastattn.unpatch(copied)
    assert classes(copied) == before and classes(model) != before


@models
@pytest.mark.parametrize("train", [True, False])
def test_a_patched_model_compiles_whole(make, shape, train):
    torch._dynamo.reset()
    model, x = make().train(train), randn(*shape)
    fastattn.patch(model)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)
    assert len(graphs) == 1
    assert [node for node in graphs[0].graph.nodes if "fastattn" in str(node.target)]
    with torch.no_grad():
        assert torch._dynamo.explain(model)(x).graph_break_count == 0


def test_a_compiled_model_is_compiled_anew():
    torch._dynamo.reset()
    model, x, graphs = vision(), randn(2, 7, 16), []

    def backend(graph, inputs):
        graphs.append("fastattn" in str([node.target for node in graph.graph.nodes]))
        return graph

    compiled = torch.compile(model, backend=backend)
    expected = compiled(x)
    fastattn.patch(compiled)
    torch.testing.assert_close(compiled(x), expected)
    fastattn.unpatch(compiled)
    torch.testing.assert_close(compiled(x), expected)
    assert graphs[0] is False and graphs[1] is True


@pytest.mark.parametrize("strict", [True, False])
def test_a_patched_model_exports(strict):
    model, x = vision().eval(), randn(2, 7, 16)
    fastattn.patch(model)
    program = torch.export.export(model, (x,), strict=strict)
    used = {str(node.target) for node in program.graph.nodes}
    assert {
        f"fastattn.{op}_forward.default" for op in ("attention", "layer_norm", "softmax")
    } <= used
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_replays_the_dropout_of_a_patched_model(reentrant):
    class Dropping(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)

    model = nn.Sequential(Dropping())
    fastattn.patch(model)
    results = []
    for checkpointed in (False, True):
        x = randn(2, 2, 5, 4).requires_grad_()
        torch.manual_seed(0)
        out = (
            torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)
            if checkpointed
            else model(x)
        )
        out.square().sum().backward()
        results.append((out.detach(), x.grad))
    torch.testing.assert_close(*results)


def test_autocast_func_grad_inference_and_double_backward():
    model, patched, x = vision(), vision(), randn(2, 7, 16)
    fastattn.patch(patched)
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = model(x), patched(x)
        assert expected.dtype is got.dtype
        torch.testing.assert_close(got, expected, atol=2e-2, rtol=5e-2)
    with torch.inference_mode():
        torch.testing.assert_close(patched(x), model(x))
    parameters = dict(model.named_parameters())

    def loss(module):
        return lambda p: torch.func.functional_call(module, p, (x,)).square().sum()

    torch.testing.assert_close(
        torch.func.grad(loss(patched))(parameters), torch.func.grad(loss(model))(parameters)
    )
    second = []
    for module in (model, patched):
        leaf = x.clone().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):
            (first,) = torch.autograd.grad(module(leaf).sin().sum(), leaf, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), leaf)[0])
    torch.testing.assert_close(*second, atol=1e-4, rtol=1e-4)


@models
@pytest.mark.filterwarnings("ignore")
def test_a_patched_model_is_traced_and_still_learns(make, shape):
    """check_trace: a second trace is the same graph, op by op."""
    model, x = make(), randn(*shape)
    fastattn.patch(model)
    traced = torch.jit.trace(model, (x,), check_trace=True)
    assert "fastattn::layer_norm_forward" in str(traced.inlined_graph)
    grads = []
    for module in (model, traced):
        leaf = randn(*shape, seed=1).requires_grad_()
        grads.append(torch.autograd.grad(module(leaf).square().sum(), [leaf, *model.parameters()]))
    torch.testing.assert_close(*grads)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_is_traced(need_weights):
    class SelfAttention(fastattn.nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x, need_weights=need_weights)[0]

    attention, x = SelfAttention(8, 2, batch_first=True), randn(2, 5, 8)
    traced = torch.jit.trace(attention, (x,), check_trace=True)
    torch.testing.assert_close(traced(x), attention(x))


@pytest.mark.filterwarnings("ignore")
def test_scripting_a_patched_model_is_refused_and_leaves_it_whole():
    model, x = translation().eval(), randn(2, 5, 16)
    expected = model(x, x)
    for part in (model, vision(), nn.Sequential(nn.ReLU(), nn.LayerNorm(16))):
        fastattn.patch(part)
        before = list(part.modules())
        with pytest.raises(TypeError, match=r"torch.jit.script: .* unpatch the model before"):
            torch.jit.script(part)
        assert all(a is b for a, b in zip(before, part.modules(), strict=True))
    fastattn.unpatch(model)
    torch.testing.assert_close(torch.jit.script(model)(x, x), expected)


# -------------------------------------------------------------------------------------- autocast


def _attention_module(x):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    return attention(x, x, x, need_weights=False)[0]


AUTOCAST = {
    "layer_norm": lambda x: F.layer_norm(x, (8,)),
    "layer_norm_weights": lambda x: F.layer_norm(x, (8,), torch.ones(8), torch.zeros(8)),
    "rms_norm": lambda x: F.rms_norm(x, (8,)),
    "rms_norm_weight": lambda x: F.rms_norm(x, (8,), torch.ones(8)),
    "softmax": lambda x: F.softmax(x, -1),
    "softmax_dtype": lambda x: F.softmax(x, -1, dtype=torch.float32),
    "log_softmax": lambda x: F.log_softmax(x, -1),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "attention_mask": lambda x: F.scaled_dot_product_attention(x, x, x, torch.zeros(5, 5).to(x)),
    "attention_causal": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "module": _attention_module,
}


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", AUTOCAST)
def test_autocast_has_torchs_dtypes(op, x_dtype, dtype, enabled):
    def call():
        x = randn(2, 5, 8).to(x_dtype).requires_grad_()
        with torch.autocast("cpu", dtype, enabled=enabled):
            out = AUTOCAST[op](x)
        return out, torch.autograd.grad((out.float() * randn(2, 5, 8, seed=1)).sum(), x)[0]

    try:
        expected = call()
    except (RuntimeError, ValueError):  # what torch refuses, such as weights of another dtype
        return
    with fastattn.override():
        got = call()
    for a, b in zip(got, expected, strict=True):
        assert a.dtype is b.dtype
        torch.testing.assert_close(a, b, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm", "softmax"])
def test_where_autocast_computes_in_float32_so_do_we(op, monkeypatch):
    """As on GPUs; here the CPU is told to be one of these."""
    run, x = AUTOCAST[op], randn(2, 5, 8).bfloat16()
    with fastattn.override(), torch.autocast("cpu", torch.bfloat16):
        assert run(x).dtype is torch.bfloat16
        monkeypatch.setattr(torch_calls, "_AUTOCAST_FLOAT32", frozenset([(op, "cpu")]))
        torch.testing.assert_close(run(x), run(x.float()), atol=1e-6, rtol=1e-6)
        assert run(x).dtype is torch.float32
        assert run(x.double()).dtype is torch.float64
    with fastattn.override():
        assert run(x).dtype is torch.bfloat16


# ------------------------------------------------------------------------------------- the rest


def test_per_sample_gradients_of_a_patched_model():
    model, x = vision().double(), randn(3, 7, 16).double()
    fastattn.patch(model)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x[None],)).square().sum()

    together = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    one_by_one = [torch.func.grad(loss)(parameters, sample) for sample in x]
    for name, grads in together.items():
        torch.testing.assert_close(grads, torch.stack([each[name] for each in one_by_one]))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_model_learns_as_one_that_is_not(reentrant):
    """With dropout in the attention: replayed, or the gradients would differ."""
    model = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.3, batch_first=True)
    fastattn.patch(model)
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        x = randn(2, 7, 16).requires_grad_()
        if checkpointed:
            out = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)
        else:
            out = model(x)
        model.zero_grad()
        out.square().sum().backward()
        results.append([out.detach(), x.grad, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*results)


class Logged(torch.Tensor):
    """A subclass with rules of its own."""

    seen: list = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_tensor_subclasses_are_served_by_their_own_rules(calls):
    model, x = vision(), randn(2, 7, 16)
    fastattn.patch(model)
    expected = model(x)
    calls.clear()
    Logged.seen.clear()
    out = model(x.as_subclass(Logged))
    assert type(out) is Logged and not calls
    assert {F.layer_norm, F.scaled_dot_product_attention, F.softmax} <= set(Logged.seen)
    torch.testing.assert_close(out.as_subclass(torch.Tensor), expected, atol=1e-5, rtol=1e-5)


def test_nested_tensors_go_to_torch(calls):
    norm = fastattn.nn.LayerNorm(8)
    nested = torch.nested.nested_tensor([randn(3, 8), randn(5, 8)], layout=torch.jagged)
    assert norm(nested).is_nested and not calls


def test_sdpa_kernel_is_left_alone(calls):
    flags = (
        torch.backends.cuda.flash_sdp_enabled,
        torch.backends.cuda.mem_efficient_sdp_enabled,
        torch.backends.cuda.math_sdp_enabled,
        torch.backends.cuda.cudnn_sdp_enabled,
    )
    before, x = [flag() for flag in flags], randn(2, 3, 5, 8)
    model, y = vision(), randn(2, 7, 16)
    fastattn.patch(model)
    with sdpa_kernel(SDPBackend.MATH):
        inside = [flag() for flag in flags]
        assert inside == [False, False, True, False]
        expected = F.scaled_dot_product_attention(x, x, x)
        assert not calls  # outside of what was patched it says what runs
        model(y)
        with fastattn.override():
            torch.testing.assert_close(F.scaled_dot_product_attention(x, x, x), expected)
        assert calls.count("attention") == 3
        assert [flag() for flag in flags] == inside
    assert [flag() for flag in flags] == before
