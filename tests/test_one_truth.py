"""Which keys a query sees and which elements are dropped: the same in every backend, to the bit.

Values that are an identity matrix make attention's output the matrix of probabilities, and an
output gradient that is one makes it the gradient of the values: what is 0 there was hidden or
dropped.
"""

import itertools
from functools import partial

import pytest
import torch
from here import INTERPRETED

import fastattn
from fastattn import dispatch, reference, testing
from fastattn.backends import BACKENDS as BY_NAME
from fastattn.backends.base import AttentionCall
from fastattn.cases import DTYPES
from fastattn.spec import Mask


def probabilities(
    q_len, k_len, mask, backend, seed=None, dropout_p=0.0, batch=1, heads=1, kv_heads=1
):
    """(P, P again): as the forward has it and as the backward makes it, uniform where visible."""
    q = torch.zeros(batch, heads, q_len, 1)
    k = torch.zeros(batch, kv_heads, k_len, 1)
    v = torch.eye(k_len).expand(batch, kv_heads, k_len, k_len)

    def run(*args):
        scalars = (1.0, 0.0, *mask, dropout_p, backend)
        return torch.ops.fastattn.attention_forward(*args, None, None, None, seed, *scalars)

    forward = run(q, k, v)[0]
    # Of one query head of each group at a time: a KV head's gradient is the sum over its group.
    v = torch.zeros(batch, kv_heads, k_len, q_len, requires_grad=True)
    group = heads // kv_heads
    backward = torch.empty_like(forward)
    for g in range(group):
        dout = torch.zeros(batch, heads, q_len, q_len)
        dout[:, g::group] = torch.eye(q_len)
        (dv,) = torch.autograd.grad(run(q, k, v)[0], v, dout)
        backward[:, g::group] = dv.mT
    return forward, backward


LIMITS = (-1, 0, 1, 3)
SHIFTS = (-11, -4, -1, 0, 2, 6)


@pytest.mark.parametrize("q_len", [1, 2, 5, 9, 13])  # up to eight queries are decoded
@pytest.mark.parametrize("k_len", [1, 4, 7, 17])
def test_every_small_mask(q_len, k_len, backend):
    for mask in itertools.starmap(Mask, itertools.product(LIMITS, LIMITS, SHIFTS)):
        visible = mask.dense_mask(q_len, k_len)
        for seen in probabilities(q_len, k_len, mask, backend):
            assert torch.equal(seen[0, 0] != 0, visible), mask


# Where the tiles of the kernels end: 24 and 192 queries, 96 and 128 keys.
BLOCKS = [
    (-1, 0, 77),
    (-1, 0, -23),
    (40, 0, 77),
    (95, 33, 0),
    (-1, 128, 5),
    (7, 7, 60),
    (127, -1, 77),
]


@pytest.mark.parametrize(("q_len", "k_len"), [(49, 300), (200, 129), (25, 97), (6, 400)])
@pytest.mark.parametrize("mask", BLOCKS, ids=str)
def test_masks_across_blocks(mask, q_len, k_len, backend):
    visible = Mask(*mask).dense_mask(q_len, k_len)
    for seen in probabilities(q_len, k_len, mask, backend):
        assert torch.equal(seen[0, 0] != 0, visible)


NO_LIMIT = (-1, -1, 0)


# The interpreter is slow: every other number, and no more tiles than it takes.
SOME = slice(None, None, 2 if INTERPRETED else 1)
LENGTHS = [(1, 4), (1, 37), (3, 130), (40, 7), (130, 261)][: -1 if INTERPRETED else None]


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 1 - 1e-9][SOME])
@pytest.mark.parametrize(("q_len", "k_len"), LENGTHS)
@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 2, 123456789123456789][SOME])
def test_attention_drops_the_same_elements(seed, q_len, k_len, p, backend):
    seed = torch.tensor(seed)
    keep = reference.attention_dropout_keep(seed, p, 2, 4, q_len, k_len)
    shape = {"batch": 2, "heads": 4, "kv_heads": 2}
    for seen in probabilities(q_len, k_len, NO_LIMIT, backend, seed, p, **shape):
        assert torch.equal(seen != 0, keep)
        torch.testing.assert_close(seen, keep / (k_len * (1 - p)))


