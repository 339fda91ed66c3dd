"""Samplers of a bridge: section 4, and the probability flow of section 2.6.

On a grid 0 = t_0 < ... < t_n = T, with D = D(R_t, t; R^0) at s = t_k and the pinned law a, b, c
from s to u = t_{k+1}, all of the first four make the step

    R_u = a R_s + b D + eta sqrt( (1 - m) c + m v(s,u) ) eps

    mean        eta = 0                      n calls      point estimates; n = 1 is regression
    bridge      m = noise_mix                n            samples; the last step has no noise
    posterior   m = 0                        n            exact for a single end
    em          m = 1, Euler-Maruyama        n            `drop_last_noise` in its last step
    pfode       posterior step to eps,       2 n + 2      ablation; n steps of Heun, dense at
                Heun to T - eps, then D                   both ends, where the flow is singular

The denoiser is never asked at t = T. All are one scan over the rows of a `Table`, whose numbers
are data: another sigma, grid or noise mix compiles nothing anew; another number of steps does.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from common.errors import reject
from geometry.graphs import Graph
from geometry.matching import output
from geometry.reference import Reference, coefs
from geometry.reference import grid as points

STEPS = {"mean": 10, "bridge": 50, "posterior": 50, "em": 50, "pfode": 50}


class Sampler(NamedTuple):
    """Settings, as `sampler` checked them.

    Attributes:
      name: of the table above.
      steps: n.
      noise_mix: m of bridge; the others do not read it.
      grid, power: of `reference.grid`; pfode has its own.
      eps: of pfode, in units of T.
      drop_last_noise: of em.
    """

    name: str
    steps: int
    noise_mix: float
    grid: str
    power: float
    eps: float
    drop_last_noise: bool


class Memory(NamedTuple):
    """What a second call of a step needs: a combination kept from the call before.

    Attributes:
      start, use: factors of R^0 and of what was kept, in the new state.
      x, d, origin: factors of the state, D and R^0 in what is kept.
    """

    start: Float[np.ndarray, "*segments rows"]
    use: Float[np.ndarray, "*segments rows"]
    x: Float[np.ndarray, "*segments rows"]
    d: Float[np.ndarray, "*segments rows"]
    origin: Float[np.ndarray, "*segments rows"]


class Table(NamedTuple):
    """A sampler on a reference: one row for each call of the denoiser, float64 on the host.

    Attributes:
      time: where D is asked.
      x, d: factors of the state and of D.
      noise: factor of standard normal noise; None where there is none at all.
      memory: None of samplers of one call a step.
      shown: rows after which the state is one of the grid, int32.
    """

    time: Float[np.ndarray, "*segments rows"]
    x: Float[np.ndarray, "*segments rows"]
    d: Float[np.ndarray, "*segments rows"]
    noise: Float[np.ndarray, "*segments rows"] | None
    memory: Memory | None
    shown: Int[np.ndarray, "*segments points"]


def sampler(
    name: str = "mean",
    steps: int | None = None,
    noise_mix: float = 0.5,
    grid: str = "cosine",
    power: float = 2.0,
    eps: float = 1e-3,
    drop_last_noise: bool = True,
) -> Sampler:
    """Settings of a sampler; steps None is 10 of "mean" and else 50.

    Raises:
      UserError: an unknown name or grid, or a number out of its range.
    """
    if name not in STEPS:
        raise reject("sampler.name", name, f"one of {', '.join(STEPS)}")
    steps = STEPS[name] if steps is None else steps
    points(grid, steps, 1.0, power)
    if not 0 <= noise_mix <= 1:
        raise reject("sampler.noise_mix", noise_mix, "a number from 0 to 1")
    if not 0 < eps < 0.5:
        raise reject("sampler.eps", eps, "a number between 0 and 0.5")
    return Sampler(name, int(steps), noise_mix, grid, power, eps, bool(drop_last_noise))


def table(reference: Reference, sampler: Sampler) -> Table:
    """The rows of a sampler on a reference with noise of one number."""
    if sampler.name == "pfode":
        return _flow(reference, sampler.steps, sampler.eps)
    times = points(sampler.grid, sampler.steps, reference.end, sampler.power)
    s, u = times[:-1], times[1:]
    a, b, c = coefs(reference, s, u)
    shown = np.arange(len(s), dtype=np.int32)
    if sampler.name == "mean":
        return Table(s, a, b, None, None, shown)
    mix = {"bridge": sampler.noise_mix, "posterior": 0.0, "em": 1.0}[sampler.name]
    noise = np.sqrt((1 - mix) * c + mix * reference.v(s, u))
    if sampler.name != "em" or sampler.drop_last_noise:
        noise[-1] = 0.0
    return Table(s, a, b, noise, None, shown)


def _flow(reference, steps, eps):
    """A row for the kick, two for each step of Heun's method, one for the end."""
    end = reference.end
    edge = np.log(eps / (1 - eps))
    times = end / (1 + np.exp(-np.linspace(edge, -edge, steps + 1)))
    s, u = times[:-1], times[1:]
    half = (u - s) / 2
    at_s, at_u = (np.broadcast_arrays(*output("flow", reference, t), t)[:3] for t in (s, u))
    zero, one = np.zeros_like(s), np.ones_like(s)
    # x' = x + h slope(x, s), kept: x + h/2 slope; then x'' = kept + h/2 slope(x', u).
    first = [s, 1 + 2 * half * at_s[1], 2 * half * at_s[0], zero, 2 * half * at_s[2], zero]
    first += [1 + half * at_s[1], half * at_s[0], half * at_s[2]]
    second = [u, half * at_u[1], half * at_u[0], zero, half * at_u[2], one, zero, zero, zero]
    pairs = np.stack([first, second], -1).reshape(9, -1)
    a, b, c = coefs(reference, 0.0, times[0])
    kick = [0.0, a, b, np.sqrt(c), 0, 0, 0, 0, 0]
    last = [times[-1], 0, 1, 0, 0, 0, 0, 0, 0]
    rows = np.concatenate([np.stack([kick], -1), pairs, np.stack([last], -1)], -1)
    shown = np.r_[0, 2 * np.arange(1, steps + 1), 2 * steps + 1].astype(np.int32)
    return Table(*rows[:4], Memory(*rows[4:]), shown)


