"""The error law of the tests, and what tests of kernels need beside it.

The law is flash-attention's, kept strict: measured against float64, a kernel's error is at most
twice that of naive PyTorch in the kernel's own dtype (three times for a gradient), plus one
rounding at the magnitude of the result. A tolerance that grows with the problem by itself, and that
nobody needs to tune.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from . import library, reference
from .ops import layer_norm as layer_norm_ops
from .ops import softmax as softmax_ops
from .ops.attention import attention, op_arguments
from .spec import AttentionSpec

FORWARD_FACTOR = 2.0
BACKWARD_FACTOR = 3.0

Results = dict[str, Tensor]


def assert_error_law(name: str, got: Tensor, naive: Tensor, exact: Tensor) -> None:
    """AssertionError unless ``got`` is about as close to ``exact`` (float64) as ``naive`` is.

    Names that start with "d" are gradients. Infinities and NaNs have to be where exact has them.
    """
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    rounded = exact.to(got.dtype)
    special = ~rounded.isfinite()
    same = (got == rounded) | (got.isnan() & rounded.isnan())
    assert bool(same[special].all()), f"{name}: infinite or NaN otherwise than float64"
    got64, naive64, exact = (x.double().masked_fill(special, 0.0) for x in (got, naive, exact))
    error = (got64 - exact).abs().max().item()
    naive_error = (naive64 - exact).abs().max().item()
    factor = BACKWARD_FACTOR if name.startswith("d") else FORWARD_FACTOR
    if got.dtype is torch.float64:
        # exact is no more exact than naive: scale float32's error, and count it for exact too
        factor += 1.0
        naive_error *= torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    bound = factor * naive_error + torch.finfo(got.dtype).eps * exact.abs().max().item()
    assert error <= bound, (
        f"{name}: error {error:.3g} against float64 is over {bound:.3g} "
        f"({factor:g} x the naive {naive_error:.3g} + one rounding)"
    )


class Comparison(NamedTuple):
    """The results of one problem: the kernel's, naive PyTorch's in the same dtype, float64's."""

    got: Results
    naive: Results
    exact: Results


def over_draws(draw: Callable[[int], Comparison], draws: int = 8) -> Comparison:
    """Holds ``draw(0)`` to the law; if it breaks it, holds ``draw(0)`` to ``draw(draws - 1)`` to it
    together, as one larger problem. Returns ``draw(0)``.

    The law compares two maxima. Over a few hundred numbers naive PyTorch's can be small by luck: one
    draw in some hundreds then breaks the law, also when PyTorch is held against itself with its sums
    in another order. A kernel that is wrong, or less exact, breaks it over more numbers too.
    """
    first = draw(0)
    try:
        assert_laws(*first)
    except AssertionError:
        if max(x.numel() for x in first.exact.values()) > 2**16:
            raise
        several = [first, *(draw(n) for n in range(1, draws))]
        assert_laws(
            *(
                {name: torch.stack([results[name] for results in part]) for name in part[0]}
                for part in zip(*several, strict=True)
            )
        )
    return first


def assert_laws(got: Results, naive: Results, exact: Results) -> None:
    """``assert_error_law`` for every result of one call."""
    assert got.keys() == exact.keys(), f"results {list(got)}, not {list(exact)}"
    for name in exact:
        assert_error_law(name, got[name], naive[name], exact[name])


def naive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    upcast: bool = False,
    **keywords: Any,
) -> Any:
    """``fastattn.attention`` as plain PyTorch writes it, differentiable by autograd: the products
    in the inputs' own dtype (``upcast``: in the statistics dtype), the softmax in float32."""
    spec = AttentionSpec.of(q, k, v, bias=bias, alibi_slopes=alibi_slopes, sinks=sinks, **keywords)
    call = library.attention_call(*op_arguments(q, k, v, bias, alibi_slopes, sinks, spec))
    out, lse = reference.attention(call, upcast=upcast)
    return (out, lse) if return_lse else out


