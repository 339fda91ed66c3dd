"""Exact diagonalisation of small sectors: the line under our curves."""

import numpy as np
import scipy.sparse.linalg
from scipy.special import comb

from common.errors import UserError
from nqs.lattice import Hubbard, all_states, matrix

MAX_STATES = 60_000
DENSE = 400  # Up to here every eigenvalue is cheaper than Lanczos.


def n_states(h: Hubbard) -> int:
    """Dimension of the sector."""
    return comb(h.n_sites, h.n_up, exact=True) * comb(h.n_sites, h.n_dn, exact=True)


def ground_state(h: Hubbard, k: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The k lowest states.

    Returns:
      energies: float64 [k], totals in units of t, ascending.
      vectors: float64 [n_states, k], normalised, in the sequence of
        `lattice.all_states`.

    Raises:
      UserError: the sector has more than `MAX_STATES` states.
    """
    size = n_states(h)
    if size > MAX_STATES:
        raise UserError(
            f"{h.label} has {size:,} states; exact diagonalisation stops at {MAX_STATES:,}."
        )
    hamiltonian = matrix(h)
    if size <= max(DENSE, 2 * k):
        energies, vectors = np.linalg.eigh(hamiltonian.toarray())
        return energies[:k], vectors[:, :k]
    start = np.random.default_rng(0).normal(size=size)
    energies, vectors = scipy.sparse.linalg.eigsh(hamiltonian, k, which="SA", v0=start)
    order = np.argsort(energies)
    return energies[order], vectors[:, order]


def exact_observables(h: Hubbard, vector: np.ndarray) -> dict:
    """Diagonal observables of a state, by the definitions of `observables`.

    Args:
      vector: [n_states], in the sequence of `lattice.all_states`.

    Returns:
      double_occupancy per site; density_up, density_dn [N]; spin_correlation and
      charge_correlation [Lx, Ly] by displacement, non-negative in open directions.
    """
    weight = np.abs(vector) ** 2
    x = all_states(h).astype(float)
    up, down = x[:, : h.n_sites], x[:, h.n_sites :]
    n, s = up + down, (up - down) / 2
    density = weight @ n
    return {
        "double_occupancy": (weight @ (up * down)).mean(),
        "density_up": weight @ up,
        "density_dn": weight @ down,
        "spin_correlation": _by_shift(h, (s * weight[:, None]).T @ s),
        "charge_correlation": _by_shift(
            h, (n * weight[:, None]).T @ n - np.outer(density, density)
        ),
    }


def _by_shift(h: Hubbard, pairs: np.ndarray) -> np.ndarray:
    """(1/N) sum_i pairs[i, i + r] for each r; only pairs inside where it is open."""
    found = np.zeros(h.shape)
    for i in np.ndindex(*h.shape):
        for r in np.ndindex(*h.shape):
            j = [a + b for a, b in zip(i, r, strict=True)]
            outside = [
                place >= size and bc == "open"
                for place, size, bc in zip(j, h.shape, h.boundary, strict=True)
            ]
            if not any(outside):
                j = [place % size for place, size in zip(j, h.shape, strict=True)]
                a, b = (k[0] * h.shape[1] + k[1] for k in (i, j))
                found[r] += pairs[a, b] / h.n_sites
    return found
