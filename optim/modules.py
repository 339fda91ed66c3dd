"""Which parameters are modules, and how a leaf of them is cut into matrices.

A leaf holds one module or many: layers stacked for a scan, experts, a fused qkv. Rank alone
cannot tell, since stacked norm scales have two axes as well; so the caller says it, with
`Dims`, in the manner of the dimension numbers of `optax.contrib`.
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from common.errors import UserError

# Ends of a path that say nothing of what a module is.
SILENT = ("kernel", "weight", "w", "embedding")

# Optax has a message of its own for this, but not in public.
NO_PARAMS = "Weight decay needs the parameters: call `update(updates, state, params)`."


class Dims(NamedTuple):
    """Which axes of a leaf make a matrix, as in `optax.contrib.MuonDimensionNumbers`.

    Axes that are neither are batch axes: each of their indices is a module. So `Dims()` is
    a matrix, or a stack of them along the axes before the last two.
    """

    reduction_axis: int | tuple[int, ...] = -2
    output_axis: int | tuple[int, ...] = -1
    parts: int = 1  # Matrices fused along the merged output axes, as q, k, v often are.


class Leaf(NamedTuple):
    """One selected leaf of the parameters."""

    name: str  # Its path, dotted.
    index: int  # Its place among `jax.tree.leaves(params)`.
    shape: tuple[int, ...]
    reduction: tuple[int, ...]  # Axes, not negative.
    output: tuple[int, ...]
    parts: int
    dtype: str = "float32"  # Of what is computed from it: that of the leaf, or wider.

    @property
    def batch(self) -> tuple[int, ...]:
        """The axes that count modules."""
        used = self.reduction + self.output
        return tuple(a for a in range(len(self.shape)) if a not in used)

    @property
    def modules(self) -> tuple[int, ...]:
        """Shape of what there is one number per module of."""
        counts = tuple(self.shape[a] for a in self.batch)
        return counts + ((self.parts,) if self.parts > 1 else ())

    @property
    def sides(self) -> tuple[int, int]:
        """Inputs and outputs of a module's matrix."""
        n = int(np.prod([self.shape[a] for a in self.reduction]))
        return n, int(np.prod([self.shape[a] for a in self.output])) // self.parts

    @property
    def rank(self) -> int:
        """How many eigenvalues a module has."""
        return min(self.sides)

    @property
    def kind(self) -> str:
        """The type of its modules: the last part of the path that says something."""
        words = [w for w in self.name.split(".") if w not in SILENT and not w.isdigit()]
        return words[-1] if words else self.name

    def names(self) -> list[str]:
        """One name per module: `blocks.q[3]` where a leaf holds several."""
        if not self.modules:
            return [self.name]
        places = itertools.product(*map(range, self.modules))
        return [f"{self.name}[{','.join(map(str, place))}]" for place in places]


def matrices(leaf: Leaf, w: Array) -> Array:
    """A leaf as matrices, inputs by outputs: [*modules, n, m]."""
    n, m = leaf.sides
    w = jnp.transpose(w, leaf.batch + leaf.reduction + leaf.output)
    counts = tuple(leaf.shape[a] for a in leaf.batch)
    if leaf.parts == 1:
        return w.reshape(*counts, n, m)
    return jnp.moveaxis(w.reshape(*counts, n, leaf.parts, m), -2, -3)


def spread(leaf: Leaf, value: Float[Array, "..."]) -> Array:
    """One number per module [*modules], in a shape that multiplies the leaf."""
    counts = tuple(leaf.shape[a] for a in leaf.batch)
    if leaf.parts == 1:
        value = value.reshape(counts + (1,) * (len(leaf.shape) - len(counts)))
    else:
        outputs = tuple(leaf.shape[a] for a in leaf.output)
        value = jnp.repeat(value, leaf.sides[1], axis=-1)
        value = value.reshape(counts + (1,) * len(leaf.reduction) + outputs)
    order = leaf.batch + leaf.reduction + leaf.output
    return jnp.transpose(value, np.argsort(order))


