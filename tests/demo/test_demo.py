"""The command itself, on the smallest model, in a process of its own."""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_quick_demo_of_one_model(tmp_path):
    folder = tmp_path / "report"
    command = [sys.executable, "-m", "torch_sage", "demo", "--quick", "--model", "dinov2"]
    result = subprocess.run(
        [*command, "--output", str(folder)], capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout + result.stderr

    data = json.loads((folder / "report.json").read_text())
    (model,) = data["models"]
    assert model["title"] == "DINOv2-S"
    assert all(goal["met"] for goal in model["goals"])
    assert len(model["layers"]) == 12
    assert sum(bool(node["recipe"]) for node in model["nodes"]) == 12
    (timing,) = model["timings"]
    assert len(timing["sdpa_seconds"]) == len(timing["torch_sage_seconds"]) >= 3

    page = (folder / "index.html").read_text()
    for name in ("speed.svg", "layers.svg", "attention.html"):
        assert name in page
        assert (folder / name).stat().st_size > 1000
