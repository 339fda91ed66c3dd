"""The decoder against NumPy with loops, its symmetries, its gradient, and many devices."""

from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common import mesh as meshes
from common.errors import UserError
from lm.transformer import SIZES, flops_per_token, parameters, rules, transformer

# Two queries share a key; a strong start, so that attention is far from uniform.
SMALL = dict(vocab=23, dim=16, mlp=24, heads=4, kv_heads=2, depth=2, init_std=0.3)
COUNTS = {
    "60m": (58_073_600, 25_296_896),
    "135m": (134_105_856, 84_934_656),
    "350m": (367_969_280, 302_383_104),
    "1b": (1_339_082_752, 1_207_910_400),
}


def tokens(batch=2, time=7, vocab=SMALL["vocab"], seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(vocab, size=(batch, time)))


def pieces(seed=0, **changes):
    """A model and parameters of it, norms away from one as after training."""
    model = transformer(**(SMALL | changes))
    params = jax.jit(model.init)(jax.random.key(seed))
    rng = np.random.default_rng(seed)
    for norm in (
        *(params["blocks"][f"{n}_norm"] for n in ("attention", "mlp")),
        params["norm"],
    ):
        norm["scale"] = norm["scale"] * rng.uniform(0.5, 1.5, norm["scale"].shape)
    # NumPy's float64 must not widen what is float32.
    return model, jax.tree.map(lambda a: a.astype(params["embed"]["embedding"].dtype), params)


