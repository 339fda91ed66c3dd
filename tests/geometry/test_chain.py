"""Chains against arc lengths, a file's displacements, and exact covariances of frames.

Gaussian frames make the denoiser linear, and the chain then is linear in its noise: fed with
unit vectors it yields the exact covariances of what it generates.
"""

import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from geometry.chain import (
    chain,
    condition,
    denoiser,
    draw,
    mean_squares,
    of_segment,
    resample,
    sample,
    tables,
)
from geometry.graphs import noise
from geometry.matching import denoised, objective
from geometry.network import Network
from geometry.reference import brownian, coefs, reference
from geometry.samplers import run, sampler, table
from tests.geometry.test_matching import GRAPH

UNIT = brownian(1.0)
FRAMES = jnp.asarray(np.random.default_rng(0).normal(size=(5, 14, 3)), jnp.float32)


def walk(angles):
    """A molecule of two atoms, one of which goes round a circle."""
    moving = np.stack([np.cos(angles), np.sin(angles), 0 * angles], -1)
    return np.stack([0 * moving, moving], 1)


def test_paths_are_resampled_at_equal_lengths():
    uneven = walk(np.pi * np.linspace(0, 1, 400) ** 3)
    frames = resample(uneven, 4, rotate=False)
    np.testing.assert_allclose(frames, walk(np.pi * np.arange(5) / 4), atol=1e-4)
    np.testing.assert_array_equal(frames[[0, -1]], uneven[[0, -1]])
    # With every frame repeated, it is the same path.
    again = resample(np.repeat(uneven, 2, 0), 4, rotate=False)
    np.testing.assert_allclose(again, frames, atol=1e-12)
    # More frames than there were.
    fine = resample(walk(np.array([0.0, 1.0])), 4, rotate=False)
    np.testing.assert_allclose(
        np.diff(fine, axis=0), np.stack([fine[1] - fine[0]] * 4), atol=1e-12
    )


def test_a_molecule_is_followed_in_its_own_frame():
    rng = np.random.default_rng(1)
    shape = rng.normal(size=(6, 3))
    bend = rng.normal(size=(6, 3))
    path, turned = [], []
    for k in range(9):
        frame = shape + 0.02 * k**1.5 * bend
        axes = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        axes[:, 0] *= np.linalg.det(axes)
        path.append(frame - frame.mean(0))
        turned.append((path[-1] @ axes) if k else path[-1])
    frames = resample(np.array(turned), 5)
    np.testing.assert_array_equal(frames[0], path[0])
    distance = lambda x: np.linalg.norm(x[:, None] - x[None], axis=-1)
    np.testing.assert_allclose(distance(frames[-1]), distance(path[-1]), atol=1e-12)
    rms = np.sqrt((np.diff(frames, axis=0) ** 2).sum(-1).mean(-1))
    np.testing.assert_allclose(rms, rms.mean(), rtol=0.02)
    # No turn is left: the moment of momentum of every step is 0.
    spin = np.cross(frames[:-1], np.diff(frames, axis=0)).sum(1)
    assert np.abs(spin).max() < 0.05 * rms.mean()


@pytest.mark.parametrize("frames", [1, 4])
def test_what_does_not_move_is_a_single_bridge(frames):
    still = np.repeat(np.random.default_rng(2).normal(size=(1, 4, 3)), frames, 0)
    with pytest.warns(UserWarning, match=f"{frames} frames does not move: it is a single"):
        assert resample(still, 4) is None


