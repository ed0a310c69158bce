"""Opt in and out by module: ``sage``, ``exclude`` and ``apply_``.

A scope (``scope.py``) is entered around ``forward`` by a subclass of the module's class, one per
class and scope: dynamo's guard on the type of a module then tells scopes apart, so that identical
blocks share a graph exactly if they share a scope, and copies and pickles of a module keep theirs.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast, overload

import torch
from torch import nn

from torch_sage.config import SageConfig, as_config
from torch_sage.scope import EXACT, Scope, call_within, sage_scope

T = TypeVar("T")


def _within(function: Callable[..., Any], scope: Scope) -> Callable[..., Any]:
    """Return ``function`` inside ``scope``; of nested decorations the last one applied counts."""
    if inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function):
        raise TypeError(f"target must be an ordinary function, got {function.__qualname__}")
    plain = _plain(function)

    @functools.wraps(plain)
    def scoped(*args: Any, **kwargs: Any) -> Any:
        return call_within(scope, plain, *args, **kwargs)

    scoped.__torch_sage_plain__ = plain  # type: ignore[attr-defined]  # read by _plain alone
    return scoped


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    plain: Callable[..., Any] = getattr(function, "__torch_sage_plain__", function)
    return plain


class _ScopedModule(nn.Module):
    """Marks the classes that ``_scoped_class`` makes; ``_torch_sage_base`` is what they were."""

    _torch_sage_base: type[nn.Module]
    _torch_sage_scope: Scope


@functools.cache
def _scoped_class(base: type[nn.Module], scope: Scope) -> type[nn.Module]:
    """Return the subclass of ``base`` whose forward runs inside ``scope``."""

    def reduce_ex(self: nn.Module, protocol: Any) -> Any:
        rebuild, arguments, *state = cast("tuple[Any, ...]", base.__reduce_ex__(self, protocol))
        if rebuild is copyreg.__newobj__:  # type: ignore[attr-defined]  # not in typeshed
            rebuild, arguments = _new_scoped, (base, scope.key)
        return (rebuild, arguments, *state)

    members = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": reduce_ex,
        "_torch_sage_base": base,
        "_torch_sage_scope": scope,
        "forward": _within(base.forward, scope),
    }
    return type(base.__name__, (base, _ScopedModule), members)


def _new_scoped(base: type[nn.Module], key: tuple[Any, ...]) -> nn.Module:
    """Return an empty module for unpickling, in the scope that ``key`` names."""
    scope = EXACT if key == EXACT.key else sage_scope(key[1])
    scoped = _scoped_class(base, scope)  # type: ignore[arg-type]  # a class is hashable
    return scoped.__new__(scoped)


def _scope_module(module: nn.Module, scope: Scope) -> None:
    module = getattr(module, "_orig_mod", module)  # what torch.compile wrapped
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(f"target must not be scripted, got {type(module).__name__}")
    if "forward" in vars(module):
        # Such as by accelerate's hooks: what is called is not the class's forward any more.
        module.forward = _within(module.forward, scope)
    else:
        reset_(module, recurse=False)
        module.__class__ = _scoped_class(type(module), scope)  # type: ignore[arg-type]  # as above


def _scoped(target: T, scope: Scope) -> T:
    if isinstance(target, nn.Module):
        _scope_module(target, scope)
        return target
    if isinstance(target, type):
        if not issubclass(target, nn.Module):
            raise TypeError(f"target must be a Module class, got {target.__name__}")
        target.forward = _within(target.forward, scope)
        return target
    if callable(target):
        return cast(T, _within(target, scope))
    raise TypeError(f"target must be a Module, a Module class or a function, got {target!r}")


@overload
def sage(target: SageConfig | str | None = None, /) -> Callable[[T], T]: ...
@overload
def sage(target: T, /) -> T: ...
def sage(target: Any = None, /) -> Any:
    """Compute the SDPA calls of a module or function with quantized attention.

    ``@sage`` or ``@sage(config)`` on a Module class, a Module instance (changed in place and
    returned) or a function. Holds for everything called inside, eager or compiled, until a nested
    ``sage`` or ``exclude`` says otherwise; training and unsupported input run exact SDPA.

    Args:
        target: what to opt in, or the configuration (or a preset's name) of the decorator returned.

    Raises:
        TypeError: if ``target`` is none of these.
    """
    if target is None or isinstance(target, (SageConfig, str)):
        return functools.partial(_scoped, scope=sage_scope(as_config(target)))
    return _scoped(target, sage_scope(as_config(None)))


def exclude(target: T, /) -> T:
    """Keep exact attention in a Module class, a Module instance or a function.

    Also under ``torch_sage.enable()``: the traced graph says so itself. A nested ``sage`` opts in
    again.

    Raises:
        TypeError: if ``target`` is none of these.
    """
    return _scoped(target, EXACT)


def apply_(
    model: nn.Module,
    rules: Mapping[str, SageConfig | str | None],
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> nn.Module:
    """Opt submodules of ``model`` in or out by their qualified names, in place.

    Args:
        model: any module.
        rules: qualified name, or "re:" and a pattern that must match a whole name, to the
            configuration (or a preset's name); None excludes. A module's own name goes before
            patterns, and an earlier pattern before a later one.
        filter_fn: called with a module and its name; only where it returns True do rules apply.

    Returns:
        ``model``.

    Raises:
        ValueError: if a rule matches no module.
        re.error: if a pattern is not a regular expression.
    """
    scopes = {
        key: EXACT if config is None else sage_scope(as_config(config))
        for key, config in rules.items()
    }
    patterns = {key: re.compile(key[3:]) for key in rules if key.startswith("re:")}
    model_ = getattr(model, "_orig_mod", model)
    chosen: dict[str, str] = {}
    unused = dict.fromkeys(rules)
    for name, module in model_.named_modules():
        matches = [key for key in rules if key == name and key not in patterns]
        matches += [key for key, pattern in patterns.items() if pattern.fullmatch(name)]
        for key in matches:
            unused.pop(key, None)
        if matches and (filter_fn is None or filter_fn(module, name)):
            chosen[name] = matches[0]
    if unused:
        raise ValueError(f"rules must each match a module, got no match for {list(unused)}")
    for name, key in chosen.items():
        _scope_module(model_.get_submodule(name), scopes[key])
    return model


def reset_(model: nn.Module, *, recurse: bool = True) -> nn.Module:
    """Take back what ``sage``, ``exclude`` and ``apply_`` did to instances, in place.

    Args:
        model: any module; its class, where that was decorated, stays decorated.
        recurse: whether to reset submodules as well.

    Returns:
        ``model``.
    """
    module = getattr(model, "_orig_mod", model)
    for each in module.modules() if recurse else [module]:
        if isinstance(each, _ScopedModule):
            each.__class__ = each._torch_sage_base  # type: ignore[assignment]  # what it was
        if "forward" in vars(each):
            each.forward = _plain(each.forward)
    return model
