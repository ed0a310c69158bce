"""Attention over packed sequences is that of every sequence alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import torch_sage
from tests.numerics import exact_attention, relative_l1, same_bits
from tests.varlen import Packed, as_batch, one_by_one, pack, sequences, starts
from torch_sage import SageConfig, _extension, ops
from torch_sage.config import as_config
from torch_sage.recipes import SUPPORT
from torch_sage.varlen import choose_recipe

pytestmark = pytest.mark.skipif(not _extension.is_available(), reason="extension not built")

QUERIES, KEYS = [65, 0, 1, 64, 130, 3], [63, 7, 1, 0, 200, 65]
RECIPE = SUPPORT["cpu"].default.op_kwargs()


@pytest.mark.parametrize("causal", ["none", "top_left", "bottom_right"])
@pytest.mark.parametrize("layout", ["thd", "htd", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_sequence_has_the_bits_of_a_call_alone(
    dtype: torch.dtype, layout: str, causal: str
) -> None:
    packed = pack(QUERIES, KEYS, head_dim=40, head_dim_v=33, dtype=dtype, layout=layout)
    expected, expected_lse = one_by_one(packed, causal, -0.2, **RECIPE)
    output, lse = ops.varlen_sdpa_with_lse(*packed, causal, -0.2, **RECIPE)
    assert same_bits(output, expected) and same_bits(lse, expected_lse)
    assert same_bits(ops.varlen_sdpa(*packed, causal, -0.2, **RECIPE), expected)
    assert output.is_contiguous() and lse.is_contiguous()


def test_rows_that_see_no_key_are_zero() -> None:
    packed = pack([5, 4], [0, 9])
    output, lse = ops.varlen_sdpa_with_lse(*packed, **RECIPE)
    assert (output[:5] == 0).all() and (lse[:, :5] == -torch.inf).all()
    assert output[5:].abs().amin((1, 2)).gt(0).any() and lse[:, 5:].isfinite().all()


@pytest.mark.parametrize("granularity", SUPPORT["cpu"].granularity)
@pytest.mark.parametrize("smooth", ["", "k", "qkv"])
def test_recipes_of_the_device_run(granularity: str, smooth: str) -> None:
    packed = pack([70, 9], [65, 100], layout="thd")
    recipe = {**RECIPE, "granularity": granularity, "smooth": smooth}
    assert same_bits(ops.varlen_sdpa(*packed, **recipe), one_by_one(packed, "none", **recipe)[0])


def exact(packed: Packed, causal: str) -> tuple[Tensor, Tensor]:
    """Return output and LSE of exact attention."""
    outputs, lses = [], []
    for queries, keys in sequences(packed):
        q, k, v = (as_batch(x, r) for x, r in zip(packed, (queries, keys, keys), strict=False))
        output, lse = exact_attention(q, k, v, None, causal)
        outputs.append(output[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outputs), torch.cat(lses, 1)


@pytest.mark.parametrize(("argument", "causal"), [({}, "none"), ({"is_causal": True}, "top_left")])
def test_the_function_is_accurate(argument: dict[str, Any], causal: str) -> None:
    """Each sequence has another bias in K and V, which a mean over all of them would leave."""
    packed = pack([100, 77, 300], [100, 90, 301], dtype=torch.float32)
    output = torch_sage.varlen_attention(*packed, **argument)
    expected, expected_lse = exact(packed, causal)
    assert isinstance(output, Tensor) and relative_l1(output, expected) < 0.01
    with_lse = torch_sage.varlen_attention(*packed, **argument, return_lse=True)
    assert isinstance(with_lse, torch_sage.AttentionOutput)
    assert same_bits(with_lse.output, output)
    assert (with_lse.lse - expected_lse).abs().max() < 0.05


def test_causal_from_the_bottom_right_is_by_sequence() -> None:
    packed = pack([3, 2], [5, 4], dtype=torch.float32)
    output = torch_sage.varlen_attention(*packed, causal="bottom_right")
    assert isinstance(output, Tensor)
    assert relative_l1(output, exact(packed, "bottom_right")[0]) < 0.02


def test_rows_outside_every_sequence_are_zero() -> None:
    packed = pack([10, 20, 5], [10, 20, 5])
    inner = torch.tensor([10, 30], dtype=torch.int32)
    output, lse = ops.varlen_sdpa_with_lse(*packed[:3], inner, inner, 20, 20, **RECIPE)
    whole, whole_lse = ops.varlen_sdpa_with_lse(*packed, **RECIPE)
    assert same_bits(output[10:30], whole[10:30]) and same_bits(lse[:, 10:30], whole_lse[:, 10:30])
    for outside in (slice(10), slice(30, 35)):
        assert (output[outside] == 0).all() and (lse[:, outside] == -torch.inf).all()


def test_nothing_to_do() -> None:
    none, empty = pack([], []), pack([0, 0], [3, 0])
    assert ops.varlen_sdpa(*none, **RECIPE).shape == (0, 4, 64)
    output, lse = ops.varlen_sdpa_with_lse(*empty, **RECIPE)
    assert output.shape == (0, 4, 64) and lse.shape == (4, 0)


P = pack([9, 4], [11, 5], dtype=torch.float32)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"query": P.query[None]}, "query must be 3-D [tokens, heads, head_dim], got [1, 13"),
    "dtype": ({"key": P.key.half()}, "key must have the dtype of query"),
    "tokens": ({"value": P.value[:-1]}, "value must have the number of tokens of key, 16, got 15"),
    "head_dim": ({"key": P.key[..., :8]}, "key must have the head_dim of query, 64, got 8"),
    "heads": ({"query": P.query[:, :3]}, "key must have a number of heads that divides query's 3"),
    "starts": (
        {"cu_seqlens_q": P.cu_seqlens_q[:0]},
        "cu_seqlens_q must be 1-D with one element more than there are sequences, got [0]",
    ),
    "starts of keys": (
        {"cu_seqlens_k": P.cu_seqlens_k[:2]},
        "cu_seqlens_k must have shape [3], got [2]",
    ),
    "int64": ({"cu_seqlens_k": P.cu_seqlens_k.long()}, "cu_seqlens_k must have dtype int32, got"),
    "longest": ({"max_seqlen_q": -1}, "max_seqlen_q must not be negative, got -1"),
    "causal": ({"causal": "lower"}, "causal must be one of ['none', 'top_left', 'bottom_right']"),
    "scale": ({"scale": float("inf")}, "scale must be finite in float32, got inf"),
    "recipe": ({"pv": "fp16"}, "pv must be one of ['bf16'] on cpu, got 'fp16'"),
}


@pytest.mark.parametrize("where", ["fake", "real"])
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case: str, where: str) -> None:
    changes, message = BAD[case]
    arguments = {**P._asdict(), **changes}
    if where == "fake":
        mode = torch._subclasses.FakeTensorMode()
        arguments = {
            name: mode.from_tensor(x) if isinstance(x, Tensor) else x
            for name, x in arguments.items()
        }
    with pytest.raises(ValueError) as error:
        ops.varlen_sdpa(**arguments)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cu_seqlens_q": [0, 8, 5]}, "cu_seqlens_q must not decrease, and be between 0 and"),
        ({"cu_seqlens_q": [-1, 5, 13]}, "cu_seqlens_q must not decrease, and be between 0 and"),
        ({"cu_seqlens_k": [0, 5, 17]}, "the number of tokens, 16, got 5 and then 17"),
        ({"cu_seqlens_k": [0, 2**31 - 1, 16]}, "cu_seqlens_k must not decrease"),
        (
            {"max_seqlen_k": 10},
            "max_seqlen_k must be at least 11, the length of a sequence, got 10",
        ),
    ],
)
def test_lengths_that_do_not_fit_are_named_on_cpu(changes: dict[str, Any], message: str) -> None:
    tensors = {k: torch.tensor(v, dtype=torch.int32) for k, v in changes.items() if k[0] == "c"}
    with pytest.raises(ValueError) as error:
        ops.varlen_sdpa(**{**P._asdict(), **changes, **tensors})
    assert message in str(error.value)


def test_the_function_says_what_it_refuses() -> None:
    with pytest.raises(TypeError, match="cu_seqlens_q must be a Tensor, got list"):
        torch_sage.varlen_attention(*P[:3], [0, 9, 13], *P[4:])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is_causal must be False when causal is given"):
        torch_sage.varlen_attention(*P, is_causal=True, causal="none")
    with pytest.raises(NotImplementedError, match="pv must be one of"):
        torch_sage.varlen_attention(*P, config=SageConfig(pv="e4m3"))
    with pytest.raises(RuntimeError, match="value must not require grad"):
        torch_sage.varlen_attention(P.query, P.key, P.value.clone().requires_grad_(), *P[3:])
    meta = [x.to("meta") if isinstance(x, Tensor) else x for x in P]
    with pytest.raises(NotImplementedError, match="query must be on one of"):
        torch_sage.varlen_attention(*meta)


@pytest.mark.parametrize(("config", "granularity"), [("auto", "token_thread"), ("sage1", "block")])
def test_hopper_takes_its_own_kernels(config: str, granularity: str, hopper: None) -> None:
    """The op is not run: there is no GPU."""
    with FakeTensorMode():
        query = torch.empty(1, 1, 128, device="cuda", dtype=torch.bfloat16)
    recipe, reasons = choose_recipe(query, query, as_config(config))
    assert not reasons and recipe is not None and recipe.granularity == granularity


def test_lengths_are_not_baked_into_a_graph(recorder: Any) -> None:
    def run(*args: Any) -> Any:
        return torch_sage.varlen_attention(*args, causal="bottom_right", return_lse=True)

    compiled = torch.compile(run, backend=recorder, fullgraph=True, dynamic=True)
    for lengths in ([9, 4], [7, 30, 2], [3, 8, 1, 5]):
        packed = pack(lengths, lengths, dtype=torch.float32)
        for got, expected in zip(compiled(*packed), run(*packed), strict=True):
            assert same_bits(got, expected)
    assert len(recorder.graphs) == 1


def test_vmap_calls_once_for_each() -> None:
    twice = P._replace(query=torch.stack([P.query, -P.query]))
    mapped = torch.vmap(lambda q: ops.varlen_sdpa_with_lse(q, *P[1:]))(twice.query)
    for i, sign in enumerate((1, -1)):
        alone = ops.varlen_sdpa_with_lse(sign * P.query, *P[1:])
        assert all(same_bits(m[i], a) for m, a in zip(mapped, alone, strict=True))


def test_flops_are_those_of_the_sequences() -> None:
    with FlopCounterMode(display=False) as counted:
        ops.varlen_sdpa(*P)
    assert counted.get_total_flops() == 2 * 4 * (9 * 11 + 4 * 5) * (64 + 64)


def test_autocast_leaves_the_lengths() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        output = ops.varlen_sdpa(*P, **RECIPE)
    cast = [x.bfloat16() for x in P[:3]]
    assert same_bits(output, ops.varlen_sdpa(*cast, *P[3:], **RECIPE))
    assert starts([3]).dtype == torch.int32
