"""The torch.library ops: one for each direction of each family, whatever the backend.

An op unpacks its arguments into the call that backends understand. Its fake gives the shapes and
strides, for meta tensors and for torch.compile, to which an op is opaque. The autograd kernels are
registered in ``fastattn.ops``, where the autograd.Functions are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .backends import BACKENDS
from .backends.base import (
    AttentionCall,
    LayerNormCall,
    SoftmaxCall,
    empty_output,
    statistics_dtype,
)

_LIBRARY = torch.library.Library("fastattn", "DEF")

_ATTENTION_TENSORS = "Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, Tensor? seed"
_ATTENTION_SCALARS = (
    "float scale, float softcap, SymInt left, SymInt right, SymInt shift, float dropout_p, "
    "str backend"
)
_LAYER_NORM_SCALARS = "SymInt width, float eps, bool rms, float dropout_p, str backend"

_SCHEMAS = (
    f"attention_forward(Tensor q, Tensor k, Tensor v, {_ATTENTION_TENSORS}, {_ATTENTION_SCALARS})"
    " -> (Tensor out, Tensor lse, Tensor lse_low)",
    "attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor lse_low, "
    f"bool[] needs, Tensor q, Tensor k, Tensor v, {_ATTENTION_TENSORS}, {_ATTENTION_SCALARS})"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)",
    "layer_norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed, "
    f"{_LAYER_NORM_SCALARS}) -> (Tensor y, Tensor new_residual, Tensor mean, Tensor rstd)",
    "layer_norm_backward(Tensor dy, Tensor? dnew_residual, Tensor source, Tensor mean, "
    "Tensor rstd, bool[] needs, bool has_residual, Tensor? weight, Tensor? bias, Tensor? seed, "
    f"{_LAYER_NORM_SCALARS})"
    " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    "softmax_forward(Tensor x, int dim, Tensor? mask, float scale, bool log, ScalarType dtype, "
    "str backend) -> Tensor",
    "softmax_backward(Tensor y, Tensor dy, int dim, float scale, bool log, ScalarType x_dtype, "
    "str backend) -> Tensor",
)
for _schema in _SCHEMAS:
    _LIBRARY.define(_schema)

_NOT_TENSORS = frozenset((bool, int, float, list))

# Asked at every call, so by names that are found at once.
_PARAMETER = torch.nn.Parameter
_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms_are_active = torch._C._are_functorch_transforms_active
_trace = torch._C._get_tracing_state
_profiler_is_on = torch.autograd._profiler_enabled
_is_batch = torch._C._functorch.is_legacy_batchedtensor


class Op:
    """One op: what it runs, and the ways to call it. ``alone`` are keywords of ``run`` for a call
    without a backward to come, ``unseen`` for one whose results no schema has to fit."""

    function: type[torch.autograd.Function]  # its derivative
    eager: type[torch.autograd.Function]  # the same for plain calls

    def __init__(
        self,
        name: str,
        run: Callable[..., Any],
        fake: Callable[..., Any],
        alone: dict[str, Any],
        unseen: dict[str, Any],
    ) -> None:
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        _LIBRARY.impl(name, fake, "Meta")  # the fake too; register_fake takes 7 ms of import
        self.name = name
        self.run = run
        self.alone = alone
        self.unseen = unseen
        self.overload = getattr(torch.ops.fastattn, name).default
        kinds = [str(argument.type) for argument in self.overload._schema.arguments]
        # Arguments up to the last tensor; those after it are numbers and names.
        self.tensors = max(i for i, kind in enumerate(kinds) if "Tensor" in kind) + 1

    def call(self, needs_grad: bool, *args: Any) -> Any:
        """The op, differentiable, by the shortest way. There may be fewer results than the schema
        has, at the end: those that only a backward needs."""
        if _is_compiling() or _trace() is not None:
            return self.overload(*args)  # opaque to the compiler, which finds function later
        if _transforms_are_active():
            return self.function.apply(*args)
        if needs_grad or forward_ad._current_level >= 0:
            # What Function.apply calls in the end; its inspection of signatures takes 100 us.
            return super(torch.autograd.Function, self.eager).apply(*args)  # type: ignore[misc]
        if _nobody_looks(args[: self.tensors]):
            return self.run(*args, **self.alone)
        return self._through_dispatcher(*args)

    def below_autograd(self, *args: Any, **keywords: Any) -> Any:
        """The op without its derivative, for arguments that autograd has nothing to do with."""
        if _nobody_looks(args[: self.tensors]):
            return self.run(*args, **keywords)  # the dispatcher would come to the same, 15 us later
        return self._through_dispatcher(*args)

    def _through_dispatcher(self, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*args)

    def differentiable_as(self, function: type[Any]) -> None:
        """Makes ``call`` differentiable, and calls of the op itself, ``torch.ops.fastattn.*``.

        Whoever forms ``function``, an autograd.Function that works under ``torch.func`` too, may
        give it ``keep(ctx, inputs, output)``, the part of ``setup_context`` that knows nothing of
        what is an output, and ``shown``, how many results are outputs if no transform is active.
        """
        self.function = self.eager = function
        if hasattr(function, "keep"):
            self.eager = _eager(self, function)

        def run(*args: Any) -> Any:
            with_tangent = forward_ad._current_level >= 0
            if with_tangent or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
                return function.apply(*args)
            return self._through_dispatcher(*args)

        _LIBRARY.impl(self.name, run, "Autograd")


def _eager(op: Op, function: type[Any]) -> type[torch.autograd.Function]:
    """``function``, the derivative of ``op``, in autograd's older form, which costs less a call: a
    result that is kept for the backward and is nobody's output needs no wrapping."""

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = op.below_autograd(*args, **op.unseen)
            function.keep(ctx, args, output)
            return output[: function.shown] if isinstance(output, tuple) else output

        backward = staticmethod(function.backward)

    Eager.__name__ = Eager.__qualname__ = function.__name__
    return Eager


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd records a call of these tensors."""
    if torch.is_grad_enabled():
        for x in tensors:  # a loop: this runs at every call
            if x is not None and x.requires_grad:
                return True
    return False


def _nobody_looks(args: tuple[Any, ...]) -> bool:
    """Plain tensors with memory, and no mode, transform, trace or profiler that must see the op."""
    if _dispatch_modes() or _transforms_are_active() or _trace() is not None or _profiler_is_on():
        return False
    for x in args:  # a loop: this runs at every call
        if x is None:
            continue
        kind = type(x)
        if kind is Tensor or kind is _PARAMETER:
            # Whose numbers are not those at its address: no memory, the negative of it, zeros
            # without any, or a batch of gradients (is_grads_batched).
            if x.is_meta or x.is_neg() or x._is_zerotensor() or _is_batch(x):
                return False
        elif kind not in _NOT_TENSORS:
            return False
    return True


def _op(
    fake: Callable[..., Any],
    alone: dict[str, Any] | None = None,
    unseen: dict[str, Any] | None = None,
) -> Callable[[Callable[..., Any]], Op]:
    """Makes the op of the same name of the decorated function, with ``fake`` for its shapes."""
    return lambda run: Op(run.__name__, run, fake, alone or {}, unseen or {})


def _with_stand_ins(grads: tuple[Tensor | None, ...], like: Tensor) -> tuple[Tensor, ...]:
    """With an empty tensor for each gradient that was not asked for: a schema knows no None."""
    return tuple(like.new_empty(0) if dx is None else dx for dx in grads)


def double_backward(
    op: Op, composite: Callable[..., tuple[Tensor, ...]]
) -> type[torch.autograd.Function]:
    """The differentiable form of a backward op: runs the op, and differentiates ``composite``, the
    same results made of torch operations, so that there are derivatives of any order."""

    class BackwardFunction(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> Any:
            return op.below_autograd(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))
            ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            if all(grad is None for grad in grads):
                return (None,) * len(ctx.others)
            pairs = zip(ctx.saved_tensors, ctx.others, strict=True)
            args = [other if x is None else x for x, other in pairs]
            wanted = [i for i, need in enumerate(ctx.needs_input_grad) if need]

            def results(*inputs: Tensor) -> tuple[Tensor, ...]:
                for i, x in zip(wanted, inputs, strict=True):
                    args[i] = x
                return tuple(
                    y for y, grad in zip(composite(*args), grads, strict=True) if grad is not None
                )

            pull_back = torch.func.vjp(results, *(args[i] for i in wanted))[1]
            second = pull_back(tuple(grad for grad in grads if grad is not None))
            by_input = dict(zip(wanted, second, strict=True))
            return tuple(by_input.get(i) for i in range(len(args)))

    op.differentiable_as(BackwardFunction)
    return BackwardFunction


# -------------------------------------------------------------------------------------- attention


def attention_call(*args: Any) -> AttentionCall:
    """The call of an op's arguments, without its backend: broadcasts what has to."""
    call = AttentionCall(*args)
    q, k, _, bias, alibi_slopes, *_ = args
    if bias is not None:
        call = call._replace(bias=bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2]))
    if alibi_slopes is not None:
        call = call._replace(alibi_slopes=alibi_slopes.expand(q.shape[0], q.shape[1]))
    return call


