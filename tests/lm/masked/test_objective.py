"""Objectives against -log q(x) and sums over all reveal plans; brute force in float64."""

from functools import partial
from itertools import product
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from common import mesh as meshes
from common.errors import UserError
from lm.masked import curve, objective, parts, schedules
from lm.masked import denoiser as denoisers
from lm.masked.denoiser import carry_over, denoise, plain, target_log_f
from tests.lm.masked import tables

V, L = 2, 4
EVERY = np.array(list(product(range(V), repeat=L)))
Q = np.random.default_rng(0).dirichlet(np.full(V**L, 3.0))
with np.errstate(divide="ignore"):
    ROWS = np.log(tables.posterior(Q.reshape((V,) * L)))
EXACT = tables.denoiser(V, L)
PARAMS = jnp.asarray(ROWS, jnp.float32)
FIELDS = dict(
    kind="continuous", schedule="linear", grid="uniform", steps=3, floor=1e-3, stratify=True
)


def made(**fields):
    return objective.objective(**FIELDS | fields)


@partial(jax.jit, static_argnums=1)
def draws(key, settings, x):
    """[keys, batch] draws of the objective."""
    one = lambda key: objective.nelbo(key, settings, EXACT, PARAMS, x)[0]
    return jax.lax.map(one, jax.random.split(key, 4096), batch_size=256)


def close(found, want, errors=4.5):
    """The mean over keys is the wanted number, within its own error."""
    found = np.asarray(found, float)
    spread = found.std(axis=0, ddof=1) / np.sqrt(len(found))
    assert np.all(np.abs(found.mean(axis=0) - want) < errors * spread + 1e-6)
    assert np.all(spread < 0.1)


@pytest.mark.parametrize(
    "fields",
    [
        dict(kind="count"),
        dict(floor=0.03),
        dict(floor=0.03, schedule="cosine"),
        dict(floor=0.03, schedule="poly2"),
        dict(kind="count", stratify=False),
    ],
    ids=str,
)
def test_of_the_exact_denoiser_every_order_gives_log_q(fields):
    settings = made(**fields)
    found = draws(jax.random.key(0), settings, jnp.asarray(EVERY))
    want = -np.log(Q)
    if settings.kind == "continuous":
        # What is cut off: alpha above alpha(floor) has nearly all visible.
        want = want - dropped(settings.schedule.alpha(settings.floor))
    close(found, want)


def dropped(alpha):
    """The part of each text's NELBO with more than alpha visible, by summing over subsets."""
    found = np.zeros(len(EVERY))
    for masked in product([False, True], repeat=L):
        masked = np.array(masked)
        m = masked.sum()
        if m:
            # Integral over a in [alpha, 1] of a^(L-m) (1-a)^(m-1).
            tail = special.betaincc(L - m + 1, m, alpha) * special.beta(L - m + 1, m)
            found += tail * losses(masked).sum(axis=1)
    return found


def losses(masked):
    """-log f of the masked positions of every text, [V^L, L]."""
    base = (V + 1) ** np.arange(L - 1, -1, -1)
    rows = ROWS[(np.where(masked, V, EVERY) @ base)]
    found = np.take_along_axis(rows, EVERY[..., None], axis=-1)[..., 0]
    return np.where(masked, -found, 0)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_finite_objective_is_the_mean_over_all_plans(schedule):
    w = schedules.weights(schedules.schedule(schedule), "uniform", 3)
    want = np.zeros(len(EVERY))
    for plan in product(range(3), repeat=L):
        plan = np.array(plan)
        for k in range(3):
            want += np.prod(w[plan]) * np.where(plan == k, losses(plan >= k), 0).sum(axis=1)
    close(draws(jax.random.key(1), made(kind="finite", schedule=schedule), EVERY), want)
    assert Q @ want > -Q @ np.log(Q) + 0.01


def test_times_are_spread_over_the_global_batch():
    found = np.sort(objective.times(jax.random.key(3), 64, True))
    assert np.all(np.floor(found * 64) == np.arange(64))
    assert len(np.unique(np.floor(objective.times(jax.random.key(3), 64, False) * 64))) < 60


