"""Where exact SDPA is faster than quantized attention: measured, one small rule per family.

Quantizing costs time per element of q, k and v, and saves time per multiplication, so what decides
is their ratio: how often an element is used. Grouped heads save no elements: smoothing Q reads K
once for every query head. A fixed cost per call comes on top. The numbers are printed by
``python -m benchmarks.bench_attention --crossover`` for CPUs (docs/kernels/cpu.md shows the
measurements) and ``python -m benchmarks.crossover_gpu`` (docs/kernels/hopper.md).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Form = Literal["full", "causal", "masked", "ragged", "packed", "packed causal"]
"""What a call leaves out of the scores, and how that is said: see ``Rule``; packed sequences, which
take no mask that is a tensor, have rules of their own."""


class Crossover(NamedTuple):
    """From both of these on, quantized attention was measured to be the faster one."""

    reuse: float
    """Multiplications per element of q, k and v, the latter counted for every query head."""

    multiplications: float
    """Multiplications of one call, those a causal mask saves included."""


class Rule(NamedTuple):
    """The crossovers of one family of kernels, faster from any one of a tuple's on."""

    full: tuple[Crossover, ...]
    """Without a mask."""

    causal: tuple[Crossover, ...]
    """With a causal mask, which halves the products and leaves the cost of quantizing."""

    masked: tuple[Crossover, ...]
    """With a mask that is a tensor, whose rows kernels may read 16 bytes at a time."""

    ragged: tuple[Crossover, ...]
    """With one whose rows they may not."""


_NEVER = Rule(full=(), causal=(), masked=(), ragged=())
# SDPA on CPU hardly saves what a causal mask hides, so the same sizes decide.
_CPU = (Crossover(reuse=64, multiplications=9.4e6),)
# Sequences of 1024 tokens, 4 of them and more, in heads of 64 and 128 channels: 1.03 to 1.4 times
# torch's varlen_attn; of 512 it was the faster one (python -m benchmarks.bench_varlen --equal).
_PACKED = (Crossover(reuse=682, multiplications=1.7e10),)

# Hopper's up to 128 channels.
_FULL = (
    Crossover(reuse=1365, multiplications=6.8e10),
    Crossover(reuse=2048, multiplications=3.8e10),
)
_CAUSAL = (Crossover(reuse=2048, multiplications=6.7e7),)

# With P and V in bf16: 16,384 tokens of 64 heads in all, 1.07 to 1.24 times cuDNN's speed.
_HALF = (Crossover(reuse=10922, multiplications=2.1e12),)

# CPU: 2 cores of a Zen 4 (AVX-512 VNNI and BF16), torch 2.13. The portable kernel, for machines
# without AVX2, reached 0.3 to 0.5 times the speed of SDPA there: no size is large enough.
#
# CUDA: on Hopper the Triton kernels had 0.5 to 0.9 times the speed of torch's best backend
# (docs/kernels/triton.md). The kernels for compute capability 9.0 won by 1.01 to 1.6 times at all
# sizes that their rules take, with a mask by 1.05 to 2.2. With masks whose rows are not aligned,
# and with any at 64 channels up to 4096 tokens, they reached 0.6 to 1.1 times the speed of SDPA.
# Other GPUs are not measured: what is not known to be faster does not run unless dispatch='always'
# asks for it.
CROSSOVER: dict[str, Rule] = {
    "cpu": Rule(full=_CPU, causal=_CPU, masked=_CPU, ragged=_CPU),
    "cpu.portable": _NEVER,
    "cuda": _NEVER,
    "cuda.sm80": _NEVER,
    "cuda.sm89": _NEVER,
    "cuda.sm120": _NEVER,
    "cuda.sm90": Rule(
        _FULL, _CAUSAL, masked=(Crossover(reuse=4096, multiplications=6.7e7),), ragged=()
    ),
    "cuda.sm90.128": Rule(
        _FULL, _CAUSAL, masked=(Crossover(reuse=1024, multiplications=1.3e8),), ragged=()
    ),
    "cuda.sm90.256": Rule(
        # Larger totals: 128 heads of 2048 tokens full, 4096 causal, 1.16 times cuDNN's speed.
        full=(
            Crossover(reuse=2048, multiplications=2.7e8),
            Crossover(reuse=1365, multiplications=2.7e11),
        ),
        causal=(
            Crossover(reuse=4096, multiplications=2.7e8),
            Crossover(reuse=2730, multiplications=1.0e12),
        ),
        masked=(Crossover(reuse=682, multiplications=2.7e8),),
        ragged=(),
    ),
    "cuda.sm90.half": Rule(full=_HALF, causal=_HALF, masked=(), ragged=()),
    "cuda.sm90.packed": Rule(full=_PACKED, causal=_PACKED, masked=(), ragged=()),
}

WIDTHS = (64, 128, 256)
"""Channels that heads are padded to; where the table has ``<kernel>.<width>``, it is their rule."""


def _crossovers(kernel: str, form: Form, widest: int) -> tuple[Crossover, ...]:
    width = next((width for width in WIDTHS if widest <= width), WIDTHS[-1])
    if form in ("packed", "packed causal"):
        packed = CROSSOVER.get(f"{kernel}.packed", _NEVER)
        rule = _NEVER if width == WIDTHS[-1] else packed
        return rule.full if form == "packed" else rule.causal
    crossovers: tuple[Crossover, ...]
    crossovers = getattr(CROSSOVER.get(f"{kernel}.{width}", CROSSOVER[kernel]), form)
    return crossovers


def prefers_exact(
    kernel: str,
    form: Form,
    *,
    batch: int,
    heads_q: int,
    seqlen_q: int,
    seqlen_k: int,
    head_dim: int,
    head_dim_v: int,
) -> bool:
    """Return whether exact SDPA was measured to be faster at these sizes.

    ``kernel`` is a key of ``CROSSOVER``, without a width. Packed sequences count as a batch of
    their average length: longer ones among them only add to what is gained.
    """
    crossovers = _crossovers(kernel, form, max(head_dim, head_dim_v))
    multiplications = batch * heads_q * seqlen_q * seqlen_k * (head_dim + head_dim_v)
    elements = batch * heads_q * (seqlen_q * head_dim + seqlen_k * (head_dim + head_dim_v))
    return not any(
        multiplications >= max(crossover.multiplications, crossover.reuse * elements)
        for crossover in crossovers
    )
