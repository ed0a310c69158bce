"""setup.py: what it refuses, and what it does where there is no compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.csrc.isas import ROOT


@pytest.fixture
def source_tree(tmp_path):
    """The files that a build reads, so that no test writes into the checkout."""
    for name in ("csrc", "torch_sage"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def run_setup(folder, *arguments, **environment):
    """Run setup.py with only these environment variables beside the machine's own."""
    names = ("TORCH_SAGE_CUDA", "TORCH_CUDA_ARCH_LIST", "TORCH_SAGE_SANITIZE", "CXX")
    inherited = {k: v for k, v in os.environ.items() if k not in names}
    return subprocess.run(
        [sys.executable, "setup.py", "--quiet", *arguments],
        cwd=folder,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("TORCH_SAGE_CUDA", "yes", "TORCH_SAGE_CUDA must be one of 0, 1, auto, got 'yes'"),
        ("TORCH_CUDA_ARCH_LIST", "8.0;sm_90", "must list capabilities such as 9.0a, got 'sm_90'"),
    ],
)
def test_unknown_values_are_errors(source_tree, variable, value, message):
    done = run_setup(source_tree, "--version", **{variable: value})
    assert done.returncode != 0 and message in done.stderr


def test_cuda_on_demand_needs_nvcc(source_tree, tmp_path):
    done = run_setup(source_tree, "--version", TORCH_SAGE_CUDA="1", PATH=str(tmp_path))
    assert done.returncode != 0 and "nvcc is not on PATH" in done.stderr


def test_cuda_on_demand_is_an_error_while_there_are_no_cuda_sources(source_tree, tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    assert list((ROOT / "csrc").rglob("*.cu")) == []
    done = run_setup(source_tree, "--version", TORCH_SAGE_CUDA="1", PATH=str(nvcc.parent))
    assert done.returncode != 0 and "this version has no CUDA kernels" in done.stderr


@pytest.mark.parametrize("mode", ["0", "auto"])
def test_valid_values_are_accepted(source_tree, mode):
    arches = "8.0 8.6;9.0a+PTX"
    done = run_setup(source_tree, "--version", TORCH_SAGE_CUDA=mode, TORCH_CUDA_ARCH_LIST=arches)
    assert done.returncode == 0, done.stderr


def test_without_compiler_a_pure_wheel_is_built_with_a_warning(source_tree, tmp_path):
    done = run_setup(source_tree, "bdist_wheel", PATH=str(tmp_path / "nothing"))
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler" in done.stderr
    (wheel,) = (source_tree / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert [n for n in zipfile.ZipFile(wheel).namelist() if n.endswith(".so")] == []


def test_failing_compiler_is_an_error(source_tree):
    """Only an absent compiler is forgiven: a broken build must not install silently."""
    done = run_setup(source_tree, "build_ext", CXX="false")
    assert done.returncode != 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_wheel_fits_every_python(source_tree):
    """An object file of the checkout's own build spares the minute that a full build takes."""
    if (ROOT / "build" / "native").is_dir():
        shutil.copytree(ROOT / "build" / "native", source_tree / "build" / "native")
    done = run_setup(source_tree, "bdist_wheel")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (wheel,) = (source_tree / "dist").glob("*.whl")
    assert "-py3-none-linux_" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert {"torch_sage/libtorch_sage.so", "torch_sage/libtorch_sage_standalone.so"} < set(names)
