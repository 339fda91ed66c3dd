"""Figures of a comparison: errors against steps, with the theory drawn through them."""

from pathlib import Path

import numpy as np

from common import plots
from common.experiment import Run
from lm.masked import known
from lm.masked.rows import AR, MDM, THEORY, last, mean
from lm.masked.speed import cost_model

Drawn = list[tuple[str, str]]  # (caption, file)


def all_figures(runs: dict[str, Run], rows: list[dict], speed: dict, folder: Path) -> Drawn:
    """Every figure for which there is something to draw."""
    made = [
        *token_errors(runs, rows, folder / "token_errors.png"),
        *sequence_errors(runs, rows, folder / "sequence_errors.png"),
        *curves(runs, folder / "information.png"),
        *learned(runs, rows, folder / "learned.png"),
        *samplers(rows, folder / "samplers.png"),
        *text(rows, folder / "text.png"),
        *efficiency(speed, folder / "efficiency.png"),
    ]
    return [(caption, path.name) for caption, path in made]


def _variants(rows: list[dict], kind: str) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for row in rows:
        if row["kind"] == kind:
            found.setdefault(row["variant"], []).append(row)
    return found


def _line(rows: list[dict], field: str, length: int, sampler: str) -> tuple[np.ndarray, ...]:
    """Steps, means over seeds and errors, where the field is known."""
    some = [
        r
        for r in rows
        if r["length"] == length and r["sampler"] == sampler and r[field] is not None
    ]
    steps = sorted({r["steps"] for r in some})
    pairs = [mean([r for r in some if r["steps"] == n], field) for n in steps]
    values = np.array([p[0] for p in pairs])
    return np.array(steps), values, np.array([p[1] or 0.0 for p in pairs])


def _lengths(rows: list[dict]) -> list[int]:
    return sorted({row["length"] for row in rows})


def token_errors(runs: dict[str, Run], rows: list[dict], path: Path):
    """gap_T of the exact denoiser against T, every length: flat in L."""
    shown = {
        name: each
        for name, each in _variants(rows, THEORY).items()
        if any(row["gap"] is not None for row in each)
    }
    if not shown:
        return []
    with plots.panels(path, len(shown)) as axes:
        for axis, (name, each) in zip(axes, shown.items(), strict=True):
            config = next(r for r in runs.values() if r.name == each[0]["run"]).config
            for i, length in enumerate(_lengths(each)):
                steps, gap, error = _line(each, "gap", length, "ancestral")
                axis.errorbar(
                    steps,
                    gap,
                    error,
                    fmt="o",
                    ms=4,
                    color=plots.colour(i),
                    label=f"L = {length}",
                )
                curve = known.token_gap(config, length, steps)
                if curve is not None:
                    axis.plot(steps, curve, color=plots.colour(i), lw=1)
                if i == 0:
                    drop = np.subtract(*known.ends(config, length))
                    grid = np.unique(np.geomspace(1, max(steps), 50).astype(int))
                    bound = np.array([known.gap_bound(config, drop, n) for n in grid])
                    axis.plot(grid, bound / 2, "k--", lw=1, label="half of it")
                    axis.plot(grid, bound, "k:", lw=1, label="bound, (h(0) - h(1)) max w")
                steps, ter, error = _line(each, "ter", length, "ancestral")
                if len(steps):
                    entropy = next(r["entropy"] for r in each if r["length"] == length)
                    axis.plot(steps, np.abs(ter - entropy), "x", ms=4, color=plots.colour(i))
            axis.set(xscale="log", yscale="log", title=name, xlabel="steps T")
            axis.set_ylabel("token error above H(q) / L, nats")
            axis.legend(fontsize=7)
    caption = (
        "Exact denoiser: token error above the entropy against steps, in the direction of the "
        "data (dots) and of the samples (crosses, absolute). It does not depend on the length. "
        "Solid: exact curve, where there is one; half of the bound is the limit of many even "
        "steps."
    )
    return [(caption, path)]


