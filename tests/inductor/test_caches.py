"""Compile caches: keyed by what the passes would do, and silent about nothing on a warm start."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import torch_sage
from torch_sage import SageConfig
from torch_sage.inductor import passes
from torch_sage.inductor.passes import Always, PostPass, PrePass

REPOSITORY = Path(__file__).parents[2]
PROBE = Path(__file__).with_name("cache_probe.py")


def probe(setting, cache, *artifacts, repository=REPOSITORY, **env):
    """Compile in a fresh process that has only ``cache`` in common with others."""
    process = subprocess.run(
        [sys.executable, str(PROBE), setting, *artifacts],
        env={
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": str(cache),
            "PYTHONPATH": str(repository),
            **env,
        },
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    (line,) = [x for x in process.stdout.splitlines() if x.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


def outcome(result):
    """Return whether a result came from the AOTAutograd cache, the FX graph cache or neither."""
    if result["autograd"].get("autograd_cache_hit"):
        return "autograd hit"
    return "fx hit" if result["inductor"].get("fxgraph_cache_hit") else "miss"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One cache for the sequences below, whose order is theirs."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
def test_settings_never_share_entries_and_warm_reports_equal_cold_ones(cache):
    """Trap 2's other half: joint passes do not run on a hit, so the report must be replayed."""
    assert outcome(probe("off", cache)) == "miss"

    # Without the AOTAutograd cache the joint passes run, and then the FX graph cache hits.
    cold = probe("on", cache, TORCHINDUCTOR_AUTOGRAD_CACHE="0")
    assert outcome(cold) == "miss"
    assert (cold["report"]["rewritten"], cold["report"]["skipped"]) == (3, 1)
    assert cold["report"]["reasons"] == {"dropout": 1}
    modules = [node["module"] for node in cold["report"]["graphs"][0]["nodes"]]
    assert modules == ["first", "first", "second", "second"]
    lukewarm = probe("on", cache)
    assert outcome(lukewarm) == "fx hit"
    assert lukewarm["report"] == cold["report"]

    warm = probe("on", cache)
    assert outcome(warm) == "autograd hit"
    assert warm["report"] == cold["report"]

    other = probe("other", cache)
    assert outcome(other) == "miss"
    assert other["report"]["rewritten"] == 3

    off = probe("off", cache)
    assert outcome(off) == "autograd hit"
    assert off["report"]["graphs"] == []


@pytest.mark.slow
def test_options_and_enable_share_entries(cache):
    """They do the same to the graph."""
    probe("on", cache)
    warm = probe("scoped", cache)
    assert outcome(warm) == "autograd hit"
    assert warm["report"]["rewritten"] == 3


@pytest.mark.slow
def test_foreign_passes_keep_their_cacheability(cache):
    assert outcome(probe("foreign", cache)) == "miss"
    warm = probe("foreign", cache)
    assert outcome(warm) == "autograd hit"
    assert warm["report"]["rewritten"] == 3
    plain = probe("plain", cache)
    assert outcome(plain) == "miss"
    assert plain["inductor"]["fxgraph_cache_bypass"] == 1
    assert plain["report"]["rewritten"] == 3


@pytest.mark.slow
def test_artifacts_carry_the_cache_to_another_machine(tmp_path):
    """torch's mega-cache: one file, loaded into a process whose cache is empty."""
    file = str(tmp_path / "artifacts")
    # Headers compiled ahead take longer than what they save in an empty cache.
    fast = {"TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0"}
    cold = probe("on", tmp_path / "here", "save", file, **fast)
    assert outcome(cold) == "miss"
    warm = probe("on", tmp_path / "there", "load", file, **fast)
    assert outcome(warm) == "autograd hit"
    assert warm["report"] == cold["report"]
    assert warm["report"]["rewritten"] == 3


@pytest.mark.slow
def test_other_kernels_and_another_version_miss(cache, tmp_path):
    package = shutil.copytree(REPOSITORY / "torch_sage", tmp_path / "torch_sage")
    probe("on", cache, repository=tmp_path)
    with (package / "libtorch_sage.so").open("ab") as file:
        file.write(b"\0")
    assert outcome(probe("on", cache, repository=tmp_path)) == "miss"
    source = package / "__init__.py"
    text = source.read_text()
    assert text.count("__version__ = ") == 1
    source.write_text(text.replace("__version__ = ", '__version__ = "9" + '))
    assert outcome(probe("on", cache, repository=tmp_path)) == "miss"


def test_uuid_is_the_same_in_another_checkout(tmp_path):
    """Names within the package and contents count, paths do not."""
    shutil.copytree(
        REPOSITORY / "torch_sage",
        tmp_path / "elsewhere" / "torch_sage",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    code = (
        "import torch_sage; from torch_sage.inductor.passes import source_hash; "
        "print(torch_sage.__file__); print(source_hash())"
    )

    def ask():
        process = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(tmp_path / "elsewhere")},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        return process.stdout.splitlines()

    where, digest = ask()
    assert where.startswith(str(tmp_path))
    assert digest == passes.source_hash()
    source = tmp_path / "elsewhere" / "torch_sage" / "recipes.py"
    source.write_text(source.read_text() + "\n# changed\n")
    assert ask()[1] != digest


def test_uuid_tells_stage_config_kernel_and_torch_apart(monkeypatch):
    def uuid(stage=PrePass, **changes):
        return stage(Always(SageConfig(**changes))).uuid()

    base = uuid()
    assert base == uuid()
    assert base != uuid(PostPass)
    for field, value in {
        "qk": "int4",
        "granularity": "block",
        "pv": "e4m3",
        "smooth_q": True,
        "smooth_k": False,
        "smooth_v": True,
        "dispatch": "always",
        "on_unsupported": "warn",
    }.items():
        assert base != uuid(**{field: value}), field
    for target, value in {
        "torch_sage._extension.kernel_version": lambda: "another",
        "torch.__version__": "2.99",
    }.items():
        with monkeypatch.context() as patch:
            patch.setattr(target, value)
            assert base != uuid(), target


def test_disabled_passes_identify_themselves_as_such():
    with torch_sage.enable():
        on = torch_sage.inductor.switch._passes["joint_custom_pre_pass"].uuid()
    off = torch_sage.inductor.switch._passes["joint_custom_pre_pass"].uuid()
    assert on != off
