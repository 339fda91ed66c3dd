"""MinSR, SPRING and MARCH against P x P solves in NumPy; invariances, refusals, Optax."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from common.errors import UserError
from optim import natural_gradient as ng
from optim.norm_constraint import scale_by_norm_constraint

MARCH = [
    dict(normalize_v=n, difference=d, decay=c, preconditioner=p)
    for n, d, c, p in itertools.product(
        (True, False), ("raw", "momentum"), ("sum", "ema"), ("sqrt", "quarter")
    )
]
ALL = [ng.scale_by_minsr, ng.scale_by_spring, ng.scale_by_march, ng.energy_gradient]


def tree(size, dtype=None):
    """Parameters whose flat order is not the one in which they are written down."""
    return {"w": jnp.ones((size - 3,), dtype), "b": jnp.full((1, 3), 0.5, dtype)}


def batches(samples, size, steps=4, seed=0):
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(size, size)) / np.sqrt(size)
    return [
        (rng.normal(size=(samples, size)) @ mixing + 3.0, 2 * rng.standard_t(3, samples))
        for _ in range(steps)
    ]


def follow(tx, data, params=None, state=None):
    """The flat updates of some steps, and the last state."""
    params = tree(data[0][0].shape[1]) if params is None else params
    state = tx.init(params) if state is None else state
    update = jax.jit(tx.update)  # Compiled once for each `tx`, shapes and mesh.
    steps = []
    for scores, energy in data:
        arrays = dict(scores=jnp.asarray(scores), local_energy=jnp.asarray(energy))
        step, state = update(params, state, params, **arrays)
        steps.append(np.asarray(ravel_pytree(step)[0]))
    return np.stack(steps), state


def centred(scores, energy, clip=None):
    if clip:
        middle = np.median(energy)
        width = clip * np.mean(np.abs(energy - middle))
        energy = np.minimum(np.maximum(energy, middle - width), middle + width)
    root = np.sqrt(len(energy))
    return (scores - scores.mean(0)) / root, (energy.mean() - energy) / root


def minimiser(rows, residual, damping, phi, metric):
    """argmin of ‖Õ d − ε̃‖²/λ + ‖d − φ‖² in the metric, by its P x P normal equations."""
    matrix = rows.T @ rows / damping + np.diag(metric)
    return np.linalg.solve(matrix, rows.T @ residual / damping + metric * phi)


def used_moment(history, beta, normalize_v, decay):
    """v as the step after `history` (of differences) uses it."""
    v, average = np.ones(history[0].size if history else 1), 0.0
    for difference in history:
        average = beta * average + (1 - beta) * difference**2
        v = beta * v + difference**2
        if normalize_v:
            v = v / np.sqrt(np.mean(v**2))
    if decay == "ema" and history:
        v = average / (1 - beta ** len(history))
        v = v / np.sqrt(np.mean(v**2)) if normalize_v else v
    return v


def march(data, mu, damping, beta, eps, difference, preconditioner, clip=None, **moment):
    history, steps, last = [], [], 0.0
    for scores, energy in data:
        v = used_moment(history, beta, **moment)
        root = np.sqrt(v) + eps if preconditioner == "sqrt" else (v**0.25 + eps) ** 2
        rows, residual = centred(scores, energy, clip)
        step = minimiser(rows, residual, damping, mu * last, root * np.ones(rows.shape[1]))
        history.append(step - (last if difference == "raw" else mu * last))
        steps.append(step)
        last = step
    return np.stack(steps)


def mesh(devices, model=1):
    shape, kinds = (devices // model, model), (AxisType.Auto, AxisType.Auto)
    names = ("data", "model")
    return jax.make_mesh(shape, names, kinds, devices=jax.devices()[:devices])


@pytest.mark.parametrize("size", [5, 12, 30])
@pytest.mark.parametrize("clip", [None, 0.8])
def test_minsr_and_spring_solve_the_normal_equations(size, clip):
    data = batches(12, size)
    with jax.enable_x64(True):
        minsr, _ = follow(ng.scale_by_minsr(0.02, clip=clip), data)
        spring, _ = follow(ng.scale_by_spring(0.9, 0.02, clip=clip), data)

    last = 0.0
    for i, (scores, energy) in enumerate(data):
        rows, residual = centred(scores, energy, clip)
        want = minimiser(rows, residual, 0.02, 0.0, np.ones(size))
        np.testing.assert_allclose(minsr[i], want, rtol=1e-10, atol=1e-10)
        last = minimiser(rows, residual, 0.02, 0.9 * last, np.ones(size))
        np.testing.assert_allclose(spring[i], last, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", MARCH, ids=lambda o: "-".join(map(str, o.values())))
def test_march_solves_its_problem_with_every_option(options):
    data = batches(10, 14, steps=5)
    fixed = dict(mu=0.8, beta=0.9, damping=0.05, eps=0.01, clip=2.0)
    with jax.enable_x64(True):
        got, state = follow(ng.scale_by_march(**fixed, **options), data)
    np.testing.assert_allclose(got, march(data, **fixed, **options), rtol=1e-9)
    np.testing.assert_array_equal(state.phi, got[-1])
    assert state.count == 5
    assert (np.asarray(state.v) > 0).all()


@pytest.mark.parametrize("options", MARCH[:2])
def test_steps_satisfy_the_optimality_condition(options):
    *past, (scores, energy) = batches(9, 20)
    tx = ng.scale_by_march(mu=0.9, damping=1e-3, eps=0.0, clip=None, **options)
    with jax.enable_x64(True):
        _, state = follow(tx, past)
        (step,), _ = follow(tx, [(scores, energy)], state=state)
    rows, residual = centred(scores, energy)
    v = np.asarray(state.v) / np.sqrt(np.mean(np.asarray(state.v) ** 2))
    data = rows.T @ (rows @ step - residual) / 1e-3
    prior = np.sqrt(v) * (step - 0.9 * np.asarray(state.phi))
    assert np.linalg.norm(data + prior) <= 1e-9 * np.linalg.norm(prior)


@pytest.mark.parametrize("make", ALL)
def test_constants_and_the_order_of_samples_do_not_matter(make):
    data = batches(11, 17)
    rng = np.random.default_rng(1)
    moved, shuffled = [], []
    for scores, energy in data:
        moved.append((scores + rng.normal(size=17), energy - 7.0))
        order = rng.permutation(11)
        shuffled.append((scores[order], energy[order]))
    tx = make(clip=1.0)
    with jax.enable_x64(True):
        want, _ = follow(tx, data)
        assert np.abs(want).min() > 0
        for changed in (moved, shuffled):
            got, _ = follow(tx, changed)
            np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize(("x64", "tolerance"), [(True, 1e-10), (False, 1e-4)])
def test_number_of_devices_does_not_matter(make, x64, tolerance):
    data = batches(16, 21, steps=3)  # 21 parameters: padding is needed.
    tx = make(clip=2.0) if make is ng.energy_gradient else make(damping=0.1, clip=2.0)
    with jax.enable_x64(x64):
        want, _ = follow(tx, data)
        for model in (1, 2):
            with jax.set_mesh(mesh(8, model)):
                rows = NamedSharding(mesh(8, model), PartitionSpec("data"))
                got, _ = follow(tx, [jax.device_put(batch, rows) for batch in data])
            scale = np.abs(want).max()
            np.testing.assert_allclose(got / scale, want / scale, atol=tolerance)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("block", [1, 4, 7, 50])
def test_gram_in_blocks_of_columns(devices, block):
    scores, _ = batches(16, 42, steps=1)[0]
    rng = np.random.default_rng(2)
    weights, mean, good = rng.uniform(size=42), rng.normal(size=42), rng.uniform(size=16) > 0.3
    scores = np.where(good[:, None], scores, np.nan)
    with jax.enable_x64(True), jax.set_mesh(mesh(devices)):
        arrays = map(jnp.asarray, (scores, weights, mean, good))
        got = jax.jit(ng.gram, static_argnames="block")(*arrays, block=block)
    rows = np.where(good[:, None], scores - mean, 0)
    np.testing.assert_allclose(got, (rows * weights) @ rows.T, rtol=1e-12, atol=1e-12)


def test_float32_scores_are_centred_and_multiplied_in_float64():
    scores, energy = batches(10, 12, steps=1)[0]
    scores = (scores + 100).astype(np.float32)
    with jax.enable_x64(True):
        for block in (5, 4096):
            got, state = follow(ng.scale_by_spring(block=block), [(scores, energy)])
            rows, residual = centred(scores.astype(np.float64), energy)
            want = minimiser(rows, residual, 1e-3, 0.0, np.ones(12))
            np.testing.assert_allclose(got[0], want, rtol=1e-8)
            assert state.phi.dtype == jnp.float64
        got, state = follow(ng.scale_by_spring(dtype="float32"), [(scores, energy)])
        assert state.phi.dtype == jnp.float32
        assert 1e-8 < np.abs(got[0] - want).max() < 1e-2 * np.abs(want).max()


def test_march_with_a_constant_moment_is_spring():
    data = batches(9, 15)
    with jax.enable_x64(True):
        spring, state = follow(ng.scale_by_spring(0.9, 0.01), data)
        tx = ng.scale_by_march(0.9, damping=0.01, eps=0.0)
        frozen = tx.init(tree(15))
        for i, batch in enumerate(data):
            got, new = follow(tx, [batch], state=frozen)
            np.testing.assert_allclose(got[0], spring[i], rtol=1e-9)
            assert np.ptp(new.v) > 0
            frozen = new._replace(v=frozen.v)
    np.testing.assert_allclose(frozen.phi, state.phi, rtol=1e-9)


def test_large_damping_follows_the_preconditioned_gradient():
    *past, (scores, energy) = batches(9, 15)
    with jax.enable_x64(True):
        _, state = follow(ng.scale_by_march(), past)
        tx = ng.scale_by_march(mu=0.9, damping=1e9, normalize_v=False, eps=0.0)
        state = state._replace(phi=state.phi * 1e-6)  # Or φ would drown the difference.
        (step,), _ = follow(tx, [(scores, energy)], state=state)
    rows, residual = centred(scores, energy)
    phi = 0.9 * np.asarray(state.phi)
    want = rows.T @ (residual - rows @ phi) / np.sqrt(state.v) / 1e9
    np.testing.assert_allclose(step - phi, want, rtol=1e-5, atol=1e-7 * np.abs(want).max())


def test_momentum_solves_least_squares_sooner_than_minsr():
    rng = np.random.default_rng(3)
    table = rng.normal(size=(300, 24)) * np.linspace(0.2, 1.0, 24)
    target = rng.normal(size=24)

    def error(direction):
        tx = optax.chain(direction, optax.scale(0.1))

        def step(carry, rows):
            theta, state = carry
            update, state = tx.update(
                theta, state, theta, scores=rows, local_energy=rows @ (theta - target)
            )
            return (optax.apply_updates(theta, update), state), None

        theta = jnp.zeros(24)
        picks = table[np.random.default_rng(4).integers(300, size=(60, 5))]
        (theta, _), _ = jax.lax.scan(step, (theta, tx.init(theta)), jnp.asarray(picks))
        return np.linalg.norm(theta - target) / np.linalg.norm(target)

    with jax.enable_x64(True):
        minsr = error(ng.scale_by_minsr(0.1))
        assert error(ng.scale_by_spring(0.9, 0.1)) < 0.4 * minsr < 0.4
        assert error(ng.scale_by_march(0.9, damping=0.1)) < 0.4 * minsr


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("devices", [1, 8])
def test_bad_samples_count_as_absent(make, devices):
    data, spoiled = [], []
    for i, (scores, energy) in enumerate(batches(104, 10, steps=3)):
        data.append((np.delete(scores, 50, 0), np.delete(energy, 50)))
        if i == 1:
            scores[50, 4] = np.nan
        else:
            energy[50] = np.inf
        spoiled.append((scores, energy))
    with jax.enable_x64(True):
        want, _ = follow(make(clip=1.0), data)
        with jax.set_mesh(mesh(devices)):
            got, _ = follow(make(clip=1.0), spoiled)
    assert np.abs(want).max() > 0
    np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("cause", ["scores", "energy", "overflow"])
def test_bad_batches_change_nothing(make, cause):
    data = batches(100, 8, steps=3)
    data = [tuple(array.astype(np.float32) for array in batch) for batch in data]
    tx = make()
    _, state = follow(tx, data)
    scores, energy = (array.copy() for array in data[0])
    if cause == "scores":
        scores[[5, 6], 1] = np.inf
    elif cause == "energy":
        energy[[5, 6]] = np.nan
    else:
        scores *= 1e30
        energy *= 1e30
    got, after = follow(tx, [(scores, energy)], state=state)
    np.testing.assert_array_equal(got, 0)
    chex.assert_trees_all_equal(after, state)

    scores, energy = data[0]
    energy[5] = np.nan  # One per cent is accepted.
    got, after = follow(tx, [(scores, energy)], state=state)
    assert np.isfinite(got).all()
    assert np.abs(got).max() > 0


@pytest.mark.parametrize("make", ALL[:3])
def test_duplicated_samples_fall_back_to_eigenvalues(make):
    rng = np.random.default_rng(5)
    scores = np.tile(rng.normal(size=(4, 40)), (16, 1)).astype(np.float32) * 30
    energy = np.tile(rng.normal(size=4), 16).astype(np.float32)
    rows, residual = centred(scores, energy)
    matrix = rows @ rows.T + np.float32(1 / 64) + 1e-9 * np.eye(64, dtype=np.float32)
    assert np.isnan(jnp.linalg.cholesky(matrix)).any()

    got, _ = follow(make(damping=1e-9), [(scores, energy)])
    want = np.linalg.pinv(rows.astype(np.float64), 1e-5) @ residual
    np.testing.assert_allclose(got[0], want, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("size", [6, 20])
def test_energy_gradient_is_the_derivative_of_the_mean_energy(size):
    (scores, energy), _ = batches(15, size, steps=2)
    with jax.enable_x64(True):
        got, _ = follow(ng.energy_gradient(), [(scores, energy)])
        # <E> = Σ p E / Σ p, where p = |ψ|² changes by 2 O dθ, and E is held fixed.
        mean = lambda theta: jax.nn.softmax(2 * scores @ theta) @ energy
        want = jax.grad(mean)(jnp.zeros(size))
        descent, _ = follow(
            optax.chain(ng.energy_gradient(), optax.sgd(0.1)), [(scores, energy)]
        )
    np.testing.assert_allclose(got[0], want, rtol=1e-9)
    np.testing.assert_allclose(descent[0], -0.1 * np.asarray(want), rtol=1e-9)


@pytest.mark.parametrize("make", ALL)
def test_optax_contract(make):
    params = {"a": jnp.ones((2, 3), jnp.bfloat16), "b": (jnp.ones(4), jnp.ones(()))}
    tx = optax.chain(make(), scale_by_norm_constraint(0.05, "fixed"))
    state = tx.init(params)
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(tx.update, n=1))
    for scores, energy in batches(12, 11, steps=3):
        arrays = dict(scores=jnp.asarray(scores), local_energy=jnp.asarray(energy))
        got, new = update(params, state, params, **arrays, unknown=jnp.ones(3))
        chex.assert_trees_all_equal_shapes_and_dtypes(got, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
        np.testing.assert_allclose(optax.tree.norm(got), 0.05, rtol=1e-2)
        state = new
    alone, _ = make().update(params, make().init(params), **arrays)
    chex.assert_trees_all_equal_shapes_and_dtypes(alone, params)


def test_momentum_is_stored_before_the_constraint():
    data = batches(12, 9)
    free, alone = follow(ng.scale_by_march(), data)
    tx = optax.chain(ng.scale_by_march(), scale_by_norm_constraint(1e-3))
    bound, (state, _) = follow(tx, data)
    chex.assert_trees_all_close(state, alone, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(bound, axis=1), 1e-3, rtol=1e-5)
    assert (np.linalg.norm(free, axis=1) > 1e-2).all()


@pytest.mark.parametrize(
    ("make", "field", "value"),
    [
        (ng.scale_by_spring, "mu", 1.0),
        (ng.scale_by_march, "mu", -0.1),
        (ng.scale_by_march, "mu", float("nan")),
        (ng.scale_by_march, "beta", 1.0),
        (ng.scale_by_minsr, "damping", 0.0),
        (ng.scale_by_spring, "damping", float("inf")),
        (ng.scale_by_march, "eps", -1e-3),
        (ng.scale_by_march, "difference", "none"),
        (ng.scale_by_march, "decay", "mean"),
        (ng.scale_by_march, "preconditioner", "cube"),
        (ng.energy_gradient, "clip", 0.0),
        (ng.scale_by_march, "block", 0),
        (ng.scale_by_minsr, "dtype", "float16"),
    ],
)
def test_bad_options_are_named(make, field, value):
    with pytest.raises(UserError, match=rf"config\.optim\.{field} is {value!r}, but must"):
        make(**{field: value})


def test_float64_without_x64_is_refused():
    tx = ng.scale_by_march(dtype=jnp.float64)
    with pytest.raises(UserError, match=r"config\.precision\.linalg is 'float64'"):
        tx.init(tree(5))
    with pytest.raises(UserError, match=r"config\.precision\.linalg is 'float64'"):
        follow(ng.scale_by_minsr(dtype="float64"), batches(6, 5, steps=1))
    with jax.enable_x64(True):
        assert tx.init(tree(5)).v.dtype == jnp.float64
