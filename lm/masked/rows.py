"""The results of runs as rows: one for each run, sampler, length and number of steps.

Everything a report says comes from here, and `results.csv` holds it all.
"""

import csv
import hashlib
import json
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from common import config as configs
from common import metrics
from common.experiment import Run
from lm.languages import theory
from lm.masked import curve, known, plans, settings

THEORY, AR, MDM = "theory", "ar", "mdm"
COLUMNS = (
    "run",
    "variant",
    "seed",
    "config",
    "kind",
    "language",
    "sampler",
    "length",
    "steps",
    "texts",
    "entropy",
    "entropy_error",
    "nats",
    "nats_error",
    "gap",
    "gap_error",
    "ter_bound",
    "perplexity",
    "bits",
    "ter",
    "ter_error",
    "ser",
    "ser_error",
    "unsupported",
    "entropy_1",
    "entropy_2",
    "entropy_3",
    "distinct_2",
    "distinct_3",
    "judged",
    "judged_error",
    "calls",
    "rounds",
    "clipped",
)


def kind(config: Any) -> str:
    """What a run is: theory, ar or mdm."""
    return THEORY if config.experiment.endswith("theory") else config.kind


def last(run: Run) -> dict:
    """The last evaluation of a run; of lists there are arrays."""
    found = [row for row in run.rows if row["split"] == "eval"][-1]
    return {k: np.array(v) if isinstance(v, list) else v for k, v in found.items()}


def rows_of(runs: dict[str, Run]) -> list[dict]:
    """All rows, in the order of runs, samplers, lengths and steps."""
    return [row for run in runs.values() for row in one_run(run)]


def one_run(run: Run) -> list[dict]:
    """The rows of one run, None for what is not known; perplexity and bits are of `nats`,
    the held-out likelihood, which no sampler changes."""
    config, found = run.config, last(run)
    which = kind(config)
    base = dict.fromkeys(COLUMNS) | {
        "run": run.name,
        "variant": run.name.rpartition("seed")[0].rstrip("-") or "main",
        "seed": config.seed,
        "config": digest(config),
        "kind": which,
        "language": config.language.path or config.language.kind or "text",
    }
    if which == THEORY:
        made = _theory(base, config, found)
    else:
        samplers = config.eval.samplers if which == MDM else (AR,)
        made = [row for name in samplers for row in _learned(base, config, found, name)]
    formal = config.language.path or config.language.kind
    full = bool(formal) and known.full_support(config)
    for row in made:
        if row["nats"] is not None:
            row["perplexity"] = float(np.exp(row["nats"]))
            row["bits"] = float(row["nats"] / np.log(2))
        if full:  # Every text is right: known.WHY_NO_SER.
            row["ser"] = row["ser_error"] = None
    return made


def excess(config, sampler: str, length: int, steps: int) -> np.ndarray | None:
    """Coefficients c_n with NELBO_T / L - NELBO / L = sum c_n h_n; None: there is no bound.

    Where the order of writing depends on what is written, or goes block by block, the
    information curve says nothing; nor where tokens are not drawn from f itself. First
    hitting writes one by one: all zero.
    """
    fields = dict(config.sampler) | {"kind": "ancestral" if sampler == AR else sampler}
    if not settings.plain_law(settings.Settings(**fields), sampler == AR):
        return None
    if sampler != AR and (config.sampler.block or sampler not in settings.PLANNED):
        return None
    if sampler == AR or (sampler == "first_hitting" and config.sampler.per_call == 1):
        return np.zeros(length)
    if sampler == "ancestral":
        return curve.excess(known.ancestral(config, steps), length)
    if sampler == "first_hitting":
        steps = -(-length // config.sampler.per_call)
        sizes = np.full(steps, config.sampler.per_call)
        sizes[-1] = length - sizes[:-1].sum()
    else:
        sizes = plans.sizes(length, steps)
    return curve.grouped(length, sizes) - curve.whole(length)


def _theory(base: dict, config, found: dict) -> list[dict]:
    made = []
    for name in config.theory.samplers:
        for length in config.theory.lengths:
            entropy = found[f"entropy_{length}"]
            for i, n in enumerate(np.atleast_1d(found[f"steps_{name}_{length}"]).tolist()):
                row = base | {"sampler": name, "length": length, "steps": n}
                row |= {"entropy": entropy, "texts": config.steps * config.batch_size}
                row["entropy_error"] = found[f"entropy_error_{length}"]
                for field in (
                    "ser", "ser_error", "ter", "ter_error", "unsupported", "calls", "rounds",
                ):  # fmt: skip
                    value = float(np.atleast_1d(found[f"{field}_{name}_{length}"])[i])
                    row[field] = value if np.isfinite(value) else None
                more = excess(config, name, length, n)
                if more is not None and f"h_{length}" in found:
                    gap = curve.linear(found[f"h_{length}"], found[f"h_error_{length}"], more)
                    row["gap"], row["gap_error"] = gap
                    row["ter_bound"] = entropy + gap.value
                made.append(row)
    return made


def _learned(base: dict, config, found: dict, name: str) -> list[dict]:
    if f"steps_{name}" not in found:
        return []
    made = []
    total = config.length - config.objective.prompt
    for i, n in enumerate(np.atleast_1d(found[f"steps_{name}"]).tolist()):
        row = base | {"sampler": name, "length": config.length, "steps": n}
        row |= {"texts": config.eval.samples, "entropy": found.get("entropy")}
        row |= {"nats": found["nats"], "nats_error": found["nats_error"]}
        for field in COLUMNS:
            key = f"{field}_{name}"
            if field not in ("steps", "entropy", "texts", "nats") and key in found:
                value = float(np.atleast_1d(found[key])[i])
                row[field] = value if np.isfinite(value) else None
        more = excess(config, name, total, n)
        if more is not None and ("h" in found or not more.any()):
            gap = curve.Estimate(0.0, 0.0)
            if more.any():
                gap = curve.linear(found["h"], found["h_error"], more)
            row["ter_bound"] = found["nats"] + gap.value
            if found.get("gap") is not None:
                row["gap"] = found["gap"] + gap.value
                row["gap_error"] = float(np.hypot(found["gap_error"], gap.error))
        made.append(row)
    return made


def ser_bound(rows: list[dict], prompt: int = 0) -> float | None:
    """1 - exp(-L gap) of rows that differ in their seeds, which no sampler with that bound
    exceeds; None without one. Tokens of a prompt are none of L."""
    gap, _ = mean(rows, "gap")
    if not np.isfinite(gap):
        return None
    return theory.ser_bound(rows[0]["length"] - prompt, gap)


def digest(config) -> str:
    """Eight hexadecimal digits of a run's config, seed included."""
    text = json.dumps(configs.to_dict(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def write(rows: list[dict], path: Path) -> None:
    """`results.csv`."""
    text = StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    metrics.write(path, text.getvalue())


def mean(rows: list[dict], field: str) -> tuple[float, float | None]:
    """Over seeds: the mean and its standard error, between seeds and within each."""
    known = [row for row in rows if row[field] is not None]
    if not known:
        return float("nan"), None
    values = [row[field] for row in known]
    own = [row.get(f"{field}_error") for row in known]
    within = None if any(e is None for e in own) else np.sqrt(np.sum(np.square(own))) / len(own)
    if len(values) == 1:
        return values[0], own[0]
    # Runs may share held-out texts, so the two are added: rather too large than too small.
    between = np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values)), float(np.hypot(between, within or 0.0))
