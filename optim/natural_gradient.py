"""Natural-gradient steps for variational Monte Carlo: minSR, SPRING and MARCH.

With B samples, scores O = ∂ log|ψ|/∂θ, local energies E and means over samples,

    Õ = (O − mean O)/√B,   ε̃ = −(E − mean E)/√B,   φ = μ d_{k−1},   D = diag(≈ 1/√v),
    d_k = φ + D Õᵀ (Õ D Õᵀ + λ)⁻¹ (ε̃ − Õ φ)
        = argmin_d ‖Õ d − ε̃‖²/λ + (d − φ)ᵀ D⁻¹ (d − φ).

    minSR   μ = 0, D = 1   Chen & Heyl, arXiv:2302.01941; Rende et al., arXiv:2310.05715
    SPRING  D = 1          Goldshlager, Abrahamsen & Lin, arXiv:2401.10190
    MARCH   v ≈ Σ (Δd)²    Gu et al., arXiv:2507.02644, supplement S17-S23

`update` takes `scores` [B, P] and `local_energy` [B], raw and global, and gives a step for
`optax.apply_updates` to add. Samples with a non-finite number do not count; if they are
more than 1 %, or if the result is not finite, it is zero and the state stays as it was.
"""

from collections import namedtuple
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from common.errors import reject

Transformation = optax.GradientTransformationExtraArgs


class NaturalGradientState(NamedTuple):
    """Accepted steps; last d_k, unconstrained, and MARCH's v, flat as in `ravel_pytree`."""

    count: Int[Array, ""]
    phi: Float[Array, " params"]
    v: Float[Array, " params"] | optax.EmptyState


def scale_by_minsr(damping: float = 1e-3, **solver) -> Transformation:
    """d = Õᵀ (Õ Õᵀ + λ)⁻¹ ε̃ (arXiv:2302.01941); arguments as in `scale_by_march`."""
    solver = _solver(damping, **solver)
    return _stateless(lambda batch: _direction(batch, solver), solver)


def scale_by_spring(mu: float = 0.99, damping: float = 1e-3, **solver) -> Transformation:
    """MARCH without v (arXiv:2401.10190); arguments as in `scale_by_march`."""
    return _with_momentum(mu, _solver(damping, **solver))


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
) -> Transformation:
    """MARCH (arXiv:2507.02644, S17-S23). Sources differ in details, hence the options.

    Args:
      mu, beta: momentum and decay of v, in [0, 1).
      damping, eps: λ > 0; ε ≥ 0 bounds D where v vanishes.
      normalize_v: use v/rms(v), so that λ keeps its meaning; "sum" also goes on from it.
      difference: whose square enters v: "raw", d_k − d_{k−1}; "momentum", d_k − μ d_{k−1}.
      decay: "sum": v ← β v + (·)², from 1. "ema": v ← β v + (1 − β)(·)², from 0, divided
        by 1 − β^count where used; its first step uses 1 as well.
      preconditioner: D is "sqrt": 1/(√v + ε); "quarter": 1/(v^¼ + ε)².
      clip: 5.0 clips local energies to median ± 5 mean|E − median|; None does not.
      axis: the mesh axis over which the rows of `scores` are spread.
      dtype: "float32" or "float64", of linear algebra and state; None: the widest given.
      block: columns of `scores` that are converted to `dtype` at a time.

    Raises:
      UserError: an option is out of range, or float64 is asked for and x64 is disabled.
    """
    _require("beta", beta, 0 <= beta < 1, "at least 0 and below 1")
    _require("eps", eps, 0 <= eps < jnp.inf, "finite and at least 0")
    _one_of("difference", difference, "raw", "momentum")
    _one_of("decay", decay, "sum", "ema")
    _one_of("preconditioner", preconditioner, "sqrt", "quarter")

    def used(v, count):
        if decay == "ema":
            v = jnp.where(count == 0, 1, v / jnp.maximum(1 - beta**count, 1 - beta))
        if not normalize_v:
            return v
        v = jnp.where(v.max() > 0, v / v.max(), 1)  # Or v², of order d⁴, may underflow.
        return v / jnp.sqrt(jnp.mean(v**2))

    def metric(v, count):
        root = jnp.sqrt(jnp.maximum(used(v, count), jnp.finfo(v.dtype).tiny))
        return 1 / (root + eps if preconditioner == "sqrt" else (root**0.5 + eps) ** 2)

    def accumulate(v, count, step, previous):
        square = (step - (mu if difference == "momentum" else 1) * previous) ** 2
        if decay == "sum":
            return beta * used(v, count) + square
        return beta * jnp.where(count == 0, 0, v) + (1 - beta) * square

    return _with_momentum(mu, _solver(damping, **solver), metric, accumulate)


