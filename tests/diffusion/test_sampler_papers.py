"""Samplers against the papers' algorithms, typed out in NumPy with the same noise."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.samplers import planned, sample

NOISE = np.random.default_rng(1).normal(size=(3, 2))
SIGMAS = np.array([12.0, 5.0, 2.5, 1.1, 0.4, 0.1, 0.0])


def keys_of(seed, n):
    return jax.random.split(jax.random.key(seed), n)


def draws(keys, row, shape=(), dtype=np.float64):
    one = lambda key: jax.random.normal(jax.random.fold_in(key, row), shape, dtype)
    return np.asarray(jax.vmap(one)(keys), np.float64)


def nonlinear(x, s):
    """A denoiser without a meaning, the same for NumPy and JAX."""
    s = s.reshape(s.shape + (1,) * (x.ndim - 1)) if getattr(s, "ndim", 0) else s
    xp = np if isinstance(x, np.ndarray) else jnp
    return xp.tanh(x / (1 + s**2)) + 0.1 * xp.cos(x)


def check(method, reference, sigmas=SIGMAS, start="ve", **options):
    """`sample` in float64 against reference(x, keys, sigmas), which begins at level s."""
    with jax.enable_x64(True):
        keys = keys_of(3, len(NOISE))
        noise = jnp.asarray(NOISE)
        found = sample(nonlinear, noise, sigmas, keys, method, start=start, **options)
        want = reference(lambda row: draws(keys, row, NOISE.shape[1:]))
        np.testing.assert_allclose(np.asarray(found), want, rtol=1e-10, atol=1e-12)


def test_heun_is_algorithm_1_of_karras():
    def reference(draw):
        x = SIGMAS[0] * NOISE
        for s, t in pairwise(SIGMAS):
            d = (x - nonlinear(x, s)) / s
            after = x + (t - s) * d
            if t:
                after = x + (t - s) * (d + (after - nonlinear(after, t)) / t) / 2
            x = after
        return x

    check("heun", reference)
    check("edm", reference)


@pytest.mark.parametrize("s_max", [10.0, 20.0], ids=["below the start", "above the start"])
def test_edm_is_algorithm_2_of_karras(s_max):
    n = len(SIGMAS) - 1
    options = dict(s_churn=1.5, s_min=0.3, s_max=s_max, s_noise=1.01)

    def reference(draw):
        x, evaluations, row = SIGMAS[0] * NOISE, 2 * n - 1, None
        for i, (s, t) in enumerate(pairwise(SIGMAS)):
            gamma = 1.5 / n if 0.3 <= s <= s_max else 0.0
            raised = s + gamma * s
            # The noise of the first step has the row after all others.
            row = evaluations if i == 0 else 2 * i - 1
            x = x + np.sqrt(raised**2 - s**2) * 1.01 * draw(row)
            d = (x - nonlinear(x, raised)) / raised
            after = x + (t - raised) * d
            if t:
                after = x + (t - raised) * (d + (after - nonlinear(after, t)) / t) / 2
            x = after
        return x

    check("edm", reference, **options)


def test_churn_is_capped_at_root_two():
    plan = planned(SIGMAS, "edm", s_churn=1e9)
    np.testing.assert_allclose(plan.sigma[0], 12 * 2**0.5)


def alpha_bar(s):
    return 1 / (1 + s**2)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_is_equation_12_of_song_in_variance_preserving_variables(eta):
    def reference(draw):
        x = NOISE  # x_t of unit variance.
        for row, (s, t) in enumerate(pairwise(SIGMAS)):
            a, b = alpha_bar(s), alpha_bar(t)
            x0 = nonlinear(x / np.sqrt(a), s)
            eps = (x - np.sqrt(a) * x0) / np.sqrt(1 - a)
            c = eta * np.sqrt((1 - b) / (1 - a)) * np.sqrt(1 - a / b)
            x = np.sqrt(b) * x0 + np.sqrt(1 - b - c**2) * eps + c * draw(row)
        return x

    check("ddim", reference, start="vp", eta=eta)


@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_ddpm_is_equation_7_of_ho(variance):
    def reference(draw):
        x = NOISE
        for row, (s, t) in enumerate(pairwise(SIGMAS)):
            a, b = alpha_bar(s), alpha_bar(t)
            beta = 1 - a / b
            x0 = nonlinear(x / np.sqrt(a), s)
            mean = np.sqrt(b) * beta * x0 + np.sqrt(1 - beta) * (1 - b) * x
            spread = dict(posterior=(1 - b) / (1 - a) * beta, beta=beta)[variance]
            x = mean / (1 - a) + np.sqrt(spread) * draw(row) * (t > 0)
        return x

    check("ddpm", reference, start="vp", variance=variance)


PATHS = {  # t(s), alpha, sigma, alpha', sigma' as functions of t.
    "linear": (
        lambda s: s / (1 + s),
        lambda t: 1 - t,
        lambda t: t,
        lambda t: -1.0,
        lambda t: 1.0,
    ),
    "gvp": (
        lambda s: np.arctan(s) * 2 / np.pi,
        lambda t: np.cos(np.pi * t / 2),
        lambda t: np.sin(np.pi * t / 2),
        lambda t: -np.pi / 2 * np.sin(np.pi * t / 2),
        lambda t: np.pi / 2 * np.cos(np.pi * t / 2),
    ),
    "ve": (lambda s: s, lambda t: 1.0, lambda t: t, lambda t: 0.0, lambda t: 1.0),
}


def velocity_and_score(path, x, t):
    _, alpha, sigma, alpha_rate, sigma_rate = PATHS[path]
    x0 = nonlinear(x / alpha(t), sigma(t) / alpha(t))
    eps = (x - alpha(t) * x0) / sigma(t)
    return alpha_rate(t) * x0 + sigma_rate(t) * eps, -eps / sigma(t)


def native_start(path):
    time, alpha, *_ = PATHS[path]
    times = [float(time(s)) for s in SIGMAS]
    return times, SIGMAS[0] * NOISE * alpha(times[0])


@pytest.mark.parametrize("path", PATHS)
def test_native_euler_and_heun_step_in_the_time_of_the_path(path):
    def euler(draw):
        times, x = native_start(path)
        for t, after in pairwise(times):
            x = x + (after - t) * velocity_and_score(path, x, t)[0]
        return x

    def heun(draw):
        times, x = native_start(path)
        for t, after in pairwise(times):
            v = velocity_and_score(path, x, t)[0]
            there = x + (after - t) * v
            if after:
                v = (v + velocity_and_score(path, there, after)[0]) / 2
            x = x + (after - t) * v
        return x

    check("native_euler", euler, path=path)
    check("native_heun", heun, path=path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("diffusion", ["constant", "sigma", "linear"])
@pytest.mark.parametrize("last", ["mean", "tweedie"])
def test_euler_maruyama_steps_along_the_reverse_sde(path, diffusion, last):
    def reference(draw):
        times, x = native_start(path)
        alpha, sigma = PATHS[path][1:3]
        for row, (t, after) in enumerate(pairwise(times)):
            v, score = velocity_and_score(path, x, t)
            w = 0.7 * {"constant": 1.0, "sigma": sigma(t), "linear": t}[diffusion]
            if after == 0 and last == "tweedie":
                return (x + sigma(t) ** 2 * score) / alpha(t)
            x = x + (after - t) * (v - w * score)
            if after:
                x = x + np.sqrt(2 * w * (t - after)) * draw(row)
        return x

    options = dict(path=path, diffusion=diffusion, norm=0.7, last=last)
    check("euler_maruyama", reference, **options)
