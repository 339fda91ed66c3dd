"""Noise levels of training: densities by counting, weights by their table, the optimal one."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from common.checkpoint import Checkpoints
from common.errors import UserError
from diffusion import schedules
from diffusion.optimal_schedule import between, middles, star_of
from diffusion.preconditioning import preconditioning
from diffusion.processes import iddpm_levels, process, ratio

SD, LOW, HIGH, BINS = 0.5, 0.002, 80.0, 32
MIDDLE = middles(LOW, HIGH, BINS)
LEVEL = np.exp(MIDDLE)
EDGE = np.linspace(np.log(LOW), np.log(HIGH), BINS + 1)
MEAN, STD, V, STAR = -1.2, 1.2, 0.25, 0.46
NORMAL = np.exp(-0.5 * ((MIDDLE - MEAN) / STD) ** 2)
NORMAL /= NORMAL.sum()
FLOOR = V / (1 + 99 * (STAR / LEVEL) ** 8)  # J* of a made-up data set: tau V at STAR.
OPTIMAL = dict(space="F", tau=0.01, cap=1.0, bins=BINS, mix=0.1, least_gap=1e-8)
OPTIMAL |= dict(bump=1.0, bump_shift=-0.8, bump_width=1.0, soft_edge=0.0)
OPTIMAL |= dict(warm=1000, every=500, half_life=2000)
F = preconditioning(process("edm"), "F", SD)


def made(kind, *, optimal=None, **changes):
    base = dict(sigma_data=SD, p_mean=MEAN, p_std=STD, sigma_min=LOW, sigma_max=HIGH)
    return schedules.schedule(kind, F, **base | changes, optimal=OPTIMAL | (optimal or {}))


def ready(**optimal):
    """The schedule of the optimal loss and a state that knows the floor."""
    chosen = made("optimal_loss", optimal=optimal)
    state = chosen.init()._replace(floor=jnp.float32(FLOOR), variance=jnp.float32(V))
    return chosen, state


def kappa(space, s=LEVEL):
    return (s**2 + SD**2) / (s * SD) ** 2 if space == "F" else np.ones_like(s)


def told(chosen, state, loss, rounds=1):
    """After every bin was seen once in each round, with that loss."""
    update = jax.jit(chosen.update)
    for _ in range(rounds):
        state = update(state, jnp.float32(LEVEL), jnp.float32(loss))
    return state


def weights(space="F", cap=1.0, bump=1.0, shift=-0.8, width=1.0, soft=0.0):
    """w at the middles by section 5, float64."""
    k = kappa(space)
    below = np.flatnonzero(FLOOR <= 0.01 * V)[-1]
    part = (0.01 * V - FLOOR[below]) / (FLOOR[below + 1] - FLOOR[below])
    star = MIDDLE[below] + part * (MIDDLE[1] - MIDDLE[0])
    w_star = cap / (kappa(space, np.exp(star)) * 0.01 * V)
    left = 1 / (1 + np.exp(-(star - MIDDLE) / soft)) if soft else star > MIDDLE
    hill = np.exp(-0.5 * ((MIDDLE - star - shift) / width) ** 2)
    shape = np.minimum(1 / (k * FLOOR), w_star) + bump * w_star * hill * left
    skip = SD**2 / (LEVEL**2 + SD**2)
    first = (1 - skip) ** 2 * SD**2 + (skip * LEVEL) ** 2
    a = 1 / np.sum(NORMAL * shape * k * first)
    return a * shape * k, a, w_star, star, first


LAWS = {
    "edm": stats.norm(MEAN, STD).cdf,
    "edm2": stats.norm(MEAN, STD).cdf,
    "fm_logit_normal": stats.norm(0, 1).cdf,
    "ve": stats.uniform(np.log(0.02), np.log(100 / 0.02)).cdf,
    # P(s <= e^x) = P(t <= t(e^x)).
    "fm_uniform": lambda x: np.exp(x) / (1 + np.exp(x)),
    "vp": lambda x: (np.sqrt(0.1**2 + 2 * 19.9 * np.log1p(np.exp(2 * x))) - 0.1) / 19.9,
}


@pytest.mark.parametrize("kind", LAWS)
def test_levels_are_drawn_from_the_named_law(kind):
    chosen = made(kind)
    s = jax.jit(lambda k: chosen.sample(k, 20_000, chosen.init()))(jax.random.key(0))
    chex.assert_shape(s, (20_000,))
    assert s.dtype == jnp.float32
    assert stats.kstest(np.log(np.asarray(s, np.float64)), LAWS[kind]).pvalue > 1e-3


def test_iddpm_draws_every_time_alike_and_never_zero():
    chosen = made("iddpm")
    s = jax.jit(lambda k: chosen.sample(k, 50_000, ()))(jax.random.key(0))
    levels = iddpm_levels()[-2::-1]
    at = np.argmin(np.abs(np.log(levels) - np.log(np.asarray(s)[:, None])), 1)
    np.testing.assert_allclose(s, levels[at], rtol=1e-3)
    assert stats.chisquare(np.bincount(at // 50, minlength=20)).pvalue > 1e-3
    assert np.min(s) > 0


def test_density_counts_what_is_drawn():
    sigmas = np.geomspace(0.01, 10, 25)
    found = schedules.density(made("edm"), (), sigmas, jax.random.key(1))
    x = np.log(sigmas)
    width = x[1] - x[0]
    law = stats.norm(MEAN, STD)
    share = law.cdf(x + width / 2) - law.cdf(x - width / 2)
    error = np.sqrt(share * (1 - share) / 200_000) / width
    assert np.all(np.abs(found - share / width) < 4.5 * error)


def test_density_compiles_once_for_all_states_of_a_schedule():
    chosen, state = ready()
    traces = []

    def counted(key, n, state):
        traces.append(n)
        return chosen.sample(key, n, state)

    sigmas, own = np.geomspace(0.01, 10, 25), chosen._replace(sample=counted)
    first = schedules.density(own, state, sigmas, jax.random.key(0), 10_000)
    moved = told(chosen, state, FLOOR + LEVEL, rounds=200)
    other = schedules.density(own, moved, sigmas, jax.random.key(0), 10_000)
    schedules.density(own, state, sigmas, jax.random.key(1), 10_000)
    assert traces == [10_000]
    assert np.abs(other - first).max() > 0.05


@pytest.mark.parametrize("kind", [k for k in schedules.KINDS if k != "optimal_loss"])
def test_weights_are_those_of_the_table(kind):
    s, chosen = np.geomspace(0.01, 80, 9), made(kind)
    unit, flow = 1 / s**2, ((1 + s) / s) ** 2
    want = dict.fromkeys(("vp", "ve", "iddpm", "ddpm"), unit)
    want |= dict.fromkeys(("fm_uniform", "fm_logit_normal"), flow)
    want["gvp"] = (np.pi / 2) ** 2 / np.sin(np.arctan(s)) ** 2
    found = chosen.weight(jnp.float32(s), chosen.init())
    np.testing.assert_allclose(found, want.get(kind, kappa("F", s)), rtol=1e-5)
    assert chosen.learned == (kind == "edm2")
    assert chosen.update((), jnp.float32(s), jnp.float32(s)) == ()


def test_of_all_kinds_edm2_alone_learns_the_log_of_its_loss():
    assert [kind for kind in schedules.KINDS if made(kind).learned] == ["edm2"]


def test_a_process_trains_with_its_own_constants():
    mine = process("vp", beta_d=5.0)
    own = made("vp", of=mine)
    s = own.sample(jax.random.key(0), 4000, ())
    assert s.max() <= ratio(mine, jnp.float32(1.0)) * 1.001
    other = made("vp", of=process("fm_linear")).sample(jax.random.key(0), 4000, ())
    assert other.max() > 50


def test_a_number_that_is_none_is_not_counted():
    chosen, state = ready()
    s = jnp.float32(LEVEL)
    state = chosen.update(state, s, jnp.ones(len(LEVEL)))
    bad = chosen.update(state, s, jnp.ones(len(LEVEL)).at[3].set(jnp.nan))
    assert np.isfinite(bad.total).all()
    assert bad.count[3] < state.count[3]
    none = chosen.update(state, s, jnp.full(len(LEVEL), jnp.inf), jnp.zeros(len(LEVEL), bool))
    np.testing.assert_allclose(none.total / none.count, state.total / state.count, rtol=1e-6)


@pytest.mark.parametrize("space", ["F", "x0"])
@pytest.mark.parametrize(
    "changes", [{}, dict(cap=0.3, bump=0.0), dict(cap=2.0, bump=2.5), dict(soft=0.1)]
)
def test_weight_and_density_are_the_equations(space, changes):
    names = dict(soft="soft_edge")
    chosen, state = ready(space=space, **{names.get(k, k): v for k, v in changes.items()})
    want, *_ = weights(space, **changes)
    found = jax.jit(chosen.weight)(jnp.float32(LEVEL), state)
    np.testing.assert_allclose(found, want, rtol=2e-4)

    loss = FLOOR + 0.01 * LEVEL**2 / (1 + LEVEL**2)
    state = told(chosen, state, loss, rounds=1000 // BINS + 1)
    p = want * (loss - FLOOR)
    np.testing.assert_allclose(
        state.probability, 0.9 * p / p.sum() + 0.1 * NORMAL, rtol=2e-3, atol=1e-7
    )


@pytest.mark.parametrize("space", ["F", "x0"])
def test_w_is_capped_left_of_sigma_star_and_a_over_the_floor_right_of_it(space):
    chosen, state = ready(space=space, bump=0.0)
    _, a, w_star, star, _ = weights(space, bump=0.0)
    # In the space of w, per unit of its loss.
    found = np.asarray(chosen.weight(jnp.float32(LEVEL), state)) / kappa(space)
    floor = kappa(space) * FLOOR
    np.testing.assert_allclose(found[star > MIDDLE], a * w_star, rtol=2e-4)
    np.testing.assert_allclose(found[star < MIDDLE], (a / floor)[star < MIDDLE], rtol=2e-4)


@pytest.mark.parametrize("space", ["F", "x0"])
def test_a_makes_the_first_weighted_loss_one(space):
    """Mean over the starting density of w J before training, J of the output 0."""
    chosen, state = ready(space=space)
    first = weights(space)[-1]
    found = np.asarray(chosen.weight(jnp.float32(LEVEL), state), np.float64)
    assert NORMAL @ (found * first) == pytest.approx(1, rel=1e-4)
    if space == "F":  # An output of zero misses a target of unit variance by 1.
        np.testing.assert_allclose(first * kappa("F"), 1, rtol=1e-10)


@pytest.mark.parametrize("soft", [0.0, 0.1])
def test_the_bump_lies_left_of_sigma_star_only(soft):
    _, a, w_star, star, _ = weights(bump=0.0)
    away = np.array([-2.0, -0.9, -0.3, -0.06, 0.06, 0.3, 0.9])
    s = jnp.float32(np.exp(star + away))
    without, state = ready(bump=0.0)
    chosen, _ = ready(bump=1.5, soft_edge=soft)
    base, w = (np.asarray(c.weight(s, state), np.float64) for c in (without, chosen))
    # a differs; far to the right, where no bump reaches, the two are a apart.
    far = jnp.float32([60.0])
    scale = float(without.weight(far, state)[0] / chosen.weight(far, state)[0])
    found = (w * scale - base) / (a * w_star * kappa("F", np.asarray(s, np.float64)))
    hill = 1.5 * np.exp(-0.5 * (away + 0.8) ** 2)
    left = 1 / (1 + np.exp(away / soft)) if soft else np.heaviside(-away, 0)
    np.testing.assert_allclose(found, hill * left, atol=2e-3)
    assert np.all(np.abs(found[4:]) < 1e-4) == (soft == 0)


def test_the_density_sums_to_one_and_never_falls_below_its_share_of_the_normal():
    rng = np.random.default_rng(0)
    for space in ("F", "x0"):
        chosen, state = ready(space=space, warm=0, every=1)
        for _ in range(4):
            state = told(chosen, state, FLOOR * rng.uniform(0.2, 3, BINS))
            p = np.asarray(state.probability, np.float64)
            assert p.sum() == pytest.approx(1, abs=1e-5)
            assert np.all(p >= 0.1 * NORMAL * (1 - 1e-4))


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_gap_of_zero_or_below_is_safe(share):
    """All gaps are then the least one, and the density is that of w."""
    for space in ("F", "x0"):
        chosen, state = ready(space=space, warm=0, every=1)
        state = told(chosen, state, share * FLOOR)
        p = weights(space)[0]
        want = 0.9 * p / p.sum() + 0.1 * NORMAL
        np.testing.assert_allclose(state.probability, want, rtol=2e-3, atol=1e-7)


def test_nothing_known_not_even_the_floor_is_safe():
    chosen = made("optimal_loss")
    blank = chosen.init()
    assert np.all(np.isfinite(chosen.weight(jnp.float32(LEVEL), blank)))
    state = told(chosen, blank, np.zeros(BINS), rounds=40)
    assert np.all(np.isfinite(state.probability))
    assert float(jnp.sum(state.probability)) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("where", [4, 15, 27])
def test_it_follows_a_bump_of_the_gap(where):
    chosen, state = ready(warm=0, every=1, mix=0.0)
    w = weights()[0]
    gap = (0.01 + np.exp(-0.5 * ((np.arange(BINS) - where) / 1.5) ** 2)) / w
    state = told(chosen, state, FLOOR + gap)
    found = np.asarray(state.probability)
    assert found.argmax() == where
    np.testing.assert_allclose(found, w * gap / (w * gap).sum(), rtol=5e-3)


@pytest.mark.parametrize("space", ["F", "x0"])
def test_it_is_flat_where_the_gap_is_one_over_w(space):
    chosen, state = ready(space=space, warm=0, every=1, mix=0.0)
    # w is per unit of x_0's loss; in the space's own unit both carry kappa, which cancels.
    gap = 100 / weights(space)[0]
    state = told(chosen, state, FLOOR + gap)
    np.testing.assert_allclose(state.probability, np.full(BINS, 1 / BINS), rtol=5e-3)


def test_levels_are_drawn_from_the_bins_and_evenly_within():
    chosen, state = ready()
    p = np.linspace(1, 5, BINS)
    p[3] = 0
    p /= p.sum()
    state = state._replace(probability=jnp.float32(p))
    s = jax.jit(lambda k: chosen.sample(k, 20_000, state))(jax.random.key(2))
    x = np.log(np.asarray(s, np.float64))
    law = partial(np.interp, xp=EDGE, fp=np.concatenate([[0], np.cumsum(p)]))
    assert stats.kstest(x, law).pvalue > 1e-3
    assert not np.any((x > EDGE[3] + 1e-5) & (x < EDGE[4] - 1e-5))
    assert x.min() >= EDGE[0] - 1e-5
    assert x.max() <= EDGE[-1] + 1e-5


@pytest.mark.parametrize(
    ("warm", "every", "want"),
    [(0, 96, [96, 192, 288]), (100, 96, [128, 224, 320]), (64, 160, [64, 224])],
)
def test_the_density_changes_when_warm_and_then_every_so_often(warm, every, want):
    chosen, state = ready(warm=warm, every=every, half_life=100)
    update, changed = jax.jit(chosen.update), []
    for i in range(10):
        before = state
        loss = FLOOR * (2 + np.cos(i + np.arange(BINS)))
        state = update(state, jnp.float32(LEVEL), jnp.float32(loss))
        same = np.array_equal(before.probability, state.probability)
        assert same == (float(state.refreshed) == float(before.refreshed))
        if not same:
            changed.append(32 * (i + 1))
            assert float(state.refreshed) == 32 * (i + 1)
        elif not changed:
            np.testing.assert_allclose(state.probability, NORMAL, rtol=1e-4, atol=1e-9)
    assert changed == list(want)
    assert float(state.images) == 320


def test_averages_halve_in_their_half_life():
    """Against the sum over all batches, each weighted by its age in images."""
    n, rounds, half_life = 24, 7, 60
    chosen, state = ready(half_life=half_life)
    rng, total, count = np.random.default_rng(1), np.zeros(BINS), np.zeros(BINS)
    keep = 0.5 ** (n / half_life)
    for i in range(rounds):
        x = rng.uniform(EDGE[0] - 0.5, EDGE[-1] + 0.5, n)  # Some beyond the ends.
        error = rng.uniform(0, 1, n)
        state = chosen.update(state, jnp.exp(jnp.float32(x)), jnp.float32(error))
        bin_ = np.clip(np.floor((x - EDGE[0]) / (EDGE[1] - EDGE[0])), 0, BINS - 1).astype(int)
        age = 0.5 ** ((rounds - 1 - i) * n / half_life)
        np.add.at(total, bin_, (1 - keep) * age * error)
        np.add.at(count, bin_, (1 - keep) * age)
    np.testing.assert_allclose(state.total, total, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(state.count, count, rtol=1e-4, atol=1e-6)


def test_empty_bins_are_interpolated():
    x = np.sort(np.random.default_rng(2).uniform(0, 10, 12))
    mean = np.random.default_rng(3).uniform(1, 5, 12)
    for there in ([3, 4, 8], [0, 11], [5], [0, 1, 2], list(range(12))):
        count = np.zeros(12)
        count[there] = np.linspace(0.5, 2, len(there))
        found = between(jnp.float32(x), jnp.float32(mean * count), jnp.float32(count))
        np.testing.assert_allclose(found, np.interp(x, x[there], mean[there]), rtol=1e-5)
    none = jnp.zeros(12)
    np.testing.assert_array_equal(between(jnp.float32(x), none, none), none)


def test_what_a_refresh_has_not_seen_is_interpolated():
    chosen, state = ready(warm=0, every=1, mix=0.0)
    seen = np.array([2, 9, 20, 31])
    loss = FLOOR + 0.02 + 0.01 * np.arange(BINS)
    state = chosen.update(state, jnp.float32(LEVEL[seen]), jnp.float32(loss[seen]))
    gap = np.maximum(np.interp(MIDDLE, MIDDLE[seen], loss[seen]) - FLOOR, 1e-8)
    p = weights()[0] * gap
    np.testing.assert_allclose(state.probability, p / p.sum(), rtol=5e-3, atol=1e-9)


def test_sigma_star_is_the_largest_level_below():
    x = jnp.arange(5.0)
    star = lambda floor, level: float(star_of(x, jnp.float32(floor), jnp.float32(level)))
    assert star([0, 0, 1, 3, 4], 2) == pytest.approx(2.5)
    assert star([0, 3, 1, 3, 4], 2) == pytest.approx(2.5)  # Not the first crossing.
    assert star([3, 4, 5, 6, 7], 2) == 0
    assert star([0, 0, 1, 1, 1], 2) == 4


def test_state_survives_a_checkpoint(tmp_path):
    chosen, state = ready(warm=0, every=1)
    state = told(chosen, state, 2 * FLOOR)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    with Checkpoints(tmp_path) as kept:
        kept.save(3, state)
        kept.wait()
        chex.assert_trees_all_equal(kept.restore(3, shapes), state)


def test_state_keeps_its_shape_through_jit_and_donation():
    chex.clear_trace_counter()
    chosen, state = ready(warm=0, every=40)
    before = jax.tree.map(np.array, state)
    leaves = jax.tree.leaves(chosen.init())
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)

    def step(state, key):
        s = chosen.sample(key, 16, state)
        return chosen.update(state, s, 0.1 * s**2 / (1 + s**2)), chosen.weight(s, state)

    run = jax.jit(chex.assert_max_traces(step, n=1), donate_argnums=0)
    for i in range(4):
        old = state
        state, w = run(state, jax.random.key(i))
        assert old.probability.is_deleted()
    chex.assert_tree_all_finite((state, w))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, before)
    found = {name: leaf.dtype for name, leaf in state._asdict().items()}
    wide = dict.fromkeys(("images", "refreshed"), np.dtype("uint32"))
    assert found == dict.fromkeys(found, np.dtype("float32")) | wide
    np.testing.assert_array_equal(state.floor, before.floor)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: made("edm3"), r"schedule\.kind is 'edm3', but must be one of edm, edm2"),
        (lambda: made("edm", sigma_data=0.0), r"model\.sigma_data is 0\.0"),
        (lambda: made("edm", p_mean=float("nan")), r"schedule\.p_mean is nan"),
        (lambda: made("edm", p_std=0.0), r"schedule\.p_std is 0\.0"),
        (lambda: made("edm", sigma_min=0.0), r"schedule\.sigma_min is 0\.0"),
        (lambda: made("edm", sigma_max=0.001), r"schedule\.sigma_max is 0\.001"),
        (lambda: made("edm", sigma_max=float("inf")), r"schedule\.sigma_max is inf"),
        *[
            (
                lambda field=field, value=value: made("optimal_loss", optimal={field: value}),
                rf"schedule\.{field} is ",
            )
            for field, value in (
                ("space", "G"),
                ("tau", 0.0),
                ("tau", 1.0),
                ("cap", 0.0),
                ("cap", float("inf")),
                ("bump", -1.0),
                ("bump", float("inf")),
                ("bump_shift", float("nan")),
                ("bump_width", 0.0),
                ("soft_edge", -0.1),
                ("bins", 1),
                ("warm", -1),
                ("every", 0),
                ("half_life", 0),
                ("mix", 1.1),
                ("mix", float("nan")),
                ("least_gap", 0.0),
            )
        ],
    ],
)
def test_what_cannot_be_is_named(call, said):
    with pytest.raises(UserError, match=said):
        call()
