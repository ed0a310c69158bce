"""Packed sequences on a GPU have the bits of each one alone; no host knows their lengths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import torch_sage
from tests.gpu import sm90
from tests.gpu.mma import MEMBERS, Member
from tests.gpu.shared import OPS, Recipe, assert_replays_other_lengths
from tests.numerics import same_bits
from tests.varlen import Packed, as_batch, one_by_one, pack, sequences, starts
from torch_sage import SageConfig
from torch_sage.recipes import PREPARED, SUPPORT

# Tiles of 64 keys, blocks of 128 rows, and statistics of more than 4 chunks of 256 rows, which a
# launch of its own adds up, meet their edges; 17,000 keys have chunks of more than 256. Hopper's
# own kernels have blocks of 192 rows, steps of 128 keys, and groups of 1024.
LENGTHS = {
    "edges": ([0, 1, 63, 64, 65, 1000, 128], [1, 0, 64, 63, 129, 65, 1000]),
    "groups": ([191, 192, 193, 385, 1, 0, 129], [1023, 1024, 1025, 2049, 128, 127, 1]),
    "one": ([300], [257]),
    "chunks": ([40, 130, 7, 200], [1025, 1, 17000, 1300]),
    "many": ([3 * i % 50 for i in range(1100)], [5 * i % 70 for i in range(1100)]),
    "few": ([0] * 300 + [1], [0] * 300 + [5]),  # pieces of work; more blocks
    "skewed": ([20000] + [30] * 50, [20000] + [30] * 50),
}


HOPPER = SUPPORT[PREPARED].default.op_kwargs()
# One of each family, for what does not depend on the formats.
FAMILIES = {
    "mma-bf16": MEMBERS[0].recipe("tensor", "qkv"),
    "mma-fp8": MEMBERS[4].recipe("tensor", "qkv"),
    "mma-int4": MEMBERS[-1].recipe("tensor", "qkv"),
    "hopper": HOPPER,
}
of_each_family = pytest.mark.parametrize("recipe", FAMILIES.values(), ids=FAMILIES)


def laid_out(lengths: str, dims: tuple[int, int], layout: str, dtype: torch.dtype) -> Packed:
    queries, keys = LENGTHS[lengths]
    if layout == "fused":
        keys = queries
    d, dv = dims
    return pack(queries, keys, head_dim=d, head_dim_v=dv, dtype=dtype, layout=layout, device="cuda")


def outputs_one_by_one(packed: Packed, causal: str, scale: float | None, recipe: Recipe) -> Tensor:
    """Return the output of ``sdpa`` on every sequence alone, packed."""
    q, k, v = packed[:3]
    output = q.new_zeros((*q.shape[:2], v.shape[2]))
    for queries, keys in sequences(packed):
        operands = as_batch(q, queries), as_batch(k, keys), as_batch(v, keys)
        output[queries] = OPS.sdpa(*operands, None, causal, scale, **recipe)[0].transpose(0, 1)
    return output


def assert_one_by_one(packed: Packed, causal: str, scale: float | None, recipe: Recipe) -> None:
    expected, expected_lse = one_by_one(packed, causal, scale, **recipe)
    output, lse = OPS.varlen_sdpa_with_lse(*packed, causal, scale, **recipe)
    assert same_bits(output, expected)
    assert same_bits(lse, expected_lse)
    if recipe.get("exponential") == "mixed":  # exact where the LSE is returned
        expected = outputs_one_by_one(packed, causal, scale, recipe)
    assert same_bits(OPS.varlen_sdpa(*packed, causal, scale, **recipe), expected)


@pytest.mark.parametrize("member", [*MEMBERS, "hopper"], ids=str)
@pytest.mark.parametrize("causal", ["none", "top_left", "bottom_right"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_every_sequence_has_the_bits_of_a_call_alone(
    lengths: str, causal: str, member: Member | str
) -> None:
    packed = pack(*LENGTHS[lengths], device="cuda")
    recipe = HOPPER
    if isinstance(member, Member):
        recipe = member.recipe(smooth="qk" if member.qk == "int4" else "k")
    assert_one_by_one(packed, causal, None, recipe)


@pytest.mark.parametrize("member", [MEMBERS[0], MEMBERS[4], MEMBERS[-1]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["htd", "sliced", "fused"])
@pytest.mark.parametrize(
    ("granularity", "smooth", "dims"),
    [
        ("tensor", "qkv", (64, 64)),
        ("block", "v", (128, 40)),
        ("warp", "", (33, 128)),
        ("tensor", "", (256, 256)),
        ("thread", "qk", (200, 17)),
    ],
)
def test_recipes_layouts_and_widths(
    granularity: str,
    smooth: str,
    dims: tuple[int, int],
    layout: str,
    dtype: torch.dtype,
    member: Member,
) -> None:
    packed = laid_out("edges", dims, layout, dtype)
    assert_one_by_one(packed, "bottom_right", -0.1, member.recipe(granularity, smooth))


@pytest.mark.parametrize("exponential", sm90.EXPONENTIALS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["htd", "sliced", "fused"])
@pytest.mark.parametrize(
    ("smooth", "dims"),
    [("k", (64, 64)), ("v", (128, 40)), ("", (33, 128)), ("kv", (128, 128)), ("kv", (17, 9))],
)
def test_layouts_and_widths_of_hopper(
    smooth: str, dims: tuple[int, int], layout: str, dtype: torch.dtype, exponential: str
) -> None:
    packed = laid_out("groups", dims, layout, dtype)
    recipe = {**sm90.RECIPE, "smooth": smooth, "exponential": exponential}
    assert_one_by_one(packed, "bottom_right", -0.1, recipe)


@of_each_family
@pytest.mark.parametrize("operand", [0, 1, 2])
def test_poison_stays_in_its_sequence(operand: int, recipe: Recipe) -> None:
    clean = pack([100, 200, 70], [100, 200, 70], device="cuda")
    spoilt = clean[operand].clone()
    spoilt[150, 1, 3] = torch.nan
    poisoned = clean._replace(**{clean._fields[operand]: spoilt})
    outputs = [OPS.varlen_sdpa_with_lse(*x, **recipe) for x in (clean, poisoned)]
    for right, found in zip(*outputs, strict=True):
        rows = found.movedim(found.shape.index(370), 0)
        expected = right.movedim(right.shape.index(370), 0)
        assert same_bits(rows[:100], expected[:100]) and same_bits(rows[300:], expected[300:])
    assert outputs[1][0][100:300].isnan().any()


@of_each_family
def test_rows_that_no_sequence_has_are_zero(recipe: Recipe) -> None:
    packed = pack([100, 200, 70], [100, 200, 70], device="cuda")
    inner = torch.tensor([100, 300], dtype=torch.int32, device="cuda")
    output, lse = OPS.varlen_sdpa_with_lse(*packed[:3], inner, inner, 200, 200, **recipe)
    whole, whole_lse = OPS.varlen_sdpa_with_lse(*packed, **recipe)
    assert same_bits(output[100:300], whole[100:300])
    assert same_bits(lse[:, 100:300], whole_lse[:, 100:300])
    for outside in (slice(100), slice(300, 370)):
        assert (output[outside] == 0).all() and (lse[:, outside] == -torch.inf).all()


@of_each_family
def test_what_is_longer_than_it_may_be_is_left_out(recipe: Recipe) -> None:
    packed = pack([300, 40], [300, 40], device="cuda")
    output = OPS.varlen_sdpa(*packed[:5], 200, 200, **recipe)
    short = [torch.cat([x[:200], x[300:]]) for x in packed[:3]]
    edges = starts([200, 40], "cuda")
    expected = OPS.varlen_sdpa(*short, edges, edges, 200, 200, **recipe)
    assert same_bits(torch.cat([output[:200], output[300:]]), expected)
    assert (output[200:300] == 0).all()


@pytest.mark.parametrize(
    "edges",
    [
        [0, 2**31 - 1, -(2**31), 5, 400],
        [-7, 300, 10, 370, 370],
        [370, 0, 370, 0, 370],
        [2**30] * 5,
        [-1] * 5,
    ],
)
@of_each_family
def test_lengths_that_make_no_sense_touch_no_other_memory(recipe: Recipe, edges: list[int]) -> None:
    """What comes out is nobody's; compute-sanitizer sees what is read (tests/gpu/sanitize.py)."""
    packed = pack([100, 200, 70], [100, 200, 70], device="cuda")
    wrong = torch.tensor(edges, dtype=torch.int32, device="cuda")
    for q_edges, k_edges in ((wrong, wrong), (packed.cu_seqlens_q.repeat(2)[:5], wrong)):
        OPS.varlen_sdpa_with_lse(*packed[:3], q_edges, k_edges, 370, 370, **recipe)
    torch.cuda.synchronize()
    assert_one_by_one(packed, "none", None, recipe)


