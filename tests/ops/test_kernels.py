"""The CPU kernels against the oracle: quantizers bit for bit, attention within the budget."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import torch_sage  # noqa: F401  (defines the ops)
from tests.cases import (
    CASES,
    DTYPES,
    EMPTY_CASES,
    POISONS,
    AttentionCase,
    Inputs,
    Poison,
    make_inputs,
    poison,
)
from tests.numerics import (
    Expected,
    assert_within_budget,
    expect,
    output_budget_use,
    relative_l1,
    same_bits,
)
from torch_sage import _extension, reference

pytestmark = pytest.mark.skipif(
    not _extension.is_available(), reason=_extension.unavailable_reason() or ""
)
OPS = torch.ops.torch_sage
GRANULARITIES = ("token", "thread", "warp", "block", "tensor")
LAYOUTS = ("bhsd", "bshd", "sliced", "fused", "expanded", "last_dim_strided")

# Keys per step of the online softmax (kBlockKeys in main_loop.h): the oracle rounds P relative to
# the same maximum, so that a comparison sees the kernel's errors, not another sample of rounding.
KERNEL_TILE = 256


def expected(case: AttentionCase, inputs: Inputs) -> Expected:
    """Return the references, with the kernel's own means: only they are free (algorithm.md 2.1)."""
    means = {}
    if "k" in case.smooth:
        means["key_mean"] = OPS.quantize_key(inputs.key)[2]
    if "q" in case.smooth:
        means["smooth_block"] = max(case.seqlen_q, 1)
    if "v" in case.smooth:
        means["value_mean"] = OPS.quantize_value(inputs.value, smooth=True)[2]
    return expect(*inputs, **case.recipe, **means, tile=KERNEL_TILE)


def assert_kernel_is_right(case: AttentionCase, inputs: Inputs) -> None:
    output, lse = OPS.sdpa_with_lse(*inputs, **case.recipe)
    assert_within_budget(output, expected(case, inputs), lse=lse)
    assert same_bits(OPS.sdpa(*inputs, **case.recipe), output)


@pytest.mark.parametrize("case", [*CASES, *EMPTY_CASES], ids=lambda c: c.id)
def test_attention_is_within_budget(case: AttentionCase) -> None:
    assert_kernel_is_right(case, make_inputs(case))


@pytest.mark.parametrize("granularity", ["token", "thread"])
def test_every_sequence_length_is_within_budget(granularity: str) -> None:
    corners = itertools.cycle(["none", "top_left", "bottom_right", "none"])  # 4 against 3 pairs
    for length in range(1, 131):
        for n, m in ((length, length), (length, 70), (70, length)):
            shape = {"seqlen_q": n, "seqlen_k": m, "head_dim": 16, "head_dim_v": 8, "heads_q": 1}
            case = AttentionCase(**shape, heads_kv=1, causal=next(corners), granularity=granularity)
            assert_kernel_is_right(case, make_inputs(case))


def test_every_head_dim_is_within_budget() -> None:
    for head_dim in range(1, 257):
        case = AttentionCase(
            head_dim=head_dim, head_dim_v=257 - head_dim, seqlen_q=9, seqlen_k=11, smooth="kv"
        )
        assert_kernel_is_right(case, make_inputs(case))


@pytest.mark.parametrize("what", POISONS, ids=str)
@pytest.mark.parametrize(
    ("granularity", "smooth", "causal"),
    [("token", "", "top_left"), ("thread", "k", "none"), ("block", "kv", "bottom_right")],
)
def test_poison_reaches_exactly_the_oracles_set(
    what: Poison, granularity: str, smooth: str, causal: str
) -> None:
    case = AttentionCase(granularity=granularity, smooth=smooth, causal=causal, seqlen_k=70)
    assert_kernel_is_right(case, poison(make_inputs(case), what))


