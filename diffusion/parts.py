"""Of a config: network, process and schedule, for training, evaluation and actions."""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common import mesh as meshes
from common.errors import reject
from diffusion import cost
from diffusion.dataset import placed
from diffusion.images import Images
from diffusion.networks import KINDS, SIZES, Network, network
from diffusion.preconditioning import Preconditioning, denoiser, preconditioning
from diffusion.processes import Process, process
from diffusion.schedules import Schedule, schedule


class Parts(NamedTuple):
    """Of one config.

    Attributes:
      network, process, wrap, schedule: the model and how it is trained.
      of_condition: (params of the network, condition or None) -> denoiser.
      shape: (H, W, C).
      rows: () -> all rows on the devices.
      flops: () -> FLOPs of training on one image.
    """

    network: Network
    process: Process
    wrap: Preconditioning
    schedule: Schedule
    of_condition: Callable
    shape: tuple[int, int, int]
    rows: Callable
    flops: Callable[[], float]


def parts_of(config, data: Images) -> Parts:
    """The model, process and schedule of a config.

    Raises:
      UserError: the config asks for what cannot be.
    """
    shape = tuple(int(n) for n in data.rows.shape[1:])
    model = config.model
    if model.name not in KINDS and model.name not in SIZES:
        raise reject("model.name", model.name, f"one of {', '.join([*KINDS, *SIZES])}")
    own = model[model.name].to_dict() if model.name in KINDS else {}
    classes = int(data.labels.max()) + 1 if config.data.class_cond else 0
    if model.label_dim and not classes:
        raise reject("model.label_dim", model.label_dim, "0, or data.class_cond True")
    shared = dict(dtype=model.dtype, label_dim=model.label_dim or classes)
    if model.dropout:
        shared["dropout"] = model.dropout
    if config.augment:
        shared["augment_dim"] = 9
    if model.remat:
        shared["remat"] = True
    if classes > shared["label_dim"]:
        raise reject("model.label_dim", model.label_dim, f"0 or at least {classes} classes")
    net = _plain(network(model.name, shape=shape, **shared, **own), shape[-1])
    if config.fsdp and not net.rules(True):
        raise reject("fsdp", True, f"False for {model.name}, which has no rules to split it")
    if not 0 < config.noise_scale < np.inf:
        raise reject("noise_scale", config.noise_scale, "a finite number above 0")
    made = process(**config.process)
    wrap = preconditioning(made, config.target, model.sigma_data, config.noise_scale)
    if model.noise_input not in ("native", "log"):
        raise reject("model.noise_input", model.noise_input, "native or log")
    if model.noise_input == "log":
        wrap = wrap._replace(c_noise=lambda s: jnp.log(s) / 4)
    given = config.schedule.to_dict()
    sched = schedule(wrap=wrap, sigma_data=model.sigma_data, of=made, **given)

    def of_condition(params, condition=None):
        return denoiser(net.apply, params, wrap, condition)

    @lru_cache(maxsize=1)
    def rows():
        mesh = meshes.make(**config.mesh)
        return placed(data, mesh, config.estimator.tile, config.data.class_cond)

    @lru_cache(maxsize=1)
    def work():
        def loss(params, x, s):
            return jnp.sum(of_condition(params)(x, s))

        params = jax.eval_shape(net.init, jax.random.key(0))
        image, level = (jax.ShapeDtypeStruct(n, "float32") for n in ((1, *shape), (1,)))
        return cost.flops(jax.grad(loss), params, image, level)

    return Parts(net, made, wrap, sched, of_condition, shape, rows, work)


def size(params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _plain(net: Network, channels: int) -> Network:
    """Without the variances that DiT learns beside its prediction."""
    apply = lambda *given: net.apply(*given)[..., :channels]
    return net._replace(apply=apply)
