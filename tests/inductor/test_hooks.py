"""Installing next to other passes, in every thread, and leaving no trace."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass

import torch_sage
from tests.inductor.graphs import ALWAYS, FOR_CPU, SDPA, captured_graphs, count
from torch_sage.inductor.hooks import Chain, combine, members
from torch_sage.inductor.passes import PostPass, PrePass, PublishPass, SagePass

HOOKS = ("joint_custom_pre_pass", "joint_custom_post_pass", "post_grad_custom_pre_pass")


class Foreign(CustomGraphPass):
    """A user's pass that counts its runs."""

    def __init__(self, uuid="foreign"):
        self.identity = uuid
        self.runs = 0

    def __call__(self, graph):
        self.runs += 1

    def uuid(self):
        return self.identity


def ours(hook):
    return [p for p in members(getattr(inductor_config, hook)) if isinstance(p, SagePass)]


def attention(q):
    return F.scaled_dot_product_attention(q, q, q)


@pytest.fixture
def q():
    return torch.randn(1, 2, 32, 16)


def test_enable_installs_and_disable_restores_the_very_objects():
    foreign = Foreign()
    with inductor_config.patch(joint_custom_post_pass=foreign):
        torch_sage.enable()
        assert [len(ours(hook)) for hook in HOOKS] == [1, 1, 1]
        assert members(inductor_config.joint_custom_post_pass)[0] is foreign
        torch_sage.disable()
        assert inductor_config.joint_custom_post_pass is foreign
        assert inductor_config.joint_custom_pre_pass is None


def test_a_list_of_user_passes_is_restored_as_the_same_list():
    theirs = [Foreign("a"), Foreign("b")]
    with inductor_config.patch(joint_custom_pre_pass=theirs):
        with torch_sage.enable():
            assert members(inductor_config.joint_custom_pre_pass)[:2] == tuple(theirs)
        assert inductor_config.joint_custom_pre_pass is theirs
        assert len(theirs) == 2


def test_foreign_passes_run_next_to_ours(q, no_grad):
    before, callable_runs = Foreign(), []
    with inductor_config.patch(
        joint_custom_pre_pass=before, joint_custom_post_pass=callable_runs.append
    ):
        with torch_sage.enable(ALWAYS):
            _, graphs = captured_graphs(attention, q, patches={})
    assert before.runs == 1
    assert len(callable_runs) == 1
    assert count(graphs, SDPA) == 1


def test_a_pass_added_after_enable_survives_disable():
    torch_sage.enable()
    late = Foreign()
    value = combine((*members(inductor_config.joint_custom_post_pass), late))
    inductor_config.joint_custom_post_pass = value
    torch_sage.disable()
    assert members(inductor_config.joint_custom_post_pass) == (late,)
    inductor_config.joint_custom_post_pass = None


def test_a_users_assignment_after_enable_is_reported_and_survives_disable():
    """Trap 9: an assignment to the hook replaces ours, and only the report can say so."""
    torch_sage.enable()
    mine = Foreign()
    inductor_config.joint_custom_post_pass = mine
    try:
        notes = torch_sage.report().notes
        assert any("joint_custom_post_pass was reassigned" in note for note in notes)
        torch_sage.disable()
        assert inductor_config.joint_custom_post_pass is mine
    finally:
        inductor_config.joint_custom_post_pass = None


def run_in_thread(work):
    results = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results[0]


def run_in_executor(work):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


@pytest.mark.parametrize("run", [run_in_thread, run_in_executor])
def test_threads_see_enable_and_disable(run, q):
    """Trap 1: since torch 2.12 a configuration set here is not set in another thread."""

    def rewrites():
        with torch.no_grad():
            _, graphs = captured_graphs(attention, q, patches={})
        return count(graphs, SDPA), count(graphs, FOR_CPU)

    assert run(rewrites) == (0, 1)
    with torch_sage.enable(ALWAYS):
        assert run(rewrites) == (1, 0)
    assert run(rewrites) == (0, 1)


def test_a_thread_that_saw_enable_does_nothing_after_disable(q):
    """The thread's context keeps a copy of the hooks; the pass in it must go quiet."""
    handle = torch_sage.enable(ALWAYS)
    enabled, disabled = threading.Event(), threading.Event()
    seen = []

    def work():
        with torch.no_grad():
            _, graphs = captured_graphs(attention, q, patches={})
            seen.append(count(graphs, SDPA))
            enabled.set()
            disabled.wait()
            _, graphs = captured_graphs(attention, q, patches={})
            seen.append(count(graphs, SDPA))

    thread = threading.Thread(target=work)
    thread.start()
    enabled.wait()
    handle.close()
    disabled.set()
    thread.join()
    assert seen == [1, 0]


def test_enable_in_one_thread_reaches_another(q):
    def rewrites():
        with torch.no_grad():
            _, graphs = captured_graphs(attention, q, patches={})
        return count(graphs, SDPA)

    run_in_thread(lambda: torch_sage.enable(ALWAYS))
    assert run_in_thread(rewrites) == 1
    run_in_thread(torch_sage.disable)
    assert run_in_thread(rewrites) == 0


def test_many_threads_may_toggle_at_once():
    def toggle(_):
        with torch_sage.enable():
            assert torch_sage.is_enabled()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(toggle, range(40)))
    assert not torch_sage.is_enabled()
    assert [ours(hook) for hook in HOOKS] == [[], [], []]


def test_chain_runs_in_order_and_is_cacheable_only_if_all_members_are():
    """torch 2.11 takes one pass per hook."""
    first, second = Foreign("a"), Foreign("b")
    assert Chain(first, second).uuid() == ("a", "b")
    assert Chain(first, lambda graph: None).uuid() is None
    assert Chain(first, Foreign(None)).uuid() is None
    order = []
    Chain(lambda graph: order.append(1), lambda graph: order.append(2))(torch.fx.Graph())
    assert order == [1, 2]
    assert members(Chain(first, second)) == (first, second)


def test_hooks_of_torch_2_11_take_a_chain(monkeypatch, q, no_grad):
    """One pass stays itself, two become a Chain; the same graph comes out."""
    monkeypatch.setattr("torch_sage.inductor.hooks.TAKES_LISTS", False)
    foreign = Foreign()
    assert combine(()) is None
    assert combine((foreign,)) is foreign
    with inductor_config.patch(joint_custom_post_pass=foreign):
        with torch_sage.enable(ALWAYS):
            assert isinstance(inductor_config.joint_custom_post_pass, Chain)
            _, graphs = captured_graphs(attention, q, patches={})
            assert count(graphs, SDPA) == 1
        assert inductor_config.joint_custom_post_pass is foreign
    assert foreign.runs == 1


@pytest.mark.parametrize("stage", [PrePass, PostPass, PublishPass])
def test_passes_copy_as_themselves(stage):
    """torch deep-copies defaults into each context."""
    import copy

    one = stage(lambda: None)
    assert copy.deepcopy([one])[0] is one
