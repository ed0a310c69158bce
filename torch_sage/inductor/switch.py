"""Turning the passes on and off: for the process, for one ``torch.compile``, as a backend."""

from __future__ import annotations

import threading
import warnings
from types import TracebackType
from typing import Any

import torch
from torch._dynamo import convert_frame
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options

from torch_sage.config import SageConfig, as_config
from torch_sage.inductor.hooks import Installation, combine, members
from torch_sage.inductor.passes import Always, PostPass, PrePass, PublishPass, SagePass

_STAGES: tuple[type[SagePass], ...] = (PrePass, PostPass, PublishPass)


class _Enabled:
    """The process-wide state: who enabled what, the last one deciding."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.handles: list[Handle] = []
        self.installation: Installation | None = None

    def config(self) -> SageConfig | None:
        handles = self.handles
        return handles[-1].config if handles else None


_enabled = _Enabled()
_passes = {stage.stage: stage(_enabled.config) for stage in _STAGES}


class Handle:
    """What ``enable`` returns: ``close()`` or leaving the ``with`` block takes it back."""

    def __init__(self, config: SageConfig) -> None:
        """Hold ``config`` for ``enable``."""
        self.config = config

    def close(self) -> None:
        """Restore what was enabled before this handle; again, or after ``disable``, do nothing."""
        with _enabled.lock, convert_frame.compile_lock:
            if self in _enabled.handles:
                _enabled.handles.remove(self)
                _apply()

    def __enter__(self) -> Handle:
        """Return itself; ``enable`` has begun already."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()


def enable(config: SageConfig | str | None = None) -> Handle:
    """Rewrite attention in whatever ``torch.compile`` compiles from now on, in every thread.

    Functions that are already compiled are compiled again at their next call; a warning says so.

    Args:
        config: configuration, name of a preset, or None for the default.

    Returns:
        A handle that is also a context manager; the block ends what this call began.
    """
    handle = Handle(as_config(config))
    with _enabled.lock, convert_frame.compile_lock:
        stale = compiled_functions()
        _enabled.handles.append(handle)
        _apply()
    if stale:
        warnings.warn(
            f"torch_sage.enable() came after {stale} function(s) were compiled. They will be "
            "compiled again, with torch_sage, at their next call; call enable() before compiling "
            "to compile once. AOTInductor packages and captured CUDA graphs stay as they are.",
            stacklevel=2,
        )
    return handle


def disable() -> None:
    """Undo every ``enable``: restore the hooks, and compile without torch_sage from now on."""
    with _enabled.lock, convert_frame.compile_lock:
        if _enabled.handles:
            _enabled.handles.clear()
            _apply()


def is_enabled() -> bool:
    """Return whether ``enable`` is in force."""
    return _enabled.config() is not None


def enabled_config() -> SageConfig | None:
    """Return the configuration that ``enable`` put in force, or None."""
    return _enabled.config()


def missing_hooks() -> list[str]:
    """Return the hooks from which somebody removed the enabled passes."""
    installation = _enabled.installation
    return [] if installation is None else installation.missing()


def options(
    config: SageConfig | str | None = None, mode: str | None = None, **inductor_options: Any
) -> dict[str, Any]:
    """Return ``options`` for one ``torch.compile`` that rewrites attention; nothing else changes.

    ``torch.compile`` takes either ``mode`` or ``options``, so a mode is merged in here. Passes that
    are in Inductor's hooks now, or among ``inductor_options``, keep running, before ours.

    Args:
        config: configuration, name of a preset, or None for the default.
        mode: a mode of ``torch.compile``, such as ``max-autotune``.
        inductor_options: further options; dotted names as ``**{"triton.cudagraphs": True}``.
    """
    source = Always(as_config(config))
    merged = {**(list_mode_options(mode) if mode else {}), **inductor_options}
    for stage in _STAGES:
        given = merged.get(stage.stage, getattr(inductor_config, stage.stage))
        theirs = tuple(p for p in members(given) if not isinstance(p, SagePass))
        merged[stage.stage] = combine((*theirs, stage(source)))
    return merged


def backend(
    graph_module: torch.fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Any:
    """Compile as ``torch.compile(model, backend="torch_sage")``: Inductor with the passes.

    The configuration is the enabled one, else the default.
    """
    from torch._inductor.compile_fx import compile_fx

    patches = _scoped_options(enabled_config(), mode, **(options or {}))
    return compile_fx(graph_module, example_inputs, config_patches=patches)


_scoped_options = options


def compiled_functions() -> int:
    """Return how many functions dynamo holds compiled code for."""
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list

    codes = (weak() for weak in convert_frame.input_codes.seen)
    return sum(code is not None and bool(_debug_get_cache_entry_list(code)) for code in codes)


def _apply() -> None:
    """Make hooks and caches agree with the handles; the caller holds the locks.

    The compile lock keeps a compilation from asking for the uuid under one configuration and
    rewriting under another. No dynamo guard sees Inductor's hooks, hence the reset.
    """
    if _enabled.handles and _enabled.installation is None:
        _enabled.installation = Installation(_passes)
    elif not _enabled.handles and _enabled.installation is not None:
        _enabled.installation.remove()
        _enabled.installation = None
    torch._dynamo.reset_code_caches()
