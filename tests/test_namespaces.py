"""Who imports whom, and what importing the package costs and leaves alone."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import torch_sage
from tests.csrc.isas import ROOT, run_python
from torch_sage.ops.schemas import DEFINITIONS

PACKAGE = ROOT / "torch_sage"

# Lower levels know nothing of higher ones; within a level only along the listed order.
LEVELS: list[list[str]] = [
    ["torch_sage.config", "torch_sage._extension"],
    ["torch_sage.devices", "torch_sage.recipes", "torch_sage.crossover"],
    ["torch_sage.reference", "torch_sage.ops.reasons"],
    [
        "torch_sage.ops.checks",
        "torch_sage.ops.packed",
        "torch_sage.ops.schemas",
        "torch_sage.ops.after_import",
        "torch_sage.ops.hadamard",
        "torch_sage.ops.rotary",
        "torch_sage.ops.rules",
        "torch_sage.ops.exact",
        "torch_sage.ops.triton_packed",
        "torch_sage.ops.triton_statistics",
        "torch_sage.ops.triton_quantize",
        "torch_sage.ops.triton_round",
        "torch_sage.ops.triton_dot",
        "torch_sage.ops.triton_attention",
        "torch_sage.ops.triton_ops",
        "torch_sage.ops.gpu",
        "torch_sage.ops",
        "torch_sage.ops.dispatch",
    ],
    ["torch_sage.fusion"],
    [
        "torch_sage.attention",
        "torch_sage.varlen",
        "torch_sage.prepared",
        "torch_sage.scope",
        "torch_sage.module",
        "torch_sage.inductor",
    ],
    ["torch_sage.distributed"],
    ["torch_sage"],
    ["torch_sage.demo", "torch_sage.__main__"],
]
ORDER = {name: (level, i) for level, names in enumerate(LEVELS) for i, name in enumerate(names)}


def module_of(path: Path) -> str:
    """Return the module that a file is."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def owner(module: str) -> str:
    """Return the listed module or package that ``module`` belongs to."""
    while module not in ORDER:
        module = module.rpartition(".")[0]
    return module


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports(tree: ast.AST) -> set[str]:
    """Return the modules of ours that a file imports at run time."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if is_type_checking(node):
            continue
        if isinstance(node, ast.Import):
            # The bare package is there anyway, and good for its path alone.
            found |= {alias.name for alias in node.names} - {"torch_sage"}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                path = ROOT / submodule.replace(".", "/")
                is_module = path.is_dir() or path.with_suffix(".py").is_file()
                found.add(submodule if is_module else node.module)
        found |= imports(node)
    return {name for name in found if name.split(".")[0] == "torch_sage"}


FILES = sorted(path for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_go_down(path: Path) -> None:
    importer = owner(module_of(path))
    for name in imports(ast.parse(path.read_text(encoding="utf-8"))):
        imported = owner(name)
        if imported == importer:
            continue
        assert ORDER[imported] < ORDER[importer], f"{importer} must not import {imported}"


def test_the_two_columns_never_meet() -> None:
    """Attention called directly and attention found in graphs know nothing of each other."""
    column = {f"torch_sage.{name}" for name in ("attention", "prepared", "scope", "module")}
    for path in FILES:
        if owner(module_of(path)) == "torch_sage.inductor":
            found = {owner(name) for name in imports(ast.parse(path.read_text(encoding="utf-8")))}
            assert not found & column, module_of(path)


def test_rules_above_see_violations() -> None:
    tree = ast.parse("if x:\n    from torch_sage import attention\nimport torch_sage.ops.dispatch")
    assert imports(tree) == {"torch_sage.attention", "torch_sage.ops.dispatch"}
    assert ORDER["torch_sage.attention"] > ORDER["torch_sage.ops.dispatch"]


def test_public_names_exist_and_are_listed() -> None:
    for name in torch_sage.__all__:
        assert getattr(torch_sage, name) is not None
        assert name in dir(torch_sage)
    with pytest.raises(AttributeError, match="has no attribute 'sparkle'"):
        _ = torch_sage.sparkle


def run(code: str) -> None:
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


def test_import_pulls_in_no_compiler() -> None:
    """Neither what the pass needs nor what compiling needs is loaded by the import alone."""
    heavy = ("triton", "sympy", "torch._inductor", "torch._dynamo", "torch_sage.inductor")
    heavy += ("torch.distributed.tensor", "torch_sage.distributed")
    run(
        f"""if True:
        import sys, torch
        before = set(sys.modules)
        import torch_sage
        q = torch.ones(1, 2, 3, 4)
        torch_sage.scaled_dot_product_attention(q, q, q, config=torch_sage.SageConfig())
        new = set(sys.modules) - before
        loaded = [n for n in new if n.startswith({heavy!r})]
        assert not loaded, loaded
        assert "enable" in dir(torch_sage)
        assert torch_sage.is_enabled() is False
        assert "torch_sage.inductor" in sys.modules
        assert callable(torch_sage.distributed.ring_attention)
        """
    )


def test_star_import_and_all() -> None:
    run(
        "from torch_sage import *; assert callable(enable) and callable(sage) and callable(why_not)"
    )


def test_fullgraph_as_the_very_first_call() -> None:
    run(
        """if True:
        import torch, torch_sage
        f = torch.compile(
            lambda q: torch_sage.scaled_dot_product_attention(
                q, q, q, config=torch_sage.SageConfig(dispatch="always")),
            backend="aot_eager", fullgraph=True)
        q = torch.randn(1, 2, 8, 16)
        exact = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        assert torch.allclose(f(q), exact, atol=.1)
        """
    )


def test_ops_are_registered_by_the_import_alone() -> None:
    run(
        f"""if True:
        import torch, torch_sage
        for name in {list(DEFINITIONS)}:
            assert torch.Tag.pt2_compliant_tag in getattr(torch.ops.torch_sage, name).default.tags
        """
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_import_starts_no_thread() -> None:
    run(
        """if True:
        import os, torch
        before = len(os.listdir("/proc/self/task"))
        import torch_sage
        assert len(os.listdir("/proc/self/task")) == before
        """
    )
