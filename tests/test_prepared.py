"""The functions on prepared keys and values: what they hand to the ops, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import torch_sage
from torch_sage import PreparedKV, SageConfig, _extension, devices, ops

B, HQ, HKV, N, M, D, DV = 2, 4, 2, 9, 1500, 80, 40
UPPER, LOWER = causal_upper_left(N, M), causal_lower_right(N, M)


def on_gpu(*shape: int) -> Tensor:
    """Return an empty tensor; inside FakeTensorMode no GPU is needed."""
    return torch.empty(shape, device="cuda")


@pytest.fixture
def tensors() -> tuple[Tensor, Tensor, Tensor]:
    with FakeTensorMode():
        query = on_gpu(B, N, HQ, D).transpose(1, 2)
        return query, on_gpu(B, HKV, M, D), on_gpu(B, HKV, M, DV)


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Keeps the arguments of the ops on prepared operands, by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (ops.prepare_kv, ops.attention_prepared):
            arguments = func._schema.arguments
            bound = {a.name: a.default_value for a in arguments if a.has_default_value()}
            bound |= dict(zip((a.name for a in arguments), args, strict=False))
            self.seen.append({**bound, **kwargs})
        return func(*args, **kwargs)


def test_arguments_reach_the_ops(hopper: None, tensors: Any) -> None:
    query, key, value = tensors
    with query.fake_mode, Calls() as calls:
        mask = torch.ones(N, M, dtype=torch.bool, device="cuda")
        prepared = torch_sage.prepare_kv(key, value)
        unsmoothed = SageConfig(smooth_k=False, exponential="exact")
        torch_sage.prepare_kv(key, value, unsmoothed)
        plain = torch_sage.attention_prepared(query, prepared)
        torch_sage.attention_prepared(query, prepared, mask, scale=0.3, config=unsmoothed)
        torch_sage.attention_prepared(query, prepared, is_causal=True)
        torch_sage.attention_prepared(query, prepared, causal="bottom_right")
        torch_sage.attention_prepared(query, prepared, UPPER)
        torch_sage.attention_prepared(query, prepared, LOWER)
    assert isinstance(prepared, PreparedKV)
    assert (prepared.seqlen_k, prepared.head_dim_v) == (M, DV)
    assert plain.shape == (B, HQ, N, DV) and plain.device == query.device
    first, second, *rest = calls.seen
    assert first["smooth"] == "kv" and second["smooth"] == "v"
    for call in rest:
        assert all(call[name] is getattr(prepared, name) for name in PreparedKV._fields[:6])
        assert (call["seqlen_k"], call["head_dim_v"]) == (M, DV)
    assert rest[0]["exponential"] == "mixed" and rest[1]["exponential"] == "exact"
    assert rest[1]["attn_mask"] is mask and rest[1]["scale"] == 0.3
    assert [call["attn_mask"] is None for call in rest] == [True, False, True, True, True, True]
    assert [call["causal"] for call in rest] == [
        *("none", "none", "top_left", "bottom_right", "top_left", "bottom_right"),
    ]


@pytest.mark.parametrize("dv", [DV, D])
def test_the_result_has_the_order_of_the_query(hopper: None, tensors: Any, dv: int) -> None:
    """SDPA's result has it too, where both head dimensions are the same."""
    query, key, value = tensors
    with query.fake_mode:
        prepared = torch_sage.prepare_kv(key, key if dv == D else value)
        output = torch_sage.attention_prepared(query, prepared)
        assert output.transpose(1, 2).is_contiguous() == (dv == D)
        assert torch_sage.attention_prepared(on_gpu(*query.shape), prepared).is_contiguous()


