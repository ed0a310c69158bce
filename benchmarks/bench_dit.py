"""Diffusion transformers under torch.compile: time of a step with each attention, in bf16.

A CogVideoX-1.5-5B- and a FLUX.1-shaped transformer of diffusers, random weights, two layers of each
kind, at about 4k, 17k and 45k tokens; a step is one forward pass. As diffusers recommends, the
layers are compiled; those of one kind and the same strides of inputs share a graph. ``default`` is
torch's SDPA, ``sage`` the same model with ``options=torch_sage.options(...)``, ``fa3`` with
FlashAttention-3 (bf16) in SDPA's place, left out where it is not installed. Medians of the device's
time, contenders in turn. The cosine is that of the output with the default's; the one of "none",
where attention returns zeros, shows how much of the output attention decides at all. ``rewritten``
counts attention nodes of compiled graphs, from torch_sage's report.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import torch_sage
from benchmarks import bench_gpu, harness
from benchmarks.gpu import dit
from benchmarks.gpu.contender import module, nothing
from benchmarks.gpu.timing import Timing

Record = dict[str, Any]
# A fault moves the output by a good part of what attention does; a format by a thousandth of it.
MOST_LOSS = 0.1


class Contender(NamedTuple):
    """One attention in a model."""

    lack: Callable[[], str | None]
    """Say why it cannot run here, if it cannot."""
    options: Callable[[torch_sage.SageConfig], dict[str, Any] | None]
    """Options of torch.compile."""
    context: Callable[[], AbstractContextManager[Any]]
    """Where the model is compiled and called."""


@torch.library.custom_op("torch_sage_benchmarks::fa3", mutates_args=())
def fa3(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """FlashAttention-3, which takes and returns [B, L, H, D]."""
    from flash_attn_interface import flash_attn_func

    return flash_attn_func(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)


@fa3.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[3]).transpose(1, 2)


def _without_attention(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    return torch.zeros_like(query)


def _fa3_sdpa(query: Tensor, key: Tensor, value: Tensor, **others: Any) -> Tensor:
    if any(argument is not None and argument for argument in others.values()):
        raise NotImplementedError(f"others must be SDPA's defaults, got {others}")
    return fa3(query, key, value)


def _sdpa_is(function: Callable[..., Tensor]) -> AbstractContextManager[Any]:
    return mock.patch.object(F, "scaled_dot_product_attention", function)


CONTENDERS = {
    "default": Contender(nothing, lambda _: None, nullcontext),
    "sage": Contender(nothing, torch_sage.options, nullcontext),
    "fa3": Contender(module("flash_attn_interface"), lambda _: None, lambda: _sdpa_is(_fa3_sdpa)),
}


class Ready(NamedTuple):
    """A compiled contender."""

    step: Callable[[], Tensor]
    output: Tensor
    compile_seconds: float
    rewritten: int
    skipped: int
    reasons: dict[str, int]
    """Why, by code."""


def prepare(built: dit.Built, contender: Contender, config: torch_sage.SageConfig) -> Ready:
    """Compile the model and run it once."""
    compiled = built.with_compiled_layers(dynamic=False, options=contender.options(config))

    def step() -> Tensor:
        with contender.context():
            return compiled(**built.inputs, return_dict=False)[0]

    before = torch_sage.report()
    start = time.perf_counter()
    output = step()
    seconds = time.perf_counter() - start
    after = torch_sage.report()
    return Ready(
        step,
        output,
        seconds,
        after.rewritten - before.rewritten,
        after.skipped - before.skipped,
        dict(after.reasons - before.reasons),
    )


def cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine of two outputs as vectors."""
    return float(F.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


def time_steps(ready: dict[str, Ready], device: str, seconds: float) -> dict[str, Timing]:
    """Return the milliseconds of a step of each."""
    if device == "cuda":
        times = bench_gpu.time_all({n: {"step": r.step} for n, r in ready.items()}, seconds)
        return {name: calls["step"] for name, calls in times.items()}
    runs = {name: lambda _, step=r.step: step() for name, r in ready.items()}
    nan = float("nan")
    return {
        name: Timing(t.median * 1e3, t.low * 1e3, t.high * 1e3, t.calls, nan, nan)
        for name, t in harness.time_paired(runs, None, seconds).items()
    }


def measure(
    name: str,
    size: str,
    names: list[str],
    device: str,
    config: torch_sage.SageConfig,
    seconds: float,
) -> Record:
    """Compile, compare and time the contenders on one model of one size."""
    torch._dynamo.reset()
    built = dit.build(name, size, device, torch.bfloat16)
    ready: dict[str, Ready] = {}
    problems: dict[str, str] = {}
    for contender in names:
        try:
            ready[contender] = prepare(built, CONTENDERS[contender], config)
        except Exception as failure:  # one that fails must not end the run of the others
            if contender == "default":
                raise
            problems[contender] = f"{type(failure).__name__}: {str(failure)[:300]}"
    expected = ready["default"].output
    with _sdpa_is(_without_attention):
        zeroed = built.module(**built.inputs, return_dict=False)[0]
    without = cosine(zeroed, expected)
    cosines = {contender: cosine(r.output, expected) for contender, r in ready.items()}
    for contender, value in cosines.items():
        if not 1 - value <= MOST_LOSS * (1 - without):
            del ready[contender]
            problems[contender] = f"wrong: cosine {value:.6f}"
    times = time_steps(ready, device, seconds)
    contenders: dict[str, Record] = {n: {"problem": problem} for n, problem in problems.items()}
    for contender, r in ready.items():
        contenders[contender] = {
            "time": times[contender]._asdict(),
            "speedup": times["default"].median / times[contender].median,
            "cosine": cosines[contender],
            "rewritten": r.rewritten,
            "skipped": r.skipped,
            "reasons": r.reasons,
            "compile_seconds": r.compile_seconds,
        }
    return {
        "model": name,
        "tokens": built.tokens,
        "cosine_without_attention": without,
        "contenders": contenders,
    }


HEAD = (
    "| model | tokens | attention | ms a step | speed-up | cosine | rewritten | compile |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
)


def rows(record: Record) -> str:
    """Return the lines of the table for one record."""
    case = f"| {record['model']} | {record['tokens']}"
    lines = []
    for name, c in record["contenders"].items():
        if "problem" in c:
            lines.append(f"{case} | {name} | {c['problem']} | - | - | - | - |")
            continue
        why = "".join(f", {count} {code}" for code, count in c["reasons"].items())
        lines.append(
            f"{case} | {name} | {c['time']['median']:.2f} | {c['speedup']:.2f}x "
            f"| {c['cosine']:.6f} | {c['rewritten']} of {c['rewritten'] + c['skipped']}{why} "
            f"| {c['compile_seconds']:.1f} s |"
        )
    lines.append(f"{case} | none | - | - | {record['cosine_without_attention']:.6f} | - | - |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=dit.MODELS, default=list(dit.MODELS))
    parser.add_argument("--tokens", nargs="+", choices=dit.TOKENS, default=list(dit.TOKENS))
    parser.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME"
    )
    parser.add_argument(
        "--dispatch",
        choices=["measured", "always"],
        default="measured",
        help="whether torch_sage leaves SDPA where it was measured to be faster",
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="one tiny size of each model instead")
    parser.add_argument("--seconds", type=float, default=0.4, help="time spent on each contender")
    parser.add_argument("--limit", type=float, default=85, help="start no case after this")
    parser.add_argument("--json", type=Path, help="write it after every case")
    arguments = parser.parse_args()
    start = time.perf_counter()
    stamp = bench_gpu.environment() if arguments.device == "cuda" else harness.environment()
    print(" ".join(f"{name}={value}" for name, value in stamp.items()), flush=True)
    config = torch_sage.SageConfig(dispatch=arguments.dispatch)
    # Speed-ups and cosines are relative to the default: it always runs, and first.
    names = ["default"]
    for name in arguments.contenders:
        if lack := CONTENDERS[name].lack():
            print(f"without {name}: {lack}", flush=True)
        elif name not in names:
            names.append(name)
    records: list[Record] = []
    print(HEAD, flush=True)
    for size in ["tiny"] if arguments.tiny else arguments.tokens:
        for name in arguments.models:
            seconds = time.perf_counter() - start
            if seconds > arguments.limit:
                print(f"left out at {seconds:.0f} s: {name} {size}", flush=True)
                continue
            with torch.no_grad():
                records.append(
                    measure(name, size, names, arguments.device, config, arguments.seconds)
                )
            print(rows(records[-1]), flush=True)
            if arguments.json:
                text = json.dumps({"environment": stamp, "records": records}, indent=1)
                arguments.json.write_text(text + "\n")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
