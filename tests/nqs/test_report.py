"""Reports of legal extremes, and what a reader is told of the exact energy."""

import json
import math

import jax
import numpy as np
import pytest

from common import metrics
from common.experiment import Run
from nqs import evaluation, hubbard, report
from nqs.lattice import hubbard as system_of
from tests.nqs.clusters import cluster, config

pytestmark = pytest.mark.xdist_group("netket")

FULL = dict(n_up=6, n_dn=6)
SLATER = dict(name="slater")
EXTREMES = {
    "full band": (dict(model=FULL), 48.0),
    "full band, no interaction": (dict(model=FULL | dict(U=0.0), ansatz=SLATER), 0.0),
    "one site": (
        dict(lattice=dict(Lx=1, Ly=1, bc_x="open"), model=dict(n_up=1, n_dn=1)),
        8.0,
    ),
    "no hopping": (dict(model=dict(t=0.0), ansatz=SLATER), 0.0),
}


@pytest.mark.parametrize(("changes", "energy"), EXTREMES.values(), ids=EXTREMES)
def test_legal_extremes_end_in_a_report(changes, energy, tmp_path):
    c = config(eval=dict(blocks=8, thermalize=20), **changes)
    with jax.enable_x64(True):
        experiment = hubbard.make(c)
        state = jax.jit(experiment.init)(jax.random.key(0))
        rows = []
        for step in (1, 2):
            state, values = jax.jit(experiment.step)(state, (), jax.random.key(step))
            rows.append(metrics.to_row(step, "train", values))
        values = experiment.evaluate(state, jax.random.key(9))
        rows.append(metrics.to_row(2, "eval", values))
        made = experiment.report({"seed0": Run("seed0", c, rows, {}, None)}, tmp_path)
    text = json.dumps(made.summary, allow_nan=False)
    found = json.loads(text)
    assert found["exact_energy"] == pytest.approx(energy, abs=1e-9)
    if energy == 0:
        assert found["relative_error"] is found["signed_relative_error"] is None
        assert made.result.endswith("relative error –.")
        assert "| – |" in made.text
    else:
        assert found["relative_error"] == pytest.approx(0, abs=1e-12)
        assert found["v_score"] == found["v_score_error"] == found["sigmas_above_exact"] == 0
    for word in ("nan", "inf ", "None"):
        assert word not in made.text + made.result
    assert "No seed lies below the exact energy" in made.text
    assert (tmp_path / "energy.png").stat().st_size > 1000
    assert ("attention_distance" in found) == (c.ansatz.name == "transformer")


SYSTEM = cluster(3, 2, 3, 3, "PO", U=8.0)
EXACT = -2.310828545


def row_of(energy, error=0.01, **more):
    return {
        "energy": energy,
        "energy_error": error,
        "variance": 0.5,
        "variance_error": 0.02,
        "v_score": 0.1,
        "acceptance": 0.3,
        "r_hat": 1.0,
        "autocorrelation_time": 0.5,
        "double_occupancy": 0.05,
        "double_occupancy_error": 0.001,
    } | more


def known(energy=EXACT):
    return report.Truth(energy, "by hand", None, [])


def test_an_energy_below_the_exact_one_is_called_a_bug_by_its_own_error():
    seeds = {
        "seed0": report.summarize(SYSTEM, known(), [row_of(EXACT + 0.2)]),
        "seed1": report.summarize(SYSTEM, known(), [row_of(EXACT - 0.05)]),
    }
    assert seeds["seed1"]["sigmas_above_exact"] == pytest.approx(-5)
    words = report.variational(seeds)
    assert words.startswith("WARNING: seed1 lies below the exact energy by 5.0 standard errors")
    assert "seed0" not in words
    # Together they look innocent.
    both = report.summarize(SYSTEM, known(), [row_of(EXACT + 0.2), row_of(EXACT - 0.05)])
    assert both["sigmas_above_exact"] > 0
    # Two and a half standard errors happen.
    fine = {"seed0": report.summarize(SYSTEM, known(), [row_of(EXACT - 0.025)])}
    assert report.variational(fine).startswith("No seed lies below the exact energy by more")
    # Without any scatter every gap but rounding counts.
    sure = {"seed0": report.summarize(SYSTEM, known(), [row_of(EXACT - 0.01, 0.0)])}
    assert report.variational(sure).startswith("WARNING: seed0")
    exact = {"seed0": report.summarize(SYSTEM, known(), [row_of(EXACT - 1e-9, 1e-12)])}
    assert report.variational(exact).startswith("No seed")


@pytest.mark.parametrize("sign", [-1, 1])
def test_relative_errors_carry_their_sign(sign):
    found = report.summarize(SYSTEM, known(), [row_of(EXACT + sign * 0.1)])
    assert found["relative_error"] == pytest.approx(0.1 / -EXACT)
    assert found["signed_relative_error"] == pytest.approx(sign * 0.1 / -EXACT)
    line = report.sentence(SYSTEM, known(), found, 1)
    assert f"relative error {'-+'[sign > 0]}0.043" in line
    table = report._energies(SYSTEM, known(), {}, {"seed0": found})
    assert f"{'-+'[sign > 0]}4.33e-02 ± 4e-03" in table


