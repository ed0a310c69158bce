"""What the tests of every family of CUDA kernels have in common; a recipe is that of ``sdpa``."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.cases import DTYPES, AttentionCase, Inputs
from tests.numerics import exact_attention, relative_l1, same_bits
from tests.varlen import one_by_one, pack, starts

OPS = torch.ops.torch_sage
Recipe = dict[str, Any]


def to_gpu(x: Tensor) -> Tensor:
    """Return the same view of the same storage, NaN around it included."""
    storage = x.untyped_storage().cuda()
    empty = torch.empty(0, dtype=x.dtype, device="cuda")
    return empty.set_(storage, x.storage_offset(), x.shape, x.stride())


def on_gpu(inputs: Inputs) -> Inputs:
    return Inputs(*(to_gpu(x) if isinstance(x, Tensor) else x for x in inputs))


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same bits, any NaN equal to any other."""
    return same_bits(*(torch.where(x.isnan(), torch.nan, x) for x in (a, b)))


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def qkv(*shape: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    return normal(*shape, dtype=dtype), normal(*shape, dtype=dtype), normal(*shape, dtype=dtype)


def random_case(
    pick: random.Random,
    *,
    granularity: Sequence[str],
    smooth: Sequence[str],
    head_dims: Sequence[int],
    most_queries: int,
    most_keys: Sequence[int],
) -> AttentionCase:
    """Return a case; the last of ``head_dims`` is the largest there is, others are drawn often."""
    heads_kv = pick.choice([1, 2])
    causal = pick.choice(["none", "top_left", "bottom_right"])
    masks = ["none", "bool", "key_padding", "bool_hidden_rows", "float", "float_inf", "alibi"]
    return AttentionCase(
        batch=pick.choice([1, 2]),
        heads_q=heads_kv * pick.choice([1, 2, 3]),
        heads_kv=heads_kv,
        seqlen_q=pick.randint(1, most_queries),
        seqlen_k=pick.choice([pick.randint(1, most) for most in most_keys]),
        head_dim=pick.choice([*head_dims, pick.randint(1, head_dims[-1])]),
        head_dim_v=pick.choice([*head_dims, pick.randint(1, head_dims[-1])]),
        dtype=pick.choice(sorted(DTYPES)),
        causal=causal,
        mask=pick.choice(masks) if causal == "none" else "none",
        scale=pick.choice([None, None, 0.05, -0.1]),
        granularity=pick.choice(granularity),
        smooth=pick.choice(smooth),
        data=pick.choice(["normal", "normal", "channel_bias", "uneven", "outlier_row"]),
        layout=pick.choice(["bhsd", "bshd", "sliced", "fused", "expanded"]),
    )


# Query rows, keys and both head dimensions; with 4 times 96 heads more pieces of work than a GPU
# has multiprocessors.
MANY = {
    "short": (150, 130, 64, 64),
    "groups": (400, 2100, 64, 64),
    "wide": (400, 1100, 128, 100),
    "wider": (300, 1100, 200, 256),
    "hidden": (1500, 300, 64, 64),
}


def assert_heads_are_independent(recipe: Recipe, shape: str, causal: str) -> None:
    """Require the bits of a head to be those of a call with that head alone."""
    batch, heads_kv, group = 4, 48, 2
    n, m, d, dv = MANY[shape]
    q = normal(batch, heads_kv * group, n, d)
    k, v = normal(batch, heads_kv, m, d), normal(batch, heads_kv, m, dv)
    mask = torch.rand(n, m, device="cuda") > 0.4 if causal == "masked" else None
    semantics = (mask, "none" if causal == "masked" else causal)
    output = OPS.sdpa(q, k, v, *semantics, **recipe)
    with_lse = OPS.sdpa_with_lse(q, k, v, *semantics, **recipe)
    for b, h in ((0, 0), (1, 17), (3, heads_kv - 2), (3, heads_kv - 1)):
        kv, heads = (slice(b, b + 1), slice(h, h + 1)), slice(group * h, group * (h + 1))
        one = (slice(b, b + 1), heads)
        alone = (q[one], k[kv], v[kv], *semantics)
        assert same_bits(output[one], OPS.sdpa(*alone, **recipe))
        for whole, part in zip(with_lse, OPS.sdpa_with_lse(*alone, **recipe), strict=True):
            assert same_bits(whole[one], part)


def accuracy_inputs(data: str, head_dim: int, causal: str) -> Inputs:
    generator = torch.Generator(device="cuda").manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    q, k, v = drawn(3, 1, 8, 4096, head_dim)
    if data != "normal":
        k = k + 5 * drawn(8, 1, head_dim)
    if data == "key_and_value_bias":
        v = v + 5 * drawn(8, 1, head_dim)
    return Inputs(q.bfloat16(), k.bfloat16(), v.bfloat16(), None, causal, None)


def error_of(output: Tensor, inputs: Inputs) -> float:
    """Return the relative L1 error against exact attention on the same inputs."""
    exact = []
    for head in range(inputs.query.shape[1]):  # one at a time: workers share the GPU's memory
        q, k, v = (x[:, head : head + 1] for x in inputs[:3])
        exact.append(exact_attention(q, k, v, None, inputs.causal).output)
    return relative_l1(output, torch.cat(exact, dim=1))


def assert_same_bits_on_any_stream(recipe: Recipe, causal: str, head_dim: int) -> None:
    """Require one result of runs whose blocks are done in another order every time."""
    q, k, v = qkv(2, 64, 1500, head_dim)
    first = OPS.sdpa(q, k, v, None, causal, **recipe)
    for _ in range(5):
        assert same_bits(OPS.sdpa(q, k, v, None, causal, **recipe), first)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late_q, late_k, late_v = torch.zeros(3, *q.shape, dtype=q.dtype, device="cuda")
        torch.cuda._sleep(50_000_000)  # whatever ran on another stream would read zeros
        for late, x in ((late_q, q), (late_k, k), (late_v, v)):
            late.copy_(x)
        second = OPS.sdpa(late_q, late_k, late_v, None, causal, **recipe)
    stream.synchronize()
    assert same_bits(second, first)


def assert_streams_do_not_meet(recipe: Recipe) -> None:
    """Require workspaces to belong to a call."""
    inputs = [qkv(1, 16, 1000, 64) for _ in range(2)]
    expected = [OPS.sdpa(*x, None, "top_left", **recipe) for x in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    found: list[list[Tensor]] = [[], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[i].append(OPS.sdpa(*inputs[i], None, "top_left", **recipe))
    torch.cuda.synchronize()
    for outputs, right in zip(found, expected, strict=True):
        assert all(same_bits(output, right) for output in outputs)


def assert_graph_replays_new_inputs(run: Callable[..., tuple[Tensor, ...]], *args: Any) -> None:
    """Require a replay of ``run(q, k, v, *args)`` to read its inputs and to allocate nothing."""
    q, k, v = qkv(2, 8, 500, 64)
    run(q, k, v, *args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(q, k, v, *args)
    graph.replay()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(1000):
        graph.replay()
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before
    for _ in range(3):
        for x in (q, k, v):
            x.copy_(torch.randn_like(x))
        graph.replay()
        for found, eager in zip(captured, run(q, k, v, *args), strict=True):
            assert same_bits(found, eager)


def assert_memory_order(recipe: Recipe, order: str, dtype: torch.dtype) -> None:
    """Require the output and the LSE to lie as ``output_order`` says."""
    q, k, v = qkv(2, 3, 77, 40, dtype=dtype)
    output, lse = OPS.sdpa_with_lse(q, k, v[..., :33], **recipe, output_order=order)
    assert (output.transpose(1, 2) if order == "bshd" else output).is_contiguous()
    assert output.shape == (2, 3, 77, 33) and output.dtype == dtype
    assert lse.is_contiguous() and lse.dtype == torch.float32
    assert same_bits(output, OPS.sdpa_with_lse(q, k, v[..., :33], **recipe)[0])


def opcheck(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op.default, args, kwargs, test_utils=tests)


# The largest tests: offsets beyond 32 bits.
BEYOND = 2**32  # elements; on the way there lies 2**31


def assert_strides_beyond_32_bits(recipe: Recipe) -> None:
    """Require dense inputs' bits of tokens 2**25 elements apart, 2**32 from first to last."""
    tokens, stride = 129, 2**25
    storage = torch.empty(tokens * stride, dtype=torch.bfloat16, device="cuda")
    dense, strided = [normal(1, 1, tokens, 64) for _ in range(3)], []
    for place, x in enumerate(dense):
        view = storage.as_strided(x.shape, (0, 0, stride, 1), 64 * place)
        strided.append(view.copy_(x))
    assert same_bits(OPS.sdpa(*strided, **recipe), OPS.sdpa(*dense, **recipe))
    found, expected = (OPS.sdpa_with_lse(*x, **recipe) for x in (strided, dense))
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


def assert_packed_strides_beyond_32_bits(recipe: Recipe) -> None:
    """Require dense inputs' bits of packed tokens 2**25 elements apart."""
    tokens, stride = 129, 2**25
    storage = torch.empty(tokens * stride, dtype=torch.bfloat16, device="cuda")
    dense, strided = [normal(tokens, 1, 64) for _ in range(3)], []
    for place, x in enumerate(dense):
        view = storage.as_strided(x.shape, (stride, 64, 1), 64 * place)
        strided.append(view.copy_(x))
    edges = torch.tensor([0, 90, tokens], dtype=torch.int32, device="cuda")
    lengths = (edges, edges, 90, 90)
    found, expected = (OPS.varlen_sdpa_with_lse(*x, *lengths, **recipe) for x in (strided, dense))
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


def assert_outputs_beyond_32_bits(recipe: Recipe) -> None:
    heads, n, d = 257, 2**17, 128
    one, k, v = normal(1, 1, n, d), normal(1, 1, 64, d), normal(1, 1, 64, d)
    q, k_all, v_all = (x.expand(1, heads, -1, -1) for x in (one, k, v))
    output, lse = OPS.sdpa_with_lse(q, k_all, v_all, None, "top_left", **recipe)
    assert output.numel() > BEYOND
    alone, alone_lse = OPS.sdpa_with_lse(one, k, v, None, "top_left", **recipe)
    for head in (0, 127, 128, 255, 256):
        assert same_bits(output[:, head], alone[:, 0])
        assert same_bits(lse[:, head], alone_lse[:, 0])


def assert_mask_strides_beyond_32_bits(recipe: Recipe) -> None:
    """Require dense bits of a mask with a query row every 2**28 elements."""
    q, k, v = normal(1, 2, 16, 64), normal(1, 2, 300, 64), normal(1, 2, 300, 64)
    dense = normal(16, 300)
    storage = torch.empty(16 * 2**28 + 300, dtype=torch.bfloat16, device="cuda")
    mask = storage.as_strided((16, 300), (2**28, 1)).copy_(dense)
    found = OPS.sdpa(q, k, v, mask, **recipe)
    assert same_bits(found, OPS.sdpa(q, k, v, dense, **recipe))


def assert_replays_other_lengths(recipe: Recipe) -> None:
    """Require a CUDA graph to compute packed sequences of the lengths that it finds at replay."""
    tokens, count = 1500, 6
    first = pack([250] * count, [250] * count, device="cuda")
    inputs = first._replace(max_seqlen_q=tokens, max_seqlen_k=tokens)
    OPS.varlen_sdpa_with_lse(*inputs, "bottom_right", **recipe)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = OPS.varlen_sdpa_with_lse(*inputs, "bottom_right", **recipe)
    for lengths in ([1500, 0, 0, 0, 0, 0], [1, 2, 3, 1400, 90, 4], [65, 64, 63, 500, 408, 400]):
        for edges in (inputs.cu_seqlens_q, inputs.cu_seqlens_k):
            edges.copy_(starts(lengths))
        for x in inputs[:3]:
            x.copy_(torch.randn_like(x))
        graph.replay()
        eager = OPS.varlen_sdpa_with_lse(*inputs, "bottom_right", **recipe)
        alone = one_by_one(inputs, "bottom_right", **recipe)
        for got, expected, other in zip(captured, eager, alone, strict=True):
            assert same_bits(got, expected) and same_bits(got, other)
