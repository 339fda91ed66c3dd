"""Training of a geometric diffusion bridge, of a chain of them, or of plain regression.

Luo et al., "Bridging Geometric States via Geometric Diffusion Bridge", arXiv:2410.24220. From
the state R^0 that is known, a bridge draws the state R^T that is sought. Where to find what:

    reference processes and their pinned laws, section 2.3    reference.py
    preconditioning, losses, times, section 6                 matching.py
    samplers, section 4                                       samplers.py
    chains over the frames of a trajectory, section 3         chain.py
    networks, section 7                                       network.py, networks/
    files, alignment, checks, batches, section 8              data/, dataset.py
    metrics, section 9                                        metrics.py
    couplings with a known optimum, sections 2.5 and 11.2     oracle.py, toys.py, toy_bridge.py
    tables, figures, actions                                  report.py, figures.py, actions.py

A step draws a time and a pinned state of every structure and regresses D on the end. "direct"
is the same network at t = 0 only. Actions: evaluate, predict (--input is a file of structures
or SMILES) and animate.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from common.experiment import Experiment
from geometry import actions, chain, evaluation, graphs, matching, report
from geometry.parts import Parts, parts_of
from optim import ema
from optim.denoising import denoising


class State(NamedTuple):
    """All of a run.

    Attributes:
      average: exponential average of the parameters; None without `config.ema`.
      done: steps so far.
    """

    params: Any
    opt: optax.OptState
    average: ema.Averages | None
    done: Int[Array, ""]


def make(config) -> Experiment:
    """The experiment of `configs/bridge.py`.

    Raises:
      UserError: the config asks for what cannot be.
    """
    parts = parts_of(config)
    tx = denoising(**config.optim, steps=config.steps)
    decays = (ema.ramped(config.ema),) if config.ema else ()
    aux = bool(config.loss.distances or config.loss.bonds)

    def init(key):
        params = parts.network.init(key)
        average = ema.init(params, decays) if decays else None
        return State(params, tx.init(params), average, jnp.zeros((), jnp.int32))

    def step(state, batch, key):
        function = lambda params: _loss(config, parts, aux, params, batch, key)
        loss, grads = jax.value_and_grad(function)(state.params)
        updates, opt = tx.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        average = ema.update(state.average, params, decays) if decays else None
        values = {
            "loss": loss,
            "structures": jnp.sum(batch.graph.ids >= 0).astype(jnp.float32),
            "grad_norm": optax.tree.norm(grads),
            "update_norm": optax.tree.norm(updates),
            "skipped": opt.total_notfinite.astype(jnp.float32),
        }
        return State(params, opt, average, state.done + 1), values

    return Experiment(
        init=init,
        step=step,
        batch=parts.batch,
        evaluate=partial(evaluation.evaluate, config, parts),
        report=report.report,
        adopt=lambda fresh, donor: fresh._replace(params=donor.params),
        actions={name: partial(run, config, parts) for name, run in actions.ALL.items()},
        headline=lambda row: f"loss {row['loss']:.4f}  grad {row['grad_norm']:.2f}",
    )


def _loss(config, parts: Parts, aux: bool, params, batch, key):
    """The loss of all packs together."""
    real = batch.graph.ids >= 0
    of_times, of_noise = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
    last, end = config.loss.last, parts.reference.end
    i = jnp.zeros(real.shape, jnp.int32)
    if config.kind == "direct":
        t = jnp.zeros(real.shape)
    elif parts.chain is not None:
        i, t = chain.draw(of_times, real, len(parts.chain.squares), end, last)
    else:
        t = matching.times(of_times, real, end, last)

    def one(batch, t, i):
        noise = graphs.noise(of_noise, batch.graph)
        process, s2, known, target, part = (
            parts.reference,
            parts.s2,
            batch.start[None],
            batch.end,
            0.0,
        )
        if parts.chain is not None:
            process, s2 = chain.of_segment(parts.chain, i)
            known, target = chain.condition(parts.chain, batch.graph, batch.frames, i)
            part = i / len(parts.chain.squares)
        return matching.objective(
            parts.network, process, s2, params, batch.graph, known, target, t, noise,
            part, config.loss.w_min, aux,
        )  # fmt: skip

    sums = graphs.each_pack(one)(batch, t, i)
    return matching.loss(sums, config.loss.distances, config.loss.bonds)
