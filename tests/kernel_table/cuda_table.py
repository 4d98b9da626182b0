"""The generated code of every CUDA kernel, read from the built module and held to a committed table.

    python tests/kernel_table/cuda_table.py            read, compare with cuda_table.txt
    python tests/kernel_table/cuda_table.py --update   read, write cuda_table.txt
    python tests/kernel_table/cuda_table.py PATTERN    print what matches

A line is one kernel on one architecture: registers a thread, bytes of local memory that it stores to
or loads from for want of registers (its own code; functions that it calls for rare rows are not
counted), bytes of shared memory (the compiler's and the launch's), blocks that fit on a
multiprocessor, and instructions: products of warps (HMMA) and of warpgroups (HGMMA), asynchronous
copies of 16 bytes (LDGSTS.128) and of boxes (UTMALDG), barriers of a cluster (UCGABAR_WAIT). Figures
hold for the nvcc that the table names.

Needs the built module and cuobjdump and nvdisasm: the toolkit's, or those that Triton brings.
"""

from __future__ import annotations

import fnmatch
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

import common
from emulator import build

HERE = Path(__file__).parent
TABLE = HERE / "cuda_table.txt"
INSTRUCTIONS = {
    "hmma": r"\bHMMA\b",
    "hgmma": r"\bHGMMA\b",
    "ldgsts128": r"\bLDGSTS\.\S*128",
    "utmaldg": r"\bUTMALDG\b",
    "ucgabar": r"\bUCGABAR_WAIT\b",
}
# What kernels take their time in: these must not spill.
MAIN = re.compile(r"attention_((forward|dq|dkdv)(_sm90)?|rows)/\w+/(64|128)(/\d+)?$|(?!attention)")


class Line(NamedTuple):
    kernel: str
    arch: str
    registers: int
    spilled: int
    static: int
    dynamic: int
    blocks: int
    hmma: int
    hgmma: int
    ldgsts128: int
    utmaldg: int
    ucgabar: int

    @property
    def key(self) -> tuple[str, str]:
        return self.kernel, self.arch


def tool(name: str) -> str | None:
    if found := shutil.which(name):
        return found
    spec = find_spec("triton")
    found = (
        Path(spec.origin).parent / "backends/nvidia/bin" / name if spec and spec.origin else None
    )
    return str(found) if found and found.exists() else None


def built_module() -> Path | None:
    spec = find_spec("fastattn._cuda")
    return Path(spec.origin) if spec and spec.origin else None


def missing() -> str:
    """Why the table cannot be made here; empty when it can."""
    if built_module() is None:
        return "fastattn was built without CUDA"
    for name in ("cuobjdump", "nvdisasm"):
        if tool(name) is None:
            return f"no {name}"
    return "" if build.compiler() else "no C++ compiler"


# -------------------------------------------------------------------------------- reading the code


def name_of(mangled: str) -> str:
    """attention_forward/bf16/128 of _ZN8fastattn24attention_forward_kernelINS_4bf16ELi128ELb0EE..."""
    found = re.search(r".*\d((?:attention|layer_norm|softmax)\w*?)_kernel(?:I(.*?)EEv)?", mangled)
    assert found, mangled
    parts = [found[1]]
    for kind, number, flag in re.findall(r"(bf16|f16|f(?=L|$))|Li(\d+)|Lb([01])", found[2] or ""):
        parts += [{"f": "f32"}.get(kind, kind)] if kind else [number] if number else []
        parts += ["modified"] if flag == "1" else []
    return "/".join(parts)


def bytes_of_local(code: str) -> int:
    width = {"64": 8, "128": 16}
    return sum(width.get(n, 4) for n in re.findall(r"\b(?:LDL|STL)(?:\.LU)?(?:\.(64|128))?", code))


