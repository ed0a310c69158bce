"""The study of producers without a GPU: its layers, and how it tells kernels apart."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton has wheels for Linux only")

import torch
import torch.nn.functional as F

import torch_sage
from benchmarks import bench_producer
from benchmarks.gpu import blocks

# What Inductor writes for a layer, cut to the lines that matter.
CODE = """
        stream0 = get_raw_stream(0)
        triton_red_fused_native_layer_norm_0.run(arg0_1, buf3, 4608, 3072, stream=stream0)
        extern_kernels.mm(reinterpret_tensor(buf3, (4608, 3072), (3072, 1), 0), arg2_1, out=buf4)
        extern_kernels.mm(buf3, arg3_1, out=buf14)
        triton_per_fused_add_mul_1.run(buf4, arg5_1, arg6_1, buf7, 110592, 128, stream=stream0)
        triton_per_fused_add_mul_2.run(buf9, arg5_1, arg6_1, buf10, 110592, 128, stream=stream0)
        buf15 = torch.ops.torch_sage.sdpa.default(buf7, reinterpret_tensor(buf10, (1, 24), (1, 1), 0), reinterpret_tensor(buf14, (1, 24), (1, 1), 0), None, 'none', None, qk='int8')
        triton_poi_fused_sdpa_gelu_3.run(buf16, buf14, 56623104, stream=stream0)
"""  # noqa: E501


def test_producers_write_q_or_k() -> None:
    found = bench_producer.producers(CODE)
    assert found == {"triton_per_fused_add_mul_1", "triton_per_fused_add_mul_2"}
    parts = {
        "triton_per_fused_add_mul_1": "producer",
        "triton_poi_fused_sdpa_gelu_3": "rest",
        "void torch_sage::(anonymous)::prepare_kv_kernel<128>(X)": "prepare",
        "void torch_sage::mma::statistics_kernel<128, false>(PrepareParams)": "prepare",
        "void torch_sage::sm90::attention_kernel<torch_sage::sm90::Config<128> >(X)": "attention",
        "_attention_kernel": "attention",
        "_rows_kernel": "prepare",
        "void cudnn::fusion::flash_fprop_sm90": "attention",
        "nvjet_tst_128x256_64x4_2x1_v_bz_TNT": "linear",
        "triton_tem_fused_mm_4": "linear",
        "void at::native::vectorized_elementwise_kernel<4>": "rest",
    }  # fmt: skip
    assert {kernel: bench_producer.part_of(kernel, found) for kernel in parts} == parts


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
    program = torch_sage.apply_to_exported(program, bench_producer.CONFIG)
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
