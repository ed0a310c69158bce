"""Make random models notice their attention: the measure without which these tests prove nothing.

A randomly initialised model hardly depends on its attention weights: its scores are near zero, so
its softmax is near uniform, and halving the softmax scale leaves the output's cosine above 0.999.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Parameters behind queries and keys (projections, the norms after them, and fused projections), and
# behind what attention adds to the residual stream.
SCORES = re.compile(
    r"(^|[._])(q|k|query|key|qkv|c_attn|in_proj|to_[qk]|[qk]_proj|add_[qk]_proj|norm_(added_)?[qk])"
    r"[._]weight$"
)
VALUES = re.compile(r"(^|[._])(v|value|to_v|v_proj|add_v_proj|out_proj)[._]weight$")
# Required of halving the scale. trust.md: 30 of 33 models reach 0.973 with tuned gains.
SABOTAGED_COSINE = 0.97
Sdpa = Callable[..., Tensor]


def first_tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double().flatten(), b.double().flatten()
    return float(F.cosine_similarity(a, b, dim=0))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@contextmanager
def attention_replaced_by(sdpa: Sdpa) -> Iterator[None]:
    """Run ``sdpa`` wherever eager code calls ``F.scaled_dot_product_attention``.

    The C++ fast path of nn.TransformerEncoderLayer would call nothing of the kind: it is off.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with mock.patch.object(F, "scaled_dot_product_attention", sdpa):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def halved_scale(exact: Sdpa) -> Sdpa:
    def sabotaged(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        scale = kwargs.pop("scale", None)
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        return exact(query, key, value, *args, scale=scale / 2, **kwargs)

    return sabotaged


def sharpen_attention(model: nn.Module, run: Callable[[nn.Module], Tensor]) -> float:
    """Scale q, k and v weights until halving the softmax scale shows; return the cosine then.

    Larger values let attention outweigh the residual stream, larger queries and keys move the
    softmax between uniform and one-hot, where it is blind again: both gains are searched.
    ``run`` must compute every attention by ``F.scaled_dot_product_attention``.
    """
    scores = [p for name, p in model.named_parameters() if SCORES.search(name)]
    values = [p for name, p in model.named_parameters() if VALUES.search(name)]
    assert scores, f"SCORES must name parameters of {type(model).__name__}, got none"
    original = [p.detach().clone() for p in scores + values]
    sabotaged = halved_scale(F.scaled_dot_product_attention)
    lowest = 1.0
    for value_gain in (1, 4, 16, 64):
        for score_gain in (1, 2, 4, 8, 16, 32, 64):
            gains = [score_gain] * len(scores) + [value_gain] * len(values)
            for weight, start, gain in zip(scores + values, original, gains, strict=True):
                weight.data = start * gain
            honest = run(model)
            with attention_replaced_by(sabotaged):
                seen = cosine(run(model), honest)
            if seen < SABOTAGED_COSINE:
                return seen
            lowest = min(lowest, seen)
    raise AssertionError(f"halving the softmax scale must show, got a cosine of {lowest}")
