"""The report of optimal losses and of the models that were held against them.

Sections appear where there are runs for them: the optimal loss of each data set, what each
variant of training leaves open above it, which schedule does so where along the noise axis, a
scaling law over widths, and times. Beside the figures lie optimal_loss.npz and .csv and
diagnosis.csv, with all numbers of the figures.
"""

from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from common import mesh as meshes
from common.experiment import Report, Run
from diffusion import (
    curve,
    drawing,
    figures,
    findings,
    pictures,
    scaling_runs,
    totals,
)
from diffusion.dataset import dataset
from diffusion.findings import TOLERANCE, Groups, digits
from diffusion.images import scaled
from diffusion.parts import parts_of

DISTANCES = {
    "local": "local Frechet distance",
    "inception": "Frechet distance of Inception features",
    "dinov2": "Frechet distance of DINOv2 features",
}
SHOWN = 32  # Samples in a picture.


def report(runs: dict[str, Run], folder: Path) -> Report:
    """Everything that the runs of one command tell.

    Args:
      runs: run name VARIANT-seedN -> run, of either kind of experiment.
      folder: for figures and files; is made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    floors, groups = findings.grouped(runs)
    config = next(iter(runs.values())).config
    parts, drawn, summary = [], [], {}
    for section in (_floors(floors, folder), *_trained(groups, config, folder)):
        parts += section[0]
        drawn += section[1]
        summary |= section[2]
    summary["timing"] = {name: run.timing for name, run in runs.items()}
    result = _result(summary)
    text = "\n\n".join(
        [
            "# Optimal loss of diffusion models",
            result,
            *parts,
            "## This machine",
            _machine(runs),
            "## Figures",
            *[f"{caption}\n\n![{caption}](figures/{name})" for name, caption in drawn],
            "Losses are means over coordinates, of x_0 where no weight is named; s is the "
            "noise level of x = x_0 + s eps. Brackets are one standard error in units of the "
            "last digits: over seeds; of J* and the gap over draws where one seed ran. `gap` "
            "is loss minus the optimal loss of the same rows and draws.",
        ]
    )
    return Report(text, findings.plain(summary), result)


Section = tuple[list[str], list[tuple[str, str]], dict]


def _trained(groups: Groups, config, folder: Path) -> list[Section]:
    if not groups:
        return []
    figures.write_diagnoses(groups, folder / "diagnosis.csv")
    found = [_diagnosis(groups, folder), _comparison(groups, folder)]
    if config.report.scaling:
        found.append(scaling_runs.section(groups, folder))
    return found


def _floors(floors: Groups, folder: Path) -> Section:
    """1. The optimal loss of each data set."""
    if not floors:
        return [], [], {}
    curves = {name: findings.floor(seeds) for name, seeds in floors.items()}
    configs = {name: next(iter(seeds.values())).config for name, seeds in floors.items()}
    bounds = _linear(curves, configs)
    parts = ["## Optimal loss"]
    for name, (found, said) in curves.items():
        config, sigma_data = configs[name], float(configs[name].model.sigma_data)
        said["totals"] = totals.totals(found, sigma_data)
        about = dict(
            images=said["data"],
            sha256=said["sha256"],
            data=config.data.to_dict(),
            estimator=config.estimator.to_dict(),
            seeds=sorted(floors[name]),
        )
        file = "optimal_loss.npz" if len(curves) == 1 else f"optimal_loss_{name}.npz"
        curve.save(folder / file, found, about)
        parts += [_floor_words(name, said), figures.curve_table(found)]
        parts += [totals.table(said["totals"], sigma_data), *_known(said)]
    each = {
        name: {seed: findings.curve_of(findings.last(run)) for seed, run in seeds.items()}
        for name, seeds in floors.items()
    }
    figures.write_curves(each, folder / "optimal_loss.csv")
    drawn = [figures.optimal_loss(curves, folder / "optimal_loss.png", bounds)]
    first = next(iter(curves.values()))[1]
    names = (
        "sigma_star",
        "sigma_star_inside",
        "information",
        "information_ratio",
        "entropy",
        "variance",
        "totals",
    )
    top = {n: first[n] for n in (*names, "sigma_star_error", "information_error")}
    return parts, drawn, top | {"optimal_loss": {n: said for n, (_, said) in curves.items()}}


def _linear(curves: figures.Curves, configs: dict) -> dict[str, np.ndarray]:
    """The linear bound [S] of each curve without classes, into whose summary it goes."""
    known: dict[str, np.ndarray] = {}  # Variants may share their data.
    bounds = {}
    for name, (found, said) in curves.items():
        config = configs[name]
        if config.data.class_cond or found.dim > totals.WIDEST:
            continue
        data = dataset(**config.data, seed=config.data_seed)
        if data.sha256 not in known:
            known[data.sha256] = curve.covariance_eigenvalues(data.rows, scaled)
        bounds[name], said["linear"] = totals.beside_linear(found, known[data.sha256])
    return bounds


def _floor_words(name: str, said: dict) -> str:
    spread = ""
    if said["seeds"] > 1:
        low, high = (f"{said[f'sigma_star_{end}']:.4g}" for end in ("low", "high"))
        spread = f" ({low} to {high} over {said['seeds']} seeds)"
    star = f"sigma_star {_star(said)}{spread}, the largest s with J* ≤ {said['tau']:g} V"
    if not said["sigma_star_inside"]:
        star += ", is not between the levels: change estimator.sigma_min or sigma_max"
    ratio, off = said["information_ratio"], abs(said["information"] - said["entropy"])
    known = np.nan_to_num(said["information_error"])
    warning = ""
    if off > 3 * known + 0.03 * max(said["entropy"], 0.1):
        warning = (
            " It is not: the levels do not cover where J* rises, lie too far apart, or the "
            "estimator is biased."
        )
    share = "" if ratio is None else f", {100 * ratio:.1f} %"
    same = f" ({said['duplicates']:,} equal an earlier one)" if said["duplicates"] else ""
    linear = f" {totals.linear_words(said['linear'])}" if "linear" in said else ""
    draws = f"{said['draws']:,} draws"
    if said["cheap_draws"]:
        draws += f" with exact sums and {said['cheap_draws']:,} with subsets"
    return (
        f"{name}: {said['rows']:,} rows{same} of {said['dim']} coordinates of {said['data']}, "
        f"estimator {said['estimator']}, {draws}. {star}; variance "
        f"{said['variance']:.6g} per coordinate. Information "
        f"{digits(said['information'], said['information_error'])} of "
        f"{said['entropy']:.4f} nats{share}: the integral of J* s⁻³, which must be the entropy "
        f"of a row, ln N where no two are equal.{warning}{linear}"
    )


def _star(said: dict) -> str:
    """sigma_star with its error, or on which side of the levels it lies."""
    value = said["sigma_star"]
    if said["sigma_star_inside"]:
        return digits(value, said["sigma_star_error"])
    return "none" if not said["variance"] else f"at the end of the levels, {value:.4g}"


def _known(said: dict) -> list[str]:
    if not said.get("known"):
        return []
    lines = [
        f"Beside {said['known_source']}, measured elsewhere:",
        "| s | J* / D here | J* / D there | difference in errors |\n|---|---|---|---|",
    ]
    for r in said["known"]:
        cells = digits(r["ours"], r["ours_error"]), digits(r["known"], r["known_error"])
        away = "–" if r["errors"] is None else f"{r['errors']:+.1f}"
        lines[-1] += f"\n| {r['sigma']:g} | {cells[0]} | {cells[1]} | {away} |"
    return lines


def _diagnosis(groups: Groups, folder: Path) -> Section:
    """2. What each variant leaves open."""
    found = {name: findings.summarize(seeds) for name, seeds in groups.items()}
    best = min(found, key=lambda name: found[name]["edm_gap"])
    parts = ["## Diagnosis", _losses(found), _bands(found), _checks(found)]
    if any("frechet" in f for f in found.values()):
        parts += ["## Samples", _samples_table(found, _distance(groups))]
    drawn = [
        figures.losses(groups, folder / "losses.png"),
        figures.training(groups, folder / "training.png"),
        figures.schedules(groups, folder / "schedules.png"),
        *_samples(groups, folder),
    ]
    top = {"best": best, "groups": found}
    top |= {n: found[best][n] for n in ("edm_loss", "edm_floor", "edm_gap")}
    top["edm_gap_error"] = _spread(found[best])
    return parts, [d for d in drawn if d], top


def _spread(f: dict) -> float:
    """The error of edm_gap: over seeds, else over draws."""
    over_seeds = f["edm_gap_error"]
    return f["edm_gap_draws"] if over_seeds is None else over_seeds


def _losses(found: dict) -> str:
    lines = [
        "| | seeds | loss, EDM-weighted | floor | gap | own loss | own floor | own gap |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, f in sorted(found.items(), key=lambda item: item[1]["edm_gap"]):
        cells = [
            digits(f[n], _spread(f) if n == "edm_gap" else f[f"{n}_error"])
            for n in findings.TOTALS
        ]
        lines.append(f"| {name} | {f['seeds']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _bands(found: dict) -> str:
    """A table for each set of bands; all variants share one unless their levels differ."""
    tables: dict[tuple, list[str]] = {}
    for name, f in found.items():
        ranges = tuple(f"{e['low']:.2g} – {e['high']:.2g}" for e in f["bands"])
        head = [f"| gap at s | {' | '.join(ranges)} |", "|---" * (len(ranges) + 1) + "|"]
        cells = [
            digits(e["gap"], e["draws"] if e["error"] is None else e["error"])
            for e in f["bands"]
        ]
        tables.setdefault(ranges, head).append(f"| {name} | {' | '.join(cells)} |")
    return "\n\n".join("\n".join(lines) for lines in tables.values())


def _checks(found: dict) -> str:
    lines = [
        "| | least gap (errors) | gap never negative | its two estimates differ by (errors) |",
        "|---|---|---|---|",
    ]
    for name, f in found.items():
        said = "yes" if f["gap_nonnegative"] else "no"
        lines.append(f"| {name} | {f['gap_worst']:+.1f} | {said} | {f['agreement']:.1f} |")
    lines.append(
        f"\n`Never negative` allows {TOLERANCE:g} standard errors at any level. The second "
        "estimate of the gap is E|D − D*|², never negative."
    )
    return "\n".join(lines)


def _samples_table(found: dict, distance: str) -> str:
    names = ("frechet", "precision", "recall", "copies", "nearest")
    lines = [
        f"| | samples | {distance} | precision | recall | copies | distance to nearest row |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, f in found.items():
        if "frechet" in f:
            cells = [digits(f.get(n), f.get(f"{n}_error")) for n in names]
            lines.append(f"| {name} | {f['samples']:.0f} | {' | '.join(cells)} |")
    if distance == DISTANCES["local"]:
        lines.append(
            "\nLocal features are those of a small classifier trained on these data: the "
            "distance compares runs on these data and nothing else. It is no FID."
        )
    return "\n".join(lines)


def _distance(groups: Groups) -> str:
    return DISTANCES[next(iter(next(iter(groups.values())).values())).config.eval.features]


def _samples(groups: Groups, folder: Path) -> list[tuple[str, str]]:
    """Training data beside samples of the first seed of each variant that made any."""
    drawn = []
    for name, seeds in groups.items():
        run = next(iter(seeds.values()))
        if not run.config.eval.samples:
            continue
        config = ConfigDict(run.config.to_dict())
        devices = meshes.current()
        config.sampler.batch_size = -(-SHOWN // devices) * devices
        data = dataset(**config.data, seed=config.data_seed)
        parts = parts_of(config, data)
        params = run.state().averages.trees[0]
        key = jax.random.key(config.seed)
        made = drawing.samples(config, data, parts, params, key, SHOWN)
        real = np.asarray(
            scaled(data.rows[np.linspace(0, len(data.rows) - 1, SHOWN, dtype=int)])
        )
        pictures.side_by_side(folder / f"samples_{name}.png", real, made)
        drawn.append((f"samples_{name}.png", f"{name}: training data and samples, one seed"))
    return drawn


def _comparison(groups: Groups, folder: Path) -> Section:
    """3. Who leaves less, and where."""
    if len(groups) < 2:
        return [], [], {}
    paired = findings.comparisons(groups)
    base, distance = paired[0]["base"], _distance(groups)
    lines = [
        f"| minus {base} | seeds | gap, EDM-weighted | 95 % interval | p "
        f"| {distance} | 95 % interval | p |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for d in paired:
        cells = _interval(d["edm_gap"]) + _interval(d.get("frechet"))
        lines.append(f"| {d['what']} | {d['edm_gap']['seeds']} | {' | '.join(cells)} |")
    lines.append(
        "\nDifferences are paired by seed, which fixes data order, initial weights and the "
        "draws of evaluations; intervals are by Student's t, each by itself. Below 0 is better."
    )
    where = [f"- {d['what']}: {findings.where_better(d)}" for d in paired if "bands" in d]
    parts = ["## Comparison", "\n".join(lines), *(["\n".join(where)] if where else [])]
    drawn = [figures.differences(paired, folder / "differences.png")]
    related = findings.correlation(groups)
    summary: dict = {"paired": paired}
    if related:
        drawn.append(figures.correlations(related, folder / "correlation.png", distance))
        sigma, (pearson, spearman) = related
        summary["correlation"] = dict(sigma=sigma, pearson=pearson, spearman=spearman)
    return parts, [d for d in drawn if d], summary


def _interval(d: dict | None) -> list[str]:
    if d is None or d["difference"] is None:
        return ["–"] * 3
    if d["low"] is None:
        return [f"{d['difference']:+.4g}", "–", "–"]
    p = d["p"] if d["p"] is not None and np.isfinite(d["p"]) else None
    words = f"{d['low']:+.4g} to {d['high']:+.4g}", "–" if p is None else f"{p:.2g}"
    return [f"{d['difference']:+.4g}", *words]


def _machine(runs: dict[str, Run]) -> str:
    """5. Times, of the last call that worked at each run."""
    lines = [
        "| | steps per second | images or draws per second | FLOP per second "
        "| peak memory (MB) | devices |",
        "|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        t, c = run.timing, run.config
        if not t or not t.get("steps_per_second"):
            continue
        rate, row = t["steps_per_second"], findings.last(run)
        trained = c.experiment != findings.ESTIMATION
        drawn = 0 if trained else row["num_draws"] + row.get("cheap_draws", 0)
        each = c.batch_size if trained else drawn / row["step"]
        used = f"{rate * row['flops'] / row['step']:.3g}" if row.get("flops") else "–"
        lines.append(
            f"| {name} | {rate:.3g} | {rate * each:,.0f} | {used} "
            f"| {t['peak_host_memory_mb']:.0f} | {t['devices']} |"
        )
    return "\n".join(lines)


def _result(summary: dict) -> str:
    parts = []
    if "sigma_star" in summary:
        parts.append(f"sigma_star {_star(summary)}")
    if "best" in summary:
        best, count = summary["best"], len(summary["groups"])
        name = f"best of {count}: {best}" if count > 1 else best
        gap = digits(summary["edm_gap"], summary["edm_gap_error"])
        parts.append(f"{name}, gap {gap} of loss {summary['edm_loss']:.3g}")
    return "; ".join(parts) + "."