def test_count_masks_exactly_n_and_all_n_alike():
    x = jnp.zeros((40, 5), jnp.int32)
    free = jnp.arange(5) >= jnp.arange(40)[:, None] % 5
    found = objective.noised(jax.random.key(0), made(kind="count"), x, free, 9)
    assert not np.any(found.masked & ~free)
    n = np.asarray(found.masked.sum(axis=1))
    np.testing.assert_allclose(found.weight, np.asarray(free.sum(axis=1)) / n, rtol=1e-6)
    assert n.min() == 1
    assert np.all((found.x == 9) == found.masked)
    whole = objective.noised(jax.random.key(1), made(kind="count"), x, x == 0, 9)
    assert np.bincount(whole.masked.sum(axis=1)).tolist() == [0, 8, 8, 8, 8, 8]


def test_exact_zeros_elsewhere_do_no_harm():
    """A visible token that f excludes has an infinite loss and no part in the sum."""

    def f(params, x):
        logits = jnp.stack([params * jnp.ones(x.shape), jnp.zeros(x.shape)], axis=-1)
        none = jnp.array([0.0, -jnp.inf])
        return jnp.where((x == 2)[..., None], jax.nn.log_softmax(logits), none)

    x = jnp.ones((8, 6), jnp.int32)
    loss = lambda params: objective.nelbo(jax.random.key(0), made(), plain(f, 2), params, x)[
        0
    ].mean()
    value, slope = jax.value_and_grad(loss)(jnp.float32(0.3))
    assert np.isfinite(value)
    assert np.isfinite(slope)
    assert slope > 0


def test_shards_draw_what_one_device_draws():
    x = jnp.asarray(np.tile(EVERY, (2, 1)))
    function = jax.jit(lambda x: objective.nelbo(jax.random.key(5), made(), EXACT, PARAMS, x))
    want = function(x)
    mesh = meshes.make(devices=jax.devices()[:8])
    with jax.set_mesh(mesh):
        found = function(meshes.to_devices(np.asarray(x), mesh))
    chex.assert_trees_all_close(found, want, rtol=1e-6)


def test_ratios_are_binned_from_above():
    h = np.arange(32.0)  # n visible of 32: mask ratios 32/32, 31/32, ...
    found = curve.by_ratio(h, 16)
    np.testing.assert_allclose(found, [30.5 - 2 * i for i in range(16)])
    few = curve.by_ratio(np.array([3.0, 5.0]), 4)
    np.testing.assert_array_equal(few, [np.nan, 5, np.nan, 3])


def test_carry_over_puts_the_visible_token_first():
    x = jnp.array([[0, 2, 1, 2]])
    found = carry_over(denoise(EXACT, PARAMS, x), x, 2)
    assert found[0, 0].tolist() == [0, -np.inf]
    assert found[0, 2].tolist() == [-np.inf, 0]
    np.testing.assert_array_equal(found[0, 1], denoise(EXACT, PARAMS, x)[0, 1])


@pytest.mark.parametrize("devices", [1, 8])
def test_logits_in_parts_are_those_of_the_whole(monkeypatch, devices):
    x = jnp.asarray(np.tile(EVERY, (1, 1)))
    noisy = x.at[:, ::2].set(V)

    def loss(rows):
        return jnp.sum(target_log_f(EXACT, rows, noisy, x) * (1 + jnp.arange(L)))

    want = jax.value_and_grad(loss)(PARAMS)
    monkeypatch.setattr(denoisers, "LOGITS", len(x) * V)
    with jax.set_mesh(meshes.make(devices=jax.devices()[:devices])):
        text = str(jax.make_jaxpr(loss)(PARAMS))
        found = jax.jit(jax.value_and_grad(loss))(PARAMS)
    assert f"{len(x)},1,{V}" in text
    chex.assert_trees_all_close(found, want, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (dict(kind="nelbo"), "objective.kind is 'nelbo'"),
        (dict(schedule="sine"), "objective.schedule is 'sine'"),
        (dict(grid="log"), "objective.grid is 'log'"),
        (dict(floor=0.0), "objective.floor is 0.0"),
        (dict(steps=0), "objective.steps is 0"),
    ],
)
def test_what_cannot_be_is_refused(fields, said):
    with pytest.raises(UserError, match=said):
        made(**fields)


