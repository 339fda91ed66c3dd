"""Samplers that let the network decide where to write next.

    confidence       the n / T candidates of the highest probability f_i(x_i)
    margin           ... of the largest lead of the most probable token over the next
    entropy          ... of the lowest entropy H_i of f_i
    threshold        all with f_i(x_i) >= tau, and at least one
    entropy_bound    by ascending entropy, the longest prefix with sum H - max H <= gamma

(MaskGIT, Chang et al., arXiv:2202.04200; LLaDA, arXiv:2502.09992; Fast-dLLM, arXiv:2505.22618;
Ben-Hamu et al., arXiv:2505.24857; section 7 of the specification of arXiv:2502.09622.) A
candidate is drawn at every masked position and committed with the token that was scored. The
scores are of f itself: temperature, top_k and top_p change candidates only. Where the order
depends on the text the law is distorted, even for an exact denoiser.

Ties are broken at random. Scores that agree to 4 digits are ties: all positions of a text of
masks have the same score but for a network's rounding, which depends on the devices and must
not decide.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from lm.masked.categorical import draw, fold
from lm.masked.denoiser import Denoiser
from lm.masked.plans import group, group_size, in_block
from lm.masked.reveal import over_rows
from lm.masked.settings import QUOTA, Numbers, Settings, rows

DIGITS = 2**14  # Of scores, as far as they are told apart.


def commit(
    settings: Settings,
    keys: Key[Array, " batch"],
    log_f: Float[Array, "batch n vocab"],
    free: Bool[Array, "batch n"],
    quota: Int[Array, " batch"],
) -> tuple[Int[Array, "batch n"], Bool[Array, "batch n"]]:
    """What one call writes.

    Args:
      settings: of an adaptive kind, or count: random places.
      keys: of the texts, for this call only.
      log_f: normalised.
      free: which positions are masked; the others are never taken.
      quota: positions to take; threshold and entropy_bound have their own rules.

    Returns:
      candidates, int32, and which of them to commit: `quota` or all that are free, at least
      one for threshold and entropy_bound; none of a text with no free position.
    """
    at = jnp.broadcast_to(jnp.arange(free.shape[1]), free.shape)
    candidate, score = scored(settings, keys, log_f, at)
    return candidate, taken(settings, keys, score, free, quota)


def scored(
    settings: Settings,
    keys: Key[Array, " batch"],
    log_f: Float[Array, "batch n vocab"],
    at: Int[Array, "batch n"],
    greedy: Array | bool = False,
) -> tuple[Int[Array, "batch n"], Float[Array, "batch n"]]:
    """A candidate for each row of log f and its score: the higher, the earlier.

    Args:
      at: the position that each row is of, as in `categorical.draw`.
      greedy: where candidates are the most probable tokens whatever the settings say.
    """
    log_f = log_f.astype(jnp.promote_types(log_f.dtype, jnp.float32))
    best = settings.candidate == "argmax" or greedy
    candidate = draw(fold(keys, 0), settings, log_f, at, best)
    if settings.kind in ("confidence", "threshold"):
        score = jnp.take_along_axis(log_f, candidate[..., None], axis=-1)[..., 0]
    elif settings.kind == "margin":
        top = jax.lax.top_k(log_f, min(2, log_f.shape[-1]))[0]
        # Less 1: most leads are near it, and are to be told apart there.
        score = jnp.expm1(top[..., 0]) - (jnp.exp(top[..., 1]) if top.shape[-1] > 1 else 0.0)
    elif settings.kind in ("entropy", "entropy_bound"):
        p = jnp.exp(log_f)
        # 0 log 0 = 0, and a certain token has no entropy at all.
        score = jnp.minimum(jnp.sum(jnp.where(p > 0, p * log_f, 0.0), axis=-1), 0.0)
    else:
        score = jnp.zeros(candidate.shape, log_f.dtype)
    return candidate, score


def taken(
    settings: Settings,
    keys: Key[Array, " batch"],
    score: Float[Array, "batch n"],
    free: Bool[Array, "batch n"],
    quota: Int[Array, " batch"],
) -> Bool[Array, "batch n"]:
    """Which candidates to commit, by their scores."""

    def one(key, score, free, quota):
        u = jax.random.uniform(key, score.shape, score.dtype)
        mantissa, exponent = jnp.frexp(score)
        coarse = jnp.ldexp(jnp.round(mantissa * DIGITS) / DIGITS, exponent)
        badness = jnp.where(free, -coarse, jnp.inf)
        places = jnp.arange(len(score))
        order = jax.lax.sort((badness, u, places), num_keys=2)[2]
        rank = jnp.zeros_like(places).at[order].set(places)
        if settings.kind == "threshold":
            take = (jnp.exp(score) >= settings.tau) | (rank == 0)
        elif settings.kind == "entropy_bound":
            h = jnp.where(free, -score, 0.0)[order]
            # Ascending, so the sum less the largest is the sum of those before.
            before = jnp.concatenate([jnp.zeros(1, h.dtype), jnp.cumsum(h)[:-1]])
            take = (before <= settings.gamma)[rank]
        else:
            take = rank < quota
        return take & free

    return jax.vmap(one)(fold(keys, 1), score, free, quota)


def adapt(
    keys: Key[Array, " batch"],
    denoiser: Denoiser,
    params: Any,
    x: Int[Array, "batch length"],
    settings: Settings,
    data: Numbers,
) -> tuple[Int[Array, "batch length"], Int[Array, "batch length"]]:
    """Fills x in, block by block; each text goes on by itself.

    A call looks at the masked positions of a text's leftmost unfinished block only. With n
    of them at its start, a quota is n / S, one more in the first n mod S steps of S.

    Args:
      keys: of the texts.
      x: the mask where free.

    Returns:
      tokens, and `when`: the number of the text's call that wrote each; -1 where given.
    """
    settings = settings._replace(tau=data.tau, gamma=data.gamma)
    width = rows(settings, *x.shape, denoiser.vocab)
    length = x.shape[1]
    block = jnp.arange(length) // data.block
    free = x == denoiser.mask
    total = jax.vmap(lambda row: in_block(row, data.block)[1])(free)

    def body(carry):
        r, x, when = carry
        masked = x == denoiser.mask
        current = jnp.min(jnp.where(masked, block, length), axis=1)
        active = masked & (block == current[:, None])
        n = jnp.max(jnp.where(active, total, 0), axis=1)
        left = jnp.sum(active, axis=1, dtype=jnp.int32)
        quota = group_size(n - left, n, data.steps)
        key, greedy = fold(keys, r), False
        if settings.final == "greedy" and settings.kind in QUOTA:
            step = current * data.steps + group(n - left, n, data.steps)
            greedy = jnp.broadcast_to((step == data.last)[:, None], (len(x), width))

        def use(log_f, at):
            return scored(settings, key, log_f, at, greedy)

        features = denoiser.hidden(params, x)
        into = jnp.zeros_like(x), jnp.zeros(x.shape, score_type)
        candidate, score = over_rows(denoiser, params, features, active, width, use, into)
        take = taken(settings, key, score, active, quota)
        # Every call writes something, so a text is at its call r until it is done.
        return r + 1, jnp.where(take, candidate, x), jnp.where(take, r, when)

    head = jax.eval_shape(denoiser.head, params, jax.eval_shape(denoiser.hidden, params, x))
    score_type = jnp.promote_types(head.dtype, jnp.float32)
    start = jnp.int32(0), x, jnp.full(x.shape, -1, jnp.int32)
    unfinished = lambda carry: (carry[0] < length) & jnp.any(carry[1] == denoiser.mask)
    return jax.lax.while_loop(unfinished, body, start)[1:]
