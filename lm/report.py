"""Tables, paired tests and figures of a comparison of weight decays."""

from collections import defaultdict
from itertools import product
from pathlib import Path

import numpy as np
from scipy import stats

from common import metrics
from common.experiment import Report, Run
from lm import figures
from lm.actions import note
from lm.modules import TYPES
from lm.transformer import flops_per_token, parameters

CONTROLS = ("uniform_matched", "static_by_type", "shuffled")
NUMBERS = ("val_loss", "val_ppl", "val_ppl_released")
# Dense products per second of one device, bfloat16, as its maker states them.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def report(runs: dict[str, Run], folder: Path) -> Report:
    """Validation losses with error bars over seeds, and paired differences."""
    groups: dict[str, dict[int, Run]] = defaultdict(dict)
    for name, run in runs.items():
        variant, _, seed = name.rpartition("seed")
        groups[variant.rstrip("-") or "main"][int(seed)] = run
    found = {name: summarize(each) for name, each in groups.items()}
    paired = [
        {"what": what, "base": base} | difference(groups[what], groups[base])
        for what, base in pairs(groups)
    ]
    best = min(found, key=lambda name: found[name]["val_loss"])
    drawn = figures.all_figures(groups, found, paired, folder)
    summary = found[best] | {
        "best": best,
        "groups": found,
        "paired": paired,
        "timing": {name: run.timing for name, run in runs.items()},
    }
    config = next(iter(runs.values())).config
    result = (
        f"Best of {len(groups)}: {best}, validation loss {_digits(found[best], 'val_loss')} "
        f"nats ({_seeds(found[best]['seeds'])})."
    )
    text = "\n\n".join(
        [
            f"# Language model, {parameters(**config.model):,} parameters",
            result,
            "## Validation",
            _losses(found),
            *(["## Paired differences", _pairs(paired)] if paired else []),
            "## Spectra at the end",
            _spectra(found),
            *_flagged(groups),
            "## This machine",
            _machine(runs),
            "## Figures",
            *[f"{caption}\n\n![{caption}](figures/{name})" for name, caption in drawn],
            "Losses are nats per token; ± and brackets are one standard error over seeds. "
            "Paired differences are by seed, which fixes initial weights and data; intervals "
            "are 95 %, by Student's t, each by itself. Lower losses are better. `mean ratio` "
            "is the mean over time and parameters. `val_ppl_released` is exp(sum of batch "
            "means / (batches + 1)), as published tables of this benchmark print it.",
        ]
    )
    return Report(text, summary, result)


def pairs(groups) -> list[tuple[str, str]]:
    """Which variants are compared: (variant, base).

    Everything with no decay, every rule with uniform decay of the same strength, AlphaDecay
    with its controls; the first with all others where that gives nothing.
    """
    rule, strength = {}, {}
    for name, seeds in groups.items():
        optim = next(iter(seeds.values())).config.optim
        rule[name], strength[name] = optim.rule, optim.weight_decay

    def wanted(name, base):
        if rule[base] == "none":
            return rule[name] != "none"
        controlled = rule[base] in CONTROLS and rule[name] == "alphadecay"
        ruled = rule[base] == "uniform" and rule[name] not in ("none", "uniform")
        return (controlled or ruled) and strength[name] == strength[base]

    found = [pair for pair in product(groups, groups) if wanted(*pair)]
    found.sort(key=lambda pair: rule[pair[1]] == "none")  # The rules among each other first.
    first = next(iter(groups))
    return found or [(name, first) for name in groups if name != first]


def summarize(seeds: dict[int, Run]) -> dict:
    """Means over seeds of the last evaluation; `_error` is one standard error."""
    rows = [last(run) for run in seeds.values()]
    optim = next(iter(seeds.values())).config.optim
    found: dict = {"seeds": len(rows), "rule": optim.rule, "weight_decay": optim.weight_decay}
    for name in NUMBERS:
        values = np.array([row[name] for row in rows])
        found[name] = float(values.mean())
        found[f"{name}_error"] = _error(values)
    kinds = [_mean_alpha([row[f"alpha_layers_{k}"] for row in rows]) for k in TYPES]
    known = [kind for kind in kinds if kind is not None]
    found["alpha"] = dict(zip(TYPES, kinds, strict=True))
    found["alpha_spread"] = max(known) - min(known) if known else None
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
    length = config.data.length - (not config.data.pack)  # Places with a prediction.
    tokens = config.batch_size * length
    each = flops_per_token(length=length, **config.model)
    return {"forward and backward": float(each) * tokens}


def _error(values: np.ndarray) -> float | None:
    """One standard error of the mean; None of a single value."""
    n = len(values)
    return float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else None


def _mean_alpha(values: list) -> float | None:
    """Over layers and seeds; modules without an exponent stand as 0 and do not count."""
    alpha = np.ravel(values)
    return float(alpha[alpha > 0].mean()) if np.any(alpha > 0) else None


def _digits(found: dict, name: str) -> str:
    value, error = found[name], found[f"{name}_error"]
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


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
    lines = ["| | minus | seeds | loss | 95 % interval | p |", "|---|---|---|---|---|---|"]
    for d in paired:
        gap = "–" if d["difference"] is None else f"{d['difference']:+.4f}"
        known = d["low"] is not None
        interval = f"{d['low']:+.4f} to {d['high']:+.4f}" if known else "–"
        p = "–" if d["p"] is None else f"{d['p']:.2g}"
        lines.append(f"| {d['what']} | {d['base']} | {d['seeds']} | {gap} | {interval} | {p} |")
    return "\n".join(lines)


def _spectra(found) -> str:
    lines = [
        f"| alpha | {' | '.join(TYPES)} | spread |",
        "|---|" + "---|" * (len(TYPES) + 1),
    ]
    for name, f in found.items():
        values = [*(f["alpha"][kind] for kind in TYPES), f["alpha_spread"]]
        cells = ["–" if value is None else f"{value:.3f}" for value in values]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _flagged(groups) -> list[str]:
    """A sentence on modules without a sound spectrum, if there are any."""
    found = [
        f"{name}-seed{seed}: {kind}[{layer}] {said}"
        for name, seeds in groups.items()
        for seed, run in seeds.items()
        for kind in TYPES
        for layer, alpha in enumerate(last(run)[f"alpha_layers_{kind}"])
        if (said := note(float(alpha), last(run)[f"deficient_layers_{kind}"][layer]))
    ]
    return ["Modules to look at: " + ", ".join(found) + "."] if found else []


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
        # Places in the rows, padding included.
        tokens = rate * c.batch_size * (c.data.length - (not c.data.pack))
        peak, mfu = c.peak_flops or _peak(t["devices"]), "–"
        if peak:
            mfu = f"{100 * rate * sum(flops(c).values()) / peak:.1f} %"
        lines.append(
            f"| {name} | {rate:.3g} | {tokens:,.0f} | {mfu} "
            f"| {t['peak_host_memory_mb']:.0f} | {t['devices']} |"
        )
    return "\n".join(lines)


def _peak(devices: str) -> float:
    """Of all devices, "8 x NVIDIA H100 80GB HBM3"; 0: not known."""
    count, _, kind = devices.partition(" x ")
    known = [name for name in PEAK_FLOPS if kind.startswith(name)]
    return int(count) * PEAK_FLOPS[max(known, key=len)] if known else 0.0
