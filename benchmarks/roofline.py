"""An estimate of what the mma.sync kernels reach on GPUs that they were not measured on.

``python -m benchmarks.roofline`` counts the instructions that the built kernels run for a tile of
64 keys (tests/csrc/sass.py) and divides the work by the time that the slowest unit needs for it, at
published rates and boost clocks. Beside the published speed of the SageAttention papers' kernels of
the same formats. It knows nothing of memory, latency, power limits or quantization.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from tests.csrc import sass

KEYS, WIDTH = 64, 128  # of the tile and of the kernel
SCHEDULERS = 4  # of a multiprocessor: each issues an instruction of a warp per clock
LANES = 32  # of a warp
MUFU_LANES = 16  # of a multiprocessor, on every GPU below
FP32 = ("FFMA", "FADD", "FMUL")


class Gpu(NamedTuple):
    """Published numbers: dense TFLOPS of the tensor cores at the boost clock."""

    architecture: str
    multiprocessors: int
    gigahertz: float
    fp32_lanes: int  # of a multiprocessor
    tflops: dict[str, float]  # by format of Q and K, or of P and V with its accumulator
    papers: dict[str, int]  # TOPS of their kernels at 16k or 32k tokens, D = 128, unmasked


GPUS = {
    "A100": Gpu(
        "sm_80",
        108,
        1.410,
        64,
        {"int8": 624, "int4": 1248, "bf16": 312, "fp16": 312, "fp16_fp16": 312},
        {"int8, fp16": 278},
    ),
    "RTX 3090": Gpu(
        "sm_86",
        82,
        1.695,
        128,
        {"int8": 284, "int4": 568, "bf16": 71, "fp16": 71, "fp16_fp16": 142},
        {"int8, fp16_fp16": 136},
    ),
    "RTX 4090": Gpu(
        "sm_89",
        128,
        2.520,
        128,
        {
            "int8": 660.6,
            "int4": 1321.2,
            "bf16": 165.2,
            "fp16": 165.2,
            "fp16_fp16": 330.3,
            "e4m3": 330.3,
            "e4m3_fp16": 660.6,
        },
        {
            "int8, fp16_fp16": 323,
            "int8, e4m3": 431,
            "int8, e4m3_fp16": 493,
            "int4, e4m3": 489,
            "int4, e4m3_fp16": 640,
        },
    ),
    "L40S": Gpu(
        "sm_89",
        142,
        2.520,
        128,
        {
            "int8": 733,
            "int4": 733,
            "bf16": 366.5,  # printed: 362, at a lower clock
            "fp16": 366.5,
            "fp16_fp16": 366.5,
            "e4m3": 733,
            "e4m3_fp16": 733,
        },
        {},
    ),
    "RTX 5090": Gpu(
        "sm_120a",
        170,
        2.407,
        128,
        {
            "int8": 838,
            "int4": 838,  # by INT8 products
            "bf16": 209.5,
            "fp16": 209.5,
            "fp16_fp16": 419,
            "e4m3": 419,
            "e4m3_fp16": 838,
        },
        {"int8, e4m3": 554, "int8, e4m3_fp16": 643},
    ),
}


class Estimate(NamedTuple):
    """TFLOPS by what limits them."""

    tensor: float  # the two products
    issue: float  # one instruction a clock
    exponentials: float
    fp32: float

    @property
    def most(self) -> float:
        """All units at once."""
        return min(self)

    @property
    def least(self) -> float:
        """The products wait for the rest, and the rest for them."""
        return 1 / (1 / self.tensor + 1 / min(self[1:]))


def estimate(gpu: Gpu, member: str, counts: Counter[str], rows: int) -> Estimate:
    """Return what a warp of so many query rows that runs ``counts`` for a tile can reach."""
    qk, pv = member.split(", ")
    flops = 4 * rows * KEYS * WIDTH
    clocks = 1e9 * gpu.gigahertz * gpu.multiprocessors / 1e12  # 1e12 of all multiprocessors, per s

    def by_lanes(instructions: int, lanes: int) -> float:
        return flops * clocks * lanes / (instructions * LANES)

    return Estimate(
        tensor=2 / (1 / gpu.tflops[qk] + 1 / gpu.tflops[pv]),
        issue=flops * clocks * SCHEDULERS / sum(counts.values()),
        exponentials=by_lanes(counts["MUFU"], MUFU_LANES),
        fp32=by_lanes(sum(counts[name] for name in FP32), gpu.fp32_lanes),
    )


def table() -> str:
    """Return the estimates as Markdown."""
    lines = [
        "| GPU | kernel | instructions | tensor cores | issue | exponentials | fp32 "
        "| estimate, TFLOPS | papers |",
        "|---" * 9 + "|",
    ]
    for name, gpu in GPUS.items():
        for family in ("sm80", "sm89"):
            path = sass.BUILT / "attention" / family / f"attention_d{WIDTH}.cu.o"
            if gpu.architecture not in sass.contents(path) and family == "sm89":
                continue  # no FP8 there
            architecture = gpu.architecture
            if architecture not in sass.contents(path):
                architecture = "sm_86"  # whose code an 8.9 runs
            for mangled, code in sorted(sass.kernels(path, architecture).items()):
                qk, pv, _, has_mask = sass.member(mangled)
                if has_mask:
                    continue
                member = f"{qk}, {pv}"
                counts = Counter(instruction.opcode for instruction in sass.tile(code))
                found = estimate(gpu, member, counts, rows=32)
                cells = " | ".join(f"{value:.0f}" for value in found)
                measured = gpu.papers.get(member, "")
                lines.append(
                    f"| {name} | {member} | {sum(counts.values())} | {cells} "
                    f"| {found.least:.0f} to {found.most:.0f} | {measured} |"
                )
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    print(table())


if __name__ == "__main__":
    main()
