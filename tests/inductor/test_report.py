"""The report in all its forms, and that it says so when the passes did not run."""

import json
import logging
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config

import torch_sage
from tests.inductor.graphs import ALWAYS
from torch_sage.inductor.records import AttentionRecord

RECIPE = "int8.token/bf16/smooth-qk"


class Attention(torch.nn.Module):
    """Attention with an optional reason against it."""

    def __init__(self, dropout):
        super().__init__()
        self.dropout = dropout

    def forward(self, q, mask):
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask, dropout_p=self.dropout)


class Model(torch.nn.Module):
    """Two attentions, the second with dropout."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([Attention(0.0), Attention(0.5)])

    def forward(self, q, mask):
        for layer in self.layers:
            q = layer(q, mask)
        return q


@pytest.fixture
def inputs():
    return torch.randn(1, 2, 16, 8), torch.ones(16, 16, dtype=torch.bool)


@pytest.fixture
def explained(inputs, no_grad):
    return torch_sage.explain(torch.compile(Model(), options=torch_sage.options(ALWAYS)), *inputs)


def test_every_attention_is_accounted_for(explained):
    assert (explained.rewritten, explained.skipped) == (1, 1)
    assert explained.notes == ()
    (graph,) = explained.graphs
    done, left = graph.records
    assert isinstance(done, AttentionRecord)
    assert (done.module, done.recipe, done.reasons) == ("layers.0", RECIPE, ())
    assert done.source.startswith("inductor/test_report.py:")
    assert done.source.endswith(" in forward")
    assert (done.query, done.attn_mask) == ("1x2x16x8 float32", "16x16 bool")
    assert (done.pattern, done.device, done.causal) == ("fused", "cpu", "none")
    assert (left.module, left.recipe) == ("layers.1", "")
    assert [r.code for r in left.reasons] == ["dropout"]


def test_report_after_compile_equals_explain(explained, inputs, no_grad):
    torch.compile(Model(), options=torch_sage.options(ALWAYS))(*inputs)
    report = torch_sage.report()
    assert report == explained
    inductor = counters["inductor"]
    assert inductor["torch_sage_graphs"] == 1
    assert inductor["torch_sage_rewritten"] == 1
    assert inductor["torch_sage_skipped"] == 1
    assert inductor["torch_sage_skipped_dropout"] == 1


def test_two_compilations_of_one_graph_count_twice(inputs, no_grad):
    for _ in range(2):
        torch._dynamo.reset()
        torch.compile(Model(), options=torch_sage.options(ALWAYS))(*inputs)
    report = torch_sage.report()
    assert [graph.compiled for graph in report.graphs] == [2]
    assert (report.rewritten, report.skipped) == (2, 2)


def test_text_and_json(explained, tmp_path):
    text = str(explained)
    assert "1 attention nodes rewritten, 1 skipped" in text
    assert f"-> {RECIPE}" in text
    assert "skipped: dropout (" in text
    written = explained.to_json(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(written)
    data = json.loads(written)
    assert data["reasons"] == {"dropout": 1}
    assert [node["module"] for node in data["graphs"][0]["nodes"]] == ["layers.0", "layers.1"]
    again = [AttentionRecord.from_dict(node) for node in data["graphs"][0]["nodes"]]
    assert tuple(again) == explained.graphs[0].records


def test_html_is_static_and_escaped(explained, tmp_path):
    page = explained.to_html(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == page
    seen = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            seen.append((tag, dict(attributes)))

    Reader().feed(page)
    tags = {tag for tag, _ in seen}
    assert not tags & {"script", "link", "img", "iframe"}
    assert not any({"src", "href", "onload"} & attributes.keys() for _, attributes in seen)
    assert sum(tag == "tr" for tag, _ in seen) == 5  # 2 + 1 reason, 2 nodes, with their heads
    assert "layers.1" in page
    hostile = torch_sage.inductor.html.page(
        {**explained.to_dict(), "notes": ["<script>alert(1)</script>"]}
    )
    assert "<script>" not in hostile


def test_before_anything_the_report_says_so():
    report = torch_sage.report()
    assert report.graphs == ()
    assert any("not enabled" in note for note in report.notes)
    assert "note:" in str(report)


def test_mode_lite_skips_the_passes_and_the_report_says_so(inputs, no_grad):
    """Trap 9: mode "lite" has no joint passes; "0 rewritten" alone would look like a verdict."""
    model = torch.compile(Model(), options=torch_sage.options(ALWAYS, mode="lite"))
    explained = torch_sage.explain(model, *inputs)
    assert explained.graphs == ()
    assert any("lite" in note for note in explained.notes)
    model(*inputs)
    report = torch_sage.report()
    assert report.graphs == ()
    assert any("not run on any graph" in note for note in report.notes)


def test_a_global_switch_off_is_reported():
    with inductor_config.patch(use_joint_graph_passes=False):
        assert any("use_joint_graph_passes" in note for note in torch_sage.report().notes)


def test_graphs_compiled_without_the_passes_are_counted(inputs, no_grad):
    torch.compile(Model(), options=torch_sage.options(ALWAYS))(*inputs)
    assert torch_sage.report().notes == ()
    torch.compile(lambda q: q + 1)(inputs[0])
    assert any("1 graph(s) were compiled without" in n for n in torch_sage.report().notes)


def test_explain_of_a_hook_that_was_overwritten(inputs, no_grad):
    with torch_sage.enable(ALWAYS):
        plain = torch.compile(Model(), options={"joint_custom_post_pass": None})
        explained = torch_sage.explain(plain, *inputs)
    assert any("joint_custom_post_pass does not hold the pass" in n for n in explained.notes)


def test_explain_uses_the_default_when_nothing_is_enabled(no_grad):
    explained = torch_sage.explain(Model(), torch.randn(1, 2, 16, 8), None)
    codes = [[r.code for r in record.reasons] for record in explained.records]
    assert codes == [["below_crossover"], ["dropout"]]


def test_explain_leaves_no_trace_and_can_be_repeated(inputs, no_grad):
    """More often than dynamo recompiles one function by itself (8 times)."""
    model = Model()
    exact = torch.compile(model)
    before = exact(*inputs)
    with pytest.warns(UserWarning), torch_sage.enable(ALWAYS):
        for _ in range(10):
            assert torch_sage.explain(model, *inputs).rewritten == 1
    assert torch.compile(model)(*inputs).shape == before.shape
    assert inductor_config.joint_custom_post_pass is None


def test_training_is_a_reason_with_shapes(inputs):
    q, mask = inputs
    model = torch.compile(Attention(0.0), options=torch_sage.options(ALWAYS))
    out = model(q.requires_grad_(), mask)
    out.sum().backward()
    (record,) = torch_sage.report().records
    assert [reason.code for reason in record.reasons] == ["training"]
    assert record.query == "1x2x16x8 float32"


def test_excluded_and_direct_attention_is_reported(inputs, no_grad):
    """What the model itself decided on is neither rewritten nor missing."""

    excluded = torch_sage.exclude(Attention(0.0))

    def function(q, mask):
        return excluded(torch_sage.scaled_dot_product_attention(q, q, q, config=ALWAYS), mask)

    explained = torch_sage.explain(
        torch.compile(function, options=torch_sage.options(ALWAYS)), *inputs
    )
    (graph,) = explained.graphs
    assert [(r.pattern, r.recipe) for r in graph.records] == [("direct", RECIPE), ("direct", "")]
    assert explained.reasons == {"excluded": 1}


def test_the_log_tells_counts_and_records(inputs, no_grad, caplog):
    caches_off = inductor_config.patch(force_disable_caches=True)
    with caches_off, caplog.at_level(logging.DEBUG, logger="torch_sage"):
        torch.compile(Model(), options=torch_sage.options(ALWAYS))(*inputs)
    messages = [r.getMessage() for r in caplog.records if r.name.startswith("torch_sage")]
    assert "rewrote 1 of 2 attention nodes" in messages
    assert sum(message.startswith("AttentionRecord(") for message in messages) == 2


def test_torch_logs_and_tlparse_artifact(tmp_path):
    """TORCH_LOGS=torch_sage imports the package while torch itself is being imported."""
    code = (
        "import torch, torch_sage, torch.nn.functional as F\n"
        "q = torch.randn(1, 2, 16, 8)\n"
        "options = torch_sage.options(torch_sage.SageConfig(dispatch='always'))\n"
        "f = torch.compile(lambda q: F.scaled_dot_product_attention(q, q, q), options=options)\n"
        "with torch.no_grad(): f(q)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "TORCH_LOGS": "torch_sage",
            "TORCH_TRACE": str(tmp_path),
            "PYTHONPATH": str(Path(__file__).parents[2]),
        },
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert "rewrote 1 of 1 attention nodes" in process.stderr
    trace = "\n".join(path.read_text() for path in tmp_path.iterdir())
    assert '"name": "torch_sage_report"' in trace
