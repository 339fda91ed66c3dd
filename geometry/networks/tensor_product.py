"""Features of degree l <= 2 and tensor products with spherical harmonics of the edges.

Section 7.2 of the specification, after NequIP (arXiv:2101.03164) with directions of all states.
Features x are irreps F x 0e + F/2 x 1o (+ F/4 x 2e), Y_l spherical harmonics, C the
Clebsch-Gordan coefficients. A layer:

    y^b_ij = sum_k s^{k,b}_ij Y_b(u^k_ij)                   k: now, known states
    z^abc_ij = w^abc_ij ( N(x^a_j) A_a  (x)  y^b_ij )_c     a, b, c <= l and a + b + c even
    g_c = ( sum_j [ z^abc_ij of all a, b ] / nu ) B_c
    x^0_i <- x^0_i + silu(g_0) ,   x^c_i <- x^c_i + silu(g'_c) g_c

s and w, numbers for each channel, are parts of an MLP of e_ij; g'_c are further scalars. Needs
e3nn-jax, whose bases and signs are used.
"""

from math import sqrt
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from common.errors import UserError, reject
from geometry.graphs import Graph
from geometry.network import Inputs, Network
from geometry.networks import blocks
from geometry.networks.blocks import Settings, dense, layer_norm, mlp


def tensor_product(s: Settings) -> Network:
    """The network of those settings.

    Raises:
      UserError: another degree than 1 or 2, features that are no multiple of 2^degree, or
        e3nn-jax is not installed.
    """
    if s.degree not in (1, 2):
        raise reject("network.degree", s.degree, "1 or 2")
    if s.features % 2**s.degree:
        raise reject("network.features", s.features, f"a multiple of {2**s.degree}")
    e3nn = _e3nn()
    # So that components of variance 1 have products of variance 1.
    coupling = {
        (a, b, c): sqrt(2 * c + 1) * np.asarray(e3nn.clebsch_gordan(a, b, c))
        for a, b, c in _paths(s)
    }

    def init(key: jax.Array) -> dict:
        atoms, states, layers, head = jax.random.split(key, 4)
        n = _channels(s)
        # Vectors have fewer channels here than scalars have.
        vectors = {"states": jax.random.normal(states, (s.known, n[1]))}
        return {
            "atoms": blocks.atoms(atoms, s) | vectors,
            "layers": blocks.stacked(lambda k: _layer(k, s), layers, s.layers),
            "head": blocks.head(head, n[0], n[1]),
        }

    def apply(params: Any, graph: Graph, inputs: Inputs) -> Float[Array, "atoms 3"]:
        params, inputs = blocks.cleaned(s, params, graph, inputs)
        edges = blocks.edges(s, graph, inputs)
        # Without normalising they are polynomials: smooth where atoms coincide, too.
        harmonics = [
            e3nn.spherical_harmonics(ir, edges.units, False, normalization="component").array
            for ir in ("0e", "1o", "2e")[: 1 + s.degree]
        ]
        layer = lambda p, x: _step(p, s, graph, edges, harmonics, coupling, x)
        h = blocks.scalars(params["atoms"], s, graph, inputs)
        v = blocks.vectors(params["atoms"], graph, inputs)
        x = (h[:, None], v)
        if s.degree == 2:
            x += (jnp.zeros((h.shape[0], 5, _channels(s)[2]), h.dtype),)
        h, v, *_ = blocks.layers(s, layer, params["layers"], x)
        return blocks.finish(params["head"], graph, h[:, 0], v)

    return Network(init, apply)


def _e3nn() -> Any:
    try:
        import e3nn_jax
    except ImportError as error:
        raise UserError(
            "config.network.name 'tensor_product' needs e3nn-jax: uv sync --extra e3nn."
        ) from error
    return e3nn_jax


def _channels(s):
    """Of each degree."""
    return [s.features // 2**a for a in range(1 + s.degree)]


def _paths(s):
    """a, b, c, ordered by c: products of which c is a true, not a pseudo, tensor."""
    degrees = range(1 + s.degree)
    return [
        (a, b, c)
        for c in degrees
        for a in degrees
        for b in degrees
        if abs(a - b) <= c <= a + b and (a + b + c) % 2 == 0
    ]


def _layer(key: jax.Array, s: Settings) -> dict:
    filters, before, after = jax.random.split(key, 3)
    n, paths = _channels(s), _paths(s)
    into = [sum(n[a] for a, _, to in paths if to == c) for c in range(len(n))]
    # Scalars that gate come along with the scalars.
    outs = [sum(n), *n[1:]]
    weights = (1 + s.known) * len(n) + sum(into)
    mixes = lambda key, ins, outs: [
        blocks.linear(k, a, b, bias=False)
        for k, a, b in zip(jax.random.split(key, len(n)), ins, outs, strict=True)
    ]
    return {
        "filters": blocks.perceptron(filters, blocks.edge_width(s), s.features, weights),
        "norm": blocks.norm(s.features),
        "before": mixes(before, n, n),
        "after": mixes(after, into, outs),
    }


def _step(p, s, graph, edges, harmonics, coupling, x):
    """x, [atoms, 2 a + 1, channels] of each degree a, after a layer."""
    dtype, n, paths = blocks.hidden(s, x[0]), _channels(s), _paths(s)
    mix = lambda q, values: dense(q, values, dtype).astype(values.dtype)
    weights = mlp(p["filters"], edges.scalars, dtype).astype(x[0].dtype)
    cuts = np.cumsum([(1 + s.known) * len(n), *(n[a] for a, _, _ in paths)])
    shares, *w, _ = jnp.split(weights, cuts, -1)
    shares = shares.reshape(-1, len(n), 1 + s.known)
    y = [jnp.einsum("ek,ked->ed", shares[:, b], of) for b, of in enumerate(harmonics)]
    x_sent = [layer_norm(p["norm"], x[0]), *map(blocks.vector_norm, x[1:])]
    x_sent = [mix(q, of)[graph.senders] for q, of in zip(p["before"], x_sent, strict=True)]

    messages = [[] for _ in n]
    for (a, b, c), each in zip(paths, w, strict=True):
        if edges.fade is not None:
            each = each * edges.fade[:, None]
        matrix = jnp.einsum("eb,abc->eac", y[b], coupling[a, b, c].astype(x[0].dtype))
        # Row by row, as a loop over edges that multiplies tiny matrices is slow.
        product = sum(matrix[:, i, :, None] * x_sent[a][:, i, None] for i in range(2 * a + 1))
        messages[c].append(product * each[:, None])
    heard = [blocks.received(graph, s, jnp.concatenate(m, -1)) for m in messages]
    heard = [mix(q, of) for q, of in zip(p["after"], heard, strict=True)]
    scalar, *gates = jnp.split(jax.nn.silu(heard[0]), np.cumsum(n)[:-1], -1)
    new = [scalar, *(gate * of for gate, of in zip(gates, heard[1:], strict=True))]
    return tuple(before + change for before, change in zip(x, new, strict=True))
