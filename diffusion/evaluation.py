"""What training is measured by: the gap at every noise level, and samples against the data.

`parts_of` makes of a config what training, evaluation and the actions share.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import numpy as np

from common import mesh as meshes
from common.errors import reject
from diffusion import (
    cost,
    curve,
    diagnosis,
    features,
    grids,
    images,
    neighbours,
    quality,
    sampling,
)
from diffusion.dataset import dataset, placed
from diffusion.guidance import classifier_free
from diffusion.networks import Network, network
from diffusion.preconditioning import Preconditioning, denoiser, preconditioning
from diffusion.processes import Process, process
from diffusion.schedules import Schedule, density, schedule

FEATURES = ("local", "inception", "dinov2")


class Parts(NamedTuple):
    """Of one config.

    Attributes:
      network, process, wrap, schedule: the model and how it is trained.
      of_condition: (params of the network, condition or None) -> denoiser.
      guided: the same with classifier-free guidance, for sampling.
      shape: (H, W, C).
      rows: () -> all rows on the devices.
      flops: () -> FLOPs of training on one image.
    """

    network: Network
    process: Process
    wrap: Preconditioning
    schedule: Schedule
    of_condition: Callable
    guided: Callable
    shape: tuple[int, int, int]
    rows: Callable
    flops: Callable[[], float]


def parts_of(config, data: images.Images) -> Parts:
    """The model, process and schedule of a config.

    Raises:
      UserError: the config asks for what cannot be.
    """
    shape = tuple(int(n) for n in data.rows.shape[1:])
    model = config.model
    own = model[model.name].to_dict() if model.name in model else {}
    classes = int(data.labels.max()) + 1 if config.data.class_cond else 0
    shared = dict(dtype=model.dtype, label_dim=model.label_dim or classes)
    if model.dropout:
        shared["dropout"] = model.dropout
    if config.augment:
        shared["augment_dim"] = 9
    if model.remat:
        shared["remat"] = True
    if classes > shared["label_dim"]:
        raise reject("model.label_dim", model.label_dim, f"0 or at least {classes} classes")
    net = _plain(network(model.name, shape=shape, **shared, **own), shape[-1])
    made = process(**config.process)
    wrap = preconditioning(made, config.target, model.sigma_data, config.noise_scale)
    if model.noise_input not in ("native", "log"):
        raise reject("model.noise_input", model.noise_input, "native or log")
    if model.noise_input == "log":
        wrap = wrap._replace(c_noise=lambda s: jax.numpy.log(s) / 4)
    given = config.schedule.to_dict()
    sched = schedule(wrap=wrap, sigma_data=model.sigma_data, **given)

    def of_condition(params, condition=None):
        return denoiser(net.apply, params, wrap, condition)

    def guided(params, condition=None):
        s = config.sampler
        if s.guidance == 1 or condition is None:
            return of_condition(params, condition)
        interval = (s.guide_low, s.guide_high) if s.guide_low < s.guide_high else None
        return classifier_free(partial(of_condition, params), condition, s.guidance, interval)

    @lru_cache(maxsize=1)
    def rows():
        mesh = meshes.make(**config.mesh)
        return placed(data, mesh, config.estimator.tile, config.data.class_cond)

    @lru_cache(maxsize=1)
    def work():
        def loss(params, x, s):
            return jax.numpy.sum(of_condition(params)(x, s))

        params = jax.eval_shape(net.init, jax.random.key(0))
        image, level = (jax.ShapeDtypeStruct(n, "float32") for n in ((1, *shape), (1,)))
        return cost.flops(jax.grad(loss), params, image, level)

    return Parts(net, made, wrap, sched, of_condition, guided, shape, rows, work)


def _size(params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _plain(net: Network, channels: int) -> Network:
    """Without the variances that DiT learns beside its prediction."""
    apply = lambda *given: net.apply(*given)[..., :channels]
    return net._replace(apply=apply)


def evaluate(config, data: images.Images, parts: Parts, state: Any, key: jax.Array) -> dict:
    """Losses, floor and gap of the averaged parameters at all levels; samples, if asked for.

    Returns:
      the fields of `diagnosis.Diagnosis` per coordinate; edm_loss, edm_floor and edm_gap,
      weighted as EDM trains; own_* as this run does; gap_worst, the least gap in standard
      errors; density and weight of the schedule at the levels; and what `judged` finds.
    """
    params = state.averages.trees[0]
    draw, noise = jax.random.split(key)
    found = diagnose(config, data, parts, params, noise, config.eval.draws)
    edm = lambda s: np.exp(-0.5 * ((np.log(s) + 1.2) / 1.2) ** 2)
    sd = config.model.sigma_data
    edm_weight = lambda s: (s**2 + sd**2) / (s * sd) ** 2
    fields = ("loss", "floor", "gap")
    totals = diagnosis.total(found, edm_weight, edm, fields)
    s = found.sigmas
    own = density(parts.schedule, state.schedule, s, draw)
    weight = np.asarray(parts.schedule.weight(jax.numpy.asarray(s, "float32"), state.schedule))
    mine = diagnosis.total(found, lambda _: weight, lambda _: own, fields)
    values = {n: np.nan_to_num(v) for n, v in found._asdict().items()}
    values |= {f"edm_{n}": v for n, v in totals.items()}
    values |= {f"own_{n}": v for n, v in mine.items()}
    values["edm_gap_err"] = _error(found, edm_weight, edm)
    values["gap_worst"] = float(np.min(found.gap / np.maximum(found.gap_err, 1e-12)))
    values |= {"density": own, "weight": weight}
    seen = int(state.averages.step) * config.batch_size
    values |= {"images": seen, "flops": parts.flops() * seen, "params": _size(params)}
    if config.eval.samples:
        values |= judged(config, data, samples(config, data, parts, params, key))
    return values


def _error(found, weight, density) -> float:
    """Of the weighted gap. Levels share draws: errors of neighbours add up, not in squares."""
    p = density(found.sigmas)
    x = np.log(found.sigmas)
    return float(np.trapezoid(p * weight(found.sigmas) * found.gap_err, x) / np.trapezoid(p, x))


def diagnose(config, data, parts: Parts, params, key, draws: int) -> diagnosis.Diagnosis:
    """The diagnosis of a run's parameters on its own rows."""
    e = config.eval
    return diagnosis.diagnose(
        parts.rows(),
        parts.of_condition,
        params,
        curve.grid(e.sigma_min, e.sigma_max, e.points),
        key,
        shape=parts.shape,
        num_draws=draws,
        labels=data.labels if config.data.class_cond else None,
        block=e.block,
        seed=config.seed,
        progress=True,
    )


