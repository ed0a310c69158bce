"""The demo's own verdicts: each must be able to say no."""

import functools

import pytest
import torch
import torch.nn.functional as F

import torch_sage
from torch_sage.demo.layers import layer_errors
from torch_sage.demo.measure import ModelResult, Timing
from torch_sage.demo.model import Goal, require_complete
from torch_sage.demo.nodes import AttentionNodes
from torch_sage.inductor.records import AttentionRecord
from torch_sage.ops.reasons import Reason, ReasonCode


def _timing(sdpa, sage, must_be_faster):
    return Timing("call", sdpa, sage, must_be_faster)


@pytest.mark.parametrize(
    ("sdpa", "sage", "must_be_faster", "met"),
    [
        ([2.0, 2.0, 2.0], [1.0, 1.0, 1.0], True, True),
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], True, False),
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], False, True),
        ([1.0, 1.0, 1.0], [1.1, 1.1, 1.1], False, False),
        # Ratios .9, .98 and 1.1: a median 2 % below 1 inside a noise of 10 %.
        ([0.9, 0.98, 1.1], [1.0, 1.0, 1.0], False, True),
    ],
)
def test_speed_verdict(sdpa, sage, must_be_faster, met):
    assert _timing(sdpa, sage, must_be_faster).goal().met is met


def test_speedup_is_the_median_of_pairs_not_the_ratio_of_medians():
    timing = _timing([1.0, 10.0, 4.0], [1.0, 5.0, 4.0], False)
    assert timing.speedup == 1.0


def _record(*reasons: ReasonCode) -> AttentionRecord:
    why = tuple(Reason(code, code.doc) for code in reasons)
    fields = dict.fromkeys(
        ("pattern", "target", "module", "source", "query", "key", "value", "attn_mask"), ""
    )
    return AttentionRecord(
        **fields, causal="none", device="cpu", recipe="" if why else "int8", reasons=why
    )


@pytest.mark.parametrize(
    ("records", "met"),
    [
        ([_record(), _record()], True),
        ([_record(), _record(), _record(ReasonCode.BELOW_CROSSOVER)], True),
        ([_record(), _record(), _record(ReasonCode.MASK_DTYPE)], False),
        ([_record()], False),
        ([], False),
    ],
)
def test_node_verdict(records, met):
    assert AttentionNodes(tuple(records), at_least=2).goal().met is met


def test_equal_nodes_share_a_row():
    rows = list(AttentionNodes((_record(), _record()), at_least=2).rows())
    assert rows == [("2x", "", "", "int8")]


def _attend():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 96, 64, generator=generator)
    key, value = (torch.randn(1, 2, 96, 64, generator=generator) for _ in range(2))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def test_layer_errors_see_every_call_and_leave_its_result_exact():
    results = []
    errors = layer_errors(lambda: results.extend([_attend(), _attend()]))
    assert [error.call for error in errors] == [0, 1]
    assert torch.equal(results[0], _attend())
    assert errors[0].query == "1x4x96x64"
    assert 0.9998 < errors[0].cosine < 1
    assert 0 < errors[0].relative_l1 < 0.02


def test_a_wrong_layer_misses_the_goal(monkeypatch):
    real = torch_sage.scaled_dot_product_attention

    @functools.wraps(real)
    def sabotaged(*args, **kwargs):
        return real(*args, **{**kwargs, "is_causal": False})

    monkeypatch.setattr(torch_sage, "scaled_dot_product_attention", sabotaged)
    result = ModelResult("m", AttentionNodes((), 0), [], [], layer_errors(_attend), {})
    verdict = result.goals[-1]
    assert verdict.name.startswith("attention cosine")
    assert not verdict.met


def test_goals_on_speed_are_shown_but_do_not_fail():
    slow = _timing([1.0, 1.0, 1.0], [2.0, 2.0, 2.0], True)
    quality = Goal("q", "1", "1", True)
    result = ModelResult("m", AttentionNodes((), 0), [quality], [slow], layer_errors(_attend), {})
    assert all(goal.met for goal in result.goals)
    assert [goal.met for goal in result.all_goals] == [True, True, True, False]


def test_missing_weights_are_an_error():
    require_complete({"missing_keys": set(), "unexpected_keys": []})
    with pytest.raises(ValueError, match=r"'missing_keys': .'a.weight'"):
        require_complete({"missing_keys": {"a.weight"}, "unexpected_keys": []})
