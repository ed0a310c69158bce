"""Machine code of the CUDA kernels, and what a tile costs: a table of instruction counts.

``python -m tests.csrc.sass sm89/attention_d128 sm_89`` prints it for an attention source as it was
built for one GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.csrc.isas import ROOT

BUILT = ROOT / "build" / "native" / "csrc"
PV_FORMATS = ("bf16", "fp16", "fp16_fp16", "e4m3", "e4m3_fp16")  # of csrc/quantize/mma/prepared.h
TENSOR_CORE = {"IMMA", "HMMA", "QMMA", "IGMMA", "QGMMA"}
SPILLS = {"LDL", "STL"}
# What a table shows beside products: arithmetic of scores and sums, and where operands come from.
SHOWN = {
    *("FFMA", "FADD", "FMUL", "FMNMX", "MUFU", "F2FP", "HADD2", "LOP3", "IMAD"),
    *("LDSM", "LDGSTS", "LDG", "local memory"),
}


class Instruction(NamedTuple):
    """One instruction of a kernel."""

    at: int
    is_guarded: bool  # by a predicate
    opcode: str  # without its modifiers
    text: str

    @property
    def target(self) -> int | None:
        """Where a branch, or what ptxas makes of one, goes to."""
        found = re.search(r"0x[0-9a-f]+", self.text) if self.opcode in ("BRA", "CALL") else None
        return int(found[0], 16) if found else None

    @property
    def always_leaves(self) -> bool:
        """Whether the next instruction is never the following one: no predicate, uniform or not."""
        return not self.is_guarded and re.match(r"BRA\S* 0x|EXIT|RET", self.text) is not None

    @property
    def product(self) -> str:
        """The opcode with its modifiers."""
        return self.text.split()[0]


Code = list[Instruction]


def _cuobjdump(path: Path, *arguments: str) -> str:
    """Run the disassembler of triton's wheel."""
    triton = importlib.util.find_spec("triton")
    assert triton is not None and triton.origin is not None, "triton's wheel has the disassembler"
    tools = Path(triton.origin).with_name("backends") / "nvidia" / "bin"
    done = subprocess.run(
        [tools / "cuobjdump", *arguments, path],
        env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def contents(path: Path) -> list[str]:
    """Return what an object file was compiled for, such as sm_80 and, for PTX, compute_80."""
    machine = re.findall(r"\.(sm_\d+\w?)\.cubin", _cuobjdump(path, "-lelf"))
    ptx = re.findall(r"\.sm_(\d+\w?)\.ptx", _cuobjdump(path, "-lptx"))
    return [*machine, *(f"compute_{number}" for number in ptx)]


def kernels(path: Path, architecture: str) -> dict[str, Code]:
    """Return the machine code of every kernel of an object file, by its mangled name."""
    text = _cuobjdump(path, "-sass", "-arch", architecture)
    parts = re.split(r"Function : (\S+)", text)
    line = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?\w+\s+)?((\w+).*?)\s*;", re.M)
    return {
        name: [
            Instruction(int(at, 16), bool(guard), opcode, what)
            for at, guard, what, opcode in line.findall(body)
        ]
        for name, body in zip(parts[1::2], parts[2::2], strict=True)
    }


class Member(NamedTuple):
    """What a kernel of the mma.sync family instantiates."""

    qk: str
    pv: str
    width: int
    has_mask: bool

    def __str__(self) -> str:
        """Return the first column of a table."""
        return f"{self.qk}, {self.pv}, {self.width}{', masked' if self.has_mask else ''}"


def member(name: str) -> Member:
    """Return what a mangled name instantiates."""
    found = re.search(r"ConfigILi(\d+)ELb([01])ELNS\d+_2PvE(\d)ELb([01])E", name)
    assert found is not None, name
    width, is_int4, pv, has_mask = map(int, found.groups())
    return Member("int4" if is_int4 else "int8", PV_FORMATS[pv], width, bool(has_mask))


def loops(code: Code) -> list[range]:
    """Return the indices between each branch back and its target."""
    index = {instruction.at: i for i, instruction in enumerate(code)}
    starts = [-1 if x.target is None else index.get(x.target, -1) for x in code]
    return [range(start, i + 1) for i, start in enumerate(starts) if 0 <= start < i]


def main_loop(code: Code, opcodes: set[str]) -> range:
    """Return the shortest loop that has all of some opcodes."""
    places = [(i, x.opcode) for i, x in enumerate(code) if x.opcode in opcodes]
    found = [loop for loop in loops(code) if opcodes == {o for i, o in places if i in loop}]
    return min(found, key=len)


def common_path(code: Code, loop: range, through: Sequence[str]) -> Code:
    """Return the shortest way through a loop that meets some opcodes, one behind the other.

    Branches to what is rare (masks, tails, the mean of Q) are not on it.
    """
    index = {instruction.at: i for i, instruction in enumerate(code)}
    came_from: dict[tuple[int, int], tuple[int, int] | None] = {(loop[0], 0): None}
    ahead = deque(came_from)
    while ahead:
        here = ahead.popleft()
        i, met = here
        if i == loop[-1] and met == len(through):
            break
        instruction = code[i]
        if met < len(through) and instruction.opcode == through[met]:
            met += 1
        following = [] if instruction.always_leaves else [i + 1]
        if instruction.target in index:
            following.append(index[instruction.target])
        for there in ((j, met) for j in following if j in loop):
            if there not in came_from:
                came_from[there] = here
                ahead.append(there)
    else:
        raise AssertionError(f"the loop must meet {list(through)} in this order")
    path: Code = []
    step: tuple[int, int] | None = here
    while step is not None:
        path.append(code[step[0]])
        step = came_from[step]
    return path[::-1]


def tile(code: Code) -> Code:
    """Return what an mma.sync kernel runs for a tile of 64 keys: both products, both fetches."""
    product = "QMMA" if any(i.opcode == "QMMA" for i in code) else "HMMA"
    loop = main_loop(code, {"IMMA", product, "LDGSTS"})
    return common_path(code, loop, ("IMMA", "LDGSTS", "MUFU", product, "LDGSTS"))


def table(path: Path, architecture: str) -> str:
    """Return a Markdown table: kernels by opcodes, for one warp and one tile."""
    counts = {
        str(member(name)): Counter(
            "local memory"
            if i.opcode in SPILLS
            else i.product
            if i.opcode in TENSOR_CORE
            else i.opcode
            for i in tile(code)
        )
        for name, code in kernels(path, architecture).items()
    }
    total = sum(counts.values(), Counter())
    columns = [name for name, _ in total.most_common() if name in SHOWN or name[1:4] == "MMA"]
    lines = [
        f"| kernel | all | {' | '.join(columns)} | others |",
        "|---" * (3 + len(columns)) + "|",
    ]
    for kernel, count in sorted(counts.items()):
        shown = [count[column] for column in columns]
        cells = [count.total(), *shown, count.total() - sum(shown)]
        lines.append(f"| {kernel} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table of one source."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="below csrc/attention, without .cu")
    parser.add_argument("architecture", help="such as sm_89")
    arguments = parser.parse_args()
    print(table(BUILT / "attention" / f"{arguments.source}.cu.o", arguments.architecture))  # noqa: T201  # a script: what it is asked for


if __name__ == "__main__":
    main()
