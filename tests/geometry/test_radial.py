import jax
import jax.numpy as jnp
import numpy as np
import pytest

from geometry.networks import radial
from tests.geometry import graphs_made as made


def test_gaussians_are_one_width_apart_from_0_to_the_radius():
    d = np.array([0.0, 1.3, 6.0, 9.0], np.float32)
    found = radial.gaussians(jnp.asarray(d), 4, 6.0)
    expected = [[np.exp(-((a - c) ** 2) / 2 / 2.0**2) for c in (0, 2, 4, 6)] for a in d]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_envelope_goes_from_1_to_0_with_two_derivatives():
    with jax.enable_x64(True):
        f = lambda d: radial.envelope(d, 4.0)
        first = jax.grad(f)
        second = jax.grad(first)
        at = lambda g, d: float(g(jnp.float64(d)))
        assert at(f, 0.0) == 1
        assert at(f, 2.0) == pytest.approx(0.5)
        for d in (4.0, 4.0 - 1e-9, 7.0):
            for g in (f, first, second):
                assert at(g, d) == pytest.approx(0, abs=1e-7)
        inside = np.linspace(0.1, 3.9, 30)
        assert all(at(first, d) < 0 for d in inside)


def test_the_smooth_norm_has_gradient_0_at_0():
    value, slope = jax.value_and_grad(radial.smooth_norm)(jnp.zeros(3))
    assert value == pytest.approx(1e-4)
    np.testing.assert_array_equal(slope, 0)
    v = jnp.arange(24.0).reshape(2, 3, 4)
    np.testing.assert_allclose(
        radial.smooth_norm(v, 1), np.linalg.norm(np.asarray(v), axis=1), rtol=1e-6
    )


def test_time_features_are_sinusoids_and_powers():
    t = np.array([[0.0, 0.3], [0.7, 0.999]])
    frequencies = [0.25 * 64 ** (k / 7) for k in range(8)]
    with jax.enable_x64(True):
        found = radial.time_features(jnp.asarray(t))
    assert found.shape == (2, 2, radial.TIME_FEATURES)
    for i, j in np.ndindex(t.shape):
        waves = [2 * np.pi * f * t[i, j] for f in frequencies]
        expected = [*np.sin(waves), *np.cos(waves), t[i, j], t[i, j] ** 2]
        np.testing.assert_allclose(found[i, j], expected, atol=1e-12)


def test_pairs_go_from_receiver_to_the_image_of_the_sender():
    cell = np.diag([5.0, 6.0, 0.0])
    s = made.structure(0, 4, cell=cell, cutoff=5.0)
    with jax.enable_x64(True):
        graph, inputs = made.batch([s], dtype=np.float64)
        found = radial.pairs(graph, inputs.x)
    edges = made.edges_of(s)
    assert any(shift.any() for _, _, shift in edges)
    for e, (i, j, shift) in enumerate(edges):
        r = s.positions[0, j] + np.float32(shift) - s.positions[0, i]
        d = np.sqrt(r @ r + 1e-8)
        assert found.distance[e] == pytest.approx(d, abs=1e-12)
        np.testing.assert_allclose(found.unit[e], r / (d + 1e-3), atol=1e-12)
