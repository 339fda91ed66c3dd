"""Noise grids of the samplers: float64 [n + 1] on the host, falling, the last one 0.

A grid is a list of noise-to-signal ratios s = sigma / alpha (VE coordinates), so it fits any
process. Where the table of a process has no finite s, at t = 1 of flow matching, the grid
begins at `t_max` instead.

    edm          equal steps of s^(1/rho)                     Karras et al. 2022, Eq. 5
    log_uniform  equal steps of log s
    uniform      equal steps of a process's own time
    flow         equal steps of t in [0, 1], shifted           Esser et al. 2024, Eq. 23
    discrete     some of the levels of a process of discrete time
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from common.errors import reject

T_MAX = 1 - 1e-5  # Of flow matching: s = 1e5.


def edm(
    n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Float[np.ndarray, " {n}+1"]:
    """s_i = (s_max^(1/rho) + i / (n - 1) (s_min^(1/rho) - s_max^(1/rho)))^rho, then 0.

    Raises:
      UserError: n < 2, not 0 < sigma_min < sigma_max < inf, or rho is not above 0.
    """
    _range(n, 2, sigma_min, sigma_max)
    if not 0 < rho < np.inf:
        raise reject("sampler.rho", rho, "a finite number above 0")
    ends = np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), n)
    return _then_zero(ends**rho)


def log_uniform(
    n: int, sigma_min: float = 0.002, sigma_max: float = 80.0
) -> Float[np.ndarray, " {n}+1"]:
    """n values from sigma_max to sigma_min, each the same fraction of the one before; then 0.

    Raises:
      UserError: n < 2, or not 0 < sigma_min < sigma_max < inf.
    """
    _range(n, 2, sigma_min, sigma_max)
    return _then_zero(np.geomspace(sigma_max, sigma_min, n))


def uniform(
    ratio: Callable, n: int, first: float, last: float, *, zero: bool = True
) -> Float[np.ndarray, " m"]:
    """s at n times in equal steps from `last` to `first`; then 0.

    Args:
      ratio: t [n] float64 -> s [n], rising.
      n: at least 2.
      first, last: the times nearest to the data and to the noise.
      zero: False leaves the last 0 out: [n] values.

    Raises:
      UserError: n < 2, or the levels are no falling grid.
    """
    _range(n, 2)
    values = np.asarray(ratio(np.linspace(last, first, n)), np.float64)
    return check(_then_zero(values) if zero else values)


def flow(n: int, shift: float = 1.0, t_max: float = T_MAX) -> Float[np.ndarray, " {n}+1"]:
    """s = t / (1 - t) at t = 1 - i/n, i = 0 ... n, with t -> shift t / (1 + (shift - 1) t).

    A shift above 1 spends more steps on high noise; on s it is a mere factor.

    Args:
      n: at least 1.
      shift: above 0.
      t_max: the grid begins here, as s is infinite at t = 1.

    Raises:
      UserError: an argument is out of range.
    """
    _range(n, 1)
    if not 0 < shift < np.inf:
        raise reject("sampler.shift", shift, "a finite number above 0")
    if not 0 < t_max < 1:
        raise reject("sampler.t_max", t_max, "between 0 and 1")
    t = np.linspace(1, 0, n + 1)
    t = np.minimum(shift * t / (1 + (shift - 1) * t), t_max)
    return check(t / (1 - t))


def discrete(
    levels: Float[np.ndarray, " steps"], n: int, spacing: str = "leading"
) -> Float[np.ndarray, " {n}+1"]:
    """n of the levels of a process of discrete time, from noise to data; then 0.

    Args:
      levels: s of times 0, 1, ... T - 1, rising.
      n: from 2 to T, with "trailing" from 1; T takes them all.
      spacing: which times. "leading": 0, c, 2 c, ... with c = T // n (DDIM); "trailing": T - 1
        and down by T / n (Lin et al., arXiv:2305.08891); "linspace": rounded equal steps
        from 0 to T - 1 (Nichol and Dhariwal 2021).

    Raises:
      UserError: n is out of range, no such spacing, or the levels do not rise.
    """
    steps = len(levels)
    known = {
        "leading": lambda: np.arange(n) * (steps // n),
        "trailing": lambda: np.round(steps * np.arange(1, n + 1) / n).astype(int) - 1,
        "linspace": lambda: np.round(np.linspace(0, steps - 1, n)).astype(int),
    }
    if spacing not in known:
        raise reject("sampler.spacing", spacing, f"one of {', '.join(known)}")
    least = 1 if spacing == "trailing" else 2
    if not least <= n <= steps:
        raise reject("sampler.n", n, f"a whole number from {least} to {steps}")
    return check(_then_zero(np.asarray(levels, np.float64)[known[spacing]()][::-1]))


def check(sigmas) -> Float[np.ndarray, " m"]:
    """The grid as float64 on the host, if it is one.

    Raises:
      UserError: fewer than two levels, one that is not finite or below 0, or a level that
        is not below the one before. Only the last may be 0.
    """
    sigmas = np.asarray(sigmas, np.float64)
    if sigmas.ndim != 1 or len(sigmas) < 2:
        shape = f"an array of shape {sigmas.shape}"
        raise reject("sampler.sigmas", shape, "a list of at least two noise levels")
    for wrong, allowed in (
        (~np.isfinite(sigmas), "finite"),
        (sigmas < 0, "at least 0"),
    ):
        if wrong.any():
            raise reject("sampler.sigmas", float(sigmas[wrong][0]), f"{allowed} at each step")
    rising = np.flatnonzero(np.diff(sigmas) >= 0)
    if len(rising):
        pair = sigmas[rising[0] : rising[0] + 2].tolist()
        raise reject("sampler.sigmas", pair, "falling from each level to the next")
    return sigmas


def _then_zero(values):
    return np.append(values, 0.0)


def _range(n, least, low=1.0, high=2.0):
    if n < least:
        raise reject("sampler.n", n, f"a whole number from {least} up")
    if not 0 < low < np.inf:
        raise reject("sampler.sigma_min", low, "a finite number above 0")
    if not low < high < np.inf:
        raise reject("sampler.sigma_max", high, f"a finite number above sigma_min = {low}")
