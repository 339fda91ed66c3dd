"""What a curve is said to tell: sigma_star, information, curves of others beside it."""

import numpy as np
import pytest

from diffusion import findings, known_curves, report
from diffusion.images import Images
from tests.diffusion.test_report import SIGMAS, comparison, curve_row, estimation


def test_a_rise_beyond_the_levels_is_no_sigma_star(tmp_path):
    runs = {run.name: run for run in [estimation(star=1e4), *comparison(1).values()]}
    row = runs["floor-seed0"].rows[-1]
    row["sigma_star"] = SIGMAS[-1]
    found = report.report(runs, tmp_path / "figures")
    assert found.summary["sigma_star_inside"] is False
    assert found.summary["sigma_star_error"] is None
    assert "sigma_star at the end of the levels, 80" in found.result
    assert "change estimator.sigma_min or sigma_max" in found.text


@pytest.mark.parametrize(("factor", "warned"), [(1.0, False), (1.5, True)])
def test_information_that_is_not_the_entropy_is_said(tmp_path, factor, warned):
    run = estimation()
    run.rows[-1]["information"] = factor * np.log(1797)
    text = report.report({run.name: run}, tmp_path / "figures").text
    assert ("It is not: the levels do not cover" in text) == warned


def test_few_levels_about_sigma_star_are_part_of_its_error():
    fine, coarse = (
        findings.curve_of(curve_row(sigmas=np.geomspace(0.02, 80, n))) for n in (129, 9)
    )
    star, error = findings.sigma_star(fine, 0.01)
    rough, rough_error = findings.sigma_star(coarse, 0.01)
    assert error < 0.01 * star
    assert abs(rough - star) < 2 * rough_error < 1.5 * star
    assert rough_error > 20 * error


def test_curves_of_other_data_are_not_compared_with():
    images = Images(*[None] * len(Images._fields))
    rows = np.zeros((50_000, 1, 1, 3072), np.uint8)
    named = lambda name: known_curves.known(images._replace(rows=rows, name=name))
    assert named("cifar100_train") is None
    other = named("cifar10_train")
    loss = findings.curve_of(curve_row())._replace(dim=np.array(3072))
    fits = loss._replace(variance=np.array(3072 * 0.2457))
    assert known_curves.compared(fits, other)
    assert not known_curves.compared(fits._replace(variance=3980 * fits.variance), other)
