"""The one table of cases, shared by tests, `fastattn check` and benchmarks.

A case says what to call (`op` and its variants) and on what (shapes, dtype, strides). It knows how
to make its inputs, how to call fastattn, which operator of torch does the same, and how much work
that is. It does not judge results (`fastattn.testing`) and does not time them (`fastattn.bench`).
The benchmark shapes with their goals are in `fastattn.bench.table`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self

Inputs = dict[str, Tensor]
Outputs = tuple[Tensor, ...]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("contiguous", "bshd", "packed", "column", "offset", "expanded")


@dataclass(frozen=True)
class Work:
    """What a call has to do at least: floating point operations, and bytes read plus written."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Case:
    """What the three kinds of case have in common."""

    op: ClassVar[str]

    name: str
    dtype: torch.dtype = dataclasses.field(default=torch.float32, kw_only=True)
    dropout_p: float = dataclasses.field(default=0.0, kw_only=True)

    def __str__(self) -> str:
        return f"{self.op}-{self.name}-{str(self.dtype).removeprefix('torch.')}"

    def with_dtype(self, dtype: torch.dtype) -> Self:
        return dataclasses.replace(self, dtype=dtype)

    @property
    def differentiable(self) -> tuple[str, ...]:
        """Names of the inputs that get a gradient."""
        raise NotImplementedError

    def make_inputs(
        self, seed: int = 0, device: str | torch.device = "cpu", requires_grad: bool = False
    ) -> Inputs:
        """The tensors of the call by keyword. One seed gives one set of numbers on every device;
        they are drawn in float32 and rounded, so that dtypes differ by rounding alone."""
        generator = torch.Generator().manual_seed(seed)
        inputs = {name: t.to(device) for name, t in self._tensors(generator).items()}
        if torch.device(device).type != "cpu":
            # .to() drops strides that leave gaps; what it returns is dense but of equal values.
            inputs = {name: self._restride(name, t) for name, t in inputs.items()}
        if requires_grad:
            for name in self.differentiable:
                inputs[name].requires_grad_()
        return inputs

    def run(self, inputs: Inputs, backend: str | None = None, seed: int = 0) -> Outputs:
        """Call fastattn. `seed` fixes the dropout: the same elements drop in every backend."""
        if self.dropout_p > 0:
            torch.manual_seed(seed)
        out = self._call(inputs, backend)
        return out if isinstance(out, tuple) else (out,)

    def torch_peer(self, inputs: Inputs) -> Callable[[], Tensor] | None:
        """torch's fused operator on these inputs, or None where torch has no such thing."""
        raise NotImplementedError

    def work(self, backward: bool = False) -> Work:
        raise NotImplementedError

    def _tensors(self, generator: torch.Generator) -> Inputs:
        raise NotImplementedError

    def _call(self, inputs: Inputs, backend: str | None) -> Any:
        raise NotImplementedError

    def _restride(self, name: str, tensor: Tensor) -> Tensor:
        return tensor


