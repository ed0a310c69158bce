"""What the compiler made of the CUDA kernels: no spill in loops, no serialized wgmma, the opcodes.

No GPU is needed: the build keeps what ptxas reports beside each object file.
"""

from __future__ import annotations

import itertools
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests.csrc import sass
from tests.csrc.isas import ROOT
from torch_sage import _extension

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")

CSRC = ROOT / "csrc"
SOURCES = sorted(path.relative_to(CSRC) for path in CSRC.rglob("*.cu"))
ATTENTION = [path for path in SOURCES if path.stem.startswith("attention")]
HOPPER = [path for path in ATTENTION if "sm90" in path.parts]
MMA = [path for path in ATTENTION if path not in HOPPER]
# What setup.py compiles a folder for where TORCH_CUDA_ARCH_LIST does not restrict it.
CODES = {
    "attention/sm80": {"sm_80", "sm_86", "sm_90", "sm_120a", "compute_80"},
    "attention/sm89": {"sm_89", "sm_90", "sm_120a", "compute_89"},
    "attention/sm90": {"sm_90a"},
    "quantize/mma": {"sm_80", "sm_89", "sm_90", "sm_120a", "compute_80"},
    "quantize/cuda": {"sm_90a"},
}
# What ptxas may say of a kernel beyond its size. C7517: it adds a wait in front of a wgmma whose
# registers it has to copy (docs/kernels/hopper.md); the others say that all wgmma wait in turn or
# that setmaxnreg is ignored.
ALLOWED = {"C7517"}


def products_of_warpgroups(source: Path) -> set[str]:
    """Return the opcodes of Q K, which is in INT8, and of P V, in FP8 or 16 bits."""
    return {"IGMMA", "HGMMA" if "bf16" in source.name else "QGMMA"}


def report(source: Path) -> str:
    return (sass.BUILT / f"{source}.o.ptxas").read_text()


def built(source: Path) -> Path:
    return sass.BUILT / f"{source}.o"


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


def reports(source: Path) -> dict[str, str]:
    """Return what ptxas says of each kernel, by its mangled name."""
    parts = re.split(r"Compiling entry function '(\w+)'", report(source))
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("source", [s for s in SOURCES if s not in ATTENTION], ids=str)
def test_all_but_attention_spills_nothing(source):
    found = reports(source)
    assert found and all("bytes spill stores" in text for text in found.values())
    assert [name for name, text in found.items() if spills(text) and not rotates(name)] == []


def rotates(name: str) -> bool:
    """Return whether a mangled name is that of a kernel that norms and rotates K and Q."""
    return re.search(r"PairingE[12]E", name) is not None


def test_what_rotates_keeps_some_words_of_a_group_in_local_memory_and_few_of_a_row():
    """It holds K and V and needs the tables. Less than a fiftieth of its instructions do that.

    In the loop over rows of the query, less than a hundredth.
    """
    kernels = sass.kernels(built(Path("quantize/cuda/prepare_kv.cu")), "sm_90a")
    full = [code for name, code in kernels.items() if rotates(name)]
    assert len(full) == 8  # pairings, widths, types
    for code in full:
        spilled = {i for i, instruction in enumerate(code) if instruction.opcode in sass.SPILLS}
        assert len(spilled) < len(code) / 50
        # The loop over groups is where blocks wait for their cluster.
        waits = {i for i, instruction in enumerate(code) if instruction.opcode == "UCGABAR_WAIT"}
        inner = [loop for loop in sass.loops(code) if waits.isdisjoint(loop)]
        assert inner and all(len(spilled.intersection(x)) <= len(x) / 100 for x in inner)


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_objects_have_the_code_of_every_gpu(source):
    assert set(sass.contents(built(source))) == CODES[source.parent.as_posix()]


# Attention needs all registers; between pieces of work some words may wait in local memory, in the
# loop over the keys none, with a mask or without.
@pytest.mark.parametrize("source", HOPPER, ids=str)
def test_hopper_has_its_instructions_and_a_loop_without_local_memory(source):
    (code,) = sass.kernels(built(source), "sm_90a").values()
    products = products_of_warpgroups(source)
    # And the bulk copy that feeds them.
    assert {instruction.opcode for instruction in code} >= {*products, "UBLKCP"}
    consumer = list(itertools.takewhile(lambda x: "USETMAXREG.DEALLOC" not in x.text, code))
    assert len(consumer) < len(code)  # the producer's comes behind
    loop = [consumer[i].opcode for i in sass.main_loop(consumer, products)]
    assert not sass.SPILLS & set(loop)
    if "masked" not in source.name:  # which has all kinds of masks in it
        assert len(loop) < 600  # the common case alone: a promotion has as many


def products(member: sass.Member, architecture: str) -> Counter[str]:
    """Return what a warp multiplies for a tile of 64 keys, counted by hand.

    IMMA takes 16 rows, 8 keys and 32 bytes or 64 nibbles of a channel, HMMA 16 rows, 8 channels and
    16 keys, QMMA 32. P in 16 bits is multiplied by a column of ones, too.
    """
    row_tiles = 1 if member.width == 256 else 2
    codes, channels_at_once = "IMMA.16832.S8.S8", 32
    if member.qk == "int4" and architecture in ("sm_80", "sm_86", "sm_89"):
        codes, channels_at_once = "IMMA.16864.S4.S4", 64
    counts = Counter({codes: row_tiles * 8 * member.width // channels_at_once})
    pairs = row_tiles * member.width // 8
    if member.pv.startswith("e4m3"):
        accumulator = "F16" if member.pv == "e4m3_fp16" else "F32"
        counts[f"QMMA.16832.{accumulator}.E4M3.E4M3"] = 2 * pairs
    else:
        wide = "HMMA.16816.F32.BF16" if member.pv == "bf16" else "HMMA.16816.F32"
        counts["HMMA.16816.F16" if member.pv == "fp16_fp16" else wide] += 4 * pairs
        counts[wide] += 4 * row_tiles
    return counts


GENERATIONS = {"sm80": ("sm_80", "sm_86", "sm_120a"), "sm89": ("sm_89", "sm_120a")}


@pytest.mark.parametrize(
    ("source", "architecture"),
    [(source, code) for source in MMA for code in GENERATIONS[source.parent.name]],
    ids=str,
)
def test_a_tile_has_the_products_counted_by_hand_and_its_numbers_in_registers(source, architecture):
    """Beside tails and the mean of Q, that is: the way through the loop over keys that is common.

    Sums and scores are in registers; beside those of 128 channels some addresses are not, to which
    less than a fiftieth of the instructions goes. Masks take registers that there are not.
    """
    members = set()
    for name, code in sass.kernels(built(source), architecture).items():
        member, tile = sass.member(name), sass.tile(code)
        members.add(member[:2])
        found = Counter(i.product for i in tile if i.opcode in sass.TENSOR_CORE)
        assert found == products(member, architecture), member
        spilled = sum(i.opcode in sass.SPILLS for i in tile)
        assert member.has_mask or spilled < len(tile) / 50, (member, spilled, len(tile))
    formats = ("e4m3", "e4m3_fp16") if "sm89" in source.parts else ("bf16", "fp16", "fp16_fp16")
    assert members == {(qk, pv) for qk in ("int8", "int4") for pv in formats}


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
