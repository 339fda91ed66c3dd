"""The augmentation of EDM, which the network is told of so that it does not leak into samples.

Each image is flipped, scaled, turned, stretched and shifted, each with probability p, and nine
numbers say what was done; at sampling they are zeros, "nothing" (Karras et al. 2022,
appendix F.2; the transformations of Karras et al. 2020, arXiv:2006.06676). The switches:

    x-flip           always on (where p > 0)   a coin                          condition 0
    y-flip           p                         a coin                          1
    scale            p                         2^(0.2 N)                       2
    rotation         p                         uniform on the circle           3, 4
    anisotropic      p                         2^(0.2 N), and 1 over it, in
                                               a frame turned half the time    5, 6
    translation      p                         0.125 N of the width, height    7, 8

Flips move pixels. The other four are one inverse affine map, on the image continued by
reflection for ever: upsampled by two with the wavelet sym6, read bilinearly and downsampled by
the same wavelet. Those two passes alone give the image back; as the filter is not symmetric, a
half turn lies a tenth of a pixel off, in EDM as here. As reflection makes the image periodic,
upsampling is a matrix of one period for each axis, and nothing is padded.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from common.errors import reject

WIDTH = 9  # Numbers of a condition.
SCALE, ANISO = 0.2, 0.2  # Standard deviations, log2 of a factor.
FRAMES = 0.5  # Of the stretched, the share in a turned frame.
SHIFT = 0.125  # Standard deviation, of the width and of the height.

# Lowpass filter of Daubechies' least asymmetric wavelet with six vanishing moments, of norm 1.
SYM6 = (
    0.0154041093270,
    0.0034907120842,
    -0.1179901111485,
    -0.0483117425857,
    0.4910559419280,
    0.7876411410287,
    0.3379294217282,
    -0.0726375227864,
    -0.0210602925124,
    0.0447249017708,
    0.0017677118643,
    -0.0078007083250,
)
CENTRE = 5  # The tap that sits on a pixel.
HALO = 3  # Pixels around the image that the downsampling reads.


class Transform(NamedTuple):
    """What is done to one image, in this order; zeros: nothing. All [], float32 or bool.

    Attributes:
      x_flip, y_flip: mirror columns, mirror rows.
      scale: log2 of the magnification, in units of `SCALE`.
      turn: counterclockwise as np.rot90, radians.
      stretch: log2 of a factor along an axis and of 1 / factor across it, in units of `ANISO`.
      axis: of that axis, counterclockwise from the right, radians.
      shift_x, shift_y: to the right and down, in units of `SHIFT` widths and heights.
    """

    x_flip: Bool[Array, ""]
    y_flip: Bool[Array, ""]
    scale: Float[Array, ""]
    turn: Float[Array, ""]
    stretch: Float[Array, ""]
    axis: Float[Array, ""]
    shift_x: Float[Array, ""]
    shift_y: Float[Array, ""]


def augment(
    key: Key[Array, ""], images: Float[Array, "b h w c"], p: float
) -> tuple[Float[Array, "b h w c"], Float[Array, "b 9"]]:
    """Images, and what was done to them.

    What happens to row i depends on the key, on i and on the image; not on the batch.

    Args:
      key: of this batch.
      images: in [-1, 1]; the results may overshoot a little.
      p: probability of each switch, 0.12 for CIFAR-10 in EDM; 0: nothing is done.

    Returns:
      images: in the dtype they came in. One that no switch but the flips touched is those
        very pixels.
      condition: float32, the "augment" of a network's condition.

    Raises:
      UserError: p is no probability, or the images are one pixel wide or high.
    """
    if not 0 <= p <= 1:
        raise reject("augment", p, "a probability from 0 to 1")
    if min(images.shape[1:3]) < 2:
        allowed = "at least 2 where augment is on"
        raise reject("data.resolution", min(images.shape[1:3]), allowed)
    if p == 0:
        return images, jnp.zeros((len(images), WIDTH), jnp.float32)

    def one(i, image):
        made = drawn(jax.random.fold_in(key, i), p)
        return transformed(image, made), condition(made)

    return jax.vmap(one)(jnp.arange(len(images)), images)


def drawn(key: Key[Array, ""], p: float) -> Transform:
    """The transform of one image; p in (0, 1]."""
    keys = iter(jax.random.split(key, 14))
    coin = lambda: jax.random.bernoulli(next(keys))
    on = lambda share=p: jax.random.bernoulli(next(keys), share)
    normal = lambda: jax.random.normal(next(keys))
    angle = lambda: jax.random.uniform(next(keys), minval=-jnp.pi, maxval=jnp.pi)
    shift = on()
    return Transform(
        x_flip=coin(),
        y_flip=coin() & on(),
        scale=jnp.where(on(), normal(), 0),
        turn=jnp.where(on(), angle(), 0),
        stretch=jnp.where(on(), normal(), 0),
        axis=jnp.where(on(FRAMES), angle(), 0),
        shift_x=jnp.where(shift, normal(), 0),
        shift_y=jnp.where(shift, normal(), 0),
    )


def condition(made: Transform) -> Float[Array, "9"]:
    """The numbers that EDM's networks are given, float32, in their order."""
    numbers = (
        made.x_flip,
        made.y_flip,
        made.scale,
        jnp.cos(made.turn) - 1,
        jnp.sin(made.turn),
        made.stretch * jnp.cos(made.axis),
        made.stretch * jnp.sin(made.axis),
        made.shift_x,
        made.shift_y,
    )
    return jnp.stack([jnp.asarray(x, jnp.float32) for x in numbers])


