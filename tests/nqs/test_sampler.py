"""Metropolis sampling: detailed balance move by move, and |psi|^2 at large."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from nqs.hops import hops
from nqs.sampler import sample, scatter
from tests.nqs import brute
from tests.nqs.clusters import cluster, tabulated

RING = cluster(4, 1, 2, 2, "PO")
DIAGONALS = cluster(3, 2, 2, 1, "PO", tp=-0.2)
SQUARE = cluster(2, 2, 2, 1, tp=-0.2)
WEAK = cluster(2, 2, 2, 1, tp=0.01)  # Along the weakest bonds, too, hops are proposed.
CLUSTERS = [RING, SQUARE, WEAK, cluster(4, 1, 1, 2, "AO", t=2.0)]


def problem(h, seed=0):
    """All configurations, and amplitudes of random size and sign."""
    x = brute.states(h.n_sites, h.n_up, h.n_dn)
    rng = np.random.default_rng(seed)
    return x, rng.uniform(0.2, 1.2, len(x)) * rng.choice([-1, 1], len(x))


def weights(h, x):
    """max(|t|, 0.05) between configurations that one hop connects, else 0."""
    total = np.zeros((len(x), len(x)))
    for strength, unit in ((h.t, dict(t=1.0, tp=0.0)), (h.tp, dict(t=0.0, tp=1.0))):
        if strength or unit["t"]:
            bare = h._replace(U=0.0, **unit)
            total += (brute.hamiltonian(bare, x) != 0) * max(abs(strength), 0.05)
    return total


def transitions(h, x, psi):
    """P(x -> y) by proposal W_xy / W(x), accepted with min(1, |psi_y/psi_x|² W(x)/W(y))."""
    w = weights(h, x)
    out = w.sum(axis=1)
    proposal = w / out[:, None]
    acceptance = np.minimum(1, (psi / psi[:, None]) ** 2 * out[:, None] / out)
    return proposal, acceptance


def stochastic(proposal, acceptance):
    p = proposal * acceptance
    return p + np.diag(1 - p.sum(axis=1))


def run(h, x, psi, walkers, uniforms):
    """`sample` on a tabulated psi; NumPy in and out."""
    go = jax.jit(partial(sample, tabulated(x, psi), hops(h)))
    chains = go(jnp.asarray(walkers), jnp.asarray(uniforms, jnp.float32))
    return jax.tree.map(np.asarray, chains)


def grid(m):
    return (np.arange(m) + 0.5) / m


def measured(h, x, psi, fine, coarse):
    """Proposal and acceptance probabilities, to 1/fine and 1/coarse.

    The uniform numbers come from grids: first with one that accepts everything, then one
    hop of each kind with all chances to be refused.
    """
    n, hop, chance = len(x), grid(fine), grid(coarse)
    always = np.stack([np.tile(hop, n), np.zeros(n * fine)], axis=-1)[None]
    after = run(h, x, psi, np.repeat(x, fine, axis=0), always).x
    after = brute.find(after, x).reshape(n, fine)
    proposal = np.stack([np.bincount(row, minlength=n) for row in after]) / fine
    start, end = np.nonzero(proposal)
    which = np.array([hop[after[a] == b][0] for a, b in zip(start, end, strict=True)])
    both = np.stack([np.repeat(which, coarse), np.tile(chance, len(start))], axis=-1)[None]
    moved = run(h, x, psi, np.repeat(x[start], coarse, axis=0), both).moved
    acceptance = np.zeros((n, n))
    acceptance[start, end] = moved.reshape(-1, coarse).mean(axis=1)
    return proposal, acceptance


@pytest.mark.parametrize("h", CLUSTERS, ids=lambda h: h.label)
def test_every_move_obeys_detailed_balance(h):
    x, psi = problem(h)
    fine, coarse = 2048, 256
    proposal, acceptance = transitions(h, x, psi)
    p = stochastic(proposal, acceptance)
    pi = psi**2 / np.sum(psi**2)
    flow = pi[:, None] * p
    np.testing.assert_allclose(flow, flow.T, atol=1e-15)

    got_proposal, got_acceptance = measured(h, x, psi, fine, coarse)
    near = 1 / coarse + 1e-6  # A grid of m points measures an interval to 1/m.
    np.testing.assert_allclose(got_proposal, proposal, rtol=0, atol=1 / fine + 1e-6)
    there = proposal > 0
    assert (got_proposal[~there] == 0).all()
    np.testing.assert_allclose(got_acceptance[there], acceptance[there], rtol=0, atol=near)
    got = pi[:, None] * got_proposal * got_acceptance
    assert (np.abs(got - got.T) <= 2 * near * (pi[:, None] + pi)).all()


def chi_squared(counts, expected):
    """The chance of a deviation at least as large."""
    statistic = np.sum((counts - expected) ** 2 / expected)
    return chi2.sf(statistic, len(expected) - 1)


def histogram(h, x, psi, walkers, moves, key):
    """How many walkers are where after these moves."""

    @jax.jit
    def go(walkers, key):
        u = jax.random.uniform(key, (moves, len(walkers), 2))
        return sample(tabulated(x, psi), hops(h), walkers, u).x

    after = np.asarray(go(jnp.asarray(walkers), key))
    return np.bincount(brute.find(after, x), minlength=len(x))


@pytest.mark.parametrize(("h", "n"), [(RING, 2**20), (SQUARE, 2**18)], ids=["t", "t and t'"])
def test_a_million_configurations_stay_distributed_as_psi_squared(h, n):
    x, psi = problem(h)
    pi = psi**2 / np.sum(psi**2)
    rng = np.random.default_rng(2)
    walkers = x[rng.choice(len(x), n, p=pi)]
    counts = histogram(h, x, psi, walkers, 2, jax.random.key(0))
    assert chi_squared(counts, n * pi) > 1e-3
    # Such a sample tells that W(x)/W(x') is not forgotten.
    proposal, _ = transitions(h, x, psi)
    wrong = stochastic(proposal, np.minimum(1, (psi / psi[:, None]) ** 2))
    drifted = pi @ np.linalg.matrix_power(wrong, 2)
    assert chi_squared(counts, n * drifted) < 1e-12


@pytest.mark.parametrize("h", [RING, SQUARE], ids=lambda h: h.label)
def test_walkers_from_anywhere_become_distributed_as_psi_squared(h):
    x, psi = problem(h)
    p = stochastic(*transitions(h, x, psi))
    assert np.sort(np.abs(np.linalg.eigvals(p)))[-2] ** 80 < 1e-4  # Long enough.
    start, moves = jax.random.split(jax.random.key(1))
    walkers = scatter(start, 2**14, h.n_sites, h.n_up, h.n_dn)
    counts = histogram(h, x, psi, walkers, 80, moves)
    assert chi_squared(counts, 2**14 * psi**2 / np.sum(psi**2)) > 1e-3


@pytest.mark.parametrize("h", CLUSTERS, ids=lambda h: h.label)
def test_every_configuration_is_reached_from_a_single_one(h):
    x, psi = problem(h)
    u = np.random.default_rng(0).uniform(size=(60, 4096, 2))
    chains = run(h, x, psi, np.repeat(x[:1], 4096, axis=0), u)
    assert set(brute.find(chains.x, x)) == set(range(len(x)))


@pytest.mark.parametrize("h", CLUSTERS, ids=lambda h: h.label)
def test_electrons_are_conserved_and_amplitudes_are_those_of_the_walkers(h):
    x, psi = problem(h)
    walkers = x[np.arange(64) % len(x)]
    u = np.random.default_rng(0).uniform(size=(50, 64, 2))
    chains = run(h, x, psi, walkers, u)
    assert chains.x.dtype == np.int8
    assert set(chains.x.ravel()) == {0, 1}
    assert (chains.x[:, : h.n_sites].sum(axis=1) == h.n_up).all()
    assert (chains.x[:, h.n_sites :].sum(axis=1) == h.n_dn).all()
    here = psi[brute.find(chains.x, x)]
    np.testing.assert_array_equal(chains.sign, np.sign(here))
    np.testing.assert_allclose(chains.log, np.log(np.abs(here)), rtol=1e-6)
    assert ((chains.moved > 0) & (chains.moved < 1)).any()


def test_the_share_of_accepted_moves_is_counted():
    x, psi = problem(DIAGONALS)
    walkers = x[np.arange(64) % len(x)]
    u = np.random.default_rng(0).uniform(size=(4, 64, 2))
    moved, now = np.zeros(64), walkers
    for each in u:
        then = run(DIAGONALS, x, psi, now, each[None])
        changed = (then.x != now).any(axis=1)
        np.testing.assert_array_equal(then.moved, changed)
        moved, now = moved + changed, then.x
    whole = run(DIAGONALS, x, psi, walkers, u)
    np.testing.assert_array_equal(whole.x, now)
    np.testing.assert_allclose(whole.moved, moved / 4, rtol=1e-6)


@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-23])
def test_the_outermost_uniform_numbers_choose_allowed_hops(u):
    x, psi = problem(DIAGONALS)
    chains = run(DIAGONALS, x, psi, x, np.broadcast_to([u, 0.0], (1, len(x), 2)))
    assert (chains.moved == 1).all()
    assert (weights(DIAGONALS, x)[np.arange(len(x)), brute.find(chains.x, x)] > 0).all()


@pytest.mark.parametrize("bad", [0.0, np.nan])
def test_walkers_leave_nodes_and_never_enter_them(bad):
    x, psi = problem(RING)
    neighbours = np.flatnonzero(weights(RING, x)[0])
    broken = np.array([0, *neighbours[:2], 20])
    psi[broken] = bad
    n = len(x)
    u = np.random.default_rng(0).uniform(size=(1, 100, n, 2))
    u[:, :50, :, 1] = 0.0  # Even a number that accepts everything finite.
    first = run(RING, x, psi, np.tile(x, (100, 1)), u.reshape(1, -1, 2))
    start, end = np.tile(np.arange(n), 100), brute.find(first.x, x)
    sound, moved = ~np.isin(start, broken), start != end
    assert not np.isin(end[sound], broken).any()
    if bad == 0:  # From a node every move is accepted, to another node as well.
        assert moved[~sound].all()
    else:
        assert moved[~sound].any()
        assert not np.isin(end[moved], broken).any()
    np.testing.assert_array_equal(first.moved, moved)
    many = np.random.default_rng(1).uniform(size=(40, 800, 2))
    later = run(RING, x, psi, np.repeat(x[broken], 200, axis=0), many)
    assert not np.isin(brute.find(later.x, x), broken).any()
    assert np.isfinite(later.log).all()


def test_a_walker_on_a_node_refuses_a_nan_amplitude():
    x, psi = problem(RING)
    psi = np.where(np.arange(len(x)) == 3, 0.0, np.nan)
    u = np.random.default_rng(0).uniform(size=(10, 50, 2))
    chains = run(RING, x, psi, np.repeat(x[3:4], 50, axis=0), u)
    np.testing.assert_array_equal(chains.x, np.repeat(x[3:4], 50, axis=0))
    assert (chains.log == -np.inf).all()


def test_a_nan_amplitude_is_refused_and_the_walker_stays():
    x, psi = problem(RING)
    alone = np.full(len(x), np.nan)
    alone[3] = psi[3]
    u = np.random.default_rng(0).uniform(size=(10, 50, 2))
    chains = run(RING, x, alone, np.repeat(x[3:4], 50, axis=0), u)
    np.testing.assert_array_equal(chains.x, np.repeat(x[3:4], 50, axis=0))
    assert (chains.moved == 0).all()


@pytest.mark.parametrize(("n_up", "n_dn"), [(4, 4), (4, 0), (0, 4)])
@pytest.mark.parametrize("psi", [0.7, 0.0])
def test_without_allowed_moves_a_walker_stays_with_zero_acceptance(n_up, n_dn, psi):
    h = cluster(2, 2, n_up, n_dn)
    x, psi = brute.states(4, n_up, n_dn), np.array([psi])
    u = np.random.default_rng(0).uniform(size=(10, 8, 2))
    chains = run(h, x, psi, np.repeat(x, 8, axis=0), u)
    np.testing.assert_array_equal(chains.x, np.repeat(x, 8, axis=0))
    assert (chains.moved == 0).all()
    np.testing.assert_allclose(np.exp(chains.log), psi[0], rtol=1e-6)


def test_one_site_and_no_moves_return_the_walkers():
    one = cluster(1, 1, 1, 0)
    x, psi = problem(one)
    assert run(one, x, psi, x, np.zeros((5, 1, 2))).moved == [0]
    x, psi = problem(RING)
    none = run(RING, x, psi, x, np.zeros((0, len(x), 2)))
    np.testing.assert_array_equal(none.x, x)
    assert (none.moved == 0).all()


def test_a_full_spin_leaves_the_other_one_its_moves():
    h = cluster(4, 1, 4, 2, "PO")
    x, psi = problem(h)
    u = np.random.default_rng(0).uniform(size=(40, 600, 2))
    chains = run(h, x, psi, np.repeat(x[:1], 600, axis=0), u)
    assert set(brute.find(chains.x, x)) == set(range(6))
    assert (chains.moved > 0).all()


def test_scattered_walkers_are_uniform_over_the_sector():
    x, _ = problem(DIAGONALS)
    walkers = np.asarray(scatter(jax.random.key(0), 2**16, 6, 2, 1))
    assert walkers.dtype == np.int8
    counts = np.bincount(brute.find(walkers, x), minlength=len(x))
    assert chi_squared(counts, np.full(len(x), 2**16 / len(x))) > 1e-3


def test_no_number_accepts_what_is_all_but_impossible():
    """Zero is what a uniform number below its resolution is rounded to."""
    x, _ = problem(RING)
    far = np.where(np.arange(len(x)) == 3, 1.0, 1e-30)
    u = np.zeros((20, 50, 2))
    u[..., 0] = np.random.default_rng(0).uniform(size=u.shape[:2])
    chains = run(RING, x, far, np.repeat(x[3:4], 50, axis=0), u)
    np.testing.assert_array_equal(chains.x, np.repeat(x[3:4], 50, axis=0))
