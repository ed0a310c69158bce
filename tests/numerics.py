"""The one definition of "close enough": derived budgets, never picked tolerances (style.md 6).

S64 is exact attention on the original inputs in fp64; R64 the oracle on the recipe's quantized
operands in fp64; R_low the oracle with the recipe's roundings. Every maximum runs per (batch, head,
64-row block): one maximum over a causal output would be owned by its first rows.

    budget(exact, naive) = 2 * (max|naive - exact| + eps(out.dtype) * max(max|exact|, tiny)
                                + eps(fp32) * terms)

where terms are the largest numbers that may cancel in an fp32 sum: max|value| for the output, once
for every addition of an accumulator, and |scale| * max|query row| * max|key row| for the lse, whose
parts smoothing sets apart.

    implementation   max|kernel - R64| <= budget(R64, R_low)    did we compute what we specified?
    accuracy         max|kernel - S64| <= budget(S64, R_low)    is what we specified good enough?
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_sage import reference
from torch_sage.reference import AttentionOutput

ROWS_PER_BLOCK = 64

# The paper promises cosine similarity .999 at the kernel level; 8-bit P and V take half of that.
MIN_COSINE = 0.999
MIN_ELEMENTS = 64  # one number has no angle, only a sign, and that of a sum that cancels is noise

# vdpbf16ps flushes subnormal fp32 operands and results, whatever the floating-point mode.
FLUSHED = torch.finfo(torch.float32).tiny


# P is rounded to 8 bits or fewer, so kernels evaluate 2**x with a relative error of up to 2**-18
# (3.8e-6; those of the CPU: 2.9e-6). The lse is the log of such a sum: it inherits that absolutely.
EXP2_ERROR = 2.0**-18

# Tensor cores add the products of 16 keys (32 of 8 bits) to an accumulator at once, and truncate.
KEYS_PER_ADDITION = 16


class Expected(NamedTuple):
    """What an attention kernel is compared with."""

    exact: AttentionOutput  # S64
    oracle: AttentionOutput  # R64
    naive: AttentionOutput  # R_low
    output_rounding: Tensor  # [B, Hq, 1]: eps(fp32) * terms
    lse_rounding: Tensor  # [B, Hq, 1]: eps(fp32) * terms, and the error of 2**x


def exact_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    causal: str = "none",
    scale: float | None = None,
) -> AttentionOutput:
    """Return S64: fp64 attention on unquantized operands, each argument as in torch."""
    group = query.shape[1] // key.shape[1]
    q, k, v = (x.double() for x in (query, key, value))
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    n, m = q.shape[2], k.shape[2]
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask.double()
    if causal != "none":
        diagonal = 0 if causal == "top_left" else m - n
        visible = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(diagonal)
        scores = scores.masked_fill(~visible, -torch.inf)
    attends = (scores != -torch.inf).any(-1)
    weights = scores.softmax(-1)
    output = torch.where(attends[..., None], weights @ v, 0.0)
    return AttentionOutput(output, torch.where(attends, scores.logsumexp(-1), -torch.inf))


def expect(query: Tensor, key: Tensor, value: Tensor, *semantics: Any, **recipe: Any) -> Expected:
    """Compute all three references; ``semantics`` are mask, causal and scale.

    R_low is, element by element, the worst of what a right kernel may round to.
    """
    inputs = (query, key, value, *semantics)
    high = reference.attention(*inputs, **recipe, precision="exact")
    low = reference.attention(*inputs, **recipe)
    # A probability within the error of 2**x of a rounding tie may go either way.
    for error in (EXP2_ERROR, -EXP2_ERROR):
        other = reference.attention(*inputs, **recipe, exp2_error=error).output
        is_worse = (other - high.output).abs() > (low.output - high.output).abs()
        low = low._replace(output=torch.where(is_worse, other, low.output))
    low_bits = torch.finfo(torch.float32).eps
    group = query.shape[1] // key.shape[1]
    largest_value, largest_key = (
        _largest(x).repeat_interleave(group, dim=1) for x in (value.flatten(2)[..., None], key)
    )
    given = semantics[2] if len(semantics) > 2 else None
    scale = key.shape[-1] ** -0.5 if given is None else given
    terms = abs(scale) * _largest(query) * largest_key
    additions = -(-key.shape[2] // KEYS_PER_ADDITION)
    exact = exact_attention(query, key, value, *semantics)
    return Expected(
        exact, high, low, additions * low_bits * largest_value, low_bits * terms + EXP2_ERROR
    )


def _largest(x: Tensor) -> Tensor:
    """Return the largest norm among the finite rows of x [B, H, N, D], as [B, H, 1]."""
    norms = torch.where(x.isfinite(), x, 0).double().norm(dim=-1)
    return norms.amax(-1, keepdim=True) if norms.shape[-1] else norms.sum(-1, keepdim=True)


def block_max(x: Tensor) -> Tensor:
    """Return max|x| of [B, H, N, ...] per (batch, head, 64-row block); 0 where not finite."""
    finite = torch.where(x.isfinite(), x, 0.0).abs()
    finite = finite if x.dim() > 3 else finite[..., None]
    if finite.numel() == 0:
        return finite.new_zeros((*x.shape[:2], 1))
    rows = finite.amax(-1)
    padding = -rows.shape[-1] % ROWS_PER_BLOCK
    rows = torch.nn.functional.pad(rows, (0, padding))
    return rows.unflatten(-1, (-1, ROWS_PER_BLOCK)).amax(-1)


def budget(exact: Tensor, naive: Tensor, rounding: Tensor | float = 0.0) -> Tensor:
    """Return the largest error allowed in each (batch, head, 64-row block)."""
    kind = torch.finfo(naive.dtype)
    stored = kind.eps * block_max(exact).clamp_min(kind.tiny)  # eps * tiny: subnormal spacing
    return 2 * (block_max(naive.double() - exact) + stored + rounding) + FLUSHED


def budget_use(
    actual: Tensor, exact: Tensor, naive: Tensor, rounding: Tensor | float = 0.0
) -> float:
    """Return the largest share of its budget that any block of ``actual`` takes."""
    if actual.numel() == 0:
        return 0.0
    return (block_max(actual.double() - exact) / budget(exact, naive, rounding)).max().item()


def output_budget_use(actual: Tensor, expected: Expected) -> float:
    """Return the largest share of the implementation budget that an output takes."""
    oracle, naive = expected.oracle.output, expected.naive.output
    return budget_use(actual, oracle, naive, expected.output_rounding)


def assert_same_special_values(actual: Tensor, oracle: Tensor) -> None:
    """Require NaN and each infinity at exactly the oracle's positions."""
    rounded = oracle.to(actual.dtype)
    for name, is_special in (
        ("NaN", torch.isnan),
        ("inf", torch.isposinf),
        ("-inf", torch.isneginf),
    ):
        wrong = is_special(actual) != is_special(rounded)
        assert not wrong.any(), f"{name} at wrong places: {wrong.nonzero()[:8].tolist()}"


