"""The benchmark of fused norms and rotations without a GPU: layers, kernels by name, the rule."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton has wheels for Linux only")

import torch
import torch.nn.functional as F

import torch_sage
from benchmarks import bench_producer
from benchmarks.gpu import blocks, rotations
from tests.inductor.graphs import captured_graphs, count
from torch_sage import ops

# What Inductor writes for a layer, cut to the lines that matter.
CODE = """
triton_red_fused_native_layer_norm_0 = async_compile.triton('triton_red_fused_native_layer_norm_0')
        triton_red_fused_native_layer_norm_0.run(arg0_1, buf3, 4608, 3072, stream=stream0)
        extern_kernels.mm(buf3, arg3_1, out=buf14)
        triton_per_fused_add_mul_1.run(buf4, arg5_1, arg6_1, buf7, 110592, 128, stream=stream0)
        triton_per_fused_add_mul_1.run(buf9, arg5_1, arg6_1, buf10, 110592, 128, stream=stream0)
        buf15 = torch.ops.torch_sage.sdpa.default(buf7, buf10, buf14, None, 'none', qk='int8')
"""


def test_launches_are_counted_by_name() -> None:
    norm, rotation = "triton_red_fused_native_layer_norm_0", "triton_per_fused_add_mul_1"
    assert bench_producer.launches([CODE, CODE]) == [norm, rotation, rotation] * 2


def test_what_gains_is_listed_by_kind() -> None:
    gains = {("a", 1024): 0.9, ("a", 2048): 1.02, ("a", 4096): 1.0, ("b", 1024): 0.99}
    records = [{"kind": k, "tokens": n, "gain": gain} for (k, n), gain in gains.items()]
    assert rotations.faster(records) == {"a": [2048], "b": []}


@pytest.mark.parametrize("name", rotations.KINDS)
@torch.no_grad()
def test_every_kind_is_fused(name: str) -> None:
    kind = rotations.KINDS[name]._replace(heads=4, heads_kv=2)
    inputs = rotations.operands(kind, 40, "cpu")
    outputs = {}
    for way, op in (("sage", ops.sdpa), ("fused", ops.rotary_sdpa)):
        options = torch_sage.options(bench_producer.SAGE[way])
        outputs[way], graphs = captured_graphs(rotations.attend(kind), *inputs, patches=options)
        assert count(graphs, op) == 1
    assert bench_producer.cosine(*(x.flatten(2) for x in outputs.values())) > 0.999


@pytest.mark.parametrize("name", blocks.BLOCKS)
def test_layers_are_rewritten(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One attention each, whose keys are rotated by distance alone."""
    layer, inputs = blocks.build(name, 128, "cpu", tiny=True)
    shapes = []
    sdpa = F.scaled_dot_product_attention

    def seen(query, key, value, **options):
        shapes.append((query.shape, key.shape, options["is_causal"]))
        return sdpa(query, key, value, **options)

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", seen)
        exact = layer(*inputs)
    assert shapes == [((1, 2, 128, 128), (1, 2, 128, 128), name == "llama")]
    program = torch.export.export(layer, inputs)
    program = torch_sage.apply_to_exported(program, bench_producer.SAGE["sage"])
    assert [str(node.target) for node in program.graph.nodes].count("torch_sage.sdpa.default") == 1
    fast = program.module()(*inputs)
    assert F.cosine_similarity(fast.float(), exact.float(), dim=-1).min() > 0.999

    rotate = blocks.rotate_pairs if blocks.BLOCKS[name].interleaved else blocks.rotate_halves
    x = torch.randn(blocks.HEAD_DIM).expand(1, 1, 64, -1)
    rotated = rotate(x, *blocks.tables(64, blocks.BLOCKS[name].interleaved))[0, 0]
    products = rotated @ rotated.T
    for distance in (0, 1, 7):
        along = products.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=1e-4, atol=1e-3)
