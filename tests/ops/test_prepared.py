"""Ops of prepared keys and values without a GPU: shapes, every refusal, torch's transforms."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils.flop_counter import FlopCounterMode

from torch_sage import ops
from torch_sage.recipes import PREPARED, SUPPORT

NAMES = ("key_codes", "key_scales", "key_mean", "value_codes", "value_scales", "value_shift")
B, HQ, HKV, N, M, D, DV = 2, 4, 2, 9, 300, 80, 40


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def prepared(m: int = M, d: int = D, dv: int = DV) -> tuple[Tensor, ...]:
    result: tuple[Tensor, ...] = ops.prepare_kv(meta(B, HKV, m, d), meta(B, HKV, m, dv))
    return result


def arguments(m: int = M, d: int = D, dv: int = DV) -> list[Any]:
    """Return the arguments of ``attention_prepared`` up to the mask."""
    return [meta(B, HQ, N, d), *prepared(m, d, dv), m, dv]


@pytest.mark.parametrize(
    ("d", "dv", "padded"),
    [(1, 1, 64), (64, 64, 64), (65, 64, 128), (64, 65, 128), (128, 96, 128), (40, 129, 256)],
)
@pytest.mark.parametrize("m", [0, 1, 128, 129, 1024, 1025])
def test_shapes_are_whole_tiles(m: int, d: int, dv: int, padded: int) -> None:
    blocks, groups = math.ceil(m / 128), math.ceil(m / 1024)
    images, channels = (B, HKV, 2 * blocks, 64 * padded), (B, HKV, groups, padded)
    expected = {
        "key_codes": (torch.int8, images),
        "key_scales": (torch.float32, (B, HKV, blocks, 4)),
        "key_mean": (torch.float32, (B, HKV, d)),
        "value_codes": (torch.uint8, images),
        "value_scales": (torch.float32, channels),
        "value_shift": (torch.float32, channels),
    }
    found = {n: (t.dtype, t.shape) for n, t in zip(NAMES, prepared(m, d, dv), strict=True)}
    assert found == expected
    args = arguments(m, d, dv)
    assert ops.attention_prepared(*args).shape == (B, HQ, N, dv)
    output, lse = ops.attention_prepared_with_lse(*args, output_order="bshd")
    assert output.shape == (B, HQ, N, dv) and output.dtype == torch.bfloat16
    assert output.transpose(1, 2).is_contiguous()
    assert lse.shape == (B, HQ, N) and lse.dtype == torch.float32


def test_heads_that_are_too_wide_are_refused() -> None:
    """The layout has room for 256 channels whether or not the kernels have."""
    limit = SUPPORT[PREPARED].max_head_dim
    ops.attention_prepared(*arguments(64, limit, limit))
    args = arguments()
    if limit < 256:
        wide, message = meta(B, HKV, M, limit + 1), f"head_dim must be at most {limit} on cuda.sm90"
        for key, value in ((wide, V), (K, wide)):
            with pytest.raises(ValueError, match=f"{message}, got {limit + 1}"):
                ops.prepare_kv(key, value)
        args[8] = limit + 1
        with pytest.raises(ValueError, match=f"{message}, got {limit + 1}"):
            ops.attention_prepared(*args)


K, V = meta(B, HKV, M, D), meta(B, HKV, M, DV)
BAD_KV: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "rank": ((K[0], V), {}, "key must be 4-D [batch, heads, seqlen, head_dim], got [2, 300, 80]"),
    "value rank": ((K, V[0]), {}, "value must be 4-D"),
    "dtype": ((K.double(), V.double()), {}, "key must have dtype float32 or bfloat16 or float16"),
    "value dtype": ((K, V.half()), {}, "value must have dtype bfloat16, got float16"),
    "head_dim": ((meta(B, HKV, M, 257), V), {}, "key must have a head_dim between 1 and 256, got"),
    "head_dim_v": ((K, meta(B, HKV, M, 0)), {}, "value must have a head_dim between 1 and 256"),
    "tokens": ((K, V[:, :, 1:]), {}, "value must have shape [2, 2, 300, 40], got [2, 2, 299, 40]"),
    "heads": ((K, V[:, :1]), {}, "value must have shape [2, 2, 300, 40]"),
    "batch": ((K[:1], V), {}, "value must have shape [1, 2, 300, 40]"),
    "smooth": ((K, V), {"smooth": "qk"}, "smooth must be one of ['', 'k', 'v', 'kv'] on cuda.sm90"),
    "device": ((K, torch.empty(V.shape, dtype=V.dtype)), {}, "value must be on meta, got cpu"),
}


@pytest.mark.parametrize("case", BAD_KV)
def test_bad_keys_and_values_are_named(case: str) -> None:
    args, kwargs, message = BAD_KV[case]
    with pytest.raises(ValueError) as caught:
        ops.prepare_kv(*args, **kwargs)
    assert message in str(caught.value)


BAD_CALLS: dict[str, tuple[dict[Any, Any], str]] = {
    "query": ({0: meta(B, HQ, N, D)[0]}, "query must be 4-D"),
    "query dtype": ({0: meta(B, HQ, N, D, dtype=torch.int8)}, "query must have dtype float32 or"),
    "query head_dim": ({0: meta(B, HQ, N, D - 1)}, "key_mean must have shape [2, 2, 79], got"),
    "query batch": ({0: meta(3, HQ, N, D)}, "key_codes must have shape [3, 2, 6, 8192], got"),
    "query heads": ({0: meta(B, 3, N, D)}, "key must have a number of heads that divides query's"),
    "wide": ({0: meta(B, HQ, N, 257)}, "query must have a head_dim between 1 and 256, got 257"),
    "codes dtype": ({1: meta(B, HKV, 6, 64 * 128)}, "key_codes must have dtype int8, got bfloat"),
    "codes rank": ({1: meta(B, HKV, 6)}, "key_codes must be 4-D [batch, heads, tiles, codes], got"),
    "key_scales": ({2: meta(B, HKV, 3, 5)}, "key_scales must have shape [2, 2, 3, 4], got"),
    "key_mean": ({3: meta(B, HKV, 1)}, "key_mean must have shape [2, 2, 80], got [2, 2, 1]"),
    "value dtype": ({4: prepared()[0]}, "value_codes must have dtype uint8, got int8"),
    "value_codes": ({4: prepared()[3][:, :1]}, "value_codes must have shape [2, 2, 6, 8192], got"),
    "value_scales": ({5: meta(B, HKV, 2, 128)}, "value_scales must have shape [2, 2, 1, 128], got"),
    "value_shift": ({6: prepared()[5].half()}, "value_shift must have dtype float32, got float16"),
    "other device": ({6: torch.empty(B, HKV, 1, 128)}, "value_shift must be on meta, got cpu"),
    "seqlen_k": ({7: 400}, "key_codes must have shape [2, 2, 8, 8192], got [2, 2, 6, 8192]"),
    "negative": ({7: -1}, "seqlen_k must not be negative, got -1"),
    "head_dim_v": ({8: 257}, "head_dim_v must be between 1 and 256, got 257"),
    "no head_dim_v": ({8: 0}, "head_dim_v must be between 1 and 256, got 0"),
    "mask": ({"attn_mask": meta(3, M)}, "attn_mask must broadcast to [2, 4, 9, 300], got [3, 300]"),
    "mask dtype": (
        {"attn_mask": meta(N, M, dtype=torch.int32)},
        "attn_mask must have dtype bool or float32 or bfloat16 or float16, got int32",
    ),
    "mask and causal": (
        {"attn_mask": meta(N, M), "causal": "top_left"},
        "attn_mask must be None when causal is 'top_left'",
    ),
    "causal": ({"causal": "lower"}, "causal must be one of ['none', 'top_left', 'bottom_right']"),
    "scale": ({"scale": math.inf}, "scale must be finite in float32, got inf"),
    "exponential": (
        {"exponential": "fast"},
        "exponential must be one of ['mixed', 'exact'] on cuda.sm90, got 'fast'",
    ),
    "order": ({"output_order": "sbhd"}, "output_order must be one of ['bhsd', 'bshd'], got 'sbhd'"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_arguments_are_named(case: str) -> None:
    changes, message = BAD_CALLS[case]
    args = arguments()
    for position in [key for key in changes if isinstance(key, int)]:
        args[position] = changes[position]
    kwargs = {key: value for key, value in changes.items() if isinstance(key, str)}
    for op in (ops.attention_prepared, ops.attention_prepared_with_lse):
        with pytest.raises(ValueError) as caught:
            op(*args, **kwargs)
        assert message in str(caught.value)


def test_every_problem_is_listed() -> None:
    with pytest.raises(ValueError, match=r"smooth must .*; key must have dtype.*; value must have"):
        ops.prepare_kv(K.double(), V, smooth="q")
    args = arguments()
    args[2], args[3] = args[3], args[2]
    with pytest.raises(ValueError, match=r"key_scales must have shape.*; key_mean must have shape"):
        ops.attention_prepared(*args)


def on_cpu(args: Any) -> list[Any]:
    return [torch.zeros_like(a, device="cpu") if isinstance(a, Tensor) else a for a in args]


@pytest.mark.parametrize("where", ["real", "fake"])
def test_the_cpu_has_no_such_kernels_and_says_so(where: str) -> None:
    calls = [(ops.prepare_kv, [K, V], "key"), (ops.attention_prepared, arguments(), "query")]
    calls.append((ops.attention_prepared_with_lse, arguments(), "query"))
    for op, args, first in calls:
        args = on_cpu(args)
        message = f"{first} must be on a GPU of compute capability 9.0, got cpu"
        if where == "real":
            with pytest.raises(NotImplementedError, match=message):
                op(*args)
        else:
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                args = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
                with pytest.raises(NotImplementedError, match=message):
                    op(*args)


def test_fake_gpu_tensors_are_traced() -> None:
    with FakeTensorMode():
        q, k = torch.randn(2, B, HQ, M, D, device="cuda").unbind()
        output, lse = ops.attention_prepared_with_lse(q, *ops.prepare_kv(k, k), M, D)
    assert output.device == lse.device == q.device and output.shape == q.shape


def test_symbolic_lengths_add_no_guard() -> None:
    """Channels choose the tile and are guarded; batch, heads and tokens are not."""
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    dynamic, static = DimDynamic.DYNAMIC, DimDynamic.STATIC
    context = StatelessSymbolicContext(dynamic_sizes=[dynamic, dynamic, dynamic, static])
    q, k, v = (
        mode.from_tensor(torch.empty(shape, device="meta"), symbolic_context=context)
        for shape in ((B, HQ, N, D), (B, HKV, M, D), (B, HKV, M, DV))
    )
    before = len(env.guards)
    operands = ops.prepare_kv(k, v)
    assert all(isinstance(size, torch.SymInt) for size in operands[0].shape[:3])
    output = ops.attention_prepared(q, *operands, k.shape[2], DV)
    assert isinstance(output.shape[2], torch.SymInt)
    assert len(env.guards) == before


@pytest.mark.parametrize("name", ["key", "value"])
def test_wanted_gradient_is_refused_by_name(name: str) -> None:
    args = {"key": K, "value": V}
    args[name] = args[name].clone().requires_grad_()
    with pytest.raises(RuntimeError, match=f"{name} must not require grad"):
        ops.prepare_kv(**args)
    with torch.no_grad():
        assert not ops.prepare_kv(**args)[2].requires_grad


def test_gradient_of_query_and_mask_is_refused() -> None:
    args = arguments()
    mask = meta(N, M).requires_grad_()
    with pytest.raises(RuntimeError, match="attn_mask must not require grad"):
        ops.attention_prepared(*args, mask)
    args[0].requires_grad_()
    with pytest.raises(RuntimeError, match="query must not require grad"):
        ops.attention_prepared(*args)


@pytest.fixture
def half_autocast() -> Iterator[None]:
    """Autocast to float16 on CUDA; ``torch.autocast`` refuses to where no GPU is."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.float16)
    yield
    torch.set_autocast_enabled("cuda", before[0])
    torch.set_autocast_dtype("cuda", before[1])


