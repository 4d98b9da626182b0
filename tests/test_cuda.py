"""The CUDA kernels without a GPU: compiled by the host's compiler against an emulator, they pass the
tests of every backend, under the sanitizers; and the emulator catches the mistakes that people make.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from emulator import build, mistakes, mistakes_sm90

TESTS = Path(__file__).parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="runs on Linux"),
    pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler"),
]

# The suites of every backend, which in these processes is the cuda backend alone: some in every
# mode, the rest in one.
MODES = ("lazy", "eager", "random:1")
IN_EVERY_MODE = ["emulated", "test_case_table.py::test_case"]
REST = [
    "test_case_table.py::test_head_dims",
    "test_case_table.py::test_strides_of_the_output_gradient",
    "test_edge_cases.py",
    "test_edge_cases_rows.py",
    "test_ops_layer_norm.py",
    "test_ops_softmax.py",
    "test_one_truth.py::test_residual_dropout",
]
SUITES = {mode: (mode, IN_EVERY_MODE) for mode in MODES} | {"the rest": (MODES[0], REST)}
PROGRAMS = {
    name: build.EMULATOR / file
    for name, file in (
        ("check", "check.cpp"),
        ("check_rows", "check_rows.cpp"),
        ("check_sm90", "check_sm90.cpp"),
        ("conformance", "conformance.cu"),
    )
}
NVCC = shutil.which("nvcc")
MISTAKES = [*mistakes.MISTAKES, *mistakes_sm90.MISTAKES]
if "FASTATTN_ALL_MISTAKES" not in os.environ:  # the first that is reported so, found so, there
    kinds = {(m.program, m.file, m.caught, m.says): m for m in reversed(MISTAKES)}
    MISTAKES = list(reversed(kinds.values()))
HEAD_DIMS = ["64"]  # of the programs
SANITIZED = {
    "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:history_size=3",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture(scope="module")
def module(folder):
    return build.build(folder / "module", "address")


def outcomes_of(request, fixture, parameters, run):
    """What comes of run(*parameters) for each test of this fixture, as a future by its parameters:
    each is a process of its own, so that they keep all cores busy."""
    here = [item for item in request.session.items if item.path == request.path]
    items = [item for item in here if fixture in item.fixturenames]
    wanted = [tuple(item.callspec.params[name] for name in parameters) for item in items]
    with ThreadPoolExecutor(build.jobs()) as pool:
        yield {arguments: pool.submit(run, *arguments) for arguments in wanted}
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def suites(module, request):
    yield from outcomes_of(
        request, "suites", ["name"], lambda name: run_suite(module, *SUITES[name])
    )


def run_suite(module, mode, files):
    libraries = [build.runtime(f"lib{name}.so") for name in ("asan", "ubsan", "stdc++")]
    if libraries[0] is None:
        return None
    environment = SANITIZED | {
        "LD_PRELOAD": " ".join(filter(None, libraries)),
        "FASTATTN_TEST_CUDA_MODULE": str(module),
        "FASTATTN_EMULATOR": mode,
        "OMP_NUM_THREADS": "1",
    }
    # The path of this process: with -m alone, the sources beside the tests would be imported.
    code = f"import sys; sys.path[:] = {sys.path!r}; import pytest; sys.exit(pytest.main())"
    return subprocess.run(
        [sys.executable, "-c", code, "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
        + [str(TESTS / file) for file in files],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )


@pytest.mark.parametrize("name", SUITES)
def test_suites(suites, name):
    child = suites[name,].result()
    if child is None:
        pytest.skip("the compiler has no sanitizers")
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-4000:]
    assert "runtime error" not in child.stderr


def run(program, mode):
    return subprocess.run(
        [program, mode],
        env=os.environ | SANITIZED,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def programs(folder):
    """The folders of the programs without a mistake, by sanitizer: their objects are used again."""
    folders = {name: folder / name for name in ("address", "thread")}
    for sanitizer, path in folders.items():
        for source in PROGRAMS.values():
            build.build(path, sanitizer, main=source, head_dims=HEAD_DIMS)
    return folders


@pytest.fixture(scope="module")
def runs(programs, request):
    def run_one(program, sanitizer, mode):
        return run(programs[sanitizer] / f"run_{program}", mode)

    yield from outcomes_of(request, "runs", ["program", "sanitizer", "mode"], run_one)


@pytest.mark.parametrize("mode", [*MODES, "random:2"])
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_program(runs, program, sanitizer, mode):
    done = runs[program, sanitizer, mode].result()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_conformance_of_a_device(tmp_path):
    """The program that the emulator passes, each wrapper on its own, compiled for devices."""
    csrc = build.SOURCES / "csrc"
    command = [NVCC, "-std=c++17", f"-I{csrc / 'common'}", f"-I{csrc / 'cuda'}"]
    command += ["-gencode=arch=compute_80,code=[sm_80,compute_80]"]
    command += ["-gencode=arch=compute_90a,code=sm_90a", str(PROGRAMS["conformance"])]
    command += ["-o", str(tmp_path / "program")]
    subprocess.run(command, check=True)
    if not torch.cuda.is_available() or torch.version.hip:
        pytest.skip("compiled; there is no NVIDIA GPU to run it on")
    done = run(tmp_path / "program", "")
    assert done.returncode == 0, done.stdout + done.stderr


def name_of(mistake):
    return f"{mistake.program}-{mistake.name.replace(' ', '-')}"


@pytest.fixture(scope="module")
def outcomes(programs, folder, request):
    """What came of each mistake that is asked about: one file compiled, and run."""

    def outcome_of(mistake):
        return outcome(mistake, programs, folder / name_of(mistake))

    yield from outcomes_of(request, "outcomes", ["mistake"], outcome_of)


def outcome(mistake, programs, folder):
    sources = folder / "sources"
    shutil.copytree(build.SOURCES / "csrc", sources / "csrc")
    path = sources / "csrc/cuda" / mistake.file
    text = path.read_text()
    assert text.count(mistake.old) == 1, f"{mistake.file} has changed: {text.count(mistake.old)}"
    path.write_text(text.replace(mistake.old, mistake.new))
    sanitizer = "thread" if mistake.caught == "thread" else "address"
    changed = build.including(mistake.file)
    if mistake.program != "check_sm90":  # which alone runs it
        changed -= {"attention_forward_sm90", "attention_backward_sm90"}
    if mistake.into:
        changed &= {mistake.into}
    program = build.build(
        folder / "built",
        sanitizer,
        main=PROGRAMS[mistake.program],
        sources=sources,
        head_dims=HEAD_DIMS,
        only=changed,
        others=programs[sanitizer],
    )
    mode = {"thread": "lazy", "random": "random:1"}.get(mistake.caught, mistake.caught)
    done = run(program, mode)
    shutil.rmtree(folder)
    return done


@pytest.mark.parametrize("mistake", MISTAKES, ids=name_of)
def test_mistake_is_caught(outcomes, mistake):
    done = outcomes[mistake,].result()
    said = done.stdout + done.stderr
    assert done.returncode != 0, "nothing was noticed"
    assert mistake.says in said, said[-2000:]
