"""Rotary embeddings as models spell them: of x [B, H, N, D], with what each takes besides."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

B, H, N, D = 2, 4, 24, 64


def angles(n: int = N, d: int = D) -> Tensor:
    """Return [n, d / 2] in fp32."""
    return torch.arange(n)[:, None] * 10000.0 ** -(torch.arange(0, d, 2) / d)


def compact() -> tuple[Tensor, ...]:
    return angles().cos(), angles().sin()


def doubled() -> tuple[Tensor, ...]:
    return tuple(torch.cat([t, t], -1) for t in compact())


def repeated() -> tuple[Tensor, ...]:
    return tuple(t.repeat_interleave(2, -1) for t in compact())


def by_batch() -> tuple[Tensor, ...]:
    """Return [B, 1, N, D]: every sequence has its own positions."""
    at = torch.stack([angles(N + 7)[:N], angles(N + 7)[7:]])[:, None]
    return torch.cat([at, at], -1).cos(), torch.cat([at, at], -1).sin()


def rotate_half(x: Tensor) -> Tensor:
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def llama(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos.to(x.dtype) + rotate_half(x) * sin.to(x.dtype)


def computed_in_the_graph(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """As transformers: tables of every layer from positions, in fp32, cast to the model's dtype."""
    freqs = positions[:, :, None].float() * frequencies[None, None, :]
    emb = torch.cat((freqs, freqs), dim=-1)
    cos, sin = emb.cos().to(x.dtype).unsqueeze(1), emb.sin().to(x.dtype).unsqueeze(1)
    return (x * cos) + (rotate_half(x) * sin)


def chunks(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.float().chunk(2, -1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).type_as(x)


def transposed_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = torch.tensor_split(x, 2, -1)
    return torch.cat([sin * x2 + cos * x1, -(sin * x1 - cos * x2)], -1).to(x.dtype)


def split_tables(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    low, high = x.split(half, -1)
    low_cos, high_cos = cos[:, :half], cos[:, half:]
    low_sin, high_sin = sin[:, :half], sin[:, half:]
    return torch.cat([low * low_cos - high * low_sin, high * high_cos + low * high_sin], -1).to(
        x.dtype
    )


def gptj(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return (x * cos + turned * sin).to(x.dtype)


def repeated_in_the_graph(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = (t.repeat_interleave(2, -1) for t in (cos, sin))
    return gptj(x, cos, sin)


def flux(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As diffusers."""
    real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(3)
    return (x.float() * cos[None, None] + turned.float() * sin[None, None]).to(x.dtype)


def of_several_axes(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """As diffusers: some channels rotate by the row of a pixel, others by its column."""
    cos, sin = (
        torch.cat([f(at).repeat_interleave(2, -1) for at in (low, high)], -1)
        for f in (torch.cos, torch.sin)
    )
    return flux(x, cos.float(), sin.float())


def flux_matrices(x: Tensor, matrices: Tensor) -> Tensor:
    """As Black Forest Labs: [N, D / 2, 2, 2] has a matrix for every pair."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 1, 2)
    out = matrices[..., 0] * pairs[..., 0] + matrices[..., 1] * pairs[..., 1]
    return out.reshape(*x.shape).type_as(x)


def matrices() -> tuple[Tensor, ...]:
    cos, sin = compact()
    return (torch.stack([cos, -sin, sin, cos], -1).unflatten(-1, (2, 2)),)


def wan(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As diffusers: written into a new tensor, tokens before heads."""
    x = x.transpose(1, 2)
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[None, :, None, 0::2], sin[None, :, None, 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = x1 * cos - x2 * sin
    out[..., 1::2] = x1 * sin + x2 * cos
    return out.type_as(x).transpose(1, 2)


def in_place(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out, half = x.clone(), x.shape[-1] // 2
    out[..., :half] = x[..., :half] * cos - x[..., half:] * sin
    out[..., half:] = x[..., half:] * cos + x[..., :half] * sin
    return out


def complex_numbers(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As the first Llama; ``torch.polar`` made the table."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    table = torch.view_as_complex(torch.stack([cos, sin], -1))
    return torch.view_as_real(pairs * table).flatten(3).type_as(x)


def accumulated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.addcmul(x * cos, rotate_half(x), sin).to(x.dtype)


class Spelling(NamedTuple):
    rope: Callable[..., Tensor]
    tables: Callable[[], tuple[Tensor, ...]]
    pairing: str


SPELLINGS = {
    "llama": Spelling(llama, doubled, "halves"),
    "by batch": Spelling(llama, by_batch, "halves"),
    "chunks": Spelling(chunks, compact, "halves"),
    "transposed": Spelling(transposed_rotation, compact, "halves"),
    "split tables": Spelling(split_tables, doubled, "halves"),
    "in place": Spelling(in_place, compact, "halves"),
    "accumulated": Spelling(accumulated, doubled, "halves"),
    "computed in the graph": Spelling(
        computed_in_the_graph,
        lambda: (torch.arange(N).expand(B, N) + torch.arange(B)[:, None], angles()[1]),
        "halves",
    ),
    "gptj": Spelling(gptj, repeated, "neighbours"),
    "repeated in the graph": Spelling(repeated_in_the_graph, compact, "neighbours"),
    "flux": Spelling(flux, repeated, "neighbours"),
    "of several axes": Spelling(
        of_several_axes,
        lambda: (angles(d=16).double(), angles(d=48).flip(0).double()),
        "neighbours",
    ),
    "flux, matrices": Spelling(flux_matrices, matrices, "neighbours"),
    "wan": Spelling(wan, repeated, "neighbours"),
    "complex": Spelling(complex_numbers, compact, "neighbours"),
}


# Norms in front, of x [B, H, N, D]; the weight lies in the dtype of x.


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, 1e-6)


def rms_norm_in_steps(x: Tensor, weight: Tensor) -> Tensor:
    """As transformers."""
    y = x.to(torch.float32)
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * y.to(x.dtype)


def rms_norm_by_division(x: Tensor, weight: Tensor) -> Tensor:
    y = x.float()
    return (y / (y * y).mean(-1, keepdim=True).add(1e-6).sqrt()).to(x.dtype) * weight


def rms_norm_of_all_heads(x: Tensor, weight: Tensor) -> Tensor:
    """As Wan."""
    flat = x.transpose(1, 2).flatten(2)
    normed = F.rms_norm(flat, flat.shape[-1:], weight.repeat(x.shape[1]), 1e-6)
    return normed.unflatten(-1, (-1, x.shape[-1])).transpose(1, 2)


def unit_length(x: Tensor, weight: Tensor) -> Tensor:
    return F.normalize(x.float(), dim=-1).to(x.dtype) * weight


NORMS = {
    # name: (norm, whether the op computes the factor, from eps)
    "rms_norm": (rms_norm, True),
    "in steps": (rms_norm_in_steps, True),
    "by division": (rms_norm_by_division, False),
    "of all heads": (rms_norm_of_all_heads, False),
    "unit length": (unit_length, False),
}
