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


CALLS = {f"{op}{way}" for op in ("attention", "layer_norm", "softmax") for way in ("", " backward")}
CALLS.add("decode")


def test_the_host_side_of_a_call_is_measured():
    """Microseconds, of which nobody should notice more than a few dozen."""
    costs = overhead.host_microseconds()
    assert costs.keys() == CALLS
    for cost in costs.values():
        assert 0 < cost.triton < 1000 and 0 < cost.ours < 2000
    assert costs["softmax"].launches == 1 and costs["decode"].launches == 2  # its keys are split


def test_all_that_a_launch_takes_reaches_the_driver():
    """What the interpreter leaves out, and a GPU would be needed for: Triton's own way of a call."""
    import fastattn

    launches = []
    q, kv = torch.zeros(1, 4, 1, 64), torch.zeros(1, 2, 700, 64)
    with overhead.without_a_driver(launches):
        fastattn.attention(q, kv, kv, sinks=torch.zeros(4), dropout_p=0.1, backend="triton")
        fastattn.softmax(kv, dim=2, mask=kv > 0, backend="triton")
    forward, merge, columns = launches
    (*grid, _), values = forward[:3], forward[9:]  # what Triton's own comes between
    assert values[0].ptr is q and values[1].ptr is values[2].ptr is kv
    parts = values[5]
    assert grid == [2, parts.splits] and parts.max.shape == (1, 4, 1, parts.splits)
    assert merge[:3] == (4, 1, 1) and merge[9 + 2] == parts
    assert columns[:3] == (2 * 64 // 32, 1, 1)


def test_the_host_side_is_shown(capsys, monkeypatch):
    from fastattn.console import Console

    costs = dict.fromkeys(CALLS, overhead.Cost(12.3, 4.5, 2))
    monkeypatch.setattr(overhead, "host_microseconds", lambda: costs)
    monkeypatch.setattr(
        overhead, "launch_microseconds", lambda device, name: dict.fromkeys(CALLS, 67.8)
    )
    overhead.show(Console())
    text = capsys.readouterr().out
    assert "decode" in text and "12" in text and "driver" not in text
    overhead.show(Console(), GPU)
    text = capsys.readouterr().out
    assert "with the driver" in text and "68" in text
