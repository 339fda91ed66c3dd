"""Draws of tokens: unbiased in the tail, and the same whatever the batch is.

Gumbel noise made of one float32 uniform ends at 15.94, so tokens of a probability below about
1e-6 would come too rarely, and with "stay masked" in the same draw those below 1e-4, too
(section 7 of the specification). Hence *where* is decided apart from *what*, and *what* is
drawn with mode="high" noise, whose range is about 32, and never in bfloat16.

Every position of every text has a key of its own. So a token depends neither on the size of the
batch nor on how many positions one call of the head takes, nor on the number of devices.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from lm.generate import restrict
from lm.masked.settings import Settings


def each(
    key: Key[Array, ""], count: int, first: int | Int[Array, ""] = 0
) -> Key[Array, " {count}"]:
    """The keys of texts first ... first + count - 1."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(first + jnp.arange(count))


def fold(keys: Key[Array, " batch"], data: Int[Array, "..."] | int) -> Key[Array, " batch"]:
    """Every text's key with a number folded in: one for all, or each its own."""
    return jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(data, keys.shape))


def logits(
    settings: Settings, log_f: Float[Array, "*batch vocab"]
) -> Float[Array, "*batch vocab"]:
    """What is drawn from: in float32 at least, by temperature, top_k and top_p, in this order.

    Not normalised. At temperature 0 the temperature is left out.
    """
    found = log_f.astype(jnp.promote_types(log_f.dtype, jnp.float32))
    found = found / (settings.temperature or 1.0)
    return restrict(found, settings.top_k, settings.top_p)


def draw(
    keys: Key[Array, " batch"],
    settings: Settings,
    log_f: Float[Array, "batch n vocab"],
    at: Int[Array, "batch n"],
    greedy: Array | bool = False,
) -> Int[Array, "batch n"]:
    """One token for each row of log f.

    Args:
      keys: of the texts; of one call, if a position may be drawn more than once.
      log_f: any floating type.
      at: the position that each row is of: its key is folded from it.
      greedy: True, or True where [B, n], for the most probable token, the first of equals.

    Returns:
      int32; at temperature 0 the most probable ones, and no noise is made.
    """
    found = logits(settings, log_f)
    best = jnp.argmax(found, axis=-1).astype(jnp.int32)
    if settings.temperature == 0 or greedy is True:
        return best

    def one(key, at, row):
        return jax.random.categorical(jax.random.fold_in(key, at), row, mode="high")

    drawn = jax.vmap(jax.vmap(one, (None, 0, 0)))(keys, at, found).astype(jnp.int32)
    return drawn if greedy is False else jnp.where(greedy, best, drawn)