def _attention_forward_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    lse = q.new_empty(q.shape[:3], dtype=statistics_dtype(q.dtype))
    return empty_output(q, v.shape[3]), lse, torch.empty_like(lse)


@_op(_attention_forward_fake, alone={"for_backward": False})
def attention_forward(*args: Any, for_backward: bool = True) -> tuple[Tensor, Tensor, Any]:
    call = attention_call(*args[:-1], for_backward)
    out, lse, lse_low = BACKENDS[args[-1]].attention_forward(call)
    if lse_low is None and for_backward:
        lse_low = torch.zeros_like(lse)
    return out, lse, lse_low


def _attention_backward_fake(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    lse_low: Tensor,
    needs: list[bool],
    *args: Any,
) -> tuple[Tensor, ...]:
    inputs = (*args[:4], args[5])  # q, k, v, bias, sinks
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format if i > 2 else None)
        if need
        else dout.new_empty(0)
        for i, (x, need) in enumerate(zip(inputs, needs, strict=True))
    )


@_op(_attention_backward_fake, alone={"stand_ins": False})
def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    lse_low: Tensor,
    needs: list[bool],
    *args: Any,
    stand_ins: bool = True,
) -> tuple[Any, ...]:
    call = attention_call(*args[:-1])
    dq, dk, dv, dbias, dsinks = BACKENDS[args[-1]].attention_backward(
        call, dout, dlse, out, lse, lse_low, tuple(needs)
    )
    if dbias is not None:
        dbias = dbias.view(args[3].shape)
    grads = dq, dk, dv, dbias, dsinks
    return _with_stand_ins(grads, dout) if stand_ins else grads


