"""Rotating Q and K by one Hadamard matrix before they are quantized, so that no channel is loud.

Each entry of H is 1 or -1 and H H^T = b I, so (Q H)(K H)^T = b Q K^T: the scores stay what they are
with ``scale / b``. But every channel of Q H holds a share of all channels of Q, so a few large ones
no longer coarsen the codes of the rest. H is divided by b, a power of two: its entries stay exact
in 16 bits, no sum exceeds the largest input, and the scale times b makes up for both divisions.

b is the largest power of two that divides the head dimension: that itself for 64, 128 and 256,
three blocks of 32 channels for 96, five of 16 for 80. The products are summed in fp32 and rounded
to the dtype of Q and K: 2^-9 of their size in bf16, against 2^-8 of the largest in INT8 codes.

Source: QuaRot (arXiv 2404.00456); Walsh's order of rows is of no consequence here.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from torch_sage.ops.checks import Size, known


def problems(rotation: str, head_dim: Size) -> Iterator[str]:
    """Yield why ``head_dim`` channels cannot be rotated as ``SageConfig.rotation`` says."""
    if rotation == "none":
        return
    if not isinstance(head_dim, int):
        yield f"head_dim must be known for rotation={rotation!r}, got the symbol {head_dim}"
    elif head_dim % 2:
        yield f"head_dim must be even for rotation={rotation!r}, got {head_dim}"


def named(recipe: str, rotation: str) -> str:
    """Return the name of a recipe that runs on rotated Q and K, for people."""
    return recipe if rotation == "none" else f"{recipe}/{rotation}"


def rotated(
    rotation: str, query: Tensor, key: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, float | None]:
    """Return query, key and scale with the same scores, rotated as ``rotation`` says."""
    if rotation == "none":
        return query, key, scale
    by = _matrix_for(query)
    return _times(query, by), _times(key, by), scale_of_rotated(query.shape[-1], scale)


def rotate(x: Tensor) -> Tensor:
    """Return x [..., head_dim] times H / b, in the dtype and order of dimensions of x."""
    return _times(x, _matrix_for(x))


def scale_of_rotated(head_dim: int, scale: float | None) -> float:
    """Return the scale of rotated queries and keys; None means 1 / sqrt(head_dim), as ever."""
    return (head_dim**-0.5 if scale is None else scale) * block_of(head_dim)


def block_of(head_dim: int) -> int:
    """Return how many channels are rotated together."""
    return head_dim & -head_dim


def matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return H / size, [size, size]: its sign is the parity of the bits that row and column share.

    Of operators on numbers alone, so that a compiled or exported graph needs no constant for it.
    """
    index = torch.arange(size, device=device)
    bits = torch.bitwise_and(index.unsqueeze(1), index)
    for shift in (4, 2, 1):
        bits = torch.bitwise_xor(bits, bits >> shift)
    return ((1 - 2 * (bits & 1)) / size).to(dtype)


def _times(x: Tensor, by: Tensor) -> Tensor:
    """Return the product of each block of channels and ``by``."""
    # In the order of memory: a matrix product copies what it cannot flatten.
    swaps = x.dim() > 2 and known(x.stride(-3) < x.stride(-2))
    rows = x.transpose(-2, -3) if swaps else x
    if len(by) == x.shape[-1]:
        turned = rows @ by
    else:
        blocks = rows.reshape(*rows.shape[:-1], x.shape[-1] // len(by), len(by))
        turned = (blocks @ by).reshape(rows.shape)
    return turned.transpose(-2, -3) if swaps else turned


def _matrix_for(x: Tensor) -> Tensor:
    """Return the matrix for ``x``; eager calls keep theirs, and traced ones make it in the graph.

    Kept for one stream each, where what made it comes before what reads it; what a CUDA graph
    makes would live in that graph's memory.
    """
    size = block_of(x.shape[-1])
    if torch.compiler.is_compiling() or type(x) is not Tensor:
        return matrix(size, x.dtype, x.device)
    stream = 0
    if x.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return matrix(size, x.dtype, x.device)
        stream = torch.cuda.current_stream(x.device).cuda_stream
    return _kept(size, x.dtype, x.device, stream)


@lru_cache(maxsize=64)
def _kept(size: int, dtype: torch.dtype, device: torch.device, stream: int) -> Tensor:
    return matrix(size, dtype, device)
