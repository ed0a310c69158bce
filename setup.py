"""Build torch_sage's native libraries: LibTorch stable ABI, no CPython API, so one wheel for all.

libtorch_sage.so has the kernels. libtorch_sage_standalone.so loads it and defines the ops, which
the Python package does otherwise: for processes without Python.

Environment: CXX; TORCH_SAGE_CUDA=0|1|auto, auto builds CUDA kernels where nvcc is found; CUDA_HOME,
whose nvcc is taken instead of the one on PATH; TORCH_CUDA_ARCH_LIST; TORCH_SAGE_SANITIZE, for
example "address,undefined", builds into build/sanitize, without CUDA, and leaves the package alone.
"""

import ast
import functools
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

LIBRARIES = ("torch_sage.libtorch_sage", "torch_sage.libtorch_sage_standalone")
DEFINITIONS = ("torch_sage/ops/schemas.py", "torch_sage/ops/exact.py")
CXX_FLAGS = [
    *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    # A fused multiply-add skips the rounding of the product that the quantizer's definition has.
    "-ffp-contract=off",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # runs on every torch from 2.11 on
    "-DTORCH_STABLE_ONLY",
    *("-D_FORTIFY_SOURCE=2", "-fstack-protector-strong"),
]
LINK_FLAGS = [
    *("-shared", "-Wl,--no-undefined", "-Wl,-z,relro,-z,now,-z,noexecstack", "-Wl,-s"),
]
# By its name the kernels' library is found if it is loaded already, otherwise beside the other one.
# RPATH, not RUNPATH: no environment variable can put another library in its place.
LINK_KERNELS = ["-Wl,--version-script=csrc/exports.map", "-Wl,-soname,libtorch_sage.so"]
LINK_STANDALONE = [
    "-Wl,--version-script=csrc/standalone/exports.map",
    "-Wl,--disable-new-dtags,-rpath,'$$ORIGIN'",
]
# A source whose name ends with a key is compiled for that instruction set, and only on x86-64;
# csrc/common/cpu_isa.h chooses among them when the library runs. All others are baseline code.
ISA_FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512_vnni": ["-march=x86-64-v4", "-mavx512vnni"],
    "avx512_bf16": ["-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"],
}
# What the CUDA sources of a folder are compiled for: machine code, and PTX for GPUs that have none,
# which compile it when they first load it. Code runs on GPUs of its major number from its minor one
# on (sm_80's quantizers on 8.6), but sm_90a's and sm_120a's on their own alone. Hopper has code of
# all, so that they are tested there.
CUDA_CODES = {
    "attention/sm80": ("sm_80", "sm_86", "sm_90", "sm_120a", "compute_80"),
    "attention/sm89": ("sm_89", "sm_90", "sm_120a", "compute_89"),
    "attention/sm90": ("sm_90a",),
    "quantize/mma": ("sm_80", "sm_89", "sm_90", "sm_120a", "compute_80"),
    "quantize/cuda": ("sm_90a",),
}
CUDA_HOST = ("cuda", "attention/mma")  # whatever the GPUs
QUANTIZERS = {"sm80": "quantize/mma", "sm89": "quantize/mma", "sm90": "quantize/cuda"}
GPUS = ("8.0", "8.6", "8.7", "8.9", "9.0", "12.0", "12.1")  # that have kernels of their own
# nvcc compiles FP8 products with an fp16 accumulator, and for sm_120, from here on.
LEAST_NVCC = {"sm89": (12, 8), "sm_120a": (12, 8)}
NVCC_FLAGS = [
    *("-std=c++20", "-O3", "--expt-relaxed-constexpr"),
    *("-Xcompiler", "-fPIC,-fvisibility=hidden"),
    *("-Xptxas", "-v,-warn-spills"),  # what tests/csrc/test_cuda_code.py reads
]
# The runtime is linked statically: the library loads where there is no CUDA.
LINK_CUDA = ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]


class Cuda(NamedTuple):
    """The toolkit that compiles the CUDA kernels."""

    nvcc: str
    version: str
    includes: list[str]
    libraries: list[str]


