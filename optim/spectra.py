"""Spectra of weight matrices: the squared singular values of every module of a network.

For all modules of a network together (`modules.select` finds them)

    1. each leaf gives its Gram matrices on the smaller side, [modules, r, r];
    2. those of equal r go into one pack, whatever leaf they come from;
    3. each device decomposes its share of a pack and only eigenvalues are gathered.

Only eigenvalues are computed where the platform allows it: a tridiagonal form and
bisection, limited to the part of the spectrum that is asked for.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from optim.modules import Leaf, matrices

METHODS = ("auto", "gram", "tridiagonal", "svd")
SMALL = 128
# Largest over median eigenvalue from which float32 Gram matrices lose the tail.
LOST = 1e5
# Eigenvalues below this share of the largest are rounding, in units of eps (Gram) and of
# eps^2 (singular values).
ROUNDING = 4.0


def esd(
    w: Float[Array, "*batch n m"], method: str = "auto", first: int = 0
) -> Float[Array, "*batch k"]:
    """Eigenvalues of the smaller Gram matrix, not normalised, ascending, float32 or wider.

    Args:
      w: matrices of one shape, any floating dtype; bfloat16 is cast first.
      method: "gram", eigenvalues of W^T W; "tridiagonal", the same without vectors, CPU and
        GPU; "svd", singular values, four times as slow and exact to the last small one;
        "auto", the first that is good, and singular values where float32 has lost the tail.
      first: of the r values, those from this index on.

    Returns:
      the r - first largest. Zero and what is below rounding is raised to rounding, so that
      logarithms exist; a matrix of zeros stays zero. NaN where an entry is not finite.
    """
    batch, (n, m) = w.shape[:-2], w.shape[-2:]
    leaf = Leaf("w", 0, (int(np.prod(batch)), n, m), (1,), (2,), 1)
    (found,) = eigenvalues([leaf], [w.reshape(leaf.shape)], method, lambda r: first)
    return found.reshape(*batch, -1)


def eigenvalues(
    leaves: list[Leaf],
    weights: list[Array],
    method: str = "auto",
    first: Callable[[int], int] = lambda r: 0,
) -> list[Float[Array, "..."]]:
    """`esd` of all modules of all leaves together, a few batched decompositions.

    Args:
      leaves: what the weights mean.
      weights: one array per leaf.
      method: as in `esd`.
      first: r -> index of the first eigenvalue wanted.

    Returns:
      for each leaf [*modules, r - first(r)].
    """
    if method == "svd":
        return [_clamped(_by_svd(a, w, first(a.rank)), 2) for a, w in _pairs(leaves, weights)]
    grams = [_gram(leaf, w) for leaf, w in _pairs(leaves, weights)]
    found: list = [None] * len(leaves)
    for r in sorted({leaf.rank for leaf in leaves}):
        members = [i for i, leaf in enumerate(leaves) if leaf.rank == r]
        pack = jnp.concatenate([grams[i][0].reshape(-1, r, r) for i in members])
        values = _split(lambda g, r=r: _decompose(g, method, first(r)), pack)
        ends = np.cumsum([int(np.prod(leaves[i].modules)) for i in members])
        for i, part in zip(members, jnp.split(values, ends[:-1]), strict=True):
            scale = grams[i][1]
            shaped = part.reshape(*leaves[i].modules, -1) * scale[..., None] ** 2
            found[i] = _clamped(shaped, 1)
    if method != "auto":
        return found
    return [
        _unless_lost(leaf, w, values, first(leaf.rank))
        for (leaf, w), values in zip(_pairs(leaves, weights), found, strict=True)
    ]


def _pairs(leaves, weights):
    for leaf, w in zip(leaves, weights, strict=True):
        yield leaf, w.astype(jnp.promote_types(w.dtype, jnp.float32))


def _gram(leaf, w):
    """[*modules, r, r] of the matrices over their largest entry, and that entry."""
    w = matrices(leaf, w)
    scale = jnp.max(jnp.abs(w), axis=(-2, -1))
    w = w / jnp.where(scale > 0, scale, 1)[..., None, None]
    n, m = leaf.sides
    form = "...nk,...mk->...nm" if n <= m else "...kn,...km->...nm"
    return jnp.einsum(form, w, w.conj(), precision="highest"), scale


def _split(function: Callable, pack: Float[Array, "b n m"]) -> Float[Array, "b k"]:
    """`function` of a pack, each device of the mesh in use doing its share of the batch."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(pack)
    axes, size = mesh.axis_names, len(pack)
    rest = jnp.broadcast_to(pack[:1], (-size % mesh.size, *pack.shape[1:]))
    pack = jnp.concatenate([pack, rest])
    pack = jax.lax.with_sharding_constraint(pack, P(axes))
    values = jax.shard_map(function, in_specs=P(axes), out_specs=P(axes), check_vma=False)(pack)
    return jax.lax.with_sharding_constraint(values, P())[:size]


def _decompose(pack, method, first):
    """Eigenvalues [b, r - first] of [b, r, r], ascending."""
    r = pack.shape[-1]
    if method == "auto":
        # Bisection takes many small steps; small matrices are done before it starts.
        small = r < SMALL or jax.default_backend() == "tpu"
        method = "gram" if small else "tridiagonal"
    if method == "gram" or r < 3:
        return jnp.linalg.eigvalsh(pack)[..., first:]
    # LAPACK is told nothing of numbers that are none; they come back as NaN.
    good = jnp.isfinite(pack).all(axis=(-2, -1))
    _, d, e, _ = jax.lax.linalg.tridiagonal(jnp.where(good[:, None, None], pack, 0))
    bisect = lambda d, e: jax.scipy.linalg.eigh_tridiagonal(
        d, e, eigvals_only=True, select="i", select_range=(first, r - 1)
    )
    return jnp.where(good[:, None], jax.vmap(bisect)(d, e), jnp.nan)


def _by_svd(leaf, w, first):
    w = matrices(leaf, w)
    good = jnp.isfinite(w).all(axis=(-2, -1))
    safe = jnp.where(good[..., None, None], w, 0).reshape(-1, *leaf.sides)
    values = _split(lambda a: jnp.linalg.svd(a, compute_uv=False), safe)
    values = values.reshape(*leaf.modules, -1)[..., ::-1][..., first:]
    return jnp.where(good[..., None], values, jnp.nan) ** 2


def _clamped(values, power):
    """Not below rounding; `power` 1 for Gram matrices, 2 for singular values."""
    largest = values[..., -1:]
    return jnp.maximum(values, ROUNDING * jnp.finfo(values.dtype).eps ** power * largest)


def _unless_lost(leaf, w, values, first):
    """Singular values for a leaf with a module whose tail Gram matrices cannot hold."""
    middle = max(leaf.rank // 2 - first, 0)
    limit = LOST * 1e-7 / jnp.finfo(values.dtype).eps
    lost = jnp.any(values[..., -1] > limit * values[..., middle])
    exact = lambda: _clamped(_by_svd(leaf, w, first), 2)
    return jax.lax.cond(lost, exact, lambda: values)
