"""How Hopper's host splits keys: every part has some, none has too few, their results are small."""

from __future__ import annotations

import itertools
import shutil
import subprocess

import pytest

from tests.csrc.isas import ROOT

KEYS = (1025, 1151, 1152, 1153, 4096, 65_535, 65_536, 65_537, 66_049, 131_072, 2**30)
ROWS = (1, 8, 31, 32, 33, 64, 2048)
PROGRAM = """
#include <cstdio>
#include "attention/sm90/parts.h"
int main() {
  long keys, rows;
  while (std::scanf("%ld %ld", &keys, &rows) == 2) {
    const torch_sage::sm90::Parts parts = torch_sage::sm90::split(keys, rows);
    std::printf("%d %d\\n", parts.count, parts.key_blocks);
  }
}
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_parts_of_keys(tmp_path):
    source, program = tmp_path / "parts.cpp", tmp_path / "parts"
    source.write_text(PROGRAM)
    subprocess.run(["nvcc", "-std=c++20", f"-I{ROOT / 'csrc'}", source, "-o", program], check=True)
    cases = list(itertools.product(KEYS, ROWS))
    text = "\n".join(f"{keys} {rows}" for keys, rows in cases)
    done = subprocess.run([program], input=text, capture_output=True, text=True, check=True)
    found = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    for (keys, rows), (count, size) in zip(cases, found, strict=True):
        blocks = -(-keys // 128)
        assert (count - 1) * size < blocks <= count * size
        assert size >= 4 and count <= 128
        # Of width numbers in fp32, beside keys and values of two bytes a channel, or the query.
        assert rows * count * 4 <= max(keys / 8 + 4 * rows, 8 * 4 * rows)
    assert dict(zip(cases, found, strict=True))[4096, 64] == (8, 4)
    assert dict(zip(cases, found, strict=True))[131_072, 1] == (128, 8)
