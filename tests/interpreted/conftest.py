"""Tests of the Triton kernels by its interpreter: in a process of their own, with TRITON_INTERPRET=1
(``tests/test_triton.py`` starts it)."""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["*"]
