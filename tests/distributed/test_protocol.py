"""What the ranks say to each other: how much, in which order, and what they refuse to say."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh

import torch_sage
from tests.distributed.emulated import sm90_on_cpu
from tests.distributed.launch import launch
from tests.distributed.split import attend_in_context
from tests.numerics import relative_l1, same_bits
from torch_sage import SageConfig, _extension
from torch_sage.ops import hadamard

pytestmark = pytest.mark.skipif(
    not _extension.is_available(), reason=_extension.unavailable_reason() or ""
)
ROTATING = SageConfig(rotation="hadamard")
TOKENS, LONG, HEADS, CHANNELS = 128, 4096, 4, 64
PADDING = 6 * 127  # of the six tensors of a packet to 128 bytes each, at most


def tensors(tokens: int = TOKENS, **changes: Any) -> list[Tensor]:
    """Query, key and value of the whole sequence, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, HEADS, tokens, CHANNELS)
    return [torch.randn(shape, generator=generator).to(**changes) for _ in range(3)]


@contextlib.contextmanager
def watched(events: list[Any]) -> Iterator[None]:
    """Note when messages are posted, how long they are, when they are waited for, and attention."""
    from torch_sage.distributed.block import Block

    post, swap, attend = dist.batch_isend_irecv, dist.all_to_all_single, Block.attend

    class Request:
        def __init__(self, work: dist.Work) -> None:
            self.work = work

        def wait(self) -> None:
            events.append("wait")
            self.work.wait()

    def posted(ops: list[dist.P2POp]) -> list[Request]:
        events.append(("send", sum(op.tensor.nbytes for op in ops if op.op is dist.isend)))
        return [Request(work) for work in post(ops)]

    def swapped(output: Tensor, input: Tensor, **options: Any) -> Request:
        events.append(("swap", input.nbytes))
        return Request(swap(output, input, **options))

    def attended(*args: Any) -> Any:
        events.append("attend")
        return attend(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "batch_isend_irecv", posted)
        patch.setattr(dist, "all_to_all_single", swapped)
        patch.setattr(Block, "attend", attended)
        yield


