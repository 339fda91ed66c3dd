"""Samplers against loops in float64, exact variances of linear problems, and invariants.

Where the denoiser is linear in the state, so is the sampler in its noise: fed with unit vectors
for noise it yields the exact covariance of its samples, without a Monte Carlo error.
"""

from functools import partial
from itertools import pairwise

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from geometry.graphs import noise
from geometry.reference import coefs, grid, reference
from geometry.samplers import fixed, run, sample, sampler, table
from tests.geometry.test_matching import END, GRAPH, START

BROWNIAN = reference("brownian", sigma=0.7)
VP = reference("vp", beta_min=0.1, beta_max=6.0)
NOISE = jnp.asarray(np.random.default_rng(0).normal(size=(64, 5, 3)), jnp.float32)
KINDS = {
    "mean": {},
    "bridge": dict(noise_mix=0.3),
    "posterior": {},
    "em": dict(drop_last_noise=False),
    "pfode": dict(eps=0.01),
}


def pull(x, t):
    """A denoiser that is no posterior mean of anything; equivariant about the origin."""
    return x / (1 + (x**2).sum(-1, keepdims=True)) * (1 + t)


def by_hand(name, n, start, z, sigma=0.7, mix=0.3, eps=0.01):
    """The update of section 4 and the flow of 2.6 of the Brownian bridge, written out."""
    d = lambda x, t: x / (1 + (x**2).sum(-1, keepdims=True)) * (1 + t)
    x, states = start, [start]
    if name == "pfode":
        odds = np.geomspace(eps / (1 - eps), (1 - eps) / eps, n + 1)
        times = odds / (1 + odds)
        x = x + eps * (d(x, 0.0) - x) + np.sqrt(sigma**2 * eps * (1 - eps)) * z[0]
        states.append(x)
        for s, u in pairwise(times):
            first = slope_of_flow(d, start, sigma, x, s)
            second = slope_of_flow(d, start, sigma, x + (u - s) * first, u)
            x = x + (u - s) / 2 * (first + second)
            states.append(x)
        return np.stack([*states, d(x, times[-1])])
    times = (1 - np.cos(np.pi * np.arange(n + 1) / n)) / 2
    for k, (s, u) in enumerate(pairwise(times)):
        x = x + (u - s) / (1 - s) * (d(x, s) - x)
        m = {"mean": 0.0, "bridge": mix, "posterior": 0.0, "em": 1.0}[name]
        c = sigma**2 * (u - s) * (1 - u) / (1 - s)
        width = np.sqrt((1 - m) * c + m * sigma**2 * (u - s))
        if name == "mean" or (name != "em" and k == n - 1):
            width = 0.0
        x = x + width * z[k]
        states.append(x)
    return np.stack(states)


def slope_of_flow(d, start, sigma, x, t):
    """dx/dt of 2.6: with the marginal's score (mean - x) / c."""
    mean, c = (1 - t) * start + t * d(x, t), sigma**2 * t * (1 - t)
    return (d(x, t) - x) / (1 - t) - sigma**2 / 2 * (mean - x) / c


@pytest.mark.parametrize("name", KINDS)
def test_every_step_is_the_one_of_the_specification(name):
    start = np.random.default_rng(1).normal(size=(5, 3))
    with jax.enable_x64(True):
        z = jnp.asarray(NOISE, jnp.float64)
        end, states = sample(
            pull,
            BROWNIAN,
            sampler(name, 7, **KINDS[name]),
            jnp.asarray(start),
            lambda k: z[k],
            path=True,
        )
        assert end.dtype == jnp.float64
    expected = by_hand(name, 7, start, np.float64(NOISE))
    np.testing.assert_allclose(states, expected, atol=1e-12)
    np.testing.assert_array_equal(end, states[-1])
    np.testing.assert_array_equal(states[0], start)


