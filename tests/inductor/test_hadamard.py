"""The Hadamard rotation of Q and K in compiled graphs, exported programs and packages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_sage
from tests.inductor.graphs import ALWAYS
from tests.numerics import same_bits
from torch_sage.recipes import SUPPORT

ROTATING = ALWAYS.with_options(rotation="hadamard")
NAME = f"{SUPPORT['cpu'].default.name}/hadamard"


def qkv(n: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    """Return tensors with tokens before heads in memory, as models have them."""
    return tuple(torch.randn(2, n, 4, 64, dtype=dtype).transpose(1, 2) for _ in range(3))


class Attend(nn.Module):
    """SDPA, and attention in three operators."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        by_hand = (q @ k.mT * 0.125).softmax(-1) @ v
        return F.scaled_dot_product_attention(q, k, v, is_causal=True) + by_hand


def expected_of(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    attend = torch_sage.scaled_dot_product_attention
    causal = attend(q, k, v, is_causal=True, config=ROTATING)
    return causal + attend(q, k, v, scale=0.125, config=ROTATING)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_attention_is_the_eager_one(dynamic: bool) -> None:
    inputs = qkv(70)
    for tensor in inputs if dynamic else ():
        torch._dynamo.mark_dynamic(tensor, 2)
    with torch.no_grad():
        fast = torch.compile(Attend(), fullgraph=True, options=torch_sage.options(ROTATING))
        assert same_bits(fast(*inputs), expected_of(*inputs))
        opted_in = torch.compile(torch_sage.sage(ROTATING)(Attend()), options=torch_sage.options())
        opted_in(*inputs)
    graphs = torch_sage.report().graphs
    done = {(r.pattern, r.recipe) for graph in graphs for r in graph.records if r.rewritten}
    assert done == {("fused", NAME), ("manual", NAME), ("direct", NAME)}


def test_a_head_dim_that_is_a_symbol_is_refused() -> None:
    inputs = qkv(70, torch.float32)
    for tensor in inputs:
        torch._dynamo.mark_dynamic(tensor, 3)
    with torch.no_grad():
        fast = torch.compile(F.scaled_dot_product_attention, options=torch_sage.options(ROTATING))
        assert same_bits(fast(*inputs), F.scaled_dot_product_attention(*inputs))
    assert torch_sage.report().reasons == {"recipe_unsupported": 1}


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_needs_no_constant(strict: bool) -> None:
    inputs = qkv(70)
    tokens = torch.export.Dim("tokens", min=2, max=1024)
    shapes = tuple({2: tokens} for _ in inputs)
    with torch.no_grad():
        program = torch.export.export(Attend(), inputs, dynamic_shapes=shapes, strict=strict)
        program = torch_sage.apply_to_exported(program, ROTATING)
        assert not program.constants
        names = {record.recipe for graph in torch_sage.report().graphs for record in graph.records}
        assert names == {NAME}
        shorter = [x[:, :, :33] for x in inputs]
        assert same_bits(program.module()(*shorter), expected_of(*shorter))


def test_a_package_of_aotinductor_computes_the_same(tmp_path: Path) -> None:
    class Call(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return torch_sage.scaled_dot_product_attention(q, k, v, config=ROTATING)

    inputs = qkv(70)
    with torch.no_grad():
        program = torch.export.export(Call(), inputs)
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        found = torch._inductor.aoti_load_package(path)(*inputs)
    assert same_bits(found, torch_sage.scaled_dot_product_attention(*inputs, config=ROTATING))
