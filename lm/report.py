"""Tables, paired tests and figures of a comparison of weight decays."""

from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy import stats

from common import metrics
from common.experiment import Report, Run
from lm import figures
from lm.modules import TYPES
from lm.transformer import flops_per_token, parameters

BASE = "uniform"  # What the others are paired with, where it is there.
NUMBERS = ("val_loss", "val_ppl", "val_ppl_released")


def report(runs: dict[str, Run], folder: Path) -> Report:
    """Validation losses with error bars over seeds, and paired differences."""
    groups: dict[str, dict[int, Run]] = defaultdict(dict)
    for name, run in runs.items():
        variant, _, seed = name.rpartition("seed")
        groups[variant.rstrip("-") or "main"][int(seed)] = run
    found = {name: summarize(each) for name, each in groups.items()}
    base = BASE if BASE in groups else next(iter(groups))
    paired = {
        name: difference(each, groups[base]) for name, each in groups.items() if name != base
    }
    best = min(found, key=lambda name: found[name]["val_loss"])
    drawn = figures.all_figures(groups, base, paired, folder)
    summary = found[best] | {
        "best": best,
        "base": base,
        "groups": found,
        "paired": paired,
        "timing": {name: run.timing for name, run in runs.items()},
    }
    config = next(iter(runs.values())).config
    result = (
        f"Best of {len(groups)}: {best}, validation loss {_digits(found[best], 'val_loss')} "
        f"nats ({found[best]['seeds']} seeds)."
    )
    text = "\n\n".join(
        [
            f"# Language model, {parameters(**config.model):,} parameters",
            result,
            "## Validation",
            _losses(found),
            *(["## Paired with " + base, _pairs(paired)] if paired else []),
            "## Spectra at the end",
            _spectra(found),
            "## This machine",
            _machine(runs),
            "## Figures",
            *[f"{caption}\n\n![{caption}](figures/{name})" for name, caption in drawn],
            "Losses are nats per token; ± and brackets are one standard error over seeds. "
            "Paired differences are by seed, which fixes initial weights and data; intervals "
            "are 95 %, by Student's t. `val_ppl_released` is exp(sum of batch means / "
            "(batches + 1)), as published tables of this benchmark print it.",
        ]
    )
    return Report(text, summary, result)


def summarize(seeds: dict[int, Run]) -> dict:
    """Means over seeds of the last evaluation; `_error` is one standard error."""
    rows = [last(run) for run in seeds.values()]
    found: dict = {"seeds": len(rows)}
    for name in NUMBERS:
        values = np.array([row[name] for row in rows])
        found[name] = float(values.mean())
        found[f"{name}_error"] = _error(values)
    kinds = [np.array([row[f"alpha_layers_{k}"] for row in rows]).mean() for k in TYPES]
    found["alpha"] = dict(zip(TYPES, map(float, kinds), strict=True))
    found["alpha_spread"] = max(kinds) - min(kinds)
    ratios = [metrics.select(run.rows, "ratio_mean")[1] for run in seeds.values()]
    if all(len(r) for r in ratios):
        found["ratio_mean"] = float(np.mean([r.mean() for r in ratios]))
        by_type = {
            kind: np.mean(
                [metrics.select(r.rows, f"ratio_{kind}")[1].mean() for r in seeds.values()]
            )
            for kind in TYPES
        }
        found["ratios"] = {kind: float(value) for kind, value in by_type.items()}
    return found


def difference(ours: dict[int, Run], base: dict[int, Run]) -> dict:
    """Validation loss minus that of the base, seed by seed; negative is better."""
    shared = sorted(set(ours) & set(base))
    gaps = np.array([last(ours[s])["val_loss"] - last(base[s])["val_loss"] for s in shared])
    found = {"seeds": len(gaps), "difference": float(gaps.mean()) if len(gaps) else None}
    if len(gaps) < 2:
        return found | {"error": None, "low": None, "high": None, "p": None}
    error = _error(gaps)
    reach = stats.t.ppf(0.975, len(gaps) - 1) * error
    p = float(stats.ttest_1samp(gaps, 0.0).pvalue) if gaps.std() > 0 else None
    return found | {
        "error": error,
        "low": float(gaps.mean() - reach),
        "high": float(gaps.mean() + reach),
        "p": p,
    }


def last(run: Run) -> dict:
    """The last evaluation."""
    return [row for row in run.rows if row["split"] == "eval"][-1]


def flops(config) -> dict[str, float]:
    """Of one training step, all devices together."""
    tokens = config.batch_size * config.data.length
    each = flops_per_token(length=config.data.length, **config.model)
    return {"forward and backward": float(each) * tokens}


def _error(values: np.ndarray) -> float:
    n = len(values)
    return float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")


def _digits(found: dict, name: str) -> str:
    value, error = found[name], found[f"{name}_error"]
    return f"{value:.4f}" if not np.isfinite(error) else f"{value:.4f} ± {error:.4f}"


def _losses(found) -> str:
    lines = [
        "| | seeds | loss | perplexity | perplexity, release's way | mean ratio |",
        "|---|---|---|---|---|---|",
    ]
    for name, f in sorted(found.items(), key=lambda item: item[1]["val_loss"]):
        ratio = f"{f['ratio_mean']:.3f}" if "ratio_mean" in f else "–"
        cells = [_digits(f, n) for n in NUMBERS]
        lines.append(f"| {name} | {f['seeds']} | {' | '.join(cells)} | {ratio} |")
    return "\n".join(lines)


def _pairs(paired) -> str:
    lines = ["| | seeds | loss − base | 95 % interval | p |", "|---|---|---|---|---|"]
    for name, d in sorted(paired.items(), key=lambda item: item[1]["difference"] or 0):
        gap = "–" if d["difference"] is None else f"{d['difference']:+.4f}"
        known = d["low"] is not None
        interval = f"{d['low']:+.4f} to {d['high']:+.4f}" if known else "–"
        p = "–" if d["p"] is None else f"{d['p']:.2g}"
        lines.append(f"| {name} | {d['seeds']} | {gap} | {interval} | {p} |")
    return "\n".join(lines)


def _spectra(found) -> str:
    lines = [
        f"| alpha | {' | '.join(TYPES)} | spread |",
        "|---|" + "---|" * (len(TYPES) + 1),
    ]
    for name, f in found.items():
        cells = [f"{f['alpha'][kind]:.3f}" for kind in TYPES]
        lines.append(f"| {name} | {' | '.join(cells)} | {f['alpha_spread']:.3f} |")
    return "\n".join(lines)


def _machine(runs) -> str:
    lines = [
        "| | steps per second | tokens per second | MFU | peak memory (MB) | devices |",
        "|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        t, c = run.timing, run.config
        if not t or not t.get("steps_per_second"):
            continue
        rate = t["steps_per_second"]
        tokens = rate * c.batch_size * c.data.length
        mfu = "–"
        if c.peak_flops:
            mfu = f"{100 * rate * sum(flops(c).values()) / c.peak_flops:.1f} %"
        lines.append(
            f"| {name} | {rate:.3g} | {tokens:,.0f} | {mfu} "
            f"| {t['peak_host_memory_mb']:.0f} | {t['devices']} |"
        )
    return "\n".join(lines)
