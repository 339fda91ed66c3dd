"""The network of MDLM, and its published files (Sahoo et al., arXiv:2406.07524).

    h <- h + g1 * Attention(m(h; s1, b1)) Wo,   h <- h + g2 * MLP(m(h; s2, b2)),
    m(h; s, b) = LayerNorm(h) (1 + s) + b,      MLP(x) = gelu(x Wup + bup) Wdown + bdown

A diffusion transformer (Peebles and Xie, arXiv:2212.09748) on tokens: LayerNorm without bias,
gelu by tanh, rotary positions. Shifts b, scales s and gates g are a function of the time there.
MDLM's is always told the time 0, so here they are parameters, `modulation`, and `load` computes
them once:

    modulation = W silu(sigma(0)) + b,    sigma(0) = W2 silu(W1 (1 ... 1, 0 ... 0) + b1) + b2

    embed/embedding [V, d]            blocks/qkv/kernel [L, d, 3 d]   blocks/o/kernel [L, d, d]
    blocks/{attention_norm,mlp_norm}/scale [L, d]    blocks/up/{kernel [L, d, f],bias [L, f]}
    blocks/modulation/bias [L, 6 d]                  blocks/down/{kernel [L, f, d],bias [L, d]}
    norm/scale [d]   modulation/bias [2 d]           head/{kernel [d, V],bias [V]}
"""

import os
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from common.errors import UserError, reject
from lm import weights
from lm.attention import attention, precisely, rotated, rotation, seen
from lm.layouts import Config, Layout, checked, require, whole
from lm.model import Model, Params
from lm.transformer import DTYPES

WAVES = 256  # Entries of the time's embedding: cosines, then sines.
EPS = 1e-5  # Of LayerNorm.

_BLOCK = "backbone.blocks.{}."
BLOCKS = {
    "attention_norm/scale": _BLOCK + "norm1.weight",
    "qkv/kernel": _BLOCK + "attn_qkv.weight",
    "o/kernel": _BLOCK + "attn_out.weight",
    "mlp_norm/scale": _BLOCK + "norm2.weight",
    "up/kernel": _BLOCK + "mlp.0.weight",
    "up/bias": _BLOCK + "mlp.0.bias",
    "down/kernel": _BLOCK + "mlp.2.weight",
    "down/bias": _BLOCK + "mlp.2.bias",
    "modulation/kernel": _BLOCK + "adaLN_modulation.weight",
    "modulation/bias": _BLOCK + "adaLN_modulation.bias",
}
REST = {
    "embed/embedding": "backbone.vocab_embed.embedding",
    "time/first/kernel": "backbone.sigma_map.mlp.0.weight",
    "time/first/bias": "backbone.sigma_map.mlp.0.bias",
    "time/second/kernel": "backbone.sigma_map.mlp.2.weight",
    "time/second/bias": "backbone.sigma_map.mlp.2.bias",
    "norm/scale": "backbone.output_layer.norm_final.weight",
    "modulation/kernel": "backbone.output_layer.adaLN_modulation.weight",
    "modulation/bias": "backbone.output_layer.adaLN_modulation.bias",
    "head/kernel": "backbone.output_layer.linear.weight",
    "head/bias": "backbone.output_layer.linear.bias",
}
REQUIRED = {"model_type": ("mdlm",), "time_conditioning": (False,)}


class _Settings(NamedTuple):
    vocab: int
    dim: int
    mlp: int
    heads: int
    depth: int
    dtype: str
    attention: str

    @property
    def wide(self) -> jnp.dtype:
        return jnp.promote_types(self.dtype, jnp.float32)


def ddit(
    *,
    vocab: int,
    dim: int,
    heads: int,
    depth: int,
    mlp: int = 0,
    dtype: str = "float32",
    attention: str = "auto",
) -> Model:
    """The network of a config; sees both sides, keeps no cache.

    Args:
      vocab: V, the mask among them.
      dim, heads, depth: d, heads, L.
      mlp: f; 0: 4 d.
      dtype, attention: as of `transformer`.

    Raises:
      UserError: a field is out of range, or fields do not fit each other.
    """
    s = _Settings(vocab, dim, mlp or 4 * dim, heads, depth, dtype, attention)
    for name, least in dict(vocab=1, dim=1, mlp=1, heads=1, depth=0).items():
        if getattr(s, name) < least:
            raise reject(f"model.{name}", getattr(s, name), f"a whole number from {least} up")
    if dim % heads or dim // heads % 2:
        raise reject("model.heads", heads, f"a divisor of dim / 2, dim = {dim}")
    if dtype not in DTYPES:
        raise reject("model.dtype", dtype, f"one of {', '.join(DTYPES)}")
    bound = (partial(function, s) for function in (_init, _apply, _hidden, _head))
    return Model(*bound, _no_cache, _no_cache, _no_cache, _no_cache, vocab)


