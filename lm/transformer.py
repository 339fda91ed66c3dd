"""A LLaMA-style decoder: RMSNorm first, rotary positions, SwiGLU, no biases.

    h <- h + Attention(RMSNorm(h)) Wo,   h <- h + (silu(x Wgate) * (x Wup)) Wdown,
    x = RMSNorm(h),   logits = RMSNorm(h) Whead

(Touvron et al., arXiv:2302.13971; the sizes and the start of arXiv:2506.14562.) Rotary
positions pair the two halves of a head, as Hugging Face's LLaMA does, so that `lm.weights`
can hand the parameters over as they are. Blocks are stacked along axis 0 and scanned:

    embed/embedding [V, d]                     norm/scale [d]      head/kernel [d, V]
    embed/position [absolute, d], if there is one
    blocks/q/kernel [L, d, heads * c]          blocks/o/kernel [L, heads * c, d]
    blocks/{k,v}/kernel [L, d, kv_heads * c]   c = d / heads
    blocks/{gate,up}/kernel [L, d, f]          blocks/down/kernel [L, f, d]
    blocks/{attention_norm,mlp_norm}/scale [L, d]
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from common.errors import reject
from lm.attention import KINDS, attention, precisely, rotated, rotation, seen
from lm.model import Cache, Model, Params

DTYPES = ("float32", "bfloat16", "float64")

# Of arXiv:2506.14562; every other setting is what `transformer` has by itself.
SIZES = {
    "60m": dict(vocab=32000, dim=512, mlp=1376, heads=8, depth=8),
    "135m": dict(vocab=32000, dim=768, mlp=2048, heads=12, depth=12),
    "350m": dict(vocab=32000, dim=1024, mlp=2736, heads=16, depth=24),
    "1b": dict(vocab=32000, dim=2048, mlp=5461, heads=32, depth=24),
}


class _Settings(NamedTuple):
    vocab: int
    dim: int
    mlp: int
    heads: int
    depth: int
    kv_heads: int
    rope_base: float
    norm_eps: float
    init_std: float
    remat: bool
    unroll: int
    dtype: str
    attention: str
    tie: bool
    causal: bool
    block: int
    absolute: int

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def wide(self) -> jnp.dtype:
        """Of parameters, statistics of norms, and logits."""
        return jnp.promote_types(self.dtype, jnp.float32)


def transformer(
    *,
    vocab: int,
    dim: int,
    mlp: int,
    heads: int,
    depth: int,
    kv_heads: int = 0,
    rope_base: float = 1e4,
    norm_eps: float = 1e-6,
    init_std: float = 0.02,
    remat: bool = False,
    unroll: int = 1,
    dtype: str = "float32",
    attention: str = "auto",
    tie: bool = False,
    causal: bool = True,
    block: int = 0,
    absolute: int = 0,
) -> Model:
    """The decoder of a config.

    Args:
      vocab: V, tokens are 0 ... V - 1.
      dim, mlp, heads, depth: d, f, heads, L.
      kv_heads: of keys and values, each shared by heads / kv_heads queries (GQA); 0: heads.
      rope_base: pair i of a head turns by position * rope_base^(-2i/c).
      norm_eps: added to the mean square in RMSNorm.
      init_std: all matrices and the embedding start as normal(0, init_std).
      remat: keep only each block's input for the gradient, compute the rest again.
      unroll: layers in one turn of the scan; all is faster for a small model on a CPU.
      dtype: of the products and the residual stream. float32 and float64 mean just that,
        on any device; bfloat16 is the fast one. Parameters, norms, softmax and logits are
        float32 in any case, and float64 with it (which needs JAX's x64).
      attention: xla; cudnn (flash attention, bfloat16 only); auto: cudnn where it can be.
      tie: the head is the embedding, transposed; `head` is absent.
      causal: a token sees no later ones; False: all (for masked diffusion, with `fill` and
        `window` in the place of `start` and `extend`).
      block: of a model that is not causal; position i sees j iff j // block <= i // block,
        so that nothing changes any more in blocks on the left; 0: all see all.
      absolute: rows of a table of learned positions, added to the embedding (the last row
        serves all beyond); 0: none. Rotations tell distances only: a model that sees both
        sides and no start cannot know where it is.

    Raises:
      UserError: a field is out of range, or fields do not fit each other.
    """
    fields = dict(locals())  # The arguments, nothing else yet.
    s = _checked(_Settings(**fields | {"kv_heads": kv_heads or heads}))
    functions = (_init, _apply, _hidden, _head, _start, _extend, _fill, _window)
    return Model(*(partial(function, s) for function in functions), s.vocab, s.block)


def parameters(
    *,
    vocab: int,
    dim: int,
    mlp: int,
    heads: int,
    depth: int,
    kv_heads: int = 0,
    tie: bool = False,
    absolute: int = 0,
    **rest: Any,
) -> int:
    """How many there are. Takes all arguments of `transformer`; `rest` changes nothing."""
    del rest
    embeddings = vocab * dim * (1 if tie else 2) + absolute * dim
    attention = 2 * dim * dim + 2 * dim * (dim // heads) * (kv_heads or heads)
    return embeddings + depth * (attention + 3 * dim * mlp + 2 * dim) + dim


def flops_per_token(*, length: int, **model: Any) -> int:
    """Of a training step (forward 1/3, backward 2/3), for rows of `length` tokens.

    6 N + 12 L d length (Chowdhery et al., arXiv:2204.02311, appendix B): N counts what
    multiplies a token, so not the embedding, which is looked up, nor norms. By the same
    convention attention counts in full, masked or not, and recomputing (`remat`) does not.

    Args:
      length: of the rows.
      model: the arguments of `transformer`.
    """
    dim, depth, vocab = model["dim"], model["depth"], model["vocab"]
    looked_up = 0 if model.get("tie", False) else vocab * dim
    looked_up += model.get("absolute", 0) * dim
    norms = (2 * depth + 1) * dim
    products = parameters(**model) - looked_up - norms
    return 6 * products + 12 * depth * dim * length


def rules(fsdp: bool) -> tuple[tuple[str, P], ...]:
    """Placements for `Experiment.rules`: tensor parallel over "model", and with `fsdp` the
    other axis of every matrix over "data".

    First matrices are split by columns, second ones by rows: two sums over "model" a block.
    "model" must divide heads, kv_heads, mlp and vocab, "data" dim (5461 of 1B: fsdp alone).
    """
    data = "data" if fsdp else None
    return (
        (r"blocks/(q|k|v|gate|up)/kernel", P(None, data, "model")),  # Axis 0 is depth.
        (r"blocks/(o|down)/kernel", P(None, "model", data)),
        (r"embed/embedding", P("model", data)),
        (r"head/kernel", P(data, "model")),
    )


def _checked(s: _Settings) -> _Settings:
    whole = "a whole number from {} up"
    for name in ("vocab", "dim", "mlp", "heads", "unroll"):
        if getattr(s, name) < 1:
            raise reject(f"model.{name}", getattr(s, name), whole.format(1))
    for name in ("depth", "absolute"):
        if getattr(s, name) < 0:
            raise reject(f"model.{name}", getattr(s, name), whole.format(0))
    if s.dim % s.heads:
        raise reject("model.heads", s.heads, f"a divisor of dim = {s.dim}")
    if s.head_dim % 2:
        allowed = f"such that dim / heads is even, not {s.head_dim}: rotations need pairs"
        raise reject("model.heads", s.heads, allowed)
    if s.kv_heads < 1 or s.heads % s.kv_heads:
        raise reject("model.kv_heads", s.kv_heads, f"0 or a divisor of heads = {s.heads}")
    for name in ("rope_base", "norm_eps"):
        if not 0 < getattr(s, name) < float("inf"):
            raise reject(f"model.{name}", getattr(s, name), "a finite number above 0")
    if not 0 <= s.init_std < float("inf"):
        raise reject("model.init_std", s.init_std, "a finite number from 0 up")
    if s.dtype not in DTYPES:
        raise reject("model.dtype", s.dtype, f"one of {', '.join(DTYPES)}")
    if s.attention not in KINDS:
        raise reject("model.attention", s.attention, f"one of {', '.join(KINDS)}")
    if s.attention == "cudnn" and s.dtype != "bfloat16":
        allowed = f"auto or xla with dtype {s.dtype}; cudnn takes bfloat16 only"
        raise reject("model.attention", s.attention, allowed)
    if s.block < 0 or (s.block and s.causal):
        raise reject("model.block", s.block, "0, or from 1 up where model.causal is False")
    return s


def _init(s: _Settings, key: jax.Array) -> Params:
    d, f, depth, c = s.dim, s.mlp, s.depth, s.head_dim
    shapes = {
        "q": (d, s.heads * c),
        "k": (d, s.kv_heads * c),
        "v": (d, s.kv_heads * c),
        "o": (s.heads * c, d),
        "gate": (d, f),
        "up": (d, f),
        "down": (f, d),
    }
    position = jax.random.fold_in(key, 1)
    embed, head, *keys = jax.random.split(key, 2 + len(shapes))
    normal = lambda key, shape: s.init_std * jax.random.normal(key, shape, s.wide)
    blocks = {
        name: {"kernel": normal(k, (depth, *shape))}
        for (name, shape), k in zip(shapes.items(), keys, strict=True)
    }
    ones = lambda *shape: {"scale": jnp.ones(shape, s.wide)}
    blocks |= {"attention_norm": ones(depth, d), "mlp_norm": ones(depth, d)}
    params = {
        "embed": {"embedding": normal(embed, (s.vocab, d))},
        "blocks": blocks,
        "norm": ones(d),
    }
    if s.absolute:
        params["embed"]["position"] = normal(position, (s.absolute, d))
    return params if s.tie else params | {"head": {"kernel": normal(head, (d, s.vocab))}}


def _apply(
    s: _Settings,
    params: Params,
    tokens: Int[Array, "batch time"],
    positions: Int[Array, "#batch time"] | None = None,
    segments: Int[Array, "batch time"] | None = None,
) -> Float[Array, "batch time vocab"]:
    return _head(s, params, _hidden(s, params, tokens, positions, segments))


def _hidden(s, params, tokens, positions=None, segments=None) -> Float[Array, "batch time d"]:
    return _read(s, params, tokens, positions, segments, False)[0]


def _fill(s, params, tokens, positions=None, segments=None) -> tuple[Array, Cache]:
    if s.causal:
        raise reject("model.causal", s.causal, "False: with no later tokens seen, extend")
    return _read(s, params, tokens, positions, segments, True)


def _read(
    s: _Settings,
    params: Params,
    tokens: Int[Array, "batch time"],
    positions: Int[Array, "#batch time"] | None,
    segments: Int[Array, "batch time"] | None,
    keep: bool,
) -> tuple[Float[Array, "batch time d"], Cache | None]:
    """Features of whole rows, and with `keep` their keys and values."""
    if positions is None:
        positions = jnp.arange(tokens.shape[1])[None]
    mask = seen(positions, segments, s.block)

    def attend(q, k, v):
        mixed = attention(q, k, v, mask, s.causal, s.attention)
        return mixed, {"k": k, "v": v} if keep else None

    with precisely(s.dtype):
        turn = rotation(positions, s.head_dim, s.rope_base, s.wide)
        body = lambda h, p: _block(s, p, h, turn, attend)
        if s.remat:
            # A scan's body runs in a loop of its own, where nothing could be merged anyway.
            body = jax.checkpoint(body, prevent_cse=False)
        h, kept = jax.lax.scan(
            body, _embedded(s, params, tokens, positions), params["blocks"], unroll=s.unroll
        )
        return _norm(s, h, params["norm"]), kept


def _start(s: _Settings, batch: int, length: int, dtype: Any = None) -> Cache:
    if not s.causal:
        raise reject("model.causal", s.causal, "True: with later tokens seen, none is final")
    shape = (s.depth, batch, length, s.kv_heads, s.head_dim)
    return {name: jnp.zeros(shape, dtype or s.dtype) for name in ("k", "v")}


def _extend(
    s: _Settings,
    params: Params,
    cache: Cache,
    tokens: Int[Array, "batch time"],
    positions: Int[Array, "#batch time"],
) -> tuple[Float[Array, "batch time vocab"], Cache]:
    slots = jnp.arange(cache["k"].shape[2])
    mask = (slots <= positions[:, :, None])[:, None]
    # For a few queries there is nothing that flash attention could save.
    few = s._replace(attention="xla")
    h, cache = _cached(few, params, cache, tokens, positions, positions, mask)
    return _head(s, params, h), cache


def _window(
    s: _Settings,
    params: Params,
    cache: Cache,
    tokens: Int[Array, "batch time"],
    start: Int[Array, ""] | int,
    positions: Int[Array, "#batch length"] | None = None,
    segments: Int[Array, "batch length"] | None = None,
) -> tuple[Float[Array, "batch time d"], Cache]:
    length = cache["k"].shape[2]
    if positions is None:
        positions = jnp.arange(length)[None]
    slots = start + jnp.arange(tokens.shape[1])
    inside = jnp.minimum(slots, length - 1)
    mask = seen(positions, segments, s.block, inside)
    return _cached(s, params, cache, tokens, slots[None], positions[:, inside], mask)


def _cached(
    s: _Settings,
    params: Params,
    cache: Cache,
    tokens: Int[Array, "batch time"],
    slots: Int[Array, "#batch time"],
    positions: Int[Array, "#batch time"],
    mask: Bool[Array, "#batch 1 time length"] | None,
) -> tuple[Float[Array, "batch time d"], Cache]:
    """Features of some tokens that see what is in the cache once their slots are written."""
    row = jnp.arange(len(tokens))[:, None]

    def body(carry, layer):
        h, cache = carry
        p, number = layer

        def attend(q, k, v):
            # The cache is carried, not scanned over, so that only new slots are written.
            write = lambda old, new: old.at[number, row, slots].set(
                new.astype(old.dtype), mode="drop"
            )
            kept = jax.tree.map(write, cache, {"k": k, "v": v})
            k, v = (kept[name][number].astype(q.dtype) for name in "kv")
            return attention(q, k, v, mask, False, s.attention), kept

        return _block(s, p, h, turn, attend), None

    with precisely(s.dtype):
        turn = rotation(positions, s.head_dim, s.rope_base, s.wide)
        start = _embedded(s, params, tokens, positions), cache
        (h, cache), _ = jax.lax.scan(body, start, (params["blocks"], jnp.arange(s.depth)))
        return _norm(s, h, params["norm"]), cache


def _block(s: _Settings, p: Params, h: Float[Array, "b t d"], turn, attend) -> tuple:
    """One layer; `attend` is (q [b t h c], k, v) -> (mixed values, what to keep)."""
    b, t, _ = h.shape
    x = _norm(s, h, p["attention_norm"])
    q, k, v = (_linear(x, p[name]).reshape(b, t, -1, s.head_dim) for name in "qkv")
    mixed, kept = attend(rotated(q, turn), rotated(k, turn), v)
    h = h + _linear(mixed.reshape(b, t, s.dim), p["o"])
    x = _norm(s, h, p["mlp_norm"])
    inner = jax.nn.silu(_linear(x, p["gate"])) * _linear(x, p["up"])
    return h + _linear(inner, p["down"]), kept


def _norm(s: _Settings, x: Float[Array, "b t d"], p: Params) -> Float[Array, "b t d"]:
    wide = x.astype(s.wide)
    mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean_square + s.norm_eps) * p["scale"]).astype(x.dtype)


def _linear(x: Float[Array, "b t i"], p: Params) -> Float[Array, "b t o"]:
    return x @ p["kernel"].astype(x.dtype)


def _embedded(
    s: _Settings, params: Params, tokens: Int[Array, "b t"], positions: Int[Array, "#b t"]
) -> Float[Array, "b t d"]:
    # Rounded after the look-up, so that the gradient is summed up in full precision.
    h = params["embed"]["embedding"][tokens]
    if s.absolute:
        h = h + params["embed"]["position"][jnp.minimum(positions, s.absolute - 1)]
    return h.astype(s.dtype)


def _head(s: _Settings, params: Params, h: Float[Array, "b t d"]) -> Float[Array, "b t vocab"]:
    kernel = params["embed"]["embedding"].T if s.tie else params["head"]["kernel"]
    with precisely(s.dtype):
        return jnp.matmul(h, kernel.astype(h.dtype), preferred_element_type=s.wide)
