"""Diagonal observables and attention maps, as averages over configurations."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Geometry(NamedTuple):
    """Displacements between sites, for averages over pairs of the same one."""

    shift: np.ndarray  # int32 [N, N]: r = rx * Ly + ry from i to j, or N where undefined.
    shell: np.ndarray  # int32 [N, N]: which distance, an index into `distances`.
    distances: np.ndarray  # float64 [shells]: lengths, shortest image, ascending from 0.


def geometry(hubbard) -> Geometry:
    """Displacements modulo the lattice where it wraps, non-negative where it is open."""
    shape = hubbard.shape
    n = shape[0] * shape[1]
    place = np.stack(np.unravel_index(np.arange(n), shape), axis=-1)
    delta = place[None] - place[:, None]
    wraps = np.array([bc != "open" for bc in hubbard.boundary])
    size = np.array(shape)
    modulo = np.where(wraps, delta % size, delta)
    inside = (modulo >= 0).all(axis=-1)
    shift = np.where(inside, modulo[..., 0] * shape[1] + modulo[..., 1], n)
    short = np.where(wraps, (delta + size // 2) % size - size // 2, delta)
    length = np.round(np.sqrt((short**2).sum(axis=-1)), 9)
    distances, shell = np.unique(length, return_inverse=True)
    return Geometry(shift.astype(np.int32), shell.reshape(n, n).astype(np.int32), distances)


class Diagonal(NamedTuple):
    """Means over configurations. S^z = (n_up - n_dn) / 2, n = n_up + n_dn."""

    density_up: Float[Array, " sites"]
    density_dn: Float[Array, " sites"]
    double: Float[Array, " sites"]
    spin: Float[Array, " sites"]  # (1/N) sum_i <S^z_i S^z_{i+r}> for each r
    charge: Float[Array, " sites"]  # (1/N) sum_i <n_i n_{i+r}>, not connected


def diagonal(g: Geometry, x: Int[Array, "b modes"]) -> Diagonal:
    """Observables that the configurations alone decide."""
    up, down = jnp.split(x.astype(jnp.result_type(float)), 2, axis=-1)
    n = up.shape[-1]

    def pairs(a):
        both = a.T @ a / len(a)
        summed = jax.ops.segment_sum(both.ravel(), g.shift.ravel(), n + 1)
        return summed[:n] / n

    return Diagonal(
        density_up=up.mean(axis=0),
        density_dn=down.mean(axis=0),
        double=(up * down).mean(axis=0),
        spin=pairs((up - down) / 2),
        charge=pairs(up + down),
    )


def connected(g: Geometry, charge: np.ndarray, density: np.ndarray) -> np.ndarray:
    """C_c(r) = (1/N) sum_i (<n_i n_{i+r}> - <n_i><n_{i+r}>), from `Diagonal.charge`."""
    n = len(density)
    product = np.bincount(g.shift.ravel(), np.outer(density, density).ravel(), n + 1)
    return charge - product[:n] / n


def structure_factor(c: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """S(q) = sum_r exp(-i q r) C(r) on a periodic lattice, [Lx, Ly], real."""
    return np.fft.fft2(np.asarray(c).reshape(shape)).real


def attention_profile(
    g: Geometry, weights: Float[Array, "layers heads sites sites"]
) -> tuple[Float[Array, "layers heads shells"], Float[Array, "layers heads"]]:
    """How far a head looks.

    Args:
      weights: softmax weights from site i to site j.

    Returns:
      the share of attention that goes to each distance, averaged over i; sums to 1.
      participation, the number of sites a head spreads over: mean of 1 / sum_j A_ij^2.
    """
    layers, heads, n, _ = weights.shape
    flat = weights.reshape(layers * heads, n * n).T
    shells = jax.ops.segment_sum(flat, g.shell.ravel(), len(g.distances)).T / n
    participation = (1 / jnp.sum(weights**2, axis=-1)).mean(axis=-1)
    return shells.reshape(layers, heads, -1), participation
