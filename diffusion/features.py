"""Feature networks: what they share, and a small classifier trained on the data itself.

Distances between sets of images are taken between their features (`diffusion.quality`).
Two published networks take a user's weights (`diffusion.inception`, `diffusion.dinov2`).
Without any, `local_features` trains a classifier in seconds. What is computed from it is
"local": only runs on one data set with one key may be compared, and it is never FID.
"""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Shaped

from common import data
from common.errors import reject
from diffusion.images import scaled

Params = Any
SMALLEST = 4  # Pixels, where the classifier stops halving.


class Features(NamedTuple):
    """A feature network as pure functions.

    Attributes:
      name: local, inception or dinov2, for titles and file names.
      dim: of the features.
      params: of the network, a pytree.
      apply: (params, images [B, H, W, C] in [-1, 1], float32) -> features [B, dim] float32.
      logits: (params, features [B, dim]) -> class logits [B, K], or None without a head.
    """

    name: str
    dim: int
    params: Params
    apply: Callable[[Params, Array], Array]
    logits: Callable[[Params, Array], Array] | None = None


class Classifier(nn.Module):
    """Convolutions that halve the sides down to four pixels, their mean, two dense layers.

    x [B, H, W, C] -> features [B, dim]; with `head` the logits [B, classes].
    """

    classes: int
    width: int
    dim: int
    halvings: int

    def setup(self):
        exact = dict(precision="highest")
        widths = [self.width * 2 ** min(i, 2) for i in range(self.halvings + 1)]
        self.convs = [
            nn.Conv(w, (3, 3), strides=1 if i == 0 else 2, **exact)
            for i, w in enumerate(widths)
        ]
        self.hidden = nn.Dense(self.dim, **exact)
        self.out = nn.Dense(self.classes, **exact)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b k"]:
        return self.out(self.features(x))

    def features(self, x: Float[Array, "b h w c"]) -> Float[Array, "b dim"]:
        for conv in self.convs:
            x = nn.gelu(conv(x))
        return nn.gelu(self.hidden(x.mean((1, 2))))

    def head(self, features: Float[Array, "b dim"]) -> Float[Array, "b k"]:
        return self.out(features)


def local_features(
    images: Shaped[np.ndarray, "n h w c"],
    labels: Int[np.ndarray, " n"],
    key: jax.Array,
    *,
    steps: int = 300,
    batch_size: int = 128,
    width: int = 16,
    dim: int = 64,
    peak: float = 1e-2,
    held_out: float = 0.2,
) -> tuple[Features, float]:
    """A classifier trained on labelled images; its features are its penultimate layer.

    Adam with a cosine from `peak` to 0. One device gives the same bits for the same key.

    Args:
      images: uint8 or float32 in [-1, 1].
      labels: from 0 up, two classes at least.
      key: typed; of the split, the start and the order.
      steps, batch_size: of the training.
      width: channels of the first convolution; the last ones have four times as many.
      dim: of the features.
      peak: the first learning rate.
      held_out: share of the rows that are not trained on.

    Returns:
      The features, named "local", and the accuracy on the held-out rows.

    Raises:
      UserError: fewer than two classes or rows, or a setting is out of range.
    """
    classes = int(labels.max(initial=-1)) + 1
    if classes < 2 or labels.min() < 0:
        raise reject(
            "eval.features", "local", "inception or dinov2 without labels of two classes"
        )
    for name, value in dict(steps=steps, batch_size=batch_size, width=width, dim=dim).items():
        if value < 1:
            raise reject(f"eval.local.{name}", value, "a whole number from 1 up")
    if not 0 < held_out < 1 or not 0 < round(held_out * len(images)) < len(images):
        raise reject("eval.local.held_out", held_out, "a share that leaves rows on both sides")
    split, start, order = jax.random.split(key, 3)
    rows = np.asarray(jax.random.permutation(split, len(images)))
    tested, trained = np.split(rows, [round(held_out * len(images))])
    side = max(images.shape[1:3])
    halvings = max(2, math.ceil(math.log2(max(side, 1) / SMALLEST)))
    network = Classifier(classes, width, dim, halvings)
    params = jax.jit(network.init)(start, jnp.asarray(scaled(images[:1])))
    tx = optax.adam(optax.cosine_decay_schedule(peak, steps))

    def loss(params, x, y):
        xent = optax.softmax_cross_entropy_with_integer_labels
        return xent(network.apply(params, scaled(x)), y).mean()

    @jax.jit
    def step(params, opt, x, y):
        updates, opt = tx.update(jax.grad(loss)(params, x, y), opt)
        return optax.apply_updates(params, updates), opt

    opt = tx.init(params)
    seed = int(jax.random.randint(order, (), 0, np.iinfo(np.int32).max))
    for at in range(steps):
        chosen = trained[data.indices(at, len(trained), batch_size, seed)]
        params, opt = step(params, opt, images[chosen], labels[chosen])
    features = Features(
        "local",
        dim,
        params,
        lambda params, x: network.apply(params, x, method=Classifier.features),
        lambda params, f: network.apply(params, f, method=Classifier.head),
    )
    logits = features.logits(params, jnp.asarray(extract(features, images[tested])))
    return features, float(np.mean(np.argmax(logits, axis=1) == labels[tested]))


@lru_cache(maxsize=8)
def _compiled(apply: Callable) -> Callable:
    """One program for all calls with the same network."""
    return jax.jit(lambda params, x: apply(params, scaled(x)))


def extract(
    features: Features,
    images: Shaped[np.ndarray, "n h w c"],
    *,
    batch_size: int = 256,
    mesh: Mesh | None = None,
) -> Float[np.ndarray, "n dim"]:
    """The features of all images, float32 on the host.

    Args:
      features: the network.
      images: uint8 or float32 in [-1, 1]. Generated ones should be rounded to pixels first
        (`images.to_uint8`), as the real ones were.
      batch_size: images at a time; with a mesh a multiple of its "data" axis.
      mesh: of this process's devices, batches are split along "data"; None: one device.
    """
    parts = extract_batches(features, images, batch_size=batch_size, mesh=mesh)
    return np.concatenate([*parts, np.zeros((0, features.dim), np.float32)])


def extract_batches(
    features: Features,
    images: Shaped[np.ndarray, "n h w c"],
    *,
    batch_size: int = 256,
    mesh: Mesh | None = None,
) -> Iterator[np.ndarray]:
    """`extract` part by part, for statistics of more features than memory holds.

    Raises:
      UserError: the mesh does not divide `batch_size`.
    """
    devices = 1 if mesh is None else mesh.shape["data"]
    if batch_size < 1 or batch_size % devices:
        raise reject("eval.batch_size", batch_size, f"a multiple of the {devices} devices")
    place = lambda tree, spec: (
        tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, spec))
    )
    params = place(features.params, P())
    apply = _compiled(features.apply)
    for start in range(0, len(images), batch_size):
        batch = np.asarray(images[start : start + batch_size])
        found = len(batch)
        if start and found < batch_size:  # Shapes stay, so nothing compiles twice.
            batch = np.concatenate([batch, np.repeat(batch[-1:], batch_size - found, 0)])
        elif found % devices:
            batch = np.concatenate([batch, np.repeat(batch[-1:], -found % devices, 0)])
        yield np.asarray(apply(params, place(batch, P("data"))))[:found]
