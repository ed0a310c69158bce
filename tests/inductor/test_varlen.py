"""Packed attention: torch's operator is rewritten where asked for, and refused with its reason.

torch runs it on GPUs alone, but traces it anywhere; the rewritten graph runs here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention.varlen import AuxRequest, varlen_attn

import torch_sage
from tests.inductor.graphs import ALWAYS, captured_graphs, count, reasons, records, structure
from tests.numerics import same_bits
from tests.varlen import Packed, pack
from torch_sage import SageConfig
from torch_sage.crossover import CROSSOVER, Crossover, Rule
from torch_sage.inductor.passes import Always, PostPass, PrePass

VARLEN = torch.ops.torch_sage.varlen_sdpa.default
LENGTHS = [9, 70, 1]


def packed(**kwargs: Any) -> Packed:
    return pack(LENGTHS, LENGTHS, **{"heads": 2, **kwargs})


@pytest.fixture(autouse=True)
def inference() -> Any:
    with torch.no_grad():
        yield


def plain(*args: Any) -> Any:
    return varlen_attn(*args)


def unlimited(*args: Any) -> Any:
    return varlen_attn(*args, window_size=(-1, -1), scale=-0.1)


def causal(*args: Any) -> Any:
    return varlen_attn(*args, window_size=(-1, 0), scale=0.2)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("function", "alignment", "scale"),
    [(plain, "none", None), (unlimited, "none", -0.1), (causal, "bottom_right", 0.2)],
)
def test_the_operator_becomes_ours(
    function: Any, alignment: str, scale: float | None, dynamic: bool
) -> None:
    inputs = packed()
    result, graphs = captured_graphs(function, *inputs, dynamic=dynamic)
    assert count(graphs, VARLEN) == 1
    expected = torch_sage.varlen_attention(*inputs, causal=alignment, scale=scale)
    assert isinstance(expected, Tensor) and same_bits(result, expected)
    (record,) = records(graphs)
    assert record.rewritten and record.pattern == "varlen" and record.causal == alignment
    assert "_varlen_attn" in record.target


def test_heads_before_tokens_keep_their_strides() -> None:
    inputs = packed(layout="htd")
    result, graphs = captured_graphs(plain, *inputs)
    assert count(graphs, VARLEN) == 1
    assert result.stride() == torch.empty_like(inputs.query).stride()
    expected = torch_sage.varlen_attention(*inputs)
    assert isinstance(expected, Tensor) and torch.equal(result, expected)


def lse(*args: Any) -> Any:
    return varlen_attn(*args, return_aux=AuxRequest(lse=True))


def window(*args: Any) -> Any:
    return varlen_attn(*args, window_size=(7, 0))


@pytest.mark.parametrize(
    ("function", "kind", "config", "code"),
    [
        (lse, {}, ALWAYS, "lse_used"),
        (window, {}, ALWAYS, "varlen_kind"),
        (plain, {}, SageConfig(), "below_crossover"),
        (plain, {}, SageConfig(dispatch="always", pv="e4m3"), "recipe_unsupported"),
        (plain, {"dtype": torch.float64}, ALWAYS, "dtype_unsupported"),
    ],
)
def test_what_is_refused_stays(function: Any, kind: dict[str, Any], config: Any, code: str) -> None:
    """Traced alone: torch's operator, which then stays, does not run here."""
    traced = make_fx(function, tracing_mode="fake")(*packed(**kind))
    before = structure(traced.graph)
    for stage in (PrePass, PostPass):
        stage(Always(config))(traced.graph)
    assert structure(traced.graph) == before
    assert reasons([traced]) == [[code]]


@pytest.mark.parametrize(
    ("function", "reuse", "rewritten"),
    [
        (plain, 17, True),
        (plain, 18, False),
        (causal, 17, False),
    ],
)
def test_the_measured_choice_is_by_the_average_length(
    function: Any, reuse: float, rewritten: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """80 tokens in 3 sequences: 26 of each, of which an element is used 26 * 2 / 3 times."""
    rule = Rule(full=(Crossover(reuse, 0),), causal=(), masked=(), ragged=())
    monkeypatch.setitem(CROSSOVER, "cpu.packed", rule)
    traced = make_fx(function, tracing_mode="fake")(*packed())
    PostPass(Always(SageConfig()))(traced.graph)
    assert reasons([traced]) == [[] if rewritten else ["below_crossover"]]