@dataclass(frozen=True)
class AttentionCase(Case):
    """`fastattn.attention` on q (B, heads, q_len, head_dim), k and v (B, kv_heads, k_len, .)."""

    op: ClassVar[str] = "attention"

    batch: int = 2
    heads: int = 2
    q_len: int = 37
    head_dim: int = 16
    kv_heads: int | None = None  # None: as heads
    k_len: int | None = None  # None: as q_len
    value_dim: int | None = None  # None: as head_dim
    causal: bool | str = False
    window: tuple[int | None, int | None] | None = None
    scale: float | None = None
    softcap: float | None = None
    alibi: str | None = None  # "heads" (Hq,) or "batch_heads" (B, Hq)
    bias: str | None = None  # "additive", "boolean", "-inf" (additive, some elements -inf)
    bias_shape: str = "bhqk"  # a letter a dim, 1 where it broadcasts: "11qk", "b11k", "qk"
    # A bias that is the same for every key changes nothing but against a sink.
    bias_dtype: torch.dtype | None = None  # None: as q
    sinks: bool = False
    layout: str = "contiguous"  # one of LAYOUTS, of q, k and v
    magnitude: float = 1.0  # of q
    return_lse: bool = True

    @property
    def shape(self) -> dict[str, int]:
        """B, H, K (kv heads), M (q_len), N (k_len), D and E (value_dim)."""
        return {
            "B": self.batch,
            "H": self.heads,
            "K": self.heads if self.kv_heads is None else self.kv_heads,
            "M": self.q_len,
            "N": self.q_len if self.k_len is None else self.k_len,
            "D": self.head_dim,
            "E": self.head_dim if self.value_dim is None else self.value_dim,
        }

    @property
    def differentiable(self) -> tuple[str, ...]:
        names = ["q", "k", "v"]
        if self.bias in ("additive", "-inf"):
            names.append("bias")
        if self.sinks:
            names.append("sinks")
        return tuple(names)

    @property
    def options(self) -> dict[str, Any]:
        """The keywords of `fastattn.attention` that are not tensors."""
        return {
            "causal": self.causal,
            "window": self.window,
            "scale": self.scale,
            "softcap": self.softcap,
            "dropout_p": self.dropout_p,
            "return_lse": self.return_lse,
        }

    def _call(self, inputs: Inputs, backend: str | None) -> Any:
        import fastattn

        arguments: dict[str, Any] = inputs | self.options
        return fastattn.attention(**arguments, backend=backend)

    def _tensors(self, generator: torch.Generator) -> Inputs:
        s = self.shape
        q_shape = (s["B"], s["H"], s["M"], s["D"])
        k_shape = (s["B"], s["K"], s["N"], s["D"])
        v_shape = (s["B"], s["K"], s["N"], s["E"])
        statistics = torch.float64 if self.dtype == torch.float64 else torch.float32
        inputs = {
            name: _with_layout(scale * _randn(shape, generator), self.layout, self.dtype)
            for name, shape, scale in (
                ("q", q_shape, self.magnitude),
                ("k", k_shape, 1.0),
                ("v", v_shape, 1.0),
            )
        }
        if self.alibi:
            slopes = torch.exp2(-8.0 * torch.arange(1, s["H"] + 1) / s["H"])
            if self.alibi == "batch_heads":
                slopes = slopes * torch.linspace(0.5, 1.0, s["B"])[:, None]
            inputs["alibi_slopes"] = slopes.to(statistics)
        if self.bias:
            sizes = {"b": s["B"], "h": s["H"], "q": s["M"], "k": s["N"], "1": 1}
            noise = _randn(tuple(sizes[letter] for letter in self.bias_shape), generator)
            if self.bias == "boolean":
                inputs["bias"] = noise > -0.5  # about 70 % visible
            else:
                if self.bias == "-inf":
                    noise = noise.masked_fill(noise < -0.5, -math.inf)
                inputs["bias"] = noise.to(self.bias_dtype or self.dtype)
        if self.sinks:
            inputs["sinks"] = _randn((s["H"],), generator).to(self.dtype)
        return inputs

    def _restride(self, name: str, tensor: Tensor) -> Tensor:
        if name not in ("q", "k", "v"):
            return tensor
        return _with_layout(tensor, self.layout, tensor.dtype)

    def bounds(self) -> tuple[int, int, int]:
        """The mask as (left, right, shift), -1 for no limit: see docs/design.md, section 3."""
        left, right = (-1 if side is None else side for side in self.window or (None, None))
        if self.causal:
            right = 0 if right < 0 else min(right, 0)
        shift = 0 if self.causal == "top_left" else self.shape["N"] - self.shape["M"]
        return left, right, shift

    def visible_pairs(self) -> int:
        """Pairs of query and key in one head that causal and window leave."""
        q_len, k_len = self.shape["M"], self.shape["N"]
        left, right, shift = self.bounds()
        pairs = 0
        for i in range(q_len):
            first = 0 if left < 0 else max(0, i + shift - left)
            last = k_len - 1 if right < 0 else min(k_len - 1, i + shift + right)
            pairs += max(0, last - first + 1)
        return pairs

    def work(self, backward: bool = False) -> Work:
        """2 (D + E) operations a visible pair; the backward 2.5 times that, as the papers count.

        Bytes are those of the inputs and outputs, each moved once.
        """
        s = self.shape
        flops = 2.0 * s["B"] * s["H"] * self.visible_pairs() * (s["D"] + s["E"])
        queries = s["B"] * s["H"] * s["M"] * (s["D"] + s["E"])
        keys = s["B"] * s["K"] * s["N"] * (s["D"] + s["E"])
        moved = (queries + keys) * self.dtype.itemsize
        return Work(2.5 * flops, 2.0 * moved) if backward else Work(flops, float(moved))

    def torch_peer(self, inputs: Inputs) -> Callable[[], Tensor] | None:
        s = self.shape
        square = s["M"] == s["N"]
        alone = not (self.causal and self.bias)
        aligned = not self.causal or self.causal == "top_left" or square
        if self.window or self.softcap or self.alibi or self.sinks or not (alone and aligned):
            return None
        if self.bias and (self.bias_dtype or self.dtype) != self.dtype:
            return None

        def peer() -> Tensor:
            return F.scaled_dot_product_attention(
                inputs["q"],
                inputs["k"],
                inputs["v"],
                attn_mask=inputs.get("bias"),
                dropout_p=self.dropout_p,
                is_causal=bool(self.causal),
                scale=self.scale,
                enable_gqa=s["K"] != s["H"],
            )

        return peer


