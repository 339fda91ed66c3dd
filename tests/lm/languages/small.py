"""Small languages and their laws by brute force over paths of hidden states, in NumPy."""

from itertools import product

import numpy as np

from lm.languages import build, hmm

RNG = np.random.default_rng
LANGUAGES = {
    "pairs": build.pairs(3),
    "parity": build.parity(4),
    "running_sum": build.running_sum(3),
    "2gram": build.random_ngram(RNG(0), 4, 2),
    "3gram": build.random_ngram(RNG(1), 3, 3),
    "sparse": build.random_ngram(RNG(2), 4, 2, support_k=2),
    "uniform": build.random_ngram(RNG(3), 3, 3, start="uniform"),
    "hmm": build.random_hmm(RNG(4), 5, 3, 2, 2),
}
LENGTH = 4


def texts(vocab, length=LENGTH):
    """All texts, the last token fastest."""
    return np.array(list(product(range(vocab), repeat=length)), np.int32)


def law(language, length=LENGTH):
    """q of all texts: an HMM by its tables, an n-gram by its contexts, one token at a time."""
    every = texts(hmm.vocab(language), length)
    found = np.zeros(len(every))
    for i, text in enumerate(every):
        if isinstance(language, hmm.HMM):
            alive = language.pi * language.B[:, text[0]]
            for token in text[1:]:
                alive = (alive @ language.A) * language.B[:, token]
            found[i] = alive.sum()
        else:
            for context in np.ndindex(language.start.shape):
                if context[-1] == text[0]:
                    p, seen = language.start[context], list(context)
                    for token in text[1:]:
                        p *= language.table[tuple(seen[1 - language.table.ndim :])][token]
                        seen.append(token)
                    found[i] += p
    return found


def conditional(q, vocab, pattern):
    """q(x_i = v | visible), [L, V]; None if that cannot be."""
    every = texts(vocab, len(pattern))
    seen = pattern < vocab
    p = q * (every[:, seen] == pattern[seen]).all(axis=1)
    if p.sum() == 0:
        return None
    return np.stack([(every == v).T @ p for v in range(vocab)], axis=1) / p.sum()
