"""Exact denoisers of explicit laws q, by brute force: what samplers are checked against.

A law is an array [V] * L. The denoiser's parameters are log f of all (V + 1)^L patterns, so all
laws of one shape share one denoiser and every program that was compiled for it.
"""

import itertools
from functools import cache

import jax.numpy as jnp
import numpy as np

from lm.masked.denoiser import plain


def posterior(q):
    """f[pattern, i, v] = q(x_i = v | visible) by sums over q, float64; even if impossible."""
    vocab, length = q.shape[0], q.ndim
    found = []
    for pattern in itertools.product(range(vocab + 1), repeat=length):
        at = tuple(slice(None) if t == vocab else slice(t, t + 1) for t in pattern)
        part = q[at]
        rows = []
        for i in range(length):
            row = part.sum(axis=tuple(j for j in range(length) if j != i))
            if pattern[i] < vocab:
                row = (np.arange(vocab) == pattern[i]).astype(float)
            rows.append(row / row.sum() if row.sum() > 0 else np.full(vocab, 1 / vocab))
        found.append(rows)
    return np.array(found)


@cache
def denoiser(vocab, length):
    place = ((vocab + 1) ** np.arange(length)[::-1]).astype(np.int32)
    return plain(lambda table, x: table[jnp.sum(x * place, axis=1, dtype=np.int32)], vocab)


def exact(q, dtype=jnp.float32):
    """(denoiser, params) of a law."""
    with np.errstate(divide="ignore"):
        return denoiser(q.shape[0], q.ndim), jnp.asarray(np.log(posterior(q)), dtype)


def pairs(vocab, length):
    """L / 2 pairs of equal tokens."""
    q = np.zeros((vocab,) * length)
    for tokens in itertools.product(range(vocab), repeat=length // 2):
        q[tuple(np.repeat(tokens, 2))] = vocab ** -(length / 2)
    return q


def parity(length):
    """Bits of an even sum."""
    q = np.zeros((2,) * length)
    for bits in itertools.product((0, 1), repeat=length):
        if sum(bits) % 2 == 0:
            q[bits] = 2.0 ** (1 - length)
    return q


def random(vocab, length, seed=0):
    """A law with zeros and without symmetry."""
    rng = np.random.default_rng(seed)
    q = rng.dirichlet(np.full(vocab**length, 0.5)).reshape((vocab,) * length)
    q[q < np.quantile(q, 0.3)] = 0
    return q / q.sum()


def counted(tokens, vocab):
    """How often each text came, in the order of all V^L."""
    tokens = np.asarray(tokens)
    place = vocab ** np.arange(tokens.shape[1])[::-1]
    return np.bincount(tokens @ place, minlength=vocab ** tokens.shape[1])


def assert_law(tokens, vocab, p):
    """Frequencies within five standard errors, nothing where p is 0, and chi-squared, too."""
    n, found = len(tokens), counted(tokens, vocab)
    p = np.asarray(p).reshape(-1)
    assert (found[p == 0] == 0).all()
    there = n * p > 5
    assert (np.abs(found - n * p) <= 5 * np.sqrt(n * p * (1 - p)) + 1).all()
    chi = np.sum((found - n * p)[there] ** 2 / (n * p)[there])
    assert chi < there.sum() + 6 * np.sqrt(2 * there.sum())
