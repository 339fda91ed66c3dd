"""What a denoiser loses at each noise level, and what it could not help losing.

    loss(s)      = E |D(x; s) - x_0|^2          what training sees
    floor(s)     = J*(s)                        the optimum of these rows
    gap(s)       = loss - floor                 paired, draw by draw
    distance(s)  = E |D(x; s) - D*(x; s)|^2     the gap again, never negative

(Xu et al., arXiv:2506.13763, section 4.) Exact sums over all rows on shared draws, so the gap
is found in two ways that must agree. All are means over coordinates.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int
from scipy import stats
from tqdm import tqdm

from common import mesh as meshes
from common.errors import UserError
from diffusion import draws
from diffusion.draws import SPLIT, Block, over_rows, whole_rows
from diffusion.posterior import accumulate, finish, merged_over, nothing, shifted
from diffusion.preconditioning import Denoiser, check_sigmas
from diffusion.rows import Rows


class Diagnosis(NamedTuple):
    """Per noise level, per coordinate, float64 [S]; `_err` are standard errors.

    Attributes:
      sigmas: noise levels.
      loss, floor, gap, distance: as above.
      draws: [], of each level.
    """

    sigmas: np.ndarray
    loss: np.ndarray
    loss_err: np.ndarray
    floor: np.ndarray
    floor_err: np.ndarray
    gap: np.ndarray
    gap_err: np.ndarray
    distance: np.ndarray
    distance_err: np.ndarray
    draws: np.ndarray


class Optimum(NamedTuple):
    """Of B draws at S levels.

    Attributes:
      x0, eps: [B, D], uncentred rows and their noise.
      mean: [S, B, D], D*(x; s), uncentred.
      floor: [S, B], of which J* is the mean; a sum over coordinates.
    """

    x0: Float[Array, "b d"]
    eps: Float[Array, "b d"]
    mean: Float[Array, "s b d"]
    floor: Float[Array, "s b"]


@partial(jax.jit, static_argnames="precision")
def optimum(
    data: Rows,
    part: Block,
    key: jax.Array,
    sigmas: Float[Array, " s"],
    label: Int[Array, " b"] | None = None,
    precision: str = "highest",
) -> Optimum:
    """The optimal denoiser on a block of draws.

    Args:
      data, part, key, sigmas, precision: as of `draws.exact`.
      label: [B], where the denoiser is told the class, the optimum is that of its rows.
    """

    def local(data, part, key, sigmas, label):
        queries = draws.queries(part, key, whole_rows(data, part.index))
        if label is not None:
            queries = queries._replace(label=label)
        sums = accumulate(nothing(len(sigmas), queries), data, queries, sigmas, precision)
        if meshes.current() > 1:
            sums = merged_over(sums, "data")
        found = finish(sums, queries, data.mean)
        mean = queries.x0 + shifted(sums, queries)[0]
        return Optimum(queries.x0 + data.mean, queries.eps, mean + data.mean, found.trcov)

    return over_rows(local, (SPLIT, P(), P(), P(), P()), P())(data, part, key, sigmas, label)


@partial(jax.jit, static_argnames=("shape", "of_condition"))
def _errors(of_condition, params, found: Optimum, label, sigmas, shape):
    """[3, S, B]: loss, gap and distance of each draw, means over coordinates."""
    batch, dim = found.x0.shape
    x0, eps = found.x0, found.eps
    if meshes.current() > 1:  # Each device denoises its part.
        place = lambda a: jax.lax.with_sharding_constraint(a, P("data"))
        x0, eps = place(x0), place(eps)
    denoise = of_condition(params, None if label is None else {"label": label})

    def level(_, one):
        s, mean, floor = one
        x = (x0 + s * eps).reshape(batch, *shape)
        out = denoise(x, jnp.full(batch, s, x.dtype)).reshape(batch, dim)
        loss = jnp.mean((out - x0) ** 2, -1)
        return None, jnp.stack([loss, loss - floor / dim, jnp.mean((out - mean) ** 2, -1)])

    levels = (sigmas, found.mean, found.floor)
    return jnp.moveaxis(jax.lax.scan(level, None, levels)[1], 1, 0)


def diagnose(
    data: Rows,
    of_condition: Callable[[Any, dict | None], Denoiser],
    params: Any,
    sigmas: Any,
    key: jax.Array,
    *,
    shape: tuple[int, ...],
    num_draws: int,
    labels: np.ndarray | None = None,
    block: int = 256,
    seed: int = 0,
    precision: str = "highest",
    progress: bool = False,
) -> Diagnosis:
    """Losses, floor and gap of a denoiser on the rows it was trained on.

    Args:
      data: all rows; split over devices where the mesh in use has several.
      of_condition: (params, {"label": [B]} or None) -> denoiser of [B, *shape]. One function
        object, as it is compiled in.
      params: a pytree of arrays.
      sigmas: noise levels.
      key: of all noise.
      shape: of a row.
      num_draws: at least, per level; whole blocks, permutations of the rows.
      labels: [N], the condition of each row. The floor is then that of its class, and `data`
        must have the labels, too.
      block: draws in work at a time.
      seed: of the order of rows.
      precision: of the products of the floor.

    Raises:
      UserError: a noise level cannot be, or the denoiser returns what is no number.
    """
    sigmas = check_sigmas(sigmas)
    count, dim = int(data.count), data.tiles.shape[-1]
    devices = meshes.current()
    block = max(devices, min(block, num_draws) // devices * devices)
    levels = jnp.asarray(sigmas, data.square.dtype)
    # As in `draws.in_groups`, but from the host: the denoiser is the user's.
    size = draws.group_size(len(levels), block, dim, levels.dtype)
    grouped = draws.groups(levels, size)
    found, floors = [], []
    steps = range(-(-num_draws // block))
    for step in tqdm(steps, desc="diagnosing", leave=False, disable=None if progress else True):
        part = draws.block(step, block, count, seed)
        label = None if labels is None else jnp.asarray(labels[part.index], jnp.int32)
        some = []
        for group in grouped:
            best = optimum(data, part, key, group, label, precision)
            errors = _errors(of_condition, params, best, label, group, shape)
            # Fetched here, so that no two groups are on the devices at once.
            some.append((np.asarray(errors, np.float64), np.asarray(best.floor, np.float64)))
            del best
        whole = lambda parts: np.concatenate(parts, -2)[..., : len(levels), :]
        errors, floor = map(whole, zip(*some, strict=True))
        found.append(errors)
        floors.append(floor / dim)
    return _summary(sigmas, np.concatenate(found, -1), np.concatenate(floors, -1))


def _summary(sigmas, errors, floors) -> Diagnosis:
    if not np.isfinite(errors).all():
        level = float(sigmas[np.argwhere(~np.isfinite(errors))[0][1]])
        raise UserError(f"The denoiser's output is not finite at sigma = {level:g}.")
    n = floors.shape[-1]
    err = lambda v: v.std(-1, ddof=1) / np.sqrt(n) if n > 1 else np.full(len(v), np.nan)
    loss, gap, distance = errors
    return Diagnosis(
        sigmas=sigmas,
        loss=loss.mean(-1),
        loss_err=err(loss),
        floor=floors.mean(-1),
        floor_err=err(floors),
        gap=gap.mean(-1),
        gap_err=err(gap),
        distance=distance.mean(-1),
        distance_err=err(distance),
        draws=np.array(n),
    )


def check(found: Diagnosis, tolerance: float = 5.0) -> None:
    """Refuses a loss below the optimum: other data, preprocessing or weights.

    Args:
      tolerance: in standard errors of many draws; of few, so many more that as little is
        beyond them (Student).

    Raises:
      UserError: somewhere the gap is below 0 by more than that.
    """
    known = np.nan_to_num(found.gap_err, nan=np.inf)  # One draw proves nothing.
    freedom = max(int(found.draws) - 1, 1)
    tolerance = float(stats.t.isf(stats.norm.sf(tolerance), freedom))
    low = found.gap + tolerance * np.maximum(known, 1e-7 * found.floor)
    if (low < 0).any():
        i = int(np.argmin(low))
        raise UserError(
            f"At sigma = {found.sigmas[i]:g} the model's loss {found.loss[i]:.4g} is below the "
            f"optimum {found.floor[i]:.4g} of these data by more than {tolerance:.3g} standard "
            "errors: it was trained on other data, or with other preprocessing."
        )


def total(
    found: Diagnosis, weight: Callable, density: Callable, fields: Iterable[str]
) -> dict[str, float]:
    """E_{log s ~ density}[weight(s) value(s)] of some fields, trapezia in log s.

    Args:
      found: levels of which cover the density.
      weight, density: s [S] -> [S]; the density is of log s and need not be normalised.
      fields: of `Diagnosis`.
    """
    x, s = np.log(found.sigmas), found.sigmas
    p = np.asarray(density(s), float)
    mean = lambda v: float(np.trapezoid(p * np.asarray(weight(s), float) * v, x))
    return {name: mean(getattr(found, name)) / np.trapezoid(p, x) for name in fields}


def edm_weight(s: np.ndarray, sigma_data: float) -> np.ndarray:
    """EDM's weight of |D(x; s) - x_0|^2 (Karras et al. 2022), of the shape of s."""
    return (s**2 + sigma_data**2) / (s * sigma_data) ** 2


def edm_density(s: np.ndarray, sigma_data: float) -> np.ndarray:
    """EDM's density of log s, N(-1.2, 1.2^2), not normalised.

    It is for data of deviation 0.5; noise for larger data is as much larger.
    """
    return np.exp(-0.5 * ((np.log(s * 0.5 / sigma_data) + 1.2) / 1.2) ** 2)


def bands(found: Diagnosis, count: int = 8) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean gap over equal bands of log s: middles s [count], gap [count], error [count].

    Levels share their draws, so the error of a mean is taken to be the mean of the errors,
    which it cannot exceed.
    """
    x = np.log(found.sigmas)
    edges = np.linspace(x[0], x[-1], count + 1)
    which = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, count - 1)
    mean = lambda v: np.array([v[which == b].mean() for b in range(count)])
    return np.exp(0.5 * (edges[1:] + edges[:-1])), mean(found.gap), mean(found.gap_err)
