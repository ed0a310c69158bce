"""Attention that is split among ranks: the cases, and what the oracle says of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.experimental._attention import context_parallel_unshard

from tests.cases import DTYPES, AttentionCase, Inputs, make_inputs
from tests.gpu.sm90 import ORACLE
from tests.numerics import Expected, exact_attention, expect, relative_l1
from torch_sage import AttentionOutput, SageConfig, ops

# Keys per step of the online softmax in the CPU kernel, as in tests/ops/test_kernels.py.
KERNEL_TILE = 256


MIXED_ERROR = 0.05  # relative L1 of mixed exponentials against exact ones, both of 8-bit P


class Kernels(NamedTuple):
    """What the oracle must know of the kernels that quantize a shard and attend to it."""

    granularity: Callable[[AttentionCase], str]
    oracle: Callable[[AttentionCase], dict[str, Any]]
    means: Callable[[Tensor, Tensor, str], dict[str, Tensor]]
    """Those of a shard, as the kernels subtract them."""


def _means_of_parts(key: Tensor, value: Tensor, smooth: str) -> dict[str, Tensor]:
    means = {}
    if "k" in smooth:
        means["key_mean"] = ops.quantize_key(key)[2]
    if "v" in smooth:
        means["value_mean"] = ops.quantize_value(value, smooth=True)[2]
    return means


def _means_of_prepared(key: Tensor, value: Tensor, smooth: str) -> dict[str, Tensor]:
    # That of V is the mean of a group's tokens but for the rounding of fp32 sums.
    return {"key_mean": ops.prepare_kv(key, value, smooth=smooth)[2]} if "k" in smooth else {}


def parts_of(pv: dict[str, str], tile: int) -> Kernels:
    """Return kernels with V in 16 bits, ``pv`` by the dtype of a case, and ``tile`` keys a step."""
    return Kernels(
        lambda case: case.granularity,
        lambda case: {**case.recipe, "pv": pv[case.dtype], "tile": tile},
        _means_of_parts,
    )


PARTS = parts_of(dict.fromkeys(DTYPES, "bf16"), KERNEL_TILE)
PREPARED = Kernels(
    lambda case: "auto",
    lambda case: {**ORACLE, "smooth": case.smooth},
    _means_of_prepared,
)


@dataclass(frozen=True)
class SplitCase:
    """One call of ring or all-to-all attention; sizes are those of the whole sequence."""

    method: str
    order: str
    attention: AttentionCase

    @property
    def id(self) -> str:
        return f"{self.method}-{self.order}-{self.attention.id}"

    def config(self, kernels: Kernels) -> SageConfig:
        smooth = self.attention.smooth
        return SageConfig(
            granularity=kernels.granularity(self.attention),
            smooth_q=False,
            smooth_k="k" in smooth,
            smooth_v="v" in smooth,
        )


def ring(order: str = "contiguous", **attention) -> SplitCase:
    lengths = {"seqlen_q": 328, "seqlen_k": 328}
    return SplitCase("ring", order, AttentionCase(**{**lengths, **attention}))


def ulysses(**attention) -> SplitCase:
    sizes = {"seqlen_q": 200, "seqlen_k": 200, "heads_q": 4, "heads_kv": 4, "head_dim": 32}
    return SplitCase("ulysses", "contiguous", AttentionCase(**{**sizes, **attention}))


# Regimes: both orders, causal or not, GQA, MQA; shards of 82 or 164 tokens, which no block of 64
# divides, nor their halves in zigzag order; every dtype, granularity and smoothing that travels;
# masks that hide whole shards and whole rows, and of every broadcast shape; a mean of K per shard
# that differs from the others' (channel_bias, uneven).
SPLIT_CASES = [
    ring(data="channel_bias"),
    ring(causal="top_left", dtype="bf16", heads_q=4, heads_kv=2),
    ring("zigzag", causal="top_left", data="uneven", heads_q=4, heads_kv=2),
    ring("zigzag", causal="top_left", data="channel_bias", layout="bshd", batch=2, seqlen_q=64,
         seqlen_k=64),
    *(
        ring("zigzag", causal="top_left", granularity=granularity, smooth=smooth, dtype=dtype)
        for granularity, smooth, dtype in (
            ("thread", "kv", "fp16"), ("warp", "k", "fp32"), ("block", "", "bf16"),
            ("tensor", "v", "fp32"),
        )
    ),
    ring(seqlen_q=96, seqlen_k=200, head_dim_v=40, scale=-0.2, smooth="", heads_q=3, heads_kv=1),
    *(
        ring(seqlen_q=200, seqlen_k=200, mask=mask, batch=2, dtype=dtype, heads_q=4)
        for mask, dtype in (
            ("bool_hidden_rows", "fp32"), ("bool_late", "bf16"), ("key_padding", "fp32"),
            ("float", "fp32"), ("float_column", "fp32"), ("float_min_rows", "fp32"),
        )
    ),
    ulysses(data="channel_bias"),
    ulysses(causal="top_left", heads_q=8, dtype="bf16", granularity="thread", smooth="kv"),
    ulysses(seqlen_q=96, head_dim_v=24, scale=0.3, granularity="block"),
    *(ulysses(mask=mask, batch=2, heads_q=8) for mask in ("bool", "float_row", "key_padding")),
]  # fmt: skip


# Regimes of the images, scales per 128 keys and groups per 1024 of prepared operands: shards and
# halves of shards that end inside each, more than one group, widths of 64 and 128, heads cut apart.
PREPARED_CASES = [
    ring(data="channel_bias", smooth="kv"),
    ring("zigzag", causal="top_left", data="uneven", heads_q=4, heads_kv=2, smooth="kv"),
    ring("zigzag", causal="top_left", data="channel_bias", heads_q=1, heads_kv=1, seqlen_q=2200,
         seqlen_k=2200, smooth="kv", head_dim=16, head_dim_v=8, dtype="bf16"),
    ring(causal="top_left", smooth="v", head_dim=128, head_dim_v=40, dtype="fp16"),
    ring(seqlen_q=96, seqlen_k=200, smooth="", mask="key_padding", batch=2, head_dim_v=80),
    ulysses(causal="top_left", heads_q=8, dtype="bf16", smooth="kv", data="channel_bias"),
    ulysses(seqlen_q=96, scale=-0.3, mask="float", smooth="k"),
]  # fmt: skip


def held_tokens(order: str, rank: int, size: int, tokens: int) -> Tensor:
    """Return the tokens that ``rank`` holds, by the definition in docs/distributed.md."""
    pieces = torch.arange(tokens).chunk(size if order == "contiguous" else 2 * size)
    return pieces[rank] if order == "contiguous" else torch.cat([pieces[rank], pieces[-1 - rank]])


def rows_that_meet(case: SplitCase, rank: int, source: int, size: int) -> Tensor:
    """Return which queries of ``rank`` are quantized together to meet the keys of ``source``."""
    causal = case.attention.causal == "top_left"
    if case.method == "ulysses":  # a rank has all tokens of its heads; one stands for all
        tokens = torch.arange(case.attention.seqlen_q if rank == 0 else 0)
        return tokens[source * len(tokens) // size :] if causal else tokens
    tokens = held_tokens(case.order, rank, size, case.attention.seqlen_q)
    if causal and source > rank:  # all its keys lie behind our queries, or behind the first half
        return tokens[len(tokens) // 2 if case.order == "zigzag" else len(tokens) :]
    return tokens


def attend(
    case: SplitCase,
    kernels: Kernels = PARTS,
    order: str | None = None,
    inputs: Inputs | None = None,
) -> AttentionOutput:
    """Share the inputs of a case, attend, and put the results together again."""
    from torch_sage import distributed

    query, key, value, mask, causal, scale = inputs or make_inputs(case.attention)
    layout: Any = {"order": case.order}
    options: Any = {
        "is_causal": causal == "top_left",
        "scale": scale,
        "enable_gqa": True,
        "config": case.config(kernels),
    }
    q, k, v = (distributed.shard_sequence(x, **layout) for x in (query, key, value))
    assert torch.equal(distributed.unshard_sequence(q, **layout), query)
    if case.method == "ring":
        if mask is not None and mask.shape[-2] != 1:
            mask = distributed.shard_sequence(mask, -2, **layout)
        options["order"] = order or case.order
        result = distributed.ring_attention_with_lse(q, k, v, mask, **options)
        alone = distributed.ring_attention(q, k, v, mask, **options)
    else:
        result = distributed.ulysses_attention_with_lse(q, k, v, mask, **options)
        alone = distributed.ulysses_attention(q, k, v, mask, **options)
    if kernels is PREPARED and q.device.type == "cuda" and mask is None:
        # The LSE is of exact exponentials, without it a part of them is mixed.
        assert relative_l1(alone, result.output) < MIXED_ERROR
    else:
        assert torch.equal(alone, result.output)
    return AttentionOutput(*(distributed.unshard_sequence(x, **layout) for x in result))


def attend_in_context(mesh: DeviceMesh, buffers: list[Tensor], is_causal: bool) -> Tensor:
    """Call SDPA under context_parallel, and put its result together again."""
    from torch_sage import distributed

    before = [x.clone() for x in buffers]
    with torch.no_grad():
        with distributed.context_parallel(mesh, buffers=buffers, buffer_seq_dims=[2, 2, 2]):
            assert buffers[0].shape[2] == before[0].shape[2] // mesh.size()
            output = F.scaled_dot_product_attention(*buffers, is_causal=is_causal)
        assert all(torch.equal(a, b) for a, b in zip(buffers, before, strict=True))
        return context_parallel_unshard(mesh, [output], [2])[0]


def expect_split(
    case: SplitCase, size: int, kernels: Kernels = PARTS, inputs: Inputs | None = None
) -> Expected:
    """Return the references of the whole rows, with operands quantized as the ranks do it.

    Each rank's keys are attended to by the oracle, with the kernel's own mean, and the results are
    averaged in fp64: of the oracle itself that is what one device computes from all the codes.
    """
    query, key, value, mask, causal, scale = inputs or make_inputs(case.attention)
    n, m = query.shape[2], key.shape[2]
    if causal == "top_left":
        mask = torch.ones(n, m, dtype=torch.bool, device=query.device).tril()
    recipe = kernels.oracle(case.attention)
    oracle, naive, roundings = [], [], []
    for source in range(size):
        tokens = held_tokens(case.order, source, size, m)
        k, v = key[:, :, tokens], value[:, :, tokens]
        means = kernels.means(k, v, case.attention.smooth)
        oracle.append(_no_keys(query, value, torch.float64))
        naive.append(_no_keys(query, value, torch.float32))
        for rank in range(size):
            rows = rows_that_meet(case, rank, source, size)
            if len(rows) == 0:
                continue
            seen = mask
            if seen is not None:
                seen = seen if seen.shape[-1] == 1 else seen[..., tokens]
                seen = seen if seen.shape[-2] == 1 else seen[..., rows, :]
            part = expect(query[:, :, rows], k, v, seen, "none", scale, **recipe, **means)
            for whole, result in ((oracle[-1], part.oracle), (naive[-1], part.naive)):
                whole.output[:, :, rows] = result.output.to(whole.output.dtype)
                whole.lse[:, :, rows] = result.lse.to(whole.lse.dtype)
            roundings.append((part.output_rounding, part.lse_rounding))
    low = _average(naive)
    return Expected(
        exact_attention(query, key, value, mask, scale=scale),
        _average(oracle),
        AttentionOutput(low.output.to(query.dtype), low.lse),
        *(torch.stack(rounding).amax(0) for rounding in zip(*roundings, strict=True)),
    )


def _no_keys(query: Tensor, value: Tensor, dtype: torch.dtype) -> AttentionOutput:
    """Return the result [B, Hq, N, Dv] of queries that see nothing."""
    rows = query.shape[:3]
    output = value.new_zeros((*rows, value.shape[3]), dtype=dtype)
    return AttentionOutput(output, value.new_full(rows, -torch.inf, dtype=dtype))


def _average(parts: list[AttentionOutput]) -> AttentionOutput:
    lse = torch.stack([part.lse.double() for part in parts])
    weights = lse.softmax(0).nan_to_num(0.0)  # NaN: no key is visible anywhere
    outputs = torch.stack([part.output.double() for part in parts])
    return AttentionOutput((weights[..., None] * outputs).sum(0), lse.logsumexp(0))
