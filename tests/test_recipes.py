"""The recipe table is consistent, and configurations resolve to what they say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from torch_sage import _extension, devices
from torch_sage.config import PRESETS, SageConfig
from torch_sage.ops.checks import FLOAT_DTYPES, MAX_HEAD_DIM, largest_head_dim, recipe_problems
from torch_sage.recipes import (
    EXPONENTIALS,
    GRANULARITIES,
    PREPARED,
    PV_FORMATS,
    QK_FORMATS,
    SMOOTH_LETTERS,
    SUPPORT,
    Recipe,
    choose_row,
    resolve,
    resolve_in,
    rows_of_type,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
BF16 = torch.bfloat16


@pytest.mark.parametrize("row", SUPPORT)
def test_tables_hold_known_values_only(row: str) -> None:
    support = SUPPORT[row]
    assert set(support.qk) <= set(QK_FORMATS)
    assert set(support.granularity) <= set(GRANULARITIES)
    assert set(support.pv) <= set(PV_FORMATS)
    assert set(support.exponential) <= set(EXPONENTIALS)
    assert set(support.half) in (set(FLOAT_DTYPES), set())
    assert set(support.half.values()) <= set(support.pv)
    for smooth in support.smooth:
        assert smooth == "".join(letter for letter in SMOOTH_LETTERS if letter in smooth)


def test_every_known_value_is_in_some_row() -> None:
    """A value that nothing takes would be documented for nothing."""
    fields = ("qk", "granularity", "pv", "exponential")
    lists = (QK_FORMATS, GRANULARITIES, PV_FORMATS, EXPONENTIALS)
    for field, known in zip(fields, lists, strict=True):
        assert {value for row in SUPPORT.values() for value in getattr(row, field)} == set(known)


@pytest.mark.parametrize("row", SUPPORT)
def test_default_is_supported_and_is_what_auto_means(row: str) -> None:
    support = SUPPORT[row]
    assert support.allows(support.default)
    assert resolve_in(row, SageConfig(), BF16) == support.default


@pytest.mark.parametrize("row", SUPPORT)
@pytest.mark.parametrize("preset", PRESETS)
def test_allows_agrees_with_the_ops_own_check(row: str, preset: str) -> None:
    recipe = resolve_in(row, PRESETS[preset], BF16)
    assert SUPPORT[row].allows(recipe) == (not recipe_problems({row: recipe.op_kwargs()}))


def on_cpu(**fields: Any) -> Recipe:
    return resolve(SageConfig(**fields), CPU, BF16, 64)


def test_fields_override_the_default_one_by_one() -> None:
    default = SUPPORT["cpu"].default
    assert on_cpu(granularity="warp").granularity == "warp"
    assert on_cpu(smooth_k=False).smooth == "q"
    assert on_cpu(smooth_v=True).smooth == default.smooth + "v"
    assert on_cpu(smooth_q=True, smooth_v=True).smooth == "qkv"
    assert on_cpu(pv="half").pv == "bf16"
    assert on_cpu(pv="e4m3").pv == "e4m3"
    assert on_cpu(qk="int4").qk == "int4"
    assert on_cpu(exponential="mixed").exponential == "mixed"


def test_half_is_the_16_bit_type_of_the_operands() -> None:
    for pv in ("auto", "half"):
        config = SageConfig(pv=pv)
        formats = [resolve(config, CUDA, dtype, 64).pv for dtype in FLOAT_DTYPES]
        assert formats == ["bf16", "bf16", "fp16"]
        assert {resolve(config, CPU, dtype, 64).pv for dtype in FLOAT_DTYPES} == {"bf16"}
    assert resolve(SageConfig(pv="bf16"), CUDA, torch.float16, 64).pv == "bf16"


def test_paper_presets_on_the_cpu() -> None:
    resolved = {name: resolve(preset, CPU, BF16, 64) for name, preset in PRESETS.items()}
    runs = [name for name, recipe in resolved.items() if SUPPORT["cpu"].allows(recipe)]
    assert runs == ["auto", "accurate", "sage1"]
    assert resolved["sage2_4b"] == Recipe("int4", "thread", "e4m3", "qk")


def test_unknown_device_is_an_error() -> None:
    with pytest.raises(KeyError):
        resolve(SageConfig(), torch.device("meta"), BF16, 64)


def test_name_and_op_arguments() -> None:
    recipe = Recipe("int8", "token", "bf16", "")
    assert recipe.name == "int8.token/bf16/smooth-none"
    expected = {
        "qk": "int8",
        "granularity": "token",
        "pv": "bf16",
        "smooth": "",
        "exponential": "exact",
    }
    assert recipe.op_kwargs() == expected
    assert Recipe.of_op({**expected, "scale": None}) == recipe
    mixed = SUPPORT[PREPARED].default
    assert mixed.name == "int8.token_thread/e4m3_fp16/smooth-kv/exp-mixed"
    assert Recipe.of_op(mixed.op_kwargs()) == mixed


LEFT_TO_MMA: list[tuple[str, dict[str, Any]]] = [
    ("cuda.sm80", {"pv": "fp16"}),
    ("cuda.sm80", {"pv": "half", "granularity": "thread"}),
    ("cuda.sm80", {"pv": "half", "smooth_v": True}),
    ("cuda.sm80", {"qk": "int4"}),
    ("cuda.sm80", {"smooth_q": True}),
    ("cuda.sm80", {"granularity": "tensor"}),
    ("cuda.sm89", {"pv": "e4m3"}),
    ("cuda.sm89", {"pv": "e4m3_fp16", "granularity": "thread"}),
]


def test_hopper_prefers_its_own_row(hopper: None) -> None:
    own, triton = (SUPPORT[row] for row in ("cuda.sm90", "cuda"))
    own_rows = ("cuda.sm90", "cuda.sm90.half")
    assert devices.rows_of(CUDA) == (*own_rows, "cuda.sm80", "cuda.sm89", "cuda")
    assert resolve(SageConfig(), CUDA, BF16, 64) == own.default
    for dtype in FLOAT_DTYPES:
        assert resolve(SageConfig(pv="e4m3_fp16", smooth_v=False), CUDA, dtype, 64).smooth == "k"
    exact = resolve(SageConfig(exponential="exact"), CUDA, BF16, 64)
    assert own.allows(exact) and exact.name == "int8.token_thread/e4m3_fp16/smooth-kv"
    for row, fields in LEFT_TO_MMA:
        config = SageConfig(**fields)
        assert choose_row(config, devices.rows_of(CUDA), BF16, 64) == row, fields
        assert SUPPORT[row].allows(resolve(config, CUDA, BF16, 64)), fields
    for granularity in ("token", "token_block"):
        chosen = resolve(SageConfig(granularity=granularity), CUDA, BF16, 64)
        assert chosen == replace(triton.default, granularity=granularity)
    accurate = SUPPORT["cuda.sm90.half"].default
    assert accurate.name == "int8.token_thread/bf16/smooth-k"
    for dtype in FLOAT_DTYPES:  # 16 bits are bf16 there
        assert resolve(PRESETS["accurate"], CUDA, dtype, 128) == accurate
    wide = resolve(PRESETS["accurate"], CUDA, torch.float16, 129)
    assert wide == replace(SUPPORT["cuda.sm80"].default, pv="fp16")
    assert resolve(PRESETS["sage1"], CUDA, BF16, 64) == Recipe("int8", "block", "bf16", "k")
    assert resolve(SageConfig(), CPU, BF16, 64) == SUPPORT["cpu"].default


def test_wide_heads_take_the_row_that_has_room(hopper: None) -> None:
    limit = SUPPORT["cuda.sm90"].max_head_dim
    assert resolve(SageConfig(), CUDA, BF16, limit) == SUPPORT["cuda.sm90"].default
    if limit < MAX_HEAD_DIM:
        assert resolve(SageConfig(), CUDA, BF16, limit + 1) == SUPPORT["cuda.sm80"].default
    assert max(support.max_head_dim for support in SUPPORT.values()) == MAX_HEAD_DIM


def test_what_no_row_runs_is_the_recipe_of_the_preferred_one(hopper: None) -> None:
    config = SageConfig(pv="e4m3", exponential="mixed")
    rows = devices.rows_of(CUDA)
    assert choose_row(config, rows, BF16, 64) == "cuda.sm90"
    assert resolve(config, CUDA, BF16, 64) == Recipe("int8", "token_thread", "e4m3", "kv", "mixed")


def test_four_bits_smooth_queries_unless_told_not_to(hopper: None) -> None:
    def smooth(**fields: Any) -> str:
        return resolve(SageConfig(qk="int4", **fields), CUDA, BF16, 64).smooth

    assert smooth() == "qk" and smooth(smooth_q=False) == "k" and smooth(smooth_k=False) == "q"
    assert smooth(pv="e4m3") == "qk" and smooth(smooth_v=True) == "qkv"


@pytest.mark.parametrize(
    ("capability", "rows"),
    [
        ((8, 0), ["cuda.sm80"]),
        ((8, 6), ["cuda.sm80"]),
        ((8, 7), ["cuda.sm80"]),
        ((8, 9), ["cuda.sm89"]),
        ((12, 0), ["cuda.sm120"]),
        ((12, 1), ["cuda.sm120"]),
        ((7, 5), []),
        ((10, 0), []),
        (None, []),
    ],
)
def test_every_other_gpu_has_rows_by_its_capability(
    capability: Any, rows: list[str], hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code for sm_90a runs on no other capability, newer ones included."""
    monkeypatch.setattr(devices, "capability", lambda index: capability)
    assert devices.rows_of(CUDA) == (*rows, "cuda")
    assert resolve(SageConfig(), CUDA, BF16, 64) == SUPPORT[(*rows, "cuda")[0]].default
    assert devices.lack_of_sm90("query", CUDA) is not None


