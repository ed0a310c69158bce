"""Random calls of the whole op against the oracle: what no list of cases would combine.

5,000 examples, the same ones at every run. Hypothesis prints a failing case, which is a line for
the list in tests/cases.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import torch_sage  # noqa: F401  (defines the ops)
from tests.cases import DTYPES, AttentionCase, Poison, make_inputs, poison
from tests.ops.test_kernels import GRANULARITIES, LAYOUTS, assert_kernel_is_right
from torch_sage import _extension
from torch_sage.recipes import SUPPORT

pytestmark = pytest.mark.skipif(
    not _extension.is_available(), reason=_extension.unavailable_reason() or ""
)
EXAMPLES = 1000  # of each granularity

# Short sequences find the errors of tails; long K crosses tiles of 64, 128 and 256.
QUERIES = st.one_of(st.integers(0, 20), st.integers(0, 80))
KEYS = st.one_of(
    st.integers(0, 20), st.integers(0, 140), st.sampled_from([255, 256, 257, 258, 320, 513])
)
HEAD_DIMS = st.one_of(st.integers(1, 36), st.sampled_from([40, 63, 64, 65, 72, 80, 96, 128, 256]))
HEADS = st.sampled_from([(1, 1), (2, 2), (2, 1), (3, 1), (4, 2), (6, 3)])
SCALES = st.one_of(st.none(), st.sampled_from([0.0, 1.0, -0.3, 1e-3]), st.floats(-1, 1))
MASKS = (
    "bool", "bool_2d", "bool_hidden_rows", "bool_all_hidden", "bool_late", "key_padding", "float",
    "float32", "float_row", "float_column", "float_inf", "float_hidden_rows", "float_min",
    "float_min_rows", "alibi", "transposed",
)  # fmt: skip
DATA = (
    "channel_bias", "outlier_channel", "outlier_row", "uneven", "sink", "one_hot", "uniform",
    "constant_key", "zero_rows", "zero_channels", "zero", "subnormal", "tiny_half",
)  # fmt: skip
# Finite ones up to 1e4: beyond that the lse is a small difference of scores and of Q . mean(K).
NUMBERS = st.sampled_from([float("nan"), float("inf"), float("-inf"), 1e4, -1e4, 1e-42, -0.0])


@st.composite
def cases(draw: st.DrawFn, granularity: str) -> AttentionCase:
    heads_q, heads_kv = draw(HEADS)
    mask = draw(st.one_of(st.just("none"), st.sampled_from(MASKS)))
    corners = ["none"] if mask != "none" else ["none", "top_left", "bottom_right"]
    return AttentionCase(
        batch=draw(st.integers(1, 2)),
        heads_q=heads_q,
        heads_kv=heads_kv,
        seqlen_q=draw(QUERIES),
        seqlen_k=draw(KEYS),
        head_dim=draw(HEAD_DIMS),
        head_dim_v=draw(HEAD_DIMS),
        dtype=draw(st.sampled_from(list(DTYPES))),
        causal=draw(st.sampled_from(corners)),
        mask=mask,
        scale=draw(SCALES),
        granularity=granularity,
        smooth=draw(st.sampled_from(SUPPORT["cpu"].smooth)),
        data=draw(st.one_of(st.just("normal"), st.sampled_from(DATA))),
        layout=draw(st.sampled_from(LAYOUTS)),
    )


@st.composite
def poisons(draw: st.DrawFn) -> Poison:
    position = tuple(draw(st.integers(0, 5000)) for _ in range(4))
    return Poison(draw(st.integers(0, 2)), position, draw(NUMBERS))  # type: ignore[arg-type]


def wrap(what: Poison, shape: torch.Size) -> Poison:
    """Take the position modulo the shape."""
    return what._replace(index=tuple(i % n for i, n in zip(what.index, shape, strict=True)))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small tensors wait longer for a second thread than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_random_calls_are_within_budget(granularity: str) -> None:
    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(granularity), st.one_of(st.none(), st.none(), poisons()))
    def check(case: AttentionCase, what: Poison | None) -> None:
        inputs = make_inputs(case)
        if what is not None and inputs[what.operand].numel():
            inputs = poison(inputs, wrap(what, inputs[what.operand].shape))
        assert_kernel_is_right(case, inputs)

    check()
