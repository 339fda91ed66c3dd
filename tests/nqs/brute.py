"""The Hubbard model from its definition in second quantisation; shares no code with nqs.

Sites count s = i * Ly + j, modes run [up, down]. |x> is the product of the creation
operators of its occupied modes, in ascending order, on the vacuum. Of a cluster `h` only
what the user chose is read (shape, boundary, t, t', U), never what nqs derived from it.
"""

from itertools import combinations, product

import numpy as np


def states(n_sites: int, n_up: int, n_dn: int) -> np.ndarray:
    """All configurations with these numbers of electrons, int8 [n_states, 2N]."""

    def one_spin(n):
        chosen = list(combinations(range(n_sites), n))
        x = np.zeros((len(chosen), n_sites), np.int8)
        for row, sites in zip(x, chosen, strict=True):
            row[list(sites)] = 1
        return x

    pairs = product(one_spin(n_up), one_spin(n_dn))
    return np.array([np.concatenate(pair) for pair in pairs])


def find(x: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Where each row of x stands among the given configurations; it must be there."""
    bits = 2 ** np.arange(among.shape[1], dtype=np.int64)
    wanted, known = x.astype(np.int64) @ bits, among.astype(np.int64) @ bits
    order = np.argsort(known)
    at = order[np.searchsorted(known, wanted, sorter=order) % len(known)]
    assert (known[at] == wanted).all()
    return at


def annihilate(x: np.ndarray, mode: int) -> tuple[np.ndarray, np.ndarray]:
    """c_mode on each configuration: the sign (0 if nothing is left), and what is left."""
    sign = x[:, mode] * (-1.0) ** x[:, :mode].sum(axis=1)
    left = x.copy()
    left[:, mode] = 0
    return sign, left


def create(x: np.ndarray, mode: int) -> tuple[np.ndarray, np.ndarray]:
    """c†_mode on each configuration."""
    sign = (1 - x[:, mode]) * (-1.0) ** x[:, :mode].sum(axis=1)
    filled = x.copy()
    filled[:, mode] = 1
    return sign, filled


def bonds(shape, boundary, t: float, tp: float) -> dict[tuple[int, int], float]:
    """Amplitudes of all pairs of neighbours a < b: t or t', negated by antiperiodicity.

    Looks at every pair of sites, and at all images of the second one.
    """
    found = {}
    images = [(0,) if bc == "open" else (-1, 0, 1) for bc in boundary]
    sites = list(product(*map(range, shape)))
    for (a, p), (b, q) in combinations(enumerate(sites), 2):
        for turns in product(*images):
            steps = [
                abs(y + turn * size - x)
                for x, y, turn, size in zip(p, q, turns, shape, strict=True)
            ]
            strength = {(0, 1): t, (1, 0): t, (1, 1): tp}.get(tuple(steps), 0.0)
            for turn, bc in zip(turns, boundary, strict=True):
                strength *= -1.0 if turn and bc == "antiperiodic" else 1.0
            if strength:
                found[a, b] = strength
    return found


def neel(shape, h: float) -> np.ndarray:
    """The staggered field w [2N]: ±h/2 on up electrons, the opposite on down electrons."""
    spin = [h / 2 * (-1) ** (i + j) for i in range(shape[0]) for j in range(shape[1])]
    return np.array([*spin, *(-w for w in spin)])


def hamiltonian(h, x: np.ndarray, field: np.ndarray | None = None) -> np.ndarray:
    """<x|H|x'> between all rows of x, a whole sector; float64 [n_states, n_states].

    H = -Σ_(ab)σ t_ab (c†_aσ c_bσ + c†_bσ c_aσ) + U Σ_a n_a↑ n_a↓ + Σ_m w_m n_m.
    """
    n_sites = h.shape[0] * h.shape[1]
    matrix = np.zeros((len(x), len(x)))
    for (a, b), strength in bonds(h.shape, h.boundary, h.t, h.tp).items():
        for spin in (0, n_sites):
            for source, target in ((a, b), (b, a)):
                first, between = annihilate(x, source + spin)
                second, after = create(between, target + spin)
                (start,) = np.nonzero(first * second)
                end = find(after[start], x)
                matrix[end, start] -= strength * (first * second)[start]
    pairs = (x[:, :n_sites] * x[:, n_sites:]).sum(axis=1)
    w = np.zeros(2 * n_sites) if field is None else field
    return matrix + np.diag(h.U * pairs + x @ w)


def levels(h) -> np.ndarray:
    """Energies of one electron, ascending."""
    matrix = np.zeros((h.shape[0] * h.shape[1],) * 2)
    for (a, b), strength in bonds(h.shape, h.boundary, h.t, h.tp).items():
        matrix[a, b] = matrix[b, a] = -strength
    return np.linalg.eigvalsh(matrix)
