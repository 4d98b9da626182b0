"""fastattn.nn beside torch.nn: the same weights, the same results, forward and backward."""

import copy
import inspect
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastattn import nn as ours
from fastattn import torch_calls

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
PAIRS = [(theirs, mine) for theirs, mine in ours.OURS.items()]


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pair(name, *args, dtype=torch.float32, train=True, **keywords):
    """torch's module and ours, of one seed."""
    made = []
    for source in (nn, ours):
        torch.manual_seed(0)
        made.append(getattr(source, name)(*args, **keywords).to(dtype).train(train))
    theirs, mine = made
    assert list(theirs.state_dict()) == list(mine.state_dict())
    for a, b in zip(theirs.parameters(), mine.parameters(), strict=True):
        assert torch.equal(a, b)
        if a.dim() == 1:  # biases start at zero
            with torch.no_grad():
                b.copy_(a.uniform_(-0.5, 0.5))
    return theirs, mine


def step(module, inputs, keywords):
    """Outputs, and gradients of inputs and parameters."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = module(*leaves, **keywords)
    outs = [x for x in (out if isinstance(out, tuple) else (out,)) if x is not None]
    loss = sum((x.double() * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum() for x in outs)
    grads = torch.autograd.grad(loss, [*leaves, *module.parameters()], allow_unused=True)
    return [*(x.detach() for x in outs), *(grad for grad in grads if grad is not None)]


def same(theirs, mine, inputs, dtype, wrap=lambda module: module, **keywords):
    """Results and gradients are torch's; in bfloat16, as near to float64's as torch's are."""
    expected, got = (step(wrap(module), inputs, keywords) for module in (theirs, mine))
    exact = expected
    if dtype is torch.bfloat16:
        doubled = {
            name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for name, x in keywords.items()
        }
        module = copy.deepcopy(theirs).double()
        exact = step(wrap(module), [x.double() for x in inputs], doubled)
    for a, b, true in zip(expected, got, exact, strict=True):
        assert a.dtype is b.dtype and a.shape == b.shape
        a, b, true = a.double(), b.double(), true.double()
        if dtype is torch.bfloat16:
            assert (b - true).norm() <= 2 * (a - true).norm() + 0.01 * true.norm() + 1e-3
            continue
        tolerance = TOLERANCE[dtype]
        size = max(1.0, a.abs().max().item()) if a.numel() else 1.0
        torch.testing.assert_close(b, a, atol=tolerance * size, rtol=tolerance)


def test_they_are_torchs():
    for theirs, mine in PAIRS:
        assert issubclass(mine, theirs)
        assert inspect.signature(mine) == inspect.signature(theirs)
        assert list(inspect.signature(mine.forward).parameters) == list(
            inspect.signature(theirs.forward).parameters
        )
    assert {mine.__name__ for _, mine in PAIRS} == set(ours.__all__)


# --------------------------------------------------------------------------------- norms, softmax


@dtypes
@pytest.mark.parametrize("affine", [True, False])
def test_norms(dtype, affine):
    same(
        *pair("LayerNorm", (3, 8), elementwise_affine=affine, dtype=dtype),
        [randn(2, 5, 3, 8, dtype=dtype)],
        dtype,
    )
    same(
        *pair("RMSNorm", 8, 1e-3, elementwise_affine=affine, dtype=dtype),
        [randn(2, 5, 8, dtype=dtype)],
        dtype,
    )
    if affine:
        same(*pair("LayerNorm", 8, bias=False, dtype=dtype), [randn(5, 8, dtype=dtype)], dtype)


@dtypes
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_softmax(dtype, dim):
    same(*pair("Softmax", dim), [randn(4, 5, 6, dtype=dtype)], dtype)


def test_softmax_without_a_dim_is_torchs():
    with pytest.warns(UserWarning, match="Implicit dimension choice"):
        got = ours.Softmax()(randn(3, 4))
    torch.testing.assert_close(got, randn(3, 4).softmax(1))


