"""The CUDA kernels of sm_90a without a GPU: a program of them under the sanitizers, and the mistakes
that the emulator has to catch. Their tests against the definition are in ``tests/emulated``."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from emulator import build, mistakes_sm90
from test_cuda import HEAD_DIMS, MODES, pytestmark, run  # noqa: F401

CHECK = build.EMULATOR / "check_sm90.cpp"
NVCC = shutil.which("nvcc")


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The folders of the program without a mistake, by sanitizer: its objects are used again."""
    folder = tmp_path_factory.mktemp("sm90")
    folders = {name: folder / name for name in ("address", "thread")}
    for name, path in folders.items():
        build.build(path, name, main=CHECK, head_dims=HEAD_DIMS)
    return folders


@pytest.mark.parametrize("mode", [*MODES, "random:2"])
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_program(programs, sanitizer, mode):
    done = run(programs[sanitizer] / "program", mode)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize("mistake", mistakes_sm90.MISTAKES, ids=lambda m: m.name.replace(" ", "-"))
def test_mistake_is_caught(programs, tmp_path, mistake):
    sources = tmp_path / "sources"
    shutil.copytree(build.SOURCES / "csrc", sources / "csrc")
    path = sources / "csrc/cuda" / mistake.file
    text = path.read_text()
    assert text.count(mistake.old) == 1, f"{mistake.file} has changed: {text.count(mistake.old)}"
    path.write_text(text.replace(mistake.old, mistake.new))
    sanitizer = "thread" if mistake.caught == "thread" else "address"
    program = build.build(
        tmp_path / "built",
        sanitizer,
        main=CHECK,
        sources=sources,
        head_dims=HEAD_DIMS,
        only=build.including(mistake.file),
        others=programs[sanitizer],
    )
    mode = {"thread": "lazy", "random": "random:1"}.get(mistake.caught, mistake.caught)
    done = run(program, mode)
    said = done.stdout + done.stderr
    assert done.returncode != 0, "nothing was noticed"
    assert mistake.says in said, said[-2000:]


# ------------------------------------------------------------------------------ the device's code


def cuobjdump():
    """The tool, from the toolkit or as Triton brings it, or None."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = pytest.importorskip("triton", reason="no cuobjdump")
    found = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return str(found) if found.exists() else None


@pytest.fixture(scope="module", params=[64, 128, 256])
def compiled(request, tmp_path_factory):
    """(head dim, object, what ptxas says)"""
    if NVCC is None:
        pytest.skip("no nvcc")
    folder = tmp_path_factory.mktemp("nvcc")
    command = [NVCC, "-std=c++17", "-O3", "-Xptxas", "-v", f"-DFASTATTN_HEAD_DIM={request.param}"]
    command += ["-gencode", "arch=compute_90a,code=sm_90a", f"-I{build.SOURCES / 'csrc/common'}"]
    command += ["-c", str(build.SOURCES / "csrc/cuda/attention_forward_sm90.cu")]
    target = folder / "kernel.o"
    done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return request.param, target, done.stderr


def test_no_warnings_and_no_spills(compiled):
    """C75xx: products that are serialised, or registers that cannot be handed over."""
    _, _, said = compiled
    assert "(C75" not in said and "warning" not in said.lower(), said
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert spills and set(spills) == {("0", "0")}, said
    entries = re.findall(r"Used (\d+) registers", said)
    # What a launch gives: the 64 K registers of a multiprocessor over the threads of one block.
    assert set(entries) == {"128" if compiled[0] == 64 else "168"}, said


def test_the_instructions_are_there(compiled):
    """Every product twice, in the first or last tile of keys and in the loop; no other product. Of
    copies as many as the source has, or more, where loops are unrolled."""
    head_dim, target, _ = compiled
    tool = cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump")
    text = subprocess.run(
        [tool, "-sass", target], capture_output=True, text=True, check=True
    ).stdout
    kernels = re.split(r"Function : ", text)[1:]
    assert len(kernels) == (4 if head_dim == 128 else 2)
    for kernel in kernels:
        keys = int(re.search(rf"Li{head_dim}ELi(\d+)E", kernel)[1])
        count = {
            name: len(re.findall(rf"\b{name}\b", kernel))
            for name in ("HGMMA", "UTMALDG", "USETMAXREG", "HMMA")
        }
        panels, groups = head_dim // 64, 3 if head_dim == 64 else 2
        copies = panels * (groups + 3)  # Q; the first K, the next K, V
        assert count.pop("UTMALDG") >= copies
        assert count == {
            "HGMMA": 2 * (head_dim // 16 + keys // 16),
            "USETMAXREG": 2,
            "HMMA": 0,
        }
