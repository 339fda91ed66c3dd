"""Languages to study: n-grams, hidden Markov models, pairs, parity, running sums.

    ngram         a table P [V]^n, or a random one: rows Dirichlet(c) or softmax(s N(0, 1))
    hmm           random; of each state a few successors and a few symbols
    pairs         x_{2j+1} = x_{2j}, uniform: the worst case of parallel writing
    parity        blocks of g bits with an even sum
    running_sum   a digit, then (sum so far + digit) mod M, and so on

(section 6.1 of the specification of arXiv:2502.09622.) Tables are made in float64 on the host;
the same seed gives the same table everywhere.
"""

from collections.abc import Callable
from math import isfinite

import numpy as np
from jaxtyping import Float

from common.errors import UserError, reject
from lm.languages import hmm
from lm.languages.hmm import HMM, Language, NGram

KINDS = ("ngram", "hmm", "pairs", "parity", "running_sum", "path")
STARTS = ("stationary", "uniform")
SMALLEST = 1e-30  # Probability that is drawn: float32 would round smaller ones to 0.
LARGEST = 10**7  # Entries of a table
TRIES = 10_000
SUBSETS = 10_000


def language(
    *,
    kind: str,
    path: str,
    vocab: int,
    n: int,
    states: int,
    successors: int,
    emitted: int,
    concentration: float,
    softmax_scale: float,
    support_k: int,
    group: int,
    modulus: int,
    start: str,
    seed: int,
) -> Language:
    """The language of a config, float64 on the host; a kind reads its own fields only.

    Args:
      kind: of `KINDS`.
      path: an .npz with pi, A and B in the place of any kind; "": none.
      vocab: V, of ngram, hmm and pairs.
      n, concentration, softmax_scale, support_k: of `random_ngram`.
      states, successors, emitted: of `random_hmm`.
      group: g, of parity.
      modulus: M, of running_sum.
      start: of ngram and hmm, stationary or uniform.
      seed: of ngram and hmm.

    Raises:
      UserError: a field is out of range, or the file holds no language.
    """
    if kind not in KINDS:
        raise reject("language.kind", kind, f"one of {', '.join(KINDS)}")
    if path or kind == "path":
        if not path:
            raise reject("language.path", path, "an .npz with pi, A and B")
        return hmm.load(path)
    if kind == "pairs":
        return pairs(vocab)
    if kind == "parity":
        return parity(group)
    if kind == "running_sum":
        return running_sum(modulus)
    _whole("seed", seed, 0)
    rng = np.random.default_rng(seed)
    if kind == "hmm":
        return random_hmm(rng, states, vocab, successors, emitted, start)
    return random_ngram(rng, vocab, n, concentration, softmax_scale, support_k, start)


def ngram(table: Float[np.ndarray, "..."], start: str = "stationary") -> NGram:
    """The n-gram of a table P(next | context), shape [V] * n, oldest axis first.

    Args:
      start: law of the context that ends with the first token: stationary, so that a text is
        a window of an endless one, or uniform.

    Raises:
      UserError: it is no table, or has no stationary law.
    """
    return _started(table, start)


