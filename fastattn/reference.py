"""Naive PyTorch: the definition of what every kernel computes, and the oracle of the tests.

Written for reading, not for speed. The forward functions are made of differentiable operations, so
that autograd can go through them any number of times; the backward functions spell out the maths
that the kernels follow. Statistics and accumulation are float32, or float64 for float64 inputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .spec import Mask

if TYPE_CHECKING:
    from .backends.base import AttentionCall, LayerNormCall

_WORD = 0xFFFFFFFF


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


# ---------------------------------------------------------------------------------------- dropout


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of the 64-bit product of two 32-bit words (int64 wraps as uint64 does)."""
    product = a * b
    return (product >> 32) & _WORD, product & _WORD


def philox(
    seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four random 32-bit words for each counter, as int64 in [0, 2**32).

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The counters broadcast.
    """
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def _keep(words: tuple[Tensor, ...], columns: int, p: float) -> Tensor:
    """Word ``j & 3`` of counter ``j >> 2`` decides column j: kept when at least p * 2**32."""
    threshold = min(int(p * 2**32), _WORD)
    return torch.stack(words, dim=-1).flatten(-2)[..., :columns] >= threshold


def attention_dropout_keep(
    seed: Tensor, p: float, batch: int, heads: int, q_len: int, k_len: int
) -> Tensor:
    """(batch, heads, q_len, k_len) bool: which probabilities survive dropout."""

    def axis(n: int, dim: int) -> Tensor:
        shape = [1, 1, 1, 1]
        shape[dim] = n
        return torch.arange(n, device=seed.device).view(shape)

    words = philox(seed, axis((k_len + 3) // 4, 3), axis(q_len, 2), axis(heads, 1), axis(batch, 0))
    return _keep(words, k_len, p)


def row_dropout_keep(seed: Tensor, p: float, rows: int, width: int) -> Tensor:
    """(rows, width) bool: which elements survive the dropout of a residual branch."""
    row = torch.arange(rows, device=seed.device)[:, None]
    column = torch.arange((width + 3) // 4, device=seed.device)
    words = philox(seed, column, row & _WORD, row >> 32, torch.zeros_like(row))
    return _keep(words, width, p)


def _dropout(x: Tensor, keep: Tensor | None, p: float) -> Tensor:
    if keep is None:
        return x
    if p == 1.0:
        return torch.zeros_like(x)
    return torch.where(keep, x / (1.0 - p), 0.0)


# -------------------------------------------------------------------------------------- attention


def attention(call: AttentionCall, upcast: bool = True) -> tuple[Tensor, Tensor]:
    """out (B, Hq, Sq, Dv) in q's dtype and lse (B, Hq, Sq) in the statistics dtype.

    ``upcast=False`` multiplies in the inputs' own dtype, as a user of PyTorch would write it: the
    yardstick of the error law in ``fastattn.testing``.
    """
    q, k, v = _operands(call, upcast)
    scores, visible, _ = _scores(call, q, k)
    probabilities, lse, _ = _softmax_with_sink(scores, call.sinks)
    dropped = _dropout(probabilities, _attention_keep(call), call.dropout_p)
    out = _matmul(dropped.to(v.dtype), v, visible)
    return out.to(call.q.dtype), lse


def attention_probabilities(call: AttentionCall) -> Tensor:
    """(B, Hq, Sq, Sk) in the statistics dtype, before dropout: the matrix no kernel makes."""
    q, k, _ = _operands(call, upcast=True)
    return _softmax_with_sink(_scores(call, q, k)[0], call.sinks)[0]


def attention_backward(
    call: AttentionCall, dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(dq, dk, dv, dbias, dsinks). dbias has size 1 where call.bias has stride 0."""
    q, k, v = _operands(call, upcast=True)
    scores, visible, capped = _scores(call, q, k)
    p, _, p_sink = _softmax_with_sink(scores, call.sinks)
    keep = _attention_keep(call)
    dout = dout.to(q.dtype)

    # out_i = sum_j dropped_ij v_j                     ->  dv_j = sum_i dropped_ij dout_i
    dropped = _dropout(p, keep, call.dropout_p)
    dv = _matmul(dropped.mT, dout, visible.mT)
    dp = _dropout(dout @ v.mT, keep, call.dropout_p)
    # p_ij = exp(s_ij - lse_i), dlse_i / ds_ij = p_ij  ->  ds_ij = p_ij (dp_ij - delta_i + dlse_i)
    dp = torch.where(visible, dp, 0.0)  # what a query does not see may hold a NaN
    delta = (p * dp).sum(-1, keepdim=True)
    if dlse is not None:
        delta = delta - dlse.unsqueeze(-1).to(q.dtype)
    ds = torch.where(visible, p * (dp - delta), 0.0)

    dbias = dsinks = None
    if call.bias is not None and call.bias.dtype is not torch.bool:
        broadcast = [d for d in range(4) if call.bias.stride(d) == 0 and call.bias.shape[d] != 1]
        dbias = ds.sum(broadcast, keepdim=True) if broadcast else ds
        dbias = dbias.to(call.bias.dtype)
    if p_sink is not None:
        dsinks = torch.where(p_sink > 0, -p_sink * delta, 0.0).sum((0, 2, 3))

    if call.softcap:  # s = cap tanh(x / cap)          ->  dx = ds (1 - (s / cap)^2)
        ds = torch.where(visible, ds * (1.0 - (capped / call.softcap).square()), 0.0)
    # x_ij = scale q_i . k_j
    dq = _matmul(ds, k, visible) * call.scale
    dk = _matmul(ds.mT, q, visible.mT) * call.scale
    dk, dv = _sum_groups(dk, call.k.shape[1]), _sum_groups(dv, call.v.shape[1])
    dtype = call.q.dtype
    return dq.to(dtype), dk.to(dtype), dv.to(dtype), dbias, dsinks


def _operands(call: AttentionCall, upcast: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in the dtype to compute in, k and v repeated for each query head."""
    q, k, v = call.q, call.k, call.v
    if upcast:
        dtype = _statistics_dtype(q)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    groups = q.shape[1] // max(k.shape[1], 1)
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return q, k, v


def _sum_groups(dx: Tensor, kv_heads: int) -> Tensor:
    """The gradient of one KV head is the sum over the query heads that read it."""
    if dx.shape[1] == kv_heads:
        return dx
    return dx.unflatten(1, (kv_heads, -1)).sum(2)


def _scores(call: AttentionCall, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(scores, visible, capped): scores (B, Hq, Sq, Sk), -inf where a query does not see a key;
    visible, the same as bool; capped, the scores before ALiBi, bias and mask."""
    batch, heads, q_len, _ = q.shape
    k_len = k.shape[2]
    s = (q @ k.mT).to(_statistics_dtype(q)) * call.scale
    if call.softcap:
        s = call.softcap * torch.tanh(s / call.softcap)
    capped = s
    if call.alibi_slopes is not None:
        s = s - call.alibi_slopes[:, :, None, None] * alibi_distance(call.shift, q_len, k_len, s)
    visible = Mask(call.left, call.right, call.shift).dense_mask(q_len, k_len, s.device)
    if call.bias is not None:
        if call.bias.dtype is torch.bool:
            visible = visible & call.bias
        else:
            s = s + call.bias
            visible = visible & (call.bias != -torch.inf)
    visible = visible.expand(batch, heads, q_len, k_len)
    return torch.where(visible, s, -torch.inf), visible, capped


def alibi_distance(shift: int, q_len: int, k_len: int, like: Tensor) -> Tensor:
    """(q_len, k_len) |i + shift - j|, how far key j is from query i's own position."""
    i = torch.arange(q_len, device=like.device)[:, None]
    j = torch.arange(k_len, device=like.device)
    return (i + shift - j).abs().to(like.dtype)


def _softmax_with_sink(s: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """(p, lse, p_sink): a sink is one more key of each row, with this logit and no value. A row
    without any key has p = 0 and lse = -inf."""
    k_len = s.shape[-1]
    if sinks is not None:
        s = torch.cat([s, sinks.to(s.dtype)[:, None, None].expand(*s.shape[:-1], 1)], dim=-1)
    blind = (s == -torch.inf).all(dim=-1, keepdim=True)
    safe = torch.where(blind, 0.0, s)
    p = torch.where(s == -torch.inf, 0.0, safe.softmax(dim=-1))  # 0 also beside a NaN
    lse = torch.where(blind.squeeze(-1), -torch.inf, safe.logsumexp(dim=-1))
    return p[..., :k_len], lse, (p[..., k_len:] if sinks is not None else None)


def _attention_keep(call: AttentionCall) -> Tensor | None:
    if call.dropout_p == 0.0 or call.seed is None:
        return None
    batch, heads, q_len, _ = call.q.shape
    return attention_dropout_keep(call.seed, call.dropout_p, batch, heads, q_len, call.k.shape[2])


def _matmul(a: Tensor, b: Tensor, visible: Tensor) -> Tensor:
    """``a @ b``, of which row i takes only what it sees: a is 0 elsewhere, but 0 * nan is nan."""
    out = a @ b
    if not _has_values(out) or bool(torch.isfinite(out).all()):
        return out
    finite = torch.isfinite(b).all(dim=-1)  # (B, H, n)
    out = a @ torch.where(finite[..., None], b, 0.0)
    special = torch.where(finite[..., None], 0.0, b)
    for j in (~finite).flatten(0, 1).any(dim=0).nonzero().flatten().tolist():
        term = a[..., j, None] * special[..., j, None, :]
        out = out + torch.where(visible[..., j, None], term, 0.0)
    return out


def _has_values(x: Tensor) -> bool:
    """False while x is traced or transformed, when no decision can hang on its values."""
    return type(x) is Tensor and not torch._C._are_functorch_transforms_active()


# ------------------------------------------------------------------------------------- layer norm


def normalize(
    source: Tensor, weight: Tensor | None, bias: Tensor | None, width: int, eps: float, rms: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(y, mean, rstd): y in source's shape and dtype, mean (None for RMS) and rstd (rows, 1)."""
    x = _rows(source.to(_statistics_dtype(source)), width)
    x_hat, mean, rstd = _x_hat(x, eps, rms)
    y = x_hat
    if weight is not None:
        y = y * weight.reshape(width)
    if bias is not None:
        y = y + bias.reshape(width)
    return y.to(source.dtype).view(source.shape), mean, rstd


def layer_norm(
    call: LayerNormCall,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """(y, new_residual, mean, rstd): y = normalize(residual + dropout(x))."""
    source, new_residual = call.x, None
    if call.residual is not None:
        branch = _rows(call.x.to(_statistics_dtype(call.x)), call.width)
        branch = _dropout(branch, _row_keep(call), call.dropout_p)
        total = _rows(call.residual, call.width) + branch
        source = new_residual = total.to(call.residual.dtype).view(call.x.shape)
    y, mean, rstd = normalize(source, call.weight, call.bias, call.width, call.eps, call.rms)
    return y, new_residual, None if mean is None else mean.flatten(), rstd.flatten()


def layer_norm_backward(
    call: LayerNormCall, source: Tensor, dy: Tensor, dnew_residual: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dresidual, dweight, dbias); ``source`` is what was normalised."""
    x = _rows(source.to(_statistics_dtype(source)), call.width)
    g = dy = _rows(dy.to(x.dtype), call.width)
    x_hat, _, rstd = _x_hat(x, call.eps, call.rms)

    dweight = dbias = dresidual = None
    if call.weight is not None:  # y = x_hat w + b
        g = dy * call.weight.reshape(call.width)
        dweight = (dy * x_hat).sum(0).view(call.weight.shape).to(call.weight.dtype)
    if call.bias is not None:
        dbias = dy.sum(0).view(call.bias.shape).to(call.bias.dtype)

    # x_hat = (x - mean) rstd  ->  dx = rstd (g - mean(g) - x_hat mean(g x_hat)), RMS: no mean(g)
    dx = g - x_hat * (g * x_hat).mean(-1, keepdim=True)
    if not call.rms:
        dx = dx - g.mean(-1, keepdim=True)
    dx = dx * rstd
    if dnew_residual is not None:
        dx = dx + _rows(dnew_residual, call.width)
    if call.residual is not None:
        dresidual = dx.to(source.dtype).view(source.shape)
        dx = _dropout(dx, _row_keep(call), call.dropout_p)
    return dx.to(source.dtype).view(source.shape), dresidual, dweight, dbias


def _rows(x: Tensor, width: int) -> Tensor:
    rows = x.numel() // width if width else 0
    return x.reshape(rows, width)


def _x_hat(x: Tensor, eps: float, rms: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    mean = None
    if not rms:
        mean = x.mean(-1, keepdim=True)
        x = x - mean
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * rstd, mean, rstd


def _row_keep(call: LayerNormCall) -> Tensor | None:
    if call.dropout_p == 0.0 or call.seed is None:
        return None
    rows = call.x.numel() // call.width if call.width else 0
    return row_dropout_keep(call.seed, call.dropout_p, rows, call.width)


# ---------------------------------------------------------------------------------------- softmax


def softmax(
    x: Tensor, dim: int, mask: Tensor | None, scale: float, log: bool, dtype: torch.dtype
) -> Tensor:
    """softmax(scale * x + mask) over ``dim``, or its logarithm, in ``dtype``."""
    s = x.to(_statistics_dtype(x)) * scale
    if mask is not None:
        s = torch.where(mask, s, -torch.inf) if mask.dtype is torch.bool else s + mask
    y = s.log_softmax(dim) if log else s.softmax(dim)
    if mask is not None:  # a row with every key masked: nothing, where torch has NaN
        blind = (s == -torch.inf).all(dim, keepdim=True)
        y = torch.where(blind, -torch.inf if log else 0.0, y)
    return y.to(dtype)


def softmax_backward(
    y: Tensor, dy: Tensor, dim: int, scale: float, log: bool, x_dtype: torch.dtype
) -> Tensor:
    """dx of ``softmax``; where the logarithm is -inf, so is x or its mask, and dx is 0."""
    dtype = _statistics_dtype(y)
    y, dy = y.to(dtype), dy.to(dtype)
    if log:
        dx = torch.where(y == -torch.inf, 0.0, dy - y.exp() * dy.sum(dim, keepdim=True))
    else:
        dx = y * (dy - (y * dy).sum(dim, keepdim=True))
    return (dx * scale).to(x_dtype)
