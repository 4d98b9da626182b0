"""override and torch's registry of flash attention: torch's calls served, and given back."""

import math
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from small_models import randn, translation
from torch import nn
from torch.nn import attention as torch_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
import fastattn.nn
from fastattn import overriding, torch_calls
from fastattn.backends import BACKENDS


def test_override_routes_the_four_and_puts_them_back(calls):
    x = randn(2, 3, 5, 8)
    functions = {
        "attention": lambda: F.scaled_dot_product_attention(x, x, x, is_causal=True),
        "layer_norm": lambda: F.layer_norm(x, (8,)),
        "softmax": lambda: F.softmax(x, dim=-1),
    }
    for name, function in {**functions, "rms_norm": lambda: F.rms_norm(x, [8])}.items():
        expected = function()
        assert not calls
        with fastattn.override():
            torch.testing.assert_close(function(), expected)
        assert calls == [name.replace("rms", "layer")]
        calls.clear()
        function()
        assert not calls


def test_override_serves_what_was_imported_and_torchs_modules(calls):
    from torch.nn.functional import scaled_dot_product_attention as imported

    x = randn(2, 3, 5, 8)
    with fastattn.override():
        imported(x, x, x)
    assert calls == ["attention"]
    model, y = translation().eval(), randn(2, 5, 16)
    with torch.inference_mode():
        expected = model(y, y)
        calls.clear()
        with fastattn.override():
            torch.testing.assert_close(model(y, y), expected, atol=1e-5, rtol=1e-5)
    assert calls.count("attention") == 6 and calls.count("layer_norm") == 12


def test_override_ends_with_an_exception_and_nests(calls):
    x = randn(3, 4)
    with pytest.raises(ZeroDivisionError), fastattn.override():
        1 / 0  # noqa: B018
    F.softmax(x, -1)
    assert not calls
    with fastattn.override(), fastattn.override():
        F.softmax(x, -1)
    assert calls == ["softmax"]


def test_override_has_torchs_errors_and_ours_before_them():
    x = randn(2, 3, 8)
    mistakes = [
        (lambda: F.scaled_dot_product_attention(x, x, x, torch.zeros(7, 7)), "attn_mask: expected"),
        (lambda: F.scaled_dot_product_attention(x, x, x.double()), "value: expected query's dtype"),
        (lambda: F.layer_norm(x, (9,)), "input: expected shape"),
        (lambda: F.rms_norm(x, ()), "normalized_shape: expected"),
        (lambda: F.layer_norm([1.0], (1,)), None),
        (lambda: F.softmax(x, 3), "dim: expected one of"),
    ]
    for mistake, ours in mistakes:
        with pytest.raises(Exception) as theirs:
            mistake()
        with fastattn.override(), pytest.raises(theirs.type) as got:
            mistake()
        if ours is not None:
            assert str(got.value) == str(theirs.value)
            assert ours in str(got.value.__context__)


def test_what_only_torch_takes_goes_to_torch(calls):
    x, empty = randn(1, 2, 3, 8), torch.empty(1, 2, 3, 0)
    takes = [
        lambda: F.scaled_dot_product_attention(x, x, x, scale=torch.tensor(0.3)),
        lambda: F.scaled_dot_product_attention(empty, empty, x),
        lambda: F.layer_norm(x, (8,), eps=math.inf),
        lambda: F.rms_norm(x, [torch.tensor(8)]),
        lambda: F.softmax(x, torch.tensor(1)),
    ]
    for call in takes:
        expected = call()
        with fastattn.override():
            assert torch.equal(call(), expected)
    assert calls == []

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(x):
        with fastattn.override():
            return F.layer_norm(x, (8,), eps=math.inf)

    assert torch.equal(compiled(x), torch.zeros_like(x))


@pytest.mark.parametrize("kind", [TypeError, ValueError, IndexError])
def test_a_mistake_of_ours_is_not_hidden_by_torchs_result(kind, monkeypatch):
    def broken(*args, **keywords):
        raise kind("a mistake in the backend")

    for backend in BACKENDS.values():
        for op in ("attention", "layer_norm", "softmax"):
            monkeypatch.setattr(backend, f"{op}_forward", broken)
    x = randn(1, 2, 3, 8)
    calls = [
        lambda: F.scaled_dot_product_attention(x, x, x),
        lambda: F.layer_norm(x, (8,)),
        lambda: F.rms_norm(x, (8,)),
        lambda: F.softmax(x, -1),
    ]
    for call in calls:
        with fastattn.override(), pytest.raises(kind, match="a mistake in the backend"):
            call()
    attention = fastattn.nn.MultiheadAttention(8, 2)
    for module, inputs in ((fastattn.nn.LayerNorm(8), (x,)), (attention, (x[0],) * 3)):
        with pytest.raises(kind, match="a mistake in the backend"):
            module(*inputs)


def test_causal_biases_of_torch_are_served(calls):
    from torch.nn.attention.bias import causal_lower_right, causal_upper_left

    q, k = randn(2, 3, 5, 8), randn(2, 3, 7, 8)
    for bias in (causal_lower_right(5, 7), causal_upper_left(5, 7)):
        expected = F.scaled_dot_product_attention(q, k, k, bias._materialize())
        with fastattn.override():
            torch.testing.assert_close(F.scaled_dot_product_attention(q, k, k, bias), expected)
        torch._dynamo.reset()
        call = torch.compile(fastattn.scaled_dot_product_attention, fullgraph=True, backend="eager")
        torch.testing.assert_close(call(q, k, k, bias), expected)
    assert calls == ["attention"] * 2  # eager ones: a compiled call runs the op
    with pytest.raises(ValueError, match=r"attn_mask: expected a causal bias of .* got \(5, 7\)"):
        fastattn.scaled_dot_product_attention(q, q, q, bias)
    with pytest.raises(TypeError, match=r"bias: .* got a CausalBias"):
        fastattn.attention(q, k, k, bias=bias)


