"""Exported programs: rewritten, valid, saved, loaded, unflattened, and reported on."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torch_sage
from tests.inductor.graphs import ALWAYS, SDPA
from tests.inductor.joint import REL_L1
from tests.numerics import relative_l1

EXACT = torch.ops.torch_sage.exact_sdpa.default
TORCH_SDPA = torch.ops.aten.scaled_dot_product_attention.default
CAUSAL = {"is_causal": True}


class Attend(nn.Module):
    """Self-attention of four heads; ``by_hand`` in three operators."""

    def __init__(self, by_hand=False):
        super().__init__()
        self.by_hand = by_hand
        self.project = nn.Linear(64, 192)

    def forward(self, input):
        q, k, v = self.project(input).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        if self.by_hand:
            out = torch.softmax(q @ k.transpose(-1, -2) * 0.25, -1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, **CAUSAL)
        return out.transpose(1, 2).flatten(2)


class Model(nn.Module):
    """Attention in every way in which a program may hold it."""

    def __init__(self):
        super().__init__()
        self.plain, self.manual = Attend(), Attend(by_hand=True)
        self.opted_in = torch_sage.sage(ALWAYS.with_options(granularity="tensor"))(Attend())
        self.excluded = torch_sage.exclude(Attend())

    def forward(self, input):
        x = input + self.manual(self.plain(input))
        return x + self.excluded(x + self.opted_in(x))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().eval().requires_grad_(False)


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(2, 24, 64)


def calls(program):
    """Return the calls of the program, subgraphs included."""
    return [
        node
        for module in program.graph_module.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        if node.op == "call_function"
    ]


def targets(program):
    return [node.target for node in calls(program)]


def saved_and_loaded(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def outcomes(report):
    """Return (pattern, recipe or reason codes) of every attention node."""
    return [
        (record.pattern, record.recipe or ", ".join(reason.code for reason in record.reasons))
        for record in report.records
    ]


class Module(nn.Module):
    """A function as the module that export wants."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def applied(function, *args, **settings):
    """Return the applied program of a function or module."""
    module = function if isinstance(function, nn.Module) else Module(function)
    return torch_sage.apply_to_exported(torch.export.export(module, args, **settings), ALWAYS)


def assert_close(actual, expected):
    assert actual.stride() == expected.stride()
    assert relative_l1(actual, expected) <= REL_L1


@pytest.mark.parametrize("decompose", [None, {}, "core"], ids=["plain", "functional", "core"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_program_is_rewritten_and_whole(model, x, strict, dynamic, decompose):
    shapes = ({1: torch.export.Dim("tokens", min=2, max=512)},) if dynamic else None
    program = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=strict)
    if decompose is not None:
        program = program.run_decompositions(None if decompose == "core" else decompose)
    before = str(program.graph)
    rewritten = torch_sage.apply_to_exported(program, ALWAYS)
    assert str(program.graph) == before

    default, own = "int8.token/bf16/smooth-qk", "int8.tensor/bf16/smooth-qk"
    decided = [("direct", own), ("direct", "excluded")]
    found = ["manual" if decompose == "core" else "fused", "manual"]
    assert sorted(outcomes(torch_sage.report())) == sorted(
        [*((f, default) for f in found), *decided]
    )
    modules = {record.module: record.recipe for record in torch_sage.report().records}
    assert modules == {"plain": default, "manual": default, "opted_in": own, "excluded": ""}

    loaded = saved_and_loaded(rewritten)
    assert [targets(loaded).count(op) for op in (SDPA, EXACT, TORCH_SDPA)] == [3, 1, 0]
    with torch_sage.enable(ALWAYS):
        explained = torch_sage.explain(loaded)
    assert sorted(outcomes(explained)) == sorted([*[("direct", default)] * 2, *decided])
    runs = [loaded.module(), torch.export.unflatten(loaded)]
    for tokens in (24, 7, 200) if dynamic else (24,):
        longer = x.repeat(1, 9, 1)[:, :tokens] + torch.randn(tokens, 1)
        first, second = (run(longer) for run in runs)
        assert torch.equal(first, second)
        assert_close(first, model(longer))
        assert not torch.equal(first, model(longer))


def test_exclude_is_kept_where_the_export_tracks_gradients(x):
    """Export needs no no_grad; parameters that require a gradient hid what was marked."""
    model = torch_sage.exclude(Attend())
    program = torch.export.export(model, (x,))
    rewritten = torch_sage.apply_to_exported(program, ALWAYS)
    assert outcomes(torch_sage.report()) == [("direct", "excluded")]
    assert torch.equal(rewritten.module()(x), model(x))
    # What stays exact can be trained.
    gradients = []
    for run in (rewritten.module(), model):
        run.zero_grad()
        run(x).square().sum().backward()
        gradients += [dict(run.named_parameters())["project.weight"].grad]
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients)


def test_attention_is_the_output_and_keeps_the_module_calls(x):
    """The program's signature names output nodes; unflatten needs those of inner modules, too."""

    class Inner(nn.Module):
        def forward(self, q):
            return F.scaled_dot_product_attention(q, q, q)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, q):
            first = self.inner(q)
            return first, F.scaled_dot_product_attention(first, q, q, **CAUSAL)

    q = torch.randn(1, 2, 40, 16)
    program = torch.export.export(Outer(), (q,), preserve_module_call_signature=("inner",))
    rewritten = torch_sage.apply_to_exported(program, ALWAYS)
    assert targets(rewritten) == [SDPA, SDPA]
    swapped = torch.export.unflatten(rewritten)
    for run in (rewritten.module(), swapped):
        for actual, expected in zip(run(q), Outer()(q), strict=True):
            assert_close(actual, expected)
    swapped.inner = Inner()
    assert torch.equal(swapped(q)[0], Inner()(q))


