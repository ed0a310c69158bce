"""DTensors: an op beside its plain self, and models under tensor parallelism and FSDP2."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import torch_sage
from tests.numerics import relative_l1, same_bits
from torch_sage import SageConfig

ALWAYS = SageConfig(dispatch="always")
# How each model is shared, and how many of its attention nodes the passes rewrite.
MODELS = {
    "tensor parallel, eager": 0,  # sage() calls the op itself
    "tensor parallel, local": 2,
    "tensor parallel, DTensor": 2,
    "FSDP2, eager": 0,
    "FSDP2, compiled": 1,  # layer by layer, and both layers share one graph
}


def operands(heads: int = 4, heads_kv: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, h, 130, 16, generator=generator) for h in (heads, heads_kv, heads_kv)]


def run_sharded(
    op: Callable[..., Any], mesh: DeviceMesh, placements: list[Any], *args: Any, **kwargs: Any
) -> list[str]:
    """Call an op on DTensors; return where the results lie, or how they differ from plain ones."""
    sharded = [
        distribute_tensor(arg, mesh, placements) if isinstance(arg, Tensor) else arg for arg in args
    ]
    found = []
    results, plain = op(*sharded, **kwargs), op(*args, **kwargs)
    if isinstance(plain, Tensor):
        results, plain = (results,), (plain,)
    for result, expected in zip(results, plain, strict=True):
        assert isinstance(result, DTensor)
        same = (
            result.shape == expected.shape
            and result.dtype == expected.dtype
            and result.stride() == expected.stride()
            and same_bits(result.full_tensor(), expected)
        )
        found.append(str(list(result.placements)) if same else f"differs from {expected.shape}")
    return found


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, -1, 16).transpose(1, 2) for f in (self.q, self.k, self.v))
        output = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(output.transpose(1, 2).reshape(b, n, -1))


def tensor_parallel(net: nn.Module, mesh: DeviceMesh, local: bool) -> nn.Module:
    for layer in net:
        columns = {name: ColwiseParallel(use_local_output=local) for name in "qkv"}
        rows = {"o": RowwiseParallel(input_layouts=Shard(-1))}
        parallelize_module(layer, mesh, {**columns, **rows})
    return net


def fully_sharded(net: nn.Module, mesh: DeviceMesh, compiled: bool) -> nn.Module:
    for layer in net:
        if compiled:
            layer.compile(fullgraph=True)
        fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def models(mesh: DeviceMesh) -> dict[str, tuple[float, float, int]]:
    """Error of each model and of the unsplit one, and how many nodes were rewritten."""
    torch.manual_seed(0)
    net, x = nn.Sequential(Attention(), Attention()).eval(), torch.randn(2, 130, 64)
    net, x = net.to(mesh.device_type), x.to(mesh.device_type)
    exact = net(x)
    unsplit = relative_l1(torch_sage.sage(ALWAYS)(copy.deepcopy(net))(x), exact)
    found = {}

    def check(name: str, forward: Callable[[Tensor], Tensor]) -> None:
        torch._dynamo.reset()
        before = torch_sage.report().rewritten
        with torch_sage.enable(ALWAYS):
            error = relative_l1(forward(x), exact)
        found[name] = (error, unsplit, torch_sage.report().rewritten - before)

    eager = tensor_parallel(copy.deepcopy(net), mesh, local=True)
    check("tensor parallel, eager", torch_sage.sage(ALWAYS)(eager))
    for local in (True, False):
        parallel = tensor_parallel(copy.deepcopy(net), mesh, local)
        name = f"tensor parallel, {'local' if local else 'DTensor'}"
        check(name, torch.compile(parallel, fullgraph=True))
    eager = fully_sharded(copy.deepcopy(net), mesh, compiled=False)
    check("FSDP2, eager", torch_sage.sage(ALWAYS)(eager))
    check("FSDP2, compiled", fully_sharded(copy.deepcopy(net), mesh, compiled=True))
    return found


def assert_quantized(models: dict[str, tuple[float, float, int]], name: str) -> None:
    """Sums in another order flip codes, so the error is another one, and of the same size."""
    error, unsplit, nodes = models[name]
    assert nodes == MODELS[name]
    assert unsplit / 2 < error < 2 * unsplit
