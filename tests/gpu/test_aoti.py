"""An AOTInductor package on a GPU: compiled, loaded and run, each in a process of its own.

A process that dies or hangs takes no other test with it, and shows what it said: how long each of
its phases took, and the error. ``pytest -rP tests/gpu/test_aoti.py`` shows the times of tests that
pass, too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import torch_sage
from tests.csrc.isas import ROOT, run_python
from tests.numerics import relative_l1
from tests.without_package import run_without_package

# One package for all tests: one worker of pytest-xdist runs them.
pytestmark = pytest.mark.xdist_group("AOTInductor")

# Load a package and run it on every batch size, twice.
RUN = """
import time
torch.backends.cudnn.allow_tf32 = False
start = time.perf_counter()
run = torch._inductor.aoti_load_package(sys.argv[-2])
loaded = time.perf_counter()
print(f"load: {loaded - start:.1f} s", flush=True)
inputs = torch.load(sys.argv[-1])["inputs"]
with torch.no_grad():
    outputs = [run(x) for x in inputs]
    assert all(torch.equal(run(x), y) for x, y in zip(inputs, outputs)), "bits must repeat"
print(f"run: {time.perf_counter() - loaded:.1f} s", flush=True)
torch.save(outputs, sys.argv[-3])
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
}


class Made(NamedTuple):
    """What threads are making: the folder of the package, and the C++ program."""

    package: Future[Path]
    program: Future[Path]


def succeed(process: Callable[[], subprocess.CompletedProcess[str]]) -> str:
    """Return what a process printed; if it fails, or is late, show it."""
    try:
        done = process()
    except subprocess.TimeoutExpired as late:
        said = [(said or b"").decode() for said in (late.stdout, late.stderr)]
        pytest.fail(f"{late}\n{said[0][-4000:]}{said[1][-8000:]}")
    told = done.stdout[-4000:] + done.stderr[-8000:]
    assert done.returncode == 0, f"exit status {done.returncode}\n{told}"
    return done.stdout


def make_package(folder: Path) -> Path:
    cache = str(folder / "inductor")
    arguments = ("-m", "tests.gpu.aoti", str(folder))
    told = succeed(
        lambda: run_python(*arguments, TORCHINDUCTOR_CACHE_DIR=cache, PYTHONFAULTHANDLER="1")
    )
    sys.stdout.write(f"the package\n{told}")
    return folder


def make_program(folder: Path) -> Path:
    """Build the example with the libraries of this torch."""
    torch_folder = f"-DTORCH_FOLDER={Path(torch.__file__).parent}"
    source = str(ROOT / "examples" / "aoti_cpp")
    for command in (["-S", source, "-B", str(folder), torch_folder], ["--build", str(folder)]):
        succeed(lambda command=command: run_tool("cmake", *command))
    return folder / "dinov2"


def run_tool(*command: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def run_package(folder: Path, process: str) -> list[Tensor]:
    results = folder / f"{process}.pt"
    files = (results, folder / "package.pt2", folder / "tensors.pt")
    told = succeed(lambda: PROCESSES[process](*files))
    sys.stdout.write(f"{process}\n{told}")
    outputs: list[Tensor] = torch.load(results)
    return outputs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """The package and the program, made side by side."""
    with ThreadPoolExecutor() as threads:
        package = threads.submit(make_package, tmp_path_factory.mktemp("package"))
        program = threads.submit(make_program, tmp_path_factory.mktemp("program"))
        yield Made(package, program)


@pytest.fixture(scope="module")
def outputs(made: Made) -> dict[str, Future[list[Tensor]]]:
    """What the package gives in each process; they run side by side."""
    folder = made.package.result()
    with ThreadPoolExecutor() as threads:
        return {name: threads.submit(run_package, folder, name) for name in PROCESSES}


@pytest.mark.parametrize("process", PROCESSES)
def test_package_computes_what_the_model_does(
    made: Made, outputs: dict[str, Future[list[Tensor]]], process: str
) -> None:
    """The error of quantization is that of the eager model, for every batch size."""
    tensors = torch.load(made.package.result() / "tensors.pt")
    columns = (outputs[process].result(), tensors["exact"], tensors["quantized"])
    for output, exact, quantized in zip(*columns, strict=True):
        error, eager = relative_l1(output, exact), relative_l1(quantized, exact)
        assert eager / 1.1 < error < 1.1 * eager


def test_package_gives_the_same_bits_without_torch_sage(
    outputs: dict[str, Future[list[Tensor]]],
) -> None:
    for a, b in zip(*(outputs[name].result() for name in PROCESSES), strict=True):
        assert torch.equal(a, b)


def test_cpp_program_without_python(made: Made, outputs: dict[str, Future[list[Tensor]]]) -> None:
    """The example, with the libraries of this torch and no environment but that of the GPU."""
    folder = made.package.result()
    program = [made.program.result(), torch_sage.library_path(), folder / "package.pt2"]
    environment = {name: os.environ[name] for name in GPU_VARIABLES if name in os.environ}
    arguments = [*program, folder / "photograph.f32", "cuda"]
    printed = succeed(lambda: run_tool(*map(str, arguments), env=environment))
    features = torch.tensor([float(line) for line in printed.splitlines()])
    expected = outputs["with torch_sage"].result()[-1][0, 0].cpu()
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)
