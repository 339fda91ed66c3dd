"""Training a denoiser, with its optimum known at every noise level.

Diagnosing and improving diffusion models by estimating the optimal loss value (Xu et al.,
arXiv:2506.13763). Where to find what:

    processes, targets, one denoiser for all, section 1   processes, predictions,
                                                          preconditioning
    optimal loss, sections 2 and 3                        posterior, draws, estimators, curve
    an estimate as a run                                  estimate.py, named in `init_from`
    loss, optimum and gap of a model, section 4           diagnosis.py
    noise densities and weights, section 5                schedules.py, optimal_schedule.py
    scaling law, section 6                                scaling.py
    samplers, section 7                                   samplers.py, sampling.py, guidance.py
    networks, section 8                                   networks.py and one file per kind
    Frechet distance, neighbours                          quality.py, neighbours.py, features.py

A step draws noise levels from the schedule and regresses D(x; s) on x_0. Actions: evaluate,
diagnose, sample.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from common import data as common_data
from common import mesh as meshes
from common.errors import reject
from common.experiment import Experiment
from diffusion import actions, curve, evaluation, report
from diffusion import loss as objective
from diffusion.augment import augment
from diffusion.dataset import dataset, fingerprint
from diffusion.estimation import result
from diffusion.guidance import drop
from diffusion.images import scaled
from diffusion.optimal_schedule import Tracked, middles
from diffusion.parts import parts_of
from optim import ema
from optim.denoising import PATIENCE, denoising


class State(NamedTuple):
    """All that training needs to go on.

    Attributes:
      params: {"net": of the network} and, of edm2's loss on other networks, "log_loss".
      opt: of Optax.
      averages: of params["net"].
      schedule: of `schedules.Schedule`.
      shown: [3], loss, error and gradient norm of the last step that moved something.
    """

    params: Any
    opt: optax.OptState
    averages: ema.Averages
    schedule: Any
    shown: jax.Array


def make(config) -> Experiment:
    """The experiment of training runs of `configs/optimal_loss.py`.

    Raises:
      UserError: the config asks for what cannot be.
    """
    images = dataset(**config.data, seed=config.data_seed)
    _check(config)
    parts = parts_of(config, images)
    evaluation.check(config, images, parts)
    net, made = parts.network, parts.schedule
    tx = denoising(**config.optim, steps=config.steps)
    averages = averages_of(config)

    def init(key):
        params = objective.init(net, key, made.learned)
        mean = ema.init(params["net"], averages)
        return State(params, tx.init(params), mean, made.init(), jnp.zeros(3))

    def step(state, batch, key):
        keys = jax.random.split(key, 5)
        x0 = scaled(batch["x"])
        cond = {} if "label" not in batch else {"label": batch["label"]}
        told = cond
        if config.augment:
            x0, cond["augment"] = augment(keys[4], x0, config.augment)
        if config.label_drop:
            told = drop(keys[2], cond, config.label_drop)
        s = made.sample(keys[0], len(x0), state.schedule)
        eps = jax.random.normal(keys[1], x0.shape)
        given = objective.Given(x0, eps, s, made.weight(s, state.schedule), told)
        dropout = keys[3] if config.model.dropout else None
        loss = lambda params, given, key: objective.loss(
            net, parts.wrap, params, given, key, made.learned
        )
        (value, error), grads = objective.gradient(
            loss, state.params, given, dropout, config.accumulate
        )
        updates, opt = tx.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        params = params | {"net": net.normalized(params["net"])}
        mean = ema.update(state.averages, params["net"], averages)
        good = opt.last_finite
        seen = made.update(state.schedule, s, error, _like_the_floor(cond, told) & good)
        # A step that was left out repeats the figures before it. Too many in a row are shown
        # from then on, so that the loop ends the run when it looks.
        found = jnp.stack([value, jnp.mean(error), optax.tree.norm(grads)])
        show = good | (opt.notfinite_count >= PATIENCE)
        shown = jnp.where(show & jnp.isfinite(state.shown).all(), found, state.shown)
        values = {
            "loss": shown[0],
            "x0_error": shown[1],
            "grad_norm": shown[2],
            "update_norm": optax.tree.norm(updates),
            "param_norm": optax.tree.norm(params["net"]),
            "skipped": opt.total_notfinite.astype(jnp.float32),
        }
        return State(params, opt, mean, seen, shown), values

    return Experiment(
        init=init,
        step=step,
        batch=partial(_batch, config, images),
        evaluate=partial(evaluation.evaluate, config, images, parts),
        report=report.report,
        adopt=partial(_adopt, config, fingerprint(images, config.data.class_cond)),
        rules=net.rules(config.fsdp),
        actions={
            name: partial(run, config, images, parts) for name, run in actions.TRAINED.items()
        },
        headline=lambda row: f"loss {row['loss']:.4f}  grad {row['grad_norm']:.2f}",
    )


def _like_the_floor(cond, told) -> Any:
    """Which samples have the optimum that the schedule knows: told their class, unaltered."""
    use = jnp.array(True)
    if "label" in cond:
        use = use & (told["label"] == cond["label"])
    if "augment" in cond:
        use = use & jnp.all(cond["augment"] == 0, -1)
    return use


def _batch(config, images, step) -> dict:
    index = common_data.indices(step, len(images.rows), config.batch_size, config.seed)
    found = {"x": images.rows[index]}
    if config.data.class_cond:
        found["label"] = images.labels[index]
    return found


def averages_of(config) -> tuple:
    """The schedules of the averages: a half-life, or two power functions."""
    e = config.ema
    if e.kind == "half_life":
        if e.images <= 0:
            raise reject("ema.images", e.images, "a number of images above 0")
        return (ema.half_life(float(e.images), config.batch_size, e.ramp or None),)
    if e.kind == "power":
        if not e.sigma_rel:
            raise reject("ema.sigma_rel", tuple(e.sigma_rel), "at least one width")
        return tuple(ema.power(width) for width in e.sigma_rel)
    if e.kind == "plain":
        return (ema.plain(e.decay),)
    raise reject("ema.kind", e.kind, "half_life, power or plain")


def _adopt(config, source, fresh: State, donor: Any) -> State:
    """A curve for the schedule, or the parameters of another training run.

    Raises:
      UserError: the schedule needs a curve, or the curve is of other data.
    """
    wanted = isinstance(fresh.schedule, Tracked)
    if isinstance(donor, State):
        if wanted:
            allowed = "an estimation run, such as floor-seed0, for schedule.kind optimal_loss"
            raise reject("init_from", config.init_from, allowed)
        # The average is the better network, and what is averaged from here on starts there.
        net = donor.averages.trees[0]
        described = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
        if described(net) != described(fresh.averages.trees[0]):
            allowed = "a run of the same network as config.model describes"
            raise reject("init_from", config.init_from, allowed)
        trees = tuple(jax.tree.map(jnp.array, net) for _ in fresh.averages.trees)
        return fresh._replace(
            params=fresh.params | {"net": net}, averages=fresh.averages._replace(trees=trees)
        )
    if not wanted:
        return fresh
    if not np.array_equal(donor.source, source):
        allowed = "an estimation run of the same data, with the same data.class_cond"
        raise reject("init_from", config.init_from, allowed)
    e, made = config.estimator, config.schedule
    found = result(e.name, e.form, 2 if e.antithetic else 1, donor)
    at = np.exp(middles(made.sigma_min, made.sigma_max, made.optimal.bins))
    dim = float(found.dim)
    floor = curve.interpolate(curve.smooth(found), at) / dim
    tracked = fresh.schedule._replace(
        floor=jnp.asarray(floor, jnp.float32),
        variance=jnp.asarray(float(found.variance) / dim, jnp.float32),
    )
    return fresh._replace(schedule=tracked)


def _check(config) -> None:
    devices = meshes.make(**config.mesh).shape["data"]
    if config.batch_size < 1 or config.batch_size % devices:
        allowed = f"a multiple of the {devices} devices of mesh.data"
        raise reject("batch_size", config.batch_size, allowed)
    if config.accumulate < 1 or (config.batch_size // devices) % config.accumulate:
        allowed = f"a divisor of the {config.batch_size // devices} rows of a device"
        raise reject("accumulate", config.accumulate, allowed)
    if not 0 <= config.label_drop < 1:
        raise reject("label_drop", config.label_drop, "a share from 0 to below 1")
    if config.label_drop and not config.data.class_cond:
        raise reject("label_drop", config.label_drop, "0, or data.class_cond True")
    if not 0 <= config.augment <= 1:
        raise reject("augment", config.augment, "a probability from 0 to 1")
    if config.schedule.kind == "optimal_loss" and not config.init_from:
        allowed = "an estimation run, such as floor-seed0, for schedule.kind optimal_loss"
        raise reject("init_from", config.init_from, allowed)
