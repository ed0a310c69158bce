"""setup.py: what it refuses, and what it does where there is no compiler."""

from __future__ import annotations

import os
import re
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
    """A source tree of a few sources of the CUDA road, quick to fail."""
    shutil.rmtree(source_tree / "csrc")
    files = (
        "attention/sm80/kernel.cu",
        "attention/sm89/kernel.cu",
        "attention/sm90/kernel.cu",
        "attention/sm90/launch.cpp",
        "quantize/mma/prepare.cu",
        "quantize/cuda/prepare.cu",
        "cuda/stream.cpp",
        "exports.map",
        "standalone/exports.map",
    )
    for name in files:
        source = source_tree / "csrc" / name
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text("")
    return source_tree


LACK = "TORCH_CUDA_ARCH_LIST has none of 8.0, 8.6, 8.7, 8.9, 9.0, 12.0"


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
        ("TORCH_CUDA_ARCH_LIST", "7.5;10.0a", LACK),
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


def codes_of(graph, source):
    """Return what a CUDA source is compiled for; nothing: it is not."""
    edge = re.search(rf"nvcc csrc/{source}\n  flags = (.*)", graph)
    return re.findall(r"arch=compute_\w+,code=(\w+)", edge[1]) if edge else []


def header_of(folder):
    return (folder / "build" / "native" / "build_cuda.h").read_text()


@pytest.mark.parametrize("mode", ["1", "auto"])
def test_with_nvcc_the_cuda_sources_are_built_and_ptxas_is_quoted(cuda_tree, toolkit, mode):
    graph, printed = build_graph(cuda_tree, TORCH_SAGE_CUDA=mode, CUDA_HOME=str(toolkit))
    assert f"command = {toolkit}/bin/nvcc -std=c++20" in graph and "-lcudart_static" in graph
    assert "kernel.cu.o.ptxas: nvcc csrc/attention/sm90/kernel.cu" in graph
    assert "compile csrc/cuda/stream.cpp\n  flags = " in graph
    assert "-isystem /toolkit/include" in graph and "-L/toolkit/lib" in graph
    assert '"13.7"' in header_of(cuda_tree)
    assert "ptxas fatal: no such instruction" in printed


# All; what GPUs of the list run, the newest code for each; PTX where it is asked for.
@pytest.mark.parametrize(
    ("arches", "sm80", "sm89", "sm90", "gpus"),
    [
        (
            "",
            ["sm_80", "sm_86", "sm_90", "sm_120a", "compute_80"],
            ["sm_89", "sm_90", "sm_120a", "compute_89"],
            ["sm_90a"],
            "sm80:8.0,8.6,8.7,8.9,9.0,12.0,12.1;sm89:8.9,9.0,12.0,12.1;sm90:9.0",
        ),
        ("8.0", ["sm_80"], [], [], "sm80:8.0,8.6,8.7,8.9"),
        ("8.7", ["sm_86"], [], [], "sm80:8.6,8.7,8.9"),
        ("8.9 10.0", ["sm_86"], ["sm_89"], [], "sm80:8.9;sm89:8.9"),
        ("9.0", ["sm_90"], ["sm_90"], ["sm_90a"], "sm80:9.0;sm89:9.0;sm90:9.0"),
        (
            "8.9;12.0a+PTX",
            ["sm_86", "sm_120a", "compute_80"],
            ["sm_89", "sm_120a", "compute_89"],
            [],
            "sm80:8.0,8.6,8.7,8.9,9.0,12.0,12.1;sm89:8.9,9.0,12.0,12.1",
        ),
    ],
)
def test_sources_are_compiled_for_the_listed_gpus(
    cuda_tree, toolkit, arches, sm80, sm89, sm90, gpus
):
    """The header says which families there are, and which GPUs run their kernels."""
    graph, _ = build_graph(cuda_tree, CUDA_HOME=str(toolkit), TORCH_CUDA_ARCH_LIST=arches)
    expected = {"sm80": sm80, "sm89": sm89, "sm90": sm90}
    for family, codes in expected.items():
        assert codes_of(graph, f"attention/{family}/kernel.cu") == codes
        assert f"TORCH_SAGE_HAS_{family.upper()} {int(bool(codes))}\n" in header_of(cuda_tree)
    assert codes_of(graph, "quantize/cuda/prepare.cu") == sm90
    assert ("csrc/attention/sm90/launch.cpp" in graph) == bool(sm90)
    built = ",".join(family for family, codes in expected.items() if codes)
    assert f'TORCH_SAGE_CUDA "{built}"\n' in header_of(cuda_tree)
    assert f'TORCH_SAGE_CUDA_GPUS "{gpus}"\n' in header_of(cuda_tree)


def test_an_older_nvcc_leaves_out_what_it_cannot_compile(cuda_tree, toolkit):
    nvcc = toolkit / "bin" / "nvcc"
    nvcc.write_text(nvcc.read_text().replace("13.7", "12.6"))
    graph, _ = build_graph(cuda_tree, CUDA_HOME=str(toolkit))
    assert codes_of(graph, "attention/sm80/kernel.cu") == [
        "sm_80",
        "sm_86",
        "sm_90",
        "compute_80",
    ]
    assert codes_of(graph, "attention/sm89/kernel.cu") == []
    assert codes_of(graph, "attention/sm90/kernel.cu") == ["sm_90a"]
    assert 'TORCH_SAGE_CUDA "sm80,sm90"\n' in header_of(cuda_tree)


@pytest.mark.parametrize(
    "environment",
    [{"TORCH_SAGE_CUDA": "0"}, {"TORCH_CUDA_ARCH_LIST": "7.5"}],
    ids=["refused", "other capability"],
)
def test_without_cuda_its_sources_are_left_out(cuda_tree, toolkit, environment):
    graph, printed = build_graph(cuda_tree, CUDA_HOME=str(toolkit), **environment)
    assert "nvcc" not in graph and "cudart" not in graph and "csrc/cuda" not in graph
    assert 'TORCH_SAGE_CUDA "none"\n' in header_of(cuda_tree)
    warning = f"{LACK}: torch_sage will have no CUDA kernels"
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
