"""Parts of the network and the cache of a model that sees both sides, against the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from lm.transformer import parameters, transformer

FIELDS = dict(vocab=11, dim=16, mlp=24, heads=4, kv_heads=2, depth=2, init_std=0.4)
T = 8
TOKENS = np.random.default_rng(0).integers(11, size=(2, T))
SEGMENTS = np.array([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0]])
POSITIONS = np.array([[0, 0, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 5, 5]])


def pieces(**changes):
    model = transformer(**FIELDS | dict(causal=False, dtype="float64") | changes)
    return model, model.init(jax.random.key(0))


def reference(params, row, positions, segments, block):
    """Logits [T, V] of one row, whose attention is a matrix written out."""
    p = jax.tree.map(np.asarray, params)
    norm = lambda x, w: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * w["scale"]
    c, group = 4, 2
    angle = positions[:, None] * 1e4 ** (-np.arange(0, c, 2) / c)
    turn = np.exp(1j * angle)

    def rotate(x):
        z = (x[:, :2] + 1j * x[:, 2:]) * turn
        return np.concatenate([z.real, z.imag], axis=1)

    allowed = np.equal.outer(segments, segments)
    if block:
        allowed &= np.less_equal.outer(positions // block, positions // block).T
    h = p["embed"]["embedding"][row]
    for layer in range(2):
        w = {k: {n: a[layer] for n, a in v.items()} for k, v in p["blocks"].items()}
        x = norm(h, w["attention_norm"])
        mixed = []
        for head in range(4):
            mine, shared = slice(head * c, head * c + c), slice(head // group * c, None)
            q = rotate((x @ w["q"]["kernel"])[:, mine])
            k = rotate((x @ w["k"]["kernel"])[:, shared][:, :c])
            v = (x @ w["v"]["kernel"])[:, shared][:, :c]
            weights = np.where(allowed, np.exp(q @ k.T / np.sqrt(c)), 0)
            mixed.append(weights / weights.sum(1, keepdims=True) @ v)
        h = h + np.concatenate(mixed, axis=1) @ w["o"]["kernel"]
        x = norm(h, w["mlp_norm"])
        gate = x @ w["gate"]["kernel"]
        h = h + (gate / (1 + np.exp(-gate)) * (x @ w["up"]["kernel"])) @ w["down"]["kernel"]
    return norm(h, p["norm"]) @ p["head"]["kernel"]


@pytest.mark.parametrize("block", [0, 1, 3])
def test_blocks_see_what_is_on_their_left(block):
    """With segments and positions of each row; block = 1 is a causal model."""
    with jax.enable_x64(True):
        model, params = pieces(block=block)
        found = jax.jit(model.apply)(params, TOKENS, POSITIONS, SEGMENTS)
        for i in range(2):
            wanted = reference(params, TOKENS[i], POSITIONS[i], SEGMENTS[i], block)
            np.testing.assert_allclose(found[i], wanted, atol=1e-11)
        if block == 1:
            plain = jax.jit(transformer(**FIELDS, dtype="float64").apply)(params, TOKENS)
            blocks = jax.jit(model.apply)(params, TOKENS)
            np.testing.assert_allclose(blocks, plain, atol=1e-12)


def test_logits_are_those_of_the_features_one_by_one():
    model, params = pieces(dtype="float32")
    h = jax.jit(model.hidden)(params, TOKENS, POSITIONS, SEGMENTS)
    assert h.shape == (2, T, 16)
    wanted = jax.jit(model.apply)(params, TOKENS, POSITIONS, SEGMENTS)
    np.testing.assert_allclose(model.head(params, h), wanted, atol=1e-6)
    some = model.head(params, h[:, [5, 2]])
    np.testing.assert_allclose(some, wanted[:, [5, 2]], atol=1e-6)


def test_a_window_gives_what_the_whole_row_gives():
    """Where nothing outside of it has changed, for any width, start and padding."""
    with jax.enable_x64(True):
        model, params = pieces()
        fill, window = jax.jit(model.fill), jax.jit(model.window)
        for where in ((), (POSITIONS, SEGMENTS)):
            wanted = jax.jit(model.hidden)(params, TOKENS, *where)
            h, cache = fill(params, TOKENS, *where)
            np.testing.assert_array_equal(h, wanted)
            assert cache["k"].shape == cache["v"].shape == (2, 2, T, 2, 4)
            for start in (0, 2, 5):
                part = TOKENS[:, start : start + 3]
                h, kept = window(params, cache, part, start, *where)
                np.testing.assert_allclose(h, wanted[:, start : start + 3], atol=1e-12)
                np.testing.assert_allclose(kept["k"], cache["k"], atol=1e-12)
            # Beyond the end: dropped, and without effect on the rest.
            h, kept = window(params, cache, TOKENS[:, [6, 7, 0]], 6, *where)
            np.testing.assert_allclose(h[:, :2], wanted[:, 6:], atol=1e-12)
            np.testing.assert_allclose(kept["v"], cache["v"], atol=1e-12)


def test_a_window_writes_its_slots_only_and_sees_the_others_as_they_were():
    with jax.enable_x64(True):
        model, params = pieces()
        _, cache = jax.jit(model.fill)(params, TOKENS)
        changed = TOKENS.copy()
        changed[:, 2:5] = (changed[:, 2:5] + 1) % 11
        h, kept = jax.jit(model.window)(params, cache, changed[:, 2:5], 2)
        outside = np.array([0, 1, 5, 6, 7])
        for name in "kv":
            np.testing.assert_array_equal(kept[name][:, :, outside], cache[name][:, :, outside])
            assert (np.asarray(kept[name] != cache[name])[:, :, 2:5]).any(axis=(-1, -2)).all()
        exact, full = jax.jit(model.fill)(params, changed)
        # In the first layer keys and values are those of the token: exact, and no further.
        np.testing.assert_allclose(kept["k"][0], full["k"][0], atol=1e-12)
        assert np.abs(h - exact[:, 2:5]).max() > 1e-6


def test_blocks_on_the_left_are_final():
    """With a block-causal model a cache filled early is exact for what comes later."""
    with jax.enable_x64(True):
        model, params = pieces(block=2)
        early = TOKENS.copy()
        early[:, 4:] = 0
        _, cache = jax.jit(model.fill)(params, early)
        wanted, full = jax.jit(model.fill)(params, TOKENS)
        h, kept = jax.jit(model.window)(params, cache, TOKENS[:, 4:6], 4)
        np.testing.assert_allclose(h, wanted[:, 4:6], atol=1e-12)
        np.testing.assert_allclose(kept["v"][:, :, :6], full["v"][:, :, :6], atol=1e-12)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: pieces(block=-1), r"config\.model\.block is -1, but must be 0, or from 1 up"),
        (lambda: pieces(block=2, causal=True), r"config\.model\.block is 2"),
        (
            lambda: pieces(causal=True, dtype="float32")[0].fill({}, jnp.zeros((1, 2), int)),
            r"config\.model\.causal is True",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(call, sentence):
    with pytest.raises(UserError, match=sentence):
        call()


@pytest.mark.parametrize("causal", [True, False])
def test_learned_positions_break_the_symmetry_of_places(causal):
    """Of a row of equal tokens every place gets its own features, and the caches agree."""
    sizes = dict(vocab=5, dim=16, mlp=24, heads=2, depth=2, causal=causal)
    model = transformer(**sizes, absolute=6)
    params = model.init(jax.random.key(0))
    assert params["embed"]["position"].shape == (6, 16)
    assert parameters(**sizes, absolute=6) == sum(a.size for a in jax.tree.leaves(params))
    x = jnp.full((2, 8), 3)
    h = model.hidden(params, x)
    plain = transformer(**sizes).hidden(params, x)
    assert np.abs(np.asarray(plain - plain[:, :1])).max() < 1e-5
    assert np.abs(np.asarray(h[:, 1:6] - h[:, :5])).max(axis=-1).min() > 1e-4
    moved = params | {
        "embed": params["embed"] | {"position": params["embed"]["position"][::-1]}
    }
    assert np.abs(np.asarray(model.hidden(moved, x) - h)).max() > 1e-4
    if causal:
        logits, cache = model.extend(params, model.start(2, 8), x[:, :5], jnp.arange(5)[None])
        more, _ = model.extend(params, cache, x[:, 5:], jnp.arange(5, 8)[None])
        found = jnp.concatenate([logits, more], axis=1)
        np.testing.assert_allclose(found, model.apply(params, x), atol=1e-5)
    else:
        _, cache = model.fill(params, x)
        found, _ = model.window(params, cache, x[:, 3:6], jnp.int32(3))
        np.testing.assert_allclose(found, h[:, 3:6], atol=1e-5)