# ------------------------------------------------------------------------------------- layer norm


def _layer_norm_forward_fake(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    width: int,
    eps: float,
    rms: bool,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, dtype = _row_count(x, width), statistics_dtype(x.dtype)
    return (
        x.new_empty(x.shape),
        x.new_empty(0) if residual is None else x.new_empty(x.shape),
        x.new_empty(0 if rms else rows, dtype=dtype),
        x.new_empty(rows, dtype=dtype),
    )


def _row_count(x: Tensor, width: int) -> int:
    return x.numel() // width if width else 0


@_op(_layer_norm_forward_fake, alone={"for_backward": False}, unseen={"stand_ins": False})
def layer_norm_forward(
    *args: Any, for_backward: bool = True, stand_ins: bool = True
) -> tuple[Any, ...]:
    call = LayerNormCall(*(*args[:-1], for_backward))
    results = BACKENDS[args[-1]].layer_norm_forward(call)
    if not for_backward:
        return results
    y, new_residual, mean, rstd = results
    if new_residual is None and stand_ins:
        new_residual = y.new_empty(0)
    if mean is None and rstd is not None:
        mean = rstd.new_empty(0)
    return y, new_residual, mean, rstd


def _layer_norm_backward_fake(
    dy: Tensor,
    dnew_residual: Tensor | None,
    source: Tensor,
    mean: Tensor,
    rstd: Tensor,
    needs: list[bool],
    has_residual: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    return tuple(
        source.new_empty(0) if x is None or not need else x.new_empty(x.shape)
        for x, need in zip((source, source, weight, bias), needs, strict=True)
    )


@_op(_layer_norm_backward_fake, alone={"stand_ins": False})
def layer_norm_backward(
    dy: Tensor,
    dnew_residual: Tensor | None,
    source: Tensor,
    mean: Tensor,
    rstd: Tensor,
    needs: list[bool],
    has_residual: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    *rest: Any,
    stand_ins: bool = True,
) -> tuple[Any, ...]:
    *scalars, backend = rest
    call = LayerNormCall(source, source if has_residual else None, weight, bias, *scalars)
    grads = BACKENDS[backend].layer_norm_backward(
        call, source, None if call.rms else mean, rstd, dy, dnew_residual, tuple(needs)
    )
    return _with_stand_ins(grads, source) if stand_ins else grads


# ---------------------------------------------------------------------------------------- softmax


def _softmax_forward_fake(
    x: Tensor,
    dim: int,
    mask: Tensor | None,
    scale: float,
    log: bool,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


@_op(_softmax_forward_fake)
def softmax_forward(
    x: Tensor,
    dim: int,
    mask: Tensor | None,
    scale: float,
    log: bool,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    mask = None if mask is None else mask.expand(x.shape)
    return BACKENDS[backend].softmax_forward(SoftmaxCall(x, dim, mask, scale, log, dtype))


def _softmax_backward_fake(
    y: Tensor, dy: Tensor, dim: int, scale: float, log: bool, x_dtype: torch.dtype, backend: str
) -> Tensor:
    return y.new_empty(y.shape, dtype=x_dtype)


@_op(_softmax_backward_fake)
def softmax_backward(
    y: Tensor, dy: Tensor, dim: int, scale: float, log: bool, x_dtype: torch.dtype, backend: str
) -> Tensor:
    return BACKENDS[backend].softmax_backward(y, dy, dim, scale, log, x_dtype)
