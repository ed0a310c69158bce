"""Attention modules as libraries write them, through dynamo and AOTAutograd; two in full."""

import math

import pytest
import torch
from torch import nn

from tests.inductor.graphs import ALWAYS, SDPA, captured_graphs, count, reasons, records
from tests.inductor.joint import REL_L1, mT
from tests.numerics import relative_l1
from torch_sage.inductor import options

BATCH, TOKENS, WIDTH, HEADS = 2, 40, 64, 4
HEAD_DIM = WIDTH // HEADS
MATMULS = (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default)


class Attention(nn.Module):
    """Four projections, sharp enough for attention to matter."""

    def __init__(self, kv_heads=HEADS):
        super().__init__()
        self.kv_heads = kv_heads
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, kv_heads * HEAD_DIM)
        self.value = nn.Linear(WIDTH, kv_heads * HEAD_DIM)
        self.out = nn.Linear(WIDTH, WIDTH)
        for projection in (self.query, self.key):
            projection.weight.data.mul_(2)

    def heads(self, x, count=HEADS):
        return x.view(x.shape[0], x.shape[1], count, HEAD_DIM).transpose(1, 2)

    def merge(self, x):
        return self.out(x.transpose(1, 2).reshape(x.shape[0], x.shape[2], WIDTH))


class Bert(Attention):
    """Additive finfo.min mask made of the 0/1 padding mask; dropout in eval mode."""

    def forward(self, x, padding):
        q, k, v = (self.heads(f(x)) for f in (self.query, self.key, self.value))
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(HEAD_DIM)
        scores = scores + (1.0 - padding[:, None, None, :]) * torch.finfo(x.dtype).min
        weights = nn.functional.dropout(scores.softmax(dim=-1), 0.1, self.training)
        context = torch.matmul(weights, v).permute(0, 2, 1, 3).contiguous()
        return self.out(context.view(*context.shape[:2], WIDTH))


class Gpt2(Attention):
    """Causal mask as a buffer that selects finfo.min, then a padding mask on top."""

    def __init__(self):
        super().__init__()
        causal = torch.ones(64, 64, dtype=torch.bool).tril().view(1, 1, 64, 64)
        self.register_buffer("causal", causal, persistent=False)

    def forward(self, x, padding):
        q, k, v = (self.heads(f(x)) for f in (self.query, self.key, self.value))
        weights = torch.matmul(q, k.transpose(-1, -2))
        weights = weights / torch.full([], v.size(-1) ** 0.5, dtype=weights.dtype)
        length = k.size(-2)
        lowest = torch.full([], torch.finfo(weights.dtype).min, dtype=weights.dtype)
        weights = torch.where(self.causal[:, :, :length, :length], weights, lowest)
        weights = weights + (1.0 - padding[:, None, None, :]) * -1e4
        weights = nn.functional.softmax(weights, dim=-1).type(v.dtype)
        return self.merge(torch.matmul(weights, v))


class T5(Attention):
    """No scale; a learned bias by bucketed distance, added in place; softmax in fp32."""

    def __init__(self):
        super().__init__()
        self.relative_bias = nn.Embedding(16, HEADS)
        for projection in (self.query, self.key):
            projection.weight.data.mul_(0.5)

    def forward(self, x, padding):
        q, k, v = (self.heads(f(x)) for f in (self.query, self.key, self.value))
        scores = torch.matmul(q, k.transpose(3, 2))
        position = torch.arange(x.shape[1])
        buckets = (position[None, :] - position[:, None]).clamp(-8, 7) + 8
        bias = self.relative_bias(buckets).permute(2, 0, 1).unsqueeze(0)
        scores += bias + (1.0 - padding[:, None, None, :]) * torch.finfo(x.dtype).min
        weights = nn.functional.softmax(scores.float(), dim=-1).type_as(scores)
        return self.merge(torch.matmul(weights, v))


