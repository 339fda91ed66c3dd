"""Figures, tables and the closing line of a Hubbard run."""

import math
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
from nqs.lattice import hubbard

ROUNDING = 1e-8  # Of an exact energy, relative; published ones have nine digits.
SIGMAS = 3.0  # A seed this far below the exact energy has a bug.


class Truth(NamedTuple):
    """What is known of the ground state without us."""

    energy: float | None  # Total; None if nobody knows.
    source: str
    observables: dict | None  # Of `exact.exact_observables`, or of a degenerate level.
    references: list


def truth(system) -> Truth:
    """Exact diagonalisation where the sector is small, else the published energy."""
    known = references.lookup(system)
    if exact.n_states(system) <= exact.MAX_STATES:
        energies, vectors = exact.ground_state(system, min(2, exact.n_states(system)))
        source = "exact diagonalisation, here"
        if exact.degenerate(system, energies):
            source += ", degenerate"
            seen = exact.level_observables(system, vectors)
        else:
            seen = exact.exact_observables(system, vectors[:, 0])
        return Truth(float(energies[0]), source, seen, known)
    for each in known:
        if each.exact:
            total = each.energy_per_site * system.n_sites
            return Truth(total, each.source, None, known)
    return Truth(None, "not known", None, known)


def headline(system, row: dict) -> str:
    """Energy per site and acceptance, for the progress line; and what went wrong."""
    n = system.n_sites
    energy = stats.digits(row["energy"] / n, row["energy_error"] / n)
    skipped = f"  {row['skipped']} steps skipped" if row["skipped"] else ""
    return f"E/N {energy}  var {row['variance']:.3g}  acc {row['acceptance']:.2f}{skipped}"


def report(runs: dict[str, Run], folder: Path) -> Report:
    """Everything a reader of the field asks for, of all runs.

    Runs are compared with the truth of their own system. Where there are several, as when
    a run warms up at another U, the last one gives the headline and the top of the summary.
    """
    systems = {name: system_of(run.config) for name, run in runs.items()}
    labels = list(dict.fromkeys(system.label for system in systems.values()))
    parts = []
    for i, label in enumerate(labels):
        these = {n: run for n, run in runs.items() if systems[n].label == label}
        last = i == len(labels) - 1
        where = "" if last else f"system{i}/"
        parts.append(_of_system(systems[next(iter(these))], these, folder, where))
    summary = parts[-1].summary | {
        "systems": {label: part.summary for label, part in zip(labels, parts, strict=True)},
        "skipped_steps": {n: skipped(run) for n, run in runs.items()},
        "timing": {n: run.timing for n, run in runs.items()},
    }
    text = "\n\n".join(
        [
            *(part.text for part in reversed(parts)),
            "## This machine",
            _timing(runs),
            "Errors are one standard error: within a seed from the scatter of its "
            "independent chains, or blocked over time if that is larger, and over seeds the "
            "larger of that and their scatter. Energies are means of unclipped local "
            "energies at frozen parameters, in the units of U and t.",
        ]
    )
    return Report(text, finite(summary), parts[-1].result)


def _of_system(system, runs: dict[str, Run], folder: Path, where: str) -> Report:
    """The runs of one system; figures go to the folder `where` below `folder`."""
    known = truth(system)
    final = {name: last_evaluation(run) for name, run in runs.items()}
    groups = defaultdict(list)
    for name in runs:
        groups[name.rpartition("seed")[0].rstrip("-") or "main"].append(name)
    drawn = draw.all_figures(system, known, runs, final, folder / where)
    numbers = {
        group: summarize(system, known, [final[n] for n in names])
        for group, names in groups.items()
    }
    seeds = {n: summarize(system, known, [f]) for n, f in final.items()}
    best = min(numbers, key=lambda g: numbers[g]["energy"])
    summary = numbers[best] | {"system": system.label, "groups": numbers, "seeds": seeds}
    result = sentence(system, known, numbers[best], len(groups[best]))
    text = "\n\n".join(
        [
            f"# {system.label}",
            result,
            "## Energy",
            _energies(system, known, numbers, seeds),
            *([variational(seeds)] if known.energy is not None else []),
            "## The chains",
            _chains(final, runs),
            "## Figures",
            *[f"{caption}\n\n![{caption}](figures/{where}{name})" for name, caption in drawn],
        ]
    )
    return Report(text, summary, result)


