"""The Hadamard rotation of Q and K: what it is, what it is good for, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import torch_sage
from benchmarks.gpu import problem
from tests.numerics import exact_attention, relative_l1, same_bits
from tests.varlen import starts
from torch_sage import SageConfig
from torch_sage.ops import hadamard
from torch_sage.recipes import SUPPORT
from torch_sage.reference import attention as oracle

PLAIN = SageConfig(dispatch="always", on_unsupported="error")
ROTATING = PLAIN.with_options(rotation="hadamard")
CPU = SUPPORT["cpu"].default
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def qkv(n: int, head_dim: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return tensors with tokens before heads in memory, as models have them."""
    torch.manual_seed(0)
    return [torch.randn(2, n, 4, head_dim, dtype=dtype).transpose(1, 2) for _ in range(3)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2, 4, 8, 16, 32, 64, 128, 256])
def test_the_matrix_is_orthogonal(size: int, dtype: torch.dtype) -> None:
    h = hadamard.matrix(size, dtype, torch.device("cpu")).double() * size
    assert torch.equal(h.abs(), torch.ones(size, size).double())
    assert torch.equal(h, h.T)
    assert torch.equal(h @ h, size * torch.eye(size).double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("head_dim", "block"), [(64, 64), (80, 16), (96, 32), (128, 128), (192, 64), (256, 256), (6, 2)]
)
def test_numbers_that_fit_the_dtype_are_rotated_exactly(
    head_dim: int, block: int, dtype: torch.dtype
) -> None:
    """Scores of small integers are the same bits before and after; blocks stay apart."""
    torch.manual_seed(0)
    q, k = (torch.randint(-1, 2, (2, 3, 9, head_dim)).to(dtype) for _ in range(2))
    rotated, keys, scale = hadamard.rotated("hadamard", q, k, 0.25)
    assert scale == 0.25 * block
    assert rotated.dtype == dtype and rotated.shape == q.shape
    scores = rotated.double() @ keys.double().mT * scale
    assert torch.equal(scores, q.double() @ k.double().mT * 0.25)
    channel = torch.zeros(1, 1, 1, head_dim, dtype=dtype)
    channel[..., -1] = 1
    spread = hadamard.rotate(channel).flatten().abs()
    assert torch.equal(
        spread, F.pad(torch.full((block,), 1 / block), (head_dim - block, 0)).to(dtype)
    )


def test_nothing_overflows() -> None:
    """A rotation that kept lengths would make fp16 infinite here."""
    largest = torch.full((1, 1, 3, 64), 65504.0, dtype=torch.float16)
    assert torch.equal(hadamard.rotate(largest)[..., 0], largest[..., 0])


