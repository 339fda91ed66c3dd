"""Diagonal observables and attention maps, as averages over configurations."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Geometry(NamedTuple):
    """Displacements between sites, for averages over pairs of the same one."""

    shift: np.ndarray  # int32 [N, N]: r = rx * Ly + ry from i to j.
    pairs: np.ndarray  # float64 [N]: ordered pairs (i, j) of each r; N if all wraps.
    shell: np.ndarray  # int32 [N, N]: which distance, an index into `distances`.
    distances: np.ndarray  # float64 [shells]: lengths, shortest image, ascending from 0.


def geometry(hubbard) -> Geometry:
    """Displacements modulo the lattice where it wraps, their size where it is open."""
    shape = hubbard.shape
    n = shape[0] * shape[1]
    place = np.stack(np.unravel_index(np.arange(n), shape), axis=-1)
    delta = place[None] - place[:, None]
    wraps = np.array([bc != "open" for bc in hubbard.boundary])
    size = np.array(shape)
    modulo = np.where(wraps, delta % size, np.abs(delta))
    shift = (modulo[..., 0] * shape[1] + modulo[..., 1]).astype(np.int32)
    pairs = np.bincount(shift.ravel(), minlength=n).astype(float)
    short = np.where(wraps, (delta + size // 2) % size - size // 2, delta)
    length = np.round(np.sqrt((short**2).sum(axis=-1)), 9)
    distances, shell = np.unique(length, return_inverse=True)
    return Geometry(shift, pairs, shell.reshape(n, n).astype(np.int32), distances)


class Diagonal(NamedTuple):
    """Means over configurations. S^z = (n_up - n_dn) / 2, n = n_up + n_dn.

    Correlations are means over the pairs (i, j) with j - i = r: all N where everything
    wraps. In open directions there are fewer, of either sign; dividing by N would make
    correlations decay that do not.
    """

    density_up: Float[Array, " sites"]
    density_dn: Float[Array, " sites"]
    double: Float[Array, " sites"]
    spin: Float[Array, " sites"]  # mean over pairs of <S^z_i S^z_j>, for each r
    charge: Float[Array, " sites"]  # mean over pairs of <n_i n_j>, not connected


def diagonal(g: Geometry, x: Int[Array, "b modes"]) -> Diagonal:
    """Observables that the configurations alone decide."""
    up, down = jnp.split(x.astype(jnp.result_type(float)), 2, axis=-1)
    n = up.shape[-1]

    def pairs(a):
        both = a.T @ a / len(a)
        return jax.ops.segment_sum(both.ravel(), g.shift.ravel(), n) / g.pairs

    return Diagonal(
        density_up=up.mean(axis=0),
        density_dn=down.mean(axis=0),
        double=(up * down).mean(axis=0),
        spin=pairs((up - down) / 2),
        charge=pairs(up + down),
    )


def connected(g: Geometry, charge: np.ndarray, density: np.ndarray) -> np.ndarray:
    """C_c(r), the mean over pairs of <n_i n_j> - <n_i><n_j>, from `Diagonal.charge`."""
    product = np.bincount(g.shift.ravel(), np.outer(density, density).ravel())
    return charge - product / g.pairs


def structure_factor(c: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """S(q) = sum_r exp(-i q r) C(r) on a lattice that wraps both ways, [Lx, Ly], real.

    There C(r) is (1/N) sum_i, so that S(q) is never negative; elsewhere it is another
    mean and this sum means nothing.
    """
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


def uniform_share(g: Geometry) -> np.ndarray:
    """Share of each distance for a head that looks at all sites alike, [shells]."""
    return np.bincount(g.shell.ravel()) / g.shell.size
