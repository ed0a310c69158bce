"""What the demo asks of each model, and the results it collects."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

Forwards = Mapping[str, Callable[..., Any]]
"""The model's parts by name, as they are or compiled."""


@dataclass(frozen=True)
class Workload:
    """One call whose output is compared with the unmodified model's."""

    name: str
    call: Callable[[Forwards], Any]
    timed: bool = True
    must_be_faster: bool = False
    """Whether torch_sage has to win; otherwise it must not lose."""


class Goal(NamedTuple):
    """One promise of the demo and whether this run kept it."""

    name: str
    value: str
    target: str
    met: bool


class DemoModel(ABC):
    """A pretrained model, its real inputs, and what must not change about its outputs."""

    title: str
    parts: dict[str, nn.Module]
    """The modules that are compiled."""

    workloads: list[Workload]

    attention_nodes: int
    """How many attention nodes at least must be rewritten, in all compiled graphs together."""

    def compile(self, **settings: Any) -> Forwards:
        """Return the parts, each compiled by ``torch.compile`` with ``settings``."""
        return {name: torch.compile(part, **settings) for name, part in self.parts.items()}

    @abstractmethod
    def probe(self) -> None:
        """Run the unmodified parts once; the error by layer is measured on what they attend to."""

    @abstractmethod
    def quality(self, reference: Mapping[str, Any], outputs: Mapping[str, Any]) -> list[Goal]:
        """Compare the outputs of every workload, by its name, with the unmodified model's."""


def require_complete(info: Mapping[str, Any]) -> None:
    """Check transformers' loading info: a weight that is missing would be random.

    Raises:
        ValueError: if a weight is missing, unexpected, or has the wrong shape.
    """
    problems = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if problems:
        raise ValueError(f"state_dict must match the model's weights, got {problems}")


def transformers() -> Any:
    """Return the module ``transformers``, untyped: its annotations do not hold when checked."""
    return importlib.import_module("transformers")
