"""User-facing configuration: what to compute, never on which hardware."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

QKFormat = Literal["auto", "int8", "int4"]
Granularity = Literal[
    "auto", "token", "thread", "warp", "block", "tensor", "token_thread", "token_block"
]
PVFormat = Literal["auto", "half", "bf16", "fp16", "fp16_fp16", "e4m3", "e4m3_fp16"]
Exponential = Literal["auto", "exact", "mixed"]
Rotation = Literal["none", "hadamard"]
OnUnsupported = Literal["fallback", "warn", "error"]
Dispatch = Literal["measured", "always"]
Producers = Literal["measured", "always", "never"]


@dataclass(frozen=True, kw_only=True)
class SageConfig:
    """How quantized attention is computed and what happens when it cannot be.

    ``"auto"`` and ``None`` leave the choice to the recipe table of the device (``recipes.py``).
    Instances are hashable; every field is part of the compile-cache key.

    Source: SageAttention (arXiv 2410.02367), SageAttention2 (arXiv 2411.10958),
    SageAttention2++ (arXiv 2505.21136).
    """

    qk: QKFormat = "auto"
    """Integer format of Q and K codes."""

    granularity: Granularity = "auto"
    """Rows of Q and K that share one scale; ``token_thread`` is ``token`` for Q, ``thread`` for K,
    and ``token_block`` likewise."""

    pv: PVFormat = "auto"
    """Format of P and V: ``half`` is the 16-bit type of the device's kernel, ``e4m3`` accumulates
    in fp32 in two levels, ``e4m3_fp16`` in fp16 (SageAttention2++), and so does ``fp16_fp16``,
    where V of more than 1023 overflows."""

    smooth_q: bool | None = None
    """Subtract a mean of query rows before quantization and add its exact scores: the mean of a
    head on CPU and in the Triton kernels, of every 128 rows in the other kernels. INT4 recipes do
    so unless it is False."""

    smooth_k: bool | None = None
    """Subtract the token mean of K before quantization; in exact arithmetic, no change."""

    smooth_v: bool | None = None
    """Subtract the token mean of V before quantization and add it to the output."""

    rotation: Rotation = "none"
    """What Q and K are multiplied by before quantization: ``hadamard`` spreads channels with large
    scales over all of a head; in exact arithmetic, no change. It takes a head_dim that is even,
    and costs a matrix product of Q and one of K in front of attention; it rules out
    ``producers``."""

    exponential: Exponential = "auto"
    """How P is computed: ``exact`` to fp32, or ``mixed``, which is faster and approximates some
    columns inside the rounding of P to E4M3."""

    dispatch: Dispatch = "measured"
    """``measured`` leaves exact SDPA where it was measured to be faster; ``always`` never does."""

    producers: Producers = "measured"
    """Whether compiled attention norms and rotates Q and K itself, if the graph does that before it
    and the device has such kernels: where that was measured to be faster, always, or never."""

    on_unsupported: OnUnsupported = "fallback"
    """Unsupported input runs exact SDPA silently, with a warning, or raises NotImplementedError."""

    def __post_init__(self) -> None:
        """Refuse values that no field allows."""
        choices: dict[str, tuple[object, ...]] = {
            "qk": get_args(QKFormat),
            "granularity": get_args(Granularity),
            "pv": get_args(PVFormat),
            "smooth_q": (None, True, False),
            "smooth_k": (None, True, False),
            "smooth_v": (None, True, False),
            "rotation": get_args(Rotation),
            "exponential": get_args(Exponential),
            "dispatch": get_args(Dispatch),
            "producers": get_args(Producers),
            "on_unsupported": get_args(OnUnsupported),
        }
        for name, valid in choices.items():
            got = getattr(self, name)
            if not any(got is v or (isinstance(got, str) and got == v) for v in valid):
                raise ValueError(f"{name} must be one of {list(valid)}, got {got!r}")

    @classmethod
    def preset(cls, name: str) -> SageConfig:
        """Return a named configuration: one of ``PRESETS``.

        Raises:
            ValueError: if ``name`` is not a preset; the message lists them.
        """
        if name not in PRESETS:
            raise ValueError(f"config must name one of {sorted(PRESETS)}, got {name!r}")
        return PRESETS[name]

    def with_options(self, **changes: Any) -> SageConfig:
        """Return a copy with some fields replaced."""
        return replace(self, **changes)

    def cache_key(self) -> tuple[tuple[str, object], ...]:
        """Return every field as a stable, hashable key."""
        return tuple(sorted(asdict(self).items()))


# The variants of the papers, which smooth no V; the ones of 4 bits alone smooth Q.
_PAPERS = SageConfig(smooth_q=False, smooth_k=True, smooth_v=False)
_8B = replace(_PAPERS, qk="int8", granularity="thread")
_4B = replace(_PAPERS, qk="int4", granularity="thread", smooth_q=True)
PRESETS: dict[str, SageConfig] = {
    "auto": SageConfig(),
    "sage1": replace(_PAPERS, qk="int8", granularity="block", pv="half"),
    "sage2_8b": replace(_8B, pv="e4m3"),
    "sage2_4b": replace(_4B, pv="e4m3"),
    "sage2pp_8b": replace(_8B, pv="e4m3_fp16"),
    "sage2pp_4b": replace(_4B, pv="e4m3_fp16"),
}


def as_config(config: SageConfig | str | None) -> SageConfig:
    """Return ``config`` itself, the preset it names, or the default for ``None``.

    Raises:
        TypeError: if ``config`` is neither.
        ValueError: if it names no preset.
    """
    if config is None:
        return PRESETS["auto"]
    if isinstance(config, str):
        return SageConfig.preset(config)
    if not isinstance(config, SageConfig):
        raise TypeError(f"config must be a SageConfig, a preset name or None, got {type(config)}")
    return config