def energy_gradient(clip=None, axis: str = "data", dtype=None) -> Transformation:
    """Replaces the updates by ∂E/∂θ = −2 Õᵀ ε̃, for `optax.adam(rate)` to turn into a step.

    A refused batch gives a zero gradient. Arguments as in `scale_by_march`.
    """
    gradient = lambda batch: -2 * _transposed(batch.residual, *batch.columns) / batch.size
    return _stateless(gradient, _solver(1.0, clip, axis, dtype))


def gram(
    scores: Float[Array, "samples params"],
    weights: Float[Array, " params"],
    mean: Float[Array, " params"],
    good: Bool[Array, " samples"],
    *,
    axis: str = "data",
    block: int = 2048,
) -> Float[Array, "samples samples"]:
    """(O − mean) diag(weights) (O − mean)ᵀ in the dtype of `weights`, on every device.

    Zero where a sample is not `good`. On a mesh with `axis`, which must divide the number
    of samples, each device trades its samples of all parameters for all samples of some,
    in the dtype of `scores`; `block` columns at a time are converted and multiplied.
    """
    multiply = partial(_gram_of_columns, block=block)
    devices = dict(jax.sharding.get_abstract_mesh().shape).get(axis, 1)
    if devices == 1:
        return multiply(scores, weights, mean, good)

    def exchange(rows, *rest):
        columns = jax.lax.all_to_all(rows, axis, split_axis=1, concat_axis=0, tiled=True)
        return jax.lax.psum(multiply(columns, *rest), axis)

    pad = lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % devices)])
    split, whole = PartitionSpec(axis), PartitionSpec()
    # Or the split would spread to where they came from, to be gathered many times.
    weights, mean, good = jax.lax.with_sharding_constraint((weights, mean, good), whole)
    specs = dict(in_specs=(split, split, split, whole), out_specs=whole)
    # Unchecked: the check would not let a sum start from the same zeros on all devices.
    exchange = jax.shard_map(exchange, **specs, axis_names={axis}, check_vma=False)
    return exchange(pad(scores), pad(weights), pad(mean), good)


def _gram_of_columns(scores, weights, mean, good, block):
    cut = lambda rows, start: _slice(weights, start, rows.shape[1])
    add = lambda total, rows, start: total + _dot(rows * cut(rows, start), rows.T)
    return _fold(add, jnp.zeros((good.size,) * 2, mean.dtype), scores, mean, good, block)


def _transposed(vector, scores, mean, good, block):
    """(O − mean)ᵀ vector, over good samples."""

    def put(total, rows, start):
        return jax.lax.dynamic_update_slice(total, _dot(vector, rows), (start,))

    return _fold(put, jnp.zeros_like(mean), scores, mean, good, block)


def _fold(function, carry, scores, mean, good, block):
    """Over `block` columns at a time, so that scores are never stored in a wider dtype."""

    def step(carry, start, width):
        rows = _slice(scores, start, width, 1).astype(mean.dtype)
        rows = jnp.where(good[:, None], rows - _slice(mean, start, width), 0)
        return function(carry, rows, start)

    block = min(block, mean.size)  # The loop's body is traced even for no block.
    blocks, rest = divmod(mean.size, block)
    carry = step(carry, blocks * block, rest)
    return jax.lax.fori_loop(0, blocks, lambda i, x: step(x, i * block, block), carry)


_dot = partial(jnp.matmul, precision="highest")
_slice = jax.lax.dynamic_slice_in_dim
_Solver = namedtuple("_Solver", "damping clip axis dtype block")


class _Batch(NamedTuple):
    columns: tuple  # scores [B, P], raw; their mean [P]; which are good [B]; `block`
    size: Array  # how many are good
    residual: Array  # [B], √B ε̃
    usable: Array  # at most 1 % are bad


def _solver(damping, clip=None, axis="data", dtype=None, block=2048):
    _require("damping", damping, 0 < damping < jnp.inf, "finite and above 0")
    _require("clip", clip, clip is None or 0 < clip < jnp.inf, "above 0, or None")
    _require("block", block, block >= 1, "at least 1")
    if dtype is not None:
        _one_of("dtype", dtype := jnp.dtype(dtype).name, "float32", "float64")
    return _Solver(damping, clip, axis, dtype, block)


def _require(name, value, holds, allowed):
    if not holds:
        raise reject(f"optim.{name}", value, allowed)


def _one_of(name, value, *choices):
    _require(name, value, value in choices, " or ".join(map(repr, choices)))


def _dtype(solver, *arrays):
    if solver.dtype == "float64" and jnp.zeros(()).dtype != "float64":
        raise reject("precision.linalg", "float64", "'float32' while x64 is disabled")
    return jnp.dtype(solver.dtype or jnp.result_type(jnp.float32, *arrays))