def run(
    denoise: Callable,
    table: Table,
    start: Float[Array, "*shape"],
    noise: Callable | None = None,
    keep: Callable = lambda x: x,
    path: bool = False,
):
    """The scan over a table. Compiled with the table as an argument, it serves all alike.

    Args:
      denoise: (x, t scalar) -> D, of the shape and dtype of x.
      table: of `table`.
      start: R^0.
      noise: k, int32 -> standard normal of the start's shape, projected; k counts calls of
        the denoiser. None where the sampler has none.
      keep: what every new state is passed through, see `fixed`.
      path: the states at every point of the grid, too.

    Returns:
      R^T; with `path` the pair of it and [points + 1, *shape], the start first.
    """
    dtype = start.dtype
    rows = jax.tree.map(lambda v: jnp.asarray(v, dtype), table._replace(shown=None))
    count = jnp.arange(len(table.time), dtype=jnp.int32)

    def step(carry, row):
        x, kept = carry
        k, row = row
        d = denoise(x, row.time)
        new = row.x * x + row.d * d
        if row.memory is not None:
            new = new + row.memory.start * start + row.memory.use * kept
            kept = row.memory.x * x + row.memory.d * d + row.memory.origin * start
        if row.noise is not None:
            new = new + row.noise * noise(k)
        new = keep(new.astype(dtype))
        return (new, kept), new if path else None

    kept = None if table.memory is None else jnp.zeros_like(start)
    (x, _), states = jax.lax.scan(step, (start, kept), (count, rows))
    if not path:
        return x
    return x, jnp.concatenate([start[None], states[jnp.asarray(table.shown)]])


def sample(
    denoise: Callable,
    reference: Reference,
    sampler: Sampler,
    start: Float[Array, "*shape"],
    noise: Callable | None = None,
    keep: Callable = lambda x: x,
    path: bool = False,
):
    """R^T ~ q(. | R^0), or with "mean" a point estimate; arguments as of `run`.

    Raises:
      UserError: a sampler with noise is given none.
    """
    rows = table(reference, sampler)
    if rows.noise is not None and noise is None:
        raise reject("sampler.name", sampler.name, "mean where no noise is given")
    return run(denoise, rows, start, noise, keep, path)


def fixed(graph: Graph, start: Float[Array, "atoms 3"]) -> Callable:
    """`keep` of a graph: fixed atoms and padding have the start's positions, bitwise."""
    return lambda x: jnp.where(graph.free[:, None] > 0, x, start)
