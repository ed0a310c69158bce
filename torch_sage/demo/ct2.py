"""Reader of CTranslate2 ``model.bin`` files, the format in which Whisper tiny.en is shipped."""

from __future__ import annotations

import struct
from pathlib import Path

import torch
from torch import Tensor

# Codes of the file's element types, in the order in which the format numbers them.
_DTYPES = (
    torch.float32,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.float16,
    torch.bfloat16,
)
# Version 6 is what converters have written since 2022; it added the aliases at the end.
_VERSION = 6


class _Cursor:
    """A position in a byte string, advanced by each read."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.offset = 0

    def number(self, code: str) -> int:
        """Read one little-endian unsigned integer of the ``struct`` type ``code``."""
        (value,) = struct.unpack_from(f"<{code}", self.data, self.offset)
        self.offset += struct.calcsize(code)
        return int(value)

    def take(self, size: int) -> bytes:
        """Read ``size`` bytes."""
        if self.offset + size > len(self.data):
            raise ValueError(
                f"model.bin must hold {self.offset + size} bytes, got {len(self.data)}"
            )
        self.offset += size
        return self.data[self.offset - size : self.offset]

    def text(self) -> str:
        """Read a length-prefixed string; the length counts its closing NUL."""
        return self.take(self.number("H")).rstrip(b"\0").decode()


def read_model(path: Path) -> dict[str, Tensor]:
    """Return every variable of a CTranslate2 model, aliases included, in its stored dtype.

    Raises:
        ValueError: if the file has another version, an unknown dtype, or ends early.
    """
    cursor = _Cursor(path.read_bytes())
    version = cursor.number("I")
    if version != _VERSION:
        raise ValueError(f"model.bin must have format version {_VERSION}, got {version}")
    cursor.text()  # name of the specification, such as WhisperSpec
    cursor.number("I")  # its revision

    variables: dict[str, Tensor] = {}
    for _ in range(cursor.number("I")):
        name = cursor.text()
        variables[name] = _read_variable(cursor, name)
    for _ in range(cursor.number("I")):
        alias = cursor.text()
        variables[alias] = variables[cursor.text()]
    return variables


def _read_variable(cursor: _Cursor, name: str) -> Tensor:
    shape = [cursor.number("I") for _ in range(cursor.number("B"))]
    code = cursor.number("B")
    if code >= len(_DTYPES):
        raise ValueError(f"dtype of {name} must be a code below {len(_DTYPES)}, got {code}")
    raw = bytearray(cursor.take(cursor.number("I")))
    return torch.frombuffer(raw, dtype=_DTYPES[code]).reshape(shape)
