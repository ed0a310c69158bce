"""Every reason code is given for an input of its own, and not for that input's supported twin."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from torch_sage import SageConfig
from torch_sage.ops import dispatch
from torch_sage.ops.dispatch import ReasonCode, as_matrices, validate, why_not

ALWAYS = SageConfig(dispatch="always")


@pytest.fixture(autouse=True)
def library_present(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judge as where the kernels are loaded; one test below takes them away."""
    monkeypatch.setattr(dispatch, "MISSING_LIBRARY", None)


def t(*shape: int, **kwargs: Any) -> Tensor:
    return torch.zeros(shape or (2, 4, 8, 16), **kwargs)


def codes(*args: Any, config: Any = ALWAYS, **kwargs: Any) -> list[str]:
    return [reason.code for reason in why_not(*args, config=config, **kwargs)]


class Foreign(Tensor):
    """A tensor whose meaning is not ours to know."""


def nested() -> Tensor:
    return torch.nested.nested_tensor([torch.zeros(4, 8, 16), torch.zeros(4, 6, 16)])


X = t()
# For every code: arguments that have this reason alone, and their nearest supported twins.
CASES: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    "device_unsupported": [({"q": X.to("meta"), "k": X.to("meta"), "v": X.to("meta")}, {})],
    "device_mismatch": [
        ({"k": X.to("meta")}, {}),
        ({"attn_mask": t(8, 8, device="meta")}, {"attn_mask": t(8, 8)}),
    ],
    "dtype_unsupported": [({"q": X.double(), "k": X.double(), "v": X.double()}, {})],
    "dtype_mismatch": [({"k": X.half()}, {"q": X.half(), "k": X.half(), "v": X.half()})],
    "rank": [
        ({"q": t(4, 8, 16)}, {"q": t(4, 8, 16), "k": t(4, 8, 16), "v": t(4, 8, 16)}),
        ({"q": t(8, 16), "k": t(8, 16), "v": t(8, 16)}, {}),
        ({"q": t(1, 2, 4, 8, 16), "k": t(1, 2, 4, 8, 16), "v": t(1, 2, 4, 8, 16)}, {}),
    ],
    "layout": [
        ({"q": X.as_subclass(Foreign)}, {"q": torch.nn.Parameter(X, requires_grad=False)}),
        ({"v": X.to_sparse()}, {}),
        ({"q": nested(), "k": nested(), "v": nested()}, {}),
        ({"attn_mask": t(8, 8).as_subclass(Foreign)}, {"attn_mask": t(8, 8)}),
    ],
    "requires_grad": [({"v": t(requires_grad=True)}, {"v": t(requires_grad=True).detach()})],
    "mask_requires_grad": [({"attn_mask": t(8, 8, requires_grad=True)}, {"attn_mask": t(8, 8)})],
    "dropout": [({"dropout_p": 0.1}, {"dropout_p": 0.0})],
    "head_dim": [
        ({name: t(1, 1, 2, 257) for name in "qkv"}, {name: t(1, 1, 2, 256) for name in "qkv"}),
        ({"v": t(2, 4, 8, 300)}, {"v": t(2, 4, 8, 1)}),
        ({name: t(1, 1, 2, 0) for name in "qkv"}, {name: t(1, 1, 2, 1) for name in "qkv"}),
    ],
    "heads": [
        (
            {"k": t(2, 2, 8, 16), "enable_gqa": True},
            {"k": t(2, 2, 8, 16), "v": t(2, 2, 8, 16), "enable_gqa": True},
        )
    ],
    "mask_dtype": [
        ({"attn_mask": t(8, 8, dtype=torch.float64)}, {"attn_mask": t(8, 8, dtype=torch.bool)}),
        ({"attn_mask": t(8, 8, dtype=torch.int32)}, {"attn_mask": t(8, 8, dtype=torch.half)}),
    ],
    "recipe_unsupported": [
        ({"config": ALWAYS.with_options(qk="int4")}, {"config": ALWAYS.with_options(qk="int8")}),
        ({"config": ALWAYS.with_options(pv="e4m3")}, {"config": ALWAYS.with_options(pv="half")}),
        ({"config": "sage2_8b"}, {"config": "sage1"}),
    ],
    "below_crossover": [
        ({"config": "auto"}, {"config": ALWAYS}),
        ({"config": None}, {name: t(2, 8, 2048, 64) for name in "qkv"} | {"config": None}),
        (  # 0.87 times the speed of SDPA was measured: smoothing Q reads K for every query head
            {"q": t(1, 8, 32, 64), "enable_gqa": True, "config": None}
            | {name: t(1, 2, 1024, 64) for name in "kv"},
            {"q": t(1, 8, 256, 64), "enable_gqa": True, "config": None}
            | {name: t(1, 2, 1024, 64) for name in "kv"},
        ),
    ],
    "empty": [
        ({name: t(0, 4, 8, 16) for name in "qkv"}, {}),
        ({"k": t(2, 4, 0, 16), "v": t(2, 4, 0, 16)}, {}),
        ({"q": t(2, 4, 0, 16)}, {}),
    ],
    "invalid_input": [
        ({"v": t(2, 4, 9, 16)}, {"k": t(2, 4, 9, 16), "v": t(2, 4, 9, 16)}),
        ({"is_causal": True, "causal": "top_left"}, {"causal": "top_left"}),
    ],
    # Another fixture: see test_missing_library_is_a_reason.
    "extension_not_built": [],
}


