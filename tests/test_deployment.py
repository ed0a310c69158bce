"""Without the Python package: its ops from the standalone library, in packages, in C++."""

from __future__ import annotations

import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_sage
from tests.csrc.isas import ROOT, run_python
from tests.without_package import run_without_package
from torch_sage import SageConfig, _extension

ALWAYS = SageConfig(dispatch="always")
OPS = torch_sage.ops.__all__


@pytest.fixture(scope="module", autouse=True)
def compile_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


def test_schemas_are_those_of_the_package():
    """setup.py reads them from the same source; this sees a library that was not rebuilt."""
    code = """
for name in sys.argv[2:]:
    print(getattr(torch.ops.torch_sage, name).default._schema)
"""
    done = run_without_package(code, *OPS)
    assert done.returncode == 0, done.stderr
    expected = [str(getattr(torch.ops.torch_sage, name).default._schema) for name in OPS]
    assert done.stdout.splitlines() == expected


def test_ops_compute_what_they_do_in_the_package(tmp_path):
    torch.manual_seed(0)
    q, k = torch.randn(2, 6, 40, 16), torch.randn(2, 2, 72, 16)
    mask = torch.rand(40, 72) > 0.3
    arguments = {
        "sdpa": ((q, k, k, mask, "none", 0.3), {"output_order": "bshd"}),
        "exact_sdpa": ((q, k, k, mask), {"scale": 0.3, "enable_gqa": True}),
        "exact_softmax": ((q, -2, torch.float64), {}),
    }
    torch.save(arguments, tmp_path / "arguments.pt")
    code = """
arguments = torch.load(sys.argv[2])
results = {n: getattr(torch.ops.torch_sage, n)(*a, **k) for n, (a, k) in arguments.items()}
torch.save(results, sys.argv[3])
"""
    done = run_without_package(code, tmp_path / "arguments.pt", tmp_path / "results.pt")
    assert done.returncode == 0, done.stderr
    results = torch.load(tmp_path / "results.pt")
    for name, (args, kwargs) in arguments.items():
        expected = getattr(torch.ops.torch_sage, name)(*args, **kwargs)
        assert torch.equal(results[name], expected), name
        assert results[name].stride() == expected.stride(), name
    exact = F.scaled_dot_product_attention(q, k, k, mask, scale=0.3, enable_gqa=True)
    assert torch.equal(results["exact_sdpa"], exact)
    assert torch.equal(results["exact_softmax"], q.softmax(-2, torch.float64))


def test_bad_arguments_are_errors():
    done = run_without_package("q = torch.zeros(3, 4); torch.ops.torch_sage.sdpa(q, q, q)")
    assert done.returncode == 1
    assert "query must" in done.stderr


def test_loading_after_the_import_changes_nothing():
    code = """if True:
        import torch, torch_sage
        for _ in range(2):
            torch.ops.load_library(torch_sage.library_path())
        q = torch.randn(1, 1, 8, 8, requires_grad=True)
        torch.ops.torch_sage.exact_softmax(q, -1).sum().backward()
        assert torch.Tag.pt2_compliant_tag in torch_sage.ops.sdpa.tags
        assert q.grad is not None
        """
    done = run_python("-W", "error", "-c", code)
    assert (done.returncode, done.stderr) == (0, "")


def test_importing_after_the_library_is_an_error_that_says_so():
    code = f"""if True:
        import torch
        torch.ops.load_library({str(torch_sage.library_path())!r})
        import torch_sage
        """
    done = run_python("-c", code)
    assert done.returncode == 1
    assert "ImportError: torch_sage must be imported before libtorch_sage_standal" in done.stderr


def test_a_library_that_was_not_built_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(_extension, "_STANDALONE", tmp_path / "absent.so")
    with pytest.raises(FileNotFoundError, match=r"extension not built: no absent\.so in"):
        torch_sage.library_path()


@pytest.mark.skipif(shutil.which("readelf") is None, reason="binutils is not installed")
def test_library_is_bound_to_its_neighbour_and_the_stable_interface():
    def tool(*command: str) -> str:
        arguments = [*command, str(torch_sage.library_path())]
        return subprocess.run(arguments, capture_output=True, text=True, check=True).stdout

    dynamic = tool("readelf", "-dW")
    needed = re.findall(r"NEEDED.*\[(.*?)\]", dynamic)
    assert {"libtorch_sage.so", "libtorch_cpu.so"} < set(needed)
    assert not [name for name in needed if "python" in name]
    # RPATH is looked at before LD_LIBRARY_PATH, RUNPATH after it.
    assert re.findall(r"(RPATH|RUNPATH).*\[(.*?)\]", dynamic) == [("RPATH", "$ORIGIN")]
    assert "NOW" in dynamic
    assert tool("nm", "-D", "--defined-only") == ""
    symbols = [line.split()[-1] for line in tool("nm", "-D", "--undefined-only").splitlines()]
    ours = r"torch_sage_claim_schemas|(aoti_torch|torch)_[a-z0-9_]+"
    runtime = r".+@(GLIBC|GLIBCXX|CXXABI|GCC)_[0-9.]+"
    weak = r"__gmon_start__|_ITM_(de)?registerTMCloneTable"
    assert [s for s in symbols if not re.fullmatch(f"{ours}|{runtime}|{weak}", s)] == []


