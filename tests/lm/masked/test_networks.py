"""A network as a denoiser: normalised, without the mask, and blind to padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from common.errors import UserError
from lm.masked.denoiser import denoise as eager
from lm.masked.networks import denoiser
from lm.transformer import transformer

V, PAD = 6, 7
MODEL = transformer(
    vocab=8, dim=16, mlp=24, heads=2, depth=2, init_std=0.5, causal=False, unroll=2
)
PARAMS = jax.jit(MODEL.init)(jax.random.key(0))
X = np.array([[0, V, 3, V, 5], [V, V, V, 1, 2]], np.int32)
LOGITS = np.asarray(jax.jit(MODEL.apply)(PARAMS, X), np.float64)
denoise = jax.jit(eager, static_argnums=0)


@pytest.mark.parametrize(("vocab", "mask"), [(V, -1), (V, V), (8, V), (8, 0)])
def test_logits_are_normalised_without_the_mask(vocab, mask):
    found = denoise(denoiser(MODEL, vocab, mask), PARAMS, X)
    assert found.dtype == jnp.float32
    wanted = LOGITS[..., :vocab].copy()
    if 0 <= mask < vocab:
        wanted[..., mask] = -np.inf
    np.testing.assert_allclose(found, log_softmax(wanted, axis=-1), atol=1e-5)


def test_bfloat16_is_normalised_in_float32():
    fields = dict(vocab=8, dim=16, mlp=24, heads=2, depth=2, causal=False, dtype="bfloat16")
    narrow = denoiser(transformer(**fields), V)
    found = denoise(narrow, PARAMS, X)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(jnp.exp(found).sum(axis=-1), 1, atol=1e-6)


def test_it_is_one_object():
    assert denoiser(MODEL, V) is denoiser(MODEL, V)
    assert hash(denoiser(MODEL, V)) != hash(denoiser(MODEL, V, pad=PAD))
    assert denoiser(MODEL, V).mask == V


@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 2), (1, 4)])
def test_padding_changes_nothing(left, right):
    made = denoiser(MODEL, V, pad=PAD)
    padded = np.pad(X, ((0, 0), (left, right)), constant_values=PAD)
    found = denoise(made, PARAMS, padded)[:, left : left + 5]
    np.testing.assert_allclose(found, denoise(denoiser(MODEL, V), PARAMS, X), atol=1e-5)
    assert np.isfinite(denoise(made, PARAMS, padded)).all()


def test_texts_of_a_batch_may_be_padded_differently():
    made = denoiser(MODEL, V, pad=PAD)
    rows = [np.pad(X[0], (n, 3 - n), constant_values=PAD) for n in range(4)]
    found = denoise(made, PARAMS, np.stack(rows))
    wanted = denoise(made, PARAMS, X)[0]
    for n in range(4):
        np.testing.assert_allclose(found[n, n : n + 5], wanted, atol=1e-5)


def test_pads_are_never_written():
    found = denoise(denoiser(MODEL, 8, V, PAD), PARAMS, X)
    assert (found[..., [V, PAD]] == -np.inf).all()
    np.testing.assert_allclose(jnp.exp(found).sum(axis=-1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((8,), r"config\.model\.vocab is 8, but must be at least 9, with a row for the mask"),
        ((9, 0), r"config\.model\.vocab is 8, but must be at least 9"),
        ((V, V, V), r"config\.pad is 6, but must be from 0 to 7 and not the mask, 6"),
        ((V, V, 8), r"config\.pad is 8"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        denoiser(MODEL, *arguments)
