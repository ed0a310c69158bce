"""Adding passes to Inductor's hooks and taking them out again, whatever else is there.

torch 2.11 takes one pass per hook, so ours and the user's become one ``Chain``; 2.12 takes a list.
Since 2.12 an assignment to Inductor's configuration holds only in the current context, so plain
threads and executors would not see it; there the entry's default is set as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch._inductor import config as inductor_config
from torch._inductor import custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph
from torch.utils._config_module import _UNSET_SENTINEL

TAKES_LISTS = hasattr(custom_graph_pass, "get_custom_graph_passes")


class Chain(CustomGraphPass):
    """Several passes as one, for a hook that takes one."""

    def __init__(self, *passes: Any) -> None:
        """Take the passes in the order in which they run."""
        self.passes = passes

    def __call__(self, graph: Graph) -> None:
        """Run them in order."""
        for one in self.passes:
            one(graph)

    def uuid(self) -> Any | None:
        """Identify all; None, which keeps the graph out of the caches, if a member cannot."""
        uuids = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self.passes]
        return tuple(uuids) if all(uuids) else None

    def __deepcopy__(self, memo: object) -> Chain:
        """Return itself, as its members do."""
        return self

    def __eq__(self, other: object) -> bool:
        """Chains of equal passes are equal."""
        return isinstance(other, Chain) and self.passes == other.passes

    def __hash__(self) -> int:
        """Agree with ``__eq__``."""
        return hash(self.passes)


def members(hook: Any) -> tuple[Any, ...]:
    """Return the passes that the value of a hook stands for."""
    if hook is None:
        return ()
    if isinstance(hook, Chain):
        return hook.passes
    return tuple(hook) if isinstance(hook, (list, tuple)) else (hook,)


def combine(passes: tuple[Any, ...]) -> Any:
    """Return the value of a hook that runs ``passes`` in order."""
    if TAKES_LISTS:
        return list(passes) if passes else None
    return Chain(*passes) if len(passes) > 1 else next(iter(passes), None)


@dataclass(frozen=True)
class _Saved:
    """One hook before and after ``install``."""

    before: Any
    after: Any
    default: Any
    was_default: bool


class Installation:
    """Passes in Inductor's hooks, until ``remove``."""

    def __init__(self, passes: Mapping[str, CustomGraphPass]) -> None:
        """Append each pass to the hook that it is the value of."""
        self.passes = passes
        self._saved = {name: _install(name, one) for name, one in passes.items()}

    def remove(self) -> None:
        """Restore the user's own objects; what others put there since stays."""
        for name, saved in self._saved.items():
            _remove(name, self.passes[name], saved)

    def missing(self) -> list[str]:
        """Return the hooks that lost our pass in this context, to an assignment or a patch."""
        return [
            name
            for name, one in self.passes.items()
            if one not in members(getattr(inductor_config, name))
        ]


def _default_entry(name: str) -> Any | None:
    """Return the entry whose default every context sees, where overrides are per context."""
    entry = inductor_config._config[name]  # type: ignore[attr-defined]
    return entry if isinstance(entry.user_override, ContextVar) else None


def _install(name: str, one: CustomGraphPass) -> _Saved:
    entry = _default_entry(name)
    was_default = entry is not None and entry.user_override.get() is _UNSET_SENTINEL
    before = getattr(inductor_config, name)
    after = before
    if one not in members(before):
        after = combine((*members(before), one))
        setattr(inductor_config, name, after)
    default = None if entry is None else entry.default
    if entry is not None:
        entry.default = combine((*members(default), one))
    return _Saved(before, after, default, was_default)


def _remove(name: str, one: CustomGraphPass, saved: _Saved) -> None:
    entry = _default_entry(name)
    if entry is not None:
        entry.default = saved.default
    now = getattr(inductor_config, name)
    if now is saved.after and saved.before is not saved.after:
        setattr(inductor_config, name, saved.before)
        if entry is not None and saved.was_default:
            # An override with the default's value would hide the next enable() of another thread.
            entry.user_override.set(_UNSET_SENTINEL)
    elif one in members(now):
        setattr(inductor_config, name, combine(tuple(p for p in members(now) if p != one)))
