from itertools import product

import numpy as np
import pytest

from common.errors import UserError
from lm.languages import theory
from lm.languages.theory import even

UNEVEN = np.array([0.1, 0.5, 0.0, 0.4])


def sampler_law(q, weights):
    """p of ancestral sampling with the exact denoiser: all T^L assignments of steps."""
    length, p = q.ndim, np.zeros(q.shape)
    for steps in product(range(len(weights)), repeat=length):
        chance = np.prod([weights[k] for k in steps])
        if not chance:
            continue
        for x in np.ndindex(q.shape):
            f = 1.0
            for i, k in enumerate(steps):
                seen = tuple(
                    x[j] if steps[j] < k else slice(None) for j in range(length) if j != i
                )
                row = np.moveaxis(q, i, 0)[(slice(None), *seen)].reshape(q.shape[i], -1).sum(1)
                f *= row[x[i]] / row.sum() if row.sum() else 0.0
                if not f:
                    break
            p[x] += chance * f
    return p


def pairs(vocab, length):
    q = np.zeros((vocab,) * length)
    for tokens in product(range(vocab), repeat=length // 2):
        q[tuple(np.repeat(tokens, 2))] = vocab ** -(length // 2)
    return q


def parity(length):
    q = np.zeros((2,) * length)
    for bits in product((0, 1), repeat=length):
        q[bits] = (sum(bits) % 2 == 0) * 2.0 ** (1 - length)
    return q


def nelbo_gap(q, weights):
    """NELBO_T / L - H(q) / L: the mean loss of each token at its step, all assignments."""
    found = 0.0
    for steps in product(range(len(weights)), repeat=q.ndim):
        for i, k in enumerate(steps):
            seen = [j for j in range(q.ndim) if steps[j] < k]
            of = lambda kept: q.sum(axis=tuple(j for j in range(q.ndim) if j not in kept))
            both, given = of([i, *seen]), of(seen)
            nats = -np.sum(both[both > 0] * np.log(both[both > 0]))
            nats += np.sum(given[given > 0] * np.log(given[given > 0]))
            found += np.prod([weights[s] for s in steps]) * nats
    return (found + np.sum(q[q > 0] * np.log(q[q > 0]))) / q.ndim


def measured(q, weights):
    p, there = sampler_law(q, weights), q > 0
    assert p[there].sum() <= 1 + 1e-12
    gap = np.sum(q[there] * np.log(q[there] / p[there])) / q.ndim
    return 1 - p[there].sum(), gap


@pytest.mark.parametrize("weights", [even(1), even(2), even(3), UNEVEN])
def test_pairs_and_parity_are_those_of_all_assignments(weights):
    ser, gap = measured(pairs(3, 2), weights)
    assert theory.pairs_ser(2, 3, weights) == pytest.approx(ser, abs=1e-14)
    assert theory.pairs_gap(2, 3, weights) == pytest.approx(gap, abs=1e-14)
    wanted = nelbo_gap(pairs(3, 2), weights)
    assert theory.pairs_nelbo_gap(2, 3, weights) == pytest.approx(wanted, abs=1e-14)
    wanted = nelbo_gap(parity(3), weights)
    assert theory.parity_nelbo_gap(3, 3, weights) == pytest.approx(wanted, abs=1e-14)
    ser, gap = measured(parity(3), weights)
    assert theory.parity_ser(3, 3, weights) == pytest.approx(ser, abs=1e-14)
    assert theory.parity_gap(3, 3, weights) == pytest.approx(gap, abs=1e-14)


def test_several_pairs_are_independent():
    ser, gap = measured(pairs(2, 4), even(2))
    assert ser == pytest.approx(0.4375, abs=1e-14)
    assert theory.pairs_gap(4, 2, even(2)) == pytest.approx(gap, abs=1e-14)


def test_the_examples_of_the_specification():
    assert theory.pairs_ser(4, 2, even(2)) == pytest.approx(0.4375, abs=1e-14)
    assert theory.parity_ser(4, 4, even(2)) == pytest.approx(0.375, abs=1e-14)
    assert theory.parity_ser(4, 4, even(4)) == pytest.approx(0.21875, abs=1e-14)
    # T = L is not exact.
    limit = 1 - np.exp(-7 / 16)
    assert theory.pairs_ser(10**5, 8, even(10**5)) == pytest.approx(limit, abs=1e-4)
    assert round(theory.calls(1024, even(5000))) == 926
    assert round(theory.calls(1024, even(5000), batch=16)) == 4811


def test_what_the_end_cuts_is_never_wrong():
    assert theory.pairs_ser(5, 3, even(2)) == theory.pairs_ser(4, 3, even(2))
    assert theory.parity_ser(7, 4, even(2)) == theory.parity_ser(4, 4, even(2))
    assert theory.pairs_ser(1, 3, even(1)) == 0
    assert theory.pairs_gap(5, 3, even(2)) * 5 == pytest.approx(
        theory.pairs_gap(4, 3, even(2)) * 4
    )


def test_no_schedule_beats_even_steps():
    rng = np.random.default_rng(0)
    for _ in range(20):
        w = rng.dirichlet(np.ones(6))
        assert theory.pairs_ser(64, 8, w) > theory.pairs_ser(64, 8, even(6))


def test_the_bound_is_tight_for_pairs():
    for steps in (4, 64, 1024):
        gap = theory.pairs_gap(64, 8, even(steps))
        found = theory.pairs_ser(64, 8, even(steps))
        assert theory.ser_bound(64, gap) == pytest.approx(found, rel=1e-9)
        gap = theory.parity_gap(64, 4, even(steps))
        assert theory.parity_ser(64, 4, even(steps)) <= theory.ser_bound(64, gap) + 1e-12
    assert theory.ser_bound(64, -0.1) == 0
    assert theory.ser_bound(64, 50.0) == 1


def test_parity_of_many_steps():
    # 1 - exp(-L / 4T), whatever g is.
    for group in (3, 6):
        found = theory.parity_ser(960, group, even(5000))
        assert found == pytest.approx(1 - np.exp(-960 / 4 / 5000), rel=0.01)


@pytest.mark.parametrize(("length", "rel"), [(64, 0.01), (256, 0.005)])
def test_steps_for_an_error_grow_with_the_length(length, rel):
    steps = theory.steps_for(lambda n: theory.pairs_ser(length, 8, even(n)), 0.1)
    assert steps / length == pytest.approx(4.15, rel=rel)
    assert theory.pairs_ser(length, 8, even(steps)) <= 0.1
    assert theory.pairs_ser(length, 8, even(steps - 1)) > 0.1
    steps = theory.steps_for(lambda n: theory.parity_ser(length, 4, even(n)), 0.1)
    assert steps / length == pytest.approx(2.37, rel=0.01)
    half = theory.steps_for(lambda n: theory.pairs_ser(length, 8, even(n)), 0.5)
    assert half / length == pytest.approx(0.63, abs=0.02)
    # What the bound promises is enough, and needs at least as many.
    drop = np.log(8) * (1 - 0.0)
    assert theory.steps_enough(length, drop, 0.1) >= theory.steps_for(
        lambda n: theory.pairs_ser(length, 8, even(n)), 0.1
    )


def test_steps_that_bounds_promise():
    assert theory.gap_bound(2.0, 0.5, even(10), 0.01) == pytest.approx(0.16)
    steps = theory.steps_enough(100, 1.5, 0.2, learning=1e-3)
    left = lambda n: theory.ser_bound(100, theory.gap_bound(1.5, 0.0, even(n), 1e-3))
    assert left(steps) <= 0.2 < left(steps - 1)
    with pytest.raises(UserError, match=r"theory\.learning"):
        theory.steps_enough(100, 1.5, 0.2, learning=0.1)
    for wrong in (0.0, 1.0, -1.0):
        with pytest.raises(UserError, match=r"theory\.ser"):
            theory.steps_for(lambda n: 1 / n, wrong)
    with pytest.raises(UserError, match="reach"):
        theory.steps_for(lambda n: 0.5, 0.1)
    with pytest.raises(UserError, match=r"theory\.steps"):
        even(0)
    assert theory.steps_for(lambda n: 0.0, 0.1) == 1


def test_calls_are_steps_that_fill_in_something():
    rng = np.random.default_rng(0)
    for weights, batch in ((even(6), 1), (UNEVEN, 1), (UNEVEN, 3), (even(1), 2)):
        steps = rng.choice(len(weights), (20_000, batch * 5), p=weights)
        counts = np.array([len(set(row)) for row in steps.tolist()])
        error = counts.std() / np.sqrt(len(counts))
        assert abs(theory.calls(5, weights, batch) - counts.mean()) <= 4 * error + 1e-9


def test_break_even():
    assert theory.break_even(128, 0.002, 0.008) == pytest.approx(32)