# -------------------------------------------------------------------------------------- attention

KINDS = {
    "plain": {},
    "no_bias": {"bias": False},
    "kdim_vdim": {"kdim": 6, "vdim": 10},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "all": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 6, "vdim": 10},
}
BATCH, HEADS, QUERIES, KEYS, WIDTH = 3, 2, 5, 7, 8


def attention_mask(kind, dtype, batch=BATCH):
    if kind == "bool":
        mask = randn(QUERIES, KEYS, seed=7) > 0.4
        mask[:, 0] = False
        return mask
    if kind == "additive":
        return randn(QUERIES, KEYS, dtype=dtype, seed=7)
    if kind == "bool_per_head":
        mask = randn(batch * HEADS, QUERIES, KEYS, seed=7) > 0.4
        mask[..., 0] = False
        return mask
    if kind == "additive_per_head":
        return randn(batch * HEADS, QUERIES, KEYS, dtype=dtype, seed=7)
    return torch.ones(QUERIES, KEYS, dtype=torch.bool).triu(1) if kind == "causal" else None


def padding(kind, dtype, batch=BATCH):
    mask = torch.arange(KEYS)[None] >= torch.tensor([KEYS, 4, 1])[:batch, None]
    if kind == "bool":
        return mask
    return (
        randn(batch, KEYS, dtype=dtype).masked_fill(mask, -torch.inf)
        if kind == "additive"
        else None
    )


@settings(max_examples=150)
@given(
    kind=st.sampled_from(list(KINDS)),
    dtype=st.sampled_from(DTYPES),
    mask=st.sampled_from(
        [None, "bool", "additive", "bool_per_head", "additive_per_head", "causal"]
    ),
    pad=st.sampled_from([None, "bool", "additive"]),
    weights=st.sampled_from([None, "averaged", "each"]),
    batch_first=st.booleans(),
    batched=st.booleans(),
    shared=st.sampled_from(["none", "kv", "all"]),
    train=st.booleans(),
)
def test_attention(kind, dtype, mask, pad, weights, batch_first, batched, shared, train):
    options = KINDS[kind]
    same_sizes = "kdim" not in options
    theirs, mine = pair(
        "MultiheadAttention",
        WIDTH,
        HEADS,
        batch_first=batch_first,
        dtype=dtype,
        train=train,
        **options,
    )
    batch = BATCH if batched else 1
    queries = KEYS if shared == "all" and same_sizes else QUERIES
    q = randn(batch, queries, WIDTH, dtype=dtype)
    k = randn(batch, KEYS, options.get("kdim", WIDTH), dtype=dtype, seed=1)
    v = randn(batch, KEYS, options.get("vdim", WIDTH), dtype=dtype, seed=2)
    inputs = [q, k, v]
    if not batched:
        inputs = [x[0] for x in inputs]
    elif not batch_first:
        inputs = [x.transpose(0, 1) for x in inputs]
    attn_mask = None if queries != QUERIES else attention_mask(mask, dtype, batch)
    key_padding_mask = padding(pad, dtype, batch)
    if key_padding_mask is not None and not batched:
        key_padding_mask = key_padding_mask[0]
    keywords = {
        "attn_mask": attn_mask,
        "key_padding_mask": key_padding_mask,
        "need_weights": weights is not None,
        "average_attn_weights": weights == "averaged",
        "is_causal": mask == "causal" and attn_mask is not None,
    }
    if same_sizes and shared != "none":
        inputs = inputs[:2] if shared == "kv" else inputs[:1]

    def call(module):
        def run(*x, **keywords):
            q, k, v = x if len(x) == 3 else (x[0], x[-1], x[-1])
            return module(q, k, v, **keywords)

        run.parameters = module.parameters
        return run

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Support for mismatched")
        same(theirs, mine, inputs, dtype, call, **keywords)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_in_inference(batch_first, need_weights, monkeypatch):
    """torch's fast path is one C++ call that knows nothing of ours."""
    theirs, mine = pair("MultiheadAttention", WIDTH, HEADS, batch_first=batch_first, train=False)
    x = randn(BATCH, KEYS, WIDTH)
    with torch.inference_mode():
        expected = theirs(x, x, x, need_weights=need_weights)
        monkeypatch.setattr(torch, "_native_multi_head_attention", None)
        got = mine(x, x, x, need_weights=need_weights)
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a)