def system_of(config):
    """The cluster of a run's config."""
    return hubbard(lattice=config.lattice, model=config.model, pinning=config.pinning)


def evaluated(config, system, psi, parts, run: Run, folder: Path) -> str:
    """`--do=evaluate`: measures a finished run anew, with today's `config.eval`."""
    key = jax.random.fold_in(jax.random.key(config.seed), 2**31)
    values = evaluation.evaluate(config, system, psi, parts, run.state(), key)
    row = metrics.to_row(0, "eval", values)
    known = truth(system)
    if jax.process_index() == 0:
        draw.all_figures(system, known, {run.name: run}, {run.name: row}, folder)
    numbers = summarize(system, known, [row])
    seeds = {run.name: numbers}
    tables = [_energies(system, known, {}, seeds), _chains({run.name: row}, {run.name: run})]
    if known.energy is not None:
        tables.insert(1, variational(seeds))
    return "\n\n".join([sentence(system, known, numbers, 1), *tables])


def last_evaluation(run: Run) -> dict:
    return [row for row in run.rows if row["split"] == "eval"][-1]


def finite(tree):
    """A summary with None in place of every number that is not finite, as JSON asks."""
    if isinstance(tree, dict):
        return {k: finite(v) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return [finite(v) for v in tree]
    if isinstance(tree, float) and not math.isfinite(tree):
        return None
    return tree


def _show(value, form: str) -> str:
    """A number in a table; a dash where there is none."""
    return "–" if value is None or not math.isfinite(value) else format(value, form)


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
    infinite = system.U * system.n_up * system.n_dn / n
    scores = [
        stats.v_score_error(
            *(r[k] for k in ("energy", "energy_error", "variance", "variance_error")),
            system.n_electrons,
            infinite,
        )
        for r in rows
    ]
    spread = [r["variance_error"] for r in rows]
    for name, errors in (("variance", spread), ("v_score", scores)):
        value, wrong = stats.combine([r[name] for r in rows], errors)
        found |= {name: value, f"{name}_error": wrong}
    for name in ("acceptance", "r_hat", "autocorrelation_time"):
        found[name] = float(np.mean([r[name] for r in rows]))
    if "attention_distance" in rows[0]:  # [layers, heads]
        distances = np.mean([r["attention_distance"] for r in rows], axis=0)
        found["attention_distance"] = distances.tolist()
    if known.energy is not None:
        found |= _against(known, n, [r["energy"] for r in rows], energy, error)
    if known.observables is not None:
        found["exact_double_occupancy"] = float(known.observables["double_occupancy"])
    return found


def _against(known: Truth, n: int, energies: list, energy: float, error: float) -> dict:
    """What the exact energy says of a mean energy; no relative errors where it is 0."""
    gap, scale = energy - known.energy, abs(known.energy)
    found = {
        "exact_energy": known.energy,
        "exact_energy_per_site": known.energy / n,
        "exact_source": known.source,
        "relative_error": None,
        "signed_relative_error": None,
        "relative_error_error": None,
        "worst_relative_error": None,
        # Above zero: the variational principle holds by so many standard errors.
        "sigmas_above_exact": _sigmas(gap, error, scale),
    }
    if scale > ROUNDING:
        found |= {
            "relative_error": abs(gap) / scale,
            "signed_relative_error": gap / scale,
            "relative_error_error": error / scale,
            "worst_relative_error": float(max(abs(e - known.energy) for e in energies)) / scale,
        }
    return found


def _sigmas(gap: float, error: float, scale: float) -> float:
    """gap / error; 0 for a gap that is rounding, of published digits or ours."""
    if abs(gap) <= ROUNDING * max(scale, 1.0):
        return 0.0
    return gap / error if error > 0 else math.copysign(math.inf, gap)


def variational(seeds: dict[str, dict]) -> str:
    """Whether the variational principle holds, in words, by each seed's own error."""
    lines = [
        f"WARNING: {name} lies below the exact energy by {-found['sigmas_above_exact']:.1f} "
        "standard errors: this breaks the variational principle and is a bug."
        for name, found in seeds.items()
        if found["sigmas_above_exact"] < -SIGMAS
    ]
    return "\n\n".join(lines) or (
        "No seed lies below the exact energy by more than three standard errors."
    )


def sentence(system, known: Truth, found: dict, seeds: int) -> str:
    """The result in one line; the relative error is (E - E0) / |E0|."""
    energy = stats.digits(found["energy_per_site"], found["energy_per_site_error"])
    text = f"{system.label}: E/N = {energy} ({seeds} seed{'s' if seeds > 1 else ''})"
    if known.energy is None:
        return text + "."
    per_site = known.energy / system.n_sites
    wrong = stats.digits(found["signed_relative_error"], found["relative_error_error"])
    sign = "+" if (found["signed_relative_error"] or 0) > 0 else ""
    return f"{text}, exact {per_site:.6f}, relative error {sign}{wrong}."


def _energies(system, known, numbers, seeds) -> str:
    lines = [
        "| | E/N | (E − E₀) / \\|E₀\\| | variance | V-score | double occupancy |",
        "|---|---|---|---|---|---|",
    ]

    def row(name, found):
        show = lambda key, form, error: (
            f"{_show(found.get(key), form)} ± {_show(found.get(error), '.0e')}"
        )
        wrong = show("signed_relative_error", "+.2e", "relative_error_error")
        if found.get("signed_relative_error") is None:
            wrong = "–"
        energy = stats.digits(found["energy_per_site"], found["energy_per_site_error"])
        double = stats.digits(found["double_occupancy"], found["double_occupancy_error"])
        return (
            f"| {name} | {energy} | {wrong} | {show('variance', '.4g', 'variance_error')} "
            f"| {show('v_score', '.2e', 'v_score_error')} | {double} |"
        )

    lines += [row(f"**{g}, all seeds**", found) for g, found in numbers.items()]
    lines += [row(n, found) for n, found in seeds.items()]
    if known.energy is not None:
        double = (known.observables or {}).get("double_occupancy")
        shown = "–" if double is None or not np.isfinite(double) else f"{double:.6f}"
        per_site = known.energy / system.n_sites
        none = "0" if abs(known.energy) > ROUNDING else "–"
        lines.append(f"| {known.source} | {per_site:.6f} | {none} | 0 | 0 | {shown} |")
    for each in known.references:
        if each.source == known.source:
            continue  # It stands there already.
        error = f" ± {each.error}" if each.error else ""
        lines.append(f"| {each.source} | {each.energy_per_site}{error} | | | | |")
    return "\n".join(lines)


def skipped(run: Run) -> int:
    """Training steps that the optimizer refused: too many bad samples, or no number."""
    _, counts = metrics.select(run.rows, "skipped")
    return int(counts[-1]) if len(counts) else 0


def _chains(final, runs) -> str:
    lines = [
        "| | acceptance | R-hat | autocorrelation time (sweeps) | allowed hops | samples "
        "| bad samples | skipped steps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {r['acceptance']:.3f} | {_show(r['r_hat'], '.4f')} "
        f"| {r['autocorrelation_time']:.2f} | {r['connected']:.1f} | {r['samples']} "
        f"| {r['bad_samples']} | {skipped(runs[name])} |"
        for name, r in final.items()
    ]
    return "\n".join(lines)


def _timing(runs) -> str:
    lines = [
        "| | from command to first step (s) | from its own start to first step (s) "
        "| steps per second | peak memory (MB) | devices |",
        "|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        t = run.timing
        if t:
            lines.append(
                f"| {name} | {_show(t.get('seconds_from_command_to_first_step'), '.1f')} "
                f"| {_show(t.get('seconds_to_first_step'), '.1f')} "
                f"| {_show(t['steps_per_second'], '.3g')} "
                f"| {t['peak_host_memory_mb']:.0f} | {t['devices']} |"
            )
    return "\n".join(lines)
