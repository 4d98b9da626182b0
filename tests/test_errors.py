"""Every mistake raises before anything runs, and names the argument, what fits and what came."""

import numpy as np
import pytest
import torch

import fastattn

Q, K = (2, 4, 5, 8), (2, 2, 7, 8)


def tensors(**shapes):
    return {name: torch.zeros(shape) for name, shape in ({"q": Q, "k": K, "v": K} | shapes).items()}


ATTENTION = [
    # changed arguments, error, what the message says
    (tensors(q=(4, 5, 8)), ValueError, "q: expected 4 dimensions .* got shape \\(4, 5, 8\\)"),
    (tensors(v=(7, 8)), ValueError, "v: expected 4 dimensions"),
    (tensors(k=(3, 2, 7, 8)), ValueError, "k: expected q's batch size 2, got 3"),
    (tensors(v=(1, 2, 7, 8)), ValueError, "v: expected q's batch size 2, got 1"),
    (tensors(k=(2, 2, 7, 9)), ValueError, "k: expected q's head dim 8, got 9"),
    (tensors(v=(2, 2, 6, 8)), ValueError, "v: expected k's sequence length 7, got 6"),
    (tensors(v=(2, 4, 7, 8)), ValueError, "v: expected k's number of heads 2, got 4"),
    (tensors(k=(2, 3, 7, 8), v=(2, 3, 7, 8)), ValueError, "q: .* multiple of k's 3, got 4"),
    (tensors(k=(2, 8, 7, 8), v=(2, 8, 7, 8)), ValueError, "q: .* multiple of k's 8, got 4"),
    (tensors(k=(2, 0, 7, 8), v=(2, 0, 7, 8)), ValueError, "q: .* multiple of k's 0, got 4"),
    (tensors(q=(2, 4, 5, 0), k=(2, 2, 7, 0)), ValueError, "q: expected a head dim of at least 1"),
    ({"q": np.zeros(Q)}, TypeError, "q: expected a torch.Tensor, got ndarray"),
    ({"k": [1.0]}, TypeError, "k: expected a torch.Tensor, got list"),
    ({"v": None}, TypeError, "v: expected a torch.Tensor, got None"),
    ({"q": torch.zeros(Q, dtype=torch.int64)}, TypeError, "k: expected q's dtype torch.int64"),
    ({"k": torch.zeros(K).half()}, TypeError, "k: expected q's dtype torch.float32, got .*float16"),
    ({"v": torch.zeros(K, device="meta")}, ValueError, "v: expected q's device cpu, got meta"),
    ({"q": torch.zeros(Q).to_sparse()}, TypeError, "q: expected a dense"),
    ({"causal": "bottom"}, ValueError, "causal: expected .* got 'bottom'"),
    ({"causal": 1}, TypeError, "causal: expected .* got 1"),
    ({"causal": None}, TypeError, "causal"),
    ({"window": 3}, TypeError, "window: expected None or \\(left, right\\), got 3"),
    ({"window": (1, 2, 3)}, ValueError, "window: .* got 3 values"),
    ({"window": (-2, 0)}, ValueError, "window: .* got -2"),
    ({"window": (1.5, 0)}, TypeError, "window: expected integers or None, got 1.5"),
    ({"window": (True, 0)}, TypeError, "window"),
    ({"scale": "big"}, TypeError, "scale: expected a number, got 'big'"),
    ({"scale": torch.tensor(1.0)}, TypeError, "scale: expected a number, got Tensor"),
    ({"scale": 10**400}, ValueError, "scale: expected a finite number, got inf"),
    ({"scale": float("nan")}, ValueError, "scale: expected a finite number, got nan"),
    ({"softcap": -1.0}, ValueError, "softcap: .* got -1"),
    ({"softcap": float("inf")}, ValueError, "softcap"),
    ({"dropout_p": 1.5}, ValueError, "dropout_p: .*\\[0, 1\\], got 1.5"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p"),
    ({"dropout_p": float("nan")}, ValueError, "dropout_p"),
    ({"dropout_p": "0.1"}, TypeError, "dropout_p"),
    ({"dropout_p": None}, TypeError, "dropout_p"),
    ({"dropout_p": torch.zeros(2)}, TypeError, "dropout_p: expected a number, got Tensor"),
    ({"dropout_p": np.zeros(2)}, TypeError, "dropout_p: expected a number, got ndarray"),
    ({"return_lse": "yes"}, TypeError, "return_lse: expected a bool, got 'yes'"),
    ({"deterministic": 1}, TypeError, "deterministic: expected None or a bool, got 1"),
    ({"bias": torch.zeros(5, 6)}, ValueError, "bias: .*\\(2, 4, 5, 7\\), got \\(5, 6\\)"),
    ({"bias": torch.zeros(1, 2, 4, 5, 7)}, ValueError, "bias"),
    ({"bias": torch.zeros(2, 2, 5, 7)}, ValueError, "bias"),
    ({"bias": torch.zeros(5, 7).half()}, TypeError, "bias: .*float32.*, got torch.float16"),
    ({"bias": torch.zeros(5, 7).int()}, TypeError, "bias"),
    ({"bias": torch.zeros(5, 7, device="meta")}, ValueError, "bias: expected device cpu"),
    ({"bias": 1.0}, TypeError, "bias: expected a torch.Tensor, got 1.0"),
    ({"alibi_slopes": torch.zeros(2)}, ValueError, "alibi_slopes: .*\\(4,\\) or \\(2, 4\\)"),
    ({"alibi_slopes": torch.zeros(4).int()}, TypeError, "alibi_slopes: .*floating"),
    ({"alibi_slopes": [0.5] * 4}, TypeError, "alibi_slopes"),
    ({"alibi_slopes": torch.zeros(4, device="meta")}, ValueError, "alibi_slopes: .*device"),
    ({"sinks": torch.zeros(2, 4)}, ValueError, "sinks: expected shape \\(4,\\), got \\(2, 4\\)"),
    ({"sinks": torch.zeros(4).bool()}, TypeError, "sinks"),
    ({"backend": "cudnn"}, ValueError, "backend: .*reference.*, got 'cudnn'"),
    ({"backend": 3}, TypeError, "backend: .* got 3"),
]


@pytest.mark.parametrize(("changed", "error", "message"), ATTENTION)
@pytest.mark.parametrize("function", [fastattn.attention, fastattn.explain])
def test_attention(function, changed, error, message):
    arguments = tensors() | changed
    q, k, v = (arguments.pop(name) for name in "qkv")
    with pytest.raises(error, match=message):
        function(q, k, v, **arguments)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused(layout):
    x = torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(4, 3)], layout=layout)
    for function in (fastattn.layer_norm, fastattn.rms_norm):
        with pytest.raises(TypeError, match=r"input: expected a dense .* got .*(nested|jagged)"):
            function(x, (3,))
    with pytest.raises(TypeError, match=r"input: expected a dense .* got .*(nested|jagged)"):
        fastattn.softmax(x)
    with pytest.raises(TypeError, match=r"query: expected a dense .* got .*(nested|jagged)"):
        fastattn.scaled_dot_product_attention(x, x, x)
    heads = torch.nested.nested_tensor([torch.zeros(2, 3, 8), torch.zeros(2, 5, 8)])
    with pytest.raises(TypeError, match=r"q: expected a dense .* got a nested"):
        fastattn.attention(heads, heads, heads)


