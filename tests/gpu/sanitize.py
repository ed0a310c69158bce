"""Calls of every instantiation of the CUDA kernels, small, for NVIDIA's compute-sanitizer:

``compute-sanitizer --tool memcheck --error-exitcode 1 python -m tests.gpu.sanitize``, and the same
with racecheck, initcheck and synccheck. Names of families (hopper, rotary, packed-hopper, split,
mma, packed-mma, triton) behind that leave out the others. racecheck is slow: with ``--short`` a
shape comes with each dtype and each mode of masking once, in other pairs every time, and to a
member of the mma.sync family with one pair. Triton's kernels run such pairs alone, since each is
compiled anew. Of packed sequences whose lengths make no sense they read codes that nobody wrote, in
bounds: ``--valid`` leaves those out, for initcheck.
PYTORCH_NO_CUDA_MEMORY_CACHING=1 gives every tensor its own allocation, so that memcheck sees what
lies behind it.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.gpu.mma import MEMBERS, Member
from tests.gpu.shared import OPS, Recipe
from tests.gpu.sm90 import EXPONENTIALS, HALF, RECIPE
from tests.varlen import pack
from torch_sage.ops.checks import PAIRINGS, ROTARY_HEAD_DIMS
from torch_sage.recipes import SUPPORT

Shape = tuple[int, int, int, int]  # query rows, keys, and both head dimensions
# Rows off the tiles (192 and 128), one key, one group of V and two, and what needs padded copies.
SHAPES = ((1, 1, 64, 64), (200, 300, 64, 64), (70, 1100, 128, 128), (130, 129, 40, 33))
WIDE = (130, 129, 256, 200)
MOST_OF_HALF = SUPPORT["cuda.sm90.half"].max_head_dim
SPLIT = ((1, 1100, 64, 64), (3, 1700, 128, 100), (40, 1030, 256, 256))
CAUSAL = ("none", "top_left", "bottom_right")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def call(shape: Shape, dtype: torch.dtype, causal: str) -> None:
    """Run each op on one shape: grouped heads, each exponential, masked, with the LSE, prepared."""
    n, m, d, dv = shape
    q, k, v = (
        torch.randn(1, heads, tokens, channels, device="cuda").to(dtype)
        for heads, tokens, channels in ((4, n, d), (2, m, d), (2, m, dv))
    )
    prepared = OPS.prepare_kv(k, v)
    for exponential in EXPONENTIALS:
        recipe: dict[str, Any] = {**RECIPE, "smooth": "kv", "exponential": exponential}
        use(OPS.sdpa(q, k, v, None, causal, **recipe))
        use(OPS.attention_prepared(q, *prepared, m, dv, None, causal, exponential=exponential))
    half = [HALF] if max(d, dv) <= MOST_OF_HALF else []
    for recipe in half:
        use(OPS.sdpa(q, k, v, None, causal, **recipe, smooth="k"))
    for recipe in (RECIPE, *half):
        use(*OPS.sdpa_with_lse(q, k, v, None, causal, **recipe, smooth="k"))
        if causal == "none":
            visible = torch.rand(n, m, device="cuda") > 0.5
            for mask in (visible, visible.to(dtype), visible[:1].expand(4, n, m)):
                use(*OPS.sdpa_with_lse(q, k, v, mask, **recipe, smooth=""))


def call_mma(member: Member, shape: Shape, dtype: torch.dtype, causal: str) -> None:
    """Run a member of the mma.sync family; operands are read where they lie, and copied."""
    n, m, d, dv = shape
    q = torch.randn(1, 4, n, d, device="cuda").to(dtype)
    k, v = (torch.randn(1, 2, m, channels, device="cuda").to(dtype) for channels in (d, dv))
    for granularity, smooth in (("thread", "k"), ("tensor", "qkv"), ("block", "")):
        recipe = member.recipe(granularity, smooth)
        use(OPS.sdpa(q, k, v, None, causal, **recipe))
        use(*OPS.sdpa_with_lse(q, k, v, None, causal, **recipe))
    if causal == "none":
        visible = torch.rand(n, m, device="cuda") > 0.5
        for mask in (visible, visible.to(dtype)):
            use(OPS.sdpa(q, k, v, mask, **member.recipe()))


def call_packed(
    recipe: Recipe, shape: Shape, dtype: torch.dtype, causal: str, wild_lengths: bool = True
) -> None:
    """Run packed sequences, some empty, and lengths that make no sense."""
    n, m, d, dv = shape
    queries, keys = [n, 0, 1, 64, 65], [m, 3, 0, 63, 129]
    packed = pack(queries, keys, head_dim=d, head_dim_v=dv, dtype=dtype, device="cuda")
    wild = torch.tensor([2**31 - 1, -5, 70, 2**30, 10, 1000], dtype=torch.int32, device="cuda")
    use(*OPS.varlen_sdpa_with_lse(*packed, causal, **recipe))
    if recipe["granularity"] == "token_thread":  # whose kernels with the LSE are others
        use(OPS.varlen_sdpa(*packed, causal, **recipe))
    if not wild_lengths:
        return
    for edges in ((wild, wild), (packed.cu_seqlens_q, wild), (wild, packed.cu_seqlens_k)):
        OPS.varlen_sdpa_with_lse(*packed[:3], *edges, *packed[5:], causal, **recipe)


def call_packed_hopper(shape: Shape, dtype: torch.dtype, causal: str) -> None:
    for exponential in EXPONENTIALS:
        recipe = {**RECIPE, "smooth": "kv", "exponential": exponential}
        call_packed(recipe, shape, dtype, causal)
    if max(shape[2:]) <= MOST_OF_HALF:
        call_packed({**HALF, "smooth": "k"}, shape, dtype, causal)


def call_packed_mma(member: Member, shape: Shape, dtype: torch.dtype, causal: str) -> None:
    for granularity, smooth in (("thread", "k"), ("tensor", "qkv")):
        call_packed(member.recipe(granularity, smooth), shape, dtype, causal)


def use(*results: Tensor) -> None:
    """Read every element, so that initcheck sees those that nobody wrote."""
    for result in results:
        if result.isnan().any():
            raise RuntimeError(f"results must be numbers, got {result}")


def call_rotary(shape: Shape, dtype: torch.dtype, causal: str) -> None:
    """Run what norms and rotates, which takes heads of 64 and 128 channels in 16 bits."""
    n, m, d, dv = shape
    if dtype is torch.float32 or d not in ROTARY_HEAD_DIMS:
        return
    q, k, v = (
        torch.randn(1, heads, tokens, channels, device="cuda").to(dtype)
        for heads, tokens, channels in ((6, n, d), (2, m, d), (2, m, dv))
    )
    weight = torch.rand(1, d, device="cuda").to(dtype)
    tables = [
        (torch.randn(1, x.shape[2], d, device="cuda"), torch.randn(1, x.shape[2], d, device="cuda"))
        for x in (q, k)
    ]
    for pairing, eps in itertools.product(PAIRINGS, (None, 1e-6)):
        of_query, of_key = ((*table, None, weight, eps) for table in tables)
        operands = (q, k, v, *of_query, *of_key, None, causal)
        recipe = {**RECIPE, "smooth": "kv", "exponential": "mixed"}
        use(OPS.rotary_sdpa(*operands, pairing=pairing, **recipe))


def call_triton(dtype: torch.dtype, causal: str, wild_lengths: bool) -> None:
    """Run Triton's kernels, which the library calls for recipes that are none of its own."""
    q, k, v = (
        torch.randn(1, heads, tokens, 64, device="cuda").to(dtype)
        for heads, tokens in ((4, 200), (2, 300), (2, 300))
    )
    recipe = SUPPORT["cuda"].default.op_kwargs()
    use(*OPS.sdpa_with_lse(q, k, v, None, causal, **recipe))
    if causal == "none":
        use(OPS.sdpa(q, k, v, torch.rand(200, 300, device="cuda") > 0.5, **recipe))
    call_packed(recipe, (200, 300, 64, 64), dtype, causal, wild_lengths)


