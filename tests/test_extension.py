"""The native library: what it links to, where it comes from, and what happens without it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.csrc.isas import ROOT, run_python, runnable
from torch_sage import _extension

needs_binutils = pytest.mark.skipif(shutil.which("nm") is None, reason="binutils is not installed")


def tool(*command: str) -> str:
    """Return what a command says about the library."""
    arguments = [*command, str(_extension.kernels_path())]
    return subprocess.run(arguments, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def package_copy(tmp_path):
    """A folder with a copy of the package, without its library."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "torch_sage", tmp_path / "torch_sage", ignore=ignored)
    return tmp_path


def run_copy(root: Path, code: str, **environment: str) -> str:
    """Run ``code`` with the package under ``root`` and return what it writes."""
    done = run_python("-c", code, package_root=root, cwd=root, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_binutils
def test_only_the_stable_c_interface_of_torch_is_imported():
    """So the same file runs on torch 2.11 and later, for CPU or CUDA, under any Python."""
    symbols = [line.split()[-1] for line in tool("nm", "-D", "--undefined-only").splitlines()]
    assert len(symbols) > 50
    stable_c = r"(aoti_torch|torch)_[a-zA-Z0-9_]+"
    runtime = r".+@(GLIBC|GLIBCXX|CXXABI|GCC)_[0-9.]+"
    weak = r"__gmon_start__|_ITM_(de)?registerTMCloneTable"
    foreign = [s for s in symbols if not re.fullmatch(f"{stable_c}|{runtime}|{weak}", s)]
    assert foreign == []


@needs_binutils
def test_two_symbols_are_exported():
    symbols = [line.split()[-1] for line in tool("nm", "-D", "--defined-only").splitlines()]
    assert symbols == ["torch_sage_build_info", "torch_sage_claim_schemas"]


@needs_binutils
def test_library_is_hardened():
    """Relocations are read-only and bound at load, the stack is not executable."""
    segments = tool("readelf", "-lW")
    assert "GNU_RELRO" in segments
    (stack,) = (line for line in segments.splitlines() if "GNU_STACK" in line)
    assert " RW " in stack and "E" not in stack.split("0x")[-2].replace("RW", "")
    dynamic = tool("readelf", "-dW")
    assert "BIND_NOW" in dynamic or "NOW" in dynamic
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


@needs_binutils
def test_library_names_no_folder_of_the_building_machine():
    assert str(ROOT).encode() not in _extension.kernels_path().read_bytes()
    assert str(Path(torch.__file__).parent).encode() not in _extension.kernels_path().read_bytes()


@needs_binutils
@pytest.mark.skipif(
    not (ROOT / "build" / "native").is_dir(), reason="the library was built elsewhere"
)
def test_no_inline_function_of_one_instruction_set_is_shared():
    """The linker keeps one copy of a weak function: an AVX-512 one would crash older machines."""
    objects = [o for s in ("avx2", "avx512*") for o in ROOT.glob(f"build/native/**/*_{s}.o")]
    assert objects
    for path in objects:
        listing = subprocess.run(["nm", str(path)], capture_output=True, text=True, check=True)
        assert re.findall(r" [WVu] .*", listing.stdout) == [], path.name


def test_library_lies_in_the_package():
    assert _extension.kernels_path() == ROOT / "torch_sage" / "libtorch_sage.so"


def test_no_search_finds_another_library(package_copy, tmp_path):
    """A library in the working directory or on the loader's path is not looked at."""
    library = package_copy / "torch_sage" / "libtorch_sage.so"
    shutil.copy(_extension.kernels_path(), library)
    (tmp_path / "libtorch_sage.so").write_bytes(b"not a library" * 100)
    code = "from torch_sage import _extension as e; import sys; assert e.is_available();"
    code += "sys.stdout.write(str(e.kernels_path()))"
    assert run_copy(package_copy, code, LD_LIBRARY_PATH=str(tmp_path)) == str(library)


def test_absent_library_is_a_reason_and_tracing_still_works(package_copy):
    run_copy(
        package_copy,
        """if True:
        import pytest, torch, torch_sage
        from torch_sage import _extension
        assert not _extension.is_available()
        assert _extension.unavailable_reason() == "extension not built"
        assert _extension.kernel_version() == "none"
        q = torch.randn(1, 2, 5, 8)
        with pytest.raises(RuntimeError, match="extension not built"):
            torch.ops.torch_sage.sdpa(q, q, q)
        m = q.to("meta")
        assert torch.ops.torch_sage.sdpa(m, m, m).shape == q.shape
        with pytest.raises(RuntimeError, match="must be loaded") as caught:
            _extension.build_info()
        assert isinstance(caught.value.__cause__, FileNotFoundError)
        """,
    )


def test_broken_library_shows_the_error_of_the_loader(package_copy):
    """A broken build must not look like an absent one."""
    (package_copy / "torch_sage" / "libtorch_sage.so").write_bytes(b"not a library" * 100)
    run_copy(
        package_copy,
        """if True:
        import pytest, torch, torch_sage
        from torch_sage import _extension
        reason = _extension.unavailable_reason()
        assert reason.startswith("extension failed to load: ") and "invalid ELF header" in reason
        q = torch.randn(1, 2, 5, 8)
        with pytest.raises(RuntimeError, match="invalid ELF header"):
            torch.ops.torch_sage.sdpa(q, q, q)
        with pytest.raises(RuntimeError, match="invalid ELF header") as caught:
            _extension.build_info()
        assert isinstance(caught.value.__cause__, OSError)
        """,
    )


def test_kernel_version_follows_the_content(package_copy):
    library = package_copy / "torch_sage" / "libtorch_sage.so"
    code = (
        "from torch_sage import _extension as e; import sys; sys.stdout.write(e.kernel_version())"
    )
    shutil.copy(_extension.kernels_path(), library)
    assert run_copy(package_copy, code) == _extension.kernel_version()
    with library.open("ab") as file:
        file.write(b"\0")
    assert run_copy(package_copy, code) != _extension.kernel_version()


def test_import_is_quiet():
    """Importing the package starts no process, opens no socket, writes no file, wakes no CUDA."""
    done = run_python(
        "-B",
        "-c",
        """if True:
        import sys, torch
        watched = ("socket.", "subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.system",
                   "urllib.", "tempfile.", "os.mkdir", "os.rename", "os.remove")
        seen = []
        def audit(event, args):
            writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
            if writes or event.startswith(watched):
                seen.append((event, args))
        before = set(sys.modules)
        sys.addaudithook(audit)
        import torch_sage
        assert seen == [], seen
        assert not torch.cuda.is_initialized()
        new = set(sys.modules) - before
        heavy = {m for m in new if m.split(".")[0] == "triton" or m.startswith("torch._inductor")}
        assert heavy == set(), heavy
        """,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("isa", runnable())
def test_environment_lowers_the_instruction_set(isa):
    code = "from torch_sage import _extension as e; import sys; "
    code += "sys.stdout.write(e.build_info()['cpu_isa'])"
    assert run_python("-c", code, TORCH_SAGE_CPU_ISA=isa).stdout == isa


def test_unknown_instruction_set_is_an_error():
    code = (
        "import torch, torch_sage; q = torch.randn(1, 1, 4, 8); torch.ops.torch_sage.sdpa(q, q, q)"
    )
    done = run_python("-c", code, TORCH_SAGE_CPU_ISA="mmx")
    assert done.returncode != 0
    assert "TORCH_SAGE_CPU_ISA must be one of portable" in done.stderr
    assert "got 'mmx'" in done.stderr


def test_calls_leave_no_memory_behind():
    """torch's conversion of a string argument leaks it (2.11 to 2.13); ours must not.

    20,000 calls with six strings would leave 20,000 * 6 * 48 bytes = 5.8 MB; half of it fails.
    """
    q = torch.randn(1, 1, 2, 4)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    def call(times: int) -> None:
        for _ in range(times):
            torch.ops.torch_sage.sdpa(q, q, q)

    with torch.inference_mode():
        call(5_000)
        before = resident()
        call(20_000)
    assert resident() - before < 2_900_000
