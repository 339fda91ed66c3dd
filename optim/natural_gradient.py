"""Natural-gradient steps for variational Monte Carlo: minSR, SPRING and MARCH.

With B samples, scores O = ∂ log|ψ|/∂θ and local energies E (sums over good samples only),

    Õ = (O − mean O)/√B,    ε̃ = −(E − mean E)/√B,    φ = μ d_{k−1},    D = diag(≈ v^{−1/2}),
    d_k = φ + D Õᵀ (Õ D Õᵀ + λ)⁻¹ (ε̃ − Õ φ),

the minimiser of ‖Õ d − ε̃‖²/λ + (d − φ)ᵀ D⁻¹ (d − φ).

    minSR   μ = 0, D = 1      Chen & Heyl, arXiv:2302.01941; Rende et al., arXiv:2310.05715
    SPRING  D = 1             Goldshlager, Abrahamsen & Lin, arXiv:2401.10190
    MARCH   v ≈ Σ (Δd)²       Gu et al., arXiv:2507.02644, supplement S17-S23

All of them want `scores` [B, P] and `local_energy` [B], both raw and global, as keyword
arguments of `update`, and give a step to be *added* by `optax.apply_updates`. Samples with
a non-finite number do not count; with more than 1 % of them, or if the result is not
finite, the update is zero and the state stays as it was.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from common.errors import reject


class NaturalGradientState(NamedTuple):
    """Vectors run over the parameters in the order of `ravel_pytree`.

    `count` counts steps that were taken, not refused ones. `phi` is the latest d_k, before
    any norm constraint. `v` is MARCH's second moment; SPRING has none.
    """

    count: Int[Array, ""]
    phi: Float[Array, " params"]
    v: Float[Array, " params"] | optax.EmptyState


def scale_by_minsr(
    damping: float = 1e-3, **solver
) -> optax.GradientTransformationExtraArgs:
    """dθ = Õᵀ (Õ Õᵀ + λ)⁻¹ ε̃ (arXiv:2302.01941); `damping`, `solver` as in MARCH."""
    solver = _solver(damping, **solver)

    def update(updates, state, params=None, *, scores, local_energy, **extra):
        del extra
        batch = _centre(scores, local_energy, solver)
        zero = jnp.zeros(scores.shape[1], batch.residual.dtype)
        step = _direction(batch, zero, jnp.ones_like(zero), solver)
        step, _ = _accept(step, updates if params is None else params, batch.usable)
        return step, state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update
    )


def scale_by_spring(
    mu: float = 0.99, damping: float = 1e-3, **solver
) -> optax.GradientTransformationExtraArgs:
    """SPRING (arXiv:2401.10190, algorithm 1); `mu` < 1, `solver` as in MARCH."""
    return _with_momentum(mu, _solver(damping, **solver), moment=None)


def scale_by_march(
    mu: float = 0.95,
    beta: float = 0.995,
    damping: float = 1e-3,
    eps: float = 1e-3,
    normalize_v: bool = True,
    difference: str = "raw",
    decay: str = "sum",
    preconditioner: str = "sqrt",
    **solver,
) -> optax.GradientTransformationExtraArgs:
    """MARCH (arXiv:2507.02644, S17-S23). Sources differ in details, hence the options.

    Args:
      mu: momentum in [0, 1).
      beta: decay of v in [0, 1).
      damping: λ > 0.
      eps: ≥ 0, keeps D finite where v vanishes.
      normalize_v: use v/rms(v), so that λ keeps its meaning while v drifts; "sum" also
        continues from the normalised v, as the authors' code does.
      difference: whose square enters v, "raw": d_k − d_{k−1}; "momentum": d_k − μ d_{k−1}.
      decay: "sum": v ← β v + (·)² from v = 1; "ema": v ← β v + (1−β)(·)² from 0, divided
        by 1 − β^count where used. Both have D = 1 in the first step (for eps = 0).
      preconditioner: D is "sqrt": 1/(√v + eps); "quarter": 1/(v^¼ + eps)².
      clip: `clip=5.0` clips local energies to median ± 5 mean|E − median|; None: not at all.
      axis: mesh axis over which the rows of `scores` are spread.
      dtype: of the linear algebra and the state, "float64" or "float32"; None: the widest
        of `scores` and `local_energy`, and for the state JAX's default float.
      block: columns of `scores` that are converted to `dtype` at a time.

    Raises:
      UserError: an option is out of range, or float64 is asked for and x64 is disabled.
    """
    if not 0 <= beta < 1:
        raise reject("optim.beta", beta, "at least 0 and below 1")
    if not 0 <= eps < jnp.inf:
        raise reject("optim.eps", eps, "a finite number, at least 0")
    _known("difference", difference, ("raw", "momentum"))
    _known("decay", decay, ("sum", "ema"))
    _known("preconditioner", preconditioner, ("sqrt", "quarter"))
    averaged = decay == "ema"

    def used(v, count):
        if averaged:
            v = jnp.where(count == 0, 1, v / jnp.maximum(1 - beta**count, 1 - beta))
        return _unit_rms(v) if normalize_v else v

    def metric(v, count):
        v = jnp.maximum(used(v, count), jnp.finfo(v.dtype).tiny)
        return (
            1 / (jnp.sqrt(v) + eps)
            if preconditioner == "sqrt"
            else (v**0.25 + eps) ** -2
        )

    def accumulate(v, count, step, previous):
        square = (step - (previous if difference == "raw" else mu * previous)) ** 2
        if averaged:
            return beta * jnp.where(count == 0, 0, v) + (1 - beta) * square
        return beta * used(v, count) + square

    return _with_momentum(mu, _solver(damping, **solver), _Moment(metric, accumulate))


def energy_gradient(
    clip: float | None = None, axis: str = "data", dtype: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Replaces the updates by ∂E/∂θ = −2 Õᵀ ε̃, to be followed by `optax.adam(rate)`.

    Unlike the others this is a gradient, not a step: what follows has to turn its sign.
    A refused batch gives a zero gradient. Arguments as in `scale_by_march`.
    """
    solver = _solver(1.0, clip, axis, dtype)  # There is nothing to damp.

    def update(updates, state, params=None, *, scores, local_energy, **extra):
        del extra
        batch = _centre(scores, local_energy, solver)
        gradient = -2 * _transposed(batch, batch.residual)
        like = updates if params is None else params
        return _accept(gradient, like, batch.usable)[0], state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update
    )


