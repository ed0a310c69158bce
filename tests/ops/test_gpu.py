"""Which kernels CUDA tensors meet: who registers what, what a GPU must have, which row it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import torch_sage
from tests.csrc.isas import run_python
from torch_sage import SageConfig, _extension, crossover, devices, ops
from torch_sage.config import PRESETS
from torch_sage.crossover import Crossover, Rule, prefers_exact
from torch_sage.distributed.call import accept
from torch_sage.ops import gpu
from torch_sage.ops.dispatch import why_not
from torch_sage.recipes import SUPPORT
from torch_sage.varlen import choose_recipe

ALWAYS = SageConfig(dispatch="always")
WHOLE = ("sdpa", "sdpa_with_lse", "varlen_sdpa", "varlen_sdpa_with_lse")
TRITONS = " ".join(f"triton_{name}" for name in WHOLE)
PARTS = {"quantize_query", "quantize_key", "quantize_value", "attention", "attention_with_lse"}

# The module that tells what the library was built for, put in its place before the package's own.
PRETEND = """
import importlib.util, sys, torch
from pathlib import Path
package = Path(importlib.util.find_spec("torch_sage").origin).parent
spec = importlib.util.spec_from_file_location("torch_sage._extension", package / "_extension.py")
module = importlib.util.module_from_spec(spec)
sys.modules["torch_sage._extension"] = module
spec.loader.exec_module(module)
module.cuda_gpus = lambda: {gpus}
from torch_sage.ops.schemas import LIBRARY
ours = sorted(name.split("/")[1] for name in LIBRARY._op_impls if name.endswith("/CUDA"))
print(*ours)
whole = {whole}
private = (*("triton_" + name for name in whole), "mma_prepare_kv")
print(*(name for name in private if hasattr(torch.ops.torch_sage, name)))
if {gpus}:
    for name in whole:
        schema = getattr(torch.ops.torch_sage, name).default._schema
        private = getattr(torch.ops.torch_sage, "triton_" + name).default._schema
        assert str(private.arguments) == str(schema.arguments), private
        assert len(private.returns) == len(schema.returns) + 1, private
        assert all(str(result.type) == "Tensor" for result in private.returns), private
"""


@pytest.mark.parametrize(
    ("gpus", "private"),
    [
        ({}, ""),
        ({"sm90": ("9.0",)}, TRITONS),
        ({"sm80": ("8.0",)}, f"{TRITONS} mma_prepare_kv"),
    ],
)
def test_the_library_runs_the_whole_op_on_cuda_where_it_has_kernels(
    gpus: dict[str, tuple[str, ...]], private: str
) -> None:
    done = run_python("-c", PRETEND.format(gpus=gpus, whole=WHOLE))
    assert done.returncode == 0, done.stderr
    ours, found = done.stdout.splitlines()
    whole = set(TRITONS.split()) if gpus else set(WHOLE)
    assert set(ours.split()) == PARTS | whole
    assert found == private


@pytest.mark.parametrize("name", ["sdpa", "sdpa_with_lse"])
def test_the_kernel_gets_every_argument_of_the_schema(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dispatcher leaves out trailing arguments that have their default."""
    triton_ops = pytest.importorskip("torch_sage.ops.triton_ops", reason="needs triton")
    monkeypatch.setattr(triton_ops, name, lambda **arguments: arguments)
    schema = getattr(ops, name)._schema
    q, k, v = torch.zeros(3, 1)
    found = gpu._kernel(name)(q, k, v, None, "top_left", exponential="mixed")
    assert list(found) != [] and set(found) == {argument.name for argument in schema.arguments}
    assert found["causal"] == "top_left" and found["exponential"] == "mixed"
    assert found["granularity"] == "token" and found["output_order"] == "bhsd"


