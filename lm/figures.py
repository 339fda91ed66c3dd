"""The figures of a comparison of weight decays, one function each."""

from pathlib import Path

import numpy as np

from common import metrics, plots
from lm.actions import heat_map
from lm.modules import TYPES


def all_figures(groups, base: str, paired: dict, folder: Path) -> list[tuple[str, str]]:
    """Draws everything there is data for; returns (file name, caption) pairs."""
    drawn = [losses(groups, folder / "loss.png")]
    if paired:
        drawn.append(differences(paired, base, folder / "paired.png"))
    fitted = {n: g for n, g in groups.items() if _rows(g, "alpha_q")}
    for name, seeds in fitted.items():
        drawn.append(exponents(name, seeds, folder / f"alpha_{name}.png"))
    drawn.append(maps(groups, folder / "modules.png"))
    return drawn


def _rows(seeds, name: str) -> list[tuple[np.ndarray, np.ndarray]]:
    found = [metrics.select(run.rows, name) for run in seeds.values()]
    return [f for f in found if len(f[0])]


def losses(groups, path: Path) -> tuple[str, str]:
    """Training loss of every variant, and validation loss over training."""
    with plots.figure(path, columns=2) as (left, right):
        for i, (name, seeds) in enumerate(groups.items()):
            colour = f"C{i}"
            curves = _rows(seeds, "loss")
            steps, mean = curves[0][0], np.mean([c[1] for c in curves], axis=0)
            left.plot(steps, mean, lw=1, color=colour, label=name)
            evals = [metrics.select(run.rows, "val_loss", "eval") for run in seeds.values()]
            steps = evals[0][0]
            values = np.array([v for _, v in evals])
            error = values.std(axis=0, ddof=1) / len(values) ** 0.5 if len(values) > 1 else None
            right.errorbar(
                steps, values.mean(axis=0), error, lw=1, marker=".", color=colour, label=name
            )
        left.set(xlabel="step", ylabel="training loss (nats per token)")
        right.set(xlabel="step", ylabel="validation loss (nats per token)")
        right.legend()
    return path.name, "Loss over training and validation, means over seeds"


def differences(paired, base: str, path: Path) -> tuple[str, str]:
    """Validation loss minus the base's, with 95 % intervals."""
    names = sorted(paired, key=lambda name: paired[name]["difference"] or 0, reverse=True)
    with plots.figure(path) as axis:
        for i, name in enumerate(names):
            d = paired[name]
            reach = 0 if d["low"] is None else d["high"] - d["difference"]
            axis.errorbar(d["difference"], i, xerr=reach, fmt="o", capsize=3, color="C0")
        axis.axvline(0, color="k", lw=1, ls="--")
        axis.set_yticks(range(len(names)), names)
        axis.set(
            xlabel=f"validation loss − {base} (nats), 95 % intervals",
            ylim=(-0.5, len(names) - 0.5),
        )
    return path.name, f"Differences from {base}, seed by seed; left is better"


def exponents(name, seeds, path: Path) -> tuple[str, str]:
    """Exponents and ratios by type of module over training."""
    with plots.figure(path, columns=2) as (left, right):
        for i, kind in enumerate(TYPES):
            for axis, what in ((left, "alpha"), (right, "ratio")):
                curves = _rows(seeds, f"{what}_{kind}")
                mean = np.mean([c[1] for c in curves], axis=0)
                axis.plot(curves[0][0], mean, lw=1.2, color=plots.colour(i), label=kind)
        left.set(xlabel="step", ylabel="exponent")
        right.set(xlabel="step", ylabel="decay ratio")
        right.legend(ncols=2)
        left.figure.suptitle(name)
    return path.name, f"{name}: exponents and decay ratios by type of module over training"


def maps(groups, path: Path) -> tuple[str, str]:
    """Exponents at the end, types against layers, one panel per variant."""
    found = {}
    for name, seeds in groups.items():
        rows = [[r for r in run.rows if r["split"] == "eval"][-1] for run in seeds.values()]
        each = [[row[f"alpha_layers_{kind}"] for kind in TYPES] for row in rows]
        found[name] = np.mean(each, axis=0)
    heat_map(path, found)
    return path.name, "Exponents at the end of training, by type and layer"
