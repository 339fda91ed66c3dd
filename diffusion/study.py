"""How subset estimators err on a data set: value and spread against C, L and s.

As the paper's ablation (Xu et al., arXiv:2506.13763): DOL is C = 1, SNIS is C infinite, and the
corrected estimator lies between. All use the same draws, held against exact inner sums on
these draws, so that what differs is the estimator.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from common import metrics
from common.plots import panels
from diffusion import draws
from diffusion.block_means import wider
from diffusion.findings import digits
from diffusion.plans import block_of, plan_of
from diffusion.rows import Rows

FACTORS = (1.0, 2.0, 4.0, 8.0, 16.0)  # Of C0 = (N - 1) / (L - 1).


class Study(NamedTuple):
    """Sums over coordinates, float64.

    Attributes:
      sigmas: [S], sizes: [K] values of L, c: [K, F] values of C, first 1 and last infinite.
      form: of the estimates.
      exact: [S], mean over the draws.
      value: [K, F, S], likewise; spread: [K, F, S], standard deviation of one draw.
      error: [K, F, S], standard error of value / exact, between blocks, the draws of which
        share a subset; NaN of one block.
      draws: [], in all.
    """

    sigmas: np.ndarray
    sizes: np.ndarray
    c: np.ndarray
    form: str
    exact: np.ndarray
    value: np.ndarray
    spread: np.ndarray
    error: np.ndarray
    draws: np.ndarray


def study(
    data: Rows,
    sigmas: Sequence[float],
    sizes: Sequence[int],
    key: jax.Array,
    *,
    num_draws: int,
    form: str = "paired",
    block: int = 256,
    seed: int = 0,
    precision: str = "highest",
) -> Study:
    """Estimates by subsets of each size and each C.

    Raises:
      UserError: a size is below 2 or above N.
    """
    count, dim = int(data.count), data.tiles.shape[-1]
    levels = jax.numpy.asarray(sigmas, data.square.dtype)
    pick = lambda found: np.asarray(getattr(found, form), np.float64)
    ideal = np.array([(count - 1) / max(size - 1, 1) for size in sizes])
    c = np.concatenate(
        [np.ones((len(sizes), 1)), ideal[:, None] * FACTORS, np.full((len(sizes), 1), np.inf)],
        1,
    )
    plans = [_plan(count, dim, size, num_draws, form, block) for size in sizes]
    exact, found = [], [[[] for _ in row] for row in c]
    for step in range(plans[0].steps):
        for i, plan in enumerate(plans):
            part = block_of(plan, step, seed)
            if i == 0:
                exact.append(pick(draws.exact(data, part, key, levels, precision)))
            for j, value in enumerate(c[i]):
                rule = "snis" if np.isinf(value) else "constant"
                constant = 1.0 if np.isinf(value) else value
                made = draws.by_subset(
                    data, part, key, levels, rule, constant, precision=precision
                )
                found[i][j].append(pick(made.corrected))
    joined = np.array([[np.concatenate(cell, -1) for cell in row] for row in found])
    blocks = np.array([[[b.mean(-1) for b in cell] for cell in row] for row in found])
    truth = np.array([b.mean(-1) for b in exact])
    return Study(
        sigmas=np.asarray(sigmas, float),
        sizes=np.asarray(sizes),
        c=c,
        form=form,
        exact=np.concatenate(exact, -1).mean(-1),
        value=joined.mean(-1),
        spread=joined.std(-1, ddof=1),
        error=_error(blocks, truth),
        draws=np.array(joined.shape[-1]),
    )


def _error(blocks: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Of the ratio of means: blocks [K, F, n, S] over truth [n, S], of the same draws."""
    n, mean = len(truth), truth.mean(0)
    if n < 2:
        return np.full((*blocks.shape[:2], len(mean)), np.nan)
    size = np.where(mean > 0, mean, np.inf)
    left = blocks - blocks.mean(2, keepdims=True) / size * truth
    return wider(n - 1) * left.std(2, ddof=1) / np.sqrt(n) / size


def _plan(count, dim, size, num_draws, form, block):
    return plan_of(
        count,
        dim,
        num_draws=num_draws,
        estimator="cdol",
        form=form,
        subset_size=size,
        c_rule="ht",
        neighbours=0,
        exact_draws=0,
        antithetic=False,
        block=block,
    )


def page(found: Study, folder: Path) -> str:
    """A table, and a figure with a panel for each noise level."""
    names = ["DOL", *(f"{f:g} C0" for f in FACTORS), "SNIS"]
    lines = ["| s | L | " + " | ".join(names) + " |", "|---" * (2 + len(names)) + "|"]
    rows = ["sigma,subset_size,c,exact,value,spread_per_draw,ratio_error"]
    for k, s in enumerate(found.sigmas):
        for i, size in enumerate(found.sizes):
            ratio = found.value[i, :, k] / max(found.exact[k], 1e-300)
            shown = map(digits, ratio.tolist(), found.error[i, :, k].tolist())
            lines.append(f"| {s:g} | {size} | " + " | ".join(shown) + " |")
            for j, c in enumerate(found.c[i]):
                cells = (
                    s,
                    size,
                    c,
                    found.exact[k],
                    found.value[i, j, k],
                    found.spread[i, j, k],
                    found.error[i, j, k],
                )
                rows.append(",".join(f"{v:.9g}" for v in cells))
    if jax.process_index() == 0:
        _draw(found, folder / "study.png", names)
        metrics.write(folder / "study.csv", "\n".join(rows) + "\n")
    return "\n".join(
        [
            f"Estimate over exact sums of the same {int(found.draws)} draws, {found.form} "
            "form, with one standard error between blocks; C0 = (N - 1) / (L - 1).",
            "",
            *lines,
            "",
            "![Value and spread of subset estimators against C](study.png)",
        ]
    )


def _draw(found: Study, path: Path, names: list[str]) -> None:
    place = np.arange(len(names))
    with panels(path, 2 * len(found.sigmas), columns=len(found.sigmas)) as axes:
        for k, s in enumerate(found.sigmas):
            top, bottom = axes[k], axes[len(found.sigmas) + k]
            for i, size in enumerate(found.sizes):
                top.plot(
                    place, found.value[i, :, k] / found.exact[k], "o-", label=f"L = {size}"
                )
                bottom.plot(place, found.spread[i, :, k] / found.exact[k], "o-")
            top.axhline(1, color="#444444", lw=1)
            top.set(title=f"s = {s:g}", yscale="log", ylabel="estimate / exact")
            bottom.set(yscale="log", ylabel="spread of a draw / exact")
            for axis in (top, bottom):
                axis.set_xticks(place, names, rotation=45)
        axes[0].legend()
