"""Compile the Triton kernels for GPUs that are not here.

``python -m tests.triton.compile_targets`` writes JSON: registers, spills and matrix instructions of
every kernel on every target, read from its machine code.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.cases import DTYPES
from torch_sage import devices
from torch_sage.ops import triton_attention, triton_quantize, triton_statistics

TARGETS = (80, 89, 90, 100, 120)
QUANTIZER_TARGETS = (75, *TARGETS)  # Triton has no tensor cores for 7.5, which attention needs
AMD_TARGETS = {"gfx942": 64, "gfx1100": 32}  # MI300, RX 7900, and the lanes of their warps
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
MATRIX_INSTRUCTION = re.compile(
    r"\b(UTCIMMA|UTCHMMA|IGMMA|HGMMA|IMMA\.\w+\.S8|HMMA\.\w+\.F32|v_mfma_i32|v_wmma_i32|"
    r"v_mfma_f32|v_wmma_f32)"
)


def compile_for(
    arch: int | str,
    kernel: Any,
    constants: dict[str, Any],
    types: dict[str, str],
    options: dict[str, Any],
) -> dict[str, Any]:
    """Compile ``kernel`` for a compute capability or AMD GPU; return what its code is made of."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    # What the launcher finds out about real arguments: 16-byte alignment of pointers and strides.
    aligned = [[["tt.divisibility", 16]], ("*",), ("stride_b", "stride_h", "stride_n", "channels")]
    attributes = {
        (i,): aligned[0]
        for i, name in enumerate(names)
        if signature[name].startswith(aligned[1]) or name.endswith(aligned[2])
    }
    source = ASTSource(kernel, signature, constants, attributes)
    if isinstance(arch, str):
        target = GPUTarget("hip", arch, AMD_TARGETS[arch])
        return amd_code(arch, triton.compile(source, target=target, options=options).asm["amdgcn"])
    code = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        usage, machine_code = (
            subprocess.run(
                [CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for option in ("-res-usage", "-sass")
        )
    return {
        "arch": arch,
        "stack": max(int(size) for size in re.findall(r"STACK:(\d+)", usage)),
        "registers": max(int(count) for count in re.findall(r"REG:(\d+)", usage)),
        "local": len(re.findall(r"\b(?:LDL|STL)\b", machine_code)),
        "waits": len(re.findall(r"\bWARPGROUP\.DEPBAR", machine_code)),
        "instructions": Counter(MATRIX_INSTRUCTION.findall(machine_code)),
    }


def amd_code(arch: str, assembly: str) -> dict[str, Any]:
    """Return the same of AMD's assembly, as far as it tells."""
    spills, stack = (
        sum(int(size) for size in re.findall(rf"\.{name}:\s*(\d+)", assembly))
        for name in ("[sv]gpr_spill_count", "private_segment_fixed_size")
    )
    instructions = Counter(MATRIX_INSTRUCTION.findall(assembly))
    return {"arch": arch, "stack": stack, "local": spills, "instructions": instructions}


def attention(
    arch: int | str, head_dim: int, half: str, causal: bool, packed: bool
) -> dict[str, Any]:
    """Compile the attention of the default recipe, with the bias of a smoothed Q besides."""
    is_amd = isinstance(arch, str)
    generation = None if isinstance(arch, str) else arch // 10
    with (
        patch.object(devices, "generation", lambda index: generation),
        patch.object(torch.version, "hip", "" if is_amd else None),
    ):
        tile = triton_attention.tile_for(head_dim, head_dim, torch.device("cuda", 0))
    constants = {
        "PACKED": packed,
        "IS_NEGATIVE": False,
        "CAUSAL": causal,
        "MASK": "none",
        "HAS_BIAS": True,
        "HAS_VALUE_SCALES": False,
        "HAS_VALUE_MEAN": False,
        "WANTS_LSE": False,
        "HAS_LSE_SHIFT": False,
        "BLOCK_N": tile.rows,
        "BLOCK_M": tile.keys,
        "BLOCK_D": head_dim,
        "BLOCK_DV": head_dim,
        "EVEN_D": True,
        "EVEN_DV": True,
        "WIDE": False,
        "QUERY_BLOCK": 1,
        "QUERY_SPAN": 1,
        "QUERY_LANE_ROWS": 8,
        "KEY_BLOCK": 128,
        "KEY_SPAN": 128,
        "KEY_LANE_ROWS": 8,
        "BASE2": triton_attention.LOG2_E,
        "NATURAL": triton_attention.LN_2,
        "LARGEST": triton_attention.FP32_MAX,
        "LARGEST_OUTPUT": torch.finfo(DTYPES[half]).max,
        "key_stride_d": 1,
        "value_stride_d": 1,
    }
    types = dict.fromkeys(("query_scales", "key_scales", "value_scales", "value_mean"), "*fp32")
    types |= dict.fromkeys(("score_bias", "mask", "lse", "lse_shift"), "*fp32")
    types |= dict.fromkeys(("query", "key"), "*i8") | dict.fromkeys(("value", "output"), f"*{half}")
    types |= {"magnitude": "fp32", "starts_q": "*i32", "starts_k": "*i32"}
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    kernel = triton_attention._attention_kernel
    return compile_for(arch, kernel, constants, types, options)


def quantize(arch: int | str, head_dim: int, half: str, span: int, packed: bool) -> dict[str, Any]:
    """Compile the quantizer of K, per row or per span of rows."""
    tile = triton_quantize.TILE_ROWS if span == 1 else span
    constants = {
        "PACKED": packed,
        "BLOCK": span,
        "HAS_MEAN": True,
        "TILE": tile,
        "SPAN": span,
        "LANE_ROWS": 8 if span == 1 else 2,
        "BLOCK_D": head_dim,
        "LARGEST": triton_quantize.LARGEST_CODE,
        "SCALE": triton_quantize.SCALE_OF_AMAX,
        "FLOOR": triton_quantize.AMAX_FLOOR,
        "ROUNDER": triton_quantize.ROUND_TO_INTEGER,
        "INFINITY": triton_quantize.INFINITY_BITS,
        "stride_d": 1,
    }
    types = {"x": f"*{half}", "mean": "*fp32", "codes": "*i8", "scales": "*fp32", "starts": "*i32"}
    options = triton_quantize.launch_options(tile, head_dim)
    return compile_for(arch, triton_quantize._rows_kernel, constants, types, options)


def statistic(arch: int | str, head_dim: int, half: str, is_mean: bool) -> dict[str, Any]:
    """Compile what adds up, or compares, chunks of packed sequences."""
    constants = {
        **triton_statistics.constants(head_dim, is_mean=is_mean, is_packed=True),
        "HAS_MEAN": not is_mean,
        "stride_d": 1,
    }
    options = {name: constants.pop(name) for name in ("enable_fp_fusion", "num_warps")}
    types = {"x": f"*{half}", "mean": "*fp32", "starts": "*i32"}
    types["partials"] = "*fp32" if is_mean else "*i32"
    return compile_for(arch, triton_statistics._chunk_kernel, constants, types, options)


def main() -> None:
    """Print what every kernel compiles to on every target."""
    report = []
    for arch in TARGETS:
        for head_dim, half, causal, packed in (
            (64, "fp16", False, False),
            (128, "bf16", True, False),
            (128, "bf16", True, True),
            (256, "bf16", True, False),
        ):
            code = attention(arch, head_dim, half, causal, packed)
            kind = "packed" if packed else "batch"
            report.append({"name": f"attention {head_dim} {half} {kind}", **code})
    for amd in AMD_TARGETS:
        for head_dim, half, packed in ((64, "fp16", False), (128, "bf16", True)):
            code = attention(amd, head_dim, half, True, packed)
            report.append({"name": f"attention {head_dim} {half}", **code})
    for arch in (*QUANTIZER_TARGETS, *AMD_TARGETS):
        for span in (1, 64):
            code = quantize(arch, 128, "bf16", span, packed=span == 1)
            report.append({"name": f"quantize {span}", **code})
        for is_mean in (True, False):
            code = statistic(arch, 128, "bf16", is_mean)
            report.append({"name": f"statistic {is_mean}", **code})
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
