"""Write what main.cpp needs: DINOv2 as an AOTInductor package, and a photograph.

Usage: python package.py FOLDER [DEVICE]
"""

import sys
from pathlib import Path

import torch

import torch_sage
from torch_sage.demo.inputs import photographs
from torch_sage.demo.models.dinov2 import Features, load_model
from torch_sage.demo.packages import DINOV2


def main(folder: Path, device: str = "cpu") -> None:
    """Export the model for photographs of 518 pixels, rewrite its attention and compile it."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = photographs(("chelsea",), 518)
    with torch.no_grad():
        model = Features(load_model(DINOV2.path())).to(device)
        program = torch.export.export(model, (pixels.to(device),))
        program = torch_sage.apply_to_exported(program)
        print(torch_sage.report())
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(folder / "dinov2.pt2"),
            # The wrapper only calls kernels: to optimize it doubles the time of compilation.
            inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},
        )
    pixels.numpy().tofile(folder / "photograph.f32")
    print("library:", torch_sage.library_path())


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:3])
