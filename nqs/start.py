"""Where training starts: random parameters, or orbitals near those of Hartree-Fock."""

from typing import Any

import jax
import jax.numpy as jnp

from common.errors import reject
from nqs.mean_field import hartree_fock
from nqs.sampler import scatter

SAMPLES = 512  # Configurations on which a network is brought near the target.


def parameters(system, psi, key: jax.Array, *, orbitals: str, noise: float) -> Any:
    """The parameters at step 0. Traceable.

    A random network's orbitals jump from one configuration to the next; a determinant of
    Hartree-Fock is smooth and already has much of the energy. The last layer is solved
    for: the closed form of regressing the orbitals on a target (supplement, S28).

    Args:
      system: a `lattice.Hubbard`.
      psi: the `ansatz.Ansatz`.
      key: of everything random.
      orbitals: "random", or "mean_field": each determinant another solution, the lowest.
      noise: how much of the random last layer stays; makes the backflow.

    Raises:
      UserError: as `check` does.
    """
    check(orbitals, noise)
    weights, field, places = jax.random.split(key, 3)
    params = psi.init(weights)
    if orbitals == "random":
        return params
    x = scatter(places, SAMPLES, system.n_sites, system.n_up, system.n_dn)
    n_det = jax.eval_shape(psi.orbitals, params, x[0]).shape[0]
    found = hartree_fock(system, field, n_det).orbitals
    # Rows of a random start have entries of order one; these are normalised columns.
    m = found * jnp.sqrt(system.n_sites)
    add = lambda near, first: near + noise * first
    near = psi.anchor(params, x, m)
    return params | {name: jax.tree.map(add, near[name], params[name]) for name in near}


def check(orbitals: str, noise: float) -> None:
    """Refuses a `config.start` that cannot be, with a `UserError`."""
    if orbitals not in ("random", "mean_field"):
        raise reject("start.orbitals", orbitals, "random or mean_field")
    if not 0 <= noise < float("inf"):
        raise reject("start.noise", noise, "a finite number from 0 up")
