"""The optimal loss of a data set as a run: resumable, on any number of devices.

A step is one block of draws against all rows (`plans`, `draws`); the state keeps the moments
of every block, so that a run that was killed loses a block at most, and errors between blocks
are what they are. Noise levels are `points` steps of log s; after `pilot` blocks `more` levels
are added where the curve rises, about sigma_star as it is known by then.

    J*(s) = E tr Cov[x_0 | x_0 + s eps]     (Xu et al., arXiv:2506.13763)

Other runs name this one in `init_from` and take the curve over. Actions: evaluate;
diagnose, a denoiser of the user's, `--input=model.py:denoiser`, against the optimum of these
data; study, subset estimators against C, L and s; size, the estimator and draws that reach an
accuracy, `--input=0.01`.
"""

import warnings
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from common import mesh as meshes
from common.errors import reject
from common.experiment import Experiment
from diffusion import actions, curve, draws, findings, report
from diffusion.dataset import dataset, fingerprint, placed
from diffusion.estimation import State, result
from diffusion.estimators import precision_of
from diffusion.optimal_schedule import star_of
from diffusion.plans import BATCHES, Found, Plan, block_of, measured, plan_of, whole
from diffusion.rows import within_classes
from diffusion.stratification import nearest_neighbours


def make(config) -> Experiment:
    """The experiment of estimation runs of `configs/optimal_loss.py`.

    Raises:
      UserError: the config asks for what cannot be.
    """
    images = dataset(**config.data, seed=config.data_seed)
    e = config.estimator
    plan = _plan(config, len(images.rows), int(np.prod(images.rows.shape[1:])))
    _check(config, plan)
    precision = precision_of(e.precision)
    levels = curve.grid(e.sigma_min, e.sigma_max, e.points)
    size = len(levels) + e.more

    told = findings.entropy(images, config.data.class_cond)

    @lru_cache(maxsize=1)
    def data():
        mesh = meshes.make(**config.mesh)
        rows = placed(images, mesh, e.tile, config.data.class_cond)
        near = nearest_neighbours(rows, plan.neighbours, precision) if plan.neighbours else None
        within = 0.0
        if config.data.class_cond:
            # Of the rows as they are stored; `rows` may hold them scaled already.
            unit = 1 / 127.5 if images.rows.dtype == np.uint8 else 1.0
            within = within_classes(images.rows, images.labels, unit)
        return rows, near, np.float32(within)

    def init(key):
        del key
        zero = draws.zeros(size)
        many = lambda n: jax.tree.map(lambda a: jnp.zeros((n, *a.shape)), zero)
        cheap = None
        if plan.estimator != "exact":
            cheap = draws.Subset(*(many(plan.steps) for _ in range(3)))
        start = np.concatenate([levels, np.full(e.more, e.sigma_max)])
        first = np.where(np.arange(size) < len(levels), 0, e.pilot)
        return State(
            sigmas=jnp.asarray(start, jnp.float32),
            exact=many(max(plan.few, 1)),
            cheap=cheap,
            square=jnp.zeros(()),
            variance=jnp.zeros(()),
            done=jnp.zeros((), jnp.int32),
            block=jnp.asarray(plan.block, jnp.int32),
            dim=jnp.asarray(plan.dim, jnp.int32),
            first=jnp.asarray(first, jnp.int32),
            source=jnp.asarray(fingerprint(images, config.data.class_cond)),
        )

    def batch(step):
        rows, near, within = data()
        mesh = meshes.make(**config.mesh)
        block = block_of(plan, step, config.seed)
        label = images.labels[block.index] if config.data.class_cond else None
        return dict(
            rows=rows,
            near=near,
            **meshes.everywhere(dict(block=block, label=label, within=within), mesh),
        )

    def step(state, batch, key):
        rows = batch["rows"]
        sigmas = state.sigmas
        if e.more:
            chosen = jnp.concatenate([sigmas[: e.points], _rise(state, plan, config)])
            sigmas = jnp.where(state.done == e.pilot, chosen, sigmas)
        given = (rows, batch["block"], key, sigmas, batch["near"], precision, batch["label"])
        found = _measure(plan, state.done, given)
        put = lambda all_, new: all_.at[state.done].set(new.astype(all_.dtype))
        exact = state.exact
        if found.exact is not None:
            within = state.done < plan.few
            exact = jax.tree.map(
                lambda a, n: jnp.where(within, put(a, n), a), exact, found.exact
            )
        cheap = state.cheap
        if found.cheap is not None:
            cheap = jax.tree.map(put, cheap, found.cheap)
        variance = jnp.sum(rows.square) / rows.count
        square = variance + jnp.sum(rows.mean**2)
        if config.data.class_cond:
            variance = batch["within"].astype(variance.dtype)
        state = state._replace(
            sigmas=sigmas,
            exact=exact,
            cheap=cheap,
            square=square,
            variance=variance,
            done=state.done + 1,
        )
        return state, _figures(state, plan, config)

    found = partial(result, e.name, e.form, plan.fold)
    return Experiment(
        init=init,
        step=step,
        batch=batch,
        evaluate=partial(_evaluate, found, config),
        report=report.report,
        actions={
            "evaluate": partial(actions.curve_again, found, config),
            "diagnose": partial(actions.diagnose_users, config),
            "study": partial(actions.study_subsets, found, config),
            "size": partial(actions.size, found, config),
        },
        headline=lambda row: (
            f"sigma_star {row['sigma_star']:.3f}  information {row['information']:.3f} of "
            f"{told:.3f} nats"
        ),
    )


