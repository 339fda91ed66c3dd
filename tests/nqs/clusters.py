"""Configs, clusters and tabulated wave functions that the tests of nqs share."""

import jax.numpy as jnp
import numpy as np

from common import config as configs
from nqs import lattice


def config(**changes):
    """The config of size `test`, with nested changes."""
    made = configs.load("configs/nqs.py:test")
    configs.apply(made, changes)
    return made


def cluster(
    Lx, Ly, n_up, n_dn, bc="OO", U=4.0, tp=0.0, t=1.0, h=0.0, pattern="none", period=2
) -> lattice.Hubbard:
    """A cluster; `bc` holds the initials of the boundaries along x and y."""
    names = {"O": "open", "P": "periodic", "A": "antiperiodic"}
    return lattice.hubbard(
        lattice=dict(Lx=Lx, Ly=Ly, bc_x=names[bc[0]], bc_y=names[bc[1]]),
        model=dict(t=t, tp=tp, U=U, n_up=n_up, n_dn=n_dn),
        pinning=dict(h=h, pattern=pattern, period=period),
    )


def tabulated(x: np.ndarray, psi: np.ndarray):
    """log_psi: configurations [b, 2N] -> (sign, log|psi|), looked up in a table.

    Args:
      x: all configurations of a sector.
      psi: their amplitudes; NaN and 0 are kept.
    """
    bits = 2 ** np.arange(x.shape[1])
    place = np.zeros(2 ** x.shape[1], np.int32)
    place[x.astype(int) @ bits] = np.arange(len(x))
    with np.errstate(divide="ignore"):
        table = np.sign(psi), np.log(np.abs(psi))

    def log_psi(configurations):
        index = jnp.asarray(place)[configurations.astype(jnp.int32) @ jnp.asarray(bits)]
        return jnp.asarray(table[0])[index], jnp.asarray(table[1])[index]

    return log_psi
