"""Small graphs with random structures, made pair by pair: independent of geometry/data."""

from itertools import product
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from geometry.graphs import Graph
from geometry.network import Inputs


class Structure(NamedTuple):
    """Positions: [states, atoms, 3], float64: first the state now, then the known ones."""

    numbers: np.ndarray
    positions: np.ndarray
    bonds: np.ndarray
    cell: np.ndarray
    free: np.ndarray
    centred: bool
    id: int
    cutoff: float


def structure(seed, n, states=2, cell=None, cutoff=np.inf):
    """A random one of n atoms; with a cell (periodic in x and y) two atoms are fixed."""
    rng = np.random.default_rng(seed)
    start = rng.uniform(-2, 2, (n, 3))
    positions = start + 0.3 * rng.normal(size=(states, n, 3))
    bonds = np.triu(rng.integers(0, 5, (n, n)), 1)
    free = np.ones(n)
    if cell is not None:
        free[:2] = 0
        positions[:, :2] = start[:2]
    return Structure(
        rng.choice([1, 6, 7, 8], n),
        positions,
        bonds + bonds.T,
        np.zeros((3, 3)) if cell is None else cell,
        free,
        cell is None,
        100 + seed,
        cutoff,
    )


def edges_of(s):
    """(receiver, sender, shift) of all pairs that are near in the first known state."""
    images = [np.zeros(3)]
    if s.cell.any():
        images = [a * s.cell[0] + b * s.cell[1] for a, b in product((-1, 0, 1), repeat=2)]
    found = []
    n = len(s.numbers)
    for i, j, shift in product(range(n), range(n), images):
        near = np.linalg.norm(s.positions[1, j] + shift - s.positions[1, i]) < s.cutoff
        if (i != j or shift.any()) and near:
            found.append((i, j, shift))
    return found


def batch(structures, atoms=20, edges=110, graphs=5, dtype=np.float32, edges_for=edges_of):
    """Graph and Inputs of these structures, padded to those sizes.

    A structure's scale, time and segment are functions of its id.
    """
    states = structures[0].positions.shape[0]
    graph = Graph(
        numbers=np.zeros(atoms, np.int32),
        mask=np.zeros(atoms, np.float32),
        free=np.zeros(atoms, np.float32),
        owner=np.full(atoms, graphs - 1, np.int32),
        index=np.zeros(atoms, np.int32),
        senders=np.full(edges, atoms - 1, np.int32),
        receivers=np.full(edges, atoms - 1, np.int32),
        bonds=np.zeros(edges, np.int32),
        shifts=np.zeros((edges, 3), np.float32),
        edge_mask=np.zeros(edges, np.float32),
        centred=np.ones(graphs, np.float32),
        ids=np.full(graphs, -1, np.int32),
    )
    positions = np.zeros((states, atoms, 3), dtype)
    a = e = 0
    for g, s in enumerate(structures):
        n = len(s.numbers)
        here = slice(a, a + n)
        graph.numbers[here], graph.mask[here], graph.free[here] = s.numbers, 1, s.free
        graph.owner[here], graph.index[here] = g, np.arange(n)
        graph.centred[g], graph.ids[g] = s.centred, s.id
        positions[:, here] = s.positions
        for i, j, shift in edges_for(s):
            graph.receivers[e], graph.senders[e], graph.shifts[e] = a + i, a + j, shift
            graph.bonds[e], graph.edge_mask[e] = s.bonds[i, j] * (not shift.any()), 1
            e += 1
        a += n
    assert a < atoms
    assert len(structures) < graphs
    graph = jax.tree.map(jnp.asarray, graph)
    known_ids = np.maximum(np.asarray(graph.ids), 0)
    number = lambda f: jnp.asarray(f(known_ids), dtype)
    inputs = Inputs(
        x=jnp.asarray(positions[0]),
        known=jnp.asarray(positions[1:]),
        scale=number(lambda k: 2 + np.cos(k)),
        time=number(lambda k: k % 7 / 7),
        segment=number(lambda k: k % 5 / 5),
    )
    return graph, inputs


def orthogonal(seed, determinant):
    """A random rotation (1) or reflection (-1), float64."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return q * np.sign(np.linalg.det(q)) * determinant


def turned(s, matrix, by=(0.0, 0.0, 0.0)):
    """All states turned and moved."""
    positions = s.positions @ matrix.T + np.asarray(by)
    return s._replace(positions=positions, cell=s.cell @ matrix.T)


def permuted(s, order):
    """The same structure with its atoms in another order."""
    return s._replace(
        numbers=s.numbers[order],
        positions=s.positions[:, order],
        bonds=s.bonds[np.ix_(order, order)],
        free=s.free[order],
    )
