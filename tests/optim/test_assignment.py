"""From scores to ratios: the formulas, what says nothing, and which layer a module is of."""

import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from optim.alphadecay import alphadecay, refresher
from optim.assignment import assign_decay
from optim.modules import Dims

HIGH, LOW = 2 / (1 + np.exp(-4.0)), 2 / (1 + np.exp(4.0))  # One deviation off the mean.


def test_assignments():
    score = jnp.array([1.5, 2.0, 4.0, jnp.nan])
    got = assign_decay(score, "linear", 0.67, 3.0)
    np.testing.assert_allclose(got, [0.67, 0.67 + 0.2 * 2.33, 3.0, 1.0], rtol=1e-6)
    root = np.sqrt([1.5, 2.0, 4.0])
    np.testing.assert_allclose(
        assign_decay(score, "sqrt"), [*(root / root.mean()), 1.0], rtol=1e-6
    )
    logs = np.log2([1.5, 2.0, 4.0])
    np.testing.assert_allclose(
        assign_decay(score, "log2"), [*(logs / logs.mean()), 1.0], rtol=1e-6
    )
    np.testing.assert_array_equal(assign_decay(score, "uniform"), 1.0)
    layer = jnp.array([0, 0, 1, 1])
    score = jnp.array([1.0, 3.0, 5.0, 9.0])
    got = assign_decay(score, "sigmoid", layer=layer, layers=2)
    np.testing.assert_allclose(got, [LOW, HIGH, LOW, HIGH], rtol=1e-6)
    for name in ("linear", "sqrt", "log2", "sigmoid"):
        np.testing.assert_allclose(assign_decay(jnp.full(3, 2.0), name), 1.0)
        np.testing.assert_array_equal(assign_decay(jnp.full(3, jnp.nan), name), 1.0)
    far = jnp.array([1.0, 2.0, 3.0, 100.0])
    cut = np.asarray(assign_decay(far, "linear", quantiles=(0.0, 2 / 3)))
    np.testing.assert_allclose(cut, [0.67, 0.67 + 2.33 / 2, 3.0, 3.0], rtol=1e-6)


@pytest.mark.parametrize("value", [1.7, 2.1, 3.01])
def test_sigmoid_of_equal_scores_is_one(value):
    """Layers of 2 to 29 equal scores: their mean is off by rounding. A neighbour is not."""
    sizes = np.arange(2, 30)
    layer = np.repeat(np.arange(len(sizes)), sizes)
    score = np.concatenate([np.full(len(layer), value), [1.0, 3.0]]).astype(np.float32)
    layer = jnp.asarray([*layer, *[len(sizes)] * 2])
    got = assign_decay(jnp.asarray(score), "sigmoid", layer=layer, layers=len(sizes) + 1)
    np.testing.assert_array_equal(got[:-2], 1.0)
    np.testing.assert_allclose(got[-2:], [LOW, HIGH], rtol=1e-6)
    near = jnp.array([value, value * (1 + 2e-7), jnp.nan], jnp.float32)
    np.testing.assert_array_equal(assign_decay(near, "sigmoid"), 1.0)


@pytest.mark.parametrize(
    ("name", "score", "want"),
    [
        ("sqrt", [0, 0, 0], [1, 1, 1]),
        ("log2", [1, 1, 1], [1, 1, 1]),
        ("log2", [1 + 1.2e-7, 1 - 6e-8, 1 + 1.2e-7], [1, 1, 1]),
        ("log2", [0, 0, 0], [1, 1, 1]),
        ("log2", [-1, -2, -3], [1, 1, 1]),
        ("sqrt", [-1, -2, np.inf], [1, 1, 1]),
        ("sqrt", [4, -1, 16], [2 / 3, 1, 4 / 3]),
        ("log2", [2, 0, 8], [1 / 2, 1, 3 / 2]),
        ("log2", [0.5, 16, np.nan], [0, 8 / 3, 1]),
    ],
)
def test_what_has_no_root_or_logarithm_has_no_score(name, score, want):
    got = assign_decay(jnp.asarray(score, jnp.float32), name)
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("lineal",), r"alphadecay\.assignment is 'lineal', but must be one of linear, sqrt"),
        (("linear", 3.0, 1.0), r"alphadecay\.s2 is 1\.0, but must be .* at least s1 = 3\.0"),
        (("linear", -1.0), r"alphadecay\.s1 is -1\.0"),
        (("linear", 0.0, float("nan")), r"alphadecay\.s2 is nan"),
    ],
)
def test_what_cannot_be_assigned_is_named(arguments, said):
    with pytest.raises(UserError, match=said):
        assign_decay(jnp.ones(3), *arguments)


BY_LAYER = dict(assignment="sigmoid", score="frobenius", min_eigs=3, method="svd")


def ratios(params):
    matrix = lambda path, leaf: Dims() if path.split(".")[-1] in ("q", "w1") else None
    state = alphadecay(0.1, modules=matrix, **BY_LAYER).init(params)
    return refresher(modules=matrix, **BY_LAYER)(state, params).ratio


def test_layers_are_whole_numbers_in_the_path():
    """Digits within a word are none: w1, gpt2. Layers of 2 modules: one low, one high."""
    size = iter(range(1, 20))
    pair = lambda: {"q": next(size) * jnp.eye(4), "w1": next(size) * jnp.eye(4)}
    params = {
        "block_7": pair(),
        "block_8": pair(),
        "gpt2": {"layers": [pair(), pair()]},
        "head": pair(),
    }
    got = ratios(params)
    assert list(got) == [
        f"{a}.{b}"
        for a in ("block_7", "block_8", "gpt2.layers.0", "gpt2.layers.1", "head")
        for b in ("q", "w1")
    ]
    np.testing.assert_allclose([*got.values()], [LOW, HIGH] * 5, rtol=1e-6)


def test_layers_of_a_stack_are_its_first_axis():
    rng = np.random.default_rng(0)
    stack = {k: jnp.asarray(rng.normal(size=(3, 4, 6)), jnp.float32) for k in ("q", "w1")}
    together = ratios({"blocks": stack})
    apart = ratios({"layers": [{k: a[i] for k, a in stack.items()} for i in range(3)]})
    for k in stack:
        each = [apart[f"layers.{i}.{k}"] for i in range(3)]
        np.testing.assert_allclose(together[f"blocks.{k}"], each, rtol=1e-5)
        assert all(np.isclose(r, [LOW, HIGH], rtol=1e-3).any() for r in each)