def judge(changes: dict[str, Any]) -> list[str]:
    rest = {"config": ALWAYS, **changes}
    q, k, v = (rest.pop(name, X) for name in "qkv")
    return codes(q, k, v, **rest)


def test_every_code_has_cases_and_a_doc() -> None:
    assert set(CASES) == {code.value for code in ReasonCode}
    assert all(code.doc.endswith(".") for code in ReasonCode)
    assert f"{ReasonCode.HEADS}" == str(ReasonCode.HEADS) == "heads"


@pytest.mark.parametrize(
    ("code", "changes", "twin"),
    [
        pytest.param(code, *case, id=f"{code}-{i}")
        for code, cases in CASES.items()
        for i, case in enumerate(cases)
    ],
)
def test_reason_and_its_twin(code: str, changes: dict[str, Any], twin: dict[str, Any]) -> None:
    assert set(judge(changes)) == {code}
    # A twin of the measured choice is judged by it; every other twin must be supported.
    supported = judge(twin)
    assert supported == ([] if twin.get("config") != "sage1" else ["below_crossover"])


def test_missing_library_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert codes(X, X, X) == []
    monkeypatch.setattr(dispatch, "MISSING_LIBRARY", "extension not built")
    (reason,) = why_not(X, X, X, config=ALWAYS)
    assert reason.code == "extension_not_built"
    assert reason.message == "the native library must be loaded, got: extension not built"


def test_all_reasons_at_once() -> None:
    q = X.double().requires_grad_()
    found = codes(q, X.half(), t(2, 4, 9, 300), t(7, dtype=torch.int8), 0.5, config="sage2pp_4b")
    assert set(found) == {
        "recipe_unsupported",
        "requires_grad",
        "dropout",
        "invalid_input",
        "dtype_unsupported",
        "dtype_mismatch",
        "head_dim",
        "mask_dtype",
    }


def test_messages_say_expected_and_got() -> None:
    (reason,) = why_not(X, X, X, config=ALWAYS.with_options(qk="int4"))
    assert reason.message == "qk must be one of ['int8'] on cpu, got 'int4'"
    (reason,) = why_not(X.double(), X.double(), X.double(), config=ALWAYS)
    assert reason.message == ("query must have dtype float32 or bfloat16 or float16, got float64")


def test_gradients_count_only_where_they_are_recorded() -> None:
    q = t(requires_grad=True)
    with torch.no_grad():
        assert codes(q, X, X) == []
    with forward_ad.dual_level():
        assert codes(forward_ad.make_dual(X, X), X, X) == ["requires_grad"]
        assert codes(X, X, X) == []


def test_autocast_makes_dtypes_equal() -> None:
    half = X.half()
    assert codes(X, half, X) == ["dtype_mismatch"]
    with torch.autocast("cpu", torch.bfloat16):
        assert codes(X, half, X) == []
        # Autocast leaves float64 as it is.
        assert codes(X, X.double(), X) == ["dtype_mismatch"]


# What contradicts itself: an error from every entry, and never a fallback.
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "value longer": ({"v": t(2, 4, 9, 16)}, "value must have the number of tokens of key, 8, got"),
    "value shorter": ({"v": t(2, 4, 7, 16)}, "value must have the number of tokens of key"),
    "no key heads": (
        {"k": t(2, 0, 8, 16), "v": t(2, 0, 8, 16), "enable_gqa": True},
        "key must have at least one head for 4 query heads, got 0",
    ),
    "heads": (
        {"k": t(2, 3, 8, 16), "v": t(2, 3, 8, 16), "enable_gqa": True},
        "key must have a number of heads that divides query's 4, got 3",
    ),
    "heads without gqa": (
        {"k": t(2, 2, 8, 16), "v": t(2, 2, 8, 16)},
        "key must have query's 4 heads, or 1, without enable_gqa, got 2",
    ),
    "batch": ({"k": t(3, 4, 8, 16), "v": t(3, 4, 8, 16)}, "must have the batch size"),
    "head_dim": ({"k": t(2, 4, 8, 8)}, "key must have the head_dim of query, 16, got 8"),
    "mask": ({"attn_mask": t(3, 8)}, "attn_mask must broadcast to [2, 4, 8, 8], got [3, 8]"),
    "mask rank": ({"attn_mask": t(1, 1, 1, 8, 8)}, "attn_mask must have at most query's 4 dim"),
    "mask and causal": ({"attn_mask": t(8, 8), "is_causal": True}, "attn_mask must be None when"),
    "causal twice": (
        {"is_causal": True, "causal": "top_left"},
        "is_causal must be False when causal is given",
    ),
    "causal": ({"causal": "left"}, "causal must be one of"),
    "bias and causal": (
        {"attn_mask": causal_upper_left(8, 8), "is_causal": True},
        "attn_mask must not be a CausalBias",
    ),
    "bias sizes": (
        {"attn_mask": causal_lower_right(7, 8)},
        "attn_mask must be a CausalBias of (8, 8), got one of (7, 8)",
    ),
    "dropout": ({"dropout_p": 1.5}, "dropout_p must be between 0 and 1, got 1.5"),
    "scale": ({"scale": float("inf")}, "scale must be finite in float32, got inf"),
}


