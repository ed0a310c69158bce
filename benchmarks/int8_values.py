"""What 8-bit P and V would cost in accuracy: error by where the reference maximum of P moves.

``python -m benchmarks.int8_values`` prints the table of docs/kernels/hopper.md. P is an unsigned
byte, 255 at the reference maximum of its row; V has 8 bits per channel and 1024 keys; Q and K are
those of the recipe. Sums are exact, so this is the least error of any kernel that does so.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

from torch_sage import reference
from torch_sage.reference.quantize import value_shift

KEYS, ROWS, CHANNELS, STEP, GROUP, WARP = 4096, 256, 128, 64, 1024, 16
LOG2_E = math.log2(math.e)


def operands() -> tuple[Tensor, Tensor, Tensor]:
    """Return base-2 logits [rows, keys], values [keys, channels] as quantized, and the answer."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, 1, n, CHANNELS, generator=generator).bfloat16() for n in (ROWS, KEYS, KEYS)
    )
    q_codes, q_scales = reference.quantize_query(q)
    k_codes, k_scales, _ = reference.quantize_key(k, granularity="token_thread")
    group_of_key, _ = reference.key_groups(KEYS, "token_thread", STEP)
    keys = k_codes * k_scales[..., group_of_key, None]
    scores = (q_codes * q_scales[..., None]) @ keys.mT / CHANNELS**0.5
    codes, scales, mean = reference.quantize_value(v, smooth=True, pv="int8", group=GROUP)
    shift = value_shift(v, mean, codes, scales, GROUP).float()
    of_keys = torch.arange(KEYS) // GROUP
    values = codes * scales[:, :, of_keys] + shift[:, :, of_keys]
    exact = torch.softmax(q.double() @ k.double().mT / CHANNELS**0.5, -1) @ v.double()
    return scores[0, 0] * LOG2_E, values[0, 0], exact[0, 0]


def attend(z: Tensor, values: Tensor, period: int, power_of_two: bool) -> tuple[Tensor, float]:
    """Return the output, and how often a warp rescales its sums per step of 64 keys.

    Args:
        z: base-2 logits.
        values: V.
        period: keys after which the reference maxima start afresh.
        power_of_two: whether sums can only be halved and doubled, inside a group of V.
    """
    weights = torch.zeros_like(z)
    reference_max = torch.full((ROWS,), -math.inf)
    rescaled = 0.0
    for step in reversed(range(KEYS // STEP)):
        keys = slice(step * STEP, (step + 1) * STEP)
        top, end = z[:, keys].amax(1), (step + 1) * STEP
        moves = torch.full((ROWS,), end % period == 0) | (top > reference_max)
        if end % GROUP == 0 or not power_of_two:
            moved = top
        else:
            moved = reference_max + (top - reference_max).ceil()
        reference_max = torch.where(moves, moved, reference_max)
        if end % GROUP:  # a group's sums begin with zeros
            rescaled += moves.view(-1, WARP).any(1).float().mean().item()
        codes = (255 * (z[:, keys] - reference_max[:, None]).exp2()).round().clamp(0, 255)
        weights[:, keys] = codes * reference_max[:, None].exp2()
    return weights @ values / weights.sum(1, keepdim=True), rescaled / (KEYS // STEP)


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    z, values, exact = operands()

    def error(output: Tensor) -> float:
        return ((output - exact).abs().sum() / exact.abs().sum()).item()

    print("| reference maximum | error | rescaled, per step of 64 keys | in powers of two |")
    print("|--|--|--|--|")
    rounded = torch.softmax(z / LOG2_E, -1) @ values
    print(f"| P not rounded | {error(rounded):.4f} | | |")
    for period in (KEYS, GROUP, 512, 256, 128, 64):
        output, moves = attend(z, values, period, power_of_two=False)
        coarse, _ = attend(z, values, period, power_of_two=True)
        print(f"| of {period} keys | {error(output):.4f} | {moves:.2f} | {error(coarse):.4f} |")


if __name__ == "__main__":
    main()
