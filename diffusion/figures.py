"""Figures of the optimal loss and of the gap to it, and the pages of `--do=NAME`.

Figures are PNG files, written whole or not at all; each function returns (file name, caption).
Everything is per coordinate. `curves` are {variant: (OptimalLoss, its summary)} and `groups`
{variant: {seed: run}}, both of `diffusion.findings`.
"""

import csv
import io
from itertools import pairwise
from pathlib import Path

import jax
import numpy as np

from common import metrics
from diffusion import curve, diagnosis, findings, totals
from diffusion.diagnosis import Diagnosis
from diffusion.estimators import OptimalLoss
from diffusion.findings import Groups, digits

Drawn = tuple[str, str]
Curves = dict[str, tuple[OptimalLoss, dict]]

LEVELS = 12  # Rows of a table of J*.
FEW = 30  # Draws below which an error bar says little.
SIGMA_DATA = 0.5  # Of the EDM weight, where there is no config to say.


def optimal_loss(
    curves: Curves, path: Path, bounds: dict[str, np.ndarray] | None = None
) -> Drawn:
    """J*(s) / D of each data set, with bracket, variance, sigma_star and published points.

    `bounds` are {variant: [S]}, linear bounds, sums over coordinates.
    """
    from common.plots import colour, figure

    with figure(path, 2) as axes:
        for i, (name, (found, said)) in enumerate(curves.items()):
            dim, look = float(found.dim), dict(color=colour(i))
            for axis in axes:
                values = found.sigmas, found.value / dim, found.stderr / dim
                axis.errorbar(*values, lw=1.2, label=name, **look)
                if findings.bracketed(found):
                    ends = found.lower / dim, found.upper / dim
                    axis.fill_between(
                        found.sigmas, *ends, alpha=0.15, label=f"{name}: bounds", **look
                    )
                if bounds and name in bounds:
                    axis.plot(found.sigmas, bounds[name] / dim, lw=0.6, **look)
                axis.axhline(float(found.variance) / dim, ls="--", lw=1, **look)
                axis.axvline(said["sigma_star"], ls=":", lw=1, **look)
                seen = [r for r in said.get("known", []) if r["known"] > 0]
                if seen:
                    names = ("sigma", "known", "known_error")
                    mark = dict(
                        fmt="o", ms=4, mfc="none", color="k", label="measured elsewhere"
                    )
                    axis.errorbar(*([r[n] for r in seen] for n in names), zorder=3, **mark)
        tops = [float(found.variance / found.dim) for found, _ in curves.values()]
        top = max(tops) or 1.0
        for axis in axes:
            axis.set(xscale="log", xlabel="noise level s", ylabel="J*(s) / D")
        axes[0].set(ylim=(-0.03 * top, 1.15 * top))
        if max(tops) > 0:
            axes[1].set(yscale="log", ylim=(1e-8 * top, 2 * top))
        axes[0].legend(fontsize=8)
    caption = (
        "Optimal loss per coordinate; dashed: variance of the data, dotted: sigma_star, "
        "bars: one standard error" + ("; thin: linear bound" if bounds else "")
    )
    return path.name, caption


def losses(groups: Groups, path: Path) -> Drawn:
    """Loss and floor, gap, and gap over floor of each variant at the end of training."""
    from common.plots import figure

    with figure(path, 3) as (left, middle, right):
        for i, (name, seeds) in enumerate(groups.items()):
            found = _mean(seeds)
            s, look = found.sigmas, dict(lw=1.2, **_look(i))
            left.plot(s, found.loss, label=name, **look)
            left.plot(s, found.floor, **look | dict(ls="--"))
            middle.errorbar(s, _above(found.gap), found.gap_err, marker=".", ms=3, **look)
            seen = found.floor > 1e-12 * found.floor.max()
            ratio = np.divide(found.gap, found.floor, out=np.full(len(s), np.nan), where=seen)
            right.plot(s, _above(ratio), **look)
        left.set(xscale="log", xlabel="noise level s", ylabel="loss per coordinate")
        # A loss far above the data's variance would flatten the others.
        tallest = max(line.get_ydata().max() for line in left.lines)
        top = 4 * max(_mean(seeds).floor.max() for seeds in groups.values())
        left.set_ylim(0, 1.05 * min(tallest, top or tallest) or None)
        middle.set(xscale="log", yscale="log", xlabel="noise level s", ylabel="gap")
        right.set(xscale="log", yscale="log", xlabel="noise level s", ylabel="gap / floor")
        left.legend(**_columns(len(groups)))
    return path.name, "Loss and its floor (dashed), gap, and gap over floor, by variant"


