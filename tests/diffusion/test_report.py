"""The report of made-up runs: numbers against NumPy and SciPy, and every section."""

import csv
import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from common import config as configs
from common.experiment import Run
from diffusion import curve, figures, findings, known_curves, report, scaling_runs, totals
from diffusion.dataset import dataset
from diffusion.diagnosis import Diagnosis
from diffusion.estimators import OptimalLoss
from diffusion.images import Images

DIM, VARIANCE = 64, 18.773105
SIGMAS = np.geomspace(0.002, 80.0, 33)
TIMING = dict(steps_per_second=4.0, peak_host_memory_mb=100.0, devices="1 x cpu")
GAPS = {
    "edm": [0.40, 0.42, 0.41],
    "flow": [0.50, 0.55, 0.51],
    "optimal": [0.38, 0.41, 0.385],
}


def settings(**changes):
    config = configs.load("configs/optimal_loss.py:test")
    configs.apply(config, dict(eval=dict(samples=0)) | changes)
    return config


def rising(s, star=1.0):
    """A curve from 0 to 1 about `star`, as J* / V."""
    return 1 / (1 + (star / s) ** 3)


def curve_row(star=1.0, bracket=False, sigmas=SIGMAS, error=0.01):
    value = VARIANCE * rising(sigmas, star)
    row = dict(sigmas=sigmas, value=value, stderr=error * value, lower=value, upper=value)
    row |= dict(lower_err=error * value, upper_err=error * value)
    row |= dict(ess=1 + value, p_self=1 - rising(sigmas, star))
    if bracket:
        row |= dict(lower=0.7 * value, upper=np.minimum(1.4 * value, VARIANCE))
    row = {n: v.tolist() for n, v in row.items()}
    row |= dict(variance=VARIANCE, num_draws=256, cheap_draws=0, dim=DIM)
    return row | dict(sigma_star=0.2 * star, information=7.4 * star, information_err=0.05)


def estimation(seed=0, name="floor", **changes):
    config = settings(experiment="diffusion.estimate")
    row = {"step": 4, "split": "eval", **curve_row(**changes)}
    rows = [{"step": 2, "split": "train", "sigma_star": 0.1}, row]
    return Run(f"{name}-seed{seed}", config, rows, TIMING, lambda: None)


def loss_row(gap, step=4, tilt=0.0, frechet=None, flops=None):
    """An evaluation with gap times (s / 0.4)^tilt times a bump about s = 0.4."""
    floor = 0.3 * rising(SIGMAS)
    above = gap * (SIGMAS / 0.4) ** tilt * np.exp(-0.5 * np.log(SIGMAS / 0.4) ** 2)
    row = dict(sigmas=SIGMAS, loss=floor + above, floor=floor, gap=above, distance=0.99 * above)
    row |= {f"{n}_err": 0.01 * row[n] for n in ("loss", "floor", "gap", "distance")}
    row |= dict(density=np.exp(-0.5 * np.log(SIGMAS) ** 2), weight=1 + SIGMAS**-2)
    row = {n: np.asarray(v).tolist() for n, v in row.items()}
    row |= dict(edm_gap=gap, edm_floor=0.15, edm_loss=0.15 + gap, edm_gap_err=0.01)
    row |= dict(own_gap=2 * gap, own_floor=0.3, own_loss=0.3 + 2 * gap)
    row |= dict(draws=64, gap_worst=-1.5, images=step * 16)
    if frechet is not None:
        row |= dict(frechet=frechet, precision=0.5, recall=0.4, copies=0.0)
        row |= dict(nearest=3.0, feature_accuracy=0.9, samples=32)
    if flops is not None:
        row |= dict(flops=flops, params=1000)
    return {"step": step, "split": "eval", **row}


def training(name, seed, gap, config=None, steps=(4,), **changes):
    rows = [loss_row(gap * (steps[-1] / step) ** 0.5, step, **changes) for step in steps]
    return Run(f"{name}-seed{seed}", config or settings(), rows, TIMING, lambda: None)


