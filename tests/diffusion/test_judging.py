"""Samples against the data, and evaluations that are refused before training."""

import warnings
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from common.errors import UserError
from diffusion import dinov2, images, inception, judging
from diffusion.dataset import dataset
from tests.diffusion.test_inception import random_layer
from tests.diffusion.test_training import config

DIM, CLASSES = 4, 5
LAYER = "Conv2d_1a_3x3"


def ready(**changes):
    c = config(**changes)
    return c, dataset(**c.data, seed=c.data_seed)


@pytest.fixture
def weights(monkeypatch, tmp_path):
    """Files of an Inception network of one layer, without and with the last one.

    Its features are the means of the quarters of an image.
    """
    monkeypatch.setattr(inception, "SHAPES", {LAYER: (8, 3, 3, 3)})
    monkeypatch.setattr(inception, "DIM", DIM)
    monkeypatch.setattr(inception, "CLASSES", CLASSES)
    quarters = lambda x: x.reshape(len(x), 2, x.shape[1] // 2, 2, -1).mean((2, 4))
    monkeypatch.setattr(
        inception, "apply", lambda params, x, variant: quarters(x).reshape(len(x), DIM)
    )
    rng = np.random.default_rng(0)
    tensors = {f"{LAYER}.{n}": a for n, a in random_layer(rng, (8, 3, 3, 3)).items()}
    head = rng.normal(size=(CLASSES, DIM)).astype(np.float32)
    save_file(tensors, tmp_path / "bare.safetensors")
    save_file(tensors | {"fc.weight": head}, tmp_path / "whole.safetensors")
    broken = {n: a for n, a in tensors.items() if "bias" not in n}
    save_file(broken, tmp_path / "broken.safetensors")
    return SimpleNamespace(folder=tmp_path, head=head)


def at(weights, name):
    return dict(samples=64, features="inception", weights=str(weights.folder / name))


def test_copies_of_rows_are_judged_as_such():
    """Random rows of a set that is sorted by class: precise, complete, and remembered."""
    c, data = ready(eval=dict(samples=600))
    order = np.argsort(data.labels, kind="stable")
    data = data._replace(rows=data.rows[order], labels=data.labels[order])
    rng = np.random.default_rng(0)
    made = np.float32(data.rows[rng.permutation(1797)[:900]])
    found = judging.judged(c, data, made)
    assert found["precision"] == 1
    assert found["recall"] > 0.9
    assert found["copies"] > 0.9
    assert found["close"] == 1
    assert found["nearest"] < 1e-5
    noise = judging.judged(c, data, rng.normal(size=made.shape).astype(np.float32))
    assert noise["frechet"] > 20 * found["frechet"]
    assert noise["copies"] < 0.1


def test_images_are_rounded_to_pixels_as_the_real_ones_are(monkeypatch):
    c, data = ready(eval=dict(samples=64))
    data = data._replace(scaling="x/127.5-1")
    shown, real = [], judging.features.extract

    def extract(known, x, **more):
        shown.append(x.dtype)
        return real(known, x, **more)

    monkeypatch.setattr(judging.features, "extract", extract)
    judging.judged(c, data, np.zeros((64, 8, 8, 1), np.float32))
    assert shown[-1] == np.uint8


def test_weights_without_the_last_layer_have_all_but_the_inception_score(weights):
    c, data = ready(eval=at(weights, "bare.safetensors"))
    made = images.scaled(data.rows[:64])
    said = r"lacks fc\.weight, so there is no Inception score"
    with pytest.warns(UserWarning, match=said):  # Before training.
        judging.check(c, data)
    with pytest.warns(UserWarning, match=said):
        found = judging.judged(c, data, made)
    assert "inception_score" not in found
    assert found["precision"] == 1
    # Features of 8 x 8 digits by hand, and the distance by eigenvalues of the product.
    quarters = lambda x: np.float64(x)[..., 0].reshape(-1, 2, 4, 2, 4).mean((2, 4))
    a, b = (quarters(x).reshape(-1, DIM) for x in (made, images.scaled(data.rows)))
    s, t = np.cov(a.T), np.cov(b.T)
    root = np.sqrt(np.linalg.eigvals(s @ t).real).sum()
    want = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(s + t) - 2 * root
    assert found["frechet"] == pytest.approx(want, rel=1e-4)


def test_weights_with_the_last_layer_have_the_inception_score(weights):
    c, data = ready(eval=at(weights, "whole.safetensors"))
    made = images.scaled(data.rows[:64])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        judging.check(c, data)
        found = judging.judged(c, data, made)
    x = np.float64(made)[..., 0].reshape(-1, 2, 4, 2, 4).mean((2, 4)).reshape(-1, DIM)
    logits = x @ weights.head.T.astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    scores = [
        np.exp(np.mean(np.sum(q * np.log(q / q.mean(0)), axis=1)))
        for q in np.array_split(p, 10)
    ]
    assert found["inception_score"] == pytest.approx(np.mean(scores), rel=1e-5)
    assert found["inception_score_std"] == pytest.approx(np.std(scores), rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(features="fid"), "eval.features"),
        (dict(neighbours=0), "eval.neighbours"),
        (dict(samples=2), "eval.samples"),
        (dict(features="dinov2", weights="/nowhere.npz"), "eval.weights is .* that exists"),
        (dict(features="inception", weights=""), "eval.weights is .* that exists"),
        (dict(local=dict(steps=0)), "eval.local.steps"),
    ],
    ids=str,
)
def test_evaluations_that_cannot_be_are_named(changes, said):
    c, data = ready(eval=dict(samples=64))
    c.eval.update(changes)
    with pytest.raises(UserError, match=said):
        judging.check(c, data)


