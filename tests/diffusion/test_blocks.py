"""Shared pieces of the networks against NumPy in float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from diffusion import blocks


def heads(t, u, seed=0, spread=1.5):
    rng = np.random.default_rng(seed)
    draw = lambda n, c: jnp.asarray(spread * rng.standard_normal((2, n, 3, c)), jnp.float32)
    return draw(t, 4), draw(u, 4), draw(u, 5)


def softmax_attention(q, k, v):
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out = np.empty((*q.shape[:3], v.shape[-1]))
    for b, t, h in np.ndindex(*q.shape[:3]):
        scores = np.array([q[b, t, h] @ row for row in k[b, :, h]]) / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights @ v[b, :, h] / weights.sum()
    return out


# Tiles that fit, that leave a rest of queries, of keys, of both, and one of a single token.
TILED = [(8, 8, 4), (7, 8, 4), (8, 5, 4), (11, 6, 4), (3, 40, 5), (5, 4, 1)]


@pytest.mark.parametrize(("t", "u", "block"), TILED)
def test_attention_in_tiles_is_the_softmax(t, u, block):
    q, k, v = heads(t, u)
    assert t * u > block**2
    tiled = jax.jit(lambda *a: blocks.attention(*a, block))(q, k, v)
    np.testing.assert_allclose(tiled, softmax_attention(q, k, v), atol=1e-5)
    plain = blocks.attention(q, k, v, 1000)
    np.testing.assert_allclose(plain, softmax_attention(q, k, v), atol=1e-5)


@pytest.mark.parametrize(("t", "u", "block"), [(8, 8, 4), (11, 6, 4)])
def test_the_derivatives_of_attention_in_tiles_are_those_of_the_softmax(t, u, block):
    args = heads(t, u)
    w = jnp.asarray(np.random.default_rng(1).standard_normal((2, t, 3, 5)), jnp.float32)

    def derivatives(block):
        loss = lambda *a: jnp.sum(w * blocks.attention(*a, block) ** 2)
        backward = jax.grad(loss, argnums=(0, 1, 2))
        forward = lambda *a: jax.jvp(loss, a, a)[1]
        return jax.jit(lambda *a: (backward(*a), forward(*a)))(*args)

    chex.assert_trees_all_close(derivatives(block), derivatives(1000), atol=1e-5, rtol=1e-5)


def test_attention_stands_scores_far_from_zero():
    q, k, v = heads(6, 9, spread=30.0)
    out = jax.jit(lambda *a: blocks.attention(*a, 4))(q, k, v)
    np.testing.assert_allclose(out, softmax_attention(q, k, v), atol=1e-2)
    np.testing.assert_array_equal(jnp.isfinite(out), True)


def sizes(jaxpr):
    """Of all arrays in a program, however nested."""
    for equation in jaxpr.eqns:
        yield from (v.aval.size for v in equation.outvars)
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from sizes(inner)


@pytest.mark.parametrize("length", [256, 1024])
def test_no_array_of_attention_grows_with_the_square(length):
    a = jax.ShapeDtypeStruct((1, length, 1, 4), jnp.float32)

    def largest(block):
        loss = lambda q, k, v: blocks.attention(q, k, v, block).sum()
        return max(sizes(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(a, a, a).jaxpr))

    assert largest(16) <= 16 * length
    assert largest(length) == length**2  # What the walk finds where the map is whole.


def test_attention_of_bfloat16_is_bfloat16():
    args = [a.astype(jnp.bfloat16) for a in heads(8, 8)]
    for block in (4, 1000):
        out = blocks.attention(*args, block)
        assert out.dtype == jnp.bfloat16
        np.testing.assert_allclose(out.astype(float), softmax_attention(*args), atol=0.05)


def filtered(image, taps):
    """`downsample` of [h, w] by its definition, in loops."""
    taps = np.asarray(taps, np.float64) / np.sum(taps)
    rim, (h, w) = (len(taps) - 1) // 2, image.shape
    out = np.zeros((h // 2, w // 2))
    for i, j in np.ndindex(*out.shape):
        for a, b in np.ndindex(len(taps), len(taps)):
            y, x = 2 * i + a - rim, 2 * j + b - rim
            if 0 <= y < h and 0 <= x < w:
                out[i, j] += taps[a] * taps[b] * image[y, x]
    return out


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1), (1, 2, 4, 3)])
def test_resampling_is_the_filter_and_its_transpose(taps):
    image = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    wanted = filtered(image.astype(np.float64), taps)
    x = jnp.asarray(image)[None, :, :, None]
    np.testing.assert_allclose(blocks.downsample(x, taps)[0, :, :, 0], wanted, atol=1e-6)

    unit = np.eye(24).reshape(24, 6, 4)
    matrix = np.stack([filtered(e, taps).ravel() for e in unit], axis=1)
    small = np.random.default_rng(1).standard_normal((3, 2)).astype(np.float32)
    found = blocks.upsample(jnp.asarray(small)[None, :, :, None], taps)[0, :, :, 0]
    np.testing.assert_allclose(found.ravel(), 4 * matrix.T @ small.ravel(), atol=1e-6)


def test_resampling_of_pairs_means_and_repeats():
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(
        blocks.downsample(x)[0, :, :, 0], np.array([[2.5, 4.5], [10.5, 12.5]])
    )
    repeated = np.repeat(np.repeat(np.asarray(x), 2, axis=1), 2, axis=2)
    np.testing.assert_array_equal(blocks.upsample(x), repeated)
    ones = blocks.upsample(jnp.ones((1, 6, 6, 1)), (1, 3, 3, 1))[0, 1:-1, 1:-1]
    np.testing.assert_allclose(ones, 1, rtol=1e-6)


@pytest.mark.parametrize("endpoint", [False, True])
def test_positional_waves(endpoint):
    noise = np.array([0.0, 0.7, -1.3, 999.0])
    found = blocks.positional(jnp.asarray(noise, jnp.float32), 10, endpoint=endpoint)
    n = 4 if endpoint else 5
    angle = noise[:, None] * 1e4 ** -(np.arange(5) / n)
    np.testing.assert_allclose(found[:, :5], np.cos(angle), atol=2e-4)
    np.testing.assert_allclose(found[:, 5:], np.sin(angle), atol=2e-4)
    assert found.dtype == jnp.float32


def test_fourier_waves_are_a_constant_of_width_and_seed():
    noise = jnp.array([0.0, 0.01, -1.0])
    waves = blocks.fourier(noise, 512)
    np.testing.assert_array_equal(waves, blocks.fourier(noise, 512))
    assert float(jnp.abs(waves[1] - blocks.fourier(noise, 512, seed=1)[1]).max()) > 0.5
    np.testing.assert_array_equal(waves[0], np.repeat([1.0, 0.0], 256))
    np.testing.assert_allclose(waves[:, :256] ** 2 + waves[:, 256:] ** 2, 1, atol=1e-5)
    # sin(x) ~ x at 1e-5: the mean square of 2 pi f is (2 pi scale)^2.
    slopes = blocks.fourier(jnp.array([1e-5]), 512, scale=16.0)[0, 256:] / 1e-5
    assert abs(float(jnp.mean(slopes**2)) / (32 * np.pi) ** 2 - 1) < 6 * np.sqrt(2 / 256)


def test_groups_have_four_channels_or_more():
    groups = lambda n: blocks.group_norm(n, name="n", dtype="float32").num_groups
    found = {n: groups(n) for n in (2, 4, 12, 64, 100, 128, 132, 192, 1152)}
    wanted = {2: 1, 4: 1, 12: 3, 64: 16, 100: 25, 128: 32, 132: 22, 192: 32, 1152: 32}
    assert found == wanted


def test_group_norm_keeps_its_digits_where_the_mean_is_large():
    x = 1e3 + np.random.default_rng(0).standard_normal((2, 3, 3, 8))
    x = x.astype(np.float32)
    layer = blocks.group_norm(8, name="n", dtype="float32")
    found = layer.apply({"params": {"scale": jnp.ones(8), "bias": jnp.zeros(8)}}, x)
    wide = x.astype(np.float64).reshape(2, 9, 2, 4)
    mean, var = wide.mean((1, 3), keepdims=True), wide.var((1, 3), keepdims=True)
    wanted = ((wide - mean) / np.sqrt(var + 1e-6)).reshape(x.shape)
    np.testing.assert_allclose(found, wanted, atol=1e-3)


WIDTHS = dict(label=4, vector=3, augment=0, channels=1)


def test_conditions_that_are_not_given_are_absent():
    x = jnp.zeros((2, 6, 4, 3))
    found = blocks.conditions(None, x, WIDTHS)
    wanted = {
        "label": np.array([-1, -1], np.int32),
        "vector": np.zeros((2, 3), np.float32),
        "channels": np.zeros((2, 6, 4, 1), np.float32),
    }
    chex.assert_trees_all_equal(found, jax.tree.map(jnp.asarray, wanted))
    given = {"label": np.array([3, -1]), "vector": None}
    chex.assert_trees_all_equal(
        blocks.conditions(given, x, WIDTHS), found | {"label": jnp.array([3, -1], jnp.int32)}
    )
    np.testing.assert_array_equal(blocks.one_hot(jnp.array([-1, 1]), 2, "float32")[0], 0)


@pytest.mark.parametrize(
    ("cond", "sentence"),
    [
        (dict(augment=jnp.zeros((2, 9))), r"config.model.augment_dim is 0.*label, vector, ch"),
        (dict(classes=jnp.zeros(2)), r"config.model.classes is 0"),
        (dict(label=jnp.zeros((2, 1), int)), r"config.cond.label is \(2, 1\).*shape \(2,\)"),
        (dict(vector=jnp.zeros((2, 4))), r"config.cond.vector is \(2, 4\).*shape \(2, 3\)"),
        (dict(channels=jnp.zeros((2, 4, 6, 1))), r"config.cond.channels.*\(2, 6, 4, 1\)"),
    ],
)
def test_conditions_the_network_cannot_take(cond, sentence):
    with pytest.raises(UserError, match=sentence):
        blocks.conditions(cond, jnp.zeros((2, 6, 4, 3)), WIDTHS)
