"""The numbers of a report, from rows of metrics: means over seeds, and paired differences.

`Groups` are variants: name -> seed -> run. Rows of estimation runs hold sums over
coordinates, those of training runs means; everything that comes out of here is a mean over
coordinates. One standard error of a mean over seeds is called NAME_error, None for one seed.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats

from common.experiment import Run
from diffusion import curve, diagnosis, known_curves
from diffusion.dataset import dataset
from diffusion.diagnosis import Diagnosis
from diffusion.estimators import OptimalLoss
from diffusion.images import Images

Groups = dict[str, dict[int, Run]]

ESTIMATION = "diffusion.estimate"
TOTALS = tuple(f"{w}_{n}" for w in ("edm", "own") for n in ("loss", "floor", "gap"))
SAMPLED = ("frechet", "precision", "recall", "copies", "nearest", "feature_accuracy")
BANDS = 8
TOLERANCE = 3.0  # Standard errors that a check allows.


def grouped(runs: dict[str, Run]) -> tuple[Groups, Groups]:
    """Estimation runs and training runs by variant and seed, of names VARIANT-seedN."""
    found: tuple[Groups, Groups] = (defaultdict(dict), defaultdict(dict))
    for name, run in runs.items():
        variant, _, seed = name.rpartition("seed")
        kind = found[0] if run.config.experiment == ESTIMATION else found[1]
        kind[variant.rstrip("-") or "main"][int(seed)] = run
    return dict(found[0]), dict(found[1])


def evaluations(run: Run) -> list[dict]:
    """All evaluations of a run, in the order of steps."""
    return [row for row in run.rows if row["split"] == "eval"]


def last(run: Run) -> dict:
    """The last evaluation, which is the result."""
    return evaluations(run)[-1]


def curve_of(row: dict) -> OptimalLoss:
    """The curve of an evaluation of an estimation run, sums over coordinates."""
    fields = {n: row[n] for n in OptimalLoss._fields if n in row}
    return OptimalLoss(**{n: np.asarray(v, float) for n, v in fields.items()})


def diagnosis_of(row: dict) -> Diagnosis:
    """The diagnosis in an evaluation of a training run."""
    return Diagnosis(**{n: np.asarray(row[n], float) for n in Diagnosis._fields})


def pooled(losses: list[OptimalLoss]) -> OptimalLoss:
    """One curve of several: at each level the mean of those that have it, s ascending."""
    every = lambda name: np.concatenate([getattr(each, name) for each in losses])
    sigmas, which, count = np.unique(every("sigmas"), return_inverse=True, return_counts=True)
    mean = lambda name: np.bincount(which, every(name)) / count
    error = lambda name: np.sqrt(np.bincount(which, every(name) ** 2)) / count
    return OptimalLoss(
        sigmas=sigmas,
        **{n: mean(n) for n in ("value", "lower", "upper", "ess", "p_self")},
        **{n: error(n) for n in ("stderr", "lower_err", "upper_err")},
        variance=np.mean([each.variance for each in losses]),
        num_draws=np.sum([each.num_draws for each in losses]),
        dim=losses[0].dim,
        cheap_draws=np.sum([each.cheap_draws for each in losses]),
    )


def bracketed(found: OptimalLoss) -> bool:
    """Whether the estimator found bounds, rather than the value thrice."""
    return bool(np.any(found.lower != found.value) or np.any(found.upper != found.value))


def sigma_star(found: OptimalLoss, tau: float) -> tuple[float, float]:
    """The end of the levels with J* <= tau V, and by how much one error of J* moves it.

    Where levels about it are far apart, half their distance counts as an error, too. The
    second is NaN where errors of J* are, and where it is an end of the levels.
    """
    star, levels = curve.sigma_star(curve.smooth(found), tau), np.sort(found.sigmas)
    if not _inside(levels, star):
        return star, float("nan")
    if np.isnan(found.stderr).any():
        return star, float("nan")
    at = lambda shift: curve.sigma_star(
        curve.smooth(found._replace(value=found.value + shift * found.stderr)), tau
    )
    i = np.searchsorted(levels, star)
    low, high = levels[i - 1 : i + 1]
    off = (high - low) / 2 if high > known_curves.NEAR * low else 0.0
    return star, float(np.hypot(abs(at(-1) - at(1)) / 2, off))


def _inside(sigmas: np.ndarray, star: Any) -> bool:
    """Whether all of `star` are between the levels, and no end of them but for rounding."""
    low, high = sigmas.min() * (1 + 1e-6), sigmas.max() * (1 - 1e-6)
    return bool(np.all((low < star) & (star < high)))


def information(found: OptimalLoss) -> tuple[float, float]:
    """`curve.information`, with an error for levels that share their draws: errors of all
    levels add up, not in squares. It is NaN where the errors are."""
    if np.isnan(found.stderr).any():
        return curve.information(found)[0], float("nan")
    at = lambda shift: curve.information(
        found._replace(value=found.value + shift * found.stderr)
    )[0]
    return at(0), (at(1) - at(-1)) / 2


def entropy(images: Images, conditional: bool) -> float:
    """What the integral of J* s^-3 must give, in nats: of which row, told its class or not.

    ln N for N different rows without classes.
    """
    count = len(images.rows)
    labels = images.labels if conditional else np.zeros(count, np.int32)
    classes = Counter(labels.tolist())
    if not images.duplicates:
        return float(sum(n / count * np.log(n) for n in classes.values()))
    digest = lambda row: hashlib.blake2b(np.ascontiguousarray(row), digest_size=16).digest()
    rows = Counter(zip(labels.tolist(), map(digest, images.rows), strict=True))
    return float(sum(n / count * np.log(classes[c] / n) for (c, _), n in rows.items()))


def floor(seeds: dict[int, Run]) -> tuple[OptimalLoss, dict]:
    """The curve of an estimation variant, and what it says, with errors."""
    config = next(iter(seeds.values())).config
    rows = [last(run) for run in seeds.values()]
    found = pooled([curve_of(row) for row in rows])
    images = dataset(**config.data, seed=config.data_seed)
    stars = np.array([row["sigma_star"] for row in rows])
    nats = np.array([row["information"] for row in rows])
    told = entropy(images, config.data.class_cond)
    nats_error = standard_error(nats) or information(found)[1]
    star_error = sigma_star(found, config.estimator.tau)[1]
    summary = {
        "seeds": len(rows),
        "data": images.name,
        "sha256": images.sha256,
        "rows": len(images.rows),
        "duplicates": int(images.duplicates),
        "dim": int(found.dim),
        "estimator": config.estimator.name,
        "draws": int(found.num_draws),
        "cheap_draws": int(found.cheap_draws),
        "tau": float(config.estimator.tau),
        "sigma_star": float(stars.mean()),
        "sigma_star_error": standard_error(stars) or star_error,
        "sigma_star_inside": _inside(found.sigmas, stars),
        "sigma_star_low": float(stars.min()),
        "sigma_star_high": float(stars.max()),
        "variance": float(found.variance / found.dim),
        "information": float(nats.mean()),
        "information_error": nats_error,
        "entropy": told,
        "information_ratio": float(nats.mean() / told) if told else None,
    }
    plain_rows = not config.data.class_cond and not config.data.flip
    other = known_curves.known(images) if plain_rows else None
    beside = known_curves.compared(found, other) if other else []
    if other and beside:
        summary["known"] = beside
        summary["known_source"] = other.source
    return found, summary


def summarize(seeds: dict[int, Run]) -> dict:
    """What the last evaluations of a training variant say.

    Returns:
      means with `_error` of the weighted totals and of what samples gave; edm_gap_draws, the
      error of edm_gap from draws; gap_worst, the least gap of any level and seed in standard
      errors; agreement, the largest difference of the two estimates of the gap in standard
      errors; bands, {sigma, low, high, gap, error, draws} with the error over seeds and that
      of draws.
    """
    rows = [last(run) for run in seeds.values()]
    found: dict = {"seeds": len(rows), "images": int(rows[0].get("images", 0))}
    for name in (*TOTALS, *SAMPLED, "samples", "params", "flops"):
        if all(name in row for row in rows):
            values = np.array([row[name] for row in rows], float)
            found[name] = float(values.mean())
            found[f"{name}_error"] = standard_error(values)
    draws = np.array([row["edm_gap_err"] for row in rows])
    found["edm_gap_draws"] = float(np.sqrt(np.sum(draws**2)) / len(rows))
    found["gap_worst"] = float(min(row["gap_worst"] for row in rows))
    found["gap_nonnegative"] = found["gap_worst"] >= -TOLERANCE
    found["agreement"] = max(agreement(diagnosis_of(row)) for row in rows)
    parts = [bands(row) for row in rows]
    gaps, errors = (np.array([p[i] for p in parts]) for i in (1, 2))
    edges = parts[0][0]
    found["bands"] = [
        {
            "sigma": float(np.sqrt(edges[b] * edges[b + 1])),
            "low": float(edges[b]),
            "high": float(edges[b + 1]),
            "gap": float(gaps[:, b].mean()),
            "error": standard_error(gaps[:, b]),
            "draws": float(np.sqrt(np.sum(errors[:, b] ** 2)) / len(rows)),
        }
        for b in range(gaps.shape[1])
    ]
    return found


def agreement(found: Diagnosis) -> float:
    """The largest |gap - distance| in standard errors of both."""
    # Where all draws agree, rounding to float32 remains.
    error = np.hypot(found.gap_err, found.distance_err) + 1e-6 * found.loss + 1e-30
    return float(np.max(np.abs(found.gap - found.distance) / error))


def bands(row: dict, field: str = "gap") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges [n + 1], mean of a field over each band and its error [n], for equal bands of
    log s; n is 8, or the number of levels where that is less."""
    found = diagnosis_of(row)
    values = dict(gap=getattr(found, field), gap_err=getattr(found, f"{field}_err"))
    count = min(BANDS, len(found.sigmas))
    _, mean, error = diagnosis.bands(found._replace(**values), count)
    return np.geomspace(found.sigmas[0], found.sigmas[-1], count + 1), mean, error