@dataclass(frozen=True)
class LayerNormCase(Case):
    """`layer_norm` or `rms_norm` over the last `dims` dims; with `residual`, the `add_` twins."""

    op: ClassVar[str] = "layer_norm"

    shape: tuple[int, ...] = (8, 64)
    dims: int = 1
    weight: bool = True
    bias: bool = True
    rms: bool = False
    residual: bool = False
    param_dtype: torch.dtype | None = None  # None: as x
    eps: float = 1e-5
    layout: str = "contiguous"
    mean: float = 0.0
    magnitude: float = 1.0

    @property
    def normalized_shape(self) -> tuple[int, ...]:
        return self.shape[len(self.shape) - self.dims :]

    @property
    def has_bias(self) -> bool:
        return self.bias and not self.rms

    @property
    def differentiable(self) -> tuple[str, ...]:
        present = {
            "x": True,
            "residual": self.residual,
            "weight": self.weight,
            "bias": self.has_bias,
        }
        return tuple(name for name, there in present.items() if there)

    def _call(self, inputs: Inputs, backend: str | None) -> Any:
        import fastattn

        common: dict[str, Any] = {n: inputs[n] for n in ("weight", "bias") if n in inputs}
        common |= {"eps": self.eps, "backend": backend}
        if self.residual:
            add: Callable[..., Any]
            add = fastattn.add_rms_norm if self.rms else fastattn.add_layer_norm
            common["dropout_p"] = self.dropout_p
            return add(inputs["x"], inputs["residual"], self.normalized_shape, **common)
        norm: Callable[..., Tensor] = fastattn.rms_norm if self.rms else fastattn.layer_norm
        return norm(inputs["x"], self.normalized_shape, **common)

    def _tensors(self, generator: torch.Generator) -> Inputs:
        x = self.mean + self.magnitude * _randn(self.shape, generator)
        inputs = {"x": _with_layout(x, self.layout, self.dtype)}
        parameter_dtype = self.dtype
        if self.param_dtype and self.dtype != torch.float64:  # nothing is wider than float64
            parameter_dtype = self.param_dtype
        if self.residual:
            residual = _randn(self.shape, generator)
            inputs["residual"] = _with_layout(residual, self.layout, self.dtype)
        if self.weight:
            weight = 1.0 + 0.1 * _randn(self.normalized_shape, generator)
            inputs["weight"] = weight.to(parameter_dtype)
        if self.has_bias:
            inputs["bias"] = (0.1 * _randn(self.normalized_shape, generator)).to(parameter_dtype)
        return inputs

    def _restride(self, name: str, tensor: Tensor) -> Tensor:
        if name not in ("x", "residual"):
            return tensor
        return _with_layout(tensor, self.layout, tensor.dtype)

    def work(self, backward: bool = False) -> Work:
        """Forward reads x and writes y; backward reads x and dy and writes dx."""
        elements = math.prod(self.shape)
        tensors = (3 if backward else 2) + (2 if self.residual else 0)
        flops = (12.0 if backward else 8.0) * elements
        return Work(flops, float(elements * tensors * self.dtype.itemsize))

    def torch_peer(self, inputs: Inputs) -> Callable[[], Tensor] | None:
        if self.residual or (self.param_dtype or self.dtype) != self.dtype:
            return None
        shape = list(self.normalized_shape)
        x, weight, bias = inputs["x"], inputs.get("weight"), inputs.get("bias")
        if self.rms:
            return lambda: F.rms_norm(x, shape, weight, self.eps)
        return lambda: F.layer_norm(x, shape, weight, bias, self.eps)