@pytest.mark.parametrize("mask", ["bool_hidden_rows", "float_hidden_rows"])
@pytest.mark.parametrize("what", POISONS, ids=str)
def test_hidden_rows_stay_zero_beside_poison(what: Poison, mask: str) -> None:
    case = AttentionCase(mask=mask, smooth="", seqlen_k=70)
    assert_kernel_is_right(case, poison(make_inputs(case), what))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_mask_that_is_nan_or_plus_infinity_gives_nan_rows(number: float) -> None:
    """torch's math backend gives NaN, its fused one zeros; a plausible number would hide it."""
    case = AttentionCase(mask="float")
    inputs = make_inputs(case)
    assert inputs.attn_mask is not None
    inputs.attn_mask[0, 1, 3, 5] = number
    assert_kernel_is_right(case, inputs)
    assert OPS.sdpa(*inputs).isnan().any(-1).nonzero().tolist() == [[0, 1, 3]]


def test_budget_has_room_to_fail() -> None:
    """The kernel takes half of its budget, as R_low does; a kernel of another case takes more."""
    case = AttentionCase(data="uneven", causal="top_left")
    inputs = make_inputs(case)
    right = expected(case, inputs)
    for causal, most in (("top_left", 0.6), ("bottom_right", 1e9)):
        output = OPS.sdpa(*inputs[:4], causal, None, **case.recipe)
        use = output_budget_use(output, right)
        assert use < most
    assert use > 4


