"""Spectra of modules against NumPy in float64, whatever their layout, packing and placement."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from common.errors import UserError
from optim.exponents import hill_alpha
from optim.modules import Dims, Leaf, matrices, select, spread
from optim.spectra import eigenvalues, esd

RNG = np.random.default_rng(0)


def exact(w):
    """Squared singular values, ascending, in float64."""
    return np.linalg.svd(np.asarray(w, np.float64), compute_uv=False)[..., ::-1] ** 2


def alpha(values):
    return np.asarray(hill_alpha(jnp.asarray(values, jnp.float32)))


@pytest.mark.parametrize("method", ["auto", "gram", "tridiagonal", "svd"])
@pytest.mark.parametrize("shape", [(64, 64), (64, 150), (150, 64), (3, 70, 64), (2, 2, 60, 90)])
def test_spectra_are_squared_singular_values(method, shape):
    w = RNG.normal(size=shape)
    want = exact(w)
    got = np.asarray(esd(jnp.asarray(w, jnp.float32), method))
    assert got.shape == (*shape[:-2], min(shape[-2:]))
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-5 * want.max())
    np.testing.assert_allclose(alpha(got), alpha(want), rtol=1e-4)
    part = np.asarray(esd(jnp.asarray(w, jnp.float32), method, first=31))
    np.testing.assert_allclose(part, got[..., 31:], rtol=1e-4)


@pytest.mark.parametrize("shape", [(128, 128), (96, 256)])
def test_scale_transpose_and_rotation_change_no_exponent(shape):
    w = RNG.normal(size=shape) * RNG.uniform(1, 4, size=shape[1])
    turn = [np.linalg.qr(RNG.normal(size=(n, n)))[0] for n in shape]
    base = alpha(esd(jnp.asarray(w, jnp.float32)))
    for other in (1e-3 * w, 250.0 * w, w.T, turn[0] @ w @ turn[1]):
        got = alpha(esd(jnp.asarray(other, jnp.float32)))
        assert got == pytest.approx(base, rel=1e-5)


@pytest.mark.parametrize("a", [1.5, 2.0, 3.0, 5.0])
@pytest.mark.parametrize("r", [64, 256])
def test_matrices_with_pareto_spectra_have_the_closed_form(r, a):
    from tests.optim.test_exponents import constant, pareto

    left, right = (np.linalg.qr(RNG.normal(size=(r, r)))[0] for _ in range(2))
    w = jnp.asarray(left * np.sqrt(pareto(r, a)) @ right, jnp.float32)
    want = constant(r, "mle") * (a - 1)
    # Section 15; float32 Gram matrices lose a little of the heaviest tail.
    bars = dict(svd=1e-4, auto=1e-2) if a == 1.5 else dict(svd=1e-3, auto=1e-3)
    for method, bar in bars.items():
        got = float(alpha(esd(w, method)))
        assert got - 1 == pytest.approx(want, rel=bar), method


def test_a_tail_that_float32_loses_goes_by_singular_values():
    from tests.optim.test_exponents import pareto

    r = 128
    left, right = (np.linalg.qr(RNG.normal(size=(r, r)))[0] for _ in range(2))
    w = jnp.asarray(left * np.sqrt(pareto(r, 1.3)) @ right, jnp.float32)
    want = alpha(exact(w))
    assert alpha(esd(w, "svd")) == pytest.approx(want, rel=1e-3)
    assert alpha(esd(w, "auto")) == pytest.approx(want, rel=1e-3)
    assert alpha(esd(w, "gram")) != pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_weights_are_cast_first(dtype):
    w = jnp.asarray(300 * RNG.normal(size=(64, 80)), dtype)  # Squares overflow float16.
    got = esd(w)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, exact(w.astype(jnp.float32)), rtol=1e-4)


def test_edges():
    np.testing.assert_array_equal(esd(jnp.zeros((64, 64))), 0)
    assert np.isnan(esd(jnp.full((64, 64), jnp.nan))).all()
    both = esd(jnp.stack([jnp.eye(64), jnp.eye(64).at[0, 0].set(jnp.inf)]))
    np.testing.assert_allclose(both[0], 1, rtol=1e-5)
    assert np.isnan(both[1]).all()
    low = RNG.normal(size=(64, 20)) @ RNG.normal(size=(20, 64))
    values = np.asarray(esd(jnp.asarray(low, jnp.float32)))
    assert (values > 0).all()
    assert np.isfinite(alpha(values))


PARAMS = {
    "stack": {"q": np.zeros((3, 4, 6)), "norm": np.zeros((3, 4))},
    "heads": np.zeros((6, 2, 5)),
    "fused": np.zeros((4, 15)),
    "experts": np.zeros((2, 3, 4, 5)),
}
DIMS = {
    "stack.q": Dims(),
    "heads": Dims(0, (1, 2)),
    "fused": Dims(parts=3),
    "experts": Dims(reduction_axis=3, output_axis=2),
}


def test_leaves_are_cut_into_modules():
    found = {leaf.name: leaf for leaf in select(PARAMS, lambda name, _: DIMS.get(name))}
    assert {n: (a.modules, a.sides) for n, a in found.items()} == {
        "stack.q": ((3,), (4, 6)),
        "heads": ((), (6, 10)),
        "fused": ((3,), (4, 5)),
        "experts": ((2, 3), (5, 4)),
    }
    w = jnp.asarray(RNG.normal(size=(4, 15)))
    np.testing.assert_array_equal(matrices(found["fused"], w)[1], w[:, 5:10])
    w = jnp.asarray(RNG.normal(size=(2, 3, 4, 5)))
    np.testing.assert_array_equal(matrices(found["experts"], w)[1, 2], w[1, 2].T)
    w = jnp.asarray(RNG.normal(size=(6, 2, 5)))
    np.testing.assert_array_equal(matrices(found["heads"], w), w.reshape(6, 10))
    assert found["stack.q"].names() == ["stack.q[0]", "stack.q[1]", "stack.q[2]"]
    assert [a.kind for a in found.values()] == ["experts", "fused", "heads", "q"]


@pytest.mark.parametrize("name", DIMS)
def test_a_number_per_module_reaches_its_module(name):
    (leaf,) = select(PARAMS, lambda n, _: DIMS[name] if n == name else None)
    value = jnp.arange(1.0, 1 + np.prod(leaf.modules)).reshape(leaf.modules)
    w = jnp.ones(leaf.shape) * spread(leaf, value)
    got = matrices(leaf, w)
    want = np.broadcast_to(np.asarray(value)[..., None, None], got.shape)
    np.testing.assert_array_equal(got, want)


def test_a_tree_of_dimension_numbers_as_muon_has_them():
    import optax

    dims = {
        "stack": {"q": optax.contrib.MuonDimensionNumbers((1,), (2,)), "norm": None},
        "heads": None,
        "fused": None,
        "experts": None,
    }
    (leaf,) = select(PARAMS, dims)
    assert (leaf.name, leaf.modules, leaf.sides) == ("stack.q", (3,), (4, 6))


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        (lambda n, _: None, "No parameter is selected as a module; there are "),
        (lambda n, _: Dims() if n == "stack.norm" else None, None),
        (lambda n, _: Dims(0, 0) if n == "fused" else None, "fused of shape .* is no matrix"),
        (lambda n, _: Dims(0, 7) if n == "fused" else None, "fused of shape .* is no matrix"),
        (lambda n, _: Dims(parts=4) if n == "fused" else None, "15 outputs, which 4 do not"),
    ],
)
def test_what_is_no_module_is_named(modules, said):
    if said is None:  # Two axes, and the caller said so.
        assert select(PARAMS, modules)
        return
    with pytest.raises(UserError, match=said):
        select(PARAMS, modules)
    bias = {"b": np.zeros(4), "n": np.zeros((4, 4), int)}
    with pytest.raises(UserError, match="b of shape"):
        select(bias, lambda n, _: Dims() if n == "b" else None)
    with pytest.raises(UserError, match="n is int64, but must be real and floating"):
        select(bias, lambda n, _: Dims() if n == "n" else None)


SHAPES = {"a": (3, 64, 64), "b": (64, 100), "c": (2, 100, 64), "d": (80, 96)}


def network(seed=0):
    rng = np.random.default_rng(seed)
    return {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in SHAPES.items()}


@pytest.mark.parametrize("method", ["auto", "svd"])
def test_packed_and_split_over_devices_is_one_by_one(method):
    params = network()
    leaves = select(params, lambda n, _: Dims())
    weights = [params[leaf.name] for leaf in leaves]
    each = [esd(w, method) for w in weights]
    mesh = jax.make_mesh((4, 2), ("data", "model"), (AxisType.Auto,) * 2)
    placed = [
        jax.device_put(w, NamedSharding(mesh, P(*[None] * (w.ndim - 1), "model")))
        for w in weights
    ]
    run = jax.jit(lambda w: eigenvalues(leaves, w, method))
    with jax.set_mesh(mesh):
        many = jax.device_get(run(placed))
    for one, alone, together in zip(each, run(weights), many, strict=True):
        for other in (alone, together):
            np.testing.assert_allclose(other, one, atol=1e-6 * np.max(one))
            np.testing.assert_allclose(alpha(other), alpha(one), rtol=1e-5)


def test_each_device_decomposes_its_share_and_gathers_no_weights():
    params = network()
    leaves = select(params, lambda n, _: Dims())
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    placed = [jax.device_put(params[a.name], NamedSharding(mesh, P())) for a in leaves]
    with jax.set_mesh(mesh):
        compiled = jax.jit(lambda w: eigenvalues(leaves, w, "tridiagonal")).lower(placed)
        text = compiled.compile().as_text()
    calls = [line for line in text.splitlines() if "custom-call" in line and "sytrd" in line]
    assert calls
    # Six modules of rank 64 and one of 80, over eight devices: one each.
    assert all("f32[1,64,64]" in line or "f32[1,80,80]" in line for line in calls)


def test_leaves_are_plain_tuples():
    leaf = Leaf("w", 0, (4, 6), (0,), (1,), 1)
    assert (leaf.batch, leaf.modules, leaf.sides, leaf.rank) == ((), (), (4, 6), 4)
    assert leaf.names() == ["w"]
