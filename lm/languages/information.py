"""Entropy of a language and its information curve: what any number of steps can reach.

    h(a) = (1/L) sum_i E_x E_S [-log q(x_i | x_S)]     S: each other position, with chance a
    integral_0^1 h(a) da = H(q) / L
    NELBO_T / L = sum_k w_k h(a_k),   a_k = w_0 + ... + w_{k-1}        left Riemann sum
    gap_T = NELBO_T / L - H(q) / L,   0 <= gap_T <= (h(0) - h(1)) / T for even weights

(section 5.2 of the specification of arXiv:2502.09622.) In a chain of first order only the
nearest visible neighbours matter. With M_i = H(x_i) and R_i(d) = H(x_{i+d} | x_i), both from
the laws of a text that begins at position 0, stationary or not,

    H(x_i | x_l, x_r) = R_l(i - l) + R_i(r - i) - R_l(r - l)

where without a left neighbour R_l(d) is M_{l+d}, and without a right one the last two terms are
0. Summed over texts, with w_j(k) the chance that of k positions the outermost j (0, 1 or 2) are
visible and the others are not, and R(d) = sum_i R_i(d),

    L h = sum_i w_0(i) M_i + 2 sum_d w_1(d) R(d)
          - sum_d (d - 1) w_2(d) R(d) - sum_r r w_1(r) M_r

exactly, for every a and for every *number* of visible positions, at a cost of L S^3 in all.
Everything but `sampled` is float64 on the host.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key
from scipy.special import gammaln, xlogy

from common.errors import UserError
from lm.languages import hmm
from lm.languages.evaluate import draw, log_prob
from lm.languages.hmm import HMM, Language, NGram
from lm.languages.oracle import oracle
from lm.masked.curve import Estimate
from lm.masked.denoiser import denoise

BELIEFS = 1024  # Laws of the state that texts can lead to, for an exact entropy
NUMBERS = 10**7  # and what one step of them may hold
SAME = 11  # Decimals to which two of them must agree to be one
BATCH = 256


def entropy(language: Language, length: int, texts: int = 4096, seed: int = 0) -> Estimate:
    """H(q) of texts of L tokens, nats a text: exact with error 0, or by Monte Carlo.

    Exact for n-grams and wherever the laws of the state given the text so far are few: pairs,
    parity, sums, chains of first order, all HMMs whose state can be read off the text.

    Args:
      texts, seed: of Monte Carlo, float32.
    """
    table = hmm.check(language)
    if isinstance(table, NGram):
        return Estimate(_ngram_entropy(table, length), 0.0)
    exact = _by_beliefs(table, length)
    if exact is not None:
        return Estimate(exact, 0.0)
    on_device, key = hmm.on_device(table), jax.random.key(seed)
    found = [
        np.asarray(log_prob(on_device, draw(key, on_device, BATCH, length, first)))
        for first in range(0, texts, BATCH)
    ]
    nats = -np.concatenate(found)[:texts].astype(np.float64)
    return Estimate(float(nats.mean()), float(nats.std(ddof=1) / np.sqrt(texts)))


def first_order(language: Language) -> bool:
    """Whether the tokens themselves are a Markov chain: 2-grams, or a state for each token."""
    if isinstance(language, NGram):
        return hmm.order(language) == 2
    shown = np.asarray(language.B) > 0
    return bool((shown.sum(axis=1) == 1).all() and (shown.sum(axis=0) <= 1).all())


def exact_curve(
    language: Language, length: int, visible: Float[np.ndarray, " points"]
) -> Float[np.ndarray, " points"]:
    """h(a) of a first-order chain, exactly, in nats.

    Args:
      visible: a, each from 0 to 1.

    Raises:
      UserError: the language is of a higher order.
    """
    a, k = np.asarray(visible, np.float64)[:, None], np.arange(length)
    one, two = np.maximum(k - 1, 0), np.maximum(k - 2, 0)
    return _curve(
        language,
        length,
        (1 - a) ** k,
        np.where(k >= 1, a * (1 - a) ** one, 0),
        np.where(k >= 2, a**2 * (1 - a) ** two, 0),
    )


def exact_counts(language: Language, length: int) -> Float[np.ndarray, " {length}"]:
    """h_n of a first-order chain with exactly n = 0 ... L - 1 other positions visible, nats.

    Raises:
      UserError: the language is of a higher order.
    """
    n, k, others = np.arange(length)[:, None], np.arange(length), length - 1

    def chance(seen):
        """Of k given positions, exactly `seen` given ones are among the n visible."""
        rest = others - k
        fits = (k >= seen) & (n >= seen) & (n - seen <= rest)
        top = _log_binomial(np.where(fits, rest, 0), np.where(fits, n - seen, 0))
        return np.where(fits, np.exp(top - _log_binomial(others, n)), 0)

    return _curve(language, length, chance(0), chance(1), chance(2))


def nelbo(h: Float[np.ndarray, " steps"], weights: Float[np.ndarray, " steps"]) -> float:
    """NELBO_T / L from h(a_k) at the visible shares of `shares`."""
    return float(np.dot(weights, h))


def shares(weights: Float[np.ndarray, " steps"]) -> Float[np.ndarray, " steps"]:
    """a_k = w_0 + ... + w_{k-1}, what is visible before each step."""
    return np.minimum(np.concatenate([[0.0], np.cumsum(weights)[:-1]]), 1)


def gap(language: Language, length: int, weights: Float[np.ndarray, " steps"]) -> float:
    """gap_T of the exact denoiser on a first-order chain, exactly, nats per token.

    Raises:
      UserError: the language is of a higher order.
    """
    h = exact_curve(language, length, shares(weights))
    return nelbo(h, weights) - entropy(language, length).value / length


def sampled(
    key: Key[Array, ""],
    language: Language,
    length: int,
    visible: Float[np.ndarray, " points"],
    texts: int,
    above_entropy: bool = False,
) -> tuple[Float[np.ndarray, " points"], Float[np.ndarray, " points"]]:
    """h(a) of any language by Monte Carlo, and its standard errors, nats.

    The exact denoiser says q(x_i | the other visible tokens) at visible positions, too, so
    every position of every text counts.

    Args:
      key: of the texts and of what is visible.
      language: of `hmm.on_device`.
      texts: at least 2; rounded up to a multiple of 256.
      above_entropy: h(a) - H(q) / L instead: each text's own -log q(x) / L is taken off it,
        which makes the errors at large a several times smaller.
    """
    parts, a = -(-texts // BATCH), jnp.asarray(visible)
    found = [
        _losses(jax.random.fold_in(key, part), language, length, a, above_entropy)
        for part in range(parts)
    ]
    each = np.concatenate([np.asarray(one, np.float64) for one in found], axis=1)
    return each.mean(axis=1), each.std(axis=1, ddof=1) / np.sqrt(each.shape[1])


@partial(jax.jit, static_argnames=("length", "above_entropy"))
def _losses(key, language, length, visible, above_entropy):
    """[points, BATCH]: mean loss of one batch of texts at each share."""
    vocab = hmm.vocab(language)
    x = draw(jax.random.fold_in(key, 0), language, BATCH, length)
    own = -log_prob(language, x) / length if above_entropy else 0.0
    of_masks = jax.random.fold_in(key, 1)

    def one(this):
        number, a = this
        u = jax.random.uniform(jax.random.fold_in(of_masks, number), x.shape)
        log_f = denoise(oracle(vocab), language, jnp.where(u < a, x, vocab))
        return -jnp.take_along_axis(log_f, x[..., None], axis=-1)[..., 0].mean(axis=1) - own

    return jax.lax.map(one, (jnp.arange(len(visible)), visible))


def _curve(language, length, w0, w1, w2):
    """h from the chances w_j(k) [points, L] of the module docstring."""
    if not first_order(language):
        raise UserError(
            "The information curve has a closed form for chains of first order, but this "
            "language is none: its tokens depend on more than the one before."
        )
    # Each state has a token of its own, so states may stand for tokens.
    table = hmm.dense(language)
    laws = _laws(table, length)
    # R(d) = sum_s (sum over i < L - d of the law at i)(s) H(A^d(s, .)).
    total = np.concatenate([np.zeros((1, len(table.pi))), np.cumsum(laws, axis=0)])
    power, r = np.eye(len(table.pi)), np.zeros(length)
    for d in range(1, length):
        power = power @ table.A
        r[d] = total[length - d] @ _entropy(power)
    k, m = np.arange(length), _entropy(laws)
    found = w0 @ m + 2 * w1 @ r - (np.maximum(k - 1, 0) * w2) @ r - (k * w1) @ m
    return found / length


def _laws(table: HMM, length: int) -> np.ndarray:
    """[L, S]: law of the state at each position."""
    found = [table.pi]
    for _ in range(length - 1):
        found.append(found[-1] @ table.A)
    return np.array(found)


def _entropy(p: Float[np.ndarray, "*laws n"]) -> Float[np.ndarray, "*laws"]:
    """Of laws along the last axis."""
    return np.asarray(-xlogy(p, p).sum(axis=-1))


def _log_binomial(n, k):
    return gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)


def _ngram_entropy(table: NGram, length: int) -> float:
    """H of the first n - 1 tokens, and of each further one given its context."""
    context, before, a = hmm.order(table) - 1, hmm.initial(table), hmm.transitions(table)
    for _ in range(min(context, length) - 1):
        before = a.T @ before
    # The context now ends with the last of the first n - 1 tokens, or of all.
    older = max(context - length, 0)
    found = _entropy(before.reshape(table.start.shape).sum(tuple(range(older))).reshape(-1))
    each = _entropy(table.table).reshape(-1)
    for _ in range(length - context):
        found, before = found + before @ each, a.T @ before
    return float(found)


def _by_beliefs(table: HMM, length: int) -> float | None:
    """sum_i H(x_i | text so far), over the laws of the state that this leads to."""
    beliefs, chance, found = table.pi[None], np.ones(1), 0.0
    for _ in range(length):
        p = beliefs @ table.B
        found += chance @ _entropy(p)
        seen = beliefs[:, None] * table.B.T
        new, chance = seen.reshape(-1, seen.shape[-1]), (chance[:, None] * p).reshape(-1)
        some = chance > 0
        new, chance = new[some] / new[some].sum(axis=1, keepdims=True) @ table.A, chance[some]
        _, first, same = np.unique(
            new.round(SAME), axis=0, return_index=True, return_inverse=True
        )
        if len(first) > BELIEFS or len(first) * table.B.size > NUMBERS:
            return None
        beliefs, chance = new[first], np.bincount(same.reshape(-1), chance)
    return float(found)
