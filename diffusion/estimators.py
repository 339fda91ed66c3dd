"""The optimal loss of a data set: estimators and their errors.

    J*(s) = E |x_0 - E[x_0 | x]|^2 = E tr Cov[x_0 | x],   x = x_0 + s eps

over rows x_0 of the data set (Xu et al., arXiv:2506.13763, theorem 1). It is what the best of
all denoisers would still lose on exactly these rows. Outer means are over draws; inner sums
over rows are

    exact      all rows, streamed                                          unbiased
    dol        the source and L - 1 others                                 too low
    cdol       the same, the source's weight over C                        paper's Eq. 11
    snis       L rows, whatever the source                                 residual too high
    knn        the source, its K neighbours, and others for the rest       a little low
    corrected  cdol or knn on many draws, mended by exact sums on a few    unbiased

What the cheap draws of "corrected" lack, bias included, is gone from its value and stands in
its error bar, see `block_means`.
"""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from common.errors import UserError, reject
from diffusion import draws
from diffusion.block_means import OptimalLoss, curve_of
from diffusion.plans import BATCHES, SUBSET, block_of, block_size, measured, plan_of, whole
from diffusion.preconditioning import check_sigmas
from diffusion.rows import Rows, check_labels, rows
from diffusion.stratification import nearest_neighbours
from diffusion.streaming import exact_from_host, on_host

