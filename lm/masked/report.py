"""What a comparison of masked diffusion and autoregressive writing comes to: tables, text."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common.experiment import Report, Run
from lm.languages import theory
from lm.masked import animation, autoregressive, figures, known, rows, speed
from lm.masked.parts import judged_params, parts_of
from lm.masked.rows import AR, MDM, THEORY, kind, last, mean

NOTES = (
    "Nats per predicted token; ± is one standard error, over seeds where there are several, "
    "else over texts. *Bound* is NELBO_T / L, which E[-log p(x)] / L of the sampler cannot "
    "exceed; *written* is -log q(x) / L of the texts that were written, over those that the "
    "language has at all: it can be below the entropy where a sampler has collapsed, which the "
    "entropies of n-grams beside it show. SER is the share of texts outside of the language, "
    "by an exact test. Calls are those a text needed; a batch makes as many as its slowest."
)


def report(runs: dict[str, Run], folder: Path) -> Report:
    """Errors against steps, of the exact denoiser and of trained models."""
    found = rows.rows_of(runs)
    judge = judged(runs, found)
    fast = speeds(runs)
    drawn = figures.all_figures(runs, found, fast, folder)
    drawn += written(runs, folder)
    rows.write(found, folder / "results.csv")
    groups = {name: summarize(runs, each) for name, each in by_variant(found).items()}
    result = headline(groups)
    sections = [
        "# Masked diffusion of text",
        result,
        *_theory(runs, found),
        *_exact(runs),
        *_learned(runs, found),
        *_text(found, judge),
        *(["## Speed", speed.table(fast)] if fast else []),
        "## This machine",
        _machine(runs),
        "## Figures",
        *[f"{caption}\n\n![{caption}](figures/{name})" for caption, name in drawn],
        NOTES,
    ]
    summary = {
        "groups": groups,
        "speed": fast,
        "timing": {name: run.timing for name, run in runs.items()},
    }
    return Report("\n\n".join(sections), summary, result)


def by_variant(found: list[dict]) -> dict[str, list[dict]]:
    """Rows of each variant, all seeds together."""
    grouped: dict[str, list[dict]] = {}
    for row in found:
        grouped.setdefault(row["variant"], []).append(row)
    return grouped


def points(each: list[dict]) -> list[tuple[tuple[str, int, int], list[dict]]]:
    """Rows of all seeds by (sampler, length, steps)."""
    grouped: dict[tuple, list[dict]] = {}
    for row in each:
        grouped.setdefault((row["sampler"], row["length"], row["steps"]), []).append(row)
    return list(grouped.items())


def summarize(runs: dict[str, Run], each: list[dict]) -> dict:
    """What a program reads of one variant."""
    first = runs[each[0]["run"]]
    out: dict[str, Any] = {"kind": each[0]["kind"], "language": each[0]["language"]}
    same = [last(runs[name]) for name in dict.fromkeys(r["run"] for r in each)]
    for field in ("nats", "gap", "entropy"):
        values = [f[field] for f in same if field in f]
        if values:
            out[field] = float(np.mean(values))
            own = [f.get(f"{field}_error", 0.0) for f in same if field in f]
            within = np.sqrt(np.sum(np.square(own))) / len(own)
            between = np.std(values, ddof=1) / np.sqrt(len(own)) if len(own) > 1 else 0.0
            # Both, as in `rows.mean`: the runs judge by the same texts.
            out[f"{field}_error"] = float(np.hypot(within, between))
    out["points"] = [
        {"sampler": sampler, "length": length, "steps": steps}
        | {
            field: value
            for name in ("gap", "ter_bound", "ter", "ser", "calls", "judged", "entropy_1")
            for field, value in zip((name, f"{name}_error"), mean(group, name), strict=True)
            if value is not None and np.isfinite(value)
        }
        for (sampler, length, steps), group in points(each)
    ]
    out["seeds"] = len(same)
    out["steps"] = first.config.steps
    return out


def headline(groups: dict[str, dict]) -> str:
    """One line: the two sides of the paper, in the figures of these runs."""
    said = []
    for name, group in groups.items():
        points = [p for p in group["points"] if p["sampler"] == "ancestral"]
        if group["kind"] == THEORY and points:
            longest = max(p["length"] for p in points)
            some = [p for p in points if p["length"] == longest]
            middle = min(some, key=lambda p: abs(p["steps"] - longest / 2))
            if middle.get("ser"):
                said.append(
                    f"{name}: SER {middle['ser']:.3f} at T = {middle['steps']}, L = {longest}"
                )
            elif "gap" in middle:
                said.append(
                    f"{name}: {middle['gap']:.4f} nats above the entropy at "
                    f"T = {middle['steps']}, L = {longest}"
                )
        elif "gap" in group:
            said.append(f"{name}: learning gap {group['gap']:.4f} nats")
        elif "nats" in group:
            said.append(f"{name}: {group['nats']:.3f} nats")
    return "; ".join(said[:5]) + "."


def judged(runs: dict[str, Run], found: list[dict]) -> str:
    """Scores the texts of corpora with an autoregressive run of the same text; its name, or "".

    The rows get `judged` and its error: nats per token that the judge gives the texts.
    """
    names = set()
    for run in runs.values():
        judge = next((r for r in runs.values() if _judges(r.config, run.config)), None)
        texts = {k: v for k, v in last(run).items() if k.startswith("texts_")}
        if judge is None or not texts:
            continue
        names.add(judge.name)
        parts, params = parts_of(judge.config), judged_params(judge.state())

        @jax.jit
        def score(params, x, parts=parts):
            each = autoregressive.token_losses(parts.model, params, x, parts.mask)
            return jnp.mean(each, axis=1)

        size = judge.config.eval.batch_size
        for name, drawn in texts.items():
            sampler = name.removeprefix("texts_")
            mine = [r for r in found if r["run"] == run.name and r["sampler"] == sampler]
            for row, x in zip(mine, np.asarray(drawn, np.int32), strict=True):
                nats = np.concatenate(
                    [
                        score(params, jnp.asarray(x[i : i + size]))
                        for i in range(0, len(x), size)
                    ]
                ).astype(float)
                row["judged"] = float(nats.mean())
                row["judged_error"] = float(nats.std(ddof=1) / np.sqrt(len(nats)))
    return ", ".join(sorted(names))


def _judges(judge, config) -> bool:
    """Whether an autoregressive run knows the texts of another one."""
    text = lambda c: kind(c) != THEORY and not (c.language.kind or c.language.path)
    if not (text(judge) and text(config) and kind(judge) == AR):
        return False
    same = ("path", "valid", "tokenizer", "pack")
    fits = judge.length >= config.length and judge.vocab == config.vocab
    return fits and all(judge.data[name] == config.data[name] for name in same)


def speeds(runs: dict[str, Run]) -> dict:
    """Times of the first masked run whose config asks for them."""
    for run in runs.values():
        if kind(run.config) == MDM and run.config.speed.batches:
            params, parts = judged_params(run.state()), parts_of(run.config)
            return speed.measured(run.config, parts, params, tuple(run.config.eval.samplers))
    return {}


def written(runs: dict[str, Run], folder: Path) -> list[tuple[str, str]]:
    """How a text was written, as pictures, for the first masked run of a corpus."""
    for run in runs.values():
        language = run.config.language
        wanted = kind(run.config) == MDM and run.config.sample.animate
        if wanted and not (language.kind or language.path):
            parts = parts_of(run.config)
            params = judged_params(run.state())
            result = animation.text(run.config, parts, params)
            return animation.draw(run.config, parts, result, folder)
    return []


def _number(value: float | None, error: float | None = None, digits: int = 4) -> str:
    if value is None or not np.isfinite(value):
        return "–"
    tail = f" ± {error:.{digits}f}" if error is not None and np.isfinite(error) else ""
    return f"{value:.{digits}f}{tail}"


def _table(head: list[str], lines: list[list[str]]) -> str:
    line = lambda cells: f"| {' | '.join(cells)} |"
    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, lines)])


def _theory(runs: dict[str, Run], found: list[dict]) -> list[str]:
    made = []
    for name, each in by_variant([r for r in found if r["kind"] == THEORY]).items():
        config, lines = runs[each[0]["run"]].config, []
        full = known.full_support(config)
        bounded = {r["length"] for r in each if r["gap"] is not None}
        drops = {n: np.subtract(*known.ends(config, n)) for n in bounded}
        for (sampler, length, steps), group in points(each):
            ser, error = mean(group, "ser")
            closed = known.sequence_error(config, length, np.array([steps]))
            closed = None if closed is None or sampler != "ancestral" else float(closed[0])
            gap = mean(group, "gap")
            ancestral = sampler == "ancestral" and gap[1] is not None
            bound = known.gap_bound(config, drops[length], steps) if ancestral else None
            curve = known.token_gap(config, length, np.array([steps])) if ancestral else None
            ter, ter_error = mean(group, "ter")
            entropy, entropy_error = mean(group, "entropy")
            ter_error = None if ter_error is None else np.hypot(ter_error, entropy_error)
            formula = known.calls(config, length, steps) if sampler == "ancestral" else None
            rate = -np.log(1 - ser) * steps / length if 0 < ser < 1 else None
            lines.append([
                sampler, str(length), str(steps),
                _number(*gap), _number(None if curve is None else float(curve[0])),
                _number(bound),
                _number(ter - entropy, ter_error), _ser(full, ser, error), _number(closed),
                _number(rows.ser_bound(group)), _number(rate, digits=3),
                _number(mean(group, "calls")[0], digits=2), _number(formula, digits=2),
            ])  # fmt: skip
        head = [
            "sampler", "L", "T", "bound - H/L", "exact curve", "(h(0) - h(1)) max w",
            "written - H/L", "SER", "SER, closed form", "SER at most", "-log(1 - SER) T / L",
            "calls", "calls, formula",
        ]  # fmt: skip
        texts = config.steps * config.batch_size
        said = f"{each[0]['language']}, {texts:,} texts for each row"
        curve = f", {texts * config.theory.draws:,} for the curve." if bounded else "."
        said += curve
        if full:
            said += f" {known.WHY_NO_SER}"
        made += [f"## Exact denoiser: {name}", said, _table(head, lines)]
    return made


def _ser(full: bool, value: float, error: float | None) -> str:
    """SER, or that it says nothing where every text is in the language."""
    return "not informative" if full else _number(value, error)


def _exact(runs: dict[str, Run]) -> list[str]:
    lines = []
    for run in runs.values():
        found = last(run)
        if kind(run.config) != THEORY or "exact_steps" not in found:
            continue
        for i, n in enumerate(np.atleast_1d(found["exact_steps"]).tolist()):
            lines.append([
                run.name, str(found["exact_length"]), str(n),
                *(f"{np.atleast_1d(found[f'exact_{f}'])[i]:.9f}" for f in ("ser", "kl", "ter")),
            ])  # fmt: skip
    head = ["run", "L", "T", "SER", "KL(q, p), nats", "log TER, nats"]
    said = "All texts enumerated, ancestral sampling; `--do=law` writes the laws themselves."
    return ["## Exact laws of tiny texts", said, _table(head, lines)] if lines else []


def _learned(runs: dict[str, Run], found: list[dict]) -> list[str]:
    some = [r for r in found if r["kind"] in (MDM, AR) and r["entropy"] is not None]
    some += [r for r in found if r["kind"] == AR and r["ser"] is not None]
    if not some:
        return []
    ends, lines = [], []
    for name, each in by_variant(some).items():
        group, run = summarize(runs, each), runs[each[0]["run"]]
        full = known.full_support(run.config)
        predicted = each[0]["length"] - run.config.objective.prompt
        seq = theory.ser_bound(predicted, group["gap"])
        leak = group["gap_error"] is not None and group["gap"] < -3 * group["gap_error"]
        ends.append([
            name, each[0]["language"], str(each[0]["length"]),
            _number(group["nats"], group.get("nats_error")),
            _number(group["gap"], group["gap_error"]) + (" **LEAK**" if leak else ""),
            _number(seq),
        ])  # fmt: skip
        for (sampler, length, steps), rows_ in points(each):
            exact = None
            if sampler == "ancestral" and "exact" in last(run):
                exact = known.exact_gap(run.config, last(run), np.array([steps]))[0]
                exact += group["gap"]
            lines.append([
                name, sampler, str(length), str(steps), _number(*mean(rows_, "gap")),
                _number(exact), _number(*mean(rows_, "ter")),
                _ser(full, *mean(rows_, "ser")),
                _number(rows.ser_bound(rows_, run.config.objective.prompt)),
                _number(mean(rows_, "entropy_2")[0], digits=3),
                _number(mean(rows_, "calls")[0], digits=1),
            ])  # fmt: skip
    head = ["run", "language", "L", "nats", "gap", "1 - exp(-L gap)"]
    each = [
        "run", "sampler", "L", "T", "bound - H/L", "exact + learning gap", "written", "SER",
        "SER at most", "2-gram entropy", "calls",
    ]  # fmt: skip
    said = (
        "*Gap* is above the entropy; one position at a time, SER is at most the last column. A "
        "gap below zero by more than three errors is marked: the model has seen its targets."
    )
    return ["## Trained models", said, _table(head, ends), _table(each, lines)]


def _text(found: list[dict], judge: str) -> list[str]:
    some = [r for r in found if r["language"] == "text"]
    if not some:
        return []
    lines = []
    for name, each in by_variant(some).items():
        for (sampler, length, steps), group in points(each):
            nats, nats_error = mean(group, "nats")
            judged_, error = mean(group, "judged")
            lines.append([
                name, sampler, str(length), str(steps), _number(nats, nats_error),
                _number(nats / np.log(2)), _number(np.exp(nats), digits=2),
                _number(mean(group, "ter_bound")[0]), _number(judged_, error),
                _number(np.exp(judged_), digits=2),
                *(_number(mean(group, f"entropy_{n}")[0], digits=3) for n in (1, 2, 3)),
                _number(mean(group, "calls")[0], digits=1),
            ])  # fmt: skip
    head = [
        "run", "sampler", "L", "T", "held out, nats", "bits", "perplexity", "NELBO_T / L",
        "judged, nats", "generative perplexity", "H1", "H2", "H3", "calls",
    ]  # fmt: skip
    said = (
        f"Judged by {judge}, the autoregressive model of this folder. " if judge else ""
    ) + "H1 to H3 are the entropies of n-grams of the samples, nats."
    return ["## Real text", said, _table(head, lines)]


def _machine(runs: dict[str, Run]) -> str:
    head = ["run", "steps per second", "seconds", "devices"]
    lines = [
        [
            name,
            f"{t.get('steps_per_second') or float('nan'):.3g}",
            f"{t.get('seconds_in_all') or float('nan'):.0f}",
            str(t.get("devices", "")),
        ]
        for name, t in ((name, run.timing) for name, run in runs.items())
    ]
    return _table(head, lines)
