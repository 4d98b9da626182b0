"""With what every Triton kernel of the library is launched, and compiled ahead of time."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

# Triton 3.6 loses the constants of a tuple that holds a descriptor, where functions pass it on.
DESCRIPTORS_IN_TUPLES = not triton.__version__.startswith("3.6.")
LOG2E = 1.4426950408889634  # exp(x) = exp2(x * LOG2E)


class View(NamedTuple):
    """A tensor (batch, heads, sequence, dim) or less as a kernel walks it: address and strides.

    In a kernel ``x.ptr + b * x.b + ...``; strides count elements, of any sign and size.
    """

    ptr: Any
    b: Any
    h: Any
    s: Any = 0
    d: Any = 0

    @classmethod
    def of(cls, tensor: Tensor) -> View:
        return cls(tensor, *tensor.stride())


@dataclass(frozen=True)
class KernelVariant:
    """One compilation of a kernel, to be made and looked at without a GPU.

    ``signature``, ``constants`` and ``attributes`` are what ``triton.compiler.ASTSource`` takes as
    signature, constexprs and attrs: types by argument name (tuples of types for tuples), and values
    and properties by the path to an argument, ``(index,)`` or ``(index, index in the tuple)``.
    """

    name: str
    function: Any  # what triton.jit returned
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]
    num_warps: int
    num_stages: int
    main: bool = False  # a main configuration: must not spill
    instructions: tuple[str, ...] = ()  # tensor-core instructions that must occur in its assembly


@dataclass(slots=True)  # made at every call: not frozen, which takes twice as long to make
class Launch:
    """One launch of a kernel: what runs, on what, and with which compile-time choices."""

    function: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # by name: tensors, numbers, tuples, None
    constants: dict[str, Any]  # the tl.constexpr parameters; may be named tuples
    num_warps: int = 4
    num_stages: int = 2
    describes: bool = False  # makes tensor descriptors itself, which need memory

    def run(self) -> None:
        """With as many stages as the device has shared memory for: a configuration that was tuned
        for a plain call may have too many for one with a bias."""
        for stages in range(self.num_stages, 0, -1):
            try:
                self.start(stages)
            except OutOfResources as error:
                if stages == 1:
                    name = self.function.__name__
                    raise RuntimeError(f"this GPU is too small for {name}: {error}") from None
            else:
                break

    def start(self, num_stages: int) -> None:
        if self.describes:
            triton.set_allocator(_workspace)
        self.function[self.grid](**self.keywords(num_stages))

    def keywords(self, num_stages: int) -> dict[str, Any]:
        """What the kernel is called with, its options among them."""
        options = {"num_warps": self.num_warps, "num_stages": num_stages}
        return {**self.arguments, **self._compile_time(), **options}

    def _compile_time(self) -> dict[str, Any]:
        return {
            key: _constexprs(value) if isinstance(value, tuple) else value
            for key, value in self.constants.items()
        }

    def variant(
        self, name: str, main: bool = False, instructions: tuple[str, ...] = ()
    ) -> KernelVariant:
        """What Triton would compile for this launch; its tensors may be on the meta device."""
        typed = _Typed()
        unspecialized = {p.name for p in self.function.params if p.do_not_specialize}
        constants = self._compile_time()
        signature: dict[str, Any] = {}
        for i, key in enumerate(self.function.arg_names):
            if key in constants:
                typed.constants[(i,)] = constants[key]
                signature[key] = "constexpr"
            else:
                value = self.arguments[key]
                signature[key] = typed.visit((i,), value, key not in unspecialized)
        return KernelVariant(
            name,
            self.function,
            signature,
            typed.constants,
            typed.attributes,
            self.num_warps,
            self.num_stages,
            main,
            instructions,
        )


@functools.cache
def _constexprs(value: Any) -> Any:
    """Fields of a named tuple each as a tl.constexpr: a kernel can pass them on as such."""
    return type(value)(*map(tl.constexpr, value))


def _workspace(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.bool: "*i1",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass
class _Typed:
    """The types Triton gives to arguments, with what it specialises on: 1, and multiples of 16."""

    constants: dict[tuple[int, ...], Any] = field(default_factory=dict)
    attributes: dict[tuple[int, ...], list[list[Any]]] = field(default_factory=dict)

    def visit(self, path: tuple[int, ...], value: Any, specialize: bool) -> Any:
        if isinstance(value, tuple):
            types = [self.visit((*path, i), x, specialize) for i, x in enumerate(value)]
            return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
        if value is None or (specialize and type(value) is int and value == 1):
            self.constants[path] = value
            return "constexpr"
        if isinstance(value, Tensor):
            self._mark(path, value.is_meta or value.data_ptr() % 16 == 0)
            return _POINTERS[value.dtype]
        if isinstance(value, float):
            return "fp32"
        if isinstance(value, int):
            self._mark(path, specialize and value % 16 == 0)
            return "i32" if -(2**31) <= value < 2**31 else "i64"
        if isinstance(value, TensorDescriptor):
            return f"tensordesc<{_POINTERS[value.base.dtype][1:]}{list(value.block_shape)}>"
        raise TypeError(f"cannot be a kernel's argument: {value!r}")

    def _mark(self, path: tuple[int, ...], divisible: bool) -> None:
        if divisible:
            self.attributes[path] = [["tt.divisibility", 16]]


def describable(x: Tensor) -> bool:
    """Whether tensor descriptors, and so the tensor memory accelerator, can speak of x."""
    shape, strides = x.shape, x.stride()
    if strides[3] != 1 or not 0 < shape[3] <= 256 or not (x.is_meta or x.data_ptr() % 16 == 0):
        return False
    unit = 16 // x.element_size()
    for size, step in zip(shape[:3], strides, strict=False):  # a loop: this runs at every call
        if size == 0 or (size > 1 and (step <= 0 or step % unit)):
            return False
    return True


def describe(x: Tensor, rows: int) -> TensorDescriptor:
    """Of tiles (1, 1, rows, head dim) of x, the head dim as a power of two from 16 on."""
    unit = 16 // x.element_size()
    strides = [
        unit if size == 1 and d < 3 else step  # of one, any stride: it may not be fit
        for d, (step, size) in enumerate(zip(x.stride(), x.shape, strict=True))
    ]
    block = [1, 1, rows, max(16, next_power_of_two(x.shape[3]))]
    return TensorDescriptor(x, list(x.shape), strides, block)


@functools.cache
def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942", ..., or "cpu" under Triton's interpreter: what heuristics go by."""
    if device.type != "cuda":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def processors(device: torch.device) -> int:
    """How many multiprocessors the device has. The interpreter has few: there, too, a program is to
    take several shares. The meta device, of code that is only compiled, has as many as a large one.
    """
    if device.type != "cuda":
        return 4 if device.type == "cpu" else 128
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def float32_precision() -> str:
    """The ``input_precision`` of tl.dot for float32: what torch's own products may use. They have
    several names for it, and ``torch.get_float32_matmul_precision`` raises for the newer ones."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up: triton.cdiv does it in two microseconds."""
    return -(-a // b)


def next_power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
