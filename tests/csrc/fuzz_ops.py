"""Calls the native ops with hostile arguments: ``python fuzz_ops.py SECONDS SEED [--small]``.

Run in a process of its own by ``test_fuzz.py`` and ``test_sanitizers.py``: a crash must fail one
test, not end pytest. Every call must return the shape that the arguments imply, or raise an error
that names an argument. ``--small`` leaves out sizes that no memory holds, for AddressSanitizer ends
the process where an allocation fails.
"""

import faulthandler
import random
import sys
import time

import torch

import torch_sage  # noqa: F401  (defines the ops and loads the library)
from torch_sage import _extension
from torch_sage.ops.schemas import DEFINITIONS, PREPARED, ROTARY

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WRONG_DTYPES = (torch.float64, torch.int8, torch.int64, torch.bool, torch.complex64, torch.uint8)
NAMES = [name for name in DEFINITIONS if name not in (*PREPARED, ROTARY)]  # with CPU kernels
GRANULARITIES = ("token", "thread", "warp", "block", "tensor")
TEXTS = {
    "causal": ("none", "top_left", "bottom_right"),
    "qk": ("int8",),
    "granularity": GRANULARITIES,
    "pv": ("bf16",),
    "exponential": ("exact",),
    "smooth": ("", "k", "v", "kv", "q", "qk", "qv", "qkv"),
    "output_order": ("bhsd", "bshd"),
}
INTEGERS = (-(2**63), -8, -1, 0, 1, 7, 8, 12, 16, 24, 64, 128, 4096, 2**52, 2**63 - 8)
ERRORS = (ValueError, RuntimeError, TypeError, NotImplementedError, MemoryError, OverflowError)