def comparison(seeds=3, **changes):
    tilt = {"edm": 0.0, "flow": 0.4, "optimal": -0.2}
    found = [
        training(name, seed, gap, tilt=tilt[name], frechet=1 + gap, **changes)
        for name, gaps in GAPS.items()
        for seed, gap in enumerate(gaps[:seeds])
    ]
    return {run.name: run for run in found}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "figures"
    floors = [estimation(seed, star=1 + 0.02 * seed, bracket=True) for seed in range(3)]
    runs = {run.name: run for run in floors} | comparison(steps=(2, 3, 4))
    return report.report(runs, folder), folder


def named(text):
    return {part.split(")")[0] for part in text.split("(figures/")[1:]}


def test_every_section_and_figure_is_there(made):
    text, folder = made[0].text, made[1]
    drawn = {path.name for path in folder.glob("*.png")}
    assert named(text) == drawn
    assert drawn == {
        "optimal_loss.png",
        "losses.png",
        "training.png",
        "schedules.png",
        "differences.png",
        "correlation.png",
    }
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            image.verify()
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    wanted = ["Optimal loss", "Diagnosis", "Samples", "Comparison", "This machine", "Figures"]
    assert titles == [f"## {title}" for title in wanted]
    assert "It is no FID" in text
    assert "nan" not in text.lower().replace("inception", "")
    json.dumps(made[0].summary, allow_nan=False)


def test_tables_have_a_cell_for_every_column(made):
    lines = made[0].text.splitlines()
    tables = [line.replace("\\|", "") for line in lines if line.startswith("|")]
    starts = [i for i, line in enumerate(tables) if set(line) <= set("|-")]
    assert len(starts) >= 6
    for i, start in enumerate(starts):
        end = starts[i + 1] - 1 if i + 1 < len(starts) else len(tables)
        assert len({line.count("|") for line in tables[start - 1 : end]}) == 1


def test_closing_line(made):
    value = findings.digits(0.204, stats.sem([0.2, 0.204, 0.208]))
    gap = findings.digits(np.mean(GAPS["optimal"]), stats.sem(GAPS["optimal"]))
    loss = 0.15 + np.mean(GAPS["optimal"])
    want = f"sigma_star {value}; best of 3: optimal, gap {gap} of loss {loss:.3g}."
    assert made[0].result == want


def test_means_over_seeds(made):
    groups = made[0].summary["groups"]
    for name, gaps in GAPS.items():
        found = groups[name]
        assert found["edm_gap"] == pytest.approx(np.mean(gaps))
        assert found["edm_gap_error"] == pytest.approx(stats.sem(gaps))
        assert found["edm_gap_draws"] == pytest.approx(0.01 / np.sqrt(3))
        assert found["own_loss"] == pytest.approx(0.3 + 2 * np.mean(gaps))
        assert found["frechet"] == pytest.approx(1 + np.mean(gaps))
        assert found["gap_worst"] == -1.5
        assert found["gap_nonnegative"] is True
    assert made[0].summary["best"] == "optimal"


def test_bands_are_means_of_their_levels(made):
    rows = [loss_row(gap) for gap in GAPS["edm"]]
    x = np.log(SIGMAS / SIGMAS[0]) / np.log(SIGMAS[-1] / SIGMAS[0])
    which = np.minimum(np.floor(8 * x + 1e-9), 7)
    for b, band in enumerate(made[0].summary["groups"]["edm"]["bands"]):
        each = [np.array(row["gap"])[which == b].mean() for row in rows]
        assert band["gap"] == pytest.approx(np.mean(each), rel=1e-6)
        assert band["error"] == pytest.approx(stats.sem(each), rel=1e-6)
        assert band["low"] < SIGMAS[which == b].mean() < band["high"] * 1.0001


def test_the_two_estimates_of_the_gap(made):
    row = loss_row(0.4)
    gap = np.array(row["gap"])
    want = np.max(0.01 * gap / np.hypot(0.01 * gap, 0.0099 * gap))
    assert made[0].summary["groups"]["edm"]["agreement"] == pytest.approx(want, rel=1e-3)
    off = findings.diagnosis_of(row)._replace(distance=1.2 * gap)
    assert findings.agreement(off) > 10


