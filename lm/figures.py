"""The figures of a comparison of weight decays, one function each."""

import warnings
from pathlib import Path

import numpy as np

from common import metrics, plots
from lm.actions import heat_map, over_training
from lm.modules import TYPES


def all_figures(groups, found, paired: list, folder: Path) -> list[tuple[str, str]]:
    """Draws everything there is data for; returns (file name, caption) pairs."""
    drawn = [losses(groups, folder / "loss.png")]
    if len({f["weight_decay"] for f in found.values()}) > 1:
        drawn.append(strengths(found, folder / "strengths.png"))
    if paired:
        drawn.append(differences(paired, folder / "paired.png"))
    drawn.append(types(groups, folder / "types.png"))
    fitted = {n: g for n, g in groups.items() if _rows(g, "alpha_q")}
    for name, seeds in fitted.items():
        drawn.append(exponents(name, seeds, folder / f"alpha_{name}.png"))
    drawn.append(maps(groups, folder / "modules.png"))
    drawn.append(layers(groups, folder / "over_training.png"))
    return drawn


def _rows(seeds, name: str, split: str = "train") -> list[tuple[np.ndarray, np.ndarray]]:
    found = [metrics.select(run.rows, name, split) for run in seeds.values()]
    return [f for f in found if len(f[0])]


def _mean(alpha: np.ndarray, axes) -> np.ndarray:
    """Of exponents; 0 stands for none and does not count. NaN where there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(np.where(alpha > 0, alpha, np.nan), axis=axes)


def losses(groups, path: Path) -> tuple[str, str]:
    """Training loss of every variant, and validation loss over training."""
    with plots.figure(path, columns=2) as (left, right):
        for i, (name, seeds) in enumerate(groups.items()):
            colour = plots.colour(i)
            curves = _rows(seeds, "loss")
            steps, mean = curves[0][0], np.mean([c[1] for c in curves], axis=0)
            left.plot(steps, mean, lw=1, color=colour, label=name)
            evals = _rows(seeds, "val_loss", "eval")
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


def strengths(found, path: Path) -> tuple[str, str]:
    """Validation loss against the strength of decay, a line for every rule."""
    rules: dict[str, list[dict]] = {}
    for f in sorted(found.values(), key=lambda f: f["weight_decay"]):
        rules.setdefault(f["rule"], []).append(f)
    with plots.figure(path) as axis:
        for i, (rule, each) in enumerate(rules.items()):
            loss, error = each[0]["val_loss"], each[0]["val_loss_error"]
            if rule == "none":
                axis.axhline(loss, color="k", lw=1, ls="--", label=rule)
                if error is not None:
                    axis.axhspan(loss - error, loss + error, color="k", alpha=0.1)
                continue
            x = [f["weight_decay"] for f in each]
            y, errors = ([f[name] for f in each] for name in ("val_loss", "val_loss_error"))
            axis.errorbar(
                x, y, errors, marker=".", capsize=3, color=plots.colour(i), label=rule
            )
        axis.set(xscale="log", xlabel="base decay", ylabel="validation loss (nats per token)")
        axis.legend()
    return path.name, "Validation loss against the strength of decay, one standard error"


def differences(paired, path: Path) -> tuple[str, str]:
    """Paired differences of the validation loss, with 95 % intervals."""
    known = [d for d in paired if d["difference"] is not None][::-1]
    bases = list(dict.fromkeys(d["base"] for d in paired))
    height = max(3.0, 0.26 * len(known))
    with plots.figure(path, figsize=(6.4, height)) as axis:
        for i, d in enumerate(known):
            reach = 0 if d["low"] is None else d["high"] - d["difference"]
            colour = plots.colour(bases.index(d["base"]))
            axis.errorbar(d["difference"], i, xerr=reach, fmt="o", capsize=3, color=colour)
        axis.axvline(0, color="k", lw=1, ls="--")
        names = [f"{d['what']} − {d['base']}" for d in known]
        axis.set_yticks(range(len(known)), names, fontsize=8)
        axis.set(xlabel="validation loss (nats per token)", ylim=(-0.5, len(known) - 0.5))
        axis.locator_params(axis="x", nbins=5)
    return path.name, "Differences seed by seed with 95 % intervals; left: the first is better"


def types(groups, path: Path) -> tuple[str, str]:
    """Exponents by type of module over training, a panel for every variant."""
    with plots.panels(path, len(groups), sharex=True, sharey=True) as axes:
        for axis, (name, seeds) in zip(axes, groups.items(), strict=True):
            for i, kind in enumerate(TYPES):
                found = _rows(seeds, f"alpha_layers_{kind}", "eval")
                mean = _mean(np.stack([values for _, values in found]), (0, 2))
                axis.plot(found[0][0], mean, marker=".", color=plots.colour(i), label=kind)
            axis.set(title=name, xlabel="step", ylabel="exponent")
        axes[0].legend(ncols=2)
    return path.name, "Exponents by type of module, means over layers and seeds"


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
        found[name] = _mean(np.array(each), 0)
    heat_map(path, found)
    return path.name, "Exponents at the end of training, by type and layer"


def layers(groups, path: Path) -> tuple[str, str]:
    """Exponents of every module over training, the first seed of each variant."""
    over_training(path, {name: next(iter(g.values())).rows for name, g in groups.items()})
    return path.name, "Exponents of every module over training, by type and layer, one seed"
