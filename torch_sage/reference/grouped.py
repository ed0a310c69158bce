"""Attention whose V has scales for groups of keys, as on Hopper's tensor cores.

Inside a group E4M3 products are summed in fp16, which is flushed to fp32 at its end, and bf16 ones
in fp32 at once; a channel of ones behind V sums P in the same way. Keys are taken from the last to
the first, and the maximum that P is relative to follows late: fewer rescalings, at most 2**lag
above the nominal range of P.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_sage.reference.accumulate import (
    DEFAULT_ACCUMULATOR,
    linear_probabilities,
    round_probabilities,
    select_accumulator,
)
from torch_sage.reference.operands import Operands, logits_base2

# Of the formats that there are such kernels for.
ACCUMULATORS = {pv: DEFAULT_ACCUMULATOR[pv] for pv in ("e4m3_fp16", "bf16")}

# Rows whose reference maxima move together: those of one warp of a 64-row wgmma.
WARP_ROWS = 16

# Of 64 keys, the columns from here on take the linear mantissa where the exponential is "mixed".
LINEAR_PERIOD, LINEAR_START = 64, 16


def online_by_groups(
    ops: Operands, pv: str, exponential: str, tile: int, shift: float, one: float, lag: float
) -> tuple[Tensor, Tensor]:
    """E8-E12 with steps of ``tile`` keys that do not cross groups; output and lse in fp32.

    Args:
        ops: the operands.
        pv: "e4m3_fp16" or "bf16".
        exponential: "exact" or "mixed".
        tile: keys of a step.
        shift: log2 of P at the reference maximum.
        one: code of the ones that sum P.
        lag: how far in base 2 a row may exceed its reference maximum before it moves.
    """
    rows, device = ops.query_codes.shape[:-1], ops.query_codes.device
    accumulate = select_accumulator(pv, None)
    held_in = torch.float16 if ACCUMULATORS[pv] == "fp16" else torch.float32
    reference = torch.full(rows, -torch.inf, device=device)
    total = torch.zeros(rows, device=device)
    ones = ops.value_codes.new_full((*ops.value_codes.shape[:-1], 1), one, dtype=torch.float32)
    values = torch.cat((ops.value_codes.float(), ones), dim=-1)
    flushed = torch.zeros(*rows, values.shape[-1], device=device)
    for keys_of_group, scales, of_group, reads in reversed(list(ops.value_groups())):
        held = torch.zeros_like(flushed)
        for start in reversed(range(keys_of_group.start, keys_of_group.stop, tile)):
            keys = slice(start, min(start + tile, keys_of_group.stop))
            z = logits_base2(ops, keys)
            moved = _move(reference, z.amax(-1), lag)
            alpha = torch.where(reference == moved, 1.0, (reference - moved).exp2())
            reference = moved
            origin = reference.masked_fill(reference == -torch.inf, 0.0)
            x = z - origin[..., None] + shift
            error = ops.probability_error(origin)[..., None]
            p = x.exp2() * (1 + error)
            rounded = round_probabilities(p, pv)
            if exponential == "mixed":
                column = torch.arange(keys.start, keys.stop, device=device) % LINEAR_PERIOD
                linear = linear_probabilities(x + error.log1p() / math.log(2))
                rounded = torch.where(column >= LINEAR_START, linear, rounded)
            total = alpha * total + p.sum(-1)
            flushed = alpha[..., None] * flushed
            held = (alpha.to(held_in).float()[..., None] * held).to(held_in).float()
            held = accumulate(held, rounded, values[..., keys, :])
        sums = held[..., -1:] / one
        values_of_group = held[..., :-1] * scales + of_group.float() * sums
        added = torch.cat((values_of_group, sums), dim=-1)
        flushed = flushed + torch.where(reads[..., None], added, 0.0)
    output = flushed[..., :-1] / flushed[..., -1:]
    lse = math.log(2) * (reference - shift + total.log2()) + ops.lse_shift.float()
    attends = total != 0
    return (
        torch.where(attends[..., None], output, 0.0),
        torch.where(attends, lse, -torch.inf),
    )


def _move(reference: Tensor, top: Tensor, lag: float) -> Tensor:
    """Return the new reference maxima: of whole warps, where one row exceeds its own by ``lag``."""
    exceeds = top > reference + lag
    warps = -(-exceeds.shape[-1] // WARP_ROWS)
    padded = torch.nn.functional.pad(exceeds, (0, -exceeds.shape[-1] % WARP_ROWS))
    by_warp = padded.reshape(*exceeds.shape[:-1], warps, WARP_ROWS).any(-1)
    moves = by_warp.repeat_interleave(WARP_ROWS, -1)[..., : exceeds.shape[-1]]
    return torch.where(moves, torch.maximum(reference, top), reference)
