"""Structures of one batch as one graph of fixed size, and what is linear in their positions.

All atoms of all structures stand one after the other; pairs of atoms that see each other are
edges. The last structure and the last atom are padding, which padded atoms and edges belong to:

    r_ij = x[senders] + shifts - x[receivers]        message from sender j to receiver i

Two kinds of structure (section 5 of the specification): molecules, whose centre is projected
out of noise, outputs and losses, and anchored ones, periodic cells and slabs, of which some
atoms do not move.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Graph(NamedTuple):
    """What of a batch does not move. A leading axis of all fields is one of packs.

    Attributes:
      numbers: atomic numbers, int32; 0 is padding.
      mask: float32, 1 for an atom, 0 for padding.
      free: float32, 1 for an atom that may move; 0 for fixed ones and padding.
      owner: structure of each atom, int32 ascending; graphs - 1 for padding.
      index: place of each atom in its structure, int32.
      senders, receivers: atoms of each edge, int32, ordered by receiver; atoms - 1 for padding.
      bonds: class of each edge, int32: 0 none or unknown, 1, 2, 3, 4 aromatic.
      shifts: angstrom, float32: lattice vectors from a cell to the sender's image; 0 where
        nothing is periodic.
      edge_mask: float32, 1 for an edge, 0 for padding.
      centred: float32, 1 where the centre is projected out.
      ids: global number of each structure in its data set, int32; -1 for padding.
    """

    numbers: Int[Array, "*packs atoms"]
    mask: Float[Array, "*packs atoms"]
    free: Float[Array, "*packs atoms"]
    owner: Int[Array, "*packs atoms"]
    index: Int[Array, "*packs atoms"]
    senders: Int[Array, "*packs edges"]
    receivers: Int[Array, "*packs edges"]
    bonds: Int[Array, "*packs edges"]
    shifts: Float[Array, "*packs edges 3"]
    edge_mask: Float[Array, "*packs edges"]
    centred: Float[Array, "*packs graphs"]
    ids: Int[Array, "*packs graphs"]


class Batch(NamedTuple):
    """Structures with both their ends.

    Attributes:
      graph: what does not move.
      start: R^0, angstrom, centred where the graph says so, 0 at padding.
      end: R^T in the frame of the start; the start again where it is not known.
      frames: R^0 ... R^K of a path; no frames (K + 1 = 0) where there are none.
    """

    graph: Graph
    start: Float[Array, "*packs atoms 3"]
    end: Float[Array, "*packs atoms 3"]
    frames: Float[Array, "*packs frames atoms 3"]


def each_pack(function: Callable, out_axis: int = 0) -> Callable:
    """`function` of one pack, over the leading axis of all arguments.

    As `jax.vmap`; one pack alone is no batch: gradients of gathers are several times faster
    on a CPU without the axis.
    """

    def over(*arguments):
        if len(jax.tree.leaves(arguments)[0]) > 1:
            return jax.vmap(function, out_axes=out_axis)(*arguments)
        found = function(*jax.tree.map(lambda a: a[0], arguments))
        return jax.tree.map(lambda a: jnp.expand_dims(a, out_axis), found)

    return over


def of_atoms(graph: Graph, values: Float[Array, " graphs"]) -> Float[Array, "atoms 1"]:
    """A number per structure, at each of its atoms."""
    return values[graph.owner][:, None]


def total(graph: Graph, values: Float[Array, "atoms ..."]) -> Float[Array, "graphs ..."]:
    """Sums over the atoms of each structure."""
    return jax.ops.segment_sum(
        values, graph.owner, graph.ids.shape[-1], indices_are_sorted=True
    )


def project(graph: Graph, v: Float[Array, "atoms 3"]) -> Float[Array, "atoms 3"]:
    """The part of displacements that a structure may make.

    Less their mean over the atoms of a molecule; 0 at fixed atoms and padding.
    """
    v = v * graph.free[:, None]
    atoms = jnp.maximum(total(graph, graph.free), 1.0)
    mean = total(graph, v) / atoms[:, None] * graph.centred[:, None]
    return (v - mean[graph.owner]) * graph.free[:, None]


def noise(key: jax.Array, graph: Graph, dtype: Any = jnp.float32) -> Float[Array, "atoms 3"]:
    """Standard normal displacements, projected.

    A structure's own depend on the key, its `ids` and nothing else of the batch.
    """

    def one(structure, place):
        own = jax.random.fold_in(key, structure.astype(jnp.uint32))
        return jax.random.normal(jax.random.fold_in(own, place), (3,), dtype)

    return project(graph, jax.vmap(one)(graph.ids[graph.owner], graph.index))
