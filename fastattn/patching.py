"""``patch`` and ``unpatch``: a model's modules served by fastattn, in place.

A module is swapped by its class: the object stays, and with it its parameters, buffers, hooks,
device, dtype, training mode and everything that refers to it. The class it had is kept on the
module itself, so that copies and pickles of a patched model can be unpatched too.
"""

from __future__ import annotations

import dis
import functools
import re
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from . import nn as ours
from . import rms_modules, torch_calls
from .overriding import override

_ORIGINAL = "_fastattn_original_class"
_OURS = frozenset(ours.OURS.values())
_NORM = re.compile(r"layer_?norm|rms_?norm", re.IGNORECASE)
_LOOKS_ALIKE = re.compile(rf"attention|{_NORM.pattern}|softmax", re.IGNORECASE)


@dataclass
class Report:
    """What ``patch`` or ``unpatch`` did; print it.

    ``replaced`` says for each module, by its name in the model ("" is the model itself), what it
    was made; ``left`` says why a module stayed as it was.
    """

    action: str
    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        done = "nothing" if not self.replaced else _modules(len(self.replaced))
        lines = [f"fastattn {self.action} {done}"]
        lines += [f"  {line}" for line in _grouped(self.replaced)]
        if self.left:
            lines.append(f"left {_modules(len(self.left))}")
            lines += [f"  {line}" for line in _grouped(self.left)]
        elif not self.replaced and self.action == "replaced":
            lines.append("  the model has no attention, layer norm, RMS norm or softmax modules")
        elif not self.replaced:
            lines.append("  no module of the model was patched")
        return "\n".join(lines)

    __repr__ = __str__


def patch(model: nn.Module) -> Report:
    """Has fastattn serve a model's attention, layer norms, RMS norms and softmaxes, in place.

    torch.nn's modules (``LayerNorm``, ``RMSNorm``, ``Softmax``, ``MultiheadAttention``,
    ``Transformer`` and what it is built from) become those of ``fastattn.nn``. Modules whose own
    code calls ``F.scaled_dot_product_attention``, ``F.layer_norm``, ``F.rms_norm`` or ``F.softmax``
    run inside ``fastattn.override()`` from now on. A model of transformers gets
    ``attn_implementation="fastattn"``, and its KV cache is appended to in place. Parameters,
    ``state_dict``, hooks, device, dtype and training mode stay the same objects and values, and
    optimizers need not know.

    Args:
        model: any module; a model under torch.compile is compiled anew at its next call.

    Returns:
        A report that can be printed: what was replaced, what was left and why. Patching twice
        finds everything done, and a model without anything to patch is left as it is.

    Raises:
        TypeError: not a module, or a scripted or frozen one, whose code is fixed. The model is then
            as it was: nothing is replaced before all is known to be replaceable.
    """
    _check(model, "patch")
    report, plan = Report("replaced"), []
    whole = _transformers_models(model)
    inside = {id(m) for _, top in whole for m in top.modules()}
    for name, module in model.named_modules():
        new, reason = _replacement(module, id(module) in inside)
        if new is not None:
            plan.append((module, new))
            report.replaced[name] = reason
        elif reason:
            report.left[name] = reason
    _swap(plan, restoring=False)
    try:
        for name, top in whole:
            if _attend_by_fastattn(name, top, report):
                _append_to_caches(name, top, report)
    except BaseException:
        unpatch(model)
        raise
    return report


def unpatch(model: nn.Module) -> Report:
    """Gives each module that ``patch`` replaced its own class back.

    Returns:
        A report of what was restored; of a model that was never patched, that there was nothing.

    Raises:
        TypeError: not a module, or a scripted one.
    """
    _check(model, "unpatch")
    report, plan = Report("restored"), []
    for name, module in model.named_modules():
        original = module.__dict__.get(_ORIGINAL)
        if original is None:
            continue
        changed = _changed_since(module)
        if changed:
            report.left[name] = f"{type(module).__name__}: {changed}"
        else:
            plan.append((module, original))
            report.replaced[name] = f"{original.__module__}.{original.__qualname__}"
    _swap(plan, restoring=True)
    for name, module in model.named_modules():  # the outer first: it tells its parts
        implementation = module.__dict__.pop(_ATTENTION, None)
        if implementation is not None:
            module.config._attn_implementation = implementation
            where = f"{name}.config".lstrip(".")
            report.replaced[where] = f'attn_implementation="{implementation}"'
    _leave_caches(model, report)
    return report


