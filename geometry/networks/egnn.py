"""The smallest of the networks: scalar messages that push coordinates along edges.

E(n)-equivariant graph network (Satorras et al., arXiv:2102.09844), section 7.2 of the
specification. Coordinates z start at x; e_ij is that of z and the known states. A layer:

    m_ij = silu( silu( h_i A + h_j B + e_ij C ) D )
    z_i <- z_i + sum_j sum_k phi^k(m_ij) u^k_ij / nu^2          k: z, known states
    h_i <- h_i + MLP([h_i, sum_j m_ij / nu])

    F_i = project( g_0(h_i) (z_i - x_i) / angstrom + sum_r g_r(h_i) c_in (x_i - x^r_i) )

with linear g, 0 of fresh parameters.
"""

from math import sqrt
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from geometry.graphs import Graph, project
from geometry.network import Inputs, Network
from geometry.networks import blocks
from geometry.networks.blocks import Settings, dense, layer_norm, mlp


def egnn(s: Settings) -> Network:
    """The network of those settings."""

    def init(key: jax.Array) -> dict:
        atoms, layers = jax.random.split(key)
        atoms = blocks.atoms(atoms, s)
        del atoms["states"]
        zeros = jnp.zeros((s.features, 1 + s.known))
        return {
            "atoms": atoms,
            "layers": blocks.stacked(lambda k: _layer(k, s), layers, s.layers),
            "head": {"norm": blocks.norm(s.features), "out": {"kernel": zeros}},
        }

    def apply(params: Any, graph: Graph, inputs: Inputs) -> Float[Array, "atoms 3"]:
        params, inputs = blocks.cleaned(s, params, graph, inputs)
        layer = lambda p, state: _step(p, s, graph, inputs, *state)
        h = blocks.scalars(params["atoms"], s, graph, inputs)
        h, z = blocks.layers(s, layer, params["layers"], (h, inputs.x))
        h = layer_norm(params["head"]["norm"], h)
        gates = dense(params["head"]["out"], h, h.dtype)
        ways = jnp.stack([z - inputs.x, *blocks.moved(graph, inputs)])
        return project(graph, jnp.einsum("ik,kid->id", gates, ways))

    return Network(init, apply)


def _layer(key: jax.Array, s: Settings) -> dict:
    ends, edge, message, push, own = jax.random.split(key, 5)
    f = s.features
    return {
        "norm": blocks.norm(f),
        "ends": blocks.linear(ends, f, 2 * f, bias=False),
        "edge": blocks.linear(edge, blocks.edge_width(s), f),
        "message": blocks.linear(message, f, f),
        "push": blocks.linear(push, f, 1 + s.known),
        "own": blocks.perceptron(own, 2 * f, f, f),
    }


def _step(p, s, graph, inputs, h, z):
    dtype = blocks.hidden(s, h)
    edges = blocks.edges(s, graph, inputs._replace(x=z))
    normed = layer_norm(p["norm"], h)
    to, off = jnp.split(dense(p["ends"], normed, dtype), 2, -1)
    m = to[graph.receivers] + off[graph.senders] + dense(p["edge"], edges.scalars, dtype)
    m = jax.nn.silu(dense(p["message"], jax.nn.silu(m), dtype))
    push = dense(p["push"], m, dtype).astype(h.dtype)
    m = m.astype(h.dtype)
    if edges.fade is not None:
        m, push = m * edges.fade[:, None], push * edges.fade[:, None]
    pushed = jnp.einsum("ek,ked->ed", push, edges.units)
    z = z + blocks.received(graph, s, pushed) / sqrt(s.neighbours)
    both = jnp.concatenate([normed, blocks.received(graph, s, m)], -1)
    return h + mlp(p["own"], both, dtype).astype(h.dtype), z