@dataclass(frozen=True)
class SoftmaxCase(Case):
    """`softmax` or `log_softmax` of scale * x + mask over `dim`."""

    op: ClassVar[str] = "softmax"

    shape: tuple[int, ...] = (8, 64)
    dim: int = -1
    mask: str | None = None  # "boolean", "additive", "rows" (boolean, every third row has no key)
    mask_shape: tuple[int, ...] | None = None  # None: as x
    scale: float = 1.0
    log: bool = False
    out_dtype: torch.dtype | None = None
    layout: str = "contiguous"
    magnitude: float = 1.0

    @property
    def differentiable(self) -> tuple[str, ...]:
        return ("x",)

    def _call(self, inputs: Inputs, backend: str | None) -> Any:
        import fastattn

        function = fastattn.log_softmax if self.log else fastattn.softmax
        return function(
            inputs["x"],
            self.dim,
            self.out_dtype,
            scale=self.scale,
            mask=inputs.get("mask"),
            backend=backend,
        )

    def _tensors(self, generator: torch.Generator) -> Inputs:
        x = self.magnitude * _randn(self.shape, generator)
        inputs = {"x": _with_layout(x, self.layout, self.dtype)}
        if self.mask:
            noise = _randn(self.mask_shape or self.shape, generator)
            if self.mask == "additive":
                inputs["mask"] = noise.to(self.dtype)
            else:
                inputs["mask"] = noise > -0.5
            if self.mask == "rows":
                inputs["mask"].view(-1, noise.shape[-1])[::3] = False
        return inputs

    def _restride(self, name: str, tensor: Tensor) -> Tensor:
        return _with_layout(tensor, self.layout, tensor.dtype) if name == "x" else tensor

    def work(self, backward: bool = False) -> Work:
        """Forward reads x and writes y; backward reads y and dy and writes dx."""
        elements = math.prod(self.shape)
        tensors = 3 if backward else 2
        return Work(5.0 * elements, float(elements * tensors * self.dtype.itemsize))

    def torch_peer(self, inputs: Inputs) -> Callable[[], Tensor] | None:
        if self.mask or self.scale != 1.0:
            return None
        function = F.log_softmax if self.log else F.softmax
        return lambda: function(inputs["x"], self.dim, dtype=self.out_dtype)


def _randn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def _with_layout(values: Tensor, layout: str, dtype: torch.dtype) -> Tensor:
    """The same values (but for "expanded", which repeats the first batch) laid out another way."""
    values = values.to(dtype)
    if layout == "contiguous":
        return values
    if layout == "bshd":  # dims 1 and 2 swapped in memory: what a (B, S, H, D) model passes
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "packed":  # every row inside a three times wider one: a slice of a qkv projection
        wide = values.new_empty(*values.shape[:-1], 3 * values.shape[-1])
        wide[..., values.shape[-1] : 2 * values.shape[-1]] = values
        return wide[..., values.shape[-1] : 2 * values.shape[-1]]
    if layout == "column":  # the last dim is not the dense one
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "offset":  # one element past the start: unaligned for any vector width
        flat = values.new_empty(values.numel() + 1)
        flat[1:] = values.reshape(-1)
        return flat[1:].view(values.shape)
    if layout == "expanded":  # stride 0 over the batch
        return values[:1].expand(values.shape)
    raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")


