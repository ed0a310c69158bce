"""Masks of hand-written attention: one attn_mask from whatever is added to or fills the scores."""

import math

import pytest
import torch

from tests.inductor.joint import (
    REL_L1,
    B,
    D,
    H,
    M,
    N,
    attend,
    keep_mask,
    math_sdpa,
    mT,
    qkv,
    rewritten,
    run_pass,
    shape,
    traced,
)
from tests.numerics import relative_l1

INF = math.inf
MIN = torch.finfo(torch.float32).min


@pytest.fixture(autouse=True)
def inference():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def bias(*dims):
    return torch.randn(dims)


# (function of q, k, v and masks; masks; shape of the op's mask; whether it is bool)
MASKED = {
    "add": (
        lambda q, k, v, b: attend((q @ mT(k)) * 0.3 + b, v),
        lambda: (bias(B, 1, N, M),),
        ((B, 1, N, M), False),
    ),
    "added_to": (
        lambda q, k, v, b: attend(b + (q @ mT(k)) * 0.3, v),
        lambda: (bias(N, M),),
        ((1, 1, N, M), False),
    ),
    "subtracted": (
        lambda q, k, v, b: attend((q @ mT(k)) * 0.3 - b, v),
        lambda: (bias(B, 1, 1, M),),
        ((B, 1, 1, M), False),
    ),
    "scaled_after": (
        lambda q, k, v, b: attend((q @ mT(k) + b) * 0.3, v),
        lambda: (bias(1, H, N, M),),
        ((1, H, N, M), False),
    ),
    "fill": (
        lambda q, k, v, m: attend(((q @ mT(k)) * 0.3).masked_fill(m == 0, -INF), v),
        lambda: (keep_mask(B, 1, 1, M),),
        ((B, 1, 1, M), True),
    ),
    "fill_not": (
        lambda q, k, v, m: attend(((q @ mT(k)) * 0.3).masked_fill(~m, -INF), v),
        lambda: (keep_mask(B, 1, N, M),),
        ((B, 1, N, M), True),
    ),
    "fill_before_scale": (
        lambda q, k, v, m: attend((q @ mT(k)).masked_fill(~m, -INF) * 0.3, v),
        lambda: (keep_mask(N, M),),
        ((1, 1, N, M), True),
    ),
    "where_finite": (
        lambda q, k, v, m: attend(torch.where(m, (q @ mT(k)) * 0.3, MIN), v),
        lambda: (keep_mask(N, M),),
        ((1, 1, N, M), False),
    ),
    "where_tensor": (
        lambda q, k, v, m: attend(torch.where(m, (q @ mT(k)) * 0.3, torch.full([], -1e9)), v),
        lambda: (keep_mask(N, M),),
        ((1, 1, N, M), False),
    ),
    "float_of_bool": (
        lambda q, k, v, m: attend(
            (q @ mT(k)) * 0.3 + torch.zeros(B, 1, 1, M).masked_fill(~m, -INF), v
        ),
        lambda: (keep_mask(B, 1, 1, M),),
        ((B, 1, 1, M), True),
    ),
    "inverted_times_min": (
        lambda q, k, v, m: attend((q @ mT(k)) * 0.3 + (1.0 - m[:, None, None]) * MIN, v),
        lambda: (keep_mask(B, M).float(),),
        ((B, 1, 1, M), False),
    ),
    "two_fills": (
        lambda q, k, v, a, b: attend(
            ((q @ mT(k)) * 0.3).masked_fill(~a, -INF).masked_fill(~b, -INF), v
        ),
        lambda: (keep_mask(N, M), keep_mask(B, 1, 1, M)),
        ((B, 1, N, M), True),
    ),
    "bias_then_fill": (
        lambda q, k, v, b, m: attend(((q @ mT(k)) * 0.3 + b).masked_fill(~m, -INF), v),
        lambda: (bias(1, H, N, M), keep_mask(B, 1, 1, M)),
        ((B, H, N, M), False),
    ),
    "fill_then_bias": (
        lambda q, k, v, b, m: attend(((q @ mT(k)) * 0.3).masked_fill(~m, -INF) + b, v),
        lambda: (bias(1, H, N, M), keep_mask(N, M)),
        ((1, H, N, M), False),
    ),
    "finite_fill_then_bias": (
        lambda q, k, v, b, m: attend(torch.where(m, (q @ mT(k)) * 0.3, MIN) + b, v),
        lambda: (bias(B, 1, 1, M), keep_mask(N, M)),
        ((B, 1, N, M), False),
    ),
    "three_biases": (
        lambda q, k, v, a, b, c: attend((q @ mT(k) + a + b) * 0.5 + c, v),
        lambda: (bias(H, 1, 1), bias(H, 1, M), bias(N, 1)),
        ((1, H, N, M), False),
    ),
    "zeros": (
        lambda q, k, v: attend(q @ mT(k) + torch.zeros(B, 1, N, M), v),
        lambda: (),
        None,
    ),
    "math_backend": (
        lambda q, k, v, m: math_sdpa(q, k, v, attn_mask=m),
        lambda: (keep_mask(B, 1, N, M),),
        ((B, 1, N, M), True),
    ),
    "folded_scores": (
        lambda q, k, v, b: torch.bmm(
            (torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).view(B, H, N, M) + b)
            .view(B * H, N, M)
            .softmax(-1),
            v.flatten(0, 1),
        ).view(B, H, N, D),
        lambda: (bias(B, 1, N, M),),
        ((B, 1, N, M), False),
    ),
    "folded_mask": (
        lambda q, k, v, b: attend(((q @ mT(k)).view(B * H, N, M) + b).view(B, H, N, M), v),
        lambda: (bias(B * H, 1, M),),
        ((B, H, 1, M), False),
    ),
    "heads_last": (
        lambda q, k, v, m: torch.einsum(
            "bijh,bhjd->bhid",
            torch.einsum("bhid,bhjd->bijh", q, k).masked_fill(~m[..., None], -INF).softmax(2),
            v,
        ),
        lambda: (keep_mask(B, N, M),),
        ((B, 1, N, M), True),
    ),
}