def assert_quantizers_are_exact(x: Tensor, granularity: str) -> None:
    """Codes and scales of Q, of K smoothed and not, and of V smoothed and not."""
    rows = {"qk": "int8", "granularity": granularity}
    pairs = [(OPS.quantize_query(x, **rows), reference.quantize_query(x, **rows))]
    for smooth in (True, False):
        codes, scales, mean = OPS.quantize_key(x, smooth=smooth, **rows)
        given = mean if smooth else None
        pairs.append(
            ((codes, scales, mean), reference.quantize_key(x, given, smooth=smooth, **rows))
        )
        codes, scales, mean = OPS.quantize_value(x, smooth=smooth)
        given = mean if smooth else None
        pairs.append(((codes, scales, mean), reference.quantize_value(x, given, smooth=smooth)))
    for kernel, oracle in pairs:
        for a, b in zip(kernel, oracle, strict=True):
            assert same_bits(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_quantizers_are_exact_for_every_length(granularity: str, dtype: str) -> None:
    generator = torch.Generator().manual_seed(1)
    for length in range(131):
        x = torch.randn(1, 2, length, 5, generator=generator).to(DTYPES[dtype])
        assert_quantizers_are_exact(x, granularity)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_quantizers_are_exact_for_every_layout(layout: str, granularity: str, dtype: str) -> None:
    case = AttentionCase(batch=2, heads_kv=3, heads_q=3, seqlen_k=300, layout=layout, dtype=dtype)
    assert_quantizers_are_exact(make_inputs(case).key, granularity)


def special_rows(dtype: torch.dtype) -> Tensor:
    """Rows of every kind that rules R1-R7 mention, 16 channels each."""
    kind = torch.finfo(dtype)
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(100, 16, generator=generator, dtype=torch.float64)
    rows[3:30] *= torch.logspace(-38, 37, 27, dtype=torch.float64)[:, None]
    rows[30] = 0
    rows[31] = -0.0
    rows[32] = kind.max
    rows[33] = -kind.max
    rows[34] = kind.smallest_normal
    rows[35] = kind.smallest_normal * kind.eps  # the least subnormal
    rows[36] *= kind.smallest_normal
    rows[37] = 7.25
    rows[38, 5] = 1e4
    rows[39] = torch.arange(16) + 0.5  # ties
    rows[39, 0] = 127
    rows[40, 3] = torch.nan
    rows[41, 3] = torch.inf
    rows[42, 3] = -torch.inf
    rows[43] = torch.nan
    rows[43, 1:] = torch.inf
    return rows.clamp(-kind.max, kind.max).where(rows.isfinite(), rows).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_quantizers_are_exact_on_special_values(granularity: str, dtype: str) -> None:
    rows = special_rows(DTYPES[dtype])
    assert_quantizers_are_exact(rows.view(1, 1, 100, 16), granularity)
    assert_quantizers_are_exact(rows.view(1, 100, 1, 16), granularity)  # one row per head
    finite = rows[rows.isfinite().all(-1)]
    assert_quantizers_are_exact(finite[None, None], granularity)
    for kind in ("outlier_channel", "outlier_row", "constant_key", "zero_rows", "subnormal"):
        case = AttentionCase(data=kind, dtype=dtype, granularity=granularity, seqlen_k=130)
        assert_quantizers_are_exact(make_inputs(case).key, granularity)
        assert_quantizers_are_exact(make_inputs(case).value, granularity)


def test_quantizers_are_exact_on_every_bf16_and_fp16_number() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        everything = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        assert_quantizers_are_exact(everything.view(1, 1, 4096, 16), "token")
        assert_quantizers_are_exact(everything.view(1, 4096, 1, 16), "tensor")


@pytest.mark.parametrize("dtype", DTYPES)
def test_means_are_accurate_and_repeatable(dtype: str) -> None:
    """|error| <= 1e-5 * mean|x| per channel, whatever the common offset."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 2, 5000, 24, generator=generator) + 50 * torch.randn(24, generator=generator)
    x = x.to(DTYPES[dtype])
    mean = OPS.quantize_key(x)[2]
    exact = x.double()
    assert ((mean - exact.mean(2)).abs() <= 1e-5 * exact.abs().mean(2)).all()
    assert torch.equal(mean, OPS.quantize_key(x)[2])
    assert torch.equal(mean, OPS.quantize_value(x, smooth=True)[2])


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("smooth", ["", "k", "v", "kv"])  # Q is smoothed with K at hand only
def test_prequantized_operands_give_the_bits_of_the_whole_op(granularity: str, smooth: str) -> None:
    """Static K and V are quantized once and reused; nothing else may depend on it."""
    case = AttentionCase(granularity=granularity, smooth=smooth, seqlen_k=200, heads_q=4)
    inputs = make_inputs(case)
    rows = {"qk": "int8", "granularity": granularity}
    keys = OPS.quantize_key(inputs.key, smooth="k" in smooth, **rows)
    values = OPS.quantize_value(inputs.value, smooth="v" in smooth)
    output, lse = OPS.attention_with_lse(inputs.query, *keys, *values, **rows)
    whole, whole_lse = OPS.sdpa_with_lse(*inputs, **case.recipe)
    assert same_bits(output, whole)
    assert same_bits(lse, whole_lse)
    assert same_bits(OPS.attention(inputs.query, *keys, *values, **rows), whole)


@pytest.mark.parametrize("order", ["bhsd", "bshd"])
def test_output_order_changes_strides_only(order: str) -> None:
    inputs = make_inputs(AttentionCase(batch=2, head_dim_v=24))
    output = OPS.sdpa(*inputs, output_order=order)
    dense = output if order == "bhsd" else output.transpose(1, 2)
    assert dense.is_contiguous()
    assert torch.equal(output, OPS.sdpa(*inputs))


def test_runs_and_thread_counts_give_the_same_bits() -> None:
    case = AttentionCase(heads_q=6, heads_kv=3, seqlen_q=300, seqlen_k=520, causal="bottom_right")
    inputs = make_inputs(case)
    first, first_lse = OPS.sdpa_with_lse(*inputs, **case.recipe)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            for _ in range(5):
                output, lse = OPS.sdpa_with_lse(*inputs, **case.recipe)
                assert same_bits(output, first)
                assert same_bits(lse, first_lse)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("smooth", ["k", "qk"])
def test_rows_do_not_depend_on_their_batch(smooth: str) -> None:
    """A row's bits are the same alone and among others: nothing is shared by accident.

    Only the mean of a smoothed Q belongs to all rows of a head.
    """
    q, k, v, *_ = make_inputs(
        AttentionCase(batch=3, heads_q=4, heads_kv=2, seqlen_q=130, seqlen_k=130)
    )
    rows = slice(0, 130) if "q" in smooth else slice(60, 70)
    everything = OPS.sdpa(q, k, v, smooth=smooth)
    for batch in range(3):
        for head in range(4):
            b, one, kv = (slice(i, i + 1) for i in (batch, head, head // 2))
            single = OPS.sdpa(q[b, one, rows], k[b, kv], v[b, kv], smooth=smooth)
            assert same_bits(single, everything[b, one, rows])


def test_inputs_are_not_changed() -> None:
    """Smoothing subtracted the mean from the caller's K in place (ComfyUI#16035)."""
    case = AttentionCase(mask="float", smooth="kv", data="channel_bias")
    inputs = make_inputs(case)
    before = [x.clone() for x in inputs[:4] if x is not None]
    OPS.sdpa_with_lse(*inputs, **case.recipe)
    assert all(same_bits(a, b) for a, b in zip(before, inputs[:4], strict=True))


def test_offsets_beyond_2_to_the_31_elements() -> None:
    """32-bit offsets corrupted long videos (SageAttention#386); untouched pages cost nothing."""
    case = AttentionCase(batch=2, heads_q=1, heads_kv=1, dtype="bf16", seqlen_q=20, seqlen_k=20)
    inputs = make_inputs(case)
    storage = torch.empty(2**31 + 20 * 64, dtype=torch.bfloat16)
    far = [storage.as_strided(x.shape, (2**31, 20 * 64, 64, 1)) for x in inputs[:3]]
    near = [OPS.quantize_key(x)[0] for x in inputs[:3]]
    for view, x, codes in zip(far, inputs[:3], near, strict=True):
        view.copy_(x)
        assert torch.equal(OPS.quantize_key(view)[0], codes)
        query, key = inputs.query, inputs.key
        assert same_bits(OPS.sdpa(view, key, x), OPS.sdpa(x, key, x))
        assert same_bits(OPS.sdpa(query, view, view), OPS.sdpa(query, x, x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_default_recipe_meets_the_accuracy_gate(head_dim: int, dtype: str) -> None:
    """Issue 2: relative L1 <= .02 on N(0, 1)."""
    shape = {"seqlen_q": 512, "seqlen_k": 512, "head_dim": head_dim, "head_dim_v": head_dim}
    q, k, v, *_ = make_inputs(AttentionCase(heads_q=4, heads_kv=4, dtype=dtype, **shape))
    for causal in (False, True):
        exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=causal)
        output = OPS.sdpa(q, k, v, None, "top_left" if causal else "none")
        assert relative_l1(output, exact) <= 0.02


MEMORY_SCRIPT = """
import resource
import torch
import torch_sage
q, k, v = (torch.randn(1, 2, 16384, 64) for _ in range(3))
torch.ops.torch_sage.sdpa_with_lse(q[:, :, :300], k[:, :, :300], v[:, :, :300])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
torch.ops.torch_sage.sdpa_with_lse(q, k, v, None, "top_left")
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


def run_python(*arguments: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def test_memory_grows_with_tokens_not_with_their_square() -> None:
    """Codes of Q, K (1 byte) and V (2), the output (4), scales: far below one 16k x 16k buffer."""
    extra = int(run_python("-c", MEMORY_SCRIPT))
    elements = 2 * 16384 * 64
    assert extra < 12 * elements + 16 * 2**20  # 16 MiB: scratch and stacks of the threads
    assert extra < 16384**2 / 4


@pytest.mark.parametrize("isa", ["avx512_vnni", "avx2", "portable"])
def test_every_instruction_set_passes_the_same_tests(isa: str) -> None:
    compiled = _extension.build_info()["compiled_cpu_isas"].split(",")
    best = _extension.build_info()["cpu_isa"]
    if isa not in compiled or compiled.index(isa) > compiled.index(best):
        pytest.skip(f"this CPU has {best}, the library {compiled}: {isa} cannot run")
    tests = "within_budget or special_values or beside_poison"
    arguments = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", tests]
    output = run_python(*arguments, TORCH_SAGE_CPU_ISA=isa)
    assert " passed" in output
