"""DPM-Solver++: exponential integrators with data prediction (Lu et al., arXiv:2211.01095).

With lambda = log(alpha / sigma) = -log s, h the growth of lambda over a step, and everything
over alpha, no process is left in the formulas:

    x' = e^-h x + (1 - e^-h) D + ...

`multistep` takes differences of D from the step before (2M), `singlestep` evaluates D within
the step (order 3). Both yield rows for `tables`.
"""

from itertools import pairwise

import numpy as np
from jaxtyping import Float

from common.errors import reject
from diffusion.tables import D, P, Q, X, older


def multistep(sigmas, lower_order_final: bool = True):
    """DPM-Solver++(2M), one evaluation a step (Alg. 2).

    Args:
      lower_order_final: the last step is of order 1, as the reference has it. A step to 0
        always is: it is D.
    """
    levels = sigmas.tolist()
    n = len(levels) - 1
    rows, before = [], None
    for i, (s, t) in enumerate(pairwise(levels)):
        form = _first(s, t)
        plain = before is None or t == 0 or (lower_order_final and i == n - 1)
        h = np.inf if t == 0 else np.log(s / t)
        if not plain:
            form = form - 0.5 * np.expm1(-h) * (D - P) * h / before
        rows.append((s, form, True))
        before = h
    return rows, 0.0


def singlestep(sigmas, inner: str = "grid"):
    """DPM-Solver++ of order 3 with n evaluations on a grid of n + 1 levels.

    Steps take 3, 3, ... levels of the grid, the last ones 2, 1 or both (`orders`). Where the
    grid ends in 0, this last level is reached by D at the one before.

    Args:
      inner: where D is evaluated within a step. "grid": at the grid's own levels, which is
        what the reference does; "log": at 1/3 and 2/3 of the step in log s (1/2 in steps
        of order 2), as the paper has it.
    """
    if inner not in ("grid", "log"):
        raise reject("sampler.inner", inner, "one of grid, log")
    levels = sigmas.tolist()
    to_zero = levels[-1] == 0
    used = levels[:-1] if to_zero else levels
    rows, at = [], 0
    for order in orders(len(used) - 1):
        s, t = used[at], used[at + order]
        between = used[at + 1 : at + order]
        if inner == "log":
            between = [s ** (1 - k / order) * t ** (k / order) for k in range(1, order)]
        rows += _STEPS[order](s, *between, t)
        at += order
    return ([*rows, (levels[-2], D, True)] if to_zero else rows), 0.0


def orders(evaluations: int) -> list[int]:
    """The orders of the steps: 3 as long as it fits, but never in the very last step.

    7 evaluations are 3, 3, 1; 8 are 3, 3, 2; 9 are 3, 3, 2, 1, as in the reference.
    """
    threes, rest = divmod(evaluations, 3)
    if rest or not threes:
        return [3] * threes + ([rest] if rest else [])
    return [3] * (threes - 1) + [2, 1]


def _first(s, t):
    return t / s * X + (1 - t / s) * D


def _step_1(s, t):
    return [(s, _first(s, t), True)]


def _step_2(s, middle, t):
    """D at `middle` gives the slope of D in lambda (Alg. 1)."""
    h = np.log(s / t)
    r = np.log(s / middle) / h
    slope = (D - P) / r
    end = older(_first(s, t)) - 0.5 * np.expm1(-h) * slope
    return [(s, _first(s, middle), False), (middle, end, True)]


def _step_3(s, one, two, t):
    """Order 3 where the second inner level is at 2/3 of the step or tends to it."""
    h = np.log(s / t)
    r1, r2 = np.log(s / one) / h, np.log(s / two) / h
    phi = lambda r: np.expm1(-r * h) / (r * h) + 1
    second = older(_first(s, two)) + r2 / r1 * phi(r2) * (D - P)
    end = older(older(_first(s, t))) + phi(1) / r2 * (D - Q)
    return [(s, _first(s, one), False), (one, second, False), (two, end, True)]


_STEPS = {1: _step_1, 2: _step_2, 3: _step_3}


def interpolated(levels: Float[np.ndarray, " steps"], n: int) -> Float[np.ndarray, " {n}+1"]:
    """The reference's grid for a process of discrete time: n + 1 levels, none of them 0.

    Level j belongs to the time (j + 1) / T, log alpha is linear between these times, and the
    grid takes equal steps from time 1 to time 1 / T. As alpha^2 + sigma^2 = 1, log alpha is
    -log(1 + s^2) / 2.

    Args:
      levels: s of times 0, 1, ... T - 1, rising.
      n: the number of steps, of a single-step method the number of evaluations.

    Raises:
      UserError: n < 1, or fewer than two levels.
    """
    if n < 1:
        raise reject("sampler.n", n, "a whole number from 1 up")
    steps = len(levels)
    if steps < 2:
        raise reject("process.steps", steps, "a whole number from 2 up")
    times = np.arange(1, steps + 1) / steps
    log_alpha = np.interp(
        np.linspace(1, 1 / steps, n + 1), times, -0.5 * np.log1p(np.asarray(levels) ** 2)
    )
    return np.sqrt(np.expm1(-2 * log_alpha))
