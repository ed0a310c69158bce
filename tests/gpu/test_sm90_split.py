"""Few queries on prepared keys and values: blocks attend to parts of the keys, which are merged."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import AttentionCase, Inputs, Poison, make_inputs, poison
from tests.gpu.shared import OPS, normal, on_gpu
from tests.gpu.sm90 import EXPONENTIALS, RECIPE, expected
from tests.numerics import assert_within_budget, exact_attention, relative_l1, same_bits

# Query rows, keys, and both head dimensions. The first keys that are split, parts of 512 keys and
# of more, tails of a key, a step and a part, and as many rows as a head may have.
SHAPES = [
    (1, 1025, 64, 64),
    (1, 4096, 128, 128),
    (16, 5000, 128, 100),
    (64, 3000, 64, 40),
    (3, 1537, 256, 256),
    (5, 66_000, 128, 128),
    (1, 70_001, 200, 64),
]
HEADS = [(2, 2), (8, 2), (12, 1)]


def prepared_of(inputs: Inputs, smooth: str) -> tuple[Tensor | int, ...]:
    prepared = OPS.prepare_kv(inputs.key, inputs.value, smooth=smooth)
    return (*prepared, inputs.key.shape[2], inputs.value.shape[3])


def attend(inputs: Inputs, smooth: str, **options: Any) -> tuple[Tensor, Tensor]:
    """Return output and LSE; the exponentials are exact, whatever is asked for."""
    operands = (inputs.query, *prepared_of(inputs, smooth), *inputs[3:])
    output, lse = OPS.attention_prepared_with_lse(*operands, **options)
    for exponential in EXPONENTIALS:
        alone = OPS.attention_prepared(*operands, exponential=exponential, **options)
        assert same_bits(alone, output)
    part = OPS.attention_prepared_part(*operands, **options)
    assert same_bits(part[0], output) and same_bits(part[1], lse)
    return output, lse


def unsplit(inputs: Inputs, smooth: str) -> tuple[Tensor, Tensor]:
    """Return what the whole op computes, which never splits."""
    output, lse = OPS.sdpa_with_lse(*inputs, **RECIPE, smooth=smooth)
    return output, lse


@pytest.mark.parametrize("semantics", ["none", "bottom_right", "bool", "key_padding", "float"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_is_within_budget(
    shape: tuple[int, int, int, int], heads: tuple[int, int], semantics: str
) -> None:
    n, m, d, dv = shape
    is_mask = semantics in ("bool", "key_padding", "float")
    if is_mask and m > 10_000:
        m = 9_000 + n
    case = AttentionCase(
        batch=1 if m > 10_000 else 2, heads_q=heads[0], heads_kv=heads[1], seqlen_q=n,
        seqlen_k=m, head_dim=d, head_dim_v=dv, dtype=("fp32", "bf16", "fp16")[(n + heads[0]) % 3],
        causal="none" if is_mask else semantics, mask=semantics if is_mask else "none",
        scale=-0.1 if d == 64 else None, layout="bshd" if heads[1] == 2 else "bhsd",
        data="channel_bias" if dv == 128 else "normal", smooth="kv",
    )  # fmt: skip
    inputs = on_gpu(make_inputs(case))
    output, lse = attend(inputs, case.smooth)
    assert_within_budget(output, expected(inputs, case.smooth, "exact"), lse=lse)


def probes(n: int, m: int, d: int, heads: tuple[int, int], dtype: torch.dtype) -> Inputs:
    """Return queries that weigh all keys alike, and values of which channel c has one key's 1."""
    q = torch.randn(2, heads[0], n, d, device="cuda").to(dtype)
    k = torch.zeros(2, heads[1], m, d, device="cuda", dtype=dtype)
    v = torch.zeros_like(k)
    v[:, :, places(m, d), torch.arange(d, device="cuda")] = 1
    return Inputs(q, k, v, None, "none", None)