def test_override_is_one_threads(calls):
    x, inside, leave = randn(3, 4), threading.Event(), threading.Event()

    def overriding_thread():
        with fastattn.override():
            inside.set()
            leave.wait(30)
            F.softmax(x, -1)

    thread = threading.Thread(target=overriding_thread)
    thread.start()
    inside.wait(30)
    F.softmax(x, -1)
    F.layer_norm(x, (4,))
    assert not calls
    leave.set()
    thread.join()
    assert calls == ["softmax"]


def test_override_leaves_to_torch_what_is_torchs(calls):
    ints, x = torch.arange(4), randn(3, 4)
    with fastattn.override():
        with pytest.warns(UserWarning, match="Implicit dimension"):
            F.softmax(x)
        nested = torch.nested.nested_tensor([x[:2], x], layout=torch.jagged)
        assert F.softmax(nested, -1).is_nested
        torch.func.jvp(lambda x: F.softmax(x, -1), (x,), (x,))
        assert not calls
        assert F.softmax(ints, -1, dtype=torch.float32).dtype is torch.float32
        assert calls == ["softmax"]
        with sdpa_kernel(SDPBackend.MATH):
            F.scaled_dot_product_attention(x, x, x)


def test_override_compiles():
    torch._dynamo.reset()
    attention, x, graphs = nn.MultiheadAttention(4, 2, batch_first=True), randn(2, 3, 4), []

    def function(x):
        with fastattn.override():
            x = F.softmax(F.layer_norm(x.unflatten(-1, (4,)), (4,)), -1)
            return attention(x, x, x, need_weights=False)[0]

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), function(x))
    used = {str(node.target) for node in graphs[0].graph.nodes}
    assert sum("fastattn" in name for name in used) == 3
    with fastattn.override():
        torch.testing.assert_close(torch.compile(F.softmax, backend="eager")(x, -1), x.softmax(-1))


@pytest.mark.parametrize("way", ["backward", "autograd.backward", "grad"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_override_in_a_backward_that_computes_again(way, reentrant):
    def attend(x):
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)

    grads = []
    for checkpointed in (False, True):
        if way == "grad" and reentrant:
            pytest.skip("torch refuses it")
        x = randn(1, 2, 5, 4).requires_grad_()
        torch.manual_seed(0)
        with fastattn.override():
            if checkpointed:
                y = torch.utils.checkpoint.checkpoint(attend, x, use_reentrant=reentrant)
            else:
                y = attend(x)
            loss = y.square().sum()
            if way == "grad":
                grads.append(torch.autograd.grad(loss, x)[0])
                continue
            loss.backward() if way == "backward" else torch.autograd.backward(loss)
            grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_every_route_has_torchs_signature():
    import inspect

    for theirs, mine in torch_calls.ROUTES.items():
        if theirs is not F.scaled_dot_product_attention:  # a builtin, which tells none
            assert list(inspect.signature(mine).parameters) == list(
                inspect.signature(theirs).parameters
            )


# ------------------------------------------------------------------------------------------ registry

needs_registry = pytest.mark.skipif(
    not hasattr(torch_attention, "activate_flash_attention_impl"), reason="torch has no registry"
)


@needs_registry
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torchs_registry(calls, dtype, mask, is_causal):
    if mask is not None and is_causal:
        pytest.skip("torch takes one of them")
    q, k, v = (randn(2, 3, n, 8, seed=n).to(dtype).requires_grad_() for n in (5, 7, 7))
    attn_mask = {None: None, "bool": randn(5, 7) > 0, "float": randn(5, 7).to(dtype)}[mask]

    def step():
        out = F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=is_causal)
        return out, torch.autograd.grad(out.float().square().sum(), (q, k, v))

    assert "fastattn" in torch_attention.list_flash_attention_impls()
    assert torch_attention.current_flash_attention_impl() is None
    expected = step()
    assert not calls
    torch_attention.activate_flash_attention_impl("fastattn")
    try:
        assert torch_attention.current_flash_attention_impl() == "fastattn"
        got = step()
        assert calls == ["attention"]
    finally:
        torch_attention.restore_flash_attention_impl()
    tolerance = 1e-5 if dtype is torch.float32 else 5e-2
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
    calls.clear()
    torch.testing.assert_close(step(), expected, atol=0, rtol=0)
    assert not calls and torch_attention.current_flash_attention_impl() is None


@needs_registry
def test_importing_activates_nothing_and_activating_warns_of_nothing():
    code = """
import warnings
warnings.simplefilter("error")
import torch, fastattn
from torch.nn import attention
assert attention.current_flash_attention_impl() is None
attention.activate_flash_attention_impl("fastattn")
attention.activate_flash_attention_impl("fastattn")
x = torch.randn(1, 2, 5, 8)
torch.nn.functional.scaled_dot_product_attention(x, x, x)
attention.restore_flash_attention_impl()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Overriding" not in done.stderr


def test_without_torchs_registry(monkeypatch):
    monkeypatch.delattr(torch_attention, "register_flash_attention_impl", raising=False)
    overriding.register()
