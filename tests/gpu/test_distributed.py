"""Several GPUs, one process each, with NCCL; conftest.py leaves this out where there is one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

import torch_sage
from tests.cases import make_inputs
from tests.csrc.isas import ROOT, run_python
from tests.distributed.launch import launch
from tests.distributed.sharded import (
    ALWAYS,
    MODELS,
    assert_quantized,
    models,
    operands,
    run_sharded,
)
from tests.distributed.split import (
    PREPARED,
    PREPARED_CASES,
    Kernels,
    SplitCase,
    attend,
    attend_in_context,
    expect_split,
    parts_of,
    ring,
    ulysses,
)
from tests.gpu.shared import OPS, on_gpu, qkv
from tests.numerics import assert_within_budget, exact_attention, relative_l1, same_bits
from torch_sage import SageConfig, recipes
from torch_sage.devices import rows_of
from torch_sage.distributed.kernels import rows_to_send
from torch_sage.recipes import SUPPORT

# All tests of a number of processes share one start of them: one worker of pytest-xdist runs all.
pytestmark = pytest.mark.xdist_group("several GPUs")

SIZES = [size for size in (2, 4) if size <= torch.cuda.device_count()]
if not SIZES:
    raise RuntimeError(f"there must be 2 GPUs or more, got {torch.cuda.device_count()}")
MAX_LSE_ERROR = 1e-4  # of merged partial results; issue 5
TRITON_TILE = 64  # keys per step of the online softmax

# Beside what CPUs run: shards of several groups of 1024 keys whose halves end inside one, heads in
# groups, the instantiations for masks and for both widths.
LONGER_CASES = [
    ring("zigzag", causal="top_left", data="channel_bias", heads_q=4, heads_kv=2, seqlen_q=5000,
         seqlen_k=5000, smooth="kv", head_dim=128, head_dim_v=128, dtype="bf16"),
    ring(seqlen_q=400, seqlen_k=9000, smooth="k", dtype="fp16", heads_q=8, heads_kv=4),
    ring(seqlen_q=200, seqlen_k=2600, mask="bool_late", smooth="kv", dtype="bf16"),
    ulysses(causal="top_left", heads_q=8, seqlen_q=2400, seqlen_k=2400, smooth="kv", head_dim=96,
            head_dim_v=128, dtype="bf16"),
]  # fmt: skip
TRITON_CASES = [
    ring("zigzag", causal="top_left", data="channel_bias", heads_q=4, heads_kv=2, smooth="kv"),
    ring(granularity="thread", mask="key_padding", batch=2, dtype="bf16"),
    ulysses(causal="top_left", heads_q=8, dtype="fp16", granularity="block"),
]
TRITON = parts_of({"fp32": "bf16", "bf16": "bf16", "fp16": "fp16"}, TRITON_TILE)
FAMILIES: dict[str, tuple[Kernels, list[SplitCase]]] = {"triton": (TRITON, TRITON_CASES)}
if rows_to_send(torch.device("cuda", 0))[0] == recipes.PREPARED:
    FAMILIES["prepared"] = (PREPARED, [*PREPARED_CASES, *LONGER_CASES])
SPLIT = [(family, case) for family, (_, cases) in FAMILIES.items() for case in cases]


def long_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens for the default recipe, the same on every GPU."""
    generator = torch.Generator(device="cuda").manual_seed(0)

    def drawn(heads: int) -> Tensor:
        shape = (1, heads, 8192, 128)
        return torch.randn(shape, generator=generator, device="cuda").bfloat16()

    return drawn(4), drawn(2) + 1, drawn(2)