ATTENTION_CASES: tuple[AttentionCase, ...] = (
    AttentionCase("full"),
    AttentionCase("tiles", q_len=200, k_len=333, head_dim=64),
    AttentionCase("cross", q_len=19, k_len=70),
    AttentionCase("one_key", q_len=5, k_len=1),
    AttentionCase("causal", causal=True),
    AttentionCase("causal_tiles", q_len=300, head_dim=64, causal=True),
    AttentionCase("causal_long_keys", q_len=33, k_len=95, causal=True),
    AttentionCase("causal_rows_without_keys", q_len=70, k_len=40, causal="bottom_right"),
    AttentionCase("causal_top_left", q_len=33, k_len=95, causal="top_left"),
    AttentionCase("causal_top_left_long_queries", q_len=95, k_len=33, causal="top_left"),
    AttentionCase("window", q_len=130, window=(17, 5)),
    AttentionCase("window_left", q_len=130, window=(40, None)),
    AttentionCase("window_right", q_len=90, k_len=130, window=(None, 3)),
    AttentionCase("window_causal", q_len=150, causal=True, window=(31, None)),
    AttentionCase("window_diagonal", window=(0, 0)),
    AttentionCase("window_rows_without_keys", q_len=90, k_len=30, window=(4, 4)),
    AttentionCase("softcap", softcap=5.0, magnitude=4.0),
    AttentionCase("softcap_causal", softcap=2.0, causal=True, magnitude=4.0),
    AttentionCase("alibi", alibi="heads"),
    AttentionCase("alibi_batch_causal", alibi="batch_heads", q_len=20, k_len=45, causal=True),
    AttentionCase("bias", bias="additive"),
    AttentionCase("bias_keys", bias="additive", bias_shape="b11k"),
    AttentionCase("bias_queries", bias="additive", bias_shape="1hq1", sinks=True, heads=8),
    AttentionCase("bias_matrix", bias="additive", bias_shape="qk", k_len=70),
    AttentionCase("bias_one_row", bias="additive", bias_shape="111k"),
    AttentionCase("bias_heads", bias="additive", bias_shape="h11", sinks=True, heads=8),
    AttentionCase("bias_float32", bias="additive", bias_dtype=torch.float32, causal=True),
    AttentionCase("bias_infinite", bias="-inf", bias_shape="11qk"),
    AttentionCase("mask", bias="boolean"),
    AttentionCase("mask_keys", bias="boolean", bias_shape="b11k", causal=True),
    AttentionCase("sinks", sinks=True, heads=8),
    AttentionCase("sinks_rows_without_keys", sinks=True, heads=8, q_len=60, k_len=25, causal=True),
    AttentionCase("scale", scale=0.7),
    AttentionCase("scale_zero", scale=0.0),
    AttentionCase("scale_negative", scale=-0.3),
    AttentionCase("dropout", dropout_p=0.3),
    AttentionCase("dropout_causal", dropout_p=0.1, q_len=90, causal=True),
    AttentionCase("dropout_all", dropout_p=1.0),
    AttentionCase("gqa", heads=6, kv_heads=2),
    AttentionCase("mqa_causal", heads=4, kv_heads=1, causal=True),
    AttentionCase("value_dim", head_dim=24, value_dim=40),
    AttentionCase("value_dim_small", head_dim=64, value_dim=8, causal=True),
    AttentionCase("head_dim_1", head_dim=1),
    AttentionCase("head_dim_3", head_dim=3, causal=True),
    AttentionCase("head_dim_59", head_dim=59, causal=True),
    AttentionCase("head_dim_80", head_dim=80),
    AttentionCase("head_dim_128", head_dim=128, causal=True),
    AttentionCase("head_dim_256", head_dim=256, q_len=20, k_len=40),
    AttentionCase("head_dim_512", head_dim=512, q_len=20, k_len=40),
    AttentionCase("one_head", batch=1, heads=1, q_len=257, head_dim=32, causal=True),
    AttentionCase("decode", q_len=1, k_len=700, head_dim=64, causal=True),
    AttentionCase("decode_gqa", heads=8, kv_heads=2, q_len=1, k_len=515, head_dim=64, causal=True),
    AttentionCase("decode_few", heads=4, kv_heads=1, q_len=3, k_len=515, head_dim=64, causal=True),
    AttentionCase(
        "decode_window", heads=8, q_len=1, k_len=700, causal=True, window=(128, None), sinks=True
    ),
    AttentionCase("bshd", layout="bshd", causal=True),
    AttentionCase("packed", layout="packed", causal=True),
    AttentionCase("column", layout="column", causal=True),
    AttentionCase("offset", layout="offset", head_dim=24),
    AttentionCase("expanded", layout="expanded"),
    AttentionCase("large_logits", magnitude=60.0, causal=True),
    AttentionCase(
        "everything",
        heads=4,
        kv_heads=2,
        q_len=50,
        k_len=77,
        head_dim=24,
        value_dim=40,
        causal=True,
        window=(33, None),
        scale=0.3,
        softcap=4.0,
        alibi="batch_heads",
        bias="additive",
        bias_shape="1hqk",
        sinks=True,
        dropout_p=0.2,
        layout="bshd",
    ),
)

