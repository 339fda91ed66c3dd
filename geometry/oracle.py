"""Exact posterior means, and what samples are compared by: sections 2.5, 9 and 11.2.

The mean of the end given the state and the start,

    D(x, t; x0) = E[ x_T | R_t = x, R_0 = x0 ] ,   weights  q(y | x0) N(x; a x0 + b y, c I) ,

for finite couplings and for Gaussian mixtures; no learning, so that what is left of an error
is the sampler's. D without x0, the mean over starts too, is a Markov drift: it has the right
marginals but loses who belongs to whom (section 2.5).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from geometry.reference import Reference, brownian, coefs

DIRECTIONS = 64  # Of the sliced distance.


class Mixture(NamedTuple):
    """x0 ~ N(0, I_d), x_T | x0 ~ sum_k pi_k N(A_k x0 + b_k, S_k).

    Attributes:
      weights: pi.
      maps: A.
      shifts: b.
      axes, spreads: S_k = axes_k diag(spreads_k) axes_k^T.
    """

    weights: Float[Array, " k"]
    maps: Float[Array, "k d d"]
    shifts: Float[Array, "k d"]
    axes: Float[Array, "k d d"]
    spreads: Float[Array, "k d"]


def finite(
    reference: Reference,
    targets: Float[Array, "m d"],
    weights: Float[Array, "*#batch m"],
    start: Float[Array, "*batch d"],
) -> Callable:
    """D of ends out of a finite set, given the start.

    Args:
      weights: q(y | x0) of each start.
      start: x0.

    Returns:
      (x [*batch, d], t scalar) -> D.
    """

    def denoise(x, t):
        a, b, _ = coefs(reference, 0.0, t)
        # b/c = rho / v(t,T): of log N what depends on y, finite at t = 0 too.
        slope = reference.rho(t, reference.end) / reference.v(t, reference.end)
        away = (x - a * start) @ targets.T - b / 2 * (targets**2).sum(-1)
        return jax.nn.softmax(jnp.log(weights) + slope * away, -1) @ targets

    return denoise


def markov(
    reference: Reference,
    starts: Float[Array, "m d"],
    targets: Float[Array, "m d"],
    weights: Float[Array, " m"],
) -> Callable:
    """D that does not know the start: the posterior over pairs (x0, y) with their weights."""

    def denoise(x, t):
        a, b, c = coefs(reference, 0.0, t)
        away = x[..., None, :] - a * starts - b * targets
        # At t = 0 only pairs that begin at x are left.
        log = jnp.log(weights) - (away**2).sum(-1) / 2 / jnp.maximum(c, 1e-12)
        return jax.nn.softmax(log, -1) @ targets

    return denoise


def mixture(weights, maps, shifts, covariances, dtype=jnp.float32) -> Mixture:
    """A mixture from its covariances S_k."""
    spreads, axes = np.linalg.eigh(np.asarray(covariances, np.float64))
    parts = (weights, maps, shifts, axes, spreads)
    return Mixture(*(jnp.asarray(part, dtype) for part in parts))


def of_the_specification(dtype=jnp.float32) -> Mixture:
    """The coupling of section 11.2."""
    return mixture(
        weights=[0.5, 0.3, 0.2],
        maps=[[[0, -1], [1, 0]], [[-0.6, 0], [0, -0.6]], [[1.2, 0], [0, 0.4]]],
        shifts=[[2, 0], [-1, 1.5], [0, -2.5]],
        covariances=[np.eye(2) * 0.04, np.diag([0.09, 0.02]), [[0.05, 0.03], [0.03, 0.06]]],
        dtype=dtype,
    )


def draw(mixture: Mixture, key: jax.Array, start: Float[Array, "*batch d"]) -> Array:
    """x_T given x0, of the shape of the start."""
    which = jax.random.categorical(
        jax.random.fold_in(key, 0), jnp.log(mixture.weights), shape=start.shape[:-1]
    )
    z = jax.random.normal(jax.random.fold_in(key, 1), start.shape, start.dtype)
    mean = _turned(mixture.maps[which], start) + mixture.shifts[which]
    return mean + _turned(mixture.axes[which], jnp.sqrt(mixture.spreads[which]) * z)


def posterior(
    mixture: Mixture,
    reference: Reference,
    x: Float[Array, "*batch d"],
    start: Float[Array, "*batch d"],
    t: Float[Array, "*batch"],
) -> tuple[Float[Array, "*batch d"], Float[Array, "*batch"]]:
    """Mean and trace of the covariance of x_T given R_t = x and x0.

    Of component k, with g = v(0,t) / v(0,T), q = g rho^2 S + v(t,T), mu = A x0 + b_k and
    r = x - a x0 - b mu in the axes of S: C = b^2 S + c = g q, mean mu + rho S r / q and
    variances S v(t,T) / q. Nothing of it but the weights divides by g, 0 at t = 0.
    """
    t = t[..., None, None]  # batch, k, d
    a, b, _ = coefs(reference, 0.0, t)
    rho, after = reference.rho(t, reference.end), reference.v(t, reference.end)
    share = reference.v(0.0, t) / reference.v(0.0, reference.end)
    q = share * rho**2 * mixture.spreads + after
    mean = _turned(mixture.maps, start[..., None, :]) + mixture.shifts
    r = x[..., None, :] - a * start[..., None, :] - b * mean
    r = _turned(mixture.axes.mT, r)
    # At t = 0 also r = 0: nothing is known but the weights.
    square = r**2 / q / jnp.where(share > 0, share, 1.0)
    log = jnp.log(mixture.weights) - (square + jnp.log(q)).sum(-1) / 2
    weights = jax.nn.softmax(log, -1)[..., None]
    inner = rho * mixture.spreads * r / q
    means = mean + _turned(mixture.axes, inner)
    centre = (weights * means).sum(-2)
    within = mixture.spreads * after / q
    between = (means - centre[..., None, :]) ** 2
    return centre, (weights * (within + between)).sum((-2, -1))


def gaussian(mixture: Mixture, reference: Reference, start: Float[Array, "*b d"]) -> Callable:
    """D of a mixture given the start: (x [*batch, d], t scalar) -> D."""
    return lambda x, t: posterior(
        mixture, reference, x, start, jnp.full(x.shape[:-1], t, x.dtype)
    )[0]


def pairs(mixture: Mixture, reference: Reference, key: jax.Array, t: Float[Array, " n"]):
    """Samples (x0, x_t, x_T) of a mixture, each [n, d], at given times."""
    d = mixture.shifts.shape[-1]
    start = jax.random.normal(jax.random.fold_in(key, 0), (*t.shape, d), t.dtype)
    end = draw(mixture, jax.random.fold_in(key, 1), start)
    z = jax.random.normal(jax.random.fold_in(key, 2), start.shape, t.dtype)
    a, b, c = (jnp.asarray(v)[..., None] for v in coefs(reference, 0.0, t))
    return start, a * start + b * end + jnp.sqrt(c) * z, end


def irreducible(
    mixture: Mixture, reference: Reference, key: jax.Array, t: float, samples: int = 100_000
) -> tuple[float, float]:
    """E tr Cov(x_T | x_t, x0), the least mean square error at t; and its standard error."""
    times = jnp.full(samples, t, mixture.shifts.dtype)
    start, x, _ = pairs(mixture, reference, key, times)
    trace = np.asarray(posterior(mixture, reference, x, start, times)[1], np.float64)
    return float(trace.mean()), float(trace.std() / samples**0.5)


def mean_square(mixture: Mixture) -> float:
    """s^2 = E |x_T - x0|^2 / d, in closed form."""
    d = mixture.shifts.shape[-1]
    away = ((mixture.maps - jnp.eye(d)) ** 2).sum((-2, -1))
    square = away + (mixture.shifts**2).sum(-1) + mixture.spreads.sum(-1)
    return float(mixture.weights @ square) / d


def mean(mixture: Mixture, start: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
    """E[x_T | x0]."""
    at_zero = jnp.zeros(start.shape[:-1], start.dtype)
    return posterior(mixture, brownian(1.0), start, start, at_zero)[0]


def moment(mixture: Mixture) -> np.ndarray:
    """E[x_T x0^T] = sum_k pi_k A_k."""
    return np.asarray(jnp.einsum("k,kij->ij", mixture.weights, mixture.maps))


def cross_moment(end: Float[Array, "n d"], start: Float[Array, "n d"]) -> Float[Array, "d d"]:
    """E[x_T x0^T] of samples."""
    return end.T @ start / len(end)


def total_variation(p, q) -> np.ndarray:
    """Half the L1 distance of probabilities along the last axis."""
    return np.abs(np.asarray(p) - np.asarray(q)).sum(-1) / 2


def sliced_w2(x: Float[Array, "n d"], y: Float[Array, "n d"]) -> Float[Array, ""]:
    """Wasserstein-2 of two samples of one size, its square averaged over 64 fixed directions.

    In the plane they are evenly spaced over the half circle, else drawn once.
    """
    d = x.shape[-1]
    if d == 2:
        angle = np.pi * np.arange(DIRECTIONS) / DIRECTIONS
        along = np.stack([np.cos(angle), np.sin(angle)])
    else:
        along = np.random.default_rng(0).normal(size=(d, DIRECTIONS))
        along /= np.linalg.norm(along, axis=0)
    along = jnp.asarray(along, x.dtype)
    return jnp.sqrt(((jnp.sort(x @ along, 0) - jnp.sort(y @ along, 0)) ** 2).mean())


def _turned(matrix, vector):
    # Not (matrix * vector[..., None, :]).sum(-1): where a matrix is shared by many vectors, the
    # CPU compiler of jax 0.10.2 fuses that with what follows into wrong numbers.
    return jnp.einsum("...ij,...j->...i", matrix, vector)
