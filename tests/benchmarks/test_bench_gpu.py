"""The GPU benchmark without a GPU: its answers, its judgement, its peers' operands, its text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="triton has wheels for Linux only")

from benchmarks import bench_attention, bench_gpu
from benchmarks.gpu import fp8, peers, problem, table, timing
from benchmarks.gpu.contender import Contender, Unsupported, module, nothing

ROOT = Path(__file__).parents[2]
E4M3 = torch.float8_e4m3fn
# E4M3 rounds to 1/16 at most; Q, K, V and their sums in a random walk stay below.
FP8_ERROR = 1 / 16


def make(length=50, head_dim=16, is_causal=False, data="normal"):
    return problem.make((2, 3, length, head_dim), is_causal, data, device="cpu")


def sdpa(task):
    return F.scaled_dot_product_attention(*task[:3], is_causal=task.is_causal)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("data", problem.DATA)
def test_the_exact_answer_is_exact(monkeypatch, is_causal, data):
    monkeypatch.setattr(problem, "ROWS", 16)  # several chunks, the last one shorter
    task = make(is_causal=is_causal, data=data)
    wide = problem.Problem(*(x.double() for x in task[:3]), is_causal)
    answer = problem.exact(task, heads=2)
    torch.testing.assert_close(answer.double(), sdpa(wide)[0, :2], rtol=1e-4, atol=1e-5)
    assert problem.relative_l1(sdpa(wide), answer) < 1e-5
    assert problem.relative_l1(1.25 * sdpa(wide), answer) == pytest.approx(0.25, rel=1e-3)


def test_kinds_of_data_differ_where_they_say():
    normal, bias, outliers = (make(data=data) for data in problem.DATA)
    assert torch.equal(normal.query, bias.query) and torch.equal(normal.value, bias.value)
    torch.testing.assert_close(sdpa(bias), sdpa(normal), rtol=0.2, atol=0.2)
    assert (bias.key - normal.key).std(2).max() < 0.1 < (bias.key - normal.key).std()
    assert torch.equal(outliers.value[..., 0], 8 * normal.value[..., 0])
    assert torch.equal(outliers.key[..., 1:16], normal.key[..., 1:16])


def test_flops_count_both_products():
    assert make(length=50, head_dim=16).flops == 4 * 2 * 3 * 50 * 50 * 16
    assert make(is_causal=True).flops * 2 == make().flops
    assert [problem.batch_of(length) for length in (1024, 8192, 16384, 65536)] == [4, 4, 2, 1]


def test_the_fp8_quantizer_interpreted():
    """In a process of its own: all of triton is interpreted there."""
    code = """if True:
        import torch
        from benchmarks.gpu import fp8
        fp8.PARTS, fp8.BLOCK = 4, 64
        torch.manual_seed(0)
        x = [torch.randn(2, 5, 3, 16).bfloat16() * 3**i for i in range(3)]
        got = fp8.quantize(*x)
        for tensor, codes, descale, scale in zip(x, got[:3], got.descale, got.scale):
            wanted = 448 / tensor.float().abs().max()
            torch.testing.assert_close(scale, wanted, rtol=2**-22, atol=0)
            torch.testing.assert_close(descale, 1 / wanted, rtol=2**-22, atol=0)
            scaled = tensor.float() * scale
            nearest = scaled.to(torch.float8_e4m3fn)
            # The interpreter, unlike a GPU, rounds ties up and forgets the carry to a power of two.
            kept = nearest.view(torch.uint8) & 7 != 0
            far = (codes.float() - scaled).abs() > (nearest.float() - scaled).abs()
            assert not (far & kept).any() and kept.float().mean() > 0.8
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def quantize(*tensors):
    """What the Triton kernels do, in torch."""
    scale = torch.stack([448 / x.float().abs().max() for x in tensors])
    codes = ((x.float() * s).to(E4M3) for x, s in zip(tensors, scale, strict=True))
    return fp8.Operands(*codes, 1 / scale, scale)


