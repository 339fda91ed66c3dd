"""Guidance against its formula, and two passes against one doubled one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from common import mesh as meshes
from lm.masked.denoiser import Denoiser, plain
from lm.masked.denoiser import denoise as eager
from lm.masked.guidance import Guided, guided
from lm.masked.networks import denoiser
from lm.masked.sample import sample
from lm.masked.settings import settings
from lm.transformer import transformer

V = 6
MODEL = transformer(vocab=7, dim=16, mlp=24, heads=2, depth=2, init_std=0.5, causal=False)
PARAMS = jax.jit(MODEL.init)(jax.random.key(0))
DENOISER = denoiser(MODEL, V)
denoise = jax.jit(eager, static_argnums=0)
X = np.array([[0, V, 3, V, 5], [V, V, V, 1, 2]], np.int32)
PROMPTED = np.array([[1, 0, 1, 0, 0], [0, 0, 0, 1, 1]], bool)


@pytest.mark.parametrize("weight", [0.0, 0.7, 3.0, -1.0])
def test_log_f_leans_by_the_weight(weight):
    found = denoise(guided(DENOISER), Guided(PARAMS, PROMPTED, weight), X)
    given = np.asarray(denoise(DENOISER, PARAMS, X), np.float64)
    free = np.asarray(denoise(DENOISER, PARAMS, np.where(PROMPTED, V, X)), np.float64)
    wanted = log_softmax(free + (1 + weight) * (given - free), axis=-1)
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    assert found.dtype == jnp.float32


def test_one_call_of_a_doubled_batch():
    shapes = []

    def hidden(params, x):
        shapes.append(x.shape)
        return DENOISER.hidden(params, x)

    def head(params, h):
        shapes.append(h.shape)
        return DENOISER.head(params, h)

    spied = guided(Denoiser(V, V, hidden, head))
    params = Guided(PARAMS, jnp.asarray(PROMPTED), 1.0)
    h = spied.hidden(params, jnp.asarray(X))
    assert h.shape == (2, 5, 32)
    # Rows are picked after the call, as a sampler does.
    found = spied.head(params, h[:, [3, 1]])
    assert shapes == [(4, 5), (2, 4, 16)]
    wanted = denoise(guided(DENOISER), params, X)[:, [3, 1]]
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_what_is_impossible_stays_so():
    table = jnp.log(jnp.array([[0.5, 0.5, 0.0], [0.2, 0.0, 0.8]]))

    def row(table, x):
        given = jnp.any(x == 1, axis=1)[:, None, None]
        return jnp.broadcast_to(jnp.where(given, table[0], table[1]), (*x.shape, 3))

    x = jnp.array([[1, 3]])
    params = Guided(table, jnp.array([[True, False]]), 2.0)
    # With the prompt (0.5, 0.5, 0), without it (0.2, 0, 0.8).
    wanted = np.array([0.5 * (0.5 / 0.2) ** 2, 0.5, 0.0])
    log_f = denoise(guided(plain(row, 3)), params, x)[0, 1]
    np.testing.assert_allclose(jnp.exp(log_f), wanted / wanted.sum(), atol=1e-6)


def test_a_sampler_with_guidance_keeps_the_prompt_and_compiles_once():
    made = settings(kind="count", steps=2)
    traced = []

    def hidden(params, x):
        traced.append(x.shape)
        return DENOISER.hidden(params, x)

    lean = guided(DENOISER._replace(hidden=hidden))
    prompt = np.where(PROMPTED, X, V)
    found = [
        sample(
            jax.random.key(0), lean, Guided(PARAMS, PROMPTED, np.float32(w)), 2, 5, made, prompt
        )
        for w in (0.0, 4.0)
    ]
    for one in found:
        np.testing.assert_array_equal(np.asarray(one.tokens)[PROMPTED], X[PROMPTED])
    once = len(traced)
    sample(jax.random.key(1), lean, Guided(PARAMS, PROMPTED, np.float32(1)), 2, 5, made, prompt)
    assert len(traced) == once
    plainly = sample(jax.random.key(0), DENOISER, PARAMS, 2, 5, made, prompt)
    np.testing.assert_array_equal(found[0].tokens, plainly.tokens)


def test_on_eight_devices_it_is_the_same():
    x, prompted = np.tile(X, (4, 1)), np.tile(PROMPTED, (4, 1))
    call = lambda p, x: denoise(guided(DENOISER), p, x)
    wanted = call(Guided(PARAMS, prompted, 1.5), x)
    mesh = meshes.make(8, 1)
    with jax.set_mesh(mesh):
        x, prompted = meshes.to_devices((x, prompted), mesh)
        found = call(Guided(PARAMS, prompted, 1.5), x)
        assert len(found.sharding.device_set) == 8
    np.testing.assert_allclose(found, wanted, atol=1e-5)