def random_ngram(
    rng: np.random.Generator,
    vocab: int,
    n: int,
    concentration: float = 0.5,
    softmax_scale: float = 1.5,
    support_k: int = 0,
    start: str = "stationary",
) -> NGram:
    """Rows from Dirichlet(concentration), or with concentration 0 softmax(scale * N(0, 1)).

    Args:
      support_k: largest entries kept in each row, redrawn until the contexts are irreducible
        and aperiodic; 0: all, and then every text is in the language.

    Raises:
      UserError: a number is out of range, or no such table is found.
    """
    _whole("vocab", vocab, 2)
    _whole("n", n, 2)
    _entries("n", n, vocab**n)
    for name, value in (("concentration", concentration), ("softmax_scale", softmax_scale)):
        if not (isfinite(value) and value >= 0):
            raise reject(f"language.{name}", value, "a finite number from 0 up")
    _whole("support_k", support_k, 0, vocab)

    def drawn():
        if concentration:
            rows = rng.dirichlet(np.full(vocab, concentration), vocab ** (n - 1))
        else:
            logits = softmax_scale * rng.standard_normal((vocab ** (n - 1), vocab))
            rows = np.exp(logits - logits.max(axis=1, keepdims=True))
        # Dirichlet rows of a small c can even be 0 / 0.
        rows = np.maximum(np.nan_to_num(rows), SMALLEST)
        if support_k:
            rank = np.argsort(np.argsort(-rows, axis=1, kind="stable"), axis=1)
            rows = np.where(rank < support_k, rows, 0)
        return (rows / rows.sum(axis=1, keepdims=True)).reshape((vocab,) * n)

    table = drawn()
    if support_k:
        what = "language.support_k", support_k, "larger: no chain of contexts is ergodic"
        table = _ergodic(drawn, table, lambda table: _uniform(table), what)
    return _started(table, start)


def random_hmm(
    rng: np.random.Generator,
    states: int = 32,
    vocab: int = 8,
    successors: int = 2,
    emitted: int = 2,
    start: str = "stationary",
) -> HMM:
    """S states in a ring, each with other successors too, and with few symbols.

    Args:
      successors: of each state; s + 1 mod S is one of them, so the chain is irreducible.
      emitted: symbols of each state. Weights of both are Dirichlet(1), all others exactly 0.
      start: law of the first state, stationary or uniform.

    Raises:
      UserError: a number is out of range, or the chain is periodic and shall be stationary.
    """
    _whole("states", states, 1)
    _whole("vocab", vocab, 2)
    _whole("successors", successors, 1, states)
    _whole("emitted", emitted, 1, vocab)
    _entries("states", states, states * max(states, vocab))
    _choice("start", start)

    def rows(width, chosen, always):
        table = np.zeros((states, width))
        for s in range(states):
            rest = np.setdiff1d(np.arange(width), always(s))
            added = rng.choice(rest, chosen - len(always(s)), replace=False)
            own = np.concatenate([always(s), added]).astype(int)
            table[s, own] = np.maximum(rng.dirichlet(np.ones(chosen)), SMALLEST)
        return table / table.sum(axis=1, keepdims=True)

    uniform = np.full(states, 1 / states)

    def drawn():
        a = rows(states, successors, lambda s: [(s + 1) % states])
        return HMM(uniform, a, rows(vocab, emitted, lambda s: []))

    found = drawn()
    if start == "uniform":
        return hmm.check(found)
    if successors > 1:  # Else the ring is all there is.
        what = "language.successors", successors, "larger: every chain is periodic"
        found = _ergodic(drawn, found, lambda one: one, what)
    return hmm.check(found._replace(pi=hmm.stationary(found)))


def pairs(vocab: int) -> HMM:
    """Independent pairs of equal tokens, uniform over V; states (phase, token).

    Raises:
      UserError: V is below 2.
    """
    _whole("vocab", vocab, 2)
    _entries("vocab", vocab, 4 * vocab**2)
    even, zero = np.full((vocab, vocab), 1 / vocab), np.zeros((vocab, vocab))
    same = np.eye(vocab)
    pi = np.repeat([1 / vocab, 0], vocab)
    return HMM(pi, np.block([[zero, same], [even, zero]]), np.concatenate([same, same]))


def parity(group: int) -> HMM:
    """Blocks of g bits whose sum is even; states (phase, parity so far, bit).

    Raises:
      UserError: g is below 2.
    """
    _whole("group", group, 2)
    _entries("group", group, (4 * group) ** 2)

    def after(phase, odd):
        """States at a phase, after those bits of the block."""
        free = (odd,) if phase == group - 1 else (0, 1)
        return [(phase, odd ^ bit, bit) for bit in free]

    first = after(0, 0)
    every = sorted({s for j in range(group) for odd in (0, 1) for s in after(j, odd)
                    if j or not odd})  # fmt: skip
    place = {state: i for i, state in enumerate(every)}
    pi, a, b = np.zeros(len(every)), np.zeros((len(every),) * 2), np.zeros((len(every), 2))
    for state in first:
        pi[place[state]] = 1 / len(first)
    for (phase, odd, bit), i in place.items():
        b[i, bit] = 1
        following = after(phase + 1, odd) if phase < group - 1 else first
        for state in following:
            a[i, place[state]] = 1 / len(following)
    return HMM(pi, a, b)