def paired(ours: dict[int, Run], base: dict[int, Run], value: Callable[[Run], Any]) -> dict:
    """Differences by seed with 95 % intervals by Student's t; None where seeds are too few.

    Args:
      ours, base: seed -> run.
      value: of a run, a number or an array [n]; the results have its shape, as lists.
    """
    shared = sorted(set(ours) & set(base))
    gaps = np.array([np.asarray(value(ours[s])) - np.asarray(value(base[s])) for s in shared])
    nothing = dict(error=None, low=None, high=None, p=None)
    found = {"seeds": len(shared), "difference": gaps.mean(0).tolist() if shared else None}
    if len(shared) < 2:
        return found | nothing
    error = gaps.std(0, ddof=1) / np.sqrt(len(shared))
    reach = stats.t.ppf(0.975, len(shared) - 1) * error
    ratio = np.divide(gaps.mean(0), error, out=np.zeros_like(error * 1.0), where=error > 0)
    p = np.where(error > 0, 2 * stats.t.sf(np.abs(ratio), len(shared) - 1), np.nan)
    return found | {
        "error": error.tolist(),
        "low": (gaps.mean(0) - reach).tolist(),
        "high": (gaps.mean(0) + reach).tolist(),
        "p": p.tolist(),
    }


def comparisons(groups: Groups) -> list[dict]:
    """Every variant against "edm", or the first: edm_gap, frechet and the gap per band."""
    base = "edm" if "edm" in groups else next(iter(groups))
    found = []
    for name in groups:
        if name == base:
            continue
        ours, theirs = groups[name], groups[base]
        one = {"what": name, "base": base}
        one["edm_gap"] = paired(ours, theirs, lambda run: last(run)["edm_gap"])
        both = [last(run) for run in (*ours.values(), *theirs.values())]
        if all("frechet" in row for row in both):
            one["frechet"] = paired(ours, theirs, lambda run: last(run)["frechet"])
        if all(row["sigmas"] == both[0]["sigmas"] for row in both):
            one["bands"] = paired(ours, theirs, lambda run: bands(last(run))[1])
            one["edges"] = bands(both[0])[0].tolist()
            gaps = [bands(last(run))[1] for run in theirs.values()]
            one["base_gap"] = np.mean(gaps, 0).tolist()
        found.append(one)
    return found


