"""The package as pip builds it from these sources: with a compiler, without one, and at import."""

import email.parser
import os
import platform
import runpy
import shutil
import statistics
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fastattn

ROOT = Path(__file__).parents[1]
PLAINEST = "neon" if platform.machine().lower() in ("aarch64", "arm64") else "baseline"
LEFT_OUT = (".*", "build", "dist", "*.egg-info", "__pycache__", "*.so", "*.pyd", "_build_info.py")

pytestmark = pytest.mark.skipif(
    not Path(ROOT, "setup.py").exists(), reason="needs the sources beside the tests"
)

needs_compiler = pytest.mark.skipif(
    sys.platform != "win32" and not shutil.which(os.environ.get("CXX", "c++")),
    reason="needs a C++ compiler",
)

# An environment in which no nvcc can be found.
NO_NVCC = {"CUDA_HOME": "/nonexistent", "CUDA_PATH": "/nonexistent"} | {
    "PATH": os.pathsep.join(
        f for f in os.environ["PATH"].split(os.pathsep) if not Path(f, "nvcc").exists()
    )
}
CUDA_MODULE = """
#include <pybind11/pybind11.h>
PYBIND11_MODULE(_cuda, m) { m.attr("here") = true; }
"""

USE_EVERYTHING = """
import fastattn, torch
q, k, v = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3))
fastattn.attention(q, k, v, causal=True).sum().backward()
fastattn.scaled_dot_product_attention(q, k, v)
fastattn.layer_norm(q, (8,)).sum().backward()
fastattn.add_rms_norm(q, k, (8,))
fastattn.softmax(q).sum().backward()
assert all(x.grad.isfinite().all() for x in (q, k, v))
print(fastattn.__file__)
print(fastattn.explain(q, k, v))
"""


def run_python(code, cwd, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=os.environ | {"FASTATTN_CUDA": "0"} | environment,  # minutes, where there is nvcc
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def build(hook, sources, out, **environment):
    """What pip and `build` call; in a Python in which torch cannot be imported."""
    out.mkdir()
    code = f"""
import sys
sys.modules["torch"] = None
from setuptools import build_meta
build_meta.{hook}({str(out)!r})
"""
    run_python(code, sources, **environment)
    (result,) = out.iterdir()
    return result


def unpack(wheel, folder):
    """A pure unzip is all that pip does with a wheel's modules."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    shutil.copytree(ROOT, folder / "tree", ignore=shutil.ignore_patterns(*LEFT_OUT))
    return build("build_sdist", folder / "tree", folder / "out")


@pytest.fixture
def sources(sdist, tmp_path):
    """The unpacked sdist: whoever builds from it has nothing else."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path)
    return tmp_path / sdist.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def without_compiler(sdist, tmp_path_factory):
    """(wheel, folder with the package), built where CC and CXX lead nowhere."""
    folder = tmp_path_factory.mktemp("without_compiler")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)
    sources = folder / sdist.name.removesuffix(".tar.gz")
    wheel = build("build_wheel", sources, folder / "out", CC="/nonexistent", CXX="/nonexistent")
    return wheel, unpack(wheel, folder / "package")


def test_sdist_has_every_source(sdist):
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    wanted = [
        *ROOT.glob("csrc/**/*.h"),
        *ROOT.glob("csrc/**/*.cpp"),
        *ROOT.glob("csrc/**/*.cu"),
        *ROOT.glob("tests/emulator/*"),
        *ROOT.glob("fastattn/**/*.py"),
    ]
    wanted = {path.relative_to(ROOT).as_posix() for path in wanted} - {"fastattn/_build_info.py"}
    assert len(wanted) > 50
    assert wanted <= held
    assert {"pyproject.toml", "setup.py", "README.md", "LICENSE", "fastattn/py.typed"} <= held
    assert not [name for name in held if name.endswith((".so", ".pyd", "_build_info.py"))]


@pytest.mark.slow
@needs_compiler
def test_a_wheel_from_the_sdist_brings_the_kernels(sources, tmp_path):
    wheel = build("build_wheel", sources, tmp_path / "out", FASTATTN_BUILD_ISAS=PLAINEST)
    package = unpack(wheel, tmp_path / "package")
    assert list(package.glob(f"fastattn/_cpu_{PLAINEST}.*"))
    assert not list(package.glob("**/*.cpp"))
    said = run_python(USE_EVERYTHING, tmp_path, PYTHONPATH=str(package), FASTATTN_CPU_ISA=PLAINEST)
    assert said.startswith(str(package))
    assert f"cpu serves this call\ncpu: serves it ({PLAINEST})" in said


