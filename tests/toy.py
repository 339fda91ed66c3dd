"""A small experiment with every part of the protocol, for tests of the house."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from common import data
from common.experiment import Experiment, Report


class State(NamedTuple):
    params: dict
    walkers: jax.Array


def make(config) -> Experiment:
    """Noisy least squares, with a random walk beside it that is split over devices."""
    width, n = config.toy.width, config.toy.n_walkers
    rows = np.random.default_rng(0).normal(size=(64, width)).astype(np.float32)

    def init(key):
        w, x = jax.random.split(key)
        params = {"layer": {"kernel": jax.random.normal(w, (width,))}}
        return State(params, jax.random.normal(x, (n,)))

    def step(state, batch, key):
        noise, walk = jax.random.split(key)

        def loss(params):
            return jnp.mean((batch @ params["layer"]["kernel"] - 1.0) ** 2)

        value, grads = jax.value_and_grad(loss)(state.params)
        jitter = 1e-3 * jax.random.normal(noise, (width,))
        params = jax.tree.map(lambda p, g: p - 0.05 * g + jitter, state.params, grads)
        walkers = state.walkers + jax.random.normal(walk, (n,))
        spoiled = jnp.where(value < config.toy.nan_below, jnp.nan, 1.0)
        norm = jnp.linalg.norm(grads["layer"]["kernel"]) * spoiled
        return State(params, walkers), {"loss": value, "grad_norm": norm}

    def evaluate(state, key):
        return {"norm": jnp.linalg.norm(state.params["layer"]["kernel"]), "list": [1.0, 2.0]}

    def report(runs, figures):
        figures.mkdir(parents=True, exist_ok=True)
        losses = {
            n: [r for r in run.rows if r["split"] == "train"][-1]["loss"]
            for n, run in runs.items()
        }
        return Report(f"# Toy\n\n{losses}", {"loss": losses}, f"Toy: {losses}.")

    def predict(run, folder):
        kernel = run.state().params["layer"]["kernel"]
        return f"{run.name} {run.input} {float(kernel.sum()):.6f}"

    return Experiment(
        init=init,
        step=step,
        batch=lambda i: rows[data.indices(i, len(rows), config.toy.batch, config.seed)],
        evaluate=evaluate,
        report=report,
        adopt=lambda fresh, donor: fresh._replace(params=donor.params),
        rules=((r"^walkers$", P("data")),),
        actions={"predict": predict},
        headline=lambda row: f"loss {row['loss']:.4g}",
    )
