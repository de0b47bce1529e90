"""Times of functions that take turns, compared round by round, and the memory that a call needs."""

import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

Functions = Mapping[str, Callable[[], object]]


class Spent(NamedTuple):
    """Seconds that one call took."""

    wall: float
    cpu: float
    """Of all threads together, those that wait in a loop included."""


def interleaved(
    functions: Functions, *, rounds: int, device: torch.device | str, warmup: int = 1
) -> dict[str, list[Spent]]:
    """What every function took in every round; the round begins with the next function each time.

    A machine that is busy or throttles for a while then slows all of them alike, and ratios within a round hold.
    """
    for function in functions.values():
        for _ in range(warmup):
            function()
    names, spent = list(functions), {name: [] for name in functions}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            spent[name].append(once(functions[name], device))
    return spent


def once(function: Callable[[], object], device: torch.device | str) -> Spent:
    """Time of one call, with all that it left to the device."""
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    synchronize(device)
    return Spent(time.perf_counter() - wall, time.process_time() - cpu)


def synchronize(device: torch.device | str) -> None:
    """Wait for the device."""
    kind = torch.device(device).type
    if kind != "cpu":
        getattr(torch, kind).synchronize()


def compared(spent: Mapping[str, Sequence[Spent]], reference: str) -> dict[str, dict[str, object]]:
    """Seconds of each function, and their ratio to the reference's of the same round."""
    rows = {}
    for name, calls in spent.items():
        pairs = list(zip(calls, spent[reference], strict=True))
        rows[name] = {
            "wall_s": spread(call.wall for call in calls),
            "cpu_s": spread(call.cpu for call in calls),
            "ratio_wall": spread(call.wall / base.wall for call, base in pairs),
            "ratio_cpu": spread(call.cpu / base.cpu for call, base in pairs),
        }
    return rows


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median and quartiles."""
    values = list(values)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": figures(middle), "q1": figures(low), "q3": figures(high)}


def figures(value: float) -> float:
    """Four digits that count."""
    return float(f"{value:.4g}")


def peak_memory(function: Callable[[], object], device: torch.device | str) -> int:
    """Bytes that a call holds at its worst moment, on top of what was there before it.

    On CUDA the caching allocator counts them. On a CPU the profiler saw every block that torch took and gave back; what
    a kernel takes behind torch's back, such as oneDNN's scratch memory, is not in it.
    """
    device = torch.device(device)
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it tells stderr that there is no GPU
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        function()
    blocks = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for block in sorted(blocks, key=lambda block: block.start_ns()):
        held += block.nbytes()
        peak = max(peak, held)
    return peak
