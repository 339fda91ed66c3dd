"""Message passing of scalars and vectors that sees the state now and all known ones.

Section 7.1 of the specification: PaiNN (arXiv:2102.03150) with a frame for each state. From
h, V and e_ij of `blocks`, a layer is

    phi_ij = W(e_ij) * X(LN(h_j))                       MLPs; split into m, alpha and betas
    h_i <- h_i + sum_j m_ij / nu
    V_i <- V_i + sum_j ( alpha_ij V_j + sum_k beta^k_ij u^k_ij ) / nu     k: now, known states
    P = N(V_i) A ,  Q = N(V_i) B
    p1, p2, p3 = MLP([LN(h_i), |Q|])
    h_i <- h_i + p1 + p2 <P, Q> ,  V_i <- V_i + p3 P

with nu^2 the mean number of neighbours. Every scalar is made from invariants, every vector
is a sum of vectors with scalar weights, and only differences of positions enter.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from geometry.graphs import Graph
from geometry.network import Inputs, Network
from geometry.networks import blocks
from geometry.networks.blocks import Edges, Settings, dense, layer_norm, mlp
from geometry.networks.radial import smooth_norm


def two_frame(
    s: Settings, layer_of: Callable | None = None, messages: Callable | None = None
) -> Network:
    """The network of those settings.

    Args:
      layer_of: (key, s) -> a layer's parameters, with "update" of `updating`.
      messages: (its parameters, s, graph, edges, h) -> phi [edges, n]. Both by default of
        this module; attention has its own.
    """
    layer_of, messages = layer_of or _layer, messages or _messages

    def init(key: jax.Array) -> dict:
        atoms, layers, head = jax.random.split(key, 3)
        return {
            "atoms": blocks.atoms(atoms, s),
            "layers": blocks.stacked(lambda k: layer_of(k, s), layers, s.layers),
            "head": blocks.head(head, s.features, s.features),
        }

    def apply(params: Any, graph: Graph, inputs: Inputs) -> Float[Array, "atoms 3"]:
        params, inputs = blocks.cleaned(s, params, graph, inputs)
        edges = blocks.edges(s, graph, inputs)

        def layer(p, state):
            h, v = state
            phi = messages(p, s, graph, edges, h)
            return update(p["update"], s, *hear(s, graph, edges, phi, h, v))

        h = blocks.scalars(params["atoms"], s, graph, inputs)
        v = blocks.vectors(params["atoms"], graph, inputs)
        h, v = blocks.layers(s, layer, params["layers"], (h, v))
        return blocks.finish(params["head"], graph, h, v)

    return Network(init, apply)


def _layer(key: jax.Array, s: Settings) -> dict:
    filters, sources, own = jax.random.split(key, 3)
    n = width(s)
    return {
        "filters": blocks.perceptron(filters, blocks.edge_width(s), s.features, n),
        "norm": blocks.norm(s.features),
        "sources": blocks.perceptron(sources, s.features, s.features, n),
        "update": updating(own, s),
    }


def _messages(p, s, graph, edges, h):
    dtype = blocks.hidden(s, h)
    filters = mlp(p["filters"], edges.scalars, dtype)
    sources = mlp(p["sources"], layer_norm(p["norm"], h), dtype)
    phi = (filters * sources[graph.senders]).astype(h.dtype)
    return phi if edges.fade is None else phi * edges.fade[:, None]


def width(s: Settings) -> int:
    """Channels of phi: m, alpha, and a beta for each state."""
    return (3 + s.known) * s.features


def hear(
    s: Settings,
    graph: Graph,
    edges: Edges,
    phi: Float[Array, "edges n"],
    h: Float[Array, "atoms f"],
    v: Float[Array, "atoms 3 f"],
) -> tuple[Float[Array, "atoms f"], Float[Array, "atoms 3 f"]]:
    """h and V after the sums over neighbours."""
    scalar, alpha, *betas = jnp.split(phi, 3 + s.known, -1)
    vector = alpha[:, None] * v[graph.senders]
    for beta, unit in zip(betas, edges.units, strict=True):
        vector = vector + beta[:, None] * unit[:, :, None]
    return h + blocks.received(graph, s, scalar), v + blocks.received(graph, s, vector)


def updating(key: jax.Array, s: Settings) -> dict:
    """Parameters of `update`."""
    mix, gates = jax.random.split(key)
    f = s.features
    return {
        "mix": blocks.linear(mix, f, 2 * f, bias=False),
        "norm": blocks.norm(f),
        "gates": blocks.perceptron(gates, 2 * f, f, 3 * f),
    }


def update(
    p: dict, s: Settings, h: Float[Array, "atoms f"], v: Float[Array, "atoms 3 f"]
) -> tuple[Float[Array, "atoms f"], Float[Array, "atoms 3 f"]]:
    """h and V after an atom's own scalars and vectors have met."""
    dtype = blocks.hidden(s, h)
    mixed = dense(p["mix"], blocks.vector_norm(v), dtype).astype(h.dtype)
    first, second = jnp.split(mixed, 2, -1)
    both = jnp.concatenate([layer_norm(p["norm"], h), smooth_norm(second, 1)], -1)
    p1, p2, p3 = jnp.split(mlp(p["gates"], both, dtype).astype(h.dtype), 3, -1)
    return h + p1 + p2 * (first * second).sum(1), v + p3[:, None] * first
