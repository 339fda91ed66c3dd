"""Eight devices do what one does, in float64 and for several steps, and share the work."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import loop
from common import mesh as meshes
from nqs import ansatz as wave
from nqs import hubbard, lattice
from tests.nqs.clusters import config

WALKERS = 32


def setting(devices, **changes):
    """A config in float64 for so many devices."""
    return config(
        precision=dict(net="float64"),
        mesh=dict(data=devices),
        sampler=dict(n_walkers=WALKERS),
        **changes,
    )


def pieces(devices, **changes):
    """The pieces, made outside of any mesh as the runner does; parameters and walkers."""
    c = setting(devices, **changes)
    system = lattice.hubbard(lattice=c.lattice, model=c.model, pinning=c.pinning)
    psi = wave.build(
        n_sites=system.n_sites,
        n_electrons=system.n_electrons,
        dtype=c.precision.net,
        determinants=c.precision.determinants,
        **c.ansatz,
    )
    params = jax.jit(psi.init)(jax.random.key(3))
    rng = np.random.default_rng(0)
    spins = [np.arange(system.n_sites) < n for n in (system.n_up, system.n_dn)]
    x = [
        np.concatenate([rng.permutation(spin) for spin in spins])
        for _ in range(c.sampler.n_walkers)
    ]
    return hubbard.pieces(c, system, psi), params, np.array(x, np.int8)


def on(devices, function, **changes):
    """What `function` of pieces, parameters and walkers gives on so many devices.

    Returns:
      the arrays as they lie on the devices, their values, and the compiled program.
    """
    with jax.enable_x64(True):
        parts, params, x = pieces(devices, **changes)
        mesh = meshes.make(devices, 1)
        with jax.set_mesh(mesh):
            x = meshes.to_devices(x, mesh)
            run = jax.jit(lambda params, x: function(parts, params, x))
            program = run.lower(params, x).compile()
            found = program(params, x)
            return found, jax.tree.map(np.asarray, found), program.as_text()


def exchanged(program):
    """The kinds of messages between devices, sums of figures apart."""
    kinds = ("all-gather", "all-to-all", "collective-permute", "reduce-scatter")
    return [kind for kind in kinds if kind in program]


def rows(array):
    """How many stand on each device."""
    return array.sharding.shard_shape(array.shape)[0]


def test_walkers_and_energies_are_the_same_on_one_device_and_on_eight():
    def both(parts, params, x):
        walked = parts.walk(params, x, jax.random.key(0), 1)
        return walked, *parts.walk_and_measure(params, walked, jax.random.key(1), 2)

    (_, one, _), (arrays, eight, program) = (
        on(n, both, eloc=dict(chunk=5), ansatz=dict(name="tensor")) for n in (1, 8)
    )
    np.testing.assert_array_equal(one[0], eight[0])
    np.testing.assert_array_equal(one[1], eight[1])
    chex.assert_trees_all_close(one[2:], eight[2:], rtol=1e-10, atol=1e-10)
    assert [rows(a) for a in arrays[:3]] == [WALKERS // 8] * 3
    assert exchanged(program) == []
    assert 0 < one[3]["acceptance"] < 1
    assert one[3]["bad_samples"] == 0


def test_scores_are_the_same_on_one_device_and_on_eight_and_stay_where_they_are():
    def scores(parts, params, x):
        return parts.scores(params, x)

    (_, one, _), (arrays, eight, program) = (
        on(n, scores, eloc=dict(score_chunk=3)) for n in (1, 8)
    )
    np.testing.assert_allclose(eight, one, rtol=1e-10, atol=1e-10)
    assert len(np.unique(one.round(9), axis=0)) > WALKERS // 2  # Not a sum over devices.
    # Nor does every device do all of the work.
    assert rows(arrays) == WALKERS // 8
    assert exchanged(program) == []


def train(devices, steps, start=None, **changes):
    """Some steps as the loop makes them, from a state of the host or a fresh one.

    Returns:
      first and last state, the metrics of each step, and the number of compilations.
    """
    with jax.enable_x64(True):
        c = setting(devices, **changes)
        experiment = hubbard.make(c)
        mesh = meshes.make(**c.mesh)
        with jax.set_mesh(mesh):
            placed = loop.shapes(experiment, mesh)
            shardings = jax.tree.map(lambda leaf: leaf.sharding, placed)
            if start is None:
                start = jax.jit(experiment.init, out_shardings=shardings)(jax.random.key(0))
            state = jax.device_put(start, shardings)
            step = loop.stepper(experiment, placed)
            first, seen = jax.tree.map(np.asarray, state), []
            for number in range(steps):
                key = jax.random.key(1)  # The step folds its number in.
                state, values = step(state, (), key, jnp.uint32(number))
                seen.append(jax.device_get(values))
            assert rows(state.walkers) == WALKERS // devices
            assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(state.params))
            return first, jax.tree.map(np.asarray, state), seen, step._cache_size()


@pytest.mark.parametrize(
    ("optimizer", "ansatz"),
    [("march", "transformer"), ("spring", "tensor"), ("minsr", "tensor"), ("adam", "tensor")],
)
def test_training_is_the_same_on_one_device_and_on_eight(optimizer, ansatz):
    changes = dict(
        optim=dict(name=optimizer),
        ansatz=dict(name=ansatz),
        lattice=dict(Lx=2, bc_x="open"),
        model=dict(n_dn=1),
    )
    one = train(1, 4, **changes)
    # Starting on eight devices is the same, too; once is enough to see.
    eight = train(8, 4, None if ansatz == "transformer" else one[0], **changes)
    chex.assert_trees_all_close(one[:3], eight[:3], rtol=1e-10, atol=1e-10)
    np.testing.assert_array_equal(one[1].walkers, eight[1].walkers)
    first, last, seen, _ = eight
    assert one[3] == eight[3] == 1  # Compiled once.
    assert all(values["update_norm"] > 0 for values in seen)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), first.params, last.params)
    assert all(jax.tree.leaves(jax.tree.map(lambda d: d > 1e-6, moved)))
    assert (first.walkers != last.walkers).any()