def test_no_search_finds_another_library_of_kernels(tmp_path):
    (tmp_path / "libtorch_sage.so").write_bytes(b"not a library" * 100)
    code = "q = torch.zeros(1, 1, 2, 4); torch.ops.torch_sage.sdpa(q, q, q)"
    done = run_without_package(code, LD_LIBRARY_PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr


class Attend(nn.Module):
    """Self-attention between projections, by hand or by SDPA."""

    def __init__(self, by_hand: bool = False) -> None:
        super().__init__()
        self.by_hand = by_hand
        self.project = nn.Linear(64, 192)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        if self.by_hand:
            out = torch.softmax(q @ k.transpose(-1, -2) * 0.25, -1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).flatten(2)


def test_package_runs_where_torch_sage_was_never_imported(tmp_path):
    """With dynamic lengths, and with what is excluded: those ops are in the package, too."""
    torch.manual_seed(0)
    model = nn.Sequential(
        Attend(),
        torch_sage.exclude(Attend()),
        torch_sage.exclude(Attend(by_hand=True)),
    )
    x = torch.randn(2, 40, 64)
    tokens = torch.export.Dim("tokens", min=2, max=512)
    program = torch.export.export(model.eval(), (x,), dynamic_shapes=({1: tokens},))
    program = torch_sage.apply_to_exported(program, ALWAYS)
    called = {str(node.target) for node in program.graph.nodes}
    ops = ("sdpa", "exact_sdpa", "exact_softmax")
    assert {f"torch_sage.{name}.default" for name in ops} <= called
    package = torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(tmp_path / "package.pt2"),
        inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},
    )
    inputs = [x, torch.randn(2, 111, 64)]
    torch.save(inputs, tmp_path / "inputs.pt")
    code = """
model = torch._inductor.aoti_load_package(sys.argv[2])
torch.save([model(x) for x in torch.load(sys.argv[3])], sys.argv[4])
"""
    done = run_without_package(code, package, tmp_path / "inputs.pt", tmp_path / "outputs.pt")
    assert done.returncode == 0, done.stderr
    here = torch._inductor.aoti_load_package(package)
    with torch.no_grad():
        for x, there in zip(inputs, torch.load(tmp_path / "outputs.pt"), strict=True):
            assert torch.equal(there, here(x))
            assert not torch.equal(there, model(x))
            assert F.cosine_similarity(there, model(x), dim=-1).min() > 0.999


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
def test_cpp_program_prints_the_features_that_python_computes(tmp_path):
    """examples/aoti_cpp as docs/deployment.md says, with an environment that has nothing in it."""
    source, build = ROOT / "examples" / "aoti_cpp", tmp_path / "build"
    done = run_python(str(source / "package.py"), str(tmp_path), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert "12 attention nodes rewritten, 0 skipped" in done.stdout
    configure = ["cmake", "-S", source, "-B", build]
    configure += [f"-DTORCH_FOLDER={Path(torch.__file__).parent}"]
    for command in (configure, ["cmake", "--build", build]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    package, photograph = tmp_path / "dinov2.pt2", tmp_path / "photograph.f32"
    command = [build / "dinov2", torch_sage.library_path(), package, photograph]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, env=threads, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = torch.tensor([float(line) for line in done.stdout.splitlines()])
    pixels = torch.from_numpy(np.fromfile(photograph, dtype=np.float32)).view(1, 3, 518, 518)
    features = torch._inductor.aoti_load_package(str(package))(pixels)[0, 0]
    assert printed.shape == features.shape == (384,)
    torch.testing.assert_close(printed, features, atol=1e-5, rtol=0)

    with zipfile.ZipFile(package) as archive:
        (compiled,) = (name for name in archive.namelist() if name.endswith(".so"))
        archive.extract(compiled, tmp_path)
    for file in (build / "dinov2", torch_sage.library_path(), tmp_path / compiled):
        linked = subprocess.run(["ldd", file], capture_output=True, text=True, check=True).stdout
        assert "libtorch_cpu.so" in linked
        assert re.search(r"lib(torch_)?python", linked) is None

    absent = subprocess.run(
        [build / "dinov2", tmp_path / "absent.so", package, photograph],
        capture_output=True,
        text=True,
    )
    assert absent.returncode == 1
    assert "absent.so: cannot open shared object file" in absent.stderr
