"""Our own roads: the sm90 kernels in three ways, those of mma.sync, and Triton's."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.gpu.contender import Calls, Contender, nothing
from benchmarks.gpu.problem import Problem
from torch_sage import _extension
from torch_sage.ops import triton_attention
from torch_sage.ops.hadamard import rotated
from torch_sage.ops.triton_attention import Tile

RECIPE = {"qk": "int8", "granularity": "token_thread", "pv": "e4m3_fp16", "smooth": "kv"}
TILES = (
    Tile(128, 64, 8, 3),
    Tile(128, 64, 4, 3),
    Tile(128, 128, 8, 3),
    Tile(64, 128, 4, 2),
    Tile(64, 128, 4, 3),
    Tile(64, 64, 4, 2),
    Tile(64, 64, 4, 3),
    Tile(128, 64, 8, 2),
)


def lack_sm90() -> str | None:
    """Say why the sm90 kernels are not here, if they are not."""
    if not _extension.is_available():
        return _extension.unavailable_reason()
    cuda = _extension.build_info()["cuda"]
    return None if "sm90" in cuda else f"libtorch_sage.so must have cuda=sm90, got cuda={cuda}"


def sm90(exponential: str) -> Contender:
    """Return the Hopper kernels; "kernel" quantizes Q, and has K and V from ``prepare_kv``."""

    def calls(problem: Problem) -> Calls:
        ops = torch.ops.torch_sage
        query, key, value, is_causal = problem
        causal = "top_left" if is_causal else "none"
        ready = ops.prepare_kv(key, value, smooth=RECIPE["smooth"])
        sizes = (key.shape[2], value.shape[3])
        # What prepare_kv has to read and write, half of it read and half written.
        written = sum(x.numel() * x.element_size() for x in ready)
        half = (key.nbytes + value.nbytes + written) // 2
        source, target = (torch.empty(half, device=key.device, dtype=torch.uint8) for _ in range(2))
        return {
            "kernel": lambda: ops.attention_prepared(
                query, *ready, *sizes, None, causal, exponential=exponential
            ),
            "whole": lambda: ops.sdpa(
                query, key, value, None, causal, **RECIPE, exponential=exponential
            ),
            "prepare": lambda: ops.prepare_kv(key, value, smooth=RECIPE["smooth"])[0],
            "copy": lambda: target.copy_(source),
        }

    return Contender(lack_sm90, calls)


def sm90_rotated() -> Contender:
    """Return the Hopper kernels behind the Hadamard rotation of Q and K."""

    def calls(problem: Problem) -> Calls:
        query, key, value, is_causal = problem
        causal = "top_left" if is_causal else "none"

        def whole() -> Tensor:
            q, k, scale = rotated("hadamard", query, key, None)
            op = torch.ops.torch_sage.sdpa
            return op(q, k, value, None, causal, scale, **RECIPE, exponential="mixed")

        return {"whole": whole}

    return Contender(lack_sm90, calls)


def lack_mma() -> str | None:
    """Say why the mma.sync kernels are not here, if they are not."""
    if not _extension.is_available():
        return _extension.unavailable_reason()
    cuda = _extension.build_info()["cuda"]
    return None if "sm80" in cuda else f"libtorch_sage.so must have cuda=sm80, got cuda={cuda}"


def mma(pv: str, smooth: str) -> Contender:
    """Return a member of the mma.sync family; it quantizes in every call."""

    def calls(problem: Problem) -> Calls:
        query, key, value, is_causal = problem
        causal = "top_left" if is_causal else "none"
        recipe = {"qk": "int8", "granularity": "thread", "pv": pv, "smooth": smooth}
        op = torch.ops.torch_sage.sdpa
        return {"whole": lambda: op(query, key, value, None, causal, **recipe)}

    return Contender(lack_mma, calls)


def triton(smooth: str, tile: Tile | None = None, granularity: str = "token_block") -> Contender:
    """Return the portable kernels, with another tile than theirs if one is given."""

    def calls(problem: Problem) -> Calls:
        query, key, value, is_causal = problem
        causal = "top_left" if is_causal else "none"

        def whole() -> Tensor:
            chosen = triton_attention.tile_for
            triton_attention.tile_for = (lambda *_: tile) if tile else chosen
            try:
                return torch.ops.torch_sage.sdpa(
                    query, key, value, None, causal, granularity=granularity, smooth=smooth
                )
            finally:
                triton_attention.tile_for = chosen

        return {"whole": whole}

    return Contender(nothing, calls)


SAGE: dict[str, Contender] = {"sage": sm90("mixed"), "sage-exact": sm90("exact")}
ROTATED: dict[str, Contender] = {"sage-hadamard": sm90_rotated()}
MMA: dict[str, Contender] = {
    "mma-bf16": mma("bf16", "k"),
    "mma-bf16-qk": mma("bf16", "qk"),
    "mma-e4m3-fp16": mma("e4m3_fp16", "k"),
}
TRITON: dict[str, Contender] = {
    "triton": triton("k"),
    "triton-qk": triton("qk"),
    "triton-token": triton("k", granularity="token"),
    **{f"triton-{'x'.join(map(str, tile))}": triton("k", tile) for tile in TILES},
}
