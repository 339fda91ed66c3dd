"""Accuracy that is asked for is reached, at the price that is said."""

import jax
import numpy as np
import pytest

from common.errors import UserError
from diffusion import sizing
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
    """Trials and attempts together stay below it, and use most of it."""
    found = estimate_to(digits(), LEVELS, KEY, accuracy=1e-4, budget=2e10)
    assert not found.reached
    assert 1e10 < found.flops <= 2e10
    with pytest.raises(UserError, match="budget"):
        estimate_to(digits(), LEVELS, KEY, accuracy=1e-4, budget=1e9)


def test_attempts_are_pooled_and_blocks_stay_as_they_are(monkeypatch):
    """The curve is the mean of all attempts by their draws; no second program is made."""
    seen, estimate = [], estimate_optimal_loss

    def watched(*args, **given):
        seen.append((given, estimate(*args, **given)))
        return seen[-1][1]

    monkeypatch.setattr(sizing, "estimate_optimal_loss", watched)
    # The trial promises too much, so that a second attempt is needed.
    relative, calls = sizing._relative, []

    def hopeful(loss, least):
        calls.append(None)
        return relative(loss, least) * (0.3 if len(calls) <= 3 else 1.0)

    monkeypatch.setattr(sizing, "_relative", hopeful)
    found = estimate_to(digits(), LEVELS, KEY, accuracy=0.02)
    tries = [loss for _, loss in seen[len(found.candidates) :]]
    assert len(tries) > 1
    assert len({given["block"] for given, _ in seen}) == 1
    weight = np.array([t.num_draws for t in tries], float)
    mean = np.average([t.value for t in tries], axis=0, weights=weight)
    np.testing.assert_allclose(found.loss.value, mean)
    assert found.loss.num_draws == weight.sum()
    assert found.reached


def test_classes_equal_rows_and_one_row_are_sized():
    from sklearn.datasets import load_digits

    given = dict(accuracy=0.05, pilot=64)
    told = estimate_to(digits(), [1.5], KEY, labels=load_digits().target, **given)
    assert told.reached
    assert told.loss.value[0] < 9
    same = estimate_to(np.ones((64, 4)), [1.0], KEY, **given)
    assert same.reached
    assert same.loss.value[0] == 0
    with pytest.warns(UserWarning, match="one row"):
        one = estimate_to(np.ones((1, 4)), [1.0], KEY, **given)
    assert one.loss.value[0] == one.accuracy == 0


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
