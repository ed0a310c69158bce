"""DTensor: the ops under sharding rules, and models under tensor parallelism and FSDP2."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import local_map

import torch_sage.distributed
from tests.cases import AttentionCase, make_inputs
from tests.distributed.launch import launch
from tests.distributed.sharded import (
    ALWAYS,
    MODELS,
    assert_quantized,
    models,
    operands,
    run_sharded,
)
from tests.rotary import RotaryCase, arguments
from tests.varlen import pack
from torch_sage import _extension, ops
from torch_sage.recipes import SUPPORT

pytestmark = pytest.mark.skipif(
    not _extension.is_available(), reason=_extension.unavailable_reason() or ""
)
SUPPORT_OF_GPUS = [support for row, support in SUPPORT.items() if row.startswith("cuda")]
GRANULARITIES = ("token", "thread", "warp", "block", "tensor")
MASKS = [(130, 130), (1, 130), (4, 130, 130), (1, 1, 130), (2, 1, 130, 130), (2, 4, 1, 130)]
# A mask of three dimensions makes torch 2.11 flatten sharded ones, which its DTensor refuses.
TORCH_MASKS = [shape for shape in MASKS if len(shape) != 3]


def on_axis(mesh: DeviceMesh, axis: int) -> dict[str, list[str]]:
    """Every op with all operands sharded along batch (0) or heads (1)."""
    q, k, v = operands()
    lies = [Shard(axis)]
    found: dict[str, list[str]] = {}
    for granularity in GRANULARITIES:
        rows = {"granularity": granularity}
        keys, values = ops.quantize_key(k, **rows), ops.quantize_value(v, smooth=True)
        cases: dict[str, tuple[Any, tuple[Any, ...]]] = {
            "quantize_query": (ops.quantize_query, (q,)),
            "quantize_key": (ops.quantize_key, (k, k.mean(2))),
            "sdpa": (ops.sdpa, (q, k, v, None, "top_left")),
            "sdpa_with_lse": (ops.sdpa_with_lse, (q, k, v)),
            "attention": (ops.attention, (q, *keys, *values)),
            "attention_with_lse": (ops.attention_with_lse, (q, *keys, *values, None, "top_left")),
        }
        for name, (op, args) in cases.items():
            found[f"{name} {granularity}"] = run_sharded(op, mesh, lies, *args, **rows)
    for smooth in (False, True):
        found[f"quantize_value {smooth}"] = run_sharded(
            ops.quantize_value, mesh, lies, v, smooth=smooth
        )
    for order in ("bhsd", "bshd"):
        found[f"sdpa {order}"] = run_sharded(ops.sdpa, mesh, lies, q, k, v, output_order=order)
    return found


def heads(mesh: DeviceMesh) -> dict[tuple[int, int], list[str]]:
    """Numbers of query and key heads, all sharded along heads."""
    return {
        counts: run_sharded(ops.sdpa, mesh, [Shard(1)], *operands(*counts))
        for counts in ((4, 4), (4, 2), (4, 1), (6, 3), (3, 3))
    }


def packed_heads(mesh: DeviceMesh) -> list[str]:
    """Packed sequences, sharded along heads; where the sequences start is the same on all."""
    whole = pack([9, 70], [30, 41])
    lies = (Shard(1),) * 3 + (Replicate(),) * 2
    tensors = [distribute_tensor(x, mesh, [p]) for x, p in zip(whole[:5], lies, strict=True)]
    found = []
    results, plain = (ops.varlen_sdpa_with_lse(*x, 70, 41) for x in (tensors, whole[:5]))
    for result, expected in zip(results, plain, strict=True):
        same = torch.equal(result.full_tensor(), expected)
        found.append(str(list(result.placements)) if same else "differs")
    return found


def rotated_shards(mesh: DeviceMesh) -> dict[tuple[str, int], str]:
    """Tables, weights and factors go where Q and K are, whatever dimensions they have."""
    found = {}
    inputs = make_inputs(AttentionCase(batch=2, heads_q=4, dtype="bf16"))
    for case in (
        RotaryCase(),
        RotaryCase(norm="rstd", weight="channels", by_batch=True),
        RotaryCase(norm="rstd_of_heads", weight="heads"),
    ):
        args = arguments(case, inputs)
        plain = ops.rotary_sdpa(*args)
        for axis in (0, 1):
            placements = [Shard(axis)] * 3 + [Replicate()] * (len(args) - 3)
            sharded = (
                distribute_tensor(x, mesh, [p]) if isinstance(x, Tensor) else x
                for x, p in zip(args, placements, strict=True)
            )
            result = ops.rotary_sdpa(*sharded)
            same = torch.equal(result.full_tensor(), plain)
            found[case.id, axis] = str(list(result.placements)) if same else "differs"
    return found


def masks(
    op: Callable[..., Any], mesh: DeviceMesh, shapes: list[tuple[int, ...]]
) -> dict[tuple[tuple[int, ...], int], str]:
    """Replicated masks of every broadcast shape beside operands sharded along batch or heads."""
    found = {}
    q, k, v = operands()
    for shape in shapes:
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.3
        for axis in (0, 1):
            sharded = [distribute_tensor(x, mesh, [Shard(axis)]) for x in (q, k, v)]
            result = op(*sharded, distribute_tensor(mask, mesh, [Replicate()]))
            same = torch.equal(result.full_tensor(), op(q, k, v, mask))
            found[shape, axis] = str(list(result.placements)) if same else "differs"
    return found


def torch_sdpa(*args: Any) -> Any:
    return F.scaled_dot_product_attention(*args, enable_gqa=True)


def torch_sdpa_of_sharded_mask(mesh: DeviceMesh) -> str:
    mask = distribute_tensor(torch.ones(2, 1, 130, 130, dtype=torch.bool), mesh, [Shard(0)])
    try:
        torch_sdpa(*(distribute_tensor(x, mesh, [Shard(1)]) for x in operands()), mask)
    except (NotImplementedError, RuntimeError) as error:
        return str(error)
    return "accepted"


def local_function(mesh: DeviceMesh) -> list[str]:
    """The public function takes DTensors by torch's local_map."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch_sage.scaled_dot_product_attention(
            query, key, value, enable_gqa=True, config=ALWAYS
        )

    lies = [Shard(1)]
    local = local_map(attend, lies, in_placements=(lies,) * 3, device_mesh=mesh)

    def either(*args: Tensor) -> Any:
        return local(*args) if isinstance(args[0], DTensor) else ops.sdpa(*args)

    return run_sharded(either, mesh, lies, *operands())


