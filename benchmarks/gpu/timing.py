"""Time on the device, without the time that Python takes to launch."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

# The device sleeps for about 6 ms while Python launches all rounds, the slowest of which, at 1k
# tokens, take it .3 ms each: the device never waits.
SLEEP_CYCLES = 10_000_000
LEAST_ROUNDS, MOST_ROUNDS = 3, 15


class Turn(NamedTuple):
    """One turn of a contender: milliseconds of its calls, and what the device was doing."""

    times: list[float]
    mhz: float
    """SM clock; NaN where NVML cannot be asked."""
    watts: float


class Timing(NamedTuple):
    """All turns together: quartiles in milliseconds."""

    median: float
    low: float
    high: float
    calls: int
    mhz: float
    watts: float


def launch(run: Callable[[], Any], rounds: int) -> list[tuple[torch.cuda.Event, torch.cuda.Event]]:
    """Queue ``rounds`` calls, each between two events."""
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(rounds)
    ]
    for before, after in events:
        before.record()
        run()
        after.record()
    return events


def state() -> tuple[float, float]:
    """Return the SM clock in MHz and the power in W at this moment."""
    try:
        return float(torch.cuda.clock_rate()), torch.cuda.power_draw() / 1000
    except Exception:  # no NVML, or one that refuses: its errors are no RuntimeErrors
        return float("nan"), float("nan")


def turn(run: Callable[[], Any], seconds: float) -> Turn:
    """Time calls for about ``seconds``, the L2 cache as each leaves it to the next.

    The caller has called ``run`` before: nothing is compiled here.
    """
    ((before, after),) = launch(run, 1)
    torch.cuda.synchronize()
    rounds = int(seconds * 1e3 / before.elapsed_time(after))
    torch.cuda._sleep(SLEEP_CYCLES)
    events = launch(run, min(MOST_ROUNDS, max(LEAST_ROUNDS, rounds)))
    events[-1][0].synchronize()  # the last call is running now
    mhz, watts = state()
    torch.cuda.synchronize()
    return Turn([before.elapsed_time(after) for before, after in events], mhz, watts)


def summary(turns: Sequence[Turn]) -> Timing:
    """Return the quartiles of all calls; clock and power of the last turn."""
    times = [time for turn in turns for time in turn.times]
    low, median, high = statistics.quantiles(times, n=4)
    return Timing(median, low, high, len(times), turns[-1].mhz, turns[-1].watts)
