"""The cuda backend goes before triton where a benchmark shows it ahead, and says so."""

import pytest
import torch

import fastattn
from fastattn import dispatch, library
from fastattn.backends import cuda, measured
from fastattn.backends.reference import ReferenceBackend
from fastattn.bench import choice
from fastattn.bench.results import Report, Result

Q = torch.zeros(1, 2, 32, 64, dtype=torch.bfloat16)
FORWARD = "attention/forward/bfloat16/head_dim_64/short"
BACKWARD = FORWARD.replace("forward", "backward")


class Triton(ReferenceBackend):
    name, challenger = "triton", "cuda"

    def detail(self):
        return ""


class Cuda(Triton):
    """The cuda backend's choice, and nothing else of it."""

    name, challenger = "cuda", ""
    ahead = cuda.CudaBackend.ahead

    def __init__(self):
        self._measured = {}

    def _limits(self, device):
        return 227 << 10, 132, 90


@pytest.fixture
def ours(monkeypatch):
    registry = {b.name: b for b in (Triton(), Cuda(), ReferenceBackend())}
    for module in (dispatch, library):
        monkeypatch.setattr(module, "BACKENDS", registry)
    return registry["cuda"]


def test_nothing_was_measured_yet():
    """Once something is: the figures are positive, of an architecture."""
    for arch, times in measured.load().items():
        assert arch.startswith("sm_") and all(ratio > 0 for ratio in times.values())


def test_without_a_benchmark_triton_keeps_the_call(ours):
    said = fastattn.explain(Q, Q, Q)
    assert said.backend == "triton"
    assert str(said).splitlines()[2] == (
        "cuda: could too (no benchmark on sm_90 shows it ahead of triton)"
    )


def test_ahead_in_the_benchmark_it_takes_the_call(ours):
    ours._measured = {"sm_90": {FORWARD: 1.2}}
    said = fastattn.explain(Q, Q, Q)
    assert said.backend == "cuda"
    assert str(said).splitlines()[2] == (
        "cuda: serves it (a benchmark on sm_90 shows it ahead of triton)"
    )
    assert fastattn.attention(Q, Q, Q).shape == Q.shape


@pytest.mark.parametrize(
    ("table", "keywords", "learns", "expected"),
    [
        ({"sm_80": {FORWARD: 1.2}}, {}, False, "triton"),  # another architecture
        ({"sm_90": {FORWARD: 0.9}}, {}, False, "triton"),  # measured, and behind
        ({"sm_90": {FORWARD: 1.0}}, {}, False, "triton"),
        ({"sm_90": {FORWARD: 1.2}}, {"softcap": 3.0}, False, "triton"),  # a variant
        ({"sm_90": {FORWARD: 1.2}}, {}, True, "triton"),  # its backward was not measured
        ({"sm_90": {FORWARD: 1.2, BACKWARD: 0.9}}, {}, True, "triton"),
        ({"sm_90": {FORWARD: 1.2, BACKWARD: 1.1}}, {}, True, "cuda"),
    ],
)
def test_only_where_it_is_ahead(ours, table, keywords, learns, expected):
    ours._measured = table
    q = Q.clone().requires_grad_(learns)
    assert fastattn.explain(q, Q, Q, **keywords).backend == expected


def test_a_named_backend_is_never_replaced(ours):
    ours._measured = {"sm_90": {FORWARD: 1.2}}
    assert fastattn.explain(Q, Q, Q, backend="triton").backend == "triton"
    ours._measured = {}
    assert fastattn.explain(Q, Q, Q, backend="cuda").backend == "cuda"


def test_ahead_of_triton_alone(ours, monkeypatch):
    """Where triton does not serve, the order decides; where cuda does not, triton keeps it."""
    ours._measured = {"sm_90": {FORWARD: 1.2}}
    monkeypatch.setattr(Triton, "reasons", lambda self, request: ["no"])
    assert fastattn.explain(Q, Q, Q).backend == "reference"  # Cuda inherits the refusal
    monkeypatch.setattr(Cuda, "reasons", lambda self, request: [])
    assert fastattn.explain(Q, Q, Q).backend == "cuda"
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("op", "shapes", "size"),
    [
        ("attention", [(1, 8, 1, 128), (1, 8, 9000, 128), (1, 8, 9000, 128)], "128/decode"),
        ("attention", [(1, 8, 512, 96), (1, 8, 512, 96), (1, 8, 512, 64)], "128/short"),
        ("attention", [(1, 8, 2048, 64), (1, 8, 2048, 64), (1, 8, 2048, 256)], "256/long"),
        ("softmax", [(5, 1024)], "narrow"),
        ("layer_norm", [(2, 3, 4096)], "wide"),
        ("softmax", [(1, 131072)], "widest"),
        ("softmax", [()], "narrow"),
    ],
)
def test_classes(op, shapes, size):
    assert measured.class_of(op, "forward", "float16", shapes).endswith(size)


def report(backend, capability="9.0", **seconds):
    shape = {"B": 1, "H": 8, "K": 8, "M": 512, "N": 512, "D": 64, "E": 64}
    results = [
        Result(name, "attention", "full", "forward", "bfloat16", shape, backend=backend)
        for name in seconds
    ]
    for result, time in zip(results, seconds.values(), strict=True):
        result.times = {"ours": {"median": time}}
    return Report("full", machine={"gpu_capability": capability}, results=results)


def test_two_runs_make_the_table(tmp_path):
    path = tmp_path / "measured.json"
    path.write_text('{"sm_80": {"x": 1.5}, "sm_90": {"gone": 2.0}}')
    found = choice.update(report("triton", a=2.0, b=3.0, c=1.0), report("cuda", a=1.0, b=2.0), path)
    assert found == {FORWARD: 1.5}  # the least of 2 and 1.5
    assert measured.load(path) == {"sm_80": {"x": 1.5}, "sm_90": {FORWARD: 1.5}}


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ((report("cuda", a=1.0), report("cuda", a=1.0)), "expected a run with --backend triton"),
        ((report("triton", "8.0", a=1.0), report("cuda", a=1.0)), "runs on two GPUs: sm_80 and"),
        ((report("triton", a=1.0), report("cuda", "", a=1.0)), "a report of a CPU"),
    ],
)
def test_runs_that_do_not_fit(runs, message, tmp_path):
    path = tmp_path / "measured.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=message):
        choice.update(*runs, path)
    assert path.read_text() == "{}"