class Llama(Attention):
    """Grouped heads repeated for the query's, a causal float mask, softmax in fp32."""

    def __init__(self):
        super().__init__(kv_heads=2)

    def forward(self, x, padding):
        q = self.heads(self.query(x))
        k, v = (self.repeated(self.heads(f(x), 2)) for f in (self.key, self.value))
        weights = torch.matmul(q, k.transpose(2, 3)) * HEAD_DIM**-0.5
        visible = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        visible = visible & padding[:, None, None, :].bool()
        lowest = torch.finfo(x.dtype).min
        mask = torch.where(visible, torch.zeros((), dtype=x.dtype), lowest)
        weights = weights + mask[:, :, :, : k.shape[-2]]
        weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
        return self.merge(torch.matmul(weights, v))

    def repeated(self, x):
        batch, heads, tokens, dim = x.shape
        x = x[:, :, None].expand(batch, heads, HEADS // heads, tokens, dim)
        return x.reshape(batch, HEADS, tokens, dim)


class Diffusers(Attention):
    """AttnProcessor: heads folded into the batch, scale as baddbmm's alpha."""

    def fold(self, x):
        x = x.reshape(x.shape[0], x.shape[1], HEADS, HEAD_DIM).permute(0, 2, 1, 3)
        return x.reshape(-1, x.shape[2], HEAD_DIM)

    def forward(self, x, padding):
        q, k, v = (self.fold(f(x)) for f in (self.query, self.key, self.value))
        mask = ((1 - padding[:, None]) * -10000.0).repeat_interleave(HEADS, dim=0)
        mask = mask.expand(-1, q.shape[1], -1)
        scores = torch.baddbmm(mask, q, k.transpose(-1, -2), beta=1, alpha=HEAD_DIM**-0.5)
        x = torch.bmm(scores.softmax(dim=-1).to(x.dtype), v)
        x = x.reshape(x.shape[0] // HEADS, HEADS, -1, HEAD_DIM).permute(0, 2, 1, 3)
        return self.out(x.reshape(x.shape[0], x.shape[1], WIDTH))


class DiffusersUnmasked(Diffusers):
    """AttnProcessor without a mask: an uninitialized tensor times beta = 0."""

    def forward(self, x, padding):
        q, k, v = (self.fold(f(x)) for f in (self.query, self.key, self.value))
        empty = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype)
        scores = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=HEAD_DIM**-0.5)
        x = torch.bmm(scores.softmax(dim=-1), v)
        x = x.reshape(x.shape[0] // HEADS, HEADS, -1, HEAD_DIM).permute(0, 2, 1, 3)
        return self.out(x.reshape(x.shape[0], x.shape[1], WIDTH))


class Timm(Attention):
    """Vision transformer: q scaled before the matmul, q, k, v unbound from one tensor."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x, padding):
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = ((q * HEAD_DIM**-0.5) @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.merge(weights @ v)


class EinsumVit(Attention):
    """Einsum on [batch, tokens, heads, head_dim] throughout."""

    def forward(self, x, padding):
        q, k, v = (
            f(x).view(*x.shape[:2], HEADS, HEAD_DIM) for f in (self.query, self.key, self.value)
        )
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / HEAD_DIM**0.5
        return self.out(torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v).flatten(2))


class DistilBert(Attention):
    """q divided first, a bool mask expanded to the scores, filled with -inf."""

    def forward(self, x, padding):
        q, k, v = (self.heads(f(x)) for f in (self.query, self.key, self.value))
        scores = torch.matmul(q / math.sqrt(HEAD_DIM), k.transpose(2, 3))
        mask = (padding == 0).view(x.shape[0], 1, 1, x.shape[1]).expand_as(scores)
        weights = nn.functional.softmax(scores.masked_fill(mask, float("-inf")), dim=-1)
        return self.merge(torch.matmul(weights, v))


class Alibi(Attention):
    """A slope per head and distance, as the input of baddbmm (BLOOM)."""

    def forward(self, x, padding):
        q, k, v = (self.heads(f(x)).flatten(0, 1) for f in (self.query, self.key, self.value))
        slopes = 2.0 ** -torch.arange(1, HEADS + 1)
        alibi = (slopes[:, None, None] * torch.arange(x.shape[1])).repeat(x.shape[0], 1, 1)
        scores = alibi.baddbmm(q, mT(k), beta=1.0, alpha=HEAD_DIM**-0.5)
        scores = scores.view(x.shape[0], HEADS, x.shape[1], x.shape[1])
        scores = scores.masked_fill(padding[:, None, None] == 0, torch.finfo(x.dtype).min)
        weights = scores.softmax(-1, dtype=torch.float32).to(x.dtype)
        return self.merge((weights.flatten(0, 1) @ v).unflatten(0, (x.shape[0], HEADS)))


class SwinV2(Attention):
    """Cosine attention: a learned temperature per head."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.full((HEADS, 1, 1), 2.0))

    def forward(self, x, padding):
        q, k, v = (self.heads(f(x)) for f in (self.query, self.key, self.value))
        cosine = nn.functional.normalize(q, dim=-1) @ mT(nn.functional.normalize(k, dim=-1))
        scores = cosine * torch.clamp(self.temperature, max=math.log(100.0)).exp()
        return self.merge(scores.softmax(-1) @ v)


class Mha(nn.Module):
    """torch's own module where a caller asks for the weights and drops them."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x, padding):
        return self.attention(x, x, x, key_padding_mask=padding == 0, need_weights=True)[0]


MODELS = [
    Bert,
    Gpt2,
    T5,
    Llama,
    Diffusers,
    DiffusersUnmasked,
    Timm,
    EinsumVit,
    DistilBert,
    Alibi,
    SwinV2,
    Mha,
]


def inputs():
    padding = torch.ones(BATCH, TOKENS)
    padding[1, -7:] = 0
    return torch.randn(BATCH, TOKENS, WIDTH), padding


@pytest.fixture(autouse=True)
def inference():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("model", MODELS)
def test_model(model, dynamic):
    module, arguments = model().eval(), inputs()
    actual, graphs = captured_graphs(module, *arguments, dynamic=dynamic)
    assert count(graphs, SDPA) == 1
    assert count(graphs, *MATMULS) == 0
    assert [r.pattern for r in records(graphs)] == ["manual"]
    assert relative_l1(actual, module(*arguments)) <= REL_L1


@pytest.mark.parametrize("model", [Bert, Llama])
def test_model_in_bfloat16(model):
    x, padding = inputs()
    module = model().eval().bfloat16()
    arguments = x.bfloat16(), padding.bfloat16()
    actual, graphs = captured_graphs(module, *arguments)
    assert count(graphs, SDPA) == 1
    assert relative_l1(actual, module(*arguments)) <= REL_L1


def test_llama_keeps_its_grouped_heads():
    _, graphs = captured_graphs(Llama().eval(), *inputs())
    (node,) = [n for g in graphs for n in g.graph.nodes if n.target is SDPA]
    assert node.args[1].meta["val"].shape == (BATCH, 2, TOKENS, HEAD_DIM)


def test_dropout_of_a_model_left_in_training_mode():
    module = Bert().train()
    _, graphs = captured_graphs(module, *inputs())
    assert count(graphs, SDPA) == 0
    assert reasons(graphs) == [["dropout"]]


def test_training_graph_stays():
    module, arguments = Bert().eval(), inputs()
    with torch.enable_grad():
        _, graphs = captured_graphs(module, *arguments)
    assert count(graphs, SDPA) == 0


@pytest.mark.parametrize("model", [T5, Llama])
def test_compiled(model):
    """The whole road once: code generation asserts the strides of every operator."""
    module, arguments = model().eval(), inputs()
    compiled = torch.compile(module, options=options(ALWAYS), fullgraph=True)
    assert relative_l1(compiled(*arguments), module(*arguments)) <= REL_L1