def gram(
    scores: Float[Array, "samples params"],
    weights: Float[Array, " params"],
    mean: Float[Array, " params"],
    good: Bool[Array, " samples"],
    *,
    axis: str = "data",
    block: int = 4096,
) -> Float[Array, "samples samples"]:
    """(O − mean) diag(weights) (O − mean)ᵀ in the dtype of `weights`, on every device.

    Rows and columns of samples that are not `good` are zero. On a mesh with `axis`, rows
    of `scores` live on it (their number must be divisible); each device takes all samples
    of some parameters instead, sent in the dtype of `scores`, and the products are summed.
    """
    local = partial(_gram_of_columns, block=block)
    devices = _devices(axis)
    if devices == 1:
        return local(scores, weights, mean, good)

    def exchange(rows, weights, mean, good):
        columns = jax.lax.all_to_all(
            rows, axis, split_axis=1, concat_axis=0, tiled=True
        )
        return jax.lax.psum(local(columns, weights, mean, good), axis)

    padding = (0, -scores.shape[1] % devices)
    scores = jnp.pad(scores, ((0, 0), padding))
    weights, mean = jnp.pad(weights, padding), jnp.pad(mean, padding)
    split, everywhere = PartitionSpec(axis), PartitionSpec()
    specs = (split, split, split, everywhere)
    sharded = jax.shard_map(
        exchange, in_specs=specs, out_specs=everywhere, axis_names={axis}
    )
    return sharded(scores, weights, mean, good)


