"""Laws of tiny texts by sums over everything: what the code is checked against."""

from itertools import pairwise, product

import numpy as np


def texts(vocab, length):
    """All texts, the last token changing fastest: [V^L, L]."""
    return np.array(list(product(range(vocab), repeat=length)))


def of_hmm(pi, a, b, length):
    """q of all texts [V^L]: every path of states, one after the other."""
    every = texts(b.shape[1], length)
    q = np.zeros(len(every))
    for path in product(range(len(pi)), repeat=length):
        p = pi[path[0]] * np.prod([a[s, t] for s, t in pairwise(path)])
        q += p * np.prod([b[s][every[:, i]] for i, s in enumerate(path)], axis=0)
    return q


def of_ngram(start, table, length):
    """q of all texts [V^L]: every context before them, too."""
    vocab, n = len(table), table.ndim
    every = texts(vocab, length)
    q = np.zeros(len(every))
    for before in product(range(vocab), repeat=n - 2):
        for k, x in enumerate(every):
            whole = (*before, *x)
            p = start[whole[: n - 1]]
            for i in range(n - 1, len(whole)):
                p *= table[whole[i - n + 1 : i + 1]]
            q[k] += p
    return q


def marginals(q, vocab, x):
    """q(x_i = v | visible tokens but x_i) by sums over q [V^L]; V is a masked token."""
    every, found = texts(vocab, len(x)), np.zeros((len(x), vocab))
    for i in range(len(x)):
        fits = [(every[:, j] == t) | (t == vocab) for j, t in enumerate(x) if j != i]
        p = q * np.all([np.ones(len(q), bool), *fits], axis=0)
        found[i] = [p[every[:, i] == v].sum() for v in range(vocab)]
        found[i] /= found[i].sum()
    return found


def entropy(p):
    """Nats."""
    p = p[p > 0]
    return -np.sum(p * np.log(p))


def sparse_hmm(seed=0, states=4, vocab=3):
    """pi, A, B with zeros."""
    rng = np.random.default_rng(seed)

    def rows(shape):
        p = rng.dirichlet(np.ones(shape[-1]), shape[:-1])
        p[rng.random(shape) < 0.4] = 0
        p[..., 0] += p.sum(axis=-1) == 0
        return p / p.sum(axis=-1, keepdims=True)

    return rows((states,)), rows((states, states)), rows((states, vocab))


def sparse_ngram(n, vocab=3, seed=0):
    """start, table with zeros, of an arbitrary start."""
    rng = np.random.default_rng(seed)
    table = rng.dirichlet(np.ones(vocab), (vocab,) * (n - 1))
    table[rng.random(table.shape) < 0.3] = 0
    table[..., 0] += table.sum(axis=-1) == 0
    table /= table.sum(axis=-1, keepdims=True)
    return rng.dirichlet(np.ones(vocab ** (n - 1))).reshape((vocab,) * (n - 1)), table
