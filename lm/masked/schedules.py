"""How much is visible when: alpha(t), the grids of a sampler and the weights that they make.

    alpha(0) = 1, alpha(1) = 0, strictly decreasing      chance that a token is visible
    linear   alpha = 1 - t
    cosine   alpha = 1 - cos(pi/2 (1 - t)) = 1 - sin(pi t / 2)
    polyP    alpha = 1 - t^P
    w_k = alpha(t_{k+1}) - alpha(t_k),   1 = t_0 > t_1 > ... > t_T = 0

(section 2 of the specification of arXiv:2502.09622.) A sampler of T steps depends on schedule
and grid through w only: w_k is the chance that a position is filled in at step k, whatever the
others do. The continuous objective weighs a masked token's loss with -alpha' / (1 - alpha).
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from common.errors import reject

GRIDS = ("uniform", "cosine")
NAMES = "linear, cosine or poly and a positive number, as in poly2"


class Schedule(NamedTuple):
    """A noise schedule; hashable, made once. NumPy in float64 gives float64 back.

    Attributes:
      name: as `schedule` was asked for it.
      alpha: t -> alpha(t).
      inverse: alpha -> t.
      weight: t -> -alpha'(t) / (1 - alpha(t)), infinite at 0.
    """

    name: str
    alpha: Callable
    inverse: Callable
    weight: Callable


@cache
def schedule(name: str | Callable, field: str = "schedule") -> Schedule:
    """The schedule of a name, or of a function alpha(t) that takes arrays of JAX.

    Args:
      name: linear, cosine, poly<P>, or alpha itself.
      field: what an error calls it.

    Raises:
      UserError: there is no such schedule, or alpha is none.
    """
    if callable(name):
        return _given(name, field)
    if name == "linear":
        return Schedule(name, lambda t: 1 - t, lambda a: 1 - a, lambda t: 1 / t)
    if name == "cosine":
        half = np.pi / 2
        return Schedule(
            name,
            lambda t: 1 - _of(t).sin(half * t),
            lambda a: _of(a).arcsin(1 - a) / half,
            lambda t: half / _of(t).tan(half * t),
        )
    if name.startswith("poly"):
        try:
            p = float(name.removeprefix("poly"))
        except ValueError:
            raise reject(field, name, NAMES) from None
        if not 0 < p < float("inf"):
            raise reject(field, name, NAMES)
        return Schedule(name, lambda t: 1 - t**p, lambda a: (1 - a) ** (1 / p), lambda t: p / t)
    raise reject(field, name, NAMES)


def grid(name: str, steps: int, field: str = "grid") -> Float[np.ndarray, " {steps}+1"]:
    """The times 1 = t_0 > ... > t_T = 0 of T steps, float64.

    Args:
      name: uniform, or cosine: t -> cos(pi/2 (1 - t)), which takes small steps near t = 1.
      field: what an error calls it.

    Raises:
      UserError: there is no such grid.
    """
    t = np.arange(steps, -1, -1) / steps
    if name == "uniform":
        return t
    if name == "cosine":
        return np.sin(np.pi / 2 * t)
    raise reject(field, name, f"one of {', '.join(GRIDS)}")


def visible(alpha: Schedule, grid_name: str, steps: int) -> Float[np.ndarray, " {steps}+1"]:
    """alpha(t_0) = 0 ... alpha(t_T) = 1 on the grid, float64; the ends are exact."""
    found = _on_host(alpha.alpha, grid(grid_name, steps))
    found[[0, -1]] = 0, 1
    return found


def weights(alpha: Schedule, grid_name: str, steps: int) -> Float[np.ndarray, " steps"]:
    """w_k = alpha(t_{k+1}) - alpha(t_k), float64, with the sum 1; all 1/T if both are even."""
    return np.diff(visible(alpha, grid_name, steps))


def _given(alpha: Callable, field: str) -> Schedule:
    """The schedule of a user's alpha: checked on a grid, inverted by bisection."""
    name = getattr(alpha, "__name__", "alpha")
    t = np.linspace(0, 1, 1025)
    found = _on_host(alpha, t)
    if found.shape != t.shape or not np.isfinite(found).all():
        raise reject(field, name, "a function that gives a finite number for every t")
    for at, wanted in ((0, 1), (-1, 0)):
        if abs(found[at] - wanted) > 1e-6:
            raise reject(
                field, name, f"a function with alpha({t[at]:.0f}) = {wanted}, not {found[at]}"
            )
    rises = np.flatnonzero(np.diff(found) >= 0)
    if len(rises):
        where = f"between {t[rises[0]]:.4g} and {t[rises[0] + 1]:.4g}"
        raise reject(field, name, f"a function that falls everywhere; it does not {where}")

    def inverse(a):
        xp = _of(a)
        low, high = xp.zeros_like(a), xp.ones_like(a)
        for _ in range(53):
            middle = (low + high) / 2
            later = alpha(middle) > a
            low, high = xp.where(later, middle, low), xp.where(later, high, middle)
        return (low + high) / 2

    slope = jnp.vectorize(jax.grad(lambda t: jnp.asarray(alpha(t)).astype(t.dtype)))
    return Schedule(name, alpha, inverse, lambda t: -slope(t) / (1 - alpha(t)))


def _of(t):
    """The NumPy that t belongs to."""
    return jnp if isinstance(t, jax.Array) else np


def _on_host(alpha: Callable, t: np.ndarray) -> np.ndarray:
    """alpha(t) in float64 and now, also where an outer function is being traced."""
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        return np.array(alpha(t), np.float64)
