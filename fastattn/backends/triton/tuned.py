"""Configurations that `fastattn tune` measured to be faster than the heuristics, from a cache file.

The file is keyed by device and triton version, then kernel, then problem; FASTATTN_CACHE names
another folder for it. A file that is missing, unreadable or of another form changes nothing.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any, TypeVar

import torch

Table = dict[str, dict[str, Any]]  # kernel -> problem -> configuration
C = TypeVar("C", bound=tuple)


def cache_file() -> Path:
    folder = os.environ.get("FASTATTN_CACHE")
    if folder:
        return Path(folder) / "triton.json"
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "fastattn" / "triton.json"


def machine_key(device: torch.device) -> str:
    import triton

    return f"{torch.cuda.get_device_name(device)}, triton {triton.__version__}"


def tuned(kernel: str, problem: str, device: torch.device, default: C) -> C:
    """The configuration to use: ``default``, unless the cache has one for this device."""
    if device.type != "cuda":
        return default
    found = _table(device.index).get(kernel, {}).get(problem)
    return default if found is None else like(default, found) or default


def like(default: C, value: Any) -> C | None:
    """``value``, nested lists, as a tuple of the type of ``default``; None if it does not fit."""
    if not isinstance(value, list) or len(value) != len(default):
        return None
    fields = []
    for before, x in zip(default, value, strict=True):
        field = like(before, x) if isinstance(before, tuple) else x
        sound = type(field) is type(before) and (type(x) is not int or x > 0)
        if field is None or not sound:
            return None
        fields.append(field)
    return type(default)(*fields)


@functools.cache
def _table(index: int) -> Table:
    return read().get(machine_key(torch.device("cuda", index)), {})


def read() -> dict[str, Table]:
    """The whole file: machine -> kernel -> problem -> configuration. Empty if it is not sound."""
    try:
        content = json.loads(cache_file().read_text())
        for table in content.values():
            for problems in table.values():
                dict(problems)
        return dict(content)
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError):
        return {}  # RuntimeError: a user without a home


def write(machine: str, table: Table) -> str:
    """Adds a machine's table to the file; why that failed, or nothing."""
    content = read()
    before = content.setdefault(machine, {})
    for kernel, problems in table.items():
        before.setdefault(kernel, {}).update(problems)
    try:
        file = cache_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        # Whole or not at all, whoever else writes or reads at the moment.
        draft = file.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(content, indent=1))
        draft.replace(file)
    except (OSError, RuntimeError) as error:
        return str(error)
    _table.cache_clear()
    return ""
