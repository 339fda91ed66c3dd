"""Conversions of predictions and losses: round trips, draws, and derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from diffusion import predictions as pr
from diffusion.preconditioning import denoiser, expand, preconditioning
from diffusion.processes import process

PAIRS = [
    (name, target)
    for name in ("ve", "vp", "iddpm", "ddpm", "edm", "fm_linear", "gvp")
    for target in pr.TARGETS
    if not (target == "velocity" and name in ("iddpm", "ddpm"))
]


def draw(seed, shape=(64,)):
    rng = np.random.default_rng(seed)
    return (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(3))


def test_conversions_invert_each_other_for_any_target():
    rng = np.random.default_rng(0)
    x_t, predicted, _ = draw(0)
    alpha, sigma = (jnp.asarray(rng.uniform(0.2, 2, 64), jnp.float32) for _ in range(2))
    a = jnp.asarray(rng.uniform(0.2, 2, 64), jnp.float32)
    b = -jnp.asarray(rng.uniform(0.2, 2, 64), jnp.float32)
    x0 = pr.x0_of(predicted, x_t, alpha, sigma, a, b)
    eps = pr.eps_of(predicted, x_t, alpha, sigma, a, b)
    np.testing.assert_allclose(a * x0 + b * eps, predicted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(alpha * x0 + sigma * eps, x_t, rtol=1e-5, atol=1e-5)
    again = pr.target_of(x0, x_t, alpha, sigma, a, b)
    np.testing.assert_allclose(again, predicted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "target"), PAIRS)
def test_losses_convert_draw_by_draw(name, target):
    with jax.enable_x64(True):
        p = process(name)
        rng = np.random.default_rng(1)
        t = rng.uniform(p.first, p.last, 32) * 0.9 + 0.05 * p.last
        t = jnp.asarray(np.round(t) if p.steps else t)
        x0, eps, noise = (jnp.asarray(rng.normal(size=32)) for _ in range(3))
        alpha, sigma = p.alpha(t), p.sigma(t)
        a, b = pr.coefficients(target, p, t)
        x_t = alpha * x0 + sigma * eps
        truth = a * x0 + b * eps
        predicted = truth + noise
        x0_hat = pr.x0_of(predicted, x_t, alpha, sigma, a, b)
        factor = pr.loss_factor(target, p, t)
        np.testing.assert_allclose(noise**2, factor * (x0_hat - x0) ** 2, rtol=1e-9)
        back = pr.convert_loss(noise**2, p, t, target, "x0")
        np.testing.assert_allclose(back, (x0_hat - x0) ** 2, rtol=1e-9)


@pytest.mark.parametrize("name", ["vp", "ve", "fm_linear", "gvp"])
def test_the_velocity_is_the_derivative_of_the_path(name):
    with jax.enable_x64(True):
        p = process(name)
        x0, eps = 0.7, -1.3
        t = jnp.asarray([0.2, 0.5, 0.8])
        a, b = pr.coefficients("velocity", p, t)
        path = lambda t: p.alpha(t) * x0 + p.sigma(t) * eps
        want = jax.vmap(jax.grad(lambda t: path(t)))(t)
        np.testing.assert_allclose(a * x0 + b * eps, want, rtol=1e-12)


def test_the_score_is_the_derivative_of_the_log_density():
    """Of N(alpha x_0, sigma^2), at a point x_t, for every x_0."""
    p = process("vp")
    t = jnp.asarray([0.3, 0.6])
    a, b = pr.coefficients("score", p, t)
    x0, x_t = jnp.asarray([0.4, -0.2]), jnp.asarray([0.1, 0.9])
    alpha, sigma = p.alpha(t), p.sigma(t)
    log_density = lambda x: jnp.sum(-0.5 * (x - alpha * x0) ** 2 / sigma**2)
    eps = (x_t - alpha * x0) / sigma
    np.testing.assert_allclose(a * x0 + b * eps, jax.grad(log_density)(x_t), rtol=1e-5)


def test_published_factors():
    """The table of section 1.2."""
    with jax.enable_x64(True):
        t = jnp.asarray([0.1, 0.5, 0.9])
        vp, fm, edm = process("vp"), process("fm_linear"), process("edm")
        alpha, sigma = vp.alpha(t), vp.sigma(t)
        of = pr.loss_factor
        np.testing.assert_allclose(of("eps", vp, t), alpha**2 / sigma**2)
        np.testing.assert_allclose(of("score", vp, t), alpha**2 / sigma**4)
        np.testing.assert_allclose(of("v", vp, t), 1 / sigma**2)
        np.testing.assert_allclose(of("velocity", fm, t), 1 / t**2)
        np.testing.assert_allclose(of("F", edm, t), (t**2 + 0.25) / (0.5 * t) ** 2)


def test_the_unit_target_is_of_the_deviation_of_the_data():
    """F = (x_0 - c_skip x) / c_out has unit variance for data of that deviation."""
    with jax.enable_x64(True):
        t, edm = jnp.asarray([0.1, 0.5, 0.9]), process("edm")
        a, b = pr.coefficients("F", edm, t, 1.5)
        np.testing.assert_allclose(1.5**2 * a**2 + b**2, 1, rtol=1e-12)
        want = (t**2 + 1.5**2) / (1.5 * t) ** 2
        np.testing.assert_allclose(pr.loss_factor("F", edm, t, 1.5), want, rtol=1e-12)
        converted = pr.convert_loss(jnp.ones(3), edm, t, "x0", "F", 1.5)
        np.testing.assert_allclose(converted, want, rtol=1e-12)


@pytest.mark.parametrize("name", ["iddpm", "ddpm"])
def test_a_velocity_of_discrete_time_is_refused_before_anything_is_trained(name):
    with pytest.raises(UserError, match=f"process.name is '{name}'.*continuous"):
        preconditioning(process(name), "velocity")


def test_a_time_that_says_nothing_is_named():
    fm = process("fm_linear")
    with pytest.raises(UserError, match="t = 0 "):
        pr.coefficients("score", fm, jnp.asarray([0.5, 0.0]))
    with pytest.raises(UserError, match="target"):
        pr.coefficients("mu", fm, jnp.asarray([0.5]))


@pytest.mark.parametrize(
    ("name", "t"),
    [("fm_linear", 1.5), ("fm_linear", -0.5), ("gvp", 1.2), ("vp", -0.005), ("edm", -1.0)],
)
def test_times_that_a_process_does_not_have_are_named(name, t):
    with pytest.raises(UserError, match=f"At t = {t:g} alpha and sigma of the process {name}"):
        pr.coefficients("eps", process(name), jnp.asarray([0.5, t]))
    with pytest.raises(UserError, match="At t = nan "):
        pr.coefficients("eps", process(name), jnp.asarray([jnp.nan]))


def test_the_end_of_a_path_has_its_velocity():
    """Of gvp, alpha is 0 up to rounding there, of either sign."""
    one = jnp.asarray([1.0])
    for name, want in (("fm_linear", (-1.0, 1.0)), ("gvp", (-np.pi / 2, 0.0))):
        found = pr.coefficients("velocity", process(name), one)
        np.testing.assert_allclose(np.ravel(found), want, atol=1e-6)


def test_losses_convert_in_single_precision():
    rng = np.random.default_rng(3)
    x0, eps, noise = (jnp.asarray(rng.normal(size=256), jnp.float32) for _ in range(3))
    uniform = lambda: jnp.asarray(rng.uniform(0.2, 2, 256), jnp.float32)
    alpha, sigma, a, b = uniform(), uniform(), uniform(), -uniform()
    noise = jnp.sign(noise) + noise  # Far from 0, or the difference is rounding alone.
    predicted = a * x0 + b * eps + noise
    x0_hat = pr.x0_of(predicted, alpha * x0 + sigma * eps, alpha, sigma, a, b)
    error = pr.kappa(alpha, sigma, a, b) * (x0_hat - x0) ** 2
    np.testing.assert_allclose(error, noise**2, rtol=1e-4)


def test_losses_do_not_convert_where_there_is_no_noise():
    fm, t = process("fm_linear"), jnp.asarray([0.5, 0.0])
    with pytest.raises(UserError, match="At t = 0 the error of the target velocity"):
        pr.loss_factor("velocity", fm, t)
    with pytest.raises(UserError, match="At t = 0 "):
        pr.convert_loss(jnp.ones(2), fm, t, "v", "velocity")
    # At the other end only the data are lost: v = -x_0 there, and no loss of eps tells of it.
    one = jnp.asarray([1.0])
    np.testing.assert_allclose(pr.convert_loss(one, fm, one, "x0", "velocity"), 1)
    with pytest.raises(UserError, match="At t = 1 the target eps does not determine x_0"):
        pr.convert_loss(one, fm, one, "eps", "x0")
    # Values are not known while functions are traced, so nothing is refused.
    assert np.isinf(jax.jit(lambda t: pr.loss_factor("velocity", fm, t))(t)[1])


S = np.array([0.002, 0.1, 0.5, 1.0, 3.0, 80.0])


@pytest.mark.parametrize(
    ("name", "target", "skip", "out", "inside", "noise"),
    [
        (
            "vp",
            "eps",
            np.ones_like(S),
            -S,
            1 / np.sqrt(1 + S**2),
            999 * (np.sqrt(0.01 + 39.8 * np.log(1 + S**2)) - 0.1) / 19.9,
        ),
        ("ve", "score", np.ones_like(S), S, np.ones_like(S), np.log(S / 2)),
        (
            "edm",
            "F",
            0.25 / (S**2 + 0.25),
            S * 0.5 / np.sqrt(S**2 + 0.25),
            1 / np.sqrt(S**2 + 0.25),
            np.log(S) / 4,
        ),
        (
            "vp",
            "v",
            1 / (1 + S**2),
            -S / np.sqrt(1 + S**2),
            1 / np.sqrt(1 + S**2),
            999 * (np.sqrt(0.01 + 39.8 * np.log(1 + S**2)) - 0.1) / 19.9,
        ),
        ("fm_linear", "velocity", 1 / (1 + S), -S / (1 + S), 1 / (1 + S), 1000 * S / (1 + S)),
        (
            "edm",
            "x0",
            np.zeros_like(S),
            np.ones_like(S),
            1 / np.sqrt(S**2 + 0.25),
            np.log(S) / 4,
        ),
    ],
)
def test_preconditioning_is_the_table_of_section_1_3(name, target, skip, out, inside, noise):
    with jax.enable_x64(True):
        wrap = preconditioning(process(name), target)
        s = jnp.asarray(S)
        np.testing.assert_allclose(wrap.c_skip(s), skip, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(wrap.c_out(s), out, rtol=1e-9)
        np.testing.assert_allclose(wrap.c_in(s), inside, rtol=1e-9)
        np.testing.assert_allclose(wrap.c_noise(s), noise, rtol=1e-9)


def test_iddpm_noise_is_the_nearest_of_its_times():
    wrap = preconditioning(process("iddpm"), "eps")
    found = np.asarray(wrap.c_noise(jnp.asarray([0.0124, 1.0, 20000.0])))
    assert found[0] < found[1] < found[2] == 999
    assert (found == np.round(found)).all()


def test_v_on_vp_is_edm_with_unit_data_up_to_the_sign():
    s = jnp.asarray(S, jnp.float32)
    v, f = preconditioning(process("vp"), "v"), preconditioning(process("edm"), "F", 1.0)
    np.testing.assert_allclose(v.c_skip(s), f.c_skip(s), rtol=1e-6)
    np.testing.assert_allclose(v.c_out(s), -f.c_out(s), rtol=1e-6)
    np.testing.assert_allclose(v.c_in(s), f.c_in(s), rtol=1e-6)


@pytest.mark.parametrize(("name", "target"), PAIRS)
def test_a_network_that_says_the_truth_denoises(name, target):
    """The wrapped output is the target itself, so the true target gives x_0."""
    with jax.enable_x64(True):
        p = process(name)
        rng = np.random.default_rng(2)
        t = jnp.asarray(rng.uniform(p.first, p.last, 8) * 0.8 + 0.1 * p.last)
        t = jnp.round(t) if p.steps else t
        x0, eps = (jnp.asarray(rng.normal(size=(8, 3))) for _ in range(2))
        s = p.sigma(t) / p.alpha(t)
        a, b = pr.coefficients(target, p, t)
        if (name, target) == ("ve", "score") or target == "score":
            a, b = a, b * p.sigma(t)  # The network's output is scaled by the noise level.
        truth = expand(a, x0) * x0 + expand(b, x0) * eps
        apply = lambda params, x, noise, cond, key: truth
        wrap = preconditioning(p, target)
        got = denoiser(apply, None, wrap)(x0 + expand(s, x0) * eps, s)
        np.testing.assert_allclose(got, x0, rtol=1e-6, atol=1e-8)
        kappa = pr.kappa(p.alpha(t), p.sigma(t), a, b)
        np.testing.assert_allclose(1 / wrap.c_out(s) ** 2, kappa, rtol=1e-6)
