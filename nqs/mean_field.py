"""Unrestricted Hartree-Fock: the orbitals that a wave function may start from.

    H_sigma = T + diag(w_sigma + U <n_-sigma>),   <n_sigma> = sum of the lowest |orbital|^2

solved by damped iteration from several densities at once. At U > 0 the solutions
break the symmetry of the lattice; different ones make different determinants.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

ITERATIONS = 100
MIXING = 0.5  # Of the new density into the old one.
SAME = 0.99  # Overlap above which two solutions are one.
WINDOW = 0.2  # Of |energy|, above the lowest one, in which solutions are of use.


class MeanField(NamedTuple):
    """Solutions, the lowest energy first.

    The first n_up columns of the orbitals live on up modes, the rest on down modes.
    """

    orbitals: Float[Array, "k modes electrons"]
    energy: Float[Array, " k"]  # <H> in the determinant, total, in units of t


def hartree_fock(hubbard, key: jax.Array, n: int, tries: int = 16) -> MeanField:
    """The n lowest different solutions. Traceable.

    Args:
      hubbard: a `lattice.Hubbard`.
      key: of the densities that the iteration starts from.
      n: solutions wanted. Two with an overlap above `SAME` are one; where there are not
        enough within `WINDOW`, the lowest ones stand twice. Signs are such that none
        cancels the first.
      tries: starts; at least 2 n are made.
    """
    hopping, field = _one_body(hubbard)
    n_starts = max(tries, 2 * n)
    # From pure noise, which small clusters want, to disturbed staggered order, from which
    # large ones find their stripes.
    order = jnp.linspace(0, 1, n_starts, dtype=hopping.dtype)[:, None, None]
    x, y = np.indices(hubbard.shape)
    staggered = np.multiply.outer([1.0, -1.0], ((-1.0) ** (x + y)).ravel())
    order = order.at[::2].multiply(-1)  # Its mirror image is as low and another state.
    shape = (n_starts, 2, hubbard.n_sites)
    noise = jax.random.uniform(key, shape, hopping.dtype, -1, 1)
    starts = (1 + order * staggered) * (1 + (1 - 0.6 * jnp.abs(order)) * noise)
    fill = jnp.array([hubbard.n_up, hubbard.n_dn], hopping.dtype)[:, None]
    starts = fill * starts / starts.sum(axis=-1, keepdims=True)

    def orbitals(density):
        potential = field + hubbard.U * density[::-1]
        _, vectors = jnp.linalg.eigh(hopping + jax.vmap(jnp.diag)(potential))
        return vectors[0, :, : hubbard.n_up], vectors[1, :, : hubbard.n_dn]

    def densities(up, down):
        return jnp.stack([jnp.sum(up**2, axis=1), jnp.sum(down**2, axis=1)])

    def solve(density):
        def iterate(_, density):
            return density + MIXING * (densities(*orbitals(density)) - density)

        up, down = orbitals(jax.lax.fori_loop(0, ITERATIONS, iterate, density))
        n_up, n_dn = rho = densities(up, down)
        kinetic = sum(jnp.sum(v * (hopping @ v)) for v in (up, down))
        energy = kinetic + jnp.sum(field * rho) + hubbard.U * jnp.sum(n_up * n_dn)
        return up, down, energy

    up, down, energy = jax.vmap(solve)(starts)
    overlap = _overlaps(up) * _overlaps(down)
    best = _different(overlap, energy, n)
    sign = jnp.where(overlap[best, best[0]] < 0, -1, 1)
    return MeanField(_together(up[best], down[best], sign), energy[best])


def _overlaps(v: Float[Array, "k sites n"]) -> Float[Array, "k k"]:
    """Of the determinants of each pair."""
    return jnp.linalg.det(jnp.einsum("aim,bin->abmn", v, v, precision="highest"))


def _different(overlap, energy, n):
    """Indices of the n lowest states, first those that differ from all lower ones."""
    order = jnp.argsort(energy)
    useful = energy <= energy.min() + WINDOW * jnp.abs(energy.min())

    def look(chosen, i):
        new = jnp.all(~chosen | (jnp.abs(overlap[i]) < SAME))
        return chosen.at[i].set(new & useful[i]), None

    chosen, _ = jax.lax.scan(look, jnp.zeros(len(energy), bool), order)
    return order[jnp.argsort(~chosen[order], stable=True)[:n]]


def _together(up, down, sign):
    """[k, 2N, N_e]: up orbitals on up modes, down ones on down modes; det times `sign`."""
    k, sites, n_up = up.shape
    n_dn = down.shape[-1]
    upper = jnp.concatenate([up, jnp.zeros((k, sites, n_dn), up.dtype)], axis=2)
    lower = jnp.concatenate([jnp.zeros((k, sites, n_up), up.dtype), down], axis=2)
    whole = jnp.concatenate([upper, lower], axis=1)
    return whole.at[:, :, 0].multiply(sign[:, None].astype(up.dtype))


def _one_body(hubbard) -> tuple[jax.Array, jax.Array]:
    """Hopping matrix [N, N] and field [2, N] by spin, in the widest float there is."""
    n = hubbard.n_sites
    hopping = np.zeros((n, n))
    for (i, j), amplitude in zip(hubbard.bonds, hubbard.amplitude, strict=True):
        hopping[i, j] = hopping[j, i] = -amplitude
    wide = jnp.result_type(float)
    return jnp.asarray(hopping, wide), jnp.asarray(hubbard.field.reshape(2, n), wide)