def test_differences_are_paired_by_seed(made):
    paired = {d["what"]: d for d in made[0].summary["paired"]}
    assert set(paired) == {"flow", "optimal"}
    for name, d in paired.items():
        want = stats.ttest_rel(GAPS[name], GAPS["edm"])
        low, high = want.confidence_interval(0.95)
        for what in ("edm_gap", "frechet"):
            got = [d[what][n] for n in ("difference", "low", "high", "p")]
            mean = np.mean(np.subtract(GAPS[name], GAPS["edm"]))
            np.testing.assert_allclose(got, [mean, low, high, want.pvalue], rtol=1e-8)
        assert d["base"] == "edm"
        assert len(d["bands"]["difference"]) == 8


def test_where_one_is_better():
    bands = dict(difference=[-1, -1, 1, 0], low=[-2, -2, 0.5, -1], high=[-0.5, -0.1, 2, 1])
    d = dict(base="edm", bands=bands, edges=[1, 2, 4, 8, 16])
    words = "gap smaller at s 1 to 4; larger at s 4 to 8; undecided at s 8 to 16."
    assert findings.where_better(d) == words
    d["bands"] = dict(difference=[-1, 1, -1, 1], low=None, high=None)
    words = "gap smaller at s 1 to 2, 4 to 8; larger at s 2 to 4, 8 to 16 (one seed, no "
    assert findings.where_better(d) == words + "intervals)."


def test_differences_of_equal_runs_are_no_division_by_zero():
    runs = {seed: training("a", seed, 0.4) for seed in (0, 1)}
    found = findings.plain(
        findings.paired(runs, runs, lambda run: findings.last(run)["edm_gap"])
    )
    assert found == dict(seeds=2, difference=0.0, error=0.0, low=0.0, high=0.0, p=None)
    other = {7: runs[0]}
    none = findings.paired(runs, other, lambda run: findings.last(run)["edm_gap"])
    assert none["difference"] is None


def test_correlation_with_samples():
    rng = np.random.default_rng(0)
    distances, gaps = rng.uniform(1, 2, 6), rng.uniform(0.3, 0.6, 6)
    runs = {f"v{i}": {0: training(f"v{i}", 0, gaps[i], frechet=distances[i])} for i in range(6)}
    sigmas, (pearson, spearman) = findings.correlation(runs)
    np.testing.assert_allclose(sigmas, SIGMAS)
    np.testing.assert_allclose(pearson, stats.pearsonr(gaps, distances).statistic)
    np.testing.assert_allclose(spearman, stats.spearmanr(gaps, distances).statistic)
    assert findings.correlation({n: runs[n] for n in ("v0", "v1", "v2", "v3")}) is None


def test_sigma_star_information_and_the_record(made):
    summary, folder = made[0].summary, made[1]
    assert summary["sigma_star"] == pytest.approx(0.2 * 1.02)
    assert summary["sigma_star_error"] == pytest.approx(stats.sem([0.2, 0.204, 0.208]))
    assert summary["information"] == pytest.approx(7.4 * 1.02)
    assert summary["entropy"] == pytest.approx(np.log(1797))
    said = summary["optimal_loss"]["floor"]
    assert (said["sigma_star_low"], said["sigma_star_high"]) == pytest.approx((0.2, 0.208))
    found, record = curve.load(folder / "optimal_loss.npz")
    rows = [np.array(curve_row(star=1 + 0.02 * k, bracket=True)["value"]) for k in range(3)]
    np.testing.assert_allclose(found.value, np.mean(rows, 0))
    np.testing.assert_allclose(found.stderr, 0.01 * np.sqrt(np.sum(np.square(rows), 0)) / 3)
    assert record["sha256"] == dataset(**settings().data, seed=0).sha256
    assert record["estimator"]["name"] == "exact"
    assert record["seeds"] == [0, 1, 2]