def kernels_of(cubin: Path) -> Iterator[tuple[str, str]]:
    """(mangled name, its own code) of each kernel."""
    text = subprocess.run(
        [tool("nvdisasm"), "-c", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    for section in re.split(r"^\s*\.section\s+\.text\.", text, flags=re.M)[1:]:
        name = section[: section.index(",")]
        # A function that is not inlined stands behind the kernel that calls it.
        yield name, re.split(r"^\s*\.type\s+\$", section, maxsplit=1, flags=re.M)[0]


def usage_of(cubin: Path) -> dict[str, tuple[int, int]]:
    """(registers, static shared memory) by mangled name."""
    text = subprocess.run(
        [tool("cuobjdump"), "--dump-resource-usage", str(cubin)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = re.findall(r"Function (\S+):\s+REG:(\d+).*?SHARED:(\d+)", text)
    return {name: (int(registers), int(shared)) for name, registers, shared in found}


def launches() -> dict[str, tuple[int, int]]:
    """(threads, dynamic shared memory) by kernel, as the sources have them."""
    csrc = build.SOURCES / "csrc"
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "launches")
        command = [build.compiler(), "-std=c++17", "-DFASTATTN_EMULATE", "-w"]
        command += [f"-I{path}" for path in (csrc / "common", csrc / "cuda", build.EMULATOR)]
        # Constants alone: what the headers would call of the emulator is not needed.
        command += [
            str(HERE / "launches.cpp"),
            "-o",
            str(program),
            "-Wl,--unresolved-symbols=ignore-all",
        ]
        subprocess.run(command, check=True)
        text = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    rows = (line.split() for line in text.splitlines())
    return {name: (int(threads), int(shared)) for name, threads, shared in rows}


def lines_of(module: Path) -> list[Line]:
    known = launches()

    def read(cubin: Path) -> list[Line]:
        arch = re.search(r"\.(sm_\d+)a?\.cubin", cubin.name)[1]
        usage = usage_of(cubin)
        found = []
        for mangled, code in kernels_of(cubin):
            name = name_of(mangled)
            registers, static = usage[mangled]
            static -= common.MACHINES[arch].reserved if arch == "sm_90" else 0  # counted with it
            if "_wide" in name:  # its flag says whether it makes the sums of the weights
                name, *sums = name.replace("_wide", "").split("/modified")
                name += "/0/sums" if sums else "/0"
            threads, dynamic = known.get(name) or known[without_dtype(name)]
            if "HGMMA" not in code and arch == "sm_80" and "_sm90" in name:
                continue  # an empty body
            fits = common.blocks_that_fit(
                common.MACHINES[arch], registers, threads, static + dynamic
            )
            counts = (len(re.findall(pattern, code)) for pattern in INSTRUCTIONS.values())
            spilled = bytes_of_local(code)
            found.append(Line(name, arch, registers, spilled, static, dynamic, fits, *counts))
        return found

    with tempfile.TemporaryDirectory() as folder:
        command = [tool("cuobjdump"), "-xelf", "all", str(module)]
        subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, check=True)
        with ThreadPoolExecutor(build.jobs()) as pool:
            each = list(pool.map(read, sorted(Path(folder).glob("*.cubin"))))
    return sorted((line for lines in each for line in lines), key=order)


def without_dtype(name: str) -> str:
    return re.sub(r"/(bf16|f16|f32)\b", "", name, count=1)


def order(line: Line) -> list[tuple[int, str]]:
    return [(int(x), "") if x.isdigit() else (0, x) for x in (*line.kernel.split("/"), line.arch)]


def nvcc_of(module: Path) -> str:
    """The release that made the module, which its code names."""
    with tempfile.TemporaryDirectory() as folder:
        command = [tool("cuobjdump"), "-xelf", "1.sm", str(module)]
        subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, check=True)
        first = min(Path(folder).glob("*.cubin"))
        found = re.search(rb"Cuda compilation tools, release ([\d.]+)", first.read_bytes())
    return found[1].decode() if found else "unknown"


# -------------------------------------------------------------------------------------- the table


def text_of(lines: list[Line], version: str) -> str:
    return common.text_of(lines, f"nvcc {version}", Line._fields)


def read_table(path: Path = TABLE) -> tuple[str, dict[tuple[str, str], Line]]:
    first, _, *rows = path.read_text().splitlines()
    lines = (Line(*row.split()[:2], *map(int, row.split()[2:])) for row in rows)
    return first.split()[1], {line.key: line for line in lines}


def problems(line: Line, before: Line | None) -> Iterator[str]:
    """What is wrong with a line; ``before`` is the table's, of the same nvcc."""
    if MAIN.match(line.kernel) and line.spilled:
        yield f"spills {line.spilled} bytes, in a main configuration"
    kind = line.kernel.split("/")[0]
    if kind.endswith("_sm90"):
        needed = ["hgmma", "utmaldg"]
    elif line.arch == "sm_90" and re.match(r"(layer_norm|softmax).*/0$", line.kernel):
        needed = ["ucgabar"]
    else:
        needed = ["hmma", "ldgsts128"] if re.match(r"attention_(?!merge)", kind) else []
    for name in needed:
        if not getattr(line, name):
            yield f"has no {name.upper()} instruction"
    if before is None:
        return
    yield from common.growth(line, before)
    for name in INSTRUCTIONS:
        if getattr(line, name) < getattr(before, name):
            yield f"has {getattr(line, name)} {name.upper()}, {getattr(before, name)} before"


def main(arguments: list[str]) -> int:
    if why := missing():
        print(why)
        return 1
    module = built_module()
    assert module is not None
    lines, version = lines_of(module), nvcc_of(module)
    update = "--update" in arguments
    if pattern := next((x for x in arguments if not x.startswith("-")), None):
        wanted = [x for x in lines if fnmatch.fnmatch("/".join(x.key), f"*{pattern}*")]
        print(text_of(wanted, version), end="")
        return 0
    committed, table = read_table() if TABLE.exists() else ("", {})
    same = committed == version and not update
    found = []
    for line in lines:
        before = table.pop(line.key, None) if same else None
        if same and before is None:
            found.append(f"{line.kernel} on {line.arch}: is not in the table")
        found += [f"{line.kernel} on {line.arch}: {x}" for x in problems(line, before)]
    if same:
        found += [f"{kernel} on {arch}: is no longer there" for kernel, arch in table]
    if update:
        TABLE.write_text(text_of(lines, version))
        print(f"wrote {TABLE}: {len(lines)} lines")
    elif not same:
        print(f"nvcc {version}; the table is of {committed}, not compared")
    print(*found, sep="\n")
    if found and not update:
        print("wanted? python tests/kernel_table/cuda_table.py --update")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
