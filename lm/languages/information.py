"""Entropies and information curves of languages, exactly where that can be had.

    h(a) = (1/L) sum_i E_x E_S[-log q(x_i | x_S)],  S: each other position with probability a

(Section 5.2 of the specification of arXiv:2502.09622.) Its integral over a is H(q) / L. Of a
stationary first-order chain only the nearest visible neighbours matter, at distances d1 and d2:

    e(d) = sum_u pi_u H(P^d[u])          H(x_i | left at d1)
    H(x_i | both) = e(d1) + e(d2) - e(d1 + d2),    one of them: e(d),   none: H(pi)

By Monte Carlo, for any language, the curve is that of `lm.masked.curve` with the oracle.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from common.errors import UserError
from lm.languages import evaluate, hmm

TEXTS = 4096


class Entropy(NamedTuple):
    """H(q) of a text, nats; the error is 0 where it is exact."""

    value: float
    error: float


def entropy(language: Any, length: int, texts: int = TEXTS, seed: int = 0) -> Entropy:
    """H(q) of texts of L tokens.

    n-grams: H(start's newest n - 1 tokens that are in the text) and so on, in closed form.
    Other languages: the mean of -log q over random texts, in float32, with its error.

    Args:
      language: float64 on the host.
    """
    if isinstance(language, hmm.NGram):
        return Entropy(_ngram_entropy(language, length), 0.0)
    device = hmm.on_device(language)
    x = jax.jit(evaluate.draw, static_argnums=(2, 3))(
        jax.random.key(seed), device, texts, length
    )
    nats = -np.asarray(jax.jit(evaluate.log_prob)(device, x), np.float64)
    return Entropy(float(nats.mean()), float(nats.std(ddof=1) / np.sqrt(texts)))


def _ngram_entropy(language: hmm.NGram, length: int) -> float:
    """Tokens beyond the first n - 1 cost what their contexts say; those are marginals."""
    n, v = np.ndim(language.table), hmm.vocab(language)
    table = np.asarray(language.table, np.float64)
    law = np.asarray(language.start, np.float64)
    # The joint law of the last n - 1 tokens of the text so far, as far as there are any.
    total, rows, before = 0.0, _nats(table).reshape(-1), law
    for i in range(length):
        if i < n - 1:
            # Of the context at i only the newest i + 1 tokens are in the text.
            seen = law.reshape(-1, v ** (i + 1)).sum(axis=0)
            total = float(_nats(seen[None])[0])
        else:
            total += float(before.reshape(-1) @ rows)
        before = law
        law = np.einsum("ok,okv->kv", law.reshape(v, -1), table.reshape(v, -1, v))
        law = law.reshape(before.shape)
    return total


def first_order(language: Any) -> bool:
    """Whether the tokens are a stationary first-order chain: the exact curve is known."""
    try:
        _chain(language)
    except UserError:
        return False
    return True


def exact_curve(
    language: Any, length: int, a: Float[np.ndarray, " k"]
) -> Float[np.ndarray, " k"]:
    """h(a) of texts of L tokens, both ends taken as they are, float64.

    Raises:
      UserError: the language is no stationary first-order chain.
    """
    pi, p = _chain(language)
    flat = float(_nats(pi[None])[0])
    e, power = np.zeros(length + 1), np.eye(len(pi))
    for d in range(1, length + 1):
        power = power @ p
        e[d] = pi @ _nats(power)
    distance = np.arange(1, length + 1)
    within = np.concatenate([[0.0], np.cumsum(e[1:])])  # Of e up to d.
    both = np.zeros(length + 1)
    for s in range(2, length):
        both[s] = (length - s) * (2 * within[s - 1] - (s - 1) * e[s])
    found = []
    for share in np.asarray(a, np.float64):
        rest = 1 - share
        inner = share**2 * sum(both[s] * rest ** (s - 2) for s in range(2, length))
        # Neighbours on one side at d, none on the other, over all places of the token.
        one = 0.0
        for d in distance[:-1]:
            others = rest ** np.arange(d - 1, length - 1.0) if d < length else np.zeros(0)
            one += e[d] * share * others.sum()
        none = length * rest ** (length - 1) * flat
        found.append((inner + 2 * one + none) / length)
    return np.array(found)


def _chain(language: Any) -> tuple[np.ndarray, np.ndarray]:
    """Start law and transitions over tokens.

    Raises:
      UserError: there are none.
    """
    if isinstance(language, hmm.NGram):
        if np.ndim(language.table) != 2:
            raise UserError("An n-gram of n > 2 is no first-order chain of tokens.")
        pi, p = np.asarray(language.start, np.float64), np.asarray(language.table, np.float64)
    else:
        b = np.asarray(language.B)
        if b.shape[0] != b.shape[1] or not np.array_equal(b, np.eye(len(b))):
            raise UserError("The states of this HMM are not its tokens.")
        pi, p = np.asarray(language.pi, np.float64), np.asarray(language.A, np.float64)
    if np.abs(pi @ p - pi).max() > 1e-9:
        raise UserError("The start of this chain is not stationary.")
    return pi, p


def _nats(p: Float[np.ndarray, "*rows v"]) -> Float[np.ndarray, "*rows"]:
    """Entropies of the rows; 0 log 0 = 0."""
    return -np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0), axis=-1)
