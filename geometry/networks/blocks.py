"""What the networks share: dense layers, the state they start from, the head they end in.

    e_ij = [ RBF(d_ij), RBF(d^r_ij), onehot(E_ij, 5), d_ij - d^r_ij ]     r: every known state
    h_i  = Emb(Z_i) + MLP(time features)                                  [atoms, F]
    V_i  = sum_r c_r (x_i - x^r_i) w_r   c_r = c_in of the start, else 1/A   [atoms, 3, F]
    F_i  = project( sum over channels of g(h_i) V_i w ),                  w = 0 at first

Section 7.1 of the specification. Parameters are dicts of arrays; those of layers have a
leading axis, and `layers` goes over it with a scan: compiled once, whatever the depth.
"""

from collections.abc import Callable
from math import sqrt
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from common.errors import reject
from geometry.graphs import Graph, project
from geometry.network import Inputs
from geometry.networks import radial

BONDS = 5
DTYPES = ("float32", "bfloat16")


class Settings(NamedTuple):
    """What a network is made of; `checked` says what is allowed.

    Attributes:
      features: F.
      layers: L.
      radial: Gaussians per distance.
      radius: angstrom, of the last Gaussian and of the envelope.
      species: rows of the embedding: the largest atomic number plus one.
      known: number of known states.
      chained: features of i / K stand beside those of the time.
      neighbours: nu^2, the mean number of edges of an atom, of the training set. A constant,
        so that a structure does not feel the rest of its batch.
      envelope: edges fade out towards the radius.
      dtype: of hidden products, float32 (then that of the positions) or bfloat16.
      remat: keep only the input of each layer for the gradient. On a CPU, too, it is faster to
        compute the rest again than to fetch it.
      heads: of attention; a divisor of F. equi_transformer.
      degree: largest l, 1 or 2, of F / 2^l channels each. tensor_product.
    """

    features: int = 48
    layers: int = 3
    radial: int = 16
    radius: float = 8.0
    species: int = 96
    known: int = 1
    chained: bool = False
    neighbours: float = 10.0
    envelope: bool = False
    dtype: str = "float32"
    remat: bool = True
    heads: int = 4
    degree: int = 2


class Edges(NamedTuple):
    """All states, edge by edge.

    Attributes:
      scalars: e_ij.
      units: directions in the state now, then in the known ones.
      fade: 1 for an edge that counts fully, down to 0 at the radius; None without envelope.
    """

    scalars: Float[Array, "edges n"]
    units: Float[Array, "states edges 3"]
    fade: Float[Array, " edges"] | None


