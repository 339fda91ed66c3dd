"""Table 2.5, and the learned mixture down to its irreducible error."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from geometry import oracle, toys
from geometry.reference import reference

# sigma: drift sees R^0, P(y0|x0) and P(y0|x1); the Markov drift, the same.
PARTNERS = {
    0.3: ((0.713, 0.392), (0.217, 0.896)),
    0.6: ((0.711, 0.393), (0.258, 0.854)),
    1.0: ((0.705, 0.401), (0.324, 0.786)),
}
BROWNIAN = reference("brownian", sigma=1.0)
TOY = toys.toy(BROWNIAN, width=32, depth=2)
FRESH = jax.jit(TOY.init)(jax.random.key(3))


@pytest.mark.parametrize("sigma", PARTNERS)
def test_the_coupling_is_kept_by_a_drift_that_knows_the_start_only(sigma):
    """Table 2.5: 0.005 is the error of a frequency there and here, so 0.007 of a difference."""
    process = reference("brownian", sigma=sigma)
    for aware, published in zip((True, False), PARTNERS[sigma], strict=True):
        found = toys.partners(process, jax.random.key(1), 8000, aware=aware)
        np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-6)
        np.testing.assert_allclose(found[:, 0], published, atol=4 * 0.0071)
        assert found[:, 0].mean() == pytest.approx(0.55, abs=4 * 0.004)
        lost = oracle.total_variation(found, toys.PARTNERS).mean()
        assert lost < 0.015 if aware else lost > 0.35


def test_pairs_of_the_coupling_have_its_law():
    pairs = toys.coupling(jax.random.key(2), 20_000)
    for start, q in zip(toys.STARTS, toys.PARTNERS, strict=True):
        of = np.asarray((pairs.start == jnp.asarray(start)).all(-1))
        assert of.sum() == 10_000
        for end, share in zip(toys.ENDS, q, strict=True):
            hits = np.asarray((pairs.end == jnp.asarray(end)).all(-1))[of]
            assert hits.mean() == pytest.approx(share, abs=0.02)


def test_a_fresh_denoiser_is_the_best_linear_one():
    params = TOY.init(jax.random.key(3))
    loss = float(
        jax.jit(TOY.loss)(params, jax.random.key(4), TOY.batch(jax.random.key(5), 2000))
    )
    assert loss == pytest.approx(1.0, abs=0.1)
    start = jax.random.normal(jax.random.key(6), (4, 2))
    # At t = 0 nothing is known of the displacement; near T, all.
    np.testing.assert_array_equal(TOY.apply(params, start, start, jnp.zeros(4)), start)
    x = start + 1.0
    np.testing.assert_allclose(TOY.apply(params, x, start, jnp.full(4, 1 - 1e-6)), x, atol=1e-4)


def trained(toy, steps, size, rate):
    """EMA of the parameters after Adam with a cosine."""
    key = jax.random.key(7)
    optimiser = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def step(state, i):
        params, memory, ema = state
        own = jax.random.fold_in(key, i)
        batch = toy.batch(jax.random.fold_in(own, 0), size)
        grad = jax.grad(toy.loss)(params, jax.random.fold_in(own, 1), batch)
        updates, memory = optimiser.update(grad, memory)
        params = optax.apply_updates(params, updates)
        decay = jnp.minimum(0.999, (1 + i) / (10 + i))
        ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, params)
        return (params, memory, ema), None

    params = jax.jit(toy.init)(jax.random.key(8))
    state = params, optimiser.init(params), params
    return jax.jit(lambda state: jax.lax.scan(step, state, jnp.arange(steps))[0])(state)[2]


def test_a_short_training_explains_most_of_it():
    params = trained(TOY, 800, 128, 1e-2)
    options = dict(starts=4, samples=300, pairs=4000, steps=(10,))
    fresh = TOY.evaluate(FRESH, jax.random.key(10), **options)
    found = TOY.evaluate(params, jax.random.key(10), **options)
    expected = {f"{what}_{t}" for what in ("mse", "floor", "excess") for t in toys.TIMES}
    assert set(found) == expected | {"w2_10", "w2_floor", "cross"}
    for t in toys.TIMES:
        assert found[f"floor_{t}"] == fresh[f"floor_{t}"]
        assert found[f"excess_{t}"] < 0.25 * fresh[f"excess_{t}"]
        # Excess is the mean square error less the floor, without the noise of the ends.
        gap = found[f"mse_{t}"] / found[f"floor_{t}"] - 1
        assert gap == pytest.approx(found[f"excess_{t}"], abs=0.15)
    assert found["w2_10"] < 0.4 * fresh["w2_10"]


@pytest.mark.slow
def test_the_learned_bars():
    """Section 11.3: errors within 3 % of the floor, sliced distance, cross moment."""
    toy = toys.toy(BROWNIAN)
    params = trained(toy, 6000, 512, 2e-3)
    found = toy.evaluate(params, jax.random.key(11), starts=16)
    for t in toys.TIMES:
        assert found[f"excess_{t}"] < 0.03
    # Its bar of 0.22 is above a floor of 0.134, one draw of four starts.
    assert found["w2_50"] - found["w2_floor"] < 0.22 - 0.134
    assert found["cross"] < 0.05
