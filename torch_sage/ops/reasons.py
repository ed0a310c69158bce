"""Why an input is not computed by torch_sage: the codes that counters, reports and tests use."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class ReasonCode(str, Enum):
    """Why exact SDPA runs instead; the value is the counter name, ``doc`` its explanation."""

    doc: str

    def __new__(cls, value: str, doc: str) -> ReasonCode:
        """Attach ``doc`` to the string ``value``."""
        code = str.__new__(cls, value)
        code._value_ = value
        code.doc = doc
        return code

    def __str__(self) -> str:
        """Return the bare code, as it appears in counters and JSON."""
        return str(self.value)

    EXTENSION_NOT_BUILT = (
        "extension_not_built",
        "The native library is absent or did not load; the message says which.",
    )
    DEVICE_UNSUPPORTED = (
        "device_unsupported",
        "No kernel exists for this kind of device, or this GPU.",
    )
    DEVICE_MISMATCH = ("device_mismatch", "The tensors are on different devices.")
    DTYPE_UNSUPPORTED = ("dtype_unsupported", "The dtype is not float32, bfloat16 or float16.")
    DTYPE_MISMATCH = ("dtype_mismatch", "query, key and value have different dtypes.")
    RANK = ("rank", "The tensors are not all 4-D, and not all 3-D.")
    LAYOUT = ("layout", "A tensor is nested, sparse, quantized or of a foreign subclass.")
    REQUIRES_GRAD = ("requires_grad", "A gradient is wanted; quantized attention has none.")
    DROPOUT = ("dropout", "dropout_p is not zero.")
    HEAD_DIM = ("head_dim", "A head dimension of query/key or of value is outside 1…256.")
    HEADS = ("heads", "key and value have different numbers of heads.")
    MASK_REQUIRES_GRAD = ("mask_requires_grad", "A gradient of attn_mask is wanted.")
    MASK_DTYPE = ("mask_dtype", "attn_mask is not bool, float32, bfloat16 or float16.")
    RECIPE_UNSUPPORTED = (
        "recipe_unsupported",
        "The device has no kernel for the configured recipe; the message lists the legal values.",
    )
    BELOW_CROSSOVER = (
        "below_crossover",
        "Exact SDPA was measured to be faster at this size (dispatch='measured').",
    )
    EMPTY = ("empty", "There is nothing to compute: a dimension is zero.")
    INVALID_INPUT = (
        "invalid_input",
        "The arguments contradict each other; the eager API raises ValueError instead.",
    )


class Reason(NamedTuple):
    """One reason why an input is not supported."""

    code: str
    """A value of ``ReasonCode``, for counters and tests."""

    message: str
    """What was expected and what arrived, for people."""
