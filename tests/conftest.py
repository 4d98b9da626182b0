"""What every test module shares."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes with a team of threads each: idle threads must leave the cores to others.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

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
