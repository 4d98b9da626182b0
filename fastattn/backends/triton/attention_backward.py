"""Attention backward (Dao et al., 2022): the probabilities are made again from lse, tile by tile.

With p the probabilities, o the output and l the lse:
  dv_j = sum_i drop(p_ij) do_i              dp_ij = drop(do_i . v_j)
  dlogit_ij = p_ij (dp_ij - delta_i)        delta_i = do_i . o_i - dl_i
  ds_ij = dlogit_ij * dlogit/ds             dq_i = sum_j ds_ij k_j,   dk_j = sum_i ds_ij q_i

First delta, row by row; then dq, a tile of queries through its keys; then dk and dv, a tile of keys
through the queries of all heads that read it. Every sum is one program's, or is made of parts in a
fixed order: no atomics, the same result every time.

As in the forward, the common loops trust what they see: p = exp2(x * factor - reference), for
float32 exp2((x - reference) * factor), with lse as the reference. Where lse has no room for the
logarithm of the sum (say -3e38, from a bias of the smallest float), the first kernel makes the
row's maximum and sum again, and leaves NaN as its reference. A program that finds its result not
finite takes its tile once more, carefully.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..base import AttentionCall, Needs, bias_gradient_shape
from .attention_backward_kernels import (
    Spread,
    attention_dbias_kernel,
    attention_dkdv_kernel,
    attention_dq_kernel,
    attention_key_sums_kernel,
)
from .attention_backward_tile import Outputs, Rows, Tensors, attention_rows_kernel
from .attention_config import (
    BackwardConfig,
    Config,
    attention_problem,
    backward_config,
    heads_together,
)
from .attention_forward import Order
from .attention_tile import problem_of, static_of
from .kernel import DESCRIPTORS_IN_TUPLES, Launch, View, architecture, describe
from .tuned import tuned


def attention_backward(
    call: AttentionCall,
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    needs: Needs,
) -> tuple[Tensor | None, ...]:
    """(dq, dk, dv, dbias, dsinks), as ``Backend.attention_backward``."""
    plan = BackwardPlan(call, dout, dlse, out, lse, needs, architecture(call.q.device))
    for launch in plan.launches:
        launch.run()
    return plan.gradients()


class BackwardPlan:
    """The kernels of one call, and what they write; tensors may be on the meta device."""

    def __init__(
        self,
        call: AttentionCall,
        dout: Tensor,
        dlse: Tensor | None,
        out: Tensor,
        lse: Tensor,
        needs: Needs,
        arch: str,
        config: BackwardConfig | None = None,
    ) -> None:
        self.call, self.dout = call, dout
        self.problem = problem_of(call)
        self.config = config or self._config(arch)
        batch, heads, q_len, _ = call.q.shape
        k_len = call.k.shape[2]
        self.launches: list[Launch] = []
        rows, empty = batch * heads * q_len, batch * heads * q_len * k_len == 0
        new = torch.zeros_like if empty else torch.empty_like
        self.dq, self.dk, self.dv = (
            new(x) if need else None
            for x, need in zip((call.q, call.k, call.v), needs, strict=False)
        )
        self.dbias: Tensor | None = None
        self.row_sums: Tensor | None = None
        self.key_sums: Tensor | None = None
        if needs[3] and call.bias is not None:
            self._plan_bias(call.bias)
        tiles = -(-q_len // self.config.rows.block_m)
        self.lse, self.needs_sinks = lse, needs[4]
        self.delta = torch.empty_like(lse)
        if rows == 0 or (k_len == 0 and not self.needs_sinks):
            return

        self.x = Tensors(
            View.of(call.q),
            View.of(call.k),
            View.of(call.v),
            View.of(dout),
            Rows(self.delta, *(torch.empty_like(lse) for _ in range(3))),
        )
        self._add(
            attention_rows_kernel,
            (tiles * batch * heads,),
            self.config.rows,
            out=View.of(out),
            lse=lse.contiguous(),
            dlse=None if dlse is None else View.of(dlse),
            sinks=call.sinks,
        )
        if not empty:
            self._plan_sweeps()

    def _config(self, arch: str) -> BackwardConfig:
        q, (k_len, v_dim) = self.call.q, self.call.v.shape[2:]
        q_len, head_dim = q.shape[2:]
        name = attention_problem(q.dtype, head_dim, v_dim, q_len)
        default = backward_config(arch, q.dtype, head_dim, v_dim, q_len, k_len)
        return tuned("attention_backward", name, q.device, default)

    def _plan_bias(self, bias: Tensor) -> None:
        """dbias, or the sums of which it is made: as large as the scores without the dimension
        along which the bias is the same."""
        batch, heads, q_len, k_len = bias.shape
        self.dbias_shape = bias_gradient_shape(bias)
        self.shared = [a < b for a, b in zip(self.dbias_shape, bias.shape, strict=True)]
        if self.shared[3]:
            self.row_sums = bias.new_zeros((batch, heads, q_len), dtype=torch.float32)
        elif self.shared[2]:
            self.key_sums = bias.new_zeros((batch, heads, k_len), dtype=torch.float32)
        else:  # zeros: whole tiles may be hidden
            self.dbias = bias.new_zeros(self.dbias_shape)

    def _plan_sweeps(self) -> None:
        call, config = self.call, self.config
        batch, heads, q_len, head_dim = call.q.shape
        kv_heads, k_len = call.k.shape[1:3]
        group, even = self.problem.sizes.group, self.problem.mask.right is None
        bytes_a_row = (head_dim + call.v.shape[3]) * call.q.element_size()
        dbias = None if self.dbias is None else self._spread(self.dbias)
        by_score = dbias if dbias and not any(self.shared) else None

        outputs = Outputs(_view(self.dq), None, None, by_score, self.row_sums)
        if any(x is not None for x in outputs):
            tiles = -(-q_len // config.dq.block_m)
            together = heads_together(batch * heads, k_len * bytes_a_row, group, even)
            order = Order(tiles, batch * heads, together)
            grid = (tiles * batch * heads,)
            self._add(
                attention_dq_kernel, grid, config.dq, ("k", "v"), outputs=outputs, order=order
            )
        outputs = Outputs(None, _view(self.dk), _view(self.dv), None, None)
        if any(x is not None for x in outputs):
            tiles = -(-k_len // config.dkdv.block_n)
            together = heads_together(batch * kv_heads, q_len * bytes_a_row * group, 1, even)
            order = Order(tiles, batch * kv_heads, together)
            grid = (tiles * batch * kv_heads,)
            self._add(
                attention_dkdv_kernel,
                grid,
                config.dkdv,
                ("q", "dout"),
                outputs=outputs,
                order=order,
            )
        key_tiles = -(-k_len // config.dbias.block_n)
        if self.key_sums is not None:
            grid = (key_tiles * batch * heads,)
            self._add(attention_key_sums_kernel, grid, config.dbias, key_sums=self.key_sums)
        if dbias and any(self.shared):
            own_batches, own_heads = self.dbias_shape[:2]
            spread = Spread(batch // own_batches, heads // own_heads, own_heads)
            q_tiles = -(-q_len // config.dbias.block_m)
            grid = (q_tiles * key_tiles * own_batches * own_heads,)
            self._add(attention_dbias_kernel, grid, config.dbias, dbias=dbias, spread=spread)

    def _spread(self, dbias: Tensor) -> View:
        """With stride 0 where the bias is shared."""
        strides = (
            0 if shared else step for step, shared in zip(dbias.stride(), self.shared, strict=True)
        )
        return View(dbias, *strides)

    def _add(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        config: Config,
        walked: tuple[str, ...] = (),
        **arguments: Any,
    ) -> None:
        """``walked``: the tensors of which the kernel's loops fetch tiles."""
        tensors = {"q": self.call.q, "k": self.call.k, "v": self.call.v, "dout": self.dout}
        described = tuple(tensors[name] for name in walked) if DESCRIPTORS_IN_TUPLES else ()
        static = static_of(self.call, self.problem.score, config, described)
        x = self.x
        if static.tma:
            rows = config.block_m if "q" in walked else config.block_n
            x = x._replace(**{name: describe(tensors[name], rows) for name in walked})
        self.launches.append(
            Launch(
                kernel,
                grid,
                {"x": x, **arguments, **self.problem._asdict()},
                {"static": static},
                config.num_warps,
                config.num_stages,
            )
        )

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Once the kernels have run. Few numbers gather from many rows: in float64."""
        dbias, dsinks, sums = self.dbias, None, self.row_sums
        if self.key_sums is not None:
            sums = self.key_sums.unsqueeze(2)
        elif sums is not None:
            sums = sums.unsqueeze(3)
        if sums is not None and self.call.bias is not None:
            dims = [d for d in range(4) if sums.shape[d] != self.dbias_shape[d]]
            if dims:
                sums = sums.sum(dims, keepdim=True, dtype=torch.float64)
            dbias = sums.to(self.call.bias.dtype)
        sinks = self.call.sinks
        if self.needs_sinks and sinks is not None:
            # The sink's probability is exp(sink - lse); its value is zero, so its dp is too.
            share = torch.exp(sinks.double()[:, None] - self.lse.double())
            dlogit = torch.where(share > 0, -share * self.delta, 0.0)  # no lse: share is NaN
            dsinks = dlogit.sum((0, 2)).to(sinks.dtype)
        return self.dq, self.dk, self.dv, dbias, dsinks


def _view(x: Tensor | None) -> View | None:
    return None if x is None else View.of(x)
