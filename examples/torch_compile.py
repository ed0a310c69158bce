"""torch.compile, scoped and global: the model's own attention becomes quantized attention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_sage


class Block(nn.Module):
    """Self-attention as thousands of models write it."""

    def __init__(self, width: int = 256, heads: int = 4) -> None:
        """Make the projections."""
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Add to x what it attends to."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(attended.transpose(1, 2).flatten(-2))


def main() -> None:
    """Compile one model both ways and print what became of its attention."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block()).eval()
    x = torch.randn(1, 512, 256)
    # A toy is too small to gain anything; "always" rewrites it nevertheless.
    config = torch_sage.SageConfig(dispatch="always")

    with torch.inference_mode():
        exact = model(x)
        with torch_sage.enable(config):  # whatever is compiled in this block
            cosine = F.cosine_similarity(torch.compile(model)(x), exact, dim=-1)
            print("lowest cosine of a token:", cosine.min().item())

        scoped = torch.compile(model, options=torch_sage.options(config))  # only this model
        cosine = F.cosine_similarity(scoped(x), exact, dim=-1)
        print("lowest cosine of a token:", cosine.min().item())

    report = torch_sage.report()
    print(report)
    assert report.rewritten == 4
    assert report.skipped == 0


if __name__ == "__main__":
    main()
