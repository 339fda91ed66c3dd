"""Samples against the data: distances of features, precision and recall, copies of rows."""

import warnings
from functools import lru_cache

import jax
import numpy as np

from common.errors import reject
from diffusion import features, images, neighbours, quality
from diffusion.dataset import dataset

FEATURES = ("local", "inception", "dinov2")
OVERLAP = 5000  # Rows and samples that precision and recall look at, drawn at random.


def judged(config, data: images.Images, made: np.ndarray) -> dict:
    """Frechet distance in the configured features, precision and recall, copies of rows.

    "local" are the features of a small classifier trained on these data: distances in them
    compare runs on these data and nothing else. They are not an FID. Inception weights
    without their last layer have no Inception score, and a warning says so.
    """
    known, real, rows, accuracy = _reference(
        *_where(config),
        tuple(sorted(config.eval.local.items())),
        config.eval.features,
        config.eval.weights,
    )
    shown = images.to_uint8(made) if data.scaling == "x/127.5-1" else made
    found = features.extract(known, np.asarray(shown))
    distance = quality.frechet_distance(quality.statistics(found), real)
    rng = np.random.default_rng(0)
    some = lambda v: v[rng.permutation(len(v))[:OVERLAP]]
    overlap = neighbours.manifold(some(rows), some(found), neighbours=config.eval.neighbours)
    near = neighbours.nearest(made, data.rows)
    copies = neighbours.memorisation(near, _among_rows(*_where(config)))
    scores = {}
    if known.name == "inception" and known.logits is not None:
        score = quality.inception_score(np.asarray(known.logits(known.params, found)))
        scores = {"inception_score": score.mean, "inception_score_std": score.std}
    return scores | {
        "frechet": distance,
        "precision": overlap.precision,
        "recall": overlap.recall,
        "manifold_density": overlap.density,
        "manifold_coverage": overlap.coverage,
        "copies": copies.copies,
        "close": copies.close,
        "nearest": float(np.median(near.distance[:, 0])),
        "feature_accuracy": accuracy,
        "samples": len(made),
    }


@lru_cache(maxsize=2)
def _reference(where: tuple, seed: int, local: tuple, name: str, weights: str) -> tuple:
    """Features, their statistics and values on all rows, once per process."""
    data = dataset(**dict(where), seed=seed)
    accuracy = 0.0
    if name == "local":
        if data.labels is None:
            raise reject("eval.features", name, "inception or dinov2 where there are no labels")
        key = jax.random.key(seed)
        known, accuracy = features.local_features(data.rows, data.labels, key, **dict(local))
    else:
        known = _published(name, weights)
    rows = features.extract(known, data.rows)
    return known, quality.statistics(rows), rows, accuracy


def _published(name: str, weights: str) -> features.Features:
    """A network with the user's weights.

    Raises:
      UserError: the file is not that of such a network.
    """
    from diffusion import dinov2, inception

    known = {"inception": inception.inception, "dinov2": dinov2.dinov2}[name](weights)
    if name == "inception" and known.logits is None:
        said = f"{weights} lacks fc.weight, so there is no Inception score"
        warnings.warn(f"config.eval.weights: {said}.", stacklevel=2)
    return known


@lru_cache(maxsize=4)
def _scored(name: str, weights: str) -> bool:
    """Whether it has an Inception score. The weights are read, but not kept in training."""
    known = _published(name, weights)
    return name == "inception" and known.logits is not None


def _where(config) -> tuple:
    return tuple(sorted(config.data.items())), config.data_seed


@lru_cache(maxsize=2)
def _among_rows(where: tuple, seed: int) -> neighbours.Nearest:
    """Distances between the training rows, of up to `OVERLAP` of them to all."""
    rows = dataset(**dict(where), seed=seed).rows
    if len(rows) <= OVERLAP:
        return neighbours.nearest(rows, rows, 1, skip_self=True)
    # Rows find themselves first, at distance 0.
    chosen = np.random.default_rng(0).permutation(len(rows))[:OVERLAP]
    near = neighbours.nearest(rows[np.sort(chosen)], rows, 2)
    return neighbours.Nearest(near.distance[:, 1:], near.index[:, 1:])


def check(config, data: images.Images) -> None:
    """Refuses settings of `config.eval` about samples that cannot be."""
    e = config.eval
    if e.features not in FEATURES:
        raise reject("eval.features", e.features, f"one of {', '.join(FEATURES)}")
    if e.samples < 0:
        raise reject("eval.samples", e.samples, "0 (none) or more")
    if not e.samples:
        return
    if e.neighbours < 1:
        raise reject("eval.neighbours", e.neighbours, "a whole number from 1 up")
    least = min(len(data.rows), e.samples)
    if least <= e.neighbours:
        raise reject("eval.samples", e.samples, f"0, or more than {e.neighbours} neighbours")
    if e.features == "local":
        if len(data.rows) < 3:
            raise reject("eval.features", "local", "inception or dinov2 for fewer than 3 rows")
        if data.labels is None or len(np.unique(data.labels)) < 2:
            allowed = "inception or dinov2 without labels of two classes, or eval.samples 0"
            raise reject("eval.features", "local", allowed)
        for name, value in e.local.items():
            if value < 1:
                raise reject(f"eval.local.{name}", value, "a whole number from 1 up")
        return
    channels = data.rows.shape[-1]
    if channels not in (1, 3):
        allowed = f"local for data of {channels} channels, neither 1 nor 3"
        raise reject("eval.features", e.features, allowed)
    if _scored(e.features, e.weights) and e.samples < quality.SPLITS:
        allowed = f"0, or at least the {quality.SPLITS} splits of the Inception score"
        raise reject("eval.samples", e.samples, allowed)