def h_exact(n):
    """h_n by summing over all texts and subsets."""
    subsets = [np.array(m) for m in product([False, True], repeat=L) if sum(m) == L - n]
    return np.mean([Q @ losses(m).sum(axis=1) / (L - n) for m in subsets])


def test_the_curve_gives_entropy_and_every_number_of_steps():
    rng = np.random.default_rng(0)
    total = curve.empty(L)
    measure = jax.jit(partial(curve.measured, denoiser=EXACT))
    log_q = jnp.asarray(-np.log(Q) / L, jnp.float32)
    for i in range(8):
        which = rng.choice(len(Q), 2048, p=Q)
        total = curve.added(
            total,
            measure(
                jax.random.key(i),
                params=PARAMS,
                x=jnp.asarray(EVERY[which]),
                start=i * 2048,
                control=log_q[which],
            ),
        )
    assert np.all(total.texts == 4096)
    h, error = curve.information(total)
    entropy = -(Q @ np.log(Q)) / L
    want = np.array([h_exact(n) for n in range(L)])
    assert np.all(np.abs(h + entropy - want) < 4.5 * error)
    whole = curve.combined(total, curve.whole(L))
    assert abs(whole.value) < 4.5 * whole.error + 1e-6
    assert whole.error < 0.01
    w = schedules.weights(schedules.schedule("cosine"), "uniform", 3)
    plans = curve.combined(total, curve.ancestral(L, w))
    mean = 0.0
    for plan in product(range(3), repeat=L):
        plan = np.array(plan)
        for k in range(3):
            mean += np.prod(w[plan]) * (Q @ np.where(plan == k, losses(plan >= k), 0)).sum()
    assert abs(plans.value + entropy - mean / L) < 4.5 * plans.error


def test_coefficients_by_hand():
    np.testing.assert_allclose(curve.ancestral(3, np.array([1.0])), [1, 0, 0])
    # Each of the two others came first with probability 1/2.
    np.testing.assert_allclose(
        curve.ancestral(3, np.array([0.5, 0.5])), [0.5 + 0.125, 0.25, 0.125]
    )
    np.testing.assert_allclose(curve.grouped(3, np.array([2, 0, 1])), [2 / 3, 0, 1 / 3])
    np.testing.assert_allclose(curve.grouped(3, np.ones(3, int)), curve.whole(3))


def test_some_texts_and_the_tokens_of_a_prompt_do_not_count():
    x = jnp.asarray(EVERY)
    counted = jnp.arange(len(EVERY)) < 6
    found = curve.measured(jax.random.key(0), EXACT, PARAMS, x, 0, counted=counted, prompt=1)
    assert found.texts.tolist() == [2, 2, 2]
    # With all but one visible the loss is known: the last position's, or another's.
    nothing = curve.measured(jax.random.key(0), EXACT, PARAMS, x, 0, counted=x[:, 0] < 0)
    assert np.all(nothing.loss == 0)
    assert np.isnan(curve.information(nothing)[0]).all()


def test_draws_of_ragged_texts_give_log_q():
    """Stratified over texts and passes, and each text's own mean is its -log q."""
    x = jnp.asarray(np.tile(EVERY, (16, 1)))
    source = SimpleNamespace(texts=lambda batch: (batch, jnp.ones(batch.shape, bool)))
    one = jax.jit(partial(parts._count, source, EXACT, PARAMS, x))
    found = []
    for i in range(64):
        nats, tokens = one(jax.random.key(i), jnp.uint32(2_000_000_000 + i * len(x)))
        assert np.all(tokens == L)
        found += list(np.asarray(nats).reshape(16, -1))
    close(found, -np.log(Q))
