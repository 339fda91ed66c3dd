"""Training and estimation runs: placement changes nothing, resuming changes no bit."""

import zlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import config as configs
from common import loop, metrics, runner
from common import mesh as meshes
from common.errors import UserError
from diffusion import curve
from diffusion.dataset import dataset
from diffusion.edm2 import uncertainty
from diffusion.estimation import result
from diffusion.estimators import estimate_optimal_loss
from diffusion.images import scaled
from diffusion.optimal_schedule import middles
from diffusion.parts import parts_of
from tests.common.test_loop import Never
from tests.diffusion.digits import digits


def config(devices=1, experiment="diffusion.optimal_loss", **changes):
    made = configs.load("configs/optimal_loss.py:test")
    made.runs = {}
    made.experiment = experiment
    made.mesh.data = devices
    made.eval.samples = 0
    configs.apply(made, changes)
    return made


def started(c):
    """The experiment of a config, its placed state and its compiled step."""
    mesh = meshes.make(**c.mesh)
    made = runner.make(c)
    placed = loop.shapes(made, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, placed)
    state = jax.jit(made.init, out_shardings=shardings)(jax.random.key(0))
    return made, state, loop.stepper(made, placed)


def trained(many, measure=False, donor=None, **changes):
    c = config(**changes)
    with jax.set_mesh(mesh := meshes.make(**c.mesh)):
        made, state, step = started(c)
        if donor is not None:
            state = made.adopt(state, donor)
        for i in range(many):
            batch = meshes.to_devices(made.batch(i), mesh)
            state, values = step(state, batch, jax.random.key(1), jnp.uint32(i))
        found = made.evaluate(state, jax.random.key(2)) if measure else {}
        return c, jax.device_get(state), jax.device_get(values), found


