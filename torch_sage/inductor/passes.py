"""The three passes that Inductor runs: before and after its joint passes, and before post-grad.

The joint passes rewrite. The third one publishes their records in ``counters["inductor"]``: only
what is counted between post-grad and code generation is stored with the compiled artifact and
counted again when a cache serves it, so a warm start reports what the cold one did.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.virtualized import V
from torch._logging._internal import trace_structured
from torch.fx import Graph, Node

from torch_sage import _extension
from torch_sage.config import SageConfig
from torch_sage.inductor import rewrite
from torch_sage.inductor.eligibility import TORCH_FUSION, TRAINING
from torch_sage.inductor.graph_utils import erase_assertions, is_training, output_node
from torch_sage.inductor.patterns import direct, encoder_layer, fused, manual, varlen
from torch_sage.inductor.patterns.match import Match, Refusal
from torch_sage.inductor.patterns.refusals import SOFTMAX_DIM
from torch_sage.inductor.records import META_KEY, AttentionRecord, attach
from torch_sage.ops.reasons import Reason

log = logging.getLogger(__name__)

COUNTER = "torch_sage_"
REPORT_COUNTER = f"{COUNTER}report:"
"""What follows is the JSON list of one graph's records; the count is how often it was compiled."""

_PRE_STATE_KEY = "torch_sage_pre"


@cache
def source_hash() -> str:
    """Return the hash of this package's sources: names within the package and contents."""
    root = Path(__file__).parents[1]
    digest = sha256()
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(sha256(path.read_bytes()).digest())
    return digest.hexdigest()


class SagePass(CustomGraphPass):
    """A pass with a configuration: its own, or the enabled one when it is installed globally."""

    stage: ClassVar[str]

    def __init__(self, config: Callable[[], SageConfig | None]) -> None:
        """Ask ``config`` at every run."""
        self._config = config

    @property
    def config(self) -> SageConfig | None:
        """Return the configuration to work by, or None to do nothing."""
        return self._config()

    def uuid(self) -> Any:
        """Identify what this pass would do now: code, kernels, configuration and torch."""
        config = self.config
        return (
            "torch_sage",
            self.stage,
            source_hash(),
            _extension.kernel_version(),
            _extension.cpu_isa(),
            None if config is None else config.cache_key(),
            torch.__version__,
        )

    def __call__(self, graph: Graph) -> None:
        """Run on ``graph`` unless disabled."""
        config = self.config
        if config is not None:
            # An autocast region is desugared by now; one around the call of torch.compile would
            # cast what is planned here a second time.
            with torch._C._DisableAutocast():
                self.run(graph, config)

    def run(self, graph: Graph, config: SageConfig) -> None:
        """Do the work of this stage."""
        raise NotImplementedError

    def __deepcopy__(self, memo: object) -> SagePass:
        """Return itself: torch copies config defaults per context, and all must stay this one."""
        return self

    def __eq__(self, other: object) -> bool:
        """Equal passes do the same, so that dynamo may reuse code compiled for an equal one."""
        return type(self) is type(other) and self._config == other._config

    def __hash__(self) -> int:
        """Agree with ``__eq__``."""
        return hash((type(self), self._config))


@dataclass(frozen=True)
class Always:
    """The configuration of a scoped pass."""

    config: SageConfig

    def __call__(self) -> SageConfig:
        """Return it."""
        return self.config


@dataclass
class _PreState:
    """What the pre pass tells the post pass of the same run; it follows from the graph alone."""

    fused: set[Node]
    refused: list[Node]
    wrong_softmax: bool


class PrePass(SagePass):
    """Rewrites attention written by hand, before Inductor's own patterns see it."""

    stage = "joint_custom_pre_pass"

    def run(self, graph: Graph, config: SageConfig) -> None:
        """Rewrite encoder layers and hand-written attention."""
        if is_training(graph):
            return
        erase_assertions(graph)
        for node, outcome in direct.find(graph):
            rewrite.note(node, outcome)
        refused, wrong_softmax, shared = [], False, _shared()
        for pattern in (encoder_layer, manual):
            for found in pattern.find(graph):
                if not rewrite.apply(graph, found, config, shared):
                    refused.append(found.anchor)
                if isinstance(found, Refusal):
                    wrong_softmax |= SOFTMAX_DIM in found.reasons
        seen = {node for node in graph.nodes if fused.is_fused(node)}
        output_node(graph).meta[_PRE_STATE_KEY] = _PreState(seen, refused, wrong_softmax)


class PostPass(SagePass):
    """Rewrites the fused SDPA operators, torch's and those that Inductor's patterns made."""

    stage = "joint_custom_post_pass"

    def run(self, graph: Graph, config: SageConfig) -> None:
        """Rewrite what is eligible, or say why the graph stays untouched."""
        training = is_training(graph)
        state = output_node(graph).meta.pop(_PRE_STATE_KEY, None)
        new_nodes, shared = False, _shared()
        for found in fused.find(graph):
            node = found.anchor if isinstance(found, Refusal) else _operator(found)
            is_new = state is not None and node not in state.fused
            new_nodes |= is_new
            against: tuple[Reason, ...] = ()
            if training:
                against = (TRAINING,)
            elif is_new and state.wrong_softmax:
                against = (TORCH_FUSION,)
            rewrite.apply(graph, found, config, shared, against)
        for packed in varlen.find(graph):
            rewrite.apply_packed(graph, packed, config, (TRAINING,) if training else ())
        if state is not None and not new_nodes:
            _rehome(graph, state.refused)
        for node, original in direct.markers(graph):
            rewrite.restore(graph, node, original)


class PublishPass(SagePass):
    """Counts the records that the joint passes left in the graph."""

    stage = "post_grad_custom_pre_pass"

    def run(self, graph: Graph, config: SageConfig) -> None:
        """Publish one JSON list per graph; a backward graph repeats its forward's records."""
        if is_training(graph):
            return
        publish([record for node in graph.nodes for record in node.meta.get(META_KEY, ())])


def publish(records: Iterable[AttentionRecord]) -> None:
    """Count, log and trace one graph's records."""
    records = list(records)
    rewritten = sum(record.rewritten for record in records)
    inductor = counters["inductor"]
    inductor[f"{COUNTER}graphs"] += 1
    if not records:
        return
    for name, count in (("rewritten", rewritten), ("skipped", len(records) - rewritten)):
        if count:
            inductor[f"{COUNTER}{name}"] += count
    for record in records:
        for reason in record.reasons:
            inductor[f"{COUNTER}skipped_{reason.code}"] += 1
        log.debug("%s", record)
    payload = json.dumps([record.to_dict() for record in records], sort_keys=True)
    inductor[f"{REPORT_COUNTER}{payload}"] += 1
    log.info("rewrote %d of %d attention nodes", rewritten, len(records))
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "torch_sage_report", "encoding": "json"},
        payload_fn=lambda: payload,
    )


def _shared() -> rewrite.Shared:
    """Return what one run shares; a package of AOTInductor is for processes without Python."""
    return rewrite.Shared(has_python=not V.aot_compilation)


def _operator(match: Match) -> Node:
    """Return the fused operator of a match, which is behind its getitem and perhaps a slice."""
    node = match.anchor
    while not fused.is_fused(node):
        node = node.all_input_nodes[0]
    return node


def _rehome(graph: Graph, carriers: list[Node]) -> None:
    """Move records whose node Inductor replaced to the output node, so that they are published."""
    alive = set(graph.nodes)
    for node in carriers:
        if node not in alive:
            for record in node.meta.get(META_KEY, ()):
                attach(output_node(graph), record)
