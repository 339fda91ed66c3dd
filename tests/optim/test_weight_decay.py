"""Rules of weight decay and controls against trajectories in NumPy, and Optax's contract."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common.errors import UserError
from optim import weight_decay as wd
from optim.alphadecay import alphadecay
from optim.decay_controls import fixed_ratios, permuted, shuffled, static_by_type
from optim.modules import Dims, select

RATE, PEAK, STEPS = 0.05, 0.1, 6
B1, B2, EPS = 0.9, 0.99, 1e-8
SHAPES = {"out": (3, 4), "blocks.q": (2, 6, 5), "blocks.up": (2, 6, 7), "blocks.scale": (2, 6)}
BY_LEAF = {"blocks.q": np.array([0.7, 1.9]), "blocks.up": np.array([3.0, 0.0])}


def rate(t):
    return PEAK * (t + 1) / STEPS


def modules(path, leaf):
    return Dims() if path in BY_LEAF else None


def in_blocks(path):
    return path.startswith("blocks")


def layers(name, *arrays):
    """The arrays of each layer: stacked leaves one by one."""
    if in_blocks(name):
        return list(zip(*arrays, strict=True))
    return [arrays]


# References: (w, g, u, t, memory) -> decay of each leaf, all dicts of float64 arrays.


def np_awd(w, g, u, t, memory):
    length = lambda tree: np.sqrt(sum((x**2).sum() for x in tree.values()))
    now = 3e-2 * length(g) / (length(w) + 1e-8)
    memory["bar"] = 0.1 * memory.get("bar", 0.0) + 0.9 * now
    return dict.fromkeys(w, memory["bar"])


def np_adadecay(w, g, u, t, memory):
    def one(g):
        size = np.abs(g)
        z = (size - size.mean()) / size.std()
        return 0.2 * 2 / (1 + np.exp(-4 * z))

    return {n: np.array([one(x) for (x,) in layers(n, g[n])]).reshape(g[n].shape) for n in w}


def np_cautious(w, g, u, t, memory):
    return {n: 0.2 * (u[n] * w[n] >= 0) for n in w}


def np_adamc(w, g, u, t, memory):
    return {n: 0.2 * rate(t) / PEAK if in_blocks(n) else 0.2 for n in w}


def np_scheduled(w, g, u, t, memory):
    v = memory.setdefault("v", {n: np.zeros_like(x) for n, x in w.items()})
    for n in v:
        v[n] = B2 * v[n] + (1 - B2) * g[n] ** 2
    vbar = np.concatenate([(x / (1 - B2 ** (t + 1))).ravel() for x in v.values()]).mean()
    return {n: 0.2 / (np.sqrt(vbar) + EPS) for n in w}


def np_gradient_ratio(w, g, u, t, memory):
    size = np.linalg.norm
    each = {n: [size(b) / size(a) for a, b in layers(n, w[n], g[n])] for n in w}
    mean = np.mean([x for rates in each.values() for x in rates])
    shape = lambda n: (-1,) + (1,) * (w[n].ndim - 1)
    return {n: 0.2 * np.array(each[n]).reshape(shape(n)) / mean for n in w}


def np_norm_control(w, g, u, t, memory):
    target = lambda n: 0.5 if in_blocks(n) else 2.0
    each = {n: [1 - target(n) / np.linalg.norm(a) for (a,) in layers(n, w[n])] for n in w}
    return {
        n: 0.2 * np.array(x).reshape((-1,) + (1,) * (w[n].ndim - 1)) for n, x in each.items()
    }


def np_fixed(w, g, u, t, memory):
    return {n: 0.2 * BY_LEAF[n][:, None, None] if n in BY_LEAF else 0.2 for n in w}


def np_by_type(w, g, u, t, memory):
    return {n: 0.2 * {"blocks.q": 0.7, "blocks.up": 3.0}.get(n, 1.0) for n in w}


RULES = {
    "awd": (lambda: wd.awd(3e-2), np_awd),
    "adadecay": (lambda: wd.adadecay(0.2, stacked=in_blocks), np_adadecay),
    "cautious": (lambda: wd.cautious(0.2), np_cautious),
    "adamc": (lambda: wd.adamc(0.2, rate, peak=PEAK, normalised=in_blocks), np_adamc),
    "scheduled": (lambda: wd.scheduled(0.2, EPS, b2=B2), np_scheduled),
    "gradient_ratio": (lambda: wd.gradient_ratio(0.2, stacked=in_blocks), np_gradient_ratio),
    "norm_control": (
        lambda: wd.norm_control(0.2, lambda p: 0.5 if in_blocks(p) else 2.0, stacked=in_blocks),
        np_norm_control,
    ),
    "fixed_ratios": (lambda: fixed_ratios(0.2, BY_LEAF, modules=modules), np_fixed),
    "static_by_type": (
        lambda: static_by_type(0.2, {"q": 0.7, "up": 3.0}, modules=modules),
        np_by_type,
    ),
}
BOTH = ("awd", "adadecay", "gradient_ratio", "fixed_ratios", "static_by_type")
CASES = [(n, "decoupled") for n in RULES] + [(n, "coupled") for n in BOTH]


def nested(flat):
    inner = {n.removeprefix("blocks."): x for n, x in flat.items() if in_blocks(n)}
    return {"out": flat["out"], "blocks": inner}


def gradient(w, noise):
    """Of a quadratic with noise; NumPy and JAX alike."""
    return jax.tree.map(lambda w, e: 0.3 * w + e, w, noise)


def start(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda: {n: rng.normal(size=s) for n, s in SHAPES.items()}
    return draw(), [draw() for _ in range(STEPS)]


def adam_in_numpy(rule, coupling):
    w, noise = start()
    m = {n: np.zeros_like(x) for n, x in w.items()}
    v, memory = {n: x.copy() for n, x in m.items()}, {}

    def direction(g, t):
        for n in w:
            m[n] = B1 * m[n] + (1 - B1) * g[n]
            v[n] = B2 * v[n] + (1 - B2) * g[n] ** 2
        root = {n: np.sqrt(v[n] / (1 - B2 ** (t + 1))) for n in w}
        return {n: m[n] / (1 - B1 ** (t + 1)) / (root[n] + EPS) for n in w}

    for t in range(STEPS):
        g = gradient(w, noise[t])
        if coupling == "coupled":
            decay = rule(w, g, g, t, memory)
            u = direction({n: g[n] + decay[n] * w[n] for n in w}, t)
        else:
            u = direction(g, t)
            decay = rule(w, g, u, t, memory)
            u = {n: u[n] + decay[n] * w[n] for n in w}
        w = {n: w[n] - rate(t) * u[n] for n in w}
    return nested(w)


def adam(rule, coupling):
    first = optax.scale_by_adam(B1, B2, EPS)
    parts = (rule, first) if coupling == "coupled" else (first, rule)
    return wd.with_gradient(optax.chain(*parts, optax.scale_by_learning_rate(rate)))


@pytest.mark.parametrize(("name", "coupling"), CASES)
def test_trajectory(name, coupling):
    make, reference = RULES[name]
    w, noise = start()
    with jax.enable_x64(True):
        tx = adam(make(), coupling)
        params = jax.tree.map(jnp.asarray, nested(w))
        state = tx.init(params)
        chex.clear_trace_counter()
        update = jax.jit(chex.assert_max_traces(tx.update, n=1))
        for e in noise:
            updates, state = update(gradient(params, nested(e)), state, params)
            params = optax.apply_updates(params, updates)
    want = adam_in_numpy(reference, coupling)
    assert params["out"].dtype == np.float64
    chex.assert_trees_all_close(params, want, rtol=1e-12, atol=1e-12)


def test_shuffled_is_alphadecay_on_other_modules():
    """The ratios are those of its state; where they go is told here by hand."""
    settings = dict(modules=modules, min_eigs=3, every=3, method="gram", s2=5.0)
    w, noise = start()
    with jax.enable_x64(True):
        tx = shuffled(lambda t: 0.1 * (t + 1), 4, **settings)
        own = alphadecay(lambda t: 0.1 * (t + 1), **settings)
        params = jax.tree.map(jnp.asarray, nested(w))
        state, plain = tx.init(params), own.init(params)
        chex.clear_trace_counter()
        update = jax.jit(chex.assert_max_traces(tx.update, n=1))
        for t, e in enumerate(noise):
            g = jax.tree.map(jnp.asarray, nested(e))
            got, state = update(g, state, params)
            _, plain = jax.jit(own.update)(g, plain, params)
            chex.assert_trees_all_equal(state, plain)

            flat = [*np.asarray(state.ratio["blocks.q"]), *np.asarray(state.ratio["blocks.up"])]
            moved = [float(flat[i]) for i in np.random.default_rng(4).permutation(4)]
            assert moved != flat
            factor = {"q": moved[:2], "up": moved[2:], "scale": [1.0, 1.0]}
            base = 0.1 * (t + 1)
            for n, ratio in factor.items():
                each = zip(noise[t]["blocks." + n], params["blocks"][n], ratio, strict=True)
                want = [e + base * r * np.asarray(p) for e, p, r in each]
                np.testing.assert_allclose(got["blocks"][n], want, rtol=1e-12)
            params = jax.tree.map(lambda p, u: p - 0.05 * u, params, got)


def test_permuted_keeps_shapes_and_all_ratios():
    leaves = select(nested({n: np.zeros(s) for n, s in SHAPES.items()}), modules)
    ratio = {"blocks.q": jnp.array([1.0, 2.0]), "blocks.up": jnp.array([3.0, 4.0])}
    got = permuted(leaves, ratio, 7)
    assert {n: v.shape for n, v in got.items()} == {n: v.shape for n, v in ratio.items()}
    assert sorted(np.concatenate(list(got.values()))) == [1, 2, 3, 4]


# The contract.

MAKE = {
    "awd": lambda s: wd.awd(s),
    "adadecay": lambda s: wd.adadecay(s),
    "cautious": lambda s: wd.cautious(s),
    "adamc": lambda s: wd.adamc(s, rate, peak=PEAK, normalised=in_blocks),
    "scheduled": lambda s: wd.with_gradient(wd.scheduled(s)),
    "gradient_ratio": lambda s: wd.gradient_ratio(s),
    "norm_control": lambda s: wd.norm_control(s, 0.5),
    "fixed_ratios": lambda s: fixed_ratios(s, BY_LEAF, modules=modules),
    "static_by_type": lambda s: static_by_type(s, {"q": 2.0}, modules=modules),
    "shuffled": lambda s: shuffled(s, 1, modules=modules, min_eigs=3, every=2, method="gram"),
}
OWN = [n for n in MAKE if hasattr(wd, n)]
every_rule = pytest.mark.parametrize("name", list(MAKE))


def mixed():
    """Parameters and updates: float32, bfloat16, integers and leaves that are not there."""
    rng = np.random.default_rng(1)
    array = lambda name, dtype=jnp.float32: jnp.asarray(rng.normal(size=SHAPES[name]), dtype)
    tree = lambda integers: {
        "out": array("out", jnp.bfloat16),
        "blocks": {n: array(f"blocks.{n}") for n in ("q", "up", "scale")},
        "frozen": None,
        "gone": optax.MaskedNode(),
        "table": jnp.arange(3) * integers,
    }
    return tree(1), tree(0)


@every_rule
def test_contract(name):
    params, updates = mixed()
    tx = MAKE[name](0.1)
    state = tx.init(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, jax.eval_shape(tx.init, params))
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(tx.update, n=1), donate_argnums=(0, 1))
    shapes = jax.eval_shape(lambda: (updates, state))
    for _ in range(3):
        fresh, old = jax.tree.map(jnp.copy, (updates, state))
        got, state = update(fresh, old, params, value=jnp.ones(()))
        chex.assert_trees_all_equal_shapes_and_dtypes((got, state), shapes)
        chex.assert_tree_all_finite((got, getattr(state, "ratio", ())))
    chex.assert_trees_all_equal(got["table"], updates["table"])
    assert not np.array_equal(got["blocks"]["q"], updates["blocks"]["q"])
    with pytest.raises(ValueError, match=r"needs the parameters"):
        tx.update(updates, state)


@every_rule
def test_strength_zero_adds_nothing(name):
    params, updates = mixed()
    tx = MAKE[name](0.0)
    got, _ = jax.jit(tx.update)(updates, tx.init(params), params)
    chex.assert_trees_all_equal(got, updates)


@every_rule
def test_in_a_chain_under_multi_steps(name):
    """Two halves of a gradient are one step of it."""
    params, updates = (
        jax.tree.map(lambda x: x.astype(jnp.float32), {"out": t["out"], "blocks": t["blocks"]})
        for t in mixed()
    )
    inner = optax.named_chain(
        ("clip", optax.clip_by_global_norm(1.0)),
        ("adam", wd.with_gradient(optax.chain(optax.scale_by_adam(), MAKE[name](0.1)))),
        ("rate", optax.scale_by_learning_rate(0.01)),
    )
    tx = optax.MultiSteps(inner, 2)
    state, plain = tx.init(params), inner.init(params)
    update = jax.jit(tx.update)
    for share in (0.5, 1.5, 0.5, 1.5):
        part = jax.tree.map(lambda u, share=share: share * u, updates)
        got, state = update(part, state, params)
    for _ in range(2):
        want, plain = jax.jit(inner.update)(updates, plain, params)
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-8)
    chex.assert_trees_all_close(state.inner_opt_state, plain, rtol=1e-5)


@pytest.mark.parametrize("name", [n for n in MAKE if n != "shuffled"])
def test_injected_strength(name):
    params, updates = mixed()
    injected = optax.inject_hyperparams(lambda strength: MAKE[name](strength))
    tx = injected(strength=lambda t: jnp.where(t == 0, 0.0, 0.1))
    state, want = tx.init(params), []
    for t in range(2):
        got, state = jax.jit(tx.update)(updates, state, params)
        plain = MAKE[name](0.1)
        inner = plain.init(params)
        if t == 0:
            chex.assert_trees_all_close(got, updates)
        for _ in range(t + 1):
            want, inner = jax.jit(plain.update)(updates, inner, params)
    chex.assert_trees_all_close(got["blocks"], want["blocks"], rtol=1e-6)


def test_injected_by_name():
    params, updates = mixed()
    tx = optax.inject_hyperparams(wd.adamc, static_args=("learning_rate", "normalised", "mask"))
    tx = tx(0.1, rate, peak=PEAK, normalised=in_blocks, mask=in_blocks)
    state = tx.init(params)
    state.hyperparams["weight_decay"] = jnp.float32(0.2)
    got, _ = jax.jit(tx.update)(updates, state, params)
    want = updates["blocks"]["q"] + 0.2 / STEPS * params["blocks"]["q"]
    np.testing.assert_allclose(got["blocks"]["q"], want, rtol=1e-5)
    chex.assert_trees_all_equal(got["out"], updates["out"])


@pytest.mark.parametrize("name", OWN)
def test_masks(name):
    """Our mask and Optax's leave the same alone; so does an update that is not there."""
    params, updates = mixed()
    kinds = dict(mask=in_blocks)
    ours = {
        "adamc": lambda: wd.adamc(0.1, rate, peak=PEAK, normalised=in_blocks, **kinds),
        "scheduled": lambda: wd.with_gradient(wd.scheduled(0.1, **kinds)),
        "norm_control": lambda: wd.norm_control(0.1, 0.5, **kinds),
    }
    tx = ours.get(name, lambda: getattr(wd, name)(0.1, **kinds))()
    got, _ = tx.update(updates, tx.init(params), params)
    chex.assert_trees_all_equal(got["out"], updates["out"])
    assert not np.array_equal(got["blocks"]["scale"], updates["blocks"]["scale"])

    keep = {**dict.fromkeys(params, False), "blocks": True}
    masked = optax.masked(MAKE[name](0.1), keep)
    theirs, _ = masked.update(updates, masked.init(params), params, gradient=updates)
    chex.assert_trees_all_equal(theirs["out"], updates["out"])
    if name not in ("awd", "scheduled"):  # Their one number is of all leaves seen.
        chex.assert_trees_all_close(got["blocks"], theirs["blocks"], rtol=1e-6)

    absent = {**updates, "out": None}
    got, _ = MAKE[name](0.1).update(absent, tx.init(params), params)
    assert got["out"] is None
    chex.assert_tree_all_finite(got["blocks"])


