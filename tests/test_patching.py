"""patch, unpatch, override and torch's registry: what is replaced, and that it is put back."""

import copy
import pickle
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn import attention as torch_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
from fastattn import library, overriding, patching, torch_calls
from fastattn import nn as ours


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def calls(monkeypatch):
    """The names of the ops that ran, in order."""
    ran = []
    for op in (library.attention_forward, library.layer_norm_forward, library.softmax_forward):
        original = op.run
        monkeypatch.setattr(
            op,
            "run",
            lambda *a, op=op, f=original, **k: (
                ran.append(op.name.split("_forward")[0]) or f(*a, **k)
            ),
        )
    return ran


class Attention(nn.Module):
    """As timm and torchvision write it."""

    def __init__(self, dim=16, heads=4):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm = nn.RMSNorm(dim // heads)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(self.q_norm(q), k, v, dropout_p=0.0)
        return self.proj(out.transpose(1, 2).flatten(2))


def helper(x):
    return torch.nn.functional.softmax(x, -1)


class ByHelpers(nn.Module):
    """Its softmax is two calls away."""

    def forward(self, x):
        return self.weigh(x)

    def weigh(self, x):
        return x * helper(x)


class Norm2d(nn.LayerNorm):
    """torchvision's ConvNeXt has this."""

    def forward(self, x):
        x = F.layer_norm(
            x.transpose(1, -1), self.normalized_shape, self.weight, self.bias, self.eps
        )
        return x.transpose(1, -1)


class Inherits(nn.LayerNorm):
    pass


class OwnAttention(nn.Module):
    def forward(self, x):
        return (x @ x.mT).softmax(-1) @ x


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(16), Attention(), Inherits(16)
        self.mlp, self.helpers = nn.Linear(16, 16), ByHelpers()
        self.softmax = nn.Softmax(-1)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return self.softmax(self.helpers(x + self.mlp(self.norm2(x))))


def vision():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block())


def translation():
    torch.manual_seed(0)
    return nn.Transformer(16, 4, 2, 2, 32, dropout=0.0, batch_first=True)


MODELS = {
    "vision": (vision, (2, 7, 16)),
    "encoder": (lambda: translation().encoder, (2, 7, 16)),
    "norm2d": (lambda: nn.Sequential(Norm2d(16)), (2, 16, 5, 16)),
}
models = pytest.mark.parametrize(("make", "shape"), MODELS.values(), ids=MODELS)


def classes(model):
    return [type(module) for module in model.modules()]


# ------------------------------------------------------------------------------------------ patch


@models
@pytest.mark.parametrize("train", [True, False])
def test_results_and_gradients_stay(make, shape, train, calls):
    model, x = make().train(train), randn(*shape).requires_grad_()
    expected = model(x)
    expected_grads = torch.autograd.grad(expected.square().sum(), [x, *model.parameters()])
    calls.clear()
    before = classes(model)
    report = fastattn.patch(model)
    assert report.replaced and not report.left
    got = model(x)
    assert calls
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    grads = torch.autograd.grad(got.square().sum(), [x, *model.parameters()])
    torch.testing.assert_close(grads, expected_grads, atol=1e-4, rtol=1e-4)
    calls.clear()
    restored = fastattn.unpatch(model)
    assert list(restored.replaced) == list(report.replaced)
    assert classes(model) == before and not [
        m for m in model.modules() if patching._ORIGINAL in vars(m)
    ]
    assert torch.equal(model(x), expected) and not calls


def test_everything_else_stays_the_same_objects():
    model = translation().to(torch.bfloat16).eval()
    model.encoder.layers[0].train()
    seen = []
    model.decoder.norm.register_forward_hook(lambda module, args, out: seen.append(type(module)))
    model.encoder.norm.weight.requires_grad_(False)
    modules, parameters = list(model.named_modules()), list(model.named_parameters())
    modes, keys = [m.training for m in model.modules()], list(model.state_dict())
    fastattn.patch(model)
    assert all(
        a[0] == b[0] and a[1] is b[1] for a, b in zip(modules, model.named_modules(), strict=True)
    )
    assert all(a[1] is b[1] for a, b in zip(parameters, model.named_parameters(), strict=True))
    assert [m.training for m in model.modules()] == modes and list(model.state_dict()) == keys
    assert not model.encoder.norm.weight.requires_grad
    x = randn(2, 5, 16).bfloat16()
    model(x, x)
    assert seen == [ours.LayerNorm]


@pytest.mark.parametrize("pad", [False, True])
def test_the_inference_fast_path_stands_aside(pad, calls, monkeypatch):
    model = translation().eval()
    x = randn(2, 7, 16)
    keywords = (
        {"src_key_padding_mask": torch.arange(7)[None] >= torch.tensor([[7], [4]])} if pad else {}
    )
    with torch.inference_mode():
        expected = model.encoder(x, **keywords)
        assert not calls  # torch's is one C++ call
        fastattn.patch(model)
        for name in (
            "_transformer_encoder_layer_fwd",
            "_native_multi_head_attention",
            "_nested_tensor_from_mask",
        ):
            monkeypatch.setattr(torch, name, None)
        got = model.encoder(x, **keywords)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert calls.count("attention") == 2 and calls.count("layer_norm") == 5