@pytest.mark.parametrize("axes", [(0, 1, 2), (0, 2, 1), (1, 2, 0)])
def test_any_strides(axes: tuple[int, int, int]) -> None:
    x = torch.randn(3, 4, 5, 32).permute(*axes, 3)
    expected = x.contiguous() @ hadamard.matrix(32, x.dtype, x.device)
    assert torch.equal(hadamard.rotate(x), expected)
    assert torch.equal(hadamard.rotate(x[0]), expected[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_result_is_the_oracles_on_rotated_operands(dtype: torch.dtype) -> None:
    q, k, v = qkv(130, 64, dtype)
    turned = hadamard.rotated("hadamard", q, k, None)
    found = torch_sage.scaled_dot_product_attention(q, k, v, config=ROTATING)
    same = torch_sage.scaled_dot_product_attention(*turned[:2], v, scale=turned[2], config=PLAIN)
    assert same_bits(found, same) and found.stride() == q.stride()
    expected = oracle(
        *turned[:2], v, scale=turned[2], precision="exact", smooth_block=130,
        qk=CPU.qk, granularity=CPU.granularity, pv=CPU.pv, smooth=CPU.smooth,
    ).output  # fmt: skip
    # Both round P to bf16 and the output to its dtype; the scores are the same.
    assert relative_l1(found, expected) < 2**-8


@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_loud_channels_cost_half_when_rotated(head_dim: int) -> None:
    """The data of the benchmark: every 16th channel of K and V is 8 times as large."""
    task = problem.make((1, 2, 512, head_dim), False, "channel outliers", "cpu")
    exact = exact_attention(*task[:3]).output
    plain, rotated = (
        relative_l1(torch_sage.scaled_dot_product_attention(*task[:3], config=config), exact)
        for config in (PLAIN, ROTATING)
    )
    assert rotated < 0.6 * plain


def test_the_lse_is_that_of_the_scores() -> None:
    q, k, v = qkv(70, 64)
    k = k + 5  # what smoothing takes out of the codes, and adds to the LSE
    found = torch_sage.attention_with_lse(q, k, v, config=ROTATING, causal="top_left")
    exact = exact_attention(q, k, v, causal="top_left")
    assert relative_l1(found.output, exact.output) < 0.02
    assert (found.lse - exact.lse).abs().max() < 0.05  # INT8 moves it by .02 (algorithm.md 2.8)


def test_packed_sequences_are_rotated() -> None:
    q, k, v = (x[:1] for x in qkv(70, 64, torch.bfloat16))
    packed = [x[0].transpose(0, 1) for x in (q, k, v)]
    bounds = starts([30, 40])
    found = torch_sage.varlen_attention(*packed, bounds, bounds, 40, 40, config=ROTATING)
    for rows in (slice(0, 30), slice(30, 70)):
        parts = (x[:, :, rows] for x in (q, k, v))
        alone = torch_sage.scaled_dot_product_attention(*parts, config=ROTATING)
        assert same_bits(found[rows], alone[0].transpose(0, 1))
    plain = torch_sage.varlen_attention(*packed, bounds, bounds, 40, 40, config=PLAIN)
    assert not torch.equal(found, plain)


def test_prepared_keys_know_their_rotation(hopper: None) -> None:
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(1, 2, 130, 64, device="cuda")
        seen: dict[str, Any] = {}

        class Calls(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(
                self, func: Any, types: Any, args: Any, kwargs: Any = None
            ) -> Any:
                seen[str(func)] = args
                return func(*args, **(kwargs or {}))

        with Calls():
            prepared = torch_sage.prepare_kv(x, x, ROTATING)
            output = torch_sage.attention_prepared(x, prepared, scale=0.5, config=ROTATING)
        assert prepared.rotation == "hadamard" and output.shape == x.shape
        assert seen["torch_sage.prepare_kv.default"][0] is not x
        arguments = seen["torch_sage.attention_prepared.default"]
        assert arguments[0] is not x and arguments[11] == 32
        for config, other in ((None, prepared), (ROTATING, prepared._replace(rotation="none"))):
            with pytest.raises(ValueError, match="config must have the rotation of prepared, '"):
                torch_sage.attention_prepared(x, other, config=config)
        odd = torch.empty(1, 2, 130, 65, device="cuda")
        with pytest.raises(NotImplementedError, match="head_dim must be even for rotation"):
            torch_sage.prepare_kv(odd, odd, ROTATING)


def test_odd_head_dims_are_refused() -> None:
    q, k, v = qkv(9, 65)
    message = "head_dim must be even for rotation='hadamard', got 65"
    [reason] = torch_sage.why_not(q, k, v, config=ROTATING)
    assert (reason.code, reason.message) == ("recipe_unsupported", message)
    with pytest.raises(NotImplementedError, match=message):
        torch_sage.scaled_dot_product_attention(q, k, v, config=ROTATING)
    fallback = ROTATING.with_options(on_unsupported="fallback")
    found = torch_sage.scaled_dot_product_attention(q, k, v, config=fallback)
    assert torch.equal(found, F.scaled_dot_product_attention(q, k, v))
    packed, bounds = q[0].transpose(0, 1), starts([9])
    with pytest.raises(NotImplementedError, match=message):
        torch_sage.varlen_attention(packed, packed, packed, bounds, bounds, 9, 9, config=ROTATING)
