"""Where training starts: Hartree-Fock against the full Hamiltonian, and networks near it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from nqs import ansatz as wave
from nqs import exact, lattice, mean_field, start
from tests.nqs.clusters import cluster, config

NAMES = ("transformer", "nnb", "tensor", "slater")


def solve(h, n, **kwargs):
    with jax.enable_x64(True):
        solver = jax.jit(lambda key: mean_field.hartree_fock(h, key, n, **kwargs))
        return jax.tree.map(np.asarray, solver(jax.random.key(0)))


def amplitudes(h, orbitals):
    """The determinant of every configuration of the sector, [n_states]."""
    x = lattice.all_states(h)
    return np.array([np.linalg.det(orbitals[np.flatnonzero(row)]) for row in x])


@pytest.mark.xdist_group("netket")
@pytest.mark.parametrize("tp", [0.0, -0.2])
def test_energies_are_those_of_the_determinants(tp):
    h = cluster(3, 2, 3, 2, "PO", tp=tp, h=0.3, pattern="neel")
    matrix = lattice.matrix(h)
    found = solve(h, 4)
    for orbitals, energy in zip(found.orbitals, found.energy, strict=True):
        psi = amplitudes(h, orbitals)
        np.testing.assert_allclose(psi @ psi, 1, rtol=1e-10)
        np.testing.assert_allclose(psi @ (matrix @ psi), energy, rtol=1e-10)
    assert (np.diff(found.energy) >= -1e-12).all()
    assert found.energy[0] > exact.ground_state(h)[0][0]


@pytest.mark.xdist_group("netket")
def test_the_lowest_solution_cannot_be_lowered_by_turning_an_orbital():
    h = cluster(4, 2, 3, 3, "PO")
    best = solve(h, 1, tries=16).orbitals[0]
    matrix = lattice.matrix(h)
    rng = np.random.default_rng(0)

    def energy(step, direction):
        up, down = best[:8, :3], best[8:, 3:]
        turned = [
            np.linalg.qr(block + step * d)[0]
            for block, d in zip((up, down), direction, strict=True)
        ]
        zero = np.zeros((8, 3))
        psi = amplitudes(h, np.block([[turned[0], zero], [zero, turned[1]]]))
        return psi @ (matrix @ psi) / (psi @ psi)

    here = energy(0.0, np.zeros((2, 8, 3)))
    for _ in range(5):
        direction = rng.normal(size=(2, 8, 3))
        slope = (energy(1e-4, direction) - energy(-1e-4, direction)) / 2e-4
        assert abs(slope) < 2e-3
        assert energy(0.05, direction) > here


def test_without_interaction_it_is_exact():
    h = cluster(4, 3, 5, 4, "PA", U=0.0)
    hopping = np.zeros((12, 12))
    for (i, j), amplitude in zip(h.bonds, h.amplitude, strict=True):
        hopping[i, j] = hopping[j, i] = -amplitude
    levels = np.linalg.eigvalsh(hopping)
    want = levels[:5].sum() + levels[:4].sum()
    np.testing.assert_allclose(solve(h, 3).energy, want, rtol=1e-12)


@pytest.mark.parametrize(
    ("size", "n", "published"), [((8, 8), 28, -0.53874), ((16, 4), 28, -0.52499)]
)
def test_large_clusters_reach_the_published_energies(size, n, published):
    """Hartree-Fock column of table S2; a lower solution than theirs is a better one."""
    h = cluster(*size, n, n, "OO", U=8.0)
    energy = solve(h, 1).energy[0] / (size[0] * size[1])
    assert published - 0.005 < energy < published + 0.0005


def overlaps(orbitals):
    return np.linalg.det(np.einsum("aim,bin->abmn", orbitals, orbitals))


def test_solutions_differ_as_long_as_there_are_any():
    """Half filling has two, the two staggered orders; a doped cluster has many."""
    filled = overlaps(solve(cluster(4, 4, 8, 8, "PP", U=8.0), 2).orbitals)
    assert abs(filled[0, 1]) < 0.5
    doped = overlaps(solve(cluster(4, 2, 3, 3, "PO", U=8.0), 8).orbitals)
    assert np.linalg.matrix_rank(doped, tol=1e-2) == 8


def test_equal_solutions_do_not_cancel():
    found = solve(cluster(4, 4, 5, 5, "PP", U=2.0), 8)
    np.testing.assert_allclose(found.energy, found.energy[0], rtol=1e-6)
    np.testing.assert_allclose(overlaps(found.orbitals), 1, atol=1e-2)


def build(h, name, **changes):
    c = config(ansatz=dict(name=name, **changes))
    return wave.build(
        n_sites=h.n_sites,
        n_electrons=h.n_electrons,
        dtype="float64",
        determinants="float64",
        **c.ansatz,
    )


@pytest.mark.parametrize("name", NAMES)
def test_anchored_orbitals_are_near_the_target(name):
    h = cluster(4, 2, 3, 2, "PO")
    with jax.enable_x64(True):
        psi = build(h, name, embed_scale=0.01)
        params = psi.init(jax.random.key(1))
        x = jnp.asarray(lattice.all_states(h)[::97])
        m = jax.random.normal(
            jax.random.key(2), jax.eval_shape(psi.orbitals, params, x[0]).shape
        )
        near = params | psi.anchor(params, x, m)
        got = jax.vmap(psi.orbitals, (None, 0))(near, x)
        far = jax.vmap(psi.orbitals, (None, 0))(params, x)
    wrong = np.linalg.norm(got - m) / np.linalg.norm(m) / np.sqrt(len(x))
    assert wrong < (0.05 if name == "transformer" else 1e-12)
    assert np.linalg.norm(far - m) > 3 * np.linalg.norm(got - m)


def test_the_head_is_the_least_squares_solution():
    """With hardly a ridge, `_regression` is what NumPy's `lstsq` says."""
    h = cluster(3, 2, 2, 2, "PO")
    with jax.enable_x64(True):
        psi = build(h, "transformer", d_model=8, n_heads=2, n_layers=1)
        params = psi.init(jax.random.key(1))
        x = jnp.asarray(lattice.all_states(h)[::5])
        shape = jax.eval_shape(psi.orbitals, params, x[0]).shape
        m = jax.random.normal(jax.random.key(2), shape)
        head = psi.anchor(params, x, m)["head"]

        def orbitals(kernel, bias):
            changed = params | {"head": {"kernel": kernel, "bias": bias}}
            return jax.vmap(psi.orbitals, (None, 0))(changed, x) - m

        slope = jax.grad(lambda k, b: jnp.sum(orbitals(k, b) ** 2), argnums=(0, 1))
        at_zero = slope(*jax.tree.map(jnp.zeros_like, (head["kernel"], head["bias"])))
        at_best = slope(head["kernel"], head["bias"])
    assert np.abs(at_best[0]).max() < 2e-3 * np.abs(at_zero[0]).max()
    assert np.abs(at_best[1]).max() < 1e-9 * np.abs(at_zero[1]).max()


