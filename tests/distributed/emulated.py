"""The kernels for compute capability 9.0 on CPU: operands of their sizes, numbers of the oracle.

Inside an image of V tokens and channels lie in natural order, which no caller may know.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.gpu.sm90 import IMAGE_ROWS, RECIPE, VALUE_GROUP, VALUE_MAX, key_image, width_of
from tests.numerics import exact_attention
from torch_sage import ops, reference
from torch_sage.ops import checks
from torch_sage.recipes import PREPARED
from torch_sage.reference.quantize import key_groups, value_shift

GRANULARITY = RECIPE["granularity"]


def prepare_kv(
    key: Tensor, value: Tensor, *, smooth: str, pv: str = RECIPE["pv"]
) -> tuple[Tensor, ...]:
    assert pv == RECIPE["pv"]
    width = width_of(key.shape[3], value.shape[3])
    codes, scales, mean = reference.quantize_key(key, smooth="k" in smooth, granularity=GRANULARITY)
    values, value_scales, means = reference.quantize_value(
        value, smooth="v" in smooth, pv=pv, value_max=VALUE_MAX, group=VALUE_GROUP
    )
    shift = value_shift(value, means, values, value_scales, VALUE_GROUP).float()

    def image(x: Tensor) -> Tensor:
        padding = (0, width - x.shape[3], 0, -x.shape[2] % checks.KEY_BLOCK)
        return F.pad(x, padding).unflatten(2, (-1, IMAGE_ROWS)).flatten(3)

    def channels(x: Tensor) -> Tensor:
        return F.pad(x, (0, width - x.shape[3]))

    of_value = (image(values.view(torch.uint8)), channels(value_scales), channels(shift))
    # The kernels' order of channels is its own inverse.
    keys = key_image(image(codes), width).unflatten(2, (-1, IMAGE_ROWS)).flatten(3)
    return keys, scales.unflatten(2, (-1, 4)), mean, *of_value


def attention_prepared_with_lse(
    query: Tensor,
    key_codes: Tensor,
    key_scales: Tensor,
    key_mean: Tensor,
    value_codes: Tensor,
    value_scales: Tensor,
    value_shift: Tensor,
    seqlen_k: int,
    head_dim_v: int,
    attn_mask: Tensor | None,
    causal: str,
    scale: float | None,
    *,
    exponential: str,
) -> tuple[Tensor, Tensor]:
    names = ("key_codes", "key_scales", "key_mean", "value_codes", "value_scales", "value_shift")
    tensors = (key_codes, key_scales, key_mean, value_codes, value_scales, value_shift)
    problems = checks.prepared_problems(
        query, dict(zip(names, tensors, strict=True)), seqlen_k, head_dim_v, attn_mask, causal,
        scale, exponential,
    )  # fmt: skip
    assert list(problems) == []
    width = width_of(query.shape[3], head_dim_v)

    def of_groups(x: Tensor) -> Tensor:
        return x.repeat_interleave(VALUE_GROUP, 2)[:, :, :seqlen_k, :head_dim_v].double()

    group_of_key, _ = key_groups(seqlen_k, GRANULARITY, checks.KEY_BLOCK)
    keys = key_image(key_codes, width)[:, :, :seqlen_k, : query.shape[3]].double()
    keys = keys * key_scales.flatten(2)[:, :, group_of_key, None].double()
    codes = value_codes.unflatten(3, (IMAGE_ROWS, width)).flatten(2, 3)
    codes = codes[:, :, :seqlen_k, :head_dim_v].contiguous().view(torch.float8_e4m3fn)
    values = codes.double() * of_groups(value_scales) + of_groups(value_shift)
    query_codes, query_scales = reference.quantize_query(query, granularity=GRANULARITY)
    rounded = query_codes.double() * query_scales[..., None].double()
    output, lse = exact_attention(rounded, keys, values, attn_mask, causal, scale)
    means = key_mean.repeat_interleave(query.shape[1] // key_mean.shape[1], 1)
    factor = query.shape[3] ** -0.5 if scale is None else scale
    lse = lse + factor * (query.double() * means[:, :, None].double()).sum(3)
    return output.to(query.dtype), lse.float()


@contextlib.contextmanager
def sm90_on_cpu() -> Iterator[None]:
    """Share attention as on GPUs of compute capability 9.0."""
    from torch_sage.distributed import kernels

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "rows_to_send", lambda device: (PREPARED,))
        patch.setattr(ops, "prepare_kv", prepare_kv)
        # In exact arithmetic the sum for merging is no other.
        for name in ("attention_prepared_with_lse", "attention_prepared_part"):
            patch.setattr(ops, name, attention_prepared_with_lse)
        yield
