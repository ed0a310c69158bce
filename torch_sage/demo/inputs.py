"""Real inputs that are already on the machine: prose, recorded speech, photographs."""

from __future__ import annotations

import codecs
import contextlib
import io
from pydoc_data.topics import topics

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from torch_sage.demo.packages import SPEECH

# The two longest chapters of the Python reference that pydoc ships: 30k tokens of English.
_CHAPTERS = ("compound", "specialnames")
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


def prose() -> str:
    """Return chapters of the Python language reference."""
    return "\n\n".join(topics[name] for name in _CHAPTERS)


def zen() -> str:
    """Return the Zen of Python as one paragraph."""
    with contextlib.redirect_stdout(io.StringIO()):  # the module prints itself when imported
        import this
    _title, _, aphorisms = codecs.decode(this.s, "rot13").partition("\n")
    return " ".join(aphorisms.split())


def speech() -> tuple[np.ndarray, int]:
    """Return ten seconds of a recorded voice, mono float32, and its sample rate."""
    import soundfile

    samples, rate = soundfile.read(SPEECH.path(), dtype="float32")
    return samples, int(rate)


def photographs(names: tuple[str, ...], side: int) -> Tensor:
    """Return photographs as normalized squares [len(names), 3, side, side].

    Args:
        names: functions of ``skimage.data`` whose pictures are part of scikit-image's wheel.
        side: height and width in pixels; the shorter side is resized to it, the rest cropped.
    """
    import skimage.data

    mean = torch.tensor(_IMAGENET_MEAN).view(3, 1, 1)
    std = torch.tensor(_IMAGENET_STD).view(3, 1, 1)
    squares = []
    for name in names:
        picture = torch.from_numpy(getattr(skimage.data, name)()).permute(2, 0, 1) / 255.0
        height, width = picture.shape[-2:]
        short = min(height, width)
        top, left = (height - short) // 2, (width - short) // 2
        square = picture[None, :, top : top + short, left : left + short]
        resized = F.interpolate(square, size=(side, side), mode="bicubic", antialias=True)[0]
        squares.append((resized.clamp(0, 1) - mean) / std)
    return torch.stack(squares)