def test_displacements_of_the_bundled_paths():
    """Section 3, the per-segment rms of relax_gfn2; and the straight line's error."""
    file = Path(__file__).parents[2] / "geometry/data/relax_gfn2.npz"
    data = dict(np.load(file))
    cuts = np.cumsum(data["n_atoms"])[:-1]
    paths = [np.moveaxis(part, 1, 0) for part in np.split(data["traj"], cuts)]
    square = mean_squares((path, np.ones(path.shape[1])) for path in paths)
    published = [0.037, 0.043, 0.043, 0.042, 0.041, 0.041, 0.039, 0.035]
    np.testing.assert_allclose(np.sqrt(square), published, atol=5.1e-4)
    made = chain(UNIT, square, kappa=0.5)
    np.testing.assert_allclose(made.factors, 0.5 * square)
    # They are of equal length already: resampling moves little.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = resample(np.float64(paths[0]), 8)
    assert np.abs(again - paths[0]).max() < 0.01
    # Fixed atoms do not count.
    moved = np.zeros((3, 2, 3))
    moved[1:, 1] = 0.3
    np.testing.assert_allclose(mean_squares([(moved, np.array([0, 1]))]), [0.09, 0.0])


def test_noise_is_kappa_times_the_displacements():
    squares = np.array([0.1, 0.4, 0.2])
    for process in (brownian(1.7, 2.0), reference("vp"), reference("ve")):
        made = chain(process, squares, kappa=2.0)
        for i in range(3):
            own, square = of_segment(made, i)
            assert float(square) == pytest.approx(squares[i])
            assert float(own.v(0.0, own.end)) == pytest.approx(2 * squares[i], rel=1e-6)
    # sigma_i^2 T = kappa m_i in the middle of a Brownian segment.
    own, _ = of_segment(chain(brownian(1.7, 2.0), squares), jnp.asarray([2, 0]))
    np.testing.assert_allclose(coefs(own, 0.0, 1.0)[2], [0.05, 0.025], rtol=1e-6)


def test_segments_and_times_are_stratified_together():
    real = np.ones((2, 13), bool)
    real[1, 10:] = False
    go = jax.jit(lambda key: draw(key, jnp.asarray(real), 4, 2.0))
    found = [go(jax.random.key(k)) for k in range(100)]
    i, t = (np.asarray(v) for v in zip(*found, strict=True))
    assert ((i >= 0) & (i < 4)).all()
    assert ((t >= 0) & (t <= 0.999 * 2)).all()
    i, t = i[:, real], t[:, real]
    whole = np.sort(i + t / (0.999 * 2), -1) / 4 * 23
    assert (np.abs(np.floor(whole + 1e-4) - np.arange(23)) <= 0).all()
    assert t.mean() == pytest.approx(0.999, abs=0.02)
    counts = np.bincount(i.ravel(), minlength=4) / i.size
    np.testing.assert_allclose(counts, 0.25, atol=0.01)


KNOWN = {
    "segment": lambda i: [i],
    "segment+initial": lambda i: [i, 0],
    "history-1": lambda i: [i],
    "history-3": lambda i: [i, max(i - 1, 0), max(i - 2, 0)],
}


@pytest.mark.parametrize("name", KNOWN)
def test_conditions_are_the_frames_of_each_structures_segment(name):
    made = chain(UNIT, np.ones(4), name)
    i = np.array([3, 0, 2, 0])
    known, end = jax.jit(lambda i: condition(made, GRAPH, FRAMES, i))(jnp.asarray(i))
    for atom, structure in enumerate(np.asarray(GRAPH.owner)):
        own = i[structure]
        np.testing.assert_array_equal(known[:, atom], FRAMES[np.array(KNOWN[name](own)), atom])
        np.testing.assert_array_equal(end[atom], FRAMES[own + 1, atom])


def test_history_is_a_field_too():
    for name, history in (("history", 4), ("history-4", 2)):
        made = chain(UNIT, np.ones(2), name, history=history)
        assert (made.condition, made.history) == ("history", 4)
    assert chain(UNIT, np.ones(2), "segment", history=4).history == 1


