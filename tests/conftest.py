"""What every test module shares."""

import os
import re
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes share the cores: idle threads must leave them to others, and a call has
    # one thread unless a test asks for more (test_threads.py does).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from here import BACKENDS, INTERPRETED
from hypothesis import HealthCheck, settings

from fastattn import dispatch, library

settings.register_profile(
    "fastattn",
    deadline=None,
    derandomize="CI" in os.environ,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("fastattn")


if INTERPRETED:
    sys.path.insert(0, str(Path(__file__).parent / "interpreted"))
    import sanitizer
EMULATED = os.environ.get("FASTATTN_TEST_CUDA_MODULE")
if EMULATED:  # a process for the cuda backend in the emulator alone, started by test_cuda.py
    from emulator import build

    from fastattn.backends.cuda import CudaBackend

    dispatch.BACKENDS["cuda"] = CudaBackend(build.load(EMULATED))
    BACKENDS = ["cuda"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Every backend that runs here, in turn."""
    return request.param


@pytest.fixture(autouse=INTERPRETED)
def watched():
    """Every load and store of the interpreter, for lanes out of bounds and programs that collide."""
    with sanitizer.sanitized():
        yield


@pytest.fixture(autouse=bool(EMULATED))
def no_bank_conflicts():
    """In no test of the emulator do lanes share banks of shared memory."""
    yield
    assert dispatch.BACKENDS["cuda"].module.take_bank_conflicts() == []


@pytest.fixture
def calls(monkeypatch):
    """The names of the ops that ran, in order."""
    ran = []
    for op in (library.attention_forward, library.layer_norm_forward, library.softmax_forward):
        original = op.run
        monkeypatch.setattr(
            op,
            "run",
            lambda *a, op=op, f=original, **k: (
                ran.append(op.name.split("_forward")[0]) or f(*a, **k)
            ),
        )
    return ran


def pytest_collection_modifyitems(config, items):
    """Leaves out the tests of a dtype that their backend does not serve, and says so."""
    left_out = [item for item in items if _refused(getattr(item, "callspec", None))]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


def _refused(callspec):
    parameters = callspec.params if callspec else {}
    dtype = parameters.get("dtype") or getattr(parameters.get("case"), "dtype", None)
    if dtype is None or "backend" not in parameters:
        return False
    request = dispatch.Request("softmax", torch.device("cpu"), dtype, (torch.Size((1,)),))
    return bool(dispatch.BACKENDS[parameters["backend"]].reasons(request))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """The same for tests that take to float64 by themselves: skipped, and counted."""
    try:
        return (yield)
    except (ValueError, AssertionError) as error:
        if INTERPRETED and re.search(r"serves float32.*got torch\.float64", str(error)):
            pytest.skip(str(error))
        if EMULATED and re.search(r"serves (float32|attention|head dims).*got", str(error)):
            pytest.skip(str(error))
        raise


@pytest.fixture(scope="session")
def topic_texts(tmp_path_factory):
    """A folder of topics for BERT's examples (see bert_texts.py)."""
    import bert_texts

    return bert_texts.write_texts(tmp_path_factory.mktemp("texts") / "topics")


@pytest.fixture(scope="session")
def pretrained(topic_texts, tmp_path_factory):
    """What pretrain.py leaves of them, for the examples that start from it."""
    import bert_texts

    out = tmp_path_factory.mktemp("pretrained")
    bert_texts.pretrain_tiny(topic_texts, out, "--steps=150")
    return out