@functools.cache
def find_cuda() -> Cuda | None:
    """Return the toolkit to build CUDA kernels with, or None: the library is for CPUs alone."""
    mode = os.environ.get("TORCH_SAGE_CUDA", "auto")
    if mode not in ("0", "1", "auto"):
        raise SystemExit(f"TORCH_SAGE_CUDA must be one of 0, 1, auto, got {mode!r}")
    gpus, ptx = wanted_gpus()
    nvcc, lack = find_nvcc(), None
    if os.environ.get("TORCH_SAGE_SANITIZE"):
        lack = "TORCH_SAGE_SANITIZE is set"
    elif find_compiler() is None:
        lack = "there is no C++ compiler"
    elif nvcc is None:
        lack = "nvcc is not found"
    elif not any(compiled_for(codes, gpus, ptx) for codes in CUDA_CODES.values()):
        lack = f"TORCH_CUDA_ARCH_LIST has none of {', '.join(GPUS[:-1])}"
        if mode == "auto":
            warnings.warn(f"{lack}: torch_sage will have no CUDA kernels", stacklevel=1)
    if mode == "1" and lack:
        raise SystemExit(f"TORCH_SAGE_CUDA must be 0 or auto where {lack}, got 1")
    return ask_nvcc(nvcc) if nvcc and mode != "0" and not lack else None


def wanted_gpus() -> tuple[tuple[str, ...], bool]:
    """Return the capabilities of TORCH_CUDA_ARCH_LIST, and whether it wants PTX: all by default."""
    text = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if not text:
        return GPUS, True
    arches = re.split(r"[;\s]+", text)
    for arch in arches:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST must list capabilities such as 9.0a, got {arch!r}"
            )
    return tuple(re.split("[af+]", arch)[0] for arch in arches), "+PTX" in text


def codes_of(folder: str, version: str) -> tuple[str, ...]:
    """Return what this nvcc compiles the sources of ``folder`` for: nothing leaves them out."""
    release = tuple(map(int, version.split(".")))
    if release < LEAST_NVCC.get(Path(folder).name, (0,)):
        return ()
    able = [code for code in CUDA_CODES[folder] if release >= LEAST_NVCC.get(code, (0,))]
    return compiled_for(able, *wanted_gpus())


def compiled_for(codes: Iterable[str], gpus: Iterable[str], ptx: bool) -> tuple[str, ...]:
    """Return those of ``codes`` to compile: for each GPU the newest machine code that it runs."""
    machine = [code for code in codes if code.startswith("sm_")]
    newest = {
        max((code for code in machine if runs(code, gpu)), key=number, default="") for gpu in gpus
    }
    wants_ptx = ptx and any(newest)
    return tuple(c for c in codes if c in newest or (wants_ptx and c.startswith("compute_")))


def runs(code: str, gpu: str) -> bool:
    """Return whether a GPU of a compute capability runs machine code or PTX."""
    if code.endswith("a"):
        return number(gpu) == number(code)
    same_major = number(gpu) // 10 == number(code) // 10
    return number(gpu) >= number(code) and (same_major or code.startswith("compute_"))


def number(name: str) -> int:
    """Return the number of a capability or a code, such as 90 for 9.0 and sm_90a."""
    return int(re.sub(r"\D", "", name))


def find_nvcc() -> str | None:
    """Return the CUDA compiler of CUDA_HOME if that is set, or the one on PATH or installed."""
    if home := os.environ.get("CUDA_HOME"):
        return shutil.which("nvcc", path=str(Path(home, "bin")))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def ask_nvcc(nvcc: str) -> Cuda:
    """Return what nvcc says of its toolkit: it may be a script far away from it."""
    text = ""
    for question in (["--version"], ["--dryrun", "-x", "cu", "-c", os.devnull]):
        done = subprocess.run([nvcc, *question], check=True, capture_output=True, text=True)
        text += done.stdout + done.stderr
    version = re.search(r"release (\d+\.\d+)", text)
    includes = re.search(r"^#\$ INCLUDES=(.*)$", text, re.MULTILINE)
    libraries = re.search(r"^#\$ LIBRARIES=(.*)$", text, re.MULTILINE)
    if not (version and includes and libraries):
        raise SystemExit(f"{nvcc} must tell its version and folders, got {text!r}")
    folders = [flag.removeprefix("-I") for flag in shlex.split(includes[1])]
    return Cuda(nvcc, version[1], folders, shlex.split(libraries[1]))


def find_compiler() -> list[str] | None:
    """Return the C++ compiler command, or None where the package will run without its library."""
    if sys.platform != "linux":
        return None
    if "CXX" in os.environ:
        return shlex.split(os.environ["CXX"])
    found = next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), None)
    return [found] if found else None


