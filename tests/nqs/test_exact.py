"""The Hamiltonian through NetKet, and its exact energies: element by element against
second quantisation, closed forms, and the table of two other programs.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from nqs import exact, lattice
from tests.nqs import brute
from tests.nqs.clusters import cluster

pytestmark = pytest.mark.xdist_group("netket")  # It compiles for ten seconds, once.

# Section 10.1 of the specification: Lx, Ly, boundaries, t', (N_up, N_dn), states, bonds,
# E(U = 4), E(U = 8). Totals, from NetKet and a bit-string Lanczos program.
TABLE = [
    (2, 1, "OO", 0, (1, 1), 4, 1, -0.828427125, -0.472135955),
    (4, 1, "OO", 0, (2, 2), 36, 3, -1.953145309, -1.117172413),
    (6, 1, "OO", 0, (3, 3), 400, 5, -3.092565320, -1.768098755),
    (8, 1, "OO", 0, (4, 4), 4900, 7, -4.235806999, -2.420831400),
    (4, 1, "PO", 0, (2, 2), 36, 4, -2.102748483, -1.320234958),
    (6, 1, "PO", 0, (3, 3), 400, 6, -3.668706179, -2.048130886),
    (8, 1, "PO", 0, (4, 4), 4900, 8, -4.603526300, -2.666147420),
    (2, 2, "OO", 0, (2, 2), 36, 4, -2.102748483, -1.320234958),
    (2, 2, "OO", 0, (1, 1), 16, 4, -3.418550719, -3.207750943),
    (2, 3, "OO", 0, (3, 3), 400, 7, -3.619321324, -2.177793552),
    (3, 2, "PO", 0, (3, 3), 400, 9, -3.789823072, -2.310828545),
    (3, 2, "PO", 0, (2, 2), 225, 9, -6.332962199, -5.627938035),
    (4, 2, "PO", 0, (4, 4), 4900, 12, -5.954236681, -3.467173437),
    (4, 2, "PO", 0, (3, 3), 3136, 12, -7.417099010, -6.369667858),
    (4, 2, "PO", -0.2, (4, 4), 4900, 20, -5.956738609, -3.468375059),
    (4, 2, "PO", -0.2, (3, 3), 3136, 20, -7.431254337, -6.409296194),
    (4, 2, "OO", 0, (4, 4), 4900, 10, -5.012503153, -3.025922806),
    (4, 2, "OO", 0, (3, 3), 3136, 10, -6.841437817, -5.750066028),
    (3, 3, "OO", 0, (5, 4), 15876, 12, -5.778020229, -3.491143870),
    (3, 3, "OO", 0, (4, 4), 15876, 12, -6.821627338, -5.041253031),
    (3, 3, "PP", 0, (5, 4), 15876, 18, -7.824105713, -4.144215463),
    (3, 3, "PP", 0, (4, 4), 15876, 18, -9.364758522, -7.284315628),
    (3, 3, "PP", -0.2, (4, 4), 15876, 36, -10.015210289, -7.770145434),
]


def energy(h):
    return exact.ground_state(h)[0][0]


def named(row, *marks):
    Lx, Ly, bc, tp, electrons, *_ = row
    return pytest.param(row, id=f"{Lx}x{Ly}-{bc}-{electrons}-{tp}", marks=marks)


@pytest.mark.parametrize(
    "row", [named(row, *([pytest.mark.slow] if row[4] == (5, 4) else [])) for row in TABLE]
)
def test_energies_are_those_of_two_other_programs(row):
    Lx, Ly, bc, tp, electrons, states, bonds, *energies = row
    for U, want in zip((4.0, 8.0), energies, strict=True):
        h = cluster(Lx, Ly, *electrons, bc, U=U, tp=tp)
        assert len(h.bonds) == bonds
        assert exact.n_states(h) == states
        assert energy(h) == pytest.approx(want, abs=1e-8)


# Unequal spins, and fields: a confusion of the two spins shows.
FULL = [
    (cluster(1, 1, 1, 1), 0.0),
    (cluster(2, 2, 2, 2), 0.0),
    (cluster(2, 2, 2, 3, U=8.0, h=-0.4, pattern="neel"), -0.4),
    (cluster(3, 2, 3, 2, "PO", tp=-0.2), 0.0),
    (cluster(3, 2, 3, 2, "PO", tp=0.3, h=0.7, pattern="neel"), 0.7),
    (cluster(2, 3, 3, 2, "OP", h=0.2, pattern="neel"), 0.2),
    (cluster(1, 6, 3, 2, "OA", U=-3.0), 0.0),
    (cluster(3, 2, 3, 2, "AO", tp=-0.2, t=0.7), 0.0),
]


@pytest.mark.parametrize(("h", "field"), FULL, ids=lambda a: getattr(a, "label", str(a)))
def test_every_matrix_element_is_that_of_second_quantisation(h, field):
    x = lattice.all_states(h)
    want = brute.hamiltonian(h, x, brute.neel(h.shape, field))
    np.testing.assert_allclose(lattice.matrix(h).toarray(), want, rtol=0, atol=1e-12)


def test_all_states_are_the_sector_with_up_modes_first():
    h = cluster(3, 2, 3, 2)
    x = lattice.all_states(h)
    assert x.dtype == np.int8
    assert len(x) == exact.n_states(h) == 20 * 15
    assert (x[:, :6].sum(axis=1) == 3).all()
    assert (x[:, 6:].sum(axis=1) == 2).all()
    assert sorted(brute.find(x, brute.states(6, 3, 2))) == list(range(300))


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_netkets_order_of_modes_is_down_first_and_back(kind):
    x = kind(np.array([[1, 2, 3, 4, 5, 6], [7, 8, 9, 0, 1, 2]]))
    np.testing.assert_array_equal(lattice.to_netket(x)[0], [4, 5, 6, 1, 2, 3])
    np.testing.assert_array_equal(lattice.from_netket(lattice.to_netket(x)), x)
    np.testing.assert_array_equal(lattice.to_netket(lattice.from_netket(x)), x)
    assert isinstance(lattice.to_netket(x), type(x))


@pytest.mark.parametrize("U", [-3.0, 0.0, 0.5, 4.0, 30.0])
def test_the_dimer_is_solved_by_hand(U):
    want = (U - np.sqrt(U**2 + 16 * 1.3**2)) / 2
    assert energy(cluster(2, 1, 1, 1, U=U, t=1.3)) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize(
    ("h", "known"),
    [
        (cluster(4, 2, 4, 4, "PO", U=0.0), -12.0),
        (cluster(3, 3, 5, 5, "PP", U=0.0), -16.0),
        (cluster(6, 1, 3, 2, "AO", U=0.0), None),
        (cluster(3, 2, 3, 2, "AO", U=0.0, tp=0.4), None),
    ],
    ids=lambda a: getattr(a, "label", str(a)),
)
def test_without_interaction_electrons_fill_the_lowest_levels(h, known):
    levels = brute.levels(h)
    want = levels[: h.n_up].sum() + levels[: h.n_dn].sum()
    assert energy(h) == pytest.approx(want, abs=1e-9)
    if known:
        assert want == pytest.approx(known, abs=1e-9)


@pytest.mark.parametrize(
    ("Lx", "n_up", "n_dn", "pairs"), [(1, 1, 1, 1), (4, 1, 1, 0), (4, 2, 2, 0), (4, 2, 3, 1)]
)
def test_without_hopping_electrons_avoid_each_other(Lx, n_up, n_dn, pairs):
    h = cluster(Lx, 1, n_up, n_dn, t=0.0, U=6.5)
    assert energy(h) == pytest.approx(6.5 * pairs, abs=1e-12)


@pytest.mark.parametrize(("Lx", "Ly", "bc"), [(4, 1, "PO"), (3, 2, "OO")])
def test_half_filled_bipartite_spectra_at_both_signs_of_U_differ_by_a_constant(Lx, Ly, bc):
    half = Lx * Ly // 2
    U = 5.0
    spectra = [
        np.linalg.eigvalsh(lattice.matrix(cluster(Lx, Ly, half, half, bc, U=u)).toarray())
        for u in (U, -U)
    ]
    np.testing.assert_allclose(spectra[1], spectra[0] - U * half, atol=1e-10)


@pytest.mark.parametrize(
    ("h", "lowest"),
    [
        (cluster(3, 2, 3, 3, "PO"), -3.789823072),  # all eigenvalues
        (cluster(4, 2, 3, 3, "PO"), -7.417099010),  # Lanczos
    ],
    ids=lambda a: getattr(a, "label", str(a)),
)
def test_ground_states_are_orthogonal_eigenvectors_in_the_sequence_of_states(h, lowest):
    energies, vectors = exact.ground_state(h, 4)
    matrix = brute.hamiltonian(h, lattice.all_states(h))
    np.testing.assert_allclose(matrix @ vectors, vectors * energies, atol=1e-8)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(4), atol=1e-10)
    assert (np.diff(energies) >= 0).all()
    assert energies[0] == pytest.approx(lowest, abs=1e-8)


def test_a_sector_that_is_too_large_is_refused_in_words():
    with pytest.raises(UserError, match=r"\(5, 5\).*has 19,079,424 states; .* 60,000"):
        exact.ground_state(cluster(4, 4, 5, 5, "PP"))


@pytest.mark.parametrize(
    ("h", "want"),
    [
        (cluster(3, 2, 3, 3, "PO", U=8.0), False),
        (cluster(4, 2, 4, 4, "PO", U=8.0), False),
        (cluster(4, 2, 3, 3, "PO", U=8.0), True),  # Two momenta, +k and -k.
        (cluster(4, 1, 2, 2, t=0.0), True),
        (cluster(4, 2, 2, 2, "PO", t=0.0), True),  # By Lanczos.
        (cluster(3, 1, 1, 0, "PO", t=-1.0), True),
        (cluster(2, 1, 2, 2), False),  # One state.
    ],
    ids=lambda a: getattr(a, "label", str(a)),
)
def test_degenerate_ground_states_are_recognised(h, want):
    energies, _ = exact.ground_state(h, min(2, exact.n_states(h)))
    assert exact.degenerate(h, energies) is want