def reference(params, row, heads, kv_heads, base=1e4, eps=1e-6, causal=True):
    """Logits [T, V] of one row in float64, one vector after the other."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    blocks = params["blocks"]

    def norm(x, scale):
        return x / np.sqrt((x**2).mean() + eps) * scale

    def rotate(x, position):
        half = len(x) // 2
        out = np.empty_like(x)
        for i in range(half):
            angle = position * base ** (-2 * i / len(x))
            z = (x[i] + 1j * x[i + half]) * np.exp(1j * angle)
            out[i], out[i + half] = z.real, z.imag
        return out

    h = [params["embed"]["embedding"][token] for token in row]
    for layer in range(len(blocks["q"]["kernel"])):
        w = {name: leaf["kernel"][layer] for name, leaf in blocks.items() if "kernel" in leaf}
        scale = {n: blocks[n]["scale"][layer] for n in ("attention_norm", "mlp_norm")}
        x = [norm(v, scale["attention_norm"]) for v in h]
        c = w["q"].shape[1] // heads
        mixed = np.zeros((len(row), heads * c))
        for head in range(heads):
            own = slice(head * c, (head + 1) * c)
            group = head // (heads // kv_heads)
            shared = slice(group * c, (group + 1) * c)
            q = [rotate((v @ w["q"])[own], t) for t, v in enumerate(x)]
            k = [rotate((v @ w["k"])[shared], t) for t, v in enumerate(x)]
            values = [(v @ w["v"])[shared] for v in x]
            for t in range(len(row)):
                seen = range(t + 1) if causal else range(len(row))
                weights = np.exp([q[t] @ k[u] / np.sqrt(c) for u in seen])
                weights /= weights.sum()
                mixed[t, own] = sum(p * values[u] for p, u in zip(weights, seen, strict=True))
        h = [v + m @ w["o"] for v, m in zip(h, mixed, strict=True)]
        for t, v in enumerate(h):
            x = norm(v, scale["mlp_norm"])
            gate = x @ w["gate"]
            h[t] = v + (gate / (1 + np.exp(-gate)) * (x @ w["up"])) @ w["down"]
    head = params["head"]["kernel"] if "head" in params else params["embed"]["embedding"].T
    return np.array([norm(v, params["norm"]["scale"]) @ head for v in h])


@pytest.mark.parametrize(
    "changes",
    [{}, dict(kv_heads=0, tie=True), dict(causal=False, rope_base=100.0), dict(depth=0)],
    ids=["grouped", "tied", "both sides", "no blocks"],
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_logits_are_those_of_the_formulas(changes, dtype):
    with jax.enable_x64(dtype == "float64"):
        model, params = pieces(dtype=dtype, **changes)
        x = tokens()
        found = jax.jit(model.apply)(params, x)
    assert found.dtype == dtype
    s = SMALL | changes
    kinds = dict(heads=s["heads"], kv_heads=s["kv_heads"] or s["heads"])
    kinds |= dict(base=s.get("rope_base", 1e4), causal=s.get("causal", True))
    wanted = [reference(params, row, **kinds) for row in np.asarray(x)]
    np.testing.assert_allclose(found, wanted, atol=1e-4 if dtype == "float32" else 1e-11)


@pytest.mark.parametrize("causal", [True, False])
def test_the_gradient_reaches_the_earlier_tokens_and_no_later_one(causal):
    model, params = pieces(causal=causal)
    row = jnp.array([[3, 1, 4, 0, 5, 9, 2]])  # All different: rows of the table are places.

    @jax.jit
    def reach(table):
        swapped = lambda e: params | {"embed": {"embedding": e}}
        return jax.jacrev(lambda e: model.apply(swapped(e), row)[0].sum(axis=1))(table)

    by_place = np.abs(reach(params["embed"]["embedding"])[:, row[0]]).max(axis=-1)
    seen = np.tri(7, dtype=bool) if causal else np.ones((7, 7), bool)
    np.testing.assert_array_equal(by_place > 0, seen)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_packed_documents_do_not_see_each_other(dtype):
    with jax.enable_x64(dtype == "float64"):
        model, params = pieces(dtype=dtype)
        apply = jax.jit(model.apply)
        a, b = tokens(1, 5, seed=1), tokens(1, 3, seed=2)
        ids = lambda *lengths: jnp.repeat(jnp.arange(len(lengths)), jnp.array(lengths))[None]
        places = lambda *lengths: jnp.concatenate([jnp.arange(n) for n in lengths])[None]
        ab = apply(params, jnp.concatenate([a, b], 1), None, ids(5, 3))
        ba = apply(params, jnp.concatenate([b, a], 1), places(3, 5), ids(3, 5))
        alone = jnp.concatenate([apply(params, a), apply(params, b)], 1)
        tolerance = {"bfloat16": 0.2, "float64": 1e-12}[dtype]
        np.testing.assert_allclose(ab, alone, atol=tolerance)
        np.testing.assert_allclose(jnp.roll(ba, -3, axis=1), alone, atol=tolerance)
        # And one segment is the same as none.
        one = apply(params, a, None, jnp.zeros_like(a))
        np.testing.assert_allclose(one, apply(params, a), atol=1e-6)


def test_a_change_in_one_document_leaves_the_others_bits_alone():
    model, params = pieces()
    apply = jax.jit(model.apply)
    segments = jnp.array([[4, 4, 4, 7, 7, 7, 7]] * 2)
    x = tokens()
    found, changed = (apply(params, y, None, segments) for y in (x, x.at[:, 1].add(1) % 23))
    np.testing.assert_array_equal(found[:, 3:], changed[:, 3:])
    assert (found[:, 1:3] != changed[:, 1:3]).any()


def test_only_differences_of_positions_matter():
    with jax.enable_x64(True):
        model, params = pieces(dtype="float64")
        apply, x = jax.jit(model.apply), tokens()
        at = jnp.arange(7)[None]
        plain = apply(params, x)
        np.testing.assert_array_equal(apply(params, x, at), plain)
        np.testing.assert_allclose(apply(params, x, at + 1000), plain, atol=1e-9)
        rows = jnp.concatenate([at, at + 31])
        np.testing.assert_allclose(apply(params, x, rows), plain, atol=1e-9)
        stretched = apply(params, x, 2 * at)
        assert np.abs(stretched - plain)[:, 2:].max() > 1e-3


def test_bfloat16_is_near_and_its_logits_are_float32():
    model, params = pieces()
    narrow = transformer(**SMALL, dtype="bfloat16")
    chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.eval_shape(narrow.init, jax.random.key(0)), params
    )
    x = tokens()
    wanted, found = (jax.jit(m.apply)(params, x) for m in (model, narrow))
    assert found.dtype == jnp.float32
    assert (found.astype(jnp.bfloat16) != found).any()  # Not rounded at the end.
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert 0 < error < 0.02


def loss(model):
    def value(params, x):
        logits = model.apply(params, x[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, x[:, 1:]).mean()

    return value


def test_remat_changes_nothing():
    x, params = tokens(), pieces()[1]
    models = [transformer(**SMALL, dtype="bfloat16", remat=remat) for remat in (False, True)]
    plain, remat = (jax.jit(jax.value_and_grad(loss(m)))(params, x) for m in models)
    chex.assert_trees_all_close(plain, remat, rtol=1e-6, atol=1e-7)
    chex.assert_trees_all_equal_dtypes(plain[1], params)


@pytest.mark.parametrize("changes", [{}, dict(tie=True, causal=False, remat=True)])
def test_gradients_are_finite_differences(changes):
    with jax.enable_x64(True):
        model, params = pieces(dtype="float64", **changes)
        value, x = jax.jit(loss(model)), tokens()
        grads = jax.jit(jax.grad(loss(model)))(params, x)
        rng = np.random.default_rng(1)
        leaves, tree = jax.tree.flatten(params)
        for i, gradient in enumerate(jax.tree.leaves(grads)):
            assert np.isfinite(gradient).all()
            way = rng.normal(size=gradient.shape)
            at = lambda t, i=i, way=way: value(
                jax.tree.unflatten(tree, [*leaves[:i], leaves[i] + t * way, *leaves[i + 1 :]]),
                x,
            )
            wanted = (at(1e-5) - at(-1e-5)) / 2e-5
            np.testing.assert_allclose(np.vdot(gradient, way), wanted, rtol=1e-6, atol=1e-8)
            assert abs(wanted) > 1e-6


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.1), ("float64", 1e-12)]
)
def test_the_cache_gives_what_the_whole_row_gives(dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        model, params = pieces(dtype=dtype)
        x = tokens()
        wanted = jax.jit(model.apply)(params, x)
        extend = jax.jit(model.extend)
        kept, found = model.start(2, 9), []  # Two slots stay empty.
        assert kept["k"].shape == (2, 2, 9, 2, 4)
        assert kept["v"].dtype == dtype
        for first, last in [(0, 3), (3, 4), (4, 5), (5, 7)]:
            at = jnp.arange(first, last)[None]
            logits, kept = extend(params, kept, x[:, first:last], at)
            found.append(logits)
        np.testing.assert_allclose(jnp.concatenate(found, 1), wanted, atol=tolerance)


def test_rows_of_a_cache_may_be_of_different_lengths():
    model, params = pieces()
    x, extend = tokens(), jax.jit(model.extend)
    kept = model.start(2, 8, "float32")
    _, kept = extend(params, kept, x[:, :4], jnp.arange(4)[None])
    # The second row takes back its last two tokens and goes on from there.
    logits, _ = extend(params, kept, x[:, 4:5], jnp.array([[4], [2]]))
    wanted = jax.jit(model.apply)(params, x.at[1, 2].set(x[1, 4]))
    np.testing.assert_allclose(logits[0, 0], wanted[0, 4], atol=1e-5)
    np.testing.assert_allclose(logits[1, 0], wanted[1, 2], atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_those_of_the_paper(size):
    shapes = jax.eval_shape(transformer(**SIZES[size]).init, jax.random.key(0))
    every, selected = COUNTS[size]
    assert sum(a.size for a in jax.tree.leaves(shapes)) == every == parameters(**SIZES[size])
    assert sum(b["kernel"].size for b in shapes["blocks"].values() if "kernel" in b) == selected


@pytest.mark.parametrize("changes", [{}, dict(tie=True), dict(kv_heads=1, depth=0)])
def test_the_tree_of_parameters(changes):
    s = SMALL | changes
    shapes = jax.eval_shape(transformer(**s).init, jax.random.key(0))
    kv, depth = 4 * s["kv_heads"], s["depth"]
    wanted = {
        "embed/embedding": (23, 16),
        "blocks/q/kernel": (depth, 16, 16),
        "blocks/k/kernel": (depth, 16, kv),
        "blocks/v/kernel": (depth, 16, kv),
        "blocks/o/kernel": (depth, 16, 16),
        "blocks/gate/kernel": (depth, 16, 24),
        "blocks/up/kernel": (depth, 16, 24),
        "blocks/down/kernel": (depth, 24, 16),
        "blocks/attention_norm/scale": (depth, 16),
        "blocks/mlp_norm/scale": (depth, 16),
        "norm/scale": (16,),
        "head/kernel": (16, 23),
    }
    if s.get("tie"):
        del wanted["head/kernel"]
    leaves = jax.tree.leaves(shapes)
    assert dict(zip(meshes.paths(shapes), [a.shape for a in leaves], strict=True)) == wanted
    assert {a.dtype for a in leaves} == {jnp.dtype("float32")}
    assert sum(a.size for a in leaves) == parameters(**s)


def test_the_start_is_normal_and_every_matrix_its_own():
    model = transformer(vocab=200, dim=64, mlp=96, heads=4, depth=3)
    params = jax.jit(model.init)(jax.random.key(0))
    seen = set()
    for path, leaf in zip(meshes.paths(params), jax.tree.leaves(params), strict=True):
        if path.endswith("scale"):
            np.testing.assert_array_equal(leaf, 1)
            continue
        for matrix in leaf.reshape(-1, *leaf.shape[-2:]):
            assert abs(matrix.std() / 0.02 - 1) < 6 / np.sqrt(2 * matrix.size)
            assert abs(matrix.mean()) < 6 * 0.02 / np.sqrt(matrix.size)
            seen.add(float(matrix.ravel()[0]))
    assert len(seen) == 7 * 3 + 2


def test_flops_are_those_that_xla_counts():
    s = dict(vocab=256, dim=64, mlp=192, heads=4, depth=1)
    model = transformer(**s)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((4, 32), jnp.int32)
    counted = jax.jit(model.apply).lower(shapes, x).compile().cost_analysis()["flops"]
    # Forward is a third; norms, softmax and rotations come on top of the products.
    assert 1 < 3 * counted / (4 * 32) / flops_per_token(length=32, **s) < 1.1
    by_hand = 6 * (4 * 64**2 + 3 * 64 * 192 + 64 * 256) + 12 * 64 * 32
    assert (
        flops_per_token(length=32, **s) == flops_per_token(length=32, tie=True, **s) == by_hand
    )


@cache
def trained(data, model, placement):
    """Three steps on so many devices.

    Returns:
      the state's values, the losses, and into how many parts each leaf is divided.
    """
    net = transformer(vocab=32, dim=16, mlp=24, heads=4, depth=2, init_std=0.3)
    tx, mesh = optax.adam(1e-2), meshes.make(data, model)

    def init(key):
        params = net.init(key)
        return {"params": params, "opt": tx.init(params)}

    def step(state, x):
        value, grads = jax.value_and_grad(loss(net))(state["params"], x)
        updates, opt = tx.update(grads, state["opt"])
        return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, value

    with jax.set_mesh(mesh):
        placed = meshes.place(jax.eval_shape(init, jax.random.key(0)), placement, mesh)
        shardings = jax.tree.map(lambda a: a.sharding, placed)
        state = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
        advance = jax.jit(step, out_shardings=(shardings, None))
        x, losses = meshes.to_devices(np.asarray(tokens(8, 6, 32)), mesh), []
        for _ in range(3):
            state, value = advance(state, x)
            losses.append(float(value))
        parts = [a.size // a.addressable_shards[0].data.size for a in jax.tree.leaves(state)]
        parts = dict(zip(meshes.paths(state), parts, strict=True))
        return jax.tree.map(np.asarray, state), losses, parts


@pytest.mark.parametrize(("data", "model", "fsdp"), [(8, 1, True), (4, 2, True), (2, 4, False)])
def test_eight_devices_do_what_one_does(data, model, fsdp):
    one, losses, _ = trained(1, 1, ())
    many, losses_there, parts = trained(data, model, rules(fsdp))
    np.testing.assert_allclose(losses_there, losses, rtol=1e-5)
    assert losses[2] < losses[0]
    chex.assert_trees_all_close(many, one, atol=2e-5)
    # Parameters and both moments of all nine matrices; each device holds its part only.
    split = [path for path, n in parts.items() if n == (data if fsdp else 1) * model]
    assert len(split) == 3 * 9
    assert not any("norm" in path for path in split)


def test_xla_by_name_and_by_itself_are_the_same_here():
    x, params = tokens(), pieces()[1]
    named, auto = (
        jax.jit(transformer(**SMALL, dtype="bfloat16", attention=a).apply)(params, x)
        for a in ("xla", "auto")
    )
    np.testing.assert_array_equal(named, auto)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(vocab=0), "config.model.vocab is 0, but must be a whole number from 1 up"),
        (dict(dim=0), "config.model.dim is 0"),
        (dict(mlp=0), "config.model.mlp is 0"),
        (dict(heads=0), "config.model.heads is 0"),
        (dict(depth=-1), "config.model.depth is -1, but must be a whole number from 0 up"),
        (dict(heads=3), "config.model.heads is 3, but must be a divisor of dim = 16"),
        (dict(heads=16), "config.model.heads is 16.*even"),
        (dict(kv_heads=3), "config.model.kv_heads is 3, but must be 0 or a divisor of"),
        (dict(kv_heads=-2), "config.model.kv_heads is -2"),
        (dict(rope_base=0.0), "config.model.rope_base is 0.0"),
        (dict(norm_eps=float("nan")), "config.model.norm_eps is nan"),
        (dict(init_std=-1.0), "config.model.init_std is -1.0"),
        (dict(dtype="float16"), "config.model.dtype is 'float16', but must be one of float32"),
        (dict(attention="flash"), "config.model.attention is 'flash', but must be one of"),
        (dict(attention="cudnn"), "config.model.attention is 'cudnn'.*bfloat16 only"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        transformer(**(SMALL | changes))


def test_no_cache_where_later_tokens_are_seen():
    with pytest.raises(UserError, match=r"config.model.causal is False"):
        transformer(**SMALL, causal=False).start(1, 4)