def checked(s: Settings) -> Settings:
    """The settings.

    Raises:
      UserError: one is out of its range.
    """
    least = dict(features=1, layers=1, radial=2, species=2, known=1, heads=1, degree=1)
    for name, low in least.items():
        value = getattr(s, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise reject(f"network.{name}", value, f"a whole number from {low} up")
    for name in ("radius", "neighbours"):
        value = getattr(s, name)
        if not 0 < value < float("inf"):
            raise reject(f"network.{name}", value, "a finite number above 0")
    if s.dtype not in DTYPES:
        raise reject("network.dtype", s.dtype, f"one of {', '.join(DTYPES)}")
    return s


def linear(key: jax.Array, n_in: int, n_out: int, bias: bool = True) -> dict:
    """Parameters of `dense`: W normal of variance 1 / n_in, b = 0."""
    p = {"kernel": jax.random.normal(key, (n_in, n_out)) / sqrt(n_in)}
    return p | ({"bias": jnp.zeros(n_out)} if bias else {})


def dense(p: dict, x: Array, dtype: Any) -> Array:
    """x W + b of that dtype; x [..., n_in]."""
    y = x.astype(dtype) @ p["kernel"].astype(dtype)
    return y + p["bias"].astype(dtype) if "bias" in p else y


def perceptron(key: jax.Array, n_in: int, n_hidden: int, n_out: int) -> dict:
    """Parameters of `mlp`."""
    first, last = jax.random.split(key)
    return {"first": linear(first, n_in, n_hidden), "last": linear(last, n_hidden, n_out)}


def mlp(p: dict, x: Array, dtype: Any) -> Array:
    """One hidden layer with silu."""
    return dense(p["last"], jax.nn.silu(dense(p["first"], x, dtype)), dtype)


def norm(n: int) -> dict:
    """Parameters of `layer_norm`."""
    return {"scale": jnp.ones(n), "bias": jnp.zeros(n)}


def layer_norm(p: dict, h: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
    """LN: each row to mean 0 and variance 1, then scaled and shifted."""
    h = h - h.mean(-1, keepdims=True)
    h = h * jax.lax.rsqrt((h * h).mean(-1, keepdims=True) + 1e-6)
    return h * p["scale"] + p["bias"]


def vector_norm(v: Float[Array, "atoms m n"]) -> Float[Array, "atoms m n"]:
    """N: V / sqrt(1 + mean over channels, the last axis, of |V|^2)."""
    square = (v * v).sum((1, 2), keepdims=True) / v.shape[-1]
    return v * jax.lax.rsqrt(1 + square)


def hidden(s: Settings, like: Array) -> Any:
    """The dtype of hidden products."""
    return jnp.bfloat16 if s.dtype == "bfloat16" else like.dtype


def cleaned(s: Settings, params: Any, graph: Graph, inputs: Inputs) -> tuple[Any, Inputs]:
    """Parameters of the positions' dtype; positions that are 0 at padding, whatever is there.

    Raises:
      ValueError: another number of known states than the network was made for.
    """
    if inputs.known.shape[0] != s.known:
        states = inputs.known.shape[0]
        raise ValueError(f"The network was made for {s.known} known states, not {states}.")
    dtype = inputs.x.dtype
    real = graph.mask[:, None] > 0
    clear = lambda x: jnp.where(real, x, 0.0).astype(dtype)
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    return params, inputs._replace(x=clear(inputs.x), known=clear(inputs.known))


def edge_width(s: Settings) -> int:
    """Length of e_ij."""
    return s.radial * (1 + s.known) + BONDS + s.known


def edges(s: Settings, graph: Graph, inputs: Inputs) -> Edges:
    """e_ij, directions and fading of all edges."""
    now = radial.pairs(graph, inputs.x)
    then = [radial.pairs(graph, x) for x in inputs.known]
    rbf = lambda state: radial.gaussians(state.distance, s.radial, s.radius)
    bonds = jax.nn.one_hot(graph.bonds, BONDS, dtype=inputs.x.dtype)
    changes = [(now.distance - state.distance)[:, None] for state in then]
    scalars = jnp.concatenate([rbf(now), *map(rbf, then), bonds, *changes], -1)
    units = jnp.stack([now.unit, *(state.unit for state in then)])
    if not s.envelope:
        return Edges(scalars, units, None)
    # An edge counts where it is short in any of the states.
    far = 1.0
    for state in (now, *then):
        far = far * (1 - radial.envelope(state.distance, s.radius))
    return Edges(scalars, units, 1 - far)


def received(graph: Graph, s: Settings, values: Float[Array, "edges ..."]) -> Array:
    """Sums over the edges of each receiver, divided by nu: [atoms, ...]."""
    total = jax.ops.segment_sum(
        values, graph.receivers, graph.numbers.shape[0], indices_are_sorted=True
    )
    return total / sqrt(s.neighbours)


def atoms(key: jax.Array, s: Settings) -> dict:
    """Parameters of `scalars` and `vectors`."""
    embedding, time, states = jax.random.split(key, 3)
    n = radial.TIME_FEATURES * (2 if s.chained else 1)
    return {
        "embedding": jax.random.normal(embedding, (s.species, s.features)),
        "time": perceptron(time, n, s.features, s.features),
        "states": jax.random.normal(states, (s.known, s.features)),
    }


def scalars(p: dict, s: Settings, graph: Graph, inputs: Inputs) -> Float[Array, "atoms n"]:
    """h before the first layer."""
    features = radial.time_features(inputs.time)
    if s.chained:
        features = jnp.concatenate([features, radial.time_features(inputs.segment)], -1)
    time = mlp(p["time"], features, inputs.x.dtype)
    return p["embedding"][graph.numbers] + time[graph.owner]


def moved(graph: Graph, inputs: Inputs) -> Float[Array, "known atoms 3"]:
    """c_in (x - x^r) of the start; of other known states x - x^r in angstrom.

    1 / c_in is the size of the way from the start. Near t = 0 that is nothing, but other
    states are as far away as ever.
    """
    scale = jnp.ones((len(inputs.known), len(inputs.scale)), inputs.x.dtype)
    scale = scale.at[0].set(inputs.scale)
    return (inputs.x - inputs.known) * scale[:, graph.owner, None]


def vectors(p: dict, graph: Graph, inputs: Inputs) -> Float[Array, "atoms 3 n"]:
    """V before the first layer."""
    return jnp.einsum("rid,rf->idf", moved(graph, inputs), p["states"])


def head(key: jax.Array, n_scalars: int, n_vectors: int) -> dict:
    """Parameters of `finish`."""
    return {"gate": linear(key, n_scalars, n_vectors), "out": jnp.zeros(n_vectors)}


def finish(
    p: dict, graph: Graph, h: Float[Array, "atoms n"], v: Float[Array, "atoms 3 m"]
) -> Float[Array, "atoms 3"]:
    """F: gated vectors, projected."""
    gate = jax.nn.silu(dense(p["gate"], h, h.dtype)) * p["out"]
    return project(graph, (v * gate[:, None]).sum(-1))


def stacked(init: Callable, key: jax.Array, n: int) -> Any:
    """Parameters of n layers, on a leading axis."""
    return jax.vmap(init)(jax.random.split(key, n))


def layers(s: Settings, layer: Callable, params: Any, state: Any) -> Any:
    """The state after layer(p, state) -> state for each of stacked parameters p."""
    if s.remat:
        # A scan's body is not merged with the rest, so nothing has to prevent that.
        layer = jax.checkpoint(layer, prevent_cse=False)
    return jax.lax.scan(lambda state, p: (layer(p, state), None), state, params)[0]
