"""Library models as exported programs: every attention is found before anything is compiled."""

import pytest
import torch

import torch_sage
from tests.models.check import CONFIG
from tests.models.sabotage import first_tensor, relative_error
from tests.models.zoo import DIFFUSERS, TRANSFORMERS

# One of each kind: conversions around an eager softmax, cross attention, joint sequences.
NAMES = ("llama-padded-eager", "vit-eager", "whisper-sdpa", "flux")
CASES = [case for case in (*TRANSFORMERS, *DIFFUSERS) if str(case) in NAMES]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_attention_is_found(case):
    torch.manual_seed(0)
    model, inputs = case.build()
    model.eval().requires_grad_(False)
    if case.implementation:
        model.set_attn_implementation(case.implementation)
    program = torch.export.export(model, (), inputs)
    rewritten = torch_sage.apply_to_exported(program, CONFIG)
    report = torch_sage.explain(rewritten)
    assert (report.rewritten, report.skipped) == (case.attentions, 0)
    exact = first_tensor(model(**inputs))
    error = relative_error(first_tensor(rewritten.module()(**inputs)), exact)
    assert 0 < error < 0.01  # a random model's attention is nearly uniform: much under REL_L1


def test_every_kind_is_there():
    assert len(CASES) == len(NAMES)
