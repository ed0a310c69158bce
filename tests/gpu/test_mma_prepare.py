"""K and V prepared for the mma.sync kernels: every bit of the codes, and the error of the means."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.cases import DTYPES, AttentionCase, make_inputs
from tests.gpu.shared import BEYOND, OPS, normal, on_gpu, same_numbers
from tests.gpu.sm90 import CHUNK_ORDER
from tests.numerics import same_bits
from torch_sage import reference

KEYS = 64  # of a tile
MEAN_ERROR = 1e-5  # algorithm.md 2.1, of the mean magnitude of a channel
LENGTHS = (1, 9, 63, 64, 65, 130, 1000, 5000)  # the last two: some chunks of tokens, and many

# K and V meet nowhere, so that recipes need not be products of both.
KEY_RECIPES = [
    {"qk": qk, "granularity": granularity, "smooth": smooth}
    for qk, smoothing in (("int8", ("k", "")), ("int4", ("qk", "q")))
    for granularity in ("thread", "warp", "block", "tensor")
    for smooth in smoothing
]
VALUE_RECIPES = [
    {"pv": pv, "smooth": smooth}
    for pv in ("bf16", "fp16", "fp16_fp16", "e4m3", "e4m3_fp16")
    for smooth in ("v", "")
]


class Prepared(NamedTuple):
    """What the op returns, in its order."""

    key_codes: Tensor
    key_scales: Tensor
    key_mean: Tensor
    value_codes: Tensor
    value_scales: Tensor
    value_mean: Tensor


def recipes(first: int = 0) -> list[dict[str, str]]:
    """Return every recipe of K, each with one of V; ``first`` says with which they begin."""
    values = itertools.islice(itertools.cycle(VALUE_RECIPES), first, None)
    return [
        {**key, **value, "smooth": key["smooth"] + value["smooth"]}
        for key, value in zip(KEY_RECIPES, values, strict=False)
    ]


def make_kv(m: int, d: int, dv: int, dtype: str, layout: str = "bhsd") -> tuple[Tensor, Tensor]:
    """Return biased K and V whose heads have what is zero, tiny, constant, huge or not finite."""
    case = AttentionCase(
        batch=2, heads_kv=2, seqlen_q=1, seqlen_k=m, head_dim=d, head_dim_v=dv,
        dtype=dtype, layout=layout, data="channel_bias",
    )  # fmt: skip
    _, k, v, *_ = on_gpu(make_inputs(case))
    if m > 8:
        k[0, 0, : m // 2] = 0
        v[0, 0, :, 0] = -0.0
        k[0, 1, m // 3, d // 2] = torch.nan
        v[0, 1, m // 3, dv // 2] = -torch.inf
        v[0, 1, m - 1, 0] = torch.nan
        k[1, 0] *= 1e-5
        v[1, 0] *= 1e-5
        k[1, 1] = k[1, 1, :1].clone()
        v[1, 1, :, 0] = v[1, 1, 0, 0].clone()
        v[1, 1, m // 2, dv // 2] = 7e4  # more than fp16 has
    return k, v


def prepare(k: Tensor, v: Tensor, recipe: dict[str, str]) -> Prepared:
    return Prepared(*OPS.mma_prepare_kv(k, v, **recipe))


def padded_rows(codes: Tensor) -> Tensor:
    return F.pad(codes, (0, 0, 0, -codes.shape[2] % KEYS))


def check_key(k: Tensor, recipe: dict[str, str], width: int, found: Prepared) -> None:
    """Given the mean, codes and scales of K are the reference's bits."""
    smooth, qk, granularity = "k" in recipe["smooth"], recipe["qk"], recipe["granularity"]
    codes, scales, mean = reference.quantize_key(
        k, found.key_mean if smooth else None, smooth=smooth, qk=qk, granularity=granularity
    )
    assert same_bits(found.key_mean, mean)
    codes = padded_rows(F.pad(codes, (0, width - codes.shape[3])))
    expected = reference.pack_int4(codes) if qk == "int4" else codes.view(torch.uint8)
    assert same_bits(found.key_codes, expected)
    shape = (*codes.shape[:2], codes.shape[2] // KEYS, 4)
    by_tile = scales.view(shape) if granularity == "thread" else scales[..., None].expand(shape)
    assert same_numbers(found.key_scales, by_tile)


def check_value(v: Tensor, recipe: dict[str, str], width: int, found: Prepared) -> None:
    """Given the mean, codes and scales of V are the reference's bits."""
    smooth, pv = "v" in recipe["smooth"], recipe["pv"]
    codes, scales, mean = reference.quantize_value(
        F.pad(v, (0, width - v.shape[3])),
        found.value_mean if smooth else None,
        smooth=smooth,
        pv=pv,
    )
    assert same_bits(found.value_mean, mean)
    assert same_numbers(found.value_scales, scales)
    if pv.startswith("e4m3"):
        chunks = padded_rows(codes.view(torch.uint8)).mT.unflatten(-1, (-1, len(CHUNK_ORDER)))
        assert same_bits(found.value_codes, chunks[..., list(CHUNK_ORDER)].flatten(-2))
    else:
        assert same_bits(found.value_codes, codes.view(torch.int16))


def check_mean(x: Tensor, mean: Tensor) -> None:
    """``mean`` is that of all tokens of ``x``, and not finite where that is not."""
    exact, size = x.double().mean(2), x.double().abs().mean(2)
    mean = mean[..., : x.shape[3]]
    finite = exact.isfinite()
    assert torch.equal(mean.isfinite(), finite)
    assert ((mean - exact).abs() <= MEAN_ERROR * size)[finite].all()


def check(k: Tensor, v: Tensor, recipe: dict[str, str]) -> None:
    found = prepare(k, v, recipe)
    larger = max(k.shape[3], v.shape[3])
    width = next(width for width in (64, 128, 256) if larger <= width)
    check_key(k, recipe, width, found)
    check_value(v, recipe, width, found)
    if "k" in recipe["smooth"]:
        check_mean(k, found.key_mean)
    if "v" in recipe["smooth"]:
        check_mean(v, found.value_mean)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("d", "dv"),
    [(1, 1), (40, 40), (64, 64), (72, 33), (128, 128), (64, 120), (200, 200), (256, 136)],
)
def test_every_bit_is_the_references(d: int, dv: int, dtype: str) -> None:
    for first, m in enumerate(LENGTHS):
        k, v = make_kv(m, d, dv, dtype)
        for recipe in recipes(first):
            check(k, v, recipe)


