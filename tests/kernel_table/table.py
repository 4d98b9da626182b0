"""The generated code of every Triton kernel, made without a GPU and held to a committed table.

    python tests/kernel_table/table.py            compile, compare with table.txt
    python tests/kernel_table/table.py --update   compile, write table.txt
    python tests/kernel_table/table.py PATTERN    compile what matches, print; with --update, write it

A line is one kernel on one architecture: registers a thread, bytes spilled, bytes of shared memory,
blocks that fit on a multiprocessor, tensor-core instructions, and 16-byte loads and stores. Figures
hold for the triton that the table names; another one is held to compile and to use tensor cores, and
what it spills in a main configuration is printed.

A process of its own: the interpreter, once used, leaves a triton that does not compile.
"""

from __future__ import annotations

import fnmatch
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parent))

import attention_variants
import common
import row_variants

from fastattn.backends.triton.kernel import KernelVariant

TABLE = Path(__file__).parent / "table.txt"


TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Line(NamedTuple):
    kernel: str
    arch: str
    registers: int
    spilled: int
    shared: int
    blocks: int
    mma: int
    wgmma: int
    tcgen05: int
    mfma: int
    loads: int  # of 16 bytes
    stores: int

    @property
    def key(self) -> tuple[str, str]:
        return self.kernel, self.arch


# What an instruction looks like in PTX or in AMD's assembly.
TENSOR_CORES = {
    "mma": r"\bmma\.sync",
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
    "mfma": r"\bv_mfma",
}
WIDE_LOAD = r"\bld\.global\S*\.v(?:4\.b32|2\.b64|4\.f32)|\b(?:global|buffer)_load_dwordx4"
WIDE_STORE = r"\bst\.global\S*\.v(?:4\.b32|2\.b64|4\.f32)|\b(?:global|buffer)_store_dwordx4"


def variants(arch: str) -> Iterator[KernelVariant]:
    yield from row_variants.variants(arch)
    yield from attention_variants.variants(arch)


def compiled(variant: KernelVariant, arch: str) -> Line:
    target = TARGETS[arch]
    kernel = triton.compile(
        ASTSource(variant.function, variant.signature, variant.constants, variant.attributes),
        target=target,
        options={"num_warps": variant.num_warps, "num_stages": variant.num_stages},
    )
    hip = target.backend == "hip"
    assembly = kernel.asm["amdgcn" if hip else "ptx"]
    if hip:
        registers, spilled = (
            int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])  # type: ignore[index]
            for name in ("vgpr_count", "vgpr_spill_count")
        )
    else:
        registers, spilled = resource_usage(kernel.asm["cubin"])
    shared = kernel.metadata.shared
    threads = kernel.metadata.num_warps * target.warp_size  # warp specialisation adds some
    return Line(
        variant.name,
        arch,
        registers,
        spilled,
        shared,
        common.blocks_that_fit(common.MACHINES[arch], registers, threads, shared),
        *(len(re.findall(pattern, assembly)) for pattern in TENSOR_CORES.values()),
        len(re.findall(WIDE_LOAD, assembly)),
        len(re.findall(WIDE_STORE, assembly)),
    )


_work: list[tuple[KernelVariant, str]] = []


def outcome(n: int) -> Line | str:
    """What comes of the n-th piece of work: its line, or why it does not compile."""
    try:
        return compiled(*_work[n])
    except Exception as error:  # of any kind and depth: the compiler's own
        return (str(error).strip() or repr(error)).splitlines()[-1]


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack, which these kernels have for spills alone)."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2]) + int(found[3])


# ---------------------------------------------------------------------------------- the table


def text_of(lines: Iterable[Line], version: str) -> str:
    return common.text_of(lines, f"triton {version}", Line._fields)


def read(path: Path = TABLE) -> tuple[str, dict[tuple[str, str], Line]]:
    """(the triton of the table, its lines)."""
    first, _, *rows = path.read_text().splitlines()
    lines = (Line(*row.split()[:2], *map(int, row.split()[2:])) for row in rows)
    return first.split()[1], {line.key: line for line in lines}


def problems(variant: KernelVariant, line: Line, before: Line | None) -> Iterator[str]:
    """What is wrong with a line; ``before`` is the table's, of the same triton."""
    if variant.main and line.spilled:
        yield f"spills {line.spilled} bytes, in a main configuration"
    for name in variant.instructions:
        if not getattr(line, name):
            yield f"has no {name} instruction"
    if before is None:
        return
    yield from common.growth(line, before)
    for name in (*TENSOR_CORES, "loads", "stores"):
        if getattr(before, name) and not getattr(line, name):
            what = f"16-byte {name}" if name in ("loads", "stores") else f"{name} instructions"
            yield f"has lost its {what}, {getattr(before, name)} before"


def main(arguments: list[str]) -> int:
    update = "--update" in arguments
    pattern = next((x for x in arguments if not x.startswith("-")), None)
    version, table = read() if TABLE.exists() else ("", {})
    same = version == triton.__version__
    kept = table if update and same and pattern else {}
    if update:
        same = False
    lines, found, notes = [], [], []
    _work[:] = [
        (variant, arch)
        for arch in TARGETS
        for variant in variants(arch)
        if not pattern or fnmatch.fnmatch(f"{variant.name}/{arch}", f"*{pattern}*")
    ]
    # Forked, the processes have the work already.
    with multiprocessing.get_context("fork").Pool() as pool:
        for (variant, arch), line in zip(_work, pool.imap(outcome, range(len(_work))), strict=True):
            if isinstance(line, str):
                found.append(f"{variant.name} on {arch}: does not compile: {line}")
                continue
            lines.append(line)
            kept.pop(line.key, None)
            before = table.pop(line.key, None) if same else None
            if same and before is None:
                found.append(f"{variant.name} on {arch}: is not in the table")
            said = [f"{variant.name} on {arch}: {x}" for x in problems(variant, line, before)]
            found += said if same or update else [x for x in said if "spills" not in x]
            notes += [] if same or update else [x for x in said if "spills" in x]
    order = list(TARGETS)
    lines = sorted([*lines, *kept.values()], key=lambda x: (x.kernel, order.index(x.arch)))
    if pattern and not update:
        print(text_of(lines, triton.__version__), end="")
        print(*found, sep="\n")
        return 0
    if same:
        found += [f"{kernel} on {arch}: is no longer there" for kernel, arch in table]
    if update:
        TABLE.write_text(text_of(lines, triton.__version__))
        print(f"wrote {TABLE}: {len(lines)} lines")
    else:
        against = "as in the table" if same else f"the table is of triton {version}, not compared"
        print(f"triton {triton.__version__}: {len(lines)} kernels compiled; {against}")
    for problem in (*notes, *found):
        print(problem)
    if found and not update:
        print("wanted? python tests/kernel_table/table.py --update")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
