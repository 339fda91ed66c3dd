"""Samples as `config.sampler` says: grid, method, guidance, classes."""

import inspect
from collections.abc import Callable
from functools import lru_cache

import jax
import numpy as np

from common import mesh as meshes
from common.errors import reject
from diffusion import grids, samplers, sampling
from diffusion.dpm_solver import interpolated
from diffusion.guidance import classifier_free
from diffusion.images import Images
from diffusion.parts import Parts
from diffusion.processes import Process, ratio

GRIDS = ("edm", "log_uniform", "times", "flow")


def grid(config, process: Process) -> np.ndarray:
    """Noise levels of a sampler, float64, the last 0.

    Args:
      config: config.sampler. Its grid: "edm", Karras's with `rho`; "log_uniform"; "times",
        equal steps of the process's time, interpolated in log alpha where it is discrete;
        "flow", equal steps of t = s / (1 + s) with a time shift. All have n + 1 levels.
      process: of the model.

    Raises:
      UserError: an unknown grid, or one that cannot be.
    """
    c = config
    if c.grid not in GRIDS:
        raise reject("sampler.grid", c.grid, f"one of {', '.join(GRIDS)}")
    made = {
        "edm": lambda: grids.edm(c.n, c.sigma_min, c.sigma_max, c.rho),
        "log_uniform": lambda: grids.log_uniform(c.n, c.sigma_min, c.sigma_max),
        "times": lambda: _times(process, c.n),
        "flow": lambda: grids.flow(c.n, c.shift),
    }
    return made[c.grid]()


def _times(process: Process, n: int) -> np.ndarray:
    of = lambda t: np.asarray(ratio(process, jax.numpy.asarray(t, "float32")), np.float64)
    if process.steps:
        if n < 2:
            raise reject("sampler.n", n, "a whole number from 2 up")
        # The reference stops at the lowest level and leaves its noise in the samples.
        return np.append(interpolated(of(np.arange(process.steps)), n - 1), 0.0)
    return grids.uniform(of, n, process.first, process.last)


def options(config) -> dict:
    """What a method takes of `config.sampler`.

    Raises:
      UserError: an option is set that the method does not have.
    """
    of = lambda method: inspect.signature(samplers.METHODS[method]).parameters
    if config.method not in samplers.METHODS:
        known = ", ".join(samplers.METHODS)
        raise reject("sampler.method", config.method, f"one of {known}")
    mine = {name for name in of(config.method) if name in config}
    for method in samplers.METHODS:
        for name, parameter in of(method).items():
            if name in config and name not in mine and config[name] != parameter.default:
                allowed = f"{parameter.default!r} with method {config.method!r}"
                raise reject(f"sampler.{name}", config[name], allowed)
    return {name: config[name] for name in mine}


def samples(
    config, data: Images, parts: Parts, params, key: jax.Array, count: int
) -> np.ndarray:
    """Generated images [count, H, W, C], float32.

    Where the model is told classes, they come as often as in the data, or all of
    `config.sampler.label`.
    """
    s = config.sampler
    condition = None
    if config.data.class_cond:
        condition = {"label": classes(data.labels, count, s.label)}
    return sampling.generate(
        jax.tree_util.Partial(_guided(config, parts), params),
        np.arange(count),
        key,
        shape=parts.shape,
        sigmas=grid(s, parts.process),
        batch_size=s.batch_size,
        condition=condition,
        method=s.method,
        start=s.start,
        **options(s),
    )


def classes(labels: np.ndarray, count: int, label: int) -> np.ndarray:
    """int32 [count]: `label` throughout, or where it is -1 evenly from the sorted labels, so
    that their shares are those of the data, then in an order without meaning."""
    if label >= 0:
        return np.full(count, label, np.int32)
    even = (np.arange(count) + 0.5) * len(labels) / count
    chosen = np.sort(labels)[even.astype(int)]
    return np.random.default_rng(0).permutation(chosen).astype(np.int32)


def _guided(config, parts: Parts) -> Callable:
    s = config.sampler
    if s.guidance == 1:
        return parts.of_condition
    interval = (s.guide_low, s.guide_high) if s.guide_high else None
    return _led(parts.of_condition, s.guidance, interval, s.rescale)


@lru_cache(maxsize=4)
def _led(
    of_condition: Callable, weight: float, interval: tuple[float, float] | None, rescale: float
) -> Callable:
    """The same function for the same arguments: the sampler is compiled for a function."""

    def of(params, condition):
        plain = lambda some: of_condition(params, some)
        return classifier_free(plain, condition, weight, interval, rescale)

    return of


def check(config, data: Images, parts: Parts) -> None:
    """Refuses settings of `config.sampler` that cannot be, before anything is trained."""
    s = config.sampler
    devices = meshes.make(**config.mesh).shape["data"]
    if s.batch_size < 1 or s.batch_size % devices:
        allowed = f"a multiple of the {devices} devices of mesh.data"
        raise reject("sampler.batch_size", s.batch_size, allowed)
    if s.count < 1:
        raise reject("sampler.count", s.count, "a whole number from 1 up")
    samplers.planned(grid(s, parts.process), s.method, start=s.start, **options(s))
    if not 0 <= s.guidance < np.inf:
        raise reject("sampler.guidance", s.guidance, "a finite number from 0 up, 1 for none")
    if s.guidance == 1:
        for name in ("guide_low", "guide_high", "rescale"):
            if s[name] != 0:
                raise reject(f"sampler.{name}", s[name], "0.0 with sampler.guidance 1")
    if not 0 <= s.rescale <= 1:
        raise reject("sampler.rescale", s.rescale, "a share from 0 to 1")
    if s.guide_high and not 0 <= s.guide_low < s.guide_high:
        raise reject("sampler.guide_low", s.guide_low, f"from 0 to below {s.guide_high}")
    if not s.guide_high and s.guide_low:
        raise reject("sampler.guide_high", s.guide_high, f"above guide_low, {s.guide_low}")
    if s.guidance != 1 and not (config.data.class_cond and config.label_drop):
        allowed = "1, or data.class_cond True and label_drop above 0 in training"
        raise reject("sampler.guidance", s.guidance, allowed)
    if not s.label >= -1 or (s.label >= 0 and not config.data.class_cond):
        raise reject("sampler.label", s.label, "-1, or a class where data.class_cond is True")
    if config.data.class_cond and s.label > data.labels.max():
        raise reject("sampler.label", s.label, f"-1 or a class up to {data.labels.max()}")