def test_totals_are_in_the_text_and_the_summary(made):
    """Against quadrature of the mean curve on its own levels."""
    said = made[0].summary["optimal_loss"]["floor"]
    assert made[0].summary["totals"] == said["totals"]
    value = np.mean([rising(SIGMAS, 1 + 0.02 * k) for k in range(3)], 0) * VARIANCE / DIM
    x, s = np.log(SIGMAS), SIGMAS
    density = np.exp(-0.5 * (x + 1.2) ** 2 / 1.44) / 1.2 / np.sqrt(2 * np.pi)
    weight = density * (s**2 + 0.25) / (0.5 * s) ** 2
    found = said["totals"]["edm"]
    assert found["value"] == pytest.approx(np.trapezoid(weight * value, x), rel=1e-2)
    assert found["lower"] == pytest.approx(0.7 * found["value"], rel=1e-2)
    error = 0.01 * found["value"] / np.sqrt(3)
    assert found["error"] == pytest.approx(error, rel=2e-2)
    row = next(line for line in made[0].text.splitlines() if line.startswith("| edm | N("))
    assert findings.digits(found["value"], found["error"]) in row
    assert len(said["totals"]) == 7


def floor_of(data, **changes):
    config = settings(experiment="diffusion.estimate", data=data)
    row = {"step": 4, "split": "eval", **curve_row(**changes)}
    return Run("floor-seed0", config, [row], TIMING, lambda: None)


def test_repeated_rows_are_said(tmp_path):
    rows = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), np.uint8)
    rows[[5, 9]] = rows[2]
    np.savez(tmp_path / "data.npz", images=rows)
    run = floor_of(dict(path=str(tmp_path / "data.npz")))
    made = report.report({run.name: run}, tmp_path / "figures")
    assert made.summary["optimal_loss"]["floor"]["duplicates"] == 2
    assert "12 rows (2 equal an earlier one) of 64 coordinates" in made.text
    none = estimation()
    made = report.report({none.name: none}, tmp_path / "figures")
    assert made.summary["optimal_loss"]["floor"]["duplicates"] == 0
    assert "equal an earlier" not in made.text


def test_the_linear_bound_is_drawn_and_said(tmp_path, monkeypatch):
    rows = np.asarray(dataset(**settings().data, seed=0).rows, float).reshape(1797, -1)
    lam = np.linalg.eigvalsh(np.cov(rows.T, bias=True))
    bound = np.array([np.sum(lam * s**2 / (lam + s**2)) for s in SIGMAS])
    drawn = []
    draw = figures.optimal_loss

    def keep(curves, path, bounds):
        drawn.append(bounds)
        return draw(curves, path, bounds)

    monkeypatch.setattr(figures, "optimal_loss", keep)
    below = floor_of({})
    below.rows[0].update(value=(0.999 * bound).tolist(), stderr=(0.01 * bound).tolist())
    text = report.report({below.name: below}, tmp_path)
    assert "J* stays below the linear bound" in text.text
    assert "thin: linear bound" in text.text
    said = text.summary["optimal_loss"]["floor"]["linear"]
    assert said["within"] is True
    assert said["errors"] == pytest.approx(-0.1, abs=1e-3)
    np.testing.assert_allclose(drawn[0]["floor"], bound, rtol=1e-6)

    value = bound.copy()
    value[[4, 9]] *= 1.05
    below.rows[0].update(value=value.tolist(), upper=value.tolist(), lower=value.tolist())
    text = report.report({below.name: below}, tmp_path)
    assert "by more than 2 standard errors at 2 of 33 levels, at most +5.0" in text.text

    # With classes J* is far below: the bound says nothing. Wide rows would take long.
    for run in (floor_of(dict(class_cond=True)), floor_of({})):
        if not run.config.data.class_cond:
            run.rows[0]["dim"] = 5000
        text = report.report({run.name: run}, tmp_path)
        assert "linear" not in text.summary["optimal_loss"]["floor"]
        assert "linear bound" not in text.text
        assert drawn[-1] == {}


def test_errors_of_levels_that_share_draws_add_up():
    row = curve_row(error=0.02)
    found = OptimalLoss(**{n: np.asarray(row[n], float) for n in OptimalLoss._fields})
    value, error = findings.information(found)
    tail = VARIANCE / 2 / 80.0**2
    inside = np.trapezoid(found.value / SIGMAS**2, np.log(SIGMAS))
    assert value == pytest.approx(inside + tail)
    assert error == pytest.approx(0.02 * inside)


