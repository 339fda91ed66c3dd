"""An exact denoiser by brute force: every pattern of visible tokens looked up in a table."""

from itertools import product

import jax.numpy as jnp
import numpy as np

from lm.masked.denoiser import plain


def texts(vocab, length):
    """All texts, the last token changing fastest: [V^L, L]."""
    return np.array(list(product(range(vocab), repeat=length)))


def random_law(vocab, length, seed=0):
    """Probabilities of all texts, float64."""
    return np.random.default_rng(seed).dirichlet(np.full(vocab**length, 3.0))


def table(q, vocab, length):
    """log q(x_i = v | visible) of all (V + 1)^L patterns, float64 [(V+1)^L, L, V].

    Patterns that are impossible have uniform marginals.
    """
    every = texts(vocab, length)
    found = np.full(((vocab + 1) ** length, length, vocab), 1 / vocab)
    for code, pattern in enumerate(product(range(vocab + 1), repeat=length)):
        pattern = np.array(pattern)
        seen = pattern < vocab
        p = q * (every[:, seen] == pattern[seen]).all(axis=1)
        if p.sum() > 0:
            p = p / p.sum()
            for v in range(vocab):
                found[code, :, v] = p @ (every == v)
    with np.errstate(divide="ignore"):
        return np.log(found)


def lookup(vocab, length):
    """The denoiser whose params are such a table."""
    base = (vocab + 1) ** np.arange(length - 1, -1, -1)
    return plain(lambda rows, x: rows[jnp.sum(x * base, axis=1)], vocab)