@pytest.mark.parametrize("case", BAD)
def test_contradictions_are_errors(case: str) -> None:
    changes, message = BAD[case]
    arguments = dict(changes)
    q, k, v = (arguments.pop(name, X) for name in "qkv")
    with pytest.raises(ValueError) as caught:
        validate(q, k, v, **arguments)
    assert message in str(caught.value)
    reasons = why_not(q, k, v, config=ALWAYS, **arguments)
    assert message in "; ".join(r.message for r in reasons if r.code == "invalid_input")


def test_errors_are_collected() -> None:
    with pytest.raises(ValueError, match=r"dropout_p must .*; value must .*; attn_mask must"):
        validate(X, X, t(2, 4, 9, 16), t(3, 3), 2.0)


@pytest.mark.parametrize("name", ["query", "key", "value", "attn_mask"])
def test_other_types_are_type_errors(name: str) -> None:
    arguments: dict[str, Any] = {"query": X, "key": X, "value": X, name: [[0.0]]}
    with pytest.raises(TypeError, match=f"{name} must be a Tensor.*, got list"):
        validate(**arguments)


BROADCASTS = [
    ((2, 4, 5, 16), (1, 4, 7, 16), (1, 4, 7, 16)),
    ((2, 4, 5, 16), (2, 1, 7, 16), (2, 1, 7, 16)),
    ((2, 4, 5, 16), (2, 1, 7, 16), (2, 4, 7, 16)),
    ((1, 4, 5, 16), (2, 4, 7, 16), (2, 4, 7, 16)),
    ((2, 1, 5, 16), (2, 4, 7, 16), (2, 4, 7, 16)),
    ((2, 4, 5, 16), (1, 1, 7, 16), (2, 4, 7, 16)),
    ((4, 5, 16), (1, 7, 16), (4, 7, 16)),
]


@pytest.mark.parametrize("shapes", BROADCASTS, ids=str)
def test_broadcasts_that_torch_accepts(shapes: Any) -> None:
    tensors = [torch.randn(shape) for shape in shapes]
    expected = F.scaled_dot_product_attention(*tensors)
    validate(*tensors)
    assert codes(*tensors) == []
    q, k, v = as_matrices(*tensors)
    assert q.shape[0] == k.shape[0] == v.shape[0]
    assert q.shape[1] in (k.shape[1], expected.shape[-3])
    assert k.shape[1] == v.shape[1]
    got = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(got.view_as(expected), expected)


def symbolic(env: ShapeEnv, *shapes: tuple[int, ...]) -> list[Tensor]:
    mode = torch._subclasses.FakeTensorMode(shape_env=env)
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * 4)
    return [mode.from_tensor(t(*shape), symbolic_context=context) for shape in shapes]


@pytest.mark.parametrize("config", ["auto", ALWAYS], ids=["measured", "always"])
def test_symbolic_sizes_add_no_guard(config: Any) -> None:
    """Every size is a symbol of its own, so nothing is certain but what the hints make cheap."""
    env = ShapeEnv()
    small = symbolic(env, (2, 4, 8, 16), (2, 4, 9, 16), (2, 4, 9, 16))
    large = symbolic(env, *[(2, 8, 2048, 64)] * 3)
    mask = symbolic(env, (2, 4, 8, 9))[0]
    before = len(env.guards)
    assert codes(*small, mask, config=config) == ([] if config is ALWAYS else ["below_crossover"])
    assert codes(*large, is_causal=True, enable_gqa=True, config=config) == []
    assert len(env.guards) == before


def test_unbacked_sizes_count_as_long() -> None:
    env = ShapeEnv()
    with torch._subclasses.FakeTensorMode(shape_env=env):
        n = env.create_unbacked_symint()
        x = torch.empty(1, 8, n, 64)
    before = len(env.guards)
    assert codes(x, x, x, config="auto") == []
    assert len(env.guards) == before


def test_portable_kernel_is_never_the_faster_one() -> None:
    """On a machine without AVX2 the kernel had 0.3 times the speed of SDPA and was chosen."""
    code = (
        "import torch, torch_sage\n"
        "x = torch.empty(1, 8, 2048, 64)\n"
        "print([str(r.code.value) for r in torch_sage.why_not(x, x, x)])\n"
        "print(torch_sage.why_not(x, x, x, config=torch_sage.SageConfig(dispatch='always')))"
    )
    environment = {**os.environ, "TORCH_SAGE_CPU_ISA": "portable"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[:2] == ["['below_crossover']", "()"]
