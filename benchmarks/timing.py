"""Times functions against each other: alternately, warm, in one process."""

import statistics
import time
from collections.abc import Callable

import jax


def alternately(functions: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, `repeats` of each, to and fro, after one call that compiles.

    Args:
      functions: name -> function without arguments that returns arrays.
      repeats: calls of each that are timed.
    """
    for function in functions.values():
        jax.block_until_ready(function())
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(repeats):
        # Forth and back: what comes after what makes a difference.
        for name, function in list(functions.items())[:: 1 if i % 2 else -1]:
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - start)
    return seconds


def table(seconds: dict[str, list[float]], ours: str) -> str:
    """Markdown: the median of each, and of its ratio to `ours`, round by round."""
    lines = [f"| | seconds, median | times {ours}, median (least to most) |", "|---|---|---|"]
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(values, seconds[ours], strict=True)]
        middle = statistics.median(ratios)
        lines.append(
            f"| {name} | {statistics.median(values):.4f} "
            f"| {middle:.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
        )
    return "\n".join(lines)
