"""Couplings in the plane on which everything is known: sections 2.5, 11.2 and 11.3.

Two starts with two ends each, which show that the drift has to know the start; and a mixture
that a small network learns down to the irreducible loss. `oracle.py` has their posteriors.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from geometry import oracle
from geometry.matching import scales, times, weight
from geometry.reference import Reference, brownian, coefs, scaled
from geometry.samplers import run, sampler, table

# Two starts, two ends, q(y | x0) a row for each start.
STARTS = ((1.0, 0.0), (-1.0, 0.0))
ENDS = ((-1.0, 1.0), (1.0, 1.0))
PARTNERS = ((0.7, 0.3), (0.4, 0.6))

TIMES = (0.1, 0.25, 0.5, 0.75, 0.9)  # Where the learned denoiser is judged.


class Pairs(NamedTuple):
    """A batch of pairs in the plane."""

    start: Float[Array, "n 2"]
    end: Float[Array, "n 2"]


class Toy(NamedTuple):
    """A denoiser of the mixture, as pure functions.

    Attributes:
      init: key -> params.
      apply: (params, x [*batch, 2], start [*batch, 2], t [*batch]) -> D.
      batch: (key, size) -> fresh `Pairs`.
      loss: (params, key, Pairs) -> scalar; near 1 of a fresh network.
      evaluate: (params, key) -> dict of floats, see `judged`.
    """

    init: Callable
    apply: Callable
    batch: Callable
    loss: Callable
    evaluate: Callable


class Perceptron(nn.Module):
    """(y c_in, x0, time) -> F, 0 of fresh parameters."""

    width: int
    depth: int

    @nn.compact
    def __call__(self, y, start, t):
        waves = 2 * np.pi * 2.0 ** np.arange(-2, 3) * t[..., None]
        h = jnp.concatenate([y, start, t[..., None], jnp.sin(waves), jnp.cos(waves)], -1)
        for _ in range(self.depth):
            h = nn.silu(nn.Dense(self.width)(h))
        return nn.Dense(y.shape[-1], kernel_init=nn.initializers.zeros)(h)


def toy(reference: Reference, width: int = 256, depth: int = 3) -> Toy:
    """The mixture of section 11.2 with a perceptron, preconditioned as section 6.

    Args:
      reference: of the bridge; the section has brownian(1.0).
      width, depth: of the hidden layers.
    """
    mixture = oracle.of_the_specification()
    s2 = oracle.mean_square(mixture)
    network = Perceptron(width, depth)

    def init(key):
        x = jnp.zeros((1, 2))
        return network.init(key, x, x, jnp.zeros(1))

    def apply(params, x, start, t):
        skip, out, into = (value[..., None] for value in scales(reference, t, s2))
        a, b, _ = coefs(reference, 0.0, t[..., None])
        y = x - (a + b) * start
        f = network.apply(params, into * y, start, t / reference.end)
        return start + skip * y + out * f

    def batch(key, size):
        start = jax.random.normal(jax.random.fold_in(key, 0), (size, 2))
        return Pairs(start, oracle.draw(mixture, jax.random.fold_in(key, 1), start))

    def loss(params, key, pairs):
        t = times(jax.random.fold_in(key, 0), jnp.ones(len(pairs.start)), reference.end)
        z = jax.random.normal(jax.random.fold_in(key, 1), pairs.start.shape)
        a, b, c = (value[:, None] for value in coefs(reference, 0.0, t))
        x = a * pairs.start + b * pairs.end + jnp.sqrt(c) * z
        square = ((apply(params, x, pairs.start, t) - pairs.end) ** 2).mean(-1)
        return (weight(scales(reference, t, s2).out, s2) * square).mean()

    def denoiser(params, start):
        return lambda x, t: apply(params, x, start, jnp.broadcast_to(t, x.shape[:-1]))

    def evaluate(params, key, **options):
        return judged(mixture, reference, denoiser, params, key, **options)

    return Toy(init, apply, batch, loss, evaluate)


def coupling(key: jax.Array, size: int) -> Pairs:
    """Pairs of the two starts and two ends, half of them of each start."""
    side = jnp.arange(size) % 2
    other = jax.random.uniform(key, (size,)) > jnp.asarray(PARTNERS)[side, 0]
    return Pairs(jnp.asarray(STARTS)[side], jnp.asarray(ENDS)[other.astype(jnp.int32)])


def partners(
    reference: Reference, key: jax.Array, paths: int, steps: int = 60, aware: bool = True
) -> Float[np.ndarray, "2 2"]:
    """q(y | x0) of generated pairs, a row for each start: table 2.5.

    Args:
      paths: of each start.
      steps: of the sampler "posterior", uniform.
      aware: the drift knows the start; else it is the Markov one.
    """
    ends, q = jnp.asarray(ENDS), jnp.asarray(PARTNERS)
    start = jnp.repeat(jnp.asarray(STARTS)[:, None], paths, 1)
    if aware:
        denoise = oracle.finite(reference, ends, q[:, None], start)
    else:
        both = jnp.repeat(jnp.asarray(STARTS), 2, 0), jnp.tile(ends, (2, 1))
        denoise = oracle.markov(reference, *both, q.ravel() / 2)
    rows = table(reference, sampler("posterior", steps, grid="uniform"))
    end = run(denoise, rows, start, _normal(key, start.shape))
    nearest = ((end[..., None, :] - ends) ** 2).sum(-1).argmin(-1)
    return np.stack([np.asarray((nearest == k).mean(-1)) for k in range(len(ENDS))], -1)


def judged(
    mixture: oracle.Mixture,
    reference: Reference,
    denoiser: Callable,
    params: Any,
    key: jax.Array,
    steps: Sequence[int] = (10, 50),
    starts: int = 8,
    samples: int = 3000,
    pairs: int = 20_000,
) -> dict[str, float]:
    """How near a denoiser of the mixture comes to what can be reached: section 11.3.

    Args:
      denoiser: (params, start) -> ((x, t scalar) -> D); the same function compiles once.
      steps: of the sampler "bridge"; the cross moment has the last.
      starts, samples: held-out starts and ends of each, for the sliced distance.
      pairs: for the errors and the cross moment.

    Returns:
      "mse_T", |D - x_T|^2 at t = T; "floor_T", the irreducible error of the same samples;
      "excess_T", the square distance from the posterior mean over the floor; "w2_N", the mean
      conditional sliced distance with N steps; "w2_floor", that of two samples of the truth;
      "cross", the largest error of E[x_T x0^T].
    """
    found = {}
    for i, t in enumerate(TIMES):
        at = jnp.full(pairs, t)
        start, x, end = oracle.pairs(mixture, reference, jax.random.fold_in(key, i), at)
        mean, trace = oracle.posterior(mixture, reference, x, start, at)
        d = _asked(denoiser, params, start, x, jnp.float32(t))
        floor, excess = trace.mean(), ((d - mean) ** 2).sum(-1).mean()
        found |= {f"mse_{t}": float(((d - end) ** 2).sum(-1).mean())}
        found |= {f"floor_{t}": float(floor), f"excess_{t}": float(excess / floor)}
    for n in steps:
        rows = table(reference, sampler("bridge", n))
        at = mixture, denoiser, params, rows, jax.random.fold_in(key, 100), starts, samples
        far, floor = _distances(*at)
        found |= {f"w2_{n}": float(far.mean()), "w2_floor": float(floor.mean())}
    start = jax.random.normal(jax.random.fold_in(key, 101), (pairs, 2))
    end = _generated(denoiser, params, rows, start, jax.random.fold_in(key, 102))
    found["cross"] = float(np.abs(cross_error(mixture, end, start)).max())
    return found


def cross_error(mixture: oracle.Mixture, end: Array, start: Array) -> np.ndarray:
    """Error of E[x_T x0^T] of samples.

    Without the part that comes from the starts: E[(x_T - E[x_T | x0]) x0^T], which is 0.
    """
    return np.asarray(oracle.cross_moment(end - oracle.mean(mixture, start), start))


def oracle_table(
    key: jax.Array,
    sigmas: Sequence[float] = (0.5, 1.0, 2.0),
    grids: Sequence[str] = ("uniform", "cosine"),
    names: Sequence[str] = ("posterior", "bridge", "em", "pfode"),
    steps: Sequence[int] = (5, 10, 20, 50),
    starts: int = 32,
    samples: int = 3000,
) -> dict[tuple, tuple[float, float, float]]:
    """Table 11.2: the mixture's own posterior mean under every sampler; em keeps all noise.

    One compilation for each number of steps of each kind of table, as all else is data.

    Returns:
      (sigma, name, grid, n) -> mean conditional sliced distance, its excess over that of two
      samples of the truth with the same starts, and the standard error of the excess.
    """
    mixture = oracle.of_the_specification()
    found = {}
    kinds = [(name, grid) for grid in grids for name in names if name != "pfode"]
    kinds += [("pfode", "")] * ("pfode" in names)  # It has a grid of its own.
    for sigma, (name, grid), n in product(sigmas, kinds, steps):
        options = sampler(name, n, grid=grid or "cosine", drop_last_noise=False)
        rows = table(brownian(sigma), options)
        at = (mixture, jnp.float32(sigma**2)), rows, key, starts, samples
        far, floor = _distances(mixture, _exact, *at)
        error = float((far - floor).std() / starts**0.5)
        found[sigma, name, grid, n] = float(far.mean()), float((far - floor).mean()), error
    return found


def _exact(params, start):
    mixture, variance = params
    return oracle.gaussian(mixture, scaled(brownian(1.0), variance), start)


@partial(jax.jit, static_argnums=0)
def _asked(denoiser, params, start, x, t):
    return denoiser(params, start)(x, t)


@partial(jax.jit, static_argnums=0)
def _generated(denoiser, params, rows, start, key):
    return run(denoiser(params, start), rows, start, _normal(key, start.shape))


def _distances(mixture, denoiser, params, rows, key, starts, samples):
    """Sliced distances of generated and of true ends from others, [starts] each."""
    start = jax.random.normal(jax.random.fold_in(key, 0), (starts, 1, 2))
    start = jnp.repeat(start, samples, 1)
    truth, other = (oracle.draw(mixture, jax.random.fold_in(key, i), start) for i in (1, 2))
    end = _generated(denoiser, params, rows, start, jax.random.fold_in(key, 3))
    return (np.asarray(_sliced(x, truth)) for x in (end, other))


_sliced = jax.jit(jax.vmap(oracle.sliced_w2))


def _normal(key, shape):
    return lambda k: jax.random.normal(jax.random.fold_in(key, k), shape)