def select(params: Any, modules: Any) -> list[Leaf]:
    """The leaves that hold modules, in the order of the tree.

    Args:
      params: arrays or their shapes; None and `optax.MaskedNode` are passed over.
      modules: (dotted path, leaf) -> what the leaf is, or a tree of that over the leaves:
        `Dims`; True, a matrix; None or False, no module. `Dims()` for a leaf with more than
        two axes says that the last two are the matrix and the others count modules.

    Raises:
      UserError: nothing is selected, or what is no matrix.
    """
    named = jax.tree_util.tree_leaves_with_path(params, is_leaf=absent)
    if callable(modules):
        dims = [None if absent(a) else modules(dotted(path), a) for path, a in named]
    else:
        # Dims are tuples and None is no leaf: what stands there decides.
        ends = lambda x: absent(x) or hasattr(x, "reduction_axis")
        dims = jax.tree.leaves(modules, is_leaf=ends)
        if len(dims) != len(named):
            names = ", ".join(dotted(path) for path, _ in named[:8])
            raise UserError(
                f"The tree of modules has {len(dims)} leaves, but the parameters have "
                f"{len(named)}: {names or 'none'}."
            )
    there = [
        (dotted(path), leaf, d)
        for (path, leaf), d in zip(named, dims, strict=True)
        if not absent(leaf)
    ]
    if not there:
        raise UserError("There are no parameters to select modules from.")
    near = _matrices(there)
    found = [
        _leaf(name, i, leaf, d, near)
        for i, (name, leaf, d) in enumerate(there)
        if not (absent(d) or (_is_bool(d) and not d))
    ]
    if not found:
        raise UserError(f"No parameter is selected as a module; {near}.")
    return found


def _matrices(named) -> str:
    """What could have been selected: the first few leaves that may be matrices."""
    names = [name for name, leaf, _ in named if len(np.shape(leaf)) >= 2]
    if not names:
        return "there are none with two axes"
    return f"there are {', '.join(names[:5])} with two axes or more"


def _leaf(name: str, index: int, leaf: Any, dims: Any, near: str) -> Leaf:
    shape = tuple(np.shape(leaf))
    rank = len(shape)
    if _is_bool(dims):
        if rank > 2:
            raise UserError(
                f"The parameter {name} of shape {shape} is selected by True, but needs its "
                f"axes said, such as Dims({rank - 2}, {rank - 1}), having more than two."
            )
        dims = Dims()
    if not hasattr(dims, "reduction_axis"):
        raise UserError(
            f"The parameter {name} is selected by {dims!r}, but must be by Dims, True, False "
            f"or None."
        )
    axes = [
        tuple(a) if isinstance(a, tuple | list) else (a,)
        for a in (dims.reduction_axis, dims.output_axis)
    ]
    parts = getattr(dims, "parts", 1)
    every = [a for group in axes for a in group]
    known = all(_is_whole(a) and -rank <= a < rank for a in every)
    reduction, output = (tuple(a % rank for a in group) for group in axes) if known else axes
    matrix = rank >= 2 and known and reduction and output
    if not matrix or len({*reduction, *output}) < len(every):
        raise UserError(
            f"The parameter {name} of shape {shape} is no matrix with the reduction axes "
            f"{axes[0]} and the output axes {axes[1]}; {near}."
        )
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise UserError(f"The module {name} is {leaf.dtype}, but must be real and floating.")
    if not _is_whole(parts) or parts < 1:
        raise UserError(
            f"The module {name} has parts {parts!r}, but must have a whole number from 1 up."
        )
    wide = jnp.promote_types(leaf.dtype, jnp.float32).name
    found = Leaf(name, index, shape, reduction, output, parts, wide)
    width = int(np.prod([shape[a] for a in output]))
    if width % parts:
        raise UserError(f"The module {name} has {width} outputs, which {parts} do not divide.")
    if 0 in shape:
        raise UserError(f"The module {name} of shape {shape} is empty.")
    return found


def _is_bool(x) -> bool:
    return isinstance(x, bool | np.bool_)


def _is_whole(x) -> bool:
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


def absent(x: Any) -> bool:
    """Whether there is nothing at this place of a tree."""
    return x is None or isinstance(x, optax.MaskedNode)


def dotted(path: tuple) -> str:
    """A tree path as text. Not with slashes: rules that place parameters shall not match
    the small arrays that a state keeps under the same names."""
    return jax.tree_util.keystr(path, simple=True, separator=".")