def test_files_hold_all_numbers(made):
    folder = made[1]
    with (folder / "optimal_loss.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * len(SIGMAS)
    got = [float(r["value"]) for r in rows if r["seed"] == "2"]
    np.testing.assert_allclose(got, VARIANCE * rising(SIGMAS, 1.04) / DIM)
    with (folder / "diagnosis.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 3 * 3 * len(SIGMAS)
    one = [r for r in rows if (r["variant"], r["seed"], r["step"]) == ("flow", "1", "4")]
    want = loss_row(0.55, tilt=0.4)
    for name in ("loss", "floor", "gap_err", "distance", "density", "weight"):
        np.testing.assert_allclose([float(r[name]) for r in one], want[name])
    assert {r["images"] for r in one} == {"64"}


def test_estimation_alone_with_one_seed(tmp_path):
    run = estimation(star=1.0)
    made = report.report({run.name: run}, tmp_path / "figures")
    json.dumps(made.summary, allow_nan=False)
    assert "Diagnosis" not in made.text
    assert "best" not in made.summary
    # One seed's error is that of its curve, here 1 % of J* everywhere.
    x = np.log(SIGMAS)
    ends = [np.exp(np.interp(0.01 / (1 + e), rising(SIGMAS), x)) for e in (-0.01, 0.01)]
    error = made.summary["sigma_star_error"]
    assert error == pytest.approx((ends[0] - ends[1]) / 2, rel=1e-3)
    assert made.result == f"sigma_star {findings.digits(0.2, error)}."
    assert named(made.text) == {"optimal_loss.png"}
    assert "| lower |" not in made.text


def test_training_alone_with_one_seed(tmp_path):
    runs = comparison(seeds=1)
    made = report.report(runs, tmp_path / "figures")
    json.dumps(made.summary, allow_nan=False)
    assert "## Optimal loss" not in made.text
    assert "sigma_star" not in made.summary
    assert made.summary["edm_gap_error"] == pytest.approx(0.01)  # Of draws.
    assert "one seed, no intervals" in made.text
    (d, _) = made.summary["paired"]
    assert d["edm_gap"]["difference"] == pytest.approx(0.1)
    assert d["edm_gap"]["low"] is None
    assert named(made.text) == {"losses.png", "schedules.png", "differences.png"}


def test_one_variant_without_samples(tmp_path):
    run = training("main", 0, 0.4)
    made = report.report({"seed0": run._replace(name="seed0")}, tmp_path / "figures")
    assert made.result == "main, gap 0.400(10) of loss 0.55."
    assert "Frechet" not in made.text
    assert "## Comparison" not in made.text


def test_two_data_sets_and_other_levels(tmp_path):
    runs = [estimation(name="all"), estimation(name="few", star=0.9, sigmas=SIGMAS[8:])]
    made = report.report({run.name: run for run in runs}, tmp_path)
    assert set(made.summary["optimal_loss"]) == {"all", "few"}
    assert {p.name for p in tmp_path.glob("*.npz")} == {
        "optimal_loss_all.npz",
        "optimal_loss_few.npz",
    }


def test_pictures_of_samples(tmp_path, monkeypatch):
    config = settings(eval=dict(samples=16))
    run = training("edm", 0, 0.4, config=config, frechet=2.0)
    asked = []

    def samples(config, data, parts, params, key, count):
        asked.append((config.sampler.batch_size, params, count))
        return np.zeros((count, 8, 8, 1), np.float32)

    monkeypatch.setattr(report.drawing, "samples", samples)
    state = SimpleNamespace(averages=SimpleNamespace(trees=("params",)))
    made = report.report({run.name: run._replace(state=lambda: state)}, tmp_path)
    assert asked == [(32, "params", 32)]
    assert "samples_edm.png" in named(made.text)
    assert run.config.sampler.batch_size == config.sampler.batch_size  # Untouched.


def test_entropy_counts_repeated_rows_and_classes():
    rows = np.array([0, 0, 1, 2, 3, 3, 3, 4], np.uint8).reshape(8, 1, 1, 1)
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1], np.int32)
    one = np.ones(1, np.float32)
    images = Images(rows, labels, (), "x/127.5-1", 0 * one, one, "a", "", "", 3)
    shares = np.array([2, 1, 1, 3, 1]) / 8
    assert findings.entropy(images, False) == pytest.approx(stats.entropy(shares))
    within = [stats.entropy([0.5, 0.25, 0.25]), stats.entropy([0.75, 0.25])]
    assert findings.entropy(images, True) == pytest.approx(np.mean(within))
    distinct = images._replace(rows=np.arange(8, dtype=np.uint8).reshape(8, 1, 1, 1))
    distinct = distinct._replace(duplicates=0)
    assert findings.entropy(distinct, False) == pytest.approx(np.log(8))
    assert findings.entropy(distinct, True) == pytest.approx(np.log(4))


