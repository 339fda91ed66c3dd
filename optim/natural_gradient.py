"""Natural-gradient steps for variational Monte Carlo: minSR, SPRING and MARCH.

With B samples, scores O = ∂ log|ψ|/∂θ, local energies E and means over samples,

    Õ = (O − mean O)/√B,   ε̃ = −(E − mean E)/√B,   φ = μ d_{k−1},   D = diag(≈ 1/√v),
    d_k = φ + D Õᵀ (Õ D Õᵀ + λ)⁻¹ (ε̃ − Õ φ),

the minimiser of ‖Õ d − ε̃‖²/λ + (d − φ)ᵀ D⁻¹ (d − φ).

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
      mu: momentum, in [0, 1). `beta`: decay of v, in [0, 1). `damping`: λ > 0.
      eps: at least 0; bounds D where v vanishes.
      normalize_v: use v/rms(v), so that λ keeps its meaning while v drifts; "sum" then
        also continues from it, as in the authors' code.
      difference: whose square enters v: "raw", d_k − d_{k−1}; "momentum", d_k − μ d_{k−1}.
      decay: "sum": v ← β v + (·)², from 1. "ema": v ← β v + (1 − β)(·)², from 0, divided
        by 1 − β^count where used; its first step uses 1 as well.
      preconditioner: D is "sqrt": 1/(√v + eps); "quarter": 1/(v^¼ + eps)².
      clip: 5.0 clips local energies to median ± 5 mean|E − median|; None does not.
      axis: the mesh axis over which the rows of `scores` are spread.
      dtype: of linear algebra and state, "float32" or "float64". None: the widest of
        `scores` and `local_energy`; for the state, JAX's default.
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
        if normalize_v:  # v is of order d²: its own square may underflow.
            v = jnp.where(v.max() > 0, v / v.max(), 1)
            v = v / jnp.sqrt(jnp.mean(v**2))
        return v

    def metric(v, count):
        v = jnp.maximum(used(v, count), jnp.finfo(v.dtype).tiny)
        quarter = preconditioner == "quarter"
        return (v**0.25 + eps) ** -2 if quarter else 1 / (jnp.sqrt(v) + eps)

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
    solver = _solver(1.0, clip, axis, dtype)  # There is nothing to damp.
    gradient = lambda batch: -2 * (_rows(batch) * batch.residual[:, None]).sum(axis=0)
    return _stateless(gradient, solver)


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

    Zero where a sample is not `good`. On a mesh with `axis`, which must divide the number
    of samples, each device trades its samples of all parameters for all samples of some,
    in the dtype of `scores`; `block` columns at a time are converted and multiplied.
    """
    devices, multiply = _devices(axis), partial(_gram_of_columns, block=block)
    if devices == 1:
        return multiply(scores, weights, mean, good)

    def exchange(rows, *rest):
        columns = jax.lax.all_to_all(rows, axis, split_axis=1, concat_axis=0, tiled=True)
        return jax.lax.psum(multiply(columns, *rest), axis)

    pad = lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % devices)])
    split, whole = PartitionSpec(axis), PartitionSpec()
    specs = dict(in_specs=(split, split, split, whole), out_specs=whole)
    exchange = jax.shard_map(exchange, **specs, axis_names={axis})
    return exchange(pad(scores), pad(weights), pad(mean), good)


def _gram_of_columns(scores, weights, mean, good, block):
    def product(start, width):
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=width)
        centred = cut(scores, axis=1).astype(weights.dtype) - cut(mean)
        centred = jnp.where(good[:, None], centred, 0)
        return jnp.matmul(centred * cut(weights), centred.T, precision="highest")

    block = min(block, scores.shape[1])  # The loop's body is traced even for no block.
    blocks, rest = divmod(scores.shape[1], block)
    # A carry that starts as zeros would not vary over the mesh, as shard_map wants it to.
    last = product(blocks * block, rest)
    add = lambda i, total: total + product(i * block, block)
    return jax.lax.fori_loop(0, blocks, add, last)


_Solver = namedtuple("_Solver", "damping clip axis dtype block")


class _Batch(NamedTuple):
    scores: Array  # [B, P], raw; centred where they are used, so that no copy is stored
    mean: Array  # [P]
    good: Array  # [B]
    size: Array  # how many are good
    residual: Array  # [B], ε̃
    usable: Array  # at most 1 % are bad


