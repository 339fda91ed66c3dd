"""Curves: identities of section 2.3, interpolation, sigma_star, files."""

import jax
import numpy as np
import pytest

from common.errors import UserError
from diffusion import curve as cv
from diffusion.estimators import OptimalLoss, estimate_optimal_loss
from tests.diffusion.digits import digits

KEY = jax.random.key(2)


def made(s, value, stderr=None, variance=1.0):
    s, value = np.asarray(s, float), np.asarray(value, float)
    zero = np.zeros(len(s))
    error = zero if stderr is None else np.asarray(stderr, float)
    one = np.array(float(variance))
    return OptimalLoss(s, value, error, value, value, error, error, zero, zero, one, one, one)


@pytest.fixture(scope="module")
def whole():
    """Digits, 61 levels, two draws a row."""
    levels = np.geomspace(0.05, 300, 61)
    return estimate_optimal_loss(digits(), levels, KEY, num_draws=2 * 1797, block=599)


def test_information_of_the_digits_is_ln_n(whole):
    """Check 4: 7.494 within 1.5 %."""
    found, error = cv.information(whole)
    assert found == pytest.approx(np.log(1797), rel=0.015)
    assert 0 < error < 0.1


def test_the_linear_bound_holds_and_is_met_at_large_noise(whole):
    """Facts 2 and 3; ||Cov||_F^2 = 26.763."""
    lam = cv.covariance_eigenvalues(digits())
    assert lam.sum() == pytest.approx(18.773105, rel=1e-6)
    assert (lam**2).sum() == pytest.approx(26.763, rel=1e-4)
    bound = cv.linear_bound(lam, whole.sigmas)
    assert (whole.value <= bound + 2 * whole.stderr).all()
    assert whole.value[-1] == pytest.approx(bound[-1], abs=4 * whole.stderr[-1])


@pytest.mark.parametrize("shape", [(90, 3, 2, 4), (17, 24), (24, 24), (7, 3)])
def test_eigenvalues_in_pieces_are_those_of_the_covariance(shape):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, shape, np.uint8)
    before = pixels.copy()
    found = cv.covariance_eigenvalues(pixels, lambda a: a / 127.5 - 1, chunk=5)
    flat = (pixels / 127.5 - 1).reshape(shape[0], -1)
    want = np.linalg.eigvalsh(np.cov(flat.T, bias=True))[::-1][: min(flat.shape)]
    np.testing.assert_allclose(found, want, atol=1e-13)
    assert (found >= 0).all()
    np.testing.assert_array_equal(pixels, before)
    floats = rng.standard_normal((40, 6)) + 100
    kept = floats.copy()
    want = np.linalg.eigvalsh(np.cov(floats.T, bias=True))[::-1]
    np.testing.assert_allclose(cv.covariance_eigenvalues(floats, chunk=7), want, rtol=1e-9)
    np.testing.assert_array_equal(floats, kept)  # Never worked on in place.


def test_sigma_star_of_the_digits(whole):
    assert cv.sigma_star(cv.smooth(whole)) == pytest.approx(0.46, abs=0.03)


def test_smooth_is_monotone_and_keeps_what_is(whole):
    c = cv.smooth(whole)
    assert (np.diff(c.value) >= 0).all()
    assert (np.abs(c.value - whole.value) <= 3 * whole.stderr + 1e-12).all()
    np.testing.assert_allclose(c.log_sigma, np.log(whole.sigmas))
    noisy = cv.smooth(made([1, 2, 3], [0.2, 0.5, 0.4], [0.1, 0.1, 0.1]))
    np.testing.assert_allclose(noisy.value, [0.2, 0.45, 0.45])
    heavy = cv.smooth(made([1, 2, 3], [0.2, 0.5, 0.4], [0.1, 0.1, 0.3]))
    np.testing.assert_allclose(heavy.value[1:], (9 * 0.5 + 0.4) / 10)


def test_an_unknown_error_has_the_least_weight():
    c = cv.smooth(made([1, 2, 3], [0.2, 0.5, 0.4], [0.01, 0.01, np.nan]))
    np.testing.assert_allclose(c.value, [0.2, 0.5, 0.5], atol=1e-4)
    alone = cv.smooth(made([1, 2, 3], [0.2, 0.5, 0.4], [np.nan] * 3))
    np.testing.assert_allclose(alone.value, [0.2, 0.45, 0.45])
    flat = cv.smooth(made([1, 2], [0.0, 0.0], variance=0.0))
    np.testing.assert_array_equal(flat.value, 0)