def _gram_of_columns(scores, weights, mean, good, block):
    def product(start, width):
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=width)
        centred = cut(scores, axis=1).astype(weights.dtype) - cut(mean)
        centred = jnp.where(good[:, None], centred, 0)
        return jnp.matmul(centred * cut(weights), centred.T, precision="highest")

    blocks, rest = divmod(scores.shape[1], block)
    # Starting from a product, not from zeros, gives the carry its varying type (shard_map).
    first = product(blocks * block, rest)
    return jax.lax.fori_loop(
        0, blocks, lambda i, total: total + product(i * block, block), first
    )


class _Solver(NamedTuple):
    damping: float
    clip: float | None
    axis: str
    dtype: Any
    block: int


class _Moment(NamedTuple):
    metric: Callable  # v, count -> diagonal of D
    accumulate: Callable  # v, count, d_k, d_{k−1} -> v


class _Batch(NamedTuple):
    scores: Array  # [B, P], raw: centring happens on the fly, so that no copy is stored
    mean: Array  # [P]
    good: Array  # [B]
    size: Array  # number of good samples, as a float
    residual: Array  # [B], ε̃
    usable: Array  # at most 1 % of samples are bad


def _solver(damping, clip=None, axis="data", dtype=None, block=4096):
    if not 0 < damping < jnp.inf:
        raise reject("optim.damping", damping, "a finite number above 0")
    if clip is not None and not 0 < clip < jnp.inf:
        raise reject("optim.clip", clip, "a finite number above 0, or None")
    if block < 1:
        raise reject("optim.block", block, "at least 1")
    if dtype is not None:
        _known("dtype", jnp.dtype(dtype).name, ("float32", "float64"))
    return _Solver(damping, clip, axis, dtype, block)


def _known(name, value, choices):
    if value not in choices:
        raise reject(f"optim.{name}", value, " or ".join(map(repr, choices)))


def _dtype(dtype, *arrays):
    if dtype is None:
        return jnp.result_type(jnp.float32, *arrays)
    if jnp.dtype(dtype) != jax.dtypes.canonicalize_dtype(dtype):
        raise reject("precision.linalg", "float64", "'float32' unless x64 is enabled")
    return jnp.dtype(dtype)


def _with_momentum(mu, solver, moment):
    if not 0 <= mu < 1:
        raise reject("optim.mu", mu, "at least 0 and below 1")

    def init(params):
        size = sum(leaf.size for leaf in jax.tree.leaves(params))
        phi = jnp.zeros(size, _dtype(solver.dtype, float))
        v = optax.EmptyState() if moment is None else jnp.ones_like(phi)
        return NaturalGradientState(jnp.zeros((), jnp.int32), phi, v)

    def update(updates, state, params=None, *, scores, local_energy, **extra):
        del extra
        batch = _centre(scores, local_energy, solver)
        count, previous, v = state
        previous = previous.astype(batch.residual.dtype)
        metric = jnp.ones_like(previous)
        if moment is not None:
            v = v.astype(previous.dtype)
            metric = moment.metric(v, count)
        step = _direction(batch, mu * previous, metric, solver)
        if moment is not None:
            v = moment.accumulate(v, count, step, previous)
        new = NaturalGradientState(optax.safe_increment(count), step, v)
        usable = batch.usable & _finite(v)
        step, accepted = _accept(step, updates if params is None else params, usable)
        keep = lambda new, old: jnp.where(accepted, new.astype(old.dtype), old)
        return step, jax.tree.map(keep, new, state)

    return optax.GradientTransformationExtraArgs(init, update)


