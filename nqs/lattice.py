"""Hubbard clusters: lattice, Hilbert space and operator. The only file with NetKet.

    H = -t sum_<ij>s (c+_is c_js + h.c.) - t' sum_<<ij>>s (...) + U sum_i n_up n_dn
        + sum_a w_a n_a

Sites count s = i * Ly + j, modes run [up, down]; NetKet's run [down, up], and
`to_netket` and `from_netket` are the only place that knows.
"""

import warnings
from typing import Any, NamedTuple

import jax
import netket as nk
import numpy as np
import scipy.sparse
from netket.operator import FermiHubbardJax

from common.errors import reject

BOUNDARIES = ("open", "periodic", "antiperiodic")
PATTERNS = ("none", "neel", "stripe")


class Hubbard(NamedTuple):
    """A cluster as plain NumPy. Each undirected bond stands once.

    The matrix element of a hop is minus `amplitude`, times its Jordan-Wigner sign.
    """

    shape: tuple[int, int]
    boundary: tuple[str, str]
    n_up: int
    n_dn: int
    t: float
    tp: float
    U: float
    bonds: np.ndarray  # int32 [n_bonds, 2], first < second
    amplitude: np.ndarray  # float64 [n_bonds]: t or t', times the boundary's sign
    field: np.ndarray  # float64 [2N]: w, [up, down]

    @property
    def n_sites(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def n_electrons(self) -> int:
        return self.n_up + self.n_dn

    @property
    def label(self) -> str:
        """Everything a number must carry: lattice, boundaries, filling, U, t'."""
        short = {"open": "O", "periodic": "P", "antiperiodic": "A"}
        lattice = " x ".join(
            f"{short[bc]}({size})" for size, bc in zip(self.shape, self.boundary, strict=True)
        )
        field = ", with a field" if self.field.any() else ""
        t = "" if self.t == 1 else f"t = {self.t:g}, "
        units = f"{t}U = {self.U:g}, t' = {self.tp:g}"
        return f"Hubbard {lattice}, ({self.n_up}, {self.n_dn}) electrons, {units}{field}"


def hubbard(*, lattice: Any, model: Any, pinning: Any) -> Hubbard:
    """The cluster of a config.

    Args:
      lattice: Lx, Ly, bc_x, bc_y.
      model: t, tp, U, n_up, n_dn.
      pinning: h, pattern, period.

    Raises:
      UserError: a field holds what cannot be.
    """
    shape, boundary = _lattice(**lattice)
    n = shape[0] * shape[1]
    for name in ("t", "tp", "U"):
        if not np.isfinite(model[name]):
            raise reject(f"model.{name}", model[name], "a finite number")
    for name in ("n_up", "n_dn"):
        if not _whole(model[name]) or not 0 <= model[name] <= n:
            allowed = f"a whole number from 0 to {n}, the number of sites"
            raise reject(f"model.{name}", model[name], allowed)
    if model["n_up"] + model["n_dn"] == 0:
        raise reject("model.n_up", 0, "above 0 when model.n_dn is 0")
    bonds, amplitude = _bonds(shape, boundary, model["t"], model["tp"])
    return Hubbard(
        shape=shape,
        boundary=boundary,
        n_up=model["n_up"],
        n_dn=model["n_dn"],
        t=float(model["t"]),
        tp=float(model["tp"]),
        U=float(model["U"]),
        bonds=bonds,
        amplitude=amplitude,
        field=_field(shape, **pinning),
    )


def _whole(value) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _lattice(Lx, Ly, bc_x, bc_y):
    for name, size in (("Lx", Lx), ("Ly", Ly)):
        if not _whole(size) or size < 1:
            raise reject(f"lattice.{name}", size, "a whole number from 1 up")
    for name, bc, size in (("bc_x", bc_x, Lx), ("bc_y", bc_y, Ly)):
        if bc not in BOUNDARIES:
            raise reject(f"lattice.{name}", bc, f"one of {', '.join(BOUNDARIES)}")
        if size == 1 and bc != "open":
            raise reject(f"lattice.{name}", bc, "open where the lattice is one site wide")
        if size == 2 and bc == "antiperiodic":
            allowed = "open or periodic where the lattice is two sites wide"
            raise reject(f"lattice.{name}", bc, allowed)
        if size == 2 and bc == "periodic":
            warnings.warn(
                f"lattice.{name} is periodic over two sites: every bond counts once, "
                "which equals open.",
                stacklevel=3,
            )
    return (int(Lx), int(Ly)), (bc_x, bc_y)


def _bonds(shape, boundary, t, tp):
    """Nearest neighbours, then diagonals; a pair that is reached twice counts once."""
    steps = [((1, 0), t), ((0, 1), t)]
    if tp:
        steps += [((1, 1), tp), ((1, -1), tp)]
    found: dict[tuple[int, int], float] = {}
    twice = False
    for (dx, dy), strength in steps:
        for i, j in np.ndindex(*shape):
            end, sign = _wrap((i + dx, j + dy), shape, boundary)
            if end is None:
                continue
            a, b = sorted((i * shape[1] + j, end[0] * shape[1] + end[1]))
            if (a, b) in found:
                twice = twice or strength == tp
                continue
            found[a, b] = sign * strength
    if twice and tp:
        warnings.warn(
            "model.tp: on a lattice two sites wide diagonals coincide; each counts once.",
            stacklevel=4,
        )
    if tp and min(shape) == 1:
        warnings.warn("model.tp: a chain has no diagonals; t' does nothing.", stacklevel=4)
    pairs = np.array(list(found), np.int32).reshape(-1, 2)
    return pairs, np.array(list(found.values()), float)


def _wrap(site, shape, boundary):
    end, sign = [], 1.0
    for place, size, bc in zip(site, shape, boundary, strict=True):
        if not 0 <= place < size:
            if bc == "open":
                return None, 0.0
            sign *= -1.0 if bc == "antiperiodic" else 1.0
        end.append(place % size)
    return end, sign


def _field(shape, h, pattern, period):
    if not np.isfinite(h):
        raise reject("pinning.h", h, "a finite number")
    if pattern not in PATTERNS:
        raise reject("pinning.pattern", pattern, f"one of {', '.join(PATTERNS)}")
    if not _whole(period) or period < 1:
        raise reject("pinning.period", period, "a whole number from 1 up")
    if h != 0 and pattern == "none":
        raise reject("pinning.pattern", pattern, "neel or stripe where pinning.h is not 0")
    if h == 0 and pattern != "none":
        raise reject("pinning.h", h, f"other than 0 where pinning.pattern is {pattern!r}")
    x, y = np.indices(shape)
    staggered = (-1.0) ** (x + y)
    if pattern == "none":
        staggered = 0 * staggered
    if pattern == "stripe":
        # The phase flips from one domain to the next; only columns at their edges feel it.
        edge = (x % period == 0) | (x % period == period - 1)
        staggered = staggered * (-1.0) ** (x // period) * edge
    spin = h / 2 * staggered.ravel()
    return np.concatenate([spin, -spin])


def to_netket(x):
    """[up, down] -> NetKet's [down, up], along the last axis."""
    return _swap(x)


def from_netket(x):
    """NetKet's [down, up] -> [up, down], along the last axis."""
    return _swap(x)


def _swap(x):
    half = x.shape[-1] // 2
    return (np if isinstance(x, np.ndarray) else jax.numpy).roll(x, half, axis=-1)


def hilbert(h: Hubbard) -> nk.hilbert.SpinOrbitalFermions:
    """NetKet's space with both numbers of electrons fixed."""
    return nk.hilbert.SpinOrbitalFermions(
        h.n_sites, s=1 / 2, n_fermions_per_spin=(h.n_dn, h.n_up)
    )


def operator(h: Hubbard) -> FermiHubbardJax:
    """NetKet's operator of everything but the field, in NetKet's order of modes."""
    edges = [tuple(map(int, bond)) for bond in h.bonds]
    graph = nk.graph.Graph(edges=edges, n_nodes=h.n_sites)
    strength = dict(zip(edges, h.amplitude, strict=True))
    # NetKet orders edges as it likes: amplitudes must follow it.
    t = [strength[tuple(sorted(map(int, edge)))] for edge in graph.edges()]
    return FermiHubbardJax(hilbert(h), graph, t=t, U=h.U)


def all_states(h: Hubbard) -> np.ndarray:
    """All configurations of the sector, int8 [n_states, 2N], in NetKet's sequence."""
    return from_netket(np.asarray(hilbert(h).all_states())).astype(np.int8)


def matrix(h: Hubbard) -> scipy.sparse.csr_matrix:
    """The Hamiltonian, float64, field included, in the sequence of `all_states`.

    [down, up] and [up, down] differ by the sign (-1)^(N_up N_dn), the same for all
    states of a sector, so that matrix elements agree.
    """
    with jax.enable_x64(True):
        kinetic = operator(h).to_sparse()
    kinetic = scipy.sparse.csr_matrix(kinetic, dtype=np.float64, copy=True)
    kinetic.sum_duplicates()
    return kinetic + scipy.sparse.diags(all_states(h) @ h.field)
