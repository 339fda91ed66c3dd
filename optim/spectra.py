"""Spectra of weight matrices: the squared singular values of every module of a network.

For all modules of a network together (`modules.select` finds them)

    1. each leaf gives its Gram matrices on the smaller side, [modules, r, r];
    2. those of equal r and type go into one pack, whatever leaf they come from;
    3. each device decomposes its share of a pack and only eigenvalues are gathered.

Singular values are found likewise, in packs of equal sides, transposed where needed.

Devices are those of the mesh in use (`jax.set_mesh`): its Auto and Explicit axes. Each device
multiplies its part of the longer side and the Gram matrices are summed, so shards of weights
change places, but no weight is gathered (`_along` has the exception); the sums, [M, r, r],
are on every device until it has taken its share. Along Manual axes, inside `shard_map`,
every device has matrices of its own.

"tridiagonal" (a tridiagonal form and bisection, limited to the part of the spectrum that is
asked for) computes no vectors. `eigvalsh`, behind "gram", computes them and throws them
away; "auto" takes it nevertheless where that is faster, below r = 128, and on TPU, where
there is no other.
"""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from common.errors import reject
from optim.modules import Leaf, matrices

METHODS = ("auto", "gram", "tridiagonal", "svd")
SMALL = 128
# Largest over smallest eigenvalue of use from which float32 Gram matrices lose the latter.
LOST = 1e5
# Eigenvalues below this share of the largest are rounding, in units of eps (Gram) and of
# eps^2 (singular values).
ROUNDING = 4.0
# Of the largest entry of a `bounded` matrix: the squares fit into float32 with room to spare.
BOUND = 2.0**40


def esd(
    w: Float[Array, "..."],
    method: str = "auto",
    first: int | None = None,
    exact: int | None = None,
    bounded: bool = False,
) -> Float[Array, "..."]:
    """Eigenvalues of the smaller Gram matrix, not normalised, ascending, float32 or wider.

    Args:
      w: [*batch, n, m], matrices of one shape, any floating dtype; bfloat16 is cast first.
      method: "gram", eigenvalues of W^T W; "tridiagonal", the same without vectors, CPU and
        GPU; "svd", singular values, several times as slow and exact to the last small one;
        "auto", the first that is good, and singular values where float32 has lost what is
        read.
      first: of the r values, those from this index on; None: all.
      exact: what is read, for "auto": the values from this index on. None: from the median
        on, or from `first` where that is given and less. So for a tail above a half, or for
        `exponents.clauset_alpha`, which reads all, give it (0) or take "svd".
      bounded: matrices whose largest entry is not within 2^-40 .. 2^40 are scaled to be so,
        for what does not depend on scale. Without it float32 eigenvalues of entries beyond
        about 1e-19 .. 1e19 are 0 or infinite, as eigenvalues are squares.

    Returns:
      [*batch, r - first], the largest. Zero and what is below rounding is raised to
      rounding, so that logarithms exist; a matrix of zeros stays zero. NaN where an entry
      is not finite.

    Raises:
      UserError: there is no matrix, an unknown method, or no such index.
    """
    if w.ndim < 2 or 0 in w.shape:
        raise reject("optim.alphadecay.esd", w.shape, "a shape (*batch, n, m) without zeros")
    batch, (n, m) = w.shape[:-2], w.shape[-2:]
    leaf = Leaf("w", 0, (int(np.prod(batch)), n, m), (1,), (2,), 1)
    always = lambda index: None if index is None else lambda r: index
    w = w.reshape(leaf.shape)
    (found,) = eigenvalues([leaf], [w], method, always(first), always(exact), bounded)
    return found.reshape(*batch, -1)


