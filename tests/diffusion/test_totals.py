"""Optimal totals of the field's losses: published numbers, draws of each schedule, bounds."""

import jax
import numpy as np
import pytest

from diffusion import curve, known_curves, schedules, totals
from diffusion.estimators import OptimalLoss
from diffusion.preconditioning import preconditioning
from diffusion.processes import process

DIM = 10
SIGMAS = np.geomspace(0.01, 80, 60)
LAM = np.geomspace(0.02, 3, DIM)
# Of 50,000 images of CIFAR-10, from the same twelve points, by another program.
PUBLISHED = dict(
    edm=0.0066,
    edm2_latents=0.015,
    edm2_pixels=0.044,
    fm_uniform=0.033,
    fm_logit_normal=0.012,
    vp=0.00054,
)


def made(s, value, stderr, variance, dim, **changes):
    s, value, stderr = (np.asarray(a, float) for a in (s, value, stderr))
    zero = np.zeros(len(s))
    found = OptimalLoss(
        *(s, value, stderr, value, value, stderr, stderr, zero, zero),
        *(np.array(float(n)) for n in (variance, 300, dim)),
    )
    return found._replace(**changes)


def gaussian(error=0.01, **changes):
    value = curve.linear_bound(LAM, SIGMAS)
    return made(SIGMAS, value, error * value, LAM.sum(), DIM, **changes)


def cifar():
    known = known_curves._cifar10()
    value, error = (known.dim * a for a in (known.value, known.error))
    return made(known.sigmas, value, error, 0.2456 * known.dim, known.dim)


def test_published_totals_of_cifar10():
    """0.033 of flow matching is that of t below 80 / 81, where noise levels end."""
    found = totals.totals(cifar())
    for name, want in PUBLISHED.items():
        relative = 0.1 if name == "fm_uniform" else 0.03
        assert found[name]["value"] == pytest.approx(want, rel=relative), name
    (flow,) = (f for f in totals.families() if f.name == "fm_uniform")
    cut = curve.weighted_total(curve.smooth(cifar()), flow.weight, flow.density, flow.low, 80.0)
    assert cut / 3072 == pytest.approx(0.033, rel=0.01)
    # The rest is V times the share of t beyond, times ((1 + s) / s)^2.
    t = np.linspace(80 / 81, 1, 10_001)[:-1]
    rest = np.mean(0.2456 / t**2) / 81
    whole = cut / 3072 * 80 / 81 + rest
    assert found["fm_uniform"]["value"] == pytest.approx(whole, rel=2e-3)


def test_each_total_is_a_mean_over_draws_of_its_schedule():
    found = totals.totals(gaussian(), 0.7)
    given = dict(sigma_data=0.7, sigma_min=0.002, sigma_max=80.0, optimal={})
    normal = dict(
        edm=("edm", -1.2, 1.2),
        edm2_latents=("edm2", -0.4, 1.0),
        edm2_pixels=("edm2", -0.8, 1.6),
    )
    assert set(found) == set(normal) | {"fm_uniform", "fm_logit_normal", "vp", "ve"}
    for i, (name, row) in enumerate(found.items()):
        kind, mean, std = normal.get(name, (name, 0.0, 1.0))
        wrap = preconditioning(process("edm"), "F", 0.7)
        one = schedules.schedule(kind, wrap, p_mean=mean, p_std=std, **given)
        s = np.asarray(one.sample(jax.random.key(i), 200_000, ()), float)
        weight = np.asarray(one.weight(s, ()), float)
        # J* counts as 0 below the first level.
        each = np.where(s < SIGMAS[0], 0, weight * curve.linear_bound(LAM, s) / DIM)
        error = each.std() / np.sqrt(len(s))
        assert row["value"] == pytest.approx(each.mean(), abs=4 * error + 2e-4 * each.mean())


