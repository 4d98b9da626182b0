"""Tests of the CUDA kernels in the emulator: in a process of their own (``tests/test_cuda.py`` builds
the module and starts it)."""

import os

if not os.environ.get("FASTATTN_TEST_CUDA_MODULE"):
    collect_ignore_glob = ["*"]