@pytest.mark.parametrize("process", [BROWNIAN, VP])
@pytest.mark.parametrize("name", KINDS)
def test_the_end_is_never_asked_for_and_the_last_step_lands_on_d(name, process):
    asked = []

    def denoise(x, t):
        jax.debug.callback(lambda t: asked.append(float(t)), t)
        return pull(x, t)

    options = sampler(name, 6, eps=1e-3)
    end, states = sample(denoise, process, options, START, lambda k: 0.0 * START, path=True)
    jax.effects_barrier()
    assert len(asked) == {"pfode": 14}.get(name, 6)
    assert max(asked) < 1
    np.testing.assert_allclose(end, pull(states[-2], jnp.float32(max(asked))), atol=1e-6)


@pytest.mark.parametrize("process", [BROWNIAN, VP])
def test_one_step_of_the_mean_is_direct_prediction(process):
    found = sample(pull, process, sampler("mean", 1), START)
    np.testing.assert_allclose(found, pull(START, 0.0), atol=1e-7)


def covariance(process, options, denoise, calls):
    """Exact covariance over the grid of a linear sampler that starts from 0."""
    with jax.enable_x64(True):
        unit = jnp.eye(calls)
        _, states = sample(
            denoise, process, options, jnp.zeros(calls), lambda k: unit[k], path=True
        )
    states = np.asarray(states)
    return states @ states.T


@pytest.mark.parametrize("n", [10, 50, 200])
def test_euler_maruyama_leaves_noise_on_a_pinned_end(n):
    options = sampler("em", n, grid="uniform", drop_last_noise=False)
    variance = covariance(BROWNIAN, options, lambda x, t: jnp.zeros_like(x), n)
    assert variance[-1, -1] == pytest.approx(0.7**2 / n, rel=1e-9)
    assert variance[-1, -1] == pytest.approx(
        {10: 0.0490, 50: 0.0098, 200: 0.00245}[n], abs=5e-5
    )
    dropped = covariance(
        BROWNIAN, sampler("em", n, grid="uniform"), lambda x, t: jnp.zeros_like(x), n
    )
    assert dropped[-1, -1] == 0


@pytest.mark.parametrize(
    "process", [BROWNIAN, VP, reference("ve", sigma_min=0.1, sigma_max=2.0)]
)
def test_the_posterior_sampler_of_a_single_end_is_the_pinned_bridge(process):
    """Its law at all points of the grid together, whatever the grid."""
    n = 9
    found = covariance(process, sampler("posterior", n), lambda x, t: jnp.zeros_like(x), n)
    t = grid("cosine", n)
    first, last = np.minimum.outer(t, t), np.maximum.outer(t, t)
    v, rho = process.v, process.rho
    # Of the unpinned process less what the end tells.
    free = v(0.0, first) * rho(first, last)
    told = v(0.0, t) * rho(t, 1.0)
    np.testing.assert_allclose(found, free - np.outer(told, told) / v(0.0, 1.0), atol=1e-14)


RATIOS = {
    ("posterior", "cosine"): ({}, (0.56, 0.68, 0.84)),
    ("bridge", "cosine"): ({}, (0.83, 0.91, 0.95)),
    ("bridge", "power"): ({}, (0.88, 0.94, 0.96)),
    ("em", "cosine"): (dict(drop_last_noise=False), (1.35, 1.14, 1.06)),
}


@pytest.mark.parametrize(("name", "place"), RATIOS)
def test_variance_of_gaussian_ends_over_the_exact_one(name, place):
    """Target of standard deviation 0.15, sigma = 0.4; section 4's figures are simulated."""
    options, published = RATIOS[name, place]

    def denoise(x, t):  # The posterior mean of N(0, 0.15^2) about the start.
        return 0.15**2 / (t * 0.15**2 + 0.4**2 * (1 - t)) * x

    for n, ratio in zip((10, 20, 50), published, strict=True):
        at = sampler(name, n, grid=place, power=2.0, **options)
        found = covariance(reference("brownian", sigma=0.4), at, denoise, n)[-1, -1]
        assert found / 0.15**2 == pytest.approx(ratio, abs=0.03), n