def _no_cache(*rest: Any, **more: Any) -> None:
    raise UserError("This network keeps no cache of keys and values.")


def _init(s: _Settings, key: jax.Array) -> Params:
    """As theirs: uniform by the rows, and gates and head 0, so that all logits are."""
    d, f, depth = s.dim, s.mlp, s.depth
    keys = iter(jax.random.split(key, 7))

    def uniform(rows, *shape):
        edge = rows**-0.5
        return jax.random.uniform(next(keys), shape, s.wide, -edge, edge)

    zeros, ones = (lambda *shape: jnp.zeros(shape, s.wide)), (lambda *n: jnp.ones(n, s.wide))
    return {
        "embed": {"embedding": uniform(d, s.vocab, d)},
        "blocks": {
            "attention_norm": {"scale": ones(depth, d)},
            "qkv": {"kernel": uniform(d, depth, d, 3 * d)},
            "o": {"kernel": uniform(d, depth, d, d)},
            "mlp_norm": {"scale": ones(depth, d)},
            "up": {"kernel": uniform(d, depth, d, f), "bias": uniform(d, depth, f)},
            "down": {"kernel": uniform(f, depth, f, d), "bias": uniform(f, depth, d)},
            "modulation": {"bias": zeros(depth, 6 * d)},
        },
        "norm": {"scale": ones(d)},
        "modulation": {"bias": zeros(2 * d)},
        "head": {"kernel": zeros(d, s.vocab), "bias": zeros(s.vocab)},
    }


def _apply(s, params, tokens, positions=None, segments=None) -> Float[Array, "b t vocab"]:
    return _head(s, params, _hidden(s, params, tokens, positions, segments))


def _hidden(
    s: _Settings,
    params: Params,
    tokens: Int[Array, "b t"],
    positions: Int[Array, "#b t"] | None = None,
    segments: Int[Array, "b t"] | None = None,
) -> Float[Array, "b t d"]:
    if positions is None:
        positions = jnp.arange(tokens.shape[1])[None]
    b, t = tokens.shape
    width = s.dim // s.heads
    mask = seen(positions, segments)

    def body(h, p):
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(p["modulation"]["bias"], 6)
        x = _modulated(s, h, p["attention_norm"], shift1, scale1)
        q, k, v = jnp.split(_linear(x, p["qkv"]), 3, axis=-1)
        q, k, v = (a.reshape(b, t, s.heads, width) for a in (q, k, v))
        mixed = attention(rotated(q, turn), rotated(k, turn), v, mask, False, s.attention)
        h = h + gate1.astype(h.dtype) * _linear(mixed.reshape(b, t, s.dim), p["o"])
        x = _modulated(s, h, p["mlp_norm"], shift2, scale2)
        x = _linear(jax.nn.gelu(_linear(x, p["up"]), approximate=True), p["down"])
        return h + gate2.astype(h.dtype) * x, None

    with precisely(s.dtype):
        turn = rotation(positions, width, 1e4, s.wide)
        h = params["embed"]["embedding"][tokens].astype(s.dtype)
        h, _ = jax.lax.scan(body, h, params["blocks"])
        shift, scale = jnp.split(params["modulation"]["bias"], 2)
        return _modulated(s, h, params["norm"], shift, scale)


def _head(s: _Settings, params: Params, h: Float[Array, "b t d"]) -> Float[Array, "b t vocab"]:
    kernel = params["head"]["kernel"].astype(h.dtype)
    with precisely(s.dtype):
        logits = jnp.matmul(h, kernel, preferred_element_type=s.wide)
    return logits + params["head"]["bias"].astype(s.wide)


