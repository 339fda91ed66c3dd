"""Exact diagonalisation of small sectors: the line under our curves."""

import itertools

import numpy as np
import scipy.sparse.linalg
from scipy.special import comb

from common.errors import UserError
from nqs.lattice import Hubbard, all_states, matrix

MAX_STATES = 60_000
DENSE = 400  # Up to here every eigenvalue is cheaper than Lanczos.
SAME = 1e-8  # Energies this close belong to one level.


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


def degenerate(h: Hubbard, energies: np.ndarray) -> bool:
    """Whether the ground state is not unique, from at least its two lowest energies."""
    return n_states(h) > 1 and bool(energies[1] - energies[0] < SAME)


def exact_observables(h: Hubbard, vector: np.ndarray) -> dict:
    """Diagonal observables of a state, by the definitions of `observables`.

    Those of one vector out of a degenerate level are arbitrary.

    Args:
      vector: [n_states], in the sequence of `lattice.all_states`.

    Returns:
      double_occupancy per site; density_up, density_dn [N]; spin_correlation and
      charge_correlation [Lx, Ly] by displacement, without its sign in open directions.
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


def level_observables(h: Hubbard, vectors: np.ndarray) -> dict:
    """What `exact_observables` gives for a whole level; NaN where it depends on the vector.

    Numbers that two states share with their sum and their difference count as common.

    Args:
      vectors: [n_states, 2], of one degenerate level, orthonormal.
    """
    a, b = vectors.T
    states = (a, b, (a + b) / np.sqrt(2), (a - b) / np.sqrt(2))
    first, *others = [exact_observables(h, state) for state in states]
    spread = {k: sum(np.abs(first[k] - other[k]) for other in others) for k in first}
    return {k: np.where(spread[k] < 1e-7, value, np.nan) for k, value in first.items()}


def _by_shift(h: Hubbard, pairs: np.ndarray) -> np.ndarray:
    """Means of pairs[i, j] over all (i, j) with j - i = r, of either sign where open."""
    found, count = np.zeros(h.shape), np.zeros(h.shape)
    sites = list(np.ndindex(*h.shape))
    for (a, i), (b, j) in itertools.product(enumerate(sites), repeat=2):
        r = tuple(
            abs(end - start) if bc == "open" else (end - start) % size
            for start, end, size, bc in zip(i, j, h.shape, h.boundary, strict=True)
        )
        found[r] += pairs[a, b]
        count[r] += 1
    return found / count
