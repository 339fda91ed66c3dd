"""The estimator study: its ends are known, and its columns are the estimators."""

import jax
import numpy as np
import pytest

from common.errors import UserError
from diffusion.estimators import estimate_optimal_loss
from diffusion.rows import rows
from diffusion.study import FACTORS, page, study
from tests.diffusion.digits import digits

KEY = jax.random.key(6)


@pytest.fixture(scope="module")
def found():
    data = rows(np.float32(digits()))
    return study(data, [0.6, 1.5], [128, 1797], KEY, num_draws=1024)


def test_all_rows_and_no_weight_taken_away_are_exact(found):
    np.testing.assert_allclose(found.value[1, 0], found.exact, rtol=1e-4)
    assert found.c[1, 1] == pytest.approx(1)
    np.testing.assert_allclose(found.value[1, 1], found.exact, rtol=1e-4)
    np.testing.assert_allclose(found.value[1, -1], found.exact, rtol=1e-4)


def test_estimates_rise_with_c(found):
    assert (np.diff(found.value[0, :, 0]) > 0).all()
    assert (found.value[0, 0] < found.exact).all()
    assert found.value[0, -1, 0] > found.exact[0]
    assert found.c[0, 3] == pytest.approx(FACTORS[2] * 1796 / 127)


def test_columns_are_the_estimators(found):
    given = dict(num_draws=1024, subset_size=128, form="paired", estimator="cdol")
    same = estimate_optimal_loss(digits(), [0.6, 1.5], KEY, c_rule="ht", **given)
    bar = 4 * np.hypot(same.stderr, found.spread[0, 1] / 32)
    assert (np.abs(same.value - found.value[0, 1]) <= bar).all()


def test_errors_are_those_of_other_keys(found):
    data = rows(np.float32(digits()))
    again = [
        study(data, [0.6, 1.5], [128], jax.random.key(i), num_draws=512, block=64, seed=i)
        for i in range(12)
    ]
    ratio = np.stack([(f.value / f.exact)[0] for f in again])
    stated = np.sqrt(np.mean([f.error[0] ** 2 for f in again], 0))
    spread = ratio.std(0, ddof=1)  # Of 12: known to a factor of 1.8 either way.
    assert (spread < 1.8 * stated).all()
    assert (stated < 2.2 * spread)[:-1].all()  # SNIS has heavy tails.
    assert found.error[1, 0].max() < 1e-4  # All rows: no error at all.


def test_the_page_shows_all(found, tmp_path):
    text = page(found, tmp_path)
    assert text.count("| 0.6 |") == text.count("| 1.5 |") == 2
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "study.csv").read_text().splitlines()) == 1 + 2 * 2 * 7


def test_a_subset_beyond_the_data_is_named():
    with pytest.raises(UserError, match="subset_size"):
        study(rows(np.float32(digits())), [1.0], [2000], KEY, num_draws=64)
