"""The languages of the experiments, as tables in float64 on the host.

    ngram          P(v | context), rows Dirichlet(c) or softmax(s normal), perhaps cut to the
                   largest k entries
    hmm            each of S states has a few successors, s + 1 among them, and emits a few
                   symbols; zeros elsewhere
    pairs          x_{2j} uniform, x_{2j+1} the same
    parity         blocks of g bits whose sum is even
    running_sum    a free digit, then the sum so far and this digit modulo M, in turn
    path           pi, A and B from an .npz

(Section 6.1 of the specification of arXiv:2502.09622.) In pairs, parity and running_sum a
single parallel slip ruins a text that looks right token by token.
"""

import numpy as np
from jaxtyping import Float

from common.errors import UserError, reject
from lm.languages import hmm
from lm.languages.hmm import HMM, Language, NGram

KINDS = ("ngram", "hmm", "pairs", "parity", "running_sum", "path")
STARTS = ("stationary", "uniform")
TRIES = 1000
LARGEST = 2**24  # Numbers in the table of an n-gram.


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
    """The language of a config; each kind reads its own fields.

    Args:
      kind: of `KINDS`.
      path: an .npz; where it is given, nothing else is read.
      vocab: V of ngram, hmm and pairs.
      n: of ngram, from 2 up.
      states, successors, emitted: of hmm.
      concentration: of ngram, of the Dirichlet law of rows; 0: softmax of softmax_scale times
        normal numbers.
      support_k: of ngram, entries kept in each row; 0: all.
      group: g of parity.
      modulus: M of running_sum.
      start: of ngram, the law of the first context: stationary or uniform.
      seed: of the table.

    Raises:
      UserError: a field is out of range, or the file is no language.
    """
    if path:
        return hmm.load(path)
    if kind not in KINDS or kind == "path":
        allowed = f"one of {', '.join(KINDS)}" if kind != "path" else "with language.path set"
        raise reject("language.kind", kind, allowed)
    rng = np.random.default_rng(seed)
    if kind == "ngram":
        return random_ngram(rng, vocab, n, concentration, softmax_scale, support_k, start)
    if kind == "hmm":
        return random_hmm(rng, states, vocab, successors, emitted)
    if kind == "pairs":
        return pairs(vocab)
    if kind == "parity":
        return parity(group)
    return running_sum(modulus)


def ngram(table: Float[np.ndarray, "..."], start: str = "stationary") -> NGram:
    """A given P(v | context), [V] * n, with the law of its first context.

    Raises:
      UserError: the table is no law, or has no stationary one.
    """
    table = np.asarray(table, np.float64)
    v, shape = table.shape[-1], table.shape[:-1]
    uniform = np.full(shape, 1 / v ** len(shape))
    made = hmm.check(NGram(uniform, table))
    if start not in STARTS:
        raise reject("language.start", start, f"one of {', '.join(STARTS)}")
    if start == "uniform":
        return made
    return NGram(_stationary(made).reshape(shape), table)


def random_ngram(
    rng: np.random.Generator,
    vocab: int,
    n: int,
    concentration: float = 0.5,
    softmax_scale: float = 1.5,
    support_k: int = 0,
    start: str = "stationary",
) -> NGram:
    """A random table; drawn anew until all contexts reach each other and there is no period.

    Raises:
      UserError: a field is out of range, or no such table was found.
    """
    _whole("vocab", vocab, 2)
    _whole("n", n, 2)
    if vocab**n > LARGEST:
        raise reject("language.n", n, f"such that vocab^n is at most {LARGEST}")
    if not 0 <= support_k <= vocab:
        raise reject("language.support_k", support_k, f"from 0 (all) to {vocab}")
    for name, value in (("concentration", concentration), ("softmax_scale", softmax_scale)):
        if not 0 <= value < float("inf"):
            raise reject(f"language.{name}", value, "a finite number from 0 up")
    shape = (vocab,) * (n - 1)
    for _ in range(TRIES):
        if concentration:
            # So small a share that it would be a zero by rounding is none.
            table = rng.dirichlet(np.full(vocab, concentration), shape)
            table = np.maximum(table, 1e-12)
        else:
            logits = softmax_scale * rng.standard_normal((*shape, vocab))
            table = np.exp(logits - logits.max(axis=-1, keepdims=True))
        if support_k:
            least = np.sort(table, axis=-1)[..., [-support_k]]
            table = np.where(table >= least, table, 0)
        table /= table.sum(axis=-1, keepdims=True)
        made = NGram(np.full(shape, 1 / vocab ** (n - 1)), table)
        if not support_k or _mixes(made):
            return ngram(table, start)
    raise reject(
        "language.support_k", support_k, f"larger: {TRIES} random tables fell into classes"
    )