def source_flags(source: Path) -> list[str] | None:
    """Return what flags ``source`` needs; None: not for this architecture, or for CUDA only."""
    folder = "/".join(source.parent.parts[1:])
    if source.suffix == ".cu" or folder in (*CUDA_CODES, *CUDA_HOST):
        cuda = find_cuda()
        if cuda is None or (folder not in CUDA_HOST and not codes_of(folder, cuda.version)):
            return None
        if source.suffix == ".cpp":
            maps = [f"-ffile-prefix-map={folder}=cuda" for folder in cuda.includes]
            return [*maps, *(f for folder in cuda.includes for f in ("-isystem", folder))]
        # Contraction is as wrong for a quantizer here as it is in CXX_FLAGS.
        exact = ["-fmad=false"] if "quantize" in source.parts else []
        return [*exact, *gencode(codes_of(folder, cuda.version))]
    for suffix, flags in ISA_FLAGS.items():
        if source.stem.endswith(suffix):
            return flags if platform.machine() == "x86_64" else None
    return []


def gencode(codes: tuple[str, ...]) -> list[str]:
    """Return how nvcc is told what to compile for."""
    return [
        word
        for code in codes
        for word in ("-gencode", f"arch={code.replace('sm_', 'compute_')},code={code}")
    ]


def gpus_of(family: str, version: str) -> list[str]:
    """Return what GPUs run a family of attention kernels and the quantizers of its operands."""
    folders = (f"attention/{family}", QUANTIZERS[family])
    codes = [codes_of(folder, version) for folder in folders]
    return [gpu for gpu in GPUS if all(any(runs(c, gpu) for c in some) for some in codes)]


def cuda_header() -> str:
    """Return what the library says about its CUDA kernels, and its host code asks."""
    cuda = find_cuda()
    families = [Path(folder).name for folder in CUDA_CODES if folder.startswith("attention")]
    gpus = {name: gpus_of(name, cuda.version) if cuda else [] for name in families}
    built = [name for name in families if gpus[name]]
    described = ";".join(f"{name}:{','.join(gpus[name])}" for name in built)
    lines = [
        "#pragma once\n",
        f'#define TORCH_SAGE_CUDA "{",".join(built) or "none"}"',
        f'#define TORCH_SAGE_CUDA_GPUS "{described}"',
        f'#define TORCH_SAGE_CUDA_VERSION "{cuda.version if cuda else "none"}"',
        *(f"#define TORCH_SAGE_HAS_{name.upper()} {int(name in built)}" for name in families),
    ]
    return "\n".join(lines) + "\n"


