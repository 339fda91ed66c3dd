"""Sampling with a cache against sampling without, token for token."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import mesh as meshes
from common.errors import UserError
from lm.masked import blocks, networks
from lm.masked.blocks import sample_cached
from lm.masked.sample import sample
from lm.masked.settings import settings
from lm.transformer import transformer

V, L, B, BLOCK = 7, 12, 4, 4
FIELDS = dict(vocab=V + 1, dim=16, mlp=24, heads=2, depth=2, init_std=0.5, causal=False)
CAUSAL_BLOCKS = transformer(**FIELDS, block=2)
BOTH_SIDES = transformer(**FIELDS)
PARAMS = jax.jit(BOTH_SIDES.init)(jax.random.key(1))
KINDS = {
    "count": dict(kind="count", steps=6, final="greedy"),
    "confidence": dict(kind="confidence", steps=6, final="greedy"),
    "threshold": dict(kind="threshold", tau=0.4, rows=2),
}


def prompt():
    """Free: all but one; a middle with a whole block given; one token; a ragged end.

    Without any token all positions would be alike, and rounding would choose among them.
    """
    x = np.full((B, L), V, np.int32)
    x[:, 0] = 4
    x[1, :6], x[1, 8:] = 3, 1
    x[2], x[2, 5] = np.arange(L) % V, V
    x[3, 7:10] = 5
    return x


def both(model, cache, refresh=0, given=None, key=0, **fields):
    made = settings(block=BLOCK, **fields)
    key = jax.random.key(key)
    wanted = sample(key, networks.denoiser(model, V), PARAMS, B, L, made, given)
    made = made._replace(cache=cache)
    found = sample_cached(key, model, PARAMS, B, L, made, V, given, refresh=refresh)
    return found, wanted


def same(found, wanted):
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_array_equal(found.when, wanted.when)
    np.testing.assert_array_equal(found.calls, wanted.calls)
    assert found.rounds >= wanted.rounds
    chex.assert_trees_all_equal_shapes_and_dtypes(found, wanted)


@pytest.mark.parametrize(
    ("cache", "kind"),
    [*(("dual", kind) for kind in KINDS), ("prefix", "confidence")],
)
def test_where_blocks_see_nothing_to_their_right_the_cache_is_exact(cache, kind):
    same(*both(CAUSAL_BLOCKS, cache, given=prompt(), **KINDS[kind]))


def test_a_cache_that_is_refreshed_at_every_call_is_none():
    same(*both(BOTH_SIDES, "dual", refresh=1, given=prompt(), **KINDS["threshold"]))


def test_for_a_model_of_both_sides_the_cache_is_an_approximation():
    """Else the tests above would pass without any cache at all."""
    found = []
    for key in range(4):
        a, b = both(BOTH_SIDES, "dual", key=key, given=prompt(), **KINDS["threshold"])
        found.append(np.mean(np.asarray(a.tokens) != np.asarray(b.tokens)))
    assert 0 < np.mean(found) < 0.9


def test_one_block_is_exact_for_any_model():
    """It is the whole text, recomputed at every call."""
    made = settings(kind="count", steps=6)
    key = jax.random.key(2)
    wanted = sample(key, networks.denoiser(BOTH_SIDES, V), PARAMS, B, L, made)
    found = sample_cached(key, BOTH_SIDES, PARAMS, B, L, made._replace(cache="dual"), V)
    same(found, wanted)


def test_prompts_stay_and_nothing_but_tokens_is_written():
    found = both(BOTH_SIDES, "dual", given=prompt(), **KINDS["threshold"])[0]
    given = prompt() != V
    np.testing.assert_array_equal(np.asarray(found.tokens)[given], prompt()[given])
    assert np.all((np.asarray(found.when) < 0) == given)
    assert np.asarray(found.tokens).max() < V
    # A text of one free token needs one call, however many the others make.
    assert found.calls[2] == 1
    assert found.rounds >= found.calls.max()


def test_a_prompt_that_is_the_whole_text_needs_no_call():
    x = np.tile(np.arange(L, dtype=np.int32) % V, (B, 1))
    found = both(BOTH_SIDES, "dual", given=x, **KINDS["threshold"])[0]
    np.testing.assert_array_equal(found.tokens, x)
    assert found.rounds == 0
    assert not found.calls.any()


def test_calls_compute_what_the_mode_says():
    """Widths of the windows: the block, or it and what is on its right in powers of two."""
    for cache, widths in (("dual", {BLOCK}), ("prefix", {BLOCK, 2 * BLOCK, 3 * BLOCK})):
        seen, fills = set(), []

        def window(params, kept, tokens, *rest, seen=seen):
            seen.add(tokens.shape[1])
            return BOTH_SIDES.window(params, kept, tokens, *rest)

        def fill(params, tokens, *rest, fills=fills):
            jax.debug.callback(lambda x: fills.append(1), tokens[0, 0])
            return BOTH_SIDES.fill(params, tokens, *rest)

        spied = BOTH_SIDES._replace(window=window, fill=fill)
        made = settings(kind="count", steps=12, block=BLOCK, cache=cache)
        found = sample_cached(jax.random.key(0), spied, PARAMS, B, L, made, V)
        jax.effects_barrier()
        assert seen == widths
        assert len(fills) == L // BLOCK
        assert found.rounds == 12


def test_left_padding_changes_no_token():
    """Positions and attention leave pads out; the noise is that of the shifted places."""
    model = transformer(**FIELDS | dict(vocab=V + 2))
    params = jax.jit(model.init)(jax.random.key(1))
    made = settings(kind="confidence", steps=3, block=BLOCK, cache="dual", temperature=0.0)
    x = np.full((1, 8), V, np.int32)
    x[0, :2] = 2, 5
    padded = np.concatenate([np.full((1, 4), V + 1, np.int32), x], axis=1)
    run = lambda x, steps: sample_cached(
        jax.random.key(0), model, params, 1, x.shape[1], made._replace(steps=steps), V, x,
        pad=V + 1,
    )  # fmt: skip
    plain, shifted = run(x, 4), run(padded, 6)
    np.testing.assert_array_equal(plain.tokens, shifted.tokens[:, 4:])
    np.testing.assert_array_equal(shifted.tokens[:, :4], V + 1)


def test_numbers_of_a_sampler_are_data():
    key = jax.random.key(0)
    before = None
    for tau in (0.2, 0.5, 0.8):
        made = settings(kind="threshold", tau=tau, block=BLOCK, cache="dual", rows=2)
        for refresh in (0, 2):
            sample_cached(key, BOTH_SIDES, PARAMS, B, L, made, V, refresh=refresh)
        before = before or blocks._run._cache_size()
    assert blocks._run._cache_size() == before


def test_texts_depend_on_neither_batch_nor_devices():
    made = settings(**KINDS["count"], block=BLOCK, cache="dual")
    run = lambda batch, first=0: sample_cached(
        jax.random.key(3), BOTH_SIDES, PARAMS, batch, L, made, V, first=first
    )
    eight = run(8)
    np.testing.assert_array_equal(run(3, 5).tokens, eight.tokens[5:])
    with jax.set_mesh(meshes.make(8, 1)):
        there = run(8)
    np.testing.assert_array_equal(there.tokens, eight.tokens)


@pytest.mark.parametrize(
    ("fields", "others", "sentence"),
    [
        (dict(cache="none"), {}, "config.sampler.cache is 'none', but must be prefix or dual"),
        (dict(kind="remask"), {}, "config.sampler.cache is 'dual', but must be none"),
        (dict(block=5), {}, "config.sampler.block is 5.*divisor of 12, as 4 or 6"),
        (dict(block=4, steps=4), {}, "config.sampler.steps is 4, but must be a multiple"),
        (dict(top_k=V + 1), {}, "config.sampler.top_k is 8"),
        ({}, dict(batch=0), "config.batch is 0"),
        ({}, dict(length=0), "config.length is 0"),
        ({}, dict(refresh=-1), "config.refresh is -1"),
        ({}, dict(pad=V), "config.pad is 7.*not the mask"),
        ({}, dict(mask=V + 1), "config.model.vocab is 8, but must be at least 9"),
        ({}, dict(prompt=np.full((2, L + 1), V)), "at most 12 tokens"),
        ({}, dict(prompt=np.full((2, L), V + 3)), "The prompt has the token 10"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(fields, others, sentence):
    def asked():
        made = settings(**dict(kind="count", steps=6, cache="dual") | fields)
        given = dict(batch=2, length=L, settings=made, mask=V) | others
        return sample_cached(jax.random.key(0), BOTH_SIDES, PARAMS, **given)

    with pytest.raises(UserError, match=sentence):
        asked()


def test_a_causal_model_has_no_such_cache():
    model = transformer(**FIELDS | dict(causal=True))
    made = settings(kind="count", steps=6, cache="dual")
    with pytest.raises(UserError, match=r"config\.model\.causal is True"):
        sample_cached(jax.random.key(0), model, PARAMS, 2, L, made, V)


def test_inside_another_program():
    made = settings(**KINDS["threshold"], block=BLOCK, cache="dual")
    run = lambda key: sample_cached(key, BOTH_SIDES, PARAMS, B, L, made, V, prompt()).tokens
    np.testing.assert_array_equal(jax.jit(run)(jax.random.key(0)), run(jax.random.key(0)))
    assert jnp.asarray(run(jax.random.key(1))).dtype == jnp.int32