def training(groups: Groups, path: Path) -> Drawn | None:
    """Gap in bands of log s over training; None where no run was evaluated twice."""
    from common.plots import colour, panels

    curves = {}
    for name, seeds in groups.items():
        each = [findings.evaluations(run) for run in seeds.values()]
        if len({tuple(row["step"] for row in rows) for rows in each}) == 1 and len(each[0]) > 1:
            curves[name] = each
    if not curves:
        return None
    with panels(path, len(curves), sharey=True) as axes:
        for axis, (name, each) in zip(axes, curves.items(), strict=True):
            gaps = np.mean([[findings.bands(row)[1] for row in rows] for rows in each], 0)
            edges = findings.bands(each[0][0])[0]
            images = [row.get("images", row["step"]) for row in each[0]]
            for b, gap in enumerate(gaps.T):
                label = f"{edges[b]:.2g} – {edges[b + 1]:.2g}"
                axis.plot(images, _above(gap), marker=".", color=colour(b), label=label)
            axis.set(title=name, yscale="log", xlabel="images", ylabel="gap")
        axes[0].legend(fontsize=7, title="s", ncols=2)
    return path.name, "Gap per coordinate in bands of log s over training, means over seeds"


def schedules(groups: Groups, path: Path) -> Drawn:
    """Density of log s, weight and their product; thin lines: at the first evaluation."""
    from common.plots import figure

    with figure(path, 3) as axes:
        for i, (name, seeds) in enumerate(groups.items()):
            rows = findings.evaluations(next(iter(seeds.values())))
            changed = any(rows[0][n] != rows[-1][n] for n in ("density", "weight"))
            for row, width in ((rows[0], 0.6), (rows[-1], 1.4))[not changed :]:
                s, p, w = (np.array(row[n], float) for n in ("sigmas", "density", "weight"))
                x = np.log(s)
                size = np.trapezoid(p * w, x) or 1.0
                look = dict(lw=width, label=name if width > 1 else None, **_look(i))
                for axis, value in zip(axes, (p, w, _above(p * w / size)), strict=True):
                    axis.plot(s, value, **look)
        names = ("density of log s", "weight of the loss in x_0", "density × weight, unit area")
        for axis, label in zip(axes, names, strict=True):
            axis.set(xscale="log", xlabel="noise level s", ylabel=label)
        for axis in axes[1:]:
            axis.set(yscale="log")
        axes[0].legend(**_columns(len(groups)))
    return path.name, "Where training looks: density, weight and product; thin: at first"


def differences(paired: list[dict], path: Path) -> Drawn | None:
    """Gap per band minus the base's, over it, and in all, with 95 % intervals; None without
    bands."""
    from common.plots import figure

    known = [d for d in paired if d.get("bands", {}).get("difference") is not None]
    if not known:
        return None
    with figure(path, 2) as (left, right):
        left.set_yscale("symlog", linthresh=1.0)
        for i, d in enumerate(known):
            edges, found = np.array(d["edges"]), d["bands"]
            s = np.sqrt(edges[1:] * edges[:-1]) * 1.5 ** ((i + 0.5) / len(known) - 0.5)
            base = np.abs(d["base_gap"])
            mean = np.array(found["difference"]) / base
            bars = None if found["high"] is None else np.array(found["high"]) / base - mean
            look = dict(marker="o", ms=4, lw=0.8, capsize=3, **_look(i))
            left.errorbar(s, mean, bars, label=f"{d['what']} − {d['base']}", **look)
            total = d["edm_gap"]
            reach = None if total["high"] is None else total["high"] - total["difference"]
            right.errorbar(total["difference"], -i, xerr=reach, **look)
        left.axhline(0, color="k", lw=1, ls="--")
        right.axvline(0, color="k", lw=1, ls="--")
        left.set(xscale="log", xlabel="noise level s", ylabel="difference / gap of the base")
        right.set(xlabel="difference of the EDM-weighted gap", ylim=(0.5 - len(known), 0.5))
        right.set_yticks([-i for i in range(len(known))], [d["what"] for d in known])
        left.legend(**_columns(len(known)))
    return path.name, "Differences of the gap by seed with 95 % intervals; below 0 is better"


def correlations(found: tuple, path: Path, distance: str) -> Drawn:
    """Correlation over runs of the gap at each level with a distance of samples."""
    from common.plots import figure

    with figure(path) as axis:
        for values, label in zip(found[1], ("Pearson", "Spearman"), strict=True):
            axis.plot(found[0], values, marker=".", label=label)
        axis.axhline(0, color="k", lw=1, ls="--")
        axis.set(xscale="log", xlabel="noise level s", ylim=(-1.05, 1.05))
        axis.set_ylabel(f"correlation of the gap with\n{distance}")
        axis.legend()
    return path.name, f"Correlation over runs of the gap at each level with the {distance}"


