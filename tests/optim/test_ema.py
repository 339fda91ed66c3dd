"""Averages of parameters: schedules, profiles, and averages made afterwards."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from optim import ema

STEPS = 300


def path(n=STEPS, seed=0):
    """Parameters [n, 3] that drift and jitter."""
    rng = np.random.default_rng(seed)
    t = np.arange(1, n + 1)[:, None] / n
    return np.concatenate([np.sin(5 * t), t**2, 1 - t], axis=1) + 0.1 * rng.normal(size=(n, 3))


def tracked(thetas, schedules, every=None):
    """The last averages, or those after each `every` steps [n, schedules, 3]."""

    @jax.jit
    def go(thetas):
        def body(averages, theta):
            averages = ema.update(averages, {"w": theta}, schedules)
            return averages, jnp.stack([tree["w"] for tree in averages.trees])

        return jax.lax.scan(body, ema.init({"w": jnp.zeros(3)}, schedules), thetas)

    last, all_of_them = go(jnp.asarray(thetas, jnp.float32))
    return last if every is None else np.asarray(all_of_them)[every - 1 :: every]


def rates(schedule, n):
    return np.asarray(jax.vmap(schedule)(jnp.arange(1, n + 1)), np.float64)


def brute(rates, thetas, start=0.0):
    """sum_tau rate_tau prod_{later} (1 - rate) theta_tau, weight by weight."""
    left = np.cumprod((1 - rates)[::-1])[::-1]
    weight = rates * np.append(left[1:], 1.0)
    return weight @ thetas + left[0] * start


@pytest.mark.parametrize(
    "schedule",
    [ema.plain(0.97), ema.half_life(800.0, 10), ema.power(0.05), ema.power(0.25)],
    ids=["plain", "half_life", "power 0.05", "power 0.25"],
)
def test_an_average_is_the_weighted_sum_of_all_parameters(schedule):
    thetas = path()
    found = tracked(thetas, (schedule,)).trees[0]["w"]
    np.testing.assert_allclose(found, brute(rates(schedule, STEPS), thetas), atol=2e-6)


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.972), (0.10, 6.937)])
def test_relative_widths_have_the_published_exponents(sigma_rel, gamma):
    found = ema.gamma_of(sigma_rel)
    assert found == pytest.approx(gamma, abs=1e-3)
    assert ema.sigma_rel_of(found) == pytest.approx(sigma_rel, rel=1e-9)


@pytest.mark.parametrize("sigma_rel", [1e-3, 0.02, 0.2, 12**-0.5])
def test_exponents_and_widths_are_inverse(sigma_rel):
    gamma = ema.gamma_of(sigma_rel)
    assert gamma > -1e-9
    assert ema.sigma_rel_of(gamma) == pytest.approx(sigma_rel, rel=1e-9)


def test_the_width_is_the_standard_deviation_of_the_profile():
    gamma, tau = ema.gamma_of(0.12), (np.arange(100_000) + 0.5) / 100_000
    p = (gamma + 1) * tau**gamma
    mean = np.mean(p * tau)
    assert np.sqrt(np.mean(p * (tau - mean) ** 2)) == pytest.approx(0.12, rel=1e-6)


def test_power_weights_are_the_power_function_and_ignore_the_start():
    """prod (1 - 1/u)^(g+1) over u = tau+1 ... t is (tau / t)^(g+1)."""
    schedule, t = ema.power(0.1), 200
    gamma, r = ema.gamma_of(0.1), rates(ema.power(0.1), t)
    assert r[0] == 1
    tau = np.arange(1, t + 1)
    left = np.append(np.cumprod((1 - r)[::-1])[::-1][1:], 1.0)
    want = (tau / t) ** (gamma + 1) - ((tau - 1) / t) ** (gamma + 1)
    np.testing.assert_allclose(r * left, want, atol=1e-6)
    start = ema.init({"w": jnp.full(3, 1e6)}, (schedule,))
    after = ema.update(start, {"w": jnp.ones(3)}, (schedule,))
    np.testing.assert_array_equal(after.trees[0]["w"], np.ones(3))


def test_late_rates_keep_their_precision_in_float32():
    gamma = ema.gamma_of(0.05)
    found = float(ema.power(0.05)(jnp.asarray(3_000_000)))
    want = -np.expm1((gamma + 1) * np.log1p(-1 / 3e6))
    assert found == pytest.approx(want, rel=1e-5)


def test_the_half_life_ramps_up_with_the_images_seen():
    """h = min(half-life, 0.05 images seen); half of the weight is gone after h images."""
    found = rates(ema.half_life(1000.0, 100, 0.05), 400)
    seen = 100 * np.arange(400)
    with np.errstate(divide="ignore"):
        want = 1 - 0.5 ** (100 / np.minimum(1000, 0.05 * seen))
    np.testing.assert_allclose(found, want, rtol=1e-5)
    assert found[0] == 1
    constant = rates(ema.half_life(1000.0, 100, None), 10)
    np.testing.assert_allclose(np.prod(1 - constant), 0.5, rtol=1e-6)


def test_averages_are_float32_and_own_their_memory():
    params = {"a": jnp.ones((2, 2), jnp.bfloat16), "b": jnp.zeros(3)}
    schedules = (ema.plain(0.5), ema.power(0.1))
    averages = ema.init(params, schedules)
    give_away = jax.jit(lambda p: jax.tree.map(lambda a: a + 1, p), donate_argnums=0)
    params = give_away(params)
    averages = jax.jit(lambda a, p: ema.update(a, p, schedules))(averages, params)
    assert int(averages.step) == 1
    for tree, a, b in zip(averages.trees, (1.5, 2.0), (0.5, 1.0), strict=True):
        chex.assert_trees_all_equal(tree, {"a": np.full((2, 2), a), "b": np.full(3, b)})
    assert {leaf.dtype for leaf in jax.tree.leaves(averages.trees)} == {jnp.dtype("float32")}


def test_an_average_made_afterwards_is_the_one_tracked_all_along():
    widths, every = (0.05, 0.10), 75
    schedules = tuple(ema.power(width) for width in widths)
    thetas = path(1200)
    saved = tracked(thetas, schedules, every=every)  # [16, 2, 3]
    times = np.repeat(np.arange(every, 1201, every), 2).astype(np.float64)
    gammas = np.tile([ema.gamma_of(width) for width in widths], len(saved))
    trees = [{"w": jnp.asarray(row)} for row in saved.reshape(-1, 3)]
    for width, time in ((0.05, 1200), (0.08, 1200), (0.15, 1200), (0.12, 900)):
        chosen = times <= time
        factors = ema.weights(times[chosen], gammas[chosen], float(time), ema.gamma_of(width))
        assert factors.sum() == pytest.approx(1, abs=1e-12)
        found = ema.combined(factors, [t for t, c in zip(trees, chosen, strict=True) if c])
        want = tracked(thetas[:time], (ema.power(width),)).trees[0]
        chex.assert_trees_all_close(found, want, atol=5e-3)
        # Far nearer than what it was made of.
        others = np.abs(saved[time // every - 1] - np.asarray(want["w"])).max(axis=1)
        error = np.abs(np.asarray(found["w"] - want["w"])).max()
        assert width in widths or error < 0.3 * others.min()


def test_a_saved_average_is_reconstructed_from_itself():
    times, gammas = np.array([50.0, 100.0, 100.0]), np.array([7.0, 7.0, 17.0])
    np.testing.assert_allclose(ema.weights(times, gammas, 100.0, 7.0), [0, 1, 0], atol=1e-9)


def test_inner_products_of_profiles_are_their_integrals():
    """Weights solve the normal equations of a fine grid's least squares."""
    times, gammas = np.array([40.0, 70.0, 100.0]), np.array([3.0, 12.0, 6.0])
    tau = (np.arange(200_000) + 0.5) / 2000
    profile = lambda t, g: np.where(tau < t, (g + 1) * tau**g / t ** (g + 1), 0.0)
    rows = np.stack([profile(t, g) for t, g in zip(times, gammas, strict=True)], axis=1)
    want = np.linalg.lstsq(rows, profile(90.0, 9.0), rcond=None)[0]
    found = ema.weights(times, gammas, 90.0, 9.0)
    np.testing.assert_allclose(found, want / want.sum(), atol=1e-5)


