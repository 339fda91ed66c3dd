"""Averages of parameters over training: pure functions over pytrees.

    theta_hat(t) = (1 - rate_t) theta_hat(t - 1) + rate_t theta(t),   t = 1, 2, ...

    plain      rate = 1 - decay
    half_life  in images, and while few were seen a share of those      Karras et al. 2022
    power      rate = 1 - (1 - 1/t)^(gamma + 1)                          Karras et al. 2024

A power function keeps the same shape while training goes on: theta_hat(t) weighs theta(tau) by
about tau^gamma, and its relative width is sigma_rel. Two such averages saved now and then are
enough to make any other afterwards (`weights`, `mismatch`, `combined`).

A schedule is a function t -> rate. The rate, not 1 - rate, since late in training it is too
small for what float32 leaves of the difference.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from common.errors import reject

Schedule = Callable[[Array], Array]  # t -> the weight of the newest parameters, float32
WIDEST = 12**-0.5  # sigma_rel at gamma = 0, an average over everything.


class Averages(NamedTuple):
    """Several averages at once.

    Attributes:
      step: t, how many updates there were.
      trees: one average for each schedule, float32 and like the parameters.
    """

    step: Int[Array, ""]
    trees: tuple[Any, ...]


def init(params: Any, schedules: tuple[Schedule, ...]) -> Averages:
    """All averages are the parameters as they are."""
    # Copies: the step that trains may give away the memory of its parameters.
    tree = lambda: jax.tree.map(lambda p: jnp.array(p, jnp.float32), params)
    return Averages(jnp.zeros((), jnp.int32), tuple(tree() for _ in schedules))


def update(averages: Averages, params: Any, schedules: tuple[Schedule, ...]) -> Averages:
    """The averages after one more step, which led to `params`. Schedules as of `init`."""
    step = averages.step + 1

    def towards(tree, schedule):
        rate = schedule(step)
        return jax.tree.map(lambda e, p: e + rate * (p.astype(e.dtype) - e), tree, params)

    pairs = zip(averages.trees, schedules, strict=True)
    return Averages(step, tuple(towards(tree, schedule) for tree, schedule in pairs))


def plain(decay: float) -> Schedule:
    """A constant decay from 0 to below 1.

    Raises:
      UserError: it is out of this range.
    """
    if not 0 <= decay < 1:
        raise reject("ema.decay", decay, "from 0 to below 1")
    return lambda step: jnp.full((), 1 - decay, jnp.float32)


def ramped(decay: float) -> Schedule:
    """decay, but (1 + t) / (10 + t) as long as this is less: a short run has an average, too.

    Raises:
      UserError: as `plain`.
    """
    plain(decay)
    return lambda step: jnp.maximum(1 - decay, 9 / (10 + step.astype(jnp.float32)))


def half_life(images: float, batch: int, ramp: float | None = 0.05) -> Schedule:
    """decay = 2^(-batch / h), h = min(images, ramp * images seen before the step).

    Args:
      images: in which the weight of parameters halves.
      batch: images in a step.
      ramp: None for a constant half-life.

    Raises:
      UserError: an argument is not above 0.
    """
    for name, value in dict(half_life=images, ramp=1 if ramp is None else ramp).items():
        if not 0 < value < np.inf:
            raise reject(f"ema.{name}", value, "a finite number above 0")
    if batch < 1:
        raise reject("ema.batch", batch, "a whole number from 1 up")

    def schedule(step):
        seen = (step - 1).astype(jnp.float32) * batch
        h = jnp.minimum(images, jnp.inf if ramp is None else ramp * seen)
        return -jnp.expm1(-jnp.log(2.0) * batch / h)  # At h = 0 it is 1.

    return schedule


def power(sigma_rel: float) -> Schedule:
    """The power function of that relative width; its first rate is 1.

    Raises:
      UserError: as `gamma_of`.
    """
    exponent = gamma_of(sigma_rel) + 1
    return lambda step: -jnp.expm1(exponent * jnp.log1p(-1 / step.astype(jnp.float32)))


def gamma_of(sigma_rel: float) -> float:
    """gamma, the largest real root of g^3 + 7 g^2 + (16 - c) g + (12 - c), c = sigma_rel^-2.

    Raises:
      UserError: sigma_rel is not above 0 or is above 12^(-1/2), where gamma is 0.
    """
    if not 0 < sigma_rel <= WIDEST:
        raise reject("ema.sigma_rel", sigma_rel, f"above 0 and at most {WIDEST:.4f}")
    c = sigma_rel**-2
    roots = np.roots([1, 7, 16 - c, 12 - c])
    return float(roots[np.abs(roots.imag) < 1e-6 * np.abs(roots)].real.max())


def sigma_rel_of(gamma: float) -> float:
    """sqrt((g + 1) / ((g + 2)^2 (g + 3))), the relative width of a power function."""
    return float(np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))))


def weights(
    times: Float[np.ndarray, " n"],
    gammas: Float[np.ndarray, " n"],
    time: float,
    gamma: float,
) -> Float[np.ndarray, " n"]:
    """The combination of saved averages that is nearest to another one, float64.

    Least squares between the profiles p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1) on
    [0, t] as functions of tau (Karras et al. 2024, Alg. 3); the sum is then made to be 1.

    Args:
      times, gammas: t, in steps or images, and gamma of each saved average.
      time, gamma: of the one that is wanted; its time is that of the last one or before.

    Raises:
      UserError: nothing saved, a time that is not above 0, a gamma below 0, or a time after
        the last one that was saved.
    """
    if not len(times):
        raise reject("ema.snapshots", 0, "at least one")
    if not (np.all(times > 0) and np.all(gammas >= 0)):
        raise reject("ema.snapshots", "one", "of a time above 0 and a gamma from 0 up")
    if not 0 < time <= np.max(times):
        raise reject("ema.time", time, f"above 0 and at most {np.max(times)}")
    if not gamma >= 0:
        raise reject("ema.gamma", gamma, "from 0 up")
    column = lambda a: np.asarray(a, np.float64)[:, None]
    gram = _product(column(times), column(gammas), times, gammas)
    right = _product(column(times), column(gammas), np.array([time]), np.array([gamma]))
    # Profiles that nearly repeat each other share their weight.
    found = np.linalg.lstsq(gram, right[:, 0], rcond=None)[0]
    return found / found.sum()


def mismatch(
    factors: Float[np.ndarray, " n"],
    times: Float[np.ndarray, " n"],
    gammas: Float[np.ndarray, " n"],
    time: float,
    gamma: float,
) -> float:
    """|sum_i factors_i p_i - p| / |p| of profiles in L2 on [0, t], from 0; `weights` finds the
    factors. Rounding leaves 1e-8 of what is exact."""
    column = lambda a: np.asarray(a, np.float64)[:, None]
    last = np.array([time]), np.array([gamma])
    gram = _product(column(times), column(gammas), times, gammas)
    right = _product(column(times), column(gammas), *last)[:, 0]
    whole = float(_product(*last, *last)[0])
    left = factors @ gram @ factors - 2 * factors @ right + whole
    return float(np.sqrt(max(left, 0.0) / whole))


def _product(t, g, time, gamma):
    """The integral of two profiles' product."""
    ratio = t / time
    # The power of the smaller over the larger time: it never overflows.
    power = np.minimum(ratio, 1) ** gamma * np.maximum(ratio, 1) ** -g
    return (g + 1) * (gamma + 1) * power / ((g + gamma + 1) * np.maximum(t, time))


def combined(factors: Float[np.ndarray, " n"], trees: Iterable[Any]) -> Any:
    """sum_i factors_i trees_i, float32, taken one after another, for instance from a disk."""
    total = None
    for factor, tree in zip(factors.tolist(), trees, strict=True):
        part = jax.tree.map(lambda leaf, f=factor: f * leaf.astype(jnp.float32), tree)
        total = part if total is None else jax.tree.map(jnp.add, total, part)
    return total
