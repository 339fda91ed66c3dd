"""The chain of denoisers: learning rates, bad gradients, decay, clipping, refusals."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common.errors import UserError
from optim.denoising import PATIENCE, denoising, schedule

PARAMS = {
    "dense": {"kernel": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "bias": jnp.ones(3)},
    "scale": jnp.float32(0.5),
}


def settings(**changes):
    base = dict(name="adam", steps=100, learning_rate=0.1, rate="constant", warmup=0)
    base |= dict(decay_from=1, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, clip=0.0)
    return base | changes


def gradient(step):
    return jax.tree.map(lambda p: jnp.cos(3 * p + step), PARAMS)


def run(tx, gradients):
    """Parameters and state after every gradient."""
    update, params, state = jax.jit(tx.update), PARAMS, tx.init(PARAMS)
    seen = []
    for grads in gradients:
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        seen.append((params, state))
    return seen


def adam(gradients, rate, decay=0.0, b1=0.9, b2=0.999, eps=1e-8):
    """Adam of Kingma and Ba, decoupled decay of Loshchilov and Hutter, float64."""
    p = np.asarray(PARAMS["dense"]["kernel"], np.float64)
    m = v = np.zeros_like(p)
    for t, grads in enumerate(gradients):
        g = np.asarray(grads["dense"]["kernel"], np.float64)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        step = (m / (1 - b1 ** (t + 1))) / (np.sqrt(v / (1 - b2 ** (t + 1))) + eps)
        p = p - rate(t) * (step + decay * p)
    return p


def test_warm_up_is_a_straight_line_to_the_peak_under_every_shape():
    for rate in ("constant", "cosine", "inverse_sqrt"):
        of = schedule(rate, 0.2, 100, 10, 50)
        found = [float(of(t)) for t in range(10)]
        np.testing.assert_allclose(found, 0.02 * np.arange(1, 11), rtol=1e-6)
        assert float(schedule(rate, 0.2, 100, 0, 50)(0)) == pytest.approx(0.2)


def test_constant_stays():
    of = schedule("constant", 0.2, 100, 10, 1)
    np.testing.assert_allclose(of(jnp.arange(10, 1000)), np.full(990, 0.2), rtol=1e-6)


@pytest.mark.parametrize("warmup", [0, 10, 100])
def test_cosine_ends_at_zero(warmup):
    of = schedule("cosine", 0.2, 100, warmup, 1)
    t = np.arange(warmup, 100)
    want = 0.1 * (1 + np.cos(np.pi * (t - warmup) / max(100 - warmup, 1)))
    np.testing.assert_allclose(of(jnp.asarray(t)), want, atol=1e-7)
    after = of(jnp.array([101, 200]) if warmup == 100 else jnp.array([100, 101, 200]))
    np.testing.assert_allclose(after, 0, atol=1e-8)
    if warmup < 100:
        assert float(of((100 + warmup) // 2)) == pytest.approx(0.1, rel=1e-5)


def test_inverse_sqrt_falls_from_where_it_is_told():
    of = schedule("inverse_sqrt", 0.2, 1000, 10, 50)
    np.testing.assert_allclose(of(jnp.arange(10, 51)), np.full(41, 0.2), rtol=1e-6)
    t = np.array([51, 100, 200, 5000])
    np.testing.assert_allclose(of(jnp.asarray(t)), 0.2 / np.sqrt(t / 50), rtol=1e-6)


def test_warm_up_may_last_longer_than_the_plateau():
    of = schedule("inverse_sqrt", 0.2, 1000, 100, 25)
    assert float(of(49)) == pytest.approx(0.5 * 0.2 / np.sqrt(49 / 25))


@pytest.mark.parametrize(("name", "decay"), [("adam", 0.0), ("adamw", 0.0), ("adamw", 0.3)])
def test_steps_are_those_of_the_papers(name, decay):
    gradients = [gradient(i) for i in range(5)]
    changes = dict(rate="cosine", steps=8, warmup=2, b1=0.8, b2=0.99, eps=1e-4)
    tx = denoising(**settings(name=name, weight_decay=decay, **changes))
    rate = schedule("cosine", 0.1, 8, 2, 1)
    want = adam(gradients, lambda t: float(rate(t)), decay, 0.8, 0.99, 1e-4)
    params, _ = run(tx, gradients)[-1]
    np.testing.assert_allclose(params["dense"]["kernel"], want, rtol=1e-5)


def test_decay_is_times_the_learning_rate_and_of_every_leaf():
    none = jax.tree.map(jnp.zeros_like, PARAMS)
    tx = denoising(**settings(name="adamw", weight_decay=0.5))
    (params, _), *_ = run(tx, [none])
    chex.assert_trees_all_close(params, jax.tree.map(lambda p: 0.95 * p, PARAMS), rtol=1e-6)


@pytest.mark.parametrize("clip", [0.5, 1e9])
def test_clip_is_of_the_global_norm_before_adam(clip):
    """eps is large, so that Adam sees sizes."""
    norm = float(optax.tree.norm(gradient(0)))
    assert 0.5 < norm < 1e9
    small = jax.tree.map(lambda g: g * min(1, clip / norm), gradient(0))
    (found, _), *_ = run(denoising(**settings(clip=clip, eps=1.0)), [gradient(0)])
    (want, _), *_ = run(denoising(**settings(eps=1.0)), [small])
    chex.assert_trees_all_close(found, want, rtol=1e-6)
    (plain, _), *_ = run(denoising(**settings(eps=1.0)), [gradient(0)])
    differs = not np.allclose(found["dense"]["kernel"], plain["dense"]["kernel"], atol=1e-4)
    assert differs == (clip == 0.5)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_one_gradient_that_is_not_finite_moves_nothing(bad):
    """Not the parameters, the moments, the count or the learning rate; the run goes on."""
    tx = denoising(**settings(name="adamw", weight_decay=0.3, clip=1.0, warmup=10))
    broken = gradient(1) | {"scale": jnp.float32(bad)}
    with_bad = run(tx, [gradient(0), broken, gradient(2)])
    without = run(tx, [gradient(0), gradient(2)])
    chex.assert_trees_all_equal(with_bad[1][0], with_bad[0][0])
    chex.assert_trees_all_equal(with_bad[1][1].inner_state, with_bad[0][1].inner_state)
    chex.assert_trees_all_equal(with_bad[2][0], without[1][0])
    assert int(with_bad[2][1].total_notfinite) == 1
    assert int(with_bad[2][1].notfinite_count) == 0


def test_broken_gradients_in_a_row_are_counted_and_never_let_through():
    """Who trains stops at PATIENCE of them."""
    assert PATIENCE == 20
    tx = denoising(**settings())
    broken = jax.tree.map(lambda g: jnp.nan * g, gradient(0))
    twice = run(tx, [broken] * 20 + [gradient(0)] + [broken] * 20)
    chex.assert_tree_all_finite(twice[-1][0])
    chex.assert_trees_all_equal(twice[19][0], PARAMS)
    assert int(twice[-1][1].total_notfinite) == 40
    params, state = run(tx, [broken] * 21)[-1]
    chex.assert_trees_all_equal(params, PARAMS)
    assert int(state.notfinite_count) == 21


@pytest.mark.parametrize("changes", [{}, dict(name="adamw", weight_decay=0.1, clip=1.0)])
def test_structure_dtypes_and_traces_are_kept(changes):
    chex.clear_trace_counter()
    params = {"a": jnp.ones((2, 3)), "b": [jnp.ones(4, jnp.bfloat16)], "none": None}
    tx = denoising(**settings(rate="inverse_sqrt", decay_from=3, warmup=2, **changes))
    state = tx.init(params)

    def update(grads, state, params):
        return tx.update(grads, state, params)

    run = jax.jit(chex.assert_max_traces(update, n=1))
    after = state
    for _ in range(3):
        updates, after = run(params, after, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


def test_it_chains():
    tx = optax.chain(denoising(**settings()), optax.scale(0.5))
    (half, _), *_ = run(tx, [gradient(0)])
    (whole, _), *_ = run(denoising(**settings()), [gradient(0)])
    moved = lambda tree: tree["dense"]["kernel"] - PARAMS["dense"]["kernel"]
    np.testing.assert_allclose(moved(half), 0.5 * moved(whole), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(name="sgd"), r"optim\.name is 'sgd', but must be adam or adamw"),
        (dict(learning_rate=0.0), r"optim\.learning_rate is 0\.0"),
        (dict(learning_rate=float("inf")), r"optim\.learning_rate is inf"),
        (dict(learning_rate=float("nan")), r"optim\.learning_rate is nan"),
        (dict(eps=0.0), r"optim\.eps is 0\.0"),
        (dict(b1=1.0), r"optim\.b1 is 1\.0"),
        (dict(b1=-0.1), r"optim\.b1 is -0\.1"),
        (dict(b2=float("nan")), r"optim\.b2 is nan"),
        (dict(clip=-1.0), r"optim\.clip is -1\.0"),
        (dict(clip=float("inf")), r"optim\.clip is inf"),
        (dict(name="adamw", weight_decay=-0.1), r"optim\.weight_decay is -0\.1"),
        (dict(weight_decay=0.1), r"optim\.weight_decay is 0\.1, but must be 0 for adam"),
        (dict(rate="linear"), r"optim\.rate is 'linear', but must be one of constant, cosine"),
        (dict(warmup=-1), r"optim\.warmup is -1"),
        (dict(warmup=101), r"optim\.warmup is 101, but must be from 0 to the 100 steps"),
        (dict(rate="inverse_sqrt", decay_from=0), r"optim\.decay_from is 0"),
    ],
)
def test_what_cannot_be_is_named(changes, said):
    with pytest.raises(UserError, match=said):
        denoising(**settings(**changes))
