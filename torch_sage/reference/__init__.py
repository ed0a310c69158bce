"""The specification as readable torch code: every kernel is tested against this package.

Plain torch, no extension, no autograd. ``quantize.py`` holds the quantizers (kernels must match
them bit for bit), ``operands.py`` what they make of the arguments, ``accumulate.py`` the formats of
P and the accumulators of tensor cores, ``attention.py`` the attention itself, ``grouped.py`` that
with scales of V per group of keys.

Where algorithm.md leaves a choice, it is made and documented here:

* A row that attends to no key reads nothing: output 0 and lse -inf, even where its query, the keys
  or a V channel are not finite (E11 before 2.10.3).
* ``-inf`` in a float mask hides a key exactly like False in a bool mask: by selection, so a hidden
  key poisons nothing by its score (its value still poisons its channel, as in torch).
* A finite float mask stays finite when it is converted to base 2: ``torch.finfo(dtype).min`` in a
  whole row, as transformers writes it, is a uniform row, not a hidden one (2.10.2). Its lse
  saturates at -ln 2 * 3.4e38.
* Half-precision V saturates at the largest finite bf16; a value beyond the largest fp16 poisons its
  channel (overflow must show, and bf16 loses nothing by saturating).
* The output is a convex combination of V, so where rounding V carries a finite result past the
  largest number of the output's type (fp16 65504 is 65536 in bf16), it saturates there.
* The row sum is taken from the rounded P for 16-bit and INT8 P, from the unrounded P for FP8 P
  (2.6); the lse always from the unrounded P. With scales of V per group of keys the accumulator
  itself sums the rounded P, as it sums P V.
* V that is not finite poisons its channel; with scales per group of keys, in the rows whose last
  visible key lies in that group or behind it.

Source: SageAttention (arXiv 2410.02367), SageAttention2 (arXiv 2411.10958), SageAttention2++
(arXiv 2505.21136).
"""

from torch_sage.reference.attention import AttentionOutput, attention, varlen_attention
from torch_sage.reference.quantize import (
    key_groups,
    pack_int4,
    quantize_key,
    quantize_query,
    quantize_value,
    query_groups,
    smooth_query,
    token_mean,
    unpack_int4,
)

__all__ = [
    "AttentionOutput",
    "attention",
    "key_groups",
    "pack_int4",
    "quantize_key",
    "quantize_query",
    "quantize_value",
    "query_groups",
    "smooth_query",
    "token_mean",
    "unpack_int4",
    "varlen_attention",
]
