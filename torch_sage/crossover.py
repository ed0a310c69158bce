"""Where exact SDPA is faster than quantized attention: measured, as one small rule per device.

Quantizing costs time per element of q, k and v, and saves time per multiplication, so what decides
is their ratio: how often an element is used. Grouped heads save no elements: smoothing Q reads K
once for every query head. A fixed cost per call comes on top. The numbers of a device are printed
by ``python -m benchmarks.bench_attention --crossover``; docs/kernels/cpu.md shows the measurements
behind them.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class Crossover(NamedTuple):
    """From both of these on, quantized attention was measured to be the faster one."""

    reuse: float
    """Multiplications per element of q, k and v, the latter counted for every query head."""

    multiplications: float
    """Multiplications of one call, those a causal mask saves included: SDPA hardly saves them."""


# CPU: 2 cores of a Zen 4 (AVX-512 VNNI and BF16), torch 2.13. The portable kernel, for machines
# without AVX2, reached 0.3 to 0.5 times the speed of SDPA there: no size is large enough.
#
# CUDA: on an H100 the Triton kernels had 0.2 to 0.8 times the speed of torch's best backend
# (docs/kernels/triton.md). Other GPUs are not measured: what is not known to be faster does not run
# unless dispatch='always' asks for it.
CROSSOVER: dict[str, Crossover] = {
    "cpu": Crossover(reuse=64, multiplications=9.4e6),
    "cpu.portable": Crossover(reuse=math.inf, multiplications=math.inf),
    "cuda": Crossover(reuse=math.inf, multiplications=math.inf),
}


def prefers_exact(
    kernel: str,
    *,
    batch: int,
    heads_q: int,
    seqlen_q: int,
    seqlen_k: int,
    head_dim: int,
    head_dim_v: int,
) -> bool:
    """Return whether exact SDPA was measured to be faster at these sizes.

    ``kernel`` is a key of ``CROSSOVER``.
    """
    crossover = CROSSOVER[kernel]
    multiplications = batch * heads_q * seqlen_q * seqlen_k * (head_dim + head_dim_v)
    elements = batch * heads_q * (seqlen_q * head_dim + seqlen_k * (head_dim + head_dim_v))
    return multiplications < max(crossover.multiplications, crossover.reuse * elements)