def curve_page(
    found: OptimalLoss, record: dict, tau: float, folder: Path, sigma_data: float = SIGMA_DATA
) -> str:
    """A curve as Markdown; writes optimal_loss.png, .npz and .csv into `folder`.

    Args:
      found: the curve, sums over coordinates.
      record: what it is of; goes into the .npz.
      tau: share of the variance that defines sigma_star.
      folder: is there; only the first process writes.
      sigma_data: of the weights of EDM, in the table of totals.
    """
    found = findings.pooled([found])
    star, error = findings.sigma_star(found, tau)
    nats = findings.information(found)
    if jax.process_index() == 0:
        optimal_loss({"J*": (found, {"sigma_star": star})}, folder / "optimal_loss.png")
        curve.save(folder / "optimal_loss.npz", found, record)
        write_curves({"": {0: found}}, folder / "optimal_loss.csv")
    return "\n\n".join(
        [
            f"sigma_star {digits(star, error)} (J* ≤ {tau:g} V), variance "
            f"{float(found.variance / found.dim):.6g} per coordinate, information "
            f"{digits(*nats)} nats, {int(found.num_draws)} draws.",
            curve_table(found),
            totals.table(totals.totals(found, sigma_data), sigma_data),
            "![J*](optimal_loss.png)",
            "All of it: optimal_loss.npz (sums over coordinates), optimal_loss.csv (means).",
        ]
    )


def diagnosis_page(
    found: Diagnosis, name: str, folder: Path, sigma_data: float = SIGMA_DATA
) -> str:
    """A diagnosis as Markdown; writes diagnosis.png and .csv into `folder`.

    Shares are of the gap's integral over log s, plain and weighted as EDM trains data of
    standard deviation `sigma_data`.

    Args:
      found: the diagnosis.
      name: whose.
      folder: is there; only the first process writes.
      sigma_data: of the weight of EDM.
    """
    from common.plots import figure

    if jax.process_index() == 0:
        with figure(folder / "diagnosis.png", 2) as (left, right):
            look = dict(marker=".", lw=1.2)
            left.errorbar(found.sigmas, found.loss, found.loss_err, label="loss", **look)
            left.errorbar(found.sigmas, found.floor, found.floor_err, label="floor", **look)
            right.errorbar(found.sigmas, _above(found.gap), found.gap_err, label="gap", **look)
            distance = _above(found.distance)
            right.plot(found.sigmas, distance, ls="--", color="k", label="E|D − D*|²")
            left.set(xscale="log", xlabel="noise level s", ylabel="loss per coordinate")
            right.set(xscale="log", yscale="log", xlabel="noise level s", ylabel="gap")
            for axis in (left, right):
                axis.legend()
            left.figure.suptitle(name)
        names = [n for n in Diagnosis._fields if n != "draws"]
        values = zip(*(getattr(found, n).tolist() for n in names), strict=True)
        write_csv(folder / "diagnosis.csv", names, values)
    lines = ["| s | loss | floor | gap | E\\|D − D*\\|² |", "|---|---|---|---|---|"]
    for i, s in enumerate(found.sigmas):
        pairs = ((getattr(found, n)[i], getattr(found, f"{n}_err")[i]) for n in FOUR)
        lines.append(f"| {s:.4g} | {' | '.join(digits(*pair) for pair in pairs)} |")
    shares = ["| octave of s | share of the gap | EDM-weighted |", "|---|---|---|"]
    for low, high, share, weighted in octaves(found, sigma_data):
        shares.append(
            f"| {low:.3g} – {high:.3g} | {100 * share:.1f} % | {100 * weighted:.1f} % |"
        )
    drawn = f"![{name}](diagnosis.png)"
    return "\n\n".join(["\n".join(lines), "\n".join(shares), drawn])


FOUR = ("loss", "floor", "gap", "distance")


def octaves(found: Diagnosis, sigma_data: float = SIGMA_DATA) -> list[tuple]:
    """(low, high, share, EDM-weighted share) of the gap's integral over log s, by octave.

    The gap is linear in log s between levels; the EDM density is N(-1.2, 1.2^2) of log s.
    Octaves begin at powers of 2 and are cut where the levels end.
    """
    ends = np.log(found.sigmas[[0, -1]])
    powers = np.arange(np.ceil(ends[0] / np.log(2)), np.floor(ends[1] / np.log(2)) + 1)
    edges = np.unique(np.concatenate([ends, powers * np.log(2)]))
    rows = []
    for low, high in pairwise(edges):
        x = np.linspace(low, high, 65)
        gap, s = np.interp(x, np.log(found.sigmas), found.gap), np.exp(x)
        weight = diagnosis.edm_weight(s, sigma_data)
        density = diagnosis.edm_density(s, sigma_data)
        parts = np.trapezoid(gap, x), np.trapezoid(gap * weight * density, x)
        rows.append((np.exp(low), np.exp(high), *parts))
    sums = [sum(row[i] for row in rows) or 1.0 for i in (2, 3)]
    return [
        (float(low), float(high), float(a / sums[0]), float(b / sums[1]))
        for low, high, a, b in rows
    ]


