"""Exact laws against sums over all assignments and closed forms (section 8.1, bars 2 and 3)."""

import itertools

import jax
import numpy as np
import pytest

from common.errors import UserError
from lm.masked import enumeration, plans, schedules
from lm.masked.enumeration import count_law, kl, law, literal_law, sequence_errors, texts
from lm.masked.settings import settings
from tests.lm.masked import tables


def weights(schedule, grid, steps):
    return schedules.weights(schedules.schedule(schedule), grid, steps)


def by_assignments(q, weight, assignments):
    """p(x) as a plain sum over reveal assignments; f is taken from q itself."""
    vocab, length = q.shape[0], q.ndim
    f = tables.posterior(q)
    place = (vocab + 1) ** np.arange(length)[::-1]
    found = np.zeros(vocab**length)
    for n, x in enumerate(itertools.product(range(vocab), repeat=length)):
        for k in assignments:
            product = weight(k)
            for step in set(k):
                pattern = [x[i] if k[i] < step else vocab for i in range(length)]
                row = f[np.dot(pattern, place)]
                product *= np.prod([row[i, x[i]] for i in range(length) if k[i] == step])
            found[n] += product
    return found


@pytest.mark.parametrize(
    ("schedule", "grid", "steps"), [("linear", "uniform", 3), ("cosine", "cosine", 4)]
)
def test_the_law_is_a_sum_over_all_assignments_and_the_reverse_chain(schedule, grid, steps):
    q, w = tables.random(2, 4), weights(schedule, grid, steps)
    with jax.enable_x64(True):
        denoiser, params = tables.exact(q, float)
        found = law(denoiser, params, 4, w)
        chain = literal_law(
            denoiser, params, 4, settings(schedule=schedule, grid=grid, steps=steps)
        )
    every = list(itertools.product(range(steps), repeat=4))
    wanted = by_assignments(q, lambda k: np.prod(w[list(k)]), every)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-13)
    np.testing.assert_allclose(chain, found, rtol=0, atol=1e-12)
    assert abs(found.sum() - 1) < 1e-12
    assert abs(found - q.reshape(-1)).max() > 1e-3  # Parallel steps do distort.


def test_the_law_of_groups_is_a_mean_over_orders():
    q = tables.random(2, 4, seed=1)
    denoiser, params = tables.exact(q)
    for sizes in ([2, 1, 1], [3, 1], [2, 2]):
        steps = np.repeat(np.arange(len(sizes)), sizes)
        every = set(itertools.permutations(steps))
        wanted = by_assignments(q, lambda k: 1 / len(every), every)  # noqa: B023
        found = count_law(denoiser, params, 4, np.array(sizes))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


def test_pairs_and_parity_are_the_closed_forms():
    def errors(q, steps):
        denoiser, params = tables.exact(q)
        p = law(denoiser, params, q.ndim, weights("linear", "uniform", steps))
        return sequence_errors(q.reshape(-1), p)

    assert errors(tables.pairs(2, 4), 2) == pytest.approx(0.4375, abs=1e-7)
    assert errors(tables.parity(4), 2) == pytest.approx(0.375, abs=1e-7)
    assert errors(tables.parity(4), 4) == pytest.approx(0.21875, abs=1e-7)
    # Other weights: 1 / T becomes the sum of w_k^2.
    q, w = tables.pairs(3, 4), weights("cosine", "uniform", 5)
    p = law(*tables.exact(q), 4, w)
    alone = 1 - (1 - 1 / 3) * np.sum(w**2)
    assert sequence_errors(q.reshape(-1), p) == pytest.approx(1 - alone**2, abs=1e-6)
    gap = enumeration.token_errors(q.reshape(-1), p, 4) - np.log(3) / 2
    assert gap == pytest.approx(-np.log(alone) / 2, abs=1e-6)
    assert kl(q.reshape(-1), p) == pytest.approx(4 * gap, abs=1e-6)


def test_one_position_a_step_is_exact_and_larger_groups_are_not():
    with jax.enable_x64(True):
        for q in (tables.pairs(2, 4), tables.parity(4), tables.random(2, 4)):
            p = count_law(*tables.exact(q, float), 4, plans.sizes(4, 4))
            np.testing.assert_allclose(p, q.reshape(-1), rtol=0, atol=1e-14)
            assert sequence_errors(q.reshape(-1), p) == 0
            assert abs(kl(q.reshape(-1), p)) < 1e-12
        q = tables.parity(4)
        p = count_law(*tables.exact(q, float), 4, plans.sizes(4, 2))
        assert sequence_errors(q.reshape(-1), p) == pytest.approx(0.5, abs=1e-14)
        assert kl(q.reshape(-1), np.zeros(16) + (q.reshape(-1) == 0) / 8) == np.inf


def test_texts_and_patterns_are_in_order():
    np.testing.assert_array_equal(texts(2, 2), [[0, 0], [0, 1], [1, 0], [1, 1]])
    q = tables.random(2, 3)
    found = enumeration.tabulated(*tables.exact(q), 3)
    np.testing.assert_allclose(found, tables.posterior(q), atol=1e-6)


def test_what_is_too_large_is_refused():
    denoiser = tables.denoiser(2, 4)
    with pytest.raises(UserError, match=r"V\^L is 131072 of at most 100000"):
        law(denoiser, None, 17, np.ones(1))
    with pytest.raises(UserError, match=r"\(3 V\)\^L is 362797056 of at most"):
        count_law(denoiser, None, 11, np.array([11]))
    with pytest.raises(UserError, match=r"\(2 V \+ 1\)\^L is 244140625"):
        literal_law(denoiser, None, 12, settings())
    with pytest.raises(UserError, match="The groups have 3 positions, but a text has 4"):
        count_law(denoiser, None, 4, np.array([2, 1]))