def test_interpolation_within_and_beyond():
    lam = np.array([0.7, 0.3])
    s = np.geomspace(0.1, 5, 40)
    c = cv.smooth(made(s, cv.linear_bound(lam, s)), lam)
    between = np.geomspace(0.12, 4.9, 17)
    np.testing.assert_allclose(
        cv.interpolate(c, between), cv.linear_bound(lam, between), rtol=1e-3
    )
    np.testing.assert_allclose(cv.interpolate(c, s), c.value, rtol=1e-12)
    beyond = cv.interpolate(c, [8.0, 80.0])
    np.testing.assert_allclose(beyond, cv.linear_bound(lam, [8.0, 80.0]), rtol=1e-9)
    assert (cv.interpolate(c, [0.01, 0.09]) == 0).all()
    without = cv.interpolate(c._replace(eigenvalues=np.zeros(0)), [8.0, 80.0])
    np.testing.assert_allclose(without, beyond, rtol=5e-3)


def test_levels_that_nearly_coincide_do_not_bend_the_curve():
    """A pair whose values are equal by chance has no slope; between others there is one."""
    lam = np.array([1.0])
    s = np.array([0.5, 0.7, 0.95, 1.1, 1.103, 1.4, 2.0])
    value = cv.linear_bound(lam, s)
    value[3] = value[4]
    c = cv.smooth(made(s, value, np.full(7, 1e-3)))
    assert len(c.log_sigma) == 6
    between = np.array([0.8, 1.0, 1.05, 1.2])
    np.testing.assert_allclose(
        cv.interpolate(c, between), cv.linear_bound(lam, between), rtol=4e-3
    )


def test_sigma_star_between_points_and_at_the_ends():
    c = cv.smooth(made([1.0, np.e], [0.0, 0.04]))
    assert cv.sigma_star(c) == pytest.approx(np.exp(0.25))
    assert cv.sigma_star(cv.smooth(made([1.0, 2.0], [0.5, 0.6]))) == pytest.approx(1.0)
    assert cv.sigma_star(cv.smooth(made([1.0, 2.0], [0.0, 0.001]))) == pytest.approx(2.0)


def test_weighted_total_against_a_closed_form():
    """Gaussian data, weight 1 + 1 / s^2, log s normal: by Gauss-Hermite."""
    lam = np.array([1.0])
    s = np.geomspace(1e-3, 1e3, 400)
    c = cv.smooth(made(s, cv.linear_bound(lam, s)), lam)
    density = lambda s: np.exp(-0.5 * ((np.log(s) - 0.3) / 0.5) ** 2)
    got = cv.weighted_total(c, lambda s: 1 + 1 / s**2, density, 1e-2, 1e2)
    assert got == pytest.approx(1.0, rel=1e-4)  # (1 + 1/s^2) s^2 / (1 + s^2) = 1


def test_grid_adds_points_about_the_rise():
    plain, more = cv.grid(), cv.grid(star=0.5)
    assert len(plain) == 48
    assert plain[0] == pytest.approx(0.002)
    assert plain[-1] == pytest.approx(80)
    added = np.setdiff1d(more, plain)
    assert len(added) == 16
    assert added.min() == pytest.approx(0.5 / 3)
    assert added.max() == pytest.approx(2.0)


def test_a_file_keeps_the_curve_and_what_it_is_of(tmp_path, whole):
    record = dict(data="digits", form="trcov")
    cv.save(tmp_path / "c.npz", whole, record)
    loss, found = cv.load(tmp_path / "c.npz")
    for a, b in zip(loss, whole, strict=True):
        np.testing.assert_array_equal(a, b)
    assert found == record
    assert [p.name for p in tmp_path.iterdir()] == ["c.npz"]
    whole_file = (tmp_path / "c.npz").read_bytes()
    for content in (b"PK no", b"", whole_file[:300], whole_file[:-40]):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.npz"):
            cv.load(tmp_path / "bad.npz")
