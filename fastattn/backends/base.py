"""The contract between the ops and a backend.

A backend receives one *call*, checked and complete, and allocates what it returns. It keeps the
tensors as the user gave them: any strides, any offset, stride 0 where something was broadcast.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..dispatch import Request

Needs = tuple[bool, ...]


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of lse, mean, rstd and of all accumulation for inputs of ``dtype``."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def empty_output(q: Tensor, v_dim: int) -> Tensor:
    """Attention's output, uninitialised (B, Hq, Sq, v_dim).

    Laid out as q is: contiguous, or (B, Sq, Hq, v_dim) in memory when q's heads lie inside its
    sequence, so that a model's ``out.transpose(1, 2).reshape(...)`` costs no copy.
    """
    batch, heads, length, head_dim = q.shape
    if v_dim == head_dim and (  # the same as below, sooner
        q.is_contiguous()
        or q.stride() == (length * heads * head_dim, head_dim, heads * head_dim, 1)
    ):
        return torch.empty_like(q)
    if q.stride(1) < q.stride(2):
        return q.new_empty((batch, length, heads, v_dim)).transpose(1, 2)
    return q.new_empty((batch, heads, length, v_dim))


def bias_gradient_shape(bias: Tensor) -> list[int]:
    """The shape of dbias: one along the dimensions in which the call's bias is broadcast."""
    return [size if step else 1 for size, step in zip(bias.shape, bias.stride(), strict=True)]


def sink_gradient(
    sinks: Tensor, lse: Tensor, lse_low: Tensor | None, delta: Tensor, dlse: Tensor | None
) -> Tensor:
    """dsinks (Hq,), of lse and delta = rowsum(dout * out), (B, Hq, Sq).

    A sink's probability is exp(sink - lse); its value is zero, so its dp is too. One number gathers
    from every row: in float64, as the sum of many like the parts.
    """
    exact_lse = lse.double() if lse_low is None else lse.double() + lse_low
    share = torch.exp(sinks.double()[:, None] - exact_lse)
    share = share.masked_fill(lse == -math.inf, 0.0)
    dlogit = share * (delta if dlse is None else delta - dlse)
    return -dlogit.sum((0, 2)).to(sinks.dtype)


class AttentionCall(NamedTuple):
    """One attention problem, validated. "Statistics dtype" is ``statistics_dtype(q.dtype)``.

    The score of query i and key j is ``softcap * tanh(scale * q_i.k_j / softcap)``, minus
    ``alibi_slope * |i + shift - j|``, plus the bias; a query sees the keys with
    ``i + shift - left <= j <= i + shift + right``.
    """

    q: Tensor  # (B, Hq, Sq, D)
    k: Tensor  # (B, Hkv, Sk, D)
    v: Tensor  # (B, Hkv, Sk, Dv)
    bias: Tensor | None  # (B, Hq, Sq, Sk), stride 0 where broadcast; bool, float32 or q.dtype
    alibi_slopes: Tensor | None  # (B, Hq) view, statistics dtype
    sinks: Tensor | None  # (Hq,) contiguous, statistics dtype
    seed: Tensor | None  # int64 scalar, present when dropout_p > 0
    scale: float
    softcap: float  # 0: off
    left: int  # -1: no limit
    right: int
    shift: int
    dropout_p: float
    for_backward: bool = True  # else lse_low may be None


class LayerNormCall(NamedTuple):
    """Normalise the last ``width`` numbers of ``residual + dropout(x)``, or of x."""

    x: Tensor  # any shape; the normalised dimensions are the trailing ones
    residual: Tensor | None  # x's shape and dtype
    weight: Tensor | None  # normalized_shape; x.dtype or the statistics dtype
    bias: Tensor | None  # as weight
    seed: Tensor | None  # int64 scalar, present when dropout_p > 0
    width: int
    eps: float
    rms: bool  # RMS norm: no mean is subtracted
    dropout_p: float
    for_backward: bool = True  # else mean and rstd may be None


class SoftmaxCall(NamedTuple):
    """``softmax(scale * x + mask)`` over ``dim``, or its logarithm.

    A row of -inf is NaN as in torch without a mask; with one it is zeros (log: -inf).
    """

    x: Tensor
    dim: int  # not negative
    mask: Tensor | None  # x's shape by expand; bool (True = keep), or x.dtype or float32, added
    scale: float
    log: bool
    dtype: torch.dtype  # of the output


class Backend:
    """What a backend implements. None stands for a result that was not asked for."""

    name: str
    challenger = ""  # a later one in the order, which goes before this one where it is ahead

    @property
    def device(self) -> str:
        """The type of device that it runs on here, for whoever wants to try it."""
        return "cpu"

    def unavailable(self) -> str | None:
        """One line why this backend cannot run here at all, or None."""
        return None

    def reasons(self, request: Request) -> list[str]:
        """Why this backend does not serve the request; empty when it does.

        Looks at shapes, dtypes and devices only, and stays plain enough for torch.compile to trace.
        """
        raise NotImplementedError

    def ahead(self, request: Request) -> tuple[bool, str]:
        """Whether it goes before the one it challenges, for a request that both serve, and why; as
        plain as ``reasons``."""
        return False, ""

    def detail(self) -> str:
        """What a person wants to know about this backend here, such as its instruction set."""
        return ""

    def attention_forward(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor | None]:
        """(out, lse, lse_low): out as ``empty_output`` lays it out; lse (B, Hq, Sq), statistics
        dtype; lse_low, as lse, what rounding took off it, for a backward that wants lse more
        exactly, or None."""
        raise NotImplementedError

    def attention_backward(
        self,
        call: AttentionCall,
        dout: Tensor,
        dlse: Tensor | None,
        out: Tensor,
        lse: Tensor,
        lse_low: Tensor | None,
        needs: Needs,
    ) -> tuple[Tensor | None, ...]:
        """(dq, dk, dv, dbias, dsinks), those that ``needs`` asks for.

        dq, dk and dv are laid out as ``torch.empty_like`` of their inputs; dbias is contiguous, in
        the bias's dtype, with size 1 in every dimension in which call.bias has stride 0.
        """
        raise NotImplementedError

    def layer_norm_forward(
        self, call: LayerNormCall
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """(y, new_residual, mean, rstd): y and new_residual contiguous in x's shape and dtype;
        mean (None for RMS) and rstd (rows,) in the statistics dtype."""
        raise NotImplementedError

    def layer_norm_backward(
        self,
        call: LayerNormCall,
        source: Tensor,
        mean: Tensor | None,
        rstd: Tensor,
        dy: Tensor,
        dnew_residual: Tensor | None,
        needs: Needs,
    ) -> tuple[Tensor | None, ...]:
        """(dx, dresidual, dweight, dbias), those that ``needs`` asks for, all contiguous.

        ``source`` is what was normalised: new_residual when there is a residual, else x. The
        forward's x and residual are no longer kept: ``call.x`` (and ``call.residual``, where there
        was one) are the source too.
        """
        raise NotImplementedError

    def softmax_forward(self, call: SoftmaxCall) -> Tensor:
        """y, contiguous, in x's shape and the call's dtype."""
        raise NotImplementedError

    def softmax_backward(
        self, y: Tensor, dy: Tensor, dim: int, scale: float, log: bool, x_dtype: torch.dtype
    ) -> Tensor:
        """dx, contiguous, in ``x_dtype``; for ``log``, zero where y is -inf."""
        raise NotImplementedError