def where_better(d: dict) -> str:
    """Ranges of s in which the gap is smaller, larger or undecided, of one of `comparisons`.

    With one seed there are no intervals, and the sign alone is told.
    """
    found, edges = d["bands"], d["edges"]
    if found["difference"] is None:
        return f"no seed in common with {d['base']}."
    alone = found["low"] is None
    low, high = (found["difference"],) * 2 if alone else (found["low"], found["high"])
    signs = [-1 if h < 0 else 1 if l > 0 else 0 for l, h in zip(low, high, strict=True)]
    parts = []
    for sign, word in ((-1, "smaller"), (1, "larger"), (0, "undecided")):
        ranges, start = [], None
        for b, each in enumerate([*signs, None]):
            if each == sign and start is None:
                start = b
            if each != sign and start is not None:
                ranges.append(f"{edges[start]:.2g} to {edges[b]:.2g}")
                start = None
        if ranges:
            parts.append(f"{word} at s {', '.join(ranges)}")
    return f"gap {'; '.join(parts)}" + (" (one seed, no intervals)." if alone else ".")


def correlation(
    groups: Groups,
) -> tuple[Float[np.ndarray, " s"], Float[np.ndarray, "2 s"]] | None:
    """Levels, and Pearson's and Spearman's correlation over runs of the gap with frechet.

    None for fewer than 5 runs with samples at the same levels. NaN where a gap is constant.
    """
    rows = [last(run) for seeds in groups.values() for run in seeds.values()]
    rows = [row for row in rows if "frechet" in row]
    if len(rows) < 5 or any(row["sigmas"] != rows[0]["sigmas"] for row in rows):
        return None
    gaps, distance = np.array([r["gap"] for r in rows]), np.array([r["frechet"] for r in rows])
    ranks = stats.rankdata(gaps, axis=0), stats.rankdata(distance)
    return np.array(rows[0]["sigmas"]), np.array([_pearson(gaps, distance), _pearson(*ranks)])


