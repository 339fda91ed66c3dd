"""Wave functions: sums of K determinants of configuration-dependent orbitals.

    psi(x) = sum_k det M^k(x)[R, :],   R = the occupied modes of x, ascending

(arXiv:2507.02644, supplement S1-S8.) An `Ansatz` differs from another only in M:

    transformer  a transformer over the sites' tokens: the paper's
    nnb          a perceptron on all occupations: the paper's warm start
    tensor       one table per site and local state: the cheapest backflow
    slater       a constant: Hartree-Fock

Everything is real. Up modes come first, and a generalised determinant mixes both spins.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from common.errors import reject
from common.layers import stack
from nqs.determinants import log_det_sum, occupied

Params = Any
RIDGE = 1e-4  # Of the regression that anchors a network, times its mean eigenvalue.


class Ansatz(NamedTuple):
    """A wave function as pure functions.

    Attributes:
      init: key -> params.
      log_psi: (params, x [2N]) -> (sign, log|psi|), scalars.
      orbitals: (params, x [2N]) -> M [K, 2N, N_e].
      anchor: (params, x [n, 2N], M [K, 2N, N_e]) -> the part of the parameters, by name,
        that makes the orbitals of configurations x nearest to the constant M.
      attention: (params, x [2N]) -> softmax weights [L, heads, N, N] from site to site,
        or None where there is no attention.
    """

    init: Callable
    log_psi: Callable
    orbitals: Callable
    anchor: Callable
    attention: Callable | None = None


def build(
    name: str,
    n_sites: int,
    n_electrons: int,
    *,
    d_model: int,
    n_heads: int,
    n_layers: int,
    n_det: int,
    mlp_hidden: int,
    mlp_layers: int,
    embed_scale: float = 1.0,
    dtype: str = "float32",
    determinants: str = "float64",
) -> Ansatz:
    """The ansatz of a config. Only the fields that `name` needs are looked at.

    Args:
      name: transformer, nnb, tensor or slater.
      d_model, n_heads, n_layers: of the transformer.
      n_det: K.
      embed_scale: of the token embeddings at the start; the released code has 1. The
        smaller, the less the orbitals depend on the configuration before training.
      mlp_hidden, mlp_layers: of the perceptron.
      dtype: of parameters and network.
      determinants: of the determinants and their sum.

    Raises:
      UserError: unknown name, or sizes that do not fit.
    """
    shape = (n_det, 2 * n_sites, n_electrons)
    known = {
        "transformer": lambda: _transformer(
            shape, d_model, n_heads, n_layers, embed_scale, dtype
        ),
        "nnb": lambda: _nnb(shape, mlp_hidden, mlp_layers, dtype),
        "tensor": lambda: _tensor(shape, dtype),
        "slater": lambda: _slater(shape, dtype),
    }
    if name not in known:
        raise reject("ansatz.name", name, f"one of {', '.join(known)}")
    if n_det < 1:
        raise reject("ansatz.n_det", n_det, "a whole number from 1 up")
    init, orbitals, anchor, attention = known[name]()

    def log_psi(params: Params, x: Int[Array, " modes"]):
        rows = orbitals(params, x)[:, occupied(x, n_electrons), :]
        return log_det_sum(rows.astype(determinants))

    return Ansatz(init, log_psi, orbitals, anchor, attention)


def tokens(x: Int[Array, " modes"]) -> Int[Array, " sites"]:
    """Local states: 0 empty, 1 up, 2 down, 3 doubly occupied."""
    up, down = jnp.split(x.astype(jnp.int32), 2)
    return up + 2 * down


# The released code's scale: weights ~ N(0, 1/fan_in), all else ~ N(0, 1). Orbital
# matrices then start of full rank and no determinant is near zero.
_weight = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
_unit = nn.initializers.normal(1.0)


# Float32 means float32: TF32 and bfloat16 passes spoil ratios of large determinants.
_einsum = partial(jnp.einsum, precision="highest")


def _exactly(dtype):
    return dict(dtype=dtype, precision="highest")


class Block(nn.Module):
    """Y = X + Attn(X), X' = Y + silu(Y W + b): no layer norm, no second matrix (S4-S7).

    Input and output [N, d]; with `weights` the softmax weights [heads, N, N] instead.
    """

    n_heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "sites d"], weights: bool = False):
        n, d = x.shape
        kind = dict(param_dtype=self.dtype, kernel_init=_weight, **_exactly(self.dtype))
        qkv = nn.Dense(3 * d, use_bias=False, name="qkv", **kind)(x)
        q, k, v = jnp.moveaxis(qkv.reshape(n, 3, self.n_heads, d // self.n_heads), 1, 0)
        scores = _einsum("ihc,jhc->hij", q, k) / jnp.sqrt(d // self.n_heads).astype(x.dtype)
        attention = jax.nn.softmax(scores)
        mixed = _einsum("hij,jhc->ihc", attention, v).reshape(n, d)
        y = x + nn.Dense(d, use_bias=False, name="out", **kind)(mixed)
        z = y + nn.silu(nn.Dense(d, bias_init=_unit, name="mlp", **kind)(y))
        return attention if weights else z


def _transformer(shape, d, n_heads, n_layers, embed_scale, dtype):
    if d < 1:
        raise reject("ansatz.d_model", d, "a whole number from 1 up")
    if n_heads < 1 or d % n_heads:
        raise reject("ansatz.n_heads", n_heads, f"a divisor of d_model = {d}")
    if n_layers < 0:
        raise reject("ansatz.n_layers", n_layers, "a whole number from 0 up")
    if not 0 < embed_scale < float("inf"):
        raise reject("ansatz.embed_scale", embed_scale, "a finite number above 0")
    n_det, n_modes, n_electrons = shape
    n_sites = n_modes // 2
    block = Block(n_heads, dtype)
    init_blocks, apply_blocks = stack(block, n_layers)
    head = nn.Dense(
        2 * n_det * n_electrons,
        param_dtype=dtype,
        kernel_init=_weight,
        bias_init=_unit,
        **_exactly(dtype),
    )

    def init(key):
        embed, place, blocks, last = jax.random.split(key, 4)
        x = jnp.zeros((n_sites, d), dtype)
        return {
            "embed": embed_scale * _unit(embed, (4, d), dtype),
            "place": _unit(place, (n_sites, d), dtype),
            "blocks": init_blocks(blocks, x),
            "head": head.init(last, x)["params"],
        }

    def embedded(params, x):
        # A product, not a gather: its gradient is a product too, and not a scatter.
        local = jax.nn.one_hot(tokens(x), 4, dtype=dtype)
        return _einsum("it,td->id", local, params["embed"]) + params["place"]

    def features(params, x):
        return apply_blocks(params["blocks"], embedded(params, x))

    def anchor(params, x, m):
        h = jax.lax.map(partial(features, params), x, batch_size=64)
        target = m.reshape(n_det, 2, n_sites, n_electrons).transpose(2, 1, 0, 3)
        return {"head": _regression(h, target.reshape(n_sites, -1))}

    def orbitals(params, x):
        rows = head.apply({"params": params["head"]}, features(params, x))
        # [N, spin, K, N_e] -> [K, spin * N, N_e]: up rows first.
        rows = rows.reshape(n_sites, 2, n_det, n_electrons)
        return rows.transpose(2, 1, 0, 3).reshape(shape)

    def attention(params, x):
        def body(h, p):
            weights = block.apply({"params": p}, h, weights=True)
            return block.apply({"params": p}, h), weights

        return jax.lax.scan(body, embedded(params, x), params["blocks"])[1]

    return init, orbitals, anchor, attention if n_layers else None


def _nnb(shape, hidden, layers, dtype):
    """M from a perceptron 2N -> hidden -> ... -> K 2N N_e with silu (Table S5)."""
    if hidden < 1:
        raise reject("ansatz.mlp_hidden", hidden, "a whole number from 1 up")
    if layers < 1:
        raise reject("ansatz.mlp_layers", layers, "a whole number from 1 up")
    kind = dict(param_dtype=dtype, kernel_init=_weight, bias_init=_unit, **_exactly(dtype))
    widths = [nn.Dense(hidden, **kind) for _ in range(layers)]
    head = nn.Dense(shape[0] * shape[1] * shape[2], **kind)

    def init(key):
        keys = jax.random.split(key, layers + 1)
        x = jnp.zeros(shape[1], dtype)
        params = {}
        for i, (layer, k) in enumerate(zip(widths, keys, strict=False)):
            params[f"layer{i}"] = layer.init(k, x)["params"]
            x = jnp.zeros(hidden, dtype)
        return params | {"head": head.init(keys[-1], x)["params"]}

    def orbitals(params, x):
        h = 2 * x.astype(dtype) - 1
        for i, layer in enumerate(widths):
            h = nn.silu(layer.apply({"params": params[f"layer{i}"]}, h))
        return head.apply({"params": params["head"]}, h).reshape(shape)

    def anchor(params, x, m):
        kernel = jnp.zeros_like(params["head"]["kernel"])
        return {"head": {"kernel": kernel, "bias": m.ravel().astype(dtype)}}

    return init, orbitals, anchor, None


def _tensor(shape, dtype):
    """Row (spin, site) depends on its own site's local state alone (arXiv:2507.01856)."""
    n_det, n_modes, n_electrons = shape
    n_sites = n_modes // 2

    def init(key):
        size = (4, n_sites, n_det, 2, n_electrons)
        return {"table": jax.random.normal(key, size, dtype)}

    def orbitals(params, x):
        chosen = _einsum(
            "it,tikse->ksie", jax.nn.one_hot(tokens(x), 4, dtype=dtype), params["table"]
        )
        return chosen.reshape(shape)

    def anchor(params, x, m):
        rows = m.reshape(n_det, 2, n_sites, n_electrons).transpose(2, 0, 1, 3)
        return {"table": jnp.broadcast_to(rows.astype(dtype), params["table"].shape)}

    return init, orbitals, anchor, None


def _slater(shape, dtype):
    def init(key):
        return {"orbitals": jax.random.normal(key, shape, dtype)}

    def anchor(params, x, m):
        return {"orbitals": m.astype(dtype)}

    return init, lambda params, x: params["orbitals"], anchor, None


def _regression(h: Float[Array, "samples sites d"], target: Float[Array, "sites o"]) -> dict:
    """The dense layer that maps features to a target by site, in least squares."""
    wide = jnp.result_type(float)
    flat = h.reshape(-1, h.shape[-1]).astype(wide)
    wanted = jnp.tile(target.astype(wide), (len(h), 1))
    center, offset = flat.mean(axis=0), wanted.mean(axis=0)
    rows = flat - center
    square = rows.T @ rows / len(rows)
    # Enough to keep the solution from growing where features hardly vary.
    ridge = RIDGE * jnp.trace(square) / len(square) + jnp.finfo(wide).tiny ** 0.5
    right = rows.T @ (wanted - offset) / len(rows)
    kernel = jnp.linalg.solve(square + ridge * jnp.eye(len(square)), right)
    cast = lambda a: a.astype(h.dtype)
    return {"kernel": cast(kernel), "bias": cast(offset - center @ kernel)}
