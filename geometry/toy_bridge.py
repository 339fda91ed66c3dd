"""A bridge on a coupling whose optimum is known: what training, sampler and conditioning cost.

Sections 2.5, 11.2 and 11.3 of the specification of arXiv:2410.24220. A perceptron learns the
mixture of `oracle.py`, new pairs in every step, and is held against the posterior mean: its
error at five times against the irreducible one, the sliced distance of what the sampler draws
from each start, and the cross moment of both ends. Beside it the two couplings of section 2.5,
with a drift that knows the start and one that does not, by their oracles.
"""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from common import plots
from common.errors import reject
from common.experiment import Experiment, Report, Run
from geometry import toys
from geometry.figures import last, over_seeds, variants
from geometry.reference import brownian
from optim import ema
from optim.denoising import denoising

SIGMAS = (0.3, 0.6, 1.0)  # Of table 2.5.


class State(NamedTuple):
    """All of a run, as of `bridge.State`."""

    params: Any
    opt: optax.OptState
    average: ema.Averages
    done: Int[Array, ""]


def make(config) -> Experiment:
    """The experiment of `configs/bridge.py:toy`.

    Raises:
      UserError: the config asks for what cannot be.
    """
    for name in ("width", "depth", "paths"):
        if config.toy[name] < 1:
            raise reject(f"toy.{name}", config.toy[name], "a whole number from 1 up")
    made = toys.toy(brownian(config.reference.sigma), config.toy.width, config.toy.depth)
    tx = denoising(**config.optim, steps=config.steps)
    decays = (ema.ramped(config.ema),)

    def init(key):
        params = made.init(key)
        return State(
            params, tx.init(params), ema.init(params, decays), jnp.zeros((), jnp.int32)
        )

    def step(state, batch, key):
        del batch
        pairs = made.batch(jax.random.fold_in(key, 0), config.batch_size)
        of_loss = jax.random.fold_in(key, 1)
        loss, grads = jax.value_and_grad(made.loss)(state.params, of_loss, pairs)
        updates, opt = tx.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        average = ema.update(state.average, params, decays)
        values = {"loss": loss, "update_norm": optax.tree.norm(updates)}
        return State(params, opt, average, state.done + 1), values

    return Experiment(
        init=init,
        step=step,
        evaluate=lambda state, key: made.evaluate(state.average.trees[0], key),
        report=partial(report),
        headline=lambda row: f"loss {row['loss']:.4f}",
    )


def report(runs: dict[str, Run], folder: Path) -> Report:
    """Errors against what can be reached, and both columns of table 2.5."""
    groups = {name: _numbers(each) for name, each in variants(runs).items()}
    config = next(iter(runs.values())).config
    couplings = {
        (sigma, aware): toys.partners(
            brownian(sigma), jax.random.key(0), config.toy.paths, aware=aware
        )
        for sigma in SIGMAS
        for aware in (True, False)
    }
    _figure(couplings, folder / "coupling.png")
    first = next(iter(groups.values()))
    result = (
        f"Error above the irreducible one at most {first['excess']:.2%}; sliced W2 "
        f"{first['w2_50']:.3f} with 50 steps, of two samples of the truth "
        f"{first['w2_floor']:.3f}; cross moment off by {first['cross']:.3f}."
    )
    caption = (
        "Which end a path from each start reaches: bars of a drift that knows its start, and "
        "of one that does not; lines are the law. Both have the right ends on the average."
    )
    sections = [
        "# A bridge with a known optimum",
        result,
        *(f"## {name}\n\n{_table(each)}" for name, each in variants(runs).items()),
        f"## Whether the drift knows its start ({config.toy.paths:,} paths of each)",
        _couplings(couplings),
        f"{caption}\n\n![{caption}](figures/coupling.png)",
    ]
    timing = {name: run.timing for name, run in runs.items()}
    return Report("\n\n".join(sections), {"groups": groups, "timing": timing}, result)


def _numbers(runs: list[Run]) -> dict:
    mean = lambda name: float(over_seeds(runs, name)[0][0])
    found = {name: mean(name) for name in ("w2_10", "w2_50", "w2_floor", "cross")}
    found["excess"] = max(mean(f"excess_{t}") for t in toys.TIMES)
    return found


def _table(runs: list[Run]) -> str:
    number = lambda name: over_seeds(runs, name)[0][0]
    lines = [
        f"| {t} | {number(f'mse_{t}'):.4f} | {number(f'floor_{t}'):.4f} "
        f"| {number(f'excess_{t}'):.2%} |"
        for t in toys.TIMES
    ]
    head = "| t / T | squared error | irreducible | above it |\n|---|---|---|---|"
    more = ", ".join(f"{n} {number(n):.4f}" for n in ("w2_10", "w2_50", "w2_floor", "cross"))
    steps = last(runs[0])["step"]
    return f"{head}\n" + "\n".join(lines) + f"\n\nAfter {steps} steps: {more}."


def _couplings(found: dict) -> str:
    lines = []
    truth = np.array(toys.PARTNERS)
    for (sigma, aware), p in found.items():
        off = np.abs(p - truth).sum(axis=1).mean() / 2
        lines.append(
            f"| {sigma} | {'yes' if aware else 'no'} | {p[0, 0]:.3f}, {p[1, 0]:.3f} "
            f"| {off:.3f} | {p[:, 0].mean():.3f} |"
        )
    said = f"{truth[0, 0]}, {truth[1, 0]} and {truth[:, 0].mean():.2f}"
    head = (
        f"The law has {said}.\n\n| sigma | knows the start | P(y0 given x0), P(y0 given x1) "
        "| total variation | P(y0) |\n|---|---|---|---|---|"
    )
    return head + "\n" + "\n".join(lines)


def _figure(found: dict, path: Path) -> None:
    truth = np.array(toys.PARTNERS)[:, 0]
    with plots.figure(path, len(SIGMAS)) as axes:
        for axis, sigma in zip(axes, SIGMAS, strict=True):
            for k, aware in enumerate((True, False)):
                p = found[sigma, aware][:, 0]
                label = "knows its start" if aware else "does not"
                axis.bar(
                    np.arange(2) + 0.4 * k - 0.2, p, 0.38, color=plots.colour(k), label=label
                )
            for start, value in enumerate(truth):
                axis.plot([start - 0.4, start + 0.4], [value] * 2, "k", lw=1.5)
            axis.set(title=f"sigma = {sigma}", ylim=(0, 1), xticks=[0, 1])
            axis.set_xticklabels(["from x0", "from x1"])
            axis.set_ylabel("share that ends in y0")
        axes[0].legend(fontsize=7)
