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

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from common.errors import reject
from diffusion import draws
from diffusion.plans import Plan, block_of, measured, plan_of
from diffusion.preconditioning import check_sigmas
from diffusion.rows import Rows, rows
from diffusion.stratification import nearest_neighbours
from diffusion.streaming import exact_from_host, on_host


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
    chunk: int = 0,
    progress: bool = False,
) -> OptimalLoss:
    """J* of a data set at noise levels that share all draws.

    Args:
      data: [N, ...] numbers, as `rows.rows` takes them.
      sigmas: noise levels s.
      key: of all noise, orders and subsets.
      num_draws: at least, of the outer mean; whole blocks, permutations of the rows.
      estimator: one of `plans.ESTIMATORS`.
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
      chunk: rows that come to the devices at a time, where the data stay on the host or on its
        disk; 0: all at once. For exact sums without labels.
      progress: shows a bar.

    Raises:
      UserError: one of these cannot be; the sentence names it.
    """
    sigmas = check_sigmas(sigmas)
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
        if chunk:
            if estimator != "exact" or labels is not None:
                raise reject("estimator.chunk", chunk, "0, but for exact sums without labels")
            held = on_host(data, scale=scale, offset=offset)
            return _from_host(held, sigmas, key, seed, num_draws, chunk, tile, options)
        place = dict(tile=tile, scale=scale, offset=offset, mesh=mesh)
        if labels is None:
            found = rows(data, **place)
            return of_rows(found, sigmas, key, seed, num_draws=num_draws, **options)
        return _by_class(data, labels, sigmas, key, seed, place, num_draws, options)


def default_precision() -> str:
    """TF32 or one bfloat16 pass would do above sigma_star only."""
    return "highest" if jax.default_backend() == "cpu" else "high"


def _from_host(data, sigmas, key, seed, num_draws, chunk, tile, options):
    """Chunks of rows that come to the devices one after the other."""
    given = {n: v for n, v in options.items() if n not in ("precision", "progress")}
    plan = plan_of(len(data.rows), data.mean.size, num_draws=num_draws, **given)
    parts = [block_of(plan, step, seed) for step in range(plan.steps)]
    found = exact_from_host(
        data, parts, key, sigmas, chunk=chunk, tile=tile, precision=options["precision"]
    )
    many = [jax.tree.map(lambda a: np.asarray(a, np.float64), draws.moments(f)) for f in found]
    exact = jax.tree.map(lambda *a: np.stack(a), *many)
    square = data.variance + float((np.asarray(data.mean, np.float64) ** 2).sum())
    return curve_of(plan, sigmas, exact, None, square, data.variance)


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
    plan = plan_of(
        int(data.count),
        data.tiles.shape[-1],
        num_draws=num_draws,
        estimator=estimator,
        form=form,
        subset_size=subset_size,
        c_rule=c_rule,
        neighbours=neighbours,
        exact_draws=exact_draws,
        antithetic=antithetic,
        block=block,
    )
    levels = jnp.asarray(sigmas, data.square.dtype)
    near = nearest_neighbours(data, plan.neighbours, precision) if plan.neighbours else None
    found = []
    for step in tqdm(
        range(plan.steps), desc="optimal loss", disable=None if progress else True
    ):
        part = block_of(plan, first + step, seed)
        made = measured(plan, step < plan.few, data, part, key, levels, near, precision)
        found.append(jax.tree.map(lambda a: np.asarray(a, np.float64), made))
    exact = [f.exact for f in found if f.exact is not None]
    cheap = [f.cheap for f in found if f.cheap is not None]
    stack = lambda many: jax.tree.map(lambda *a: np.stack(a), *many) if many else None
    return curve_of(plan, sigmas, stack(exact), stack(cheap), *sizes(data))


def sizes(data: Rows) -> tuple[float, float]:
    """A = E |x_0|^2 of uncentred rows, and the variance V."""
    variance = np.asarray(data.square, np.float64).sum() / int(data.count)
    return float(variance + (np.asarray(data.mean, np.float64) ** 2).sum()), float(variance)


def curve_of(
    plan: Plan,
    sigmas: np.ndarray,
    exact: draws.Moments | None,
    cheap: draws.Subset | None,
    square: float,
    variance: float,
) -> OptimalLoss:
    """Blocks, stacked along axis 0 as float64, as a curve.

    Args:
      plan: whose blocks they are; of "corrected" the first `few` of `cheap` go with `exact`.
      sigmas: [S].
      exact: moments [few, S].
      cheap: moments [steps, S], or None.
      square, variance: `sizes`.
    """
    if plan.estimator == "exact":
        main = exact
        value = low = up = _by_draw(exact, plan, square)
    else:
        low = _by_block(cheap.lower.mean.trcov)
        up = _by_block(cheap.upper.mean.residual)
        main = {"dol": cheap.lower, "snis": cheap.upper}.get(plan.estimator, cheap.corrected)
        value = _by_block(_form(main.mean, plan.form, square))
    if plan.estimator == "corrected":
        base = _form(cheap.corrected.mean, plan.form, square)
        truth = _form(exact.mean, plan.form, square)
        value, main = _controlled(truth, base[: plan.few], base[plan.few :]), exact
    return OptimalLoss(
        sigmas=np.asarray(sigmas, np.float64),
        value=value[0],
        stderr=value[1],
        lower=low[0],
        upper=up[0],
        lower_err=low[1],
        upper_err=up[1],
        ess=main.mean.ess.mean(0),
        p_self=main.mean.p_self.mean(0),
        variance=np.array(variance),
        num_draws=np.array(len(main.mean.ess) * plan.block),
        dim=np.array(plan.dim),
    )


def _form(mean, form, square):
    """Of block means: the mean of this form."""
    return square - mean.mean_square if form == "unpaired" else getattr(mean, form)


def _by_draw(found, plan, square):
    """Mean and standard error where draws, or pairs of them, are independent."""
    mean = _form(found.mean, plan.form, square)
    name = "mean_square" if plan.form == "unpaired" else plan.form
    if plan.fold > 1:  # Pairs are not independent; blocks of them are.
        return _by_block(mean)
    n = len(mean) * plan.block
    if n < 2:
        return mean.mean(0), np.full(mean.shape[1:], np.nan)
    within = getattr(found.spread, name).sum(0)
    between = plan.block * np.sum((mean - mean.mean(0)) ** 2, 0)
    return mean.mean(0), np.sqrt((within + between) / (n - 1) / n)


def _by_block(means):
    """Mean and standard error where the draws of a block belong together."""
    n = len(means)
    if n < 2:
        return means.mean(0), np.full(means.shape[1:], np.nan)
    return means.mean(0), means.std(0, ddof=1) / np.sqrt(n)


def _controlled(truth, base, many):
    """The control variate's value and standard error, from block means."""
    n, m = len(truth), len(many)
    about = lambda v: v - v.mean(0)
    covariance = np.sum(about(truth) * about(base), 0)
    spread = np.sum(about(base) ** 2, 0)
    # Of independent means over n and m blocks; no correlation, no correction.
    beta = np.divide(covariance, spread, out=np.zeros_like(spread), where=spread > 0)
    beta = np.clip(beta, 0, None) * m / (n + m)
    value = truth.mean(0) + beta * (many.mean(0) - base.mean(0))
    rest = truth - beta * base
    # Two numbers, the mean and beta, were fitted.
    error = np.sum(about(rest) ** 2, 0) / max(n - 2, 1) / n + beta**2 * many.var(0, ddof=1) / m
    return value, np.sqrt(error)
