"""Check 18: with the exact denoiser every sample ends on a training row."""

import jax
import numpy as np
import pytest

from diffusion import grids
from diffusion.neighbours import nearest
from diffusion.optimal_denoiser import optimal_denoiser
from diffusion.rows import rows
from diffusion.sampling import generate
from tests.diffusion.digits import digits


def of_condition(data, condition):
    del condition
    return optimal_denoiser(data)


@pytest.mark.parametrize("method", ["heun", "dpm_2m"])
def test_samples_are_rows_and_rows_are_equally_likely(method):
    y = np.float32(digits()).reshape(-1, 8, 8, 1)
    made = generate(
        jax.tree_util.Partial(of_condition, rows(y)),
        np.arange(600),
        jax.random.key(0),
        shape=(8, 8, 1),
        sigmas=grids.edm(18),
        batch_size=200,
        method=method,
    )
    near = nearest(made, y, 1)
    assert near.distance.max() < 1e-3
    # 600 uniform choices among 1797 rows hit 1797 (1 - (1 - 1 / 1797)^600) = 510 of them.
    distinct = len(np.unique(near.index))
    assert 480 <= distinct <= 540
    # Classes come as often as they are there.
    from sklearn.datasets import load_digits

    labels = load_digits().target
    share = np.bincount(labels[near.index[:, 0]], minlength=10) / 600
    want = np.bincount(labels) / 1797
    assert (np.abs(share - want) <= 4 * np.sqrt(want / 600)).all()
