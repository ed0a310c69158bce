"""The native library: loaded once from inside the package, and why it is not there if it is not.

Its twin for processes that do not import this package, ``library_path``, is only named here.
"""

from __future__ import annotations

import ctypes
import hashlib
from functools import cache
from pathlib import Path

import torch

NOT_BUILT = "extension not built"

# An absolute path inside the package and no search: no environment variable or working directory
# can put another library in its place.
_PATH = Path(__file__).resolve().with_name("libtorch_sage.so")
_STANDALONE = _PATH.with_name("libtorch_sage_standalone.so")

if hasattr(torch.ops.torch_sage, "sdpa"):
    raise ImportError(
        f"torch_sage must be imported before {_STANDALONE.name} is loaded, got ops that it defined "
        "already; load it afterwards, or not at all: importing torch_sage is enough"
    )


def kernels_path() -> Path:
    """Return where the library is, or would be."""
    return _PATH


def library_path() -> Path:
    """Return the library that a process without the Python package loads to have the ops.

    ``torch.ops.load_library`` or ``dlopen`` takes it; ``libtorch_sage.so`` must lie beside it. In a
    process that has imported torch_sage, loading it changes nothing.

    Raises:
        FileNotFoundError: if the native libraries were not built.
    """
    if not _STANDALONE.is_file():
        raise FileNotFoundError(f"{NOT_BUILT}: no {_STANDALONE.name} in {_STANDALONE.parent}")
    return _STANDALONE


@cache
def load_error() -> BaseException | None:
    """Load the library at the first call; return what went wrong, None if nothing did.

    An absent file is a ``FileNotFoundError``, so that it is told from a file that cannot be loaded.
    """
    if not _PATH.is_file():
        return FileNotFoundError(f"{NOT_BUILT}: no {_PATH.name} in {_PATH.parent}")
    try:
        torch.ops.load_library(_PATH)  # type: ignore[no-untyped-call]  # torch's
        # The schemas are defined by now; the standalone library must not do it again.
        ctypes.CDLL(str(_PATH)).torch_sage_claim_schemas()
    except (OSError, RuntimeError) as error:
        # torch says only which file it could not load; its cause is what the loader said.
        return error.__cause__ or error
    return None


def is_available() -> bool:
    """Return whether the native library is loaded."""
    return load_error() is None


def unavailable_reason() -> str | None:
    """Return None, "extension not built", or the error that a library which exists gave."""
    error = load_error()
    if error is None:
        return None
    if isinstance(error, FileNotFoundError):
        return NOT_BUILT
    return f"extension failed to load: {error}"


@cache
def kernel_version() -> str:
    """Return a hash of the binary for cache keys; "none" where no library is loaded."""
    if not is_available():
        return "none"
    return hashlib.sha256(_PATH.read_bytes()).hexdigest()


def build_info() -> dict[str, str]:
    """Return what was compiled and what runs here: cpu_isa, compiled_cpu_isas, cuda, cuda_gpus, ...

    Raises:
        RuntimeError: if the library is not loaded; its cause is the load error.
    """
    error = load_error()
    if error is not None:
        raise RuntimeError(f"torch_sage's native library must be loaded: {error}") from error
    describe = ctypes.CDLL(str(_PATH)).torch_sage_build_info
    describe.restype = ctypes.c_char_p
    text: bytes = describe()
    return dict(line.split("=", 1) for line in text.decode().splitlines())


@cache
def cuda_gpus() -> dict[str, tuple[str, ...]]:
    """Return what compute capabilities run each family of CUDA kernels, such as "sm90".

    Nothing where the library is absent or was built without CUDA.
    """
    families = build_info()["cuda_gpus"].split(";") if is_available() else []
    named = [family.split(":") for family in families if family]
    return {name: tuple(gpus.split(",")) for name, gpus in named}


@cache
def cpu_isa() -> str:
    """Return the instruction set of the CPU kernels in use; "none" where no library is loaded."""
    return build_info()["cpu_isa"] if is_available() else "none"
