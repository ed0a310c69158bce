"""torch's context_parallel with ring_attention inside."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.experimental import context_parallel as torch_context_parallel
from torch.distributed.tensor.experimental._attention import _cp_options
from torch.overrides import TorchFunctionMode

from torch_sage.config import SageConfig, as_config
from torch_sage.distributed.ring import ring_attention
from torch_sage.ops.dispatch import why_not

# F.scaled_dot_product_attention; torch's context_parallel puts a function of its own there.
_SDPA = torch._C._nn.scaled_dot_product_attention
_SEQUENCE = (Shard(2),)


@contextlib.contextmanager
def context_parallel(
    mesh: DeviceMesh,
    *,
    buffers: list[Tensor] | None = None,
    buffer_seq_dims: list[int] | None = None,
    no_restore_buffers: set[Tensor] | None = None,
    config: SageConfig | str | None = None,
) -> Iterator[None]:
    """Shard ``buffers`` and share attention as torch's ``context_parallel``, by ``ring_attention``.

    A call of ``F.scaled_dot_product_attention`` inside, on the ranks' own tokens, becomes
    ``ring_attention``. Masks, gradients and what the kernels do not support are left to torch,
    which has a ring for its CUDA kernels; it has none on CPU, where they are an error. Eager only.

    Args:
        mesh: the 1-D mesh that shares the sequence; this and the next three are torch's.
        buffers: tensors to shard in place, such as inputs and position embeddings.
        buffer_seq_dims: the dimension of tokens in each.
        no_restore_buffers: those that need not be whole again afterwards.
        config: how to compute, as for ``ring_attention``.

    Raises:
        NotImplementedError: on CPU, where torch has no ring for what ours does not support.
    """
    sharded = torch_context_parallel(
        mesh,
        buffers=buffers,
        buffer_seq_dims=buffer_seq_dims,
        no_restore_buffers=no_restore_buffers,
    )
    with sharded, _RingMode(mesh, as_config(config)):
        yield


class _RingMode(TorchFunctionMode):
    """SDPA of DTensors that are sharded along the tokens is ring attention.

    torch has no hook for another kernel. But its replacement of SDPA turns the local tensors into
    DTensors and calls the original with them, and a function mode sees that.
    """

    def __init__(self, mesh: DeviceMesh, config: SageConfig) -> None:
        """Keep the ranks that share the sequence, and how to compute."""
        super().__init__()
        self.mesh = mesh
        self.config = config

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Compute SDPA of sequence shards, if the kernels support it."""
        kwargs = kwargs or {}
        if func is _SDPA:
            result = self._attend(*args, **kwargs)
            if result is not None:
                return result
        return func(*args, **kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor | None:
        operands = [x for x in (query, key, value) if isinstance(x, DTensor)]
        if len(operands) != 3 or any(x.placements != _SEQUENCE for x in operands):
            return None
        q, k, v = (x.to_local() for x in operands)
        config = self.config.with_options(dispatch="always")
        lacks = why_not(q, k, v, None, dropout_p, is_causal, scale, enable_gqa, config=config)
        problems = [reason.message for reason in lacks]
        if attn_mask is not None:
            problems.append("attn_mask must be None")
        if problems and query.device.type == "cpu":
            raise NotImplementedError("in context_parallel on CPU, " + "; ".join(problems))
        if problems:
            return None
        output = ring_attention(
            q,
            k,
            v,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
            group=self.mesh,
            order="zigzag" if _cp_options.enable_load_balance else "contiguous",
            config=self.config,
        )
        return DTensor.from_local(output, self.mesh, _SEQUENCE, run_check=False)
