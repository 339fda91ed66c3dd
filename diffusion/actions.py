"""`--do=NAME` on finished runs: the curve, a diagnosis with more draws, samples.

--do=evaluate                         the figures of the report, measured again
--do=diagnose                         loss, optimum and gap per noise level
--do=sample                           a grid of samples, and the rows nearest to them
    --input=0.12                      of any of these: not with the average that was tracked,
                                      but with the one of this relative width (ema.kind power)
--do=diagnose --input=model.py:f      of a user's denoiser f(x, sigma) -> x0_hat, on the data
                                      of an estimation run; `users_models.denoiser_of`
--do=size --input=0.01                the estimator and draws for this accuracy of the curve
--do=study                            subset estimators against C, L and s
"""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from common import mesh as meshes
from common.errors import Unfit, UserError, reject
from common.experiment import Run
from diffusion import (
    averages,
    curve,
    diagnosis,
    drawing,
    evaluation,
    figures,
    images,
    neighbours,
    pictures,
    sizing,
    study,
    users_models,
)
from diffusion.dataset import dataset, fingerprint, placed


def curve_again(result: Callable, config, run: Run, folder: Path) -> str:
    """`evaluate` of an estimation run: its curve as a table, figure, .npz and .csv.

    Raises:
      UserError: the data are others than the run's.
    """
    if run.input:
        raise Unfit(f"--input={run.input} is for training runs, not for an optimal loss.")
    state = run.state()
    _same_data(config, state)
    found = result(state)
    record = dict(data=config.data.to_dict(), estimator=config.estimator.to_dict())
    tau, sigma_data = config.estimator.tau, config.model.sigma_data
    return figures.curve_page(found, record, tau, folder, sigma_data)


def _same_data(config, state) -> None:
    """Refuses to call a curve that of other data than those of `config.data`."""
    data = dataset(**config.data, seed=config.data_seed)
    today = fingerprint(data, config.data.class_cond)
    if not np.array_equal(np.asarray(state.source), today):
        raise UserError(
            f"config.data.path {config.data.path!r}, with the rest of config.data, means other "
            "data than those that this run is of: estimate their curve in a new workdir."
        )


def evaluate(config, data, parts, run: Run, folder: Path) -> str:
    """The evaluation of a training run again, with the settings of today; `--input` chooses
    the average, see `averages.averaged`."""
    del folder
    key = jax.random.key(config.seed)
    state, said = averages.averaged(config, run)
    found = evaluation.evaluate(config, data, parts, state, key)
    lines = [said, "", "| figure | value |", "|---|---|"]
    single = {n: v for n, v in found.items() if np.ndim(v) == 0}
    return "\n".join(lines + [f"| {n} | {float(v):.6g} |" for n, v in single.items()])


def diagnose(config, data, parts, run: Run, folder: Path) -> str:
    """Loss, optimum and gap of a training run; `--input` as of `evaluate`."""
    key = jax.random.key(config.seed)
    state, said = averages.averaged(config, run)
    params = state.averages.trees[0]
    found = evaluation.diagnose(config, data, parts, params, key, config.eval.draws)
    diagnosis.check(found)
    page = figures.diagnosis_page(found, run.name, folder, config.model.sigma_data)
    return f"{said}\n\n{page}"


def diagnose_users(config, run: Run, folder: Path) -> str:
    """A denoiser of the user's against the optimum of the data of an estimation run.

    `--input=FILE.py:NAME` names a function (x [B, H, W, C] = x_0 + sigma eps, sigma [B]) ->
    estimate of x_0, for images in [-1, 1] as training saw them; with data.class_cond a third
    argument is the classes [B]. It may be of JAX, or take and return NumPy arrays, whatever
    computes within. `users_models.denoiser_of` makes one of other targets and processes.

    Raises:
      UserError: there is no such function, it fails, or its loss is below the optimum.
    """
    evaluation.check_levels(config)
    conditional = config.data.class_cond
    data = dataset(**config.data, seed=config.data_seed)
    shape = tuple(int(n) for n in data.rows.shape[1:])
    function = users_models.denoiser_in(run.input, shape, conditional)
    rows = placed(data, meshes.make(**config.mesh), config.estimator.tile, conditional)

    def of_condition(params, condition):
        del params
        told = (condition["label"],) if conditional else ()
        return lambda x, s: function(x, s, *told)

    e = config.eval
    found = diagnosis.diagnose(
        rows,
        of_condition,
        (),
        curve.grid(e.sigma_min, e.sigma_max, e.points),
        jax.random.key(config.seed),
        shape=shape,
        num_draws=e.draws,
        labels=data.labels if conditional else None,
        block=e.block,
        seed=config.seed,
        progress=True,
    )
    diagnosis.check(found)
    return figures.diagnosis_page(found, run.input, folder, config.model.sigma_data)


