"""Why something that looks like attention is not rewritten: what no tensor argument can tell.

What the op itself cannot compute is judged by ``why_not``; these are about the graph around it.
"""

from __future__ import annotations

from torch_sage.ops.reasons import Reason

WEIGHTS_USED = Reason(
    "weights_used", "The scores or attention weights are used elsewhere, so they must exist."
)
WEIGHTS_MODIFIED = Reason(
    "weights_modified", "The attention weights are changed between softmax and value."
)
WEIGHTS_DROPOUT = Reason("dropout", "The attention weights go through dropout.")
SOFTMAX_DIM = Reason("softmax_dim", "softmax must run over the key tokens, got another dimension.")
SCORE_OP = Reason(
    "score_op", "The scores must only be scaled, masked and cast between the matmul and softmax."
)
SCORE_SCALE = Reason(
    "score_scale",
    "The scores must be scaled by the same for all keys, by a positive number where masked before.",
)
MASK_FILL = Reason("mask_fill", "Masked scores must be replaced by a constant of at most -1e4.")
MASK_LAYOUT = Reason(
    "mask_layout", "The mask or an operand does not split into batch and heads as the scores do."
)


class Unsupported(Exception):
    """Attention that cannot be expressed; carries the reason."""

    def __init__(self, reason: Reason) -> None:
        """Keep ``reason``."""
        super().__init__(reason.message)
        self.reason = reason


VARLEN_KIND = Reason(
    "varlen_kind", "Packed attention with a window, a length in use, or pages has no kernel."
)
