"""AttentionSpec: the one description of every attention variant, and where its errors are raised.

Every mistake a caller can make is found here, before anything runs, and named: the argument, what
was expected, what came.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real  # numpy's scalars are of these too
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_STRIDED = torch.strided
_NO_WINDOW = (-1, -1)
_FAR = 2**62


class Refusal(Exception):
    """A call that is not served: a mistake in its arguments, or no backend takes it.

    Every check raises one, which is a TypeError, ValueError or IndexError too. Whoever passes such
    calls on to torch catches this and no more: any other error is a mistake of this package.
    """


class RefusedType(Refusal, TypeError):
    pass


class RefusedValue(Refusal, ValueError):
    pass


class RefusedIndex(Refusal, IndexError):
    pass


class Mask(NamedTuple):
    """Query i sees key j when ``i + shift - left <= j <= i + shift + right``; -1: no limit.

    ``csrc/common/mask.h`` has the same functions under the same names.
    """

    left: int = -1
    right: int = -1
    shift: int = 0

    def keys_of(self, i: int, k_len: int) -> tuple[int, int]:
        """Half-open interval of the keys that query i sees out of ``k_len``."""
        begin = 0 if self.left < 0 else i + self.shift - self.left
        end = k_len if self.right < 0 else i + self.shift + self.right + 1
        begin = min(max(begin, 0), k_len)
        return begin, max(min(end, k_len), begin)

    def any_keys(self, i_begin: int, i_end: int, k_len: int) -> tuple[int, int]:
        """Keys that at least one query of the tile [i_begin, i_end) sees."""
        begin, end = self.keys_of(i_begin, k_len)[0], self.keys_of(i_end - 1, k_len)[1]
        return begin, max(begin, end)

    def all_keys(self, i_begin: int, i_end: int, k_len: int) -> tuple[int, int]:
        """Keys that every query of the tile [i_begin, i_end) sees."""
        begin, end = self.keys_of(i_end - 1, k_len)[0], self.keys_of(i_begin, k_len)[1]
        return begin, max(begin, end)

    def any_queries(self, j_begin: int, j_end: int, q_len: int) -> tuple[int, int]:
        """Queries that see at least one key of [j_begin, j_end): the rule read the other way."""
        begin = 0 if self.right < 0 else j_begin - self.shift - self.right
        end = q_len if self.left < 0 else j_end - self.shift + self.left
        begin = min(max(begin, 0), q_len)
        return begin, max(min(end, q_len), begin)

    def dense_mask(
        self, q_len: int, k_len: int, device: torch.device | str | None = None
    ) -> Tensor:
        """(q_len, k_len) bool, True where the query sees the key."""
        offset = torch.arange(k_len, device=device) - self.shift
        offset = offset - torch.arange(q_len, device=device)[:, None]  # j - (i + shift)
        mask = torch.ones_like(offset, dtype=torch.bool)
        if self.left >= 0:
            mask = mask & (offset >= -self.left)
        if self.right >= 0:
            mask = mask & (offset <= self.right)
        return mask


class Names(NamedTuple):
    """What a caller calls the arguments of an attention call, for the messages."""

    q: str = "q"
    k: str = "k"
    v: str = "v"
    window: str = "window"
    scale: str = "scale"
    bias: str = "bias"
    sinks: str = "sinks"
    dropout_p: str = "dropout_p"


_NAMES = Names()


class AttentionSpec(NamedTuple):
    """The scalars of one attention call; ``AttentionSpec.of`` checks a call and makes one."""

    mask: Mask
    scale: float
    softcap: float  # 0: off
    dropout_p: float

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool | str = False,
        window: tuple[int | None, int | None] | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        alibi_slopes: Tensor | None = None,
        bias: Tensor | None = None,
        sinks: Tensor | None = None,
        dropout_p: float = 0.0,
        deterministic: bool | None = None,
        names: Names | None = None,
    ) -> AttentionSpec:
        """Checks everything.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        names = names or _NAMES
        batch, heads, q_len, k_len, head_dim = _check_qkv(q, k, v, names)

        scale = 1.0 / math.sqrt(head_dim) if scale is None else check_number(names.scale, scale)
        softcap = 0.0 if softcap is None else check_number("softcap", softcap)
        if softcap < 0:
            raise RefusedValue(f"softcap: expected None or a number >= 0 (0: off), got {softcap}")
        dropout_p = check_dropout(dropout_p, names.dropout_p)
        if deterministic is not None and not isinstance(deterministic, bool):
            raise RefusedType(f"deterministic: expected None or a bool, got {_got(deterministic)}")
        if bias is not None:
            _check_bias(names.bias, bias, q, (batch, heads, q_len, k_len))
        if alibi_slopes is not None:
            _check_per_head("alibi_slopes", alibi_slopes, q, ((heads,), (batch, heads)))
        if sinks is not None:
            _check_per_head(names.sinks, sinks, q, ((heads,),))
        window = _NO_WINDOW if window is None else _check_window(names.window, window)
        return cls(_mask(causal, window, q_len, k_len), scale, softcap, dropout_p)