@pytest.mark.parametrize("layout", ["bshd", "sliced", "fused", "expanded", "last_dim_strided"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_change_nothing(dtype: str, layout: str) -> None:
    for m, d, dv in ((77, 64, 64), (1500, 128, 96), (300, 33, 57)):
        k, v = make_kv(m, d, dv, dtype, layout)
        for recipe in recipes(m)[::3]:
            strided = prepare(k, v, recipe)
            for a, b in zip(strided, prepare(k.contiguous(), v.contiguous(), recipe), strict=True):
                assert same_numbers(a, b) if a.is_floating_point() else same_bits(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "heads", "m"), [(1, 1, 40001), (1, 3, 16384), (5, 120, 300)])
def test_any_number_of_chunks(batch: int, heads: int, m: int, dtype: str) -> None:
    """Chunks of uneven length, all that there may be, and heads enough that each is one chunk."""
    x = torch.randn(batch, heads, m, 128, device="cuda") + 5
    k, v = x[..., :64].to(DTYPES[dtype]), x[..., 64:].to(DTYPES[dtype])
    for recipe in recipes()[::5]:
        check(k, v, recipe)


@pytest.mark.usefixtures("one_at_a_time")
def test_sums_of_equal_numbers_do_not_drift() -> None:
    """Every addition of a constant rounds the same way: 100,000 tokens of a chunk are 3e-5 off.

    That is if 3,125 sums of 4 numbers are added up without keeping what is lost.
    """
    one = torch.full((1, 1, 1, 256), 0.1, device="cuda")
    x = one.expand(1, 1, 6_400_000, 256)
    found = prepare(x, x, {"qk": "int4", "granularity": "thread", "pv": "e4m3", "smooth": "kv"})
    check_mean(one, found.key_mean)
    check_mean(one, found.value_mean)


@pytest.mark.parametrize("recipe", recipes()[:10], ids=lambda r: "-".join(r.values()))
def test_numbers_at_the_limits(recipe: dict[str, str]) -> None:
    """Sums that fp32 does not have; the largest number of fp16, and the next."""
    k = torch.randn(1, 2, 300, 64, device="cuda")
    v = torch.randn(1, 2, 300, 64, device="cuda")
    k[..., 0] = 3e38
    v[..., 1] = -3e38
    v[:, :, 0, 2], v[:, :, 0, 3] = 65519.996, 65520.0
    v[..., 4] *= 1e-30
    k[:, 1], v[:, 1] = k[:, 1] * 1e-36, v[:, 1] * 1e-36
    check(k, v, recipe)
    found = prepare(k, v, recipe)
    assert found.key_mean.isfinite().all() and found.value_mean.isfinite().all()


@pytest.mark.parametrize("m", [700, 9000])
def test_two_runs_are_the_same_bits_on_any_stream(m: int) -> None:
    k, v = normal(2, 2, 40, m, 128)
    recipe = {"qk": "int8", "granularity": "tensor", "pv": "e4m3", "smooth": "kv"}
    first = prepare(k, v, recipe)
    for _ in range(5):
        assert all(same_bits(a, b) for a, b in zip(prepare(k, v, recipe), first, strict=True))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late_k, late_v = torch.zeros(2, *k.shape, dtype=k.dtype, device="cuda")
        torch.cuda._sleep(50_000_000)  # whatever ran on another stream would read zeros
        late_k.copy_(k)
        late_v.copy_(v)
        second = prepare(late_k, late_v, recipe)
    stream.synchronize()
    assert all(same_bits(a, b) for a, b in zip(second, first, strict=True))


LARGE: list[dict[str, Any]] = [
    {"qk": "int8", "granularity": "thread", "pv": "e4m3", "smooth": "kv"},
    {"qk": "int4", "granularity": "tensor", "pv": "fp16", "smooth": "v"},
]


@pytest.mark.usefixtures("one_at_a_time")
@pytest.mark.parametrize("recipe", LARGE)
def test_strides_beyond_32_bits(recipe: dict[str, str]) -> None:
    """One token every 2**25 elements, 2**32 of them from the first to the last."""
    tokens, stride = 129, 2**25
    storage = torch.empty(tokens * stride, dtype=torch.bfloat16, device="cuda")
    dense = normal(2, 1, 1, tokens, 64)
    strided = [
        storage.as_strided(x.shape, (0, 0, stride, 1), 64 * place).copy_(x)
        for place, x in enumerate(dense)
    ]
    found, expected = prepare(*strided, recipe), prepare(*dense, recipe)
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.usefixtures("one_at_a_time")
@pytest.mark.parametrize("recipe", LARGE)
def test_codes_beyond_32_bits(recipe: dict[str, str]) -> None:
    """Of 257 heads that are one in memory."""
    k, v = normal(2, 1, 1, 2**17, 128)
    everyone = prepare(k.expand(1, 257, -1, -1), v.expand(1, 257, -1, -1), recipe)
    assert everyone.value_codes.numel() > BEYOND
    heads = [Prepared(*(x[:, i : i + 1] for x in everyone)) for i in (0, 127, 128, 255, 256)]
    check_key(k, recipe, 128, heads[0])
    check_value(v, recipe, 128, heads[0])
    for head in heads[1:]:
        assert all(same_bits(a, b) for a, b in zip(head, heads[0], strict=True))