def places(m: int, d: int) -> Tensor:
    """Return a key for each channel: the first and last, edges of parts, and some between."""
    edges = [i for edge in range(0, m, 512) for i in (edge, edge + 511) if i < m] + [m - 1]
    between = torch.linspace(0, m - 1, d).long().tolist()
    return torch.tensor((edges[: d // 2] + between)[:d], device="cuda")


@pytest.mark.parametrize("semantics", ["none", "bottom_right", "bool", "float"])
@pytest.mark.parametrize("m", [1025, 1152, 1153, 2048, 3583, 66_048, 66_049])
@pytest.mark.parametrize(("n", "d"), [(1, 64), (3, 128), (64, 64), (17, 256)])
def test_every_key_counts_once(n: int, d: int, m: int, semantics: str) -> None:
    """With scores of 0 the LSE is the log of how many keys a row sees, and V shows which."""
    heads = (4, 2)
    inputs = probes(n, m, d, heads, torch.float32)
    visible = torch.ones(n, m, dtype=torch.bool, device="cuda")
    if semantics == "bottom_right":
        visible = visible.tril(m - n)
        inputs = inputs._replace(causal="bottom_right")
    elif semantics != "none":
        visible = torch.rand(n, m, device="cuda") > 0.3
        visible[0, :1000] = False  # a part of nothing
        bias = torch.zeros(n, m, device="cuda").masked_fill(~visible, -torch.inf)
        inputs = inputs._replace(attn_mask=visible if semantics == "bool" else bias)
    output, lse = attend(inputs, "")
    count = visible.sum(-1).double()
    torch.testing.assert_close(lse.double(), count.log().expand_as(lse), rtol=0, atol=8e-6)
    right = visible[:, places(m, d)].double() / count[:, None]
    torch.testing.assert_close(output.double(), right.expand_as(output), rtol=3e-6, atol=0)


@pytest.mark.parametrize("mask", ["bool_hidden_rows", "float_hidden_rows", "float_min_rows"])
@pytest.mark.parametrize("n", [1, 6])
def test_rows_that_see_nothing(n: int, mask: str) -> None:
    case = AttentionCase(seqlen_q=n, seqlen_k=2500, mask=mask, heads_q=4)
    inputs = on_gpu(make_inputs(case))
    output, lse = attend(inputs, "k")
    assert_within_budget(output, expected(inputs, "k", "exact"), lse=lse)
    hidden = unsplit(inputs, "k")[1] == -torch.inf
    assert hidden.any() == (mask != "float_min_rows")
    assert (output[hidden] == 0).all() and torch.equal(lse == -torch.inf, hidden)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", [0, 511, 512, 1300, 2499])
@pytest.mark.parametrize("operand", [0, 1, 2])
@pytest.mark.parametrize("semantics", ["bottom_right", "bool"])
def test_poison_reaches_what_it_reaches_unsplit(
    semantics: str, operand: int, key: int, number: float
) -> None:
    is_mask = semantics == "bool"
    case = AttentionCase(
        seqlen_q=9, seqlen_k=2500, heads_q=4, causal="none" if is_mask else semantics,
        mask="bool_hidden_rows" if is_mask else "none",
    )  # fmt: skip
    row = 7 if operand == 0 else key
    inputs = on_gpu(poison(make_inputs(case), Poison(operand, (0, 1, row, 3), number)))
    for found, right in zip(attend(inputs, ""), unsplit(inputs, ""), strict=True):
        assert torch.equal(found.isnan(), right.isnan())
        assert torch.equal(found.isinf(), right.isinf())
        assert right.isnan().any() or found.dim() == 3  # V does not reach the LSE


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_mask_that_is_nan_or_plus_infinity_gives_nan_rows(number: float) -> None:
    inputs = make_inputs(AttentionCase(mask="float", seqlen_q=7, seqlen_k=2500))
    assert inputs.attn_mask is not None
    inputs.attn_mask[0, 1, 3, 1700] = number
    output, _ = attend(on_gpu(inputs), "k")
    assert output.isnan().any(-1).nonzero().tolist() == [[0, 1, 3]]


@pytest.mark.parametrize("heads", [(48, 48), (48, 12)], ids=str)
@pytest.mark.parametrize(("n", "d"), [(1, 64), (4, 128), (40, 256)])
@pytest.mark.parametrize("causal", ["none", "bottom_right"])
def test_a_head_has_the_bits_of_a_call_alone(
    causal: str, n: int, d: int, heads: tuple[int, int]
) -> None:
    """Where a block has many pieces of work, and every time."""
    of_query, of_key = heads
    group = of_query // of_key
    q, k, v = normal(3, of_query, n, d), normal(3, of_key, 4500, d), normal(3, of_key, 4500, d)
    prepared = OPS.prepare_kv(k, v)
    semantics = (4500, d, None, causal)
    whole = OPS.attention_prepared_with_lse(q, *prepared, *semantics)
    for _ in range(3):
        again = OPS.attention_prepared_with_lse(q, *prepared, *semantics)
        assert all(same_bits(a, b) for a, b in zip(again, whole, strict=True))
    for b, h in ((0, 0), (1, 5), (2, of_key - 1)):
        of_one = slice(b, b + 1), slice(group * h, group * (h + 1))
        one = [x[b : b + 1, h : h + 1] for x in prepared]
        alone = OPS.attention_prepared_with_lse(q[of_one], *one, *semantics)
        for found, right in zip(alone, whole, strict=True):
            assert same_bits(found, right[of_one])


@pytest.mark.parametrize("layout", ["bshd", "sliced", "fused", "expanded", "last_dim_strided"])
@pytest.mark.parametrize("n", [1, 5])
def test_strides_of_a_query_change_nothing(n: int, layout: str) -> None:
    case = AttentionCase(
        batch=2, heads_q=6, heads_kv=2, seqlen_q=n, seqlen_k=2100, head_dim=72, layout=layout
    )
    inputs = on_gpu(make_inputs(case))
    dense = inputs._replace(query=inputs.query.contiguous())
    for order in ("bhsd", "bshd"):
        found = attend(inputs, "kv", output_order=order)
        right = attend(dense, "kv", output_order="bhsd")
        assert all(same_bits(a, b) for a, b in zip(found, right, strict=True))


@pytest.mark.parametrize("shape", [(2, 1, 1, 2100), (1, 6, 1, 2100), (2, 6, 1, 2100)])
def test_masks_of_a_single_query_are_packed_however_they_broadcast(shape: tuple[int, ...]) -> None:
    case = AttentionCase(batch=2, heads_q=6, heads_kv=2, seqlen_q=1, seqlen_k=2100)
    mask = torch.rand(shape, device="cuda") > 0.5
    inputs = on_gpu(make_inputs(case))._replace(attn_mask=mask)
    whole = inputs._replace(attn_mask=mask.expand(2, 6, 1, 2100).contiguous())
    for found, right in zip(attend(inputs, "k"), attend(whole, "k"), strict=True):
        assert same_bits(found, right)
    assert_within_budget(attend(inputs, "k")[0], expected(inputs, "k", "exact"))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    ("n", "m", "causal", "is_split"),
    [
        (1, 1025, "none", True),
        (64, 3000, "none", True),
        (9, 3000, "bottom_right", True),
        (1, 1024, "none", False),
        (65, 3000, "none", False),
        (9, 3000, "top_left", False),  # which hides most keys
    ],
)
def test_few_rows_of_many_keys_are_split(
    n: int, m: int, causal: str, is_split: bool, head_dim: int
) -> None:
    """Maxima, and so roundings, are others than those of the whole op, which never splits."""
    q, k, v = (torch.randn(1, 2, rows, head_dim, device="cuda") for rows in (n, m, m))
    inputs = Inputs(q, k, v, None, causal, None)
    operands = (q, *prepared_of(inputs, "kv"), *inputs[3:])
    output = OPS.attention_prepared_with_lse(*operands)[0]
    assert same_bits(output, unsplit(inputs, "kv")[0]) != is_split


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_accuracy_is_that_of_unsplit_keys(head_dim: int) -> None:
    q, k, v = normal(1, 8, 16, head_dim), *torch.randn(2, 1, 8, 8192, head_dim, device="cuda")
    inputs = Inputs(q, k.bfloat16(), v.bfloat16(), None, "none", None)
    exact = exact_attention(*inputs).output
    errors = [relative_l1(f(inputs, "kv")[0], exact) for f in (attend, unsplit)]
    assert errors[0] < min(0.040, 1.1 * errors[1])


@pytest.mark.parametrize("causal", ["none", "bottom_right"])
def test_graphs_read_new_inputs(causal: str) -> None:
    """And a launch that overlaps the one before it waits for its results."""
    q, k, v = normal(2, 16, 2, 128), normal(2, 4, 20_000, 128), normal(2, 4, 20_000, 128)
    prepared = OPS.prepare_kv(k, v)

    def call() -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor]
        found = OPS.attention_prepared_with_lse(q, *prepared, 20_000, 128, None, causal)
        return found

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = [call() for _ in range(8)]
    for _ in range(3):
        q.copy_(torch.randn_like(q))
        graph.replay()
        right = call()
        for found in replayed:
            assert all(same_bits(a, b) for a, b in zip(found, right, strict=True))


def test_lse_of_large_logits() -> None:
    """Far from 0, where only the reference maximum keeps exponentials in range."""
    q, k = 60 * torch.ones(1, 1, 1, 64, device="cuda"), torch.zeros(1, 1, 3000, 64, device="cuda")
    k[:, :, 2000:2500] = 60
    value = torch.arange(3000, device="cuda").float()[:, None].expand(1, 1, 3000, 64)
    inputs = Inputs(q, k, value.contiguous(), None, "none", 1.0)
    output, lse = attend(inputs, "")
    assert abs(lse.item() - (60 * 60 * 64 + math.log(500))) < 0.3
    torch.testing.assert_close(output, unsplit(inputs, "")[0], rtol=0.01, atol=0)
