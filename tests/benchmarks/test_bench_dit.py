"""The benchmark of diffusion transformers without a GPU: its models' sizes, its judgement."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="triton has wheels for Linux only")

from benchmarks import bench_dit
from benchmarks.gpu import dit


@pytest.mark.parametrize(
    "name, heads, head_dim, attentions", [("cogvideox", 48, 64, 2), ("flux", 24, 128, 4)]
)
@pytest.mark.parametrize(
    "size, least, most", [("4k", 4096, 4200), ("17k", 16896, 17400), ("45k", 45000, 45200)]
)
def test_models_have_the_sizes_that_they_are_named_after(
    monkeypatch, name, heads, head_dim, attentions, size, least, most
):
    shapes = []

    def sdpa(query, key, value, **_):
        shapes.append(query.shape)
        assert key.shape == value.shape == query.shape
        return torch.empty_like(query)

    built = dit.build(name, size, "meta", torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in built.module.parameters())
    monkeypatch.setattr(F, "scaled_dot_product_attention", sdpa)
    (output,) = built.module(**built.inputs, return_dict=False)
    assert output.shape == built.inputs["hidden_states"].shape and output.dtype == torch.bfloat16
    assert least <= built.tokens <= most
    assert shapes == [(1, heads, built.tokens, head_dim)] * attentions


def test_each_attention_is_in_its_model_and_a_wrong_one_is_not_timed(monkeypatch, tmp_path, capsys):
    """A stand-in for FlashAttention-3, right and then with another scale."""
    calls = []

    def fa3_with(gain):
        def flash_attn_func(query, key, value):
            calls.append(query.shape)
            q, k, v = (x.transpose(1, 2).float() for x in (query, key, value))
            scores = q @ k.mT * (gain * q.shape[3] ** -0.5)
            return (scores.softmax(3) @ v).transpose(1, 2).contiguous().bfloat16()

        return SimpleNamespace(flash_attn_func=flash_attn_func)

    def run(gain):
        monkeypatch.setitem(sys.modules, "flash_attn_interface", fa3_with(gain))
        calls.clear()
        bench_dit.main()
        (record,) = json.loads(path.read_text())["records"]
        return record

    path = tmp_path / "out.json"
    arguments = "--tiny --device cpu --models cogvideox --dispatch always --seconds 0.01 --json"
    monkeypatch.setattr(sys, "argv", ["bench_dit", *arguments.split(), str(path)])
    record = run(gain=1)
    contenders = record["contenders"]
    assert list(contenders) == ["default", "sage", "fa3"]
    assert [c["rewritten"] for c in contenders.values()] == [0, 1, 0]
    assert contenders["default"]["speedup"] == 1 == pytest.approx(contenders["default"]["cosine"])
    assert contenders["sage"]["cosine"] != contenders["default"]["cosine"]
    assert all(c["time"]["median"] > 0 for c in contenders.values())
    # Once compiled, twice to choose how often to repeat, then in turn: its own calls alone.
    assert len(calls) >= 3 + contenders["fa3"]["time"]["calls"]
    assert set(calls) == {(1, record["tokens"], 2, 64)}
    printed = capsys.readouterr().out
    assert "| cogvideox | 346 | sage |" in printed and "| 1 of 1 |" in printed
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--contenders", "fa3"])
    wrong = run(gain=0.5)["contenders"]
    assert wrong["fa3"]["problem"].startswith("wrong: cosine 0.9") and "sage" not in wrong