def test_without_a_compiler_everything_works_and_says_so(without_compiler, tmp_path):
    _, package = without_compiler
    assert not list(package.glob("fastattn/_cpu_*"))
    environment = {"PYTHONPATH": str(package), "FASTATTN_CPU_ISA": ""}
    said = run_python(USE_EVERYTHING, tmp_path, **environment)
    assert said.startswith(str(package))
    assert "reference serves this call\ncpu: no C++ compiler at install" in said
    info = run_python("from fastattn import cli; cli.main(['info'])", tmp_path, **environment)
    assert "no C++ compiler at install" in info


@pytest.fixture
def small_sources(sources):
    """The same tree, with next to nothing in its C++: how it is built, in a second."""
    for path in sources.glob("csrc/cpu/*.cpp"):
        path.write_text('#include "kernels.h"\n')
    return sources


def build_in_place(sources, first="", **environment):
    """`setup.py build_ext --inplace`, after the statement `first`; the instruction sets built."""
    code = f"""
import runpy, sys
sys.modules["torch"] = None
sys.argv = ["setup.py", "build_ext", "--inplace"]
{first}
runpy.run_path("setup.py", run_name="__main__")
"""
    run_python(code, sources, FASTATTN_BUILD_ISAS="", **environment)
    return build_info(sources)["CPU_ISAS"]


def build_info(sources):
    return runpy.run_path(str(sources / "fastattn/_build_info.py"))


def objects(sources):
    """When each object was compiled, by its folder (an instruction set, or any) and its name."""
    found = [path for path in sources.glob("build/**/*") if path.suffix in (".o", ".obj")]
    return {(path.parents[2].name, path.stem): path.stat().st_mtime_ns for path in found}


@needs_compiler
def test_what_has_not_changed_is_not_compiled_again(small_sources):
    built = build_in_place(small_sources)
    assert PLAINEST in built
    before = objects(small_sources)
    assert {isa for isa, _ in before} == {"any", *built}

    assert build_in_place(small_sources) == built
    assert objects(small_sources) == before

    with open(small_sources / "csrc/cpu/softmax.cpp", "a") as file:
        file.write("// changed\n")
    build_in_place(small_sources)
    after = objects(small_sources)
    assert {key for key in before if after[key] > before[key]} == {
        (isa, "softmax") for isa in built
    }

    with open(small_sources / "csrc/common/params.h", "a") as file:
        file.write("// which all include\n")
    build_in_place(small_sources)
    assert all(time > after[key] for key, time in objects(small_sources).items())


@needs_compiler
@pytest.mark.skipif(PLAINEST == "neon", reason="there is one instruction set")
def test_an_instruction_set_that_cannot_be_compiled_leaves_the_others(small_sources):
    all_of_them = build_in_place(small_sources)
    source = small_sources / "csrc/cpu/softmax.cpp"
    source.write_text('#include "kernels.h"\n#ifdef __AVX2__\n#error too old\n#endif\n')
    assert "avx2" in all_of_them
    assert build_in_place(small_sources) == ["baseline"]  # and no object of the build before


@needs_compiler
def test_without_ninja_all_is_compiled_too(small_sources):
    hide = "import shutil; shutil.which = lambda *args, **options: None"
    assert build_in_place(small_sources, first=hide) == build_in_place(small_sources)


@needs_compiler
@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
def test_the_cuda_module_is_built_where_nvcc_is(small_sources):
    for path in small_sources.glob("csrc/cuda/*.cu"):
        path.write_text('#include "launch.h"\n')
    (small_sources / "csrc/cuda/module.cpp").write_text(CUDA_MODULE)
    with open(small_sources / "csrc/cuda/attention_plan.cu", "a") as file:
        file.write("#warning a word of warning\n")
    build_in_place(small_sources, FASTATTN_CUDA="1")
    assert list(small_sources.glob("build/*/cuda/attention_plan.o"))
    assert the_cuda_module_is_there(small_sources)
    (warning,) = build_info(small_sources)["CUDA_WARNINGS"]
    assert "a word of warning" in warning


