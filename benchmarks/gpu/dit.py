"""Diffusion transformers of real shapes with random weights and few layers, and their inputs.

The classes are those of diffusers. A step costs what one of the full model costs, divided by its
number of layers (42 and 19 + 38) and multiplied by ours: embeddings hardly count.

Weights are scaled so that attention matters, as it does in trained models: activations keep their
size, and scores spread widely enough that few of 45k keys decide (a softmax over scores of N(0, 1)
would average thousands of values to nothing).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

LAYERS = 2  # of every kind
SCORE_DEVIATION = 3.0
QUERY_NORM = re.compile(r"[._]norm_(added_)?q[._]weight$")
Inputs = dict[str, Any]


class Built(NamedTuple):
    """A model and what one step takes."""

    module: nn.Module
    inputs: Inputs
    tokens: int
    """Text and image tokens that attend to each other."""

    def with_compiled_layers(self, **options: Any) -> nn.Module:
        """Return the model, weights shared, with layers compiled by ``torch.compile``."""
        model = copy.copy(self.module)
        model._modules = {
            name: nn.ModuleList(torch.compile(layer, **options) for layer in child)
            if isinstance(child, nn.ModuleList)
            else child
            for name, child in model._modules.items()
        }
        return model


class Size(NamedTuple):
    """Latents of one sample, in patches."""

    frames: int
    height: int
    width: int

    @property
    def patches(self) -> int:
        """How many there are."""
        return self.frames * self.height * self.width


class Model(NamedTuple):
    """One architecture: how to build it, and its sizes by name."""

    build: Callable[[Size, bool], Built]
    """From the size and whether all else is tiny, on torch's default device, in fp32."""
    sizes: dict[str, Size]


def cogvideox(size: Size, tiny: bool) -> Built:
    """CogVideoX-1.5-5B: 48 heads of 64, patches of two frames, rotary embeddings."""
    from diffusers import CogVideoXTransformer3DModel
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    heads, text_dim, text, layers = (2, 64, 26, 1) if tiny else (48, 4096, 226, LAYERS)
    model = CogVideoXTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=64,
        text_embed_dim=text_dim,
        num_layers=layers,
        patch_size=2,
        patch_size_t=2,
        sample_height=2 * size.height,
        sample_width=2 * size.width,
        use_rotary_positional_embeddings=True,
        patch_bias=False,
    )
    grid = (size.height, size.width)
    inputs = {
        "hidden_states": torch.randn(1, 2 * size.frames, 16, 2 * size.height, 2 * size.width),
        "encoder_hidden_states": torch.randn(1, text, text_dim),
        "timestep": torch.tensor([500]),
        "image_rotary_emb": get_3d_rotary_pos_embed(
            64,
            None,
            grid,
            size.frames,
            grid_type="slice",
            max_size=grid,
            device=torch.get_default_device(),
        ),
    }
    return Built(model, inputs, size.patches + text)


def flux(size: Size, tiny: bool) -> Built:
    """FLUX.1-dev: 24 heads of 128, layers with separate and with common weights for text."""
    from diffusers import FluxTransformer2DModel

    heads, text_dim, text, layers = (1, 64, 26, 1) if tiny else (24, 4096, 512, LAYERS)
    model = FluxTransformer2DModel(
        num_layers=layers,
        num_single_layers=layers,
        num_attention_heads=heads,
        joint_attention_dim=text_dim,
        guidance_embeds=True,
    )
    patch = torch.arange(size.patches)
    inputs = {
        "hidden_states": torch.randn(1, size.patches, 64),
        "encoder_hidden_states": torch.randn(1, text, text_dim),
        "pooled_projections": torch.randn(1, 768),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.stack([0 * patch, patch // size.width, patch % size.width], 1).float(),
        "txt_ids": torch.zeros(text, 3),
    }
    return Built(model, inputs, size.patches + text)


MODELS = {
    # 45k is 81 frames of 1360 x 768, what the 1.5 model is for; 17k 81 frames of 832 x 480.
    "cogvideox": Model(
        cogvideox,
        {
            "tiny": Size(2, 10, 16),
            "4k": Size(11, 16, 22),
            "17k": Size(11, 30, 52),
            "45k": Size(11, 48, 85),
        },
    ),
    # 17k is 2048 x 2048 pixels.
    "flux": Model(
        flux,
        {
            "tiny": Size(1, 16, 20),
            "4k": Size(1, 56, 64),
            "17k": Size(1, 128, 128),
            "45k": Size(1, 208, 214),
        },
    ),
}
TOKENS = ("4k", "17k", "45k")


def spread(module: nn.Module) -> None:
    """Draw weights with which attention decides something."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    for name, parameter in module.named_parameters():
        if QUERY_NORM.search(name):
            nn.init.constant_(parameter, SCORE_DEVIATION)


def build(name: str, size: str, device: str, dtype: torch.dtype) -> Built:
    """Return model ``name`` and inputs on ``device``, all floating point but positions in dtype."""
    model = MODELS[name]
    torch.manual_seed(0)
    with torch.device(device):
        built = model.build(model.sizes[size], size == "tiny")
        spread(built.module)
    # Not the module's own to(), which warns of float32 modules, of which these have none.
    module = nn.Module.to(built.module, dtype).eval().requires_grad_(False)

    def cast(key: str, value: Any) -> Any:
        is_data = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if is_data and not key.endswith("_ids") else value

    inputs = {key: cast(key, value) for key, value in built.inputs.items()}
    return built._replace(module=module, inputs=inputs)
