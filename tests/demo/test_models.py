"""The loaders: the weights are the published ones, and the quality goals can be missed."""

import pytest
import torch
import torch.nn.functional as F

from torch_sage.demo import models
from torch_sage.demo.inputs import photographs, prose, speech, zen
from torch_sage.demo.measure import run
from torch_sage.demo.models.smollm2 import compile_layers, prediction_losses

BECKETT = "Ever tried. Ever failed. No matter. Try again. Fail again. Fail better."


@pytest.fixture(scope="module", autouse=True)
def offline():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        with torch.inference_mode():
            yield


@pytest.fixture(scope="module")
def whisper():
    return models.load("whisper", quick=True)


@pytest.fixture(scope="module")
def dinov2():
    return models.load("dinov2", quick=True)


def test_inputs_are_real():
    assert prose().startswith("Compound statements")
    assert zen().startswith("Beautiful is better than ugly.")
    samples, rate = speech()
    assert rate == 16000
    assert 9 < len(samples) / rate < 11
    cat = photographs(("chelsea",), 224)
    assert cat.shape == (1, 3, 224, 224)
    # ImageNet's normalization leaves a photograph near mean 0 and deviation 1.
    assert abs(cat.mean().item()) < 1
    assert 0.3 < cat.std().item() < 2


def test_whisper_transcribes_the_recording(whisper):
    reference = run(whisper, whisper.parts)
    assert list(reference.values())[-1] == BECKETT
    assert all(goal.met for goal in whisper.quality(reference, reference))


def test_whisper_quality_can_be_missed(whisper):
    encoder, transcription = (workload.name for workload in whisper.workloads)
    states = torch.ones(1, 4, 8)
    reference = {encoder: states, transcription: "Ever tried."}
    other = states.clone()
    other[..., ::2] = 0
    wrong = {encoder: other, transcription: "Ever dried."}
    assert [goal.met for goal in whisper.quality(reference, wrong)] == [False, False]


def test_dinov2_knows_a_cat_from_a_rocket(dinov2):
    """The class tokens of one cat at two resolutions are closer than those of two subjects."""
    model = dinov2.parts["model"]
    small, large = photographs(("chelsea",), 224), photographs(("chelsea",), 322)
    rocket = photographs(("rocket",), 224)
    cat, same_cat, other = (model(pixels)[:, 0] for pixels in (small, large, rocket))
    assert F.cosine_similarity(cat, same_cat).item() > 0.8
    assert F.cosine_similarity(cat, other).item() < 0.5


def test_dinov2_quality_can_be_missed(dinov2):
    (workload,) = dinov2.workloads
    reference = {workload.name: torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))}
    assert all(goal.met for goal in dinov2.quality(reference, reference))
    worse = reference[workload.name].clone()
    worse[1, 0] = 0  # one token of one photograph
    assert not dinov2.quality(reference, {workload.name: worse})[0].met


def test_prediction_losses_are_those_of_the_next_id():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, 11, 4, generator=generator)
    ids = torch.randint(0, 7, (1, 11), generator=generator)
    head = torch.nn.Linear(4, 7, bias=False)
    whole = F.cross_entropy(head(states[0, :-1]), ids[0, 1:], reduction="none").double()
    torch.testing.assert_close(prediction_losses(states, ids, head, rows=3), whole)


def test_compile_layers_leaves_the_model_alone(recorder):
    class Stack(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    stack = Stack()
    kept = list(stack.layers)
    x = torch.randn(2, 4)
    torch.testing.assert_close(compile_layers(stack, backend=recorder)(x), stack(x))
    assert len(recorder.graphs) == 1
    assert list(stack.layers) == kept


@pytest.mark.slow
def test_smollm2_reads_english_and_its_quality_can_be_missed():
    """A language model without its weights has a perplexity near its vocabulary's size, 49152."""
    model = models.load("smollm2", quick=True)
    model._windows = torch.split(model._windows[0][:, :768], 256, dim=1)
    states = {
        workload.name: model.parts["model"](ids)
        for workload, ids in zip(model.workloads, model._windows, strict=True)
    }
    (kept,) = model.quality(states, states)
    assert kept.met
    assert 2 < float(kept.value.split(",")[0]) < 30

    (missed,) = model.quality(states, {name: 0.9 * output for name, output in states.items()})
    assert not missed.met
