"""Schedules against their own derivatives and inverses; weights; what is no schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from lm.masked import schedules
from lm.masked.schedules import grid, schedule, weights

NAMES = ("linear", "cosine", "poly2", "poly0.5")
given = lambda t: (1 - t) * (1 - 0.5 * t)


@pytest.mark.parametrize("name", [*NAMES, given])
def test_the_weight_is_the_slope_and_the_inverse_inverts(name):
    made = schedule(name)
    t, h = np.linspace(0.05, 0.95, 19), 1e-6
    slope = (made.alpha(t + h) - made.alpha(t - h)) / (2 * h)
    with jax.enable_x64(True):
        found = np.asarray(made.weight(jnp.asarray(t)))
        back = made.inverse(jnp.asarray(made.alpha(t)))
    np.testing.assert_allclose(found, -slope / (1 - made.alpha(t)), rtol=1e-7)
    np.testing.assert_allclose(back, t, rtol=1e-9)
    np.testing.assert_allclose(made.inverse(made.alpha(t)), t, rtol=1e-9)
    at = jax.jit(lambda t: (made.alpha(t), made.weight(t), made.inverse(made.alpha(t))))
    for there, wanted in zip(
        at(jnp.asarray(t, jnp.float32)), (made.alpha(t), found, t), strict=True
    ):
        assert there.dtype == jnp.float32
        np.testing.assert_allclose(there, wanted, rtol=1e-5)
    assert schedule(name) is made
    assert hash(made) == hash(schedule(name))


def test_formulas_are_those_of_the_specification():
    t = np.linspace(0, 1, 7)
    np.testing.assert_allclose(schedule("linear").alpha(t), 1 - t)
    half = np.pi / 2
    np.testing.assert_allclose(
        schedule("cosine").alpha(t), 1 - np.cos(half * (1 - t)), atol=1e-15
    )
    np.testing.assert_allclose(schedule("poly3").alpha(t), 1 - t**3)
    np.testing.assert_allclose(grid("uniform", 6), t[::-1])
    np.testing.assert_allclose(grid("cosine", 6), np.cos(half * (1 - t[::-1])), atol=1e-15)
    assert schedule("linear").weight(0.25) == 4


@pytest.mark.parametrize("name", [*NAMES, given])
@pytest.mark.parametrize("of", schedules.GRIDS)
def test_weights_are_positive_and_sum_to_one(name, of):
    for steps in (1, 2, 7, 100):
        w = weights(schedule(name), of, steps)
        assert w.dtype == np.float64
        assert w.shape == (steps,)
        assert (w > 0).all()
        assert abs(w.sum() - 1) < 1e-14
    t = grid(of, 7)
    assert (t[0], t[-1]) == (1, 0)
    assert (np.diff(t) < 0).all()


def test_even_steps_of_the_linear_schedule_are_even_weights():
    np.testing.assert_allclose(weights(schedule("linear"), "uniform", 10), 0.1, rtol=1e-14)
    # Two pairs of one law: poly2 on sqrt-spaced times would be linear again.
    np.testing.assert_allclose(
        weights(schedule("cosine"), "uniform", 5), np.diff(1 - grid("cosine", 5)), rtol=1e-12
    )


def test_weights_are_there_while_an_outer_function_is_traced():
    fine = jax.jit(
        lambda: jnp.asarray(weights(schedule(lambda t: 1 - jnp.sqrt(t)), "uniform", 4))
    )
    np.testing.assert_allclose(fine(), np.diff(1 - np.sqrt([1, 0.75, 0.5, 0.25, 0])), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("linar", "config.schedule is 'linar', but must be linear, cosine or poly"),
        ("poly", "config.schedule is 'poly'"),
        ("polyx", "config.schedule is 'polyx'"),
        ("poly0", "config.schedule is 'poly0'"),
        ("poly-1", "config.schedule is 'poly-1'"),
        ("polynan", "config.schedule is 'polynan'"),
        (lambda t: 0.9 * (1 - t), r"a function with alpha\(0\) = 1, not 0.9"),
        (lambda t: 1 - 0.9 * t, r"a function with alpha\(1\) = 0, not 0.0999"),
        (lambda t: 1 - t + 0.3 * jnp.sin(6 * jnp.pi * t), "it does not between"),
        (
            lambda t: jnp.clip(1.1 - 1.1 * t, 0, 1),
            "falls everywhere; it does not between 0 and",
        ),
        (lambda t: jnp.log(t), "a finite number for every t"),
        (lambda t: 1.0, "a finite number for every t"),
    ],
)
def test_what_is_no_schedule_is_refused(name, sentence):
    with pytest.raises(UserError, match=sentence):
        schedule(name)


def test_what_is_no_grid_is_refused():
    with pytest.raises(
        UserError, match=r"config\.grid is 'log', but must be one of uniform, cos"
    ):
        grid("log", 3)
