"""torch.export and AOTInductor: quantized attention in a saved program and in a package."""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_sage


class Block(nn.Module):
    """Self-attention as thousands of models write it."""

    def __init__(self, width: int = 128, heads: int = 2) -> None:
        """Make the projections."""
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        """Add to x what it attends to."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)


def main() -> None:
    """Export, apply, save, load, compile and run."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(), torch_sage.exclude(Block())).eval()
    x = torch.randn(1, 64, 128)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(model, (x,), dynamic_shapes=({1: tokens},))

    # A toy is too small to gain anything; "always" rewrites it nevertheless.
    program = torch_sage.apply_to_exported(program, torch_sage.SageConfig(dispatch="always"))
    print(torch_sage.explain(program))

    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        torch.export.save(program, Path(folder, "program.pt2"))
        program = torch.export.load(Path(folder, "program.pt2"))
        package = str(Path(folder, "package.pt2"))
        torch._inductor.aoti_compile_and_package(program, package_path=package)
        run = torch._inductor.aoti_load_package(package)
        for length in (64, 300):
            x = torch.randn(1, length, 128)
            exact = model(x)
            assert not torch.equal(run(x), exact)
            cosine = F.cosine_similarity(run(x), exact, dim=-1).min().item()
            print(f"{length} tokens, lowest cosine: {cosine:.7f}")
            assert cosine > 0.999


if __name__ == "__main__":
    main()
