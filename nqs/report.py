"""Figures, tables and the closing line of a Hubbard run."""

from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from common import metrics
from common.experiment import Report, Run
from nqs import evaluation, exact, references
from nqs import figures as draw
from nqs import statistics as stats


class Truth(NamedTuple):
    """What is known of the ground state without us."""

    energy: float | None  # Total; None if nobody knows.
    source: str
    observables: dict | None  # Of `exact.exact_observables`.
    references: list


def truth(system) -> Truth:
    """Exact diagonalisation where the sector is small, else the published energy."""
    known = references.lookup(system)
    if exact.n_states(system) <= exact.MAX_STATES:
        energies, vectors = exact.ground_state(system)
        seen = exact.exact_observables(system, vectors[:, 0])
        return Truth(float(energies[0]), "exact diagonalisation, here", seen, known)
    for each in known:
        if each.exact:
            total = each.energy_per_site * system.n_sites
            return Truth(total, each.source, None, known)
    return Truth(None, "not known", None, known)


def headline(system, row: dict) -> str:
    """Energy per site and acceptance, for the progress line."""
    n = system.n_sites
    energy = stats.digits(row["energy"] / n, row["energy_error"] / n)
    return f"E/N {energy}  var {row['variance']:.3g}  acc {row['acceptance']:.2f}"


def report(system, runs: dict[str, Run], folder: Path) -> Report:
    """Everything a reader of the field asks for, of all runs."""
    known = truth(system)
    final = {name: last_evaluation(run) for name, run in runs.items()}
    groups = defaultdict(list)
    for name in runs:
        groups[name.rpartition("seed")[0].rstrip("-") or "main"].append(name)
    drawn = draw.all_figures(system, known, runs, final, folder)
    numbers = {
        group: summarize(system, known, [final[n] for n in names])
        for group, names in groups.items()
    }
    best = min(numbers, key=lambda g: numbers[g]["energy"])
    summary = numbers[best] | {
        "system": system.label,
        "groups": numbers,
        "seeds": {n: summarize(system, known, [f]) for n, f in final.items()},
        "timing": {n: run.timing for n, run in runs.items()},
    }
    text = "\n\n".join(
        [
            f"# {system.label}",
            sentence(system, known, numbers[best], len(groups[best])),
            "## Energy",
            _energies(system, known, numbers, final),
            "## The chains",
            _chains(final),
            "## This machine",
            _timing(runs),
            "## Figures",
            *[f"{caption}\n\n![{caption}](figures/{name})" for name, caption in drawn],
            "Errors are one standard error: blocked over the chain within a seed, and over "
            "seeds the larger of that and their scatter. Energies are means of unclipped "
            "local energies at frozen parameters, in units of t.",
        ]
    )
    return Report(text, summary, sentence(system, known, numbers[best], len(groups[best])))


def evaluated(config, system, psi, parts, run: Run, folder: Path) -> str:
    """`--do=evaluate`: measures a finished run anew, with today's `config.eval`."""
    key = jax.random.fold_in(jax.random.key(config.seed), 2**31)
    values = evaluation.evaluate(config, system, psi, parts, run.state(), key)
    row = metrics.to_row(0, "eval", values)
    known = truth(system)
    if jax.process_index() == 0:
        draw.all_figures(system, known, {run.name: run}, {run.name: row}, folder)
    numbers = summarize(system, known, [row])
    tables = [
        _energies(system, known, {run.name: numbers}, {run.name: row}),
        _chains({run.name: row}),
    ]
    return "\n\n".join([sentence(system, known, numbers, 1), *tables])


def last_evaluation(run: Run) -> dict:
    return [row for row in run.rows if row["split"] == "eval"][-1]