@pytest.mark.parametrize(
    ("built", "capability", "rows"),
    [
        ({}, (9, 0), []),
        ({"sm90": ("9.0",)}, (8, 9), []),
        ({"sm90": ("9.0",)}, (9, 0), ["cuda.sm90", "cuda.sm90.half"]),
        ({"sm80": ("8.0", "8.9")}, (8, 9), ["cuda.sm80"]),
        ({"sm80": ("8.9",), "sm89": ("8.9",)}, (8, 0), []),
        ({"sm80": ("12.0",)}, (12, 0), ["cuda.sm80"]),
    ],
)
def test_a_build_without_code_for_a_gpu_leaves_its_rows_out(
    built: dict[str, tuple[str, ...]],
    capability: Any,
    rows: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """TORCH_CUDA_ARCH_LIST, or an older nvcc, decides what there is."""
    monkeypatch.setattr(_extension, "cuda_gpus", lambda: built)
    monkeypatch.setattr(devices, "capability", lambda index: capability)
    assert devices.rows_of(CUDA) == (*rows, "cuda")


def test_a_fake_gpu_is_judged_without_a_gpu() -> None:
    """Tracing for CUDA on a machine that has none must neither fail nor initialise CUDA."""
    if torch.cuda.is_available():
        pytest.skip("needs a machine without GPU, got one")
    with FakeTensorMode():
        x = torch.empty(1, 2, 64, 64, device="cuda")
    assert resolve(SageConfig(), x.device, x.dtype, 64) == SUPPORT["cuda"].default


def test_lack_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, hopper: None) -> None:
    needs = "key must be on a GPU of compute capability 9.0, got "
    assert devices.lack_of_sm90("key", CUDA) is None
    assert devices.lack_of_sm90("key", CPU) == needs + "cpu"
    monkeypatch.setattr(devices, "capability", lambda index: (8, 6))
    assert devices.lack_of_sm90("key", CUDA) == needs + "8.6"
    monkeypatch.setattr(devices, "capability", lambda index: None)
    assert devices.lack_of_sm90("key", CUDA) == needs + "none that torch can use"
    monkeypatch.setattr(_extension, "cuda_gpus", dict)
    assert devices.lack_of_sm90("key", CUDA) == (
        "the native library must be built with kernels for sm90, got one without"
    )


