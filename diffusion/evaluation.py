"""What training is measured by: the gap at every noise level, and samples against the data."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common.errors import reject
from diffusion import curve, diagnosis, drawing, images, judging
from diffusion import loss as objective
from diffusion.parts import Parts, size
from diffusion.schedules import density


def evaluate(config, data: images.Images, parts: Parts, state: Any, key: jax.Array) -> dict:
    """Losses, floor and gap of the averaged parameters at all levels; samples, if asked for.

    Returns:
      the fields of `diagnosis.Diagnosis` per coordinate; edm_loss, edm_floor and edm_gap,
      weighted as EDM trains; own_* as this run does; gap_worst, the least gap in standard
      errors; density and weight of the schedule at the levels; and what `judging.judged` finds.
    """
    params = state.averages.trees[0]
    draw, noise, start = jax.random.split(key, 3)
    found = diagnose(config, data, parts, params, noise, config.eval.draws)
    sd = config.model.sigma_data
    edm = lambda s: diagnosis.edm_density(s, sd)
    edm_weight = lambda s: diagnosis.edm_weight(s, sd)
    fields = ("loss", "floor", "gap")
    totals = diagnosis.total(found, edm_weight, edm, fields)
    s = found.sigmas
    own = density(parts.schedule, state.schedule, s, draw)
    levels = jnp.asarray(s, "float32")
    weight = np.asarray(parts.schedule.weight(levels, state.schedule))
    if parts.schedule.learned:  # The gradient of w exp(-u) J + u.
        averaged = state.params | {"net": params}
        u = objective.log_loss(parts.network, parts.wrap, averaged, levels)
        weight = weight * np.exp(-np.asarray(u))
    mine = diagnosis.total(found, lambda _: weight, lambda _: own, fields)
    values = found._asdict()  # Of two draws at least: all errors are known.
    values |= {f"edm_{n}": v for n, v in totals.items()}
    values |= {f"own_{n}": v for n, v in mine.items()}
    values["edm_gap_err"] = _error(found, edm_weight, edm)
    values["gap_worst"] = float(np.min(found.gap / np.maximum(found.gap_err, 1e-12)))
    values |= {"density": own, "weight": weight}
    seen = int(state.averages.step) * config.batch_size
    values |= {"images": seen, "flops": parts.flops() * seen, "params": size(params)}
    if config.eval.samples:
        made = drawing.samples(config, data, parts, params, start, config.eval.samples)
        values |= judging.judged(config, data, made)
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


def check(config, data: images.Images, parts: Parts) -> None:
    """Refuses settings of evaluation and sampling that cannot be, before training starts."""
    check_levels(config)
    drawing.check(config, data, parts)
    judging.check(config, data)


def check_levels(config) -> None:
    """Refuses draws and noise levels of a diagnosis that cannot be.

    Raises:
      UserError: names the field of `config.eval`.
    """
    e = config.eval
    if e.draws < 2:
        raise reject("eval.draws", e.draws, "a whole number from 2 up")
    if e.points < 2:
        raise reject("eval.points", e.points, "a whole number from 2 up")
    if not 0 < e.sigma_min < np.inf:
        raise reject("eval.sigma_min", e.sigma_min, "a finite number above 0")
    if not e.sigma_min < e.sigma_max < np.inf:
        raise reject("eval.sigma_max", e.sigma_max, f"a finite number above {e.sigma_min}")
    if e.block < 1:
        raise reject("eval.block", e.block, "a whole number from 1 up")
