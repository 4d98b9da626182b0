"""Child processes that answer a request: JSON in on stdin, lines of JSON out on stdout."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any


class ChildError(RuntimeError):
    """The child ended with an exit status other than 0."""


def answers(module: str, request: Any, environment: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Run ``module`` as a program of its own and yield what it prints, line by line.

    It gets this process's import path: `python -m` would put the current directory first, and from
    within a checkout import sources that were never built instead of the installed package.
    """
    code = (
        f"import runpy, sys; sys.path[:] = {sys.path!r}; "
        f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=dict(environment),
    )
    assert child.stdin and child.stdout
    try:
        with child.stdin as stdin:
            stdin.write(json.dumps(request))
    except BrokenPipeError:
        pass  # it died before it read; its status tells
    for line in child.stdout:
        yield json.loads(line)
    if status := child.wait():
        raise ChildError(f"{module} ended with exit status {status}")
