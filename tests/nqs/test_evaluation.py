"""Error bars of what an evaluation measures, and samples that are no numbers."""

import numpy as np
import pytest

from common.errors import UserError
from nqs import evaluation
from nqs import observables as obs
from tests.nqs.clusters import cluster
from tests.nqs.test_statistics import ar1

SYSTEM = cluster(3, 2, 2, 2, "PO", U=8.0)


def test_bad_samples_do_not_lower_the_variance():
    local = -5 + np.random.default_rng(0).normal(size=(64, 50))
    bad = np.random.default_rng(1).random(local.shape) < 0.3
    holes = np.where(bad, np.where(local > -5, np.nan, np.inf), local)
    got = evaluation.energy_figures(SYSTEM, holes, 1)
    assert got["bad_samples"] == bad.sum()
    assert got["energy"] == pytest.approx(local[~bad].mean())
    assert got["variance"] == pytest.approx(local[~bad].var())
    whole = evaluation.energy_figures(SYSTEM, local, 1)
    for name in ("energy_error", "variance_error", "r_hat"):
        assert got[name] == pytest.approx(whole[name], rel=0.4)
    assert np.isfinite(got["autocorrelation"]).all()
    assert np.isfinite(got["blocking"]).all()


def test_nothing_but_bad_samples_is_refused_in_words():
    with pytest.raises(UserError, match="No local energy is finite"):
        evaluation.energy_figures(SYSTEM, np.full((8, 4), np.nan), 1)


def test_energy_errors_are_those_of_slow_chains():
    found = [
        evaluation.energy_figures(SYSTEM, ar1(0.9, 64, 256, seed), 3) for seed in range(30)
    ]
    for name, centre in (("energy", 0.0), ("variance", 1.0)):
        scatter = np.sqrt(np.mean([(f[name] - centre) ** 2 for f in found]))
        assert np.mean([f[f"{name}_error"] for f in found]) == pytest.approx(scatter, rel=0.35)
    time = np.mean([f["autocorrelation_time"] for f in found])
    assert time == pytest.approx(3 * 9.5, rel=0.2)  # In sweeps.


def test_errors_of_observables_know_the_time_of_the_energy():
    g = obs.geometry(SYSTEM)
    rng = np.random.default_rng(0)
    d = obs.Diagonal(*(rng.normal(size=(128, 6)) for _ in obs.Diagonal._fields))
    fast, slow = (evaluation.correlations(g, d, tau) for tau in (0.5, 12.5))
    for name in ("spin_error", "charge_error", "density_error", "double_occupancy_error"):
        naive, corrected = np.mean(fast[name]), np.mean(slow[name])
        assert corrected > 3 * naive
    assert slow["spin_error"].mean() == pytest.approx(5 / np.sqrt(128), rel=0.25)
