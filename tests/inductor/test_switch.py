"""enable, disable, options and the backend."""

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends import registry
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config

import torch_sage
from tests.inductor.graphs import ALWAYS, FOR_CPU, SDPA, captured_graphs, count
from tests.inductor.test_hooks import Foreign
from torch_sage import SageConfig
from torch_sage.inductor.hooks import members
from torch_sage.inductor.passes import SagePass
from torch_sage.inductor.switch import enabled_config

REPOSITORY = Path(__file__).parents[2]


def attention(q):
    return F.scaled_dot_product_attention(q, q, q)


@pytest.fixture
def q():
    return torch.randn(1, 2, 32, 16)


def test_enable_after_compile_warns_and_recompiles(q, no_grad):
    """Trap 3: no dynamo guard sees Inductor's hooks, so the old code would run for ever."""
    compiled = torch.compile(attention)
    exact = compiled(q)
    with pytest.warns(UserWarning, match=r"1 function.*call enable\(\) before compiling"):
        handle = torch_sage.enable(ALWAYS)
    rewritten = compiled(q)
    assert not torch.equal(exact, rewritten)
    assert torch_sage.report().rewritten == 1
    handle.close()
    assert torch.equal(compiled(q), exact)


def test_enable_before_compile_does_not_warn(q, recwarn):
    torch_sage.enable().close()
    torch_sage.enable().close()
    assert [str(w.message) for w in recwarn if "torch_sage" in str(w.message)] == []


def test_handles_nest_and_close_in_any_order():
    outer, inner = SageConfig(smooth_k=False), SageConfig(smooth_v=True)
    first = torch_sage.enable(outer)
    second = torch_sage.enable(inner)
    assert enabled_config() == inner
    first.close()
    assert enabled_config() == inner
    second.close()
    assert not torch_sage.is_enabled()
    second.close()
    torch_sage.enable(outer)
    torch_sage.enable("sage1")
    torch_sage.disable()
    assert not torch_sage.is_enabled()
    first.close()
    assert not torch_sage.is_enabled()


def test_the_context_manager_ends_on_an_exception():
    with pytest.raises(KeyError), torch_sage.enable():
        raise KeyError
    assert not torch_sage.is_enabled()


@pytest.mark.parametrize(("bad", "error"), [("sage9", ValueError), (3, TypeError)])
def test_a_bad_config_changes_nothing(bad, error):
    with pytest.raises(error, match="config must"):
        torch_sage.enable(bad)
    with pytest.raises(error, match="config must"):
        torch_sage.options(bad)
    assert not torch_sage.is_enabled()


def test_options_are_scoped(q, no_grad):
    compiled = torch.compile(attention, options=torch_sage.options(ALWAYS))
    assert not torch.equal(compiled(q), attention(q))
    assert inductor_config.joint_custom_post_pass is None
    _, graphs = captured_graphs(attention, q, patches={})
    assert count(graphs, SDPA) == 0


def test_options_merge_mode_and_inductor_options():
    merged = torch_sage.options(mode="max-autotune", **{"triton.cudagraphs": False})
    assert merged["max_autotune"] is True
    assert merged["triton.cudagraphs"] is False
    with pytest.raises(RuntimeError, match="Unrecognized mode=quick"):
        torch_sage.options(mode="quick")


def test_options_keep_user_passes_and_replace_the_enabled_ones(q, no_grad):
    installed, given = Foreign(), Foreign()
    with inductor_config.patch(joint_custom_pre_pass=installed), torch_sage.enable("sage1"):
        scoped = torch_sage.options(ALWAYS, joint_custom_post_pass=given)
    pre, post = (members(scoped[f"joint_custom_{when}_pass"]) for when in ("pre", "post"))
    assert pre[0] is installed
    assert post[0] is given
    assert [p.config for p in (*pre, *post) if isinstance(p, SagePass)] == [ALWAYS, ALWAYS]
    _, graphs = captured_graphs(attention, q, patches=scoped)
    assert (installed.runs, given.runs, count(graphs, SDPA)) == (1, 1, 1)


def test_options_decide_over_enable(q, no_grad):
    scoped = torch_sage.options(ALWAYS.with_options(smooth_k=False))
    with torch_sage.enable(ALWAYS):
        _, graphs = captured_graphs(attention, q, patches=scoped)
    (node,) = [n for n in graphs[0].graph.nodes if n.target is SDPA]
    assert node.kwargs["smooth"] == "q"


def test_equal_options_share_compiled_code(q, no_grad):
    """dynamo compares backends by their options; unequal ones would compile again."""
    assert torch_sage.options(ALWAYS) == torch_sage.options(ALWAYS)
    assert torch_sage.options(ALWAYS) != torch_sage.options("sage1")


def test_backend_by_function_and_by_name(q, no_grad, monkeypatch):
    """The name is an entry point, so that it is known without importing torch_sage."""
    entry = EntryPoint("torch_sage", "torch_sage.inductor:backend", "torch_dynamo_backends")
    assert f'torch_sage = "{entry.value}"' in (REPOSITORY / "pyproject.toml").read_text()
    monkeypatch.setitem(registry._BACKENDS, entry.name, entry)
    big = torch.randn(1, 4, 1024, 64)
    for backend in (torch_sage.inductor.backend, "torch_sage"):
        torch._dynamo.reset()
        counters.clear()
        torch.compile(attention, backend=backend, options={"max_autotune": False})(big)
        assert torch_sage.report().rewritten == 1


def test_backend_uses_the_enabled_config(q, no_grad):
    with torch_sage.enable(ALWAYS):
        torch.compile(attention, backend=torch_sage.inductor.backend)(q)
    assert torch_sage.report().rewritten == 1


def test_without_anything_the_graph_is_torchs_own(q, no_grad):
    _, graphs = captured_graphs(attention, q, patches={})
    assert (count(graphs, SDPA), count(graphs, FOR_CPU)) == (0, 1)
