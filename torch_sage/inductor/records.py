"""One record per attention node: what it was, where, and what became of it."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

import torch_sage
from torch_sage.ops.reasons import Reason

META_KEY = "torch_sage"
"""Where a node carries its record until the post-grad pass publishes it. No decision reads it."""


@dataclass(frozen=True)
class AttentionRecord:
    """An attention node and its fate; every field is JSON."""

    pattern: str
    """The pattern that found it, such as ``fused`` or ``manual``."""

    target: str
    """The operator that computed it."""

    module: str
    """Qualified name of the innermost module, "" when the graph does not say. Informational."""

    source: str
    """``file:line in function`` of the model's code, "" when unknown. Informational."""

    query: str
    """Shape and dtype of each operand, such as ``1x8x128x64 bfloat16``; "" when not understood."""

    key: str
    value: str
    attn_mask: str
    causal: str
    device: str

    recipe: str
    """Name of the recipe when rewritten, else ""."""

    reasons: tuple[Reason, ...]
    """Why it was left alone; empty when rewritten."""

    producers: str = ""
    """What else the op does, such as ``rotation``, that the graph did before it; or ""."""

    @property
    def outcome(self) -> str:
        """Return the recipe and what else the op does, "" when it was left alone."""
        return f"{self.recipe}, with {self.producers}" if self.producers else self.recipe

    @property
    def rewritten(self) -> bool:
        """Return whether the node became a torch_sage op."""
        return bool(self.recipe)

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON-serializable data."""
        data = asdict(self)
        data["reasons"] = [{"code": str(code), "message": text} for code, text in self.reasons]
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> AttentionRecord:
        """Return the record that ``to_dict`` described."""
        reasons = tuple(Reason(r["code"], r["message"]) for r in data["reasons"])
        return cls(**{**data, "reasons": reasons})


def describe(tensor: Tensor | None) -> str:
    """Return shape and dtype for people, symbolic sizes by name."""
    if tensor is None:
        return ""
    return f"{'x'.join(map(str, tensor.shape))} {str(tensor.dtype).removeprefix('torch.')}"


def module_name(node: Node) -> str:
    """Return the innermost module of the model that the node was traced in."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(next(reversed(stack.values()))[0])
    path = re.sub(r"\._modules\['([^']*)'\]|\['([^']*)'\]", r".\1\2", path)
    return re.sub(r"^(L\.\w+|G)(\.|$)", "", path)


def source_line(node: Node) -> str:
    """Return the innermost line of the model's code that the node was traced from."""
    trace = str(node.meta.get("stack_trace") or "")
    frames = [line.strip() for line in trace.splitlines() if line.strip().startswith('File "')]
    if not frames:
        return ""
    inside = tuple(f'File "{package.__path__[0]}' for package in (torch, torch_sage))
    theirs = [frame for frame in frames if not frame.startswith(inside)]
    path, _, place = (theirs or frames)[-1].removeprefix('File "').partition('", line ')
    line, _, function = place.partition(", in ")
    # Two path components name the file; the rest would tie a cached report to one machine.
    return f"{'/'.join(Path(path).parts[-2:])}:{line} in {function}"


def attach(node: Node, record: AttentionRecord) -> None:
    """Let ``node`` carry ``record`` to the post-grad pass."""
    node.meta[META_KEY] = (*node.meta.get(META_KEY, ()), record)
