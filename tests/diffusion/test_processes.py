"""Processes: table of section 1.1 against formulas written anew in NumPy float64."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from diffusion.processes import ddpm_levels, iddpm_levels, process, rates, ratio

NAMES = ("ve", "vp", "iddpm", "ddpm", "edm", "fm_linear", "gvp")


def times(p, n=50):
    inner = np.linspace(p.first, p.last, n + 2)[1:-1]
    return np.round(inner) if p.steps else inner


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("ve", lambda t: 0.02 * 5000**t),
        ("vp", lambda t: np.sqrt(np.exp(9.95 * t**2 + 0.1 * t) - 1)),
        ("edm", lambda t: t),
        ("fm_linear", lambda t: t / (1 - t)),
        ("gvp", lambda t: np.tan(np.pi * t / 2)),
    ],
)
def test_ratio_of_noise_to_signal(name, want):
    with jax.enable_x64(True):
        p = process(name)
        t = times(p)
        np.testing.assert_allclose(ratio(p, jnp.asarray(t)), want(t), rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_time_and_scale_are_functions_of_the_ratio(name):
    with jax.enable_x64(True):
        p = process(name)
        t = jnp.asarray(times(p))
        s = p.sigma(t) / p.alpha(t)
        np.testing.assert_allclose(p.time(s), t, rtol=1e-9)
        np.testing.assert_allclose(p.scale(s), p.alpha(t), rtol=1e-12)


@pytest.mark.parametrize("name", ["vp", "iddpm", "ddpm", "gvp"])
def test_variance_is_preserved(name):
    p = process(name)
    t = jnp.asarray(times(p), jnp.float32)
    np.testing.assert_allclose(p.alpha(t) ** 2 + p.sigma(t) ** 2, 1, rtol=3e-6)


@pytest.mark.parametrize("name", NAMES)
def test_float32_is_good_from_end_to_end(name):
    p = process(name)
    ends = np.array([p.first, p.last])
    single = np.asarray(ratio(p, jnp.asarray(ends, jnp.float32)))
    with jax.enable_x64(True):
        double = np.asarray(ratio(p, jnp.asarray(ends)))
    np.testing.assert_allclose(single, double, rtol=5e-3)
    assert (single > 0).all()
    assert np.isfinite(single).all()


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("ve", 0.02, 100.0),
        ("edm", 0.02, 100.0),
        ("vp", np.sqrt(np.expm1(9.95e-10 + 1e-6)), np.sqrt(np.expm1(10.05))),
        ("fm_linear", 1e-5 / 0.99999, 99_999.0),
        ("gvp", np.tan(np.pi / 2 * 1e-5), 1 / np.tan(np.pi / 2 * 1e-5)),
    ],
)
def test_levels_go_from_end_to_end_as_documented(name, first, last):
    with jax.enable_x64(True):
        p = process(name)
        found = ratio(p, jnp.asarray([p.first, p.last]))
        np.testing.assert_allclose(found, [first, last], rtol=1e-9)


def test_beta_min_may_be_zero():
    with jax.enable_x64(True):
        p, t = process("vp", beta_min=0.0), jnp.asarray([0.1, 1.0])
        s = ratio(p, t)
        np.testing.assert_allclose(s, np.sqrt(np.expm1(9.95 * np.array([0.01, 1.0]))))
        np.testing.assert_allclose(p.time(s), t)


def test_vp_has_the_published_schedule():
    p = process("vp")
    assert float(ratio(p, jnp.float32(1.0))) == pytest.approx(
        np.sqrt(np.exp(10.05) - 1), rel=1e-5
    )


def test_iddpm_levels_are_those_of_the_cosine():
    u = iddpm_levels()
    assert len(u) == 1001
    assert u[-1] == 0
    assert (np.diff(u) < 0).all()
    # Without the floor of C1 the recursion is the cosine itself.
    bar = np.sin(0.5 * np.pi * np.arange(1001) / (1000 * 1.008)) ** 2
    j = np.arange(200, 1000)
    np.testing.assert_allclose(u[j], np.sqrt(bar[1000] / bar[j] - 1), rtol=1e-9)


def test_ddpm_levels_of_busgen():
    s = ddpm_levels(500, 1e-4, 0.028)
    bar = 1 / (1 + s**2)
    np.testing.assert_allclose(bar[[0, 249, 499]], [0.9999, 0.170, 8.3e-4], rtol=3e-2)


@pytest.mark.parametrize("name", ["fm_linear", "gvp", "vp", "ve", "edm"])
def test_rates_are_derivatives(name):
    with jax.enable_x64(True):
        p, h = process(name), 1e-6
        t = jnp.asarray(times(p, 9))
        for rate, f in zip(rates(p, t), (p.alpha, p.sigma), strict=True):
            np.testing.assert_allclose(
                rate, (f(t + h) - f(t - h)) / (2 * h), rtol=1e-5, atol=1e-9
            )


@pytest.mark.parametrize(
    ("name", "t", "said", "want"),
    [
        ("fm_linear", [0.5, 1.0, 1.0], "fm_linear of 3 were clipped: 2 to 0.99999", 99_999),
        ("fm_linear", [0.0, 1.0], "of 2 were clipped: 1 to 1e-05 and 1 to 0.99999", 99_999),
        ("vp", [0.0], "vp of 1 were clipped: 1 to 1e-05", np.sqrt(np.expm1(1.00995e-6))),
        ("ve", [1.5], "ve of 1 were clipped: 1 to 1", 100.0),
        ("ddpm", [1000.0], "1 to 999", None),
    ],
)
def test_times_beyond_the_ends_are_taken_as_the_ends_and_it_is_said(name, t, said, want):
    p = process(name)
    with pytest.warns(UserWarning, match="clipped") as seen:
        found = np.asarray(ratio(p, jnp.asarray(t, jnp.float32)))
    assert len(seen) == 1
    assert said in str(seen[0].message)
    if want is not None:
        np.testing.assert_allclose(found[-1], want, rtol=5e-3)
    assert np.isfinite(found).all()
    assert (found > 0).all()


def test_nothing_is_said_of_times_within_nor_under_jit():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in NAMES:
            p = process(name)
            for kind in (jnp.float32, jnp.float16):
                ratio(p, jnp.asarray([p.first, p.last], kind))
        p = process("fm_linear")
        beyond = jnp.asarray([-1.0, 2.0])
        found = jax.jit(lambda t: ratio(p, t))(beyond)
        mapped = jax.vmap(lambda t: ratio(p, t))(beyond)
    for each in (found, mapped):
        np.testing.assert_allclose(each, [1e-5, 99_999], rtol=5e-3)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (dict(name="wp"), "process.name"),
        (dict(name="vp", beta_d=0.0), "process.beta_d"),
        (dict(name="vp", beta_min=-1.0), "process.beta_min"),
        (dict(name="ve", sigma_max=0.01), "process.sigma_max"),
        (dict(name="ddpm", steps=1), "process.steps"),
        (dict(name="ddpm", beta_last=1.0), "process.beta_last"),
    ],
)
def test_what_cannot_be_is_named(given, named):
    with pytest.raises(UserError, match=named):
        process(**given)


def test_a_discrete_process_has_no_velocity():
    with pytest.raises(UserError, match="continuous"):
        rates(process("ddpm"), jnp.ones(1))
