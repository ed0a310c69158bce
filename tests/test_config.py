"""Configuration objects refuse what they do not know and key caches by every field."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError, fields

import pytest

from torch_sage.config import PRESETS, SageConfig, as_config

OTHER = {
    "qk": "int8",
    "granularity": "warp",
    "pv": "half",
    "smooth_q": False,
    "smooth_k": False,
    "smooth_v": True,
    "rotation": "hadamard",
    "exponential": "exact",
    "dispatch": "always",
    "producers": "never",
    "on_unsupported": "error",
}


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.parametrize("bad", ["int9", "", 1, 0, None, [], 1.0])
def test_unknown_values_are_errors(name: str, bad: object) -> None:
    if bad is None and name.startswith("smooth"):
        assert getattr(SageConfig(**{name: bad}), name) is None
        return
    with pytest.raises(ValueError, match=rf"^{name} must be one of \[.*\], got "):
        SageConfig(**{name: bad})


def test_fields_are_keyword_only_and_frozen() -> None:
    with pytest.raises(TypeError):
        SageConfig("int8")
    with pytest.raises(TypeError):
        SageConfig(int8=True)
    with pytest.raises(FrozenInstanceError):
        SageConfig().qk = "int8"


def test_every_field_is_in_hash_equality_and_key() -> None:
    assert set(OTHER) == {field.name for field in fields(SageConfig)}
    base = SageConfig()
    for name, value in OTHER.items():
        changed = base.with_options(**{name: value})
        assert changed != base
        assert changed.cache_key() != base.cache_key()
        assert getattr(changed, name) == value
        assert hash(changed) == hash(SageConfig(**{name: value}))


def test_with_options_validates() -> None:
    with pytest.raises(ValueError, match="qk must be one of"):
        SageConfig().with_options(qk="fp4")
    with pytest.raises(TypeError):
        SageConfig().with_options(unknown=1)


def test_as_config() -> None:
    config = SageConfig(qk="int8")
    assert as_config(config) is config
    assert as_config(None) == as_config("auto") == SageConfig()
    assert as_config("sage1") is PRESETS["sage1"]
    with pytest.raises(ValueError, match=r"config must name one of \[.*'sage1'.*\], got 'sage9'"):
        as_config("sage9")
    with pytest.raises(TypeError, match="config must be a SageConfig, a preset name or None"):
        as_config({"qk": "int8"})


def test_presets_survive_pickling() -> None:
    for preset in PRESETS.values():
        assert pickle.loads(pickle.dumps(preset)) == preset
