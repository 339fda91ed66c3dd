"""The report of a comparison: who is compared with whom, and the figures that come out."""

import json
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from common import config as configs
from common.experiment import Run
from lm import actions, report
from lm.modules import TYPES
from lm.transformer import transformer

pytestmark = pytest.mark.xdist_group("lm-report")

LOSSES = {
    "none": [2.0, 2.2, 2.1],
    "uniform_a": [1.9, 2.0, 2.05],
    "uniform_b": [1.8, 2.0, 2.0],
    "alphadecay_b": [1.7, 1.95, 1.9],
    "uniform_matched_b": [1.75, 1.9, 1.95],
}
OPTIM = {
    "none": dict(rule="none"),
    "uniform_a": dict(rule="uniform", weight_decay=0.1),
    "uniform_b": dict(rule="uniform", weight_decay=0.3),
    "alphadecay_b": dict(rule="alphadecay", weight_decay=0.3),
    "uniform_matched_b": dict(rule="uniform_matched", weight_decay=0.3),
}


@dataclass
class Flags:
    """What the spectra of one run say: exponents and deficient modules of type v."""

    alpha: tuple = (2.5, 2.6)
    deficient: tuple = (0, 0)


def run(name, seed, loss, flags=None, devices="2 x NVIDIA H100 80GB HBM3"):
    config = configs.load("configs/alphadecay.py:test")
    configs.apply(config, dict(optim=OPTIM[name]))
    flags = flags or Flags()
    rows = []
    for step in (0, 3, 6):
        row = {"step": step, "split": "train", "loss": 5.0 - step / 10}
        if "alphadecay" in name:
            row |= {"ratio_mean": 2.0 + step} | {f"alpha_{k}": 2.0 for k in TYPES}
            row |= {f"ratio_{k}": 1.0 + i + step for i, k in enumerate(TYPES)}
        rows.append(row)
        value = loss + (6 - step)
        row = {"step": step, "split": "eval", "val_loss": value, "val_ppl": np.exp(value)}
        row |= {"val_ppl_released": np.exp(0.99 * value)}
        for i, kind in enumerate(TYPES):
            row[f"alpha_layers_{kind}"] = list(flags.alpha) if kind == "v" else [2 + i, 2 + i]
            row[f"deficient_layers_{kind}"] = list(flags.deficient) if kind == "v" else [0, 0]
            row[f"stable_rank_layers_{kind}"] = [3.0, 3.0]
        rows.append(row)
    timing = dict(steps_per_second=4.0, peak_host_memory_mb=100.0, devices=devices)
    return Run(f"{name}-seed{seed}", config, rows, timing, lambda: None)


def runs(**changes):
    found = [
        run(name, seed, loss, **changes.get(f"{name}-seed{seed}", {}))
        for name, losses in LOSSES.items()
        for seed, loss in enumerate(losses)
    ]
    return {each.name: each for each in found}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "figures"
    return report.report(runs(), folder), folder


def test_rules_meet_those_of_their_strength(made):
    found = {(d["what"], d["base"]) for d in made[0].summary["paired"]}
    with_none = {(name, "none") for name in LOSSES if name != "none"}
    assert found == with_none | {
        ("alphadecay_b", "uniform_b"),
        ("uniform_matched_b", "uniform_b"),
        ("alphadecay_b", "uniform_matched_b"),
    }


def test_differences_are_paired_by_seed(made):
    for d in made[0].summary["paired"]:
        ours, base = LOSSES[d["what"]], LOSSES[d["base"]]
        want = stats.ttest_rel(ours, base)
        low, high = want.confidence_interval(0.95)
        got = [d["difference"], d["low"], d["high"], d["p"]]
        want = [np.mean(np.subtract(ours, base)), low, high, want.pvalue]
        np.testing.assert_allclose(got, want, rtol=1e-8)
        assert d["seeds"] == 3


def test_means_errors_and_ratios(made):
    found = made[0].summary["groups"]
    for name, losses in LOSSES.items():
        assert found[name]["val_loss"] == pytest.approx(np.mean(losses))
        assert found[name]["val_loss_error"] == pytest.approx(stats.sem(losses))
    assert made[0].summary["best"] == "alphadecay_b"
    assert found["alphadecay_b"]["ratio_mean"] == pytest.approx(5.0)
    assert found["alphadecay_b"]["ratios"]["k"] == pytest.approx(5.0)
    assert "ratio_mean" not in found["none"]


def test_every_figure_of_the_text_is_there(made):
    text, folder = made[0].text, made[1]
    named = {part.split(")")[0] for part in text.split("(figures/")[1:]}
    assert named == {path.name for path in folder.glob("*.png")}
    assert {"strengths.png", "paired.png", "types.png", "over_training.png"} <= named
    assert "Modules to look at" not in text


def test_modules_without_a_sound_spectrum_are_named(tmp_path):
    odd = {"none-seed1": dict(flags=Flags((0.0, 2.0), (0, 1)))}
    text = report.report(runs(**odd), tmp_path).text
    assert "Modules to look at: none-seed1: v[0] no exponent, none-seed1: v[1] rank-" in text


@pytest.mark.parametrize(
    ("devices", "want"),
    [
        ("2 x NVIDIA H100 80GB HBM3", 2 * 989e12),
        ("4 x TPU v5 lite", 4 * 197e12),
        ("4 x TPU v5", 4 * 459e12),
        ("1 x cpu", 0.0),
    ],
)
def test_model_flops_utilisation(devices, want, tmp_path):
    one = {"none-seed0": run("none", 0, 2.0, devices=devices)}
    made = report.report(one, tmp_path)
    json.dumps(made.summary, allow_nan=False)  # One seed has no error bar, and that is not NaN.
    text = made.text
    (row,) = [line for line in text.splitlines() if line.startswith("| none-seed0 | 4")]
    said = row.split("|")[4].strip()
    config = one["none-seed0"].config
    tokens = 4.0 * config.batch_size * config.data.length
    products = 2 * (4 * 16 * 16 + 3 * 16 * 24) + 256 * 16
    used = (6 * products + 12 * 2 * 16 * config.data.length) * tokens
    assert said == (f"{100 * used / want:.1f} %" if want else "–")


def test_flags_of_spectra():
    model = transformer(vocab=8, dim=64, mlp=96, heads=2, depth=2)
    params = model.init(jnp.array([0, 0], jnp.uint32))
    kernel = params["blocks"]["v"]["kernel"]
    low = kernel[0, :, :20] @ kernel[0, :20, :]  # Rank 20 of 64: zeros in the upper half.
    some = kernel[1, :, :40] @ kernel[1, :40, :]  # Rank 40: the upper half is whole.
    params["blocks"]["v"]["kernel"] = jnp.stack([low, some])
    params["blocks"]["o"]["kernel"] = jnp.stack([0 * low, kernel[1]])
    found = actions.spectra_of(params)
    assert found["deficient_layers_v"].tolist() == [1, 0]
    assert found["alpha_layers_v"].min() > 1
    assert found["alpha_layers_o"][0] == 0
    alpha, flags = found["alpha_layers_o"].tolist(), found["deficient_layers_o"].tolist()
    assert [actions.note(*each) for each in zip(alpha, flags, strict=True)] == [
        "no exponent",
        "",
    ]
