"""Loss, floor and gap of denoisers that are known: optimal, linear, shifted, broken."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import mesh as meshes
from common.errors import UserError
from diffusion import diagnosis as dg
from diffusion import draws
from diffusion.optimal_denoiser import optimal_denoiser
from diffusion.rows import rows
from tests.diffusion.digits import brute, digits, noise

KEY = jax.random.key(5)
LEVELS = [0.2, 0.6, 1.0, 4.0, 40.0]


def shifted(params, condition):
    """Off by a constant from c_skip x."""
    del condition
    return lambda x, s: x / (1 + s.reshape(-1, 1, 1, 1) ** 2) + params


def measured(of_condition, params, **given):
    given = dict(shape=(8, 8, 1), num_draws=512, block=128) | given
    data = given.pop("data", None) or rows(np.float32(digits()), tile=600)
    return dg.diagnose(data, of_condition, params, LEVELS, KEY, **given)


def test_the_optimal_denoiser_has_no_gap():
    """Its loss is the floor up to noise, and its distance from the optimum is nothing."""
    data = rows(np.float32(digits()), tile=600)
    found = measured(lambda params, condition: optimal_denoiser(params), data, data=data)
    np.testing.assert_allclose(found.distance, 0, atol=1e-9)
    assert (np.abs(found.gap) <= 3 * found.gap_err + 1e-9).all()
    np.testing.assert_allclose(found.loss - found.floor, found.gap, atol=1e-7)


def test_the_gap_is_found_in_two_ways_that_agree():
    """Check 14: loss minus optimum, and E |D - D*|^2."""
    found = measured(shifted, jnp.float32(0.1), num_draws=1797)
    bar = 3 * np.hypot(found.gap_err, found.distance_err)
    assert (np.abs(found.gap - found.distance) <= bar).all()
    assert (found.distance > 0).all()
    assert (found.gap >= -2 * found.gap_err).all()


def test_losses_are_those_of_the_draws():
    """All fields against brute force in float64 on the same draws."""
    found = measured(shifted, jnp.float32(0.2), num_draws=128)
    part = draws.block(0, 128, 1797, 0)
    eps = noise(KEY, part.number, 64)
    x0 = digits()[part.index]
    for i, s in enumerate(LEVELS):
        out = (x0 + s * eps) / (1 + s**2) + 0.2
        loss = ((out - x0) ** 2).mean(1)
        floor = brute(digits(), part.index, eps, s) / 64
        assert found.loss[i] == pytest.approx(loss.mean(), rel=1e-5)
        assert found.loss_err[i] == pytest.approx(loss.std(ddof=1) / 128**0.5, rel=1e-4)
        assert found.floor[i] == pytest.approx(floor.mean(), rel=1e-3, abs=1e-9)
        gap = loss - floor
        assert found.gap_err[i] == pytest.approx(gap.std(ddof=1) / 128**0.5, rel=1e-3)


def test_eight_devices_equal_one():
    one = measured(shifted, jnp.float32(0.1))
    mesh = meshes.make()
    with jax.set_mesh(mesh):
        data = rows(np.float32(digits()), tile=600, mesh=mesh)
        eight = measured(shifted, jnp.float32(0.1), data=data)
    for name in ("loss", "floor", "gap", "distance"):
        a, b = getattr(eight, name), getattr(one, name)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def test_a_class_is_told_and_its_rows_alone_are_the_floor():
    labels = np.arange(1797) % 5
    data = rows(np.float32(digits()), tile=600, labels=labels)
    told = lambda params, condition: optimal_denoiser(params, condition["label"])
    found = measured(told, data, data=data, labels=labels)
    np.testing.assert_allclose(found.distance, 0, atol=1e-9)
    plain = measured(shifted, jnp.float32(0.0))
    assert (found.floor <= plain.floor + 1e-9).all()
    assert found.floor[2] < 0.9 * plain.floor[2]


def test_a_loss_below_the_optimum_is_refused():
    """As of a model that knows the rows it is asked about."""
    found = measured(shifted, jnp.float32(0.1))
    dg.check(found)
    below = found._replace(gap=found.gap - 2 * found.gap - 10 * found.gap_err)
    with pytest.raises(UserError, match="below the optimum"):
        dg.check(below)


def test_few_draws_do_not_accuse_the_optimal_denoiser():
    """As a user asks for them to be quick: 32 levels, any of which might."""
    data = rows(np.float32(digits()), tile=600)
    optimal = lambda params, condition: optimal_denoiser(params)
    accused = 0
    for num_draws in (2, 3, 5):
        for seed in range(20):
            found = dg.diagnose(
                data,
                optimal,
                data,
                np.geomspace(0.002, 80, 32),
                jax.random.key(seed),
                shape=(8, 8, 1),
                num_draws=num_draws,
                seed=seed,
            )
            dg.check(found)
            accused += (found.gap + 5 * found.gap_err < -1e-9).any()
    assert accused >= 10  # By five standard errors, whatever the number of draws.


def test_a_model_that_knows_the_rows_is_refused_where_draws_are_many():
    """It returns what the noise was added to."""
    for num_draws in (2, 512):
        rows_ = jnp.float32(digits()[draws.block(0, num_draws, 1797, 0).index])
        told = lambda params, condition: lambda x, s: params.reshape(x.shape)
        found = measured(told, rows_, num_draws=num_draws, block=512)
        np.testing.assert_allclose(found.loss, 0, atol=1e-9)
        if num_draws == 2:
            dg.check(found)
        else:
            with pytest.raises(UserError, match="below the optimum"):
                dg.check(found)


@pytest.mark.parametrize("num_draws", [2, 3, 100_000])
def test_the_bar_is_that_of_student(num_draws):
    """Of 1 and 2 degrees of freedom by their closed forms; of many, five."""
    beyond = 0.5 * math.erfc(5 / 2**0.5)
    errors = {
        2: math.tan(math.pi * (0.5 - beyond)),
        3: (1 - 2 * beyond) / math.sqrt(2 * beyond * (1 - beyond)),
    }.get(num_draws, 5.0)
    one = np.ones(1)
    fields = dict.fromkeys(dg.Diagnosis._fields, one) | dict(draws=np.array(num_draws))
    found = dg.Diagnosis(**fields)
    dg.check(found._replace(gap=-0.999 * errors * one))
    with pytest.raises(UserError, match=f"more than {errors:.3g}".replace("+", r"\+")):
        dg.check(found._replace(gap=-1.001 * errors * one))


@pytest.mark.parametrize("devices", [1, 8])
def test_levels_in_groups_are_all_levels(devices, monkeypatch):
    """Five levels in groups of two, by one program."""
    mesh = meshes.make(data=devices)
    with jax.set_mesh(mesh):
        data = rows(np.float32(digits()), tile=600, mesh=mesh if devices > 1 else None)
        want = measured(shifted, jnp.float32(0.1), data=data)
        monkeypatch.setattr(draws, "HELD", 2 * 128 * 64 * 4)
        before = dg.optimum._cache_size(), dg._errors._cache_size()
        got = measured(shifted, jnp.float32(0.1), data=data)
        after = dg.optimum._cache_size(), dg._errors._cache_size()
    assert after == (before[0] + 1, before[1] + 1)
    assert int(got.draws) == int(want.draws) == 512
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)


def test_what_a_diagnosis_of_large_images_holds_is_limited(monkeypatch):
    """Its groups, told by what the optimum is asked for: 5 x 256 x (256 x 256 x 3)."""
    asked = []

    def optimum(data, part, key, sigmas, label, precision):
        asked.append(len(sigmas))
        batch = len(part.index)
        return dg.Optimum(*(np.zeros((len(sigmas), batch)) for _ in dg.Optimum._fields))

    def errors(of_condition, params, best, label, sigmas, shape):
        return np.stack([np.outer(np.asarray(sigmas), np.ones(best.floor.shape[1]))] * 3)

    monkeypatch.setattr(dg, "optimum", optimum)
    monkeypatch.setattr(dg, "_errors", errors)
    levels = np.geomspace(0.002, 80, 32)
    data = rows(np.zeros((2, 256 * 256 * 3), np.float32) + np.eye(2, 256 * 256 * 3))
    found = dg.diagnose(
        data, shifted, (), levels, KEY, shape=(256, 256, 3), num_draws=512, block=256
    )
    assert set(asked) == {5}
    assert asked[0] * 256 * 256 * 256 * 3 * 4 <= 2**30
    np.testing.assert_allclose(found.loss, levels, rtol=1e-6)


def test_a_denoiser_without_numbers_is_named():
    broken = lambda params, condition: lambda x, s: jnp.where(s[0] > 3, jnp.nan, x)
    with pytest.raises(UserError, match="sigma = 4"):
        measured(broken, ())


def test_totals_and_bands():
    found = measured(shifted, jnp.float32(0.1))
    flat = dg.total(found, lambda s: s**0, lambda s: s**0, ["loss"])["loss"]
    x = np.log(LEVELS)
    assert flat == pytest.approx(np.trapezoid(found.loss, x) / (x[-1] - x[0]))
    middle, gap, error = dg.bands(found, 2)
    assert len(middle) == 2
    cut = np.sqrt(0.2 * 40)
    low = np.array(LEVELS) < cut
    assert gap[0] == pytest.approx(found.gap[low].mean())
    assert error[1] == pytest.approx(found.gap_err[~low].mean())


def test_errors_of_bands_hold_what_levels_with_common_draws_do():
    """All levels share one error: a mean over them is off by as much, not by less."""
    s = np.geomspace(0.01, 10, 16)
    one, zero = np.ones(16), np.zeros(16)
    fields = dict.fromkeys(dg.Diagnosis._fields, zero)
    fields |= dict(sigmas=s, gap=one, gap_err=np.repeat([0.1, 0.3], 8), draws=np.array(9))
    _, gap, error = dg.bands(dg.Diagnosis(**fields), 2)
    np.testing.assert_allclose(gap, [1, 1])
    np.testing.assert_allclose(error, [0.1, 0.3])
