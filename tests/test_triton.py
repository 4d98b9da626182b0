"""The Triton kernels without a GPU: their numbers by the interpreter, their code by the compiler.

Each in a process of its own, since triton decides at its import which of the two it will be, and all
of them side by side.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

# The suites of every backend, which in these processes is the triton backend alone.
SUITES = {
    "layer norm and softmax": [
        "interpreted",
        "test_case_table.py::test_case",
        "test_edge_cases_rows.py",
        "test_ops_layer_norm.py",
        "test_ops_softmax.py",
        "test_one_truth.py::test_residual_dropout",
        "-k",
        "not attention-",
    ],
}


def start(command, **environment):
    return subprocess.Popen(
        [sys.executable, *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_numbers_and_code():
    running = {
        name: start(
            # The path of this process: with -m alone, the sources beside the tests would be imported.
            [
                "-c",
                f"import sys; sys.path[:] = {sys.path!r}; import pytest; sys.exit(pytest.main())",
            ]
            + [x if x.startswith(("-", "not ")) else str(TESTS / x) for x in arguments],
            TRITON_INTERPRET="1",
        )
        for name, arguments in SUITES.items()
    }
    running["generated code"] = start(
        [str(TESTS / "kernel_table" / "table.py")], PYTHONPATH=":".join(sys.path)
    )
    failed = []
    for name, process in running.items():
        output, _ = process.communicate()
        if process.returncode:
            failed.append(f"---- {name}\n{output[-20000:]}")
    assert not failed, "\n".join(failed)