def _modulated(s, h, p, shift, scale) -> Float[Array, "b t d"]:
    x = h.astype(s.wide)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + EPS)
    return (x * p["scale"] * (1 + scale) + shift).astype(h.dtype)


def _linear(x, p) -> Float[Array, "b t o"]:
    y = x @ p["kernel"].astype(x.dtype)
    return y + p["bias"].astype(x.dtype) if "bias" in p else y


def load(folder_or_file: str | os.PathLike) -> tuple[Params, dict]:
    """Reads a folder of kuleshov-group/mdlm-owt or its like; the mask is its last token.

    Returns:
      params, float32 NumPy arrays, and the fields: `ddit(**fields)` is their model.

    Raises:
      UserError: as `weights.load`; also if the network is told the time.
    """
    params, fields = weights.load(folder_or_file, LAYOUT)
    silu = lambda x: x / (1 + np.exp(-x))
    affine = lambda x, p: x @ p["kernel"].astype(np.float64) + p["bias"]
    time = params.pop("time")
    waves = np.repeat([1.0, 0.0], WAVES // 2)  # cos 0, sin 0.
    condition = silu(affine(silu(affine(waves, time["first"])), time["second"]))
    for part in (params, params["blocks"]):
        made = affine(condition, part["modulation"])
        part["modulation"] = {"bias": made.astype(np.float32)}
    return params, {name: value for name, value in fields.items() if name != "condition"}


def export(
    params: Params, fields: dict, folder: str | os.PathLike, *, length: int = 1024
) -> None:
    """Writes `model.safetensors` (float32) and `config.json` that MDLM reads.

    The time's network there is 0, and the modulation all bias.

    Raises:
      UserError: the parameters are not of these fields, the MLP is not 4 d wide, or the
        folder cannot be written.
    """
    if fields.get("mlp", 0) not in (0, 4 * fields["dim"]):
        raise reject("model.mlp", fields["mlp"], f"4 dim = {4 * fields['dim']} in MDLM's files")
    fields = fields | {"condition": 128}
    shapes = jax.eval_shape(_published(**fields).init, jax.random.key(0))
    zeros = lambda shape: np.zeros(shape.shape, np.float32)
    full = params | {"time": jax.tree.map(zeros, shapes["time"])}
    full["blocks"] = dict(params["blocks"])
    for part, shape in ((full, shapes), (full["blocks"], shapes["blocks"])):
        kernel = zeros(shape["modulation"]["kernel"])
        part["modulation"] = {"kernel": kernel, "bias": part["modulation"]["bias"]}
    weights.save(full, fields, folder, LAYOUT, {"model_length": length})


def _published(condition: int, **fields: Any) -> Model:
    """The model with the tensors that are in the files."""
    made = ddit(**fields)
    d, depth = fields["dim"], fields["depth"]

    def init(key):
        params = made.init(key)
        kernel = lambda *shape: jnp.zeros(shape, jnp.float32)
        time = {
            "first": {"kernel": kernel(WAVES, condition), "bias": kernel(condition)},
            "second": {"kernel": kernel(condition, condition), "bias": kernel(condition)},
        }
        params["blocks"]["modulation"]["kernel"] = kernel(depth, condition, 6 * d)
        params["modulation"]["kernel"] = kernel(condition, 2 * d)
        return params | {"time": time}

    return made._replace(init=init)


def _ours(config: Config) -> dict:
    require(config, REQUIRED)
    names = dict(vocab="vocab_size", dim="hidden_dim", heads="n_heads", depth="n_blocks")
    fields = {ours: whole(config, name) for ours, name in names.items()}
    return checked(config, ddit, fields) | {"condition": whole(config, "cond_dim")}


def _theirs(fields: dict) -> dict:
    return {
        "model_type": "mdlm",
        "architectures": ["MDLM"],
        "vocab_size": fields["vocab"],
        "hidden_dim": fields["dim"],
        "n_heads": fields["heads"],
        "n_blocks": fields["depth"],
        "cond_dim": fields["condition"],
        "dropout": 0.0,
        "time_conditioning": False,
        "torch_dtype": "float32",
    }


def _harmless(name: str, fields: dict) -> bool:
    del fields
    return name.endswith("rotary_emb.inv_freq")


LAYOUT = Layout(REST, BLOCKS, _published, _ours, _theirs, _harmless)
