"""Guidance of denoisers, and dropping conditions in training so that it has a partner.

    D_w = D_guide + w (D_main - D_guide)                            Ho and Salimans 2022

The guide is the same network without its condition (classifier-free guidance) or a weaker one
with it (Karras et al. 2024, autoguidance). w = 1 is the main denoiser, w = 0 the guide. In
other conventions the scale is w - 1.

A condition is a dict of arrays with one row for each sample: "label" int32 [B], "vector"
[B, V], "channels" [B, H, W, K], "augment" [B, A]. An absent label is -1; what else is absent
is 0. "augment" tells of the picture, not of its content, and is never dropped.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from common.errors import reject
from diffusion.tables import Denoiser

Condition = dict[str, Any] | None
Weight = float | int | Float[Array, ""] | Float[Array, " b"]
KEPT = ("augment",)


def guided(
    main: Denoiser,
    guide: Denoiser,
    weight: Weight,
    interval: tuple[float, float] | None = None,
    rescale: float = 0.0,
) -> Denoiser:
    """The main denoiser, led away from the guide.

    Args:
      main, guide: (x [B, *shape], sigma [B]) -> [B, *shape].
      weight: w, one number or one for each sample; at least 0.
      interval: levels (s_lo, s_hi), ends included, beyond which D_w = D_main
        (Kynkaanniemi et al. 2024). Where all samples are beyond it, the guide is not run.
      rescale: phi from 0 to 1: D_w (1 - phi + phi std(D_main) / std(D_w)), standard
        deviations within each sample (Lin et al., arXiv:2305.08891, Eq. 15 and 16, on x_0).

    Raises:
      UserError: an argument is out of range.
    """
    _check(weight, interval, rescale)

    def denoiser(x: Float[Array, " b *shape"], sigma) -> Float[Array, " b *shape"]:
        sigma = jnp.broadcast_to(jnp.asarray(sigma, x.dtype), len(x))
        plain = main(x, sigma)
        if interval is None:
            return _mixed(plain, guide(x, sigma), weight, rescale)
        inside = _inside(sigma, interval)
        lead = lambda: _mixed(plain, guide(x, sigma).astype(plain.dtype), weight, rescale)
        led = jax.lax.cond(inside.any(), lead, lambda: plain)
        return jnp.where(_column(inside, x), led, plain)

    return denoiser


def classifier_free(
    of_condition: Callable[[Condition], Denoiser],
    condition: dict[str, Any],
    weight: Weight,
    interval: tuple[float, float] | None = None,
    rescale: float = 0.0,
    *,
    stacked: bool = True,
) -> Denoiser:
    """`guided` by the same denoiser without the condition.

    Args:
      of_condition: condition -> denoiser.
      condition: arrays of the B samples.
      weight, interval, rescale: as of `guided`.
      stacked: both in one call on 2 B samples, always; else in two calls, the second only
        where it counts.

    Raises:
      UserError: an argument is out of range.
    """
    none = absent(condition)
    if not stacked:
        main, guide = of_condition(condition), of_condition(none)
        return guided(main, guide, weight, interval, rescale)
    _check(weight, interval, rescale)
    # Side by side, so that both of a sample stay on the device that has it.
    twice = lambda a, b: jnp.stack([a, b], 1).reshape(-1, *a.shape[1:])
    both = of_condition(jax.tree.map(twice, condition, none))

    def denoiser(x: Float[Array, " b *shape"], sigma) -> Float[Array, " b *shape"]:
        sigma = jnp.broadcast_to(jnp.asarray(sigma, x.dtype), len(x))
        out = both(twice(x, x), twice(sigma, sigma)).reshape(-1, 2, *x.shape[1:])
        plain, free = out[:, 0], out[:, 1]
        led = _mixed(plain, free, weight, rescale)
        if interval is None:
            return led
        return jnp.where(_column(_inside(sigma, interval), x), led, plain)

    return denoiser


def absent(condition: dict[str, Any]) -> dict[str, Any]:
    """The same condition with nothing in it: label -1, vector and channels 0."""
    return {
        name: value if name in KEPT else jnp.full_like(value, _nothing(name))
        for name, value in condition.items()
    }


def drop(
    key: Key[Array, ""],
    condition: dict[str, Any],
    rate: float | dict[str, float] = 0.1,
    together: float = 0.0,
    batch: float = 0.0,
) -> dict[str, Any]:
    """The condition with parts of it made absent at random, for training.

    Args:
      key: of the draws.
      condition: arrays of B samples.
      rate: the probability that one condition of one sample is dropped, by itself; by name
        where they differ (0 for names left out).
      together: that all of one sample are dropped.
      batch: that all of all samples are dropped at once.

    Returns:
      the same names, shapes and dtypes.

    Raises:
      UserError: a probability is not from 0 to 1.
    """
    names = sorted(set(condition) - set(KEPT))
    rates = rate if isinstance(rate, dict) else dict.fromkeys(names, rate)
    fields = {f"rate.{name}": value for name, value in rates.items()}
    for field, value in dict(fields, together=together, batch=batch).items():
        if not 0 <= value <= 1:
            raise reject(f"train.drop.{field}", value, "a probability from 0 to 1")
    unknown = sorted(set(rates) - set(names))
    if unknown and isinstance(rate, dict):
        allowed = f"of conditions that are there: {', '.join(names)}"
        raise reject(f"train.drop.rate.{unknown[0]}", rates[unknown[0]], allowed)
    whole, sample, *each = jax.random.split(key, 2 + len(names))
    everything = jax.random.bernoulli(whole, batch)
    none, dropped = absent(condition), dict(condition)
    for name, one in zip(names, each, strict=True):
        value = condition[name]
        size = value.shape[:1]
        # The same draw for every name: `sample` is cloned, not used twice.
        all_of_it = jax.random.bernoulli(jax.random.clone(sample), together, size)
        gone = jax.random.bernoulli(one, rates.get(name, 0.0), size) | all_of_it | everything
        dropped[name] = jnp.where(_column(gone, value), none[name], value)
    return dropped


def _nothing(name):
    return -1 if name == "label" else 0


def _check(weight, interval, rescale):
    if isinstance(weight, float | int) and not 0 <= weight < float("inf"):
        raise reject("sampler.guidance", weight, "a finite number from 0 up")
    if interval is not None and not 0 <= interval[0] <= interval[1]:
        raise reject("sampler.interval", interval, "two levels, 0 <= s_lo <= s_hi")
    if not 0 <= rescale <= 1:
        raise reject("sampler.rescale", rescale, "from 0 to 1")


def _mixed(plain, free, weight, rescale):
    led = free + _column(jnp.asarray(weight, plain.dtype), plain) * (plain - free)
    if not rescale:
        return led
    axes = tuple(range(1, plain.ndim))
    std = lambda value: jnp.std(value, axis=axes, keepdims=True)
    # A sample without any spread has nothing to be rescaled.
    spread = std(led)
    ratio = jnp.where(spread > 0, std(plain) / jnp.where(spread > 0, spread, 1), 1)
    return led * (1 - rescale + rescale * ratio)


def _inside(sigma, interval):
    return (interval[0] <= sigma) & (sigma <= interval[1])


def _column(values, like):
    """One value for each sample (or for all), to be broadcast against `like`."""
    return values.reshape(values.shape + (1,) * (like.ndim - 1)) if values.ndim else values
