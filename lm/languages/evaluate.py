"""What a language says of texts, texts drawn from it, and measures of texts that are written.

    log q(x) = sum_i log sum_s c_i(s) B(s, x_i)        scaled forward pass
    support:   r <- (r and B(:, x_i) > 0) (A > 0)      boolean forward pass, exact
    TER, generative = E_p[-log q(x)] / L,   SER = P_p[q(x) = 0]

(sections 4 and 6.3 of the specification of arXiv:2502.09622.) A generative TER can be below
the entropy of the language where a sampler has collapsed: hence the entropies of n-grams.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Key

from lm.languages.hmm import (
    HMM,
    Language,
    choices,
    emission,
    follow,
    forward,
    initial,
    messages,
    normalised,
    support,
    vocab,
)


@jax.jit
def log_prob(language: Language, x: Int[Array, "batch length"]) -> Float[Array, " batch"]:
    """log q(x) in nats, -inf outside of the support.

    Args:
      language: of `hmm.on_device`; its type is the result's.
      x: tokens; V is any token, which gives the log-probability of the others.
    """

    def step(c, x):
        seen = c * emission(language, x)
        return forward(language, normalised(seen)), jnp.log(jnp.sum(seen, axis=-1))

    start = messages(len(x), initial(language))
    _, logs = jax.lax.scan(step, start, x.T)
    return jnp.sum(logs, axis=0)


@jax.jit
def supported(language: Language, x: Int[Array, "batch length"]) -> Bool[Array, " batch"]:
    """Whether q(x) > 0, exactly: no product of probabilities that could round to 0.

    Args:
      language: of `hmm.on_device`.
      x: tokens; V is any token.
    """
    paths = support(language)

    def step(r, x):
        seen = ((r > 0) & (emission(paths, x) > 0)).astype(jnp.float32)
        # Numbers of states, at least 1 or exactly 0 in any precision.
        return forward(paths, seen), jnp.any(seen > 0, axis=-1)

    start = messages(len(x), initial(paths))
    _, possible = jax.lax.scan(step, start, x.T)
    return jnp.all(possible, axis=0)


def draw(
    key: Key[Array, ""], language: Language, batch: int, length: int, first: int = 0
) -> Int[Array, "batch length"]:
    """Texts first ... first + batch - 1 of the language: the same ones in batches of any size.

    Args:
      key: of all texts.
      language: of `hmm.on_device`.
    """
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(first + jnp.arange(batch))
    return draw_each(keys, language, length)


@partial(jax.jit, static_argnames="length")
def draw_each(
    keys: Key[Array, " batch"], language: Language, length: int
) -> Int[Array, "batch length"]:
    """One text for each key, int32: ancestral over the states."""
    log_pi, log_next = jnp.log(initial(language)), jnp.log(choices(language))
    hidden = isinstance(language, HMM)
    log_b = jnp.log(language.B) if hidden else None

    def pick(keys, number, logits):
        # Noise of one float32 uniform would leave out what is rarer than 1e-6.
        one = lambda key, row: jax.random.categorical(
            jax.random.fold_in(key, number), row, mode="high"
        )
        return jax.vmap(one)(keys, logits).astype(jnp.int32)

    def step(state, i):
        token = pick(keys, 2 * i + 1, log_b[state]) if hidden else state % vocab(language)
        return follow(language, state, pick(keys, 2 * i + 2, log_next[state])), token

    state = pick(keys, 0, jnp.broadcast_to(log_pi, (len(keys), len(log_pi))))
    _, tokens = jax.lax.scan(step, state, jnp.arange(length))
    return tokens.T


class Generative(NamedTuple):
    """Attributes:
    mean: of -log q(x) / L over the supported texts, nats; NaN if there are none.
    error: its standard error; NaN of fewer than two.
    unsupported: share of texts with q(x) = 0.
    """

    mean: float
    error: float
    unsupported: float


def generative(log_q: Float[np.ndarray, " texts"], length: int) -> Generative:
    """The generative TER of texts; no infinity is averaged, none is floored.

    Args:
      log_q: of `log_prob`.
      length: L.
    """
    log_q = np.asarray(log_q, np.float64)
    right = np.isfinite(log_q)
    nats = -log_q[right] / length
    mean = nats.mean() if len(nats) else np.nan
    error = nats.std(ddof=1) / np.sqrt(len(nats)) if len(nats) > 1 else np.nan
    return Generative(float(mean), float(error), float(1 - right.mean()))


def ngram_counts(
    tokens: Integer[np.ndarray, "texts length"], vocab: int, n: int
) -> Integer[np.ndarray, " found"]:
    """How often each n-gram that occurs does, for n up to L."""
    length = tokens.shape[1]
    code = np.zeros((len(tokens), length - n + 1), np.int64)
    for k in range(n):
        code = code * vocab + tokens[:, k : length - n + 1 + k]
    return np.unique(code, return_counts=True)[1]


def diversity(tokens: Integer[np.ndarray, "texts length"], vocab: int) -> dict[str, float]:
    """What a collapsed sampler lacks, whatever its texts are in.

    Returns:
      entropy_1, entropy_2, entropy_3: of whole n-grams, all texts together, nats.
      distinct_2, distinct_3: different n-grams over all. What is longer than a text is left
        out.
    """
    found = {}
    for n in range(1, min(3, tokens.shape[1]) + 1):
        counts = ngram_counts(tokens, vocab, n)
        p = counts / counts.sum()
        found[f"entropy_{n}"] = float(-np.sum(p * np.log(p)))
        if n > 1:
            found[f"distinct_{n}"] = len(counts) / int(counts.sum())
    return found


def share_error(count: Any, texts: Any) -> Any:
    """The standard error of count / texts; not 0 where none or all were counted.

    By the share with one more of each kind (Agresti and Coull), about 1 / texts there.
    """
    p = (np.asarray(count, np.float64) + 1) / (np.asarray(texts, np.float64) + 2)
    return np.sqrt(p * (1 - p) / (np.asarray(texts, np.float64) + 2))


def bits(nats: float) -> float:
    """Nats as bits."""
    return nats / np.log(2)
