"""Noise grids: published values, their ends, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from diffusion import grids

LEVELS = np.geomspace(0.01, 30, 100)


def test_the_edm_grid_begins_as_published():
    found = grids.edm(18)
    want = [80, 57.586, 40.786, 28.375, 19.353, 12.910, 8.401, 5.315, 3.257, 1.923]
    np.testing.assert_allclose(found[:10], want, atol=1e-3)
    assert found.dtype == np.float64
    assert len(found) == 19
    np.testing.assert_allclose(found[-2], 0.002, rtol=1e-12)
    assert found[-1] == 0


def test_rho_of_one_is_a_linear_grid():
    np.testing.assert_allclose(grids.edm(5, 1.0, 9.0, rho=1.0), [9, 7, 5, 3, 1, 0])


def test_log_uniform_levels_have_one_ratio():
    found = grids.log_uniform(7, 0.01, 10.0)
    np.testing.assert_allclose(found[1:-1] / found[:-2], (0.01 / 10) ** (1 / 6))
    np.testing.assert_allclose(found[[0, -2, -1]], [10, 0.01, 0])


def test_uniform_takes_equal_steps_of_time():
    ratio = lambda t: np.sqrt(np.expm1(9.95 * t**2 + 0.1 * t))
    found = grids.uniform(ratio, 4, 0.1, 1.0)
    np.testing.assert_allclose(found, [*ratio(np.array([1.0, 0.7, 0.4, 0.1])), 0])
    assert len(grids.uniform(ratio, 4, 0.1, 1.0, zero=False)) == 4


def test_uniform_takes_functions_of_jax_arrays():
    found = grids.uniform(lambda t: jnp.exp(t), 3, 0.0, 1.0)
    np.testing.assert_allclose(found, [np.e, np.e**0.5, 1, 0], rtol=1e-6)


def test_a_shift_of_flow_matching_time_is_a_factor_of_the_level():
    plain, shifted = grids.flow(10), grids.flow(10, shift=3.0)
    np.testing.assert_allclose(plain[1:-1], np.arange(9, 0, -1) / np.arange(1, 10))
    np.testing.assert_allclose(shifted[1:], 3 * plain[1:])
    assert plain[0] == shifted[0] == pytest.approx(99_999, rel=1e-9)
    assert plain[-1] == shifted[-1] == 0


@pytest.mark.parametrize(
    ("spacing", "times"),
    [
        ("leading", [75, 50, 25, 0]),
        ("leading", [66, 33, 0]),
        ("trailing", [99, 74, 49, 24]),
        ("trailing", [99, 66, 32]),
        ("trailing", [99]),
        ("linspace", [99, 66, 33, 0]),
    ],
)
def test_discrete_levels_are_those_of_the_named_times(spacing, times):
    np.testing.assert_array_equal(
        grids.discrete(LEVELS, len(times), spacing), [*LEVELS[times], 0]
    )


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_all_discrete_levels_are_all_of_them(spacing):
    np.testing.assert_array_equal(grids.discrete(LEVELS, 100, spacing), [*LEVELS[::-1], 0])


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: grids.edm(1), "n"),
        (lambda: grids.edm(8, sigma_min=0.0), "sigma_min"),
        (lambda: grids.edm(8, sigma_min=np.nan), "sigma_min"),
        (lambda: grids.edm(8, sigma_min=np.inf), "sigma_min"),
        (lambda: grids.edm(8, 1.0, 1.0), "sigma_max"),
        (lambda: grids.edm(8, sigma_max=np.inf), "sigma_max"),
        (lambda: grids.edm(8, rho=0.0), "rho"),
        (lambda: grids.log_uniform(1), "n"),
        (lambda: grids.log_uniform(4, 2.0, 1.0), "sigma_max"),
        (lambda: grids.uniform(lambda t: t, 1, 0.0, 1.0), "n"),
        (lambda: grids.uniform(lambda t: -t, 3, 0.1, 1.0), "sigmas"),
        (lambda: grids.flow(0), "n"),
        (lambda: grids.flow(4, shift=-1.0), "shift"),
        (lambda: grids.flow(4, t_max=1.0), "t_max"),
        (lambda: grids.discrete(LEVELS, 101), "n"),
        (lambda: grids.discrete(LEVELS, 1), "n"),
        (lambda: grids.discrete(LEVELS, 5, "even"), "spacing"),
        (lambda: grids.discrete(LEVELS[::-1], 5), "sigmas"),
        (lambda: grids.check([1.0]), "sigmas"),
        (lambda: grids.check([[2.0, 1.0]]), "sigmas"),
        (lambda: grids.check([2.0, np.nan, 1.0]), "sigmas"),
        (lambda: grids.check([np.inf, 1.0]), "sigmas"),
        (lambda: grids.check([1.0, 0.0, -1.0]), "sigmas"),
        (lambda: grids.check([2.0, 2.0, 1.0]), "sigmas"),
        (lambda: grids.check([1.0, 0.0, 0.0]), "sigmas"),
    ],
)
def test_what_is_no_grid_is_refused_by_its_field(call, field):
    with pytest.raises(UserError, match=rf"config\.sampler\.{field} is"):
        call()
