"""Optimizers of denoisers: Adam and AdamW with the learning rates of their papers."""

from collections.abc import Callable

import jax.numpy as jnp
import optax

from common.errors import reject

PATIENCE = 20  # Steps in a row whose gradients are not finite.
FOREVER = 2**31 - 2


def denoising(
    name: str,
    *,
    steps: int,
    learning_rate: float,
    rate: str,
    warmup: int,
    decay_from: int,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    clip: float,
) -> optax.GradientTransformation:
    """The chain of a config. A step with a gradient that is not finite moves nothing.

    Args:
      name: "adam" or "adamw".
      steps: of the whole run.
      learning_rate: the peak.
      rate: what `schedule` takes.
      warmup, decay_from: steps.
      b1, b2, eps: of Adam.
      weight_decay: of adamw, times the learning rate.
      clip: largest global norm of the gradient; 0: none.

    Raises:
      UserError: a field is out of range.
    """
    if name not in ("adam", "adamw"):
        raise reject("optim.name", name, "adam or adamw")
    for field, value in (("learning_rate", learning_rate), ("eps", eps)):
        if not 0 < value < float("inf"):
            raise reject(f"optim.{field}", value, "a finite number above 0")
    for field, value in (("b1", b1), ("b2", b2)):
        if not 0 <= value < 1:
            raise reject(f"optim.{field}", value, "at least 0 and below 1")
    for field, value in (("clip", clip), ("weight_decay", weight_decay)):
        if not 0 <= value < float("inf"):
            raise reject(f"optim.{field}", value, "a finite number from 0 up")
    if name == "adam" and weight_decay:
        raise reject("optim.weight_decay", weight_decay, "0 for adam; adamw decays")
    decay = optax.add_decayed_weights(weight_decay) if weight_decay else optax.identity()
    inner = optax.chain(
        optax.clip_by_global_norm(clip) if clip else optax.identity(),
        optax.scale_by_adam(b1, b2, eps),
        decay,
        optax.scale_by_learning_rate(schedule(rate, learning_rate, steps, warmup, decay_from)),
    )
    # Never applied, however many there are: whoever trains counts to PATIENCE and stops.
    return optax.apply_if_finite(inner, FOREVER)


def schedule(rate: str, peak: float, steps: int, warmup: int, decay_from: int) -> Callable:
    """step -> learning rate.

    Args:
      rate: "constant"; "cosine", to 0 when `steps` are done; "inverse_sqrt", falling as
        1 / sqrt(step) from `decay_from` on (Karras et al. 2024).
      peak: reached after `warmup` steps of a straight line.

    Raises:
      UserError: an unknown shape, or steps that are out of order.
    """
    if warmup < 0 or warmup > steps:
        raise reject("optim.warmup", warmup, f"from 0 to the {steps} steps of the run")
    if rate == "inverse_sqrt" and decay_from < 1:
        raise reject("optim.decay_from", decay_from, "a whole number of steps from 1 up")
    made = {
        "constant": lambda t: peak * jnp.ones_like(t),
        "cosine": lambda t: (
            0.5 * peak * (1 + jnp.cos(jnp.pi * jnp.clip((t - warmup) / span, 0, 1)))
        ),
        "inverse_sqrt": lambda t: peak / jnp.sqrt(jnp.maximum(t / decay_from, 1)),
    }
    if rate not in made:
        raise reject("optim.rate", rate, f"one of {', '.join(made)}")
    span = max(steps - warmup, 1)
    rise = lambda t: jnp.minimum(1, (t + 1) / warmup) if warmup else 1.0

    def of(step):
        t = jnp.asarray(step, jnp.float32)
        return made[rate](t) * rise(t)

    return of
