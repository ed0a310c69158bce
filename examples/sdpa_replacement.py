"""The eager API: the signature of F.scaled_dot_product_attention, quantized arithmetic."""

import torch
import torch.nn.functional as F

import torch_sage


def main() -> None:
    """Compare with exact attention, merge two halves, ask for reasons."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 8, 512, 64) for _ in range(3))

    output = torch_sage.scaled_dot_product_attention(query, key, value, is_causal=True)
    exact = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    error = ((output - exact).abs().sum() / exact.abs().sum()).item()
    print(f"relative L1 error: {error:.4f}")
    assert error < 0.02

    # The log-sum-exp of each row merges partial results, here over two halves of the keys.
    halves = [
        torch_sage.attention_with_lse(query, key[:, :, part], value[:, :, part])
        for part in (slice(0, 256), slice(256, 512))
    ]
    weights = torch.softmax(torch.stack([half.lse for half in halves]), dim=0)
    merged = sum(w[..., None] * half.output for w, half in zip(weights, halves, strict=True))
    whole = F.scaled_dot_product_attention(query, key, value)
    error = ((merged - whole).abs().sum() / whole.abs().sum()).item()
    print(f"relative L1 error, merged: {error:.4f}")
    assert error < 0.02

    # What the kernels do not compute runs exact SDPA; why_not says so beforehand.
    wide = torch.randn(1, 8, 512, 320)
    reasons = torch_sage.why_not(wide, wide, wide)
    print("\n".join(f"{reason.code}: {reason.message}" for reason in reasons))
    assert {reason.code for reason in reasons} == {"head_dim"}
    assert torch.equal(
        torch_sage.scaled_dot_product_attention(wide, wide, wide),
        F.scaled_dot_product_attention(wide, wide, wide),
    )


if __name__ == "__main__":
    main()