def run(
    function: Callable[..., Any],
    inputs: dict[str, Tensor | None],
    grad_outputs: tuple[Tensor, ...] | None,
    names: tuple[str, ...],
    seed: int = 0,
) -> Results:
    """Calls ``function(**inputs)`` from one seed: its outputs by ``names`` and, when there are
    ``grad_outputs``, the gradient "d" + name of each input that requires one."""
    torch.manual_seed(seed)
    outputs = function(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = {name: x.detach() for name, x in zip(names, outputs, strict=True)}
    if grad_outputs is not None:
        leaves = {n: x for n, x in inputs.items() if x is not None and x.requires_grad}
        cotangents = [g.to(y.dtype) for y, g in zip(outputs, grad_outputs, strict=True)]
        grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
        results |= {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return results


def cast(inputs: dict[str, Tensor | None], dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Fresh leaves with the same values and ``requires_grad``, floats in ``dtype``."""

    def one(x: Tensor | None) -> Tensor | None:
        if x is None or not x.is_floating_point():
            return x
        return x.detach().to(dtype).requires_grad_(x.requires_grad)

    return {name: one(x) for name, x in inputs.items()}


def check_attention(
    backend: str | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    backward: bool = True,
    seed: int = 0,
    **keywords: Any,
) -> Results:
    """Holds one attention call of a backend to the error law: out, lse and, with ``backward``, the
    gradient of every input that requires one, for random dout and dlse. Returns its results."""
    comparison = compare_attention(
        backend,
        q,
        k,
        v,
        bias=bias,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        backward=backward,
        seed=seed,
        **keywords,
    )
    assert_laws(*comparison)
    return comparison.got


def compare_attention(
    backend: str | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    backward: bool = True,
    seed: int = 0,
    **keywords: Any,
) -> Comparison:
    """What ``check_attention`` holds to the law."""
    inputs = {"q": q, "k": k, "v": v, "bias": bias, "alibi_slopes": alibi_slopes, "sinks": sinks}
    generator = torch.Generator().manual_seed(seed + 1)
    cotangents = None
    if backward:
        rows = q.shape[:3]
        cotangents = tuple(
            torch.randn(shape, generator=generator, dtype=torch.float64).to(q.device, q.dtype)
            for shape in ((*rows, v.shape[3]), rows)
        )

    def results(
        function: Callable[..., Any], dtype: torch.dtype | None = None, **more: Any
    ) -> Results:
        def call(**tensors: Any) -> Any:
            return function(**tensors, return_lse=True, **keywords, **more)

        tensors = inputs if dtype is None else cast(inputs, dtype)
        return run(call, tensors, cotangents, ("out", "lse"), seed)

    got = results(attention, backend=backend)
    exact = results(attention, torch.float64, backend="reference")
    naive = results(naive_attention, torch.float32 if q.dtype is torch.float64 else None)
    if not _as_finite(naive, exact):  # its products overflow, as those of float16 do beyond 65504
        naive = results(naive_attention, upcast=True)
    return Comparison(got, naive, exact)


def _as_finite(naive: Results, exact: Results) -> bool:
    return all(bool((naive[n].isfinite() | ~exact[n].isfinite()).all()) for n in exact)


def check_layer_norm(backend: str | None, x: Tensor, *arguments: Any, **keywords: Any) -> Results:
    """Holds one call of the layer norm family to the error law; arguments as
    ``compare_layer_norm`` takes them. Returns its results."""
    comparison = compare_layer_norm(backend, x, *arguments, **keywords)
    assert_laws(*comparison)
    return comparison.got


def compare_layer_norm(
    backend: str | None,
    x: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    rms: bool = False,
    backward: bool = True,
    seed: int = 0,
    **keywords: Any,
) -> Comparison:
    """One call of the layer norm family; naive is the reference backend."""
    tensors = {"x": x, "residual": residual, "weight": weight, "bias": bias}
    stem = "rms_norm" if rms else "layer_norm"
    function = getattr(layer_norm_ops, stem if residual is None else f"add_{stem}")

    def call(name: str | None) -> Callable[..., Any]:
        def one(
            x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None
        ) -> Any:
            leading = (x,) if residual is None else (x, residual)
            affine = (weight,) if rms else (weight, bias)
            return function(*leading, normalized_shape, *affine, backend=name, **keywords)

        return one

    outputs = ("y",) if residual is None else ("y", "new_residual")
    return _compare(call, backend, tensors, outputs, x.shape, backward, seed)


def check_softmax(backend: str | None, x: Tensor, *arguments: Any, **keywords: Any) -> Results:
    """Holds one call of softmax to the error law; arguments as ``compare_softmax`` takes them.
    Returns its results."""
    comparison = compare_softmax(backend, x, *arguments, **keywords)
    assert_laws(*comparison)
    return comparison.got


def compare_softmax(
    backend: str | None,
    x: Tensor,
    dim: int = -1,
    *,
    log: bool = False,
    mask: Tensor | None = None,
    backward: bool = True,
    seed: int = 0,
    **keywords: Any,
) -> Comparison:
    """One call of softmax; naive is the reference backend."""
    function = softmax_ops.log_softmax if log else softmax_ops.softmax

    def call(name: str | None) -> Callable[..., Any]:
        return lambda x, mask: function(x, dim, mask=mask, backend=name, **keywords)

    output_dtype = keywords.pop("dtype", None)
    if output_dtype is not None:  # torch casts the input first: so do we, and exact is exact
        x = x.detach().to(output_dtype).requires_grad_(x.requires_grad)
    return _compare(call, backend, {"x": x, "mask": mask}, ("y",), x.shape, backward, seed)


def _compare(
    call: Callable[[str | None], Callable[..., Any]],
    backend: str | None,
    tensors: dict[str, Tensor | None],
    outputs: tuple[str, ...],
    shape: torch.Size,
    backward: bool,
    seed: int,
) -> Comparison:
    x = tensors["x"]
    assert x is not None
    generator = torch.Generator().manual_seed(seed + 1)
    cotangents = None
    if backward:
        cotangents = tuple(
            torch.randn(shape, generator=generator, dtype=torch.float64).to(x.device, x.dtype)
            for _ in outputs
        )
    exact = run(call("reference"), cast(tensors, torch.float64), cotangents, outputs, seed)
    same_dtype = tensors if x.dtype is not torch.float64 else cast(tensors, torch.float32)
    naive = run(call("reference"), same_dtype, cotangents, outputs, seed)
    got = run(call(backend), tensors, cotangents, outputs, seed)
    return Comparison(got, naive, exact)


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fills what torch.empty and its kin return with NaN (True for bool, the largest value for
    integers), so that a kernel that leaves an element unwritten is found out."""

    def poison(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poisoned(*args: Any, **keywords: Any) -> Tensor:
            x = function(*args, **keywords)
            if x.device.type == "meta":
                return x
            if x.is_floating_point():
                return x.fill_(torch.nan)
            return x.fill_(True if x.dtype is torch.bool else torch.iinfo(x.dtype).max)

        return poisoned

    with contextlib.ExitStack() as stack:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (torch.Tensor, "new_empty"),
        ):
            stack.enter_context(mock.patch.object(owner, name, poison(getattr(owner, name))))
        yield