def summarize(system, known: Truth, rows: list[dict]) -> dict:
    """Stable names for the numbers of some seeds; `_error` is one standard error."""
    n = system.n_sites
    energy, error = stats.combine(
        [r["energy"] for r in rows], [r["energy_error"] for r in rows]
    )
    double, double_error = stats.combine(
        [r["double_occupancy"] for r in rows], [r["double_occupancy_error"] for r in rows]
    )
    found = {
        "seeds_used": len(rows),
        "energy": energy,
        "energy_error": error,
        "energy_per_site": energy / n,
        "energy_per_site_error": error / n,
        "double_occupancy": double,
        "double_occupancy_error": double_error,
    }
    for name in ("variance", "v_score", "acceptance", "r_hat", "autocorrelation_time"):
        found[name] = float(np.mean([r[name] for r in rows]))
    if known.energy is not None:
        gaps = [(r["energy"] - known.energy) / abs(known.energy) for r in rows]
        found |= {
            "exact_energy": known.energy,
            "exact_energy_per_site": known.energy / n,
            "exact_source": known.source,
            "relative_error": abs(energy - known.energy) / abs(known.energy),
            "relative_error_error": error / abs(known.energy),
            "worst_relative_error": float(np.max(np.abs(gaps))),
            # Above zero: the variational principle holds by so many standard errors.
            "sigmas_above_exact": (energy - known.energy) / error if error else 0.0,
        }
    if known.observables is not None:
        found["exact_double_occupancy"] = float(known.observables["double_occupancy"])
    return found


def sentence(system, known: Truth, found: dict, seeds: int) -> str:
    """The result in one line."""
    energy = stats.digits(found["energy_per_site"], found["energy_per_site_error"])
    text = f"{system.label}: E/N = {energy} ({seeds} seed{'s' if seeds > 1 else ''})"
    if known.energy is None:
        return text + "."
    per_site = known.energy / system.n_sites
    wrong = stats.digits(found["relative_error"], found["relative_error_error"])
    return f"{text}, exact {per_site:.6f}, relative error {wrong}."


def _energies(system, known, numbers, final) -> str:
    lines = [
        "| | E/N | relative error | variance | V-score | double occupancy |",
        "|---|---|---|---|---|---|",
    ]

    def row(name, found):
        wrong = "–"
        if known.energy is not None:
            wrong = f"{found['relative_error']:.2e} ± {found['relative_error_error']:.0e}"
        energy = stats.digits(found["energy_per_site"], found["energy_per_site_error"])
        double = stats.digits(found["double_occupancy"], found["double_occupancy_error"])
        return (
            f"| {name} | {energy} | {wrong} | {found['variance']:.4g} "
            f"| {found['v_score']:.2e} | {double} |"
        )

    lines += [row(f"**{g}, all seeds**", found) for g, found in numbers.items()]
    lines += [row(n, summarize(system, known, [r])) for n, r in final.items()]
    if known.energy is not None:
        double = (known.observables or {}).get("double_occupancy")
        shown = "–" if double is None else f"{double:.6f}"
        per_site = known.energy / system.n_sites
        lines.append(f"| {known.source} | {per_site:.6f} | 0 | 0 | 0 | {shown} |")
    for each in known.references:
        error = f" ± {each.error}" if each.error else ""
        lines.append(f"| {each.source} | {each.energy_per_site}{error} | | | | |")
    return "\n".join(lines)


def _chains(final) -> str:
    lines = [
        "| | acceptance | R-hat | autocorrelation time (sweeps) | allowed hops | samples "
        "| bad samples |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {r['acceptance']:.3f} | {r['r_hat']:.4f} "
        f"| {r['autocorrelation_time']:.2f} | {r['connected']:.1f} | {r['samples']} "
        f"| {r['bad_samples']} |"
        for name, r in final.items()
    ]
    return "\n".join(lines)


def _timing(runs) -> str:
    lines = [
        "| | from command to first step (s) | steps per second | peak memory (MB) | devices |",
        "|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        t = run.timing
        if t:
            rate = t["steps_per_second"]
            lines.append(
                f"| {name} | {t['seconds_from_command_to_first_step']:.1f} "
                f"| {'–' if rate is None else f'{rate:.3g}'} "
                f"| {t['peak_host_memory_mb']:.0f} | {t['devices']} |"
            )
    return "\n".join(lines)
