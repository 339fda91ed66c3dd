"""Small classes, the number of draws behind a value, and values that few draws carry."""

import jax
import numpy as np
import pytest

from diffusion import figures
from diffusion.estimators import estimate_optimal_loss
from tests.diffusion.digits import digits

KEY = jax.random.key(8)


@pytest.mark.parametrize(
    "estimator", [dict(estimator="knn"), dict(estimator="cdol"), dict(estimator="corrected")]
)
def test_small_classes_do_not_make_subsets_of_others_small(estimator):
    y = digits()[:402]
    labels = np.repeat([0, 1, 2], [200, 2, 200])
    sigmas = [1.0, 3.0]
    exact = estimate_optimal_loss(y, sigmas, KEY, num_draws=4000, labels=labels)
    got = estimate_optimal_loss(y, sigmas, KEY, num_draws=4000, labels=labels, **estimator)
    bar = 4 * np.hypot(exact.stderr, got.stderr)
    assert (np.abs(got.value - exact.value) <= bar).all()
    given = estimator | dict(subset_size=100, neighbours=20 * (estimator["estimator"] == "knn"))
    some = estimate_optimal_loss(y, sigmas, KEY, num_draws=4000, labels=labels, **given)
    assert (np.abs(some.value / exact.value - 1) < 0.35).all()
    assert (some.lower < exact.value + 4 * exact.stderr).all()


def test_draws_of_either_kind_are_counted():
    given = dict(num_draws=1024, estimator="corrected", subset_size=64, exact_draws=256)
    found = estimate_optimal_loss(digits(), [1.0], KEY, block=16, **given)
    assert found.num_draws == 256
    assert found.cheap_draws == 1024  # Others than the 256.
    assert estimate_optimal_loss(digits(), [1.0], KEY, num_draws=64).cheap_draws == 0


def test_values_that_few_draws_carry_are_marked():
    sigmas = np.geomspace(0.15, 80, 12)
    found = estimate_optimal_loss(digits(), sigmas, KEY, num_draws=1797)
    lines = figures.curve_table(found).splitlines()
    marked = ["†" in line for line in lines if line.startswith("| 0.") or line[:3] == "| 8"]
    assert marked[0]
    assert not marked[-1]
    assert lines[-1].startswith("†")
    tame = found._replace(stderr=1e-3 * found.value)
    assert "†" not in figures.curve_table(tame)