def the_cuda_module_is_there(sources):
    code = "import importlib.util as u; import glob, sys\n"
    code += "s = u.spec_from_file_location('_cuda', glob.glob('fastattn/_cuda*')[0])\n"
    code += "m = u.module_from_spec(s); s.loader.exec_module(m); print(m.here)"
    return run_python(code, sources) == "True\n"


# What setup.py asks of nvcc: its release, where its toolkit is, and objects.
STAND_IN = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit ;;
  --dryrun) echo "#\\$ TOP=$(dirname "$0")/.." >&2; exit ;;
esac
for argument in "$@"; do
  case "$before" in -c) source=$argument ;; -o) object=$argument ;; -MF) depends=$argument ;; esac
  before=$argument
done
exec "${CXX:-c++}" -fPIC -x c++ -c "$source" -o "$object" -MMD -MF "$depends"
"""


@needs_compiler
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="nvidia's wheels are for Linux")
def test_nvcc_is_found_in_the_wheels_for_python(small_sources, tmp_path):
    """nvidia-cuda-nvcc and nvidia-cuda-runtime unpack to nvidia/cu13 of site-packages."""
    home = tmp_path / "site-packages/nvidia/cu13"
    for name in ("bin", "lib", "include"):
        (home / name).mkdir(parents=True)
    (home / "bin/nvcc").write_text(STAND_IN)
    (home / "bin/nvcc").chmod(0o755)
    (home / "lib/libcudart_static.a").write_bytes(b"!<arch>\n")
    for path in small_sources.glob("csrc/cuda/*.cu"):
        path.write_text("")
    small_sources.joinpath("csrc/cuda/module.cpp").write_text(CUDA_MODULE)
    found = NO_NVCC | {"PYTHONPATH": str(home.parents[1])}
    build_in_place(small_sources, FASTATTN_CUDA="1", **found)
    assert the_cuda_module_is_there(small_sources)
    assert build_info(small_sources)["CUDA_REASON"] == ""
    assert build_info(small_sources)["CUDA_WARNINGS"] == []

    (home / "lib/libcudart_static.a").unlink()  # nvidia-cuda-runtime is not there
    build_in_place(small_sources, FASTATTN_CUDA="auto", **found)
    assert build_info(small_sources)["CUDA_REASON"] == "no libcudart_static.a at install"


@needs_compiler
def test_cuda_without_nvcc(small_sources):
    built = build_in_place(small_sources, FASTATTN_CUDA="auto", **NO_NVCC)
    assert PLAINEST in built
    assert not list(small_sources.glob("fastattn/_cuda*"))
    assert build_info(small_sources)["CUDA_REASON"] == "no nvcc at install"
    with pytest.raises(AssertionError, match="FASTATTN_CUDA=1, but: no nvcc at install"):
        build_in_place(small_sources, FASTATTN_CUDA="1", **NO_NVCC)


def test_an_instruction_set_that_was_not_built_is_an_error(without_compiler, tmp_path):
    _, package = without_compiler
    done = subprocess.run(
        [sys.executable, "-c", "import fastattn"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(package), "FASTATTN_CPU_ISA": "avx2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "ImportError: FASTATTN_CPU_ISA='avx2' was not built" in done.stderr
    assert "no C++ compiler at install" in done.stderr


def test_metadata_asks_for_torch_and_pins_nothing(without_compiler):
    wheel, _ = without_compiler
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = email.parser.Parser().parsestr(archive.read(name).decode())
    wanted = metadata.get_all("Requires-Dist")
    assert [line for line in wanted if "extra ==" not in line] == ["torch>=2.11"]
    assert not [line for line in wanted if "==" in line.partition(";")[0]]
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Version"] == fastattn.__version__


def test_import_costs_under_50_ms_beside_torch(tmp_path):
    code = """
import time, torch
start = time.process_time()
import fastattn
print(time.process_time() - start)
"""
    package = str(Path(fastattn.__file__).parents[1])
    seconds = [float(run_python(code, tmp_path, PYTHONPATH=package)) for _ in range(3)]
    assert statistics.median(seconds) < 0.05, seconds