def test_the_mismatch_of_a_profile_is_its_distance_on_a_fine_grid():
    times, gammas = np.array([40.0, 70.0, 100.0]), np.array([3.0, 12.0, 6.0])
    tau = (np.arange(200_000) + 0.5) / 2000
    profile = lambda t, g: np.where(tau < t, (g + 1) * tau**g / t ** (g + 1), 0.0)
    rows = np.stack([profile(t, g) for t, g in zip(times, gammas, strict=True)], axis=1)
    want = profile(90.0, 9.0)
    for factors in (ema.weights(times, gammas, 90.0, 9.0), np.array([0.0, 0.5, 0.5])):
        found = ema.mismatch(factors, times, gammas, 90.0, 9.0)
        off = np.linalg.norm(rows @ factors - want) / np.linalg.norm(want)
        assert found == pytest.approx(off, rel=1e-3)
    one = np.array([0.0, 0.0, 1.0])
    assert ema.mismatch(one, times, gammas, 100.0, 6.0) < 1e-7


def test_long_runs_and_narrow_profiles_do_not_overflow():
    times = np.linspace(1e8, 2e9, 40)
    found = ema.weights(times, np.full(40, 400.0), 2e9, 100.0)
    assert np.isfinite(found).all()


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: ema.plain(1.0), "decay"),
        (lambda: ema.plain(float("nan")), "decay"),
        (lambda: ema.half_life(0.0, 10), "half_life"),
        (lambda: ema.half_life(10.0, 10, -1.0), "ramp"),
        (lambda: ema.half_life(10.0, 0), "batch"),
        (lambda: ema.power(0.0), "sigma_rel"),
        (lambda: ema.power(0.5), "sigma_rel"),
        (lambda: ema.weights(np.array([]), np.array([]), 1.0, 1.0), "snapshots"),
        (lambda: ema.weights(np.array([0.0]), np.array([1.0]), 1.0, 1.0), "snapshots"),
        (lambda: ema.weights(np.array([1.0]), np.array([1.0]), 2.0, 1.0), "time"),
        (lambda: ema.weights(np.array([1.0]), np.array([1.0]), 1.0, -1.0), "gamma"),
    ],
)
def test_what_makes_no_sense_is_refused_by_its_field(call, field):
    with pytest.raises(UserError, match=rf"config\.ema\.{field} is"):
        call()