def disturbed(state):
    """The state with noise on its parameters, the same wherever they lie.

    Fresh networks give nearly 0, whatever they are told: neither labels nor dropout show.
    """

    def moved(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        noise = 0.3 * rng.standard_normal(leaf.shape)
        return jax.device_put((np.asarray(leaf) + noise).astype(leaf.dtype), leaf.sharding)

    return state._replace(params=jax.tree_util.tree_map_with_path(moved, state.params))


EXACT = dict(experiment="diffusion.estimate", steps=6)


@pytest.fixture(scope="module")
def floor():
    return trained(6, measure=True, **EXACT)


@pytest.fixture(scope="module")
def plain():
    return trained(3)


@pytest.mark.parametrize(
    "changes", [dict(accumulate=4), dict(devices=8), dict(devices=4, accumulate=2)], ids=str
)
def test_placement_and_accumulation_change_nothing(plain, changes):
    _, state, values, _ = trained(3, **changes)
    chex.assert_trees_all_close(state.params, plain[1].params, atol=2e-5)
    assert values["loss"] == pytest.approx(plain[2]["loss"], rel=1e-5)


@pytest.mark.parametrize("devices", [1, 8])
def test_an_estimation_run_is_the_estimator(floor, devices):
    c, state, _, found = floor if devices == 1 else trained(6, True, devices=8, **EXACT)
    loss = result(c.estimator.name, c.estimator.form, 1, state)
    assert len(loss.sigmas) == 10
    assert (np.diff(loss.sigmas) > 0).all()
    again = estimate_optimal_loss(
        digits(), loss.sigmas, jax.random.key(9), num_draws=3 * 1797, block=599
    )
    error = np.hypot(loss.stderr, again.stderr)
    assert (np.abs(loss.value - again.value) <= 4 * error + 1e-9).all()
    np.testing.assert_allclose(found["value"], loss.value)
    assert 0.15 < found["sigma_star"] < 0.6  # Between two of the few levels.
    if devices == 8:
        np.testing.assert_allclose(
            loss.value, result("exact", "trcov", 1, floor[1]).value, rtol=1e-4
        )


def test_added_levels_surround_the_rise(floor):
    c, state, *_ = floor
    added = state.sigmas[c.estimator.points :]
    assert added[0] < 0.46 < added[-1]
    assert added[-1] / added[0] == pytest.approx(12, rel=1e-3)
    # They count from the block on that chose them.
    assert (state.exact.mean.trcov[: c.estimator.pilot, -1] > 10).all()


@pytest.mark.parametrize(
    "estimator",
    [
        dict(name="cdol", subset_size=128, c_rule="paper"),
        dict(name="knn", subset_size=64, neighbours=16),
        dict(name="corrected", subset_size=128, exact_blocks=20),
    ],
    ids=lambda e: e["name"],
)
def test_estimation_runs_of_subsets(floor, estimator):
    given = dict(experiment="diffusion.estimate", steps=40, estimator=estimator)
    c, state, _, found = trained(40, measure=True, **given)
    loss = result(c.estimator.name, "trcov", 1, state)
    assert np.isfinite(found["stderr"]).all()
    np.testing.assert_allclose(found["value"], loss.value)
    exact = estimate_optimal_loss(
        digits(), loss.sigmas, jax.random.key(9), num_draws=1797, block=599
    )
    # Where J* is 1e-4 few draws carry it, and no error bar tells: 1e-3 of V = 18.8 is allowed.
    near = lambda a, a_err, b, b_err: np.abs(a - b) <= 4 * np.hypot(a_err, b_err) + 1e-3
    # What subsets give on the average, bias included, at every level.
    value, lower, upper = by_subsets(loss.sigmas, 3000, **estimator)
    assert near(loss.lower, loss.lower_err, *lower).all()
    assert near(loss.upper, loss.upper_err, *upper).all()
    # And what the optimum is: within the bracket, and where it rises much nearer to the value
    # than to DOL below, or the value itself.
    error = exact.stderr
    assert (loss.lower <= exact.value + 4 * np.hypot(loss.lower_err, error) + 1e-3).all()
    assert (loss.upper >= exact.value - 4 * np.hypot(loss.upper_err, error)).all()
    if estimator["name"] == "corrected":
        assert near(loss.value, loss.stderr, exact.value, error).all()
    else:
        assert near(loss.value, loss.stderr, *value).all()
        rise = (exact.value > 1) & (exact.value < 10)
        assert rise.any()
        short = (exact.value - loss.value)[rise]
        assert (np.abs(short) < 0.5 * (exact.value - loss.lower)[rise]).all()


def by_subsets(sigmas, draws, *, name, subset_size, neighbours=0, c_rule="", **rest):
    """Value, lower and upper, each (mean [S], error [S]), of draws with a subset each.

    Brute force in float64. Of cdol the source weighs L / 4 N; of knn the neighbours stand for
    themselves and the subset for all others; of SNIS the source is there by chance only.
    """
    del rest
    data, rng = digits().astype(np.float64), np.random.default_rng(5)
    count = len(data)
    found = np.zeros((3, draws, len(sigmas)))
    for m in range(draws):
        source, subset = rng.integers(count), rng.choice(count, subset_size, replace=False)
        x0 = data[source]
        away = ((data - x0) ** 2).sum(1)
        drawn, one = np.zeros(count), np.arange(count) == source
        drawn[subset] = 1
        others = np.where(one, 0.0, drawn)
        mended = others + one * subset_size / (4 * count)
        if name == "knn":
            order = np.argsort(np.where(one, np.inf, away))
            close = np.isin(np.arange(count), order[:neighbours])
            left = others * ~close
            mended = one + close + left * (count - 1 - neighbours) / left.sum()
        noise = rng.standard_normal(data.shape[1])
        used = np.flatnonzero(mended + drawn)
        y, far = data[used], away[used]
        weights = [
            np.log(w[used], where=w[used] > 0, out=np.full(len(used), -np.inf))
            for w in (mended, others + one, drawn)
        ]
        for j, s in enumerate(sigmas):
            logit = -((x0 + s * noise - y) ** 2).sum(1) / (2 * s**2)
            for i, log_weight in enumerate(weights):
                p = np.exp(logit + log_weight - (logit + log_weight).max())
                p /= p.sum()
                residual = ((x0 - p @ y) ** 2).sum()
                found[i, m, j] = residual if i == 2 else p @ far - residual
    return [(f.mean(0), f.std(0) / np.sqrt(draws)) for f in found]


def test_classes_have_lower_floors(floor):
    given = dict(data=dict(class_cond=True), **EXACT)
    _, state, *_ = trained(6, **given)
    told, whole = result("exact", "trcov", 1, state), result("exact", "trcov", 1, floor[1])
    i, j = np.argmin(np.abs(told.sigmas - 1)), np.argmin(np.abs(whole.sigmas - 1))
    assert told.value[i] < whole.value[j]


def test_the_variance_within_classes_of_bytes_is_in_the_units_of_training(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (24, 2, 2, 3), np.uint8)
    labels = np.arange(24) % 3
    np.savez(tmp_path / "some.npz", images=pixels, labels=labels)
    given = dict(data=dict(class_cond=True, path=str(tmp_path / "some.npz")), **EXACT)
    _, state, *_ = trained(6, **given)
    y = (pixels.astype(np.float64) / 127.5 - 1).reshape(24, -1)
    want = sum(y[labels == k].var(0).sum() for k in range(3)) / 3
    assert state.variance == pytest.approx(want, rel=1e-5)


def test_classes_are_told_in_variance_and_information(floor):
    c, state, _, found = trained(6, True, data=dict(class_cond=True), **EXACT)
    images = dataset(**c.data, seed=c.data_seed)
    y = scaled(images.rows).reshape(len(images.rows), -1)
    parts = [y[images.labels == k] for k in range(10)]
    want = sum(((p - p.mean(0)) ** 2).sum() for p in parts) / len(y)
    assert state.variance == pytest.approx(want, rel=1e-4)
    assert found["value"][-1] == pytest.approx(want, rel=0.03)
    assert float(floor[1].variance) > 1.2 * want


def test_levels_that_are_not_chosen_yet_are_no_levels():
    given = dict(EXACT, estimator=dict(pilot=2))
    few, more = trained(1, True, **given), trained(3, True, **given)
    points = few[0].estimator.points
    assert len(few[3]["sigmas"]) == points
    assert np.isfinite(few[3]["value"]).all()
    assert np.isfinite(few[3]["information"])
    assert len(more[3]["sigmas"]) == points + few[0].estimator.more


def test_the_schedule_takes_over_the_curve(floor):
    c, state, values, _ = trained(
        3,
        donor=floor[1],
        init_from="floor-seed0",
        schedule=dict(kind="optimal_loss", optimal=dict(warm=16, every=16)),
    )
    smooth = curve.smooth(result("exact", "trcov", 1, floor[1]))
    s = np.exp(middles(c.schedule.sigma_min, c.schedule.sigma_max, 64))
    want = curve.interpolate(smooth, s) / 64
    np.testing.assert_allclose(state.schedule.floor, want, rtol=1e-5, atol=1e-9)
    assert state.schedule.variance == pytest.approx(18.773105 / 64, rel=1e-4)
    assert float(state.schedule.images) == 48
    assert np.isfinite(values["loss"])


@pytest.mark.parametrize("model", ["mlp", "edm2"])
def test_the_learned_log_loss_is_learned(model):
    edm2 = dict(model_channels=8, channel_mult=(1,), attn_resolutions=(), num_blocks=1)
    edm2 |= dict(channels_per_head=8)
    given = dict(schedule=dict(kind="edm2"), model=dict(name=model, edm2=edm2), steps=40)
    # Fast, so that few steps show; the uncertainty of edm2 starts at random.
    given |= dict(optim=dict(learning_rate=0.03, rate="constant"))
    c = config(**given)
    with jax.set_mesh(meshes.make(**c.mesh)):
        before = jax.device_get(started(c)[1].params)
    _, state, values, _ = trained(15, **given)
    after = state.params
    assert np.isfinite(values["loss"])
    sd = c.model.sigma_data
    rng = np.random.default_rng(0)
    s = np.exp(c.schedule.p_mean + c.schedule.p_std * rng.standard_normal(512))
    if model == "mlp":
        u = lambda p: np.interp(np.log(s), np.linspace(-7, 5, 64), p["log_loss"])
        assert np.abs(after["log_loss"]).max() > 0
    else:
        assert "log_loss" not in after
        u = lambda p: np.asarray(jax.jit(uncertainty)(p["net"], jnp.float32(np.log(s) / 4)))
        kernels = [p["net"]["uncertainty"]["kernel"] for p in (before, after)]
        assert np.abs(kernels[1] - kernels[0]).max() > 0.01
    # The weighted loss of the network as it is now, of one draw at each level.
    parts = parts_of(c, dataset(**c.data, seed=c.data_seed))
    x0 = digits()[rng.integers(1797, size=512)].reshape(512, 8, 8, 1)
    x = x0 + s[:, None, None, None] * rng.standard_normal(x0.shape)
    denoise = jax.jit(lambda net, x, s: parts.of_condition(net)(x, s))
    given_back = denoise(after["net"], jnp.float32(x), jnp.float32(s))
    error = ((np.asarray(given_back) - x0) ** 2).mean((1, 2, 3))
    weighted = (s**2 + sd**2) / (s * sd) ** 2 * error
    # exp(-u) J + u is least at u = log J.
    cost = lambda p: np.mean(np.exp(-u(p)) * weighted + u(p))
    above = lambda p: cost(p) - np.mean(1 + np.log(weighted))
    assert above(after) < 0.7 * above(before)


def test_a_model_learns_and_its_gap_is_no_debt():
    given = dict(steps=300, batch_size=128, model=dict(mlp=dict(width=64)))
    *_, before = trained(1, measure=True, **given)
    *_, found = trained(300, measure=True, **given)
    assert found["edm_gap"] < 0.7 * before["edm_gap"]
    assert (found["gap"] >= -3 * np.maximum(found["gap_err"], 1e-9)).all()
    assert found["edm_loss"] - found["edm_floor"] == pytest.approx(found["edm_gap"], rel=1e-4)
    assert found["images"] == 300 * 128
    # 6 FLOPs a parameter and image, but for the first layer, whose input needs no gradient.
    first = 80 * 64
    want = 6 * found["params"] - 2 * first
    assert found["flops"] / found["images"] == pytest.approx(want, rel=0.03)


FLOW = dict(
    process=dict(name="fm_linear"),
    target="velocity",
    data=dict(class_cond=True),
    label_drop=0.5,
    augment=0.5,
    ema=dict(kind="power"),
    model=dict(
        name="unet",
        dropout=0.1,
        unet=dict(model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=()),
    ),
)


def first_step(**changes):
    """Of a disturbed network that is told of augmentation, but does not heed it yet.

    Returns the classes of the batch, what the step shows, by how much it moved the network's
    parameters, and state and figures after one step more.
    """
    c = config(**changes)
    with jax.set_mesh(mesh := meshes.make(**c.mesh)):
        made, state, step = started(c)
        state = disturbed(state)
        net = state.params["net"]
        if "augment" in net:
            net["augment"]["kernel"] = 0 * net["augment"]["kernel"]
        before = jax.device_get(net)
        batch = made.batch(0)
        given = meshes.to_devices(batch, mesh)
        state, values = step(state, given, jax.random.key(1), jnp.uint32(0))
        after = jax.device_get(state.params["net"])
        moved = jax.tree.map(lambda a, b: np.abs(a - b), after, before)
        more = step(state, given, jax.random.key(1), jnp.uint32(1))
        classes = set(batch["label"].tolist())
        return classes, jax.device_get(values), moved, jax.device_get(more)


@pytest.fixture(scope="module")
def flow():
    return first_step(**FLOW)


@pytest.mark.parametrize("left_out", ["label_drop", "augment", "dropout"])
def test_label_drop_augmentation_and_dropout_each_change_the_step(flow, left_out):
    classes, with_it, moved, _ = flow
    zero = dict(model=FLOW["model"] | dict(dropout=0.0))
    _, without, plain, _ = first_step(
        **FLOW | (zero if left_out == "dropout" else {left_out: 0.0})
    )
    # The same rows, noise and parameters; rounding is below 1e-5.
    assert abs(with_it["loss"] / without["loss"] - 1) > 1e-3
    heard = lambda kernel: set(np.flatnonzero(kernel.max(1)).tolist())
    if left_out == "label_drop":
        # The weights of a class move with a label that reaches the network, and only so.
        assert heard(plain["label"]["kernel"]) == classes
        assert set() < heard(moved["label"]["kernel"]) < classes
    if left_out == "augment":
        assert "augment" not in plain
        assert len(heard(moved["augment"]["kernel"])) >= 8  # Of nine; flips of rows are rare.


def test_flows_and_powers(flow):
    """Two averages of power functions, labels dropped, augmentation, flow matching."""
    *_, (state, values) = flow
    assert len(state.averages.trees) == 2
    assert np.isfinite(values["loss"])
    assert values["update_norm"] > 0


@pytest.mark.parametrize(
    "changes",
    [
        dict(schedule=dict(kind="optimal_loss", optimal=dict(warm=32, every=32))),
        dict(experiment="diffusion.estimate"),
    ],
    ids=["training", "estimation"],
)
def test_resuming_changes_no_bit(changes, tmp_path, floor):
    given = dict(save_every=2, log_every=1) | changes
    if "schedule" in changes:
        given["init_from"] = "elsewhere"
    states = []
    for name, stops in (("whole", [6]), ("broken", [3, 6])):
        for stop in stops:
            c = config(**given, steps=stop) if "schedule" in changes else config(**given)
            c.steps = 6
            made = runner.make(c)
            short = made._replace(evaluate=None)
            c.steps = stop
            with jax.set_mesh(meshes.make(**c.mesh)):
                donor = (lambda: floor[1]) if c.init_from else None
                loop.train(short, c, tmp_path / name, Never(), donor)
        rows = metrics.read(tmp_path / name / "metrics.jsonl")
        states.append((rows, runner.load(made, c, tmp_path / name, name).state()))
    assert states[0][0] == states[1][0]
    chex.assert_trees_all_equal(*(jax.device_get(s) for _, s in states))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(batch_size=0), "batch_size"),
        (dict(accumulate=3), "accumulate"),
        (dict(label_drop=0.1), "label_drop"),
        (dict(augment=2.0), "augment"),
        (dict(schedule=dict(kind="optimal_loss")), "init_from"),
        (dict(schedule=dict(kind="cosine")), "schedule.kind"),
        (dict(process=dict(name="wp")), "process.name"),
        (dict(target="mu"), "target"),
        (dict(model=dict(name="unets")), "model.name"),
        (dict(model=dict(noise_input="raw")), "model.noise_input"),
        (dict(model=dict(sigma_data=0.0)), "sigma_data"),
        (dict(optim=dict(rate="step")), "optim.rate"),
        (dict(ema=dict(kind="mean")), "ema.kind"),
        (dict(eval=dict(features="fid")), "eval.features"),
        (dict(eval=dict(samples=8, features="inception")), "eval.weights"),
        (dict(eval=dict(draws=1)), "eval.draws"),
        (dict(data=dict(path="nowhere.npz")), "nowhere.npz"),
        (dict(data=dict(path="gaussian:8")), "gaussian:HxWxC"),
        (dict(data=dict(num_rows=5000)), "num_rows"),
        (dict(experiment="diffusion.estimate", estimator=dict(pilot=0)), "pilot"),
        (dict(experiment="diffusion.estimate", estimator=dict(points=1)), "points"),
        (dict(experiment="diffusion.estimate", estimator=dict(tau=0.0)), "tau"),
        (dict(experiment="diffusion.estimate", estimator=dict(tile=0)), "tile"),
        (dict(experiment="diffusion.estimate", estimator=dict(precision="half")), "precision"),
        (
            dict(
                experiment="diffusion.estimate",
                steps=60,
                estimator=dict(name="corrected", exact_blocks=16),
            ),
            "exact_blocks",
        ),
        (dict(experiment="diffusion.estimate", estimator=dict(name="best")), "estimator.name"),
        (
            dict(experiment="diffusion.estimate", estimator=dict(name="cdol", c_rule="-1")),
            "c_rule",
        ),
        (
            dict(
                experiment="diffusion.estimate",
                data=dict(class_cond=True),
                estimator=dict(name="dol"),
            ),
            "class_cond",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_named(changes, said):
    c = config()
    configs.apply(c, changes)
    with pytest.raises(UserError, match=said):
        runner.make(c)
