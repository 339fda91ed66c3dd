"""Training runs of several widths as measurements of a scaling law, `config.report.scaling`.

F is `flops` of an evaluation row, the training FLOP so far. J is the floor of all runs plus a
run's own gap: loss and floor share their draws, so this leaves the noise of the draws out.
The errors of the gap and of J* together tell which gaps are above zero at all.
"""

from pathlib import Path

import numpy as np

from common.errors import UserError
from diffusion import diagnosis, findings, scaling, scaling_figures
from diffusion.findings import Groups, digits
from diffusion.scaling import ScalingReport

LEAST = 5  # Variants.
FREE = ("model", "optim", "steps", "seed", "n_seeds", "runs", "size")  # What a width changes.
FREE += ("log_every", "eval_every", "save_every", "keep", "init_from")
TOTAL = "total"


def section(groups: Groups, folder: Path) -> tuple[list[str], list[tuple[str, str]], dict]:
    """The report's section: Markdown parts, (file, caption) of figures, and a summary."""
    some = widths(groups)
    if len(some) < LEAST:
        words = (
            f"A fit needs {LEAST} variants that differ in the model's width alone "
            f"and count their FLOP; there are {len(some)}."
        )
        return ["## Scaling law", words], [], {}
    found, failed = analyses(some)
    lines = [
        "| | J* | α without J* | α with J* | ρ without | ρ with | ρ gained | free offset |",
        "|---|---|---|---|---|---|---|---|",
    ]
    range_of = lambda v, ends: f"{v:.4g} ({ends[0]:.4g} to {ends[1]:.4g})"
    for name, r in found.items():
        cells = [
            digits(r.optimum, r.optimum_err),
            range_of(r.raw.alpha, r.raw_interval.alpha),
            range_of(r.corrected.alpha, r.corrected_interval.alpha),
            f"{r.raw.rho:.4f}",
            f"{r.corrected.rho:.4f}",
            range_of(r.gain, r.gain_interval),
            range_of(r.free.offset, r.free_interval.offset),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [f"| {name} | {' | '.join(['–'] * 7)} |" for name in failed]
    lines.append(
        f"\nPower laws J − J* = β F^α of {len(some)} widths; `total` is the EDM-weighted loss. "
        "Intervals are 95 %, from resampling runs. " + " ".join(failed.values())
    )
    drawn = []
    each = {n: r for n, r in found.items() if n != TOTAL}
    if TOTAL in found:
        total = found[TOTAL]
        path = folder / "scaling.png"
        drawn.append(scaling_figures.scaling(path, total, loss="EDM-weighted loss"))
    if each:
        drawn.append(scaling_figures.bands(folder / "scaling_bands.png", each))
        drawn.append(scaling_figures.exponents(folder / "scaling_exponents.png", each))
    fits = {name: scaling.record(r) for name, r in found.items()}
    return ["## Scaling law", "\n".join(lines)], drawn, {"scaling": fits}


def widths(groups: Groups) -> Groups:
    """The largest set of variants that differ in the model and its optimizer alone."""
    sets: dict[str, Groups] = {}
    for name, seeds in groups.items():
        fields = next(iter(seeds.values())).config.to_dict()
        rest = {k: v for k, v in sorted(fields.items()) if k not in FREE}
        counted = all("flops" in row for r in seeds.values() for row in findings.evaluations(r))
        if counted:
            sets.setdefault(repr(rest), {})[name] = seeds
    return max(sets.values(), key=len, default={})


def analyses(
    groups: Groups, *, draws: int = 1000, band_draws: int = 200
) -> tuple[dict[str, ScalingReport], dict[str, str]]:
    """Fits of the EDM-weighted loss, "total", and of the loss in each band of log s.

    Args:
      groups: of `widths`.
      draws, band_draws: resamples behind the intervals of the total and of a band.

    Returns:
      name -> report, and name -> why there is none.
    """
    rows = {
        (name, seed): findings.evaluations(run)
        for name, seeds in groups.items()
        for seed, run in seeds.items()
    }
    first = next(iter(rows.values()))[0]
    edges = findings.bands(first)[0]
    measures = {
        TOTAL: lambda row: (
            row["edm_floor"],
            row["edm_gap"],
            _floor_error(row, groups),
            row["edm_gap_err"],
        )
    }
    for b in range(len(edges) - 1):
        measures[f"s {edges[b]:.2g} – {edges[b + 1]:.2g}"] = lambda row, b=b: _band(row, b)
    found, failed = {}, {}
    for what, measure in measures.items():
        try:
            found[what] = _fit(rows, measure, draws if what == TOTAL else band_draws)
        except UserError as error:
            failed[what] = str(error)
    return found, failed


def _fit(rows: dict, measure, draws: int) -> ScalingReport:
    values = {key: np.array([measure(row) for row in each]) for key, each in rows.items()}
    every = np.concatenate(list(values.values()))
    # Runs of one seed evaluated at one step share their draws.
    independent = len({(key[1], row["step"]) for key, each in rows.items() for row in each})
    optimum = float(every[:, 0].mean())
    error = float(every[:, 2].mean() / np.sqrt(independent))
    runs = {
        f"{name}-seed{seed}": (
            np.array([row["flops"] for row in rows[name, seed]], float),
            optimum + values[name, seed][:, 1],
        )
        for name, seed in rows
    }
    errors = {f"{name}-seed{seed}": v[:, 3] for (name, seed), v in values.items()}
    rng = np.random.default_rng(0)
    return scaling.analyse(runs, optimum, error, errors=errors, rng=rng, draws=draws)


def _band(row: dict, b: int) -> tuple[float, float, float, float]:
    """Floor and gap, and their errors."""
    (_, floor, error), (_, gap, gap_error) = findings.bands(row, "floor"), findings.bands(row)
    return floor[b], gap[b], error[b], gap_error[b]


def _floor_error(row: dict, groups: Groups) -> float:
    """Of edm_floor. Levels share draws: errors of neighbours add up."""
    sd = next(iter(next(iter(groups.values())).values())).config.model.sigma_data
    weight = lambda s: diagnosis.edm_weight(s, sd)
    density = lambda s: diagnosis.edm_density(s, sd)
    found = findings.diagnosis_of(row)
    return diagnosis.total(found, weight, density, ["floor_err"])["floor_err"]
