"""`--do=NAME` on finished runs: the curve, a diagnosis with more draws, samples.

--do=evaluate                         the figures of the report, measured again
--do=diagnose                         loss, optimum and gap per noise level
--do=diagnose --input=model.py:f      of a user's denoiser f(x, sigma) -> x0_hat
--do=sample                           a grid of samples, and the rows nearest to them
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common import mesh as meshes
from common.errors import UserError
from common.experiment import Run
from diffusion import (
    curve,
    diagnosis,
    drawing,
    evaluation,
    figures,
    images,
    neighbours,
    pictures,
    study,
)
from diffusion.dataset import dataset, placed


def curve_again(result: Callable, config, run: Run, folder: Path) -> str:
    """`evaluate` of an estimation run: its curve as a table, figure, .npz and .csv."""
    found = result(run.state())
    record = dict(data=config.data.to_dict(), estimator=config.estimator.to_dict())
    return figures.curve_page(found, record, config.estimator.tau, folder)


def evaluate(config, data, parts, run: Run, folder: Path) -> str:
    """The evaluation of a training run again, with the settings of today."""
    del folder
    key = jax.random.key(config.seed)
    found = evaluation.evaluate(config, data, parts, run.state(), key)
    lines = ["| figure | value |", "|---|---|"]
    single = {n: v for n, v in found.items() if np.ndim(v) == 0}
    return "\n".join(lines + [f"| {n} | {float(v):.6g} |" for n, v in single.items()])


def diagnose(config, data, parts, run: Run, folder: Path) -> str:
    """Loss, optimum and gap of a training run; `--input` is refused here."""
    if run.input:
        raise UserError("--input belongs to --do=diagnose of an estimation run.")
    key = jax.random.key(config.seed)
    params = run.state().averages.trees[0]
    found = evaluation.diagnose(config, data, parts, params, key, config.eval.draws)
    diagnosis.check(found)
    return figures.diagnosis_page(found, run.name, folder)


def diagnose_users(config, run: Run, folder: Path) -> str:
    """A denoiser of the user's against the optimum of the data of an estimation run.

    `--input=FILE.py:NAME` names a function (x [B, H, W, C] = x_0 + sigma eps, sigma [B]) ->
    estimate of x_0, for images in [-1, 1] as training saw them; with data.class_cond a third
    argument is the classes [B]. It may be of JAX, or take and return NumPy arrays, whatever
    computes within.

    Raises:
      UserError: there is no such function, it fails, or its loss is below the optimum.
    """
    conditional = config.data.class_cond
    data = dataset(**config.data, seed=config.data_seed)
    shape = tuple(int(n) for n in data.rows.shape[1:])
    function = _tried(_function(run.input), run.input, shape, conditional)
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
    return figures.diagnosis_page(found, run.input, folder)


def _tried(function: Callable, name: str, shape: tuple, conditional: bool) -> Callable:
    """The function, as it is where JAX can trace it, else called on the host."""
    x, s = np.zeros((2, *shape), np.float32), np.ones(2, np.float32)
    given = (x, s, np.zeros(2, np.int32)) if conditional else (x, s)
    try:
        shown = np.asarray(function(*given)).shape
    except Exception as error:  # Whatever the user's function does.
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{name} fails on two images {x.shape}: {reason}.") from error
    if shown != x.shape:
        raise UserError(f"{name} returns the shape {shown} for images {x.shape}.")
    try:
        jax.eval_shape(function, *given)
    except Exception:  # NumPy and torch know no tracers.
        on_host = lambda *given: np.asarray(function(*map(np.asarray, given)), np.float32)
        like = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32)
        return lambda x, *rest: jax.pure_callback(on_host, like(x), x, *rest)
    return lambda x, *rest: jnp.asarray(function(x, *rest), x.dtype)


def study_subsets(result: Callable, config, run: Run, folder: Path) -> str:
    """Subset estimators on the data of an estimation run, about its sigma_star."""
    found = result(run.state())
    star = curve.sigma_star(curve.smooth(found), config.estimator.tau)
    data = dataset(**config.data, seed=config.data_seed)
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


def _function(given: str) -> Callable[[Any, Any], Any]:
    path, _, name = given.rpartition(":")
    if not path:
        raise UserError(f"--input is {given!r}, but must be FILE.py:FUNCTION, a denoiser.")
    if not Path(path).is_file():
        raise UserError(f"--input names the file {path}, which is not there.")
    spec = importlib.util.spec_from_file_location("users_denoiser", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--input names {path}, which is no Python file.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # Whatever the user's file does.
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"The file {path} cannot be loaded: {reason}.") from error
    if not callable(getattr(module, name, None)):
        raise UserError(f"The file {path} has no function {name!r}.")
    return getattr(module, name)


def sample(config, data, parts, run: Run, folder: Path) -> str:
    """`sampler.count` samples, the rows nearest to the first of them, and all as an .npz."""
    key = jax.random.key(config.seed)
    params = run.state().averages.trees[0]
    made = drawing.samples(config, data, parts, params, key, config.sampler.count)
    near = neighbours.nearest(made, data.rows)
    paths = [folder / f"samples_{run.name}.png", folder / f"nearest_{run.name}.png"]
    if jax.process_index() == 0:
        pictures.grid(paths[0], made, title=run.name)
        pictures.nearest_rows(paths[1], made, data.rows, near)
        np.savez(folder / f"samples_{run.name}.npz", images=images.restored(data, made))
    lines = [f"![{p.stem}]({p.name})" for p in paths]
    distance = float(np.median(near.distance[:, 0]))
    return "\n".join([*lines, f"Median distance to the nearest row: {distance:.4g}."])


TRAINED = dict(evaluate=evaluate, diagnose=diagnose, sample=sample)
