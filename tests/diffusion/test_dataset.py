"""Data sets by a config's `data`: random numbers obey the fields that images obey."""

import warnings

import numpy as np
import pytest

from common.errors import UserError
from diffusion import images
from diffusion.dataset import dataset, fingerprint


def made(path="gaussian:4x6x2", seed=3, **changes):
    given = dict(
        path=path,
        scaling="x/127.5-1",
        resolution=0,
        channels=0,
        num_rows=20,
        shuffle=False,
        class_cond=True,
        flip=False,
        cache="",
        seed=seed,
    )
    return dataset(**given | changes)


def test_random_numbers_are_half_a_standard_normal_of_the_seed():
    got = made()
    want = 0.5 * np.random.default_rng(3).standard_normal((20, 4, 6, 2), np.float32)
    assert np.array_equal(got.rows, want)
    assert got.labels.tolist() == [*range(10), *range(10)]
    # Runs know each other by it.
    assert got.sha256 == got.source == "gaussian:4x6x2 20 3"
    assert len(made(num_rows=0).rows) == 512
    assert not np.array_equal(made(seed=4).rows, got.rows)


def test_random_numbers_are_flipped_too():
    plain, double = made(), made(flip=True)
    assert np.array_equal(double.rows[:20], plain.rows)
    assert np.array_equal(double.rows[20:], plain.rows[:, :, ::-1])
    assert double.labels.tolist() == 2 * plain.labels.tolist()
    assert double.sha256 == images.flipped(plain).sha256 != plain.sha256
    assert not np.array_equal(fingerprint(double, True), fingerprint(plain, True))


def test_fields_that_say_what_the_path_says_change_nothing():
    plain = made("gaussian:4x4x2")
    told = made("gaussian:4x4x2", resolution=4, channels=2, shuffle=True, class_cond=False)
    assert np.array_equal(told.rows, plain.rows)
    assert told.sha256 == plain.sha256


@pytest.mark.parametrize(
    ("path", "changes", "said"),
    [
        ("gaussian:4x4x2", dict(resolution=8), "data.resolution is 8, but must be 0, or what"),
        ("gaussian:4x6x2", dict(resolution=4), "data.resolution is 4, but must be 0, or what"),
        ("gaussian:4x4x2", dict(channels=3), "data.channels is 3, but must be 0, or what"),
        ("gaussian:4x4x2", dict(num_rows=-1), "data.num_rows is -1, but must be a whole"),
        ("gaussian:4x4x2", dict(scaling="x/255"), "data.scaling is 'x/255'"),
        ("gaussian:4x4", {}, "data.path is 'gaussian:4x4', but must be gaussian:HxWxC"),
        ("gaussian:4x0x1", {}, "data.path is"),
        ("gaussian:axbxc", {}, "data.path is"),
    ],
)
def test_what_random_numbers_cannot_be_is_one_sentence(path, changes, said):
    with pytest.raises(UserError) as error:
        made(path, **changes)
    assert said in str(error.value)


def test_single_rows_are_told_of(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 1)).astype(np.uint8)
    np.save(tmp_path / "one.npy", x[:1])
    single = dict(num_rows=0, class_cond=False)
    with pytest.warns(UserWarning, match=r"data\.path: one has one row.*J\* is 0"):
        assert len(made(str(tmp_path / "one.npy"), **single).rows) == 1
    # Classes 0 and 900 have one row, 3 has three, the others none.
    labels = np.array([3, 0, 3, 900, 3])
    np.savez(tmp_path / "few.npz", images=x, labels=labels)
    path = str(tmp_path / "few.npz")
    with pytest.warns(UserWarning, match=r"class_cond: 2 classes have one row"):
        made(path, num_rows=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(path, **single)  # The class is not told.
        made(path, num_rows=0, flip=True)  # Two rows of each.