class Fuzzer:
    """Builds valid arguments and then damages some of them."""

    def __init__(self, seed: int, small: bool):
        self.random = random.Random(seed)
        self.small = small
        self.elsewhere = "device"
        torch.manual_seed(seed)

    def tensor(self, shape, dtype):
        """A tensor of this shape with odd strides, and sometimes odd values."""
        roll = self.random.random
        if roll() < 0.3 and len(shape) == 4:  # tokens before heads, as fused projections give
            b, h, n, d = shape
            x = torch.randn(b, n, h, d).to(dtype).transpose(1, 2)
        elif roll() < 0.2 and shape:  # a view with gaps around it
            x = torch.randn(*shape[:-1], shape[-1] + 3).to(dtype)[..., 1 : shape[-1] + 1]
        elif roll() < 0.2 and shape:  # last dimension not adjacent
            x = torch.randn(*reversed(shape)).to(dtype).permute(*reversed(range(len(shape))))
        elif roll() < 0.1:
            x = torch.randn([1] * len(shape)).to(dtype).expand(shape)
        else:
            x = torch.randn(shape).to(dtype)
        if dtype.is_floating_point and x.numel() and roll() < 0.2:
            special = self.random.choice([float("nan"), float("inf"), -float("inf"), 3e38, 1e-40])
            at = tuple(self.random.randrange(size) for size in x.shape)
            x = x.contiguous() if 0 in x.stride() else x
            x[at] = special
        return x

    def sizes(self):
        pick = self.random.choice
        heads_kv = pick([1, 2, 3])
        return {
            "b": pick([0, 1, 2]) if self.random.random() < 0.2 else 1,
            "hq": heads_kv * pick([1, 2]),
            "hk": heads_kv,
            "n": pick([0, 1, 5, 31, 64, 65, 130]),
            "m": pick([0, 1, 9, 63, 64, 77, 129, 200]),
            "d": pick([1, 3, 16, 40, 64, 72, 128, 256]),
            "dv": pick([1, 5, 16, 64, 80, 256]),
        }

    def valid(self, name):
        """Keyword arguments with which the op runs, and the shape of its first result."""
        s, dtype = self.sizes(), self.random.choice(DTYPES)
        query, key = (s["b"], s["hq"], s["n"], s["d"]), (s["b"], s["hk"], s["m"], s["d"])
        value, out = (*key[:3], s["dv"]), (*query[:3], s["dv"])
        fp32 = torch.float32
        granularity = self.random.choice(GRANULARITIES)
        if name == "quantize_query":
            return {"query": self.tensor(query, dtype), "granularity": granularity}, query
        if name == "quantize_key":
            mean = self.tensor(key[:2] + key[3:], fp32) if self.random.random() < 0.3 else None
            return {"key": self.tensor(key, dtype), "mean": mean, "granularity": granularity}, key
        if name == "quantize_value":
            smooth = self.random.random() < 0.5
            return {"value": self.tensor(value, dtype), "smooth": smooth}, value
        if name.startswith("varlen"):
            return self.valid_packed(s, dtype, granularity)
        arguments = {"query": self.tensor(query, dtype)}
        if name.startswith("sdpa"):
            arguments |= {"key": self.tensor(key, dtype), "value": self.tensor(value, dtype)}
            arguments["smooth"] = self.random.choice(TEXTS["smooth"])
        else:
            ops = torch.ops.torch_sage
            keys = ops.quantize_key(self.tensor(key, dtype), granularity=granularity)
            values = ops.quantize_value(self.tensor(value, dtype))
            names = ("codes", "scales", "mean")
            arguments |= {f"key_{n}": t for n, t in zip(names, keys, strict=True)}
            arguments |= {f"value_{n}": t for n, t in zip(names, values, strict=True)}
        arguments["granularity"] = granularity
        arguments["output_order"] = self.random.choice(TEXTS["output_order"])
        arguments["scale"] = self.random.choice([None, 0.0, -0.3, 0.125, 1e30])
        if self.random.random() < 0.4:
            arguments["attn_mask"] = self.mask(s)
        else:
            arguments["causal"] = self.random.choice(TEXTS["causal"])
        return arguments, out

    def valid_packed(self, s, dtype, granularity):
        """The same for sequences that are packed, each of which gets some of the tokens."""
        count, pick = self.random.choice([0, 1, 2, 5]), self.random.choice
        arguments = {"granularity": granularity, "smooth": pick(TEXTS["smooth"])}
        arguments |= {"causal": pick(TEXTS["causal"]), "scale": pick([None, 0.0, -0.3])}
        shapes = {"query": ("n", "hq", "d"), "key": ("m", "hk", "d"), "value": ("m", "hk", "dv")}
        for argument, names in shapes.items():
            arguments[argument] = self.tensor(tuple(s[name] for name in names), dtype)
        for side, tokens in (("q", s["n"]), ("k", s["m"])):
            edges = sorted(self.random.randint(0, tokens) for _ in range(count + 1))
            arguments[f"cu_seqlens_{side}"] = torch.tensor(edges, dtype=torch.int32)
            arguments[f"max_seqlen_{side}"] = tokens
        return arguments, (s["n"], s["hq"], s["dv"])

    def mask(self, s):
        shape = [s["b"], s["hq"], s["n"], s["m"]]
        shape = [1 if self.random.random() < 0.3 else size for size in shape]
        shape = shape[self.random.choice([0, 0, 1, 2, 3]) :]
        return self.tensor(tuple(shape), self.random.choice([torch.bool, *DTYPES]))

    def damage(self, value):
        """A different argument in the place of ``value``: often wrong, sometimes not."""
        if isinstance(value, torch.Tensor):
            return self.damage_tensor(value)
        if isinstance(value, str):
            return self.random.choice([*sum(TEXTS.values(), ()), "", "\0", "x" * 5000, None, 3])
        if isinstance(value, bool):
            return not value
        if value is None:
            return self.random.choice([torch.randn(2, 3), float("nan"), 1e300])
        return self.random.choice([float("nan"), float("inf"), -1e300, 5, "a", None])

    def damage_tensor(self, x):
        pick = self.random.choice
        ways = ["dtype", "size", "rank", "stride", "storage", "values", self.elsewhere]
        way = pick(ways if self.small else [*ways, "huge"])
        if way == "dtype":
            return x.to(pick(WRONG_DTYPES + DTYPES))
        if way == "size" and x.dim():
            shape = list(x.shape)
            shape[pick(range(x.dim()))] = pick([0, 1, 2, 3, 7, 257, 300])
            return torch.randn(shape).to(x.dtype)
        if way == "rank":
            return pick([x[None], x.flatten(), torch.tensor(1).to(x.dtype), x.flatten()[:0]])
        if way == "stride" and x.dim():
            strides = [pick([0, 1, 2, s]) for s in x.stride()]
            reach = sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True)) + 1
            return torch.randn(max(reach, 1)).to(x.dtype).as_strided(x.shape, strides)
        if way == "storage":
            x = x.clone()
            x.untyped_storage().resize_(pick([0, 1, x.untyped_storage().nbytes() // 2]))
            return x
        if way == "device":
            return x.to("meta")
        if way == "values" and x.dtype.is_floating_point:
            return torch.full_like(x, pick([float("nan"), float("inf"), -1.0, 0.0, 6e4]))
        if way == "values" and x.dtype == torch.int32:
            return torch.randint(-(2**31), 2**31, x.shape, dtype=torch.int64).to(torch.int32)
        if way == "huge" and x.dim() == 4:
            # torch itself refuses a product of sizes beyond 2**63.
            rows = min(2**52, 2**62 // max(1, x.numel() // max(1, x.shape[2])))
            return x[:, :, :1].expand(-1, -1, rows, -1) if x.shape[2] else x
        return None if way == "none" else x

    def case(self):
        """One op with arguments, and the shape that its first result has if nothing is damaged."""
        name = self.random.choice(NAMES)
        arguments, shape = self.valid(name)
        damages = self.random.choice([0, 1, 1, 2, 3])
        # Not both in one call: with a meta tensor it is the fake, Python code, that sees the None.
        self.elsewhere = self.random.choice(["device", "none"])
        for target in self.random.sample(list(arguments), min(damages, len(arguments))):
            arguments[target] = self.damage(arguments[target])
        for integer in ("block", "warp"):
            if f"int {integer}" in DEFINITIONS[name] and self.random.random() < 0.2:
                arguments[integer] = self.random.choice(INTEGERS)
                damages += 1
        return name, arguments, None if damages else shape


def run(name, arguments, shape):
    """Call the op; raise AssertionError where its answer is neither a result nor a clear error."""
    names = [a.name for a in getattr(torch.ops.torch_sage, name).default._schema.arguments]
    try:
        result = getattr(torch.ops.torch_sage, name)(**arguments)
    except ERRORS as error:
        assert shape is None, f"a valid call raised {error!r}"
        assert isinstance(error, MemoryError) or any(n in str(error) for n in names), (
            f"nameless error {error!r}"
        )
        return False
    first = result[0] if isinstance(result, tuple) else result
    assert shape is None or first.shape == shape, f"{first.shape} instead of {shape}"
    return True


def main():
    """Fuzz for some seconds and print what was covered."""
    seconds, seed, small = float(sys.argv[1]), int(sys.argv[2]), "--small" in sys.argv
    faulthandler.enable()
    assert _extension.is_available(), _extension.unavailable_reason()
    fuzzer = Fuzzer(seed, small)
    calls = results = 0
    deadline = time.monotonic() + seconds
    with torch.inference_mode():
        while time.monotonic() < deadline:
            name, arguments, shape = fuzzer.case()
            try:
                results += run(name, arguments, shape)
            except AssertionError:
                shown = {
                    k: (v.dtype, v.shape, v.stride()) if isinstance(v, torch.Tensor) else v
                    for k, v in arguments.items()
                }
                sys.stderr.write(f"call {calls} of seed {seed}: {name} {shown}\n")
                raise
            calls += 1
    sys.stdout.write(f"{calls} calls, {results} results\n")


if __name__ == "__main__":
    main()
