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
    names = ("TORCH_SAGE_CUDA", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "TORCH_SAGE_SANITIZE", "CXX")
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


@pytest.fixture
def toolkit(tmp_path):
    """A CUDA toolkit that cannot compile anything: its nvcc says who it is, and what ptxas says."""
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        "  --version) echo release 13.7, V13.7.1 ;;\n"
        "  --dryrun) echo '#$ INCLUDES=\"-I/toolkit/include\"' >&2\n"
        "            echo '#$ LIBRARIES=  \"-L/toolkit/lib\"' >&2 ;;\n"
        "  *) echo ptxas fatal: no such instruction; exit 1 ;;\n"
        "esac\n"
    )
    nvcc.chmod(0o755)
    return nvcc.parents[1]


@pytest.fixture
def cuda_tree(source_tree):
    """A source tree of one CUDA source and one C++ source of the CUDA road, quick to fail."""
    shutil.rmtree(source_tree / "csrc")
    files = ("attention/sm90/kernel.cu", "cuda/stream.cpp", "exports.map", "standalone/exports.map")
    for name in files:
        source = source_tree / "csrc" / name
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text("")
    return source_tree


def build_graph(folder, **environment):
    """Return what setup.py wrote for ninja, and all that the build printed."""
    done = run_setup(folder, "build_ext", **environment)
    graph = (folder / "build" / "native" / "build.ninja").read_text()
    return graph, done.stdout + done.stderr


def test_cuda_on_demand_needs_nvcc(source_tree, tmp_path):
    done = run_setup(source_tree, "--version", TORCH_SAGE_CUDA="1", CUDA_HOME=str(tmp_path))
    assert done.returncode != 0
    assert "TORCH_SAGE_CUDA must be 0 or auto where nvcc is not found, got 1" in done.stderr


@pytest.mark.parametrize(
    ("variable", "value", "lack"),
    [
        ("TORCH_CUDA_ARCH_LIST", "8.0;10.0a", "TORCH_CUDA_ARCH_LIST lacks 9.0a"),
        ("TORCH_SAGE_SANITIZE", "address", "TORCH_SAGE_SANITIZE is set"),
        ("PATH", "/nonexistent", "there is no C++ compiler"),
    ],
)
def test_cuda_on_demand_is_refused_where_it_would_be_left_out(
    source_tree, toolkit, variable, value, lack
):
    environment = {"CUDA_HOME": str(toolkit), "TORCH_SAGE_CUDA": "1", variable: value}
    done = run_setup(source_tree, "--version", **environment)
    assert done.returncode != 0
    assert f"TORCH_SAGE_CUDA must be 0 or auto where {lack}, got 1" in done.stderr


@pytest.mark.parametrize("mode", ["1", "auto"])
def test_with_nvcc_the_cuda_sources_are_built_and_ptxas_is_quoted(cuda_tree, toolkit, mode):
    arches = "8.0;9.0+PTX"
    graph, printed = build_graph(
        cuda_tree, TORCH_SAGE_CUDA=mode, CUDA_HOME=str(toolkit), TORCH_CUDA_ARCH_LIST=arches
    )
    assert f"command = {toolkit}/bin/nvcc -std=c++20" in graph
    assert "arch=compute_90a,code=sm_90a" in graph and "-lcudart_static" in graph
    assert "kernel.cu.o.ptxas: nvcc csrc/attention/sm90/kernel.cu" in graph
    assert "compile csrc/cuda/stream.cpp\n  flags = " in graph
    assert "-isystem /toolkit/include" in graph and "-L/toolkit/lib" in graph
    header = (cuda_tree / "build" / "native" / "build_cuda.h").read_text()
    assert '"sm90"' in header and '"13.7"' in header
    assert "ptxas fatal: no such instruction" in printed


@pytest.mark.parametrize(
    "environment",
    [{"TORCH_SAGE_CUDA": "0"}, {"TORCH_CUDA_ARCH_LIST": "8.0"}],
    ids=["refused", "other capability"],
)
def test_without_cuda_its_sources_are_left_out(cuda_tree, toolkit, environment):
    graph, printed = build_graph(cuda_tree, CUDA_HOME=str(toolkit), **environment)
    assert "nvcc" not in graph and "cudart" not in graph and "csrc/cuda" not in graph
    assert '"sm90"' not in (cuda_tree / "build" / "native" / "build_cuda.h").read_text()
    warning = "TORCH_CUDA_ARCH_LIST lacks 9.0a: torch_sage will have no CUDA kernels"
    assert (warning in printed) == ("TORCH_CUDA_ARCH_LIST" in environment)


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