# What single rules promise.


def one(tx, w, u, **extra):
    params, updates = {"w": jnp.asarray(w)}, {"w": jnp.asarray(u)}
    return jax.jit(tx.update)(updates, tx.init(params), params, **extra)[0]["w"]


def test_cautious_decays_where_the_step_shrinks():
    """Only coordinates that the step brings nearer to zero, or leaves, are shrunk more."""
    w, u = np.array([2.0, 2.0, -2.0, -2.0, 2.0]), np.array([1.0, -1.0, 1.0, -1.0, 0.0])
    step = -0.1 * (np.asarray(one(wd.cautious(0.5), w, u)) - u)
    nearer = np.abs(w - 0.1 * u) <= np.abs(w)
    np.testing.assert_allclose(step, np.where(nearer, -0.1 * 0.5 * w, 0), rtol=1e-6)


def test_cautious_sees_the_sign_of_products_that_underflow():
    u = np.array([-1e-30, 1e-30], np.float32)
    w = np.full(2, 1e-30, np.float32)
    np.testing.assert_array_equal(one(wd.cautious(1.0), w, u), np.where(u > 0, 2 * u, u))


@pytest.mark.parametrize("value", [0.0, 0.1, 1e-30, 1e30])
def test_adadecay_of_equal_gradients_is_uniform(value):
    g = np.full((7, 9), value, np.float32) * np.where(np.arange(9) % 2, 1, -1)
    w = np.ones((7, 9), np.float32)
    got = one(wd.adadecay(0.1), w, np.zeros_like(w), gradient={"w": g.astype(np.float32)})
    np.testing.assert_allclose(got, 0.1 * w, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "size"),
    [("awd", 1e25), *((n, s) for n in ("adadecay", "gradient_ratio") for s in (1e-25, 1e25))],
)
def test_size_of_gradient_and_weights_together_is_nothing(name, size):
    rng = np.random.default_rng(3)
    w, g = rng.normal(size=(2, 5, 4)).astype(np.float32)
    share = lambda s: one(MAKE[name](0.1), s * w, 0 * w, gradient={"w": jnp.asarray(s * g)}) / s
    np.testing.assert_allclose(share(np.float32(size)), share(np.float32(1)), rtol=1e-5)


