"""EDM's augmentation against an independent padded warp, exact moves, and its counts."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from common.errors import UserError
from diffusion import augment as augmentation
from diffusion.augment import SYM6, Transform, augment, condition, drawn, transformed

SHAPES = [(32, 32, 3), (8, 8, 1), (12, 20, 2)]
NUMBERS = ("scale", "turn", "stretch", "axis", "shift_x", "shift_y")


def known(x_flip=False, y_flip=False, **numbers):
    made = dict.fromkeys(NUMBERS, 0.0) | numbers
    flips = dict(x_flip=jnp.asarray(x_flip), y_flip=jnp.asarray(y_flip))
    return Transform(**flips, **{k: jnp.float32(v) for k, v in made.items()})


def picture(shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def smooth(size):
    """One wave and a half over the picture, in no symmetric place."""
    y, x = np.mgrid[:size, :size] / size
    wave = np.sin(2 * np.pi * (1.5 * x + 0.1)) * np.cos(2 * np.pi * (0.8 * y + 0.3))
    return (0.5 * wave + 0.3 * x)[..., None].astype(np.float32)


def apply(image, made):
    return np.asarray(jax.jit(transformed)(image, made))


def padded_warp(image, made):
    """The steps of the paper's code one by one in float64: pad, upsample, warp, downsample."""
    height, width, _ = image.shape
    pad, tap = 120, np.array(SYM6)
    turn = lambda a: np.array(
        [[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]]
    )
    scale = lambda a, b: np.diag([a, b, 1.0])
    v = {name: float(getattr(made, name)) for name in NUMBERS}
    s, f = 2 ** (0.2 * v["scale"]), 2 ** (0.2 * v["stretch"])
    shift = np.eye(3)
    shift[:2, 2] = -v["shift_x"] * 0.125 * width, -v["shift_y"] * 0.125 * height
    inverse = scale(1 / s, 1 / s) @ turn(v["turn"])
    inverse = inverse @ turn(-v["axis"]) @ scale(1 / f, f) @ turn(v["axis"]) @ shift
    rows, columns = np.mgrid[-6 : 2 * height + 6, -6 : 2 * width + 6] / 2
    cx, cy = (width - 1) / 2, (height - 1) / 2
    points = np.stack([columns - cx, rows - cy, np.ones_like(rows)]).reshape(3, -1)
    x, y, _ = inverse @ points
    out = np.empty(image.shape)
    for c in range(image.shape[2]):
        wide = np.pad(image[..., c].astype(np.float64), pad, mode="reflect")
        fine = np.zeros([2 * n for n in wide.shape])
        fine[::2, ::2] = wide
        for axis in (0, 1):
            fine = np.apply_along_axis(np.convolve, axis, fine, tap)
        # Tap 5 sits on a pixel, so index 2 (pad + i) + 5 does.
        at = [2 * (y + cy + pad) + 5, 2 * (x + cx + pad) + 5]
        read = map_coordinates(fine, at, order=1).reshape(rows.shape)
        for axis in (0, 1):
            read = np.apply_along_axis(np.correlate, axis, read, tap)
        out[..., c] = read[1::2, 1::2][:height, :width]
    return out