@pytest.mark.parametrize("name", WHOLE)
def test_errors_of_the_kernel_reach_the_library_as_text(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No exception crosses torch's C interface: its caller said that a call failed, and no more."""
    triton_ops = pytest.importorskip("torch_sage.ops.triton_ops", reason="needs triton")
    count = len(getattr(ops, name)._schema.returns)
    errors: list[Exception] = []

    def run(query: Tensor, **arguments: Any) -> Any:
        if errors:
            raise errors.pop()
        return query if count == 1 else (query,) * count

    monkeypatch.setattr(triton_ops, name, run)
    kernel, x = gpu._kernel_of_library(name), torch.ones(1)

    def call() -> tuple[list[Tensor], str]:
        *results, told = kernel(x, x, x)
        assert told.device.type == "cpu" and told.dtype == torch.uint8
        return results, bytes(told.tolist()).decode()

    assert call() == ([x] * count, "")
    errors = [ValueError("key must be here, got there"), RuntimeError("out of memory")]
    results, text = call()
    assert "Traceback" in text and text.endswith("RuntimeError: out of memory\n")
    assert [result.shape for result in results] == [(0,)] * count
    assert call()[1] == "ValueError: key must be here, got there"


def fakes(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    with FakeTensorMode():
        q, k, v = torch.empty(3, 2, 4, 256, 64, dtype=dtype, device="cuda").unbind()
    return q, k, v


def codes(config: SageConfig) -> list[str]:
    return [reason.code for reason in why_not(*fakes(), config=config)]


def test_triton_is_asked_for_only_where_it_runs(
    hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = ALWAYS.with_options(granularity="token")
    monkeypatch.setattr(gpu, "find_spec", lambda name: object())
    assert codes(ALWAYS) == codes(token) == []
    gpu._lack.cache_clear()
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    assert codes(ALWAYS) == []
    (reason,) = why_not(*fakes(), config=token)
    assert reason.code == "device_unsupported"
    assert reason.message == "triton must be installed for attention on cuda"


def test_packed_sequences_run_by_triton_where_no_other_kernel_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_extension, "cuda_gpus", dict)
    monkeypatch.setattr(devices, "capability", lambda index: (8, 6))
    monkeypatch.setattr(gpu, "find_spec", lambda name: object())
    gpu._lack.cache_clear()
    with FakeTensorMode():
        query = torch.empty(10, 2, 200, dtype=torch.float16, device="cuda")
    recipe, reasons = choose_recipe(query, query, SageConfig())
    assert reasons == () and recipe is not None
    assert recipe.name == "int8.token_block/fp16/smooth-k"
    gpu._lack.cache_clear()
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    recipe, (reason,) = choose_recipe(query, query, SageConfig())
    assert recipe is None and reason.message == "triton must be installed for attention on cuda"
    gpu._lack.cache_clear()


@pytest.mark.parametrize(
    ("capability", "message"),
    [
        (None, "query must be on a GPU that torch can use, got none"),
        ((7, 5), "query must be on a GPU of compute capability 8.0 or more, got 7.5"),
        ((8, 0), None),
        ((12, 0), None),
    ],
)
def test_what_a_gpu_must_have(
    capability: Any, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "find_spec", lambda name: object())
    monkeypatch.setattr(devices, "capability", lambda index: capability)
    assert gpu._lack.__wrapped__(0, "cuda") == message


def test_refusals_name_the_values_of_every_row(hopper: None) -> None:
    (reason,) = why_not(*fakes(), config=ALWAYS.with_options(granularity="token", pv="e4m3"))
    assert reason.code == "recipe_unsupported"
    assert reason.message == (
        "granularity must be one of ['token_thread'] on cuda.sm90, got 'token' and "
        "pv must be one of ['e4m3_fp16'] on cuda.sm90, got 'e4m3', or "
        "granularity must be one of ['thread', 'warp', 'block', 'tensor'] on cuda.sm80, "
        "got 'token' and "
        "pv must be one of ['bf16', 'fp16', 'fp16_fp16'] on cuda.sm80, got 'e4m3', or "
        "granularity must be one of ['thread', 'warp', 'block', 'tensor'] on cuda.sm89, "
        "got 'token', or "
        "pv must be one of ['bf16', 'fp16'] on cuda, got 'e4m3'"
    )


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 7)])
def test_fp8_is_refused_where_the_gpu_has_none(
    capability: tuple[int, int], hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "capability", lambda index: capability)
    for preset in ("sage2_8b", "sage2_4b", "sage2pp_8b", "sage2pp_4b"):
        config = SageConfig.preset(preset).with_options(dispatch="always")
        (reason,) = why_not(*fakes(), config=config)
        assert reason.code == "recipe_unsupported"
        halves = "pv must be one of ['bf16', 'fp16', 'fp16_fp16'] on cuda.sm80, "
        assert reason.message.startswith(f"{halves}got {config.pv!r}, or ")
    assert codes(ALWAYS) == codes(SageConfig.preset("sage1").with_options(dispatch="always")) == []


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (12, 0), (12, 1)])
@pytest.mark.parametrize("preset", PRESETS)
def test_newer_gpus_run_every_preset(
    preset: str, capability: tuple[int, int], hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "capability", lambda index: capability)
    assert codes(SageConfig.preset(preset).with_options(dispatch="always")) == []


