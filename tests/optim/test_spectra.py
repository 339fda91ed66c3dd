"""Spectra of modules against NumPy in float64, whatever their layout, packing and placement."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from common.errors import UserError
from optim import scores
from optim.exponents import hill_alpha, tail_alpha, tail_start
from optim.modules import Dims, Leaf, matrices, select, spread
from optim.spectra import eigenvalues, esd

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def same_numbers_in_any_order():
    RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state


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
    # More than one matrix for each device.
    params["a"] = jnp.asarray(RNG.normal(size=(9, 64, 64)), jnp.float32)
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


def compiled(method, params, mesh, spec):
    leaves = select(params, lambda n, _: Dims())
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(params[a.name], NamedSharding(mesh, spec(params[a.name])))
            for a in leaves
        ]
        run = jax.jit(lambda w: eigenvalues(leaves, w, method))
        return run.lower(placed).compile().as_text().splitlines()


def replicated(w):
    return P()


def test_each_device_tridiagonalises_its_share():
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    lines = compiled("tridiagonal", network(), mesh, replicated)
    calls = [line for line in lines if "custom-call" in line and "sytrd" in line]
    assert calls
    # Six modules of rank 64 and one of 80, over eight devices: one each.
    assert all("f32[1,64,64]" in line or "f32[1,80,80]" in line for line in calls)


def test_each_device_takes_singular_values_of_its_share_of_unstacked_leaves():
    shapes = {f"{i:02}": (64, 96) if i % 2 else (96, 64) for i in range(12)}
    params = {n: jnp.asarray(RNG.normal(size=s), jnp.float32) for n, s in shapes.items()}
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    lines = compiled("svd", params, mesh, replicated)
    # Twelve modules over eight devices: two each, one after the other.
    (call,) = [line for line in lines if "custom-call" in line and "gesdd" in line]
    assert "f32[1,64,96]" in call or "f32[1,96,64]" in call
    (loop,) = [line for line in lines if re.search(r" while\(", line)]
    assert re.search(r'"known_trip_count":{"n":"2"}', loop)


def rows(w):
    return P(*[None] * (w.ndim - 2), "data", None)


@pytest.mark.parametrize("shape", [(8, 1), (4, 2)])
def test_weights_with_sharded_rows_are_not_gathered(shape):
    # Of both sides of the fallback; stacked and not; 100 is no multiple of eight.
    mesh = jax.make_mesh(shape, ("data", "model"), (AxisType.Auto,) * 2)
    params = {n: w for n, w in network().items() if n != "c"}
    params |= dict(c=jnp.asarray(RNG.normal(size=(2, 64, 100)), jnp.float32))
    lines = compiled("auto", params, mesh, rows)
    found = [line for line in lines if re.search(r" all-gather(-start)?\(", line)]
    sizes = [re.findall(r"f32\[([\d,]+)\]", line) for line in found]
    gathered = [np.prod([int(n) for n in s.split(",")]) for each in sizes for s in each]
    assert gathered
    # Eigenvalues alone: at most eight rows of 80.
    assert max(gathered) <= 8 * 80


@pytest.mark.parametrize("names", [None, {"data"}])
@pytest.mark.parametrize("method", ["auto", "svd"])
def test_inside_shard_map_each_device_has_its_own(method, names):
    w = jnp.asarray(RNG.normal(size=(4, 64, 70)), jnp.float32)
    mesh = jax.make_mesh((4, 2), ("data", "model"), (AxisType.Auto,) * 2)
    given = {} if names is None else dict(axis_names=names)
    one = lambda w: esd(w, method)
    split = jax.shard_map(one, mesh=mesh, in_specs=P("data"), out_specs=P("data"), **given)
    np.testing.assert_allclose(jax.jit(split)(w), esd(w, method), rtol=1e-4, atol=1e-3)


def test_a_mesh_of_explicit_axes_does_as_well():
    w = jnp.asarray(RNG.normal(size=(3, 64, 72)), jnp.float32)
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Explicit,))
    with jax.set_mesh(mesh):
        placed = jax.device_put(w, NamedSharding(mesh, P(None, "data", None)))
        got = jax.device_get(jax.jit(esd)(placed))
    want = exact(w)  # Rounding of a Gram matrix is relative to its largest eigenvalue.
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6 * want.max())


@pytest.mark.parametrize("method", ["auto", "svd"])
def test_modules_of_equal_rank_may_differ_in_type(method):
    rng = np.random.default_rng(7)
    with jax.enable_x64(True):
        params = dict(
            a=jnp.asarray(rng.normal(size=(2, 64, 70)), jnp.float32),
            b=jnp.asarray(rng.normal(size=(64, 70)), jnp.float64),
            c=jnp.asarray(rng.normal(size=(70, 64)), jnp.bfloat16),
        )
        leaves = select(params, lambda n, _: Dims())
        found = eigenvalues(leaves, [params[leaf.name] for leaf in leaves], method)
        assert [v.dtype for v in found] == [jnp.float32, jnp.float64, jnp.float32]
        # Rounding of a Gram matrix is relative to its largest eigenvalue.
        for w, v, bar in zip(params.values(), found, (2e-6, 1e-14, 2e-6), strict=True):
            np.testing.assert_allclose(v, exact(w), rtol=bar, atol=bar * exact(w).max())


@pytest.mark.parametrize("fit", ["goodness_of_fit", "fix_finger"])
def test_fits_that_read_all_of_a_spectrum_are_given_all_of_it(fit):
    from tests.optim.test_exponents import brute_clauset

    w = np.random.default_rng(5).normal(size=(2, 512, 512)).astype(np.float32)
    want = [brute_clauset(values, fit) for values in exact(w)]
    np.testing.assert_allclose(score(w, fit=fit), want, rtol=1e-4)


def test_a_tail_that_begins_below_the_median_is_held():
    from tests.optim.test_exponents import pareto

    r, tail = 256, 0.9
    left, right = (np.linalg.qr(RNG.normal(size=(r, r)))[0] for _ in range(2))
    w = jnp.asarray(left * np.sqrt(pareto(r, 1.5)) @ right, jnp.float32)
    of = lambda values: float(hill_alpha(jnp.asarray(values, jnp.float32), tail))
    want = of(exact(w))
    first = tail_start(r, tail)
    assert of(esd(w, exact=first)) == pytest.approx(want, rel=1e-5)
    whole = float(tail_alpha(esd(w, first=first), esd(w, first=first)[0]))
    assert whole == pytest.approx(want, rel=1e-5)
    assert score(w[None], tail=tail)[0] == pytest.approx(want, rel=1e-5)
    # What the default vouches for is the upper half, and Gram matrices hold that.
    np.testing.assert_array_equal(esd(w), esd(w, "tridiagonal"))
    np.testing.assert_array_equal(esd(w, exact=first), esd(w, "svd"))


def score(w, **given):
    """Scores of a stack of matrices, as `alphadecay` has them."""
    s = dict(score="alpha", fit="median", tail=0.5, reference="mle", method="auto")
    s = SimpleNamespace(**s | dict(shape_correction="none", slip=False) | given)
    leaves = select({"w": w}, lambda n, _: Dims())
    return np.asarray(scores.of_modules(s, leaves, [jnp.asarray(w)], [None])[0])


@pytest.mark.parametrize("method", ["auto", "svd"])
@pytest.mark.parametrize("given", [{}, dict(score="stable_rank")], ids=["alpha", "stable_rank"])
def test_scores_survive_scales_whose_squares_do_not(method, given):
    w = jnp.asarray(RNG.normal(size=(1, 64, 80)), jnp.float32)
    want = score(w, method=method, **given)
    for factor in (1e-30, 1e-20, 1e20, 1e30):
        got = score(factor * w, method=method, **given)
        np.testing.assert_allclose(got, want, rtol=1e-5)
    values = esd(1e-25 * w, method, bounded=True)
    np.testing.assert_allclose(hill_alpha(values), hill_alpha(esd(w, method)), rtol=1e-5)
    # Eigenvalues themselves are what they are.
    np.testing.assert_array_equal(esd(1e-25 * w, method), 0)


def test_the_correction_of_a_median_fit_goes_with_no_other():
    w = jnp.ones((1, 64, 64))
    said = "shape_correction is 'mp', but must be none or subsample with fit fix_finger"
    with pytest.raises(UserError, match=said):
        score(w, fit="fix_finger", shape_correction="mp")


@pytest.mark.parametrize(("shape", "limit"), [((512, 512), 2.122), ((512, 1376), 2.999)])
def test_random_matrices_reach_the_limit_of_their_shape(shape, limit):
    w = jnp.asarray(np.random.default_rng(6).normal(size=(3, *shape)), jnp.float32)
    assert alpha(esd(w)).mean() == pytest.approx(limit, abs=0.03)


@pytest.mark.parametrize("method", ["gram", "tridiagonal", "auto"])
@pytest.mark.parametrize("strength", [0.0, 0.6, 1.2])
def test_gram_matrices_hold_spectra_of_ratios_below_1e4(method, strength):
    low = RNG.normal(size=(256, 16)) @ RNG.normal(size=(16, 256))
    w = np.asarray(RNG.normal(size=(256, 256)) + strength * low, np.float32)
    values = exact(w)
    assert values[-1] / np.median(values) < 1e4
    got = np.asarray(esd(jnp.asarray(w), method, first=128))
    want = 1 + 1 / np.log(values[128:] / values[128]).mean()
    assert float(tail_alpha(jnp.asarray(got), jnp.asarray(got[0]))) == pytest.approx(
        want, rel=1e-4
    )


@pytest.mark.parametrize(
    ("shape", "given", "said"),
    [
        ((64,), {}, r"config.optim.alphadecay.esd is \(64,\), but must be a shape"),
        ((0, 64, 64), {}, r"esd is \(0, 64, 64\), but must be a shape"),
        ((8, 9), dict(method="foo"), "alphadecay.method is 'foo', but must be one of auto, "),
        ((8, 9), dict(first=8), "alphadecay.first is 8, but must be an index from 0 to 7"),
        ((8, 9), dict(first=-1), "alphadecay.first is -1, but must be an index from 0 to 7"),
        ((8, 9), dict(exact=8), "alphadecay.exact is 8, but must be an index from 0 to 7"),
    ],
)
def test_bad_input_is_named(shape, given, said):
    with pytest.raises(UserError, match=said):
        esd(jnp.ones(shape), **given)


def test_leaves_are_plain_tuples():
    leaf = Leaf("w", 0, (4, 6), (0,), (1,), 1)
    assert (leaf.batch, leaf.modules, leaf.sides, leaf.rank) == ((), (), (4, 6), 4)
    assert leaf.names() == ["w"]