def share_long(is_causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Ring output and LSE, and all-to-all output, of the long inputs."""
    from torch_sage import distributed as D

    order: Any = {"order": "zigzag" if is_causal else "contiguous"}
    options: Any = {"is_causal": is_causal, "enable_gqa": True}
    found = D.ring_attention_with_lse(
        *(D.shard_sequence(x, **order) for x in long_inputs()), **options, **order
    )
    rows = D.ulysses_attention(*(D.shard_sequence(x) for x in long_inputs()), **options)
    whole = [D.unshard_sequence(x, **order) for x in found]
    return whole[0], whole[1], D.unshard_sequence(rows)


def refused(call: Callable[[], Any]) -> str:
    try:
        call()
    except (NotImplementedError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def refusals(rank: int, size: int) -> dict[str, str]:
    """What calls with tensors on several devices say; a rank that waits runs into the timeout."""
    from torch_sage import distributed as D

    q, k, v = qkv(1, size, 64, 64)
    other = torch.device("cuda", (rank + 1) % size)
    return {
        "key": refused(lambda: D.ring_attention(q, k.to(other), v)),
        "value of rank 0": refused(lambda: D.ring_attention(q, k, v.to(other) if not rank else v)),
        "all-to-all": refused(lambda: D.ulysses_attention(q, k, v.cpu())),
        "mask": refused(lambda: D.ring_attention(q, k, v, torch.ones(64, 64 * size, device=other))),
        "afterwards": refused(lambda: D.ring_attention(q, k, v)),
    }


def sharded_ops(size: int) -> dict[str, list[str]]:
    """Where the results of ops lie whose operands are sharded along heads."""
    mesh = init_device_mesh("cuda", (size,))
    q, k, v = (x.cuda() for x in operands(2 * size, size))
    recipe = SUPPORT[rows_of(torch.device("cuda", 0))[0]].default.op_kwargs()
    lies = [Shard(1)]
    found = {
        "sdpa": run_sharded(OPS.sdpa, mesh, lies, q, k, v, None, "top_left", **recipe),
        "sdpa_with_lse": run_sharded(OPS.sdpa_with_lse, mesh, lies, q, k, v, **recipe),
    }
    if "prepared" in FAMILIES:
        prepared = OPS.prepare_kv(k, v)
        sizes = (k.shape[2], v.shape[3])
        found["prepare_kv"] = run_sharded(OPS.prepare_kv, mesh, lies, k, v)
        for name in ("attention_prepared_with_lse", "attention_prepared_part"):
            op = getattr(OPS, name)
            found[name] = run_sharded(op, mesh, lies, q, *prepared, *sizes)
    return found


def work(rank: int, size: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with torch.no_grad():
        for family, (kernels, cases) in FAMILIES.items():
            found[family] = {
                case.id: tuple(
                    x.cpu()
                    for x in attend(case, kernels, inputs=on_gpu(make_inputs(case.attention)))
                )
                for case in cases
            }
        found["long"] = [[x.cpu() for x in share_long(is_causal)] for is_causal in (False, True)]
        mesh = init_device_mesh("cuda", (size,))
        found["context"] = [
            attend_in_context(mesh, [*qkv_of_all(rank)], causal).cpu() for causal in (False, True)
        ]
        found["refusals"] = refusals(rank, size)
        found["sharded"] = sharded_ops(size)
        found["models"] = models(mesh)
    return found


def qkv_of_all(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same tokens on every rank, on its own GPU."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, 1, 4, 1024, 64)
    q, k, v = torch.randn(shape, generator=generator).bfloat16().to(rank).unbind()
    return q, k, v


@pytest.fixture(scope="module", params=SIZES)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The number of processes, and what each of them found."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    return request.param, launch(work, request.param, folder, backend="nccl")


@pytest.mark.parametrize(("family", "case"), SPLIT, ids=lambda x: getattr(x, "id", x))
def test_within_the_budget_of_the_unsplit_op(ranks: Any, family: str, case: SplitCase) -> None:
    size, found = ranks
    kernels = FAMILIES[family][0]
    expected = expect_split(case, size, kernels, on_gpu(make_inputs(case.attention)))
    for of_rank in found:
        output, lse = (x.cuda() for x in of_rank[family][case.id])
        assert_within_budget(output, expected, lse=lse)
        error = (lse.double() - expected.oracle.lse).abs()
        assert error[expected.oracle.lse > -1e30].max() <= MAX_LSE_ERROR


@pytest.mark.parametrize("is_causal", [False, True])
def test_long_sequences_have_the_error_of_one_gpu(ranks: Any, is_causal: bool) -> None:
    q, k, v = long_inputs()
    causal = "top_left" if is_causal else "none"
    exact = exact_attention(q, k, v, None, causal)
    options: Any = {"enable_gqa": True, "config": SageConfig(smooth_q=False, dispatch="always")}
    alone = torch_sage.attention_with_lse(q, k, v, causal=causal, **options)
    # Without the LSE a part of the exponentials is mixed.
    mixed = torch_sage.scaled_dot_product_attention(q, k, v, is_causal=is_causal, **options)
    unsplit, unsplit_mixed = (relative_l1(x, exact.output) for x in (alone.output, mixed))
    # The mean: rows that see few keys have the error of a single score, whose largest is chance.
    unsplit_lse = (alone.lse - exact.lse).abs().mean()
    for of_rank in ranks[1]:
        ring_output, lse, swapped = (x.cuda() for x in of_rank["long"][is_causal])
        for output, error in ((ring_output, unsplit), (swapped, unsplit_mixed)):
            assert error / 1.1 < relative_l1(output, exact.output) < 1.1 * error
        assert (lse - exact.lse).abs().mean() < 1.1 * unsplit_lse


@pytest.mark.parametrize("is_causal", [False, True])
def test_context_parallel_runs_the_ring(ranks: Any, is_causal: bool) -> None:
    q, k, v = qkv_of_all(0)
    exact = exact_attention(q, k, v, None, "top_left" if is_causal else "none").output
    alone = torch_sage.scaled_dot_product_attention(q, k, v, is_causal=is_causal, config=ALWAYS)
    unsplit = relative_l1(alone, exact)
    for of_rank in ranks[1]:
        error = relative_l1(of_rank["context"][is_causal].cuda(), exact)
        assert unsplit / 1.2 < error < 1.2 * unsplit  # torch's own would have a tenth of it


def test_tensors_on_several_devices_are_refused_on_every_rank(ranks: Any) -> None:
    size, found = ranks
    for rank, of_rank in enumerate(found):
        here, there = f"cuda:{rank}", f"cuda:{(rank + 1) % size}"
        refusals = of_rank["refusals"]
        start = f"must be on {here} like query, got"
        assert refusals["key"].startswith(f"NotImplementedError: key {start} {there}")
        assert refusals["all-to-all"].startswith(f"NotImplementedError: value {start} cpu")
        assert refusals["mask"] == f"ValueError: attn_mask must be on {here}, got {there}"
        refusal = refusals["value of rank 0"]
        if rank == 0:
            assert refusal.startswith(f"NotImplementedError: value {start} {there}")
        else:
            assert refusal.endswith("must be accepted on every rank, got refusals on [0]")
        assert refusals["afterwards"] == "accepted"


def test_ops_run_shard_by_shard(ranks: Any) -> None:
    for of_rank in ranks[1]:
        for name, placements in of_rank["sharded"].items():
            assert set(placements) == {str([Shard(1)])}, name


@pytest.mark.parametrize("name", MODELS)
def test_models_run_quantized(ranks: Any, name: str) -> None:
    """Tensor parallelism and FSDP2, eager and compiled."""
    for of_rank in ranks[1]:
        assert_quantized(of_rank["models"], name)


def attend_away(rank: int, size: int) -> list[bool]:
    """Attend with tensors on this rank's GPU while another one is the current device."""
    from torch_sage import distributed as D

    q, k, v = qkv_of_all(rank)
    local = [D.shard_sequence(x) for x in (q, k, v)]
    methods = (D.ring_attention, D.ulysses_attention)
    here = [attend(*local, is_causal=True) for attend in methods]
    torch.cuda.synchronize()
    torch.cuda.set_device((rank + 1) % size)
    away = [attend(*local, is_causal=True) for attend in methods]
    for device in range(size):
        torch.cuda.synchronize(device)
    same = [same_bits(a, b) for a, b in zip(here, away, strict=True)]
    torch.cuda.set_device(rank)  # the barrier at the end is this GPU's
    return same


@pytest.mark.parametrize("size", SIZES[:1])
def test_ranks_whose_current_device_is_another(size: int, tmp_path: Path) -> None:
    assert launch(attend_away, size, tmp_path, backend="nccl") == [[True, True]] * size


ROWS = rows_of(torch.device("cuda", 0))


@pytest.mark.parametrize("row", ROWS)
def test_tensors_on_another_than_the_current_device(row: str) -> None:
    """The ops launch, allocate and set up their kernels on the device of their tensors."""
    recipe = SUPPORT[row].default.op_kwargs()
    here = qkv(2, 4, 300, 64)
    there = [x.to("cuda:1") for x in here]
    assert torch.cuda.current_device() == 0
    for op in (OPS.sdpa, OPS.sdpa_with_lse):
        expected, found = op(*here, **recipe), op(*there, **recipe)
        if isinstance(expected, Tensor):
            expected, found = (expected,), (found,)
        for a, b in zip(expected, found, strict=True):
            assert b.device == torch.device("cuda", 1)
            assert same_bits(a.cpu(), b.cpu())
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("current", [0, 1])
def test_prepared_operands_on_another_than_the_current_device(current: int) -> None:
    if "prepared" not in FAMILIES:
        with pytest.raises(NotImplementedError, match="key must be on a GPU of"):
            torch_sage.prepare_kv(*qkv(1, 1, 8, 64)[1:])
        return
    with torch.cuda.device(0):
        here = qkv(2, 4, 300, 64)
        expected = torch_sage.attention_prepared(here[0], torch_sage.prepare_kv(*here[1:]))
    with torch.cuda.device(current):
        q, k, v = (x.to("cuda:1") for x in here)
        found = torch_sage.attention_prepared(q, torch_sage.prepare_kv(k, v))
    assert found.device == torch.device("cuda", 1) and same_bits(found.cpu(), expected.cpu())


def test_compiled_functions_on_another_than_the_current_device() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True) * 2

    torch._dynamo.reset()
    fast = torch.compile(attend, options=torch_sage.options(ALWAYS))
    here = qkv(1, 4, 300, 64)
    recipe = SUPPORT[ROWS[0]].default.op_kwargs()
    expected = OPS.sdpa(*here, None, "top_left", **recipe) * 2
    with torch.no_grad():
        for device in ("cuda:1", "cuda:0", "cuda:1"):
            found = fast(*(x.to(device) for x in here))
            assert str(found.device) == device
            assert same_bits(found.cpu(), expected.cpu())