@of_each_family
def test_a_graph_is_replayed_with_other_lengths(recipe: Recipe) -> None:
    assert_replays_other_lengths(recipe)


@of_each_family
def test_nothing_waits_for_the_gpu(recipe: Recipe) -> None:
    packed = pack([1000] * 20, [1000] * 20, device="cuda")
    OPS.varlen_sdpa_with_lse(*packed, **recipe)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.set_sync_debug_mode("error")
        try:
            OPS.varlen_sdpa_with_lse(*packed, **recipe)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda._sleep(200_000_000)
        done = torch.cuda.Event()
        OPS.varlen_sdpa(*packed, **recipe)
        done.record()
        assert not done.query()
    torch.cuda.synchronize()


@of_each_family
def test_memory_is_that_of_the_tokens(recipe: Recipe) -> None:
    """One long sequence among short ones does not make those long."""
    packed = pack([20000] + [30] * 50, [20000] + [30] * 50, device="cuda")
    OPS.varlen_sdpa(*packed, **recipe)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    OPS.varlen_sdpa(*packed, **recipe)
    inputs = sum(x.numel() * x.element_size() for x in packed[:3])
    assert torch.cuda.max_memory_allocated() - before < 2 * inputs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_function_runs_the_default_recipe(dtype: torch.dtype) -> None:
    packed = pack([300, 20], [300, 20], dtype=dtype, device="cuda")
    result = torch_sage.varlen_attention(*packed, is_causal=True, return_lse=True)
    for got, expected in zip(result, one_by_one(packed, "top_left", **HOPPER), strict=True):
        assert isinstance(got, Tensor) and same_bits(got, expected)
    found = torch_sage.varlen_attention(*packed, is_causal=True)
    assert isinstance(found, Tensor)
    assert same_bits(found, outputs_one_by_one(packed, "top_left", None, HOPPER))


def test_recipes_without_such_kernels_are_refused() -> None:
    packed = pack([30], [30], device="cuda")
    with pytest.raises(NotImplementedError, match="smooth must be one of"):
        config = SageConfig(granularity="token_thread", smooth_q=True)
        torch_sage.varlen_attention(*packed, config=config)
    with pytest.raises((RuntimeError, ValueError), match="smooth must be one of"):
        OPS.varlen_sdpa(*packed, **{**HOPPER, "smooth": "q"})
    with pytest.raises((RuntimeError, ValueError), match="cu_seqlens_k must be on cuda:0"):
        OPS.varlen_sdpa(*packed[:4], packed.cu_seqlens_k.cpu(), 30, 30, **MEMBERS[0].recipe())


@of_each_family
@pytest.mark.parametrize("name", ["varlen_sdpa", "varlen_sdpa_with_lse"])
def test_opcheck(name: str, recipe: Recipe) -> None:
    packed = pack([30, 70], [30, 70], device="cuda")
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    op = getattr(OPS, name).default
    torch.library.opcheck(op, packed, recipe, test_utils=tests)