def test_gpus_are_those_of_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = _extension.cuda_gpus.__wrapped__
    monkeypatch.setattr(_extension, "is_available", lambda: True)
    for listed, expected in (
        ("", {}),
        ("sm90:9.0", {"sm90": ("9.0",)}),
        ("sm80:8.0,9.0;sm90:9.0", {"sm80": ("8.0", "9.0"), "sm90": ("9.0",)}),
    ):
        monkeypatch.setattr(_extension, "build_info", lambda listed=listed: {"cuda_gpus": listed})
        assert gpus() == expected
    monkeypatch.setattr(_extension, "is_available", lambda: False)
    assert gpus() == {}


def test_rows_by_type_of_device() -> None:
    assert rows_of_type("cpu") == rows_of_type("cpu", parts=True) == ("cpu",)
    own = ("cuda", "cuda.sm90", "cuda.sm90.half", "cuda.sm80", "cuda.sm89", "cuda.sm120")
    assert rows_of_type("cuda") == own
    assert rows_of_type("cuda", parts=True) == ("cuda",)
    assert rows_of_type("meta") == tuple(SUPPORT)
    assert rows_of_type("meta", parts=True) == ("cpu", "cuda")


def judge(device_type: str, **changes: str) -> list[str]:
    recipe = {**SUPPORT[PREPARED].default.op_kwargs(), **changes}
    return recipe_problems(dict.fromkeys(rows_of_type(device_type), recipe))