def refused(call: Callable[[], Any]) -> str:
    try:
        call()
    except (NotImplementedError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def attend_by(prepared: bool, *local: Tensor) -> Tensor:
    """Ring attention as on a GPU that takes prepared operands, or as on this device."""
    from torch_sage import distributed as D

    with sm90_on_cpu() if prepared else contextlib.nullcontext():
        return D.ring_attention(*local)


def refusals(rank: int, size: int) -> dict[str, str]:
    """What each wrong call says on this rank; a rank left waiting fails by the group's timeout."""
    from torch_sage import distributed as D

    q, k, v = tensors(16)
    first = rank == 0
    alone = dist.new_group([0])
    square = init_device_mesh("cpu", (size, 1))
    hidden = torch.ones(16, 16 * size, dtype=torch.bool)
    wrong: dict[str, Callable[[], Any]] = {
        "lengths": lambda: D.ring_attention(q, *((k[:, :, :8], v[:, :, :8]) if first else (k, v))),
        "lengths, all-to-all": lambda: D.ulysses_attention(q[:, :, : 8 + 8 * first], k, v),
        "one rank": lambda: D.ring_attention(
            q, k, v, hidden if first else None, is_causal=True, order="zigzag"
        ),
        "options": lambda: D.ring_attention(q, k, v, is_causal=first),
        "recipe": lambda: D.ring_attention(
            q, k, v, config=SageConfig(granularity="block" if first else "token")
        ),
        "rotation": lambda: D.ring_attention(
            q, k, v, config=SageConfig(rotation="hadamard" if first else "none")
        ),
        "kernels": lambda: attend_by(first, q, k, v),
        "heads": lambda: D.ulysses_attention(q[:, :3], k[:, :3], v[:, :3]),
        "grouped heads": lambda: D.ulysses_attention(q, k[:, :1], v[:, :1], enable_gqa=True),
        "ungrouped heads": lambda: D.ring_attention(q, k[:, :2], v[:, :2]),
        "odd": lambda: D.ring_attention(
            *(x[:, :, :15] for x in (q, k, v)), is_causal=True, order="zigzag"
        ),
        "order": lambda: D.ring_attention(q, k, v, is_causal=True, order="spiral"),
        "causal lengths": lambda: D.ring_attention(q[:, :, :8], k, v, is_causal=True),
        "mask": lambda: D.ring_attention(q, k, v, hidden[:, :16]),
        "mask dtype": lambda: D.ring_attention(q, k, v, hidden.int()),
        "mask, all-to-all": lambda: D.ulysses_attention(q, k, v, hidden),
        "smooth_q": lambda: D.ring_attention(q, k, v, config=SageConfig(smooth_q=True)),
        "gradient": lambda: D.ring_attention(q.clone().requires_grad_(), k, v),
        "dtype": lambda: D.ring_attention(q.double(), k.double(), v.double()),
        "device": lambda: D.ring_attention(q, k.to("meta"), v.to("meta")),
        "rank": lambda: D.ring_attention(q[0], k[0], v[0]),
        "batch": lambda: D.ring_attention(q.expand(2, -1, -1, -1), k, v),
        "group": lambda: D.ring_attention(q, k, v, group="all"),
        "mesh": lambda: D.ring_attention(q, k, v, group=square),
        "shard": lambda: D.shard_sequence(q[:, :, :6], order="zigzag"),
        "unshard": lambda: D.unshard_sequence(q[:, :, :15], order="zigzag"),
    }
    found = {name: refused(call) for name, call in wrong.items()}
    if not first:
        found["outsider"] = refused(lambda: D.ring_attention(q, k, v, group=alone))
    # After every refusal the ranks still talk to each other.
    found["afterwards"] = refused(lambda: D.ring_attention(q, k, v))
    return found


def traffic(
    kind: str, dtype: torch.dtype, config: SageConfig | None, tokens: int = TOKENS
) -> list[Any]:
    from torch_sage import distributed as D

    q, k, v = (D.shard_sequence(x) for x in tensors(tokens, dtype=dtype))
    events: list[Any] = []
    with watched(events):
        if kind == "ring":
            D.ring_attention(q, k, v, config=config)
        else:
            D.ulysses_attention(q, k, v, config=config)
    return events


def traffic_of_prepared(kind: str) -> list[Any]:
    with sm90_on_cpu():
        return traffic(kind, torch.bfloat16, None, LONG)


def skipped(rank: int, size: int) -> list[int]:
    """How often each rank attends under a causal mask, in each order."""
    from torch_sage import distributed as D

    counts = []
    for order in ("contiguous", "zigzag"):
        q, k, v = (D.shard_sequence(x, order=order) for x in tensors())
        events: list[Any] = []
        with watched(events):
            D.ring_attention(q, k, v, is_causal=True, order=order)
        counts.append(events.count("attend"))
    return counts


def unsupported_context(rank: int, size: int) -> list[str]:
    """What SDPA under context_parallel says to a mask, and to a gradient."""
    from torch_sage import distributed as D

    buffers = tensors()
    mask = torch.zeros(1, 1, TOKENS // size, TOKENS)
    mesh = init_device_mesh("cpu", (size,))
    with D.context_parallel(mesh, buffers=buffers, buffer_seq_dims=[2, 2, 2]):
        learnt = buffers[0].clone().requires_grad_()
        return [
            refused(lambda: F.scaled_dot_product_attention(*buffers, attn_mask=mask)),
            refused(lambda: F.scaled_dot_product_attention(learnt, *buffers[1:])),
        ]


def work(rank: int, size: int) -> dict[str, Any]:
    from torch_sage import distributed as D

    local = [D.shard_sequence(x) for x in tensors()]
    unchecked = D.ring_attention(*local, check_ranks=False)
    mesh = init_device_mesh("cpu", (size,))
    alone = [dist.new_group([i]) for i in range(size)][rank]
    return {
        "refusals": refusals(rank, size),
        "traffic": {
            (kind, str(dtype), granularity): traffic(
                kind, dtype, SageConfig(granularity=granularity)
            )
            for kind in ("ring", "ulysses")
            for dtype in (torch.float32, torch.bfloat16)
            for granularity in ("token", "thread")
        },
        "prepared": {kind: traffic_of_prepared(kind) for kind in ("ring", "ulysses")},
        "skipped": skipped(rank, size),
        "repeated": same_bits(unchecked, D.ring_attention(*local)),
        "compiled": [
            same_bits(torch.compile(attend, backend="eager")(*local, is_causal=True), result)
            for attend in (D.ring_attention, D.ulysses_attention)
            for result in [attend(*local, is_causal=True)]
        ],
        "mesh": same_bits(unchecked, D.ring_attention(*local, group=mesh)),
        "alone": [
            same_bits(attend(*local, group=alone), whole)
            for attend in (D.ring_attention, D.ulysses_attention)
            for whole in [
                torch_sage.attention_with_lse(*local, config=SageConfig(smooth_q=False)).output
            ]
        ],
        "rotated": [
            same_bits(attend(*local, config=ROTATING), attend(*turned, local[2], scale=scale))
            for *turned, scale in [hadamard.rotated("hadamard", *local[:2], None)]
            for attend in (D.ring_attention, D.ulysses_attention)
        ],
        "context": [attend_in_context(mesh, tensors(), causal) for causal in (False, True)],
        "unsupported context": unsupported_context(rank, size),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("protocol")
    return launch(work, 2, folder)


# By the call: what rank 0 says, and rank 1 where that differs.
REFUSALS = {
    "lengths": ["ValueError: key must have the same shape on every rank"],
    "lengths, all-to-all": ["ValueError: query must have the same shape on every rank"],
    "one rank": [
        "ValueError: attn_mask must be None when is_causal",
        "ValueError: arguments must be accepted on every rank, got refusals on [0]",
    ],
    "options": ["ValueError: options must be the same on every rank, got ['is_causal=True,"],
    "recipe": ["ValueError: options must be the same on every rank"],
    "rotation": ["ValueError: options must be the same on every rank"],
    "kernels": ["ValueError: options must be the same on every rank, got"],
    "heads": ["ValueError: query must have a multiple of 2 heads"],
    "grouped heads": ["ValueError: key must have a multiple of 2 heads"],
    "ungrouped heads": ["ValueError: key must have query's 4 heads"],
    "odd": ["ValueError: key must have an even number of tokens in zigzag order, got 15"],
    "order": ["ValueError: order must be one of ['contiguous', 'zigzag'], got 'spiral'"],
    "causal lengths": ["ValueError: key must have query's 8 tokens when is_causal, got 16"],
    "mask": ["ValueError: attn_mask must broadcast to [1, 4, 16, 32], got [16, 16]"],
    "mask dtype": ["ValueError: attn_mask must have dtype bool or float32"],
    "mask, all-to-all": ["ValueError: attn_mask must broadcast to [1, 4, 32, 32], got [16, 32]"],
    "smooth_q": ["NotImplementedError: config.smooth_q must be None or False"],
    "gradient": ["NotImplementedError: query must not require grad"],
    "dtype": ["NotImplementedError: query must have dtype"],
    "device": ["NotImplementedError: key must be on cpu like query, got meta"],
    "rank": ["ValueError: query must be 4-D"],
    "batch": ["ValueError: key must have the batch size of query, 2, got 1"],
    "group": ["TypeError: group must be a ProcessGroup, DeviceMesh or None, got"],
    "mesh": ["ValueError: group must be a 1-D DeviceMesh, got 2-D"],
    "shard": ["ValueError: tensor must have a multiple of 4 tokens in dimension 2 for zigzag"],
    "unshard": ["ValueError: tensor must have an even number of tokens in zigzag order, got 15"],
    "afterwards": ["accepted"],
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_wrong_call_is_an_error_on_every_rank(ranks: list[dict[str, Any]], name: str) -> None:
    expected = REFUSALS[name]
    for rank in (0, 1):
        assert ranks[rank]["refusals"][name].startswith(expected[min(rank, len(expected) - 1)])


def test_a_process_outside_of_the_group_is_refused(ranks: list[dict[str, Any]]) -> None:
    message = "ValueError: group must contain this process, got one without rank 1"
    assert ranks[1]["refusals"]["outsider"] == message


def test_what_is_rotated_is_what_the_ranks_send(ranks: list[dict[str, Any]]) -> None:
    assert all(all(rank["rotated"]) for rank in ranks)


def test_without_processes_there_is_no_group() -> None:
    with pytest.raises(RuntimeError, match=r"torch\.distributed must be initialized"):
        torch_sage.distributed.ring_attention(*tensors(16))


def test_gpus_send_what_their_kernels_take(hopper: None) -> None:
    """Prepared operands where the recipe fits, else those of the Triton kernels."""
    from torch_sage.distributed import call

    def recipe(channels: int, **options: Any) -> str:
        with FakeTensorMode():
            q = torch.empty(1, 2, 8, channels, device="cuda", dtype=torch.bfloat16)
            how = {"is_causal": False, "scale": None, "enable_gqa": False}
            return call.accept(q, q, q, **how, config=SageConfig(**options)).name

    assert recipe(64) == "int8.token_thread/e4m3_fp16/smooth-kv/exp-mixed"
    assert recipe(256, smooth_v=False) == "int8.token_thread/e4m3_fp16/smooth-k/exp-mixed"
    assert recipe(64, pv="half") == "int8.token_block/bf16/smooth-k"
    assert recipe(64, granularity="thread") == "int8.thread/bf16/smooth-k"


def block_bytes(granularity: str, heads: int, tokens: int) -> int:
    """Bytes of K in 8 bits with its scales and mean, and of V in 16 bits with scales and mean."""
    groups = {"token": tokens, "thread": 4 * -(-tokens // 64)}[granularity]
    key = heads * (tokens * CHANNELS + 4 * groups + 4 * CHANNELS)
    value = heads * (2 * tokens * CHANNELS + 8 * CHANNELS)
    return key + value


@pytest.mark.parametrize("granularity", ["token", "thread"])
@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
def test_ring_sends_codes_and_scales_only(
    ranks: list[dict[str, Any]], dtype: str, granularity: str
) -> None:
    """With V in 16 bits that is 3/4 of what K and V take in bf16, and 3/8 of fp32."""
    tokens = TOKENS // 2
    expected = block_bytes(granularity, HEADS, tokens)
    in_bf16 = 2 * HEADS * tokens * CHANNELS * 2
    for rank in ranks:
        events = rank["traffic"]["ring", dtype, granularity]
        sent = sum(event[1] for event in events if event[0] == "send")
        assert expected <= sent <= expected + PADDING
        assert sent < 0.82 * in_bf16  # 3/4, and what short shards have in means


def prepared_bytes(heads: int, tokens: int) -> int:
    """Bytes of K and V in 8 bits, and of their scales and means; tokens in whole groups."""
    codes = 2 * tokens * CHANNELS
    key = 16 * (tokens // 128) + 4 * CHANNELS
    value = 8 * CHANNELS * (tokens // 1024)
    return heads * (codes + key + value)


def test_prepared_operands_send_half_the_bytes_of_16_bits(ranks: list[dict[str, Any]]) -> None:
    tokens = LONG // 2
    in_bf16 = 2 * HEADS * tokens * CHANNELS * 2
    for rank in ranks:
        (sent,) = [event[1] for event in rank["prepared"]["ring"] if event[0] == "send"]
        assert prepared_bytes(HEADS, tokens) <= sent <= prepared_bytes(HEADS, tokens) + PADDING
        assert sent < 0.51 * in_bf16
        swapped = [event[1] for event in rank["prepared"]["ulysses"] if event[0] == "swap"]
        expected = 2 * prepared_bytes(HEADS // 2, tokens)
        assert expected <= swapped[0] <= expected + 2 * PADDING
        assert swapped[1:] == [HEADS * tokens * CHANNELS * 2] * 2


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
def test_all_to_all_sends_codes_and_scales_and_queries(
    ranks: list[dict[str, Any]], dtype: str
) -> None:
    tokens = TOKENS // 2
    keys_and_values = 2 * block_bytes("token", HEADS // 2, tokens)
    rows = HEADS * tokens * CHANNELS * {"torch.float32": 4, "torch.bfloat16": 2}[dtype]
    for rank in ranks:
        sizes = [e[1] for e in rank["traffic"]["ulysses", dtype, "token"] if e[0] == "swap"]
        assert keys_and_values <= sizes[0] <= keys_and_values + 2 * PADDING
        assert sizes[1:] == [rows, rows]  # the queries there, the results back


def test_the_next_block_is_under_way_while_this_one_is_attended_to(
    ranks: list[dict[str, Any]],
) -> None:
    """The order of calls is all that this shows; the overlap itself is for the benchmark."""
    for rank in ranks:
        for events in (
            rank["traffic"]["ring", "torch.bfloat16", "token"],
            rank["prepared"]["ring"],
        ):
            names = [event if isinstance(event, str) else event[0] for event in events]
            assert names == ["send", "attend", "wait", "wait", "attend"]


def test_zigzag_order_balances_causal_work(ranks: list[dict[str, Any]]) -> None:
    """In contiguous order the first rank skips the keys that lie behind all its queries."""
    assert [rank["skipped"] for rank in ranks] == [[1, 2], [2, 2]]


def test_results_repeat_whatever_names_the_group(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["repeated"]
        assert rank["mesh"]


def test_compiled_functions_attend_between_graphs(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["compiled"] == [True, True]


def test_a_group_of_one_gives_the_bits_of_the_op(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["alone"] == [True, True]


@pytest.mark.parametrize("is_causal", [False, True])
def test_context_parallel_runs_the_ring(ranks: list[dict[str, Any]], is_causal: bool) -> None:
    """torch shards the buffers, head and tail; .02 is what the recipe promises on N(0, 1)."""
    exact = F.scaled_dot_product_attention(*tensors(), is_causal=is_causal)
    for rank in ranks:
        assert 0 < relative_l1(rank["context"][is_causal], exact) < 0.02


def test_context_parallel_refuses_on_cpu_what_it_would_leave_to_torch(
    ranks: list[dict[str, Any]],
) -> None:
    start = "NotImplementedError: in context_parallel on CPU, "
    for rank in ranks:
        masked, learnt = rank["unsupported context"]
        assert masked == start + "attn_mask must be None"
        assert learnt.startswith(start + "query must not require grad")
