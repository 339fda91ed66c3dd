"""The matching objective: pinned samples, preconditioning, losses. Sections 2.4 and 6.

A network F learns D, the mean of the end R^T given the state R_t and the start R^0:

    D = R^0 + c_skip y + c_out F ,   y = R_t - (a + b) R^0 = b u + sqrt(c) eps ,   u = R^T - R^0

with a, b, c of the pinned law (`reference.coefs`). c_skip y is the best linear estimate of u,
c_out^2 its mean square error and 1 / c_in^2 the mean square of y where s^2 is that of u:

    c_skip = b s^2 / q    c_out^2 = s^2 c / q    c_in^2 = 1 / q ,    q = b^2 s^2 + c

The Brownian bridge has a + b = 1 and b = t/T, which is section 6. Loss, pooled over all free
atoms of the global batch, so that a fresh network has about 1 at every t:

    l = sum w(t) |D - R^T|^2 / (3 sum free) ,    w = 1 / max(c_out, 0.02 s)^2
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from common.errors import reject
from geometry.graphs import Graph, of_atoms, project
from geometry.network import Inputs, Network
from geometry.reference import Reference, coefs

LAST = 0.999  # Times are drawn from [0, LAST T): at T nothing is left to be said.
FLOOR = 0.02  # w_min / s of the weight; also the least 1 / (c_in s).


class Scales(NamedTuple):
    """c_skip, c_out in angstrom, c_in in 1/angstrom; of the times' shape."""

    skip: Array
    out: Array
    into: Array


class Sums(NamedTuple):
    """Numerators and denominators, which are summed over packs and devices before dividing.

    Attributes:
      error, coordinates: sum of w |D - R^T|^2 over free atoms, and of 3.
      pair, pairs: sum of | |D_ij| - |R^T_ij| | over edges, angstrom, and of 1.
      bond, bonds: the same over edges that are bonds.
    """

    error: Array
    coordinates: Array
    pair: Array
    pairs: Array
    bond: Array
    bonds: Array


def times(
    key: jax.Array, real: Shaped[Array, "*batch"], end: float = 1.0, last: float = LAST
) -> Float[Array, "*batch"]:
    """Uniform on [0, last T), one in each of as many equal strata as there are structures.

    The shift within the strata is shared; which structure has which stratum is drawn.

    Args:
      key: of the step.
      real: [packs, graphs] of the whole global batch, above 0 or True for a structure.
      end: T.
      last: as above.

    Returns:
      t, float32; 0 at padding, which takes no stratum.
    """
    is_real = (real > 0).reshape(-1)
    priority = jax.random.uniform(jax.random.fold_in(key, 0), is_real.shape)
    rank = jnp.argsort(jnp.argsort(jnp.where(is_real, priority, 2.0)))
    shift = jax.random.uniform(jax.random.fold_in(key, 1))
    t = last * end * (rank + shift) / jnp.maximum(is_real.sum(), 1)
    return jnp.where(is_real, t, 0.0).reshape(real.shape)


def scales(reference: Reference, t: Array, s2: Any) -> Scales:
    """Preconditioning at t: see the module.

    Args:
      t: in [0, T).
      s2: s^2, the training set's mean square of u per free coordinate, angstrom^2; a number
        or of the shape of t.
    """
    before, after = reference.v(0.0, t), reference.v(t, reference.end)
    whole, rho = reference.v(0.0, reference.end), reference.rho(t, reference.end)
    # q = share * rest with share = v(0,t) / v(0,T). It cancels, so nothing is 0/0 at t = 0.
    share = before / whole
    rest = share * rho**2 * s2 + after
    skip = rho * s2 / rest
    out = jnp.sqrt(s2 * after / rest)
    # At t = 0, where y = 0, the floor is what keeps it finite.
    into = 1 / jnp.sqrt(jnp.maximum(share * rest, FLOOR**2 * s2))
    return Scales(*jnp.broadcast_arrays(skip, out, into))