@pytest.mark.parametrize(
    "process", [reference("brownian", sigma=0.4), VP, reference("ve", sigma_max=0.8)]
)
def test_the_flow_needs_its_kick(process):
    """It carries a Gaussian target's spread, but from a point mass it makes none."""

    def denoise(x, t):
        _, b, c = coefs(process, 0.0, t)
        return b * 0.15**2 / (b**2 * 0.15**2 + c + 1e-12) * x

    options = sampler("pfode", 100)
    found = covariance(process, options, denoise, 202)[-1, -1]
    # D at T - eps lacks what is not known there, 21 % for the steep end of vp.
    _, b, c = coefs(process, 0.0, 1 - 1e-3)
    known = b**2 * 0.15**2 / (b**2 * 0.15**2 + c)
    assert found / 0.15**2 == pytest.approx(known, abs=0.02)
    alone = sample(denoise, process, options, jnp.zeros(3), lambda k: jnp.zeros(3))
    np.testing.assert_array_equal(alone, 0)


def test_turned_inputs_and_noise_give_the_turned_sample():
    axes = np.linalg.qr(np.random.default_rng(4).normal(size=(3, 3)))[0]
    axes[:, 0] *= -np.sign(np.linalg.det(axes))  # A reflection.
    axes = jnp.asarray(axes, jnp.float32)
    start = NOISE[-1]
    for name, options in KINDS.items():
        rows = table(BROWNIAN, sampler(name, 8, **options))
        plain = run(pull, rows, start, lambda k: NOISE[k])
        turned = run(pull, rows, start @ axes, lambda k: NOISE[k] @ axes)
        np.testing.assert_allclose(turned, plain @ axes, atol=1e-5)


@pytest.mark.parametrize("process", [BROWNIAN, VP])
def test_fixed_atoms_stay_bitwise_and_centres_too(process):
    """With a denoiser that does not know it has to."""
    draw = partial(jax.random.fold_in, jax.random.key(1))
    for name in ("bridge", "em", "pfode"):
        end, states = sample(
            lambda x, t: END + 0.0 * x,
            process,
            sampler(name, 6),
            START,
            lambda k: noise(draw(k), GRAPH),
            keep=fixed(GRAPH, START),
            path=True,
        )
        still = np.asarray(GRAPH.free) == 0
        np.testing.assert_array_equal(states[:, still], np.stack([START[still]] * len(states)))
        assert np.abs(end - START)[~still].min() > 1e-4
        for k in (0, 1):
            own = np.asarray(GRAPH.owner) == k
            np.testing.assert_allclose(states[:, own].mean(1), 0, atol=1e-5)


def test_another_sigma_grid_or_mix_compiles_nothing():
    traced = chex.assert_max_traces(
        lambda rows, start: run(pull, rows, start, lambda k: NOISE[k]), n=1
    )
    go = jax.jit(traced)
    found = {
        float(
            go(table(reference(kind, **fields), sampler(name, 5, grid=place)), NOISE[0]).sum()
        )
        for kind, fields in (("brownian", dict(sigma=0.3)), ("vp", {}), ("ve", {}))
        for name in ("bridge", "posterior", "em")
        for place in ("cosine", "uniform")
    }
    assert len(found) == 18


def test_noise_is_asked_of_no_sampler_without_it():
    def silent(k):
        raise AssertionError("mean has no noise")

    sample(pull, BROWNIAN, sampler("mean", 3), START, silent)
    with pytest.raises(UserError, match=r"sampler.name is 'bridge', but must be mean where"):
        sample(pull, BROWNIAN, sampler("bridge", 3), START)


def test_defaults():
    assert sampler().steps == 10
    assert sampler("bridge") == ("bridge", 50, 0.5, "cosine", 2.0, 1e-3, True)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (dict(name="heun"), "sampler.name is 'heun'.*mean, bridge, posterior, em, pfode"),
        (dict(steps=0), "sampler.steps is 0"),
        (dict(noise_mix=1.5), "sampler.noise_mix is 1.5"),
        (dict(noise_mix=-0.1), "sampler.noise_mix"),
        (dict(grid="log"), "sampler.grid is 'log'"),
        (dict(grid="power", power=-1.0), "sampler.power is -1.0"),
        (dict(eps=0.0), "sampler.eps is 0.0"),
        (dict(eps=0.7), "sampler.eps"),
    ],
)
def test_what_is_out_of_range_is_named(fields, said):
    with pytest.raises(UserError, match=said):
        sampler(**fields)
