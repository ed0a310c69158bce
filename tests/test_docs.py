"""What README.md and docs/ say is what happens."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from docs import support_matrix, support_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def tracked_files():
    if not (ROOT / ".git").exists():
        pytest.skip("needs the git checkout: .git is missing")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True)
    paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file()]


@pytest.fixture
def clean_dynamo():
    """Start without compiled functions and reports of other tests."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_python_blocks_run(page, clean_dynamo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = blocks((ROOT / page).read_text(encoding="utf-8"), "python")
    assert found
    namespace = {"__name__": page}
    for block in found:
        exec(compile(block, page, "exec"), namespace)


def test_ci_runs_the_commands_of_the_readme():
    commands = blocks(README, "bash")[0].splitlines()
    assert commands == ["make test", "make demo"]
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert commands[0] in lines
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in commands:
        assert re.search(rf"^{command.removeprefix('make ')}: env$", makefile, re.MULTILINE)


def test_support_tables_are_the_generated_ones():
    """``python docs/support_table.py`` brings README.md up to date."""
    assert support_table.parts(README)[1] == support_table.generated()


def test_support_matrix_is_the_generated_one():
    """``python -m docs.support_matrix`` brings it up to date; each feature is shown on GPUs."""
    assert support_matrix.PAGE.read_text(encoding="utf-8") == support_matrix.generated()
    rows = [line.split(" | ") for line in support_matrix.features().splitlines()[2:]]
    assert len(rows) == len(support_matrix.FEATURES)
    assert all("::test_" in cell for row in rows for cell in row[-2:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_demo_packages_are_pinned_once():
    """requirements/demo-models.txt installs what the demo asks for."""
    from torch_sage.demo import packages

    pinned = {
        f"{value.distribution}=={value.version}"
        for value in vars(packages).values()
        if isinstance(value, packages.DataPackage)
    }
    text = (ROOT / "requirements" / "demo-models.txt").read_text(encoding="utf-8")
    assert {line for line in text.splitlines() if line and not line.startswith("#")} == pinned


def test_no_tracked_file_names_a_machine():
    """A path or host of one machine would be wrong on all others."""
    secrets = re.compile(
        rb"(?<![\w.])/(work|opt|root|home)/[\w.]|files\.python" + rb"hosted|pypi\.org"
    )
    named = {
        f"{path.relative_to(ROOT)}: {match[0].decode()}"
        for path in tracked_files()
        for match in secrets.finditer(path.read_bytes())
    }
    assert not named
