"""The generated code of the CUDA kernels: what is built is as the committed table has it, ptxas has
nothing to say, and the table notices what it is for."""

import importlib
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "kernel_table"))
import cuda_table

LINE = cuda_table.Line("attention_forward/bf16/128", "sm_80", 200, 0, 0, 49152, 2, 128, 0, 28, 0, 0)


def said(before=LINE, line=LINE, **changes):
    return list(cuda_table.problems(line._replace(**changes), before))


@pytest.mark.slow
def test_what_is_built_is_as_in_the_table(capsys):
    if why := cuda_table.missing():
        pytest.skip(why)
    status = cuda_table.main([])
    assert status == 0, capsys.readouterr().out


def test_ptxas_has_no_warnings():
    """Of any file, for any architecture, as the install kept them. C75xx: products that are
    serialised, or registers that cannot be handed over."""
    if cuda_table.built_module() is None:
        pytest.skip("fastattn was built without CUDA")
    warnings = importlib.import_module("fastattn._build_info").CUDA_WARNINGS
    if warnings is None:
        pytest.skip("fastattn was built without ninja, which keeps what compilers say")
    assert warnings == []


def test_nothing_is_said_of_the_same_or_of_less():
    assert said() == []
    assert said(registers=190, blocks=3, hmma=130) == []
    assert said(registers=210) == []  # 5 %


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"registers": 211}, "takes 211 registers, 200 before"),
        ({"blocks": 1}, "fits 1 times on a multiprocessor, 2 before"),
        ({"hmma": 127}, "has 127 HMMA, 128 before"),
        ({"ldgsts128": 27}, "has 27 LDGSTS128, 28 before"),
    ],
)
def test_what_grew_or_was_lost_is_said(changes, message):
    assert said(**changes) == [message]


def test_a_spill_of_a_main_configuration_is_said_whatever_the_table_has():
    spills = LINE._replace(spilled=8)
    assert said(spills, spills) == ["spills 8 bytes, in a main configuration"]
    rare = spills._replace(kernel="attention_forward/bf16/128/modified")
    assert said(rare, rare) == []
    assert said(rare._replace(spilled=0), rare) == ["spills 8 bytes, 0 before"]
    for name in (
        "layer_norm_forward/bf16/4",
        "attention_forward_sm90/f16/64/128",
        "attention_dkdv_sm90/f16/128",
    ):
        line = spills._replace(kernel=name, hgmma=1, utmaldg=1)
        assert said(line, line) == ["spills 8 bytes, in a main configuration"]


def test_a_kernel_without_its_instructions_is_said_without_a_table():
    assert said(None, hmma=0) == ["has no HMMA instruction"]
    hopper = LINE._replace(kernel="attention_forward_sm90/bf16/64/128", arch="sm_90", hgmma=24)
    assert said(None, hopper) == ["has no UTMALDG instruction"]
    wide = LINE._replace(kernel="softmax_forward/f32/0")
    assert said(None, wide) == []
    assert said(None, wide, arch="sm_90") == ["has no UCGABAR instruction"]


def test_names():
    prefix = "_ZN8fastattn"
    names = {
        "24attention_forward_kernelINS_4bf16ELi128ELb0EEEvNS_11ForwardCallE": "bf16/128",
        "24attention_forward_kernelINS_3f16ELi64ELb1EEEvNS_11ForwardCallE": "f16/64/modified",
    }
    for mangled, name in names.items():
        assert cuda_table.name_of(prefix + mangled) == f"attention_forward/{name}"
    inner = "_ZN57_INTERNAL_1_2_21_layer_norm_forward_cu_3_48fastattn"
    assert cuda_table.name_of(inner + "25layer_norm_forward_kernelIfLi4EEEvNS_4CallE") == (
        "layer_norm_forward/f32/4"
    )


def test_bytes_of_local_memory():
    code = "STL [R1], R4 ;\n@!P0 LDL.64 R2, [R1+0x8] ;\nLDL.LU R3, [R1] ;\nSTL.128 [R1], R4 ;"
    assert cuda_table.bytes_of_local(code) == 4 + 8 + 4 + 16
    assert cuda_table.bytes_of_local("LDG.E.128 R4, [R2] ;\nSTS [R1], R4 ;") == 0


def test_the_table_reads_as_it_is_written(tmp_path):
    path = tmp_path / "table.txt"
    path.write_text(cuda_table.text_of([LINE, LINE._replace(arch="sm_90")], "13.0"))
    version, lines = cuda_table.read_table(path)
    assert version == "13.0" and lines[LINE.key] == LINE and len(lines) == 2
