"""What the tests of the example scripts share."""

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


@pytest.fixture
def text(tmp_path):
    """A text with something to learn: sums, with spelled-out digits."""
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    lines = (f"{words[i % 10]} and {words[i % 7]} is {i % 10 + i % 7}\n" for i in range(2000))
    path = tmp_path / "sums.txt"
    path.write_text("".join(lines))
    return path


def kill_after_a_checkpoint(script, out, *arguments):
    """Start a script in a process of its own and kill it once it has saved a checkpoint."""
    paths = [str(Path(fastattn.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLES / script), "--out", str(out), *map(str, arguments)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "OMP_NUM_THREADS": "1",  # sums in the same order
        },
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not (out / "checkpoint.pt").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "no checkpoint after a minute"
        time.sleep(0.002)
    process.kill()
    assert process.wait() != 0, "the run ended before it could be killed"
    assert not (out / "metrics.json").exists()


def error_of(main, capsys, *arguments):
    """The last line of what a script says of a command line that it refuses."""
    with pytest.raises(SystemExit) as error:
        main([str(a) for a in arguments])
    assert error.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]
