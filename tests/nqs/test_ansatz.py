"""Wave functions against NumPy, finite differences and the paper's sizes."""

from itertools import permutations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from common import config as configs
from nqs import ansatz as wave
from nqs import cost
from nqs.determinants import log_det_sum, occupied
from tests.nqs import brute
from tests.nqs.clusters import config

NAMES = ["transformer", "nnb", "tensor", "slater"]
SITES, UP, DOWN = 4, 2, 1
SIZES = dict(d_model=8, n_heads=2, n_layers=2, n_det=3, mlp_hidden=5, mlp_layers=2)
X = brute.states(SITES, UP, DOWN)


def build(name, dtype="float64", determinants="float64", **changes):
    fields = dict(config().ansatz) | SIZES | changes | dict(name=name)
    kinds = dict(dtype=dtype, determinants=determinants)
    return wave.build(n_sites=SITES, n_electrons=UP + DOWN, **fields, **kinds)


def parameters(psi, seed=0):
    with jax.enable_x64(True):
        return jax.jit(psi.init)(jax.random.key(seed))


def evaluate(function, params, x=X):
    """`function` of each configuration, as NumPy float64."""
    with jax.enable_x64(True):
        return jax.device_get(jax.jit(jax.vmap(function, (None, 0)))(params, jnp.asarray(x)))


