"""Run in a process of its own: compile one model, print what the caches and the passes did.

Usage: python cache_probe.py SETTING [save FILE | load FILE], with SETTING one of off, on, other
(another configuration), scoped (options), foreign (next to a user's pass with a uuid), plain (next
to a bare callable); FILE has torch.compiler's cache artifacts.
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass

import torch_sage
from torch_sage import SageConfig

ALWAYS = SageConfig(dispatch="always")


class Foreign(CustomGraphPass):
    """A user's pass that caches know."""

    def __call__(self, graph):
        """Do nothing."""

    def uuid(self):
        """Identify it."""
        return "foreign"


class Block(torch.nn.Module):
    """One eligible and one refused attention."""

    def forward(self, q, k):
        """Attend twice."""
        x = F.scaled_dot_product_attention(q, k, k)
        return F.scaled_dot_product_attention(x, k, k, dropout_p=0.5 if self.training else 0.0) + x


class Model(torch.nn.Module):
    """Two blocks, so that records have module names."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, q, k):
        """Attend four times."""
        return self.second(self.first(q, k), k)


def main(setting, action=None, file=None):
    """Compile under ``setting``."""
    options = None
    if action == "load":
        assert torch.compiler.load_cache_artifacts(Path(file).read_bytes()) is not None
    if setting == "scoped":
        options = torch_sage.options(ALWAYS)
    elif setting == "other":
        torch_sage.enable(ALWAYS.with_options(smooth_k=False))
    elif setting != "off":
        if setting == "foreign":
            inductor_config.joint_custom_post_pass = Foreign()
        elif setting == "plain":
            inductor_config.joint_custom_post_pass = lambda graph: None
        torch_sage.enable(ALWAYS)
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 16, 8), torch.randn(1, 2, 24, 8)
    model = Model()
    model.second.eval()
    with torch.no_grad():
        out = torch.compile(model, options=options)(q, k)
    if action == "save":
        artifacts, _ = torch.compiler.save_cache_artifacts()
        Path(file).write_bytes(artifacts)
    report = torch_sage.report().to_dict()
    result = {
        "autograd": dict(counters["aot_autograd"]),
        "inductor": {
            key: value for key, value in counters["inductor"].items() if key.startswith("fxgraph")
        },
        "report": report,
        "second": out.shape,
    }
    sys.stdout.write("RESULT " + json.dumps(result) + "\n")


main(*sys.argv[1:])
