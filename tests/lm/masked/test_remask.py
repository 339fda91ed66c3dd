"""Re-masking: alpha stays what is visible, whatever is taken back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.masked import enumeration, remask, schedules
from lm.masked.sample import sample
from lm.masked.settings import settings
from tests.lm.masked import tables

Q = tables.random(2, 4)
DENOISER, PARAMS = tables.exact(Q)
LONG = 12  # A denoiser of longer texts, whose probabilities depend on what is there.


def leaning(params, x):
    ones = jnp.sum(x == 1, axis=1, keepdims=True)[..., None] + jnp.arange(LONG)[:, None]
    p = 0.1 + 0.8 * ((ones % 5) / 5)
    return jnp.log(jnp.concatenate([p, 1 - p], axis=-1))


LEANING = tables.plain(leaning, 2)
MODES = [
    dict(remask="cap", eta=0.1),
    dict(remask="cap", eta=1.0),
    dict(remask="rescale", eta=0.5),
    dict(remask="conf"),
    dict(remask="loop", eta=0.08, t_on=0.6, t_off=0.2, alpha_on=0.8),
    dict(remask="cap", eta=0.3, schedule="cosine"),
]


def wanted_alpha(made):
    """alpha at every grid time, from the words of section 7."""
    t = schedules.grid(made.grid, made.steps)
    if made.remask != "loop":
        return schedules.schedule(made.schedule).alpha(t)
    found = []
    for s in t:
        if s > made.t_on:
            found.append(made.alpha_on * (1 - s) / (1 - made.t_on))
        elif s >= made.t_off:
            found.append(made.alpha_on)
        else:
            found.append(made.alpha_on + (1 - made.alpha_on) * (1 - s / made.t_off))
    return np.array(found)


@pytest.mark.parametrize("fields", MODES, ids=str)
def test_the_visible_share_stays_alpha(fields):
    batch, steps = 3000, 10
    made = settings(kind="remask", steps=steps, **fields)
    found = sample(jax.random.key(0), LEANING, None, batch, LONG, made, history=True)
    history = np.asarray(found.history)
    assert history.shape == (steps + 1, batch, LONG)
    seen = history != 2
    alpha = wanted_alpha(made)
    # Positions of one text share what is masked where conf looks at the others.
    share, spread = seen.mean(axis=(1, 2)), seen.mean(axis=2).std(axis=1) / np.sqrt(batch)
    assert (np.abs(share - alpha) <= 5 * spread + 1e-9).all()
    if made.remask != "conf":
        each = np.sqrt(alpha * (1 - alpha) / batch)
        assert (np.abs(seen.mean(axis=1) - alpha[:, None]) <= 5 * each[:, None] + 1e-9).all()
    assert (history[0] == 2).all()
    assert (history[-1] < 2).all()
    np.testing.assert_array_equal(history[-1], found.tokens)
    # Tokens are taken back as often as sigma says.
    back = (seen[:-1] & ~seen[1:]).sum(axis=(1, 2)) / np.maximum(seen[:-1].sum(axis=(1, 2)), 1)
    before, after = alpha[:-1], alpha[1:]
    largest = np.minimum(1, (1 - after) / np.maximum(before, 1e-9))
    sigma = {
        "cap": np.minimum(made.eta, largest),
        "rescale": made.eta * largest,
        "loop": np.where(np.isclose(before, after), np.minimum(made.eta, largest), 0),
    }.get(made.remask)
    n = np.maximum(seen[:-1].sum(axis=(1, 2)), 1)
    if sigma is None:
        taken = (seen[:-1] & ~seen[1:]).sum(axis=2)
        some = seen[:-1].any(axis=2) & ~seen[:-1].all(axis=2)
        mean = largest * some.mean(axis=1)
        assert not taken[~some].any()  # Nothing could be filled in for it.
        assert (~some)[1:].any()
        assert (np.abs(taken.mean(axis=1) - mean) <= 5 * np.sqrt(mean / batch) + 1e-9).all()
    else:
        sigma[0] = 0  # Nothing is there yet.
        assert (np.abs(back - sigma) <= 5 * np.sqrt(sigma / n) + 1e-9).all()
    assert back.max() > 0


def test_conf_takes_back_the_least_certain_first():
    rows = jnp.log(jnp.array([[0.99, 0.01], [0.6, 0.4], [0.99, 0.01], [0.99, 0.01]]))
    params = jnp.broadcast_to(rows, (81, 4, 2))
    made = settings(kind="remask", remask="conf", steps=8, candidate="argmax", temperature=0.0)
    history = np.asarray(
        sample(jax.random.key(1), DENOISER, params, 4000, 4, made, history=True).history
    )
    seen = history != 2
    whole = seen[:-1].sum(axis=2) == 3
    back = (seen[:-1] & ~seen[1:])[whole].sum(axis=0)
    here = seen[:-1][whole].sum(axis=0)
    rate = back / here
    # exp(-0.6) against exp(-0.99), beside two others of 0.99.
    assert 1.2 < rate[1] / rate[[0, 2, 3]].mean() < 1.8


@pytest.mark.parametrize("mode", ["cap", "rescale"])
def test_without_taking_back_it_is_ancestral(mode):
    made = settings(kind="remask", remask=mode, eta=0.0, steps=3, schedule="cosine")
    w = schedules.weights(schedules.schedule("cosine"), "uniform", 3)
    p = enumeration.law(DENOISER, PARAMS, 4, w)
    found = sample(jax.random.key(2), DENOISER, PARAMS, 20000, 4, made)
    tables.assert_law(found.tokens, 2, p)
    assert (np.asarray(found.calls) <= 3).all()
    assert found.clipped == 0
    assert found.history is None


@pytest.mark.parametrize("mode", ["cap", "conf", "loop"])
def test_prompts_are_never_masked_and_steps_without_writing_are_skipped(mode):
    prompt = np.full((40, 4), 2, np.int32)
    prompt[:, 1], prompt[:20, 3], prompt[7] = 1, 0, [0, 1, 1, 0]
    made = settings(kind="remask", remask=mode, eta=0.05, steps=60)
    draw = lambda **f: sample(jax.random.key(3), DENOISER, PARAMS, 40, 4, made, prompt, **f)
    slow, fast = draw(history=True), draw()
    history = np.asarray(slow.history)
    given = prompt != 2
    assert (history[:, given] == prompt[given]).all()
    np.testing.assert_array_equal(slow.tokens, fast.tokens)
    np.testing.assert_array_equal(slow.when, fast.when)
    np.testing.assert_array_equal(slow.calls, fast.calls)
    assert (np.asarray(fast.when)[given] == -1).all()
    assert (np.asarray(fast.when)[~given] >= 0).all()
    wrote = ((history[:-1] == 2) & (history[1:] != 2)).any(axis=2).sum(axis=0)
    np.testing.assert_array_equal(fast.calls, wrote)
    assert fast.calls[7] == 0
    assert slow.rounds == 60
    assert fast.rounds == np.max(fast.calls) < 40


def test_sigma_above_its_maximum_is_clipped_and_counted():
    made = settings(kind="remask", steps=10, eta=0.5)
    table = remask.table(made)
    alpha = np.arange(11) / 10
    largest = np.minimum(1, (1 - alpha[1:]) / np.maximum(alpha[:-1], 1e-9))
    np.testing.assert_allclose(table.sigma[:10], np.minimum(0.5, largest), rtol=1e-6)
    shown = (alpha[1:] - (1 - table.sigma[:10]) * alpha[:-1]) / (1 - alpha[:-1])
    np.testing.assert_allclose(table.shown[:10], shown, rtol=1e-5)
    assert table.shown[9] == 1
    found = sample(jax.random.key(0), DENOISER, PARAMS, 3, 4, made)
    assert found.clipped == table.clipped == 2  # sigma_max 0.286 and 0.125, and 0 at the end
    for mode in ("rescale", "conf"):
        assert remask.table(made._replace(remask=mode)).clipped == 0


def test_a_loop_may_go_on_to_the_end():
    made = settings(kind="remask", remask="loop", steps=20, t_off=0.0, t_on=0.5, alpha_on=0.5)
    alpha = remask.alphas(made)
    assert (np.diff(alpha) >= 0).all()
    np.testing.assert_allclose(alpha[10:20], 0.5)
    assert alpha[20] == 1
    one = sample(jax.random.key(0), DENOISER, PARAMS, 3, 4, made)
    assert (np.asarray(one.tokens) < 2).all()


def test_the_last_step_may_be_greedy():
    made = settings(kind="remask", steps=1, final="greedy")
    params = jnp.broadcast_to(jnp.log(jnp.array([0.4, 0.6])), (81, 4, 2))
    assert (
        np.asarray(sample(jax.random.key(0), DENOISER, params, 50, 4, made).tokens) == 1
    ).all()


def test_steps_and_sigma_compile_nothing_new():
    traced = []
    counted = DENOISER._replace(hidden=lambda p, x: traced.append(0) or DENOISER.hidden(p, x))
    for n, fields in enumerate([dict(), dict(steps=7, eta=0.3), dict(schedule="cosine")]):
        sample(jax.random.key(0), counted, PARAMS, 8, 4, settings(kind="remask", **fields))
        if n == 0:
            once = len(traced)
    assert len(traced) == once