def standard_error(values: np.ndarray) -> float | None:
    """Of the mean; None of a single value."""
    n = len(values)
    return float(np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else None


def digits(value: float | None, error: float | None = None) -> str:
    """`0.0120(12)`, `5.6(2.9)e-05` below a thousandth, a dash for no number."""
    if value is None or not np.isfinite(value):
        return "–"
    error = float(error) if error is not None and np.isfinite(error) else 0.0
    size = max(abs(value), error)
    if 0 < size < 1e-3:
        power = int(np.floor(np.log10(size)))
        return f"{digits(value / 10.0**power, error / 10.0**power)}e{power:+03d}"
    if error <= 1e-9 * size:
        return f"{value:.4g}"
    places = 1 - int(np.floor(np.log10(error)))
    if places < 0:
        return f"{value:.0f}({error:.0f})"
    last_digits = f"{error * 10**places:.0f}" if error < 1 else f"{error:.{places}f}"
    return f"{value:.{places}f}({last_digits})"


def plain(tree: Any) -> Any:
    """For JSON: numbers of Python's, None in place of what is not finite."""
    if isinstance(tree, dict):
        return {str(k): plain(v) for k, v in tree.items()}
    if isinstance(tree, np.ndarray | list | tuple):
        return [plain(v) for v in tree]
    if isinstance(tree, np.generic):
        tree = tree.item()
    return None if isinstance(tree, float) and not np.isfinite(tree) else tree


def _pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = x - x.mean(0), y - y.mean()
    size = np.sqrt(np.sum(x**2, 0) * np.sum(y**2))
    return np.divide(y @ x, size, out=np.full(len(size), np.nan), where=size > 0)