def weight(out: Array, s2: Any, floor: float = FLOOR) -> Array:
    """w = 1 / max(c_out, floor s)^2, 1/angstrom^2."""
    return 1 / jnp.maximum(out**2, floor**2 * s2)


def pinned(
    graph: Graph,
    reference: Reference,
    t: Float[Array, " graphs"],
    start: Float[Array, "atoms 3"],
    end: Float[Array, "atoms 3"],
    noise: Float[Array, "atoms 3"],
) -> Float[Array, "atoms 3"]:
    """R_t of the process pinned at both ends; fixed atoms stay where they are, bitwise.

    Args:
      t: of each structure.
      noise: of `graphs.noise`.
    """
    a, b, c = (of_atoms(graph, _each(graph, v)) for v in coefs(reference, 0.0, t))
    # a + b = 1 where a translation of both ends is one of the path: then exactly.
    mean = start + b * (end - start)
    if not reference.translates:
        mean = mean + (a + b - 1) * start
    x = (mean + jnp.sqrt(c) * noise).astype(start.dtype)
    return jnp.where(graph.free[:, None] > 0, x, start)


def denoised(
    network: Network,
    reference: Reference,
    s2: Any,
    params: Any,
    graph: Graph,
    x: Float[Array, "atoms 3"],
    known: Float[Array, "known atoms 3"],
    t: Any,
    segment: Any = 0.0,
) -> Float[Array, "atoms 3"]:
    """D, the network's mean of the end.

    Fixed atoms and padding have the start's positions, bitwise; the rest moves as
    `graphs.project` allows.

    Args:
      network: `geometry.network.Network`.
      reference: its noise may be an array [graphs], see `reference.scaled`.
      s2: mean square displacement per coordinate, a number or [graphs].
      x: R_t.
      known: known states, the start first.
      t: in [0, T), a number or [graphs].
      segment: i / K, a number or [graphs].
    """
    start, dtype = known[0], x.dtype
    t = _each(graph, jnp.asarray(t, dtype))
    scale = scales(reference, t, s2)
    skip, out, into = (_each(graph, value).astype(dtype) for value in scale)
    if not reference.translates:
        # The network sees R^0 + y, whose distances are not shrunk.
        a, b, _ = coefs(reference, 0.0, t)
        x = x + of_atoms(graph, _each(graph, 1 - a - b).astype(dtype)) * start
    inputs = Inputs(
        x=x,
        known=known,
        scale=into,
        time=t / reference.end,
        segment=_each(graph, jnp.asarray(segment, dtype)),
    )
    f = network.apply(params, graph, inputs)
    step = of_atoms(graph, skip) * (x - start) + of_atoms(graph, out) * f
    return start + project(graph, step).astype(dtype)


def objective(
    network: Network,
    reference: Reference,
    s2: Any,
    params: Any,
    graph: Graph,
    known: Float[Array, "known atoms 3"],
    end: Float[Array, "atoms 3"],
    t: Float[Array, " graphs"],
    noise: Float[Array, "atoms 3"],
    segment: Any = 0.0,
    floor: float = FLOOR,
    auxiliary: bool = False,
) -> Sums:
    """The sums of one pack: a pinned sample, one network call, its errors.

    Args:
      network, reference, s2, params, known, segment: as of `denoised`.
      end: R^T.
      t, noise: as of `pinned`.
      floor: w_min / s.
      auxiliary: the sums of distances, too; else they are 0.
    """
    x = pinned(graph, reference, t, known[0], end, noise)
    d = denoised(network, reference, s2, params, graph, x, known, t, segment)
    w = weight(scales(reference, t, s2).out, s2, floor)
    return sums(graph, d, end, _each(graph, w), auxiliary)


