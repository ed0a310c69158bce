"""AOTInductor packages on a GPU: compiled, loaded and run, each in a process of its own.

A process that dies or hangs takes no other test with it, and shows what it said. The package of the
same model with torch's own attention tells whether torch's part works on this machine.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import torch_sage
from tests.csrc.isas import ROOT, run_python
from tests.numerics import relative_l1
from tests.without_package import run_without_package

# Load a package and run it on two batch sizes, each twice.
RUN = """
torch.backends.cudnn.allow_tf32 = False
run = torch._inductor.aoti_load_package(sys.argv[-2])
inputs = torch.load(sys.argv[-1])["inputs"]
with torch.no_grad():
    outputs = [run(x) for x in inputs]
    assert all(torch.equal(run(x), y) for x, y in zip(inputs, outputs)), "bits must repeat"
torch.save(outputs, sys.argv[-1] + ".outputs")
"""
# Where the driver's library is, and which GPUs may be used.
GPU_VARIABLES = ("LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES")
PROCESSES = {
    "with torch_sage": lambda *files: run_python(
        "-c", f"import sys, torch, torch_sage\n{RUN}", *map(str, files), PYTHONFAULTHANDLER="1"
    ),
    "with the library alone": lambda *files: run_without_package(
        RUN, *files, PYTHONFAULTHANDLER="1"
    ),
    "with torch alone": lambda *files: run_python(
        "-c",
        f"import sys, torch; sys.modules['torch_sage'] = None\n{RUN}",
        *map(str, files),
        PYTHONFAULTHANDLER="1",
    ),
}


def succeed(process: Callable[[], subprocess.CompletedProcess[str]]) -> None:
    try:
        done = process()
    except subprocess.TimeoutExpired as late:
        pytest.fail(f"{late}\n{late.stdout}\n{late.stderr}")
    told = done.stdout[-4000:] + done.stderr[-8000:]
    assert done.returncode == 0, f"exit status {done.returncode}\n{told}"


def make_package(folder: Path, *options: str) -> Path:
    arguments = ("-m", "tests.gpu.aoti", str(folder), *options)
    cache = str(folder / "inductor")
    succeed(lambda: run_python(*arguments, TORCHINDUCTOR_CACHE_DIR=cache, PYTHONFAULTHANDLER="1"))
    return folder


def run_package(folder: Path, process: str) -> list[Tensor]:
    tensors = folder / "tensors.pt"
    succeed(lambda: PROCESSES[process](folder / "package.pt2", tensors))
    outputs: list[Tensor] = torch.load(f"{tensors}.outputs")
    return outputs


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a package whose attention is quantized."""
    return make_package(tmp_path_factory.mktemp("package"))


def test_torch_itself_runs_a_package_here(tmp_path: Path) -> None:
    """If this fails, so must the others, whatever our kernels do."""
    folder = make_package(tmp_path, "--exact")
    exact = torch.load(folder / "tensors.pt")["exact"]
    for output, expected in zip(run_package(folder, "with torch alone"), exact, strict=True):
        assert relative_l1(output, expected) < 1e-4


@pytest.mark.parametrize("process", ["with torch_sage", "with the library alone"])
def test_package_computes_what_the_model_does(package: Path, process: str) -> None:
    """The error of quantization is that of the eager model; the two processes agree to the bit."""
    tensors = torch.load(package / "tensors.pt")
    outputs = run_package(package, process)
    for i, output in enumerate(outputs):
        exact, quantized = tensors["exact"][i], tensors["quantized"][i]
        error, eager = relative_l1(output, exact), relative_l1(quantized, exact)
        assert eager / 1.1 < error < 1.1 * eager
    here = run_package(package, "with torch_sage")
    assert all(torch.equal(a, b) for a, b in zip(outputs, here, strict=True))


def test_cpp_program_without_python(tmp_path: Path) -> None:
    """The example, with the libraries of this torch and no environment but that of the GPU."""
    folder = make_package(tmp_path, "--one")
    (expected,) = run_package(folder, "with torch_sage")
    build = tmp_path / "build"
    torch_folder = f"-DTORCH_FOLDER={Path(torch.__file__).parent}"
    configure = ["cmake", "-S", ROOT / "examples" / "aoti_cpp", "-B", build, torch_folder]
    program = [build / "dinov2", torch_sage.library_path(), folder / "package.pt2"]
    environment = {name: os.environ[name] for name in GPU_VARIABLES if name in os.environ}
    succeed(lambda: subprocess.run(configure, capture_output=True, text=True))
    succeed(lambda: subprocess.run(["cmake", "--build", build], capture_output=True, text=True))
    done = subprocess.run(
        [*program, folder / "photograph.f32", "cuda"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    succeed(lambda: done)
    printed = torch.tensor([float(line) for line in done.stdout.splitlines()])
    torch.testing.assert_close(printed, expected[0, 0].cpu(), atol=1e-5, rtol=0)
