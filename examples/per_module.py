"""Opt in module by module: no switch, no torch.compile needed, and the same under it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_sage

# A toy is too small to gain anything; "always" computes it nevertheless.
CONFIG = torch_sage.SageConfig(dispatch="always")


class Attention(nn.Module):
    """One head of self-attention without projections."""

    def forward(self, x: Tensor) -> Tensor:
        """Attend from x to x."""
        return F.scaled_dot_product_attention(x, x, x)


@torch_sage.sage(CONFIG)
class Encoder(nn.Module):
    """Opted in where it is defined; what it calls is, too, except for what says otherwise."""

    def __init__(self) -> None:
        """Make one quantized and one exact layer."""
        super().__init__()
        self.first = Attention()
        self.last = torch_sage.exclude(Attention())

    def forward(self, x: Tensor) -> Tensor:
        """Apply both layers."""
        return self.last(self.first(x))


def main() -> None:
    """Opt in by decorator, by name, and compile."""
    torch.manual_seed(0)
    x = torch.randn(1, 4, 256, 64)
    plain = Attention()

    with torch.inference_mode():
        # By decorator: the first layer is quantized, the last one is exact.
        encoder = Encoder()
        quantized = torch_sage.scaled_dot_product_attention(x, x, x, config=CONFIG)
        assert torch.equal(encoder(x), plain(quantized))

        # By name, in a model that somebody else wrote; None excludes.
        stack = nn.ModuleDict({f"layer{i}": Attention() for i in range(3)})
        torch_sage.apply_(stack, {"re:layer[12]": CONFIG, "layer0": None})
        changed = [name for name, layer in stack.items() if not torch.equal(layer(x), plain(x))]
        print("quantized:", changed)
        assert changed == ["layer1", "layer2"]

        # The same choices hold when the model is compiled.
        torch.testing.assert_close(torch.compile(encoder, fullgraph=True)(x), encoder(x))


if __name__ == "__main__":
    main()