def test_wide_heads_run_by_the_next_row(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SUPPORT, "cuda.sm90", SUPPORT["cuda.sm90"]._replace(max_head_dim=63))
    assert codes(ALWAYS) == []
    (reason,) = why_not(*fakes(), config=ALWAYS.with_options(exponential="mixed"))
    assert reason.message == (
        "head_dim must be at most 63 on cuda.sm90, got 64, or "
        "exponential must be one of ['exact'] on cuda.sm80, got 'mixed', or "
        "exponential must be one of ['exact'] on cuda.sm89, got 'mixed', or "
        "exponential must be one of ['exact'] on cuda, got 'mixed'"
    )
    q, k, v = fakes()
    with q.fake_mode, pytest.raises(ValueError, match=r"head_dim must be at most 63 on cuda\.sm90"):
        ops.sdpa(q, k, v, **SUPPORT["cuda.sm90"].default.op_kwargs())


def test_the_measured_choice_is_the_rows_own(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = Rule(full=(), causal=(Crossover(0, 0),), masked=(), ragged=())
    monkeypatch.setitem(crossover.CROSSOVER, "cuda.sm90", rule)
    monkeypatch.setattr(gpu, "find_spec", lambda name: object())
    q, k, v = fakes()
    assert [r.code for r in why_not(q, k, v)] == ["below_crossover"]
    assert why_not(q, k, v, is_causal=True) == ()
    assert why_not(q, k, v, causal="bottom_right") == ()
    half = SageConfig(pv="half")  # by other kernels, which have a rule of their own
    assert [r.code for r in why_not(q, k, v, is_causal=True, config=half)] == ["below_crossover"]


def test_a_width_may_have_a_rule_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    always = (Crossover(0, 0),)
    batches = {"batch": 1, "heads_q": 1, "seqlen_q": 8, "seqlen_k": 8}
    monkeypatch.setitem(crossover.CROSSOVER, "cuda.sm90", Rule(always, (), (), ()))
    monkeypatch.setitem(crossover.CROSSOVER, "cuda.sm90.128", Rule((), always, (), ()))
    monkeypatch.setitem(crossover.CROSSOVER, "cuda.sm90.256", Rule((), (), always, ()))
    forms: dict[int, crossover.Form] = {64: "full", 128: "causal", 256: "masked"}
    for least, most in ((1, 64), (65, 128), (129, 256)):
        for width, form in forms.items():
            for head_dim, head_dim_v in ((least, 1), (1, most)):
                found = prefers_exact(
                    "cuda.sm90", form, **batches, head_dim=head_dim, head_dim_v=head_dim_v
                )
                assert found == (width != most)
    assert prefers_exact("cuda.sm90", "ragged", **batches, head_dim=256, head_dim_v=1)


@pytest.mark.parametrize(
    ("shape", "strides", "dtype", "is_ragged"),
    [
        ((4096, 4096), (4096, 1), torch.bool, False),
        ((4095, 4095), (4096, 1), torch.bool, False),
        ((4096, 4096), (4097, 1), torch.bool, True),
        ((4096, 4104), (4104, 1), torch.bool, True),
        ((4096, 4104), (4104, 1), torch.bfloat16, False),
        ((4096, 4096), (1, 4096), torch.bool, True),
        ((2, 1, 1, 4096), (4096, 3, 5, 1), torch.bool, False),
        ((2, 1, 4096, 1), (4096, 4096, 1, 1), torch.bool, True),
        ((4096,), (1,), torch.bool, False),
        ((), (), torch.bool, True),
    ],
)
def test_ragged_masks_have_a_rule_of_their_own(
    shape: Any,
    strides: Any,
    dtype: torch.dtype,
    is_ragged: bool,
    hopper: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rule = Rule((), (), (Crossover(0, 0),), ())
    monkeypatch.setitem(crossover.CROSSOVER, "cuda.sm90", rule)
    monkeypatch.setattr(gpu, "find_spec", lambda name: object())
    with FakeTensorMode():
        n, m = (4096, 4096, *shape)[-2:]
        q = torch.empty(2, 2, n if n > 1 else 4096, 64, device="cuda", dtype=torch.bfloat16)
        k = torch.empty(2, 2, m if m > 1 else 4096, 64, device="cuda", dtype=torch.bfloat16)
        mask = torch.empty_strided(shape, strides, dtype=dtype, device="cuda")
        codes = [reason.code for reason in why_not(q, k, k, mask)]
    assert codes == (["below_crossover"] if is_ragged else [])


def test_calls_take_the_recipe_of_the_gpu(hopper: None) -> None:
    """On fake tensors, as when a model for a GPU is traced."""
    seen: list[dict[str, Any]] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
            if func in (ops.sdpa, ops.sdpa_with_lse):
                seen.append(kwargs or {})
            return func(*args, **(kwargs or {}))

    q, k, v = fakes()
    with q.fake_mode, Watch():
        output = torch_sage.scaled_dot_product_attention(q, k, v, config=ALWAYS)
        torch_sage.attention_with_lse(q, k, v, config=ALWAYS.with_options(exponential="exact"))
        torch_sage.attention_with_lse(q, k, v, config=ALWAYS.with_options(smooth_q=True))
    assert output.shape == q.shape and output.device == q.device
    defaults = {a.name: a.default_value for a in ops.sdpa._schema.arguments}
    names = SUPPORT["cuda"].default.op_kwargs()
    found = [{name: kwargs.get(name, defaults[name]) for name in names} for kwargs in seen]
    own, other = (SUPPORT[row].default.op_kwargs() for row in ("cuda.sm90", "cuda.sm80"))
    assert found == [own, {**own, "exponential": "exact"}, {**other, "smooth": "qk"}]


@pytest.mark.parametrize("strict", [True, False])
def test_dynamo_asks_which_gpu_it_is(hopper: None, strict: bool) -> None:
    """The question is put while tracing; its answer is the graph's."""

    class Attention(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return torch_sage.scaled_dot_product_attention(query, key, value, config=ALWAYS)

    q, k, v = fakes()
    with q.fake_mode, torch.no_grad():
        graph = torch.export.export(Attention(), (q, k, v), strict=strict).graph
    (node,) = (node for node in graph.nodes if node.target is ops.sdpa)
    assert node.kwargs["pv"] == "e4m3_fp16" and node.kwargs["exponential"] == "mixed"


def test_attention_in_parts_takes_the_row_that_has_parts(
    hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ring attention quantizes K and V by ops that the mma.sync kernels have no part in."""
    semantics: dict[str, Any] = {"is_causal": False, "scale": None, "enable_gqa": False}
    monkeypatch.setattr(devices, "capability", lambda index: (8, 9))
    monkeypatch.setattr(gpu, "find_spec", lambda name: object())
    recipe = accept(*fakes(), **semantics, config=None)
    assert recipe.name == "int8.token_block/bf16/smooth-k"
    assert accept(*fakes(torch.float16), **semantics, config=None).recipe.pv == "fp16"
    with pytest.raises(NotImplementedError, match=r"^pv must be one of \['bf16', 'fp16'\] on cuda"):
        accept(*fakes(), **semantics, config=SageConfig(pv="e4m3_fp16"))
    gpu._lack.cache_clear()
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    with pytest.raises(NotImplementedError, match="triton must be installed"):
        accept(*fakes(), **semantics, config=None)
