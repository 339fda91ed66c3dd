"""Transformer neural quantum states for the doped 2D Hubbard model.

Gu et al., "Solving the Hubbard model with Neural Quantum States", arXiv:2507.02644,
Nature Communications 17, 7838 (2026). Where to find what:

    Hamiltonian, lattices, Hilbert space    lattice.py, hops.py
    transformer backflow, S1-S8             ansatz.py, determinants.py
    Hartree-Fock, the start of training     mean_field.py, start.py (ours, not the paper's)
    Metropolis sampling                     sampler.py
    local energies                          energy.py
    minSR, SPRING, MARCH, S17-S23           optim/natural_gradient.py
    observables, error bars                 observables.py, statistics.py, evaluation.py
    exact and published energies            exact.py, references.py
    figures and tables                      report.py

One step: every walker makes `sweep_factor` N proposals, local energies are summed over
the allowed hops, and the parameters take one natural-gradient step. Walkers are spread
over the devices of the mesh's `data` axis; only the optimizer communicates.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec as P

from common import mesh as meshes
from common.errors import UserError, reject
from common.experiment import Experiment
from nqs import ansatz as wave
from nqs import cost, evaluation, report, start
from nqs.energy import local_energy
from nqs.hops import hops
from nqs.sampler import sample, scatter
from optim.build import variational

RULES = ((r"^walkers$", P("data")),)


class State(NamedTuple):
    params: Any
    opt: optax.OptState
    walkers: jax.Array  # int8 [B, 2N], split over the devices
    skipped: jax.Array  # Steps that the optimizer refused to take, so far.


def make(config) -> Experiment:
    """The experiment of `configs/nqs.py`.

    Raises:
      UserError: the config asks for what cannot be.
    """
    system = report.system_of(config)
    _check(config)
    psi = wave.build(
        n_sites=system.n_sites,
        n_electrons=system.n_electrons,
        dtype=config.precision.net,
        determinants=config.precision.determinants,
        **config.ansatz,
    )
    tx = variational(**config.optim, clip=config.eloc.clip, linalg=config.precision.linalg)
    parts = pieces(config, system, psi)
    n_walkers = config.sampler.n_walkers

    def init(key):
        scattered, walk, weights = jax.random.split(key, 3)
        params = start.parameters(system, psi, weights, **config.start)
        walkers = scatter(scattered, n_walkers, system.n_sites, system.n_up, system.n_dn)
        walkers = parts.walk(params, walkers, walk, config.sampler.thermalize)
        return State(params, tx.init(params), walkers, jnp.zeros((), jnp.int32))

    def step(state, batch, key):
        del batch
        x, e, found = parts.walk_and_measure(state.params, state.walkers, key, 1)
        scores = parts.scores(state.params, x)
        updates, opt = tx.update(
            state.params, state.opt, state.params, scores=scores, local_energy=e
        )
        params = optax.apply_updates(state.params, updates)
        # The optimizer leaves out a walker whose energy or whose score is not a number.
        good = jnp.isfinite(e) & jnp.isfinite(scores).all(axis=1)
        moved = optax.tree.norm(updates)
        # In an eigenstate there is nothing to do; elsewhere no step means a refused one.
        rounding = 1e-12 * (1 + found["energy"] ** 2)
        skipped = state.skipped + ((moved == 0) & (found["variance"] > rounding))
        more = {"bad_samples": jnp.sum(~good), "update_norm": moved, "skipped": skipped}
        return State(params, opt, x, skipped), found | more

    def adopt(fresh, donor):
        if _kind(fresh) != _kind(donor):
            raise reject(
                "init_from",
                config.init_from,
                "a run with the same lattice, filling, ansatz and number of walkers",
            )
        return fresh._replace(params=donor.params, walkers=donor.walkers)

    return Experiment(
        init=init,
        step=step,
        evaluate=partial(evaluation.evaluate, config, system, psi, parts),
        report=report.report,
        adopt=adopt,
        rules=RULES,
        actions={"evaluate": partial(report.evaluated, config, system, psi, parts)},
        headline=partial(report.headline, system),
        cost=partial(cost.flops, config, system),
    )


def _kind(state: State) -> tuple:
    """What two states must share to exchange parameters and walkers."""
    shapes = jax.tree.map(lambda a: a.shape, (state.params, state.walkers))
    up, down = jnp.split(state.walkers[0], 2)
    return jax.tree.leaves(shapes), int(up.sum()), int(down.sum())


class Pieces(NamedTuple):
    """What training and evaluation share; every function maps over the walkers."""

    walk: Any  # (params, x, key, sweeps) -> x
    walk_and_measure: Any  # (params, x, key, sweeps) -> (x, E_L, figures)
    scores: Any  # (params, x) -> d log|psi| / d theta, [B, P]


def pieces(config, system, psi: wave.Ansatz) -> Pieces:
    """The sampler, the local energies and the scores of one config."""
    h = hops(system)
    n_walkers, chunk = config.sampler.n_walkers, config.eloc.chunk
    n_moves = round(config.sampler.sweep_factor * system.n_sites)

    def batched(params):
        one = partial(psi.log_psi, params)

        def log_psi(x):
            if len(x) <= chunk:
                return jax.vmap(one)(x)
            return jax.lax.map(one, x, batch_size=chunk)

        return log_psi

    def uniforms(key, sweeps):
        shape = (max(1, sweeps * n_moves), n_walkers, 2)
        return jax.random.uniform(key, shape, jnp.result_type(float))

    def moved(params, x, u):
        chains = sample(batched(params), h, x, u)
        return chains.x

    def measured(params, x, u):
        log_psi = batched(params)
        chains = sample(log_psi, h, x, u)
        e, connected = local_energy(log_psi, h, chains.x, chains.sign, chains.log, chunk)
        return chains.x, e, chains.moved, connected

    def score(params, x):
        log = lambda p: psi.log_psi(p, x)[1]
        return ravel_pytree(jax.grad(log)(params))[0]

    def scored(params, x):
        batch = min(config.eloc.score_chunk, len(x))
        return jax.lax.map(partial(score, params), x, batch_size=batch)

    walkers, moves = P("data"), P(None, "data")
    # Called when traced, within the mesh in use; there is none yet when pieces are made.
    split = meshes.over_data

    def walk(params, x, key, sweeps):
        u = uniforms(key, sweeps)
        return split(moved, (P(), walkers, moves), walkers)(params, x, u)

    def walk_and_measure(params, x, key, sweeps):
        u = uniforms(key, sweeps)
        run = split(measured, (P(), walkers, moves), (walkers,) * 4)
        x, e, accepted, connected = run(params, x, u)
        return x, e, figures(e, accepted, connected)

    def scores(params, x):
        return split(scored, (P(), walkers), walkers)(params, x)

    return Pieces(walk, walk_and_measure, scores)


def figures(e: jax.Array, accepted: jax.Array, connected: jax.Array) -> dict:
    """A step's metrics from its unclipped local energies; bad ones are left out."""
    good = jnp.isfinite(e)
    n = jnp.sum(good)
    mean = jnp.sum(jnp.where(good, e, 0)) / n
    variance = jnp.sum(jnp.where(good, (e - mean) ** 2, 0)) / n
    return {
        "energy": mean,
        "energy_error": jnp.sqrt(variance / n),
        "variance": variance,
        "acceptance": jnp.mean(accepted),
        "connected": jnp.mean(connected.astype(e.dtype)),
        "bad_samples": jnp.sum(~good),
    }


