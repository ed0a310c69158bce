"""What a tensor core does to P and V: the formats of P (2.5) and the accumulators (2.7).

An accumulator takes ``start`` [..., N, Dv], adds P [..., N, keys] times V [..., keys, Dv] and
returns what the hardware would hold afterwards, as fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from torch_sage.reference.quantize import E4M3_MAX, E4M3_RANGES, FP16_FORMATS

E4M3_MAX_CODE = 126  # of 448; 127 is NaN

Accumulator = Callable[[Tensor, Tensor, Tensor], Tensor]

# Fraction bits that an FP8 MMA keeps of each term below the largest exponent among the 33 terms
# (32 products and the accumulator), truncating toward zero: measured on H100.
FP8_FRACTION_BITS = 13
FP8_STEP = 32
FP16_STEP = 16

DEFAULT_ACCUMULATOR = {
    "bf16": "fp32",
    "fp16": "fp32",
    "fp16_fp16": "fp16",
    "int8": "fp32",
    "e4m3": "fp22",
    "e4m3_fp16": "fp16",
}


def probability_shift(pv: str, probability_max: float | None = None) -> float:
    """Return c = log2 P_r: how far below the row maximum the exponent's origin lies."""
    if pv not in E4M3_RANGES:
        return 0.0
    top = E4M3_RANGES[pv][0] if probability_max is None else probability_max
    return torch.tensor(math.log2(top), dtype=torch.float32).item()


def round_probabilities(p: Tensor, pv: str) -> Tensor:
    """Return the values that P has after its cast, as fp32."""
    if pv == "bf16":
        return p.bfloat16().float()
    if pv in FP16_FORMATS:
        return p.half().float()
    if pv == "int8":
        return (p * 127).round() * torch.tensor(1 / 127, dtype=torch.float32)
    return p.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).float()


def linear_probabilities(x: Tensor) -> Tensor:
    """Return 2**x in E4M3 with a mantissa linear in x, truncated, as fp32.

    E4M3 has 8 codes to a power of two and code 56 for 1, so the code is an affine function of x
    and no exponential is needed. Relative to 2**x: -8.3 to +6.1 %. So little is added to it that
    the largest score of a row, whose x may be rounded down, does not get the code below its own.
    """
    codes = (8 * x + (56 + 2.0**-8)).trunc().clamp(0, E4M3_MAX_CODE)
    values = codes.nan_to_num(0).to(torch.uint8).view(torch.float8_e4m3fn).float()
    return torch.where(x.isnan(), torch.nan, values)


def sums_rounded_probabilities(pv: str) -> bool:
    """Return whether the row sum is taken from the rounded P by default (2.6)."""
    return pv not in E4M3_RANGES


def accumulate_fp32(start: Tensor, p: Tensor, v: Tensor) -> Tensor:
    """Accumulate in fp32: 16-bit and INT8 operands on every device."""
    return start + p @ v


def accumulate_fp22(start: Tensor, p: Tensor, v: Tensor) -> Tensor:
    """Accumulate E4M3 products as Ada and Hopper do in "fp32": 13 fraction bits, truncated."""
    for step in range(0, p.shape[-1], FP8_STEP):
        start = _fp8_step(start, p[..., step : step + FP8_STEP], v[..., step : step + FP8_STEP, :])
    return start


def accumulate_fp8_fp16(start: Tensor, p: Tensor, v: Tensor) -> Tensor:
    """Accumulate E4M3 products in fp16: aligned as in fp22, then rounded to the nearest fp16."""
    for step in range(0, p.shape[-1], FP8_STEP):
        p_step, v_step = p[..., step : step + FP8_STEP], v[..., step : step + FP8_STEP, :]
        start = _fp8_step(start, p_step, v_step).half().float()
    return start


def accumulate_fp16(start: Tensor, p: Tensor, v: Tensor, k: int = FP16_STEP) -> Tensor:
    """Accumulate fp16 products in fp16, rounding once per ``k`` of them."""
    for step in range(0, p.shape[-1], k):
        p_step, v_step = p[..., step : step + k], v[..., step : step + k, :]
        start = (start + p_step @ v_step).half().float()
    return start


def accumulate_converted(start: Tensor, p: Tensor, v: Tensor) -> Tensor:
    """Accumulate E4M3 products as compute capability 9.0 does, which has none in mma.sync.

    It converts both to fp16 and adds eight products at a time, as sums on an H100 show.
    """
    return accumulate_fp16(start, p, v, k=8)


def select_accumulator(pv: str, name: str | None) -> Accumulator:
    """Return the accumulator called ``name``, or the default of format ``pv``.

    Raises:
        ValueError: if no hardware accumulates ``pv`` that way.
    """
    name = DEFAULT_ACCUMULATOR[pv] if name is None else name
    is_e4m3 = pv in E4M3_RANGES
    choices: dict[str, Accumulator] = {"fp32": accumulate_fp32}
    if is_e4m3:
        choices |= {"fp22": accumulate_fp22, "fp16": accumulate_fp8_fp16}
        choices |= {"fp16_converted": accumulate_converted}
    elif pv in FP16_FORMATS:
        choices |= {"fp16": accumulate_fp16}
    if name not in choices:
        raise ValueError(f"accumulator must be one of {list(choices)} for pv={pv}, got {name!r}")
    return choices[name]


def _fp8_step(start: Tensor, p: Tensor, v: Tensor) -> Tensor:
    """One k=32 MMA: truncate each of the 33 terms on a common grid, then add them exactly.

    Products of two E4M3 values have 8 significant bits and are exact in fp32; the sum spans at most
    13 + 6 bits, so it is exact, too.
    """
    terms = torch.cat((p.unsqueeze(-1) * v.unsqueeze(-3), start.unsqueeze(-2)), dim=-2)
    largest = terms.abs().amax(-2, keepdim=True)
    exponent = torch.frexp(largest).exponent - 1  # largest = 1.xxx * 2**exponent
    grid = torch.ldexp(torch.ones_like(largest), exponent - FP8_FRACTION_BITS)
    truncated = (terms / grid).trunc() * grid
    return torch.where(largest > 0, truncated, largest).sum(-2)
