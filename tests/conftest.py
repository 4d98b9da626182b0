"""What every test module shares."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes share the cores: idle threads must leave them to others, and a call has
    # one thread unless a test asks for more (test_threads.py does).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

import fastattn
from fastattn import dispatch

settings.register_profile(
    "fastattn",
    deadline=None,
    derandomize="CI" in os.environ,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("fastattn")


# Tensors of the tests lie in the CPU's memory: a backend for another device has its own tests.
BACKENDS = [
    name for name in fastattn.backends().available if dispatch.BACKENDS[name].device == "cpu"
]


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Every backend that runs here, in turn."""
    return request.param


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