def _check(config) -> None:
    start.check(**config.start)
    n = config.sampler.n_walkers
    devices = meshes.make(**config.mesh).shape["data"]
    if n < 2:
        raise reject("sampler.n_walkers", n, "at least 2")
    if n % devices:
        raise reject("sampler.n_walkers", n, f"a multiple of the {devices} devices")
    if not 0 < config.sampler.sweep_factor < float("inf"):
        raise reject("sampler.sweep_factor", config.sampler.sweep_factor, "above 0")
    positive = dict(eloc=("chunk", "score_chunk"), eval=("blocks", "sweeps"))
    for group, fields in positive.items():
        for field in fields:
            if config[group][field] < 1:
                raise reject(f"{group}.{field}", config[group][field], "at least 1")
    for group in ("sampler", "eval"):
        if config[group].thermalize < 0:
            raise reject(f"{group}.thermalize", config[group].thermalize, "0 or more")
    if config.eval.blocks < 8:
        raise reject("eval.blocks", config.eval.blocks, "at least 8, for an error bar")
    if not 0 <= config.eloc.clip < float("inf"):
        raise reject("eloc.clip", config.eloc.clip, "a number from 0 (no clipping) up")
    for field in ("net", "determinants", "linalg"):
        kind = config.precision[field]
        if kind not in ("float32", "float64"):
            raise reject(f"precision.{field}", kind, "float32 or float64")
        if kind == "float64" and not jax.config.jax_enable_x64:
            raise UserError(
                f"config.precision.{field} is 'float64', but config.x64 is False; "
                "set it to True or the precision to float32."
            )