def test_a_training_sample_of_a_chain_is_one_of_its_bridges():
    """Structures in different segments have the errors they have in a batch of their own."""
    made = chain(UNIT, np.array([0.5, 1.0, 2.0, 0.3]), "segment+initial")
    network = Network(lambda key: 0.0, lambda p, g, inputs: p * (inputs.x - inputs.known[1]))
    z, t = noise(jax.random.key(3), GRAPH), jnp.asarray([0.2, 0.5, 0.9, 0.0])

    @jax.jit
    def call(i):
        own, s2 = of_segment(made, i)
        known, end = condition(made, GRAPH, FRAMES, i)
        x = known[0] + 0.1 * z
        d = denoised(network, own, s2, 0.2, GRAPH, x, known, t, i / 4)
        errors = objective(network, own, s2, 0.2, GRAPH, known, end, t, z, i / 4)
        return d, errors, denoiser(network, made, 0.2, GRAPH)(x, known, t[0], i[0])

    mixed, errors, _ = call(jnp.asarray([3, 0, 2, 0]))
    assert np.isfinite(errors).all()
    for k, i in enumerate((3, 0, 2)):
        alone, _, first = call(jnp.full(4, i))
        own = np.asarray(GRAPH.owner) == 0
        np.testing.assert_allclose(first[own], alone[own], atol=1e-6)
        own = np.asarray(GRAPH.owner) == k
        np.testing.assert_allclose(mixed[own], alone[own], atol=1e-6)


def generated(made, options, denoise, start):
    """Exact responses [frames, noises + start] of a linear chain to unit noise."""
    with jax.enable_x64(True):
        rows = tables(made, options)
        calls = rows.time.size
        unit = jnp.eye(calls + 1)
        go = jax.jit(
            lambda rows: sample(denoise, made, rows, start * unit[-1], lambda k: unit[k])
        )
        return np.asarray(go(rows))


def test_markov_frames_keep_their_covariances():
    """x^{i+1} = 0.8 x^i + 0.5 eps from N(0, 1): all of cov(x^i, x^j)."""
    segments = 4
    truth = np.eye(segments + 1)
    variance = [1.0]
    for _ in range(segments):
        variance.append(0.64 * variance[-1] + 0.25)
    for i in range(segments + 1):
        for j in range(i, segments + 1):
            truth[i, j] = truth[j, i] = 0.8 ** (j - i) * variance[i]
    made = chain(UNIT, np.full(segments, 0.3), "segment")

    def denoise(x, known, t, i):
        return posterior(0.8 * known[0], 0.25, made.factors[0], x, known[0], t)

    for n, bound in ((50, 0.03), (400, 0.004)):
        frames = generated(made, sampler("bridge", n), denoise, 1.0)
        np.testing.assert_allclose(frames @ frames.T, truth, atol=bound)


def posterior(mean, spread, sigma2, x, start, t):
    """E[y | x] of y ~ N(mean, spread) and a Brownian bridge from the start to y."""
    gain = spread / (t * spread + sigma2 * (1 - t))
    return mean + gain * (x - (1 - t) * start - t * mean)


def test_frames_with_memory_need_their_history():
    """Section 3: x^{i+1} = x^i + 0.9 (x^i - x^{i-1}) + 0.15 eps, 4 segments.

    From x^0 = 0 and x^1 ~ N(0, 0.5^2), which the published figures fit; mean square second
    difference, truth 0.0247, given the segment's start 0.0344, given the history 0.0235.
    """
    rows = np.zeros((5, 4))
    rows[1, 0] = 0.5
    for i in (1, 2, 3):
        rows[i + 1] = rows[i] + 0.9 * (rows[i] - rows[i - 1])
        rows[i + 1, i] += 0.15
    second = lambda frames: (np.diff(frames, 2, axis=0) ** 2).sum(-1).mean()
    assert second(rows) == pytest.approx(0.0247, abs=1.5e-4)
    cov = rows @ rows.T
    slope = np.r_[0.0, [cov[i + 1, i] / cov[i, i] for i in (1, 2, 3)]]
    left = np.r_[0.25, [cov[i + 1, i + 1] - slope[i] * cov[i + 1, i] for i in (1, 2, 3)]]
    squares = (np.diff(rows, axis=0) ** 2).sum(-1)

    def of_start(x, known, t, i):
        mean = jnp.asarray(slope)[i] * known[0]
        at = jnp.asarray(left)[i], jnp.asarray(squares)[i]
        return posterior(mean, *at, x, known[0], t)

    def of_history(x, known, t, i):
        mean = known[0] + 0.9 * (known[0] - known[1])
        spread = jnp.where(i == 0, 0.25, 0.15**2)
        return posterior(mean, spread, jnp.asarray(squares)[i], x, known[0], t)

    options = sampler("bridge", 50)
    markov = generated(chain(UNIT, squares, "segment"), options, of_start, 0.0)
    history = generated(chain(UNIT, squares, "history-2"), options, of_history, 0.0)
    assert second(markov) == pytest.approx(0.0344, abs=0.001)
    assert second(history) == pytest.approx(0.0235, abs=0.001)


