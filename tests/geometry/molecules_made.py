"""Small molecules written by hand, and what tests of several files do with them."""

import os
from pathlib import Path

import numpy as np

from geometry.records import Record

WATER = np.array([[0, 0, 0], [0.9584, 0, 0], [-0.24, 0.9278, 0]])
MOVED = np.array([[0, 0, 0], [1, 0, 0], [-0.3, 0.95, 0.1]])
BUNDLED = Path(__file__).parents[2] / "geometry" / "data" / "relax_gfn2.npz"


def record(numbers, start, end=None, bonds=(), name="made", **fields):
    numbers = np.array(numbers, np.int32)
    made = Record(
        id=name,
        numbers=numbers,
        start=np.array(start, float),
        end=None if end is None else np.array(end, float),
        frames=None,
        bonds=np.array(bonds, np.int32).reshape(-1, 3),
        cell=np.zeros((3, 3)),
        pbc=np.zeros(3, bool),
        free=np.ones(len(numbers), bool),
        smiles="",
        group=name,
    )
    return made._replace(**fields)


def water(**fields):
    return record([8, 1, 1], WATER, MOVED, [(0, 1, 1), (0, 2, 1)], "water", **fields)


def turned(x, seed, reflect=False):
    """x after a random rotation (and reflection) and shift."""
    rng = np.random.default_rng(seed)
    q, r = np.linalg.qr(rng.standard_normal((3, 3)))
    q = q * np.sign(np.diag(r))
    if (np.linalg.det(q) < 0) != reflect:
        q[:, 0] *= -1
    return x @ q + rng.standard_normal(3) * 5


def tetrahedron(order=(0, 1, 2, 3)):
    """Carbon with four neighbours; the order decides the hand."""
    corners = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / np.sqrt(3)
    lengths = np.array([1.35, 1.77, 1.94, 1.09])[:, None]
    return np.concatenate([np.zeros((1, 3)), corners[list(order)] * lengths])


def chiral(order=(0, 1, 2, 3), **fields):
    """Bromochlorofluoromethane."""
    bonds = [(0, k, 1) for k in range(1, 5)]
    return record([6, 9, 17, 35, 1], tetrahedron(order), bonds=bonds, name="chiral", **fields)


def data_folder():
    """The folder of large data sets, or None."""
    folder = os.environ.get("TENFOLD_DATA")
    return Path(folder) if folder else None
