"""`fastattn tune`: its search, and the file it keeps; measured by a stopwatch of our own."""

import json
from importlib.util import find_spec
from typing import NamedTuple

import pytest
import torch

from fastattn import cli
from fastattn.bench import overhead

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
GPU = torch.device("cuda", 0)


class Config(NamedTuple):
    block: int
    num_warps: int
    looped: bool = False


class Pair(NamedTuple):
    first: Config
    second: Config


DEFAULT = Config(64, 4)


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    from fastattn.backends.triton import tuned

    monkeypatch.setenv("FASTATTN_CACHE", str(tmp_path / "folder"))
    monkeypatch.setattr(tuned, "machine_key", lambda device: "a GPU, triton 9.9")
    tuned._table.cache_clear()
    yield tuned
    tuned._table.cache_clear()


def test_what_was_written_is_used(tuned):
    assert tuned.tuned("kernel", "problem", GPU, DEFAULT) == DEFAULT
    assert tuned.write("a GPU, triton 9.9", {"kernel": {"problem": Config(128, 8, True)}}) == ""
    assert tuned.tuned("kernel", "problem", GPU, DEFAULT) == Config(128, 8, True)
    assert tuned.tuned("kernel", "other", GPU, DEFAULT) == DEFAULT
    assert tuned.tuned("other", "problem", GPU, DEFAULT) == DEFAULT
    assert tuned.tuned("kernel", "problem", torch.device("cpu"), DEFAULT) == DEFAULT


def test_a_table_grows_and_machines_do_not_mix(tuned):
    tuned.write("a GPU, triton 9.9", {"kernel": {"one": Config(32, 1)}})
    tuned.write("a GPU, triton 9.9", {"kernel": {"two": Config(32, 2)}})
    tuned.write("another GPU", {"kernel": {"one": Config(16, 16)}})
    assert tuned.tuned("kernel", "one", GPU, DEFAULT) == Config(32, 1)
    assert tuned.tuned("kernel", "two", GPU, DEFAULT) == Config(32, 2)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", "null", '{"a GPU, triton 9.9": 3}', '{"a GPU, triton 9.9": {"kernel": 3}}']
    + [
        json.dumps({"a GPU, triton 9.9": {"kernel": {"problem": value}}})
        for value in (3, None, [], [1], [1, 2, 3], [1, 2, 0], [0, 4, False], [-1, 4, False], ["1", 4, False], [1.5, 4, False], {}, [[1], 4, False])
    ],
)  # fmt: skip
def test_a_corrupt_file_does_not_hurt(content, tuned):
    tuned.cache_file().parent.mkdir()
    tuned.cache_file().write_text(content)
    assert tuned.tuned("kernel", "problem", GPU, DEFAULT) == DEFAULT
    assert tuned.write("a GPU, triton 9.9", {"kernel": {"problem": Config(128, 8)}}) == ""
    assert tuned.tuned("kernel", "problem", GPU, DEFAULT) == Config(128, 8)


def test_bytes_that_are_no_text_do_not_hurt(tuned):
    tuned.cache_file().parent.mkdir()
    tuned.cache_file().write_bytes(b"\xff\xfe\x00")
    assert tuned.tuned("kernel", "problem", GPU, DEFAULT) == DEFAULT


def test_a_folder_that_cannot_be_written_is_said(tuned, tmp_path):
    (tmp_path / "folder").write_text("a file")
    assert "folder" in tuned.write("a GPU, triton 9.9", {})
    assert tuned.tuned("kernel", "problem", GPU, DEFAULT) == DEFAULT


def test_configurations_within_configurations(tuned):
    default = Pair(DEFAULT, DEFAULT)
    tuned.write("a GPU, triton 9.9", {"kernel": {"problem": Pair(Config(8, 1), Config(9, 2))}})
    assert tuned.tuned("kernel", "problem", GPU, default) == Pair(Config(8, 1), Config(9, 2))
    assert tuned.like(default, [[8, 1, False], 3]) is None


def test_the_search_takes_the_fastest_and_survives_what_fails():
    from fastattn.backends.triton.tune import Problem, search

    def measure(config):
        if config.num_warps == 16:
            raise RuntimeError("out of shared memory")
        return abs(config.block - 128) + abs(config.num_warps - 2)

    problem = Problem(
        "kernel",
        "problem",
        DEFAULT,
        [
            lambda best: [best._replace(block=block) for block in (32, 128, 256)],
            lambda best: [best._replace(num_warps=warps) for warps in (1, 2, 16)],
        ],
        lambda config: config,
    )
    assert search(problem, measure) == (Config(128, 2), 0, 66)


def test_every_problem_has_launches_on_the_meta_device():
    """What `fastattn tune` would launch, as far as that goes without a GPU."""
    from fastattn.backends.triton import tune

    with torch.device("meta"):
        x, q = torch.empty(512, 4096), torch.empty(1, 2, 512, 64, dtype=torch.bfloat16)
        found = [
            *tune.layer_norm_problems(x),
            *tune.softmax_problems(x),
            *tune.attention_problems(q),
        ]
    assert len({problem.kernel for problem in found}) == 6
    for problem in found:
        assert problem.launches(problem.default)
        for alternatives in problem.steps:
            candidates = alternatives(problem.default)
            assert len(candidates) == len(set(candidates)) > 4
            for candidate in candidates[::7]:
                assert problem.launches(candidate)


def test_without_a_device_it_says_so(capsys, monkeypatch):
    from fastattn.backends import BACKENDS

    monkeypatch.setattr(type(BACKENDS["triton"]), "unavailable", lambda self: "needs a GPU")
    assert cli.main(["tune"]) == 1
    assert "fastattn tune: nothing to tune: triton: needs a GPU" in capsys.readouterr().out


def test_the_host_side_of_a_call_is_measured():
    """Microseconds, of which nobody should notice more than a few dozen."""
    costs = overhead.host_microseconds()
    assert len(costs) == 6
    for cost in costs.values():
        assert 0 < cost.triton < 1000 and 0 < cost.ours < 2000
