"""CuDNN's FP8 attention through its graph API."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.contender import Unsupported
from benchmarks.gpu.fp8 import Operands

# The output types to ask for, the best first: not every cuDNN writes 16 bits from FP8 operands.
OUTPUTS = (torch.bfloat16, torch.float16, torch.float8_e4m3fn)
# cuDNN rounds this times exp(score - maximum), which is at most 1, to E4M3.
PROBABILITY_SCALE = 256.0


@cache
def handle() -> int:
    """Return cuDNN's handle of this process, on the current stream."""
    import cudnn

    made: int = cudnn.create_handle()
    cudnn.set_stream(made, torch.cuda.current_stream().cuda_stream)
    return made


def attention(like: Operands, is_causal: bool) -> Callable[[Operands], Tensor]:
    """Return the compiled attention of operands of this shape, [B, L, H, D] in memory."""
    import cudnn

    problems = []
    for dtype in OUTPUTS:
        output = torch.empty_like(like.query, dtype=dtype).transpose(1, 2)
        try:
            graph, workspace = build(like, output, is_causal)
        except cudnn.cudnnGraphNotSupportedError as error:
            problems.append(f"{dtype}: {error}")
            continue
        return bind(graph, workspace, output)
    raise Unsupported("; ".join(problems))


NAMES = ("q", "k", "v", "descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
OUTPUT, LARGEST_P, LARGEST_OUTPUT = (len(NAMES) + i for i in range(3))


def build(like: Operands, output: Tensor, is_causal: bool) -> tuple[Any, Tensor]:
    """Return the graph, its tensors numbered in the order of ``NAMES``, and its workspace."""
    import cudnn

    e4m3, fp32 = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
    graph = cudnn.pygraph(
        io_data_type=e4m3,
        intermediate_data_type=fp32,
        compute_data_type=fp32,
        handle=handle(),
    )
    tensors = {}
    for uid, name in enumerate(NAMES):
        is_scalar = "scale" in name
        shown = torch.empty(1, 1, 1, 1) if is_scalar else like.query.transpose(1, 2)
        tensors[name] = graph.tensor(
            uid=uid,
            dim=list(shown.shape),
            stride=list(shown.stride()),
            data_type=fp32 if is_scalar else e4m3,
        )
    out, _, *largest = graph.sdpa_fp8(
        **tensors,
        attn_scale=like.query.shape[3] ** -0.5,
        use_causal_mask=is_causal,
        generate_stats=False,
    )
    out.set_uid(OUTPUT).set_output(True).set_data_type(
        {
            torch.bfloat16: cudnn.data_type.BFLOAT16,
            torch.float16: cudnn.data_type.HALF,
            torch.float8_e4m3fn: e4m3,
        }[output.dtype]
    )
    out.set_dim(list(output.shape)).set_stride(list(output.stride()))
    for uid, tensor in zip((LARGEST_P, LARGEST_OUTPUT), largest, strict=True):
        tensor.set_uid(uid).set_output(True).set_data_type(fp32)
        tensor.set_dim([1, 1, 1, 1]).set_stride([1, 1, 1, 1])
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    size = max(1, graph.get_workspace_size())
    return graph, torch.empty(size, device=output.device, dtype=torch.uint8)


def bind(graph: Any, workspace: Tensor, output: Tensor) -> Callable[[Operands], Tensor]:
    """Return a call of ``graph`` that writes ``output`` and returns it in bf16."""
    scale = torch.tensor([PROBABILITY_SCALE], device=output.device)
    one, descale = torch.ones_like(scale), 1 / scale
    largest = {uid: torch.zeros_like(scale) for uid in (LARGEST_P, LARGEST_OUTPUT)}

    def attend(operands: Operands) -> Tensor:
        # No output is larger than the largest value, so its scale fits an E4M3 output, too.
        is_fp8 = output.dtype == torch.float8_e4m3fn
        inputs = (*operands[:3], *operands.descale, descale, scale)
        pointers: dict[int, Tensor] = dict(enumerate(inputs))
        pointers[NAMES.index("scale_o")] = operands.scale[2] if is_fp8 else one
        graph.execute({**pointers, **largest, OUTPUT: output}, workspace, handle=handle())
        if output.dtype == torch.bfloat16:
            return output
        wide = output.to(torch.bfloat16)
        return wide.mul_(operands.descale[2]) if is_fp8 else wide

    return attend
