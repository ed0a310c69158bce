"""The study of the family's errors and the estimate of its speed, without models and kernels."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from benchmarks import family, roofline


def test_calls_are_recorded_as_they_were_meant():
    q, k, v = torch.randn(1, 8, 80, 16), torch.randn(1, 2, 80, 16), torch.randn(1, 2, 80, 12)
    mask = torch.rand(1, 8, 80, 80) > 0.2
    with family.Record() as recorded:
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        F.scaled_dot_product_attention(q, k, v, mask, 0.0, False, scale=0.5, enable_gqa=True)
        F.scaled_dot_product_attention(q[:, :, :9], k[:, :, :9], v[:, :, :9], enable_gqa=True)
    causal, masked = recorded.calls  # the third has too few keys
    assert (causal.causal, causal.scale, causal.attn_mask) == ("top_left", None, None)
    assert torch.equal(causal.query, q[:, [0, 4, 7]].bfloat16())
    assert torch.equal(causal.key, k[:, [0, 1, 1]].bfloat16())
    assert masked.causal == "none" and masked.scale == 0.5
    assert torch.equal(masked.attn_mask, mask[:, [0, 4, 7]])


def test_errors_of_members_are_in_their_order(monkeypatch):
    names = ["int8, bf16, k", "int8, e4m3, k", "int4, e4m3, qk"]
    monkeypatch.setattr(family, "VARIANTS", {name: family.VARIANTS[name] for name in names})
    q, k, v = torch.randn(3, 1, 2, 128, 64).bfloat16()
    calls = [family.Call(q, k, v, None, causal, None) for causal in ("none", "top_left")]
    found = family.measure(calls, "fp32")
    l1 = [[error for _, error in found[name]] for name in names]
    assert all(0 < a < b < c < 0.5 for a, b, c in zip(*l1, strict=True))
    text = family.table({"random": found})
    assert text.count("\n") == 1 + len(names) and f"{sum(l1[0]) / 2:.4f}" in text


@pytest.mark.parametrize(
    ("counts", "slowest"),
    [
        ({"IMMA": 32, "HMMA": 64}, "tensor"),
        ({"IMMA": 32, "HMMA": 64, "IADD3": 10**5}, "issue"),
        ({"IMMA": 32, "HMMA": 64, "MUFU": 10**4}, "exponentials"),
        ({"IMMA": 32, "HMMA": 64, "FFMA": 10**5}, "fp32"),
    ],
)
def test_the_slowest_unit_limits(counts, slowest):
    counts = Counter({"IMMA": 0, "HMMA": 0, "MUFU": 1, "FFMA": 1, **counts})
    found = roofline.estimate(roofline.GPUS["A100"], "int8, fp16", counts, rows=32)
    assert found.most == getattr(found, slowest)
    assert found.most / 2 <= found.least < found.most
    assert found.tensor == pytest.approx(416)


def test_published_rates_are_those_of_the_multiprocessors():
    """A tensor core does a power of two of products a clock, whatever the marketing says."""
    for name, gpu in roofline.GPUS.items():
        for kind, tflops in gpu.tflops.items():
            per_clock = tflops * 1e3 / gpu.gigahertz / gpu.multiprocessors
            nearest = 2.0 ** round(torch.tensor(per_clock).log2().item())
            assert abs(per_clock / nearest - 1) < 0.01, (name, kind, per_clock)
