"""The Triton kernels without a GPU: their numbers by the interpreter, their code by the compiler.

Each in processes of their own, since triton decides at its import which of the two it will be; two
at a time, as many as CI has cores.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

# The suites of every backend, which in these processes is the triton backend alone: files and nodes,
# and what is left out of them, the longest first. What is left out are the largest shapes, of which
# smaller ones show the same, and masks that interpreted/test_mask.py has all of.
SUITES = {
    "attention at its edges": (
        [
            "test_edge_cases.py",
            "test_one_truth.py::test_masks_across_blocks",
            "test_one_truth.py::test_dropout_where_a_window_starts_between_counters",
            "test_one_truth.py::test_attention_drops_the_same_elements",
            "test_one_truth.py::test_every_dtype_drops_the_same_elements",
            "test_one_truth.py::test_backends_pair",
        ],
        "",
    ),
    "attention": (
        ["interpreted/test_attention.py", "test_case_table.py::test_case", "test_samples.py"],
        "not _norm- and not softmax-",
    ),
    "layer norm and softmax": (
        [
            "interpreted/test_interpreter.py",
            "interpreted/test_mask.py",
            "interpreted/test_sanitizer.py",
            "test_case_table.py::test_case",
            "test_samples.py",
            "test_edge_cases_rows.py",
            "test_ops_layer_norm.py",
            "test_ops_softmax.py",
            "test_one_truth.py::test_residual_dropout",
        ],
        "not attention-",
    ),
}


def run(command, **environment):
    """What it printed, if it failed."""
    done = subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
    )
    return (done.stdout + done.stderr)[-20_000:] if done.returncode else ""


def interpret(name):
    nodes, chosen = SUITES[name]
    # The path of this process: with -m alone, the sources beside the tests would be imported.
    code = f"import sys; sys.path[:] = {sys.path!r}; import pytest; sys.exit(pytest.main())"
    return run(
        ["-c", code, *(str(TESTS / node) for node in nodes), "-k", chosen], TRITON_INTERPRET="1"
    )


def compile_all(name):
    return run([str(TESTS / "kernel_table" / "table.py")], PYTHONPATH=":".join(sys.path))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_numbers_and_code():
    jobs = {"generated code": compile_all, **dict.fromkeys(SUITES, interpret)}
    with ThreadPoolExecutor(max(2, os.cpu_count() or 1)) as pool:
        outputs = pool.map(lambda name: jobs[name](name), jobs)
        failed = [f"---- {name}\n{out}" for name, out in zip(jobs, outputs, strict=True) if out]
    assert not failed, "\n".join(failed)
