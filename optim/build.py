"""Chains of gradient transformations from a config's `optim`."""

from functools import partial

import jax
import jax.numpy as jnp
import optax

from common.errors import reject
from optim import natural_gradient as ng
from optim.norm_constraint import decayed_norm, scale_by_norm_constraint


def variational(
    name: str,
    *,
    mu: float,
    beta: float,
    damping: float,
    eps: float,
    normalize_v: bool,
    difference: str,
    decay: str,
    preconditioner: str,
    max_norm: float,
    norm_mode: str,
    decay_start: int,
    decay_scale: float,
    warmup: int,
    learning_rate: float,
    clip: float,
    linalg: str,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a variational Monte Carlo run.

    Args:
      name: march, spring, minsr (with the norm constraint as step size), adam or sgd
        (with `learning_rate`).
      clip: of local energies, in mean absolute deviations; 0: none.
      linalg: dtype of the natural gradient's linear algebra.

    The other fields are those of the transformations; a name uses those it needs.

    Raises:
      UserError: an unknown name, or a field out of its range.
    """
    cut = clip or None
    shared = dict(damping=damping, clip=cut, dtype=linalg)
    natural = {
        "march": lambda: ng.scale_by_march(
            mu=mu,
            beta=beta,
            eps=eps,
            normalize_v=normalize_v,
            difference=difference,
            decay=decay,
            preconditioner=preconditioner,
            **shared,
        ),
        "spring": lambda: ng.scale_by_spring(mu=mu, **shared),
        "minsr": lambda: ng.scale_by_minsr(**shared),
    }
    plain = {"adam": optax.adam, "sgd": optax.sgd}
    if name in natural:
        length = decayed_norm(max_norm, decay_start, decay_scale, warmup)
        return optax.chain(natural[name](), scale_by_norm_constraint(length, norm_mode))
    if name in plain:
        if not 0 < learning_rate < float("inf"):
            raise reject("optim.learning_rate", learning_rate, "a finite number above 0")
        return optax.chain(
            ng.energy_gradient(clip=cut, dtype=linalg), _unless_zero(plain[name](learning_rate))
        )
    raise reject("optim.name", name, f"one of {', '.join([*natural, *plain])}")


def _unless_zero(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner`, but a gradient of zeros, which is a refused batch, moves and ages nothing."""

    def update(updates, state, params=None):
        there = optax.tree.norm(updates, ord=jnp.inf) > 0
        step, new = inner.update(updates, state, params)
        zero = jax.tree.map(jnp.zeros_like, step)
        return jax.tree.map(partial(jnp.where, there), (step, new), (zero, state))

    return optax.GradientTransformation(inner.init, update)
