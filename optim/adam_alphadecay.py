"""Adam with AlphaDecay, whole: the two couplings of arXiv:2506.14562 (its tables 1 and 9).

    decoupled (AdamW)   clip, scale_by_adam, alphadecay, learning rate
    coupled (Adam, L2)  clip, alphadecay, scale_by_adam, learning rate

Decays of the paper: 0.01 to 0.1 decoupled, 1e-6 to 1e-5 coupled.
"""

from typing import Any

import jax
import optax

from common.errors import reject
from optim.alphadecay import alphadecay
from optim.weight_decay import Transformation, check, with_gradient


def decoupled(
    learning_rate: Any,
    weight_decay: Any,
    *,
    modules: Any,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    clip: Any = 0.0,
    **settings,
) -> Transformation:
    """AdamW with AlphaDecay: w <- w - lr (m_hat / (sqrt(v_hat) + eps) + decay_i w).

    Args:
      learning_rate, weight_decay: numbers or schedules of the step.
      modules, settings: of `alphadecay`; grad_norm has the gradient before clipping.
      b1, b2, eps: Adam's.
      clip: largest global norm of the gradient; 0: none.

    Raises:
      UserError: an argument is out of range.
    """
    decay = alphadecay(weight_decay, modules=modules, **settings)
    return _chain(learning_rate, b1, b2, eps, clip, lambda adam: (adam, decay))


def coupled(
    learning_rate: Any,
    weight_decay: Any,
    *,
    modules: Any,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    clip: Any = 0.0,
    **settings,
) -> Transformation:
    """Adam with AlphaDecay as an L2 term: g <- g + decay_i w, then Adam. Else `decoupled`."""
    decay = alphadecay(weight_decay, modules=modules, **settings)
    return _chain(learning_rate, b1, b2, eps, clip, lambda adam: (decay, adam))


def _chain(learning_rate, b1, b2, eps, clip, order) -> Transformation:
    if not callable(learning_rate):
        check("learning_rate", learning_rate)
    for name, value in (("b1", b1), ("b2", b2)):
        check(name, value)
        if not isinstance(value, jax.Array) and value >= 1:
            raise reject(f"optim.{name}", value, "at least 0 and below 1")
    check("eps", eps)
    parts = (
        *order(optax.scale_by_adam(b1, b2, eps)),
        optax.scale_by_learning_rate(learning_rate),
    )
    if not isinstance(clip, jax.Array):
        check("clip", clip)
    if isinstance(clip, jax.Array) or clip:
        parts = (optax.clip_by_global_norm(clip), *parts)
    return with_gradient(optax.chain(*parts))