def _stateless(vector, solver):
    def update(updates, state, params=None, *, scores, local_energy, **extra):
        batch = _centre(scores, local_energy, solver)
        return _accept(vector(batch), updates, params, batch.usable)[0], state

    return Transformation(lambda _: optax.EmptyState(), update)


def _with_momentum(mu, solver, metric=None, accumulate=None):
    """`metric`: v, count -> diagonal of D; `accumulate`: v, count, d_k, d_{k−1} -> v."""
    _require("mu", mu, 0 <= mu < 1, "at least 0 and below 1")

    def init(params):
        phi = jnp.zeros(optax.tree.size(params), _dtype(solver, jnp.zeros(())))
        v = jnp.ones_like(phi) if metric else optax.EmptyState()
        return NaturalGradientState(jnp.zeros((), jnp.int32), phi, v)

    def update(updates, state, params=None, *, scores, local_energy, **extra):
        batch = _centre(scores, local_energy, solver)
        count, phi, v = state
        phi, v = jax.tree.map(lambda x: x.astype(batch.residual.dtype), (phi, v))
        step = _direction(batch, solver, mu * phi, metric and metric(v, count))
        v = accumulate(v, count, step, phi) if metric else v
        update, accepted = _accept(step, updates, params, batch.usable, v)
        new = NaturalGradientState(optax.safe_increment(count), step, v)
        keep = lambda new, old: jnp.where(accepted, new.astype(old.dtype), old)
        return update, jax.tree.map(keep, new, state)

    return Transformation(init, update)


def _centre(scores, energy, solver):
    dtype = _dtype(solver, scores, energy)
    good = jnp.isfinite(energy) & jnp.isfinite(scores).all(axis=1)
    size = jnp.maximum(good.sum(), 1).astype(dtype)
    average = lambda x: jnp.where(good, x, 0).sum() / size
    energy = energy.astype(jnp.result_type(energy, dtype))
    if solver.clip is not None:
        median = jnp.nanmedian(jnp.where(good, energy, jnp.nan))
        width = solver.clip * average(jnp.abs(energy - median))
        energy = jnp.clip(energy, median - width, median + width)
    residual = jnp.where(good, average(energy) - energy, 0).astype(dtype)
    zero = jnp.zeros(scores.shape[1], dtype)
    mean = _transposed(good / size, scores, zero, good, solver.block)
    usable = 100 * (~good).sum() <= good.size
    return _Batch((scores, mean, good, solver.block), size, residual, usable)


def _direction(batch, solver, phi=None, metric=None):
    """φ + D Õᵀ (Õ D Õᵀ + λ)⁻¹ (ε̃ − Õ φ); φ = 0 and D = 1 where not given."""
    (scores, mean, good, block), size, residual, _ = batch
    phi = jnp.zeros_like(mean) if phi is None else phi
    metric = jnp.ones_like(mean) if metric is None else metric
    matrix = gram(scores, metric, mean, good, axis=solver.axis, block=block)
    # The residual is orthogonal to 1, which Õᵀ sends to 0: adding 1 1ᵀ changes nothing
    # but keeps one eigenvalue away from zero.
    matrix = ((matrix + matrix.T) / 2 + jnp.outer(good, good)) / size
    minus = lambda x, rows, start: x - _dot(rows, _slice(phi, start, rows.shape[1]))
    residual = _fold(minus, residual, *batch.columns)
    solution = _solve(matrix, residual, solver.damping)  # Times √B, like the residual.
    return phi + metric * _transposed(solution, *batch.columns) / size


def _solve(matrix, vector, damping):
    """(matrix + damping)⁻¹ vector, also where rounding made the matrix indefinite."""
    factor = jnp.linalg.cholesky(matrix + jnp.diag(jnp.full_like(vector, damping)))
    solution = jax.scipy.linalg.cho_solve((factor, True), vector)

    def by_eigenvalues():
        values, vectors = jnp.linalg.eigh(matrix)
        # Smaller ones, negative or not, are rounding; dividing by them makes noise.
        values = jnp.maximum(values, jnp.finfo(values.dtype).eps * values.max())
        return _dot(vectors, _dot(vectors.T, vector) / (values + damping))

    return jax.lax.cond(jnp.isfinite(solution).all(), lambda: solution, by_eigenvalues)


def _accept(step, updates, params, usable, v=()):
    """The step as a tree, or zeros if not all is usable and finite; and whether it is."""
    flat, unravel = ravel_pytree(updates if params is None else params)
    cast = step.astype(flat.dtype)
    accepted = usable & jnp.isfinite(ravel_pytree((step, cast, v))[0]).all()
    return unravel(jnp.where(accepted, cast, 0)), accepted
