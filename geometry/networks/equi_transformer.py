"""`two_frame` whose messages are weighted by attention over the edges of an atom.

Section 7.2 of the specification. With g the part of W(e_ij) that gates logits, per head

    l_ij = sum over the head of q_i k_j g_ij / sqrt(F / heads) ,   q, k = LN(h) Q, LN(h) K
    a_ij = fade_ij exp(l_ij) / ( 1 + sum_j fade_ij exp(l_ij) )
    phi_ij = a_ij W(e_ij) * X(LN(h_j)) ,  then as in `two_frame`, without nu

The 1 is a neighbour that says nothing: an atom may listen to none, and the weights of edges
that fade out go to 0 smoothly, also where they are the last ones.
"""

from math import sqrt

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from common.errors import reject
from geometry.graphs import Graph
from geometry.network import Network
from geometry.networks import blocks
from geometry.networks.blocks import Settings, dense, layer_norm, mlp
from geometry.networks.two_frame import two_frame, updating, width


def equi_transformer(s: Settings) -> Network:
    """The network of those settings.

    Raises:
      UserError: heads that do not divide the features.
    """
    if s.features % s.heads:
        raise reject("network.heads", s.heads, f"a divisor of {s.features} features")
    # Weights of attention have sum 1 at most, whatever the number of neighbours.
    s = s._replace(neighbours=1.0)
    return two_frame(s, _layer, _messages)


def _layer(key: jax.Array, s: Settings) -> dict:
    filters, sources, queries, own = jax.random.split(key, 4)
    f, n = s.features, width(s)
    return {
        "filters": blocks.perceptron(filters, blocks.edge_width(s), f, f + n),
        "norm": blocks.norm(f),
        "sources": blocks.perceptron(sources, f, f, n),
        "queries": blocks.linear(queries, f, 2 * f, bias=False),
        "update": updating(own, s),
    }


def _messages(p, s, graph, edges, h):
    dtype = blocks.hidden(s, h)
    gate, filters = jnp.split(mlp(p["filters"], edges.scalars, dtype), [s.features], -1)
    normed = layer_norm(p["norm"], h)
    sources = mlp(p["sources"], normed, dtype)
    query, key = jnp.split(dense(p["queries"], normed, dtype), 2, -1)
    logits = query[graph.receivers] * key[graph.senders] * gate
    logits = logits.reshape(-1, s.heads, s.features // s.heads).astype(h.dtype).sum(-1)
    a = attention(graph, edges.fade, logits / sqrt(s.features // s.heads))
    phi = (filters * sources[graph.senders]).astype(h.dtype)
    phi = phi.reshape(-1, 3 + s.known, s.heads, s.features // s.heads)
    return (phi * a[:, None, :, None]).reshape(-1, width(s))


def attention(
    graph: Graph, fade: Float[Array, " edges"] | None, logits: Float[Array, "edges heads"]
) -> Float[Array, "edges heads"]:
    """a_ij: see the module."""
    atoms = graph.numbers.shape[0]
    # Of the logits and the 0 of the silent neighbour; it cancels.
    top = jax.ops.segment_max(logits, graph.receivers, atoms, indices_are_sorted=True)
    top = jax.lax.stop_gradient(jnp.maximum(top, 0.0))
    weights = jnp.exp(logits - top[graph.receivers])
    if fade is not None:
        weights = weights * fade[:, None]
    total = jax.ops.segment_sum(weights, graph.receivers, atoms, indices_are_sorted=True)
    return weights / (jnp.exp(-top) + total)[graph.receivers]
