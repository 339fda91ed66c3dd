"""Local energies against H psi / psi with the matrix of second quantisation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nqs import ansatz as wave
from nqs.energy import local_energy, local_energy_padded
from nqs.hops import hops
from tests.nqs import brute
from tests.nqs.clusters import cluster, config, tabulated

SIZES = dict(d_model=8, n_heads=2, n_layers=1, n_det=2, mlp_hidden=8, mlp_layers=1)


def build(name, h, **sizes):
    """An ansatz for a cluster, in float64."""
    fields = dict(config().ansatz) | SIZES | sizes | dict(name=name)
    wide = dict(dtype="float64", determinants="float64")
    return wave.build(n_sites=h.n_sites, n_electrons=h.n_electrons, **fields, **wide)


NAMES = ["transformer", "nnb", "tensor", "slater"]
KINDS = {"packed": local_energy, "padded": local_energy_padded}
CLUSTERS = [
    cluster(2, 2, 2, 2, U=8.0),
    cluster(3, 2, 2, 2, "PO", tp=-0.2),
    cluster(3, 2, 3, 1, "AO", tp=0.3, h=0.6, pattern="neel"),
    cluster(5, 1, 2, 3, "PO", U=-2.0),
]


def problem(h):
    """All configurations, and the matrix."""
    x = brute.states(h.n_sites, h.n_up, h.n_dn)
    return x, brute.hamiltonian(h, x, brute.neel(h.shape, 0.6 if h.field.any() else 0.0))


def energies(log_psi, h, x, chunk=37, kind=local_energy):
    """E_L of each row of x, and the number of its hops; in float64."""

    @jax.jit
    def evaluate(x):
        return kind(log_psi, hops(h), x, *log_psi(x), chunk)

    with jax.enable_x64(True):
        e, count = evaluate(jnp.asarray(x))
        assert e.dtype == jnp.float64
    return np.asarray(e), np.asarray(count)


def network(h, name="transformer", seed=0):
    """log_psi of a batch, in float64, with random parameters."""
    psi = build(name, h)
    with jax.enable_x64(True):
        params = jax.jit(psi.init)(jax.random.key(seed))
    return jax.vmap(partial(psi.log_psi, params))


def amplitudes(log_psi, x):
    with jax.enable_x64(True):
        sign, log = jax.jit(log_psi)(jnp.asarray(x))
    return np.asarray(sign) * np.exp(np.asarray(log))


@pytest.mark.parametrize(
    ("kind", "h"),
    [*(("packed", h) for h in CLUSTERS), ("padded", CLUSTERS[2])],
    ids=lambda a: getattr(a, "label", a),
)
def test_an_eigenvector_has_its_energy_everywhere_and_no_variance(h, kind):
    x, matrix = problem(h)
    levels, vectors = np.linalg.eigh(matrix)
    psi = np.where(np.abs(vectors[:, 0]) > 1e-9, vectors[:, 0], 0)
    e, _ = energies(tabulated(x, psi), h, x, kind=KINDS[kind])
    there = psi != 0
    np.testing.assert_allclose(e[there], levels[0], rtol=0, atol=1e-9)
    assert e[there].var() < 1e-20
    assert np.isnan(e[~there]).all()


@pytest.mark.parametrize(
    ("name", "h"),
    [("transformer", CLUSTERS[1]), *((name, CLUSTERS[2]) for name in NAMES)],
    ids=lambda a: getattr(a, "label", a),
)
def test_every_ansatz_has_the_local_energies_of_its_vector(h, name):
    x, matrix = problem(h)
    log_psi = network(h, name)
    psi = amplitudes(log_psi, x)
    e, count = energies(log_psi, h, x)
    # Rounding in E_L is relative to the sum of its terms' magnitudes.
    size = np.abs(matrix) @ np.abs(psi) / np.abs(psi)
    assert (np.abs(e - matrix @ psi / psi) <= 1e-10 * size).all()
    expectation = psi @ matrix @ psi / (psi @ psi)
    assert np.sum(psi**2 * e) / np.sum(psi**2) == pytest.approx(expectation, abs=1e-10)
    connected = (np.abs(matrix - np.diag(np.diag(matrix))) > 0).sum(axis=1)
    np.testing.assert_array_equal(count, connected)


def test_packed_equals_padded():
    h = CLUSTERS[3]
    x, _ = problem(h)
    log_psi = network(h, seed=1)
    packed, count = energies(log_psi, h, x)
    padded, count_padded = energies(log_psi, h, x, kind=local_energy_padded)
    np.testing.assert_allclose(packed, padded, rtol=1e-11)
    np.testing.assert_array_equal(count, count_padded)


@pytest.mark.parametrize(
    ("kind", "chunks"),
    [("packed", [1, 7, 64, 10**6]), ("padded", [7, 10**6])],
)
def test_the_chunk_changes_no_bit(kind, chunks):
    h = cluster(3, 2, 2, 1, "PO", tp=-0.2)
    x, _ = problem(h)
    psi = np.random.default_rng(0).normal(size=len(x))
    want, _ = energies(tabulated(x, psi), h, x, 50, KINDS[kind])
    for chunk in chunks:
        got, _ = energies(tabulated(x, psi), h, x, chunk, KINDS[kind])
        np.testing.assert_array_equal(got, want)


def test_order_and_repetition_of_walkers_do_not_matter():
    h = cluster(3, 2, 2, 1, "PO", tp=-0.2)
    x, matrix = problem(h)
    psi = np.random.default_rng(0).normal(size=len(x))
    chosen = np.random.default_rng(1).integers(len(x), size=41)
    e, _ = energies(tabulated(x, psi), h, x[chosen], 3)
    np.testing.assert_allclose(e, (matrix @ psi / psi)[chosen], rtol=1e-10)


@pytest.mark.parametrize(
    ("n_up", "n_dn", "kind"),
    [*((a, b, "packed") for a, b in [(4, 2), (0, 2), (4, 0), (4, 4)]), (1, 4, "padded")],
)
def test_full_and_empty_spins(n_up, n_dn, kind):
    h = cluster(2, 2, n_up, n_dn, U=3.0)
    x, matrix = problem(h)
    psi = np.random.default_rng(0).normal(size=len(x))
    e, count = energies(tabulated(x, psi), h, x, kind=KINDS[kind])
    np.testing.assert_allclose(e, matrix @ psi / psi, rtol=1e-12)
    if {n_up, n_dn} <= {0, 4}:
        assert (count == 0).all()
        np.testing.assert_array_equal(e, 3.0 * min(n_up, n_dn))


@pytest.mark.parametrize("kind", KINDS)
def test_one_site_has_only_its_diagonal(kind):
    h = cluster(1, 1, 1, 1, U=3.5)
    x = brute.states(1, 1, 1)
    e, count = energies(tabulated(x, np.array([-0.3])), h, x, kind=KINDS[kind])
    assert e == [3.5]
    assert count == [0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("Lx", "n_up", "n_dn"), [(1, 1, 1), (3, 3, 3), (3, 3, 0)])
def test_a_node_without_any_hop_is_marked_too(Lx, n_up, n_dn, kind):
    h = cluster(Lx, 1, n_up, n_dn, U=3.5)
    x = brute.states(Lx, n_up, n_dn)
    e, _ = energies(tabulated(x, np.array([0.0])), h, x, kind=KINDS[kind])
    assert not np.isfinite(e).any()


@pytest.mark.parametrize("bad", [0.0, np.nan])
@pytest.mark.parametrize(
    ("kind", "chunk"), [("packed", 5), ("packed", 10**6), ("padded", 10**6)]
)
def test_nodes_and_nan_amplitudes_stay_where_they_are(bad, kind, chunk):
    h = cluster(3, 2, 2, 1, "PO", tp=-0.2)
    x, matrix = problem(h)
    psi = np.random.default_rng(0).normal(size=len(x))
    broken = [4, 17, 18, 55]
    spoilt = psi.copy()
    spoilt[broken] = bad
    e, _ = energies(tabulated(x, spoilt), h, x, chunk, KINDS[kind])
    assert not np.isfinite(e[broken]).any()
    others = np.setdiff1d(np.arange(len(x)), broken)
    if bad == 0:
        # A neighbour without amplitude adds nothing.
        want = (matrix @ spoilt)[others] / spoilt[others]
        np.testing.assert_allclose(e[others], want, rtol=1e-10)
    else:
        touched = (matrix[np.ix_(others, broken)] != 0).any(axis=1)
        assert 0 < touched.sum() < len(others)
        assert not np.isfinite(e[others][touched]).any()
        want = (matrix @ psi)[others] / psi[others]
        np.testing.assert_allclose(e[others][~touched], want[~touched], rtol=1e-10)


@pytest.mark.parametrize("h", CLUSTERS[1:], ids=lambda h: h.label)
def test_rows_replaced_in_place_need_no_sign_and_sorted_rows_do(h):
    """The sign trap: moving a row where it stands already carries the hop's sign."""
    x, matrix = problem(h)
    orbitals = np.random.default_rng(3).normal(size=(2 * h.n_sites, h.n_electrons))
    want = np.zeros(len(x))
    for i, walker in enumerate(x):
        rows = np.flatnonzero(walker)
        for j in np.flatnonzero(matrix[i]):
            if i == j:
                want[i] += matrix[i, i]
                continue
            (source,) = np.flatnonzero(walker > x[j])
            (target,) = np.flatnonzero(walker < x[j])
            in_place = orbitals[np.where(rows == source, target, rows)]
            ratio = np.linalg.det(in_place) / np.linalg.det(orbitals[rows])
            a, b = sorted((source % h.n_sites, target % h.n_sites))
            want[i] -= brute.bonds(h.shape, h.boundary, h.t, h.tp)[a, b] * ratio
    psi = build("slater", h, n_det=1)
    with jax.enable_x64(True):
        params = {"orbitals": jnp.asarray(orbitals[None])}
    e, _ = energies(jax.vmap(partial(psi.log_psi, params)), h, x)
    np.testing.assert_allclose(e, want, rtol=1e-8)


def test_energies_of_float32_amplitudes_are_summed_in_float64():
    h = cluster(3, 2, 2, 1, "PO", tp=-0.2)
    x, matrix = problem(h)
    psi = np.random.default_rng(0).normal(size=len(x))
    exactly = tabulated(x, psi)
    narrow = lambda x: jax.tree.map(lambda a: a.astype(jnp.float32), exactly(x))
    e, _ = energies(narrow, h, x)
    rounded = np.sign(psi) * np.exp(np.log(np.abs(psi)).astype(np.float32).astype(float))
    size = np.abs(matrix) @ np.abs(rounded) / np.abs(rounded)
    # A difference of float32 logarithms of order one has an error of about 1e-7.
    assert (np.abs(e - matrix @ rounded / rounded) <= 2e-6 * size).all()