def work(rank: int, size: int, cache: str) -> dict[str, Any]:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    # Plain loops around the ops will do; to find out what else the compiler can takes 8 s.
    os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "0"
    mesh = init_device_mesh("cpu", (size,))
    grid = init_device_mesh("cpu", (1, size))
    torch_sage.distributed.register_cpu_sdpa_sharding()
    with torch.no_grad():
        q, k, v = operands()
        return {
            "axes": [on_axis(mesh, axis) for axis in (0, 1)],
            "grid": run_sharded(ops.sdpa, grid, [Shard(0), Shard(1)], q, k, v),
            "heads": heads(mesh),
            "local_map": local_function(mesh),
            "packed": packed_heads(mesh),
            "rotated": rotated_shards(mesh),
            "masks": masks(ops.sdpa, mesh, MASKS),
            "torch": masks(torch_sdpa, mesh, TORCH_MASKS),
            "torch, sharded mask": torch_sdpa_of_sharded_mask(mesh),
            "models": models(mesh),
        }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("sharding")
    first, second = launch(work, 2, folder, str(folder))
    of_ranks = first.pop("models"), second.pop("models")
    assert first == second
    return {**first, "models": of_ranks}


def lies(axis: int | None) -> str:
    return str([Replicate() if axis is None else Shard(axis)])


