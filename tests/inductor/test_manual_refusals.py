"""What only looks like attention, or must not be touched: the graph stays, with a true reason."""

import pytest
import torch
import torch.nn.functional as F

from tests.inductor.joint import B, H, M, N, attend, keep_mask, mT, qkv, refused, run_pass, traced


@pytest.fixture(autouse=True)
def inference():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def scores_of(q, k):
    return (q @ mT(k)) * 0.3


def returns_weights(q, k, v):
    weights = scores_of(q, k).softmax(-1)
    return weights @ v, weights


def returns_scores(q, k, v):
    scores = scores_of(q, k)
    return attend(scores, v), scores.sum()


def returns_maximum(q, k, v):
    scores = scores_of(q, k)
    return attend(scores, v), scores.amax(-1, keepdim=True)


def two_values(q, k, v):
    weights = scores_of(q, k).softmax(-1)
    return weights @ v, weights @ v.exp()


def square(q, k, v):
    """Equal lengths, so that a softmax over queries has the shape of one over keys."""
    return q, k[:, :, :N], v[:, :, :N]


REFUSED = {
    "weights_returned": ("weights_used", returns_weights),
    "scores_returned": ("weights_used", returns_scores),
    "maximum_returned": ("weights_used", returns_maximum),
    "weights_masked": (
        "weights_modified",
        lambda q, k, v: (scores_of(q, k).softmax(-1) * q[:, :, :, :1]) @ v,
    ),
    "weights_renormalized": (
        "weights_modified",
        lambda q, k, v: (
            (lambda p: p / (p.sum(-2, keepdim=True) + 1e-6))(scores_of(q, k).softmax(-1)) @ v
        ),
    ),
    "dropout": ("dropout", lambda q, k, v: F.dropout(scores_of(q, k).softmax(-1), 0.1, True) @ v),
    "softcap": ("score_op", lambda q, k, v: attend(torch.tanh(scores_of(q, k) / 5) * 5, v)),
    "clamped": ("score_op", lambda q, k, v: attend(scores_of(q, k).clamp(-5, 5), v)),
    "topk": (
        "weights_used",
        lambda q, k, v: attend(
            (lambda s: torch.where(s >= s.topk(4)[0][..., -1:], s, -torch.inf))(scores_of(q, k)), v
        ),
    ),
    "scale_zero": ("score_op", lambda q, k, v: attend(scores_of(q, k) * 0.0, v)),
    "doubled_by_itself": (
        "score_op",
        lambda q, k, v: attend((lambda s: s + s)(scores_of(q, k)), v),
    ),
    "key_scale": (
        "score_scale",
        lambda q, k, v: attend(scores_of(q, k) * k[:, :, :, 0][:, :, None], v),
    ),
    "unknown_scale_of_masked": (
        "score_scale",
        lambda q, k, v: attend(
            scores_of(q, k).masked_fill(causal(), -torch.inf) * q[0, 0, 0, 0], v
        ),
    ),
    "negative_scale_of_masked": (
        "score_scale",
        lambda q, k, v: attend(scores_of(q, k).masked_fill(causal(), -torch.inf) * -1.0, v),
    ),
    "small_fill": (
        "mask_fill",
        lambda q, k, v: attend(scores_of(q, k).masked_fill(causal(), -5.0), v),
    ),
    "unknown_fill": (
        "mask_fill",
        lambda q, k, v: attend(torch.where(causal(), k[0, 0, 0, 0], scores_of(q, k)), v),
    ),
    "head_dim": (
        "head_dim",
        lambda q, k, v: attend(q.repeat(1, 1, 1, 20) @ mT(k.repeat(1, 1, 1, 20)), v),
    ),
}


def causal():
    """Return what a causal mask hides."""
    return ~torch.ones(N, M, dtype=torch.bool).tril()


@pytest.mark.parametrize("form", REFUSED)
def test_refused(form):
    code, function = REFUSED[form]
    assert refused(function, *qkv()) == [[code]]


def test_each_use_of_shared_weights_is_refused():
    assert refused(two_values, *qkv()) == [["weights_used"], ["weights_used"]]


@pytest.mark.parametrize("dim", [-2, 0, 1])
def test_softmax_over_another_dimension(dim):
    """Torch 2.13 takes softmax over any dimension for one over the last (pytorch#196468)."""
    q, k, v = square(*qkv())
    assert refused(lambda q, k, v: scores_of(q, k).softmax(dim) @ v, q, k, v) == [["softmax_dim"]]


@pytest.mark.parametrize("dim", [-2, 0, 1])
def test_softmax_over_another_dimension_with_dynamic_shapes(dim):
    q, k, v = square(*qkv())
    codes = refused(lambda q, k, v: scores_of(q, k).softmax(dim) @ v, q, k, v, dynamic=True)
    assert codes == [["softmax_dim"]]


def test_unlike_dims_of_equal_size_are_told_apart():
    """Heads and tokens both number four: the softmax over heads is not one over keys."""
    q, k, v = (x[:, :, :4] for x in qkv())
    assert refused(lambda q, k, v: scores_of(q, k).softmax(1) @ v, q, k, v) == [["softmax_dim"]]


def test_transposed_scores_are_not_attention():
    """softmax(K Q^T) over its last dimension normalizes over queries."""
    q, k, v = square(*qkv())
    assert refused(lambda q, k, v: mT((k @ mT(q)).softmax(-1)) @ v, q, k, v) == [["softmax_dim"]]


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, v: (q @ mT(k)) @ v,
        lambda q, k, v: q.softmax(-1) @ mT(q),
        lambda q, k, v: q.exp() @ mT(k),
        lambda q, k, v: (q @ mT(k)).sigmoid() @ v,
    ],
    ids=["linear_attention", "softmax_of_input", "kernel", "sigmoid"],
)
def test_what_is_no_attention_is_not_mentioned(function):
    assert refused(function, *qkv()) == []


def test_training_graphs_stay():
    gm = traced(lambda q, k, v: attend(scores_of(q, k), v), *qkv())
    next(iter(gm.graph.nodes)).target = "tangents_1"
    assert run_pass(gm) == []


def test_refusal_and_rewrite_in_one_graph():
    def function(q, k, v):
        return attend(scores_of(q, k), v), *returns_weights(k, q, q)

    gm = traced(function, *qkv())
    assert len(run_pass(gm)) == 1


def test_mask_with_infinity():
    """+inf in a mask gives NaN where torch's own softmax does (a fused CPU kernel gives 0)."""
    q, k, v = qkv()
    bias = torch.zeros(N, M)
    bias[3, 5] = torch.inf
    gm = traced(lambda q, k, v, b: attend(scores_of(q, k) + b, v), q, k, v, bias)
    assert len(run_pass(gm)) == 1
    assert gm(q, k, v, bias)[:, :, 3].isnan().all()
    assert not gm(q, k, v, bias)[:, :, 4:].isnan().any()


def test_values_longer_than_keys_are_an_error():
    """Torch's fused CPU kernel reads K out of bounds then; plain matmul and we say so."""
    q, k, v = qkv()
    with pytest.raises(RuntimeError):
        traced(lambda q, k, v: attend(scores_of(q, k), v), q, k[:, :, :-1], v)


def test_keep_mask_leaves_each_row_a_key():
    """The helper's promise, on which every comparison of masked forms stands."""
    assert keep_mask(B, H, N, M).any(-1).all()
