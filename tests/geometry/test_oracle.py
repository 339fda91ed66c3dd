"""Posterior means against sums over a grid, tables 11.2, and metrics against worked values."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geometry import oracle
from geometry.reference import coefs, reference
from geometry.samplers import run, sampler, table
from geometry.toys import cross_error, oracle_table

MIXTURE = oracle.of_the_specification()
PROCESSES = {
    "brownian": reference("brownian", sigma=1.3),
    "vp": reference("vp", beta_min=0.1, beta_max=6.0),
}
MAPS = np.array([[[0, -1], [1, 0]], [[-0.6, 0], [0, -0.6]], [[1.2, 0], [0, 0.4]]], float)
SHIFTS = np.array([[2, 0], [-1, 1.5], [0, -2.5]], float)
COVARIANCES = np.array(
    [[[0.04, 0], [0, 0.04]], [[0.09, 0], [0, 0.02]], [[0.05, 0.03], [0.03, 0.06]]]
)
FLOORS = {
    0.5: {0.0: 4.839, 0.1: 1.488, 0.25: 0.370, 0.5: 0.0995, 0.75: 0.0584, 0.9: 0.0331},
    1.0: {0.0: 4.839, 0.1: 3.433, 0.25: 1.916, 0.5: 0.5615, 0.75: 0.1268, 0.9: 0.0660},
    2.0: {0.0: 4.839, 0.1: 4.421, 0.25: 3.725, 0.5: 2.3543, 0.75: 0.8282, 0.9: 0.1752},
}


def by_summing(process, x, start, t):
    """Mean and trace of the covariance, of a density tabulated on a fine grid of ends."""
    side = np.linspace(-6, 6, 601)
    y = np.stack(np.meshgrid(side, side, indexing="ij"), -1).reshape(-1, 2)
    density = 0.0
    for weight, of, b, s in zip([0.5, 0.3, 0.2], MAPS, SHIFTS, COVARIANCES, strict=True):
        away = y - of @ start - b
        square = np.einsum("ni,ij,nj->n", away, np.linalg.inv(s), away)
        density = density + weight * np.exp(-square / 2) / np.sqrt(np.linalg.det(s))
    if t > 0:
        p = [process.rho(0.0, t), process.rho(t, 1.0), process.v(0.0, t), process.v(t, 1.0)]
        # Bayes without the pinned law: p(x | x0) p(y | x) q(y | x0) / p(y | x0).
        later = ((y - p[1] * x) ** 2).sum(-1) / p[3]
        whole = ((y - p[0] * p[1] * start) ** 2).sum(-1) / process.v(0.0, 1.0)
        density = density * np.exp((whole - later) / 2)
    density = density / density.sum()
    mean = density @ y
    return mean, density @ (y**2).sum(-1) - (mean**2).sum()


@pytest.mark.parametrize("name", PROCESSES)
def test_the_mixtures_posterior_is_bayes_theorem(name):
    process, rng = PROCESSES[name], np.random.default_rng(0)
    posterior = jax.jit(partial(oracle.posterior, MIXTURE, process))
    for t in (0.0, 0.05, 0.3, 0.8):
        start = rng.normal(size=2)
        # Near the path to one of the ends, and between them all.
        end = MAPS[1] @ start + SHIFTS[1] + 0.2 * rng.normal(size=2)
        a, b, c = coefs(process, 0.0, t)
        for aim in (end, 0 * end):
            x = a * start + b * aim + np.sqrt(c) * rng.normal(size=2) * (t > 0)
            mean, trace = by_summing(process, x, start, t)
            found = posterior(*(jnp.asarray(v, jnp.float32) for v in (x, start, t)))
            np.testing.assert_allclose(found[0], mean, atol=2e-4)
            assert float(found[1]) == pytest.approx(trace, rel=1e-3, abs=1e-4)


def test_finite_posteriors_are_bayes_theorem():
    rng = np.random.default_rng(1)
    starts, targets = rng.normal(size=(2, 3, 2))
    q = rng.dirichlet(np.ones(3), size=3)
    for process in PROCESSES.values():
        for t in (0.0, 0.2, 0.9):
            a, b, c = coefs(process, 0.0, t)
            x = a * starts[0] + b * targets[1] + np.sqrt(c) * rng.normal(size=2)
            if t > 0:
                near = lambda start, c=c, x=x, a=a, b=b: np.exp(
                    -((x - a * start - b * targets) ** 2).sum(-1) / 2 / c
                )
            else:
                near = lambda start: np.full(3, float((start == starts[0]).all()))
            known = q[0] * near(starts[0])
            whole = sum(q[i] / 3 * near(starts[i]) for i in range(3))
            at = jnp.asarray(x, jnp.float32)
            f32 = partial(jnp.asarray, dtype=jnp.float32)
            aware = oracle.finite(process, f32(targets), f32(q[0]), f32(starts[0]))
            blind = oracle.markov(
                process,
                f32(np.repeat(starts, 3, 0)),
                f32(np.tile(targets, (3, 1))),
                f32(q.ravel() / 3),
            )
            for denoise, weights in ((aware, known), (blind, whole)):
                expected = weights @ targets / weights.sum()
                np.testing.assert_allclose(denoise(at, t), expected, atol=2e-5)


def test_large_batches_are_many_small_ones():
    """Compiled: a fused product of small matrices came out wrong beyond 16384 elements."""
    process, n = PROCESSES["brownian"], 20_000
    start = jax.random.normal(jax.random.key(12), (n, 2))
    x = start + jax.random.normal(jax.random.key(13), (n, 2))
    ends = jnp.asarray(SHIFTS, jnp.float32)
    blind = oracle.markov(process, ends, ends[::-1], jnp.full(3, 1 / 3))
    calls = {
        "mixture": lambda x, start: oracle.gaussian(MIXTURE, process, start)(x, 0.3),
        "finite": lambda x, s: oracle.finite(process, ends, jnp.full((1, 3), 1 / 3), s)(x, 0.3),
        "markov": lambda x, start: blind(x, 0.3),
        "mean": lambda x, start: oracle.mean(MIXTURE, start),
    }
    for name, call in calls.items():
        whole = jax.jit(call)(x, start)
        part = jax.jit(call)
        for k in (0, 8000, 19_000):
            few = part(x[k : k + 1000], start[k : k + 1000])
            np.testing.assert_allclose(whole[k : k + 1000], few, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("sigma", FLOORS)
def test_irreducible_errors_are_the_published_ones(sigma):
    """Which are simulated themselves, as are these; 1 % is allowed for theirs."""
    process = reference("brownian", sigma=sigma)
    for i, (t, published) in enumerate(FLOORS[sigma].items()):
        value, error = oracle.irreducible(MIXTURE, process, jax.random.key(i), t, 20_000)
        assert value == pytest.approx(published, abs=4 * error + 0.01 * published)


def test_the_error_of_the_posterior_mean_is_its_covariance():
    """Loss floor, section 15.5: 2 %."""
    process = reference("brownian", sigma=1.0)
    for i, t in enumerate((0.1, 0.5, 0.9)):
        times = jnp.full(30_000, t)
        start, x, end = oracle.pairs(MIXTURE, process, jax.random.key(20 + i), times)
        mean, trace = oracle.posterior(MIXTURE, process, x, start, times)
        assert float(((mean - end) ** 2).sum(-1).mean()) == pytest.approx(
            float(trace.mean()), rel=0.02
        )


def test_samplers_meet_the_bars_of_the_table():
    """Excess of the sliced distance over that of two samples of the truth.

    The table's floor of 0.134 is one draw of four starts; over many it is 0.18, so that
    excesses are what can be compared: within 0.05 at n = 50, and for `bridge` with n = 10 and
    sigma = 2 at most 0.17 - 0.134, up to two standard errors. (Of 96 starts with 3000 samples:
    0.010, -0.002, -0.008, 0.013 for posterior, bridge, em, pfode, and 0.027; all +- 0.008.)
    """
    at = partial(oracle_table, jax.random.key(0), grids=("cosine",), starts=16, samples=800)
    many = at(sigmas=(1.0,), steps=(50,))
    few = at(sigmas=(2.0,), names=("bridge",), steps=(10,))
    assert [key[1] for key in many] == ["posterior", "bridge", "em", "pfode"]
    for _, excess, error in many.values():
        assert excess - 2 * error < 0.05
        assert error < 0.04
    (_, excess, error) = few[2.0, "bridge", "cosine", 10]
    assert excess - 2 * error < 0.17 - 0.134
    assert error < 0.04
    # A test that can fail: five posterior steps are far off.
    poor = at(sigmas=(1.0,), names=("posterior",), steps=(5,))
    (_, excess, error) = poor[1.0, "posterior", "cosine", 5]
    assert excess - 2 * error > 0.1


def test_the_flow_without_its_kick_has_no_spread():
    process = reference("brownian", sigma=1.0)
    start = jnp.repeat(jnp.asarray([[[0.3, -0.8]]]), 500, 1)
    truth = oracle.draw(MIXTURE, jax.random.key(1), start)
    rows = table(process, sampler("pfode", 50))
    go = jax.jit(
        lambda z: run(oracle.gaussian(MIXTURE, process, start), rows, start, lambda k: z)
    )
    kicked = go(jax.random.normal(jax.random.key(2), start.shape))
    still = go(jnp.zeros_like(start))
    assert float(still.std(1).max()) < 1e-5
    assert float(oracle.sliced_w2(still[0], truth[0])) > 1.0
    assert float(oracle.sliced_w2(kicked[0], truth[0])) < 0.35


def test_the_cross_moment_of_samples():
    exact = [[0.06, -0.5], [0.5, -0.1]]
    np.testing.assert_allclose(oracle.moment(MIXTURE), exact, atol=1e-6)
    start = jax.random.normal(jax.random.key(3), (20_000, 2))
    truth = oracle.draw(MIXTURE, jax.random.key(4), start)
    np.testing.assert_allclose(oracle.cross_moment(truth, start), exact, atol=4 * 2.4 / 141)
    process = reference("brownian", sigma=2.0)
    rows, key = table(process, sampler("bridge", 20)), jax.random.key(5)
    noise = lambda k: jax.random.normal(jax.random.fold_in(key, k), start.shape)
    end = run(oracle.gaussian(MIXTURE, process, start), rows, start, noise)
    assert np.abs(cross_error(MIXTURE, end, start)).max() < 0.04


def test_moments_of_the_mixture_are_those_of_its_samples():
    start = jnp.repeat(jax.random.normal(jax.random.key(6), (1, 2)), 20_000, 0)
    end = oracle.draw(MIXTURE, jax.random.key(7), start)
    np.testing.assert_allclose(oracle.mean(MIXTURE, start)[0], end.mean(0), atol=0.05)
    mean, trace = oracle.posterior(MIXTURE, PROCESSES["vp"], start[:1], start[:1], jnp.zeros(1))
    assert float(trace[0]) == pytest.approx(float(end.var(0).sum()), rel=0.03)
    np.testing.assert_allclose(mean, oracle.mean(MIXTURE, start[:1]), atol=1e-6)
    start = jax.random.normal(jax.random.key(8), (20_000, 2))
    end = oracle.draw(MIXTURE, jax.random.key(9), start)
    square = float(((end - start) ** 2).mean())
    assert oracle.mean_square(MIXTURE) == pytest.approx(square, rel=0.03)


def test_distances_of_distributions():
    x = jax.random.normal(jax.random.key(10), (200, 2))
    shift = jnp.asarray([0.6, -0.8])
    # Along each direction the whole shift: the mean of its squares is |shift|^2 / 2.
    assert float(oracle.sliced_w2(x, x + shift)) == pytest.approx(0.5**0.5, rel=1e-5)
    assert float(oracle.sliced_w2(x, x[::-1])) == 0
    y = jax.random.normal(jax.random.key(11), (200, 3))
    along = float(oracle.sliced_w2(y, y + jnp.asarray([0.0, 0.0, 1.0])))
    assert along == pytest.approx(3**-0.5, rel=0.15)
    np.testing.assert_allclose(
        oracle.total_variation([[0.713, 0.287], [0.392, 0.608]], [[0.7, 0.3], [0.4, 0.6]]),
        [0.013, 0.008],
    )
