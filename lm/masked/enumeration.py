"""Exact laws of samplers on tiny texts, float64 on the host, whatever the denoiser is.

    p(x) = sum_K prod_i w_{K_i} prod_k prod_{i: K_i = k} f(x with K < k visible)[i, x_i]

(section 2 of the specification of arXiv:2502.09622; K over all T^L assignments.) The sum is
done over sets of visible positions, not over assignments: with P_k(S) the weight of all ways
to have S filled in with x_S before step k,

    P_{k+1}(S') = sum_{S subset of S'} P_k(S) c_k(S, S') prod_{i in S' - S} f(x_S)[i, x_i]

where c = w_k^|S' - S|, or for `count` 1 / (L - |S| over |S' - S|) at groups of its size. That
costs (3 V)^L a step, so any T can be had. `literal_law` follows instead the Markov chain of the
reverse process over all (V + 1)^L patterns.

Texts are in the order of `texts`; q is any law over them.
"""

from collections.abc import Callable
from math import comb
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from common.errors import UserError
from lm.masked.denoiser import Denoiser, denoise
from lm.masked.reveal import ratios
from lm.masked.settings import Settings

TEXTS = 10**5  # V^L
WORK = 10**8  # (3 V)^L, and (2 V + 1)^L of the chain
CHUNK = 4096


def fits(vocab: int, length: int) -> bool:
    """Whether texts are few enough for `law`."""
    return vocab**length <= TEXTS and (3 * vocab) ** length <= WORK


def texts(vocab: int, length: int) -> Int[np.ndarray, "texts length"]:
    """All V^L texts, the last position fastest."""
    return np.indices((vocab,) * length).reshape(length, -1).T.astype(np.int32)


def law(
    denoiser: Denoiser, params: Any, length: int, weights: Float[np.ndarray, " steps"]
) -> Float[np.ndarray, " texts"]:
    """p(x) of ancestral sampling with the weights w_0 ... w_{T-1}.

    Raises:
      UserError: V^L or (3 V)^L is too large.
    """

    def chance(k, before, added):
        return weights[k] ** added

    return _over_sets(denoiser, params, length, len(weights), chance)


def count_law(
    denoiser: Denoiser, params: Any, length: int, sizes: Int[np.ndarray, " steps"]
) -> Float[np.ndarray, " texts"]:
    """p(x) of a random order in groups of these sizes: count, first_hitting.

    Raises:
      UserError: the sizes do not sum up to L, or the law is too large.
    """
    if sum(sizes) != length:
        raise UserError(f"The groups have {sum(sizes)} positions, but a text has {length}.")
    start = np.concatenate([[0], np.cumsum(sizes)]).astype(int)

    def chance(k, before, added):
        if before != start[k] or added != sizes[k]:
            return 0.0
        return 1 / comb(length - before, added)

    return _over_sets(denoiser, params, length, len(sizes), chance)


def literal_law(
    denoiser: Denoiser, params: Any, length: int, settings: Settings
) -> Float[np.ndarray, " texts"]:
    """p(x) of the reverse process from step to step, with T, schedule and grid of the settings.

    Raises:
      UserError: V^L or (2 V + 1)^L is too large.
    """
    vocab = denoiser.vocab
    _fits(vocab, length, 2 * vocab + 1, "(2 V + 1)^L")
    f = tabulated(denoiser, params, length)
    patterns = texts(vocab + 1, length)
    p = np.zeros(len(patterns))
    p[-1] = 1  # All masks.
    for ratio in ratios(settings):
        after = np.zeros((vocab + 1,) * length)
        for at in np.flatnonzero(p):
            outcome, place = np.array(p[at]), []
            for i, token in enumerate(patterns[at]):
                if token < vocab:
                    place.append(token)
                else:
                    place.append(slice(None))
                    one = np.concatenate([ratio * f[at, i], [1 - ratio]])
                    outcome = outcome[..., None] * one
            after[tuple(place)] += outcome
        p = after.reshape(-1)
    return p.reshape((vocab + 1,) * length)[(slice(vocab),) * length].reshape(-1)


def kl(q: Float[np.ndarray, " texts"], p: Float[np.ndarray, " texts"]) -> float:
    """KL(q || p) in nats; infinite where q has what p has not."""
    there = q > 0
    with np.errstate(divide="ignore"):
        return float(np.sum(q[there] * (np.log(q[there]) - np.log(p[there]))))


def sequence_errors(q: Float[np.ndarray, " texts"], p: Float[np.ndarray, " texts"]) -> float:
    """SER = P_p[q(x) = 0]."""
    return float(p[q == 0].sum())


def token_errors(
    q: Float[np.ndarray, " texts"], p: Float[np.ndarray, " texts"], length: int
) -> float:
    """log TER(p) = E_q[-log p(x)] / L, nats."""
    there = q > 0
    with np.errstate(divide="ignore"):
        return float(-np.sum(q[there] * np.log(p[there])) / length)


def tabulated(
    denoiser: Denoiser, params: Any, length: int
) -> Float[np.ndarray, "patterns length vocab"]:
    """f of all (V + 1)^L patterns of tokens and masks, the mask as token V; rows sum to 1."""
    vocab = denoiser.vocab
    patterns = texts(vocab + 1, length)
    x = np.where(patterns == vocab, denoiser.mask, patterns).astype(np.int32)
    size = min(CHUNK, len(x))
    call = jax.jit(lambda params, x: denoise(denoiser, params, x))
    found = []
    for first in range(0, len(x), size):
        part = x[first : first + size]
        filled = np.pad(part, ((0, size - len(part)), (0, 0)))
        found.append(np.asarray(call(params, filled), np.float64)[: len(part)])
    f = np.exp(np.concatenate(found))
    return f / f.sum(axis=-1, keepdims=True)


def _over_sets(
    denoiser: Denoiser, params: Any, length: int, steps: int, chance: Callable
) -> Float[np.ndarray, " texts"]:
    """p(x) by the recursion over sets; chance is c_k of |S| and |S' - S|."""
    vocab = denoiser.vocab
    _fits(vocab, length, 3 * vocab, "(3 V)^L")
    f = tabulated(denoiser, params, length)
    x = texts(vocab, length)
    place = (vocab + 1) ** np.arange(length)[::-1]
    everything = 2**length - 1
    bits = lambda s: [i for i in range(length) if s >> i & 1]
    # chosen[S][:, i] = f(x_S)[i, x_i] of every text x.
    chosen = []
    for s in range(2**length):
        seen = np.isin(np.arange(length), bits(s))
        pattern = np.where(seen, x, vocab) @ place
        chosen.append(f[pattern[:, None], np.arange(length), x])
    p = {0: np.ones(len(x))}
    for k in range(steps):
        after = {}
        for s, weight in p.items():
            missing, added = everything & ~s, everything & ~s
            while True:
                c = chance(k, s.bit_count(), added.bit_count())
                if c:
                    new = weight * c * chosen[s][:, bits(added)].prod(axis=1)
                    after[s | added] = after.get(s | added, 0) + new
                if not added:
                    break
                added = (added - 1) & missing
        p = after
    return p[everything]


def _fits(vocab: int, length: int, base: int, name: str) -> None:
    if vocab**length > TEXTS or base**length > WORK:
        raise UserError(
            f"Texts of {length} tokens out of {vocab} are too many to enumerate: V^L is "
            f"{vocab**length} of at most {TEXTS}, {name} is {base**length} of at most {WORK}."
        )