def softmax(a):
    e = np.exp(a - a.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def transformer(params, x, heads):
    """Equations 1 to 6 of section 2.1, one configuration, loop by loop.

    Returns:
      M [K, 2N, N_e] and the attention weights [L, heads, N, N].
    """
    p = jax.tree.map(np.asarray, params)
    n, (_, d) = len(x) // 2, p["embed"].shape
    h = np.array([p["embed"][x[i] + 2 * x[n + i]] + p["place"][i] for i in range(n)])
    seen, width = [], d // heads
    for layer in range(len(p["blocks"]["qkv"]["kernel"])):
        block = jax.tree.map(lambda a, layer=layer: a[layer], p["blocks"])
        q, k, v = np.split(h @ block["qkv"]["kernel"], 3, axis=1)
        mixed, maps = np.zeros((n, d)), []
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            maps.append(softmax(q[:, part] @ k[:, part].T / np.sqrt(width)))
            mixed[:, part] = maps[-1] @ v[:, part]
        y = h + mixed @ block["out"]["kernel"]
        inner = y @ block["mlp"]["kernel"] + block["mlp"]["bias"]
        h = y + inner / (1 + np.exp(-inner))
        seen.append(maps)
    rows = h @ p["head"]["kernel"] + p["head"]["bias"]
    electrons = int(x.sum())
    rows = rows.reshape(n, 2, -1, electrons)  # site, spin, determinant, column
    m = np.array([np.concatenate([rows[:, 0, k], rows[:, 1, k]]) for k in range(rows.shape[2])])
    return m, np.array(seen)


def amplitude(m, x):
    return sum(np.linalg.det(each[np.flatnonzero(x)]) for each in m)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("determinants", ["float32", "float64"])
def test_shapes_and_dtypes(name, dtype, determinants):
    psi = build(name, dtype, determinants)
    with jax.enable_x64(True):
        params = jax.eval_shape(psi.init, jax.random.key(0))
        x = jax.ShapeDtypeStruct((2 * SITES,), jnp.int8)
        m = jax.eval_shape(psi.orbitals, params, x)
        sign, log = jax.eval_shape(psi.log_psi, params, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    assert (m.shape, m.dtype) == ((3, 2 * SITES, UP + DOWN), jnp.dtype(dtype))
    assert (sign.shape, log.shape) == ((), ())
    assert sign.dtype == log.dtype == jnp.dtype(determinants)


@pytest.mark.parametrize(("n_layers", "n_heads"), [(0, 1), (1, 1), (3, 4)])
def test_the_transformer_is_that_of_the_paper(n_layers, n_heads):
    psi = build("transformer", n_layers=n_layers, n_heads=n_heads)
    params = parameters(psi)
    by_hand = [transformer(params, x, n_heads) for x in X]
    m = evaluate(psi.orbitals, params)
    np.testing.assert_allclose(m, [a for a, _ in by_hand], rtol=1e-10, atol=1e-10)
    sign, log = evaluate(psi.log_psi, params)
    want = [amplitude(a, x) for (a, _), x in zip(by_hand, X, strict=True)]
    np.testing.assert_array_equal(sign, np.sign(want))
    np.testing.assert_allclose(log, np.log(np.abs(want)), rtol=1e-10, atol=1e-10)


def test_attention_weights_are_those_of_the_paper_and_sum_to_one():
    psi = build("transformer", n_layers=3)
    params = parameters(psi, 1)
    weights = evaluate(psi.attention, params)
    chex.assert_shape(weights, (len(X), 3, 2, SITES, SITES))
    want = [transformer(params, x, 2)[1] for x in X]
    np.testing.assert_allclose(weights, want, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-12)
    assert (weights >= 0).all()


def test_only_a_transformer_with_layers_has_attention():
    assert build("transformer", n_layers=0).attention is None
    assert all(build(name).attention is None for name in NAMES[1:])


@pytest.mark.parametrize(
    ("sites", "electrons", "sizes", "millions"),
    [
        (64, 56, dict(d_model=256, n_layers=4, n_det=4, n_heads=4), 1.44),
        (256, 224, dict(d_model=256, n_layers=4, n_det=4, n_heads=4), 1.84),
        (6, 4, dict(d_model=8, n_layers=1, n_det=2, n_heads=2), None),
        (6, 4, dict(d_model=12, n_layers=0, n_det=1, n_heads=3), None),
    ],
)
def test_number_of_parameters(sites, electrons, sizes, millions):
    c = config(ansatz=dict(name="transformer", **sizes))
    psi = wave.build(n_sites=sites, n_electrons=electrons, **c.ansatz)
    tree = jax.eval_shape(psi.init, jax.random.key(0))
    real = sum(leaf.size for leaf in jax.tree.leaves(tree))
    d, layers, k = sizes["d_model"], sizes["n_layers"], sizes["n_det"]
    formula = 4 * d + sites * d + layers * (5 * d**2 + d) + (d + 1) * 2 * k * electrons
    assert real == formula == cost.parameters(c.ansatz, sites, electrons)
    assert millions is None or round(real / 1e6, 2) == millions


def test_the_papers_wave_function_has_a_shape():
    c = configs.load("configs/nqs.py:paper")
    n, electrons = c.lattice.Lx * c.lattice.Ly, c.model.n_up + c.model.n_dn
    psi = wave.build(n_sites=n, n_electrons=electrons, **c.ansatz)
    x = jax.ShapeDtypeStruct((2 * n,), jnp.int8)
    with jax.enable_x64(True):
        params = jax.eval_shape(psi.init, jax.random.key(0))
        m = jax.eval_shape(psi.orbitals, params, x)
        score = jax.eval_shape(jax.grad(lambda p, x: psi.log_psi(p, x)[1]), params, x)
    assert m.shape == (c.ansatz.n_det, 2 * n, electrons)
    chex.assert_trees_all_equal_shapes_and_dtypes(score, params)


def test_slater_and_tensor_are_determinants_of_their_tables():
    slater, tensor = build("slater"), build("tensor")
    fixed, table = parameters(slater), parameters(tensor)
    assert jax.tree.leaves(fixed)[0].shape == (3, 2 * SITES, UP + DOWN)
    want = [amplitude(np.asarray(fixed["orbitals"]), x) for x in X]
    sign, log = evaluate(slater.log_psi, fixed)
    np.testing.assert_allclose(sign * np.exp(log), want, rtol=1e-12)
    m = evaluate(tensor.orbitals, table)
    for x, rows in zip(X, m, strict=True):
        for other, others in zip(X, m, strict=True):
            for i in range(SITES):
                same = (x[[i, SITES + i]] == other[[i, SITES + i]]).all()
                both = rows[:, [i, SITES + i]] == others[:, [i, SITES + i]]
                assert both.all() if same else not both.any()


@pytest.mark.parametrize("name", NAMES)
def test_log_psi_is_the_sum_of_determinants_of_the_occupied_rows(name):
    psi = build(name)
    params = parameters(psi, 2)
    sign, log = evaluate(psi.log_psi, params)
    want = [amplitude(m, x) for m, x in zip(evaluate(psi.orbitals, params), X, strict=True)]
    np.testing.assert_allclose(sign * np.exp(log), want, rtol=1e-10)


def test_exchanging_rows_changes_the_sign_as_exchanging_electrons_does():
    psi = build("slater")
    m = np.asarray(parameters(psi)["orbitals"])
    x = X[5]
    rows = np.flatnonzero(x)
    orders = list(permutations(range(len(rows))))
    exchanged = np.stack([m] * len(orders))
    for each, order in zip(exchanged, orders, strict=True):
        each[:, rows] = m[:, rows[list(order)]]
    with jax.enable_x64(True):
        many = jax.jit(jax.vmap(lambda m: psi.log_psi({"orbitals": m}, jnp.asarray(x))))
        sign, log = jax.device_get(many(jnp.asarray(exchanged)))
    inversions = [sum(a > b for i, a in enumerate(o) for b in o[i + 1 :]) for o in orders]
    assert orders[0] == (0, 1, 2)
    np.testing.assert_array_equal(sign, sign[0] * (-1.0) ** np.array(inversions))
    np.testing.assert_allclose(log, log[0], atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_differences(name):
    psi = build(name)
    params = parameters(psi, 3)
    with jax.enable_x64(True):
        flat, unravel = ravel_pytree(params)
        log = lambda flat, x: psi.log_psi(unravel(flat), x)[1]
        gradient = jax.jit(jax.grad(log))
        moved = jax.jit(jax.vmap(lambda step, x: log(flat + step, x), (0, None)))
        step = 1e-3 * jnp.eye(flat.size)
        for x in jnp.asarray(X[[0, 7]]):
            got = gradient(flat, x)
            near = (moved(step, x) - moved(-step, x)) / 2e-3
            far = (moved(2 * step, x) - moved(-2 * step, x)) / 4e-3
            want = (4 * near - far) / 3  # Of fourth order.
            scale = np.abs(got).max()
            np.testing.assert_allclose(got / scale, want / scale, rtol=0, atol=1e-7)
    assert scale > 0


@pytest.mark.parametrize("n_electrons", [0, 1, 3, 8])
def test_occupied_modes_ascend(n_electrons):
    rng = np.random.default_rng(n_electrons)
    x = rng.permutation([1] * n_electrons + [0] * (8 - n_electrons)).astype(np.int8)
    got = occupied(jnp.asarray(x), n_electrons)
    np.testing.assert_array_equal(got, np.flatnonzero(x))


ONE, TURNED = np.eye(2), np.eye(2)[::-1]  # Determinants 1 and -1.
ZERO = np.ones((2, 2))


@pytest.mark.parametrize(
    ("matrices", "value"),
    [
        ([ZERO], 0),
        ([ZERO, 0 * ZERO], 0),
        ([ONE, TURNED], 0),
        ([ONE, TURNED, ZERO], 0),
        ([ONE, ZERO], 1),
        ([TURNED, 0 * ZERO], -1),
        ([ONE, 2 * TURNED], -3),
        ([ONE, ONE, TURNED], 1),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sums_with_vanishing_and_cancelling_determinants(matrices, value, dtype):
    with jax.enable_x64(True):
        found = jax.jit(log_det_sum)(jnp.asarray(np.array(matrices, dtype)))
    sign, log = jax.device_get(found)
    assert sign == np.sign(value)
    if value:
        assert float(log) == pytest.approx(np.log(abs(value)), abs=1e-6)
    else:
        assert log == -np.inf


@pytest.mark.parametrize("power", [-900, -300, 0, 300, 900])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_huge_and_tiny_determinants_do_not_over_or_underflow(power, dtype):
    # Ten rows scaled by 2^(power / 10) scale the determinant by 2^power, exactly.
    m = np.random.default_rng(0).normal(size=(3, 10, 10))
    scaled = (m * 2.0 ** (power // 10)).astype(dtype)
    total = sum(np.linalg.det(scaled.astype(float) / 2.0 ** (power // 10)))
    with jax.enable_x64(True):
        sign, log = jax.device_get(jax.jit(log_det_sum)(jnp.asarray(scaled)))
    assert sign == np.sign(total)
    want = np.log(abs(total)) + power * np.log(2)
    assert float(log) == pytest.approx(want, rel={4: 1e-5, 8: 1e-12}[sign.dtype.itemsize])
