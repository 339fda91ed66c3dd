"""Every option of AlphaDecay by its value in NumPy, and input that cannot be."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common.errors import UserError
from optim import exponents
from optim.adam_alphadecay import coupled, decoupled
from optim.alphadecay import AlphaDecayState, alphadecay, diagnostics, refresher
from optim.decay_controls import shuffled
from optim.modules import Dims, select
from optim.weight_decay import with_gradient

FIXED = dict(s1=0.67, s2=5.0, min_eigs=10)
NAMES = ("blocks.q", "blocks.up")
NAN = float("nan")


def modules(name, leaf):
    return Dims() if name.split(".")[-1] in ("q", "up") else None


def network(seed=0, dtype=np.float64):
    """Two layers, stacked: q 16 x 16, up 16 x 40; an embedding beside them."""
    rng = np.random.default_rng(seed)
    make = lambda *shape: (rng.normal(size=shape) * rng.pareto(4, shape[-1])).astype(dtype)
    return {"blocks": {"q": make(2, 16, 16), "up": make(2, 16, 40)}, "embed": make(30, 16)}


def arrays(seed=0, dtype=np.float32):
    return jax.tree.map(jnp.asarray, network(seed, dtype))


def members(tree):
    """q[0], q[1], up[0], up[1]."""
    return [*tree["blocks"]["q"], *tree["blocks"]["up"]]


def values(w):
    """Eigenvalues of the smaller Gram matrix, ascending."""
    return np.linalg.svd(w, compute_uv=False)[::-1] ** 2


def hill(values, tail=0.5, below=0):
    start = int(len(values) * (1 - tail) + 1e-9)
    logs = np.log(values[start:] / values[start - below])
    return 1 + len(logs) / logs.sum()


def pooled(w):
    """Square windows along the long side, evenly laid from end to end, fitted together."""
    r, long = w.shape
    starts = {16: [0], 40: [0, 12, 24]}[long]
    return hill(np.sort(np.concatenate([values(w[:, a : a + r]) for a in starts])))


def clauset(w):
    """The start whose power law is nearest to the counts (arXiv:0706.1062)."""
    x, best = values(w), (np.inf, NAN)
    for i in range(len(x) - 1):
        tail = x[i:]
        alpha = 1 + len(tail) / np.log(tail / tail[0]).sum()
        model = 1 - (tail / tail[0]) ** (1 - alpha)
        best = min(best, (np.abs(model - np.arange(len(tail)) / len(tail)).max(), alpha))
    return best[1]


def near_peak(w):
    """As `exponents` has it, which `test_exponents` checks."""
    return float(exponents.clauset_alpha(jnp.asarray(values(w)), "fix_finger"))


def random_matrix(w):
    return exponents.marchenko_pastur_alpha(*w.shape, 0.5)


def linear(scores, s1=0.67, s2=5.0):
    low, high = np.min(scores), np.max(scores)
    return (np.asarray(scores) - low) / (high - low) * (s2 - s1) + s1


SCORES = {
    "alpha": (dict(), lambda w: hill(values(w))),
    "tail": (dict(tail=0.25), lambda w: hill(values(w), 0.25)),
    "hill": (dict(reference="hill"), lambda w: hill(values(w), below=1)),
    "frobenius": (dict(score="frobenius"), lambda w: (w**2).sum()),
    "spectral": (dict(score="spectral"), lambda w: np.linalg.norm(w, 2) ** 2),
    "stable_rank": (
        dict(score="stable_rank"),
        lambda w: (w**2).sum() / np.linalg.norm(w, 2) ** 2,
    ),
    "alpha_hat": (
        dict(score="alpha_hat"),
        lambda w: np.logaddexp(0, hill(values(w)) * np.log10(values(w)[-1])),
    ),
    "mp": (dict(shape_correction="mp"), lambda w: hill(values(w)) - random_matrix(w)),
    "subsample": (dict(shape_correction="subsample"), pooled),
    "goodness_of_fit": (dict(fit="goodness_of_fit"), clauset),
    "fix_finger": (dict(fit="fix_finger"), near_peak),
}


@pytest.mark.parametrize("name", SCORES)
def test_scores_are_those_of_numpy(name):
    settings, score = SCORES[name]
    w = network()
    with jax.enable_x64(True):
        want = [score(a) for a in members(w)]
        params = jax.tree.map(jnp.asarray, w)
        shared = dict(modules=modules, method="svd", **FIXED) | settings
        state = refresher(**shared)(alphadecay(0.1, **shared).init(params), params)
        state = jax.device_get(state)
    for field, target in ((state.alpha, want), (state.ratio, linear(want))):
        got = np.concatenate([field[n] for n in NAMES])
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, target, rtol=1e-9)


RATIOS = {
    "sqrt": (dict(assignment="sqrt"), lambda a: np.sqrt(a) / np.sqrt(a).mean()),
    "log2": (dict(assignment="log2"), lambda a: np.log2(a) / np.log2(a).mean()),
    "uniform": (dict(assignment="uniform"), np.ones_like),
    "quantiles": (
        dict(quantiles=(0.25, 0.75)),
        lambda a: np.interp(a, np.quantile(a, [0.25, 0.75]), [0.67, 5.0]),
    ),
    "exclude": (
        dict(exclude=("blocks.q[1]",)),
        lambda a: np.insert(linear(np.delete(a, 1)), 1, 1.0),
    ),
    "list": (dict(quantiles=[0, 1], exclude=[]), linear),
}


@pytest.mark.parametrize("name", RATIOS)
def test_ratios_are_those_of_numpy(name):
    settings, ratio = RATIOS[name]
    w = network()
    params = arrays()
    shared = dict(modules=modules, method="svd", **FIXED) | settings
    state = refresher(**shared)(alphadecay(0.1, modules=modules, **FIXED).init(params), params)
    got = np.concatenate([state.ratio[n] for n in NAMES])
    np.testing.assert_allclose(got, ratio([hill(values(a)) for a in members(w)]), rtol=1e-4)


def test_exponents_are_smoothed_over_refreshes():
    shared = dict(modules=modules, method="svd", ema=0.75, **FIXED)
    refresh, state = refresher(**shared), alphadecay(0.1, **shared).init(arrays())
    first, second = ([hill(values(a)) for a in members(network(s))] for s in (0, 1))
    state = refresh(state, arrays(0))
    np.testing.assert_allclose(np.concatenate([*state.alpha.values()]), first, rtol=1e-4)
    state = refresh(state._replace(count=jnp.int32(5)), arrays(1))
    want = 0.75 * np.array(first) + 0.25 * np.array(second)
    np.testing.assert_allclose(np.concatenate([*state.alpha.values()]), want, rtol=1e-4)
    np.testing.assert_allclose(np.concatenate([*state.ratio.values()]), linear(want), rtol=1e-3)


def test_the_score_of_gradients():
    """Those given as `gradient`, or else the updates; not numbers, no change."""
    params, updates, gradient = (arrays(seed) for seed in (0, 1, 2))
    tx = alphadecay(0.1, modules=modules, score="grad_norm", every=1, **FIXED)
    update = jax.jit(tx.update)
    norms = lambda tree: [np.linalg.norm(g) for g in members(tree)]
    _, state = update(updates, tx.init(params), params)
    np.testing.assert_allclose(np.concatenate([*state.alpha.values()]), norms(updates), 1e-5)
    for make in (tx, with_gradient(tx)):
        raw = gradient if make is tx else updates
        _, state = jax.jit(make.update)(updates, tx.init(params), params, gradient=gradient)
        got = [np.concatenate([*field.values()]) for field in (state.alpha, state.ratio)]
        np.testing.assert_allclose(got[0], norms(raw), rtol=1e-5)
        np.testing.assert_allclose(got[1], linear(norms(raw)), rtol=1e-4)
    bad = jax.tree.map(lambda g: g.at[0, 0].set(jnp.nan), updates)
    _, after = update(bad, state, params)
    chex.assert_trees_all_equal((after.alpha, after.ratio), (state.alpha, state.ratio))


def test_the_mean_is_normalised_over_those_that_take_part():
    """The excluded and those without an exponent stay at 1; ratios of 0 become 1."""
    params = arrays()
    params["blocks"]["up"] = params["blocks"]["up"].at[1].set(0.0)
    shared = dict(modules=modules, method="svd", exclude=("blocks.q[1]",), normalize_mean=True)
    state = alphadecay(0.1, min_eigs=10, **shared).init(params)
    ends = lambda **s: refresher(min_eigs=10, **shared, **s)(state, params).ratio
    ratio = ends(s1=0.5, s2=2.5)
    assert ratio["blocks.q"][1] == ratio["blocks.up"][1] == 1
    q, up = float(ratio["blocks.q"][0]), float(ratio["blocks.up"][0])
    assert max(q, up) / min(q, up) == pytest.approx(5, rel=1e-5)
    assert (256 * q + 640 * up) / 896 == pytest.approx(1, rel=1e-5)
    for value in ends(s1=0.0, s2=0.0).values():
        np.testing.assert_array_equal(value, 1)


@pytest.mark.parametrize("score", ["alpha", "grad_norm"])
@pytest.mark.parametrize("gone", [None, optax.MaskedNode()], ids=["none", "masked"])
def test_an_update_that_is_not_there_is_passed_over(score, gone):
    """Even the first in the tree; other modules keep their own gradients."""
    first = {"q": arrays(3)["blocks"]["q"], "scale": jnp.ones(3)}
    params = {"a": first, "absent": None, "also": optax.MaskedNode()} | arrays()
    tx = alphadecay(0.1, modules=modules, score=score, method="gram", **FIXED)
    updates = {**params, "a": {"q": gone, "scale": gone}, "embed": gone}
    got, state = tx.update(updates, tx.init(params), params)
    assert (got["a"], got["embed"]) == (updates["a"], gone)
    assert (got["absent"], got["also"]) == (None, optax.MaskedNode())
    assert list(state.ratio) == ["a.q", *NAMES]
    whole, other = tx.update(params, tx.init(params), params)
    if score == "alpha":
        chex.assert_trees_all_equal(state, other)
        chex.assert_trees_all_equal(got["blocks"], whole["blocks"])
    else:
        assert np.isnan(state.alpha["a.q"]).all()
        np.testing.assert_array_equal(state.ratio["a.q"], 1)
        for n in NAMES:
            np.testing.assert_array_equal(state.alpha[n], other.alpha[n])
    assert not np.array_equal(got["blocks"]["q"], params["blocks"]["q"])


def test_shuffled_leaves_small_modules_as_alphadecay_does():
    """They decay at eta, also where the rest does not."""
    params = arrays() | {"tiny": {"q": jnp.ones((2, 2))}}
    zero = jax.tree.map(jnp.zeros_like, params)
    settings = dict(modules=modules, decay_rest="none", method="svd", **FIXED)
    for tx in (shuffled(0.1, 4, **settings), alphadecay(0.1, **settings)):
        got, _ = tx.update(zero, tx.init(params), params)
        np.testing.assert_allclose(got["tiny"]["q"], 0.1)
        np.testing.assert_array_equal(got["embed"], 0)
        assert np.abs(got["blocks"]["q"]).min() > 0


def test_diagnostics_are_those_of_numpy():
    alpha = {"blocks.q": jnp.array([1.5, 2.5]), "blocks.up": jnp.array([jnp.nan, 4.0])}
    ratio = {"blocks.q": jnp.array([0.5, 1.5]), "blocks.up": jnp.array([1.0, 3.0])}
    state = AlphaDecayState(jnp.int32(8), alpha, ratio)
    small = arrays() | {"tiny": {"q": jnp.ones((2, 2))}}
    found = diagnostics(state, select(small, modules), 5, 1)
    want = dict(
        alpha_q=2.0, alpha_min_q=1.5, alpha_max_q=2.5, ratio_q=1.0, ratio_min_q=0.5,
        ratio_max_q=1.5, alpha_up=4.0, alpha_min_up=4.0, alpha_max_up=4.0, ratio_up=2.0,
        ratio_min_up=1.0, ratio_max_up=3.0, alpha_undefined=1, alpha_min=1.5, alpha_max=4.0,
        alpha_spread=2.5, ratio_mean=(256 * 2 + 640 * 4) / (256 * 2 + 640 * 2), since_refresh=3,
    )  # fmt: skip
    assert {k: pytest.approx(float(v), rel=1e-6) for k, v in found.items()} == want
    since = lambda count, offset: diagnostics(
        state._replace(count=jnp.int32(count)), select(small, modules), 5, offset
    )["since_refresh"]
    assert [int(since(t + 1, 0)) for t in range(7)] == [0, 1, 2, 3, 4, 0, 1]
    assert [int(since(t + 1, 1)) for t in range(7)] == [0, 1, 2, 3, 0, 1, 2]
    with pytest.raises(ValueError, match=r"other modules; differing: blocks\.q"):
        diagnostics(state, select({"tiny": small["tiny"]}, modules), 5)


def test_the_refresher_knows_its_modules():
    params = arrays()
    state = alphadecay(0.1, modules=modules, **FIXED).init(params)
    only = lambda name, leaf: Dims() if name == "blocks.q" else None
    fewer = refresher(modules=only, **FIXED)
    with pytest.raises(ValueError, match=r"other modules; differing: blocks\.up"):
        fewer(state, params)


@pytest.mark.parametrize("make", [decoupled, coupled])
def test_builders_are_the_chains_written_by_hand(make):
    params, settings = arrays(), dict(modules=modules, every=2, **FIXED)
    rate = lambda t: 0.01 / (1 + t)
    decay, adam = alphadecay(0.3, **settings), optax.scale_by_adam(0.8, 0.99, 1e-6)
    order = (decay, adam) if make is coupled else (adam, decay)
    clip, last = optax.clip_by_global_norm(0.5), optax.scale_by_learning_rate(rate)
    theirs = optax.chain(clip, *order, last)
    ours = make(rate, 0.3, b1=0.8, b2=0.99, eps=1e-6, clip=0.5, **settings)
    found = []
    for tx in (ours, theirs):
        w, state, update = params, tx.init(params), jax.jit(tx.update)
        for seed in range(3):
            updates, state = update(arrays(seed + 1), state, w)
            w = optax.apply_updates(w, updates)
        found.append((w, state))
    chex.assert_trees_all_equal(*found)
    assert len(make(0.1, 0.3, **settings).init(params)) == 3  # Nothing is clipped.
    for name, value in (("b2", 1.0), ("clip", -1.0), ("learning_rate", NAN), ("eps", "x")):
        arguments = dict(learning_rate=0.1, weight_decay=0.1) | {name: value}
        with pytest.raises(UserError, match=rf"config\.optim\.{name} is"):
            make(**arguments, **settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(s1=-1.0), r"\.s1 is -1\.0, but must be a finite number from 0 up"),
        (dict(s1="a"), r"\.s1 is 'a', but must be a finite number"),
        (dict(s1=None), r"\.s1 is None, but"),
        (dict(s1=3.0, s2=1.0), r"\.s2 is 1\.0, but must be finite and at least s1 = 3\.0"),
        (dict(s2=NAN), r"\.s2 is nan"),
        (dict(s2=np.float32(NAN)), r"\.s2 is np\.float32\(nan\)"),
        (dict(every=0), r"\.every is 0, but must be a whole number from 1 up"),
        (dict(every=True), r"\.every is True"),
        (dict(every=2.0), r"\.every is 2\.0"),
        (dict(every=2**31), r"\.every is 2147483648, but .* from 1 to 2147483647"),
        (dict(offset=-1), r"\.offset is -1"),
        (dict(min_eigs=2), r"\.min_eigs is 2, but must be a whole number from 3 up"),
        (dict(tail=1.0), r"\.tail is 1\.0, but must be between 0 and 1"),
        (dict(tail="x"), r"\.tail is 'x', but must be between 0 and 1"),
        (dict(fit="mean"), r"\.fit is 'mean', but must be one of median"),
        (dict(score="beta"), r"\.score is 'beta'"),
        (dict(score=["alpha"]), r"\.score is \['alpha'\]"),
        (dict(quantiles=(0.9, 0.1)), r"\.quantiles is \(0\.9, 0\.1\), but must be two shares"),
        (dict(quantiles=(0.1, 0.5, 0.9)), r"\.quantiles is"),
        (dict(quantiles=None), r"\.quantiles is None"),
        (dict(ema=1.0), r"\.ema is 1\.0"),
        (dict(exclude="blocks.q[0]"), r"\.exclude is 'blocks\.q\[0\]', but must be a tuple"),
        (dict(slip="no"), r"\.slip is 'no', but must be True or False"),
        (dict(assignment="sqrt", shape_correction="mp"), "none with sqrt and log2"),
        (dict(fit="fix_finger", shape_correction="mp"), r"\.shape_correction is 'mp', but"),
        (dict(assignment="log2", score="frobenius"), "log2 for alpha and stable_rank alone"),
        (dict(decay_rest="all"), r"optim\.decay_rest is 'all', but must be base"),
        (dict(score="grad_norm"), r"\.score is 'grad_norm', but must be computed from"),
        (dict(score="grad_norm", refresh="external"), r"\.refresh is 'external', but"),
        (dict(s3=1), r"optim\.alphadecay is 's3', but must be settings named s1, s2, every"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_named(settings, said):
    where = r"^config\.optim\.alphadecay" if said.startswith(r"\.") else ""
    with pytest.raises(UserError, match=where + said):
        refresher(modules=modules, **settings)


@pytest.mark.parametrize("value", [-0.1, "0.1", None, np.float32(-1), np.float32(NAN)])
def test_a_strength_that_cannot_be_is_named(value):
    with pytest.raises(UserError, match=r"config\.optim\.weight_decay is"):
        alphadecay(value, modules=modules)


def test_what_cannot_be_is_said_by_init():
    params = arrays()
    for settings, said in (
        (dict(min_eigs=50), "alphadecay.min_eigs is 50, but must be at most 16"),
        (dict(tail=0.99), r"alphadecay.tail is 0\.99, but must be at most 0\.9375"),
        (dict(tail=0.06), r"alphadecay.tail is 0\.06, but must be above 0\.0625"),
        (dict(exclude=("q",)), r"alphadecay.exclude is 'q', but .* such as blocks\.q\[0\]"),
    ):
        with pytest.raises(UserError, match=said):
            alphadecay(0.1, modules=modules, **FIXED | settings).init(params)
    tx = alphadecay(0.1, modules=modules, **FIXED)
    less = {"blocks": {"q": params["blocks"]["q"]}}
    with pytest.raises(ValueError, match=r"differing: blocks\.up"):
        tx.update(less, tx.init(params), less)


def test_modules_may_be_told_by_true():
    flat = {"a": np.ones((4, 5)), "b": np.ones((2, 4, 5)), "c": np.ones(3), "gone": None}
    tree = {"a": True, "b": False, "c": None, "gone": None}
    for told in (tree, lambda name, leaf: name == "a", {**tree, "b": np.False_}):
        (leaf,) = select(flat, told)
        assert (leaf.name, leaf.index, leaf.modules, leaf.sides) == ("a", 0, (), (4, 5))
    (leaf,) = select(flat, lambda name, leaf: Dims() if name == "b" else False)
    assert (leaf.index, leaf.modules, leaf.sides) == (1, (2,), (4, 5))


FLAT = {"a": np.ones((4, 6)), "b": np.ones((2, 4, 6)), "c": np.ones(3)}


@pytest.mark.parametrize(
    ("params", "told", "said"),
    [
        (FLAT, lambda n, a: n == "b", r"parameter b of shape .* by True, but needs its axes"),
        (
            FLAT,
            lambda n, a: n == "c",
            r"parameter c .* no matrix .*; there are a, b with two axes",
        ),
        (FLAT, lambda n, a: None, "No parameter is selected as a module; there are a, b with"),
        ({"c": FLAT["c"]}, lambda n, a: None, "as a module; there are none with two axes"),
        ({}, lambda n, a: None, "There are no parameters to select modules from"),
        ({}, {}, "There are no parameters"),
        (FLAT, lambda n, a: n, "parameter a is selected by 'a', but must be by Dims, True"),
        (FLAT, lambda n, a: Dims(parts="3"), "module a has parts '3', but must have a whole"),
        (FLAT, lambda n, a: Dims(parts=0), "module a has parts 0"),
        (FLAT, lambda n, a: Dims(parts=4), "module a has 6 outputs, which 4 do not divide"),
        (FLAT, lambda n, a: Dims("x", 1), "no matrix with the reduction axes"),
        (FLAT, {"a": True}, "tree of modules has 1 leaves, but the parameters have 3: a, b"),
    ],
)
def test_modules_that_cannot_be_are_named(params, told, said):
    with pytest.raises(UserError, match=said):
        select(params, told)