@pytest.mark.parametrize("is_causal", [False, True])
def test_fa3_gets_tokens_first_and_a_scale_per_head(monkeypatch, is_causal):
    """A stand-in with FlashAttention-3's signature, which computes from what it is given."""

    def flash_attn_func(q, k, v, causal=False, q_descale=None, k_descale=None, v_descale=None):
        if q.dtype == E4M3:
            scales = (q_descale, k_descale, v_descale)
            assert all(x.shape == (2, 3) and x.dtype == torch.float32 for x in scales)
            q, k, v = (
                (x.float() * s[:, None, :, None]).bfloat16()
                for x, s in zip((q, k, v), scales, strict=True)
            )
        assert all(x.is_contiguous() for x in (q, k, v))
        out = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal
        )
        return out.transpose(1, 2).contiguous()

    stand_in = SimpleNamespace(flash_attn_func=flash_attn_func)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", stand_in)
    monkeypatch.setattr(peers, "quantize", quantize)
    task = make(is_causal=is_causal)
    names = ["fa3", "fa3-fp8"]
    ready, errors, problems = bench_gpu.prepare(names, task, most_error=1)
    assert problems == {} and list(ready["fa3-fp8"]) == ["kernel", "whole", "quantize"]
    assert errors["fa3"] < 2**-7 < errors["fa3-fp8"] < FP8_ERROR  # bf16 has 8 bits


def test_a_peer_that_is_absent_fails_or_is_wrong_is_named_and_not_timed(
    monkeypatch, tmp_path, capsys
):
    def unsupported(task):
        raise Unsupported("no such mask")

    def call(compute):
        return Contender(nothing, lambda task: {"whole": lambda: compute(task)})

    contenders = {
        "absent": Contender(module("no_such_module"), unsupported),
        "unsupported": Contender(nothing, unsupported),
        "failing": call(lambda task: task.query @ task.key),
        "wrong": call(lambda task: sdpa(task) * 1.2),
        "peer": call(sdpa),
        "sage": Contender(
            nothing, lambda task: dict.fromkeys(("kernel", "whole"), lambda: sdpa(task))
        ),
    }
    monkeypatch.setattr(bench_gpu, "CONTENDERS", contenders)
    monkeypatch.setattr(bench_gpu, "environment", lambda: {"gpu": "none"})
    made = problem.make
    monkeypatch.setattr(problem, "make", lambda *arguments: made(*arguments, device="cpu"))
    monkeypatch.setattr(problem, "HEADS", 2)
    milliseconds = iter([4.0, 1.0, 2.0, 2.0, 1.0, 4.0])  # peer, kernel, whole, and back
    turn = lambda *_: timing.Turn([next(milliseconds)], 1000, 500)  # noqa: E731
    monkeypatch.setattr(timing, "turn", turn)
    path = tmp_path / "out.json"
    arguments = f"--head-dims 16 --modes causal --lengths 40 --data-lengths 40 --json {path}"
    given = ["--device", "cuda", *arguments.split(), "--contenders", *contenders]
    monkeypatch.setattr(sys, "argv", ["bench_attention", *given])
    bench_attention.main()
    printed = capsys.readouterr().out
    assert "without absent: no_such_module: No module named" in printed
    assert "no such mask" in printed and "wrong: relative L1 error 0.200" in printed
    assert "RuntimeError: Expected size" in printed
    (record,) = json.loads(path.read_text())["records"]
    assert "absent" not in record["contenders"]
    assert set(record["contenders"]["peer"]["errors"]) == set(problem.DATA)
    assert record["contenders"]["sage"]["times"]["kernel"]["median"] == 1
    assert "sage / best peer, kernel / whole: 4.00x / 2.00x" in printed
    row = next(line for line in printed.splitlines() if line.startswith("| D=16 causal | 40 |"))
    assert row.split(" | ")[2:5] == ["-", "-", "-"] and row.endswith("| 4.00x / 2.00x |")


def test_table_gives_kernel_and_whole_op():
    times = {"kernel": {"median": 0.5}, "whole": {"median": 1.0}}
    record = {
        "flops": 10**12,
        "contenders": {"a": {"times": times}, "b": {"times": {"whole": {"median": 4.0}}}},
    }
    assert [table.cell(record, name) for name in "abc"] == ["2000/1000", "250", "-"]
    assert table.ratios(record, ["a"]) == "8.00x / 4.00x"