def sequence_errors(runs: dict[str, Run], rows: list[dict], path: Path):
    """SER of the exact denoiser against T and against T / L."""
    shown = {
        name: [r for r in each if r["sampler"] == "ancestral"]
        for name, each in _variants(rows, THEORY).items()
        if any(r["ser"] for r in each)
    }
    shown = {name: each for name, each in shown.items() if each}
    if not shown:
        return []
    with plots.figure(path, len(shown), 2, squeeze=False) as axes:
        for column, (name, each) in enumerate(shown.items()):
            config = next(r for r in runs.values() if r.name == each[0]["run"]).config
            for i, length in enumerate(_lengths(each)):
                steps, ser, error = _line(each, "ser", length, "ancestral")
                colour = plots.colour(i)
                grid = np.unique(np.geomspace(1, max(steps), 60).astype(int))
                curve = known.sequence_error(config, length, grid)
                for axis, scale in ((axes[0, column], 1), (axes[1, column], length)):
                    axis.errorbar(
                        steps / scale, ser, error, fmt="o", ms=4, color=colour,
                        label=f"L = {length}",
                    )  # fmt: skip
                    if curve is not None:
                        axis.plot(grid / scale, curve, color=colour, lw=1)
            axes[0, column].set(title=name, xlabel="steps T")
            axes[1, column].set(xlabel="T / L")
            for axis in axes[:, column]:
                axis.set(xscale="log", ylabel="sequence error rate", ylim=(-0.02, 1.02))
                axis.legend(fontsize=7)
    caption = (
        "Exact denoiser: the share of texts that are wrong somewhere, against steps and steps "
        "per token. Lengths fall on one curve of T / L: steps must grow with the length. "
        "Lines: closed forms, where there are any."
    )
    return [(caption, path)]


def curves(runs: dict[str, Run], path: Path):
    """Information curves, learned and exact."""
    shown = [r for r in runs.values() if "h" in last(r) and r.config.n_seeds]
    shown = [r for r in shown if r.config.seed == min(s.config.seed for s in shown)]
    if not shown:
        return []
    with plots.figure(path) as axis:
        for i, run in enumerate(shown):
            found = last(run)
            share = np.arange(len(found["h"])) / len(found["h"])
            base = found.get("entropy", 0.0)
            axis.plot(share, found["h"] + base, color=plots.colour(i), label=run.name)
            if "exact" in found:
                axis.plot(share, found["exact"] + base, "--", color=plots.colour(i), lw=1)
        axis.set(xlabel="share visible", ylabel="loss of a masked token, nats")
        axis.legend(fontsize=7)
    return [("Loss of a masked token by the share visible; dashed: the exact denoiser.", path)]


def learned(runs: dict[str, Run], rows: list[dict], path: Path):
    """Trained models of a language beside the exact denoiser and the autoregressive one."""
    shown = {
        name: each
        for name, each in _variants(rows, MDM).items()
        if any(r["ser"] is not None for r in each)
    }
    if not shown:
        return []
    others = _variants(rows, AR)
    with plots.figure(path, len(shown), 2, squeeze=False) as axes:
        for column, (name, each) in enumerate(shown.items()):
            top, below = axes[:, column]
            length, run = each[0]["length"], runs[each[0]["run"]]
            steps, gap, error = _line(each, "gap", length, "ancestral")
            top.errorbar(
                steps, gap, error, fmt="o", ms=4, color=plots.colour(0), label="learned"
            )
            exact = known.exact_gap(run.config, last(run), steps)
            top.plot(steps, exact, "k--", lw=1, label="exact denoiser")
            top.plot(
                steps, exact + last(run)["gap"], color=plots.colour(0), lw=1,
                label="exact + learning gap",
            )  # fmt: skip
            top.set(xscale="log", yscale="log", title=name, xlabel="steps T")
            top.set_ylabel("NELBO_T / L - H(q) / L, nats")
            for i, sampler in enumerate(dict.fromkeys(r["sampler"] for r in each)):
                steps, ser, error = _line(each, "ser", length, sampler)
                below.errorbar(
                    steps,
                    ser,
                    error,
                    fmt="o-",
                    ms=4,
                    lw=0.7,
                    color=plots.colour(i),
                    label=sampler,
                )
            for other in others.values():
                if other[0]["language"] == each[0]["language"] and other[0]["length"] == length:
                    same = runs[other[0]["run"]].config.language == run.config.language
                    value, _ = mean(other, "ser")
                    if same and np.isfinite(value):
                        below.axhline(value, color="k", ls=":", label=other[0]["variant"])
            if known.full_support(run.config):
                below.set_title("every text is in the language", fontsize=9)
            below.set(xscale="log", xlabel="steps T", ylabel="sequence error rate")
            below.set_ylim(-0.02, 1.02)
            for axis in (top, below):
                axis.legend(fontsize=7)
    caption = "Trained models: token error above the entropy, and wrong texts, against steps."
    return [(caption, path)]


