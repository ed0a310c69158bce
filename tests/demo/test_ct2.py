"""The reader of CTranslate2 files, on files written here."""

import struct

import pytest
import torch

from torch_sage.demo.ct2 import read_model


def _text(value: str) -> bytes:
    return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"


def _variable(name: str, shape: tuple[int, ...], code: int, data: bytes) -> bytes:
    header = struct.pack(f"<B{len(shape)}I", len(shape), *shape)
    return _text(name) + header + struct.pack("<BI", code, len(data)) + data


def _model(*variables: bytes, aliases: bytes = struct.pack("<I", 0), version: int = 6) -> bytes:
    head = struct.pack("<I", version) + _text("WhisperSpec") + struct.pack("<I", 3)
    return head + struct.pack("<I", len(variables)) + b"".join(variables) + aliases


@pytest.fixture
def read(tmp_path):
    def write_and_read(data: bytes):
        (tmp_path / "model.bin").write_bytes(data)
        return read_model(tmp_path / "model.bin")

    return write_and_read


def test_reads_dtypes_shapes_scalars_and_aliases(read):
    half = torch.tensor([[1.0, -2.5, 3.0], [0.5, 65504.0, 2**-24]], dtype=torch.float16)
    data = _model(
        _variable("a/weight", (2, 3), 4, half.numpy().tobytes()),
        _variable("a/bias", (2,), 0, struct.pack("<2f", 1.5, -0.25)),
        _variable("heads", (), 2, struct.pack("<h", 6)),
        aliases=struct.pack("<I", 1) + _text("b/weight") + _text("a/weight"),
    )
    variables = read(data)
    assert list(variables) == ["a/weight", "a/bias", "heads", "b/weight"]
    assert torch.equal(variables["a/weight"], half)
    assert variables["a/bias"].tolist() == [1.5, -0.25]
    assert variables["heads"].item() == 6
    assert variables["heads"].dtype == torch.int16
    assert variables["b/weight"] is variables["a/weight"]


def test_other_version_is_refused(read):
    with pytest.raises(ValueError, match="version 6, got 5"):
        read(_model(version=5))


def test_unknown_dtype_is_refused(read):
    with pytest.raises(ValueError, match="dtype of x must be a code below 6, got 9"):
        read(_model(_variable("x", (1,), 9, b"\0")))


def test_truncated_file_is_refused(read):
    data = _model(_variable("x", (4,), 0, struct.pack("<4f", 1, 2, 3, 4)))
    with pytest.raises(ValueError, match=r"must hold .* bytes, got"):
        read(data[:-8])
