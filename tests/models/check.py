"""What every library model is held to."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import torch_sage
from tests.models.sabotage import (
    attention_replaced_by,
    first_tensor,
    halved_scale,
    relative_error,
    sharpen_attention,
)
from tests.models.zoo import ModelCase
from torch_sage import reference
from torch_sage.recipes import SUPPORT

# Small models are below the measured crossover.
CONFIG = torch_sage.SageConfig(dispatch="always")


def oracle_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """SDPA by the oracle, with the recipe that the pass takes on a CPU."""
    assert dropout_p == 0
    assert enable_gqa or query.shape[1] == key.shape[1]
    causal = "top_left" if is_causal else "none"
    recipe = SUPPORT["cpu"].default.op_kwargs()
    del recipe["exponential"]  # the oracle has the exact one alone
    return reference.attention(query, key, value, attn_mask, causal, scale, **recipe).output


def graph_breaks(call: Any) -> tuple[int, Counter[str]]:
    """Compile by ``call`` from scratch; return the number of graphs and the breaks between them."""
    torch._dynamo.reset()
    counters.clear()
    call()
    return counters["stats"]["unique_graphs"], Counter(counters["graph_break"])


class Subject(NamedTuple):
    """A model to test, and how far its output may be from the exact one."""

    model: nn.Module
    inputs: dict[str, Any]
    exact: Tensor
    allowed: float

    def run(self, module: nn.Module) -> Tensor:
        return first_tensor(module(**self.inputs))


def make_subject(case: ModelCase) -> Subject:
    """Build a model and its error budget.

    It may be twice as far from the exact model as the same model with the oracle's attention is
    (tests/numerics.py has the same formula for one op), and halving the softmax scale must exceed
    that.
    """
    torch.manual_seed(0)
    model, inputs = case.build()
    model.eval().requires_grad_(False)

    def run(module: nn.Module) -> Tensor:
        return first_tensor(module(**inputs))

    if case.implementation:
        model.set_attn_implementation("sdpa")
    sharpen_attention(model, run)
    exact = run(model)
    with attention_replaced_by(oracle_sdpa):
        allowed = 2 * relative_error(run(model), exact) + torch.finfo(exact.dtype).eps
    with attention_replaced_by(halved_scale(F.scaled_dot_product_attention)):
        assert relative_error(run(model), exact) > allowed, "the budget must not hide a wrong scale"

    if case.implementation:
        model.set_attn_implementation(case.implementation)
    return Subject(model, inputs, exact, allowed)


def check_model(case: ModelCase) -> None:
    """Require every attention rewritten, the oracle's accuracy, and no graph break of ours."""
    subject = make_subject(case)
    model, run = subject.model, subject.run
    without = graph_breaks(lambda: run(torch.compile(model, backend="eager")))
    results = []
    compiled = torch.compile(model, options=torch_sage.options(CONFIG))
    assert graph_breaks(lambda: results.append(run(compiled))) == without

    report = torch_sage.report()
    assert report.reasons == case.skipped, report
    assert report.rewritten == case.attentions - case.skipped.total(), report
    assert relative_error(results[0], subject.exact) <= subject.allowed