def test_variance_v_score_and_attention_distance_reach_the_summary():
    rows = [row_of(-2.0, attention_distance=[[a, 1.0]]) for a in (0.5, 0.7)]
    found = report.summarize(SYSTEM, known(), rows)
    assert found["variance_error"] == pytest.approx(0.02 / math.sqrt(2))
    gap = -2.0 - 8 * 9 / 6
    parts = 0.02 / 0.5, 2 * 0.01 / gap
    single = 6 * 0.5 / gap**2 * math.hypot(*parts)
    assert found["v_score_error"] == pytest.approx(single / math.sqrt(2))
    np.testing.assert_allclose(found["attention_distance"], [[0.6, 1.0]])
    table = report._energies(SYSTEM, known(), {}, {"seed0": found})
    assert "0.5 ± 1e-02" in table


def test_numbers_that_are_not_finite_become_none_everywhere():
    tree = {"a": math.inf, "b": {"c": [np.float64("nan"), 1.0, "x"]}, "d": 3, "e": True}
    assert report.finite(tree) == {"a": None, "b": {"c": [None, 1.0, "x"]}, "d": 3, "e": True}
    assert report._show(None, ".2f") == report._show(math.inf, ".2f") == "–"


def test_walkers_that_never_move_have_no_r_hat_in_the_table():
    local = np.tile([1.0, 2.0, 3.0], (8, 1))
    row = evaluation.energy_figures(SYSTEM, local, 1) | {"acceptance": 0.0, "connected": 4.0}
    assert row["r_hat"] == math.inf
    rows = [dict(step=5, split="train", skipped=0), dict(step=10, split="train", skipped=3)]
    table = report._chains({"seed0": row}, {"seed0": Run("seed0", None, rows, {}, None)})
    assert "| 0.000 | – |" in table
    assert table.endswith("| 24 | 0 | 3 |")


def test_skipped_steps_show_while_it_runs():
    row = dict(energy=-3.0, energy_error=0.1, variance=1.0, acceptance=0.5, skipped=0)
    assert "skipped" not in report.headline(SYSTEM, row)
    assert report.headline(SYSTEM, row | dict(skipped=7)).endswith("  7 steps skipped")


def test_times_that_nobody_took_are_dashes():
    rest = dict(steps_per_second=None, peak_host_memory_mb=100.0, devices=1)
    timings = [
        dict(seconds_from_command_to_first_step=12.0, seconds_to_first_step=3.0),
        dict(seconds_from_command_to_first_step=None, seconds_to_first_step=4.0),
        dict(seconds_from_command_to_first_step=5.0),
    ]
    runs = {
        f"seed{i}": Run(f"seed{i}", None, [], t | rest, None) for i, t in enumerate(timings)
    }
    lines = report._timing(runs).splitlines()[2:]
    assert lines[0].startswith("| seed0 | 12.0 | 3.0 | – |")
    assert lines[1].startswith("| seed1 | – | 4.0 | – |")
    assert lines[2].startswith("| seed2 | 5.0 | – | – |")


def test_a_degenerate_ground_state_keeps_what_all_of_its_vectors_share():
    unique = report.truth(SYSTEM)
    assert unique.energy == pytest.approx(EXACT, abs=1e-8)
    assert unique.observables["double_occupancy"] > 0
    c = config(model=dict(t=0.0))
    level = report.truth(system_of(lattice=c.lattice, model=c.model, pinning=c.pinning))
    assert level.energy == pytest.approx(0, abs=1e-12)
    assert "degenerate" in level.source
    # Without hopping any placement of the electrons will do: only their number is shared.
    assert level.observables["double_occupancy"] == pytest.approx(0, abs=1e-12)
    assert np.isnan(level.observables["density_up"]).any()


def test_every_run_is_judged_by_its_own_system(tmp_path):
    """A run at U = 4 that another, at U = 8, starts from."""
    runs = {}
    with jax.enable_x64(True):
        for name, u in (("warm-seed0", 4.0), ("main-seed0", 8.0)):
            c = config(model=dict(U=u), eval=dict(blocks=8), ansatz=SLATER)
            experiment = hubbard.make(c)
            state = jax.jit(experiment.init)(jax.random.key(0))
            values = experiment.evaluate(state, jax.random.key(1))
            runs[name] = Run(name, c, [metrics.to_row(0, "eval", values)], {}, None)
        made = report.report(runs, tmp_path)
    four, eight = (report.truth(report.system_of(run.config)).energy for run in runs.values())
    assert four < eight
    assert made.summary["exact_energy"] == pytest.approx(eight)
    assert "U = 8" in made.result
    systems = made.summary["systems"]
    assert [s["exact_energy"] for s in systems.values()] == pytest.approx([four, eight])
    assert [list(s["seeds"]) for s in systems.values()] == [["warm-seed0"], ["main-seed0"]]
    assert (tmp_path / "density.png").exists()
    assert (tmp_path / "system0" / "density.png").exists()
    assert "(figures/system0/density.png)" in made.text
