"""Everything that is measured with frozen parameters, with error bars."""

from functools import partial

import jax
import numpy as np
from tqdm import tqdm

from common import mesh as meshes
from common.errors import UserError
from nqs import observables as obs
from nqs import statistics as stats

ATTENDED = 64  # Configurations that attention maps are averaged over.
LAGS = 64  # Of the autocorrelation function that is kept.


def evaluate(config, system, psi, parts, state, key) -> dict:
    """Energy, observables and the health of the chains.

    Args:
      config: uses eval.blocks (measurements), eval.sweeps (sweeps between two) and
        eval.thermalize (sweeps before the first).
      system: a `lattice.Hubbard`.
      psi: the ansatz.
      parts: `hubbard.Pieces`.
      state: whose `params` are frozen and whose `walkers` are the start.
      key: of the moves.

    Returns:
      host numbers and arrays; energies are totals in units of t, from unclipped local
      energies. `*_error` is one standard error of correlated chains.
    """
    g = obs.geometry(system)
    measure = jax.jit(partial(_measure, config, g, parts))
    warm, *keys = jax.random.split(key, config.eval.blocks + 1)
    x = jax.jit(parts.walk, static_argnums=3)(
        state.params, state.walkers, warm, config.eval.thermalize
    )
    local, seen = [], []
    for each in tqdm(keys, desc="evaluating", leave=False, disable=None):
        x, e, values, diagonal = measure(state.params, x, each)
        local.append(e)
        seen.append((values, diagonal))
    # One transfer at the end; until then the device runs ahead of the host.
    local = np.asarray(jax.device_get(local), float)
    values, diagonal = jax.tree.map(lambda *a: np.stack(a), *jax.device_get(seen))
    found = energy_figures(system, local, config.eval.sweeps)
    tau = found["autocorrelation_time"] / config.eval.sweeps  # In measurements.
    return (
        found
        | {k: values[k].mean() for k in ("acceptance", "connected")}
        | correlations(g, diagonal, tau)
        | _attention(g, psi, state.params, x)
    )


def _measure(config, g, parts, params, x, key):
    x, e, values = parts.walk_and_measure(params, x, key, config.eval.sweeps)
    return x, meshes.replicate(e), values, obs.diagonal(g, x)


def energy_figures(system, local: np.ndarray, sweeps: int) -> dict:
    """Energy, variance and chain diagnostics from local energies [blocks, B].

    Samples that are not finite are counted and left out.
    """
    good = np.isfinite(local)
    if not good.any():
        raise UserError("No local energy is finite; nothing can be measured.")
    energy, variance = local[good].mean(), local[good].var()
    error, levels = stats.chains_error(local)
    rho = stats.autocorrelation(local)
    infinite = system.U * system.n_up * system.n_dn / system.n_sites
    return {
        "energy": energy,
        "energy_error": error,
        "variance": variance,
        "variance_error": stats.chains_error((local - energy) ** 2)[0],
        "v_score": stats.v_score(energy, variance, system.n_electrons, infinite),
        "r_hat": stats.split_r_hat(local),
        "autocorrelation_time": stats.autocorrelation_time(rho) * sweeps,
        "autocorrelation": rho[:LAGS],
        "blocking": levels,
        "samples": local.size,
        "bad_samples": int((~good).sum()),
    }


def correlations(g, d: obs.Diagonal, tau: float) -> dict:
    """Means over blocks of what `Diagonal` holds per block.

    Which walker contributed what is not kept: errors are naive ones times sqrt(2 tau),
    with `tau`, in blocks, of the energy or of the observable, whichever is larger.
    """
    errors = lambda series: np.array([stats.correlated_error(c, tau) for c in series.T])
    density = d.density_up + d.density_dn
    charge = np.stack([obs.connected(g, c, n) for c, n in zip(d.charge, density, strict=True)])
    # Within one block <n_i><n_j> is noisy and would bias the product; use all blocks.
    center = obs.connected(g, d.charge.mean(axis=0), density.mean(axis=0))
    double = d.double.mean(axis=1)
    return {
        "double_occupancy": double.mean(),
        "double_occupancy_error": stats.correlated_error(double, tau),
        "double": d.double.mean(axis=0),
        "density_up": d.density_up.mean(axis=0),
        "density_dn": d.density_dn.mean(axis=0),
        "density_error": errors(density),
        "spin": d.spin.mean(axis=0),
        "spin_error": errors(d.spin),
        "charge": center,
        "charge_error": errors(charge),
    }


def _attention(g, psi, params, x) -> dict:
    if psi.attention is None:
        return {}

    @jax.jit
    def profile(params, x):
        weights = jax.vmap(psi.attention, (None, 0))(params, x[:ATTENDED])
        share, spread = jax.vmap(partial(obs.attention_profile, g))(weights)
        return meshes.replicate((share.mean(axis=0), spread.mean(axis=0)))

    share, spread = jax.device_get(profile(params, x))
    return {
        "attention": share,
        "attention_distance": share @ g.distances,
        "attention_participation": spread,
        "distances": g.distances,
    }
