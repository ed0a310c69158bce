"""Install the one wheel of a folder apart from the checkout and run its kernels."""

import subprocess
import sys
import tempfile
from pathlib import Path

PROBE = """
import sys
import torch, torch_sage
assert torch_sage.__file__.startswith(sys.argv[1]), torch_sage.__file__
q = torch.randn(1, 2, 70, 64)
expected = torch.nn.functional.scaled_dot_product_attention(q, q, q)
got = torch_sage.scaled_dot_product_attention(
    q, q, q, config=torch_sage.SageConfig(dispatch="always", on_unsupported="error")
)
assert not torch.equal(got, expected), "must run the quantized kernel, got SDPA's result"
assert torch.cosine_similarity(got.flatten(), expected.flatten(), dim=0) > 0.999
"""
# The library by itself: what a process loads that never imports the package.
STANDALONE_PROBE = """
import sys
import torch
torch.ops.load_library(sys.argv[1] + "/torch_sage/libtorch_sage_standalone.so")
q = torch.randn(1, 2, 70, 64)
assert torch.ops.torch_sage.sdpa(q, q, q).shape == q.shape
assert "torch_sage" not in sys.modules
"""


def main() -> None:
    """Check the tag, install without dependencies into a temporary folder, run the probe."""
    wheels = list(Path(sys.argv[1]).glob("*.whl"))
    if len(wheels) != 1 or "-py3-none-linux" not in wheels[0].name:
        raise SystemExit(f"dist must hold one py3-none-linux wheel, got {wheels}")
    with tempfile.TemporaryDirectory() as folder:
        install = ["install", "--quiet", "--no-deps", "--target", folder, str(wheels[0])]
        subprocess.run([sys.executable, "-m", "pip", *install], check=True)
        code = f"import sys; sys.path.insert(0, {folder!r})\n{PROBE}"
        for probe in (code, STANDALONE_PROBE):
            subprocess.run([sys.executable, "-c", probe, folder], check=True, cwd=folder)


main()
