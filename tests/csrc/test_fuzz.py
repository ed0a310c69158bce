"""No arguments of a direct ``torch.ops`` call crash the process or give an unnamed error."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.csrc import isas

SCRIPT = Path(__file__).with_name("fuzz_ops.py")


@pytest.mark.parametrize("isa", isas.runnable())
def test_hostile_arguments_give_a_result_or_a_named_error(isa):
    # MALLOC_PERTURB_ fills memory that is allocated or freed, so that a stale read shows.
    done = isas.run_python(str(SCRIPT), "6", "1", TORCH_SAGE_CPU_ISA=isa, MALLOC_PERTURB_="165")
    assert done.returncode == 0, done.stderr[-4000:]
    calls, results = (int(word) for word in done.stdout.split() if word.isdigit())
    assert calls > 100 and calls > results > 10
