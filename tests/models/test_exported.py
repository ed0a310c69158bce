"""Library models as exported programs: every attention is found before anything is compiled."""

import pytest
import torch

import torch_sage
from tests.models.check import CONFIG, oracle_sdpa
from tests.models.sabotage import (
    attention_replaced_by,
    first_tensor,
    relative_error,
    sharpen_attention,
)
from tests.models.zoo import DIFFUSERS, TRANSFORMERS

# One of each kind: conversions around an eager softmax, cross attention, joint sequences.
NAMES = ("llama-padded-eager", "vit-eager", "whisper-sdpa", "flux")
CASES = [case for case in (*TRANSFORMERS, *DIFFUSERS) if str(case) in NAMES]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_attention_is_found(case):
    """Accuracy as in check.py: twice the oracle's distance from the exact model."""
    torch.manual_seed(0)
    model, inputs = case.build()
    model.eval().requires_grad_(False)

    def run(module):
        return first_tensor(module(**inputs))

    if case.implementation:
        model.set_attn_implementation("sdpa")
    sharpen_attention(model, run)
    exact = run(model)
    with attention_replaced_by(oracle_sdpa):
        allowed = 2 * relative_error(run(model), exact) + torch.finfo(exact.dtype).eps
    if case.implementation:
        model.set_attn_implementation(case.implementation)
    program = torch.export.export(model, (), inputs)
    rewritten = torch_sage.apply_to_exported(program, CONFIG)
    report = torch_sage.explain(rewritten)
    assert (report.rewritten, report.skipped) == (case.attentions, 0)
    assert 0 < relative_error(run(rewritten.module()), exact) <= allowed


def test_every_kind_is_there():
    assert len(CASES) == len(NAMES)
