"""What runs in this process."""

import os

import fastattn
from fastattn import dispatch

# A process for the triton backend alone, started by test_triton.py.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Tensors of the tests lie in the CPU's memory: a backend for another device has its own tests.
BACKENDS = [
    name
    for name in fastattn.backends().available
    if dispatch.BACKENDS[name].device == "cpu" and (name == "triton" or not INTERPRETED)
]
KERNELS = [name for name in BACKENDS if name != "reference"]
