"""What the compiler made of the CUDA kernels: no spill, no serialized wgmma, the right opcodes.

No GPU is needed: the build keeps what ptxas reports beside each object file.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.csrc.isas import ROOT
from torch_sage import _extension

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")

CSRC, BUILT = ROOT / "csrc", ROOT / "build" / "native" / "csrc"
SOURCES = sorted(path.relative_to(CSRC) for path in CSRC.rglob("*.cu"))
ATTENTION = [path for path in SOURCES if "attention" in path.parts]
# What ptxas may say of a kernel beyond its size. C7517: it adds a wait in front of a wgmma whose
# registers it has to copy (docs/kernels/hopper.md); the others say that all wgmma wait in turn or
# that setmaxnreg is ignored.
ALLOWED = {"C7517"}
# Int8 and FP8 products of a warpgroup, and the bulk copy that feeds them.
INSTRUCTIONS = {"IGMMA", "QGMMA", "UBLKCP"}


def report(source: Path) -> str:
    return (BUILT / f"{source}.o.ptxas").read_text()


def wrong(text: str) -> list[str]:
    """Return the lines of a report that no kernel may have."""
    return [
        line
        for line in text.splitlines()
        if re.search(r"\b[1-9]\d* bytes spill", line)
        or "Potential Performance Loss" in line
        or not ALLOWED.issuperset(re.findall(r"\((C\d{4})\)", line))
    ]


def instructions(source: Path) -> set[str]:
    """Return the opcodes of an object file, without their modifiers."""
    triton = importlib.util.find_spec("triton")
    assert triton is not None and triton.origin is not None, "triton's wheel has the disassembler"
    tools = Path(triton.origin).with_name("backends") / "nvidia" / "bin"
    done = subprocess.run(
        [tools / "cuobjdump", "-sass", BUILT / f"{source}.o"],
        env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?(\w+)", done.stdout, re.M))


def test_the_library_has_cuda_kernels_and_no_path_of_this_machine():
    info = _extension.build_info()
    assert info["cuda"] == "sm90" and re.fullmatch(r"\d+\.\d+", info["cuda_version"])
    library = _extension.kernels_path().read_bytes()
    # The checkout, the toolkit's headers and nvcc's intermediate files.
    paths = [str(ROOT), "targets/x86_64-linux", "tmpxft"]
    assert [path for path in paths if path.encode() in library] == []


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_no_kernel_spills_or_waits(source):
    text = report(source)
    assert "Compiling entry function" in text and "0 bytes spill stores" in text
    assert wrong(text) == []


@pytest.mark.parametrize("source", ATTENTION, ids=str)
def test_attention_runs_on_warpgroup_products_and_bulk_copies(source):
    assert instructions(source) >= INSTRUCTIONS


@pytest.mark.parametrize(
    "line",
    [
        "    8 bytes stack frame, 0 bytes spill stores, 4 bytes spill loads",
        "ptxas warning : Registers are spilled to local memory in function 'f', 24 bytes spill",
        "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are "
        "serialized due to non wgmma instructions defining accumulator registers in 'f'",
        "ptxas info : (C7508) Potential Performance Loss: 'setmaxnreg' ignored",
    ],
)
def test_the_test_sees_what_it_is_for(line):
    clean = "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
    clean += "ptxas info : (C7517) warpgroup.wait is injected in around line 1 by compiler\n"
    assert wrong(clean) == [] and wrong(clean + line) == [line]
