"""The local classifier: accuracy, same bits, any image size; extraction in batches."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from common.errors import UserError
from diffusion.features import Features, extract, extract_batches, local_features
from diffusion.images import load, scaled
from diffusion.pretrained import coloured, read_weights, require, resampling, resized
from diffusion.quality import frechet_distance, statistics


@pytest.fixture(scope="module")
def digits():
    return load("", scaling="x/127.5-1")


@pytest.fixture(scope="module")
def trained(digits):
    small = dict(steps=120, batch_size=64, width=8, peak=2e-2)
    return local_features(digits.rows, digits.labels, jax.random.key(0), **small)


def test_the_local_classifier_reads_digits(digits, trained):
    features, accuracy = trained
    assert accuracy > 0.95
    assert (features.name, features.dim) == ("local", 64)
    x = extract(features, digits.rows[:300])
    chex.assert_shape(x, (300, 64))
    chex.assert_type(x, np.float32)
    logits = features.logits(features.params, jnp.asarray(x))
    assert np.mean(np.argmax(logits, 1) == digits.labels[:300]) > 0.95


def test_the_local_distance_tells_noise_from_digits(digits, trained):
    features, _ = trained
    noise = np.random.default_rng(0).uniform(-1, 1, (400, 8, 8, 1)).astype(np.float32)
    first, second, made = (
        statistics(extract(features, x)) for x in (digits.rows[::2], digits.rows[1::2], noise)
    )
    assert frechet_distance(first, made) > 20 * frechet_distance(first, second)


def test_one_key_gives_the_same_bits(digits):
    short = lambda: local_features(
        digits.rows, digits.labels, jax.random.key(1), steps=3, width=2, dim=8
    )
    first, second = short(), short()
    chex.assert_trees_all_equal(first[0].params, second[0].params)
    assert first[1] == second[1]


@pytest.mark.parametrize("shape", [(32, 32, 3), (5, 3, 2)])
def test_any_shape_of_image_will_do(shape):
    x = np.random.default_rng(0).integers(0, 256, (20, *shape)).astype(np.uint8)
    y = np.arange(20) % 2
    kind = dict(steps=1, batch_size=4, width=2, dim=5)
    features, accuracy = local_features(x, y, jax.random.key(0), **kind)
    assert extract(features, x).shape == (20, 5)
    assert 0 <= accuracy <= 1


def test_no_classifier_without_classes():
    x = np.zeros((10, 8, 8, 1), np.float32)
    wrong = [
        (dict(labels=np.zeros(10, int)), r"eval\.features"),
        (dict(labels=np.arange(10), held_out=1.0), r"eval\.local\.held_out"),
        (dict(labels=np.arange(10), held_out=0.01), r"eval\.local\.held_out"),
        (dict(labels=np.arange(10), steps=0), r"eval\.local\.steps"),
    ]
    for kwargs, match in wrong:
        with pytest.raises(UserError, match=match):
            local_features(x, key=jax.random.key(0), **kwargs)


def counted():
    """Features of a linear map, and how often it was traced."""
    traces = []

    def apply(params, x):
        traces.append(x.shape)
        return x.reshape(len(x), -1) @ params

    return Features("local", 3, jax.random.normal(jax.random.key(0), (12, 3)), apply), traces


@pytest.mark.parametrize("devices", [None, 1, 8])
@pytest.mark.parametrize("count", [0, 3, 16, 37])
def test_batches_and_devices_change_nothing(devices, count):
    features, traces = counted()
    rows = np.random.default_rng(0).integers(0, 256, (count, 2, 2, 3)).astype(np.uint8)
    mesh = None
    if devices:
        axes = dict(axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
        mesh = jax.make_mesh((devices,), ("data",), **axes)
    got = extract(features, rows, batch_size=16, mesh=mesh)
    want = scaled(rows).reshape(count, 12) @ np.asarray(features.params)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert len(traces) <= 1


def test_a_batch_that_the_devices_do_not_divide_is_refused():
    features, _ = counted()
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    with pytest.raises(UserError, match=r"eval\.batch_size"):
        next(extract_batches(features, np.zeros((4, 2, 2, 3)), batch_size=12, mesh=mesh))


def test_linear_resampling_is_interpolation():
    x = np.random.default_rng(0).normal(size=5)
    at = np.clip((np.arange(12) + 0.5) * 5 / 12 - 0.5, 0, 4)
    np.testing.assert_allclose(resampling(5, 12) @ x, np.interp(at, np.arange(5), x), atol=1e-6)
    at = np.clip(np.arange(12) * 5 / 12, 0, 4)
    got = resampling(5, 12, offset=0.0) @ x
    np.testing.assert_allclose(got, np.interp(at, np.arange(5), x), atol=1e-6)


@pytest.mark.parametrize("kernel", ["linear", "cubic"])
def test_resampling_keeps_constants_and_equal_sizes(kernel):
    np.testing.assert_allclose(resampling(7, 19, kernel).sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(resampling(9, 9, kernel), np.eye(9), atol=1e-6)


def test_cubic_resampling_by_hand():
    # Half way between pixels, a = -3/4: (-3, 19, 19, -3) / 32.
    got = resampling(6, 12, "cubic", offset=0.0)[5]
    np.testing.assert_allclose(got * 32, [0, -3, 19, 19, -3, 0], atol=1e-5)


def test_resizing_takes_each_axis_by_its_matrix():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, 2)), jnp.float32)
    got = resized(x, resampling(3, 6), resampling(4, 4))
    want = jax.image.resize(x, (2, 6, 4, 2), "linear", antialias=False)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_grey_becomes_three_channels_and_others_are_refused():
    x = jnp.arange(4.0).reshape(1, 2, 2, 1)
    assert np.array_equal(coloured(x), np.broadcast_to(x, (1, 2, 2, 3)))
    with pytest.raises(UserError, match="4 channels"):
        coloured(jnp.zeros((1, 2, 2, 4)))


def test_weights_are_read_from_both_kinds_of_file(tmp_path):
    from safetensors.numpy import save_file

    tensors = {"a": np.arange(6, dtype=np.float16).reshape(2, 3)}
    save_file(tensors, tmp_path / "a.safetensors")
    np.savez(tmp_path / "a.npz", **tensors)
    for name in ("a.safetensors", "a.npz"):
        found = require(read_weights(str(tmp_path / name), "x.y"), {"a": (2, 3)}, name, "x.y")
        chex.assert_trees_all_equal(found, {"a": tensors["a"].astype(np.float32)})


def test_wrong_weights_are_one_sentence(tmp_path):
    (tmp_path / "torn.safetensors").write_bytes(b"no header here")
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 no zip")
    (tmp_path / "a.pth").write_bytes(b"")
    for name, match in {
        "torn.safetensors": "damaged",
        "torn.npz": "damaged",
        "a.pth": r"\.safetensors or \.npz",
        "nowhere.npz": "exists",
    }.items():
        with pytest.raises(UserError, match=match):
            read_weights(str(tmp_path / name), "eval.weights")
    for tensors, match in [
        ({}, "lacks the tensor a and 1 more"),
        ({"a": np.ones(2), "b": np.ones(3)}, r"a of f has the shape \(2,\)"),
        ({"a": np.ones(3, int), "b": np.ones(3)}, "type int64"),
        ({"a": np.full(3, np.nan), "b": np.ones(3)}, "a of f is not finite"),
    ]:
        with pytest.raises(UserError, match=match):
            require(tensors, {"a": (3,), "b": (3,)}, "f", "eval.weights")
