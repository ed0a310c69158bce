"""The ops on a GPU, by the Triton kernels."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import torch_sage
from tests.cases import DTYPES, AttentionCase, Inputs, make_inputs
from tests.gpu.shared import assert_replays_other_lengths
from tests.numerics import assert_within_budget, relative_l1, same_bits
from tests.triton.oracle import ALL_CASES, GRANULARITIES, arguments, expected
from tests.triton.packed import (
    WITH_LSE,
    assert_nothing_outside_is_found,
    assert_one_by_one,
    assert_tiles_are_found,
)
from tests.varlen import one_by_one, pack, starts
from torch_sage import SageConfig, reference
from torch_sage.ops import triton_ops
from torch_sage.recipes import SUPPORT

OPS = torch.ops.torch_sage
# Every other case has P and V in fp16: nearly every one compiles kernels of its own, for seconds.
WITH_FORMATS = [
    pytest.param(case, pv, id=f"{case.id}-{pv}")
    for case, pv in zip(ALL_CASES, itertools.cycle(("bf16", "fp16")), strict=False)
]
MEASURED = SageConfig(granularity="token_block")  # Triton's alone, with a library or without
ALWAYS = MEASURED.with_options(dispatch="always", on_unsupported="error")


def on_gpu(inputs: Inputs) -> Inputs:
    return Inputs(*(x.cuda() if isinstance(x, Tensor) else x for x in inputs))


def assert_right(case: AttentionCase, pv: str) -> None:
    """Call what the ops call where the library has no kernel."""
    inputs = make_inputs(case)
    given = arguments(case, on_gpu(inputs), pv)
    output, lse = triton_ops.sdpa_with_lse(**given)
    assert_within_budget(output.cpu(), expected(case, inputs, pv, "cuda"), lse=lse.cpu())


@pytest.mark.parametrize(("case", "pv"), WITH_FORMATS)
def test_attention_is_within_budget(case: AttentionCase, pv: str) -> None:
    assert_right(case, pv)


@pytest.mark.parametrize(
    ("mask", "causal"), [("none", "none"), ("none", "bottom_right"), ("float_inf", "none")]
)
@pytest.mark.parametrize("pv", ["bf16", "fp16"])
def test_the_output_is_the_same_without_its_lse(pv: str, mask: str, causal: str) -> None:
    case = AttentionCase(mask=mask, causal=causal, smooth="qkv")
    given = arguments(case, on_gpu(make_inputs(case)), pv)
    assert same_bits(triton_ops.sdpa(**given), triton_ops.sdpa_with_lse(**given)[0])


@pytest.mark.parametrize("seed", range(16))
def test_random_cases_are_within_budget(seed: int) -> None:
    """16 times 40 cases; few head dimensions, since each compiles a kernel."""
    pick = random.Random(seed)
    head_dim, head_dim_v = pick.choice([(64, 64), (128, 128), (40, 80), (96, 33), (256, 256)])
    granularity, smooth = pick.choice(GRANULARITIES), pick.choice(SUPPORT["cuda"].smooth)
    dtype, pv = pick.choice(sorted(DTYPES)), pick.choice(["bf16", "fp16"])
    scales = pick.choice([(None, 0.05), (-0.1,)])  # a negative one is another kernel
    for _ in range(40):
        heads_kv = pick.choice([1, 2, 3])
        case = AttentionCase(
            batch=pick.choice([1, 2]),
            heads_q=heads_kv * pick.choice([1, 2, 4]),
            heads_kv=heads_kv,
            seqlen_q=pick.randint(1, 300),
            seqlen_k=pick.randint(1, 300),
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            causal=pick.choice(["none", "top_left", "bottom_right"]),
            scale=pick.choice(scales),
            granularity=granularity,
            smooth=smooth,
            dtype=dtype,
            layout=pick.choice(["bhsd", "bshd", "sliced", "fused"]),
        )
        assert_right(case, pv)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantizers_are_bit_exact(granularity: str, dtype: str) -> None:
    rows: dict[str, Any] = {"granularity": granularity}
    for n, d in ((1, 8), (77, 80), (1000, 64), (2048, 128), (333, 256)):
        x = torch.randn(2, 3, n, d).mul(3).to(DTYPES[dtype])
        x[0, 0, 0] = 0
        if n > 20:
            x[0, 1, 5, 3] = torch.nan
            x[0, 0, 9, 1] = torch.inf
        pairs = [(OPS.quantize_query(x.cuda(), **rows), reference.quantize_query(x, **rows))]
        for smooth, block in itertools.product((True, False), (64, 128)):
            ours = OPS.quantize_key(x.cuda(), smooth=smooth, block=block, **rows)
            mean = ours[2].cpu() if smooth else None
            exact = reference.quantize_key(x, mean, smooth=smooth, block=block, **rows)
            pairs.append((ours, exact))
        for pv, smooth in itertools.product(("bf16", "fp16"), (True, False)):
            ours = OPS.quantize_value(x.cuda(), smooth=smooth, pv=pv)
            mean = ours[2].cpu() if smooth else None
            pairs.append((ours, reference.quantize_value(x, mean, smooth=smooth, pv=pv)))
        for actual, exact in pairs:
            for a, b in zip(actual, exact, strict=True):
                assert same_bits(a.cpu(), b)


def sdpa(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
    """Call the op with the default recipe of the Triton kernels."""
    output: Tensor = OPS.sdpa(q, k, v, *options, **SUPPORT["cuda"].default.op_kwargs())
    return output


def qkv(*shape: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(shape, dtype=dtype, device="cuda") for _ in range(3))  # type: ignore[return-value]


def test_opcheck() -> None:
    q, k, v = qkv(1, 2, 70, 64)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(OPS.sdpa.default, (q, k, v), test_utils=tests)
    torch.library.opcheck(OPS.sdpa_with_lse.default, (q, k, v, None, "top_left"), test_utils=tests)
    torch.library.opcheck(OPS.quantize_key.default, (k,), test_utils=tests)
    torch.library.opcheck(OPS.quantize_value.default, (v,), test_utils=tests)


def test_two_runs_are_the_same_bits_on_any_stream() -> None:
    q, k, v = qkv(2, 8, 1000, 128)
    first = sdpa(q, k, v)
    assert same_bits(sdpa(q, k, v), first)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # whatever ran on another stream would finish too early
        late_q = q.clone()
        second = sdpa(late_q, k, v)
    stream.synchronize()
    assert same_bits(second, first)


def test_cuda_graph_replays_new_inputs() -> None:
    q, k, v = qkv(1, 4, 500, 64)
    sdpa(q, k, v, None, "top_left")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sdpa(q, k, v, None, "top_left")
    before = torch.cuda.memory_allocated()
    for _ in range(1000):
        graph.replay()
    assert torch.cuda.memory_allocated() == before
    for x in (q, k, v):
        x.copy_(torch.randn_like(x))
    graph.replay()
    assert same_bits(captured, sdpa(q, k, v, None, "top_left"))


@pytest.mark.parametrize("mode", [None, "reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_models_use_the_op(mode: str | None, dynamic: bool) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2) * 2

    torch._dynamo.reset()
    fast = torch.compile(attend, dynamic=dynamic, options=torch_sage.options(ALWAYS, mode=mode))
    with torch.no_grad():
        for n in (256, 300):
            inputs = qkv(1, 4, n, 64)
            for _ in range(3):
                actual = fast(*inputs).clone()
            assert relative_l1(actual.cpu(), attend(*inputs).cpu()) < 0.02
    report = torch_sage.report()
    assert "rewritten" in str(report)


def test_eager_api_runs_what_was_measured_to_be_faster() -> None:
    q, k, v = qkv(1, 8, 4096, 128)
    assert [r.code.value for r in torch_sage.why_not(q, k, v, config=MEASURED)] == [
        "below_crossover"
    ]
    assert torch_sage.why_not(q, k, v, config=ALWAYS) == ()
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    actual = torch_sage.scaled_dot_product_attention(q, k, v, config=ALWAYS)
    assert relative_l1(actual.cpu(), exact.cpu()) < 0.02


def test_offsets_beyond_32_bits() -> None:
    """One token every 2**25 elements: 2**32 of them from the first to the last."""
    tokens, stride = 129, 2**25
    storage = torch.empty(tokens * stride, dtype=torch.bfloat16, device="cuda")
    q, k, v = qkv(1, 1, tokens, 64)
    strided = []
    for place, x in enumerate((q, k, v)):
        view = storage.as_strided(x.shape, (0, 0, stride, 1), 64 * place)
        view.copy_(x)
        strided.append(view)
    assert same_bits(sdpa(*strided), sdpa(q, k, v))


def test_autocast_and_default_half() -> None:
    q, k, v = qkv(1, 2, 200, 64, dtype=torch.float32)
    with torch.autocast("cuda", torch.float16):
        output = torch_sage.scaled_dot_product_attention(q, k, v, config=ALWAYS)
    assert output.dtype == torch.float16
    exact = F.scaled_dot_product_attention(q, k, v)
    assert relative_l1(output.float().cpu(), exact.cpu()) < 0.02


DEFAULT = SUPPORT["cuda"].default.op_kwargs()  # Triton's alone, as MEASURED
# Tiles of 64 rows and of 128 keys, chunks of 256 whose sums others add up 32 at a time, and 128
# sequences that a search asks for at once, meet their edges.
LENGTHS = {
    "edges": ([0, 1, 63, 64, 65, 1000, 128], [1, 0, 64, 63, 129, 65, 1000]),
    "chunks": ([40, 130, 7, 200], [1025, 1, 17000, 257]),
    "many": ([3 * i % 50 for i in range(300)], [5 * i % 70 for i in range(300)]),
    "skewed": ([20000] + [30] * 50, [20000] + [30] * 50),
}


@pytest.mark.parametrize("causal", ["none", "top_left", "bottom_right"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_every_sequence_has_the_bits_of_a_call_alone(lengths: str, causal: str) -> None:
    packed = pack(*LENGTHS[lengths], device="cuda")
    assert_one_by_one(packed, causal, None, **DEFAULT)


@pytest.mark.parametrize(
    ("granularity", "smooth", "dims", "layout", "dtype", "pv"),
    [
        ("token_block", "qkv", (128, 128), "thd", torch.bfloat16, "bf16"),
        ("token", "v", (64, 64), "htd", torch.float16, "fp16"),
        ("thread", "kv", (128, 40), "sliced", torch.float32, "fp16"),
        ("warp", "qk", (33, 128), "fused", torch.bfloat16, "fp16"),
        ("block", "", (256, 256), "thd", torch.float32, "bf16"),
    ],
)
def test_packed_recipes_layouts_and_widths(
    granularity: str, smooth: str, dims: tuple[int, int], layout: str, dtype: torch.dtype, pv: str
) -> None:
    queries, keys = [65, 0, 1, 130], [33, 7, 0, 300]
    packed = pack(
        queries,
        queries if layout == "fused" else keys,
        head_dim=dims[0],
        head_dim_v=dims[1],
        dtype=dtype,
        layout=layout,
        device="cuda",
    )
    formats = {"qk": "int8", "granularity": granularity, "pv": pv, "smooth": smooth}
    assert_one_by_one(packed, "bottom_right", -0.1, **formats)


def test_packed_sequences_reach_the_kernels() -> None:
    """By the ops, whether the library has kernels for others or not, and by the function."""
    packed = pack([300, 20], [300, 20], device="cuda")
    expected = one_by_one(packed, "top_left", **DEFAULT)
    for got, right in zip(
        OPS.varlen_sdpa_with_lse(*packed, "top_left", **DEFAULT), expected, strict=True
    ):
        assert same_bits(got, right)
    assert same_bits(OPS.varlen_sdpa(*packed, "top_left", **DEFAULT), expected[0])
    result = torch_sage.varlen_attention(*packed, is_causal=True, config=MEASURED)
    assert isinstance(result, Tensor) and same_bits(result, expected[0])
    with pytest.raises((RuntimeError, ValueError), match="pv must be one of"):
        OPS.varlen_sdpa(*packed, **{**DEFAULT, "pv": "fp16_fp16"})
    with pytest.raises((RuntimeError, ValueError), match="cu_seqlens_k must be on cuda:0"):
        OPS.varlen_sdpa(*packed[:4], packed.cu_seqlens_k.cpu(), 300, 300, **DEFAULT)


@pytest.mark.parametrize("lengths", [[300], [3, 0, 9] * 43, [1] * 17000])
def test_tiles_of_packed_sequences_are_found(lengths: list[int]) -> None:
    assert_tiles_are_found(starts(lengths, "cuda"), 32, most=20000)


@pytest.mark.parametrize(
    "edges",
    [[0, 2**31 - 1, -(2**31), 5, 400], [-7, 300, 10, 370, 370], [370, 0, 370, 0, 370], [-1] * 5],
)
def test_lengths_that_make_no_sense_touch_no_other_memory(edges: list[int]) -> None:
    packed = pack([100, 200, 70], [100, 200, 70], device="cuda")
    wrong = torch.tensor(edges, dtype=torch.int32, device="cuda")
    for size in (1, 64, 128):
        assert_nothing_outside_is_found(wrong, 370, size, longest=200)
    for q_edges, k_edges in ((wrong, wrong), (packed.cu_seqlens_q.repeat(2)[:5], wrong)):
        WITH_LSE(*packed[:3], q_edges, k_edges, 370, 370, "bottom_right", **DEFAULT)
    torch.cuda.synchronize()
    assert_one_by_one(packed, "bottom_right", None, **DEFAULT)


def test_packed_rows_that_no_sequence_has_are_zero() -> None:
    packed = pack([100, 200, 70], [100, 200, 70], device="cuda")
    inner = torch.tensor([100, 300], dtype=torch.int32, device="cuda")
    output, lse = WITH_LSE(*packed[:3], inner, inner, 200, 200, **DEFAULT)
    whole, whole_lse = WITH_LSE(*packed, **DEFAULT)
    assert same_bits(output[100:300], whole[100:300])
    assert same_bits(lse[:, 100:300], whole_lse[:, 100:300])
    for outside in (slice(100), slice(300, 370)):
        assert (output[outside] == 0).all() and (lse[:, outside] == -torch.inf).all()


def test_a_graph_is_replayed_with_other_lengths() -> None:
    assert_replays_other_lengths(DEFAULT)


def test_packed_sequences_wait_for_nothing_and_take_the_memory_of_their_tokens() -> None:
    packed = pack([20000] + [30] * 50, [20000] + [30] * 50, device="cuda")
    OPS.varlen_sdpa(*packed, **DEFAULT)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        OPS.varlen_sdpa(*packed, **DEFAULT)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    inputs = sum(x.numel() * x.element_size() for x in packed[:3])
    assert torch.cuda.max_memory_allocated() - before < 2 * inputs


@pytest.mark.parametrize("name", ["varlen_sdpa", "varlen_sdpa_with_lse"])
def test_opcheck_of_packed_sequences(name: str) -> None:
    packed = pack([30, 70], [30, 70], device="cuda")
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(OPS, name).default, packed, DEFAULT, test_utils=tests)
