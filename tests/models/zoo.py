"""Small random models of real libraries, their inputs, and how many attentions each computes.

Configurations are the smallest that keep what decides about a rewrite: grouped heads, padding
masks, relative position bias, cross attention, joint text-image sequences, rotary embeddings.
Sequences are not multiples of the kernels' 64-key blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 99
TOKENS = 75
Inputs = dict[str, Any]


@dataclass(frozen=True)
class ModelCase:
    """One model: how to build it and the number of attentions that one call computes."""

    name: str
    build: Callable[[], tuple[nn.Module, Inputs]]
    attentions: int
    implementation: str | None = None
    """What the model is switched to for compiling; its attention is SDPA before that."""

    skipped: Counter[str] = field(default_factory=Counter)
    """Reason codes of the attentions that are not rewritten."""

    def __str__(self) -> str:
        return f"{self.name}-{self.implementation}" if self.implementation else self.name


def token_ids(*shape: int) -> Tensor:
    return torch.randint(3, VOCABULARY, shape)


def right_padding(batch: int, tokens: int) -> Tensor:
    """Return an attention mask whose sequence i ends 11 * i tokens early."""
    lengths = tokens - 11 * torch.arange(batch)
    return (torch.arange(tokens) < lengths[:, None]).long()


def text_inputs(padded: bool) -> Inputs:
    inputs = {"input_ids": token_ids(2, TOKENS)}
    return inputs | {"attention_mask": right_padding(2, TOKENS)} if padded else inputs


TEXT_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
}


def bert(padded: bool) -> tuple[nn.Module, Inputs]:
    config = transformers.BertConfig(**TEXT_ENCODER)
    return transformers.BertModel(config, add_pooling_layer=False), text_inputs(padded)


def gpt2(padded: bool) -> tuple[nn.Module, Inputs]:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=128,
        n_embd=64,
        n_layer=2,
        n_head=2,
        use_cache=False,
    )
    return transformers.GPT2Model(config), text_inputs(padded)


def llama(padded: bool) -> tuple[nn.Module, Inputs]:
    config = transformers.LlamaConfig(
        **(TEXT_ENCODER | {"num_attention_heads": 4}),
        num_key_value_heads=2,
        use_cache=False,
    )
    return transformers.LlamaModel(config), text_inputs(padded)


def t5() -> tuple[nn.Module, Inputs]:
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=64,
        d_kv=32,
        d_ff=96,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=2,
        use_cache=False,
    )
    inputs = {
        "input_ids": token_ids(2, TOKENS),
        "attention_mask": right_padding(2, TOKENS),
        "decoder_input_ids": token_ids(2, 70),
    }
    return transformers.T5Model(config), inputs


def whisper() -> tuple[nn.Module, Inputs]:
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        num_mel_bins=8,
        max_source_positions=TOKENS,
        max_target_positions=96,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        use_cache=False,
    )
    inputs = {
        "input_features": torch.randn(2, 8, 2 * TOKENS),
        "decoder_input_ids": token_ids(2, 70),
    }
    return transformers.WhisperModel(config), inputs


VISION_ENCODER = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "image_size": 72,
    "patch_size": 8,
}


def vit() -> tuple[nn.Module, Inputs]:
    config = transformers.ViTConfig(**VISION_ENCODER)
    model = transformers.ViTModel(config, add_pooling_layer=False)
    return model, {"pixel_values": torch.randn(2, 3, 72, 72)}


def clip_vision() -> tuple[nn.Module, Inputs]:
    config = transformers.CLIPVisionConfig(**VISION_ENCODER)
    return transformers.CLIPVisionModel(config), {"pixel_values": torch.randn(2, 3, 72, 72)}


def clip_text() -> tuple[nn.Module, Inputs]:
    config = transformers.CLIPTextConfig(
        **TEXT_ENCODER,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    return transformers.CLIPTextModel(config), text_inputs(padded=True)


def flux() -> tuple[nn.Module, Inputs]:
    model = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(8, 12, 12),
    )
    rows = torch.arange(64)
    image_ids = torch.stack([torch.zeros(64), rows // 8, rows % 8], dim=1)
    inputs = {
        "hidden_states": torch.randn(1, 64, 4),
        "encoder_hidden_states": torch.randn(1, 13, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": image_ids,
        "txt_ids": torch.zeros(13, 3),
    }
    return model, inputs


def wan() -> tuple[nn.Module, Inputs]:
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=1,
        rope_max_seq_len=32,
    )
    inputs = {
        "hidden_states": torch.randn(1, 4, 3, 10, 10),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 70, 32),
    }
    return model, inputs


def cogvideox() -> tuple[nn.Module, Inputs]:
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=32,
        num_layers=1,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=22,
    )
    inputs = {
        "hidden_states": torch.randn(1, 3, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 22, 32),
        "timestep": torch.tensor([500]),
    }
    return model, inputs


def sd_block() -> tuple[nn.Module, Inputs]:
    """Return the transformer of one Stable Diffusion UNet level: self, then cross attention."""
    model = diffusers.Transformer2DModel(
        num_attention_heads=2,
        attention_head_dim=40,
        in_channels=80,
        cross_attention_dim=32,
        norm_num_groups=8,
    )
    inputs = {
        "hidden_states": torch.randn(1, 80, 9, 9),
        "encoder_hidden_states": torch.randn(1, 77, 32),
    }
    return model, inputs


TRANSFORMERS = [
    ModelCase("bert", partial(bert, padded=False), 2, "sdpa"),
    ModelCase("bert-padded", partial(bert, padded=True), 2, "sdpa"),
    ModelCase("bert-padded", partial(bert, padded=True), 2, "eager"),
    ModelCase("gpt2-padded", partial(gpt2, padded=True), 2, "sdpa"),
    ModelCase("gpt2", partial(gpt2, padded=False), 2, "eager"),
    ModelCase("llama", partial(llama, padded=False), 2, "sdpa"),
    ModelCase("llama-padded", partial(llama, padded=True), 2, "eager"),
    ModelCase("vit", vit, 2, "sdpa"),
    ModelCase("vit", vit, 2, "eager"),
    ModelCase("clip-text", clip_text, 2, "sdpa"),
    ModelCase("clip-vision", clip_vision, 2, "eager"),
    ModelCase("t5", t5, 6, "sdpa"),
    ModelCase("t5", t5, 6, "eager"),
    ModelCase("whisper", whisper, 6, "sdpa"),
    ModelCase("whisper", whisper, 6, "eager"),
]

DIFFUSERS = [
    ModelCase("flux", flux, 2),
    ModelCase("wan", wan, 2),
    ModelCase("cogvideox", cogvideox, 1),
    ModelCase("sd-unet-block", sd_block, 2),
]


class SelfAttention(nn.Module):
    """nn.MultiheadAttention as users call it; "eager" asks for the weights and ignores them."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 2, batch_first=True, **settings)
        self.need_weights = False

    def set_attn_implementation(self, name: str) -> None:
        self.need_weights = name == "eager"

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.attention(x, x, x, key_padding_mask=padding, need_weights=self.need_weights)[0]


def multihead(padded: bool) -> tuple[nn.Module, Inputs]:
    inputs = {"x": torch.randn(2, TOKENS, 64)}
    return SelfAttention(), inputs | ({"padding": right_padding(2, TOKENS) == 0} if padded else {})


def encoder_layer(norm_first: bool, padded: bool) -> tuple[nn.Module, Inputs]:
    layer = nn.TransformerEncoderLayer(64, 2, 96, batch_first=True, norm_first=norm_first)
    inputs: Inputs = {"src": torch.randn(2, TOKENS, 64)}
    if padded:
        inputs["src_key_padding_mask"] = right_padding(2, TOKENS) == 0
    return layer, inputs


TORCH_NN = [
    ModelCase("multihead", partial(multihead, padded=False), 1, "sdpa"),
    ModelCase("multihead-padded", partial(multihead, padded=True), 1, "sdpa"),
    ModelCase("multihead", partial(multihead, padded=False), 1, "eager"),
    ModelCase("encoder-layer", partial(encoder_layer, norm_first=False, padded=False), 1),
    ModelCase("encoder-layer-padded", partial(encoder_layer, norm_first=True, padded=True), 1),
]
