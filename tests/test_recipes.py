"""The recipe table is consistent, and configurations resolve to what they say."""

from __future__ import annotations

import pytest
import torch

from torch_sage.config import PRESETS, SageConfig
from torch_sage.ops.checks import FLOAT_DTYPES, recipe_problems
from torch_sage.recipes import (
    GRANULARITIES,
    PV_FORMATS,
    QK_FORMATS,
    SMOOTH_LETTERS,
    SUPPORT,
    Recipe,
    resolve,
)


@pytest.mark.parametrize("device", SUPPORT)
def test_tables_hold_known_values_only(device: str) -> None:
    support = SUPPORT[device]
    assert set(support.qk) <= set(QK_FORMATS)
    assert set(support.granularity) <= set(GRANULARITIES)
    assert set(support.pv) <= set(PV_FORMATS)
    assert set(support.half) == set(FLOAT_DTYPES)
    assert set(support.half.values()) <= set(support.pv)
    for smooth in support.smooth:
        assert smooth == "".join(letter for letter in SMOOTH_LETTERS if letter in smooth)


@pytest.mark.parametrize("device", SUPPORT)
def test_default_is_supported_and_is_what_auto_means(device: str) -> None:
    support = SUPPORT[device]
    assert support.allows(support.default)
    assert resolve(SageConfig(), device) == support.default


@pytest.mark.parametrize("device", SUPPORT)
@pytest.mark.parametrize("preset", PRESETS)
def test_allows_agrees_with_the_ops_own_check(device: str, preset: str) -> None:
    recipe = resolve(PRESETS[preset], device)
    assert SUPPORT[device].allows(recipe) == (not [*recipe_problems(device, **recipe.op_kwargs())])


def test_fields_override_the_default_one_by_one() -> None:
    default = SUPPORT["cpu"].default
    assert resolve(SageConfig(granularity="warp"), "cpu").granularity == "warp"
    assert resolve(SageConfig(smooth_k=False), "cpu").smooth == "q"
    assert resolve(SageConfig(smooth_v=True), "cpu").smooth == default.smooth + "v"
    assert resolve(SageConfig(smooth_q=True, smooth_v=True), "cpu").smooth == "qkv"
    assert resolve(SageConfig(pv="half"), "cpu").pv == "bf16"
    assert resolve(SageConfig(pv="e4m3"), "cpu").pv == "e4m3"
    assert resolve(SageConfig(qk="int4"), "cpu").qk == "int4"


def test_half_is_the_16_bit_type_of_the_operands() -> None:
    for pv in ("auto", "half"):
        formats = [resolve(SageConfig(pv=pv), "cuda", dtype).pv for dtype in FLOAT_DTYPES]
        assert formats == ["bf16", "bf16", "fp16"]
        assert {resolve(SageConfig(pv=pv), "cpu", dtype).pv for dtype in FLOAT_DTYPES} == {"bf16"}
    assert resolve(SageConfig(pv="bf16"), "cuda", torch.float16).pv == "bf16"


def test_paper_presets_on_the_cpu() -> None:
    resolved = {name: resolve(preset, "cpu") for name, preset in PRESETS.items()}
    runs = [name for name, recipe in resolved.items() if SUPPORT["cpu"].allows(recipe)]
    assert runs == ["auto", "sage1"]
    assert resolve(PRESETS["sage2_4b"], "cpu") == Recipe("int4", "thread", "e4m3", "qk")


def test_unknown_device_is_an_error() -> None:
    with pytest.raises(KeyError):
        resolve(SageConfig(), "abacus")


def test_name_and_op_arguments() -> None:
    recipe = Recipe("int8", "token", "bf16", "")
    assert recipe.name == "int8.token/bf16/smooth-none"
    expected = {"qk": "int8", "granularity": "token", "pv": "bf16", "smooth": ""}
    assert recipe.op_kwargs() == expected