@pytest.mark.xdist_group("netket")
@pytest.mark.parametrize("name", NAMES)
def test_training_starts_near_hartree_fock(name):
    h = cluster(4, 2, 3, 3, "PO")
    matrix, x = lattice.matrix(h), lattice.all_states(h)

    def energy(**kwargs):
        with jax.enable_x64(True):
            psi = build(h, name, d_model=32, n_heads=4, n_layers=2, embed_scale=0.1)
            params = jax.jit(lambda key: start.parameters(h, psi, key, **kwargs))(
                jax.random.key(0)
            )
            sign, log = jax.vmap(psi.log_psi, (None, 0))(params, jnp.asarray(x))
        v = np.asarray(sign * np.exp(log - log.max()))
        return v @ (matrix @ v) / (v @ v)

    best = solve(h, 1).energy[0]
    assert energy(orbitals="mean_field", noise=0.0) < best + 0.15 * abs(best)
    assert energy(orbitals="random", noise=0.0) > best + 0.5 * abs(best)


@pytest.mark.parametrize(("field", "value"), [("orbitals", "zero"), ("noise", -1.0)])
def test_what_cannot_be_is_named(field, value):
    h = cluster(2, 2, 1, 1, "OO")
    given = dict(orbitals="mean_field", noise=0.1) | {field: value}
    with pytest.raises(UserError, match=rf"config\.start\.{field} is {value!r}, but must be"):
        start.parameters(h, build(h, "slater"), jax.random.key(0), **given)
