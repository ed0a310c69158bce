"""The family of mma.sync kernels: its members, their oracle, and what their results must be."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.cases import AttentionCase, Inputs
from tests.gpu.shared import OPS, Recipe
from tests.numerics import Expected, assert_within_budget, expect, same_bits
from torch_sage.recipes import SUPPORT

SM89 = SUPPORT["cuda.sm89"]  # all that the kernels do
MEAN_ROWS, MEAN_PART = 128, 8  # of csrc/quantize/mma/tile_mean.cuh
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp16_fp16": torch.float16}


class Member(NamedTuple):
    """One of the family: the formats of Q and K, and of P and V with their accumulator."""

    qk: str
    pv: str

    def __str__(self) -> str:
        """Return the name of a test's parameter."""
        return f"{self.qk}-{self.pv}"

    def recipe(self, granularity: str = "thread", smooth: str = "k") -> Recipe:
        """Return the arguments of ``sdpa`` that choose the member."""
        return {"qk": self.qk, "granularity": granularity, "pv": self.pv, "smooth": smooth}


MEMBERS = [Member(qk, pv) for qk in SM89.qk for pv in SM89.pv]


def expected(inputs: Inputs, recipe: Recipe, device: str = "cuda") -> Expected:
    """Return the references, on a device, with the means that the kernels take.

    Rows of a warp are fewer where it has more channels.
    """
    means: dict[str, Any] = {}
    _, _, key_mean, _, _, value_mean = OPS.mma_prepare_kv(inputs.key, inputs.value, **recipe)
    if "k" in recipe["smooth"]:
        means["key_mean"] = key_mean
    if "v" in recipe["smooth"]:
        means["value_mean"] = value_mean[..., : inputs.value.shape[3]].contiguous()
    if "q" in recipe["smooth"]:
        means["query_mean"] = query_means(inputs.query)
    widest = max(inputs.query.shape[3], inputs.value.shape[3])
    accumulator = None  # that of the GPUs that have the products
    if recipe["pv"] == "e4m3_fp16" and torch.cuda.get_device_capability() == (9, 0):
        accumulator = "fp16_converted"
    warp = 32 if widest <= 128 else 16
    inputs = inputs.on(device)
    means = {name: mean.to(device) for name, mean in means.items()}
    return expect(*inputs, **recipe, **means, warp=warp, accumulator=accumulator)


def query_means(query: Tensor) -> Tensor:
    """Return the mean of every 128 rows, [B, H, blocks, D], summed as the kernels sum.

    Another order moves codes that lie on a tie, each by more than the error of all that follows.
    """
    rows = query.shape[2]
    blocks = torch.nn.functional.pad(query.float(), (0, 0, 0, -rows % MEAN_ROWS)) / MEAN_ROWS
    blocks = blocks.unflatten(2, (-1, MEAN_ROWS // MEAN_PART, MEAN_PART))
    parts, sums = torch.zeros_like(blocks[..., 0, :]), torch.zeros_like(blocks[..., 0, 0, :])
    for i in range(MEAN_PART):
        parts = parts + blocks[..., i, :]
    for i in range(parts.shape[3]):
        sums = sums + parts[..., i, :]
    valid = [min(MEAN_ROWS, rows - first) for first in range(0, rows, MEAN_ROWS)]
    share = MEAN_ROWS / torch.tensor(valid, dtype=torch.float32, device=query.device)
    means = sums * share[:, None]
    return torch.where(means.isfinite(), means, 0.0)


def assert_right(inputs: Inputs, recipe: Recipe) -> None:
    """Require ``sdpa`` and ``sdpa_with_lse`` to be what the recipe specifies."""
    output, lse = OPS.sdpa_with_lse(*inputs, **recipe)
    # References are many small operations, with which workers that share a GPU wait for each other;
    # only the emulated accumulator of the FP8 products is so long that the GPU is quicker.
    device = "cuda" if recipe["pv"] == "e4m3" else "cpu"
    assert_within_budget(output.to(device), expected(inputs, recipe, device), lse=lse.to(device))
    assert same_bits(OPS.sdpa(*inputs, **recipe), output)


def overflows(member: Member, case: AttentionCase) -> bool:
    """Return whether V is too large for 16-bit sums, which only FP8 scales away."""
    return member.pv == "fp16_fp16" and case.data == "largest_half"