def transformed(image: Float[Array, "h w c"], made: Transform) -> Float[Array, "h w c"]:
    """One image, transformed; in its dtype, warped in float32."""
    image = jnp.where(made.x_flip, image[:, ::-1], image)
    image = jnp.where(made.y_flip, image[::-1], image)
    moved = (made.scale, made.turn, made.stretch, made.shift_x, made.shift_y)
    warped = _warped(image.astype(jnp.float32), made).astype(image.dtype)
    return jnp.where(jnp.any(jnp.stack(moved) != 0), warped, image)


def _map(made, x, y, height, width):
    """Points of the source for points (x, y) of the result, in pixels from the centre.

    The last move is undone first.
    """
    x = x - made.shift_x * SHIFT * width
    y = y - made.shift_y * SHIFT * height
    factor = jnp.exp2(ANISO * made.stretch)
    x, y = _turned(x, y, made.axis)
    x, y = _turned(x / factor, y * factor, -made.axis)
    x, y = _turned(x, y, made.turn)
    scale = jnp.exp2(SCALE * made.scale)
    return x / scale, y / scale


def _turned(x, y, angle):
    c, s = jnp.cos(angle), jnp.sin(angle)
    return c * x - s * y, s * x + c * y


def _warped(image, made):
    height, width, _ = image.shape
    # Rounded inputs, as a TPU's matrix unit takes by default, would blur every image.
    exact = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    fine = exact("ih,jw,hwc->ijc", _up(height), _up(width), image)
    # In pixels of the image; of the result at twice the resolution, with its halo.
    y = 0.5 * jnp.arange(2 * (height + 2 * HALO)) - HALO
    x = 0.5 * jnp.arange(2 * (width + 2 * HALO)) - HALO
    x, y = jnp.meshgrid(x - 0.5 * (width - 1), y - 0.5 * (height - 1))
    x, y = _map(made, x, y, height, width)
    read = _bilinear(fine, 2 * x + width - 1, 2 * y + height - 1)
    return exact("hi,wj,ijc->hwc", _down(height), _down(width), read)


def _bilinear(periodic, x, y):
    """Values at real indices (y, x) of an array that repeats along both."""
    low_x, low_y = jnp.floor(x), jnp.floor(y)
    part_x, part_y = (x - low_x)[..., None], (y - low_y)[..., None]

    def at(dy, dx):
        row = (low_y.astype(jnp.int32) + dy) % periodic.shape[0]
        column = (low_x.astype(jnp.int32) + dx) % periodic.shape[1]
        return periodic[row, column]

    top = (1 - part_x) * at(0, 0) + part_x * at(0, 1)
    bottom = (1 - part_x) * at(1, 0) + part_x * at(1, 1)
    return (1 - part_y) * top + part_y * bottom


def _up(n):
    """[4 (n - 1), n]: n pixels -> one period of their reflection at twice the resolution.

    Value m lies at pixel m / 2.
    """
    period = 2 * (n - 1)
    made = np.zeros((2 * period, n), np.float32)
    for m in range(2 * period):
        for k, tap in enumerate(SYM6):
            pixel, between = divmod(m + CENTRE - k, 2)
            pixel %= period
            if not between:
                made[m, min(pixel, period - pixel)] += tap
    return made


def _down(n):
    """[n, 2 (n + 2 HALO)]: twice the resolution, from `HALO` pixels outside on -> n pixels."""
    made = np.zeros((n, 2 * (n + 2 * HALO)), np.float32)
    for i in range(n):
        first = 2 * (i + HALO) - CENTRE
        made[i, first : first + len(SYM6)] = SYM6
    return made
