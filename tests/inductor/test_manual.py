"""Hand-written attention without masks: every spelling becomes the op on the model's tensors."""

import pytest
import torch
import torch.nn.functional as F

from tests.inductor.joint import (
    B,
    D,
    H,
    M,
    N,
    attend,
    folded,
    math_sdpa,
    merge,
    mT,
    qkv,
    rewritten,
    run_pass,
    shape,
    softmax32,
    token_major,
    traced,
)


@pytest.fixture(autouse=True)
def inference():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def exp_sum(x):
    e = x.exp()
    return e / e.sum(-1, keepdim=True)


def max_exp_sum(x):
    return exp_sum(x - x.max(-1, keepdim=True)[0])


def permuted(x):
    return x.permute(0, 2, 1, 3)


# Every way that models write softmax(q k^T * scale) v without a mask.
PLAIN = {
    "div": lambda q, k, v: (q @ mT(k)).div(2.0).softmax(-1) @ v,
    "mul": lambda q, k, v: attend((q @ mT(k)) * 0.3, v),
    "mul_left": lambda q, k, v: attend(0.3 * (q @ mT(k)), v),
    "unscaled": lambda q, k, v: attend(q @ mT(k), v),
    "scaled_query": lambda q, k, v: attend((q * 0.3) @ mT(k), v),
    "divided_query": lambda q, k, v: attend((q / 4) @ mT(k), v),
    "scaled_both": lambda q, k, v: attend((q * 0.5) @ mT(k * 0.5), v),
    "scaled_transposed_key": lambda q, k, v: attend((q * 0.5) @ (mT(k) * 0.5), v),
    "negative_scale": lambda q, k, v: attend((q @ mT(k)) * -0.3, v),
    "scale_tensor": lambda q, k, v: attend((q @ mT(k)) / torch.full([], 4.0), v),
    "temperature": lambda q, k, v: attend((q @ mT(k)) * q[0, 0, 0, 0].abs(), v),
    "per_head_scale": lambda q, k, v: attend((q @ mT(k)) * q[0, :, :1, :1].abs(), v),
    "dropout_off": lambda q, k, v: F.dropout(((q @ mT(k)) * 0.3).softmax(-1), 0.1, False) @ v,
    "exp_sum": lambda q, k, v: exp_sum((q @ mT(k)) * 0.3) @ v,
    "max_exp_sum": lambda q, k, v: max_exp_sum((q @ mT(k)) * 0.3) @ v,
    "math_backend": lambda q, k, v: math_sdpa(q, k, v),
    "contiguous_key": lambda q, k, v: attend((q @ mT(k).contiguous()) * 0.3, v),
    "merged_heads": lambda q, k, v: merge(attend((q @ mT(k)) * 0.3, v)),
    "einsum": lambda q, k, v: torch.einsum(
        "bhij,bhjd->bihd", (torch.einsum("bhid,bhjd->bhij", q, k) * 0.3).softmax(-1), v
    ),
    "einsum_keys_first": lambda q, k, v: torch.einsum(
        "bhji,bhjd->bhid", (torch.einsum("bhid,bhjd->bhji", q, k) * 0.3).softmax(-2), v
    ),
    "value_first": lambda q, k, v: mT(mT(v) @ mT(((q @ mT(k)) * 0.3).softmax(-1))),
    "folded": lambda q, k, v: torch.bmm(
        (torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)) * 0.3).softmax(-1),
        v.flatten(0, 1),
    ).view(q.shape[0], H, -1, D),
}


@pytest.mark.parametrize("form", PLAIN)
def test_plain_form(form):
    node = rewritten(PLAIN[form], *qkv())
    assert [shape(x) for x in node.args[:3]] == [(B, H, N, D), (B, H, M, D), (B, H, M, D)]


