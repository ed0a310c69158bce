"""Make an AOTInductor package of a model shaped like DINOv2-S, for test_aoti.py:

``python -m tests.gpu.aoti FOLDER [--exact] [--one]`` writes ``package.pt2``, and in ``tensors.pt``
inputs of two batch sizes and what the model, and the same model with quantized attention, make of
them. With ``--one`` the package takes one image, which is in ``photograph.f32``, too.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_sage
from torch_sage import SageConfig

WIDTH, HEADS, LAYERS, PATCH, SIDE = 384, 6, 4, 14, 518  # of 12 layers: the rest are the same
ALWAYS = SageConfig(dispatch="always", on_unsupported="error")


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
    """Image to tokens, 1 + 37 * 37 of them."""

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


def main(folder: Path, exact: bool, one: bool) -> None:
    """Export, rewrite, compile; compute what the package is compared with."""
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False
    # In fp32 what the compiler fuses changes less than what quantization does.
    model = Features().cuda().eval().requires_grad_(False)
    inputs = [torch.randn(n, 3, SIDE, SIDE, device="cuda") for n in ((1,) if one else (2, 3))]
    outputs = [model(x) for x in inputs]
    shapes = None if one else ({0: torch.export.Dim("batch", min=2, max=8)},)
    program = torch.export.export(model, (inputs[0],), dynamic_shapes=shapes)
    if not exact:
        program = torch_sage.apply_to_exported(program, ALWAYS)
        rewritten = sum("torch_sage.sdpa" in str(node.target) for node in program.graph.nodes)
        if rewritten != LAYERS:
            raise RuntimeError(f"{LAYERS} nodes must be rewritten, got {rewritten}")
    torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(folder / "package.pt2"),
        # The wrapper only calls kernels: to optimize it doubles the time of compilation.
        inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},
    )
    quantized = [torch_sage.sage(ALWAYS)(model)(x) for x in inputs]
    tensors = {"inputs": inputs, "exact": outputs, "quantized": quantized}
    torch.save(tensors, folder / "tensors.pt")
    if one:
        inputs[0].cpu().numpy().tofile(folder / "photograph.f32")


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--exact" in sys.argv, "--one" in sys.argv)