def test_writes_into_operands_do_not_reach_attention():
    """A repeated K is read before its repetition only if nothing wrote into it since."""

    def attend(q, k):
        k = k * 2
        repeated = k[:, :, None].expand(2, 2, 3, 24, 16).clone().view(2, 6, 24, 16)
        k.zero_()
        return F.scaled_dot_product_attention(q, repeated, repeated) + k.sum()

    q, k = torch.randn(2, 6, 24, 16), torch.randn(2, 2, 24, 16)
    rewritten = applied(attend, q, k)
    assert targets(rewritten).count(SDPA) == 1
    assert not any(target._schema.is_mutable for target in targets(rewritten))
    assert_close(rewritten.module()(q, k), attend(q, k))


def test_buffers_are_still_written(x):
    class Counting(Attend):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, input):
            self.calls += 1
            return super().forward(input) * self.calls

    model = Counting().eval().requires_grad_(False)
    rewritten = applied(copy.deepcopy(model), x)
    assert targets(rewritten).count(SDPA) == 1
    run = rewritten.module()
    for _ in range(2):
        assert_close(run(x), model(x))
    assert run.calls == 2


def test_regions():
    """Autocast and no_grad regions, and a branch, hold their attention in graphs of their own."""
    q = torch.randn(1, 2, 40, 16)

    def attend(q):
        return F.scaled_dot_product_attention(q, q, q)

    def regions(q, flag):
        with torch.no_grad():
            first = attend(q)
        with torch.autocast("cpu", torch.bfloat16):
            second = attend(q)
        return torch.cond(flag, attend, torch.sin, (first + second,))

    def region(q):
        with torch.no_grad():
            return attend(q) + 1

    for flag in (torch.tensor(True), torch.tensor(False)):
        rewritten = applied(regions, q, flag)
        dtypes = [node.meta["val"].dtype for node in calls(rewritten) if node.target is SDPA]
        assert sorted(map(str, dtypes)) == ["torch.bfloat16", "torch.float32", "torch.float32"]
        assert_close(rewritten.module()(q, flag), regions(q, flag))
    rewritten = applied(region, q)
    assert targets(rewritten).count(SDPA) == 1
    assert_close(rewritten.module()(q), region(q))


def test_program_without_hand_written_attention_keeps_its_operators(x):
    """A classifier's softmax is none: no matmul follows."""

    class Classifier(Attend):
        def forward(self, input):
            return super().forward(input).softmax(-1)

    rewritten = applied(Classifier().eval(), x)
    assert torch.ops.aten.linear.default in targets(rewritten)
    assert targets(rewritten).count(SDPA) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_softmax_that_is_converted(dtype):
    """As transformers' eager attention does. Export asserts the dtype before each conversion."""

    def attend(q):
        weights = torch.softmax(q @ q.transpose(-1, -2) * 0.25, -1, dtype=torch.float32)
        return weights.to(q.dtype) @ q

    q = torch.randn(1, 2, 40, 16, dtype=dtype)
    rewritten = applied(attend, q)
    assert targets(rewritten).count(SDPA) == 1
    assert torch.ops.aten._softmax.default not in targets(rewritten)
    assert_close(rewritten.module()(q), attend(q))
    # The passes at compilation.
    plain = torch.export.export(Module(attend), (q,)).module()
    with torch.no_grad(), torch_sage.enable(ALWAYS):
        assert outcomes(torch_sage.explain(plain, q)) == outcomes(torch_sage.report())


def test_reasons_are_reported(x):
    def attend(q):
        return F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)

    q = torch.randn(1, 2, 40, 16)
    rewritten = applied(attend, q)
    assert targets(rewritten) == [TORCH_SDPA]
    assert outcomes(torch_sage.report()) == [("fused", "dropout")]
    plain = torch.export.export(Attend().eval(), (x,))
    assert outcomes(torch_sage.explain(plain)) == [("fused", "below_crossover")]
    assert torch_sage.report().skipped == 1, "explain must not count"


def test_long_dynamic_sequences_are_measured_by_their_example(x):
    """The hint decides about speed; it survives saving."""
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    long = torch.randn(1, 2048, 64)
    program = torch.export.export(Attend().eval(), (long,), dynamic_shapes=({1: tokens},))
    for each in (program, saved_and_loaded(program)):
        assert targets(torch_sage.apply_to_exported(each)).count(SDPA) == 1


def test_what_is_no_inference_program_is_refused(model, x):
    with pytest.raises(TypeError, match="program must be an ExportedProgram, got <class"):
        torch_sage.apply_to_exported(model)
    with pytest.raises(ValueError, match="config must name one of"):
        torch_sage.apply_to_exported(torch.export.export(model, (x,)), "sage9")

    class Loss(Attend):
        def forward(self, input):
            return super().forward(input).sum()

    from torch.export.experimental import _export_forward_backward

    joint = _export_forward_backward(torch.export.export(Loss(), (x,)))
    with pytest.raises(ValueError, match="must be for inference, got one that computes gradients"):
        torch_sage.apply_to_exported(joint, ALWAYS)