def _solver(damping, clip=None, axis="data", dtype=None, block=4096):
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
        like = updates if params is None else params
        return _accept(vector(batch), like, batch.usable)[0], state

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
        phi, v = jax.tree.map(lambda x: x.astype(batch.mean.dtype), (phi, v))
        step = _direction(batch, solver, mu * phi, metric and metric(v, count))
        v = accumulate(v, count, step, phi) if metric else v
        like = updates if params is None else params
        update, accepted = _accept(step, like, batch.usable, v)
        new = NaturalGradientState(optax.safe_increment(count), step, v)
        keep = lambda new, old: jnp.where(accepted, new.astype(old.dtype), old)
        return update, jax.tree.map(keep, new, state)

    return Transformation(init, update)


def _centre(scores, energy, solver):
    dtype = _dtype(solver, scores, energy)
    good = jnp.isfinite(energy) & jnp.isfinite(scores).all(axis=1)
    good, energy = _everywhere((good, energy), solver.axis)
    size = jnp.maximum(good.sum(), 1).astype(dtype)
    average = lambda x: jnp.where(good, x, 0).sum() / size
    energy = energy.astype(jnp.result_type(energy, dtype))
    if solver.clip is not None:
        median = jnp.nanmedian(jnp.where(good, energy, jnp.nan))
        width = solver.clip * average(jnp.abs(energy - median))
        energy = jnp.clip(energy, median - width, median + width)
    residual = (jnp.where(good, average(energy) - energy, 0) / jnp.sqrt(size)).astype(dtype)
    mean = jnp.where(good[:, None], scores, 0).sum(axis=0, dtype=dtype) / size
    usable = 100 * (~good).sum() <= good.size
    return _Batch(scores, _everywhere(mean, solver.axis), good, size, residual, usable)


def _rows(batch):
    # To be multiplied and summed only: XLA fuses a sum with this conversion, whereas for
    # a matrix product it would store all scores in the wider dtype.
    centred = batch.scores.astype(batch.mean.dtype) - batch.mean
    return jnp.where(batch.good[:, None], centred, 0) / jnp.sqrt(batch.size)


def _direction(batch, solver, phi=0.0, metric=None):
    """φ + D Õᵀ (Õ D Õᵀ + λ)⁻¹ (ε̃ − Õ φ); D = 1 without `metric`."""
    scores, mean, good, size, residual, _ = batch
    metric = jnp.ones_like(mean) if metric is None else metric
    residual = _everywhere(residual - (_rows(batch) * phi).sum(axis=1), solver.axis)
    matrix = gram(scores, metric, mean, good, axis=solver.axis, block=solver.block)
    # The residual is orthogonal to 1, which Õᵀ sends to 0: adding 1 1ᵀ changes nothing
    # but keeps one eigenvalue away from zero.
    matrix = ((matrix + matrix.T) / 2 + jnp.outer(good, good)) / size
    solution = _solve(matrix, residual, solver.damping)
    return phi + metric * (_rows(batch) * solution[:, None]).sum(axis=0)


def _solve(matrix, vector, damping):
    """(matrix + damping)⁻¹ vector, also where rounding made the matrix indefinite."""
    shift = damping * jnp.eye(vector.size, dtype=matrix.dtype)
    factor = jnp.linalg.cholesky(matrix + shift)
    solution = jax.scipy.linalg.cho_solve((factor, True), vector)

    def by_eigenvalues():
        values, vectors = jnp.linalg.eigh(matrix)
        dot = partial(jnp.matmul, precision="highest")
        return dot(vectors, dot(vectors.T, vector) / (jnp.maximum(values, 0) + damping))

    return jax.lax.cond(jnp.isfinite(solution).all(), lambda: solution, by_eigenvalues)


def _accept(step, like, usable, v=()):
    """The step as a tree like `like`, or zeros; and whether all is usable and finite."""
    flat, unravel = ravel_pytree(like)
    cast = step.astype(flat.dtype)
    accepted = usable & jnp.isfinite(ravel_pytree((step, cast, v))[0]).all()
    return unravel(jnp.where(accepted, cast, 0)), accepted


def _devices(axis):
    return dict(jax.sharding.get_abstract_mesh().shape).get(axis, 1)


def _everywhere(arrays, axis):
    """Replicated, so that what follows inherits no split and is not gathered again."""
    replicate = lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec())
    return arrays if _devices(axis) == 1 else jax.tree.map(replicate, arrays)
