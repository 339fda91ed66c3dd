"""What a comparison of bridges comes to: tables, figures, and published numbers beside them."""

from pathlib import Path

import jax
import numpy as np

from common.experiment import Report, Run
from geometry import baselines, dataset, evaluation, figures, metrics
from geometry.figures import last, over_seeds, variants
from geometry.parts import parts_of, predict

COLUMNS = ("d_mae", "d_rmse", "c_rmsd", "rmsd")
PUBLISHED = (
    "Published for QM9, test, D-MAE / D-RMSE / C-RMSD in A, other data than here: RDKit ETKDG "
    "0.355 / 0.621 / 0.689, GTMGC 0.264 / 0.470 / 0.367 (Xu et al. 2024), the bridge about "
    "0.096 / 0.223 / 0.148 (Luo et al., arXiv:2410.24220)."
)
NOTES = (
    "D-MAE and D-RMSE pool all n^2 distances of a structure, hydrogens included; C-RMSD is of "
    "heavy atoms over symmetries and proper rotations; RMSD of all atoms. ± is one standard "
    "error: over structures (jackknife over ten groups), with several seeds also between them."
)


def report(runs: dict[str, Run], folder: Path) -> Report:
    """Tables of all variants, figures of the best-known one, a line."""
    groups = {name: summarize(each) for name, each in variants(runs).items()}
    drawn = figures.calls(runs, folder / "calls.png")
    drawn += pictures(runs, folder)
    result = headline(groups)
    first = next(iter(runs.values()))
    sections = [
        "# Geometric diffusion bridge",
        result,
        "## Held-out structures",
        main_table(runs, first.config),
        *_samples(runs),
        "## By number of network calls",
        calls_table(runs),
        PUBLISHED,
        "## This machine",
        _machine(runs),
        "## Figures",
        *[_shown(caption, name) for caption, name in drawn],
        NOTES,
    ]
    summary = {"groups": groups, "timing": {name: run.timing for name, run in runs.items()}}
    return Report("\n\n".join(sections), summary, result)


def _shown(caption: str, name: str) -> str:
    """A picture, or where it moves a link to it."""
    if name.endswith(".gif"):
        return f"[{caption}](figures/{name})"
    return f"{caption}\n\n![{caption}](figures/{name})"


def summarize(runs: list[Run]) -> dict:
    """What a program reads of one variant: metrics at the most calls."""
    made = {"kind": runs[0].config.kind, "seeds": len(runs)}
    made["calls"] = int(np.atleast_1d(last(runs[0])["calls"])[_chosen(runs[0])])
    for name in COLUMNS:
        mean, error = over_seeds(runs, name)
        k = _chosen(runs[0])
        made[name], made[f"{name}_error"] = float(mean[k]), float(error[k])
        start, _ = over_seeds(runs, f"identity_{name}")
        made[f"identity_{name}"] = float(start[0])
    return made


def _chosen(run: Run) -> int:
    """The number of calls that the config's own sampler has, or the nearest."""
    calls = np.atleast_1d(last(run)["calls"])
    config = run.config
    wanted = config.sampler.steps
    if config.kind == "chain":
        wanted = config.chain.segments * config.chain.steps
    return int(np.argmin(np.abs(calls - wanted)))


def headline(groups: dict[str, dict]) -> str:
    """One line: how far off, beside the unchanged start."""
    start = next(iter(groups.values()))
    said = [f"{name} {g['d_mae']:.4f} A after {g['calls']} calls" for name, g in groups.items()]
    return f"D-MAE: unchanged {start['identity_d_mae']:.4f} A; {', '.join(said)}."


def main_table(runs: dict[str, Run], config) -> str:
    """Every variant and baseline."""
    parts = parts_of(config)
    records = evaluation.held_out(config, parts)
    lines = []
    for name, row in baselines.rows(config, records).items():
        lines.append(_line(name, 0, [(row[c], row.get(f"{c}_error")) for c in COLUMNS]))
    for name, each in variants(runs).items():
        g = summarize(each)
        cells = [(g[c], g[f"{c}_error"]) for c in COLUMNS]
        lines.append(_line(f"{name} ({g['seeds']} seeds)", g["calls"], cells))
    said = f"{len(records)} structures of the {config.eval.split} set."
    head = "| model | calls | D-MAE | D-RMSE | C-RMSD | RMSD |\n|---|---|---|---|---|---|"
    return f"{said}\n\n{head}\n" + "\n".join(lines)


def calls_table(runs: dict[str, Run]) -> str:
    """Metrics against calls."""
    lines = []
    for name, each in variants(runs).items():
        found = {c: over_seeds(each, c) for c in COLUMNS}
        for k, n in enumerate(np.atleast_1d(last(each[0])["calls"]).astype(int).tolist()):
            lines.append(_line(name, n, [(found[c][0][k], found[c][1][k]) for c in COLUMNS]))
    head = "| model | calls | D-MAE | D-RMSE | C-RMSD | RMSD |\n|---|---|---|---|---|---|"
    return head + "\n" + "\n".join(lines)


def _line(name: str, calls: int, cells) -> str:
    made = [
        f"{value:.4f}" + (f" ± {error:.4f}" if error is not None and error > 0 else "")
        for value, error in cells
    ]
    return f"| {name} | {calls} | {' | '.join(made)} |"


def _samples(runs: dict[str, Run]) -> list[str]:
    lines = []
    for name, each in variants(runs).items():
        if "samples_best_rmsd" not in last(each[0]):
            continue
        cells = [
            float(over_seeds(each, f"samples_{c}")[0][0])
            for c in ("best_rmsd", "mean_rmsd", "best_c_rmsd", "mean_c_rmsd", "diversity")
        ]
        count = each[0].config.eval.samples
        lines.append(f"| {name} | {count} | " + " | ".join(f"{v:.4f}" for v in cells) + " |")
    if not lines:
        return []
    head = (
        "| model | samples | best RMSD | mean RMSD | best C-RMSD | mean C-RMSD | diversity |\n"
        "|---|---|---|---|---|---|---|"
    )
    return ["## Draws of the stochastic bridge", head + "\n" + "\n".join(lines)]


def pictures(runs: dict[str, Run], folder: Path) -> list[tuple[str, str]]:
    """Overlays of six held-out structures and a moving bridge, of the first such run."""
    run = next((r for r in runs.values() if r.config.kind != "direct"), None)
    if run is None:
        return []
    parts = parts_of(run.config)
    records = evaluation.held_out(run.config, parts)
    step = max(1, len(records) // 6)
    some = records[::step][:6]
    params = evaluation.judged_params(run.state())
    key, reach = jax.random.key(run.config.seed), dataset.reach_of(run.config)
    found = predict(parts, params, some, reach, parts.sampler, key, path=True)
    rmsd = [metrics.c_rmsd(r, x[-1]) for r, x in zip(some, found, strict=True)]
    drawn = figures.overlay(some, [x[-1] for x in found], rmsd, folder / "overlay.png")
    figures.animation(some[0], found[0], folder / "bridge.gif")
    return [*drawn, (f"One bridge of {some[0].smiles or some[0].id}.", "bridge.gif")]


def _machine(runs: dict[str, Run]) -> str:
    lines = [
        f"| {name} | {run.timing.get('steps_per_second') or float('nan'):.3g} "
        f"| {run.timing.get('seconds') or float('nan'):.0f} |"
        for name, run in runs.items()
    ]
    return "| run | steps per second | seconds |\n|---|---|---|\n" + "\n".join(lines)
