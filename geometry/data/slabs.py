"""Small relaxations that need no quantum chemistry: adsorbates on metals, and clusters.

    slabs      fcc(111) of Al, Ni, Cu, Pd, Ag, Pt or Au with one H, C, N or O; EMT; the two
               lowest of three layers fixed; periodic along the surface. A miniature IS2RS.
    clusters   7 to 13 Lennard-Jones atoms from random places: targets with many basins.

Structure number k of a seed is always the same.
"""

from typing import Any

import numpy as np

from geometry.chain import resample
from geometry.data import checks, elements
from geometry.data.generate import FMAX, STEPS, relaxed
from geometry.records import Record

METALS = ("Al", "Ni", "Cu", "Pd", "Ag", "Pt", "Au")
ADSORBATES = ("H", "C", "N", "O")
SITES = ("ontop", "bridge", "fcc", "hcp")
ARGON, SIGMA = 18, 3.4  # Element and size, angstrom, of clusters; energies are in epsilon.


def slab(number: int, seed: int = 0, segments: int = 8) -> Record | str:
    """A slab with an adsorbate near a site, relaxed; or why there is none."""
    from ase.build import add_adsorbate, fcc111
    from ase.calculators.emt import EMT
    from ase.constraints import FixAtoms

    rng = np.random.default_rng((seed, number, 1))
    metal, adsorbate, site = (
        str(rng.choice(options)) for options in (METALS, ADSORBATES, SITES)
    )
    atoms = fcc111(metal, size=(3, 3, 3), vacuum=8.0)
    add_adsorbate(atoms, adsorbate, height=rng.uniform(1.0, 2.0), position=site)
    fixed = atoms.get_tags() > 1  # Layers are counted from the top; the adsorbate is 0.
    moved = np.where(fixed[:, None], 0.0, rng.normal(0, 0.08, (len(atoms), 3)))
    moved[-1, :2] += rng.normal(0, 0.3, 2)
    atoms.set_positions(atoms.get_positions() + moved)
    atoms.set_constraint(FixAtoms(mask=fixed))
    atoms.calc = EMT()
    path = relaxed(atoms, FMAX, STEPS)
    if path is None:
        return "EMT did not relax it"
    return _record(
        f"slab-{number}",
        np.asarray(atoms.numbers, np.int32),
        path,
        segments,
        cell=np.array(atoms.cell.array),
        pbc=np.array([True, True, False]),
        free=~fixed,
        group=f"{metal}-{adsorbate}-{site}",
    )


def cluster(number: int, seed: int = 0, segments: int = 8) -> Record | str:
    """A cluster from random places in a ball, relaxed; or why there is none."""
    from scipy.optimize import minimize

    rng = np.random.default_rng((seed, number, 2))
    count = int(rng.integers(7, 14))
    x = _placed(count, rng)
    path = [x]
    result = minimize(
        lambda v: _energy(v.reshape(-1, 3)),
        x.ravel(),
        jac=True,
        method="BFGS",
        callback=lambda v: path.append(v.reshape(-1, 3).copy()),
        options=dict(gtol=1e-3, maxiter=1000),
    )
    path = [SIGMA * (p - p.mean(axis=0)) for p in path]
    apart = np.linalg.norm(path[-1][:, None] - path[-1], axis=-1) / SIGMA
    joined = np.linalg.matrix_power((apart < 1.5).astype(float), count).all()
    if not result.success or not joined:
        return "it fell apart"
    return _record(
        f"cluster-{number}",
        np.full(count, ARGON, np.int32),
        path,
        segments,
        cell=np.zeros((3, 3)),
        pbc=np.zeros(3, bool),
        free=np.ones(count, bool),
        group=f"cluster-{number}",
    )


def _placed(count: int, rng: Any) -> np.ndarray:
    """Points in a ball, none nearer than 0.9, in units of sigma."""
    radius = 0.9 * count ** (1 / 3)
    placed: list[np.ndarray] = []
    while len(placed) < count:
        point = rng.uniform(-radius, radius, 3)
        if np.linalg.norm(point) <= radius and all(
            np.linalg.norm(point - p) >= 0.9 for p in placed
        ):
            placed.append(point)
    return np.stack(placed)


def _energy(x: np.ndarray) -> tuple[float, np.ndarray]:
    """4 sum (r^-12 - r^-6) over pairs, and its gradient."""
    delta = x[:, None] - x[None]
    square = np.sum(delta**2, axis=-1) + np.eye(len(x))
    six = square**-3
    np.fill_diagonal(six, 0.0)
    slope = -24 * (2 * six**2 - six) / square
    return float(2 * np.sum(six**2 - six)), np.sum(slope[..., None] * delta, axis=1).ravel()


def _record(name, numbers, path, segments, *, cell, pbc, free, group) -> Record | str:
    x = np.stack(path)
    turn = not pbc.any() and bool(free.all())
    frames = resample(x, segments, rotate=turn)
    if frames is None:
        return "it stood in its minimum already"
    frames[:, ~free] = x[0, ~free]  # Interpolation rounds.
    record = Record(
        id=name,
        numbers=numbers,
        start=x[0],
        end=x[-1],
        frames=frames,
        bonds=np.zeros((0, 3), np.int32),
        cell=cell,
        pbc=pbc,
        free=free,
        smiles="",
        group=group or elements.formula(numbers),
    )
    return checks.checked(record)