def random_hmm(
    rng: np.random.Generator, states: int, vocab: int, successors: int, emitted: int
) -> HMM:
    """Sparse transitions and emissions with Dirichlet(1) weights; the start is stationary.

    Raises:
      UserError: a field is out of range, or no aperiodic chain was found.
    """
    _whole("states", states, 1)
    _whole("vocab", vocab, 1)
    for name, value, most in (("successors", successors, states), ("emitted", emitted, vocab)):
        if not 1 <= value <= most:
            raise reject(f"language.{name}", value, f"from 1 to {most}")
    for _ in range(TRIES):
        a, b = np.zeros((states, states)), np.zeros((states, vocab))
        for s in range(states):
            following = (s + 1) % states
            others = np.setdiff1d(np.arange(states), [following])
            to = [following, *rng.permutation(others)[: successors - 1]]
            a[s, to] = rng.dirichlet(np.ones(successors))
            b[s, rng.permutation(vocab)[:emitted]] = rng.dirichlet(np.ones(emitted))
        found = hmm.classes(a)
        if found.closed.sum() == 1 and found.period[found.closed][0] == 1:
            return hmm.check(HMM(hmm.stationary(a), a, b))
    raise reject("language.successors", successors, "larger: all random chains were periodic")


def pairs(vocab: int) -> HMM:
    """States (phase, v): the first of a pair is v, or the second is."""
    _whole("vocab", vocab, 2)
    zero, eye = np.zeros((vocab, vocab)), np.eye(vocab)
    uniform = np.full((vocab, vocab), 1 / vocab)
    a = np.block([[zero, eye], [uniform, zero]])
    pi = np.concatenate([np.full(vocab, 1 / vocab), np.zeros(vocab)])
    return HMM(pi, a, np.concatenate([eye, eye]))


def parity(group: int) -> HMM:
    """States (phase, parity with this bit, this bit); the last bit of a block is forced."""
    _whole("group", group, 2)
    place = {}
    for phase in range(group):
        for even in range(2):
            for bit in range(2):
                place[phase, even, bit] = len(place)
    a, b = np.zeros((len(place), len(place))), np.zeros((len(place), 2))
    for (phase, even, bit), s in place.items():
        b[s, bit] = 1
        following = (phase + 1) % group
        before = 0 if following == 0 else even
        if following == group - 1:
            a[s, place[following, 0, before]] = 1
        else:
            for new in range(2):
                a[s, place[following, before ^ new, new]] = 0.5
    pi = np.zeros(len(place))
    for bit in range(2):
        pi[place[0, bit, bit]] = 0.5
    return HMM(pi, a, b)


def running_sum(modulus: int) -> HMM:
    """States: M sums that were just written, then M * M (sum before, digit just written)."""
    _whole("modulus", modulus, 2)
    m = modulus
    of_digit = lambda total, digit: m + total * m + digit
    count = m + m * m
    a, b = np.zeros((count, count)), np.zeros((count, m))
    for total in range(m):
        b[total, total] = 1
        for digit in range(m):
            a[total, of_digit(total, digit)] = 1 / m
            b[of_digit(total, digit), digit] = 1
            a[of_digit(total, digit), (total + digit) % m] = 1
    pi = np.zeros(count)
    pi[[of_digit(0, digit) for digit in range(m)]] = 1 / m
    return HMM(pi, a, b)


def informative(given: Language) -> bool:
    """Whether some texts are impossible: without zeros SER is 0 and says nothing."""
    return any((np.asarray(table) == 0).any() for table in given)


def _mixes(made: NGram) -> bool:
    try:
        _stationary(made)
    except UserError:
        return False
    found = hmm.classes(hmm.dense(made).A)
    return found.count == 1


def _stationary(made: NGram) -> np.ndarray:
    """Of contexts; beyond a dense matrix by iterating, which full support makes converge."""
    count, v = hmm.states(made), hmm.vocab(made)
    if count <= 1024:
        return hmm.stationary(hmm.dense(made).A)
    if (np.asarray(made.table) == 0).any():
        raise UserError(f"An n-gram of {count} contexts with zeros is too large to be checked.")
    law = np.full(count, 1 / count)
    table = np.asarray(made.table).reshape(v, -1, v)
    for _ in range(100_000):
        new = np.einsum("ok,okv->kv", law.reshape(v, -1), table).reshape(-1)
        if np.abs(new - law).sum() < 1e-14:
            return new / new.sum()
        law = new
    raise UserError("The stationary law of the contexts did not converge.")


def _whole(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise reject(f"language.{name}", value, f"a whole number from {least} up")
