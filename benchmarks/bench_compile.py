"""How much compile time the passes take, as a share of the whole of torch.compile.

Usage: python -m benchmarks.bench_compile [--layers N]. Compiles a Llama and a BERT of random
weights with cold caches and prints, per model, the attention nodes, the seconds of compilation and
the seconds inside the three passes. The goal is at most 2 %.
"""

import argparse
import time

import torch
from torch._inductor import config as inductor_config
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

import torch_sage
from torch_sage.inductor.passes import SagePass

LENGTH = 256


def models(layers):
    """Yield name, model and input ids."""
    ids = torch.arange(LENGTH)[None]
    sizes = {
        "hidden_size": 256,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "vocab_size": 1024,
    }
    for attention in ("sdpa", "eager"):
        llama = LlamaConfig(**sizes, num_key_value_heads=2, attn_implementation=attention)
        yield f"llama {attention}", LlamaModel(llama).eval(), ids
        bert = BertConfig(**sizes, attn_implementation=attention)
        yield f"bert {attention}", BertModel(bert).eval(), ids


def main():
    """Print one line per model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    layers = parser.parse_args().layers
    spent = {"passes": 0.0}
    run = SagePass.__call__

    def timed(self, graph):
        start = time.perf_counter()
        run(self, graph)
        spent["passes"] += time.perf_counter() - start

    SagePass.__call__ = timed
    config = torch_sage.SageConfig(dispatch="always")
    torch.compile(lambda x: x + 1, options=torch_sage.options(config))(torch.ones(4))
    with torch.no_grad(), inductor_config.patch(force_disable_caches=True):
        for name, model, ids in models(layers):
            spent["passes"] = 0.0
            before = torch_sage.report().rewritten
            start = time.perf_counter()
            torch.compile(model, options=torch_sage.options(config))(ids)
            total = time.perf_counter() - start
            count = torch_sage.report().rewritten - before
            share = spent["passes"] / total
            print(
                f"{name:12} rewritten {count:3}  compile {total:6.2f} s  "
                f"passes {spent['passes'] * 1e3:6.1f} ms  {share:.2%}"
            )


if __name__ == "__main__":
    main()
