"""Make the AOTInductor package of test_aoti.py: a small model shaped like DINOv2.

``python -m tests.gpu.aoti FOLDER`` writes ``package.pt2``; ``tensors.pt`` with inputs of three
batch sizes and what the model, and the same model with quantized attention, make of them; and the
last input, one image, as ``photograph.f32``. It prints how long each phase took.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_sage
from torch_sage import SageConfig

# Two layers: one's output is the other's input. Heads of 64 channels, and 1 + 16 * 16 tokens, which
# leave a tile of keys unfilled, as those of DINOv2-S do.
WIDTH, HEADS, LAYERS, PATCH, SIDE = 128, 2, 2, 14, 224
BATCHES = (2, 3, 1)  # the first is traced
ALWAYS = SageConfig(dispatch="always", on_unsupported="error")
# The wrapper only calls kernels: to optimize it doubles the time of compilation.
INDUCTOR = {"aot_inductor.compile_wrapper_opt_level": "O0"}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*heads.unbind())
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Features(nn.Module):
    """Image to tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.first = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.places = nn.Parameter(torch.randn(1, 1 + (SIDE // PATCH) ** 2, WIDTH))
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patches(pixels).flatten(2).mT
        x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1) + self.places
        for layer in self.layers:
            x = layer(x)
        return x


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Print how long the block took; a process that is killed has printed those before."""
    start = time.perf_counter()
    yield
    sys.stdout.write(f"{name}: {time.perf_counter() - start:.1f} s\n")
    sys.stdout.flush()


def main(folder: Path) -> None:
    """Export, rewrite, compile; compute what the package is compared with."""
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False
    with phase("model"):
        # In fp32 what the compiler fuses changes less than what quantization does.
        model = Features().cuda().eval().requires_grad_(False)
        inputs = [torch.randn(n, 3, SIDE, SIDE, device="cuda") for n in BATCHES]
        exact = [model(x) for x in inputs]
        quantized = [torch_sage.sage(ALWAYS)(model)(x) for x in inputs]
    torch.save({"inputs": inputs, "exact": exact, "quantized": quantized}, folder / "tensors.pt")
    inputs[-1].cpu().numpy().tofile(folder / "photograph.f32")
    with phase("export"):
        shapes = ({0: torch.export.Dim("batch", min=1, max=8)},)
        program = torch.export.export(model, (inputs[0],), dynamic_shapes=shapes)
        program = torch_sage.apply_to_exported(program, ALWAYS)
        rewritten = sum("torch_sage.sdpa" in str(node.target) for node in program.graph.nodes)
        if rewritten != LAYERS:
            raise RuntimeError(f"{LAYERS} nodes must be rewritten, got {rewritten}")
    with phase("compile"):
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(folder / "package.pt2"), inductor_configs=INDUCTOR
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
