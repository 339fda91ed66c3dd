"""Layers in NumPy and float64, written from their definitions, for images [b, h, w, c]."""

import numpy as np


def wide(tree):
    if isinstance(tree, dict):
        return {name: wide(leaf) for name, leaf in tree.items()}
    return np.asarray(tree, np.float64)


def silu(x):
    return x / (1 + np.exp(-x))


def dense(x, p):
    return x @ p["kernel"] + p.get("bias", 0)


def conv(x, p):
    """Zero-padded, of the size of the kernel, [k, k, in, out]."""
    k = len(p["kernel"])
    h, w = x.shape[1:3]
    padded = np.pad(x, ((0, 0), (k // 2,) * 2, (k // 2,) * 2, (0, 0)))
    shifts = ((i, j) for i in range(k) for j in range(k))
    out = sum(padded[:, i : i + h, j : j + w] @ p["kernel"][i, j] for i, j in shifts)
    return out + p.get("bias", 0)


def group_norm(x, p, eps):
    groups = max(min(32, x.shape[-1] // 4), 1)
    g = x.reshape(*x.shape[:3], groups, -1)
    mean, var = (f(g, axis=(1, 2, 4), keepdims=True) for f in (np.mean, np.var))
    return ((g - mean) / np.sqrt(var + eps)).reshape(x.shape) * p["scale"] + p["bias"]


def halving(n, taps):
    """The matrix [n / 2, n] of filtering and dropping every second value along one side."""
    taps = np.asarray(taps, np.float64) / np.sum(taps)
    rim = (len(taps) - 1) // 2
    matrix = np.zeros((n // 2, n))
    for i in range(n // 2):
        for k, tap in enumerate(taps):
            if 0 <= 2 * i + k - rim < n:
                matrix[i, 2 * i + k - rim] = tap
    return matrix


def resample(x, taps, way):
    if way == "down":
        rows, columns = (halving(n, taps) for n in x.shape[1:3])
    else:
        rows, columns = (2 * halving(2 * n, taps).T for n in x.shape[1:3])
    return np.einsum("ih,jw,bhwc->bijc", rows, columns, x)


def attention(q, k, v):
    """[t, c] each: one head of one image."""
    scores = q @ k.T / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True) @ v


def attend(qkv, heads, change=lambda x: x):
    """[b, h, w, 3 c] with outputs ordered head, (q, k, v), channel -> [b, h, w, c]."""
    b, h, w, n = qkv.shape
    split = change(qkv.reshape(b, h * w, heads, 3, n // 3 // heads))
    out = np.empty((b, h * w, heads, split.shape[-1]))
    for i, head in np.ndindex(b, heads):
        out[i, :, head] = attention(*(split[i, :, head, part] for part in range(3)))
    return out.reshape(b, h, w, -1)


def waves(noise, frequencies):
    angle = np.asarray(noise, np.float64)[:, None] * frequencies
    return np.concatenate([np.cos(angle), np.sin(angle)], axis=1)


def filled(shapes, seed=0, stacked=()):
    """Parameters for `shapes`: kernels of normal(0, 1 / fan-in), scales near 1, the rest small.

    `stacked` are names at the top whose leaves have a leading axis of layers.
    """
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        values = rng.standard_normal(shape)
        if path[-1] == "kernel":
            return values / np.sqrt(np.prod(shape[path[0] in stacked : -1]))
        return 0.2 * values + (path[-1] == "scale")

    def walk(tree, path):
        if isinstance(tree, dict):
            return {name: walk(tree[name], (*path, name)) for name in sorted(tree)}
        return leaf(path, tree.shape).astype(np.float32)

    return walk(shapes, ())