def test_autocast_casts_what_is_not_quantized(half_autocast: None) -> None:
    with FakeTensorMode():
        q, k = torch.empty(B, HQ, M, D, device="cuda"), torch.empty(B, HKV, M, D, device="cuda")
        operands = ops.prepare_kv(k, k.bfloat16())
        output, lse = ops.attention_prepared_with_lse(q, *operands, M, D)
    assert [x.dtype for x in operands] == [x.dtype for x in prepared()]
    assert (output.dtype, lse.dtype) == (torch.float16, torch.float32)


def test_vmap_folds_into_the_batch() -> None:
    keys, values = meta(3, B, HKV, M, D), meta(B, HKV, 3, M, DV)
    operands = torch.vmap(ops.prepare_kv, in_dims=(0, 2))(keys, values)
    assert [x.shape for x in operands] == [(3, *x.shape) for x in prepared()]

    def attend(query: Tensor, mask: Tensor) -> Any:
        return ops.attention_prepared_with_lse(query, *prepared(), M, DV, mask)

    queries, masks = meta(B, HQ, N, D, 3), meta(3, N, M)
    output, lse = torch.vmap(attend, in_dims=(-1, 0))(queries, masks)
    assert output.shape == (3, B, HQ, N, DV) and lse.shape == (3, B, HQ, N)


def test_flops_are_those_of_the_tokens() -> None:
    """Tiles are filled up to 64 tokens and to 64, 128 or 256 channels, which is no attention."""
    args = arguments()
    for op in (ops.attention_prepared, ops.attention_prepared_with_lse):
        with FlopCounterMode(display=False) as counted:
            op(*args)
        assert counted.get_total_flops() == 2 * B * HQ * N * M * (D + DV)
    with FlopCounterMode(display=False) as counted:
        ops.prepare_kv(K, V)
    assert counted.get_total_flops() == 0