def test_norm_control_without_target_is_adamw_bitwise():
    params, updates = mixed()
    params, updates = params["blocks"], updates["blocks"]
    ours, theirs = wd.norm_control(0.1), optax.add_decayed_weights(0.1)
    got, _ = jax.jit(ours.update)(updates, ours.init(params), params)
    want, _ = jax.jit(theirs.update)(updates, theirs.init(params), params)
    chex.assert_trees_all_equal(got, want)


def test_norm_control_reaches_its_target():
    tx, w = wd.norm_control(0.5, 3.0), np.array([[1.0, 2.0], [0.5, -1.0]])
    for _ in range(60):
        w = w - 0.5 * np.asarray(one(tx, w, np.zeros_like(w)))
    assert np.linalg.norm(w) == pytest.approx(3.0, rel=1e-5)
    np.testing.assert_array_equal(one(tx, np.zeros((2, 2)), np.ones((2, 2))), np.ones((2, 2)))


def test_gradient_ratio_without_gradients_or_weights():
    w, zero = np.array([1.0, 2.0]), np.zeros(2)
    np.testing.assert_allclose(one(wd.gradient_ratio(0.1), w, zero), 0.1 * w, rtol=1e-6)
    params = {"a": jnp.zeros(2), "b": jnp.ones(2)}
    tx = wd.gradient_ratio(0.1)
    got, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    np.testing.assert_allclose(got["b"], 1.1, rtol=1e-6)
    np.testing.assert_array_equal(got["a"], 1)


