"""Processes that have the ops from the standalone library alone."""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch_sage
from tests.csrc.isas import run_python


def run_without_package(
    code: str, *arguments: object, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run ``code`` after loading the standalone library; torch_sage cannot be imported."""
    head = (
        "import sys, torch; torch.ops.load_library(sys.argv[1]); sys.modules['torch_sage'] = None"
    )
    names = [str(torch_sage.library_path()), *map(str, arguments)]
    return run_python("-c", f"{head}\n{code}", *names, package_root=Path("/"), **environment)
