"""The extension under AddressSanitizer and UndefinedBehaviorSanitizer: no read or write outside
what a tensor holds, whatever the shapes, and no undefined arithmetic."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parent.parent
ISA = "avx2"

SCRIPT = """
import sys, torch, fastattn
from fastattn import cases, proof
from fastattn.backends import BACKENDS

assert fastattn.__file__.startswith(sys.argv[1]), fastattn.__file__
assert BACKENDS["cpu"].unavailable() is None, BACKENDS["cpu"].unavailable()

def prove(case):
    verdict = proof.prove(case, "cpu")
    if verdict.problem or verdict.refusal:
        print(verdict)

torch.set_num_threads(2)
for case in cases.CASES:
    for dtype in (torch.float32, torch.bfloat16):
        prove(case.with_dtype(dtype))
for n in (1, 3, 7, 8, 9, 15, 17, 31, 33, 97, 129):
    for dtype in cases.DTYPES:
        fields = {"batch": 1, "dtype": dtype, "bias": "boolean", "dropout_p": 0.1}
        prove(cases.AttentionCase("lengths", q_len=n, k_len=n + 2, head_dim=n, causal=True, **fields))
        prove(cases.AttentionCase("decode", q_len=1, k_len=n, head_dim=n, layout="packed", **fields))
        prove(cases.LayerNormCase("rows", shape=(n, n), residual=True, dropout_p=0.1, dtype=dtype))
        prove(cases.SoftmaxCase("rows", shape=(n, n), mask="boolean", dtype=dtype))
        prove(cases.SoftmaxCase("columns", shape=(n, n + 1), dim=0, dtype=dtype))
print("done")
"""


def compiler():
    return os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), None)


def runtime(name):
    """The path of a sanitizer's library, which has to be loaded before Python."""
    found = subprocess.run(
        [compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return found if os.path.isabs(found) else None


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """The package, built with the sanitizers in a folder of its own."""
    if not sys.platform.startswith("linux"):
        pytest.skip("runs on Linux")
    if not (SOURCES / "setup.py").exists():
        pytest.skip("no sources beside the tests")
    if compiler() is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("sanitized")
    environment = dict(os.environ, FASTATTN_SANITIZE="address,undefined", FASTATTN_BUILD_ISAS=ISA)
    subprocess.run(
        [
            *(sys.executable, "setup.py", "-q", "build"),
            *("--build-base", str(folder / "build"), "--build-lib", str(folder / "lib")),
        ],
        cwd=SOURCES,
        env=environment,
        check=True,
    )
    return folder / "lib"


@pytest.mark.slow
def test_case_table(sanitized):
    libraries = [runtime("libasan.so"), runtime("libubsan.so"), runtime("libstdc++.so.6")]
    if libraries[0] is None:
        pytest.skip("the compiler has no sanitizers")
    environment = dict(
        os.environ,
        LD_PRELOAD=" ".join(filter(None, libraries)),
        ASAN_OPTIONS="detect_leaks=0:halt_on_error=1",
        UBSAN_OPTIONS="halt_on_error=1:print_stacktrace=1",
        FASTATTN_CPU_ISA="",
    )
    code = f"import sys; sys.path[:] = {[str(sanitized), *sys.path]!r}\n{SCRIPT}"
    child = subprocess.run(
        [sys.executable, "-c", code, str(sanitized)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert child.returncode == 0, child.stderr[-6000:]
    assert "runtime error" not in child.stderr
    assert child.stdout == "done\n"