def sums(
    graph: Graph,
    d: Float[Array, "atoms 3"],
    end: Float[Array, "atoms 3"],
    w: Float[Array, " graphs"],
    auxiliary: bool = False,
) -> Sums:
    """The sums of estimates D of ends R^T with weights w(t)."""
    square = of_atoms(graph, w)[:, 0] * ((d - end) ** 2).sum(-1)
    error = jnp.where(graph.free > 0, square, 0.0).sum()
    zero = jnp.zeros_like(error)
    pair = pairs = bond = bonds = zero
    if auxiliary:
        off = jnp.abs(_distances(graph, d) - _distances(graph, end))
        of_bonds = graph.edge_mask * (graph.bonds > 0)
        pair, pairs = (graph.edge_mask * off).sum(), graph.edge_mask.sum()
        bond, bonds = (of_bonds * off).sum(), of_bonds.sum()
    return Sums(error, 3 * graph.free.sum(), pair, pairs, bond, bonds)


def loss(sums: Sums, pair: float = 0.0, bond: float = 0.0) -> Float[Array, ""]:
    """The loss of the global batch from the sums of its packs, of any leading axes.

    Args:
      pair, bond: weights of the auxiliary losses, 1/angstrom.
    """
    total = Sums(*(value.sum() for value in sums))
    mean = lambda numerator, count: numerator / jnp.maximum(count, 1.0)
    return (
        mean(total.error, total.coordinates)
        + pair * mean(total.pair, total.pairs)
        + bond * mean(total.bond, total.bonds)
    )


def _distances(graph, x):
    """|r_ij| of each edge; 1 at padding and where two atoms coincide, without a gradient."""
    r = x[graph.senders] + graph.shifts - x[graph.receivers]
    square = (r**2).sum(-1)
    return jnp.sqrt(jnp.where((square > 0) & (graph.edge_mask > 0), square, 1.0))


def _each(graph, value):
    return jnp.broadcast_to(value, graph.centred.shape)


def _velocity(reference, t):
    rate = 1 / (reference.end - t)
    return rate, -rate, 0.0


def _noise(reference, t):
    a, b, c = coefs(reference, 0.0, t)
    return b / c**0.5, -1 / c**0.5, a / c**0.5


def _score(reference, t):
    rho = reference.rho(t, reference.end)
    rate = rho / reference.v(t, reference.end)
    return rate, -rho * rate, 0.0


def _drift(reference, t):
    p, q, _ = _score(reference, t)
    variance = reference.variance(t)
    return variance * p, reference.rate(t) + variance * q, 0.0


def _flow(reference, t):
    of_drift, of_noise = _drift(reference, t), _noise(reference, t)
    half = reference.variance(t) / 2 / coefs(reference, 0.0, t)[2] ** 0.5
    return tuple(u - half * v for u, v in zip(of_drift, of_noise, strict=True))


# What a network could say, as p D + q R_t + r R^0: the factors from the reference and t.
OUTPUTS: dict[str, Callable] = {
    "target": lambda reference, t: (1.0, 0.0, 0.0),
    "displacement": lambda reference, t: (1.0, 0.0, -1.0),
    "velocity": _velocity,
    "noise": _noise,
    "score": _score,
    "drift": _drift,
    "flow": _flow,
}


def output(name: str, reference: Reference, t: Any) -> tuple[Any, Any, Any]:
    """p, q, r of an output p D + q R_t + r R^0 at a time 0 < t < T.

        target         D
        displacement   D - R^0
        velocity       (D - R_t) / (T - t)
        noise          (a R^0 + b D - R_t) / sqrt(c)
        score          rho (D - rho R_t) / v(t,T), of the h-function
        drift          f R_t + sigma^2 score
        flow           drift - sigma^2 noise / (2 sqrt(c)), of the marginal given R^0

    Raises:
      UserError: an unknown name.
    """
    if name not in OUTPUTS:
        raise reject("output", name, f"one of {', '.join(OUTPUTS)}")
    return OUTPUTS[name](reference, t)


def from_target(name: str, reference: Reference, d: Any, x: Any, start: Any, t: Any) -> Any:
    """The output of that name that says D: positions are NumPy or JAX arrays, t fits them."""
    p, q, r = output(name, reference, t)
    return p * d + q * x + r * start


def to_target(name: str, reference: Reference, value: Any, x: Any, start: Any, t: Any) -> Any:
    """The D that an output says; the inverse of `from_target`."""
    p, q, r = output(name, reference, t)
    return (value - q * x - r * start) / p
