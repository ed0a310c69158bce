"""The attention cases that every implementation runs, and the data that makes them hard."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """One call of attention: shapes, meaning, recipe and the kind of data."""

    batch: int = 1
    heads_q: int = 2
    heads_kv: int = 2
    seqlen_q: int = 65
    seqlen_k: int = 77
    head_dim: int = 64
    head_dim_v: int = 64
    dtype: str = "fp32"
    causal: str = "none"
    mask: str = "none"
    scale: float | None = None
    granularity: str = "token"
    smooth: str = "k"
    data: str = "normal"
    layout: str = "bhsd"

    @property
    def id(self) -> str:
        """Readable and unique: every field that is not at its default."""
        parts = [f"b{self.batch}-h{self.heads_q}/{self.heads_kv}"]
        parts += [f"q{self.seqlen_q}-k{self.seqlen_k}-d{self.head_dim}/{self.head_dim_v}"]
        parts += [self.dtype, self.granularity, f"smooth_{self.smooth or 'none'}"]
        if self.scale is not None:
            parts.append(f"scale{self.scale:g}")
        optional = (
            (self.causal, "none"), (self.mask, "none"), (self.data, "normal"),
            (self.layout, "bhsd"),
        )  # fmt: skip
        return "-".join([*parts, *(value for value, default in optional if value != default)])

    @property
    def recipe(self) -> dict[str, str]:
        """The recipe arguments of the CPU op and of the oracle."""
        return {
            "qk": "int8",
            "granularity": self.granularity,
            "pv": "bf16",
            "smooth": self.smooth,
        }


class Inputs(NamedTuple):
    """Positional arguments of the ops and of the oracle."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    causal: str
    scale: float | None

    def on(self, device: str) -> Inputs:
        """Return the same numbers on a device."""
        return Inputs(*(x.to(device) if isinstance(x, Tensor) else x for x in self))


