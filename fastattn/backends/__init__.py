"""The backends, in order of preference: the first that can serve a call does."""

from .base import Backend
from .cpu import CpuBackend
from .cuda import CudaBackend
from .reference import ReferenceBackend
from .triton import TritonBackend

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        CpuBackend(),
        TritonBackend(),
        CudaBackend(),
        ReferenceBackend(),
    )
}
