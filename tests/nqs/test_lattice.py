"""Bonds, boundaries and fields against a search through all pairs of sites."""

import warnings

import numpy as np
import pytest

from common.errors import UserError
from nqs import references
from tests.nqs import brute
from tests.nqs.clusters import cluster

SHAPES = [
    *[(4, 3, bc) for bc in ("OO", "PP", "PO", "OP", "PA", "AA", "AO")],
    *[(1, 6, bc) for bc in ("OO", "OP", "OA")],
    (2, 5, "OP"),
    (3, 3, "PP"),
    (5, 4, "PA"),
    (1, 1, "OO"),
]


@pytest.mark.parametrize(("Lx", "Ly", "bc"), SHAPES)
@pytest.mark.parametrize("tp", [0.0, -0.2])
def test_bonds_join_all_neighbours_once(Lx, Ly, bc, tp):
    h = cluster(Lx, Ly, 1, 0, bc, tp=tp, t=1.5)
    pairs = [tuple(map(int, bond)) for bond in h.bonds]
    assert len(set(pairs)) == len(pairs)
    found = dict(zip(pairs, h.amplitude, strict=True))
    assert found == brute.bonds(h.shape, h.boundary, 1.5, tp)


def warned(function):
    """What it returns, and the sentences it warns with."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = function()
    return found, [str(each.message) for each in caught]


@pytest.mark.parametrize("bc", ["PO", "PP"])
@pytest.mark.parametrize("tp", [0.0, -0.2])
def test_bonds_across_two_sites_count_once_with_a_warning(bc, tp):
    h, sentences = warned(lambda: cluster(2, 4, 1, 0, bc, tp=tp))
    assert any("lattice.bc_x is periodic over two sites" in s for s in sentences)
    assert any("every bond counts once" in s for s in sentences)
    wanted = brute.bonds(h.shape, h.boundary, 1.0, tp)
    assert dict(zip(map(tuple, h.bonds.tolist()), h.amplitude, strict=True)) == wanted
    nearest = {bond for bond, strength in wanted.items() if strength == 1}
    assert len(nearest) == {"PO": 10, "PP": 12}[bc]


def test_coinciding_diagonals_count_once_with_a_warning():
    wrapped, sentences = warned(lambda: cluster(2, 4, 1, 0, "PP", tp=-0.2))
    assert any("model.tp" in s for s in sentences)
    open_one = cluster(2, 4, 1, 0, "OP", tp=-0.2)
    assert {*map(tuple, wrapped.bonds.tolist())} == {*map(tuple, open_one.bonds.tolist())}
    assert sorted(wrapped.amplitude) == sorted(open_one.amplitude) == [-0.2] * 8 + [1.0] * 12


def test_a_chain_has_no_diagonals_and_says_so():
    with pytest.warns(UserWarning, match=r"model\.tp"):
        assert len(cluster(6, 1, 1, 1, "PO", tp=-0.2).bonds) == 6


@pytest.mark.parametrize(("Lx", "Ly", "bc"), [(4, 2, "PO"), (3, 3, "PA"), (4, 4, "PP")])
def test_ordinary_lattices_do_not_warn(Lx, Ly, bc):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cluster(Lx, Ly, 1, 1, bc, tp=-0.2)


def test_pinning_fields_are_staggered_and_opposite_for_the_spins():
    neel = cluster(3, 4, 2, 2, h=0.3, pattern="neel")
    np.testing.assert_allclose(neel.field, brute.neel((3, 4), 0.3))
    stripe = cluster(8, 2, 2, 2, "PO", h=0.3, pattern="stripe", period=4).field
    for i in range(8):
        for j in range(2):
            edge = i % 4 in (0, 3)
            want = 0.15 * (-1) ** (i + j + i // 4) * edge
            assert stripe[2 * i + j] == pytest.approx(want)
            assert stripe[16 + 2 * i + j] == pytest.approx(-want)
    assert not cluster(3, 4, 2, 2, h=0.0, pattern="none").field.any()


@pytest.mark.parametrize(
    ("h", "pattern", "field"),
    [(0.05, "none", "pattern"), (0.0, "neel", "h"), (0.0, "stripe", "h")],
)
def test_a_field_that_would_silently_be_none_is_refused(h, pattern, field):
    with pytest.raises(UserError, match=rf"config\.pinning\.{field} is .*, but must be "):
        cluster(3, 4, 2, 2, h=h, pattern=pattern)


def table_of(key):
    shape, boundary, (n_up, n_dn), U, tp = key
    initials = "".join(bc[0].upper() for bc in boundary)
    return cluster(*shape, n_up, n_dn, initials, U=U, tp=tp)


@pytest.mark.parametrize("key", references.TABLE, ids=str)
def test_every_published_energy_is_found_whichever_way_the_lattice_lies(key):
    h = table_of(key)
    assert references.lookup(h) == references.TABLE[key]
    turned = h._replace(shape=h.shape[::-1], boundary=h.boundary[::-1])
    assert references.lookup(turned) == references.TABLE[key]
    for reference in references.TABLE[key]:
        assert -4 < reference.energy_per_site < 0
        assert reference.source


def test_published_energies_are_those_of_the_specification():
    def found(*cluster_of, source="", **kind):
        known = references.lookup(cluster(*cluster_of, **kind))
        return {r.energy_per_site for r in known if source in r.source}

    exact = "exact"
    assert found(4, 4, 8, 8, "PP", U=8.0, source=exact) == {-0.529304688}
    assert found(4, 4, 8, 8, "PP", U=4.0, source=exact) == {-0.851365926}
    assert found(4, 4, 7, 7, "PP", U=8.0, source=exact) == {-0.741802223}
    assert found(4, 4, 7, 7, "PP", U=8.0, tp=-0.2, source=exact) == {-0.756155419}
    assert found(4, 4, 5, 5, "PP", U=8.0, source=exact) == {-1.094397918}
    assert found(4, 4, 4, 4, "PP", U=8.0, source=exact) == {-1.028789172}
    assert found(8, 8, 28, 28, "OO", U=8.0, source="Gu et al") == {-0.69952, -0.69840}
    assert found(16, 4, 28, 28, "PP", U=8.0, source="Gu et al") == {-0.76298}
    assert found(16, 16, 112, 112, "PP", U=8.0, source="Gu et al") == {-0.7563}
    assert found(16, 10, 70, 70, "PP", U=8.0, tp=-0.2) == {-0.7434}


@pytest.mark.parametrize("key", references.TABLE, ids=str)
def test_variational_energies_lie_above_exact_ones(key):
    known = references.TABLE[key]
    for truth in (r for r in known if r.exact):
        for other in known:
            assert other.energy_per_site >= truth.energy_per_site - 3 * (other.error or 0)


@pytest.mark.parametrize(
    "change",
    [
        dict(t=2.0),
        dict(U=8.5),
        dict(tp=0.2),
        dict(bc="PO"),
        dict(n_dn=6),
        dict(h=0.1, pattern="neel"),
    ],
    ids=str,
)
def test_nothing_is_published_for_another_cluster(change):
    kind = dict(Lx=4, Ly=4, n_up=7, n_dn=7, bc="PP", U=8.0)
    assert references.lookup(cluster(**kind))
    assert references.lookup(cluster(**kind | change)) == []
