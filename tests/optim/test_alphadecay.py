"""AlphaDecay against an independent NumPy trajectory, its Optax contract and its edges."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optim.alphadecay import (
    STATIC,
    alphadecay,
    diagnostics,
    refresher,
)
from optim.modules import Dims, select

WIDE = dict(s1=0.67, s2=5.0, every=5, min_eigs=10)


def modules(name, leaf):
    return Dims() if name.split(".")[-1] in ("q", "up") else None


def network(dtype=np.float64, seed=0):
    """Two layers, stacked: q 16 x 16, up 16 x 40; a norm and an embedding beside them."""
    rng = np.random.default_rng(seed)
    make = lambda *shape: (rng.normal(size=shape) * rng.pareto(4, shape[-1])).astype(dtype)
    return {
        "blocks": {
            "norm": make(2, 16),
            "q": make(2, 16, 16),
            "up": make(2, 16, 40),
        },
        "embed": make(30, 16),
    }


def unstacked(params):
    b = params["blocks"]
    layers = {f"layer{i}": {k: b[k][i] for k in b} for i in range(2)}
    return layers | {"embed": params["embed"]}


def alpha_of(w):
    """The exponent by a singular value decomposition, in float64."""
    values = np.linalg.svd(w, compute_uv=False)[::-1] ** 2
    r = len(values)
    i = r // 2
    return 1 + (r - i) / np.log(values[i:] / values[i]).sum()


def reference(params, gradients, *, coupled, lr, eta, s1, s2, every, offset=0):
    """Adam or AdamW with AlphaDecay, matrix by matrix, in NumPy."""
    flat = unstacked(params)
    w = {(a, b): v.copy() for a, leaf in flat.items() for b, v in _items(leaf)}
    m = {k: np.zeros_like(v) for k, v in w.items()}
    v = {k: np.zeros_like(v) for k, v in w.items()}
    selected = [k for k in w if k[1] in ("q", "up")]
    ratio = {}
    for t, given in enumerate(gradients):
        g = {(a, b): x for a, leaf in unstacked(given).items() for b, x in _items(leaf)}
        if t == 0 or (t + offset) % every == 0:
            alpha = {k: alpha_of(w[k]) for k in selected}
            low, high = min(alpha.values()), max(alpha.values())
            ratio = {k: (a - low) / (high - low) * (s2 - s1) + s1 for k, a in alpha.items()}
        for k in w:
            decay = eta * ratio.get(k, 1.0) * w[k]
            h = g[k] + decay if coupled else g[k]
            m[k] = 0.9 * m[k] + 0.1 * h
            v[k] = 0.999 * v[k] + 0.001 * h**2
            step = m[k] / (1 - 0.9 ** (t + 1))
            step = step / (np.sqrt(v[k] / (1 - 0.999 ** (t + 1))) + 1e-8)
            w[k] = w[k] - lr * (step if coupled else step + decay)
    return w


def _items(leaf):
    return leaf.items() if isinstance(leaf, dict) else [("", leaf)]


CASES = [*itertools.product((False, True), (True, False), (0, 1), ("svd",))]


@pytest.mark.parametrize(
    ("coupled", "stacked", "offset", "method"), [*CASES, (False, True, 0, "auto")]
)
def test_twelve_steps_are_those_of_numpy(coupled, stacked, offset, method):
    params = network()
    gradients = [network(seed=s) for s in range(1, 13)]
    lr, eta = 0.02, 0.3
    with jax.enable_x64(True):
        decay = alphadecay(eta, modules=modules, offset=offset, method=method, **WIDE)
        adam = optax.scale_by_adam(eps=1e-8)
        parts = (decay, adam) if coupled else (adam, decay)
        tx = optax.chain(*parts, optax.scale(-lr))
        shape = (lambda tree: tree) if stacked else unstacked
        w = jax.tree.map(jnp.asarray, shape(params))
        state = tx.init(w)
        step = jax.jit(lambda g, s, w: tx.update(g, s, w))
        for g in gradients:
            updates, state = step(jax.tree.map(jnp.asarray, shape(g)), state, w)
            w = optax.apply_updates(w, updates)
        got = jax.device_get(unstacked(w) if stacked else w)
    arguments = dict(coupled=coupled, lr=lr, eta=eta, offset=offset)
    want = reference(params, gradients, s1=0.67, s2=5.0, every=5, **arguments)
    for (a, b), value in want.items():
        ours = got[a][b] if b else got[a]
        np.testing.assert_allclose(ours, value, rtol=0, atol=1e-12, err_msg=f"{a}.{b}")


@pytest.mark.parametrize("method", ["auto", "gram", "tridiagonal"])
def test_other_methods_give_the_same_in_float64(method):
    found = []
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, network(np.float64))
        for m in ("svd", method):
            tx = alphadecay(0.1, modules=modules, method=m, **WIDE)
            found.append(jax.device_get(tx.update(params, tx.init(params), params)))
    assert found[1][1].alpha["blocks.q"].dtype == np.float64
    chex.assert_trees_all_close(*found, rtol=1e-8)


@pytest.mark.parametrize(
    ("dtype", "coupled"), [(jnp.float32, False), (jnp.bfloat16, False), (jnp.float32, True)]
)
def test_equal_ends_are_uniform_decay_bit_for_bit(dtype, coupled):
    params = jax.tree.map(lambda a: jnp.asarray(a, dtype), network(np.float32))
    same = alphadecay(0.1, modules=modules, s1=1.0, s2=1.0, every=2, min_eigs=10)
    plain = optax.add_decayed_weights(0.1)
    adam = optax.scale_by_adam()
    order = (lambda tx: (tx, adam)) if coupled else (lambda tx: (adam, tx))
    ours, theirs = (optax.chain(*order(tx), optax.scale(-1e-2)) for tx in (same, plain))
    found = []
    for tx in (ours, theirs):
        w, state, update = params, tx.init(params), jax.jit(tx.update)
        for s in range(5):
            g = jax.tree.map(lambda a: jnp.asarray(a, dtype), network(np.float32, seed=s))
            updates, state = update(g, state, w)
            w = optax.apply_updates(w, updates)
        found.append(w)
    chex.assert_trees_all_equal(*found)


def test_optax_contract():
    params = jax.tree.map(jnp.asarray, network(np.float32))
    tx = alphadecay(0.1, modules=modules, **WIDE)
    state = tx.init(params)
    chex.assert_trees_all_equal(state, jax.jit(tx.init)(params))
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(tx.update, n=1), donate_argnums=1)
    for _ in range(7):
        before = jax.tree.map(lambda a: (a.shape, a.dtype), state)
        updates, state = update(params, state, params)
        assert before == jax.tree.map(lambda a: (a.shape, a.dtype), state)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    assert int(state.count) == 7
    with pytest.raises(ValueError, match="params"):
        tx.update(params, state, None)
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    updates, _ = tx.update(narrow, tx.init(narrow), narrow)
    chex.assert_trees_all_equal_dtypes(updates, narrow)
    for wrapped in (
        optax.named_chain(("decay", tx)),
        optax.masked(tx, jax.tree.map(lambda _: True, params)),
        optax.MultiSteps(tx, 2),
        optax.inject_hyperparams(alphadecay, static_args=STATIC)(0.1, modules=modules, **WIDE),
    ):
        s = wrapped.init(params)
        for _ in range(3):
            updates, s = jax.jit(wrapped.update)(params, s, params)
        chex.assert_tree_all_finite(updates)


def test_the_step_count_of_multisteps_is_that_of_real_steps():
    params = jax.tree.map(jnp.asarray, network(np.float32))
    tx = optax.MultiSteps(alphadecay(0.1, modules=modules, **WIDE), 3)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(9):
        _, state = update(params, state, params)
    assert int(state.inner_opt_state.count) == 3


def test_what_is_no_array_or_no_float_passes_through():
    params = jax.tree.map(jnp.asarray, network(np.float32)) | {
        "none": None,
        "masked": optax.MaskedNode(),
        "steps": jnp.arange(3),
    }
    tx = alphadecay(0.1, modules=modules, **WIDE)
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["none"] is None
    np.testing.assert_array_equal(updates["steps"], jnp.arange(3))


def test_rest_is_decayed_at_the_base_or_not_at_all():
    params = jax.tree.map(jnp.asarray, network(np.float32))
    zero = jax.tree.map(jnp.zeros_like, params)
    for rest, factors in (
        ("base", (0.1, 0.1)),
        ("none", (0, 0)),
        (lambda path: path == "embed", (0.1, 0)),
    ):
        tx = alphadecay(0.1, modules=modules, decay_rest=rest, **WIDE)
        updates, _ = tx.update(zero, tx.init(params), params)
        for factor, leaf in zip(factors, ("embed", "norm"), strict=True):
            got, w = (t.get(leaf, t["blocks"].get(leaf)) for t in (updates, params))
            np.testing.assert_allclose(got, factor * w, rtol=1e-6)


def test_external_refresh_is_the_inline_one():
    params = jax.tree.map(jnp.asarray, network(np.float32))
    inline = alphadecay(0.1, modules=modules, **WIDE)
    outside = alphadecay(0.1, modules=modules, refresh="external", **WIDE)
    refresh = jax.jit(refresher(modules=modules, **WIDE))
    a, b = (optax.chain(tx, optax.scale(-0.1)) for tx in (inline, outside))
    wa = wb = params
    sa, sb = a.init(params), b.init(params)
    step_a, step_b = jax.jit(a.update), jax.jit(b.update)
    for t in range(11):
        if t % 5 == 0:
            sb = refresh(sb, wb)
        ua, sa = step_a(params, sa, wa)
        ub, sb = step_b(params, sb, wb)
        wa, wb = optax.apply_updates(wa, ua), optax.apply_updates(wb, ub)
    chex.assert_trees_all_close(wa, wb, rtol=1e-6)


def test_refreshes_happen_when_they_should():
    rng = np.random.default_rng(0)
    for offset, want in ((0, [0, 5, 10]), (1, [0, 4, 9])):
        tx = alphadecay(0.1, modules=modules, offset=offset, **WIDE)
        params = jax.tree.map(jnp.asarray, network(np.float32))
        state, seen, update = tx.init(params), [], jax.jit(tx.update)
        for t in range(12):
            params = jax.tree.map(
                lambda p: p + jnp.asarray(rng.normal(size=p.shape), p.dtype), params
            )
            _, new = update(params, state, params)
            if not np.array_equal(new.alpha["blocks.q"], state.alpha["blocks.q"]):
                seen.append(t)
            state = new
        assert seen == want


def test_weights_that_are_no_numbers_leave_the_ratios():
    params = jax.tree.map(jnp.asarray, network(np.float32))
    tx = alphadecay(0.1, modules=modules, **WIDE | dict(every=1))
    _, state = tx.update(params, tx.init(params), params)
    bad = jax.tree.map(lambda p: p, params)
    bad["blocks"]["q"] = bad["blocks"]["q"].at[0, 0, 0].set(jnp.nan)
    _, after = tx.update(params, state, bad)
    chex.assert_trees_all_equal(after.ratio, state.ratio)
    chex.assert_trees_all_equal(after.alpha, state.alpha)


def test_modules_without_an_exponent_take_ratio_one():
    params = jax.tree.map(jnp.asarray, network(np.float32))
    params["blocks"]["q"] = params["blocks"]["q"].at[0].set(0.0).at[1].set(jnp.eye(16))
    tx = alphadecay(0.1, modules=modules, **WIDE)
    updates, state = tx.update(params, tx.init(params), params)
    np.testing.assert_array_equal(state.ratio["blocks.q"], 1.0)
    assert np.isnan(state.alpha["blocks.q"]).all()
    np.testing.assert_allclose(np.sort(state.ratio["blocks.up"]), [0.67, 5.0], rtol=1e-6)
    chex.assert_tree_all_finite(updates)
    found = diagnostics(state, select(params, modules), 5)
    assert int(found["alpha_undefined"]) == 2
    chex.assert_tree_all_finite(found)


def test_no_decay_needs_no_decomposition():
    params = jax.tree.map(jnp.asarray, network(np.float32))
    for eta, decomposed in ((0.1, True), (0.0, False), (np.float32(0), False)):
        tx = alphadecay(eta, modules=modules, **WIDE)
        text = jax.jit(tx.update).lower(params, tx.init(params), params).as_text()
        assert ("lapack" in text) == decomposed
    updates, _ = tx.update(params, tx.init(params), params)
    chex.assert_trees_all_equal(updates, params)


def test_a_schedule_is_multiplied_by_the_ratios():
    params = jax.tree.map(jnp.asarray, network(np.float32))
    zero = jax.tree.map(jnp.zeros_like, params)
    tx = alphadecay(lambda count: 0.1 / (1 + count), modules=modules, **WIDE)
    first, state = tx.update(zero, tx.init(params), params)
    second, _ = tx.update(zero, state, params)
    chex.assert_trees_all_close(first, jax.tree.map(lambda u: 2 * u, second), rtol=1e-6)


def test_eight_devices_are_one():
    params = jax.tree.map(jnp.asarray, network(np.float32))
    tx = alphadecay(0.1, modules=modules, **WIDE)
    one, after = jax.jit(tx.update)(params, tx.init(params), params)
    mesh = jax.make_mesh((4, 2), ("data", "model"), (AxisType.Auto,) * 2)
    placed = jax.tree.map(
        lambda p: jax.device_put(p, NamedSharding(mesh, P(*[None] * (p.ndim - 1), "model"))),
        params,
    )
    with jax.set_mesh(mesh):
        many, there = jax.jit(tx.update)(placed, tx.init(placed), placed)
    chex.assert_trees_all_close(jax.device_get(many), jax.device_get(one), rtol=1e-5)
    chex.assert_trees_all_close(
        jax.device_get(there.alpha), jax.device_get(after.alpha), rtol=1e-5
    )


def test_modules_below_the_least_size_keep_the_base_decay():
    params = jax.tree.map(jnp.asarray, network(np.float32)) | {"q": jnp.ones((4, 4))}
    zero = jax.tree.map(jnp.zeros_like, params)
    tx = alphadecay(0.1, modules=modules, decay_rest="none", **WIDE)
    updates, state = tx.update(zero, tx.init(params), params)
    assert "q" not in state.ratio
    np.testing.assert_allclose(updates["q"], 0.1)
    np.testing.assert_array_equal(updates["embed"], 0)