def test_functions_are_traced_as_one_graph(hopper: None, tensors: Any) -> None:
    """A model that prepares and attends is exported without a break; lengths stay dynamic.

    Above 1024 tokens: torch asks whether the number of 1024-token groups is one.
    """

    class CrossAttention(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            prepared = torch_sage.prepare_kv(key, value)
            return torch_sage.attention_prepared(query, prepared, is_causal=True)

    tokens = torch.export.Dim("tokens", min=1025)
    shapes = {"query": None, "key": {2: tokens}, "value": {2: tokens}}
    with tensors[0].fake_mode, torch.no_grad():
        for strict in (True, False):
            program = torch.export.export(
                CrossAttention(), tensors, dynamic_shapes=shapes, strict=strict
            )
            nodes = [node for node in program.graph.nodes if node.op == "call_function"]
            called = [n.target for n in nodes if "torch_sage" in str(n.target)]
            assert called == [ops.prepare_kv, ops.attention_prepared]
            (attention,) = (n for n in nodes if n.target is ops.attention_prepared)
            assert isinstance(attention.args[7], torch.fx.Node)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "query type": ({"query": [1.0]}, TypeError, "query must be a Tensor, got list"),
    "mask type": ({"attn_mask": [1.0]}, TypeError, "attn_mask must be a Tensor, got list"),
    "prepared": ({"prepared": (1, 2)}, TypeError, "prepared must be a PreparedKV, got tuple"),
    "rank": ({"query": (HQ, N, D)}, ValueError, "query must be 4-D, got [4, 9, 80]"),
    "head_dim": ({"query": (B, HQ, N, 8)}, ValueError, "key_mean must have shape [2, 2, 8]"),
    "causal twice": (
        {"is_causal": True, "causal": "none"},
        ValueError,
        "is_causal must be False when causal is given, got causal='none'",
    ),
    "causal": ({"causal": "left"}, ValueError, "causal must be one of ['none', 'top_left'"),
    "bias": (
        {"attn_mask": causal_upper_left(N, N)},
        ValueError,
        "attn_mask must be a CausalBias of (9, 1500), got one of (9, 9)",
    ),
    "bias and causal": (
        {"attn_mask": UPPER, "is_causal": True},
        ValueError,
        "attn_mask must not be a CausalBias when causal is asked for, got one",
    ),
    "scale": ({"scale": float("nan")}, ValueError, "scale must be finite in float32, got nan"),
    "preset": ({"config": "sage9"}, ValueError, "config must name one of"),
    "config": ({"config": 3}, TypeError, "config must be a SageConfig, a preset name or None"),
    "recipe": (
        {"config": SageConfig(pv="fp16", smooth_q=True)},
        NotImplementedError,
        "pv must be one of ['e4m3_fp16'] on cuda.sm90, got 'fp16' and smooth must be one of",
    ),
    "other values": (
        {"config": SageConfig(pv="bf16")},
        ValueError,
        "prepared must have values in bf16, got e4m3_fp16",
    ),
    "device": (
        {"query": torch.empty(B, HQ, N, D)},
        NotImplementedError,
        "query must be on a GPU of compute capability 9.0, got cpu",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refusals_say_expected_and_got(hopper: None, tensors: Any, case: str) -> None:
    changes, error, message = BAD[case]
    query, key, value = tensors
    with query.fake_mode:
        if isinstance(changes.get("query"), tuple):  # its shape, on the GPU
            query, changes = on_gpu(*changes["query"]), {}
        arguments = {"query": query, "prepared": torch_sage.prepare_kv(key, value), **changes}
        with pytest.raises(error) as caught:
            torch_sage.attention_prepared(**arguments)
    assert message in str(caught.value)


def test_keys_and_values_are_refused_by_name(
    hopper: None, tensors: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key, value = tensors
    with query.fake_mode:
        with pytest.raises(TypeError, match="value must be a Tensor, got NoneType"):
            torch_sage.prepare_kv(key, None)
        with pytest.raises(ValueError, match="value must have shape"):
            torch_sage.prepare_kv(key, on_gpu(B, HKV, M - 1, DV))
        with pytest.raises(NotImplementedError, match=r"smooth must be one of \['', 'k', 'v', 'kv"):
            torch_sage.prepare_kv(key, value, SageConfig(smooth_q=True))
        with pytest.raises(RuntimeError, match="key must not require grad"):
            torch_sage.prepare_kv(key.requires_grad_(), value)
        monkeypatch.setattr(devices, "capability", lambda index: (8, 0))
        with pytest.raises(NotImplementedError, match=r"key must be on a GPU of .* 9\.0, got 8\.0"):
            torch_sage.prepare_kv(key, value)
        monkeypatch.setattr(_extension, "cuda_gpus", dict)
        with pytest.raises(NotImplementedError, match="library must be built with kernels for sm"):
            torch_sage.prepare_kv(key, value)


def test_the_cpu_is_refused_with_the_reason() -> None:
    x = torch.randn(1, 2, 8, 16)
    needs = "must be on a GPU of compute capability 9.0, got cpu"
    with pytest.raises(NotImplementedError, match=f"key {needs}"):
        torch_sage.prepare_kv(x, x)
    prepared = PreparedKV(x, x, x, x, x, x, 8, 16)
    with pytest.raises(NotImplementedError, match=f"query {needs}"):
        torch_sage.attention_prepared(x, prepared)