@pytest.mark.parametrize("form", sorted(set(PLAIN) - {"scale_tensor"}))
def test_plain_form_with_dynamic_shapes(form):
    """Sizes become symbols, folded batches their products; nothing may be guarded."""
    rewritten(PLAIN[form], *qkv(), dynamic=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, v: attend((q @ mT(k)) * 0.3, v),
        lambda q, k, v: softmax32((q @ mT(k)) * 0.3) @ v,
        lambda q, k, v: ((q @ mT(k)) * 0.3).float().softmax(-1).type_as(q) @ v,
        lambda q, k, v: (((q.float() @ mT(k.float())) * 0.3).softmax(-1)).to(v.dtype) @ v,
        lambda q, k, v: (attend((q.float() @ mT(k.float())) * 0.3, v.float())).to(q.dtype),
        lambda q, k, v: math_sdpa(q, k, v),
    ],
    ids=["plain", "softmax32", "float_type_as", "scores32", "all32", "math"],
)
def test_half_precision(dtype, function):
    rewritten(function, *qkv(dtype))


def test_upcast_scores_keep_the_operands_dtype():
    """Upcasting q and k for the first matmul adds nothing that the op would lose."""
    node = rewritten(
        lambda q, k, v: ((q.float() @ mT(k.float())).softmax(-1)).to(v.dtype) @ v,
        *qkv(torch.bfloat16),
    )
    assert {x.meta["val"].dtype for x in node.args[:3]} == {torch.bfloat16}


def test_mixed_dtypes_meet_in_the_widest():
    q, k, _ = qkv()
    v = torch.randn(B, H, M, D, dtype=torch.bfloat16)
    node = rewritten(lambda q, k, v: (q @ mT(k)).softmax(-1).to(v.dtype) @ v, q, k, v)
    assert {x.meta["val"].dtype for x in node.args[:3]} == {torch.float32}


