"""One layer of three transformers, written here as their authors compute them, random weights.

What produces Q and K differs: Llama rotates them, Flux and Wan also norm them, per head and across
all heads. V comes straight from its projection in all three.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_DIM = 128


class Sizes(NamedTuple):
    """Of one layer."""

    heads: int
    heads_kv: int
    hidden: int
    """Channels between the two linear layers of the feed-forward part."""

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.heads * HEAD_DIM


def tables(tokens: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of rotary embeddings, [tokens, HEAD_DIM] in fp32."""
    frequencies = 10000.0 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = torch.arange(tokens)[:, None] * frequencies
    angles = angles.repeat_interleave(2, 1) if interleaved else torch.cat([angles, angles], 1)
    return angles.cos(), angles.sin()


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel i of [B, H, N, D] with channel i + D / 2, in the dtype of x (Llama)."""
    low, high = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat([-high, low], -1) * sin.to(x.dtype)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring channels of [B, H, N, D], in fp32 (Flux, Wan)."""
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], -1).flatten(-2)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


class Layer(nn.Module):
    """Attention and what follows it; ``produce`` makes Q and K of the projections."""

    def __init__(self, sizes: Sizes) -> None:
        """Make the projections of all of these layers."""
        super().__init__()
        self.sizes = sizes
        width, of_keys = sizes.width, sizes.heads_kv * HEAD_DIM
        self.q, self.k, self.v = (
            nn.Linear(width, out, bias=False) for out in (width, of_keys, of_keys)
        )
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, sizes.hidden, bias=False)
        self.down = nn.Linear(sizes.hidden, width, bias=False)

    def heads(self, x: Tensor) -> Tensor:
        """Return [B, N, H * D] as [B, H, N, D]."""
        return x.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, x: Tensor, is_causal: bool = False) -> Tensor:
        """Attend with values of ``x``; project back."""
        gqa = self.sizes.heads != self.sizes.heads_kv
        output = F.scaled_dot_product_attention(
            q, k, self.heads(self.v(x)), is_causal=is_causal, enable_gqa=gqa
        )
        return self.out(output.transpose(1, 2).flatten(2))


class Llama(Layer):
    """RMSNorm, RoPE, causal attention with grouped heads, SwiGLU."""

    def __init__(self, sizes: Sizes) -> None:
        """Add the norms and the gate."""
        super().__init__(sizes)
        self.norm1, self.norm2 = nn.RMSNorm(sizes.width), nn.RMSNorm(sizes.width)
        self.gate = nn.Linear(sizes.width, sizes.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the tokens after the layer."""
        y = self.norm1(x)
        q, k = (rotate_halves(self.heads(f(y)), cos, sin) for f in (self.q, self.k))
        x = x + self.attend(q, k, y, is_causal=True)
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Flux(Layer):
    """Attention beside the feed-forward part; Q and K normed per head."""

    def __init__(self, sizes: Sizes) -> None:
        """Add the norms."""
        super().__init__(sizes)
        self.norm = nn.LayerNorm(sizes.width, elementwise_affine=False)
        self.norm_q, self.norm_k = nn.RMSNorm(HEAD_DIM), nn.RMSNorm(HEAD_DIM)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the tokens after the layer."""
        y = self.norm(x)
        q = rotate_pairs(self.norm_q(self.heads(self.q(y))), cos, sin)
        k = rotate_pairs(self.norm_k(self.heads(self.k(y))), cos, sin)
        return x + self.attend(q, k, y) + self.down(F.gelu(self.up(y), approximate="tanh"))


class Wan(Layer):
    """Self-attention and feed-forward part; Q and K normed across all heads."""

    def __init__(self, sizes: Sizes) -> None:
        """Add the norms."""
        super().__init__(sizes)
        self.norm1, self.norm2 = (
            nn.LayerNorm(sizes.width, elementwise_affine=False) for _ in range(2)
        )
        self.norm_q, self.norm_k = nn.RMSNorm(sizes.width), nn.RMSNorm(sizes.width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the tokens after the layer."""
        y = self.norm1(x)
        q = rotate_pairs(self.heads(self.norm_q(self.q(y))), cos, sin)
        k = rotate_pairs(self.heads(self.norm_k(self.k(y))), cos, sin)
        x = x + self.attend(q, k, y)
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Block(NamedTuple):
    """How to build a layer, and the numbers of tokens at which to time it."""

    layer: Callable[[Sizes], Layer]
    sizes: Sizes
    tokens: tuple[int, ...]
    interleaved: bool


# Llama-3.1-8B; FLUX.1-dev, 1024 and 2048 pixels a side with 512 tokens of text; Wan2.1-14B, 81
# frames of 832 x 480.
BLOCKS = {
    "llama": Block(Llama, Sizes(32, 8, 14336), (8192, 32768), False),
    "flux": Block(Flux, Sizes(24, 24, 12288), (4608, 16896), True),
    "wan": Block(Wan, Sizes(40, 40, 13824), (32760,), True),
}
TINY = Sizes(2, 2, 256)


def build(
    name: str, tokens: int, device: str, tiny: bool = False
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Return a layer in bf16 and what it takes: tokens, cosines and sines."""
    block = BLOCKS[name]
    sizes = TINY if tiny else block.sizes
    torch.manual_seed(0)
    with torch.device(device):
        layer = block.layer(sizes).bfloat16().eval().requires_grad_(False)
        x = torch.randn(1, tokens, sizes.width, dtype=torch.bfloat16)
        return layer, (x, *tables(tokens, block.interleaved))
