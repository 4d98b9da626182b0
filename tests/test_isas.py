"""Each instruction set that was built and that this processor runs, forced in turn."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastattn.backends import cpu
from fastattn.bench import machine

BUILT = machine.build_record()["isas"]
USABLE = machine.build_record()["usable"]
built = pytest.mark.skipif(not BUILT, reason="no extension was built")

# A slice of the case table that comes through each kernel of an instruction set.
CASES = [
    "tiles",
    "causal_tiles",
    "causal_rows_without_keys",
    "window",
    "bias_keys",
    "bias_infinite",
    "mask",
    "sinks",
    "dropout",
    "softcap_causal",
    "alibi_batch_causal",
    "gqa",
    "value_dim",
    "head_dim_3",
    "head_dim_59",
    "head_dim_128",
    "one_head",
    "decode_gqa",
    "decode_few",
    "decode_window",
    "packed",
    "column",
    "offset",
    "large_logits",
    "everything",
    "width_odd",
    "width_wide",
    "many_rows",
    "parameters_float32",
    "mean",
    "rms_wide",
    "residual_dropout",
    "residual_column",
    "middle_dim",
    "mask_broadcast",
    "mask_additive",
    "mask_empty_rows",
    "out_float32",
    "log_wide",
    "log_first_dim",
]

SCRIPT = """
import json, sys
from fastattn import cases, proof, testing
from fastattn.backends import BACKENDS

names = set(json.loads(sys.argv[1]))
assert not names - {case.name for case in cases.CASES}, "a case is gone"
print(BACKENDS["cpu"].isa)
for case in cases.CASES:
    for dtype in cases.DTYPES if case.name in names else ():
        with testing.poisoned_empty():
            verdict = proof.prove(case.with_dtype(dtype), "cpu")
        if verdict.problem or verdict.refusal:
            print(verdict)
"""


def python(code, *arguments, isa=None, timeout=300):
    """Runs code in a process of its own, since a process loads only one instruction set."""
    environment = {k: v for k, v in os.environ.items() if k != "FASTATTN_CPU_ISA"}
    if isa is not None:
        environment["FASTATTN_CPU_ISA"] = isa
    code = f"import sys; sys.path[:] = {sys.path!r}\n{code}"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.mark.parametrize("isa", USABLE)
def test_forced(isa):
    child = python(SCRIPT, json.dumps(CASES), isa=isa)
    assert child.returncode == 0, child.stderr
    assert child.stdout.split("\n") == [isa, ""]


@pytest.mark.parametrize("isa", sorted({"avx2", "baseline"} & set(USABLE)))
def test_edges(isa):
    """What the rounding and the width of its vectors decide, of those that the tests do not take."""
    files = [str(Path(__file__).parent / f"test_edge_cases{name}.py") for name in ("", "_rows")]
    code = "import sys, pytest; sys.exit(pytest.main(['-q', '-k', 'cpu', *sys.argv[1:]]))"
    child = python(code, *files, isa=isa)
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr


@built
def test_the_best_is_taken():
    child = python("from fastattn.backends import BACKENDS; print(BACKENDS['cpu'].isa)")
    assert child.stdout.strip() == USABLE[0], child.stderr
    assert [isa for isa in cpu.ISAS if isa in USABLE] == USABLE


@built
def test_the_plainest_that_was_built_runs():
    assert max(BUILT, key=cpu.ISAS.index) in USABLE


@built
@pytest.mark.parametrize("isa", sorted(set(BUILT) - set(USABLE)))
def test_one_that_this_processor_lacks(isa):
    child = python("import fastattn", isa=isa)
    assert child.returncode == 1
    assert f"FASTATTN_CPU_ISA='{isa}': this CPU or its system does not have it" in child.stderr


@built
def test_one_that_no_processor_has(monkeypatch):
    """The same on a processor that has all that was built."""
    plainest = max(BUILT, key=cpu.ISAS.index)
    module = sys.modules[f"fastattn._cpu_{plainest}"]
    monkeypatch.setattr(module, "usable_isas", lambda: [])
    monkeypatch.setenv("FASTATTN_CPU_ISA", BUILT[0])
    with pytest.raises(ImportError, match=f"'{BUILT[0]}': this CPU or its system does not have it"):
        cpu.load_extension()
    monkeypatch.delenv("FASTATTN_CPU_ISA")
    module, isa, reason = cpu.load_extension()
    assert module is None and not isa and "no extension that was built runs on this CPU" in reason


@pytest.mark.parametrize("isa", [isa for isa in cpu.ISAS if isa not in BUILT])
def test_one_that_was_not_built(isa):
    child = python("import fastattn", isa=isa)
    assert child.returncode == 1
    assert f"FASTATTN_CPU_ISA='{isa}' was not built; what was built: " in child.stderr


@pytest.mark.parametrize("isa", ["sse", "AVX2", "avx2,avx512"])
def test_one_that_does_not_exist(isa):
    child = python("import fastattn", isa=isa)
    assert child.returncode == 1
    assert f"FASTATTN_CPU_ISA='{isa}': expected one of avx512bf16, avx512, avx2" in child.stderr