def test_a_chain_follows_a_half_circle_and_one_bridge_does_not():
    """Root mean square distance of the mean path: 0.721 and 0.055 of the radius."""
    ends = walk(np.pi * np.linspace(0, 1, 401))
    options = sampler("mean", 100, grid="uniform")

    def away(states):
        states = np.asarray(states)[:, 1]
        circle = walk(np.pi * np.linspace(0, 1, len(states)))[:, 1]
        return np.sqrt(((states - circle) ** 2).sum(-1).mean())

    start, end = (jnp.asarray(ends[k]) for k in (0, -1))
    _, line = run(lambda x, t: end, table(UNIT, options), start, path=True)
    assert away(line) == pytest.approx(0.721, abs=0.005)
    frames = jnp.asarray(resample(ends, 4, rotate=False))
    made = chain(UNIT, np.full(4, 0.1))
    denoise = lambda x, known, t, i: frames[i + 1]
    found, states = sample(denoise, made, tables(made, options), start, path=True)
    np.testing.assert_allclose(found, frames, atol=1e-5)
    np.testing.assert_allclose(states[1:, 0], states[:-1, -1])
    whole = np.concatenate([states[:1, 0], *states[:, 1:]])
    assert away(whole) == pytest.approx(0.055, abs=0.001)


@pytest.mark.parametrize("name", KNOWN)
def test_the_scan_is_a_loop_over_segments(name):
    """With conditions that are carried, and noise that no two segments share."""
    made = chain(UNIT, np.array([0.5, 1.0, 2.0, 0.3]), name)
    options = sampler("bridge", 3)
    z = jax.random.normal(jax.random.key(4), (12, 2))
    start = jnp.asarray([0.3, -0.4])
    weights = jnp.asarray([0.7, -0.5, 0.3])

    def denoise(x, known, t, i):
        return jnp.sin(x) + weights[: len(known)] @ known + 0.1 * i * t

    found = jax.jit(
        lambda rows: sample(denoise, made, rows, start, lambda k: z[k], keep=lambda x: 0.9 * x)
    )(tables(made, options))
    frames = [start]
    for i in range(4):
        known = jnp.stack([frames[k] for k in KNOWN[name](i)])
        x = run(
            lambda x, t, known=known, i=i: denoise(x, known, t, i),
            table(brownian(float(made.factors[i]) ** 0.5), options),
            known[0],
            lambda k, i=i: z[3 * i + k],
            lambda x: 0.9 * x,
        )
        frames.append(x)
    np.testing.assert_allclose(found, jnp.stack(frames), atol=2e-6)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: chain(UNIT, np.ones(2), "initial"), "chain.condition is 'initial'.*history-k"),
        (lambda: chain(UNIT, np.ones(2), "history-x"), "chain.condition"),
        (lambda: chain(UNIT, np.ones(2), "segment-2"), "chain.condition"),
        (lambda: chain(UNIT, np.ones(2), "history-0"), "chain.history is 0"),
        (lambda: chain(UNIT, np.ones(2), kappa=0.0), "chain.kappa is 0.0"),
        (lambda: chain(UNIT, np.array([1.0, 0.0])), "chain.frames"),
        (lambda: resample(np.zeros((3, 2, 3)), 0), "chain.segments is 0"),
    ],
)
def test_what_is_out_of_range_is_named(call, said):
    with pytest.raises(UserError, match=said):
        call()