def study_subsets(result: Callable, config, run: Run, folder: Path) -> str:
    """Subset estimators on the data of an estimation run, about its sigma_star.

    Raises:
      UserError: the data are others than the run's, or classes, or one row.
    """
    evaluation.check_levels(config)
    if config.data.class_cond:
        allowed = "False in the run and now, as subsets are of the rows of all classes"
        raise reject("data.class_cond", True, allowed)
    data = dataset(**config.data, seed=config.data_seed)
    if len(data.rows) < 2:
        raise UserError(
            f"config.data.path {config.data.path!r} has one row, of which there are no subsets "
            "to study."
        )
    state = run.state()
    _same_data(config, state)
    star = curve.sigma_star(curve.smooth(result(state)), config.estimator.tau)
    mesh = meshes.make(**config.mesh)
    rows = placed(data, mesh, config.estimator.tile, False)
    count = len(data.rows)
    sizes = sorted({max(2, min(count // part, 4096 // part)) for part in (2, 8, 32)})
    made = study.study(
        rows,
        [star, 1.5 * star, 3 * star],
        sizes,
        jax.random.key(config.seed),
        num_draws=config.eval.draws,
        block=config.eval.block,
        seed=config.seed,
    )
    return study.page(made, folder)


def size(result: Callable, config, run: Run, folder: Path) -> str:
    """The estimator and the draws that an accuracy of the curve needs, and that curve.

    `--input=ACCURACY` or `--input=ACCURACY,FLOPS`: the largest standard error over
    max(J*, V / 100), at the levels of an estimation run; and the work after which to give up,
    10^15 if not said. Candidates are those of `sizing.estimate_to`.

    Raises:
      UserError: the input is no such numbers, the work does not last for the trials, or the
        data are others than the run's.
    """
    accuracy, budget = _accuracy(run.input)
    data, e = dataset(**config.data, seed=config.data_seed), config.estimator
    state = run.state()
    _same_data(config, state)
    mesh = meshes.make(**config.mesh)
    scaled = data.rows.dtype == np.uint8 and data.scaling == "x/127.5-1"
    try:
        found = sizing.estimate_to(
            data.rows,
            result(state).sigmas,
            jax.random.key(config.seed),
            accuracy=accuracy,
            budget=budget,
            labels=data.labels if config.data.class_cond else None,
            mesh=mesh if mesh.shape["data"] > 1 else None,
            precision=e.precision,
            tile=e.tile,
            **(dict(scale=1 / 127.5, offset=-1.0) if scaled else {}),
        )
    except UserError as error:
        if "estimator.budget" not in str(error):
            raise
        needed = str(error).partition("but must be ")[2].partition(",")[0]
        said = f"--input allows {budget:.3g} FLOPs, but must be ACCURACY,FLOPS with {needed}."
        raise UserError(said) from error
    given = dict(accuracy=accuracy, flops=found.flops, **found.options)
    record = dict(data=config.data.to_dict(), sized=given)
    page = figures.curve_page(found.loss, record, e.tau, folder, config.model.sigma_data)
    return f"{sizing.page(found, accuracy)}\n\n{page}"


def _accuracy(given: str) -> tuple[float, float]:
    try:
        accuracy, budget = (*map(float, given.split(",")), 1e15)[:2]
        good = 0 < accuracy < np.inf and budget > 0 and given.count(",") < 2
    except ValueError:
        good = False
    if not good:
        allowed = "ACCURACY or ACCURACY,FLOPS, numbers above 0, such as 0.01"
        raise UserError(f"--input is {given!r}, but must be {allowed}.")
    return accuracy, budget


def sample(config, data, parts, run: Run, folder: Path) -> str:
    """`sampler.count` samples, the rows nearest to the first of them, and all as an .npz;
    `--input` as of `evaluate`."""
    key = jax.random.key(config.seed)
    state, said = averages.averaged(config, run)
    params = state.averages.trees[0]
    made = drawing.samples(config, data, parts, params, key, config.sampler.count)
    near = neighbours.nearest(made, data.rows)
    paths = [folder / f"samples_{run.name}.png", folder / f"nearest_{run.name}.png"]
    if jax.process_index() == 0:
        pictures.grid(paths[0], made, title=run.name)
        pictures.nearest_rows(paths[1], made, data.rows, near)
        np.savez(folder / f"samples_{run.name}.npz", images=images.restored(data, made))
    lines = [f"![{p.stem}]({p.name})" for p in paths]
    distance = float(np.median(near.distance[:, 0]))
    return "\n".join([said, "", *lines, f"Median distance to the nearest row: {distance:.4g}."])


TRAINED = dict(evaluate=evaluate, diagnose=diagnose, sample=sample)