PRECISIONS = ("default", "high", "highest")


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
      num_draws: at least, of the outer mean; whole blocks, permutations of the rows. Fewer
        than 2 leave no error, NaN, and a warning.
      estimator: one of `plans.ESTIMATORS`.
      form: trcov (least spread), residual, paired or unpaired (the paper's A - B).
      subset_size: L, of all but exact; 0: 2048 or N.
      c_rule: of cdol and corrected: "paper", "tapered", "ht" or C itself.
      neighbours: K of knn; of corrected, 0 means cdol and K > 0 knn. 0 with knn: L / 2.
      exact_draws: of corrected, 16 blocks at least; 0: an eighth of num_draws.
      labels: [N]; given, every class is a data set of its own and the result is their mean.
        Classes of no more than L rows have exact sums; of one row nothing is lost, and a
        warning says so.
      scale, offset: of whole numbers.
      antithetic: pairs of draws with noise of either sign.
      mesh: rows are split over its axis "data".
      precision: of products, one of `PRECISIONS`; "": highest on a CPU, high elsewhere.
      tile, block: rows and draws that are in work at a time.
      chunk: rows that come to the devices at a time, where the data stay on the host or on its
        disk; 0: all at once. For exact sums without labels.
      progress: shows a bar.

    Raises:
      UserError: one of these cannot be; the sentence names it.
    """
    sigmas = levels_of(sigmas)
    tile = whole("tile", tile)
    if whole("num_draws", num_draws) < 2:
        warnings.warn("One draw of the optimal loss has no standard error.", stacklevel=2)
    if np.ndim(data) and len(data) == 1:
        warnings.warn("Of one row nothing can be lost: J* is 0.", stacklevel=2)
    seed = int(jax.random.bits(jax.random.fold_in(key, 0)))
    options = dict(
        estimator=estimator,
        form=form,
        subset_size=subset_size,
        c_rule=c_rule,
        neighbours=neighbours,
        exact_draws=exact_draws,
        antithetic=antithetic,
        precision=precision_of(precision),
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


def levels_of(sigmas: Any) -> np.ndarray:
    """`check_sigmas` of whatever a user gives.

    Raises:
      UserError: they are no noise levels.
    """
    try:
        return check_sigmas(sigmas)
    except (TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise reject("sigmas", sigmas, "numbers, noise levels above 0") from error


def precision_of(name: str) -> str:
    """Of products: the name, or for "" highest on a CPU and high elsewhere, as TF32 or one
    bfloat16 pass would do above sigma_star only.

    Raises:
      UserError: there is no such precision.
    """
    if name and name not in PRECISIONS:
        raise reject("estimator.precision", name, f"one of {', '.join(PRECISIONS)}")
    return name or ("highest" if jax.default_backend() == "cpu" else "high")


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
    data = np.asarray(data)
    labels = check_labels(labels, len(data))
    classes, counts = np.unique(labels, return_counts=True)
    alone = counts == 1
    if alone.any():
        said = f"{alone.sum()} classes have one row, of which nothing can be lost: J* is 0."
        warnings.warn(said, stacklevel=3)
    # One program for all classes: of their average size, or of the smallest where it must fit.
    share = lambda n, of: max(1, round(of * n / len(data)))
    average = len(data) / len(classes)
    few = options["exact_draws"] or -(-num_draws // 8)
    block = block_size(
        options["block"],
        share(average, num_draws),
        options["estimator"],
        share(average, few),
        options["antithetic"],
    )
    least = 2 * block if options["estimator"] == "exact" else BATCHES * block
    subset = 0 if options["estimator"] == "exact" else options["subset_size"] or SUBSET
    place["tile"] = min(place["tile"], int(counts.max()))
    tiles = -(-int(counts.max()) // place["tile"])
    parts = []
    for c, n in zip(classes, counts, strict=True):
        if n == 1:
            parts.append(_nothing(sigmas, data[0].size))
            continue
        found = rows(data[labels == c], tiles=tiles, **place)
        own = jax.random.fold_in(key, int(c) + 1)
        given = options | dict(block=block, num_draws=max(share(n, num_draws), least))
        given["exact_draws"] = max(share(n, few), least)
        # A subset of all rows is all rows.
        whole_class = dict(estimator="exact", subset_size=0, neighbours=0)
        given |= whole_class if n <= subset else dict(subset_size=subset)
        parts.append(of_rows(found, sigmas, own, seed + int(c), **given))
    weight = (counts / counts.sum())[:, None]
    each = lambda name: np.stack([getattr(p, name) for p in parts])
    mean = lambda name: np.sum(weight * each(name), 0)
    error = lambda name: np.sqrt(np.sum((weight * each(name)) ** 2, 0))
    return parts[0]._replace(
        **{n: mean(n) for n in ("value", "lower", "upper", "ess", "p_self")},
        **{n: error(n) for n in ("stderr", "lower_err", "upper_err")},
        variance=np.sum(weight[:, 0] * each("variance")),
        **{n: np.sum(each(n)) for n in ("num_draws", "cheap_draws")},
    )


def _nothing(sigmas, dim) -> OptimalLoss:
    """The curve of one row."""
    zero, one = np.zeros(len(sigmas)), np.ones(len(sigmas))
    ends = (np.array(0.0), np.array(0), np.array(dim))
    return OptimalLoss(np.asarray(sigmas, float), *[zero] * 6, one, one, *ends)


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
    if near is not None:  # As many as there are places, so that classes share a program.
        near = jnp.pad(near, ((0, data.index.size - len(near)), (0, 0)))
    fetched = lambda tree: jax.tree.map(lambda a: np.asarray(a, np.float64), tree)
    found = []
    for step in tqdm(
        range(plan.steps), desc="optimal loss", disable=None if progress else True
    ):
        part = block_of(plan, first + step, seed)
        made = measured(plan, step < plan.few, data, part, key, levels, near, precision)
        if found:  # One behind, so that the device need not wait for the host.
            found[-1] = fetched(found[-1])
        found.append(made)
    found[-1] = fetched(found[-1])
    exact = [f.exact for f in found if f.exact is not None]
    cheap = [f.cheap for f in found if f.cheap is not None]
    stack = lambda many: jax.tree.map(lambda *a: np.stack(a), *many) if many else None
    return curve_of(plan, sigmas, stack(exact), stack(cheap), *sizes(data))


def sizes(data: Rows) -> tuple[float, float]:
    """A = E |x_0|^2 of uncentred rows, and the variance V."""
    variance = np.asarray(data.square, np.float64).sum() / int(data.count)
    return float(variance + (np.asarray(data.mean, np.float64) ** 2).sum()), float(variance)
