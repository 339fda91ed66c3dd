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
from diffusion.augment import augment
from diffusion.dataset import dataset
from diffusion.estimation import result
from diffusion.guidance import drop
from diffusion.images import scaled
from diffusion.optimal_schedule import Tracked, middles
from diffusion.preconditioning import denoiser
from optim import ema
from optim.denoising import denoising


class State(NamedTuple):
    """All that training needs to go on.

    Attributes:
      params: {"net": of the network} and, of edm2's loss on other networks, "log_loss".
      opt: of Optax.
      averages: of params["net"].
      schedule: of `schedules.Schedule`.
    """

    params: Any
    opt: optax.OptState
    averages: ema.Averages
    schedule: Any


def make(config) -> Experiment:
    """The experiment of training runs of `configs/optimal_loss.py`.

    Raises:
      UserError: the config asks for what cannot be.
    """
    images = dataset(**config.data, seed=config.data_seed)
    _check(config, images)
    parts = evaluation.parts_of(config, images)
    net, made = parts.network, parts.schedule
    tx = denoising(**config.optim, steps=config.steps)
    averages = averages_of(config)

    def init(key):
        params = {"net": net.normalized(net.init(key))}
        if made.learned and net.uncertainty is None:
            params["log_loss"] = jnp.zeros(KNOTS)
        mean = ema.init(params["net"], averages)
        return State(params, tx.init(params), mean, made.init())

    def step(state, batch, key):
        keys = jax.random.split(key, 5)
        x0 = scaled(batch["x"])
        cond = {} if "label" not in batch else {"label": batch["label"]}
        if config.augment:
            x0, cond["augment"] = augment(keys[4], x0, config.augment)
        if config.label_drop:
            cond = drop(keys[2], cond, config.label_drop)
        s = made.sample(keys[0], len(x0), state.schedule)
        eps = jax.random.normal(keys[1], x0.shape)
        given = dict(x0=x0, eps=eps, s=s, cond=cond)
        loss = partial(_loss, config, parts, state.schedule, keys[3])
        (value, error), grads = _gradient(loss, state.params, given, config.accumulate)
        updates, opt = tx.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        params = params | {"net": net.normalized(params["net"])}
        mean = ema.update(state.averages, params["net"], averages)
        seen = made.update(state.schedule, s, error)
        good = opt.last_finite
        values = {
            # A step that was left out shows as such, not as a loss; too many end the run.
            "loss": jnp.where(good | (opt.notfinite_count >= 20), value, 0.0),
            "x0_error": jnp.where(good, jnp.mean(error), 0.0),
            "grad_norm": jnp.where(good, optax.tree.norm(grads), 0.0),
            "update_norm": optax.tree.norm(updates),
            "param_norm": optax.tree.norm(params["net"]),
            "skipped": opt.total_notfinite.astype(jnp.float32),
        }
        return State(params, opt, mean, seen), values

    return Experiment(
        init=init,
        step=step,
        batch=partial(_batch, config, images),
        evaluate=partial(evaluation.evaluate, config, images, parts),
        report=report.report,
        adopt=partial(_adopt, config),
        rules=net.rules(config.fsdp),
        actions={
            name: partial(run, config, images, parts) for name, run in actions.TRAINED.items()
        },
        headline=lambda row: f"loss {row['loss']:.4f}  grad {row['grad_norm']:.2f}",
    )


KNOTS = 64  # Of the learned log loss, over log s from SPAN[0] to SPAN[1].
SPAN = (-7.0, 5.0)


def _loss(config, parts, schedule_state, key, params, given):
    """Mean weighted loss of a batch, and the squared error of each sample."""
    of = denoiser(
        parts.network.apply, params["net"], parts.wrap, given["cond"],
        key if config.model.dropout else None,
    )  # fmt: skip
    s = given["s"]
    x = given["x0"] + s.reshape(-1, 1, 1, 1) * given["eps"]
    error = jnp.mean((of(x, s) - given["x0"]) ** 2, (1, 2, 3))
    weighted = parts.schedule.weight(s, schedule_state) * error
    if parts.schedule.learned:
        if parts.network.uncertainty is None:
            knots = jnp.linspace(*SPAN, KNOTS)
            u = jnp.interp(jnp.log(s), knots, params["log_loss"])
        else:
            u = parts.network.uncertainty(params["net"], parts.wrap.c_noise(s))
        weighted = weighted * jnp.exp(-u) + u
    return jnp.mean(weighted), error


def _gradient(loss, params, given, parts: int):
    """Loss, errors and gradient; `parts` slices of the batch one after the other."""
    both = jax.value_and_grad(loss, has_aux=True)
    if parts == 1:
        return both(params, given)
    split = lambda a: jnp.moveaxis(a.reshape(-1, parts, *a.shape[1:]), 1, 0)

    def more(carry, part):
        (value, error), grads = both(params, part)
        return jax.tree.map(lambda a, b: a + b / parts, carry, (value, grads)), error

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    (value, grads), errors = jax.lax.scan(more, zero, jax.tree.map(split, given))
    return (value, jnp.moveaxis(errors, 0, 1).reshape(-1)), grads


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
        return (ema.half_life(float(e.images), config.batch_size, e.ramp or None),)
    if e.kind == "power":
        return tuple(ema.power(width) for width in e.sigma_rel)
    if e.kind == "plain":
        return (ema.plain(e.decay),)
    raise reject("ema.kind", e.kind, "half_life, power or plain")


def _adopt(config, fresh: State, donor: Any) -> State:
    """A curve for the schedule, or the parameters of another training run."""
    if isinstance(donor, State):
        mean = fresh.averages._replace(trees=donor.averages.trees)
        return fresh._replace(params=donor.params, averages=mean)
    if not isinstance(fresh.schedule, Tracked):
        return fresh
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


def _check(config, images) -> None:
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
    evaluation.check(config, images)
