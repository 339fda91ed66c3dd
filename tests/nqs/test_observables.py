"""Observables against loops over sites, and their averages against exact states."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nqs import exact, lattice
from nqs import observables as obs
from tests.nqs.clusters import cluster

LATTICES = [(4, 3, "PP"), (4, 3, "OP"), (3, 3, "PO"), (5, 2, "AO"), (2, 3, "OO"), (1, 4, "OP")]
every = pytest.mark.parametrize(("Lx", "Ly", "bc"), LATTICES)


def sites(h):
    return list(itertools.product(*map(range, h.shape)))


def displacement(h, a, b):
    """From site a to site b: modulo the lattice where it wraps, else without its sign."""
    return tuple(
        abs(y - x) if bc == "open" else (y - x) % size
        for x, y, size, bc in zip(a, b, h.shape, h.boundary, strict=True)
    )


def distance(h, a, b):
    """Between the nearest images."""
    images = [(0,) if bc == "open" else (-1, 0, 1) for bc in h.boundary]
    vectors = [
        np.array(b) + np.array(turns) * h.shape - a for turns in itertools.product(*images)
    ]
    return min(np.hypot(*vector) for vector in vectors)


def correlation(h, pairs):
    """Mean of pairs[i, j] for each displacement, in the order of sites; pairs [N, N]."""
    found = {r: [] for r in sites(h)}
    for (i, a), (j, b) in itertools.product(enumerate(sites(h)), repeat=2):
        found[displacement(h, a, b)].append(pairs[i, j])
    return np.array([np.mean(each) for each in found.values()])


def random_walkers(h, n=50, seed=0):
    return np.random.default_rng(seed).integers(0, 2, (n, 2 * h.n_sites)).astype(np.int8)


def diagonal(h, x):
    with jax.enable_x64(True):
        return jax.device_get(obs.diagonal(obs.geometry(h), jnp.asarray(x)))


@every
def test_geometry_is_that_of_the_lattice(Lx, Ly, bc):
    h = cluster(Lx, Ly, 1, 1, bc)
    g = obs.geometry(h)
    order = {r: i for i, r in enumerate(sites(h))}
    assert (np.diff(g.distances) > 1e-6).all()
    assert g.distances[0] == 0
    for (i, a), (j, b) in itertools.product(enumerate(sites(h)), repeat=2):
        assert g.shift[i, j] == order[displacement(h, a, b)]
        assert g.distances[g.shell[i, j]] == pytest.approx(distance(h, a, b), abs=1e-8)


@every
def test_diagonal_observables_are_means_over_walkers(Lx, Ly, bc):
    h = cluster(Lx, Ly, 1, 1, bc)
    x = random_walkers(h)
    got = diagonal(h, x)
    up, down = np.split(x.astype(float), 2, axis=1)
    s, n = (up - down) / 2, up + down
    np.testing.assert_allclose(got.density_up, up.mean(axis=0))
    np.testing.assert_allclose(got.density_dn, down.mean(axis=0))
    np.testing.assert_allclose(got.double, (up * down).mean(axis=0))
    spin, charge = (np.mean([np.outer(a, a) for a in each], axis=0) for each in (s, n))
    np.testing.assert_allclose(got.spin, correlation(h, spin), atol=1e-14)
    np.testing.assert_allclose(got.charge, correlation(h, charge), atol=1e-14)


@every
def test_connected_correlations_subtract_the_product_of_densities(Lx, Ly, bc):
    h = cluster(Lx, Ly, 1, 1, bc)
    x = random_walkers(h)
    d = diagonal(h, x)
    density = d.density_up + d.density_dn
    n = np.add(*np.split(x.astype(float), 2, axis=1))
    covariance = np.cov(n.T, bias=True)
    got = obs.connected(obs.geometry(h), d.charge, density)
    np.testing.assert_allclose(got, correlation(h, covariance), atol=1e-13)


@every
def test_order_over_the_whole_lattice_does_not_decay(Lx, Ly, bc):
    """A Neel state: |C_s| is 1/4 at every distance, whatever the boundaries."""
    h = cluster(Lx, Ly, 1, 1, bc)
    sign = np.array([(-1) ** (i + j) for i, j in sites(h)])
    if any(size % 2 and b != "open" for size, b in zip(h.shape, h.boundary, strict=True)):
        sign = np.ones_like(sign)  # No room for a staggered one: all up.
    x = np.concatenate([sign > 0, sign < 0])[None].astype(np.int8)
    want = sign / 4
    np.testing.assert_allclose(diagonal(h, x).spin, want)
    if exact.n_states(h) <= 144:
        pure = np.outer(sign, sign) / 4
        np.testing.assert_allclose(exact._by_shift(h, pure).ravel(), want)


@every
def test_the_uniform_share_is_that_of_a_head_that_looks_everywhere(Lx, Ly, bc):
    h = cluster(Lx, Ly, 1, 1, bc)
    g, n = obs.geometry(h), h.n_sites
    share, _ = obs.attention_profile(g, jnp.full((1, 1, n, n), 1 / n))
    np.testing.assert_allclose(obs.uniform_share(g), share[0, 0], rtol=1e-5)


def test_spin_and_charge_sum_rules_on_a_periodic_lattice():
    h = cluster(4, 3, 5, 3, "PP")
    rng = np.random.default_rng(1)
    one = lambda n: rng.permuted(np.tile(np.arange(12) < n, (40, 1)), axis=1)
    d = diagonal(h, np.concatenate([one(5), one(3)], axis=1).astype(np.int8))
    # Each walker has total S^z = 1 and eight electrons.
    assert d.spin.sum() == pytest.approx(1 / 12, abs=1e-12)
    assert d.charge.sum() == pytest.approx(64 / 12, abs=1e-12)
    density = d.density_up + d.density_dn
    assert obs.connected(obs.geometry(h), d.charge, density).sum() == pytest.approx(
        0, abs=1e-12
    )
    assert d.spin[0] == pytest.approx((8 - 2 * d.double.sum()) / 48, abs=1e-12)


@pytest.mark.parametrize(("Lx", "Ly"), [(4, 3), (1, 6), (5, 5)])
def test_the_structure_factor_is_the_fourier_sum(Lx, Ly):
    c = correlation(
        cluster(Lx, Ly, 1, 1, "PP" if Lx > 1 else "OP"),
        (lambda a: a @ a.T)(np.random.default_rng(0).normal(size=(Lx * Ly, 7))),
    )
    got = obs.structure_factor(c, (Lx, Ly))
    assert got.shape == (Lx, Ly)
    for kx, ky in np.ndindex(Lx, Ly):
        q = 2 * np.pi * np.array([kx / Lx, ky / Ly])
        phases = [np.exp(-1j * q @ r) for r in np.ndindex(Lx, Ly)]
        assert got[kx, ky] == pytest.approx((phases @ c).real, abs=1e-10)
        assert abs((phases @ c).imag) < 1e-10
    assert (got > -1e-10).all()


@every
def test_attention_profiles_sum_the_weights_of_each_distance(Lx, Ly, bc):
    h = cluster(Lx, Ly, 1, 1, bc)
    g, n = obs.geometry(h), h.n_sites
    weights = np.random.default_rng(0).dirichlet(np.ones(n), size=(2, 3, n))
    with jax.enable_x64(True):
        share, spread = jax.device_get(obs.attention_profile(g, jnp.asarray(weights)))
    want = np.zeros((2, 3, len(g.distances)))
    for (i, a), (j, b) in itertools.product(enumerate(sites(h)), repeat=2):
        shell = np.argmin(np.abs(g.distances - distance(h, a, b)))
        want[..., shell] += weights[..., i, j] / n
    np.testing.assert_allclose(share, want, atol=1e-12)
    np.testing.assert_allclose(share.sum(axis=-1), 1, rtol=1e-12)
    by_hand = [
        [np.mean([1 / sum(row**2) for row in head]) for head in layer] for layer in weights
    ]
    np.testing.assert_allclose(spread, by_hand, rtol=1e-12)


def test_participation_counts_the_sites_a_head_looks_at():
    h = cluster(2, 3, 1, 1, "OP")
    looks = np.stack([np.full((6, 6), 1 / 6), np.eye(6)])[None]
    share, spread = obs.attention_profile(obs.geometry(h), jnp.asarray(looks))
    np.testing.assert_allclose(spread, [[6, 1]], rtol=1e-6)
    np.testing.assert_allclose(share[0, 1], [1, 0, 0], atol=1e-7)


STATES = [
    cluster(3, 2, 3, 3, "PO", U=8.0),
    cluster(1, 6, 3, 2, "OA"),
    cluster(3, 2, 3, 2, "OO", h=0.4, pattern="neel"),
]


@pytest.mark.xdist_group("netket")
@pytest.mark.parametrize("h", STATES, ids=lambda h: h.label)
def test_averages_over_psi_squared_are_the_exact_observables(h):
    _, vectors = exact.ground_state(h)
    psi, x = vectors[:, 0], lattice.all_states(h)
    want = exact.exact_observables(h, psi)
    up, down = np.split(x.astype(float), 2, axis=1)
    s, n = (up - down) / 2, up + down
    mean = lambda a: np.tensordot(psi**2, a, 1)
    pairs = lambda a: mean(a[:, :, None] * a[:, None, :])
    charge = pairs(n) - np.outer(mean(n), mean(n))
    np.testing.assert_allclose(want["density_up"], mean(up), atol=1e-13)
    np.testing.assert_allclose(want["density_dn"], mean(down), atol=1e-13)
    assert want["double_occupancy"] == pytest.approx(mean(up * down).mean(), abs=1e-13)
    for name, a in (("spin", pairs(s)), ("charge", charge)):
        found = want[f"{name}_correlation"]
        assert found.shape == h.shape
        np.testing.assert_allclose(found.ravel(), correlation(h, a), atol=1e-13)

    # What walkers measure is linear, so that their exact average can be taken.
    g = obs.geometry(h)
    with jax.enable_x64(True):
        each = jax.vmap(lambda x: obs.diagonal(g, x[None]))(jnp.asarray(x))
    got = obs.Diagonal(*(mean(np.asarray(a)) for a in each))
    np.testing.assert_allclose(got.density_up, want["density_up"], atol=1e-13)
    np.testing.assert_allclose(got.density_dn, want["density_dn"], atol=1e-13)
    assert got.double.mean() == pytest.approx(want["double_occupancy"], abs=1e-13)
    np.testing.assert_allclose(got.spin, want["spin_correlation"].ravel(), atol=1e-13)
    connected = obs.connected(g, got.charge, got.density_up + got.density_dn)
    np.testing.assert_allclose(connected, want["charge_correlation"].ravel(), atol=1e-13)


@pytest.mark.xdist_group("netket")
@pytest.mark.parametrize(
    "kind",
    [
        dict(Lx=3, Ly=2, n_up=3, n_dn=3, bc="PO"),
        dict(Lx=6, Ly=1, n_up=3, n_dn=2, bc="OO"),
    ],
    ids=str,
)
@pytest.mark.parametrize("U", [1.0, 8.0])
def test_double_occupancy_is_the_derivative_of_the_energy(kind, U):
    energy = lambda u: exact.ground_state(cluster(**kind, U=u))[0][0]
    h = cluster(**kind, U=U)
    near, far = ((energy(U + d) - energy(U - d)) / (2 * d) for d in (0.01, 0.02))
    slope = (4 * near - far) / 3  # Of fourth order.
    vector = exact.ground_state(h)[1][:, 0]
    got = exact.exact_observables(h, vector)["double_occupancy"]
    assert got == pytest.approx(slope / h.n_sites, abs=1e-8)