def call_split(shape: Shape, dtype: torch.dtype, causal: str) -> None:
    """Run few queries on prepared keys, whose heads are packed or not, with masks and without."""
    n, m, d, dv = shape
    q = torch.randn(2, 4, n, d, device="cuda").to(dtype)
    k, v = (torch.randn(2, 2, m, channels, device="cuda").to(dtype) for channels in (d, dv))
    operands = (*OPS.prepare_kv(k, v), m, dv)
    use(*OPS.attention_prepared_with_lse(q, *operands, None, causal))
    if causal == "none":
        visible = torch.rand(n, m, device="cuda") > 0.5
        for mask in (visible, visible.to(dtype)):
            use(OPS.attention_prepared(q, *operands, mask))


def call_many(causal: str) -> None:
    """Run more than twice as many heads as there are multiprocessors.

    A block then takes a third piece of work, which lies in shared memory where its first one did.
    """
    heads = torch.cuda.get_device_properties().multi_processor_count + 12
    many = torch.randn(2, heads, 130, 64, device="cuda").bfloat16()
    use(OPS.sdpa(many, many, many, None, causal, **RECIPE, smooth="kv", exponential="mixed"))


HOPPER: dict[str, Callable[[Shape, torch.dtype, str], None]] = {
    "hopper": call,
    "rotary": call_rotary,
    "packed-hopper": call_packed_hopper,
    "split": call_split,
}
SHAPES_OF = {"rotary": SHAPES, "split": SPLIT}
BY_MEMBER: dict[str, Callable[[Member, Shape, torch.dtype, str], None]] = {
    "mma": call_mma,
    "packed-mma": call_packed_mma,
}
FAMILIES = [*HOPPER, *BY_MEMBER, "triton"]


def main() -> None:
    """Run the list of the families that are named, by default of all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", metavar="family", help=", ".join(FAMILIES))
    parser.add_argument("--short", action="store_true", help="a part of them")
    parser.add_argument("--valid", action="store_true", help="no lengths without sense for Triton")
    arguments = parser.parse_args()
    families = arguments.families or FAMILIES
    if unknown := set(families) - set(FAMILIES):
        parser.error(f"family must be one of {FAMILIES}, got {sorted(unknown)}")
    modes = [*itertools.product(DTYPES, CAUSAL)]
    for family in families:
        if family in HOPPER:
            shapes = SHAPES_OF.get(family, (*SHAPES, WIDE))
            for i, shape in enumerate(shapes):
                turned = CAUSAL[i % 3 :] + CAUSAL[: i % 3]
                pairs = zip(DTYPES, turned, strict=True)
                for mode in pairs if arguments.short else modes:
                    HOPPER[family](shape, *mode)
            continue
        if family == "triton":
            for dtype, causal in zip(DTYPES, CAUSAL, strict=True):
                call_triton(dtype, causal, not arguments.valid)
            continue
        for i, shape in enumerate((*SHAPES, WIDE)):
            for j, member in enumerate(MEMBERS):
                turn = (4 * i + j) % len(modes)
                for mode in modes[turn : turn + 1] if arguments.short else modes:
                    BY_MEMBER[family](member, shape, *mode)
    if "hopper" in families:
        for causal in CAUSAL:
            call_many(causal)
    torch.cuda.synchronize()
    print("done")  # noqa: T201  # a script: what it is asked for


if __name__ == "__main__":
    main()