def running_sum(modulus: int) -> HMM:
    """A uniform digit and the sum of all digits so far, mod M, in turn; one slip ruins a text.

    States: the sum just written (M), then (sum before, digit just written) (M^2).

    Raises:
      UserError: M is below 2.
    """
    _whole("modulus", modulus, 2)
    m = modulus
    _entries("modulus", m, (m + m * m) ** 2)
    total, digit = np.divmod(np.arange(m * m), m)
    a = np.zeros((m + m * m,) * 2)
    a[total, m + np.arange(m * m)] = 1 / m
    a[m + np.arange(m * m), (total + digit) % m] = 1
    pi = np.zeros(m + m * m)
    pi[m : 2 * m] = 1 / m  # Nothing has been added up before the first digit.
    return HMM(pi, a, np.concatenate([np.eye(m), np.eye(m)[digit]]))


def informative(language: Language) -> bool:
    """Whether a text outside of the language exists: else its SER is 0 and says nothing.

    Follows the sets of states that texts can lead to, the determinised support. Also True if
    that is not settled after 10,000 sets.
    """
    table = hmm.check(language)
    if isinstance(table, NGram) and (table.table > 0).all():
        return False
    moves, emits = hmm.transitions(table) > 0, hmm.emissions(table) > 0
    sets = (hmm.initial(table) > 0)[None]
    seen = {sets[0].tobytes()}
    while len(sets) and len(seen) < SUBSETS:
        left = (sets[:, None] & emits.T).reshape(-1, sets.shape[1])
        if not left.any(axis=1).all():
            return True
        reached = np.unique((moves.T.astype(int) @ left.T.astype(int)).T > 0, axis=0)
        sets = np.array([s for s in reached if s.tobytes() not in seen], bool)
        seen |= {s.tobytes() for s in sets}
    return len(sets) > 0


def _started(table: np.ndarray, start: str) -> NGram:
    found = _uniform(table)
    _choice("start", start)
    if start == "stationary":
        law = hmm.stationary(found)
        found = found._replace(start=law.reshape(found.start.shape))
    return found


def _uniform(table: np.ndarray) -> NGram:
    """The n-gram with a uniform start."""
    shape = np.shape(table)[1:]
    return hmm.check(NGram(np.full(shape, 1 / max(np.prod(shape), 1)), table))


def _ergodic(drawn: Callable, first, as_language: Callable, what: tuple):
    """The first draw whose chain is irreducible and aperiodic.

    Raises:
      UserError: `what`, if there is none.
    """
    found = first
    for _ in range(TRIES):
        if hmm.is_ergodic(as_language(found)):
            return found
        found = drawn()
    raise reject(*what)


def _whole(name: str, value, least: int, most: int | None = None) -> None:
    wrong = isinstance(value, bool) or not isinstance(value, int | np.integer)
    if wrong or value < least or (most is not None and value > most):
        allowed = f"from {least} up" if most is None else f"from {least} to {most}"
        raise reject(f"language.{name}", value, f"a whole number {allowed}")


def _entries(name: str, value, entries: int) -> None:
    if entries > LARGEST:
        raise UserError(
            f"config.language.{name} is {value!r}, which makes a table of {entries:.3g} "
            f"numbers, but at most {LARGEST:.0e} are allowed."
        )


def _choice(name: str, value) -> None:
    if value not in STARTS:
        raise reject(f"language.{name}", value, f"one of {', '.join(STARTS)}")
