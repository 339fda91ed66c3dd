"""The parts of `benchmarks.mdm_sampling` at toy sizes: that they do what they say they time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import mdm_sampling as bench
from lm.masked.denoiser import plain
from lm.masked.settings import settings

SIZES = dict(vocab=3, width=8, depth=1, length=16, batch=2)


def first_or_later(params, x):
    """log f that says 0 while a text is all masks, and 1 afterwards."""
    late = jnp.any(x != 2, axis=1)[:, None, None] & jnp.ones((*x.shape, 1), bool)
    return jnp.where(jnp.arange(2) == late, 0.0, -jnp.inf)


def test_step_by_step_is_the_reverse_process():
    """A position is filled in while all are masked with chance 1 / T, if it is alone."""
    made, texts = settings(steps=4), 4000
    x = bench.by_steps(jax.random.key(0), plain(first_or_later, 2), None, texts, 2, made)
    x = np.asarray(x)
    assert set(np.unique(x)) == {0, 1}
    # Both positions at once: (1 / T^2) T; the first of two alone: what is left.
    both, later = np.mean((x == 0).all(axis=1)), np.mean((x == 1).all(axis=1))
    assert later == 0
    assert abs(both - 1 / 4) < 5 * np.sqrt(3 / 16 / texts)


def test_there_is_a_function_for_every_sampler_and_each_writes():
    found = bench.samplers(**SIZES)
    assert len(found) == 9 + 3 + 2
    for name in ("ancestral", "confidence, 4 blocks, dual cache", "ar"):
        result = found[name]()
        x = np.asarray(result.tokens)
        assert x.shape == (2, 16)
        assert ((x >= 0) & (x < 3)).all()
    np.testing.assert_array_equal(result.calls, 16)


def test_gathered_rows_and_whole_logits_give_the_same_texts():
    ratio, text = bench.gather(8, 16, 8, 1, rows=2, batch=2, repeats=1, limit=1.0)
    assert ratio > 0
    assert "100.0 % the same tokens" in text


def test_compilations_are_counted():
    data = (dict(kind="count", steps=(2, 4), block=(0, 8)),)
    shape = (dict(kind="count", steps=2, top_k=(1, 2)),)
    assert bench.compilations(data, 16, 1) == 0
    assert bench.compilations(shape, 16, 1) == 1


def test_the_oracle_writes():
    first, again = bench.oracle_seconds(2, 8, 4, 2)
    assert first > 0
    assert again > 0


def test_bars_are_judged(capsys):
    assert bench.report([("a", 1.31, ">=", 1.3), ("b", 0, "<=", 0)]) == 0
    assert "NOT" not in capsys.readouterr().out
    assert bench.report([("a", 1.29, ">=", 1.3), ("b", 0, "<=", 0)]) == 1
    assert capsys.readouterr().out.count("NOT reached") == 1


def test_the_least_of_all_rounds_is_found():
    found = bench.best({"nothing": lambda: np.zeros(1)}, 5, 1.0)["nothing"]
    assert found.rounds == 5
    assert found.calls is None
    table = bench.tokens_table({"a": bench.Found(0.5, 5, 4.0)}, 8, 16)
    assert table.splitlines()[-1] == "| a | 500.00 | 256 | 4.0 |"


def test_torch_has_the_same_logits_and_the_same_law():
    torch = pytest.importorskip("torch")
    assert bench.torch_difference(5, 32, 2, 12) < 1e-5
    _, params = bench.network(3, 8, 1)
    params["head"]["kernel"] = jnp.zeros_like(params["head"]["kernel"])
    weights = bench.torch_weights(torch, params)
    x = bench.by_torch(torch, weights, 3, 300, 8, settings(steps=3), 1)
    share = np.bincount(x.ravel(), minlength=3) / x.size
    np.testing.assert_allclose(share, 1 / 3, atol=5 * np.sqrt(2 / 9 / x.size))