def test_attention_weights_are_dropped_out_as_torchs():
    theirs, mine = pair("MultiheadAttention", WIDTH, HEADS, dropout=0.5)
    x = randn(KEYS, BATCH, WIDTH)
    results = []
    for module in (theirs, mine):
        torch.manual_seed(1)
        results.append(module(x, x, x))
    torch.testing.assert_close(*results)


def test_attention_drops_out_in_training_only():
    attention = ours.MultiheadAttention(WIDTH, HEADS, dropout=0.5)
    x = randn(KEYS, BATCH, WIDTH)
    first, second = (attention(x, x, x, need_weights=False)[0] for _ in range(2))
    assert not torch.equal(first, second)
    attention.eval()
    first, second = (attention(x, x, x, need_weights=False)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_a_query_that_sees_no_key_is_as_torchs():
    theirs, mine = pair("MultiheadAttention", WIDTH, HEADS, batch_first=True)
    x = randn(1, KEYS, WIDTH)
    nothing = torch.ones(1, KEYS, dtype=torch.bool)
    for need_weights in (True, False):
        calls = [
            m(x, x, x, key_padding_mask=nothing, need_weights=need_weights) for m in (theirs, mine)
        ]
        torch.testing.assert_close(*calls, equal_nan=True)
        assert calls[0][0].isnan().any() == need_weights


def test_a_learned_mask_has_its_gradient():
    theirs, mine = pair("MultiheadAttention", WIDTH, HEADS, batch_first=True)
    x = randn(BATCH, KEYS, WIDTH)
    grads = []
    for module in (theirs, mine):
        bias = randn(KEYS, KEYS).requires_grad_()
        module(x, x, x, attn_mask=bias, need_weights=False)[0].square().sum().backward()
        grads.append(bias.grad)
    torch.testing.assert_close(*grads)


WRONG = {
    "query_4d": ({"q": (1, 2, 3, 8)}, AssertionError, "query should be unbatched 2D or batched 3D"),
    "key_2d": ({"k": (7, 8), "v": (7, 8)}, AssertionError, "expected `key` and `value` to be 3-D"),
    "width": ({"q": (3, 5, 9)}, AssertionError, "embedding dimension of 8, but got 9"),
    "value_length": ({"v": (3, 6, 8)}, AssertionError, "does not match value shape"),
    "padding_3d": ({"pad": (3, 7, 1)}, AssertionError, "`key_padding_mask` to be `None` or 2-D"),
    "padding_shape": ({"pad": (3, 6)}, AssertionError, "key_padded_mask.shape"),
    "mask_2d": ({"mask": (5, 6)}, RuntimeError, "2D attn_mask is .* but should be"),
    "mask_3d": ({"mask": (3, 5, 7)}, RuntimeError, "3D attn_mask is .* but should be"),
    "mask_dtype": ({"mask_dtype": torch.int64}, AssertionError, "only bool and floating types"),
    "causal": ({"is_causal": True}, RuntimeError, "Need attn_mask if specifying the is_causal"),
}


@pytest.mark.parametrize(("change", "kind", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_gets_torchs_answer(change, kind, message):
    attention = ours.MultiheadAttention(8, 2, batch_first=True)
    q, k, v = (
        randn(*change.get(name, shape))
        for name, shape in (("q", (3, 5, 8)), ("k", (3, 7, 8)), ("v", (3, 7, 8)))
    )
    keywords = {"is_causal": change.get("is_causal", False)}
    if "pad" in change:
        keywords["key_padding_mask"] = torch.zeros(change["pad"], dtype=torch.bool)
    if "mask" in change or "mask_dtype" in change:
        keywords["attn_mask"] = torch.zeros(
            change.get("mask", (5, 7)), dtype=change.get("mask_dtype", torch.bool)
        )
    with pytest.raises(kind, match=message):
        attention(q, k, v, **keywords)


# ----------------------------------------------------------------------------------------- layers


@dtypes
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("masked", [None, "pad", "mask", "causal"])
def test_layers(dtype, norm_first, train, masked):
    options = {
        "dropout": 0.0,
        "norm_first": norm_first,
        "batch_first": True,
        "dtype": dtype,
        "train": train,
    }
    x, memory = randn(BATCH, KEYS, WIDTH, dtype=dtype), randn(BATCH, 4, WIDTH, dtype=dtype, seed=1)
    pad = padding("bool", dtype)
    mask = nn.Transformer.generate_square_subsequent_mask(KEYS, dtype=dtype)
    encoder = {
        None: {},
        "pad": {"src_key_padding_mask": pad},
        "mask": {"src_mask": mask},
        "causal": {"src_mask": mask, "is_causal": True},
    }[masked]
    same(
        *pair("TransformerEncoderLayer", WIDTH, HEADS, 16, activation="gelu", **options),
        [x],
        dtype,
        **encoder,
    )
    decoder = {
        None: {},
        "pad": {"tgt_key_padding_mask": pad, "memory_key_padding_mask": pad[:, :4]},
        "mask": {"tgt_mask": mask, "memory_mask": mask[:, :4]},
        "causal": {"tgt_mask": mask, "tgt_is_causal": True},
    }[masked]
    same(
        *pair("TransformerDecoderLayer", WIDTH, HEADS, 16, bias=False, **options),
        [x, memory],
        dtype,
        **decoder,
    )


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_transformer(batch_first, train, pad, mask):
    theirs, mine = pair(
        "Transformer", WIDTH, HEADS, 2, 2, 16, dropout=0.0, batch_first=batch_first, train=train
    )
    src, tgt = randn(BATCH, KEYS, WIDTH), randn(BATCH, QUERIES, WIDTH, seed=1)
    if not batch_first:
        src, tgt = src.transpose(0, 1), tgt.transpose(0, 1)
    keywords = {}
    if pad:
        keywords = {
            "src_key_padding_mask": padding("bool", None),
            "memory_key_padding_mask": padding("bool", None),
        }
    if mask is not None:
        causal = nn.Transformer.generate_square_subsequent_mask(QUERIES)
        keywords["tgt_mask"] = causal < 0 if mask == "bool" else causal
    same(theirs, mine, [src, tgt], torch.float32, **keywords)
    with torch.no_grad():
        torch.testing.assert_close(
            mine(src, tgt, **keywords), theirs(src, tgt, **keywords), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("mask_check", [True, False])
def test_padded_positions_in_inference_are_as_torchs(aligned, mask_check, monkeypatch):
    """torch computes them through nested tensors, which leave zeros behind."""
    made = []
    for source in (nn, ours):
        torch.manual_seed(0)
        layer = source.TransformerEncoderLayer(WIDTH, HEADS, 16, 0.0, batch_first=True)
        made.append(
            source.TransformerEncoder(
                layer, 2, source.LayerNorm(WIDTH), mask_check=mask_check
            ).eval()
        )
    pad = padding("bool", None) if aligned or not mask_check else padding("bool", None).flip(1)
    x = randn(BATCH, KEYS, WIDTH)
    with torch.inference_mode():
        expected = made[0](x, src_key_padding_mask=pad)
        for name in ("_nested_tensor_from_mask", "_transformer_encoder_layer_fwd"):
            monkeypatch.setattr(torch, name, None)
        torch.testing.assert_close(
            made[1](x, src_key_padding_mask=pad), expected, atol=1e-5, rtol=1e-5
        )


def test_nested_tensors_are_torchs():
    theirs, mine = pair("TransformerEncoderLayer", WIDTH, HEADS, 16, batch_first=True, train=False)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        x = torch.nested.nested_tensor([randn(4, WIDTH), randn(6, WIDTH)])
        torch.testing.assert_close(mine(x).to_padded_tensor(0.0), theirs(x).to_padded_tensor(0.0))


def test_custom_parts_of_a_transformer_stay():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    model = ours.Transformer(8, 2, 1, 1, 16, custom_encoder=encoder, batch_first=True)
    assert model.encoder is encoder and type(encoder.layers[0]) is nn.TransformerEncoderLayer
    assert type(model.decoder.layers[0]) is ours.TransformerDecoderLayer
    assert type(model.decoder.norm) is ours.LayerNorm


def test_hooks_of_norms_are_called():
    layer = ours.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    expected, seen = layer(randn(2, 3, 8)), []
    layer.norm2.register_forward_hook(lambda module, args, out: seen.append(out))
    torch.testing.assert_close(layer(randn(2, 3, 8)), expected)
    assert len(seen) == 1


@pytest.mark.parametrize(
    "name", ["LayerNorm", "RMSNorm", "MultiheadAttention", "TransformerEncoderLayer"]
)
def test_copies_and_pickles(name):
    args = {"MultiheadAttention": (8, 2), "TransformerEncoderLayer": (8, 2, 16)}.get(name, (8,))
    module = getattr(ours, name)(*args)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(copied) is type(module)
        assert all(
            torch.equal(a, b) for a, b in zip(copied.parameters(), module.parameters(), strict=True)
        )


# -------------------------------------------------------------------------------------- machinery


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_autocast_gives_torchs_dtypes(dtype, x_dtype):
    x = randn(BATCH, KEYS, WIDTH, dtype=x_dtype)
    with torch.autocast("cpu", dtype):
        for name, args in (("LayerNorm", (8,)), ("RMSNorm", (8,)), ("Softmax", (-1,))):
            theirs, mine = pair(
                name, *args, dtype=torch.float64 if x_dtype is torch.float64 else torch.float32
            )
            expected = theirs(x)
            assert mine(x).dtype is expected.dtype
        if x_dtype is torch.float64:
            return
        theirs, mine = pair("MultiheadAttention", WIDTH, HEADS)
        for weights in (True, False):
            expected, got = (m(x, x, x, need_weights=weights) for m in (theirs, mine))
            for a, b in zip(expected, got, strict=True):
                assert (a is None and b is None) or a.dtype is b.dtype
        theirs, mine = pair("TransformerEncoderLayer", WIDTH, HEADS, 16, 0.0)
        expected, got = theirs(x), mine(x)
        assert expected.dtype is got.dtype
        torch.testing.assert_close(got, expected, atol=3e-2, rtol=3e-2)


def test_autocast_on_a_gpu_has_norms_and_softmax_in_float32():
    """Read off torch's dispatch table, so that it can be known without a GPU."""
    table = torch_calls._AUTOCAST_FLOAT32
    assert {("layer_norm", "cuda"), ("softmax", "cuda")} <= table
    assert not [op for op, device in table if device == "cpu"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_replays_dropout(reentrant):
    layer = ours.TransformerEncoderLayer(WIDTH, HEADS, 16, dropout=0.5, batch_first=True)
    results = []
    for checkpointed in (False, True):
        x = randn(BATCH, KEYS, WIDTH).requires_grad_()
        torch.manual_seed(1)
        if checkpointed:
            out = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)
        else:
            out = layer(x)
        layer.zero_grad()
        out.square().sum().backward()
        results.append((out.detach(), x.grad, [p.grad for p in layer.parameters()]))
    torch.testing.assert_close(*results)


def test_func_grad_vmap_and_double_backward():
    theirs, mine = pair(
        "TransformerEncoderLayer", 4, 2, 4, 0.0, batch_first=True, dtype=torch.float64, train=False
    )
    x = randn(3, 2, 4, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in mine.named_parameters()}

    def loss(module):
        return lambda parameters, x: (
            torch.func.functional_call(module, parameters, (x[None],)).square().sum()
        )

    grads = [torch.func.grad(loss(module))(parameters, x[0]) for module in (theirs, mine)]
    torch.testing.assert_close(*grads)
    per_sample = torch.func.vmap(torch.func.grad(loss(mine)), (None, 0))(parameters, x)
    torch.testing.assert_close(per_sample["linear1.weight"][0], grads[0]["linear1.weight"])

    second = []
    for module in (theirs, mine):
        leaf = x.clone().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):  # torch's fused kernel has no second derivative
            (first,) = torch.autograd.grad(module(leaf).sin().sum(), leaf, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), [leaf, *module.parameters()]))
    torch.testing.assert_close(*second)


def test_forward_mode_is_torchs():
    theirs, mine = pair("TransformerEncoderLayer", 4, 2, 4, 0.0, train=False)
    x, tangent = randn(3, 2, 4), randn(3, 2, 4, seed=1)
    with sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(*(torch.func.jvp(m, (x,), (tangent,)) for m in (mine, theirs)))


def ops_of(graph):
    return {str(node.target) for node in graph.nodes if "fastattn" in str(node.target)}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_compiled_whole(train, masked):
    torch._dynamo.reset()
    model = ours.Transformer(WIDTH, HEADS, 1, 1, 16, 0.0, batch_first=True).train(train)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = randn(BATCH, KEYS, WIDTH)
    keywords = {}
    if masked:
        keywords = {
            "tgt_mask": nn.Transformer.generate_square_subsequent_mask(KEYS),
            "src_key_padding_mask": padding("bool", None),
        }
    torch.testing.assert_close(
        compiled(x, x, **keywords), model(x, x, **keywords), atol=1e-5, rtol=1e-5
    )
    assert len(graphs) == 1
    used = ops_of(graphs[0].graph)
    assert any("attention_forward" in op for op in used) and any(
        "layer_norm_forward" in op for op in used
    )


@pytest.mark.parametrize("strict", [True, False])
def test_exported(strict):
    model = ours.TransformerEncoder(
        ours.TransformerEncoderLayer(WIDTH, HEADS, 16, 0.0, batch_first=True), 1
    ).eval()
    x = randn(BATCH, KEYS, WIDTH)
    program = torch.export.export(model, (x,), strict=strict)
    used = ops_of(program.graph)
    assert (
        "fastattn.attention_forward.default" in used
        and "fastattn.layer_norm_forward.default" in used
    )
    torch.testing.assert_close(program.module()(x), model(x))


def test_meta_modules_give_shapes():
    model = ours.Transformer(WIDTH, HEADS, 1, 1, 16, batch_first=True, device="meta")
    x = torch.empty(BATCH, KEYS, WIDTH, device="meta")
    assert model(x, x).shape == x.shape
    pad = torch.zeros(BATCH, KEYS, dtype=torch.bool, device="meta")
    with torch.no_grad():
        assert model.eval().encoder(x, src_key_padding_mask=pad).shape == x.shape


def test_a_tensor_subclass_keeps_its_rules():
    calls = []

    class Logged(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            calls.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    x = randn(2, 8).as_subclass(Logged)
    out = ours.LayerNorm(8)(x)
    assert isinstance(out, Logged) and F.layer_norm in calls


def test_an_attention_with_a_bias_of_another_dtype():
    theirs = torch.nn.MultiheadAttention(4, 2, batch_first=True)
    theirs.in_proj_bias = torch.nn.Parameter(theirs.in_proj_bias.half())
    mine, x = copy.deepcopy(theirs), randn(2, 3, 4)
    ours.adopt(mine)
    torch.testing.assert_close(mine(x, x, x)[0], theirs(x, x, x)[0])