@pytest.mark.parametrize("left", [1, 2, 3, 50])
@pytest.mark.parametrize("q_len", [5, 150])
def test_dropout_where_a_window_starts_between_counters(q_len, left, backend):
    """A counter gives four elements: keys need not begin at a multiple of four."""
    mask, seed, k_len = Mask(left, 2, 3), torch.tensor(7), q_len + 10
    keep = reference.attention_dropout_keep(seed, 0.5, 1, 1, q_len, k_len)[0, 0]
    for seen in probabilities(q_len, k_len, mask, backend, seed, 0.5):
        assert torch.equal(seen[0, 0] != 0, keep & mask.dense_mask(q_len, k_len))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_drops_the_same_elements(dtype, backend):
    q = torch.zeros(1, 2, 30, 4, dtype=dtype)
    v = torch.eye(50, dtype=dtype).expand(1, 2, 50, 50)
    torch.manual_seed(5)
    out = fastattn.attention(q, q.new_zeros(1, 2, 50, 4), v, dropout_p=0.3, backend=backend)
    torch.manual_seed(5)
    seed = torch.randint(2**63 - 1, ())
    keep = reference.attention_dropout_keep(seed, 0.3, 1, 2, 30, 50)
    assert torch.equal(out != 0, keep)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 9, 64), (70, 33), (4, 5000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_residual_dropout(dtype, shape, p, rms, backend):
    x = torch.ones(shape, dtype=dtype, requires_grad=True)
    add = fastattn.add_rms_norm if rms else fastattn.add_layer_norm
    torch.manual_seed(11)
    _, new_residual = add(x, torch.zeros_like(x), shape[-1:], dropout_p=p, backend=backend)
    torch.manual_seed(11)
    seed = torch.randint(2**63 - 1, ())
    keep = reference.row_dropout_keep(seed, p, x.numel() // shape[-1], shape[-1]).view(shape)
    kept = torch.where(keep, 1 / (1 - p), 0.0).to(dtype)
    torch.testing.assert_close(new_residual, kept)
    assert torch.equal(new_residual != 0, keep)
    (dx,) = torch.autograd.grad(new_residual, x, torch.ones_like(x))
    torch.testing.assert_close(dx, kept)
    assert torch.equal(dx != 0, keep)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_backends_pair(dtype, backend):
    """Any forward with any backward: seed, out and lse mean the same to each."""
    shapes = dict.fromkeys("qkv", (1, 2, 60, 16)) | {"dout": (1, 2, 60, 16), "sinks": (2,)}
    names = {"dq": 0, "dk": 1, "dv": 2, "dsinks": 4}

    def call_of(x):
        qkv = (x["q"], x["k"], x["v"])
        return AttentionCall(*qkv, None, None, x["sinks"], torch.tensor(3), 0.3, 2.0, 40, 0, 0, 0.2)

    def pair(other, draw):
        generator = torch.Generator().manual_seed(draw)
        x = {n: torch.randn(shape, generator=generator).to(dtype) for n, shape in shapes.items()}
        call, wide = call_of(x), {name: t.double() for name, t in x.items()}
        out, lse, low = BY_NAME[backend].attention_forward(call)
        needs = (True, True, True, False, True)
        results = (
            other.attention_backward(call, x["dout"], None, out, lse, low, needs),
            reference.attention_backward(call, x["dout"], None),
            reference.attention_backward(call_of(wide), wide["dout"], None),
        )
        return testing.Comparison(*({n: r[i] for n, i in names.items()} for r in results))

    request = dispatch.Request(
        "attention", torch.device("cpu"), dtype, (torch.Size(shapes["q"]),) * 3
    )
    for other in BY_NAME.values():
        if other.device != "cpu" or dispatch.refusals(other, request):
            continue
        if dtype is torch.float64:
            got, _, exact = pair(other, 0)
            for name in names:
                torch.testing.assert_close(got[name], exact[name])
        else:
            testing.over_draws(partial(pair, other))
