"""What the Triton backend does not serve: a reason in explain(), the same one in the error of
backend="triton", and no exception of Triton's own."""

import importlib.machinery
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import fastattn
from fastattn import dispatch
from fastattn.backends import triton

Q = torch.zeros(1, 2, 4, 8)
GPU = torch.device("cuda", 0)


@pytest.fixture
def install(monkeypatch):
    """A machine with or without triton, with or without a GPU, and a backend that looks at it."""

    def made(package="3.7.1", gpu=True, interpreted=False, capability=(9, 0), hip=None):
        there = None if package is None else importlib.machinery.ModuleSpec("triton", None)
        monkeypatch.setattr(triton, "find_spec", lambda name: there)
        monkeypatch.setattr(triton, "INTERPRETED", interpreted)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.version, "hip", hip)
        major, minor = capability
        device = SimpleNamespace(name="a GPU", major=major, minor=minor)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device_: device)
        monkeypatch.setattr(triton, "_GPU_OBSTACLES", {})

        def package_itself():
            if isinstance(package, Exception):
                raise package
            return SimpleNamespace(__version__=package)

        monkeypatch.setattr(triton, "_triton", package_itself)
        backend = triton.TritonBackend()
        monkeypatch.setitem(dispatch.BACKENDS, "triton", backend)
        return backend

    return made


def request(device=GPU, dtype=torch.bfloat16, head_dim=64, v_dim=None, op="attention"):
    shapes = [torch.Size((1, 2, 4, d)) for d in (head_dim, head_dim, v_dim or head_dim)]
    return dispatch.Request(op, torch.device(device), dtype, tuple(shapes))


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        ({"package": None}, "triton is not installed"),
        ({"gpu": False}, "needs a CUDA or HIP device (torch sees none)"),
        ({"package": "3.5.1"}, "needs triton 3.6 or newer (got 3.5.1)"),
        ({"package": "2.3.0+git1234"}, "needs triton 3.6 or newer (got 2.3.0+git1234)"),
        (
            {"package": ImportError("libcuda.so.1:\ncannot open")},
            "triton cannot be imported (ImportError: libcuda.so.1: cannot open)",
        ),
        (
            {"package": "3.5.1", "gpu": False, "interpreted": True},
            "needs triton 3.6 or newer (got 3.5.1)",
        ),
    ],
    ids=["missing", "no GPU", "old", "older", "broken", "old interpreter"],
)
def test_why_it_cannot_run_here(machine, reason, install):
    install(**machine)
    assert fastattn.backends()["triton"] == reason
    explanation = fastattn.explain(Q, Q, Q)
    assert explanation.reasons["triton"] == [reason]
    assert f"\ntriton: {reason}" in f"\n{explanation}"
    for call in (
        lambda: fastattn.attention(Q, Q, Q, backend="triton"),
        lambda: fastattn.layer_norm(Q, (8,), backend="triton"),
        lambda: fastattn.softmax(Q, backend="triton"),
    ):
        with pytest.raises(ValueError) as raised:
            call()
        assert str(raised.value) == f"backend: 'triton' does not serve this call: {reason}"


@pytest.mark.parametrize("version", ["3.6.0", "3.10.0", "4.0.0", "3.7.1+git0", "main"])
def test_versions_that_serve(version, install):
    assert install(package=version).unavailable() is None


@pytest.mark.parametrize(
    ("asked", "machine", "reason"),
    [
        ({"device": "cpu"}, {}, "needs a CUDA or HIP tensor (got cpu)"),
        (
            {"device": GPU},
            {"interpreted": True},
            "its interpreter (TRITON_INTERPRET) needs a CPU tensor (got cuda)",
        ),
        (
            {"dtype": torch.float64},
            {},
            "serves float32, bfloat16 and float16 (got torch.float64)",
        ),
        ({"head_dim": 513}, {}, "serves head dims up to 512 in torch.bfloat16 (got 513)"),
        ({"v_dim": 600}, {}, "serves head dims up to 512 in torch.bfloat16 (got 600)"),
        (
            {"head_dim": 257, "dtype": torch.float32},
            {},
            "serves head dims up to 256 in torch.float32 (got 257)",
        ),
        (
            {},
            {"capability": (7, 5)},
            "needs a GPU of compute capability 8.0 or newer (got a GPU, 7.5)",
        ),
    ],
    ids=["CPU tensor", "CUDA tensor", "dtype", "head dim", "value dim", "float32", "old GPU"],
)
def test_why_it_does_not_serve_a_call(asked, machine, reason, install):
    install(**machine)
    refused = request(**asked)
    assert dispatch.explain(None, refused).reasons["triton"] == [reason]
    with pytest.raises(ValueError) as raised:
        dispatch.select("triton", refused)
    assert str(raised.value) == f"backend: 'triton' does not serve this call: {reason}"


@pytest.mark.parametrize(
    ("asked", "machine"),
    [
        ({"head_dim": 512}, {}),
        ({"head_dim": 256, "dtype": torch.float32}, {}),
        ({"head_dim": 1, "dtype": torch.float16}, {"capability": (12, 0)}),
        ({"device": "cpu", "head_dim": 512, "dtype": torch.float32}, {"interpreted": True}),
        ({}, {"capability": (7, 5), "hip": "6.4"}),  # AMD's numbers mean something else
        ({"op": "softmax", "head_dim": 4096}, {}),
    ],
    ids=str,
)
def test_what_it_serves(asked, machine, install):
    install(**machine)
    assert dispatch.select("triton", request(**asked)).name == "triton"


def test_every_reason_at_once(install):
    install()
    asked = request("cpu", torch.float64, 600)
    assert len(dispatch.explain(None, asked).reasons["triton"]) == 3


def test_shared_memory_that_does_not_suffice_costs_stages(monkeypatch):
    """A launch falls back to fewer stages; only what no number of them can run is an error."""
    kernel = pytest.importorskip("fastattn.backends.triton.kernel")
    tried = []

    class Function:
        __name__ = "attention_kernel"

        def __init__(self, fits):
            self.fits = fits

        def __getitem__(self, grid):
            return self

        def __call__(self, num_stages, **more):
            tried.append(num_stages)
            if num_stages > self.fits:
                raise kernel.OutOfResources(300_000, 232_448, "shared memory")

    kernel.Launch(Function(2), (1,), {}, {}, num_stages=4).run()
    assert tried == [4, 3, 2]
    with pytest.raises(RuntimeError, match=r"too small for attention_kernel: .*232448"):
        kernel.Launch(Function(0), (1,), {}, {}, num_stages=2).run()


def test_without_triton_everything_else_works():
    """Not hidden by a mock: a process in which triton cannot be found."""
    code = (
        "import sys; sys.modules['triton'] = None; import torch, fastattn;"
        "q = torch.zeros(1, 2, 4, 8); fastattn.attention(q, q, q);"
        "print(fastattn.explain(q, q, q).reasons['triton'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("['triton"), done.stdout
