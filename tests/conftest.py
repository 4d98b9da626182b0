"""What every test module shares."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes share the cores: idle threads must leave them to others, and a call has
    # one thread unless a test asks for more (test_threads.py does).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

import fastattn

settings.register_profile(
    "fastattn",
    deadline=None,
    derandomize="CI" in os.environ,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("fastattn")


@pytest.fixture(params=fastattn.backends().available)
def backend(request):
    """Every backend that runs here, in turn."""
    return request.param