def test_known_curves_are_told_by_name_and_size():
    digits = dataset(**settings().data, seed=0)
    other = known_curves.known(digits)
    assert other.value[list(other.sigmas).index(1.0)] * 64 == pytest.approx(4.8)
    assert known_curves.known(digits._replace(rows=digits.rows[:100])) is None
    assert known_curves.known(digits._replace(name="photos")) is None
    cifar = np.broadcast_to(np.zeros((), np.uint8), (50_000, 32, 32, 3))
    there = known_curves.known(digits._replace(rows=cifar, name="cifar-10-batches"))
    assert there.value[list(there.sigmas).index(8.0)] == pytest.approx(0.1397)
    assert len(there.sigmas) == len(there.value) == len(there.error) == 12


def test_comparison_with_a_known_curve():
    other = known_curves.known(dataset(**settings().data, seed=0))
    dense = np.geomspace(0.25, 6, 12)
    dense = np.union1d(dense[np.abs(np.log(dense / 2)) > 0.1], [2.0])
    value = np.interp(np.log(dense), np.log(other.sigmas), other.value) * DIM
    found = OptimalLoss(
        *(dense, value, 0.01 * value, value, value, value, value, value, value),
        *(np.array(n) for n in (VARIANCE, 256, DIM)),
    )
    rows = {row["sigma"]: row for row in known_curves.compared(found, other)}
    assert 10 not in rows  # Beyond our levels.
    at = rows[2.0]
    assert at["ours"] == pytest.approx(13.08 / 64)
    assert at["ours_error"] == pytest.approx(0.1308 / 64)
    assert abs(at["errors"]) < 1e-6
    sparse = found._replace(
        **{n: getattr(found, n)[::6] for n in ("sigmas", "value", "stderr")}
    )
    assert len(known_curves.compared(sparse, other)) < len(rows)


WIDTHS = (8, 12, 16, 24, 32, 48)


def ladder(steps=(4,), odd=False):
    runs = {}
    for width in WIDTHS:
        config = settings(report=dict(scaling=True), model=dict(mlp=dict(width=width)))
        if odd:
            config.batch_size = width
        for seed in (0, 1):
            rows = []
            for step in steps:
                flops = 1e6 * width**2 * step
                gap = 0.4 * (flops / 1e8) ** -0.25
                rows.append(loss_row(gap, step, flops=flops))
            name = f"w{width:02d}-seed{seed}"
            runs[name] = Run(name, config, rows, TIMING, lambda: None)
    return runs


def test_scaling_law_of_widths(tmp_path, monkeypatch):
    few = lambda groups: ANALYSES(groups, draws=20, band_draws=4)
    monkeypatch.setattr(scaling_runs, "analyses", few)
    made = report.report(ladder(), tmp_path)
    json.dumps(made.summary, allow_nan=False)
    total = made.summary["scaling"]["total"]
    assert total["corrected_alpha"] == pytest.approx(-0.25, abs=1e-6)
    assert total["corrected_rho"] == pytest.approx(1, abs=1e-9)
    assert total["optimum"] == pytest.approx(0.15)
    assert total["raw_rho"] < 1
    assert total["free_offset"] == pytest.approx(0.15, abs=0.005)
    assert len(made.summary["scaling"]) > 1  # Bands, too.
    assert {"scaling.png", "scaling_bands.png", "scaling_exponents.png"} <= named(made.text)
    assert "| total | 0.15" in made.text