def samplers(rows: list[dict], path: Path):
    """SER against the generative TER, one point for every sampler and number of steps."""
    shown = {
        name: each
        for name, each in (_variants(rows, THEORY) | _variants(rows, MDM)).items()
        if len({r["sampler"] for r in each}) > 1 and any(r["ter"] is not None for r in each)
    }
    if not shown:
        return []
    with plots.panels(path, len(shown)) as axes:
        for axis, (name, each) in zip(axes, shown.items(), strict=True):
            length = _lengths(each)[0]
            some = [r for r in each if r["length"] == length and r["ter"] is not None]
            for i, sampler in enumerate(dict.fromkeys(r["sampler"] for r in some)):
                points = sorted(
                    (r["calls"], r["ser"], r["ter"]) for r in some if r["sampler"] == sampler
                )
                _, ser, ter = np.array(points).T
                axis.plot(ter, ser, "o-", ms=4, lw=0.7, color=plots.colour(i), label=sampler)
            axis.axvline(some[0]["entropy"], color="k", ls=":", label="H(q) / L")
            axis.set(title=f"{name}, L = {length}", xlabel="-log q / L of right texts, nats")
            axis.set_ylabel("sequence error rate")
            axis.legend(fontsize=7)
    caption = (
        "Samplers: share of wrong texts against what the right ones look like. On the dotted "
        "line the law is right; left of it it has collapsed, whatever the error rate says."
    )
    return [(caption, path)]


def text(rows: list[dict], path: Path):
    """Generative perplexity and entropy of real text against steps."""
    shown = {
        name: each
        for name, each in _variants(rows, MDM).items()
        if any(r["judged"] is not None for r in each)
    }
    if not shown:
        return []
    with plots.figure(path, 2) as (left, right):
        i = 0
        for name, each in shown.items():
            for sampler in dict.fromkeys(r["sampler"] for r in each):
                length = each[0]["length"]
                steps, nats, error = _line(each, "judged", length, sampler)
                label = f"{name}, {sampler}"
                left.errorbar(
                    steps, nats, error, fmt="o-", ms=4, color=plots.colour(i), label=label
                )
                steps, entropy, _ = _line(each, "entropy_1", length, sampler)
                right.plot(steps, entropy, "o-", ms=4, color=plots.colour(i), label=label)
                i += 1
        for each in _variants(rows, AR).values():
            judged, _ = mean(each, "judged")
            if np.isfinite(judged):
                left.axhline(judged, color="k", ls=":", label=each[0]["variant"])
                right.axhline(mean(each, "entropy_1")[0], color="k", ls=":")
        left.set(xscale="log", xlabel="steps T", ylabel="judged, nats per token")
        right.set(xscale="log", xlabel="steps T", ylabel="unigram entropy, nats")
        left.legend(fontsize=7)
    return [
        ("Real text: what an autoregressive model says of samples, and their entropy.", path)
    ]


def efficiency(speed: dict, path: Path):
    """Steps at which a masked model is as slow as the autoregressive one, by batch size."""
    if not speed:
        return []
    batches = np.array(speed["batches"], float)
    with plots.figure(path) as axis:
        axis.errorbar(
            batches, speed["break_even"], speed["break_even_error"], fmt="o", label="measured"
        )
        grid = np.geomspace(batches.min(), batches.max(), 60)
        axis.plot(grid, cost_model(speed, grid), lw=1, label="cost model")
        axis.axhline(speed["length"], color="k", ls=":", label=f"L = {speed['length']}")
        axis.set(xscale="log", yscale="log", xlabel="batch", ylabel="T*, steps")
        axis.legend()
    caption = (
        "Break-even T*: with fewer steps the masked model writes faster than the "
        "autoregressive one with its cache. It falls with the batch: a speed-up at one batch "
        "is no result."
    )
    return [(caption, path)]
