"""Closed forms of section 5.2: what parallel writing costs, token by token and text by text.

w_0 ... w_{T-1} is the chance of a position to be filled in at each step; ancestral sampling
with a uniform schedule has w = 1/T. All are of the exact denoiser.

    gap_T <= (h(0) - h(1)) / T, and T gap_T -> (h(0) - h(1)) / 2   any language
    SER <= 1 - exp(-L (log TER(p) - log TER(q)))   any p and q
    pairs    log TER(p) - log TER(q) = -1/2 log(1 - (1 - 1/V) sum w^2)
             SER = 1 - (1 - (1 - 1/V) sum w^2)^(L/2)
    parity   a block is wrong with chance 1/2 iff its last step has two positions or more

(Feng et al., arXiv:2502.09622, sharpened; derived and checked by enumeration in the tests.)
"""

import numpy as np
from jaxtyping import Float
from scipy import optimize

from common.errors import reject

Weights = Float[np.ndarray, " steps"]


def uniform(steps: int) -> Weights:
    """w of a linear schedule on a uniform grid."""
    return np.full(steps, 1 / steps)


def pairs_token_gap(vocab: int, w: Weights) -> float:
    """log TER(p) - log TER(q) of pairs, nats per token."""
    return float(-0.5 * np.log1p(-(1 - 1 / vocab) * np.sum(w**2)))


def pairs_bound_gap(vocab: int, w: Weights) -> float:
    """NELBO_T / L - H(q) / L of pairs: a tie costs the second of a pair log V."""
    return float(0.5 * np.sum(w**2) * np.log(vocab))


def pairs_ser(length: int, vocab: int, w: Weights) -> float:
    """SER of L / 2 whole pairs."""
    return float(-np.expm1(length // 2 * np.log1p(-(1 - 1 / vocab) * np.sum(w**2))))


def parity_tie(group: int, w: Weights) -> float:
    """The chance that the last step of a block fills in two of its positions or more."""
    before = np.concatenate([[0.0], np.cumsum(w)[:-1]])
    return float(1 - group * np.sum(w * before ** (group - 1)))


def parity_ser(length: int, group: int, w: Weights) -> float:
    """SER of L / g whole blocks."""
    return float(-np.expm1(length // group * np.log1p(-parity_tie(group, w) / 2)))


def ser_bound(length: int, token_gap: float) -> float:
    """The largest SER that a token gap admits, nats per token, data direction."""
    return float(-np.expm1(-length * max(token_gap, 0.0)))


def gap_bound(h0: float, h1: float, steps: int) -> float:
    """What gap_T cannot exceed with uniform weights; half of it is its limit."""
    return (h0 - h1) / steps


def pairs_steps(length: int, vocab: int, ser: float) -> float:
    """T of uniform weights at which pairs have this SER; a real number.

    Raises:
      UserError: SER is not between 0 and 1.
    """
    _share(ser)
    return float((1 - 1 / vocab) / -np.expm1(np.log1p(-ser) / (length / 2)))


def parity_steps(length: int, group: int, ser: float) -> int:
    """The fewest steps of uniform weights at which parity has at most this SER.

    Raises:
      UserError: SER is not between 0 and 1.
    """
    _share(ser)
    above = lambda steps: parity_ser(length, group, uniform(max(1, round(steps)))) - ser
    high = 1
    while above(high) > 0:
        high *= 2
    if high == 1:
        return 1
    near = round(optimize.brentq(above, high / 2, high, xtol=0.5))
    return next(t for t in range(max(1, near - 2), near + 3) if above(t) <= 0)


def calls(length: int, w: Weights, texts: int = 1) -> float:
    """Expected network calls where empty steps are skipped.

    Args:
      texts: 1: each text skips its own; else a batch skips what is empty for all of it.
    """
    return float(np.sum(-np.expm1(length * texts * np.log1p(-np.minimum(w, 1 - 1e-16)))))


def break_even(length: int, decode: float, forward: float) -> float:
    """T* = L t_decode / t_forward: with fewer steps a masked model is the faster one."""
    return length * decode / forward


def _share(ser: float) -> None:
    if not 0 < ser < 1:
        raise reject("ser", ser, "between 0 and 1")