# q, k, v as [batch, tokens, heads, head_dim].
TOKEN_MAJOR = {
    "permuted": lambda q, k, v: attend((permuted(q) @ k.permute(0, 2, 3, 1)) * 0.3, permuted(v)),
    "permuted_twice": lambda q, k, v: attend((permuted(q) @ mT(permuted(k))) * 0.3, permuted(v)),
    "merged": lambda q, k, v: merge(attend((permuted(q) @ mT(permuted(k))) * 0.3, permuted(v))),
    "einsum": lambda q, k, v: torch.einsum(
        "bhij,bjhd->bihd", (torch.einsum("bihd,bjhd->bhij", q, k) * 0.3).softmax(-1), v
    ),
    "einsum_heads_last": lambda q, k, v: torch.einsum(
        "bijh,bjhd->bihd", (torch.einsum("bihd,bjhd->bijh", q, k) * 0.3).softmax(2), v
    ),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("form", TOKEN_MAJOR)
def test_token_major_form(form, dynamic):
    rewritten(TOKEN_MAJOR[form], *token_major(), dynamic=dynamic)


def test_operands_are_the_models_own():
    """The copies that bmm needed, and the one before the output projection, are gone."""
    q, k, v = token_major()
    gm = traced(TOKEN_MAJOR["merged"], q, k, v)
    (node,) = run_pass(gm)
    gm.graph.eliminate_dead_code()
    assert node.kwargs["output_order"] == "bshd"
    assert not [n for n in gm.graph.nodes if n.target is torch.ops.aten.clone.default]


FOLDED = {
    "bmm": lambda q, k, v: torch.bmm((torch.bmm(q, mT(k)) * 0.3).softmax(-1), v),
    "alpha": lambda q, k, v: torch.bmm(
        torch.baddbmm(mT(k)[:, :1], q, mT(k), beta=0, alpha=0.3).softmax(-1), v
    ),
    "beta": lambda q, k, v: torch.bmm(
        torch.baddbmm(mT(k)[:, :1], q, mT(k), beta=0.5, alpha=0.3).softmax(-1), v
    ),
    "value_first": lambda q, k, v: torch.bmm(mT(v), mT((torch.bmm(q, mT(k)) * 0.3).softmax(2))),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("form", FOLDED)
def test_folded_form(form, dynamic):
    node = rewritten(FOLDED[form], *folded(), dynamic=dynamic)
    if not dynamic:
        assert shape(node.args[0]) == (B * H, 1, N, D)


@pytest.mark.parametrize("rank", [2, 3])
def test_matmuls_without_batch(rank):
    """A matrix of keys serves every token, as in memory layers."""
    q, k, v = torch.randn(N, D), torch.randn(M, D), torch.randn(M, D)
    rewritten(lambda q, k, v: attend((q @ k.t()) * 0.3, v), q if rank == 2 else q[None], k, v)


# Grouped heads: (function; query heads share this many K/V heads in the op)
GROUPED = {
    "interleave": (
        lambda q, k, v: attend((q @ mT(repeat(k))) * 0.3, repeat(v)),
        2,
    ),
    "expand": (
        lambda q, k, v: attend((q @ mT(expanded(k))) * 0.3, expanded(v)),
        2,
    ),
    "broadcast": (
        lambda q, k, v: attend(
            (q.unflatten(1, (2, 2)) @ mT(k[:, :, None])) * 0.3, v[:, :, None]
        ).flatten(1, 2),
        2,
    ),
    "one_head": (
        lambda q, k, v: attend((q @ mT(k[:, :1])) * 0.3, v[:, :1]),
        1,
    ),
    "only_keys": (
        lambda q, k, v: attend((q @ mT(repeat(k))) * 0.3, v.repeat(1, 2, 1, 1)),
        4,
    ),
    "tiled": (
        lambda q, k, v: attend((q @ mT(k.repeat(1, 2, 1, 1))) * 0.3, v.repeat(1, 2, 1, 1)),
        4,
    ),
}


def repeat(x):
    return x.repeat_interleave(2, dim=1)


def expanded(x):
    b, h, n, d = x.shape
    return x[:, :, None].expand(b, h, 2, n, d).reshape(b, h * 2, n, d)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("form", GROUPED)
def test_grouped_heads(form, batch):
    """Heads 0 0 1 1 are kept once; tiled heads 0 1 0 1 are not what the op groups."""
    function, heads = GROUPED[form]
    node = rewritten(function, *qkv(kv_heads=2, batch=batch))
    assert shape(node.args[0]) == (batch, H, N, D)
    assert shape(node.args[1])[1] == shape(node.args[2])[1] == heads


@pytest.mark.parametrize("form", ["interleave", "expand"])
def test_grouped_heads_with_dynamic_shapes(form):
    node = rewritten(GROUPED[form][0], *qkv(kv_heads=2), dynamic=True)
    query, key = (node.args[i].meta["val"] for i in (0, 1))
    assert query.shape[1] == 2 * key.shape[1]


def test_one_query_token():
    q, k, v = qkv()
    rewritten(lambda q, k, v: attend((q @ mT(k)) * 0.3, v), q[:, :, :1], k, v)


def test_value_may_have_another_head_dim():
    q, k, v = qkv()
    rewritten(lambda q, k, v: attend((q @ mT(k)) * 0.3, v), q, k, v[..., :8])


def test_channels_first_operands():
    """The attention of convolutional autoencoders: q, k, v are [batch, channels, pixels]."""
    q, k, v = (mT(x).contiguous() for x in folded())
    rewritten(lambda q, k, v: torch.bmm(v, mT((torch.bmm(mT(q), k) * 0.3).softmax(2))), q, k, v)


def test_more_than_four_dims():
    q, k, v = (x.unflatten(0, (1, 2))[:, :, None] for x in qkv())
    rewritten(lambda q, k, v: attend((q @ mT(k)) * 0.3, v), q, k, v)


def test_scores_whose_size_is_asked_for():
    """With symbolic sizes ``scores.shape`` becomes a node that must not keep the scores alive."""

    def function(q, k, v):
        scores = (q @ mT(repeat(k))) * 0.3
        return scores.softmax(-1) @ repeat(v)[:, : scores.shape[1]]

    rewritten(function, *qkv(kv_heads=2), dynamic=True)


def test_every_layer_is_found():
    """One rewrite feeds the next: its result is their query."""

    def function(q, k, v):
        for _ in range(3):
            q = attend((q @ mT(k)) * 0.3, v)
        return q

    gm = traced(function, *qkv())
    assert len(run_pass(gm)) == 3