def test_twenty_steps_have_equal_losses():
    losses = []
    for patched in (False, True):
        model = vision()
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        if patched:  # after the optimizer was made
            fastattn.patch(model)
        losses.append([])
        for step in range(20):
            loss = (model(randn(2, 7, 16, seed=step)) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] != losses[0][0]


def test_the_report():
    model = nn.ModuleDict({"block": Block(), "own": OwnAttention(), "linear": nn.Linear(2, 2)})
    report = fastattn.patch(model)
    assert report.replaced["block.norm1"] == "fastattn.nn.LayerNorm"
    assert (
        report.replaced["block.attn"] == "Attention, its F.scaled_dot_product_attention by fastattn"
    )
    assert report.replaced["block.helpers"] == "ByHelpers, its F.softmax by fastattn"
    assert report.replaced["block.norm2"] == "Inherits, its F.layer_norm by fastattn"
    assert list(report.left) == ["own"] and "calls none of torch's functions" in report.left["own"]
    text = str(report)
    assert (
        text.startswith("fastattn replaced 6 modules\n")
        and "left 1 module\n  own: OwnAttention" in text
    )
    assert "linear" not in text
    many = str(fastattn.patch(vision()))
    assert "*.norm1 (x2): fastattn.nn.LayerNorm" in many


def test_a_model_with_nothing_to_patch():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    report = fastattn.patch(model)
    assert not report.replaced and not report.left
    assert "replaced nothing\n  the model has no attention" in str(report)
    assert classes(model) == [nn.Sequential, nn.Linear, nn.ReLU]


def test_patching_twice_and_unpatching_what_was_not():
    model = vision()
    x = randn(2, 7, 16)
    expected = model(x)
    assert "restored nothing\n  no module of the model was patched" in str(fastattn.unpatch(model))
    first = fastattn.patch(model)
    patched = classes(model)
    second = fastattn.patch(model)
    assert not second.replaced and second.left.keys() == first.replaced.keys()
    assert set(second.left.values()) == {"served by fastattn already"}
    assert classes(model) == patched
    fastattn.unpatch(model)
    assert torch.equal(model(x), expected)
    assert not fastattn.unpatch(model).replaced


def test_ours_by_construction_are_not_unpatched():
    model = nn.Sequential(ours.LayerNorm(4), nn.LayerNorm(4))
    fastattn.patch(model)
    fastattn.unpatch(model)
    assert classes(model)[1:] == [ours.LayerNorm, nn.LayerNorm]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("frozen", [False, True])
def test_scripted_models_are_refused(frozen):
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)).eval()
    scripted = torch.jit.script(model)
    scripted = torch.jit.freeze(scripted) if frozen else scripted
    for function in (fastattn.patch, fastattn.unpatch):
        with pytest.raises(
            TypeError, match="model: expected a module in Python, got a scripted or frozen"
        ):
            function(scripted)
    outer = nn.Sequential(scripted, nn.LayerNorm(4))
    report = fastattn.patch(outer)
    assert list(report.replaced) == ["1"]


@pytest.mark.parametrize("model", [None, 3, nn.LayerNorm, F.softmax])
def test_what_is_no_model(model):
    for function in (fastattn.patch, fastattn.unpatch):
        with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got"):
            function(model)


def test_frozen_parameters_and_half_a_failure(monkeypatch):
    model = vision().requires_grad_(False)
    before, become, count = classes(model), patching._become, []

    def fails(module, new, restoring):
        count.append(module)
        if len(count) == 4:
            raise RuntimeError("out of luck")
        become(module, new, restoring)

    monkeypatch.setattr(patching, "_become", fails)
    with pytest.raises(RuntimeError, match="out of luck"):
        fastattn.patch(model)
    assert classes(model) == before and not [
        m for m in model.modules() if patching._ORIGINAL in vars(m)
    ]
    monkeypatch.undo()
    assert fastattn.patch(model).replaced


def test_what_is_left_says_why():
    replaced_forward, parametrized = nn.LayerNorm(4), nn.LayerNorm(4)
    replaced_forward.forward = lambda x: x
    nn.utils.parametrize.register_parametrization(parametrized, "weight", nn.Identity())
    model = nn.ModuleList([replaced_forward, parametrized])
    report = fastattn.patch(model)
    assert not report.replaced
    assert "its forward was replaced on the module itself" in report.left["0"]
    assert "parametrized" in report.left["1"]


def test_a_module_used_twice():
    norm = nn.LayerNorm(16)
    model = nn.Sequential(norm, nn.Linear(16, 16), norm)
    assert list(fastattn.patch(model).replaced) == ["0"]
    assert model[0] is model[2] is norm and type(norm) is ours.LayerNorm


def test_the_model_itself():
    norm = nn.LayerNorm(4)
    assert "the model itself: fastattn.nn.LayerNorm" in str(fastattn.patch(norm))
    assert type(norm) is ours.LayerNorm
    assert type(nn.LayerNorm(4)) is nn.LayerNorm
    fastattn.unpatch(norm)
    assert type(norm) is nn.LayerNorm


# -------------------------------------------------------------------------------------- machinery


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


# --------------------------------------------------------------------------------------- override


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
    with (
        fastattn.override(),
        pytest.raises(ValueError, match="attn_mask: expected a shape that broadcasts"),
    ):
        F.scaled_dot_product_attention(x, x, x, torch.zeros(7, 7))


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


# --------------------------------------------------------------------------------------- registry

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
