"""All samplers: prompts, batches, devices, outer programs, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import mesh as meshes
from common.errors import UserError
from lm.masked.ladder import ladder
from lm.masked.sample import frames, prompted, sample
from lm.masked.settings import KINDS, settings
from tests.lm.masked import tables

Q = tables.random(3, 4)
DENOISER, PARAMS = tables.exact(Q)
FIELDS = {kind: dict(kind=kind, steps=3, tau=0.6, gamma=0.3, eta=0.2) for kind in KINDS}
PROMPT = prompted([1], [2], 8, 4, 3)
PROMPT[3] = [0, 1, 2, 0]
KEY = jax.random.key(11)
ALL = {}
FAMILIES = ("ancestral", "threshold", "remask")


def made(kind):
    return settings(**FIELDS[kind])


def prompted_samples(kind):
    if kind not in ALL:
        ALL[kind] = sample(KEY, DENOISER, PARAMS, 8, 4, made(kind), PROMPT)
    return ALL[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_stay_and_what_is_free_is_filled_in(kind):
    found = prompted_samples(kind)
    tokens, given = np.asarray(found.tokens), PROMPT != 3
    np.testing.assert_array_equal(tokens[given], PROMPT[given])
    assert ((tokens >= 0) & (tokens < 3)).all()
    assert tokens.dtype == np.int32
    when = np.asarray(found.when)
    np.testing.assert_array_equal(when == -1, given)
    assert found.calls[3] == 0
    assert (np.asarray(found.calls) >= 1).sum() == 7
    assert (when.max(axis=1) < np.asarray(found.calls)).all()
    assert found.rounds == np.max(found.calls)
    for b, row in enumerate(when):
        if kind != "remask":
            assert set(row[row >= 0]) == set(range(int(found.calls[b])))


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_text_knows_neither_its_batch_nor_its_program(kind):
    whole = prompted_samples(kind)
    part = sample(KEY, DENOISER, PARAMS, 3, 4, made(kind), PROMPT[2:5], first=2)
    outer = jax.jit(
        lambda key, params, prompt: sample(key, DENOISER, params, 8, 4, made(kind), prompt)
    )
    inner = outer(KEY, PARAMS, jnp.asarray(PROMPT))
    for name in ("tokens", "calls", "when"):
        np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[2:5])
        np.testing.assert_array_equal(getattr(inner, name), getattr(whole, name))


@pytest.mark.parametrize("kind", FAMILIES)
def test_eight_devices_write_what_one_does(kind):
    # Under a mesh: sharded if the devices divide the texts, else whole on each.
    seen = []

    def hidden(params, x):
        jax.debug.inspect_array_sharding(x, callback=lambda s: seen.append(s))
        return DENOISER.hidden(params, x)

    spied = DENOISER._replace(hidden=hidden)
    with jax.set_mesh(meshes.make()):
        found = sample(KEY, spied, PARAMS, 8, 4, made(kind), PROMPT)
        uneven = None
        if kind == "ancestral":
            uneven = sample(KEY, DENOISER, PARAMS, 3, 4, made(kind), PROMPT[:3]).tokens
    assert found.tokens.sharding.is_fully_replicated
    assert seen
    assert all(s.shard_shape((8, 4)) == (1, 4) for s in seen)
    one = prompted_samples(kind)
    for name in ("tokens", "calls", "when", "rounds"):
        np.testing.assert_array_equal(getattr(found, name), getattr(one, name))
    if uneven is not None:
        np.testing.assert_array_equal(uneven, one.tokens[:3])


def test_a_prompt_of_all_tokens_comes_back_for_nothing():
    full = np.tile(np.array([[0, 1, 2, 0], [2, 2, 1, 0]], np.int32), (4, 1))
    for kind in KINDS:
        found = sample(KEY, DENOISER, PARAMS, 8, 4, made(kind), full)
        np.testing.assert_array_equal(found.tokens, full)
        assert not np.asarray(found.calls).any()
        assert found.rounds == 0
        assert (np.asarray(found.when) == -1).all()


def test_a_users_prompt_is_not_given_away():
    mine = jnp.asarray(PROMPT)
    sample(KEY, DENOISER, PARAMS, 8, 4, made("count"), mine)
    np.testing.assert_array_equal(mine, PROMPT)


def test_keys_make_texts():
    one = sample(KEY, DENOISER, PARAMS, 64, 4, made("ancestral")).tokens
    np.testing.assert_array_equal(
        one, sample(KEY, DENOISER, PARAMS, 64, 4, made("ancestral")).tokens
    )
    other = sample(jax.random.key(1), DENOISER, PARAMS, 64, 4, made("ancestral")).tokens
    assert (np.asarray(one) != other).any()


def test_temperature_zero_is_the_same_for_every_key_where_the_order_is():
    cold = settings(kind="confidence", steps=4, block=1, temperature=0.0)
    found = [sample(jax.random.key(i), DENOISER, PARAMS, 2, 4, cold).tokens for i in (0, 1)]
    np.testing.assert_array_equal(*found)
    row = []
    for _ in range(4):
        seen = Q[tuple(row)]
        row.append(int(seen.reshape(3, -1).sum(axis=1).argmax()))
    np.testing.assert_array_equal(found[0], [row, row])


@pytest.mark.parametrize("kind", ["count", "threshold", "remask"])
def test_frames_show_the_text_grow(kind):
    found = sample(KEY, DENOISER, PARAMS, 8, 4, made(kind), PROMPT, history=True)
    shown = frames(found, 3)
    assert shown.shape == (int(found.rounds) + 1, 8, 4)
    np.testing.assert_array_equal(shown[0], PROMPT)
    np.testing.assert_array_equal(shown[-1], found.tokens)
    if kind != "remask":
        assert ((shown[1:] == 3) <= (shown[:-1] == 3)).all()
        for b in range(8):
            fewer = (shown[1:, b] != shown[:-1, b]).any(axis=1)
            assert fewer.sum() == found.calls[b]


def test_a_mask_inside_the_vocabulary_and_padding():
    # Token 0 is the mask: its probability is 0.
    log_p = jnp.log(jnp.array([0.0, 0.5, 0.5]))
    inside = tables.plain(lambda p, x: jnp.broadcast_to(p, (*x.shape, 3)), 3, 0)
    prompt = np.array([[0, 0, 1, 3]], np.int32)
    for kind in ("ancestral", "threshold"):
        found = sample(KEY, inside._replace(pad=3), log_p, 1, 4, made(kind), prompt)
        np.testing.assert_array_equal(found.tokens[0, 2:], [1, 3])
        assert (np.asarray(found.tokens)[0, :2] > 0).all()


def test_prefix_and_suffix_make_a_prompt():
    np.testing.assert_array_equal(prompted([1, 2], None, 2, 4, 9), [[1, 2, 9, 9]] * 2)
    np.testing.assert_array_equal(prompted(None, [[1], [2]], 2, 3, 9), [[9, 9, 1], [9, 9, 2]])
    np.testing.assert_array_equal(prompted([], [], 1, 2, 9), [[9, 9]])
    np.testing.assert_array_equal(prompted([1], [2], 1, 2, 9), [[1, 2]])
    for prefix, suffix, sentence in (
        ([1, 2, 3], [1, 2], "The prompt has 5 tokens, but a text has 4"),
        ([[1], [2], [3]], None, "The prefix has 3 rows, but there are 2 texts"),
        (None, [0.5], "The suffix must be whole numbers"),
        (3, None, "The prefix must be whole numbers"),
    ):
        with pytest.raises(UserError, match=sentence):
            prompted(prefix, suffix, 2, 4, 9)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (dict(batch=0), "config.batch is 0, but must be a whole number from 1 up"),
        (dict(batch=True), "config.batch is True"),
        (dict(length=0), "config.length is 0"),
        (dict(settings=settings(cache="dual")), "sampler.cache is 'dual', but must be none"),
        (dict(settings=settings(top_k=4)), "top_k is 4, but must be at most 3"),
        (dict(settings=settings(kind="count", steps=5)), "steps is 5, but must be at most 4"),
        (dict(prompt=np.zeros((2, 5), np.int32)), "at most 4 tokens in each of 2 rows"),
        (dict(prompt=np.zeros((2, 3), np.int32)), r"must be \(2, 4\), with the mask, 3,"),
        (dict(prompt=np.zeros((3, 4), np.int32)), r"must be \(2, 4\)"),
        (
            dict(prompt=np.array([[0, 1, 2, 3], [0, 4, 3, -1]], np.int32)),
            "the token 4 in row 1 at 1, but tokens are 0 to 2, and 3 is the mask",
        ),
        (dict(prompt=np.full((2, 4), -1, np.int32)), "the token -1 in row 0 at 0"),
    ],
)
def test_what_cannot_be_is_refused(arguments, sentence):
    known = dict(batch=2, length=4, settings=settings(), prompt=None) | arguments
    with pytest.raises(UserError, match=sentence):
        sample(KEY, DENOISER, PARAMS, **known)


@pytest.mark.parametrize("kind", ["ancestral", "threshold", "remask"])
def test_a_ladder_is_each_of_its_rungs(kind):
    fields = FIELDS[kind] | {"cache": "none"}
    rungs = [settings(**fields | {"steps": steps}) for steps in (1, 2, 4)]
    found = jax.jit(lambda key, params: ladder(key, DENOISER, params, 8, 4, rungs))(KEY, PARAMS)
    for i, rung in enumerate(rungs):
        want = sample(jax.random.fold_in(KEY, i), DENOISER, PARAMS, 8, 4, rung)
        for name in ("tokens", "calls", "when"):
            np.testing.assert_array_equal(getattr(found, name)[i], getattr(want, name))
    assert len({np.asarray(tokens).tobytes() for tokens in found.tokens}) == 3


def test_tables_of_several_sizes_share_a_ladder():
    rungs = [settings(kind="ancestral", steps=steps) for steps in (2, 5000)]
    found = ladder(KEY, DENOISER, PARAMS, 8, 4, rungs)
    for i, rung in enumerate(rungs):
        want = sample(jax.random.fold_in(KEY, i), DENOISER, PARAMS, 8, 4, rung)
        np.testing.assert_array_equal(found.tokens[i], want.tokens)