def _centre(scores, energy, solver):
    """ε̃, and what it takes to apply Õ and Õᵀ."""
    dtype = _dtype(solver.dtype, scores, energy)
    good = jnp.isfinite(energy) & jnp.isfinite(scores).all(axis=1)
    good, energy = _everywhere(good, solver.axis), _everywhere(energy, solver.axis)
    energy = jnp.where(good, energy.astype(jnp.result_type(energy, dtype)), 0)
    samples = good.sum()
    size = jnp.maximum(samples, 1).astype(dtype)
    if solver.clip is not None:
        median = jnp.nanmedian(jnp.where(good, energy, jnp.nan))
        width = solver.clip * jnp.where(good, jnp.abs(energy - median), 0).sum() / size
        energy = jnp.clip(energy, median - width, median + width)
    centred = energy - jnp.where(good, energy, 0).sum() / size
    residual = jnp.where(good, -centred, 0).astype(dtype) / jnp.sqrt(size)
    mean = jnp.where(good[:, None], scores, 0).sum(axis=0, dtype=dtype) / size
    mean = _everywhere(mean, solver.axis)
    usable = 100 * (good.size - samples) <= good.size
    return _Batch(scores, mean, good, size, residual, usable)


def _rows(batch):
    centred = batch.scores.astype(batch.mean.dtype) - batch.mean
    return jnp.where(batch.good[:, None], centred, 0) / jnp.sqrt(batch.size)


# Sums, not matrix products: XLA fuses them with the conversion in `_rows`, where a product
# would first store all scores in the wider dtype. They never use reduced precision either.
def _apply(batch, vector):
    return (_rows(batch) * vector).sum(axis=1)


def _transposed(batch, vector):
    return (_rows(batch) * vector[:, None]).sum(axis=0)


def _direction(batch, phi, metric, solver):
    """φ + D Õᵀ (Õ D Õᵀ + λ)⁻¹ (ε̃ − Õ φ)."""
    residual = _everywhere(batch.residual - _apply(batch, phi), solver.axis)
    matrix = gram(
        batch.scores,
        metric,
        batch.mean,
        batch.good,
        axis=solver.axis,
        block=solver.block,
    )
    # Õᵀ 1 = 0 and the residual is orthogonal to 1, so the added ones change nothing but
    # keep the eigenvalue of that direction away from zero.
    ones = batch.good.astype(matrix.dtype)
    matrix = ((matrix + matrix.T) / 2 + jnp.outer(ones, ones)) / batch.size
    return phi + metric * _transposed(batch, _solve(matrix, residual, solver.damping))


def _solve(matrix, vector, damping):
    """(matrix + damping)⁻¹ vector, also when rounding has made the matrix indefinite."""
    factor = jnp.linalg.cholesky(
        matrix + damping * jnp.eye(len(vector), dtype=matrix.dtype)
    )
    solution = jax.scipy.linalg.cho_solve((factor, True), vector)

    def clipped():
        values, vectors = jnp.linalg.eigh(matrix)
        inverse = 1 / (jnp.maximum(values, 0) + damping)
        dot = partial(jnp.matmul, precision="highest")
        return dot(vectors, inverse * dot(vectors.T, vector))

    return jax.lax.cond(_finite(solution), lambda: solution, clipped)


def _accept(step, like, usable):
    """The flat step as a tree like `like`, or zeros; and whether it is usable and finite."""
    flat, unravel = ravel_pytree(like)
    cast = step.astype(flat.dtype)
    accepted = usable & _finite((step, cast))
    return unravel(jnp.where(accepted, cast, 0)), accepted


def _unit_rms(v):
    # Divided by the largest first: v ~ d² is small, and its square underflows in float32.
    largest = v.max()
    v = jnp.where(largest > 0, v / largest, 1)
    return v / jnp.sqrt(jnp.mean(v**2))


def _finite(tree):
    leaves = jax.tree.leaves(tree)
    return jnp.array([jnp.isfinite(leaf).all() for leaf in leaves] or [True]).all()


def _devices(axis):
    return dict(jax.sharding.get_abstract_mesh().shape).get(axis, 1)


def _everywhere(array, axis):
    """Replicated, so that no later product inherits a split and is gathered again."""
    if _devices(axis) == 1:
        return array
    return jax.lax.with_sharding_constraint(array, PartitionSpec())
