"""Reference processes against the published values, quadrature and Gaussian conditioning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from geometry.reference import checked_time, coefs, grid, reference, scaled

ALL = [
    reference("brownian", sigma=0.7),
    reference("brownian", sigma=0.7, end=2.5),
    reference("ve", sigma_min=0.05, sigma_max=3.0),
    reference("ve", sigma_min=0.05, sigma_max=3.0, end=2.5),
    reference("vp", beta_min=0.1, beta_max=2.0),
    reference("vp", beta_min=0.0, beta_max=6.0, end=2.5),
    scaled(reference("vp", beta_min=0.1, beta_max=6.0), 0.3),
]
PUBLISHED = {
    0: {0.1: (-0.7, 0.0441), 0.5: (0.5, 0.1225), 0.9: (1.7, 0.0441)},
    4: {0.1: (-0.944310, 0.019106), 0.5: (-0.185753, 0.205061), 0.9: (1.439266, 0.153860)},
}


@pytest.mark.parametrize("which", PUBLISHED)
def test_means_and_variances_are_the_published_ones(which):
    for t, (mean, variance) in PUBLISHED[which].items():
        a, b, c = coefs(ALL[which], 0.0, t)
        assert (-a + 2 * b, c) == pytest.approx((mean, variance), abs=5.1e-7)


@pytest.mark.parametrize("process", ALL)
def test_variances_are_the_integral_of_the_noise(process):
    for s, t in ((0.0, 0.3), (0.2, 0.9), (0.5, 1.0)):
        s, t = s * process.end, t * process.end
        u, h = np.linspace(s, t, 200_001, retstep=True)
        rates = np.broadcast_to(process.rate(u), u.shape)
        over = np.r_[0, np.cumsum((rates[1:] + rates[:-1]) / 2 * h)]
        factor = np.exp(over[-1] - over)
        noise = factor**2 * process.variance(u)
        assert process.rho(s, t) == pytest.approx(factor[0], rel=1e-9)
        assert process.v(s, t) == pytest.approx(np.trapezoid(noise, u), rel=1e-9)


@pytest.mark.parametrize("process", ALL)
def test_pinned_laws_are_gaussian_conditionals_and_compose(process):
    end = process.end
    for s, t, u in ((0.0, 0.1, 0.2), (0.1, 0.35, 0.98), (0.4, 0.401, 0.999), (0.0, 0.5, 1.0)):
        s, t, u = s * end, t * end, u * end
        # (R_t, R_T) given R_s: condition the first on the second.
        rho, later = process.rho(s, t), process.rho(t, end)
        to_t, to_end = process.v(s, t), process.v(s, end)
        gain = to_t * later / to_end
        a, b, c = coefs(process, s, t)
        assert b == pytest.approx(gain, abs=1e-13)
        assert a == pytest.approx(rho - gain * rho * later, abs=1e-12)
        assert c == pytest.approx(to_t - gain * later * to_t, abs=1e-12)
        # s -> t -> u is s -> u, of the process and of the pinned one.
        assert process.rho(s, u) == pytest.approx(rho * process.rho(t, u), abs=1e-13)
        through = process.rho(t, u) ** 2 * to_t + process.v(t, u)
        assert process.v(s, u) == pytest.approx(through, abs=1e-12)
        a2, b2, c2 = coefs(process, t, u)
        whole = (a2 * a, a2 * b + b2, a2**2 * c + c2)
        np.testing.assert_allclose(coefs(process, s, u), whole, atol=1e-12)


@pytest.mark.parametrize("process", ALL)
def test_limits_at_both_ends_are_exact(process):
    end = process.end
    for s in (0.0, 0.3 * end):
        np.testing.assert_array_equal(coefs(process, s, s), (1, 0, 0))
        np.testing.assert_array_equal(coefs(process, s, end), (0, 1, 0))
    np.testing.assert_array_equal(coefs(process, end, end), (0, 1, 0))
    # In float32, too, and with gradients that are finite there.
    with jax.debug_nans(True):
        ends = jax.jit(lambda t: coefs(process, t, t))(jnp.asarray([0.0, end], jnp.float32))
        np.testing.assert_array_equal(ends, [[1, 0], [0, 1], [0, 0]])
        slope = jax.grad(lambda t: sum(coefs(process, 0.0, t)))(jnp.float32(0.0))
    assert np.isfinite(slope)


def test_what_is_translated_and_what_is_not():
    for process in ALL:
        a, b, _ = coefs(process, 0.0, 0.4)
        assert (abs(a + b - 1) < 1e-14) == process.translates


def test_noise_of_its_own_for_each_structure_is_the_single_numbers():
    factors, t = np.array([0.3, 2.0, 1.0]), np.array([0.2, 0.7, 0.0])
    for process in (ALL[0], ALL[4]):
        together = coefs(scaled(process, jnp.asarray(factors)), 0.0, jnp.asarray(t))
        for i, factor in enumerate(factors):
            alone = coefs(scaled(process, factor), 0.0, t[i])
            np.testing.assert_allclose([v[i] for v in together], alone, rtol=2e-6)
        assert all(v.dtype == jnp.float32 for v in together)
        # Only the noise is larger: the mean does not know it.
        np.testing.assert_allclose(alone[:2], coefs(process, 0.0, t[2])[:2], rtol=1e-12)


def test_grids():
    np.testing.assert_allclose(grid("uniform", 4, 2.0), [0, 0.5, 1, 1.5, 2])
    np.testing.assert_allclose(grid("cosine", 3), [0, 0.25, 0.75, 1], atol=1e-15)
    np.testing.assert_allclose(grid("power", 2, 1.0, power=2.0), [0, 0.75, 1])
    for name in ("uniform", "cosine", "power"):
        times = grid(name, 50, 2.5)
        assert times[0] == 0
        assert times[-1] == 2.5
        assert (np.diff(times) > 0).all()
        assert times.dtype == np.float64


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: reference("levy"), "reference.name is 'levy'.*brownian, ve, vp"),
        (lambda: reference("brownian", beta_min=1.0), "reference.beta_min.*sigma, end"),
        (lambda: reference("brownian", sigma=0.0), "reference.sigma is 0.0"),
        (lambda: reference("brownian", sigma=float("nan")), "reference.sigma"),
        (lambda: reference("brownian", end=-1.0), "reference.end"),
        (lambda: reference("ve", sigma_min=2.0, sigma_max=1.0), "reference.sigma_max.*2.0"),
        (lambda: reference("vp", beta_min=-1.0), "reference.beta_min is -1.0"),
        (lambda: reference("vp", beta_min=0.0, beta_max=0.0), "reference.beta_max"),
        (lambda: grid("log", 5), "sampler.grid is 'log'.*uniform, cosine, power"),
        (lambda: grid("uniform", 0), "sampler.steps is 0"),
        (lambda: grid("power", 5, power=0.0), "sampler.power"),
        (lambda: checked_time(1.0, 1.0), "time is 1.0.*below T = 1.0"),
        (lambda: checked_time(-0.1, 1.0), "time is -0.1"),
    ],
)
def test_what_is_out_of_range_is_named(call, said):
    with pytest.raises(UserError, match=said):
        call()


def test_times_inside_pass():
    assert checked_time(0.0, 1.0) == 0.0
    assert checked_time(1.5, 2.0) == 1.5