ANALYSES = scaling_runs.analyses


def test_scaling_along_training_and_paired_floors():
    """Noise of the floor that loss and floor share does not move the fit."""
    groups = findings.grouped(ladder(steps=(2, 4, 8, 16)))[1]
    rng = np.random.default_rng(0)
    for seeds in groups.values():
        for run in seeds.values():
            for row in run.rows:
                row["edm_floor"] = 0.15 + 0.01 * rng.standard_normal()
                row["edm_loss"] = row["edm_floor"] + row["edm_gap"]
    found, _ = scaling_runs.analyses(groups, draws=0, band_draws=0)
    total = found["total"]
    floors = [row["edm_floor"] for s in groups.values() for r in s.values() for row in r.rows]
    assert total.optimum == pytest.approx(np.mean(floors))
    assert total.corrected.alpha == pytest.approx(-0.25, abs=1e-3)
    # 8 evaluations have draws of their own, whatever the number of widths.
    x, s = np.log(SIGMAS), SIGMAS
    density = np.exp(-0.5 * ((x + 1.2) / 1.2) ** 2)
    weighted = (s**2 + 0.25) / (0.5 * s) ** 2 * 0.003 * rising(s)
    each = np.trapezoid(density * weighted, x) / np.trapezoid(density, x)
    assert total.optimum_err == pytest.approx(each / np.sqrt(8))


def test_gaps_within_their_own_error_are_dropped():
    """Each evaluation brings its own error, of the total and of its bands."""
    groups = findings.grouped(ladder(steps=(2, 4)))[1]
    rows = [row for s in groups.values() for r in s.values() for row in r.rows]
    error = np.zeros(len(SIGMAS))
    for row in rows[:3]:
        row["edm_gap_err"] = 0.6 * row["edm_gap"]
        row["gap_err"] = (20 * np.array(row["gap"])).tolist()
    for row in rows:
        row["floor_err"] = error.tolist()
    found, _ = scaling_runs.analyses(groups, draws=0, band_draws=0)
    assert {(r.below, r.within) for r in found.values()} == {(0, 3)}


def test_scaling_needs_five_widths(tmp_path):
    made = report.report(ladder(odd=True), tmp_path)
    assert "A fit needs 5 variants" in made.text
    assert "there are 1." in made.text
    assert "scaling" not in made.summary


def test_fields_that_do_not_matter_keep_widths_together():
    runs = ladder()
    for i, run in enumerate(runs.values()):
        run.config.optim.learning_rate = 1e-3 * (1 + i)
    groups = findings.grouped(runs)[1]
    assert set(scaling_runs.widths(groups)) == set(groups)


@pytest.mark.parametrize("bracket", [False, True])
def test_page_of_a_curve(tmp_path, bracket):
    row = curve_row(bracket=bracket)
    found = OptimalLoss(**{n: np.asarray(row[n], float) for n in OptimalLoss._fields})
    text = figures.curve_page(found, dict(data="made up"), 0.01, tmp_path)
    assert ("lower" in text) is bracket
    assert f"variance {VARIANCE / DIM:.6g} per coordinate" in text
    star = np.exp(np.interp(0.01, rising(SIGMAS), np.log(SIGMAS)))
    assert f"sigma_star {star:.3f}"[:-1] in text
    again, record = curve.load(tmp_path / "optimal_loss.npz")
    np.testing.assert_array_equal(again.value, found.value)
    assert record == dict(data="made up")
    rows = (tmp_path / "optimal_loss.csv").read_text().splitlines()
    assert len(rows) == 1 + len(SIGMAS)
    table = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert 8 <= len(table) - 8 <= 13  # Below it, the head and seven rows of totals.
    want = totals.totals(found, 0.5)["vp"]
    assert f"| {findings.digits(want['value'], want['error'])} |" in text
    other = figures.curve_page(found, {}, 0.01, tmp_path, sigma_data=1.0)
    want = totals.totals(found, 1.0)["edm"]
    assert f"σ_data 1 | {findings.digits(want['value'], want['error'])} |" in other
    with Image.open(tmp_path / "optimal_loss.png") as image:
        image.verify()