def _mask(causal: Any, window: tuple[int, int], q_len: int, k_len: int) -> Mask:
    left, right = window
    shift = k_len - q_len
    if causal is False:
        return Mask(left, right, shift)
    if isinstance(causal, str):
        if causal not in ("bottom_right", "top_left"):
            raise RefusedValue(
                f'causal: expected False, True, "bottom_right" or "top_left", got {causal!r}'
            )
        shift = 0 if causal == "top_left" else shift
    elif causal is not True:
        raise RefusedType(
            f'causal: expected False, True, "bottom_right" or "top_left", got {_got(causal)}'
        )
    return Mask(left, 0, shift)  # a query never looks ahead, whatever the window's right


def _check_window(name: str, window: Any) -> tuple[int, int]:
    if not isinstance(window, (tuple, list)):
        raise RefusedType(f"{name}: expected None or (left, right), got {_got(window)}")
    if len(window) != 2:
        raise RefusedValue(f"{name}: expected (left, right), got {len(window)} values")
    left, right = (-1 if limit is None else limit for limit in window)
    for limit in (left, right):
        if not is_integer(limit):
            raise RefusedType(f"{name}: expected integers or None, got {_got(limit)}")
        if limit < -1:
            raise RefusedValue(f"{name}: expected limits >= 0, or -1 or None for none, got {limit}")
    # One that would overflow when added to a position, such as sys.maxsize, limits nothing.
    return -1 if left >= _FAR else left, -1 if right >= _FAR else right


def _check_qkv(q: Any, k: Any, v: Any, names: Names) -> tuple[int, int, int, int, int]:
    """(batch, heads, q_len, k_len, head_dim)"""
    q_name, k_name, v_name = names[:3]
    check_tensor(q_name, q)
    check_tensor(k_name, k)
    check_tensor(v_name, v)
    dtype, device = q.dtype, q.device
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    alike = k.dtype is dtype and v.dtype is dtype and k.device == device and v.device == device
    if not alike or not len(q_shape) == len(k_shape) == len(v_shape) == 4:
        _refuse_unlike(names, q, k, v)
    check_dtype(q_name, q)
    batch, heads, q_len, head_dim = q_shape
    k_batch, kv_heads, k_len, k_head_dim = k_shape
    v_batch, v_heads, v_len, _ = v_shape
    if head_dim == 0:
        raise RefusedValue(f"{q_name}: expected a head dim of at least 1, got {tuple(q.shape)}")
    if k_batch != batch:
        raise RefusedValue(f"{k_name}: expected {q_name}'s batch size {batch}, got {k_batch}")
    if v_batch != batch:
        raise RefusedValue(f"{v_name}: expected {q_name}'s batch size {batch}, got {v_batch}")
    if k_head_dim != head_dim:
        raise RefusedValue(f"{k_name}: expected {q_name}'s head dim {head_dim}, got {k_head_dim}")
    if v_heads != kv_heads:
        raise RefusedValue(
            f"{v_name}: expected {k_name}'s number of heads {kv_heads}, got {v_heads}"
        )
    if v_len != k_len:
        raise RefusedValue(f"{v_name}: expected {k_name}'s sequence length {k_len}, got {v_len}")
    if kv_heads != heads and (kv_heads == 0 or heads % kv_heads != 0):
        raise RefusedValue(
            f"{q_name}: expected a number of heads that is a multiple of {k_name}'s {kv_heads}, "
            f"got {heads}"
        )
    return batch, heads, q_len, k_len, head_dim


