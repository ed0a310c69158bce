"""The instruction-set levels that this machine can run, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from torch_sage import _extension

ROOT = Path(__file__).parents[2]


def runnable() -> list[str]:
    """Return the levels up to the one in use, the lowest first."""
    if not _extension.is_available():
        return []
    info = _extension.build_info()
    levels = info["compiled_cpu_isas"].split(",")
    return levels[: levels.index(info["cpu_isa"]) + 1]


def run_python(
    *arguments: str, package_root: Path = ROOT, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python with the package of ``package_root``; nothing is raised for a failure."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(package_root), **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )
