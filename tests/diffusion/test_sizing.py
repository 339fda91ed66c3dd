"""Accuracy that is asked for is reached, at the price that is said."""

import jax
import numpy as np
import pytest

from common.errors import UserError
from diffusion.estimators import estimate_optimal_loss
from diffusion.sizing import estimate_to, work
from tests.diffusion.digits import digits

KEY = jax.random.key(4)
LEVELS = [0.7, 1.5, 5.0]


@pytest.fixture(scope="module")
def truth():
    return estimate_optimal_loss(digits(), LEVELS, jax.random.key(77), num_draws=10 * 1797)


@pytest.mark.parametrize("accuracy", [0.05, 0.01])
def test_the_error_is_as_asked(truth, accuracy):
    found = estimate_to(digits(), LEVELS, KEY, accuracy=accuracy)
    assert found.reached
    assert found.accuracy <= accuracy
    off = np.abs(found.loss.value - truth.value)
    assert (off <= 4 * np.hypot(found.loss.stderr, truth.stderr)).all()
    # Nor is it much better than asked, where more than the pilot was needed.
    if min(c.need for c in found.candidates) > 1:
        assert found.accuracy > 0.5 * accuracy


def test_the_cheapest_candidate_is_chosen():
    found = estimate_to(digits(), LEVELS, KEY, accuracy=0.01)
    assert {c.options["estimator"] for c in found.candidates} == {"exact", "corrected"}
    best = min(found.candidates, key=lambda c: c.need * c.flops)
    assert found.options["estimator"] == best.options["estimator"]
    assert found.options["num_draws"] >= best.options["num_draws"]


def test_a_budget_ends_it():
    found = estimate_to(digits(), LEVELS, KEY, accuracy=1e-4, budget=1e9)
    assert not found.reached
    assert found.flops < 4e9  # A pilot's worth is always spent.


def test_work_by_hand():
    assert work(100, 7, 1, num_draws=5) == 4 * 5 * 100 * 7
    assert work(100, 7, 3, num_draws=5) == 2 * 7 * 5 * 5 * 100
    few = work(100, 7, 3, num_draws=8, estimator="corrected", subset_size=10, exact_draws=2)
    assert few == 2 * 7 * 5 * (8 * 10 + 2 * 110)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (dict(accuracy=0.0), "accuracy"),
        (dict(accuracy=0.1, least=0.0), "least"),
        (dict(accuracy=0.1, pilot=8), "pilot"),
        (dict(accuracy=0.1, budget=0.0), "budget"),
    ],
    ids=str,
)
def test_what_cannot_be_is_named(given, named):
    with pytest.raises(UserError, match=named):
        estimate_to(digits(), LEVELS, KEY, **given)
