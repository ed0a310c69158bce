"""Other people's attention: torch's backends, FlashAttention-3, cuDNN in FP8, comfy-kitchen."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu import cudnn_fp8
from benchmarks.gpu.contender import Calls, Contender, Unsupported, module, nothing
from benchmarks.gpu.fp8 import Operands, quantize
from benchmarks.gpu.problem import Problem


def torch_backend(backend: SDPBackend) -> Contender:
    """Return torch's SDPA with one backend."""

    def calls(problem: Problem) -> Calls:
        query, key, value, is_causal = problem

        def whole() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)

        return {"whole": whole}

    return Contender(nothing, calls)


def tokens_first(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Return Q, K, V as [B, L, H, D] in memory, the order of the kernels that take it."""
    query, key, value = (x.transpose(1, 2).contiguous() for x in problem[:3])
    return query, key, value


def fa3_bf16(problem: Problem) -> Calls:
    """FlashAttention-3 on what it is given."""
    from flash_attn_interface import flash_attn_func

    tensors = tokens_first(problem)
    return {"whole": lambda: flash_attn_func(*tensors, causal=problem.is_causal).transpose(1, 2)}


def fa3_fp8(problem: Problem) -> Calls:
    """FlashAttention-3 in E4M3, one scale per tensor."""
    from flash_attn_interface import flash_attn_func

    tensors = tokens_first(problem)
    scales = (problem.query.shape[0], problem.query.shape[1])

    def attend(operands: Operands) -> Tensor:
        query, key, value = (x.expand(scales) for x in operands.descale)
        output = flash_attn_func(
            *operands[:3],
            causal=problem.is_causal,
            q_descale=query,
            k_descale=key,
            v_descale=value,
        )
        return output.transpose(1, 2)

    return quantized(tensors, attend)


def cudnn_in_fp8(problem: Problem) -> Calls:
    """CuDNN's E4M3 attention, one scale per tensor."""
    tensors = tokens_first(problem)
    return quantized(tensors, cudnn_fp8.attention(quantize(*tensors), problem.is_causal))


def quantized(tensors: tuple[Tensor, Tensor, Tensor], attend: Any) -> Calls:
    """Return the calls of an FP8 kernel with the quantizer in front."""
    ready = quantize(*tensors)
    return {
        "kernel": lambda: attend(ready),
        "whole": lambda: attend(quantize(*tensors)),
        "quantize": lambda: quantize(*tensors).query,
    }


def comfy_int8(problem: Problem) -> Calls:
    """comfy-kitchen's INT8 attention, which has no causal mask."""
    import comfy_kitchen

    if problem.is_causal:
        raise Unsupported("no causal mask")
    query, key, value, _ = problem
    ready = comfy_kitchen.prequantize_int8_attention(query, key, value)
    return {
        "kernel": lambda: comfy_kitchen.int8_attention_from_prequantized(ready),
        "whole": lambda: comfy_kitchen.int8_attention(query, key, value),
    }


PEERS: dict[str, Contender] = {
    "fa2": torch_backend(SDPBackend.FLASH_ATTENTION),
    "cudnn": torch_backend(SDPBackend.CUDNN_ATTENTION),
    "fa3": Contender(module("flash_attn_interface"), fa3_bf16),
    "fa3-fp8": Contender(module("flash_attn_interface"), fa3_fp8),
    "cudnn-fp8": Contender(module("cudnn"), cudnn_in_fp8),
    "comfy": Contender(module("comfy_kitchen"), comfy_int8),
}
