"""Hops against the matrix of second quantisation, state by state."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nqs import hops as hop
from nqs import lattice
from tests.nqs import brute
from tests.nqs.clusters import cluster

CLUSTERS = [
    cluster(2, 2, 2, 2),
    cluster(4, 1, 2, 3, "PO", U=8.0),
    cluster(1, 5, 2, 1, "OA", U=-3.0),
    cluster(3, 2, 2, 2, "PO", tp=-0.2),
    cluster(2, 3, 3, 1, "OP", tp=0.3, h=0.7, pattern="neel"),
    cluster(3, 3, 2, 1, "PP", tp=-0.2, t=1.5),
    cluster(3, 3, 1, 2, "AP", tp=-0.2),
    cluster(3, 4, 1, 1, "OP", U=1.0),
    cluster(2, 2, 4, 0, U=2.0),
    cluster(2, 2, 1, 4, U=2.0),
]


class Sector(NamedTuple):
    """All configurations, all their allowed hops, and what these do."""

    h: lattice.Hubbard
    x: np.ndarray
    diagonal: np.ndarray
    state: np.ndarray  # Index of the configuration of each allowed hop.
    after: np.ndarray  # The configuration it leads to.
    element: np.ndarray


@pytest.fixture(scope="module", params=CLUSTERS, ids=lambda h: h.label)
def sector(request):
    h = request.param
    hops, x = hop.hops(h), brute.states(h.n_sites, h.n_up, h.n_dn)

    @jax.jit
    def many(x, chosen):
        return hop.apply(hops, x, chosen), hop.elements(hops, x, chosen)

    with jax.enable_x64(True):
        allowed, diagonal = jax.jit(lambda x: (hop.allowed(hops, x), hop.diagonal(hops, x)))(x)
        assert diagonal.dtype == jnp.float64
        state, chosen = np.nonzero(np.asarray(allowed))
        after, element = many(jnp.asarray(x[state]), jnp.asarray(chosen))
    return Sector(h, x, *map(np.asarray, (diagonal, state, after, element)))


def test_hops_and_diagonal_make_the_matrix_of_second_quantisation(sector):
    h, x, diagonal, state, after, element = sector
    got = np.zeros((len(x), len(x)))
    np.add.at(got, (state, brute.find(after, x)), element)
    want = brute.hamiltonian(h, x, brute.neel(h.shape, 0.7 if h.field.any() else 0.0))
    np.testing.assert_allclose(got + np.diag(diagonal), want, rtol=0, atol=1e-12)


def test_no_two_hops_of_a_configuration_lead_to_the_same_one(sector):
    pairs = set(zip(sector.state, map(tuple, sector.after), strict=True))
    assert len(pairs) == len(sector.state)
    reached = brute.hamiltonian(sector.h._replace(U=0.0), sector.x) != 0
    assert len(pairs) == reached.sum()


def test_a_hop_moves_one_electron_of_one_spin_and_changes_nothing_else(sector):
    assert sector.after.dtype == np.int8
    change = sector.after.astype(int) - sector.x[sector.state]
    up, down = np.split(change, 2, axis=1)
    assert (np.abs(change).sum(axis=1) == 2).all()
    assert (up.sum(axis=1) == 0).all()
    assert (down.sum(axis=1) == 0).all()


def hand(h, electrons, source, target):
    """<x|H|x'> of the hop from mode to mode in the configuration of these electrons."""
    hops = hop.hops(h)
    x = np.zeros((1, 2 * h.n_sites), np.int8)
    x[0, list(electrons)] = 1
    (chosen,) = np.nonzero((hops.source == source) & (hops.target == target))
    assert np.asarray(hop.allowed(hops, jnp.asarray(x)))[0, chosen].all()
    return float(hop.elements(hops, jnp.asarray(x), jnp.asarray(chosen))[0])


def test_signs_by_hand_along_rows_across_rows_and_around_the_boundary():
    # Sites of a 3 x 3 lattice:  0 1 2 / 3 4 5 / 6 7 8; down modes 9 to 17.
    h = cluster(3, 3, 3, 1, "PP")
    assert hand(h, (0, 4, 8, 17), 0, 1) == -1  # Neighbours in the order of modes.
    assert hand(h, (0, 1, 8, 17), 0, 3) == +1  # Across the row stands one, at 1.
    assert hand(h, (0, 1, 2, 17), 0, 3) == -1  # Two.
    assert hand(h, (0, 1, 8, 17), 0, 2) == +1  # Around a row.
    assert hand(h, (0, 4, 8, 17), 0, 6) == +1  # Around a column.
    assert hand(h, (0, 4, 8, 17), 8, 2) == +1  # Backwards.
    assert hand(h, (4, 5, 8, 17), 8, 2) == -1
    # An electron of the other spin does not count, whatever its mode.
    one_up = cluster(3, 3, 1, 3, "PP")
    assert hand(one_up, (8, 9, 10, 11), 8, 6) == -1
    assert hand(one_up, (8, 9, 10, 17), 9, 15) == +1
    assert hand(one_up, (8, 9, 10, 14), 9, 15) == -1


def test_an_antiperiodic_boundary_turns_the_sign_once_more():
    for electrons in ((3, 4), (1, 3, 4), (1, 2, 3, 4)):
        n_up = sum(e < 4 for e in electrons)
        periodic = hand(cluster(4, 1, n_up, 1, "PO"), electrons, 3, 0)
        anti = hand(cluster(4, 1, n_up, 1, "AO"), electrons, 3, 0)
        assert periodic == (-1.0) ** n_up
        assert anti == -periodic


def test_one_site_has_no_hops():
    hops = hop.hops(cluster(1, 1, 1, 1, U=3.0))
    x = jnp.array([[1, 1]], jnp.int8)
    assert hop.allowed(hops, x).shape == (1, 0)
    assert float(hop.diagonal(hops, x)[0]) == 3.0


def test_the_diagonal_counts_pairs_and_the_field_of_each_spin():
    h = cluster(2, 2, 2, 3, U=2.5, h=0.6, pattern="neel")
    x = np.array([[1, 0, 1, 0, 1, 1, 1, 0], [1, 0, 0, 1, 0, 1, 1, 1]], np.int8)
    # The field is (+, -, -, +) * 0.3 on up electrons and the opposite on down electrons.
    want = [2 * 2.5 + 0.3 * (1 - 1) - 0.3 * (1 - 1 - 1), 2.5 + 0.3 * 2 - 0.3 * (-1 - 1 + 1)]
    with jax.enable_x64(True):
        got = hop.diagonal(hop.hops(h), jnp.asarray(x))
    np.testing.assert_allclose(got, want, rtol=1e-14)
