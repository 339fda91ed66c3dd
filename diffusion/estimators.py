"""The optimal loss of a data set: estimators and their errors.

    J*(s) = E |x_0 - E[x_0 | x]|^2 = E tr Cov[x_0 | x],   x = x_0 + s eps

over rows x_0 of the data set (Xu et al., arXiv:2506.13763, theorem 1). It is what the best of
all denoisers would still lose on exactly these rows. Outer means are over draws; inner sums
over rows are

    exact      all rows, streamed                                          unbiased
    dol        the source and L - 1 others                                 too low
    cdol       the same, the source's weight over C                        paper's Eq. 11
    snis       L rows, whatever the source                                 too high
    knn        the source, its K neighbours, and others for the rest       a little low
    corrected  cdol or knn on many draws, mended by exact sums on a few    unbiased

"corrected" is a control variate: mean(exact) over few draws plus beta times (mean over many
minus mean over the few) of the cheap one. What the cheap one lacks, bias included, is gone
from the value and stands in its error bar.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from common.errors import UserError, reject
from diffusion import draws
from diffusion.preconditioning import check_sigmas
from diffusion.rows import Rows, rows
from diffusion.stratification import nearest_neighbours

ESTIMATORS = ("exact", "dol", "cdol", "snis", "knn", "corrected")
FORMS = ("trcov", "residual", "paired", "unpaired")
RULES = ("paper", "tapered", "ht")
BATCHES = 16  # Subsets at least, so that their spread can be told.


class OptimalLoss(NamedTuple):
    """A curve J*(s), sums over coordinates; float64 [S] unless said otherwise.

    Attributes:
      sigmas: noise levels s, as given.
      value: the estimate.
      stderr: its standard error; NaN where there is one draw. Biases are not in it.
      lower, upper: bracket, of the estimators with subsets; the value itself otherwise.
      lower_err, upper_err: standard errors of these.
      ess: mean number of rows that share a posterior.
      p_self: mean weight of the source.
      variance: [], total variance V of the data, the limit of large s.
      num_draws: [], of the outer mean.
      dim: [], coordinates D of a row; value / dim is per coordinate.
    """

    sigmas: np.ndarray
    value: np.ndarray
    stderr: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    lower_err: np.ndarray
    upper_err: np.ndarray
    ess: np.ndarray
    p_self: np.ndarray
    variance: np.ndarray
    num_draws: np.ndarray
    dim: np.ndarray


def estimate_optimal_loss(
    data: Any,
    sigmas: Any,
    key: jax.Array,
    *,
    num_draws: int,
    estimator: str = "exact",
    form: str = "trcov",
    subset_size: int = 0,
    c_rule: str | float = "tapered",
    neighbours: int = 0,
    exact_draws: int = 0,
    labels: Any = None,
    scale: float | None = None,
    offset: float = 0.0,
    antithetic: bool = False,
    mesh: jax.sharding.Mesh | None = None,
    precision: str = "",
    tile: int = 4096,
    block: int = 256,
    progress: bool = False,
) -> OptimalLoss:
    """J* of a data set at noise levels that share all draws.

    Args:
      data: [N, ...] numbers, as `rows.rows` takes them.
      sigmas: noise levels s.
      key: of all noise, orders and subsets.
      num_draws: of the outer mean; whole permutations of the rows.
      estimator: one of `ESTIMATORS`.
      form: trcov (least spread), residual, paired or unpaired (the paper's A - B).
      subset_size: L, of all but exact; 0: 2048 or N.
      c_rule: of cdol and corrected: "paper", "tapered", "ht" or C itself.
      neighbours: K of knn; of corrected, 0 means cdol and K > 0 knn. 0 with knn: L / 2.
      exact_draws: of corrected; 0: an eighth of num_draws.
      labels: [N]; given, every class is a data set of its own and the result is their mean.
      scale, offset: of whole numbers.
      antithetic: pairs of draws with noise of either sign.
      mesh: rows are split over its axis "data".
      precision: of products; "": highest on a CPU, high elsewhere.
      tile, block: rows and draws that are in work at a time.
      progress: shows a bar.

    Raises:
      UserError: one of these cannot be; the sentence names it.
    """
    sigmas = check_sigmas(sigmas)
    if num_draws < 1:
        raise reject("estimator.num_draws", num_draws, "a whole number from 1 up")
    seed = int(jax.random.bits(jax.random.fold_in(key, 0)))
    options = dict(
        estimator=estimator,
        form=form,
        subset_size=subset_size,
        c_rule=c_rule,
        neighbours=neighbours,
        exact_draws=exact_draws,
        antithetic=antithetic,
        precision=precision or default_precision(),
        block=block,
        progress=progress,
    )
    with jax.set_mesh(mesh or jax.sharding.get_mesh()):
        place = dict(tile=tile, scale=scale, offset=offset, mesh=mesh)
        if labels is None:
            found = rows(data, **place)
            return of_rows(found, sigmas, key, seed, num_draws=num_draws, **options)
        return _by_class(data, labels, sigmas, key, seed, place, num_draws, options)


def default_precision() -> str:
    """TF32 or one bfloat16 pass would do above sigma_star only."""
    return "highest" if jax.default_backend() == "cpu" else "high"


def _by_class(data, labels, sigmas, key, seed, place, num_draws, options):
    whole = rows(data, labels=labels, **place)  # Refuses what cannot be.
    variance = float(jnp.sum(whole.square)) / int(whole.count)
    del whole
    data, labels = np.asarray(data), np.asarray(labels)
    classes, counts = np.unique(labels, return_counts=True)
    place["tile"] = min(place["tile"], int(counts.max()))
    tiles = -(-int(counts.max()) // place["tile"])
    parts = []
    for c, n in zip(classes, counts, strict=True):
        found = rows(data[labels == c], tiles=tiles, **place)
        share = max(2, round(num_draws * n / len(data)))
        own = jax.random.fold_in(key, int(c) + 1)
        parts.append(of_rows(found, sigmas, own, seed + int(c), num_draws=share, **options))
    weight = (counts / counts.sum())[:, None]
    each = lambda name: np.stack([getattr(p, name) for p in parts])
    mean = lambda name: np.sum(weight * each(name), 0)
    error = lambda name: np.sqrt(np.sum((weight * each(name)) ** 2, 0))
    return parts[0]._replace(
        **{n: mean(n) for n in ("value", "lower", "upper", "ess", "p_self")},
        **{n: error(n) for n in ("stderr", "lower_err", "upper_err")},
        variance=np.array(variance),
        num_draws=np.sum(each("num_draws")),
    )


def of_rows(
    data: Rows,
    sigmas: np.ndarray,
    key: jax.Array,
    seed: int,
    *,
    num_draws: int,
    estimator: str,
    form: str,
    subset_size: int,
    c_rule: str | float,
    neighbours: int,
    exact_draws: int,
    antithetic: bool,
    precision: str,
    block: int,
    progress: bool,
    first: int = 0,
) -> OptimalLoss:
    """`estimate_optimal_loss` of rows that are placed.

    Args:
      seed: of orders and subsets.
      first: number of the first block; calls with other blocks are independent.
    """
    count = int(data.count)
    if estimator not in ESTIMATORS:
        raise reject("estimator.name", estimator, f"one of {', '.join(ESTIMATORS)}")
    if form not in FORMS:
        raise reject("estimator.form", form, f"one of {', '.join(FORMS)}")
    rule, constant = _rule(estimator, c_rule, neighbours)
    size = subset_size or min(2048, count)
    k = neighbours or (size // 2 - 1 if rule == "knn" else 0)
    if estimator != "exact":
        _check_subset(size, k, count)
    block = _block(estimator, block, num_draws, antithetic, data.tiles.shape[-1], k)
    levels = jnp.asarray(sigmas, data.square.dtype)
    near = nearest_neighbours(data, k, precision) if rule == "knn" else None

    def exact(part):
        return [draws.exact(data, part, key, levels, precision)]

    def cheap(part):
        return list(draws.by_subset(data, part, key, levels, rule, constant, near, precision))

    make = lambda step, subset: draws.block(
        step, block, count, seed, subset=subset, antithetic=antithetic
    )
    bar = lambda steps: tqdm(steps, desc="optimal loss", disable=None if progress else True)
    steps = -(-num_draws // block)
    square = _mean_square(data)
    fold = 2 if antithetic else 1

    def run(functions: Callable, chosen, cut):
        found = []
        for step in bar(chosen):
            made = functions(make(first + step, size if estimator != "exact" else 0))
            found.append(jax.tree.map(lambda a: np.asarray(a, np.float64), made))
        return jax.tree.map(lambda *a: np.concatenate(a, -1)[:, :cut], *found)

    shared = dict(square=square, form=form, sigmas=sigmas, data=data)
    if estimator == "exact":
        (all_rows,) = run(exact, range(steps), num_draws)
        value = _mean(_values(all_rows, form, square), fold)
        return _curve(all_rows, value, value, value, **shared)
    if estimator != "corrected":
        found, lower, upper = run(cheap, range(steps), num_draws)
        low = _mean(lower.trcov, block)
        up = _mean(upper.residual, block)
        middle = {"dol": lower, "snis": upper}.get(estimator, found)
        return _curve(middle, _mean(_values(middle, form, square), block), low, up, **shared)

    few = max(1, -(-(exact_draws or num_draws // 8) // block))
    many = run(cheap, range(few, few + steps), num_draws)
    some = run(lambda part: exact(part) + cheap(part), range(few), few * block)
    truth, base = (_values(some[i], form, square) for i in (0, 1))
    value = _controlled(truth, base, _values(many[0], form, square), block)
    low, up = _mean(many[1].trcov, block), _mean(many[2].residual, block)
    return _curve(some[0], value, low, up, **shared)


def _rule(estimator, c_rule, neighbours):
    if estimator == "knn" or (estimator == "corrected" and neighbours):
        return "knn", 1.0
    if estimator == "snis":
        return "snis", 1.0
    if isinstance(c_rule, str) and c_rule in RULES:
        return c_rule, 1.0
    if isinstance(c_rule, int | float) and c_rule > 0:
        return ("snis", 1.0) if np.isinf(c_rule) else ("constant", float(c_rule))
    raise reject("estimator.c_rule", c_rule, f"one of {', '.join(RULES)}, or C above 0")


def _check_subset(size, k, count):
    if not 2 <= size <= count:
        raise reject("estimator.subset_size", size, f"from 2 to the {count} rows there are")
    if k and not 1 <= k < size - 1:
        raise reject("estimator.neighbours", k, f"from 1 to {size - 2}, below L - 1")
    if k and k >= count - 1:
        raise reject("estimator.neighbours", k, f"below {count - 1}")


def _block(estimator, block, num_draws, antithetic, dim, k):
    if block < 1:
        raise reject("estimator.block", block, "a whole number from 1 up")
    if estimator != "exact":
        block = min(block, max(2, num_draws // BATCHES))
    if k:  # Every draw gathers rows of its own.
        block = min(block, max(2, 2**26 // (k * dim)))
    devices = draws.meshes.current()
    fold = devices * 2 if antithetic else devices
    return max(block - block % fold, fold)


def _mean_square(data: Rows) -> float:
    """A = E |x_0|^2 of uncentred rows."""
    square = np.asarray(data.square, np.float64).sum() / int(data.count)
    return float(square + (np.asarray(data.mean, np.float64) ** 2).sum())


def _values(found, form, square):
    if form == "unpaired":
        return square - found.mean_square
    return getattr(found, form)


def _mean(values, group):
    """Mean and standard error over the last axis, by means of groups that belong together."""
    mean = values.mean(-1)
    n = values.shape[-1] // group
    if n < 2:
        return mean, np.full(mean.shape, np.nan)
    parts = values[..., : n * group].reshape(*values.shape[:-1], n, group).mean(-1)
    return mean, parts.std(-1, ddof=1) / np.sqrt(n)


def _controlled(truth, base, many, group):
    """The control variate's value and standard error."""
    by = lambda v: v[..., : v.shape[-1] // group * group].reshape(*v.shape[:-1], -1, group)
    truth, base, many = (by(v).mean(-1) for v in (truth, base, many))
    n, m = truth.shape[-1], many.shape[-1]
    if n < 2 or m < 2:
        raise UserError(
            f"config.estimator.exact_draws and num_draws give {n} and {m} blocks of {group} "
            "draws, but the correction needs at least 2 of each."
        )
    about = lambda v: v - v.mean(-1, keepdims=True)
    covariance = np.sum(about(truth) * about(base), -1)
    spread = np.sum(about(base) ** 2, -1)
    # Of independent means over n and m groups; no correlation, no correction.
    beta = np.divide(covariance, spread, out=np.zeros_like(spread), where=spread > 0)
    beta = np.clip(beta, 0, None) * m / (n + m)
    value = truth.mean(-1) + beta * (many.mean(-1) - base.mean(-1))
    rest = truth - beta[:, None] * base
    error = rest.var(-1, ddof=1) / n + beta**2 * many.var(-1, ddof=1) / m
    return value, np.sqrt(error)


def _curve(found, value, low, up, *, square, form, sigmas, data):
    del square, form
    variance = np.asarray(data.square, np.float64).sum() / int(data.count)
    return OptimalLoss(
        sigmas=np.asarray(sigmas, np.float64),
        value=value[0],
        stderr=value[1],
        lower=low[0],
        upper=up[0],
        lower_err=low[1],
        upper_err=up[1],
        ess=found.ess.mean(-1),
        p_self=found.p_self.mean(-1),
        variance=np.array(variance),
        num_draws=np.array(found.ess.shape[-1]),
        dim=np.array(data.tiles.shape[-1]),
    )
