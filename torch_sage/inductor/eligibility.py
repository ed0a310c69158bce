"""May this match be rewritten? ``why_not`` on the graph's fake tensors; adds no guard.

Only shapes, dtypes, strides and devices of fake values count. They follow from the graph and its
inputs, which cache keys cover; other node annotations are in no key, so nothing here reads them.
"""

from __future__ import annotations

from typing import Any

from torch_sage.config import SageConfig
from torch_sage.crossover import prefers_exact
from torch_sage.devices import rows_of
from torch_sage.inductor.graph_utils import tensor, val
from torch_sage.inductor.patterns.match import Match, PackedMatch
from torch_sage.ops import checks, packed
from torch_sage.ops.checks import largest_head_dim
from torch_sage.ops.dispatch import hint, why_not
from torch_sage.ops.reasons import Reason, ReasonCode
from torch_sage.recipes import Recipe, choose_row
from torch_sage.varlen import choose_recipe

TRAINING = Reason("training", "The graph is differentiated; quantized attention has no gradient.")
LSE_USED = Reason("lse_used", "Another output than the attention itself is used, such as its LSE.")
TORCH_FUSION = Reason(
    "torch_fusion",
    "Inductor's own fuse_attention made this node in a graph with a softmax over another dimension "
    "than the last, which it takes for one over the last.",
)
EXCLUDED = Reason("excluded", "A module or function around it is marked with exclude.")
SCALE_UNKNOWN = Reason("scale_unknown", "scale must be a number known at compile time.")
OUTPUT_LAYOUT = Reason(
    "output_layout", "The output's strides have gaps, which a copy would not reproduce."
)


NOT_FASTER = Reason(
    ReasonCode.BELOW_CROSSOVER,
    "packed sequences must be of an average length at which ours were measured to be faster than "
    "torch's; dispatch='always' ignores this",
)


def reasons_against_packed(
    match: PackedMatch, config: SageConfig
) -> tuple[Recipe | None, tuple[Reason, ...]]:
    """Return the recipe to compute ``match`` with, or every reason not to."""
    tensors = [tensor(x) for x in match.operands[:5]]
    longest = [x if isinstance(x, int) else val(x) for x in match.operands[5:]]
    arguments: tuple[Any, ...] = (*tensors, *longest, match.causal, match.scale)
    problems = packed.rank_problems(*arguments[:5]) or list(packed.contradictions(*arguments))
    reasons = [Reason(ReasonCode.INVALID_INPUT, problem) for problem in problems]
    query, key, value = tensors[:3]
    if not reasons:
        reasons += checks.limits(query, key, value, None)
    recipe, against = choose_recipe(query, value, config)
    reasons += against
    if not reasons and config.dispatch == "measured":
        heads_q, head_dim = (hint(size) for size in query.shape[1:])
        sequences = max(hint(tensors[3].shape[0]) - 1, 1)
        if prefers_exact(
            choose_row(config, rows_of(query.device), query.dtype, largest_head_dim(query, value)),
            "packed" if match.causal == "none" else "packed causal",
            batch=sequences,
            heads_q=heads_q,
            seqlen_q=hint(query.shape[0]) // sequences,
            seqlen_k=hint(key.shape[0]) // sequences,
            head_dim=head_dim,
            head_dim_v=hint(value.shape[2]),
        ):
            reasons.append(NOT_FASTER)
    return (None if reasons else recipe), tuple(reasons)


def reasons_against(match: Match, config: SageConfig) -> tuple[Reason, ...]:
    """Return every reason not to compute ``match`` by torch_sage; empty means it may be."""
    return why_not(
        tensor(match.query),
        tensor(match.key),
        tensor(match.value),
        None if match.attn_mask is None else tensor(match.attn_mask),
        match.dropout_p,
        False,
        match.scale,
        True,
        config=config,
        causal=match.causal,
    )