def test_integers_are_refused():
    x = torch.zeros(Q, dtype=torch.int32)
    with pytest.raises(TypeError, match=r"q: expected float32, .* got torch.int32"):
        fastattn.attention(x, x, x)


X = torch.zeros(2, 4, 5, 8)
SDPA = [
    ({"query": torch.zeros(8)}, ValueError, "query: expected at least 2 dimensions"),
    ({"query": None}, TypeError, "query: expected a torch.Tensor"),
    ({"key": torch.zeros(2, 4, 5, 9)}, ValueError, "key: expected query's head dim 8, got 9"),
    ({"value": torch.zeros(2, 4, 6, 8)}, ValueError, "value: expected key's sequence length 5"),
    ({"key": torch.zeros(2, 2, 5, 8)}, ValueError, "query: .*broadcast"),
    ({"key": torch.zeros(3, 4, 5, 8)}, ValueError, "query: .*broadcast"),
    ({"value": X.double()}, TypeError, "value: expected query's dtype"),
    ({"attn_mask": torch.zeros(5, 5), "is_causal": True}, ValueError, "attn_mask: .*is_causal"),
    ({"attn_mask": torch.zeros(5, 6)}, ValueError, "attn_mask: "),
    ({"attn_mask": torch.zeros(5, 5).half()}, TypeError, "attn_mask: .*got torch.float16"),
    ({"is_causal": "no"}, TypeError, "is_causal: expected a bool, got 'no'"),
    ({"is_causal": None}, TypeError, "is_causal"),
    ({"enable_gqa": torch.ones(2)}, TypeError, "enable_gqa: expected a bool, got Tensor"),
    ({"attn_mask": [1]}, TypeError, "attn_mask: expected a torch.Tensor"),
    ({"dropout_p": 2.0}, ValueError, "dropout_p"),
    ({"scale": "x"}, TypeError, "scale"),
    ({"backend": "none"}, ValueError, "backend: "),
    (
        dict.fromkeys(("query", "key", "value"), X[0, 0]) | {"enable_gqa": True},
        ValueError,
        "gqa",
    ),
]


@pytest.mark.parametrize(("changed", "error", "message"), SDPA)
def test_scaled_dot_product_attention(changed, error, message):
    with pytest.raises(error, match=message):
        fastattn.scaled_dot_product_attention(**{"query": X, "key": X, "value": X} | changed)