def make_inputs(case: AttentionCase) -> Inputs:
    """Return the tensors of a case; the same case always gives the same numbers."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.id.encode()))

    def normal(heads: int, seqlen: int, channels: int) -> Tensor:
        return torch.randn(case.batch, heads, seqlen, channels, generator=generator)

    tensors = (
        normal(case.heads_q, case.seqlen_q, case.head_dim),
        normal(case.heads_kv, case.seqlen_k, case.head_dim),
        normal(case.heads_kv, case.seqlen_k, case.head_dim_v),
    )
    shaped = (x.to(DTYPES[case.dtype]) for x in _shape_data(case.data, *tensors, generator))
    query, key, value = (_lay_out(case.layout, x) for x in shaped)
    return Inputs(query, key, value, _make_mask(case, generator), case.causal, case.scale)


def _shape_data(
    kind: str, q: Tensor, k: Tensor, v: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn N(0, 1) tensors into the kind of data that a case is about."""
    d = k.shape[-1]
    if kind == "channel_bias":  # what smoothing is for
        return q, k + 4 * torch.randn(d, generator=generator), v + 3
    if kind == "outlier_channel":
        q[..., 0] *= 30
        k[..., 0] += 30
        v[..., 0] *= 100
    elif kind == "outlier_row":  # one loud row spoils the scales of its group only
        q[:, :, q.shape[2] // 2 :][:, :, :1] *= 50
        k[:, :, k.shape[2] // 2 :][:, :, :1] *= 50
    elif kind == "uneven":  # neighbouring scales differ, so a swapped one shows
        k *= 2.0 ** (torch.arange(k.shape[2]) // 16 % 4)[:, None]
        v *= 2.0 ** (torch.arange(v.shape[3]) % 5)
    elif kind == "sink":  # one key takes most of the weight and has a small value
        k[..., :1, :] = 3 * q.mean((1, 2), keepdim=True) / q.mean((1, 2)).norm() * d**0.5
        v[..., :1, :] *= 0.01
    elif kind == "one_hot":
        q *= 20
    elif kind == "uniform":  # equal scores: every probability is 1, the row sum is exact
        q *= 0
        v = v.sign() * 3.0
    elif kind == "constant_key":  # smoothing leaves exact zeros
        k[:] = k[..., :1, :].clone()
    elif kind == "zero_rows":
        q[..., ::3, :] = 0
        k[..., 1::4, :] = 0
    elif kind == "zero_channels":
        q[..., ::2] = 0
        v[..., ::3] = 0
    elif kind == "zero":
        q, k, v = (torch.zeros_like(x) for x in (q, k, v))
    elif kind == "subnormal":  # of bf16 and fp32; a part of them flushes to zero in fp16
        q, k, v = (x * 1e-39 for x in (q, k, v))
    elif kind == "tiny_half":  # subnormal in fp16
        q, k, v = (x * 1e-6 for x in (q, k, v))
    elif kind == "largest_half":
        q, k = q.sign() * 65504 * 2.0**-8, k.sign() * 2.0**-6
        v = v.sign() * 65504
    elif kind != "normal":
        raise ValueError(f"unknown data {kind!r}")
    return q, k, v


def _lay_out(layout: str, x: Tensor) -> Tensor:
    """Return the same values under other strides; storage around views is NaN."""
    b, h, n, d = x.shape
    if layout == "bshd":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sliced":
        storage = torch.full((b, h + 2, n + 5, d + 3), torch.nan, dtype=x.dtype)
        view = storage[:, 1 : h + 1, 2 : n + 2, 1 : d + 1]
        return view.copy_(x)
    if layout == "fused":  # one projection, as most models do: heads interleaved with others
        storage = torch.full((b, n, 3, h, d), torch.nan, dtype=x.dtype)
        return storage[:, :, 1].copy_(x.transpose(1, 2)).transpose(1, 2)
    if layout == "expanded":  # every head is the first one, stride 0
        return x[:, :1].expand(b, h, n, d)
    if layout == "last_dim_strided":
        return x.mT.contiguous().mT
    if layout != "bhsd":
        raise ValueError(f"unknown layout {layout!r}")
    return x.contiguous()


def _make_mask(case: AttentionCase, generator: torch.Generator) -> Tensor | None:
    b, h, n, m = case.batch, case.heads_q, case.seqlen_q, case.seqlen_k
    kind, dtype = case.mask, DTYPES[case.dtype]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    masks = {
        "none": lambda: None,
        "bool": lambda: normal(b, h, n, m) > 0,
        "bool_2d": lambda: normal(n, m) > 0,
        "bool_hidden_rows": lambda: (normal(b, 1, n, m) > 0) & (torch.arange(n) % 5 > 1)[:, None],
        "bool_all_hidden": lambda: torch.zeros(n, m, dtype=torch.bool),
        "bool_late": lambda: (torch.arange(m) > 0.9 * m).expand(n, m),
        "key_padding": lambda: (torch.arange(m) < 0.7 * m).expand(b, 1, 1, m),
        "float": lambda: normal(b, h, n, m).to(dtype),
        "float32": lambda: normal(1, h, n, m),
        "float_row": lambda: normal(h, 1, m).to(dtype),
        "float_column": lambda: normal(b, 1, n, 1).to(dtype),
        "float_inf": lambda: normal(n, m).masked_fill(normal(n, m) > 0, -torch.inf).to(dtype),
        "float_hidden_rows": lambda: normal(n, m).masked_fill(
            torch.arange(n)[:, None] % 3 == 0, -torch.inf
        ),
        # Masks as transformers writes them: a wholly masked row is uniform, not hidden.
        "float_min": lambda: torch.where(normal(1, 1, n, m) > 1, 0.0, torch.finfo(dtype).min).to(
            dtype
        ),
        "float_min_rows": lambda: (
            torch.zeros(n, m)
            .masked_fill(torch.arange(n)[:, None] % 2 == 0, torch.finfo(dtype).min)
            .to(dtype)
        ),
        "alibi": lambda: (
            (-(torch.arange(n)[:, None] - torch.arange(m)).abs() * 0.1).expand(h, n, m).to(dtype)
        ),
        "transposed": lambda: normal(m, n).T.to(dtype),
    }
    mask = masks[kind]()
    return mask


# Regimes: every dtype, granularity and smoothing of the CPU recipe; both causal corners with N < M,
# N = M and N > M; every kind of mask and of broadcast; both signs of the scale and 0; GQA and MQA;
# head_dim 1..256 off and on every vector width, Dv != D; lengths off and on every tile; every
# layout; every kind of data. Left out: lengths above 1,300 (the oracle is O(N * M); test_kernels.py
# checks memory at 16k tokens), and products of rare values: test_fuzz.py draws those.
_DEFAULT = AttentionCase()
CASES: list[AttentionCase] = [
    _DEFAULT,
    *(
        AttentionCase(granularity=granularity, smooth=smooth, dtype=dtype)
        for granularity in ("token", "thread", "warp", "block", "tensor")
        for smooth, dtype in (
            ("k", "bf16"), ("", "fp32"), ("v", "fp16"), ("kv", "fp32"),
            ("q", "fp32"), ("qk", "bf16"), ("qk", "fp32"), ("qkv", "fp16"),
        )
    ),
    *(
        AttentionCase(causal=causal, seqlen_q=n, seqlen_k=m, dtype=dtype)
        for causal in ("top_left", "bottom_right")
        for n, m, dtype in (
            (130, 130, "bf16"), (257, 257, "fp32"), (33, 300, "fp16"), (300, 33, "fp32"),
            (1, 65, "bf16"), (65, 1, "fp32"), (64, 63, "fp32"), (63, 64, "fp32"),
        )
    ),
    *(
        AttentionCase(mask=mask, dtype=dtype, batch=2, heads_q=4, heads_kv=2)
        for mask, dtype in (
            ("bool", "fp32"), ("bool_2d", "bf16"), ("bool_hidden_rows", "fp32"),
            ("bool_all_hidden", "fp32"), ("bool_late", "fp32"), ("key_padding", "bf16"),
            ("float", "bf16"), ("float", "fp16"), ("float32", "bf16"), ("float_row", "fp32"),
            ("float_column", "fp32"), ("float_inf", "fp32"), ("float_hidden_rows", "fp32"),
            ("float_min", "bf16"), ("float_min", "fp32"), ("float_min_rows", "fp32"),
            ("float_min_rows", "bf16"), ("float_min_rows", "fp16"), ("alibi", "bf16"),
            ("transposed", "fp32"),
        )
    ),
    AttentionCase(mask="bool_late", seqlen_k=700),
    AttentionCase(mask="float_inf", seqlen_k=700, smooth="kv"),
    *(AttentionCase(scale=scale) for scale in (1.0, -0.125, 0.0, -0.0, 3.0, 1e-6)),
    AttentionCase(scale=-0.2, causal="top_left", smooth="kv"),
    AttentionCase(scale=0.0, causal="top_left"),
    *(
        AttentionCase(heads_q=q, heads_kv=kv, batch=2, causal="top_left", granularity=granularity)
        for q, kv, granularity in ((8, 2, "token"), (6, 1, "thread"), (4, 4, "block"))
    ),
    *(
        AttentionCase(head_dim=d, head_dim_v=dv, dtype=dtype)
        for d, dv, dtype in (
            (1, 1, "fp32"), (2, 3, "bf16"), (3, 1, "fp16"), (5, 17, "fp32"), (16, 8, "fp32"),
            (31, 33, "fp32"), (40, 40, "bf16"), (64, 128, "fp32"), (72, 72, "bf16"),
            (80, 96, "fp16"), (111, 59, "fp32"), (127, 129, "fp32"), (128, 128, "bf16"),
            (192, 128, "bf16"), (255, 256, "fp32"), (256, 256, "bf16"),
        )
    ),
    *(
        AttentionCase(seqlen_q=n, seqlen_k=m, head_dim=32, head_dim_v=32)
        for n, m in ((1, 1), (1, 1300), (700, 1), (128, 256), (129, 257), (127, 255), (300, 1024))
    ),
    *(
        AttentionCase(layout=layout, batch=2, dtype=dtype, granularity=granularity, smooth="kv")
        for layout in ("bshd", "sliced", "fused", "expanded", "last_dim_strided")
        for dtype, granularity in (("bf16", "token"), ("fp32", "thread"))
    ),
    *(
        AttentionCase(data=data, dtype=dtype, smooth=smooth)
        for data, dtype in (
            ("channel_bias", "bf16"), ("outlier_channel", "fp32"), ("outlier_row", "bf16"),
            ("uneven", "fp32"), ("sink", "fp32"), ("one_hot", "fp32"), ("uniform", "bf16"),
            ("constant_key", "fp32"), ("zero_rows", "fp32"), ("zero_channels", "bf16"),
            ("zero", "fp32"), ("subnormal", "fp32"), ("subnormal", "bf16"), ("tiny_half", "fp16"),
            ("largest_half", "fp16"),
        )
        for smooth in ("k", "kv", "qk")
    ),
    *(
        AttentionCase(data=data, granularity=granularity, causal="top_left", seqlen_k=140)
        for data in ("uneven", "outlier_row", "zero_rows")
        for granularity in ("thread", "warp", "block", "tensor")
    ),
]  # fmt: skip

# Nothing to read or nothing to write; M = 0 gives zeros, as in torch.
EMPTY_CASES: list[AttentionCase] = [
    replace(_DEFAULT, **change, granularity=granularity, smooth="kv")
    for granularity in ("token", "thread", "tensor")
    for change in (
        {"seqlen_k": 0}, {"seqlen_q": 0}, {"batch": 0}, {"seqlen_q": 0, "seqlen_k": 0},
        {"heads_q": 0, "heads_kv": 1},
    )
]  # fmt: skip


# Poison: where one element of an input is not finite.
class Poison(NamedTuple):
    """Put ``number`` into one element of the named input: 0 query, 1 key, 2 value."""

    operand: int
    index: tuple[int, int, int, int]
    number: float


POISONS = [
    Poison(operand, (0, head, row, 3), number)
    for operand in (0, 1, 2)
    for head, row in ((0, 5), (1, 0), (1, 64))
    for number in (float("nan"), float("inf"), float("-inf"))
]


def poison(inputs: Inputs, what: Poison) -> Inputs:
    """Return the inputs with one element replaced."""
    tensors = [x.clone() for x in inputs[:3]]
    tensors[what.operand][what.index] = what.number
    return Inputs(*tensors, *inputs[3:])
