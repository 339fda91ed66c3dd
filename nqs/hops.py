"""Hops of the Hamiltonian: which are allowed, their signs, and what they lead to.

A hop moves one electron from mode `source` to mode `target` of the same spin. With the
modes ordered [up, down] its matrix element is -t times the parity of the occupied modes
strictly between the two (Jordan-Wigner).
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


class Hops(NamedTuple):
    """All directed hops of both spins, and the diagonal of the Hamiltonian.

    A tuple of small arrays that a traced function may close over.
    """

    source: np.ndarray  # int32 [H]
    target: np.ndarray  # int32 [H]
    element: np.ndarray  # float64 [H]: -t_ij, without the sign
    U: float
    field: np.ndarray  # float64 [2N]


def hops(hubbard) -> Hops:
    """The directed hops of a `lattice.Hubbard`, up spins first."""
    n_sites = hubbard.n_sites
    i, j = np.asarray(hubbard.bonds, np.int32).reshape(-1, 2).T
    source = np.concatenate([i, j])
    target = np.concatenate([j, i])
    element = -np.tile(np.asarray(hubbard.amplitude, np.float64), 2)
    return Hops(
        source=np.concatenate([source, source + n_sites]),
        target=np.concatenate([target, target + n_sites]),
        element=np.tile(element, 2),
        U=float(hubbard.U),
        field=np.asarray(hubbard.field, np.float64),
    )


def allowed(h: Hops, x: Int[Array, "*b modes"]) -> Bool[Array, "*b hops"]:
    """Where the source is occupied and the target empty."""
    return (x[..., h.source] > 0) & (x[..., h.target] == 0)


def apply(h: Hops, x: Int[Array, "b modes"], hop: Int[Array, " b"]) -> Int[Array, "b modes"]:
    """One hop for each configuration; must be allowed."""
    modes = jnp.arange(x.shape[-1])
    source = jnp.asarray(h.source)[hop][:, None] == modes
    target = jnp.asarray(h.target)[hop][:, None] == modes
    return x + target.astype(x.dtype) - source.astype(x.dtype)


def elements(h: Hops, x: Int[Array, "b modes"], hop: Int[Array, " b"]) -> Float[Array, " b"]:
    """<x|H|x'> of one allowed hop x -> x' for each configuration, with its sign."""
    source, target = jnp.asarray(h.source)[hop], jnp.asarray(h.target)[hop]
    filled = jnp.cumsum(x, axis=-1, dtype=jnp.int32)

    def up_to(mode):
        return jnp.take_along_axis(filled, mode[:, None], axis=-1)[:, 0]

    low, high = jnp.minimum(source, target), jnp.maximum(source, target)
    between = up_to(high - 1) - up_to(low)
    return jnp.asarray(h.element)[hop] * (1 - 2 * (between % 2))


def diagonal(h: Hops, x: Int[Array, "*b modes"]) -> Float[Array, "*b"]:
    """U times the doubly occupied sites, plus the field; the widest float there is."""
    up, down = jnp.split(x, 2, axis=-1)
    wide = jnp.result_type(float)
    pairs = jnp.sum(up * down, axis=-1, dtype=jnp.int32).astype(wide)
    return h.U * pairs + x.astype(wide) @ jnp.asarray(h.field, wide)
