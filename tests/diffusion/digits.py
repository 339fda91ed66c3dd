"""The digits in [-1, 1], and the optimal loss of given draws by brute force in float64."""

from functools import cache

import jax
import numpy as np


@cache
def digits() -> np.ndarray:
    """[1797, 64]."""
    from sklearn.datasets import load_digits

    return load_digits().data / 8 - 1


def noise(key, numbers, dim) -> np.ndarray:
    """What the estimators draw for these numbers."""
    draw = lambda m: jax.random.normal(jax.random.fold_in(key, m), (dim,))
    return np.asarray(jax.vmap(draw)(np.asarray(numbers, np.uint32)), np.float64)


def brute(data, index, eps, s, form="trcov"):
    """Per draw, from |c - y|^2 for all rows y: no streaming, no source form."""
    data = np.asarray(data, np.float64)
    x0 = data[index]
    c = x0 + s * eps
    away = np.stack([((c_m - data) ** 2).sum(1) for c_m in c])
    logit = -(away - away.min(1, keepdims=True)) / (2 * s**2)
    p = np.exp(logit)
    p /= p.sum(1, keepdims=True)
    mu = p @ data
    if form == "trcov":
        spread = np.stack([((x - data) ** 2).sum(1) for x in x0])
        return (p * spread).sum(1) - ((x0 - mu) ** 2).sum(1)
    return {
        "residual": ((x0 - mu) ** 2).sum(1),
        "paired": (x0**2).sum(1) - (mu**2).sum(1),
        "unpaired": (data**2).sum(1).mean() - (mu**2).sum(1),
    }[form]
