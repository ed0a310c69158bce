"""RMSNorm and RoPE inside attention: the model's own code, and kernels less in front of it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_sage


class Attention(nn.Module):
    """Self-attention that norms and rotates Q and K, as most transformers do."""

    def __init__(self, heads: int = 4, head_dim: int = 64) -> None:
        """Make the projections and the norms."""
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(heads * head_dim, 3 * heads * head_dim, bias=False)
        self.norm_q, self.norm_k = (nn.RMSNorm(head_dim, eps=1e-6) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return what x attends to."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = (rotate(y, cos, sin) for y in (self.norm_q(q), self.norm_k(k)))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each channel with the one half of all channels away."""
    low, high = x.float().chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1).to(x.dtype)


def main() -> None:
    """Compile attention, and print what its op does."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Attention().bfloat16().to(device).eval()
    x = torch.randn(1, 512, 256, dtype=torch.bfloat16, device=device)
    frequencies = 10000.0 ** -(torch.arange(32, device=device) / 32)
    angles = torch.arange(512, device=device)[:, None] * frequencies

    # A toy is too small to gain anything: "measured", the default of both, would leave it.
    config = torch_sage.SageConfig(dispatch="always", producers="always")
    fast = torch.compile(model, options=torch_sage.options(config))
    with torch.inference_mode():
        inputs = (x, angles.cos(), angles.sin())
        cosine = F.cosine_similarity(fast(*inputs).float(), model(*inputs).float(), dim=-1)
    print("lowest cosine of a token:", cosine.min().item())
    print(torch_sage.report())


if __name__ == "__main__":
    main()
