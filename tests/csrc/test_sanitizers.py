"""AddressSanitizer and UndefinedBehaviorSanitizer find nothing in the native library."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.csrc import isas

SCRIPT = Path(__file__).with_name("fuzz_ops.py")
LIBRARIES = ("libasan.so", "libstdc++.so")


def find_libraries() -> str | None:
    """Return what to preload, None where g++ has no sanitizer.

    Python is C, so without libstdc++ the sanitizer finds no __cxa_throw to wrap.
    """
    if shutil.which("g++") is None:
        return None
    ask = [["g++", f"-print-file-name={name}"] for name in LIBRARIES]
    paths = [subprocess.run(a, capture_output=True, text=True).stdout.strip() for a in ask]
    return " ".join(paths) if all(map(os.path.isabs, paths)) else None


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_libraries() is None, reason="g++ with libasan is not installed"),
]


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """A copy of the package with the library that ``TORCH_SAGE_SANITIZE`` builds."""
    environment = {**os.environ, "TORCH_SAGE_SANITIZE": "address,undefined", "CXX": "g++"}
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(build, cwd=isas.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    root = tmp_path_factory.mktemp("sanitized")
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(isas.ROOT / "torch_sage", root / "torch_sage", ignore=ignored)
    library = isas.ROOT / "build" / "sanitize" / "libtorch_sage.so"
    shutil.copy(library, root / "torch_sage")
    return root


def run_sanitized(root: Path, *arguments: str, **environment: str):
    """Run Python under the sanitizers. Leaks are not looked for: CPython and torch have many."""
    return isas.run_python(
        *arguments,
        package_root=root,
        LD_PRELOAD=find_libraries(),
        ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1",
        UBSAN_OPTIONS="print_stacktrace=1",
        **environment,
    )


@pytest.mark.parametrize("isa", isas.runnable())
def test_fuzzing_is_clean(sanitized, isa):
    done = run_sanitized(sanitized, str(SCRIPT), "12", "2", "--small", TORCH_SAGE_CPU_ISA=isa)
    assert done.returncode == 0, done.stderr[:4000]
    assert int(done.stdout.split()[0]) > 100


def test_the_sanitizer_is_awake(sanitized):
    """A read behind a heap block must end the process, or the test above proves nothing."""
    code = "import ctypes, torch_sage; p = ctypes.CDLL(None).malloc; p.restype = ctypes.c_void_p; "
    code += "import sys; sys.stdout.write(ctypes.string_at(p(1), 4096).hex())"
    done = run_sanitized(sanitized, "-c", code)
    assert done.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in done.stderr
