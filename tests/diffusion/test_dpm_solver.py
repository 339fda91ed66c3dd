"""DPM-Solver++: orders on known flows, and the reference's steps typed out in NumPy."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from common.errors import UserError
from diffusion.dpm_solver import interpolated, orders
from diffusion.processes import ddpm_levels
from diffusion.samplers import planned, sample

FIRST, LAST = 20.0, 0.05


def two_points(x, sigma):
    """The exact denoiser of +-0.7 in one dimension."""
    s = sigma.reshape(sigma.shape + (1,) * (x.ndim - 1)) if getattr(sigma, "ndim", 0) else sigma
    xp = np if isinstance(x, np.ndarray | float) else jnp
    return 0.7 * xp.tanh(0.7 * x / s**2)


def gaussian(x, sigma):
    s = sigma.reshape(sigma.shape + (1,) * (x.ndim - 1)) if getattr(sigma, "ndim", 0) else sigma
    return 0.25 * x / (0.25 + s**2)


STARTS = np.array([[-1.1], [0.4], [0.02]])


def flow(denoiser):
    """Endpoints of dx / d log s = x - D, to about 1e-12."""
    slope = lambda u, x: x - denoiser(x, np.exp(u))
    ends = [
        solve_ivp(slope, np.log([FIRST, LAST]), FIRST * x, rtol=1e-12, atol=1e-13).y[:, -1]
        for x in STARTS
    ]
    return np.array(ends)


def grid(n):
    """Steps of log s that grow smoothly to three times their first size."""
    u = np.linspace(0, 1, n + 1)
    return FIRST * (LAST / FIRST) ** ((u + u**2) / 2)


def errors(denoiser, method, sizes, **options):
    with jax.enable_x64(True):
        found = [
            np.asarray(
                sample(
                    denoiser,
                    jnp.asarray(STARTS),
                    grid(n),
                    method=method,
                    **options,
                )
            )
            for n in sizes
        ]
    return np.array([np.abs(x - flow(denoiser)).max() for x in found])


def test_the_flow_of_gaussian_data_is_the_closed_form():
    want = FIRST * STARTS * np.sqrt((0.25 + LAST**2) / (0.25 + FIRST**2))
    np.testing.assert_allclose(flow(gaussian), want, rtol=1e-9)


@pytest.mark.parametrize("denoiser", [gaussian, two_points])
@pytest.mark.parametrize(
    ("method", "options", "order"),
    [
        ("dpm_2m", {}, 2),
        ("dpm_2m", dict(lower_order_final=False), 2),
        ("dpm_3s", dict(inner="grid"), 3),
        ("dpm_3s", dict(inner="log"), 3),
    ],
)
def test_the_order_of_convergence_is_that_of_the_method(denoiser, method, options, order):
    # 3 k + 2 evaluations: as many steps of order 3 as possible.
    found = errors(denoiser, method, (386, 770, 1538), **options)
    measured = np.log2(found[:-1] / found[1:])
    assert (np.abs(measured - order) < 0.2).all(), (measured, found)
    assert found[-1] < 10.0 ** (-2 - order)


def reference_step(x, s, inner, t, evaluate):
    """One step in x_t, alpha, sigma and lambda, as the reference writes it."""
    alpha = lambda s: 1 / np.sqrt(1 + s**2)
    sigma = lambda s: s / np.sqrt(1 + s**2)
    model = lambda x, s: evaluate(x / alpha(s), s)
    h = np.log(s) - np.log(t)
    of_s = model(x, s)
    plain = lambda u, e: sigma(u) / sigma(s) * x - alpha(u) * e * of_s
    if not inner:
        return plain(t, np.expm1(-h))
    r1 = (np.log(s) - np.log(inner[0])) / h
    of_1 = model(plain(inner[0], np.expm1(-r1 * h)), inner[0])
    if len(inner) == 1:
        e = np.expm1(-h)
        return plain(t, e) - 0.5 / r1 * alpha(t) * e * (of_1 - of_s)
    r2 = (np.log(s) - np.log(inner[1])) / h
    phi_22 = np.expm1(-r2 * h) / (r2 * h) + 1
    at_2 = plain(inner[1], np.expm1(-r2 * h))
    at_2 = at_2 + r2 / r1 * alpha(inner[1]) * phi_22 * (of_1 - of_s)
    of_2 = model(at_2, inner[1])
    phi_2 = np.expm1(-h) / h + 1
    return plain(t, np.expm1(-h)) + 1 / r2 * alpha(t) * phi_2 * (of_2 - of_s)


@pytest.mark.parametrize("n", [1, 2, 3, 6, 7, 8])
@pytest.mark.parametrize("inner", ["grid", "log"])
def test_single_steps_are_those_of_the_reference(n, inner):
    sigmas = np.linspace(9, 0.3, n + 1) ** 1.5 / 3
    split = {1: [1], 2: [2], 3: [2, 1], 6: [3, 2, 1], 7: [3, 3, 1], 8: [3, 3, 2]}[n]
    x, at = STARTS, 0
    for order in split:
        s, t = sigmas[at], sigmas[at + order]
        points = list(sigmas[at + 1 : at + order])
        if inner == "log":
            fractions = {1: [], 2: [1 / 2], 3: [1 / 3, 2 / 3]}[order]
            points = [np.exp((1 - r) * np.log(s) + r * np.log(t)) for r in fractions]
        x, at = reference_step(x, s, points, t, two_points), at + order
    want = x * np.sqrt(1 + sigmas[-1] ** 2)
    with jax.enable_x64(True):
        options = dict(method="dpm_3s", start="vp", inner=inner)
        found = sample(two_points, jnp.asarray(STARTS), sigmas, **options)
    np.testing.assert_allclose(np.asarray(found), want, rtol=1e-11)


@pytest.mark.parametrize("lower", [True, False])
def test_multistep_is_algorithm_2_of_lu(lower):
    sigmas = np.array([9.0, 5.0, 2.0, 1.0, 0.3, 0.1])
    x, before, last = STARTS * 9, None, None
    for i, (s, t) in enumerate(pairwise(sigmas)):
        d, h = two_points(x, s), np.log(s / t)
        mixed = d
        if last is not None and not (lower and i == 4):
            r = before / h
            mixed = (1 + 1 / (2 * r)) * d - 1 / (2 * r) * last
        x = t / s * x - np.expm1(-h) * mixed
        before, last = h, d
    with jax.enable_x64(True):
        found = sample(
            two_points, jnp.asarray(STARTS), sigmas, method="dpm_2m", lower_order_final=lower
        )
    np.testing.assert_allclose(np.asarray(found), x, rtol=1e-12)


def test_evaluations_are_split_into_orders_as_in_the_reference():
    assert orders(50) == [3] * 16 + [2]
    assert orders(9) == [3, 3, 2, 1]
    assert orders(7) == [3, 3, 1]
    assert [orders(n) for n in range(4)] == [[], [1], [2], [2, 1]]
    for n in range(4, 60):
        assert sum(orders(n)) == n
        assert orders(n)[-1] < 3


@pytest.mark.parametrize("n", [1, 2, 7, 51])
def test_a_grid_to_zero_ends_with_the_denoiser_and_as_many_evaluations(n):
    plan = planned(np.linspace(3, 0, n + 1), "dpm_3s")
    assert len(plan.sigma) == n
    np.testing.assert_array_equal(plan.form[-1], [0, 1, 0, 0, 0])
    assert plan.sigma[-1] == pytest.approx(3 / n)


def test_the_released_generator_of_ultrasound_images_has_this_grid():
    """T = 500, betas from 1e-4 to 0.028, 50 evaluations."""
    levels = ddpm_levels(500, 1e-4, 0.028)
    bar = 1 / (1 + levels**2)
    np.testing.assert_allclose(bar[[0, 249, 499]], [0.9999, 0.170, 8.3e-4], rtol=5e-3)
    found = interpolated(levels, 50)
    assert len(found) == 51
    assert (np.diff(found) < 0).all()
    np.testing.assert_allclose(found[[0, -1]], levels[[-1, 0]], rtol=1e-12)
    log_alpha = 0.5 * np.cumsum(np.log(1 - np.linspace(1e-4, 0.028, 500)))
    times = 500 * np.linspace(1, 1 / 500, 51)
    below = np.floor(times).astype(int)
    share = times - below
    above = np.minimum(below, 499)
    want = (1 - share) * log_alpha[below - 1] + share * log_alpha[above]
    np.testing.assert_allclose(-0.5 * np.log1p(found**2), want, rtol=1e-10)
    assert len(planned(found, "dpm_3s", start="vp").sigma) == 50


def test_as_many_steps_as_there_are_intervals_take_every_level():
    levels = ddpm_levels(40, 1e-3, 0.2)
    np.testing.assert_allclose(interpolated(levels, 39), levels[::-1], rtol=1e-9)


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: interpolated(np.array([0.1, 1.0]), 0), r"sampler\.n"),
        (lambda: interpolated(np.array([0.1]), 4), r"process\.steps"),
    ],
)
def test_what_is_no_grid_is_refused(call, field):
    with pytest.raises(UserError, match=rf"config\.{field} is"):
        call()