def test_the_wavelet_is_orthonormal_with_six_vanishing_moments():
    tap = np.array(SYM6)
    shifted = [tap[2 * k :] @ tap[: 12 - 2 * k] for k in range(6)]
    np.testing.assert_allclose(shifted, [1, 0, 0, 0, 0, 0], atol=1e-11)
    np.testing.assert_allclose(tap.sum(), np.sqrt(2), atol=1e-11)
    high = tap * (-1) ** np.arange(12)
    moments = [high @ ((np.arange(12) - 5.5) / 5.5) ** k for k in range(7)]
    np.testing.assert_allclose(moments[:6], 0, atol=1e-10)
    assert abs(moments[6]) > 1e-3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "numbers",
    [
        dict(scale=1.3),
        dict(turn=0.7),
        dict(stretch=-1.7, axis=0.9),
        dict(shift_x=0.37, shift_y=-1.21),
        dict(scale=-2.5, turn=-2.6, stretch=1.1, axis=-0.4, shift_x=1.9, shift_y=0.8),
    ],
)
def test_the_warp_is_that_of_the_padded_steps(shape, numbers):
    image, made = picture(shape), known(**numbers)
    np.testing.assert_allclose(apply(image, made), padded_warp(image, made), atol=2e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_wavelet_alone_gives_the_image_back(shape):
    image = picture(shape)
    found = jax.jit(augmentation._warped)(image, known())
    np.testing.assert_allclose(found, image, atol=1e-6)


@pytest.mark.parametrize("size", [32, 8])
def test_a_whole_translation_is_a_roll_away_from_the_edge(size):
    image = picture((size, size, 1))
    found = apply(image, known(shift_x=3 / (0.125 * size), shift_y=-2 / (0.125 * size)))
    want = np.roll(image, (-2, 3), (0, 1))
    np.testing.assert_allclose(found[:-2, 3:], want[:-2, 3:], atol=1e-5)
    # Beyond the edge the image is reflected about its outermost pixels.
    np.testing.assert_allclose(found[:-2, :3], image[2:, 3:0:-1], atol=1e-5)


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_quarter_turn_is_rot90(quarters):
    """Up to a tenth of a pixel: the wavelet is a little off its centre."""
    image = smooth(32)
    found = apply(image, known(turn=quarters * np.pi / 2))[4:-4, 4:-4]
    np.testing.assert_allclose(found, np.rot90(image, quarters)[4:-4, 4:-4], atol=0.02)
    assert np.abs(found - np.rot90(image, -1 if quarters == 1 else 0)[4:-4, 4:-4]).max() > 0.3


def test_a_scale_magnifies_and_a_stretch_keeps_the_area():
    """By where a linear ramp is read; wavelets with six moments keep ramps."""
    y, x = np.mgrid[:32, :32] - 15.5
    ramp = (np.stack([x, y], -1) / 32).astype(np.float32)
    inner = np.s_[12:20, 12:20]
    found = apply(ramp, known(scale=5.0))
    np.testing.assert_allclose(found[inner], ramp[inner] / 2, atol=2e-3)
    found = apply(ramp, known(stretch=5.0))
    np.testing.assert_allclose(found[inner], ramp[inner] * [0.5, 2], atol=2e-3)
    found = apply(ramp, known(stretch=5.0, axis=np.pi / 2))
    np.testing.assert_allclose(found[inner], ramp[inner] * [2, 0.5], atol=2e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_flips_move_pixels_and_nothing_else(shape):
    image = picture(shape)
    np.testing.assert_array_equal(apply(image, known()), image)
    np.testing.assert_array_equal(apply(image, known(x_flip=True)), image[:, ::-1])
    np.testing.assert_array_equal(apply(image, known(y_flip=True)), image[::-1])
    both = apply(image, known(x_flip=True, y_flip=True))
    np.testing.assert_array_equal(both, image[::-1, ::-1])


def test_flips_come_before_the_warp():
    image, numbers = picture((8, 8, 1)), dict(turn=0.4, shift_x=0.6)
    found = apply(image, known(x_flip=True, **numbers))
    np.testing.assert_array_equal(found, apply(image[:, ::-1], known(**numbers)))


def test_the_condition_is_the_nine_numbers_in_order():
    made = known(
        True, True, scale=-0.3, turn=2.0, stretch=1.5, axis=-0.7, shift_x=0.2, shift_y=3
    )
    want = [1, 1, -0.3, np.cos(2) - 1, np.sin(2), 1.5 * np.cos(0.7), -1.5 * np.sin(0.7), 0.2, 3]
    found = condition(made)
    np.testing.assert_allclose(found, want, rtol=1e-5)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(condition(known()), np.zeros(9))
    np.testing.assert_array_equal(condition(known(x_flip=True)), [1] + 8 * [0])
    np.testing.assert_array_equal(condition(known(y_flip=True)), [0, 1] + 7 * [0])
    # A turned frame without a stretch is nothing.
    np.testing.assert_array_equal(condition(known(axis=1.0)), np.zeros(9))


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_a_batch_is_its_drawn_transforms(shape):
    images, key = picture((24, *shape)), jax.random.key(3)
    found, numbers = jax.jit(lambda k, x: augment(k, x, 0.3))(key, images)
    chex.assert_shape(numbers, (24, 9))
    assert found.dtype == images.dtype
    assert numbers.dtype == jnp.float32
    draw = jax.jit(lambda i: drawn(jax.random.fold_in(key, i), 0.3))
    seen = {"warped": 0, "moved": 0}
    for i, image in enumerate(images):
        made = draw(i)
        np.testing.assert_allclose(numbers[i], condition(made), atol=1e-6)
        warped = bool(np.any(numbers[i, 2:] != 0))
        seen["warped" if warped else "moved"] += 1
        if warped:
            np.testing.assert_allclose(found[i], apply(image, made), atol=1e-4)
        else:
            np.testing.assert_array_equal(found[i], apply(image, made))
            flips = np.array(numbers[i, :2], bool)
            kept = np.flip(image, np.flatnonzero(flips[::-1]))
            np.testing.assert_array_equal(found[i], kept)
    assert min(seen.values()) >= 3


def test_one_trace_for_every_key_and_rows_that_do_not_know_their_batch():
    chex.clear_trace_counter()
    images = picture((6, 8, 8, 1))
    run = jax.jit(chex.assert_max_traces(lambda k, x: augment(k, x, 0.5), n=1))
    first, other = run(jax.random.key(0), images), run(jax.random.key(1), images)
    assert not np.array_equal(first[1], other[1])
    chex.assert_trees_all_equal(run(jax.random.key(0), images), first)
    part = jax.jit(lambda k, x: augment(k, x, 0.5))(jax.random.key(0), images[:3])
    chex.assert_trees_all_close(part, tuple(x[:3] for x in first), atol=1e-5)


def test_sharded_over_eight_devices_is_one_device():
    images, key = picture((16, 8, 8, 1)), jax.random.key(4)
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    split = jax.NamedSharding(mesh, jax.P("data"))
    run = jax.jit(lambda k, x: augment(k, x, 0.5))
    want, found = run(key, images), run(key, jax.device_put(images, split))
    chex.assert_trees_all_close(found, want, atol=1e-5)


def test_without_probability_nothing_happens():
    images = jnp.asarray(picture((5, 8, 8, 1)))
    found, numbers = augment(jax.random.key(0), images, 0.0)
    np.testing.assert_array_equal(found, images)
    np.testing.assert_array_equal(numbers, np.zeros((5, 9)))


def test_half_precision_stays_what_it_is():
    images = jnp.asarray(picture((4, 8, 8, 1)), jnp.bfloat16)
    found, numbers = jax.jit(lambda k, x: augment(k, x, 1.0))(jax.random.key(0), images)
    assert found.dtype == jnp.bfloat16
    assert numbers.dtype == jnp.float32
    want, _ = jax.jit(lambda k, x: augment(k, x, 1.0))(
        jax.random.key(0), images.astype(jnp.float32)
    )
    np.testing.assert_allclose(found.astype(jnp.float32), want, atol=0.02)


@pytest.mark.parametrize("p", [0.12, 0.5, 1.0])
def test_switches_are_on_as_often_as_asked(p):
    n = 20_000
    draw = jax.jit(jax.vmap(lambda i: drawn(jax.random.fold_in(jax.random.key(7), i), p)))
    made = jax.tree.map(np.asarray, draw(jnp.arange(n)))
    # y-flip is a coin after its switch; x-flip a coin alone; FRAMES half of the axes.
    shares = dict(
        x_flip=0.5, y_flip=p / 2, scale=p, turn=p, stretch=p, axis=0.5, shift_x=p, shift_y=p
    )
    for name, share in shares.items():
        error = np.sqrt(share * (1 - share) / n)
        found = np.mean(getattr(made, name) != 0)
        assert abs(found - share) <= 4 * error, name
    np.testing.assert_array_equal(made.shift_x != 0, made.shift_y != 0)
    on = np.stack([getattr(made, f) != 0 for f in ("scale", "turn", "stretch", "shift_x")])
    assert abs(on.sum(0).mean() - 4 * p) <= 4 * np.sqrt(4 * p * (1 - p) / n) + 1e-12
    for name in ("scale", "stretch", "shift_x", "shift_y"):
        values = getattr(made, name)[getattr(made, name) != 0]
        assert abs(values.mean()) < 4 / np.sqrt(len(values)), name
        assert abs(values.var() - 1) < 4 * np.sqrt(2 / len(values)), name
    for name in ("turn", "axis"):
        values = getattr(made, name)[getattr(made, name) != 0]
        assert np.abs(values).max() <= np.pi + 1e-6
        assert abs((values**2).mean() - np.pi**2 / 3) < 4 * 2.94 / np.sqrt(len(values)), name


@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
def test_what_is_no_probability_is_named(p):
    with pytest.raises(UserError, match=r"config\.augment is .* a probability"):
        augment(jax.random.key(0), jnp.zeros((2, 8, 8, 1)), p)


def test_an_image_of_one_row_is_named():
    with pytest.raises(UserError, match=r"config\.data\.resolution is 1"):
        augment(jax.random.key(0), jnp.zeros((2, 1, 8, 1)), 0.1)