def test_a_recipe_must_be_one_rows_as_a_whole() -> None:
    assert judge("cuda") == judge("meta") == []
    triton = {"granularity": "token", "pv": "bf16", "exponential": "exact"}
    assert judge("cuda", **triton) == []
    mma = {"granularity": "tensor", "qk": "int4", "pv": "fp16_fp16", "exponential": "exact"}
    assert judge("cuda", **mma) == judge("cuda", **mma, smooth="qkv") == []
    # Every value is legal on CUDA, in one row or the other.
    (problem,) = judge("cuda", granularity="token", exponential="exact")
    assert problem.split(", or ") == [
        "pv must be one of ['bf16', 'fp16'] on cuda, got 'e4m3_fp16'",
        "granularity must be one of ['token_thread'] on cuda.sm90, got 'token'",
        "granularity must be one of ['token_thread'] on cuda.sm90.half, got 'token' and "
        "pv must be one of ['bf16'] on cuda.sm90.half, got 'e4m3_fp16' and "
        "smooth must be one of ['', 'k'] on cuda.sm90.half, got 'kv'",
        "granularity must be one of ['thread', 'warp', 'block', 'tensor'] on cuda.sm80, "
        "got 'token' and pv must be one of ['bf16', 'fp16', 'fp16_fp16'] on cuda.sm80, "
        "got 'e4m3_fp16'",
        "granularity must be one of ['thread', 'warp', 'block', 'tensor'] on cuda.sm89, "
        "got 'token'",
        "granularity must be one of ['thread', 'warp', 'block', 'tensor'] on cuda.sm120, "
        "got 'token'",
    ]
    # What is wrong in every row is all there is to say.
    (problem,) = judge("cuda", qk="int2")
    assert problem.split(", or ") == [
        "qk must be one of ['int8'] on cuda, got 'int2'",
        "qk must be one of ['int8'] on cuda.sm90, got 'int2'",
        "qk must be one of ['int8'] on cuda.sm90.half, got 'int2'",
        "qk must be one of ['int8', 'int4'] on cuda.sm80, got 'int2'",
        "qk must be one of ['int8', 'int4'] on cuda.sm89, got 'int2'",
        "qk must be one of ['int8', 'int4'] on cuda.sm120, got 'int2'",
    ]
    assert judge("cpu", granularity="token", pv="bf16", qk="int4", exponential="exact") == [
        "qk must be one of ['int8'] on cpu, got 'int4'"
    ]


def test_head_dim_is_part_of_what_a_row_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    own, triton = (SUPPORT[row] for row in ("cuda.sm90", "cuda"))
    own = own._replace(max_head_dim=100)
    monkeypatch.setitem(SUPPORT, "cuda.sm90", own)
    wide = own.max_head_dim + 1
    rows = {"cuda": own.default.op_kwargs(), "cuda.sm90": own.default.op_kwargs()}
    (problem,) = recipe_problems(rows, wide)
    limit = f"head_dim must be at most {own.max_head_dim} on cuda.sm90, got {wide}"
    assert problem.endswith(f", or {limit}") and problem.startswith("granularity must be")
    assert recipe_problems({"cuda.sm90": own.default.op_kwargs()}, own.max_head_dim) == []
    assert recipe_problems({"cuda": triton.default.op_kwargs()}, MAX_HEAD_DIM) == []


def test_an_unknown_head_dim_counts_as_the_largest() -> None:
    """So that no kernel is chosen that may turn out too narrow; it adds no guard either."""
    narrow, wide = torch.empty(1, 1, 2, 40), torch.empty(1, 1, 2, 80)
    assert largest_head_dim(narrow, wide) == largest_head_dim(wide, narrow) == 80
    assert largest_head_dim(torch.empty(1, 1, 2, 300)) == MAX_HEAD_DIM
    env = ShapeEnv()
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * 4)
    symbolic = FakeTensorMode(shape_env=env).from_tensor(narrow, symbolic_context=context)
    before = len(env.guards)
    assert largest_head_dim(symbolic, wide) == MAX_HEAD_DIM
    assert len(env.guards) == before
