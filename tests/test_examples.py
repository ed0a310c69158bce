"""Every example runs as a user would run it, and says what it promises to say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
SPOKEN = {
    "sdpa_replacement": "relative L1 error, merged:",
    "torch_compile": "4 attention nodes rewritten, 0 skipped",
    "export_aoti": "1 attention nodes rewritten, 1 skipped",
    "norms_and_rotations": "with norm and rotation",
    "per_module": "quantized: ['layer1', 'layer2']",
    "ring_attention": "all-to-all over 2",
}


def test_every_example_is_listed():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SPOKEN)


@pytest.mark.parametrize("name", SPOKEN)
def test_runs_and_is_short(name):
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text().splitlines()) <= 60
    # A script's own folder heads its path, not the checkout that is being tested.
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, path], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert SPOKEN[name] in result.stdout