@pytest.mark.parametrize("name", ["adadecay", "gradient_ratio", "norm_control"])
def test_stacked_is_unstacked(name):
    rng = np.random.default_rng(5)
    w, g = (jnp.asarray(x) for x in rng.normal(size=(2, 3, 4, 5)))
    extra = dict(rho=2.0) if name == "norm_control" else {}
    stack = getattr(wd, name)(0.1, stacked=lambda path: 1, **extra)
    together = one(stack, w, jnp.zeros_like(w), gradient={"w": g})
    apart, grads = ({str(i): x for i, x in enumerate(t)} for t in (w, g))
    tx = getattr(wd, name)(0.1, **extra)
    zero = jax.tree.map(jnp.zeros_like, apart)
    got, _ = tx.update(zero, tx.init(apart), apart, gradient=grads)
    np.testing.assert_allclose(together, np.stack(list(got.values())), rtol=1e-5)


def test_scheduled_needs_the_gradient():
    with pytest.raises(ValueError, match="with_gradient"):
        one(wd.scheduled(0.1), np.ones(2), np.ones(2))
    np.testing.assert_array_equal(
        one(wd.with_gradient(wd.scheduled(0.1, 0.0)), np.ones(2), np.zeros(2)), 0
    )


def test_independent_of_the_peak():
    for peak in (0.01, 0.3):
        assert peak * wd.independent(2e-4, peak) == pytest.approx(2e-4)


