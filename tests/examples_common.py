"""What the tests of the example scripts share: where they are, how one is killed, what it says."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fastattn

EXAMPLES = Path(__file__).parent.parent / "examples"
if str(EXAMPLES) not in sys.path:
    sys.path.insert(0, str(EXAMPLES))


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small gain nothing from threads, and lose much where the cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def kill_at_first_checkpoint(script, arguments, checkpoint):
    """Start a script in a process of its own, and kill it as soon as it has saved."""
    paths = [str(Path(fastattn.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLES / script), *map(str, arguments)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "OMP_NUM_THREADS": "1",  # sums in the same order
        },
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while not checkpoint.exists():
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline, "no checkpoint after two minutes"
            time.sleep(0.002)
    finally:
        process.kill()
        status = process.wait()
    assert status != 0, "the run ended before it could be killed"


def error_of(capsys, main, *arguments):
    """The last line that a script prints when it refuses."""
    with pytest.raises(SystemExit) as error:
        main([str(a) for a in arguments])
    assert error.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def losses(metrics, name="fused"):
    return metrics["runs"][name]["losses"]
