"""Builds the CUDA kernels against the emulator: the module of csrc/cuda, or a program of its own.

A folder keeps its objects: what has not changed is not compiled again.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pybind11

SOURCES = Path(__file__).resolve().parent.parent.parent
EMULATOR = SOURCES / "tests" / "emulator"
NAME = "_cuda_emulated"
HEAD_DIMS = re.findall(r"f\((\d+)\)", (SOURCES / "csrc/cuda/head_dims.h").read_text())

# What a kernel's memory accesses are checked by. The emulator itself is compiled without: it tells
# the sanitizers what they have to know.
SANITIZERS = {
    "": ([], []),
    "address": (
        ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
        ["-DEMULATOR_ASAN"],
    ),
    "thread": (["-fsanitize=thread"], ["-DEMULATOR_TSAN"]),
}


def compiler():
    return os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), None)


def kernels(sources, head_dims):
    """(name, file, flags) of every object of csrc/cuda but the binding."""
    for path in sorted((sources / "csrc/cuda").glob("*.cu")):
        if re.search(r"\bFASTATTN_HEAD_DIM\b", path.read_text()):
            for n in head_dims:
                yield f"{path.stem}_{n}", path, [f"-DFASTATTN_HEAD_DIM={n}"]
        else:
            yield path.stem, path, []


def including(name):
    """The .cu files, without the suffix, that a file of csrc/cuda is part of."""
    folder = SOURCES / "csrc/cuda"
    found, texts = {name}, {path: path.read_text() for path in folder.iterdir()}
    for _ in texts:
        found |= {p.name for p, text in texts.items() if any(f'"{n}"' in text for n in found)}
    return {Path(n).stem for n in found if n.endswith(".cu")}


def runtime(name):
    """The path of a sanitizer's library, which has to be loaded before Python."""
    found = subprocess.run(
        [compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return found if os.path.isabs(found) else None


def build(
    folder,
    sanitizer="",
    main=None,
    sources=SOURCES,
    head_dims=HEAD_DIMS,
    only=None,
    others=None,
):
    """The path of the extension module, or with ``main``, a source, of the program; programs of one
    folder share the kernels' objects.

    ``sources``: another tree, such as one with a mistake in it, of which the files ``only`` are
    compiled; the objects of the others are those in the folder ``others``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    checked, emulator = SANITIZERS[sanitizer]
    include = [sources / "csrc/common", sources / "csrc/cuda", EMULATOR]
    if main is None:
        include += [pybind11.get_include(), sysconfig.get_path("include")]
    common = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-g1", "-DFASTATTN_EMULATE"]
    if head_dims != HEAD_DIMS:
        common.append(f"-DFASTATTN_HEAD_DIMS(f)={' '.join(f'f({n})' for n in head_dims)}")
    common += [f"-I{path}" for path in include] + ["-x", "c++"]
    objects = [
        ("emulator", EMULATOR / "emulator.cpp", ["-O2", *emulator]),
        ("memory", EMULATOR / "memory.cpp", ["-O2", *emulator]),
        ("hopper", EMULATOR / "hopper.cpp", ["-O2", *emulator]),
        ("instructions", EMULATOR / "instructions.cpp", ["-O3", *emulator]),
        ("products", EMULATOR / "products.cpp", ["-O3", *emulator]),
        (main.stem, main, ["-O1", *checked])
        if main
        else ("module", sources / "csrc/cuda/module.cpp", ["-O0"]),
    ]
    if main:
        objects.append(("definition", EMULATOR / "definition.cpp", ["-O2"]))
    objects += [
        (name, path, ["-O1", *checked, *flags]) for name, path, flags in kernels(sources, head_dims)
    ]
    made = {o[0]: folder / f"{o[0]}.o" for o in objects}
    if only is not None:
        of_only = {name for name, path, _ in kernels(sources, head_dims) if path.stem in only}
        made |= {name: others / f"{name}.o" for name in made if name not in of_only}
        objects = [o for o in objects if o[0] in of_only]
    target = folder / (
        f"run_{main.stem}" if main else NAME + sysconfig.get_config_var("EXT_SUFFIX")
    )
    link = checked if main else ["-shared", *checked]
    lines = [
        f"builddir = {folder}",
        "rule compile",
        "  command = $line -MMD -MF $out.d -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler()} {shlex.join(link)} $in -o $out",
    ]
    for name, path, flags in objects:
        line = shlex.join([compiler(), *common, *flags, "-c", str(path)])
        lines += [f"build {made[name]}: compile {path}", f"  line = {line}"]
    lines.append(f"build {target}: link {' '.join(map(str, made.values()))}")
    script = folder / f"{main.stem if main else NAME}.ninja"
    script.write_text("\n".join(lines) + "\n")
    folders = [sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]
    ninja = shutil.which("ninja", path=os.pathsep.join(folders))
    done = subprocess.run(
        [ninja, "-f", str(script), "-j", str(jobs())], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return target


def load(path):
    """The module at ``path``, which is in no package."""
    spec = importlib.util.spec_from_file_location(NAME, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def jobs():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
