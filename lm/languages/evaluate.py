"""What can be said exactly of a text: its probability, and whether the language has it.

    log q(x) = sum_i log z_i,   z_i = sum_s c_i(s) B[s, x_i],   c_{i+1} = c_i B[., x_i] / z_i A
    q(x) > 0  iff  the set of states that can have written x_0 ... x_i never is empty

(Section 6.3 of the specification of arXiv:2502.09622.) The support is a pass over sets of
states, exact in any precision; a log-likelihood may underflow. Scores of many texts and the
entropies of n-grams (section 4) are here, too.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from lm.languages import hmm


def log_prob(language: Any, x: Int[Array, "batch length"]) -> Float[Array, " batch"]:
    """log q(x) in nats; -inf outside of the support.

    Args:
      language: of `hmm.on_device`; its type is that of the result.
      x: tokens below V.
    """
    first = hmm.start(language)

    def body(carry, token):
        c, total = carry
        seen = c * hmm.emission(language, token)
        z = seen.sum(axis=1)
        scaled = seen / jnp.where(z == 0, 1.0, z)[:, None]
        return (hmm.forward(language, scaled), total + jnp.log(z)), None

    begin = jnp.broadcast_to(first, (len(x), first.size)), jnp.zeros(len(x), first.dtype)
    (_, total), _ = jax.lax.scan(body, begin, x.T)
    return total


def supported(language: Any, x: Int[Array, "batch length"]) -> Bool[Array, " batch"]:
    """Whether q(x) > 0, by sets of states."""
    allowed = jax.tree.map(lambda table: (table > 0).astype(jnp.float32), language)
    first = hmm.start(allowed)

    def body(alive, token):
        alive = alive * hmm.emission(allowed, token)
        # Counts of ways, at most S: exact in float32.
        return (hmm.forward(allowed, alive) > 0).astype(jnp.float32), alive.any(axis=1)

    begin = jnp.broadcast_to(first, (len(x), first.size))
    return jnp.all(jax.lax.scan(body, begin, x.T)[1], axis=0)


def draw(
    key: Key[Array, ""], language: Any, batch: int, length: int
) -> Int[Array, "batch length"]:
    """Texts of the language; text b depends on the key and b only."""
    keys = jax.vmap(lambda b: jax.random.fold_in(key, b))(jnp.arange(batch))
    return draw_each(keys, language, length)


def draw_each(
    keys: Key[Array, " batch"], language: Any, length: int
) -> Int[Array, "batch length"]:
    """One text for each key: states from left to right, and what they emit."""
    v, count = hmm.vocab(language), hmm.states(language)
    choose = lambda key, p: jax.random.categorical(key, jnp.log(p), mode="high")

    def one(key):
        def token(state, i):
            if isinstance(language, hmm.NGram):
                return state % v
            return choose(jax.random.fold_in(key, 2 * i + 1), language.B[state])

        def following(state, i):
            of_step = jax.random.fold_in(key, 2 * i + 2)
            if isinstance(language, hmm.NGram):
                rows = language.table.reshape(count, v)
                return (state * v + choose(of_step, rows[state])) % count
            return choose(of_step, language.A[state])

        def body(state, i):
            return following(state, i).astype(jnp.int32), token(state, i).astype(jnp.int32)

        begin = choose(jax.random.fold_in(key, 0), hmm.start(language)).astype(jnp.int32)
        return jax.lax.scan(body, begin, jnp.arange(length))[1]

    return jax.vmap(one)(keys)


class Generative(NamedTuple):
    """E_p[-log q(x)] / L over the texts that the language has, and what share it has not.

    Attributes:
      mean, error: nats per token, and the standard error; NaN without any such text.
      unsupported: share of the texts with q(x) = 0. They are in no mean: it would be infinite.
    """

    mean: float
    error: float
    unsupported: float


def generative(log_q: Float[np.ndarray, " texts"], length: int) -> Generative:
    """The generative token error of texts, from their log q(x)."""
    log_q = np.asarray(log_q, np.float64)
    fine = np.isfinite(log_q)
    some = -log_q[fine] / length
    if not len(some):
        return Generative(float("nan"), float("nan"), 1.0)
    error = some.std(ddof=1) / np.sqrt(len(some)) if len(some) > 1 else float("nan")
    return Generative(float(some.mean()), float(error), float(1 - fine.mean()))


def diversity(tokens: Int[np.ndarray, "texts length"], vocab: int) -> dict[str, float]:
    """Entropies of n-grams of all texts together, nats, and distinct-n.

    Returns:
      entropy_n for n = 1, 2, 3 (of a whole n-gram, not per token) and distinct_n for n = 2, 3:
      different n-grams over all n-grams. Those that do not fit a text are left out.
    """
    tokens = np.asarray(tokens, np.int64)
    found = {}
    for n in (1, 2, 3):
        width = tokens.shape[1] - n + 1
        if width < 1:
            continue
        code = np.zeros((len(tokens), width), np.int64)
        for i in range(n):
            code = code * vocab + tokens[:, i : i + width]
        _, number = np.unique(code, return_counts=True)
        p = number / number.sum()
        found[f"entropy_{n}"] = float(-(p * np.log(p)).sum())
        if n > 1:
            found[f"distinct_{n}"] = float(len(number) / number.sum())
    return found


def bits(nats: float) -> float:
    """Nats as bits."""
    return nats / float(np.log(2))