W = torch.zeros(8)
NORMS = [
    ({"input": [1.0]}, TypeError, "input: expected a torch.Tensor, got list"),
    ({"input": torch.zeros(2, 8).long()}, TypeError, "input: .*got torch.int64"),
    ({"normalized_shape": 8}, TypeError, "normalized_shape: expected a tuple .*, got 8 \\(int\\)"),
    ({"normalized_shape": (8.0,)}, TypeError, "normalized_shape: .*, got \\(8.0,\\)"),
    ({"normalized_shape": torch.tensor([8])}, TypeError, "normalized_shape: "),
    ({"normalized_shape": ()}, ValueError, "normalized_shape: expected at least one dimension"),
    ({"normalized_shape": (7,)}, ValueError, "input: .*\\(\\*, 7\\).*got \\(2, 8\\)"),
    ({"normalized_shape": (3, 2, 8)}, ValueError, "input: "),
    ({"weight": W[:4]}, ValueError, "weight: expected normalized_shape \\(8,\\), got \\(4,\\)"),
    ({"weight": 1.0}, TypeError, "weight: expected a torch.Tensor"),
    ({"weight": W.int()}, TypeError, "weight: "),
    ({"weight": W.to("meta")}, ValueError, "weight: expected device cpu, got meta"),
    ({"eps": "small"}, TypeError, "eps: expected a number"),
    ({"eps": float("nan")}, ValueError, "eps: expected a finite number"),
    ({"backend": "fast"}, ValueError, "backend: "),
]


@pytest.mark.parametrize(("changed", "error", "message"), NORMS)
@pytest.mark.parametrize("function", [fastattn.layer_norm, fastattn.rms_norm])
def test_norms(function, changed, error, message):
    with pytest.raises(error, match=message):
        function(**{"input": torch.zeros(2, 8), "normalized_shape": (8,)} | changed)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"bias": torch.zeros(4)}, ValueError, "bias: expected normalized_shape"),
        ({"weight": W.half()}, TypeError, "weight: expected torch.float32"),
        ({"weight": W.double()}, TypeError, "weight: "),
        ({"eps": None}, TypeError, "eps: expected a number, got None"),
    ],
)
def test_layer_norm_alone(changed, error, message):
    with pytest.raises(error, match=message):
        fastattn.layer_norm(**{"input": torch.zeros(2, 8), "normalized_shape": (8,)} | changed)


def test_layer_norm_parameters_of_two_dtypes():
    with pytest.raises(TypeError, match="bias: expected weight's dtype"):
        fastattn.layer_norm(torch.zeros(2, 8).bfloat16(), (8,), W.bfloat16(), W)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"residual": None}, TypeError, "residual: expected a torch.Tensor, got None"),
        ({"residual": torch.zeros(8)}, ValueError, "residual: expected x's shape \\(2, 8\\)"),
        ({"residual": torch.zeros(2, 8).half()}, TypeError, "residual: expected x's dtype"),
        ({"x": 1}, TypeError, "x: expected a torch.Tensor"),
        ({"dropout_p": 1.01}, ValueError, "dropout_p: "),
        ({"normalized_shape": (4,)}, ValueError, "x: "),
    ],
)
@pytest.mark.parametrize("function", [fastattn.add_layer_norm, fastattn.add_rms_norm])
def test_fused_residual(function, changed, error, message):
    x = torch.zeros(2, 8)
    with pytest.raises(error, match=message):
        function(**{"x": x, "residual": x, "normalized_shape": (8,)} | changed)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"input": 1.0}, TypeError, "input: expected a torch.Tensor"),
        ({"input": torch.zeros(2, 8).long()}, TypeError, "input: .*got torch.int64"),
        ({"input": torch.zeros(2, 8).cfloat(), "dtype": torch.float32}, TypeError, "input: "),
        ({"dtype": np.zeros(2)}, TypeError, "dtype: expected float32"),
        ({"dtype": torch.int32}, TypeError, "dtype: .*got torch.int32"),
        ({"dim": 2}, IndexError, "dim: expected one of \\[-2, 1\\], got 2"),
        ({"dim": -3}, IndexError, "dim: "),
        ({"dim": 0.5}, TypeError, "dim: expected an int, got float"),
        ({"scale": None}, TypeError, "scale: "),
        ({"mask": torch.zeros(7)}, ValueError, "mask: .*\\(2, 8\\), got \\(7,\\)"),
        ({"mask": torch.zeros(1, 2, 8)}, ValueError, "mask: "),
        ({"mask": torch.zeros(8).half()}, TypeError, "mask: "),
        ({"mask": [True]}, TypeError, "mask: expected a torch.Tensor"),
        ({"mask": W.to("meta")}, ValueError, "mask: expected device"),
        ({"backend": "fast"}, ValueError, "backend: "),
    ],
)
@pytest.mark.parametrize("function", [fastattn.softmax, fastattn.log_softmax])
def test_softmax(function, changed, error, message):
    with pytest.raises(error, match=message):
        function(**{"input": torch.zeros(2, 8)} | changed)


def test_numpy_scalars_are_numbers():
    x = torch.ones(2, 2, 4, 8)
    size, half = np.int64(2), np.float32(0.5)
    out = fastattn.attention(x, x, x, window=(size, size), scale=half, softcap=half, dropout_p=half)
    assert out.shape == x.shape
    assert fastattn.softmax(x, size, scale=half).shape == x.shape
    assert fastattn.layer_norm(x, (np.int64(8),), eps=half).shape == x.shape