def assert_cosine(actual: Tensor, oracle: Tensor, minimum: float = MIN_COSINE) -> None:
    """Require the cosine similarity of every (batch, head) over its finite elements."""
    if actual.shape[2] * actual.shape[3] < MIN_ELEMENTS:
        return
    oracle = oracle.to(actual.dtype)
    finite = (actual.isfinite() & oracle.isfinite()).flatten(2)
    a, b = (torch.where(finite, x.double().flatten(2), 0.0) for x in (actual, oracle))
    norms = a.norm(dim=-1) * b.norm(dim=-1)
    # Subnormal outputs have a handful of levels: one of them is a large angle.
    subnormal = torch.finfo(actual.dtype).tiny
    silent = b.abs().amax(-1) <= subnormal if b.shape[-1] else norms == 0
    cosine = torch.where(silent, 1.0, (a * b).sum(-1) / norms)
    assert (cosine >= minimum).all(), f"cosine {cosine.min().item():.6f} < {minimum}"


def assert_within_budget(actual: Tensor, expected: Expected, *, lse: Tensor | None = None) -> None:
    """Require a kernel's result to be what the recipe specifies, and that to be good enough.

    Args:
        actual: output [B, Hq, N, Dv] of the kernel.
        expected: ``expect(...)`` of the same arguments.
        lse: natural-log lse [B, Hq, N] of the kernel.
    """
    assert actual.dtype == expected.naive.output.dtype
    assert actual.shape == expected.oracle.output.shape
    assert_same_special_values(actual, expected.oracle.output)
    assert_cosine(actual, expected.oracle.output)
    used = output_budget_use(actual, expected)
    assert used <= 1, f"implementation error is {used:.3g} times its budget"
    if lse is not None:
        assert lse.dtype == torch.float32
        assert_same_special_values(lse, expected.oracle.lse)
        used = budget_use(lse, expected.oracle.lse, expected.naive.lse, expected.lse_rounding)
        assert used <= 1, f"lse error is {used:.3g} times its budget"
    sums = expected.output_rounding
    # What is specified is judged by the worst of a head: a block with few channels is a small
    # sample of errors, whose largest another rounding may exceed twofold.
    error = block_max(actual.double() - expected.exact.output).amax(-1)
    allowed = budget(expected.exact.output, expected.naive.output, sums).amax(-1)
    used = (error / allowed).max().item() if error.numel() else 0.0
    assert used <= 1, f"accuracy error is {used:.3g} times its budget"


def relative_l1(actual: Tensor, exact: Tensor) -> float:
    """Return sum|actual - exact| / sum|exact| (algorithm.md 3)."""
    return ((actual.double() - exact.double()).abs().sum() / exact.double().abs().sum()).item()


def cosine_percent(actual: Tensor, exact: Tensor) -> float:
    """Return 100 * cosine similarity of the flattened tensors (algorithm.md 3)."""
    a, b = actual.double().flatten(), exact.double().flatten()
    return 100 * (a @ b / (a.norm() * b.norm())).item()


def rmse(actual: Tensor, exact: Tensor) -> float:
    """Return the root of the mean squared difference (algorithm.md 3)."""
    return (actual.double() - exact.double()).square().mean().sqrt().item()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal with NaN equal to itself and 0 unequal to -0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))