def test_page_of_a_diagnosis(tmp_path):
    row = loss_row(0.4)
    found = Diagnosis(**{n: np.asarray(row[n], float) for n in Diagnosis._fields})
    text = figures.diagnosis_page(found, "edm-seed0", tmp_path)
    assert sum(line.startswith("| ") for line in text.splitlines()) == 2 + 33 + 16
    assert len((tmp_path / "diagnosis.csv").read_text().splitlines()) == 1 + len(SIGMAS)
    with Image.open(tmp_path / "diagnosis.png") as image:
        image.verify()


def test_the_weight_of_a_diagnosis_is_that_of_its_data(tmp_path):
    row = loss_row(0.4, tilt=0.5)
    found = Diagnosis(**{n: np.asarray(row[n], float) for n in Diagnosis._fields})
    half, one = (
        figures.diagnosis_page(found, "a", tmp_path, **k) for k in ({}, dict(sigma_data=1.0))
    )
    assert half != one
    for text, sd in ((half, 0.5), (one, 1.0)):
        shares = [f"| {100 * row[3]:.1f} % |" for row in figures.octaves(found, sd)]
        lines = [line for line in text.splitlines() if " – " in line]
        assert all(line.endswith(share) for line, share in zip(lines, shares, strict=True))


def test_octaves_of_a_flat_gap_have_equal_shares():
    one = np.ones(40)
    flat = Diagnosis(np.geomspace(0.25, 4, 40), *(one for _ in range(8)), np.array(9))
    rows = figures.octaves(flat)
    np.testing.assert_allclose(
        [row[:2] for row in rows], [(0.25, 0.5), (0.5, 1), (1, 2), (2, 4)]
    )
    np.testing.assert_allclose([row[2] for row in rows], 0.25)
    x = np.linspace(np.log(0.25), np.log(4), 4001)
    s = np.exp(x)
    parts = np.exp(-0.5 * ((x + 1.2) / 1.2) ** 2) * (s**2 + 0.25) / (0.5 * s) ** 2
    share = np.trapezoid(parts[:1001], x[:1001]) / np.trapezoid(parts, x)
    assert rows[0][3] == pytest.approx(share, rel=1e-3)
    cut = figures.octaves(flat._replace(sigmas=np.geomspace(0.3, 3, 40)))
    assert (cut[0][0], cut[-1][1]) == pytest.approx((0.3, 3.0))
    assert sum(row[2] for row in cut) == pytest.approx(1)


def test_a_gap_below_zero_is_said():
    row = loss_row(0.4) | dict(gap_worst=-7.0)
    found = findings.summarize({0: Run("a", settings(), [row], {}, lambda: None)})
    assert found["gap_nonnegative"] is False


@pytest.mark.parametrize(
    ("value", "error", "want"),
    [
        (0.012, 0.0012, "0.0120(12)"),
        (0.46, 0.01, "0.460(10)"),
        (5.6e-5, 2.9e-5, "5.6(2.9)e-05"),
        (2e-7, 0.0, "2e-07"),
        (0.25, None, "0.25"),
        (0.0, 0.0, "0"),
        (12.5, 1.5, "12.5(1.5)"),
        (1234.0, 56.0, "1234(56)"),
        (None, None, "–"),
        (float("nan"), 1.0, "–"),
    ],
)
def test_digits(value, error, want):
    assert findings.digits(value, error) == want


def test_plain_numbers_for_json():
    tree = dict(a=np.float32(1.5), b=[np.nan, np.inf, 2], c=(np.bool_(True),), d=np.arange(2))
    tree["e"] = dict(f=jnp.inf)
    want = dict(a=1.5, b=[None, None, 2], c=[True], d=[0, 1], e=dict(f=None))
    assert findings.plain(tree) == want