def _plan(config, count: int, dim: int) -> Plan:
    """The plan of `config.steps` blocks of `estimator.block` draws.

    Raises:
      UserError: a setting of the estimator cannot be, or devices do not divide a block.
    """
    e = config.estimator
    if config.steps < 1:
        raise reject("steps", config.steps, "a whole number from 1 up")
    enough = BATCHES * whole("block", e.block)  # Blocks are as large as asked for.
    with jax.set_mesh(meshes.make(**config.mesh)):
        plan = plan_of(
            count,
            dim,
            num_draws=enough,
            estimator=e.name,
            form=e.form,
            subset_size=e.subset_size,
            c_rule=_number(e.c_rule),
            neighbours=e.neighbours,
            exact_draws=enough,
            antithetic=e.antithetic,
            block=e.block,
        )
        devices = meshes.current()
    if plan.block != e.block:
        allowed = f"a multiple of {devices * plan.fold}, of devices and the signs of draws"
        raise reject("estimator.block", e.block, allowed)
    few = {"exact": config.steps, "corrected": e.exact_blocks}.get(e.name, 0)
    if e.name == "corrected":
        # Added levels do not have the blocks before they were chosen.
        least, most = BATCHES + (e.pilot if e.more else 0), config.steps - BATCHES
        if least > most:
            allowed = f"from {least + BATCHES} up for estimator.name corrected"
            raise reject("steps", config.steps, allowed)
        if not least <= few <= most:
            allowed = f"from {least} (with the pilot) to {most}, {BATCHES} less than steps"
            raise reject("estimator.exact_blocks", few, allowed)
    if config.steps * e.block < 2:
        warnings.warn("A single draw has no standard error: it is NaN.", stacklevel=3)
    return plan._replace(steps=config.steps, few=few)


def _measure(plan: Plan, done, given) -> Found:
    """Moments of one block; with exact sums for the first `few`."""
    if plan.few in (0, plan.steps):
        return measured(plan, plan.few > 0, *given)

    def without():
        found = measured(plan, False, *given)
        return found._replace(exact=jax.tree.map(jnp.zeros_like, found.cheap.lower))

    return jax.lax.cond(done < plan.few, lambda: measured(plan, True, *given), without)


def _means(state: State, plan: Plan) -> Float[Array, " s"]:
    """The curve so far, as it stands within a step."""
    if plan.estimator == "exact":
        return jnp.sum(state.exact.mean.trcov, 0) / jnp.maximum(state.done, 1)
    return jnp.sum(state.cheap.corrected.mean.trcov, 0) / jnp.maximum(state.done, 1)


def _rise(state: State, plan: Plan, config) -> Float[Array, " m"]:
    """The levels to add: from a third of sigma_star to four times it."""
    e = config.estimator
    x = jnp.log(state.sigmas[: e.points])
    star = star_of(x, _means(state, plan)[: e.points], e.tau * state.variance)
    high = jnp.minimum(star + jnp.log(4.0), jnp.log(e.sigma_max))
    return jnp.exp(jnp.linspace(star - jnp.log(3.0), high, e.more))


def _figures(state: State, plan: Plan, config) -> dict:
    """What the progress line shows: sigma_star, and the integral of J* s^-3 against ln N."""
    e = config.estimator
    x = jnp.log(state.sigmas[: e.points])
    value = _means(state, plan)[: e.points]
    star = star_of(x, value, e.tau * state.variance)
    # Where J* is 0 its weight may be beyond float32.
    inside = jnp.trapezoid(jnp.where(value > 0, value * jnp.exp(-2 * x), 0), x)
    tail = state.variance / 2 * jnp.exp(-2 * x[-1])
    return {
        "sigma_star": jnp.exp(star),
        "information": inside + tail,
        "variance": state.variance / plan.dim,
        "blocks": state.done.astype(jnp.float32),
    }


def _evaluate(result, config, state, key) -> dict:
    """The curve, for metrics.jsonl; sums over coordinates."""
    del key
    found = result(state)
    star = curve.sigma_star(curve.smooth(found), config.estimator.tau)
    information, error = curve.information(found)
    # NaN is an error that one draw cannot tell.
    return found._asdict() | {
        "sigma_star": star,
        "information": information,
        "information_err": error,
    }


def _number(rule: str) -> str | float:
    """A rule for C by its name, or C itself."""
    try:
        return float(rule)
    except ValueError:
        return rule


def _check(config, plan: Plan) -> None:
    e = config.estimator
    if not 0 < e.sigma_min < np.inf:
        raise reject("estimator.sigma_min", e.sigma_min, "a finite number above 0")
    if not e.sigma_min < e.sigma_max < np.inf:
        raise reject("estimator.sigma_max", e.sigma_max, f"a finite number above {e.sigma_min}")
    whole("tile", e.tile)
    if e.points < 2:
        raise reject("estimator.points", e.points, "a whole number from 2 up")
    if e.more < 0:
        raise reject("estimator.more", e.more, "a whole number from 0 up")
    if e.more and not 1 <= e.pilot < max(plan.few, 0 if plan.few else plan.steps):
        allowed = f"from 1 to {max(plan.few or plan.steps, 2) - 1} blocks, or estimator.more 0"
        raise reject("estimator.pilot", e.pilot, allowed)
    if not 0 < e.tau < 1:
        raise reject("estimator.tau", e.tau, "a share of the variance between 0 and 1")
    if config.data.class_cond and plan.estimator != "exact":
        raise reject("estimator.name", plan.estimator, "exact where data.class_cond is True")