def test_errors_of_levels_add_up():
    found = totals.totals(gaussian())
    for name, row in found.items():
        # Beyond s = 80 the variance is known.
        assert row["error"] == pytest.approx(0.01 * row["value"], rel=0.03), name
    density = lambda s: np.exp(-0.5 * ((np.log(s) + 1.2) / 1.2) ** 2)
    s = np.geomspace(SIGMAS[0], SIGMAS[-1], 4001)
    weight = density(s) * (s**2 + 0.25) / (0.5 * s) ** 2
    size = 1.2 * np.sqrt(2 * np.pi)
    alone = 0.3 * (np.arange(60) == 30)  # One level with an error: a bump of its own.
    got = totals.totals(gaussian()._replace(stderr=alone))["edm"]["error"]
    bump = np.interp(np.log(s), np.log(SIGMAS), alone)
    want = np.trapezoid(weight * bump, np.log(s)) / size / DIM
    assert got == pytest.approx(want, rel=0.03)
    none = totals.totals(gaussian(error=np.nan))
    assert np.isnan(none["vp"]["error"])
    assert np.isfinite(none["vp"]["value"])


def test_bounds_have_totals_where_there_are_bounds():
    plain = totals.totals(gaussian())
    assert set(plain["edm"]) == {"value", "error"}
    value = gaussian().value
    both = totals.totals(gaussian(lower=0.5 * value, upper=np.minimum(1.5 * value, LAM.sum())))
    assert both["edm"]["lower"] == pytest.approx(0.5 * both["edm"]["value"], rel=0.02)
    assert both["edm"]["value"] == plain["edm"]["value"]
    assert 1.2 < both["edm"]["upper"] / both["edm"]["value"] < 1.5
    heads = [totals.table(rows).splitlines()[0] for rows in (plain, both)]
    assert ["upper" in head for head in heads] == [False, True]


@pytest.mark.parametrize("error", [0.0, 0.01])
def test_a_table_has_a_row_for_every_loss(error):
    text = totals.table(totals.totals(gaussian(error), 1.0), 1.0)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 7
    assert len({line.count("|") for line in lines}) == 1
    assert "EDM, σ_data 1 |" in lines[2]
    assert ("(" in lines[2].split("|")[4]) is bool(error)


def test_data_without_spread_lose_nothing():
    flat = made(SIGMAS, 0 * SIGMAS, 0 * SIGMAS, 0.0, 1)
    assert all(row == dict(value=0.0, error=0.0) for row in totals.totals(flat).values())
    bound, said = totals.beside_linear(flat, np.zeros(1))
    assert said["within"]
    np.testing.assert_array_equal(bound, 0)


def test_the_linear_bound_and_who_is_above_it():
    """Normal data lie on it; eigenvalues by hand."""
    s = SIGMAS
    bound, said = totals.beside_linear(gaussian(), LAM)
    want = [sum(lam * one**2 / (lam + one**2) for lam in LAM) for one in s]
    np.testing.assert_allclose(bound, want, rtol=1e-12)
    assert said["within"]
    assert abs(said["errors"]) < 1e-6
    assert "stays below the linear bound" in totals.linear_words(said)

    off = gaussian()
    off.value[20] += 1.9 * off.stderr[20]
    said = totals.beside_linear(off, LAM)[1]
    assert said["within"]
    assert said["errors"] == pytest.approx(1.9, rel=1e-3)
    assert said["sigma"] == pytest.approx(s[20])
    off.value[40:43] += 3 * off.stderr[40:43]
    said = totals.beside_linear(off, LAM)[1]
    assert (said["within"], said["above"], said["levels"]) == (False, 3, 60)
    words = totals.linear_words(said)
    assert "standard errors at 3 of 60 levels, at most +3.0 of them" in words

    unknown = totals.beside_linear(gaussian(error=np.nan), LAM)[1]
    assert (unknown["within"], unknown["errors"], unknown["sigma"]) == (True, None, None)
    assert totals.linear_words(unknown).endswith("at every level.")
