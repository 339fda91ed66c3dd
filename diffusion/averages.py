"""Other averages of parameters than those tracked, made from a run's kept checkpoints.

Training with config.ema.kind power tracks power functions of the widths ema.sigma_rel. Those of
all kept checkpoints (config.keep) are added up so that their profile is nearest to that of the
relative width asked for, at the end of training (Karras et al. 2024, Alg. 3; `optim.ema`).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common.errors import Unfit, UserError
from common.experiment import Run
from optim import ema

POOR = 0.1  # A profile that is off by more than this is another one.


def averaged(config, run: Run) -> tuple[Any, str]:
    """The last state of a training run, and a sentence on its average.

    Args:
      config: of the run.
      run: with `--input=WIDTH`, a relative width, the first of the state's averages becomes
        the one of that width; without, all is as it is and the sentence empty.

    Raises:
      UserError: the width is no number or out of range. `Unfit`: no power functions.
    """
    if not run.input:
        return run.state(), ""
    width = _width(config, run.input)
    saved, tracked = run.saved(), [float(w) for w in config.ema.sigma_rel]
    steps = list(saved)
    times = np.repeat(np.array(steps, np.float64), len(tracked))
    gammas = np.tile([ema.gamma_of(w) for w in tracked], len(steps))
    wanted = float(steps[-1]), ema.gamma_of(width)
    factors = ema.weights(times, gammas, *wanted)
    state = total = None
    for step, share in zip(steps, factors.reshape(len(steps), -1), strict=True):
        state = saved[step]()
        part = ema.combined(share, state.averages.trees)
        total = part if total is None else jax.tree.map(jnp.add, total, part)
    trees = (total, *state.averages.trees[1:])
    state = state._replace(averages=state.averages._replace(trees=trees))
    return state, _said(width, tracked, steps, ema.mismatch(factors, times, gammas, *wanted))


def _width(config, given: str) -> float:
    if config.ema.kind != "power":
        raise Unfit(
            f"--input={given} of a training run is the relative width of an average, for which "
            f"config.ema.kind must be 'power', but it is {config.ema.kind!r}."
        )
    allowed = f"a number above 0 and at most {ema.WIDEST:.4f}, the relative width of an average"
    try:
        width = float(given)
    except ValueError:
        kind = Unfit if ":" in given else UserError  # A file is for an estimation run.
        raise kind(f"--input is {given!r}, but must be {allowed}.") from None
    if not 0 < width <= ema.WIDEST:
        raise UserError(f"--input is {given}, but must be {allowed}.")
    return width


def _said(width: float, tracked: list, steps: list, left: float) -> str:
    many = [str(step) for step in steps]
    if len(many) > 12:
        many = [*many[:3], "...", *many[-3:]]
    some = "1 checkpoint (step" if len(steps) == 1 else f"{len(steps)} checkpoints (steps"
    text = (
        f"Average of relative width {width:g} at step {steps[-1]}, from those of the widths "
        f"{', '.join(f'{w:g}' for w in tracked)} at {some} "
        f"{', '.join(many)}); its profile is off by {100 * left:.2g} %."
    )
    if left > POOR:
        text += (
            " That is another average than asked for: keep more checkpoints (config.keep), or "
            "ask for a width nearer to those tracked."
        )
    return text
