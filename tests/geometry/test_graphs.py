import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geometry import graphs
from tests.geometry import graphs_made as made

CELL = np.diag([7.0, 7.0, 0.0])
MOLECULES = [made.structure(k, n) for k, n in enumerate((5, 3, 6))]
SLAB = made.structure(3, 4, cell=CELL, cutoff=3.0)


@pytest.fixture(scope="module")
def batch():
    return made.batch([*MOLECULES[:2], SLAB])[0]


def test_totals_are_sums_over_the_atoms_of_each_structure(batch):
    values = np.random.default_rng(0).normal(size=(20, 2, 3)).astype(np.float32)
    owner = np.asarray(batch.owner)
    for v in (values, values[:, 0], values[:, 0, 0]):
        expected = [v[owner == g].sum(0) for g in range(5)]
        np.testing.assert_allclose(graphs.total(batch, jnp.asarray(v)), expected, atol=1e-5)


def test_a_number_of_each_structure_stands_at_its_atoms(batch):
    values = jnp.arange(5.0) * 10
    found = graphs.of_atoms(batch, values)
    assert found.shape == (20, 1)
    np.testing.assert_array_equal(found[:, 0], np.asarray(batch.owner) * 10.0)


def test_projection_centres_molecules_and_holds_fixed_atoms(batch):
    v = np.random.default_rng(1).normal(size=(20, 3)).astype(np.float32)
    expected = np.zeros_like(v)
    expected[:5] = v[:5] - v[:5].mean(0)
    expected[5:8] = v[5:8] - v[5:8].mean(0)
    expected[10:12] = v[10:12]  # Atoms 8 and 9 of the slab are fixed, and it is anchored.
    found = graphs.project(batch, jnp.asarray(v))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    for held in (slice(8, 10), slice(12, 20)):
        np.testing.assert_array_equal(found[held], 0)
    np.testing.assert_allclose(graphs.project(batch, found), found, atol=1e-6)


def test_a_molecule_with_a_fixed_atom_is_centred_over_those_that_move():
    s = MOLECULES[0]._replace(free=np.array([0.0, 1, 1, 1, 1]))
    graph, _ = made.batch([s])
    v = np.random.default_rng(2).normal(size=(20, 3)).astype(np.float32)
    found = graphs.project(graph, jnp.asarray(v))
    np.testing.assert_allclose(found[1:5], v[1:5] - v[1:5].mean(0), atol=1e-6)
    np.testing.assert_array_equal(found[0], 0)


def test_projection_keeps_float64(batch):
    with jax.enable_x64(True):
        assert graphs.project(batch, jnp.ones((20, 3), jnp.float64)).dtype == jnp.float64
        assert graphs.noise(jax.random.key(0), batch, jnp.float64).dtype == jnp.float64


def test_noise_of_a_structure_does_not_depend_on_its_batch():
    alone, _ = made.batch([MOLECULES[2]], atoms=9, edges=40, graphs=2)
    last, _ = made.batch([MOLECULES[1], MOLECULES[0], MOLECULES[2]])
    draw = lambda graph, k=0: np.asarray(graphs.noise(jax.random.key(k), graph))
    np.testing.assert_array_equal(draw(alone)[:6], draw(last)[8:14])
    np.testing.assert_array_equal(draw(last)[14:], 0)
    assert np.abs(draw(last)[:3] - draw(last)[3:6]).max() > 0.1
    assert np.abs(draw(alone) - draw(alone, 1)).max() > 0.1


def test_noise_is_standard_normal_in_the_subspace():
    """E |eps|^2 = 3 (n - 1) of a molecule, 3 free atoms of a slab; no atom is special."""
    graph, _ = made.batch([MOLECULES[0], SLAB])
    keys = jax.random.split(jax.random.key(5), 3000)
    eps = np.asarray(jax.jit(jax.vmap(lambda k: graphs.noise(k, graph)))(keys))
    variance = (eps**2).mean(0)
    np.testing.assert_allclose(variance[:5], 4 / 5, rtol=0.13)
    np.testing.assert_allclose(variance[7:9], 1, rtol=0.13)
    assert (eps[:, :5] ** 2).sum((1, 2)).mean() == pytest.approx(12, rel=0.03)
    covariance = np.einsum("kid,kjd->ij", eps[:, :9], eps[:, :9]) / len(keys) / 3
    expected = np.zeros((9, 9))
    expected[:5, :5] = np.eye(5) - 1 / 5
    expected[7:, 7:] = np.eye(2)
    np.testing.assert_allclose(covariance, expected, atol=0.05)
