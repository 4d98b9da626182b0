"""Which backend serves a call, and how it says so."""

import subprocess
import sys

import pytest
import torch

import fastattn
from fastattn import dispatch, library
from fastattn.backends import cpu
from fastattn.backends.base import Backend
from fastattn.backends.reference import ReferenceBackend

Q = torch.zeros(1, 2, 4, 8)


class Picky(ReferenceBackend):
    """Serves attention without softcap, forward only."""

    name = "picky"

    def reasons(self, request):
        reasons = ["has no softcap"] if "softcap" in request.flags else []
        return reasons + (["has no backward"] if request.needs_backward else [])


class Absent(Backend):
    name = "absent"

    def unavailable(self):
        return "no such machine"


@pytest.fixture
def registry(monkeypatch):
    registry = {b.name: b for b in (Absent(), Picky(), ReferenceBackend())}
    for module in (dispatch, library):
        monkeypatch.setattr(module, "BACKENDS", registry)
    return registry


def test_the_first_that_can_serves(registry):
    assert fastattn.explain(Q, Q, Q).backend == "picky"
    assert fastattn.explain(Q, Q, Q, softcap=2.0).backend == "reference"
    assert fastattn.explain(Q.clone().requires_grad_(), Q, Q).backend == "reference"
    with torch.no_grad():
        assert fastattn.explain(Q.clone().requires_grad_(), Q, Q).backend == "picky"
    assert fastattn.explain(Q, Q, Q, backend="reference").backend == "reference"


def test_explain_prints_one_line_a_backend(registry):
    assert str(fastattn.explain(Q, Q, Q, softcap=2.0)).splitlines() == [
        "reference serves this call",
        "absent: no such machine",
        "picky: has no softcap",
        "reference: serves it (naive PyTorch)",
    ]


def test_a_named_backend_is_never_replaced(registry):
    for function in (fastattn.attention, fastattn.explain):
        with pytest.raises(ValueError, match="'picky' does not serve this call: has no softcap"):
            function(Q, Q, Q, softcap=2.0, backend="picky")
        with pytest.raises(ValueError, match=r"'absent' does not serve .*: no such machine"):
            function(Q, Q, Q, backend="absent")


def test_the_chosen_backend_runs(registry, monkeypatch):
    ran = []
    monkeypatch.setattr(
        Picky,
        "attention_forward",
        lambda self, call: ran.append("picky") or ReferenceBackend.attention_forward(self, call),
    )
    fastattn.attention(Q, Q, Q)
    fastattn.attention(Q, Q, Q, backend="reference")
    assert ran == ["picky"]


def test_nothing_serves(registry):
    del registry["reference"]
    with pytest.raises(ValueError, match=r"(?s)no backend serves.*absent: no.*picky: has no soft"):
        fastattn.attention(Q, Q, Q, softcap=1.0)


def test_backends_is_a_mapping_that_prints(registry):
    backends = fastattn.backends()
    assert list(backends) == ["absent", "picky", "reference"]
    assert backends["absent"] == "no such machine" and backends["reference"] is None
    assert backends.available == ["picky", "reference"]
    assert "absent: unavailable, no such machine" in str(backends)


def test_reference_is_always_there():
    assert fastattn.backends()["reference"] is None
    assert list(fastattn.backends())[-1] == "reference"


def test_flags_name_the_variants():
    seen = []

    class Spy(ReferenceBackend):
        def reasons(self, request):
            seen.append(request)
            return []

    spy = Spy()
    original = dict(dispatch.BACKENDS)
    dispatch.BACKENDS.clear()
    dispatch.BACKENDS["reference"] = spy
    try:
        fastattn.explain(
            Q,
            Q,
            Q,
            softcap=2.0,
            alibi_slopes=torch.ones(2),
            bias=torch.zeros(4, 4),
            sinks=torch.zeros(2),
            dropout_p=0.1,
            deterministic=True,
        )
    finally:
        dispatch.BACKENDS.clear()
        dispatch.BACKENDS.update(original)
    request = seen[0]
    assert request.op == "attention" and request.shapes == (Q.shape,) * 3
    assert set(request.flags) == {"bias", "alibi", "sinks", "softcap", "dropout", "deterministic"}


# ------------------------------------------------------------------------------ the cpu extensions


def test_unknown_instruction_set(monkeypatch):
    monkeypatch.setenv("FASTATTN_CPU_ISA", "mmx")
    with pytest.raises(ImportError, match=r"FASTATTN_CPU_ISA='mmx': expected one of .*avx2"):
        cpu.load_extension()


def test_instruction_set_that_was_not_built(monkeypatch):
    monkeypatch.setenv("FASTATTN_CPU_ISA", "avx2")
    monkeypatch.setattr(cpu, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="'avx2' was not built"):
        cpu.load_extension()


def test_without_extensions_there_is_a_reason(monkeypatch):
    monkeypatch.delenv("FASTATTN_CPU_ISA", raising=False)
    monkeypatch.setattr(cpu, "find_spec", lambda name: None)
    module, isa, reason = cpu.load_extension()
    assert module is None and isa == "" and reason


def test_import_is_light():
    """What takes long to import is imported when it is needed, unless torch already has."""
    code = (
        "import sys, torch; before = set(sys.modules); import fastattn;"
        "new = {name.split('.')[0] for name in set(sys.modules) - before};"
        "compilers = [n for n in set(sys.modules) - before if n.startswith('torch.')];"
        "print(sorted(new - {'fastattn'}), compilers)"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == "[] []"


def test_a_torch_without_the_exchange_interface_is_served_by_reference(tmp_path):
    """What C++ reads tensors by is newer than most of torch; where it is missing, we say so."""
    code = (
        "import torch; del torch._tensor.Tensor.__dlpack_c_exchange_api__\n"
        "import fastattn; q = torch.randn(1, 2, 3, 4); print(fastattn.explain(q, q, q))\n"
        "fastattn.attention(q, q, q)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("reference serves this call\ncpu: torch ")
    assert "does not offer DLPack's exchange API 1" in said.stdout