def _check(model: Any, what: str) -> None:
    if isinstance(model, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        raise TypeError(
            f"model: expected a module in Python, got a scripted or frozen one "
            f"({type(model).__name__}), whose code is fixed; {what} it before torch.jit.script"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def _swap(plan: list[tuple[nn.Module, type]], restoring: bool) -> None:
    """All of it or, when one fails, none."""
    done: list[tuple[nn.Module, type]] = []
    try:
        for module, new in plan:
            done.append((module, type(module)))
            _become(module, new, restoring)
    except BaseException:
        for module, old in done:
            _become(module, old, not restoring)
        raise


def _become(module: nn.Module, new: type, restoring: bool) -> None:
    old = type(module)
    module.__class__ = new
    if restoring:
        module.__dict__.pop(_ORIGINAL, None)
    else:
        module.__dict__.setdefault(_ORIGINAL, old)


# ---------------------------------------------------------------------------- what becomes of what


def _replacement(
    module: nn.Module, in_transformers: bool = False
) -> tuple[type[nn.Module] | None, str]:
    """(the class to give it, what that is), or (None, why it stays as it is, or "")."""
    kind: Any = type(module)
    if _is_sharded(module):
        kind = kind.__mro__[2]  # after its own and FSDPModule
    if kind in _OURS or _ORIGINAL in module.__dict__:
        return None, "served by fastattn already"
    new = ours.OURS.get(kind)
    calls = () if new is not None else _calls(kind)
    form = None if new is not None or calls else rms_modules.recognise(module)
    if in_transformers and not (new or form or calls or _NORM.search(kind.__name__)):
        return None, ""  # its attention is the whole model's affair
    concerned = new is not None or calls or form or _LOOKS_ALIKE.search(kind.__name__) is not None
    if not concerned or (new is None and not calls and form is None and _is_container(module)):
        return None, ""
    name = kind.__name__
    if isinstance(module, torch.jit.ScriptModule):
        return None, f"{name}: scripted, its code is fixed"
    if "forward" in module.__dict__:
        return None, f"{name}: its forward was replaced on the module itself"
    if parametrize.is_parametrized(module):
        return None, f"{name}: parametrized, its class is made and unmade by torch"
    if _is_sharded(module):
        return None, f"{name}: sharded already; patch before fully_shard"
    if new is not None:
        return new, f"fastattn.nn.{new.__name__}"
    if not calls and form is None:
        return None, f"{name}: {_unknown(module)}"
    if "__reduce__" in _own_names(kind) or "__reduce_ex__" in _own_names(kind):
        return None, f"{name}: pickles itself in its own way"
    if form is not None:
        return _routed(kind, form), f"{name}, an RMS norm, by fastattn"
    functions = " and ".join(calls)
    if in_transformers and isinstance(module, _pretrained()):
        # All that the model calls would pass by override, and take twice as long for one token.
        return None, f"{name}: its own {functions} is too little for a whole model"
    return _routed(kind, None), f"{name}, its {functions} by fastattn"


def _unknown(module: nn.Module) -> str:
    """Why nobody can say what the module's own code computes."""
    weight = module._parameters.get("weight")
    if weight is not None and weight.is_meta:
        return "has no numbers to try it on (meta); patch when they are loaded"
    if weight is not None and not torch_calls.is_plain(weight):
        return f"has a {type(weight).__name__} for a weight; patch before"
    return "calls none of torch's functions that fastattn serves"


def _is_sharded(module: nn.Module) -> bool:
    """By ``fully_shard``, which has given it a class of its own."""
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


def _changed_since(module: nn.Module) -> str:
    """Why a patched module cannot have its class back: somebody has given it another since."""
    if _is_sharded(module):
        return "sharded since; unpatch before fully_shard"
    if parametrize.is_parametrized(module):
        return "parametrized since; remove the parametrizations before"
    if vars(type(module)).get("__prepare_scriptable__") is not ours.refuse_scripting:
        return "of a class that is not patch's"  # all of that is
    return ""


def _is_container(module: nn.Module) -> bool:
    """Whether what looks alike in it is in its children, which have answers of their own."""
    return any(
        _LOOKS_ALIKE.search(type(child).__name__) or type(child) in _OURS
        for child in module.modules()
        if child is not module
    )


def _own_names(kind: type) -> set[str]:
    return {name for base in _own_bases(kind) for name in vars(base)}


def _own_bases(kind: type) -> Iterator[type]:
    for base in kind.__mro__:
        if base is nn.Module:
            return
        yield base


@functools.cache
def _routed(kind: Any, form: rms_modules.Form | None) -> type[nn.Module]:
    """A subclass whose forward runs inside ``override``, or is an RMS norm of this form. The name
    stays: libraries look at it."""

    def forward(self: Any, *args: Any, **keywords: Any) -> Any:
        with override():
            return kind.forward(self, *args, **keywords)

    def norm(self: Any, x: Any) -> Any:
        return rms_modules.forward(form, kind, self, x)  # type: ignore[arg-type]

    def reduce(self: Any, protocol: Any) -> Any:
        _, _, *rest = super(made, self).__reduce_ex__(protocol)
        return _new, (kind, form), *rest  # by the class that a pickle can name

    made: Any = type(
        kind.__name__,
        (kind,),
        {
            "forward": functools.wraps(kind.forward)(forward if form is None else norm),
            "__reduce_ex__": reduce,
            "__prepare_scriptable__": ours.refuse_scripting,
            "__module__": kind.__module__,
            "__qualname__": kind.__qualname__,
            "__doc__": kind.__doc__,
        },
    )
    return made


def _new(kind: Any, form: rms_modules.Form | None) -> nn.Module:
    made = _routed(kind, form)
    return made.__new__(made)


# ------------------------------------------------------------------------------ Hugging Face models

_ATTENTION = "_fastattn_original_attention"


def _transformers_models(model: nn.Module) -> list[tuple[str, Any]]:
    """The outermost models of transformers in it: their attention is chosen for all of one."""
    library = sys.modules.get("transformers.modeling_utils")
    if library is None:
        return []
    found: list[tuple[str, Any]] = []
    inside: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, library.PreTrainedModel) and id(module) not in inside:
            found.append((name, module))
            inside |= {id(m) for m in module.modules()}
    return found


def _pretrained() -> type[nn.Module]:
    return sys.modules["transformers.modeling_utils"].PreTrainedModel


def _append_to_caches(name: str, top: Any, report: Report) -> None:
    """Has a model that generates append to its KV cache in place."""
    from .integrations import kv_cache

    if top.can_generate() and not kv_cache.installed(top):
        kv_cache.install(top)
        report.replaced[f"{name}.cache".lstrip(".")] = "DynamicCache, appended to in place"


def _leave_caches(model: nn.Module, report: Report) -> None:
    """Takes that back, of a model inside another that was patched by itself too."""
    if "transformers.modeling_utils" not in sys.modules:
        return
    from .integrations import kv_cache

    for name, module in model.named_modules():
        if kv_cache.remove(module):
            report.replaced[f"{name}.cache".lstrip(".")] = "transformers' own"


def _attend_by_fastattn(name: str, top: Any, report: Report) -> bool:
    """Whether a model's attention is fastattn's from now on, or is so already."""
    from .integrations import transformers as integration

    where = f"{name}.config".lstrip(".")
    before = top.config._attn_implementation
    if before == integration.NAME:
        report.left[where] = 'attn_implementation is "fastattn" already'
        return True
    if not top._can_set_attn_implementation():
        report.left[where] = f"{type(top).__name__}: its attention cannot be chosen"
        return False
    for part in top.modules():
        kind: Any = type(part)
        unknown = integration.unknown_arguments(kind)
        if unknown:
            only = f"attention takes {' and '.join(unknown)}, which fastattn's does not"
            report.left[where] = f"{type(top).__name__}: its {only}"
            return False
    parts: list[Any] = [part for part in top.modules() if isinstance(part, _pretrained())]
    if any(getattr(part.config, "output_attentions", False) for part in parts):
        # It would run, but transformers saves no such configuration.
        only = 'has output_attentions, for which transformers wants "eager"'
        report.left[where] = f"{type(top).__name__}: its configuration {only}"
        return False
    integration.register()
    top.__dict__[_ATTENTION] = before
    for part in parts:  # may have a configuration, and an attention, of its own
        if part.config is not top.config:
            part.__dict__[_ATTENTION] = part.config._attn_implementation
    top.set_attn_implementation(integration.NAME)
    report.replaced[where] = f'attn_implementation="{integration.NAME}"'
    return True


# ------------------------------------------------------------------ which calls a module's code has

_FUNCTIONS: dict[Any, str] = {function: f"F.{function.__name__}" for function in torch_calls.ROUTES}
_CONTAINERS_OF_TORCH = (nn.TransformerEncoder, nn.TransformerDecoder, nn.Transformer)


@functools.cache
def _calls(kind: Any) -> tuple[str, ...]:
    """Which of torch's functions the code of a class calls, as far as it can be read."""
    if _package(kind) == "torch":
        return ()
    if issubclass(kind, nn.TransformerEncoderLayer) or issubclass(kind, _CONTAINERS_OF_TORCH):
        return ("inference fast path",)
    found: list[str] = []
    waiting: list[Any] = [
        base.__dict__["forward"] for base in _own_bases(kind) if "forward" in base.__dict__
    ]
    seen: set[Any] = set()
    package = _package(kind)
    while waiting:
        function = waiting.pop()
        if not isinstance(function, types.FunctionType) or function.__code__ in seen:
            continue
        seen.add(function.__code__)
        for used in _used(function, kind):
            if type(used).__name__ == "AttentionInterface":
                return ()  # transformers': which attention it calls is in the model's config
            if _hashable(used) and used in _FUNCTIONS:
                found.append(_FUNCTIONS[used])
            elif isinstance(used, types.FunctionType) and _package(used) == package:
                waiting.append(used)
    return tuple(sorted(set(found)))


def _package(x: Any) -> str:
    return (x.__module__ or "").partition(".")[0]


def _used(function: types.FunctionType, kind: type) -> Iterator[Any]:
    """The objects that a function's names lead to: globals, what is in their modules, methods."""
    current: Any = None
    for instruction in dis.get_instructions(function):
        name = instruction.argval
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF"):
            current = _global(function, name)
            yield current
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            if isinstance(current, types.ModuleType):
                current = getattr(current, name, None)
                yield current
            else:
                current = None
                yield getattr(kind, name, None)
        elif instruction.opname not in ("CACHE", "PUSH_NULL", "PRECALL", "EXTENDED_ARG"):
            current = None


def _global(function: types.FunctionType, name: Any) -> Any:
    if function.__closure__ and name in function.__code__.co_freevars:
        cell = function.__closure__[function.__code__.co_freevars.index(name)]
        try:
            return cell.cell_contents
        except ValueError:  # not yet filled
            return None
    return function.__globals__.get(name)


def _hashable(x: Any) -> bool:
    return callable(x) and getattr(type(x), "__hash__", None) is not None


# -------------------------------------------------------------------------------------- the report


def _modules(count: int) -> str:
    return f"{count} module{'' if count == 1 else 's'}"


def _grouped(named: dict[str, str]) -> list[str]:
    """One line for modules that differ in the numbers of their names only."""
    lines: dict[tuple[str, str], list[str]] = {}
    for name, what in named.items():
        shape = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
        lines.setdefault((shape, what), []).append(name or "the model itself")
    return [
        f"{names[0] if len(names) == 1 else f'{shape} (x{len(names)})'}: {what}"
        for (shape, what), names in lines.items()
    ]