@pytest.mark.parametrize("name", ["inception", "dinov2"])
def test_files_that_are_no_weights_are_refused_before_training(weights, name):
    (weights.folder / "hostname").write_text("here\n")
    (weights.folder / "torn.npz").write_bytes(b"PK\x03\x04 no zip")
    for file, said in {
        "hostname": r"ends in \.safetensors or \.npz",
        "torn.npz": "is damaged",
        "broken.safetensors": "lacks the tensor",
    }.items():
        c, data = ready(eval=at(weights, file) | dict(features=name))
        with pytest.raises(UserError, match=rf"config\.eval\.weights.*{said}"):
            judging.check(c, data)


def test_weights_at_home_are_found(weights, monkeypatch):
    monkeypatch.setenv("HOME", str(weights.folder))
    c, data = ready(eval=dict(at(weights, ""), weights="~/whole.safetensors"))
    judging.check(c, data)


def test_fewer_samples_than_splits_are_refused_where_there_is_a_score(weights):
    c, data = ready(eval=at(weights, "whole.safetensors") | dict(samples=9))
    with pytest.raises(UserError, match=r"eval\.samples is 9, but .* at least the 10 splits"):
        judging.check(c, data)
    c.eval.samples = 10
    judging.check(c, data)
    c.eval.weights, c.eval.samples = str(weights.folder / "bare.safetensors"), 9
    with pytest.warns(UserWarning, match="no Inception score"):
        judging.check(c, data)


@pytest.mark.parametrize("name", ["inception", "dinov2"])
def test_networks_of_colours_refuse_latents(monkeypatch, name):
    changes = dict(samples=64, features=name, weights="/nowhere.npz")
    c, data = ready(data=dict(path="gaussian:4x4x4"), eval=changes)
    with pytest.raises(UserError, match=rf"eval\.features is '{name}', .* local .* 4 channels"):
        judging.check(c, data)
    # They are asked before the file is read; of three channels the file is next.
    c, data = ready(data=dict(path="gaussian:4x4x3"), eval=changes)
    with pytest.raises(UserError, match=r"eval\.weights"):
        judging.check(c, data)


def test_a_good_file_of_dinov2_passes(monkeypatch, tmp_path):
    made = judging.features.Features("dinov2", 4, jnp.zeros(1), lambda p, x: x)
    monkeypatch.setattr(dinov2, "dinov2", lambda path: made)
    chosen = dict(samples=9, features="dinov2", weights=str(tmp_path / "a.npz"))
    judging.check(*ready(eval=chosen))


def test_too_few_rows_for_the_local_classifier_are_refused():
    c, data = ready(eval=dict(samples=64, neighbours=1))
    few = data._replace(rows=data.rows[:2], labels=data.labels[:2])
    with pytest.raises(UserError, match=r"eval\.features is 'local', .* fewer than 3 rows"):
        judging.check(c, few)
    judging.check(c, data._replace(rows=data.rows[:3], labels=data.labels[:3]))
