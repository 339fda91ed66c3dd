"""Samplers against closed forms: orders, distributions, invariants, and what is refused."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from common.errors import UserError
from diffusion import grids
from diffusion.samplers import METHODS, planned, sample, trajectory
from diffusion.tables import D, P, Q, X, Z, older

STOCHASTIC = {
    "edm": dict(s_churn=20.0, s_min=0.05, s_max=50.0, s_noise=1.003),
    "ddim": dict(eta=0.6),
    "ddpm": dict(),
    "euler_maruyama": dict(last="tweedie"),
}


NOISE = np.random.default_rng(1).normal(size=(3, 2))
SIGMAS = np.array([12.0, 5.0, 2.5, 1.1, 0.4, 0.1, 0.0])


def gaussian(lam):
    """The exact denoiser of N(0, lam) data."""
    return Partial(_gaussian, jnp.asarray(lam))


def _gaussian(lam, x, sigma):
    s2 = sigma.reshape(sigma.shape + (1,) * (x.ndim - 1)) ** 2
    return lam * x / (lam + s2)


def endpoint(lam, x, s):
    """Where the probability flow of N(0, lam) data leads from x at level s."""
    return x * np.sqrt(lam / (lam + s**2))


def keys_of(seed, n):
    return jax.random.split(jax.random.key(seed), n)


PUBLISHED = {
    ("euler", 0.25): "-0.3010 -0.1539 -0.0780 -0.0392 -0.0197",
    ("heun", 0.25): "0.2781 0.0553 0.01221 0.002871 0.000691",
    ("heun", 1.0): "0.2314 0.0448 0.009965 0.002353 0.000571",
}


@pytest.mark.parametrize(("method", "lam"), PUBLISHED)
def test_errors_and_orders_on_gaussian_data_are_the_published_ones(method, lam):
    errors = []
    with jax.enable_x64(True):
        for n in (9, 18, 36, 72, 144):
            x0 = sample(gaussian(lam), jnp.ones((1, 1)), grids.edm(n), method=method)
            errors.append(float(x0[0, 0]) / endpoint(lam, 80.0, 80.0) - 1)
    for error, printed in zip(errors, PUBLISHED[method, lam].split(), strict=True):
        last_digit = 10.0 ** -len(printed.partition(".")[2])
        assert abs(error - float(printed)) <= 0.501 * last_digit
    order = np.log2(np.array(errors[2:-1]) / errors[3:])
    low, high = {"euler": (0.95, 1.05), "heun": (1.9, 2.2)}[method]
    assert ((low < order) & (order < high)).all()


def test_float32_agrees_with_float64():
    noise = np.random.default_rng(0).normal(size=(4, 3))
    found = sample(gaussian(0.25), jnp.asarray(noise, jnp.float32), grids.edm(18))
    assert found.dtype == jnp.float32
    with jax.enable_x64(True):
        exact = sample(gaussian(0.25), jnp.asarray(noise), grids.edm(18))
        assert exact.dtype == jnp.float64
        chex.assert_trees_all_close(found, exact.astype(jnp.float32), rtol=2e-5)


def test_ddim_without_noise_is_euler_and_with_all_of_it_ddpm():
    euler, ddim = planned(SIGMAS, "euler"), planned(SIGMAS, "ddim", eta=0.0)
    np.testing.assert_allclose(ddim.form, euler.form, atol=1e-15)
    ddpm, ddim = planned(SIGMAS, "ddpm"), planned(SIGMAS, "ddim", eta=1.0)
    np.testing.assert_allclose(ddim.form, ddpm.form, atol=1e-14)
    np.testing.assert_allclose(planned(SIGMAS, "native_euler").form, euler.form, atol=1e-15)


def test_noise_at_the_start_is_what_each_process_takes_for_pure_noise():
    grid = np.array([2.0, 1.0])
    scales = {
        start: planned(grid, "euler", start=start).scale for start in ("ve", "vp", "flow")
    }
    assert scales == pytest.approx({"ve": 2.0, "vp": 5**0.5, "flow": 3.0})


def test_flow_matching_begins_with_pure_noise_at_time_one():
    """Gaussian data N(0, lam): the flow scales noise to sqrt(lam) noise."""
    noise = jnp.asarray(NOISE, jnp.float32)
    options = dict(method="native_heun", start="flow")
    x0 = sample(gaussian(0.25), noise, grids.flow(100, shift=2.0), **options)
    chex.assert_trees_all_close(x0, 0.5 * noise, atol=2e-3)


@pytest.mark.parametrize("method", ["native_euler", "native_heun", "heun", "dpm_2m"])
@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_every_route_leads_to_the_same_end(method, path):
    options = dict(path=path) if method.startswith("native") else {}
    with jax.enable_x64(True):
        # A time that ends above 0, as the last step decides nothing about the order.
        s = [np.geomspace(20, 0.05, n + 1) for n in (40, 80)]
        found = [
            float(
                sample(gaussian(0.25), jnp.ones((1, 1)), grid, method=method, **options)[0, 0]
            )
            for grid in s
        ]
    end = 20 * np.sqrt((0.25 + 0.05**2) / (0.25 + 400))
    errors = np.abs(np.array(found) - end)
    assert errors[1] < (0.03 if method == "native_euler" else 2e-3) * end
    assert errors[0] / errors[1] > (1.9 if method == "native_euler" else 3.5)


@pytest.mark.parametrize("method", STOCHASTIC)
def test_stochastic_samplers_keep_the_variance_of_the_data(method):
    lam, n = 0.25, 20_000
    noise = jax.random.normal(jax.random.key(0), (n,))
    grid = grids.edm(160, sigma_min=0.01, sigma_max=20.0)
    options = dict(STOCHASTIC[method])
    if method == "edm":
        options["s_noise"] = 1.0
    x0 = np.asarray(sample(gaussian(lam), noise, grid, keys_of(1, n), method, **options))
    # Five standard errors, and a little for the steps.
    assert abs(x0.mean()) < 5 * np.sqrt(lam / n)
    assert abs(x0.var() / lam - 1) < 5 * np.sqrt(2 / n) + 0.01
    assert abs(np.corrcoef(x0, noise)[0, 1]) < 0.9  # Noise was added indeed.


def test_ancestral_steps_of_unit_gaussian_data_are_exact_at_any_size():
    """x_t then is stationary, and beta the variance of p(x_t' | x_t)."""
    plan = planned(np.array([30.0, 4.0, 0.7, 0.2]), "ddpm", variance="beta", start="vp")
    after = [*plan.sigma[1:], 0.2]
    factor = plan.form[:, 0] + plan.form[:, 1] / (1 + plan.sigma**2)
    variance = factor**2 * (1 + plan.sigma**2) + plan.form[:, 4] ** 2
    np.testing.assert_allclose(variance, 1 + np.square(after), rtol=1e-12)


def rows_denoiser(rows):
    return Partial(_posterior_mean, jnp.asarray(rows))


def _posterior_mean(rows, x, sigma):
    distances = ((x[:, None] - rows) ** 2).sum(axis=-1)
    return jax.nn.softmax(-distances / (2 * sigma[:, None] ** 2)) @ rows


@pytest.mark.parametrize(("x64", "near"), [(False, 1e-3), (True, 1e-9)])
def test_with_the_exact_denoiser_of_a_data_set_every_sample_is_a_row(x64, near):
    rng = np.random.default_rng(0)
    rows = rng.uniform(-1, 1, size=(30, 16))
    with jax.enable_x64(x64):
        noise = jnp.asarray(rng.normal(size=(200, 16)), jnp.result_type(float))
        x0 = np.asarray(sample(rows_denoiser(rows), noise, grids.edm(18)))
    distances = np.linalg.norm(x0[:, None] - rows, axis=-1)
    assert distances.min(axis=1).max() < near
    assert len(set(distances.argmin(axis=1))) > 15  # Not always the same one.


EVALUATIONS = {
    "euler": 18,
    "heun": 35,
    "edm": 35,
    "native_heun": 35,
    "dpm_2m": 18,
    "dpm_3s": 18,
}


@pytest.mark.parametrize("method", EVALUATIONS)
def test_the_denoiser_is_evaluated_as_often_as_published(method):
    levels = []

    def counting(x, sigma):
        jax.debug.callback(lambda s: levels.append(np.array(s)), sigma)
        return 0.5 * x

    x0 = sample(counting, jnp.ones((2, 1)), grids.edm(18), method=method)
    jax.block_until_ready(x0)
    jax.effects_barrier()
    assert len(levels) == EVALUATIONS[method]
    assert all(level.shape == (2,) for level in levels)
    assert min(level.min() for level in levels) > 0
    assert len(planned(grids.edm(256), "edm").sigma) == 511


def test_other_keys_grids_parameters_and_methods_are_no_compilation():
    traces = []

    def denoiser(scale, x, sigma):
        traces.append(1)
        return scale * x

    def go(scale, grid, seed, method, **options):
        noise = jnp.ones((2, 3)) * (1 + seed)
        bound = Partial(denoiser, jnp.float32(scale))
        return sample(bound, noise, grid, keys_of(seed, 2), method, **options)

    first = go(0.5, grids.edm(6), 0, "ddim", eta=0.5)
    others = [
        go(0.5, grids.edm(6), 1, "ddim", eta=0.5),
        go(0.5, grids.log_uniform(6), 0, "ddim", eta=0.5),
        go(0.25, grids.edm(6), 0, "ddim", eta=0.5),
        go(0.5, grids.edm(6), 0, "ddim", eta=0.9),
        go(0.5, grids.edm(6), 0, "euler_maruyama"),
    ]
    assert len(traces) == 1
    for other in others:
        assert np.abs(np.asarray(other - first)).max() > 1e-6


@pytest.mark.parametrize("method", STOCHASTIC)
def test_a_sample_depends_on_its_own_noise_and_key_alone(method):
    noise = jax.random.normal(jax.random.key(5), (6, 3))
    keys, options = keys_of(2, 6), STOCHASTIC[method]
    go = lambda rows: sample(gaussian(0.3), noise[rows], SIGMAS, keys[rows], method, **options)
    together = np.asarray(go(np.arange(6)))
    np.testing.assert_array_equal(together[[4, 1]], go(np.array([4, 1])))
    np.testing.assert_array_equal(together, go(np.arange(6)))


def test_a_trajectory_has_one_state_for_each_step_and_ends_in_the_sample():
    noise = jnp.asarray(NOISE, jnp.float32)
    states = trajectory(gaussian(0.3), noise, SIGMAS, method="heun")
    assert states.shape == (6, 3, 2)
    x0 = sample(gaussian(0.3), noise, SIGMAS, method="heun")
    np.testing.assert_array_equal(states[-1], x0)
    half = sample(gaussian(0.3), noise, SIGMAS[:4], method="heun")
    chex.assert_trees_all_close(states[2], half, rtol=1e-5)


def test_formulas_age_with_each_evaluation():
    np.testing.assert_array_equal(older(2 * X + 3 * D + 4 * P), 2 * X + 3 * P + 4 * Q)
    for lost in (Q, Z):
        with pytest.raises(ValueError, match="not kept"):
            older(lost)


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("method", dict(method="rk45")),
        ("start", dict(start="vpp")),
        ("eta", dict(method="euler", eta=0.1)),
        ("churn", dict(method="edm", churn=1.0)),
        ("s_churn", dict(method="edm", s_churn=-1.0)),
        ("s_min", dict(method="edm", s_min=np.nan)),
        ("s_max", dict(method="edm", s_min=2.0, s_max=1.0)),
        ("s_noise", dict(method="edm", s_noise=np.inf)),
        ("eta", dict(method="ddim", eta=1.5)),
        ("eta", dict(method="ddim", eta=np.nan)),
        ("variance", dict(method="ddpm", variance="learned")),
        ("path", dict(method="native_heun", path="vp")),
        ("path", dict(method="euler_maruyama", path="vp")),
        ("diffusion", dict(method="euler_maruyama", diffusion="sbdm")),
        ("norm", dict(method="euler_maruyama", norm=-1.0)),
        ("last", dict(method="euler_maruyama", last="euler")),
        ("inner", dict(method="dpm_3s", inner="thirds")),
        ("sigmas", dict(sigmas=[1.0, 2.0, 0.0])),
        ("sigmas", dict(sigmas=[1.0, np.nan, 0.0])),
        ("sigmas", dict(sigmas=[1.0])),
        ("method", dict(method="ddpm")),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_their_field(field, settings):
    settings = dict(sigmas=SIGMAS) | settings
    settings["sigmas"] = np.array(settings["sigmas"])
    with pytest.raises(UserError, match=rf"config\.sampler\.{field} is"):
        sample(gaussian(1.0), jnp.ones((1, 1)), **settings)


@pytest.mark.parametrize("method", METHODS)
def test_a_denoiser_that_knows_the_sample_leads_to_it_in_one_step_or_many(method):
    truth = jnp.asarray([[0.3, -0.7], [0.1, 0.9]])
    for n in (1, 2, 5):
        x0 = sample(
            Partial(lambda truth, x, sigma: truth, truth),
            jnp.ones((2, 2)),
            np.linspace(3, 0, n + 1),
            keys_of(0, 2),
            method,
            **(dict(last="tweedie") if method == "euler_maruyama" else {}),
        )
        chex.assert_trees_all_close(x0, truth, atol=1e-6)