def definitions_header() -> str:
    """Return the schemas of all ops as C++.

    They are defined in Python next to their fakes. Importing that would need torch; the strings
    alone are assignments of literals.
    """
    schemas: dict[str, str] = {}
    for path in DEFINITIONS:
        names: dict[str, object] = {}
        for node in ast.parse(Path(path).read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and is_literal(node.value, names):
                target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
                value = compile(ast.Expression(node.value), path, "eval")
                names[ast.unparse(target)] = eval(value, {"__builtins__": {}}, names)
        schemas.update(names["DEFINITIONS"])
    strings = "".join(f"    {json.dumps(name + schema)},\n" for name, schema in schemas.items())
    array = f"inline constexpr const char* kDefinitions[] = {{\n{strings}}};\n"
    return f"#pragma once\n\nnamespace torch_sage {{\n{array}}}  // namespace torch_sage\n"


def is_literal(value: ast.AST | None, names: dict[str, object]) -> bool:
    """Return whether ``value`` is made of constants and ``names`` alone."""
    kinds = (ast.Constant, ast.JoinedStr, ast.FormattedValue, ast.Dict, ast.Tuple, ast.Load)
    return value is not None and all(
        node.id in names if isinstance(node, ast.Name) else isinstance(node, kinds)
        for node in ast.walk(value)
    )


def nvcc_rule(cuda: Cuda, compiler: list[str]) -> list[str]:
    """Return how ninja compiles CUDA: two at a time, each takes gigabytes; what ptxas says is kept.

    It lies beside the object, for tests/csrc/test_cuda_code.py.
    """
    flags = [*NVCC_FLAGS, "-Icsrc"]
    flags += [f"-Xcompiler=-ffile-prefix-map={folder}=cuda" for folder in cuda.includes]
    if len(compiler) == 1:  # nvcc takes a program, not a command line
        flags += ["-ccbin", compiler[0]]
    return [
        "pool nvcc",
        "  depth = 2",
        "rule nvcc",
        f"  command = {shlex.join([cuda.nvcc, *flags])} $flags -MMD -MF $out.d -c $in -o $out"
        " > $out.ptxas 2>&1 || { cat $out.ptxas; exit 1; }",
        "  depfile = $out.d",
        "  deps = gcc",
        "  pool = nvcc",
    ]


def ninja_file(compiler: list[str], folder: Path) -> str:
    """Return the build graph: a compile edge per source and one link edge per library."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit("torch must be installed where torch_sage is built, got none")
    torch, cuda = Path(spec.origin).parent, find_cuda()
    cflags = [*CXX_FLAGS, "-Icsrc", f"-I{folder}", "-isystem", str(torch / "include")]
    # No path of the building machine in the binary: error texts and hash are the same everywhere.
    cflags += [f"-ffile-prefix-map={torch}=torch"]
    ldflags = [*LINK_FLAGS, f"-L{torch / 'lib'}", "-ltorch_cpu"]
    if sanitizers := os.environ.get("TORCH_SAGE_SANITIZE"):
        extra = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-g", "-O1"]
        cflags += [*extra, "-fno-omit-frame-pointer", "-U_FORTIFY_SOURCE"]
        ldflags = [f for f in ldflags if f != "-Wl,-s"] + extra
    lines = [
        f"builddir = {folder}",  # where ninja keeps its log
        f"cxx = {shlex.join(compiler)}",
        "rule compile",
        f"  command = $cxx {shlex.join(cflags)} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx $in {shlex.join(ldflags)} $flags -o $out",
        *(nvcc_rule(cuda, compiler) if cuda else []),
    ]
    objects: dict[bool, list[str]] = {False: [], True: []}
    for source in sorted(p for p in Path("csrc").rglob("*") if p.suffix in (".cpp", ".cu")):
        flags = source_flags(source)
        if flags is None:
            continue
        compiled = f"{folder / source}.o"
        objects["standalone" in source.parts].append(compiled)
        lines += [
            f"build {compiled} | {compiled}.ptxas: nvcc {source}"
            if source.suffix == ".cu"
            else f"build {compiled}: compile {source}",
            f"  flags = {shlex.join(flags)}",
        ]
    kernels, standalone = (folder / f"{name.split('.')[1]}.so" for name in LIBRARIES)
    link_cuda = [*cuda.libraries, *LINK_CUDA] if cuda else []
    lines += [
        f"build {kernels}: link {' '.join(objects[False])} | csrc/exports.map",
        f"  flags = {shlex.join([*LINK_KERNELS, *link_cuda])}",
        f"build {standalone}: link {' '.join(objects[True])} {kernels}"
        " | csrc/standalone/exports.map",
        f"  flags = {' '.join(LINK_STANDALONE)}",
    ]
    return "\n".join(lines) + "\n"


def write_if_changed(path: Path, text: str) -> None:
    """Write a generated header; one that is as it was must not make ninja compile again."""
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


class BuildLibrary(build_ext):
    """Runs ninja; the results have no CPython suffix because they are no Python modules."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return the file name inside the package, such as libtorch_sage.so."""
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Compile and link out of tree, then copy the library to where setuptools wants it."""
        sanitize = bool(os.environ.get("TORCH_SAGE_SANITIZE"))
        folder = Path("build", "sanitize" if sanitize else "native")
        built = folder / f"{ext.name.split('.')[1]}.so"
        folder.mkdir(parents=True, exist_ok=True)
        write_if_changed(folder / "definitions.h", definitions_header())
        write_if_changed(folder / "build_cuda.h", cuda_header())
        compiler = find_compiler()
        assert compiler is not None  # else there is no extension to build
        (folder / "build.ninja").write_text(ninja_file(compiler, folder))
        ninja = [sys.executable, "-m", "ninja", "-f", str(folder / "build.ninja"), str(built)]
        subprocess.run(ninja, check=True)
        target = Path(self.get_ext_fullpath(ext.name))
        if not sanitize:
            self.mkpath(str(target.parent))
            self.copy_file(str(built), str(target))

    def copy_extensions_to_source(self) -> None:
        """Copy into the source tree, except a sanitizer build."""
        if not os.environ.get("TORCH_SAGE_SANITIZE"):
            super().copy_extensions_to_source()


class TagWheel(bdist_wheel):
    """One wheel for every Python 3: the library does not know the interpreter."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return py3-none-<platform>; pure where nothing was compiled."""
        return "py3", "none", super().get_tag()[2]


find_cuda()  # refuses what it cannot do before anything is built
if find_compiler() is None:
    warnings.warn("no C++ compiler: torch_sage will run torch's own attention", stacklevel=1)
setup(
    ext_modules=[Extension(name, []) for name in LIBRARIES] if find_compiler() else [],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": TagWheel},
)