def curve_table(found: OptimalLoss) -> str:
    """About 12 levels from where J* is a millionth of V upward, as Markdown."""
    rising = np.flatnonzero(found.value > 1e-6 * found.variance)
    x = np.log(found.sigmas[max(rising[0] - 1, 0) if rising.size else 0 :])
    wanted = np.linspace(x[0], x[-1], LEVELS)
    nearest = np.abs(np.log(found.sigmas)[:, None] - wanted).argmin(0)
    dim, bounds = float(found.dim), findings.bracketed(found)
    head = ["s", "J* / D", "J* / V", *(["lower", "upper"] if bounds else []), "rows shared"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    doubted = False
    for i in np.unique(nearest):
        share = found.value[i] / found.variance if found.variance else 0.0
        cells = [f"{found.sigmas[i]:.4g}", digits(found.value[i] / dim, found.stderr[i] / dim)]
        cells.append(f"{share:.3g}")
        rare = found.stderr[i] > found.value[i] / np.sqrt(FEW) > 0
        cells[1] += " †" if rare else ""
        doubted |= bool(rare)
        if bounds:
            for n in ("lower", "upper"):
                value, error = getattr(found, n)[i], getattr(found, f"{n}_err")[i]
                cells.append(digits(value / dim, error / dim))
        lines.append(f"| {' | '.join([*cells, f'{found.ess[i]:.4g}'])} |")
    if doubted:
        lines.append(
            f"\n† Fewer than about {FEW} draws carry this value: it is more likely too low "
            "than too high, and its error too small. More draws, or seeds, tell."
        )
    return "\n".join(lines)


def write_curves(curves: dict[str, dict[int, OptimalLoss]], path: Path) -> None:
    """{variant: {seed: curve}} as a CSV of means over coordinates."""
    sums = ("value", "stderr", "lower", "lower_err", "upper", "upper_err")
    head = ["variant", "seed", "sigma", *sums, "ess", "p_self", "variance", "draws"]
    rows = []
    for name, seeds in curves.items():
        for seed, c in seeds.items():
            dim = float(c.dim)
            columns = [c.sigmas, *(getattr(c, n) / dim for n in sums), c.ess, c.p_self]
            end = [float(c.variance) / dim, int(c.num_draws)]
            rows += [[name, seed, *row, *end] for row in np.stack(columns, 1).tolist()]
    write_csv(path, head, rows)


def write_diagnoses(groups: Groups, path: Path) -> None:
    """Every evaluation of every training run as a CSV, one line per level."""
    names = [n for n in Diagnosis._fields if n not in ("sigmas", "draws")]
    names += ["density", "weight"]
    rows = []
    for variant, seeds in groups.items():
        for seed, run in seeds.items():
            for row in findings.evaluations(run):
                start = [variant, seed, row["step"], row.get("images", "")]
                levels = zip(row["sigmas"], *(row[n] for n in names), strict=True)
                rows += [[*start, *level] for level in levels]
    write_csv(path, ["variant", "seed", "step", "images", "sigma", *names], rows)


def write_csv(path: Path, head: list, rows) -> None:
    """A CSV file, whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    metrics.write(path, text.getvalue())


def _mean(seeds: dict) -> Diagnosis:
    """Over seeds, of the last evaluations at the levels of the first seed."""
    each = [findings.diagnosis_of(findings.last(run)) for run in seeds.values()]
    each = [d for d in each if np.array_equal(d.sigmas, each[0].sigmas)]
    error = lambda name: np.sqrt(np.mean([getattr(d, name) ** 2 for d in each], 0) / len(each))
    return Diagnosis(
        *(
            error(n) if n.endswith("_err") else np.mean([getattr(d, n) for d in each], 0)
            for n in Diagnosis._fields
        )
    )


def _look(i: int) -> dict:
    """Of the i-th variant; the line changes where colours begin anew."""
    from common.plots import colour

    return dict(color=colour(i), ls=("-", "-.", ":")[i // 10 % 3])


def _columns(count: int) -> dict:
    """Of a legend."""
    return dict(ncols=1 + (count - 1) // 8, fontsize=8 if count <= 8 else 6)


def _above(values: np.ndarray) -> np.ndarray:
    """Without what a logarithmic axis cannot show."""
    return np.where(values > 0, values, np.nan)
