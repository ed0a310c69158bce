"""Library models as exported programs: every attention is found before anything is compiled."""

import pytest
import torch

import torch_sage
from tests.models.check import CONFIG, make_subject
from tests.models.sabotage import relative_error
from tests.models.zoo import DIFFUSERS, TRANSFORMERS

# One of each kind: conversions around an eager softmax, cross attention, joint sequences.
NAMES = ("llama-padded-eager", "vit-eager", "whisper-sdpa", "flux")
CASES = [case for case in (*TRANSFORMERS, *DIFFUSERS) if str(case) in NAMES]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_attention_is_found(case):
    """Accuracy as in check.py: twice the oracle's distance from the exact model."""
    subject = make_subject(case)
    program = torch.export.export(subject.model, (), subject.inputs)
    rewritten = torch_sage.apply_to_exported(program, CONFIG)
    report = torch_sage.explain(rewritten)
    assert (report.rewritten, report.skipped) == (case.attentions, 0)
    error = relative_error(subject.run(rewritten.module()), subject.exact)
    assert 0 < error <= subject.allowed


def test_every_kind_is_there():
    assert len(CASES) == len(NAMES)
