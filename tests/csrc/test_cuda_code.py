"""What the compiler made of the CUDA kernels: no spill in loops, no serialized wgmma, the opcodes.

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
        if "Potential Performance Loss" in line
        or not ALLOWED.issuperset(re.findall(r"\((C\d{4})\)", line))
    ]


def spills(text: str) -> bool:
    """Return whether a report has a spilled register."""
    return re.search(r"\b[1-9]\d* bytes spill", text) is not None


def disassembly(source: Path) -> list[tuple[int, str]]:
    """Return address and text of every instruction of an object file, predicates left out."""
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
    line = r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?(.*?);"
    return [(int(at, 16), text) for at, text in re.findall(line, done.stdout, re.M)]


def opcodes(code: list[tuple[int, str]]) -> list[str]:
    """Return the opcodes, without their modifiers."""
    return [re.split(r"[. ]", text)[0] for _, text in code]


def main_loop(code: list[tuple[int, str]]) -> list[str]:
    """Return the opcodes of the shortest loop that multiplies both by K and by V."""
    index = {at: i for i, (at, _) in enumerate(code)}
    loops = []
    for i, (at, text) in enumerate(code):
        target = re.match(r"BRA.*?(0x[0-9a-f]+)", text)
        start = int(target[1], 16) if target else at
        if start < at and start in index:
            loops.append(opcodes(code[index[start] : i + 1]))
    return min((loop for loop in loops if {"IGMMA", "QGMMA"} <= set(loop)), key=len)


def test_the_library_has_cuda_kernels_and_no_path_of_this_machine():
    info = _extension.build_info()
    assert info["cuda"] == "sm80,sm89,sm90" and re.fullmatch(r"\d+\.\d+", info["cuda_version"])
    library = _extension.kernels_path().read_bytes()
    # The checkout, the toolkit's headers and nvcc's intermediate files.
    paths = [str(ROOT), "targets/x86_64-linux", "tmpxft"]
    assert [path for path in paths if path.encode() in library] == []


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_no_wgmma_is_serialized(source):
    text = report(source)
    assert "Compiling entry function" in text
    assert wrong(text) == []


@pytest.mark.parametrize("source", [s for s in SOURCES if s not in ATTENTION], ids=str)
def test_quantizers_spill_nothing(source):
    assert "0 bytes spill stores" in report(source) and not spills(report(source))


# Attention needs all registers; between pieces of work some words may wait in local memory, in the
# loop over the keys none. With a mask there are not enough (docs/kernels/hopper.md).
@pytest.mark.parametrize("source", ATTENTION, ids=str)
def test_attention_has_its_instructions_and_a_loop_without_local_memory(source):
    code = disassembly(source)
    assert set(opcodes(code)) >= INSTRUCTIONS
    if "masked" not in source.name:
        loop = main_loop(code)
        assert len(loop) < 500  # the common case alone
        assert not {"LDL", "STL"} & set(loop)


@pytest.mark.parametrize(
    "line",
    [
        "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are "
        "serialized due to non wgmma instructions defining accumulator registers in 'f'",
        "ptxas info : (C7508) Potential Performance Loss: 'setmaxnreg' ignored",
    ],
)
def test_the_test_sees_what_it_is_for(line):
    assert spills("    8 bytes stack frame, 0 bytes spill stores, 4 bytes spill loads")
    clean = "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
    clean += "ptxas info : (C7517) warpgroup.wait is injected in around line 1 by compiler\n"
    assert wrong(clean) == [] and wrong(clean + line) == [line]