@pytest.mark.parametrize("axis", [0, 1])
def test_every_op_runs_shard_by_shard(found: dict[str, Any], axis: int) -> None:
    """The recipe decides the sizes of the scales, so DTensor must not remember another one's."""
    results = found["axes"][axis]
    assert len(results) == 6 * len(GRANULARITIES) + 4
    assert {placement for result in results.values() for placement in result} == {lies(axis)}


def test_two_mesh_dimensions_shard_batch_and_heads(found: dict[str, Any]) -> None:
    assert found["grid"] == [str([Shard(0), Shard(1)])]


def test_heads_stay_sharded_where_those_of_keys_divide(found: dict[str, Any]) -> None:
    assert found["heads"] == {
        (4, 4): [lies(1)],
        (4, 2): [lies(1)],
        (4, 1): [lies(None)],
        (6, 3): [lies(None)],
        (3, 3): [lies(1)],
    }


def test_rotations_run_shard_by_shard(found: dict[str, Any]) -> None:
    assert len(found["rotated"]) == 6
    assert all(result == lies(axis) for (_, axis), result in found["rotated"].items())


def test_packed_sequences_are_sharded_by_heads(found: dict[str, Any]) -> None:
    """The LSE [heads, tokens] has no dimension before its heads."""
    assert found["packed"] == [lies(1), lies(0)]


def test_the_public_function_is_quantized_in_local_map(found: dict[str, Any]) -> None:
    assert found["local_map"] == [lies(1)]


def test_masks_are_sharded_as_they_broadcast(found: dict[str, Any]) -> None:
    assert found["masks"] == {(shape, axis): lies(axis) for shape in MASKS for axis in (0, 1)}


def test_torch_sdpa_on_cpu_takes_dtensors(found: dict[str, Any]) -> None:
    """DTensor moves no keyword argument: what a mask would have to be cut for is gathered."""
    for (shape, axis), result in found["torch"].items():
        assert result != "differs"
        full = (1,) * (4 - len(shape)) + shape
        assert result in [lies(None), *(lies(own) for own in (0, 1) if full[own] == 1)]
        assert full[axis] != 1 or result == lies(axis)


def test_torch_sdpa_on_cpu_refuses_a_sharded_mask(found: dict[str, Any]) -> None:
    assert "attn_mask must be replicated" in found["torch, sharded mask"]


@pytest.mark.parametrize("axis", [0, 1])
def test_ops_of_gpus_are_judged_as_on_gpus(axis: int) -> None:
    """DTensor of torch 2.11 traced every op on CPU, which refused the recipes of a mesh of GPUs.

    Fakes need no GPU, and no other rank.
    """
    placements = (Shard(axis),)
    mesh = DeviceMesh("cuda", [0, 1], _init_backend=False, _rank=0)
    ours = torch.ops.torch_sage
    with FakeTensorMode(), torch.no_grad():
        local = [torch.empty(2, heads, 130, 16, device="cuda") for heads in (4, 2, 2)]
        q, k, v = (DTensor.from_local(x, mesh, placements, run_check=False) for x in local)
        prepared = ours.prepare_kv(k, v)
        results = [
            *prepared,
            *ours.attention_prepared_with_lse(q, *prepared, 130, 16),
            *ours.attention_prepared_part(q, *prepared, 130, 16),
            ours.attention_prepared(q, *prepared, 130, 16),
            *ours.quantize_value(v, pv="fp16"),
            *(ours.sdpa(q, k, v, **row.default.op_kwargs()) for row in SUPPORT_OF_GPUS),
        ]
    for result in results:
        assert result.placements == placements
        assert result.device.type == result.to_local().device.type == "cuda"
        sizes = [*result.to_local().shape]
        sizes[axis] *= 2
        assert [*result.shape] == sizes


@pytest.mark.parametrize("name", MODELS)
def test_models_run_quantized(found: dict[str, Any], name: str) -> None:
    for of_rank in found["models"]:
        assert_quantized(of_rank, name)


def test_group_is_gone_afterwards(found: dict[str, Any]) -> None:
    assert not dist.is_initialized()