def test_ratios_of_all_ones_are_uniform_and_the_rest_is_obeyed():
    params, updates = mixed()
    del params["table"], updates["table"]
    uniform = optax.add_decayed_weights(0.1)
    want, _ = jax.jit(uniform.update)(updates, uniform.init(params), params)
    for rest, others in (("base", want), ("none", updates), (in_blocks, {})):
        tx = static_by_type(0.1, {"q": 1.0, "up": 1.0}, modules=modules, decay_rest=rest)
        got, _ = jax.jit(tx.update)(updates, tx.init(params), params)
        for n in ("q", "up"):
            chex.assert_trees_all_equal(got["blocks"][n], want["blocks"][n])
        scale = others["blocks"]["scale"] if others else want["blocks"]["scale"]
        out = others["out"] if others else updates["out"]
        chex.assert_trees_all_equal((got["blocks"]["scale"], got["out"]), (scale, out))


NAN = float("nan")


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: wd.awd(-1.0), "strength"),
        (lambda: wd.adadecay(NAN), "weight_decay"),
        (lambda: wd.adadecay(0.1, -4.0), "alpha"),
        (lambda: wd.cautious(float("inf")), "weight_decay"),
        (lambda: wd.adamc(0.1, rate, peak=0.0, normalised=in_blocks), "peak"),
        (lambda: wd.adamc(0.1, -1.0, peak=1.0, normalised=in_blocks), "learning_rate"),
        (lambda: wd.scheduled(-0.1), "weight_decay"),
        (lambda: wd.scheduled(0.1, -1.0), "eps"),
        (lambda: wd.scheduled(0.1, b2=1.0), "b2"),
        (lambda: wd.gradient_ratio(-0.1), "weight_decay"),
        (lambda: wd.norm_control(-0.1), "weight_decay"),
        (lambda: wd.norm_control(0.1, NAN), "rho"),
        (lambda: one(wd.norm_control(0.1, lambda path: -1.0), [1.0], [1.0]), "rho"),
        (lambda: one(wd.adadecay(0.1, stacked=lambda path: 2), [1.0], [1.0]), "stacked"),
        (lambda: wd.independent(0.1, 0.0), "peak"),
        (lambda: fixed_ratios(-0.1, BY_LEAF, modules=modules), "weight_decay"),
        (lambda: fixed_ratios(0.1, {"blocks.q": -1.0}, modules=modules), "ratios.blocks.q"),
        (lambda: fixed_ratios(0.1, BY_LEAF, modules=modules, decay_rest="all"), "decay_rest"),
        (lambda: fixed_ratios(0.1, {"k": 1.0}, modules=modules).init(mixed()[0]), "ratios"),
        (
            lambda: fixed_ratios(0.1, {"blocks.q": [1, 1, 1]}, modules=modules).init(
                mixed()[0]
            ),
            "ratios.blocks.q",
        ),
        (lambda: static_by_type(0.1, {"k": 1.0}, modules=modules).init(mixed()[0]), "ratios"),
        (lambda: shuffled(-0.1, 0, modules=modules), "weight_decay"),
        (lambda: shuffled(0.1, 0, modules=modules, every=0), "alphadecay.every"),
        (lambda: shuffled(0.1, 0, modules=modules, T=5), "alphadecay"),
        (lambda: wd.cautious(np.float32(-1)), "weight_decay"),
        (lambda: wd.cautious(np.float32(NAN)), "weight_decay"),
    ],
)
def test_bad_values_are_named(make, field):
    with pytest.raises(UserError, match=rf"config\.optim\.{field} is"):
        make()