@pytest.mark.parametrize("form", MASKED)
def test_masked_form(form):
    function, masks, expected = MASKED[form]
    node = rewritten(function, *qkv(), *masks())
    mask = node.args[3]
    if expected is None:
        assert mask is None
    else:
        assert (shape(mask), mask.meta["val"].dtype is torch.bool) == expected


def test_causal_mask_of_the_math_backend():
    """It is computed of no input, so the pass can prove what it says."""
    node = rewritten(lambda q, k, v: math_sdpa(q, k, v, is_causal=True), *qkv())
    assert node.args[3:5] == (None, "top_left")


@pytest.mark.parametrize(
    "form", ["add", "scaled_after", "fill", "where_finite", "bias_then_fill", "heads_last"]
)
def test_masked_form_with_dynamic_shapes(form):
    function, masks, expected = MASKED[form]
    node = rewritten(function, *qkv(), *masks(), dynamic=True)
    assert (node.args[3].meta["val"].dtype is torch.bool) == expected[1]


def test_window_mask_over_folded_batch():
    """Swin: batch and windows are one dimension, split only while the window mask is added."""

    def function(q, k, v, table, windows):
        scores = (q @ mT(k)) * 0.3 + table[None]
        scores = scores.view(B, 3, H, N, M) + windows[None, :, None]
        return attend(scores.view(3 * B, H, N, M), v)

    q, k, v = qkv(batch=3 * B)
    rewritten(function, q, k, v, bias(H, N, M), bias(3, N, M))


def test_negative_scale_after_a_bias():
    rewritten(lambda q, k, v, b: attend((q @ mT(k) + b) * -0.3, v), *qkv(), bias(N, M))


def test_causal_with_a_negative_scale():
    """Torch's fused CPU kernel gives NaN in every row with a masked key there."""

    def function(q, k, v):
        hidden = ~torch.ones(N, M, dtype=torch.bool).tril()
        return attend(((q @ mT(k)) * -0.3).masked_fill(hidden, -INF), v)

    node = rewritten(function, *qkv())
    assert node.args[3:6] == (None, "top_left", -0.3)


@pytest.mark.parametrize("hidden", [-INF, MIN, -1e4])
def test_a_row_without_visible_keys(hidden):
    """-inf: 0 as in SDPA, where plain softmax gives NaN. A finite fill: torch's weights stay."""
    q, k, v = qkv()
    keep = keep_mask(N, M)
    keep[3] = False

    def function(q, k, v, keep):
        return attend(((q @ mT(k)) * 0.3).masked_fill(~keep, hidden), v)

    gm = traced(function, q, k, v, keep)
    run_pass(gm)
    actual, expected = gm(q, k, v, keep), function(q, k, v, keep)
    if hidden == -INF:
        assert expected[:, :, 3].isnan().all()
        assert (actual[:, :, 3] == 0).all()
        expected = expected.nan_to_num(0.0)
    if hidden == -1e4:
        # Added, not filled in: all keys hidden alike leaves the softmax of the scores themselves.
        expected[:, :, 3] = attend((q @ mT(k)) * 0.3, v)[:, :, 3]
    assert relative_l1(actual, expected) <= REL_L1


def test_safe_softmax_keeps_its_zeros():
    q, k, v = qkv()
    keep = keep_mask(N, M)
    keep[3] = False
    node = rewritten(
        lambda q, k, v, m: math_sdpa(q, k, v, attn_mask=m),
        q,
        k,
        v,
        keep,
    )
    assert node.args[3].meta["val"].dtype is torch.bool