def eigenvalues(
    leaves: list[Leaf],
    weights: list[Array],
    method: str = "auto",
    first: Callable[[int], int] | None = None,
    exact: Callable[[int], int] | None = None,
    bounded: bool = False,
) -> list[Float[Array, "..."]]:
    """`esd` of all modules of all leaves together, a few batched decompositions.

    Args:
      leaves: what the weights mean.
      weights: one array per leaf.
      method, bounded: as in `esd`.
      first, exact: r -> index, as in `esd`.

    Returns:
      for each leaf [*modules, r - first(r)], the same on all devices.

    Raises:
      UserError: an unknown method, or no such index.
    """
    if method not in METHODS:
        raise reject("optim.alphadecay.method", method, f"one of {', '.join(METHODS)}")
    if exact is None:
        exact = lambda r: r // 2 if first is None else min(first(r), r // 2)
    start = first or (lambda r: 0)
    for r in sorted({leaf.rank for leaf in leaves}):
        for name, index in (("first", start(r)), ("exact", exact(r))):
            if not 0 <= index < r:
                allowed = f"an index from 0 to {r - 1}"
                raise reject(f"optim.alphadecay.{name}", index, allowed)
    find = lambda weights: _eigenvalues(leaves, weights, method, start, exact, bounded)
    if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
        return jax.sharding.auto_axes(find, out_sharding=P())(weights)
    return find(weights)


def _eigenvalues(leaves, weights, method, first, exact, bounded):
    wide = [w.astype(jnp.promote_types(w.dtype, jnp.float32)) for w in weights]
    found: list = [None] * len(leaves)
    if method != "svd":
        grams = [_gram(leaf, w) for leaf, w in zip(leaves, wide, strict=True)]
        for (r, _), members in _groups(lambda i: (leaves[i].rank, wide[i].dtype.name), leaves):
            function = lambda g, r=r: _decompose(g, method, first(r))
            values = _packed(function, [grams[i][0] for i in members])
            for i, part in zip(members, values, strict=True):
                scale = _bounded(grams[i][1]) if bounded else grams[i][1]
                found[i] = _clamped(part * scale[..., None] ** 2, 1)
    if method not in ("svd", "auto"):
        return found
    kind = lambda i: (leaves[i].rank, max(leaves[i].sides), wide[i].dtype.name)
    for (r, _, _), members in _groups(kind, leaves):
        those = [(leaves[i], wide[i]) for i in members]
        singular = lambda those=those, r=r: _by_svd(those, first(r), bounded)
        if method == "svd":
            values = singular()
        else:
            place = max(exact(r) - first(r), 0)
            values = _unless_lost([found[i] for i in members], place, singular)
        for i, value in zip(members, values, strict=True):
            found[i] = value
    return found


def _groups(kind: Callable, leaves: list[Leaf]) -> list[tuple]:
    """(kind, the indices of that kind), sorted."""
    kinds = [kind(i) for i in range(len(leaves))]
    return [(k, [i for i, other in enumerate(kinds) if other == k]) for k in sorted({*kinds})]


def _gram(leaf, w):
    """[*modules, r, r] of the matrices over their largest entry, and that entry."""
    w = matrices(leaf, w)
    n, m = leaf.sides
    w = _along(w, -1 if n <= m else -2)
    scale = jnp.max(jnp.abs(w), axis=(-2, -1))
    w = w / jnp.where(scale > 0, scale, 1)[..., None, None]
    form = "...nk,...mk->...nm" if n <= m else "...kn,...km->...nm"
    return _everywhere(jnp.einsum(form, w, w.conj(), precision="highest")), scale


def _bounded(scale):
    return jnp.clip(scale, 1 / BOUND, BOUND)