def _refuse_unlike(names: Names, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises for the first of them that has not four dimensions, q's dtype and q's device."""
    for name, x in zip(names[:3], (q, k, v), strict=True):
        if x.dim() != 4:
            raise RefusedValue(
                f"{name}: expected 4 dimensions (batch, heads, sequence, head_dim), "
                f"got shape {tuple(x.shape)}"
            )
        if x.dtype is not q.dtype:
            raise RefusedType(f"{name}: expected {names.q}'s dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise RefusedValue(f"{name}: expected {names.q}'s device {q.device}, got {x.device}")


def _check_bias(name: str, bias: Any, q: Tensor, full: tuple[int, ...]) -> None:
    check_tensor(name, bias)
    if is_causal_bias(bias):
        raise RefusedType(f"{name}: expected a tensor of numbers, got a CausalBias; pass causal")
    if bias.dtype not in (torch.bool, torch.float32, q.dtype):
        raise RefusedType(f"{name}: expected bool, float32 or {q.dtype}, got {bias.dtype}")
    if bias.device != q.device:
        raise RefusedValue(f"{name}: expected device {q.device}, got {bias.device}")
    check_broadcasts(name, bias, full)


def _check_per_head(name: str, x: Any, q: Tensor, shapes: tuple[tuple[int, ...], ...]) -> None:
    check_tensor(name, x)
    if not x.dtype.is_floating_point:
        raise RefusedType(f"{name}: expected a floating-point dtype, got {x.dtype}")
    if x.device != q.device:
        raise RefusedValue(f"{name}: expected device {q.device}, got {x.device}")
    if tuple(x.shape) not in shapes:
        expected = " or ".join(str(shape) for shape in shapes)
        raise RefusedValue(f"{name}: expected shape {expected}, got {tuple(x.shape)}")


def check_tensor(name: str, x: Any) -> None:
    """TypeError unless x is a dense tensor."""
    if isinstance(x, Tensor) and x.layout is _STRIDED and not x.is_nested:
        if type(x) is not Tensor and type(x).__name__ == "DTensor":  # importing it takes long
            raise RefusedType(
                f"{name}: expected a tensor of this process, got a DTensor; call with to_local(), "
                "or inside fastattn.override(), where torch's own function serves it"
            )
        return
    if not isinstance(x, Tensor):
        raise RefusedType(f"{name}: expected a torch.Tensor, got {_got(x)}")
    got = "a nested tensor" if x.is_nested else f"layout {x.layout}"
    raise RefusedType(f"{name}: expected a dense (strided) tensor, got {got}")


def is_causal_bias(x: Tensor) -> bool:
    """Whether x is of torch.nn.attention.bias: a mask by its attributes, its elements are noise.

    By name: that module takes a second to import, and who has such a mask has imported it.
    """
    return type(x).__name__ == "CausalBias" and hasattr(x, "variant")


def check_dtype(name: str, x: Tensor) -> None:
    """TypeError unless x has one of the four dtypes that the kernels compute in."""
    if x.dtype not in DTYPES:
        raise RefusedType(f"{name}: expected float32, bfloat16, float16 or float64, got {x.dtype}")


def check_broadcasts(name: str, bias: Tensor, full: tuple[int, ...]) -> None:
    """ValueError unless ``bias`` expands to ``full``, the shape of the scores."""
    if not broadcasts(bias.shape, full):
        raise RefusedValue(
            f"{name}: expected a shape that broadcasts to (batch, heads, q_len, k_len) = "
            f"{tuple(full)}, got {tuple(bias.shape)}"
        )


def broadcasts(shape: Sequence[int], full: Sequence[int]) -> bool:
    """Whether a tensor of ``shape`` expands to ``full``."""
    pairs = zip(reversed(shape), reversed(full), strict=False)
    return len(shape) <= len(full) and all(n == 1 or n == whole for n, whole in pairs)


def check_number(name: str, value: Any) -> float:
    """``value`` as a finite float, or a TypeError or ValueError that names it."""
    if type(value) is float and value - value == 0:
        return value
    if isinstance(value, bool) or not isinstance(value, (Real, torch.SymInt, torch.SymFloat)):
        raise RefusedType(f"{name}: expected a number, got {_got(value)}")
    try:
        number = float(value)
    except OverflowError:  # an integer beyond the largest float
        number = math.inf
    if number - number != 0:  # nan or infinite, in a form that torch.compile can trace
        raise RefusedValue(f"{name}: expected a finite number, got {number}")
    return number


def check_flag(name: str, value: Any) -> None:
    """TypeError unless ``value`` is a bool: what is merely true or false is a mistake."""
    if not isinstance(value, (bool, torch.SymBool)):
        raise RefusedType(f"{name}: expected a bool, got {_got(value)}")


def is_integer(value: Any) -> bool:
    """Whether ``value`` is an integer, and no bool."""
    if type(value) is int:
        return True
    return isinstance(value, (Integral, torch.SymInt)) and not isinstance(value, bool)


def check_dropout(p: Any, name: str = "dropout_p") -> float:
    """The dropout probability as a float in [0, 1]."""
    if isinstance(p, (float, int)) and p == 0:
        return 0.0
    p = check_number(name, p)
    if not 0.0 <= p <= 1.0:
        raise RefusedValue(f"{name}: expected a probability in [0, 1], got {p}")
    return p


def _got(value: Any) -> str:
    if value is None or isinstance(value, (bool, int, float, str)):
        return f"{value!r} ({type(value).__name__})"
    return type(value).__name__
