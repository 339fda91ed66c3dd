"""The schedule that follows from the optimal loss (Xu et al., arXiv:2506.13763, section 5).

    w(s) = a min(1 / J*(s), w_star) + f(s) [s < sigma_star]
    p(s) ~ w(s) (J(s) - J*(s)),      f = bump a w_star exp(-(log s - mu)^2 / (2 width^2))

1 / J* puts all noise levels on one scale, w_star caps it where J* vanishes, f stresses what
lies left of sigma_star, and p samples where weighted error is left. J and J* are those of the
network's output (space "F": times 1 / c_out^2) or of x_0. J is an exponential average of the
errors that training itself sees, per bin of log s. The constants a, w_star, mu and width are
not published; all are settings.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from common.errors import reject
from diffusion.preconditioning import Preconditioning


class Tracked(NamedTuple):
    """State of the schedule, float32; [bins] unless said otherwise.

    Attributes:
      floor: J* per coordinate at the middles of the bins, in x_0. Set once, at the start.
      variance: [], V per coordinate, the limit of J*.
      total, count: averages of errors and of samples seen.
      probability: of each bin, as drawn from now.
      images: [], uint32, seen so far.
      refreshed: [], uint32, images at the last refresh of `probability`.
    """

    floor: Float[Array, " bins"]
    variance: Float[Array, ""]
    total: Float[Array, " bins"]
    count: Float[Array, " bins"]
    probability: Float[Array, " bins"]
    images: UInt32[Array, ""]
    refreshed: UInt32[Array, ""]


class Constants(NamedTuple):
    """What the floor decides: the scale a, w_star, and sigma_star; scalars."""

    a: Float[Array, ""]
    w_star: Float[Array, ""]
    log_star: Float[Array, ""]


def optimal(
    wrap: Preconditioning,
    *,
    sigma_data: float,
    p_mean: float,
    p_std: float,
    sigma_min: float,
    sigma_max: float,
    space: str,
    tau: float,
    cap: float,
    bump: float,
    bump_shift: float,
    bump_width: float,
    soft_edge: float,
    bins: int,
    warm: int,
    every: int,
    half_life: int,
    mix: float,
    least_gap: float,
) -> tuple[Callable, Callable, Callable, Callable]:
    """init, sample, weight and update of a `schedules.Schedule`.

    Args:
      wrap: of the network.
      sigma_data: standard deviation of the data, for the error before training.
      p_mean, p_std: normal density of log s, before `warm` images and mixed in afterwards.
      sigma_min, sigma_max: range of the bins.
      space: "F" or "x0", of the loss that w multiplies.
      tau: sigma_star is the largest s with J* <= tau V.
      cap: w_star as a multiple of 1 / J* at sigma_star.
      bump: peak of f over a w_star.
      bump_shift, bump_width: mu - log sigma_star and the width of f.
      soft_edge: width in log s of the step at sigma_star; 0: hard.
      bins: of log s, at least 2.
      warm: images before the density first changes.
      every: images between refreshes.
      half_life: of the averages, images.
      mix: share of the normal density that stays.
      least_gap: floor of the gap, per coordinate.

    Raises:
      UserError: a constant is out of its range.
    """
    if space not in ("F", "x0"):
        raise reject("schedule.space", space, "F or x0")
    for field, value, low, high in (
        ("tau", tau, 0, 1),
        ("cap", cap, 0, np.inf),
        ("bump_width", bump_width, 0, np.inf),
        ("half_life", half_life, 0, np.inf),
        ("every", every, 0, np.inf),
        ("least_gap", least_gap, 0, np.inf),
    ):
        if not low < value < high:
            raise reject(f"schedule.{field}", value, f"a number above {low} and below {high}")
    for field, value in (("bump", bump), ("soft_edge", soft_edge), ("warm", warm)):
        if not 0 <= value < np.inf:
            raise reject(f"schedule.{field}", value, "a finite number from 0 up")
    if not 0 <= mix <= 1:
        raise reject("schedule.mix", mix, "a number from 0 to 1")
    if not np.isfinite(bump_shift):
        raise reject("schedule.bump_shift", bump_shift, "a finite number")
    if bins < 2:
        raise reject("schedule.bins", bins, "a whole number from 2 up")
    edges = jnp.linspace(np.log(sigma_min), np.log(sigma_max), bins + 1)
    middle = jnp.asarray(middles(sigma_min, sigma_max, bins), jnp.float32)
    normal = jax.nn.softmax(-0.5 * ((middle - p_mean) / p_std) ** 2)
    scale = lambda s: 1 / wrap.c_out(s) ** 2 if space == "F" else jnp.ones_like(s)

    def init():
        zero, none = jnp.zeros(()), jnp.zeros(bins)
        # Copies: the loop gives every leaf of the state away by itself.
        count = lambda: jnp.zeros((), jnp.uint32)
        return Tracked(none, zero, 0 * none, 0 * none, 1 * normal, count(), count())

    def constants(state):
        star = star_of(middle, state.floor, tau * state.variance)
        s = jnp.exp(middle)
        at = scale(jnp.exp(star)) * jnp.interp(star, middle, state.floor)
        w_star = cap / jnp.maximum(at, 1e-12)
        shape = _shape(middle, state.floor * scale(s), w_star, star)
        # Before training the output is 0 and D is c_skip x.
        skip = wrap.c_skip(s)
        error = (1 - skip) ** 2 * sigma_data**2 + (skip * s) ** 2
        a = 1 / jnp.sum(normal * shape * scale(s) * error)
        return Constants(a, w_star, star)

    def _shape(x, floor, w_star, star):
        """w over a."""
        capped = jnp.minimum(1 / jnp.maximum(floor, 1e-30), w_star)
        if soft_edge:
            left = jax.nn.sigmoid((star - x) / soft_edge)
        else:
            left = (x < star).astype(x.dtype)
        hill = jnp.exp(-0.5 * ((x - star - bump_shift) / bump_width) ** 2)
        return capped + bump * w_star * hill * left

    def weight(s, state):
        c = constants(state)
        x = jnp.log(s)
        floor = jnp.interp(x, middle, state.floor) * scale(s)
        return c.a * _shape(x, floor, c.w_star, c.log_star) * scale(s)

    def sample(key, n, state):
        where, within = jax.random.split(key)
        bin_ = jax.random.categorical(where, jnp.log(state.probability), shape=(n,))
        u = jax.random.uniform(within, (n,))
        return jnp.exp(edges[bin_] + u * (edges[bin_ + 1] - edges[bin_]))

    def update(state, s, error, use=True):
        n = len(s)
        bin_ = jnp.clip(jnp.searchsorted(edges, jnp.log(s), side="right") - 1, 0, bins - 1)
        # One number that is none would stay in every bin for ever.
        use = jnp.isfinite(error) & use
        one_hot = ((bin_[:, None] == jnp.arange(bins)) & use[:, None]).astype(jnp.float32)
        error = jnp.where(use, error, 0)
        keep = 0.5 ** (n / half_life)
        state = state._replace(
            total=keep * state.total + (1 - keep) * jnp.sum(one_hot * error[:, None], 0),
            count=keep * state.count + (1 - keep) * jnp.sum(one_hot, 0),
            images=state.images + jnp.uint32(n),
        )
        due = (state.images >= warm) & (
            (state.images - state.refreshed >= every) | (state.images < warm + n)
        )
        new = refreshed(state)
        return state._replace(
            probability=jnp.where(due, new, state.probability),
            refreshed=jnp.where(due, state.images, state.refreshed),
        )

    def refreshed(state):
        loss = between(middle, state.total, state.count)
        gap = jnp.maximum(loss - state.floor, least_gap)
        p = weight(jnp.exp(middle), state) * gap
        return (1 - mix) * p / jnp.sum(p) + mix * normal

    return init, sample, weight, update


def middles(sigma_min: float, sigma_max: float, bins: int) -> Float[np.ndarray, " bins"]:
    """log s at the middle of each bin."""
    edges = np.linspace(np.log(sigma_min), np.log(sigma_max), bins + 1)
    return 0.5 * (edges[1:] + edges[:-1])


def between(
    x: Float[Array, " n"], total: Float[Array, " n"], count: Float[Array, " n"]
) -> Float[Array, " n"]:
    """total / count; where nothing was counted, linear in x between the bins that have some.

    Flat beyond the outermost of them; 0 where there are none at all.
    """
    n = len(x)
    there = count > 1e-12
    mean = jnp.where(there, total / jnp.where(there, count, 1), 0)
    index = jnp.arange(n)
    left = jax.lax.cummax(jnp.where(there, index, -1))
    right = jax.lax.cummin(jnp.where(there, index, n), reverse=True)
    left, right = (
        jnp.where(left < 0, jnp.minimum(right, n - 1), left),
        jnp.where(right > n - 1, jnp.maximum(left, 0), right),
    )
    width = jnp.where(right > left, x[right] - x[left], 1)
    part = jnp.where(right > left, (x - x[left]) / width, 0)
    return (1 - part) * mean[left] + part * mean[right]


def star_of(
    x: Float[Array, " n"], floor: Float[Array, " n"], level: Float[Array, ""]
) -> Float[Array, ""]:
    """log of the largest s with J* <= level, linear between the points."""
    below = floor <= level
    i = jnp.max(jnp.where(below, jnp.arange(len(x)), 0))
    j = jnp.minimum(i + 1, len(x) - 1)
    rise = floor[j] - floor[i]
    part = jnp.where(rise > 0, (level - floor[i]) / jnp.where(rise > 0, rise, 1), 0)
    return x[i] + jnp.clip(part, 0, 1) * (x[j] - x[i])