def samples(config, data, parts: Parts, params, key, count: int = 0) -> np.ndarray:
    """Generated images [n, H, W, C], float32. Classes as often as in the data, in turn."""
    s, n = config.sampler, count or config.eval.samples
    condition = None
    if config.data.class_cond:
        condition = {"label": data.labels[np.arange(n) % len(data.labels)].astype(np.int32)}
    options = {"edm": ("s_churn", "s_min", "s_max", "s_noise"), "ddim": ("eta",)}
    return sampling.generate(
        jax.tree_util.Partial(parts.guided, params),
        np.arange(n),
        key,
        shape=parts.shape,
        sigmas=grids.edm(s.n, s.sigma_min, s.sigma_max, s.rho),
        batch_size=s.batch_size,
        condition=condition,
        method=s.method,
        **{name: s[name] for name in options.get(s.method, ())},
    )


def judged(config, data: images.Images, made: np.ndarray) -> dict:
    """Frechet distance in the configured features, precision and recall, copies of rows.

    "local" are the features of a small classifier trained on these data: distances in them
    compare runs on these data and nothing else. They are not an FID.
    """
    known, real, rows, accuracy = _reference(
        tuple(sorted(config.data.items())),
        config.data_seed,
        tuple(sorted(config.eval.local.items())),
        config.eval.features,
        config.eval.weights,
    )
    whole = made.dtype if data.scaling != "x/127.5-1" else np.uint8
    shown = images.to_uint8(made) if whole == np.uint8 else made
    found = features.extract(known, np.asarray(shown))
    distance = quality.frechet_distance(quality.statistics(found), real)
    n = min(len(rows), 5000)
    overlap = neighbours.manifold(rows[:n], found[:5000], neighbours=config.eval.neighbours)
    near = neighbours.nearest(made, data.rows)
    copies = neighbours.memorisation(near)
    return {
        "frechet": distance,
        "precision": overlap.precision,
        "recall": overlap.recall,
        "copies": copies.copies,
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
        from diffusion import dinov2, inception

        made = {"inception": inception.inception, "dinov2": dinov2.dinov2}[name]
        known = made(weights)
    rows = features.extract(known, data.rows)
    return known, quality.statistics(rows), rows, accuracy


def check(config, data: images.Images) -> None:
    """Refuses settings of evaluation and sampling that cannot be."""
    e, s = config.eval, config.sampler
    devices = meshes.make(**config.mesh).shape["data"]
    if e.features not in FEATURES:
        raise reject("eval.features", e.features, f"one of {', '.join(FEATURES)}")
    if e.features != "local" and e.samples and not e.weights:
        raise reject("eval.weights", e.weights, f"a file with the weights of {e.features}")
    if e.draws < 2:
        raise reject("eval.draws", e.draws, "a whole number from 2 up")
    if e.samples < 0:
        raise reject("eval.samples", e.samples, "0 (none) or more")
    if e.samples and e.features == "local" and data.labels is None:
        raise reject("eval.features", "local", "inception or dinov2 where there are no labels")
    if e.points < 2 or not 0 < e.sigma_min < e.sigma_max:
        raise reject("eval.points", e.points, "at least 2, of a range sigma_min < sigma_max")
    if e.block < 1:
        raise reject("eval.block", e.block, "a whole number from 1 up")
    if s.batch_size < 1 or s.batch_size % devices:
        allowed = f"a multiple of the {devices} devices of mesh.data"
        raise reject("sampler.batch_size", s.batch_size, allowed)