LAYER_NORM_CASES: tuple[LayerNormCase, ...] = (
    LayerNormCase("plain"),
    LayerNormCase("batch", shape=(2, 7, 96)),
    LayerNormCase("two_dims", shape=(5, 6, 8), dims=2),
    LayerNormCase("vector", shape=(33,)),
    LayerNormCase("width_1", shape=(9, 1)),
    LayerNormCase("width_3", shape=(17, 3)),
    LayerNormCase("width_odd", shape=(6, 1027)),
    LayerNormCase("width_wide", shape=(3, 20_000)),
    LayerNormCase("many_rows", shape=(700, 24)),
    LayerNormCase("no_weight", weight=False),
    LayerNormCase("no_bias", bias=False),
    LayerNormCase("no_parameters", weight=False, bias=False),
    LayerNormCase("parameters_float32", param_dtype=torch.float32),
    LayerNormCase("mean", mean=100.0),
    LayerNormCase("eps", eps=0.1, magnitude=0.1),
    LayerNormCase("column", shape=(2, 9, 40), layout="column"),
    LayerNormCase("bshd", shape=(2, 9, 5, 40), layout="bshd"),
    LayerNormCase("packed", shape=(9, 40), layout="packed"),
    LayerNormCase("offset", layout="offset"),
    LayerNormCase("expanded", shape=(3, 9, 40), layout="expanded"),
    LayerNormCase("rms", rms=True),
    LayerNormCase("rms_wide", rms=True, shape=(3, 5000)),
    LayerNormCase("rms_no_weight", rms=True, weight=False),
    LayerNormCase("residual", residual=True, shape=(2, 9, 48)),
    LayerNormCase("residual_rms", residual=True, rms=True),
    LayerNormCase("residual_column", residual=True, shape=(2, 9, 40), layout="column"),
    LayerNormCase("residual_dropout", residual=True, dropout_p=0.3, shape=(2, 9, 50)),
)

SOFTMAX_CASES: tuple[SoftmaxCase, ...] = (
    SoftmaxCase("plain"),
    SoftmaxCase("vector", shape=(33,)),
    SoftmaxCase("width_1", shape=(9, 1)),
    SoftmaxCase("width_3", shape=(17, 3)),
    SoftmaxCase("width_odd", shape=(6, 1027)),
    SoftmaxCase("width_wide", shape=(3, 20_000)),
    SoftmaxCase("first_dim", shape=(40, 7), dim=0),
    SoftmaxCase("middle_dim", shape=(3, 40, 7), dim=1),
    SoftmaxCase("large", magnitude=30.0),
    SoftmaxCase("scale", scale=0.2, magnitude=4.0),
    SoftmaxCase("mask", mask="boolean"),
    SoftmaxCase("mask_broadcast", shape=(2, 5, 9, 33), mask="boolean", mask_shape=(2, 1, 1, 33)),
    SoftmaxCase("mask_additive", mask="additive", scale=0.5),
    SoftmaxCase("mask_empty_rows", mask="rows"),
    SoftmaxCase("out_float32", out_dtype=torch.float32),
    SoftmaxCase("column", shape=(9, 40), layout="column"),
    SoftmaxCase("packed", shape=(9, 40), layout="packed"),
    SoftmaxCase("offset", layout="offset"),
    SoftmaxCase("expanded", shape=(3, 9, 40), layout="expanded"),
    SoftmaxCase("log", log=True),
    SoftmaxCase("log_wide", log=True, shape=(3, 5001)),
    SoftmaxCase("log_first_dim", log=True, shape=(40, 7), dim=0),
    SoftmaxCase("log_mask_scale", log=True, mask="additive", scale=0.5),
)

CASES: tuple[Case, ...] = (*ATTENTION_CASES, *LAYER_NORM_CASES, *SOFTMAX_CASES)
