"""Local energies: the packed list against every hop padded, and against NetKet's list.

    uv run python -m benchmarks.nqs_local_energy [SIZE [WALKERS [REPEATS]]]

SIZE is one of configs/nqs.py (4x4_doped). All three evaluate the same transformer on the
same walkers, in chunks of the same size, and their energies are compared first.

    packed   `energy.local_energy`: the allowed hops of all walkers, one behind the other
    padded   `energy.local_energy_padded`: every hop of every walker
    NetKet   `FermiHubbardJax.get_conn_padded`: its padded list, elements that are zero
             included, as its own local estimators evaluate it
"""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import alternately, table
from common import config as configs
from common import runtime


def main(size: str = "4x4_doped", walkers: str = "256", repeats: str = "7") -> None:
    """Prints the comparison as Markdown."""
    config = configs.load(f"configs/nqs.py:{size}")
    configs.override(config, "sampler.n_walkers", walkers)
    runtime.start(config.x64)
    from nqs import ansatz, energy, hops, lattice, sampler

    system = lattice.hubbard(**{k: config[k] for k in ("lattice", "model", "pinning")})
    psi = ansatz.build(
        n_sites=system.n_sites,
        n_electrons=system.n_electrons,
        dtype=config.precision.net,
        determinants=config.precision.determinants,
        **config.ansatz,
    )
    start, weights = jax.random.split(jax.random.key(0))
    n = config.sampler.n_walkers
    x = sampler.scatter(start, n, system.n_sites, system.n_up, system.n_dn)
    params, h, chunk = psi.init(weights), hops.hops(system), config.eloc.chunk

    def log_psi(x):
        one = partial(psi.log_psi, params)
        return jax.lax.map(one, x, batch_size=min(chunk, len(x)))

    sign, log = jax.jit(log_psi)(x)
    operator = lattice.operator(system)

    @jax.jit
    def netket(x):
        there, elements = operator.get_conn_padded(lattice.to_netket(x))
        flat = lattice.from_netket(there).reshape(-1, x.shape[-1])
        s, l = (a.reshape(elements.shape) for a in log_psi(flat))
        ratio = s * sign[:, None] * jnp.exp(l - log[:, None])
        return jnp.sum(jnp.where(elements == 0, 0, elements * ratio), axis=1)

    packed = jax.jit(lambda x: energy.local_energy(log_psi, h, x, sign, log, chunk))
    padded = jax.jit(lambda x: energy.local_energy_padded(log_psi, h, x, sign, log, chunk))
    here, connected = packed(x)
    for name, other in (("padded", padded(x)[0]), ("NetKet", netket(x))):
        np.testing.assert_allclose(here, other, rtol=1e-6, atol=1e-6, err_msg=name)

    functions = dict(packed=lambda: packed(x), padded=lambda: padded(x))
    functions["NetKet"] = lambda: netket(x)
    seconds = alternately(functions, int(repeats))
    print(f"{system.label}, {n} walkers, chunks of {chunk}, {jax.devices()[0].device_kind}")
    print(
        f"Evaluations per walker: packed {float(np.mean(connected)):.1f} on average, "
        f"padded {len(h.source)}, NetKet {operator.max_conn_size}\n"
    )
    print(table(seconds, "packed"))


if __name__ == "__main__":
    main(*sys.argv[1:])
