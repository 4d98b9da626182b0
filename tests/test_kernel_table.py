"""The table of the generated code notices what it is for. ``test_triton.py`` holds the kernels to it."""

import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastattn.backends.triton import INTERPRETED

if find_spec("triton") is None or INTERPRETED:
    pytest.skip("no compiler of Triton's in this process", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parent / "kernel_table"))
import common
import table

LINE = table.Line("attention_forward/bf16/128", "sm_90", 200, 0, 40000, 2, 0, 24, 0, 0, 16, 8)
VARIANT = SimpleNamespace(name=LINE.kernel, main=True, instructions=("wgmma",))


def said(before=LINE, variant=VARIANT, **changes):
    return list(table.problems(variant, LINE._replace(**changes), before))


def test_nothing_is_said_of_the_same_or_of_less():
    assert said() == []
    assert said(registers=190, shared=1, blocks=3, loads=1) == []
    assert said(registers=210) == []  # 5 %


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"registers": 211}, "takes 211 registers, 200 before"),
        ({"blocks": 1}, "fits 1 times on a multiprocessor, 2 before"),
        ({"loads": 0}, "has lost its 16-byte loads, 16 before"),
        ({"stores": 0}, "has lost its 16-byte stores, 8 before"),
    ],
)
def test_what_grew_or_was_lost_is_said(changes, message):
    assert said(**changes) == [message]


def test_a_spill_of_a_main_configuration_is_said_whatever_the_table_has():
    assert said(LINE._replace(spilled=8), spilled=8) == ["spills 8 bytes, in a main configuration"]
    other = SimpleNamespace(**vars(VARIANT) | {"main": False})
    assert said(LINE._replace(spilled=8), other, spilled=8) == []
    assert said(LINE, other, spilled=8) == ["spills 8 bytes, 0 before"]


def test_a_lost_instruction_is_said_also_by_another_triton():
    assert said(None, wgmma=0) == ["has no wgmma instruction"]
    assert "has lost its wgmma instructions, 24 before" in said(wgmma=0)


def test_the_table_reads_as_it_is_written(tmp_path):
    path = tmp_path / "table.txt"
    path.write_text(table.text_of([LINE, LINE._replace(arch="gfx942")], "3.7.1"))
    version, lines = table.read(path)
    assert version == "3.7.1" and lines[LINE.key] == LINE and len(lines) == 2


def test_blocks_that_fit():
    """By hand: 65536 registers for 40 x 256 each; 2048 threads; 228 KB for 100 KB each."""
    machine = common.MACHINES["sm_90"]
    assert common.blocks_that_fit(machine, 40, 256, 0) == 6
    assert common.blocks_that_fit(machine, 16, 1024, 0) == 2
    assert common.blocks_that_fit(machine, 16, 32, 100 << 10) == 2
