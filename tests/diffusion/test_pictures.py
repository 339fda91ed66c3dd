"""Pictures: every pixel in its place, any number of channels, files that open."""

import numpy as np
import pytest
from PIL import Image

from diffusion.neighbours import nearest
from diffusion.pictures import grid, mosaic, nearest_rows, side_by_side


def values(n, h, w, c, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (n, h, w, c)).astype(np.float32)


def test_a_mosaic_has_every_image_in_its_place():
    x = values(5, 4, 3, 3)
    got = mosaic(x, columns=2)
    assert got.shape == (3 * 5 - 1, 2 * 4 - 1, 3)
    for at in range(5):
        top, left = 5 * (at // 2), 4 * (at % 2)
        place = got[top : top + 4, left : left + 3]
        np.testing.assert_allclose(place, (x[at] + 1) / 2, atol=1e-6)
    assert np.all(got[10:, 4:] == 1)  # The sixth place is empty,
    assert np.all(got[4] == 1)  # and so is a gap.


def test_bytes_and_floats_look_the_same():
    x = np.random.default_rng(0).integers(0, 256, (4, 2, 2, 1)).astype(np.uint8)
    floats = (x / 127.5 - 1).astype(np.float32)
    np.testing.assert_allclose(mosaic(x), mosaic(floats), atol=1e-6)
    assert mosaic(x).shape == (5, 5, 3)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 32])
def test_any_number_of_channels_can_be_seen(channels):
    x = 5 * values(3, 4, 4, channels) - 2
    got = mosaic(x, columns=3)
    assert got.shape == (4, 14, 3)
    assert 0 <= got.min() < got.max() <= 1
    if channels > 3:  # Latents fill the range, whatever theirs is.
        assert np.allclose([got[:, :4].min(), got.max()], [0, 1], atol=0.1)


def test_what_is_not_finite_or_beyond_the_range_is_clipped():
    x = np.array([np.nan, np.inf, -np.inf, 7.0], np.float32).reshape(4, 1, 1, 1)
    assert mosaic(x, columns=4)[0, ::2, 0].tolist() == [0, 1, 0, 1]
    assert mosaic(np.zeros((0, 2, 2, 1), np.float32)).shape == (2, 2, 3)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_figures_are_written(tmp_path, channels):
    rows, samples = values(20, 8, 8, channels), values(6, 8, 8, channels, 1)
    grid(tmp_path / "a" / "grid.png", samples, title="step 100")
    side_by_side(tmp_path / "both.png", rows, samples, columns=4)
    nearest_rows(tmp_path / "near.png", samples, rows, nearest(samples, rows), count=4)
    nearest_rows(tmp_path / "one.png", samples[:1], rows, nearest(samples[:1], rows, 1))
    names = ("a/grid.png", "both.png", "near.png", "one.png")
    for name in names:
        with Image.open(tmp_path / name) as picture:
            x = np.asarray(picture.convert("RGB"), np.float32)
            assert min(x.shape[:2]) > 50
            assert x.std() > 5
    assert len(list(tmp_path.rglob("*.png"))) == 4