def test_operands_on_several_devices_are_named() -> None:
    q, k, v = qkv(1, 4, 300, 64)
    far = k.to("cuda:1")
    strict = SageConfig(dispatch="always", on_unsupported="error")
    message = "key must be on cuda:0 like query, got cuda:1"
    (reason,) = torch_sage.why_not(q, far, v, config=ALWAYS)
    assert (reason.code, reason.message) == ("device_mismatch", message)
    with pytest.raises(NotImplementedError, match=message):
        torch_sage.scaled_dot_product_attention(q, far, v, config=strict)
    for row in ROWS:
        with pytest.raises(ValueError, match=re.escape(message)):
            OPS.sdpa(q, far, v, **SUPPORT[row].default.op_kwargs())
    if "prepared" in FAMILIES:
        prepared = torch_sage.prepare_kv(far, v.to("cuda:1"))
        with pytest.raises(ValueError, match="key_codes must be on cuda:0 like query, got cuda:1"):
            torch_sage.attention_prepared(q, prepared)


def test_the_example_runs_with_nccl() -> None:
    done = run_python(str(ROOT / "examples" / "ring_attention.py"))
    assert done.returncode == 0, done.stderr
    assert "all-to-all over 2 nccl ranks" in done.stdout


def test_there_is_no_group_left() -> None:
    assert not dist.is_initialized()
