"""Closed forms and bounds: what steps cost in tokens, in whole texts and in calls.

    SER <= 1 - exp(-L (log TER(p) - log TER(q)))       any sampler, any language
    pairs:    tie = sum_k w_k^2,  c = (1 - 1/V) tie
              gap = -(1/2) log(1 - c),  SER = 1 - (1 - c)^(L/2)
    parity:   tie = 1 - g sum_k w_k a_k^(g-1),  a_k = w_0 + ... + w_{k-1}
              gap = -(1/g) log(1 - tie/2),  SER = 1 - (1 - tie/2)^(L/g)
    of NELBO_T / L: gap = tie log(V) / 2 of pairs, tie log(2) / g of parity
    calls of B texts = sum_k 1 - (1 - w_k)^(B L)       steps with nothing to fill in skipped

(section 5.2 of the specification of arXiv:2502.09622, all of the exact denoiser and ancestral
sampling; with even weights w_k = 1/T they are its (5), (6) and (8).) tie is the chance that two
positions of a block share its last step; then its sum is wrong half of the time. A pair or
block that the end of the text cuts cannot be wrong. float64.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from common.errors import reject

LARGEST = 2**40


def even(steps: int) -> Float[np.ndarray, " steps"]:
    """w_k = 1 / T: of the linear schedule on the uniform grid.

    Raises:
      UserError: T is below 1.
    """
    if steps < 1:
        raise reject("theory.steps", steps, "a whole number from 1 up")
    return np.full(steps, 1 / steps)


def pairs_wrong(vocab: int, weights: Float[np.ndarray, " steps"]) -> float:
    """c: the chance that a pair is wrong."""
    return (1 - 1 / vocab) * float(np.sum(np.square(weights)))


def pairs_gap(length: int, vocab: int, weights: Float[np.ndarray, " steps"]) -> float:
    """log TER(p) - log TER(q) of the pairs language, nats per token."""
    return -(length // 2) / length * float(np.log1p(-pairs_wrong(vocab, weights)))


def pairs_nelbo_gap(length: int, vocab: int, weights: Float[np.ndarray, " steps"]) -> float:
    """gap_T = NELBO_T / L - H(q) / L of pairs: with a tie the second token costs log V, too."""
    return (length // 2) / length * float(np.sum(np.square(weights)) * np.log(vocab))


def pairs_ser(length: int, vocab: int, weights: Float[np.ndarray, " steps"]) -> float:
    """SER of the pairs language."""
    return _any_wrong(pairs_wrong(vocab, weights), length // 2)


def parity_tie(group: int, weights: Float[np.ndarray, " steps"]) -> float:
    """The chance that the last step of a block of g bits fills in two of them or more."""
    before = np.concatenate([[0.0], np.cumsum(weights)[:-1]])
    return 1 - group * float(np.sum(weights * before ** (group - 1)))


def parity_gap(length: int, group: int, weights: Float[np.ndarray, " steps"]) -> float:
    """log TER(p) - log TER(q) of the parity language, nats per token."""
    return -(length // group) / length * float(np.log1p(-parity_tie(group, weights) / 2))


def parity_nelbo_gap(length: int, group: int, weights: Float[np.ndarray, " steps"]) -> float:
    """gap_T of parity: with a tie the last bit costs log 2, too."""
    return (length // group) / length * float(parity_tie(group, weights) * np.log(2))


def parity_ser(length: int, group: int, weights: Float[np.ndarray, " steps"]) -> float:
    """SER of the parity language."""
    return _any_wrong(parity_tie(group, weights) / 2, length // group)


def ser_bound(length: int, gap: float) -> float:
    """The largest SER of a sampler whose log TER is `gap` nats above the language's."""
    return -float(np.expm1(-length * max(gap, 0.0)))


def gap_bound(
    first: float, last: float, weights: Float[np.ndarray, " steps"], learning: float = 0.0
) -> float:
    """(h(0) - h(1)) max_k w_k + eps_learning: the largest gap of these steps, of any language.

    With T even steps max w is 1 / T, and without the learning error gap_T * T goes to half of
    h(0) - h(1) as T grows.

    Args:
      first, last: h(0) and h(1), nats.
      weights: w_0 ... w_{T-1}.
      learning: eps_learning, nats.
    """
    return (first - last) * float(np.max(weights)) + learning


def steps_enough(length: int, drop: float, ser: float, learning: float = 0.0) -> int:
    """Steps at which the bounds promise a SER, whatever the language: proportional to L.

    Args:
      drop: h(0) - h(1), nats.
      ser: the SER that is wanted, above 0 and below 1.
      learning: eps_learning, nats.

    Raises:
      UserError: the learning error alone allows a larger SER.
    """
    _share(ser)
    allowed = -np.log1p(-ser) / length
    if learning >= allowed:
        raise reject("theory.learning", learning, f"below -log(1 - SER) / L = {allowed:.3g}")
    return max(1, int(np.ceil(drop / (allowed - learning))))


def steps_for(ser: Callable[[int], float], target: float) -> int:
    """The least T with ser(T) <= target, of a SER that falls with T, by bisection.

    Args:
      ser: for instance lambda steps: pairs_ser(length, vocab, even(steps)).
      target: above 0 and below 1.
    """
    _share(target)
    high = 1
    while ser(high) > target:
        high *= 2
        if high > LARGEST:
            raise reject("theory.ser", target, "a SER that more steps can reach")
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if ser(middle) > target else (low, middle)
    return high


def calls(length: int, weights: Float[np.ndarray, " steps"], batch: int = 1) -> float:
    """Expected steps that fill in something, in any of `batch` texts: network calls.

    Texts on their own clocks need `batch` = 1 each; a batch that only skips the steps that are
    empty for all of its texts needs this of B texts.
    """
    return float(np.sum(-np.expm1(batch * length * np.log1p(-np.minimum(weights, 1 - 1e-16)))))


def break_even(length: int, decode: float, call: float) -> float:
    """T* = L t_decode / t_call: with fewer calls, masked diffusion is the faster one.

    Args:
      decode: seconds of one token of the autoregressive model with a cache, at some batch size.
      call: seconds of one call over whole texts, at the same one.
    """
    return length * decode / call


def _any_wrong(chance: float, count: int) -> float:
    """The chance that one of `count` independent parts is wrong."""
    return -float(np.expm1(count * np.log1p(-chance)))


def _share(ser: float) -> None:
    if not 0 < ser < 1:
        raise reject("theory.ser", ser, "above 0 and below 1")