def _devices() -> tuple[tuple[str, ...], int]:
    """The axes over which work may be split, and of how many devices they are."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    axes = tuple(name for name, kind in kinds if kind == AxisType.Auto)
    return axes, _size(axes)


def _size(axes: tuple[str, ...]) -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return int(np.prod([mesh.shape[name] for name in axes]))


def _dividing(length: int) -> tuple[str, ...]:
    """The axes of most devices that divide `length`; all if none do."""
    axes, _ = _devices()
    some = [c for count in range(len(axes)) for c in itertools.combinations(axes, count + 1)]
    fit = [c for c in some if _size(c) > 1 and length % _size(c) == 0]
    return max(fit, key=_size, default=axes)


def _along(w: Array, axis: int) -> Array:
    """The same matrices with shards along their longer side.

    Over as many devices as divide it; over all if none do, with zeros at its end. Before
    it puts these there, the partitioner gathers a weight if the mesh has several axes.
    """
    if _devices()[1] == 1:
        return w
    pad, spec = [(0, 0)] * w.ndim, [None] * w.ndim
    spec[axis] = _dividing(w.shape[axis])
    # Neither Gram matrices nor singular values see zeros on the longer side.
    pad[axis] = (0, -w.shape[axis] % _size(spec[axis]))
    return jax.lax.with_sharding_constraint(jnp.pad(w, pad), P(*spec))


def _everywhere(x: Array) -> Array:
    return x if _devices()[1] == 1 else jax.lax.with_sharding_constraint(x, P())


def _packed(function: Callable, arrays: Sequence[Array]) -> list[Array]:
    """`function`, [b, n, m] -> [b, k], of arrays [*modules, n, m] together."""
    pack = jnp.concatenate([a.reshape(-1, *a.shape[-2:]) for a in arrays])
    values = _split(function, pack)
    ends = np.cumsum([int(np.prod(a.shape[:-2])) for a in arrays])
    parts = jnp.split(values, ends[:-1])
    return [v.reshape(*a.shape[:-2], -1) for a, v in zip(arrays, parts, strict=True)]


def _split(function: Callable, pack: Float[Array, "b n m"]) -> Float[Array, "b k"]:
    """`function` of a pack, each device of the mesh in use doing its share of the batch."""
    axes, devices = _devices()
    if devices == 1:
        return function(pack)
    size = len(pack)
    pack = jnp.pad(pack, ((0, -size % devices), (0, 0), (0, 0)))
    # From `_along` by way of the same axes: the partitioner would gather on a longer leap.
    pack = jax.lax.with_sharding_constraint(pack, P(_dividing(pack.shape[-1])))
    pack = jax.lax.with_sharding_constraint(pack, P(axes))
    if jax.default_backend() == "cpu":
        # LAPACK calls share a batch out to the threads that run them; when as many devices
        # as there are threads wait for that, all wait for ever.
        one = lambda matrix: function(matrix[None])[0]
        share = lambda part: jax.lax.map(one, part)
    else:
        share = function
    values = jax.shard_map(
        share, in_specs=P(axes), out_specs=P(axes), axis_names={*axes}, check_vma=False
    )(pack)
    return _everywhere(values)[:size]


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


def _by_svd(members, first, bounded):
    """For (leaf, weights) of equal sides, either way round, [*modules, r - first] each."""
    safe, good = [], []
    for leaf, w in members:
        w = matrices(leaf, w)
        w = w if leaf.sides[0] <= leaf.sides[1] else jnp.swapaxes(w, -1, -2)
        w = _along(w, -1)  # From there a pack goes to its devices without a gather.
        good.append(jnp.isfinite(w).all(axis=(-2, -1))[..., None])
        w = jnp.where(good[-1][..., None], w, 0)
        if bounded:
            scale = jnp.max(jnp.abs(w), axis=(-2, -1), keepdims=True)
            w = w * jnp.where(scale > 0, _bounded(scale) / jnp.where(scale > 0, scale, 1), 1)
        safe.append(w)
    values = _packed(lambda a: jnp.linalg.svd(a, compute_uv=False), safe)
    ascending = [v[..., ::-1][..., first:] for v in values]
    return [
        _clamped(jnp.where(g, v, jnp.nan) ** 2, 2) for g, v in zip(good, ascending, strict=True)
    ]


def _clamped(values, power):
    """Not below rounding; `power` 1 for Gram matrices, 2 for singular values."""
    largest = values[..., -1:]
    return jnp.maximum(values, ROUNDING * jnp.finfo(values.dtype).eps ** power * largest)


def _unless_lost(values, place, singular):
    """Singular values for a pack with a module whose `place` Gram matrices cannot hold."""
    limit = LOST * 1e-7 / jnp.finfo(values[0].dtype).eps
    lost = [jnp.any(v[..., -1] > limit * v[..., place]) for v in values]
    return jax.lax.cond(jnp.any(jnp.stack(lost)), singular, lambda: values)
