"""What networks see of positions and of time: invariants and unit vectors, finite everywhere.

    d_ij = sqrt(|r_ij|^2 + 1e-8)    u_ij = r_ij / (d_ij + 1e-3)    r_ij = x_j + shift - x_i

Section 7.1 of the specification. The norm is smooth, so that gradients are finite where
atoms coincide. Everything keeps the dtype of the positions.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from geometry.graphs import Graph

# Of the time, in its whole range 0 to 1: from a quarter of a wave to 16.
FREQUENCIES = np.geomspace(0.25, 16.0, 8)
TIME_FEATURES = 2 * len(FREQUENCIES) + 2


class Pairs(NamedTuple):
    """One state, edge by edge.

    Attributes:
      distance: d_ij, angstrom.
      unit: u_ij, from the receiver to the sender.
    """

    distance: Float[Array, " edges"]
    unit: Float[Array, "edges 3"]


def pairs(graph: Graph, x: Float[Array, "atoms 3"]) -> Pairs:
    """Distances and directions of a state's edges, through the cell's images."""
    r = x[graph.senders] + graph.shifts.astype(x.dtype) - x[graph.receivers]
    d = smooth_norm(r)
    return Pairs(d, r / (d[:, None] + 1e-3))


def smooth_norm(v: Float[Array, "..."], axis: int = -1) -> Float[Array, "..."]:
    """sqrt(|v|^2 + 1e-8) along an axis: 1e-4, with gradient 0, where v = 0."""
    return jnp.sqrt((v * v).sum(axis) + 1e-8)


def gaussians(d: Float[Array, "*batch"], count: int, radius: float) -> Float[Array, "*batch n"]:
    """exp(-((d - c) / w)^2 / 2), `count` centres c from 0 to `radius`, w apart."""
    centres = jnp.asarray(np.linspace(0.0, radius, count), d.dtype)
    width = radius / (count - 1)
    return jnp.exp(-0.5 * ((d[..., None] - centres) / width) ** 2)


def envelope(d: Float[Array, "*batch"], radius: float) -> Float[Array, "*batch"]:
    """1 - 10 u^3 + 15 u^4 - 6 u^5, u = d / radius: falls from 1 at 0 to 0 at the radius.

    Two derivatives vanish at both ends, so that edges come and go smoothly.
    """
    u = jnp.minimum(d / radius, 1.0)
    return 1 - u**3 * (10 - 15 * u + 6 * u**2)


def time_features(t: Float[Array, "*batch"]) -> Float[Array, "*batch 18"]:
    """sin and cos of 2 pi f t for the 8 frequencies, t and t^2."""
    angle = 2 * np.pi * t[..., None] * jnp.asarray(FREQUENCIES, t.dtype)
    powers = jnp.stack([t, t * t], -1)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle), powers], -1)
