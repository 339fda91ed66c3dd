"""Controls for AlphaDecay: the same ratios without the spectrum, or on other modules.

The AlphaDecay paper (arXiv:2506.14562) compares with rules that look at gradients
(`weight_decay`), but not with these, which tell whether it matters that the ratios follow
the spectrum, or only that they differ or that their mean is above 1:

    uniform_modules one constant ratio for all modules, such as the mean of a run
    fixed_ratios    constant ratios per module, such as the time means of a run
    static_by_type  constant ratios per type of module
    shuffled        AlphaDecay's ratios at every time, on modules they do not belong to

Like `alphadecay` they add decay * w to the updates, so that their place in a chain decides
the coupling, and treat what is no module as `decay_rest` says.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array

from common.errors import reject
from optim.alphadecay import alphadecay, chosen, decayed, rest_of
from optim.modules import NO_PARAMS, Leaf, select
from optim.settings import check_rest, settings
from optim.weight_decay import Transformation, check, is_zero


def uniform_modules(
    weight_decay: ArrayLike, ratio: float, *, modules: Any, decay_rest: Any = "base"
) -> Transformation:
    """One ratio for all modules: AlphaDecay's mean decay and nothing else of it.

        updates + weight_decay ratio w   for every module

    Args:
      ratio: such as the mean over time and parameters of an AlphaDecay run.
      modules, decay_rest: as in `alphadecay`.
    """
    return _constant(weight_decay, {"all": ratio}, modules, decay_rest, lambda leaf: "all")


def fixed_ratios(
    weight_decay: ArrayLike,
    ratios: Mapping[str, Any],
    *,
    modules: Any,
    decay_rest: Any = "base",
) -> Transformation:
    """Constant ratios per module, such as the time means of an AlphaDecay run.

        updates + weight_decay ratio_i w   for module i

    Args:
      ratios: dotted path of a leaf -> one number, or an array with one number per module of
        the leaf, shaped as in `AlphaDecayState.ratio`. A leaf without ratios is of the rest;
        one with too few eigenvalues keeps eta in AlphaDecay whatever `decay_rest` is, so
        with "none" give it the ratio 1.
      modules, decay_rest: as in `alphadecay`.
    """
    return _constant(weight_decay, ratios, modules, decay_rest, lambda leaf: leaf.name)


def static_by_type(
    weight_decay: ArrayLike,
    ratios: Mapping[str, Any],
    *,
    modules: Any,
    decay_rest: Any = "base",
) -> Transformation:
    """Constant ratios per type of module: `fixed_ratios` with types ("q", "up") for paths.

    The control for "more decay on the MLP": no spectrum is looked at and layers are alike.
    Types are `modules.Leaf.kind`; one that has no ratio is of the rest.
    """
    return _constant(weight_decay, ratios, modules, decay_rest, lambda leaf: leaf.kind)


def shuffled(
    weight_decay: ArrayLike | optax.Schedule, seed: int, *, modules: Any, **given
) -> Transformation:
    """AlphaDecay with its ratios permuted among all modules of the network.

        updates + weight_decay ratio_{pi(i)} w   for module i

    pi is one permutation of `seed` and never changes. It minds neither sizes nor types, so
    the mean over modules is AlphaDecay's and the mean over parameters is not; a module that
    AlphaDecay leaves at 1 hands on its 1. The state is that of `alphadecay`, not permuted:
    `permuted` gives what is applied.

    Args:
      given: settings of `alphadecay`.
    """
    s = settings(modules, **given)
    inner = alphadecay(weight_decay, **s._asdict())

    def update(updates, state, params=None, **extra):
        count = state.count
        _, state = inner.update(updates, state, params, **extra)
        if is_zero(weight_decay):
            return updates, state
        base = weight_decay(count) if callable(weight_decay) else weight_decay
        leaves, small = chosen(s, params)
        ratio = _as_wide(leaves, permuted(leaves, state.ratio, seed))
        return decayed(updates, params, base, leaves, ratio, rest_of(s, small)), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def permuted(leaves: list[Leaf], ratio: Mapping[str, Any], seed: int) -> dict[str, Array]:
    """The ratios that `shuffled` applies, from those of its state; `leaves` in tree order."""
    flat = jnp.concatenate([jnp.ravel(ratio[leaf.name]) for leaf in leaves])
    flat = flat[np.random.default_rng(seed).permutation(flat.size)]
    ends = np.cumsum([int(np.prod(leaf.modules)) for leaf in leaves])
    parts = jnp.split(flat, ends[:-1])
    return {a.name: v.reshape(a.modules) for a, v in zip(leaves, parts, strict=True)}


def _constant(weight_decay, ratios, modules, decay_rest, name: Callable[[Leaf], str]):
    check("weight_decay", weight_decay)
    check_rest(decay_rest)
    ratios = {key: np.asarray(value, np.float64) for key, value in ratios.items()}
    for key, value in ratios.items():
        if not np.all((value >= 0) & (value < np.inf)):
            raise reject(f"optim.ratios.{key}", value.tolist(), "finite numbers from 0 up")

    def given(params):
        leaves = select(params, modules)
        names = sorted({name(leaf) for leaf in leaves})
        for key in ratios:
            if key not in names:
                raise reject("optim.ratios", key, f"among {', '.join(names)}")
        leaves = [leaf for leaf in leaves if name(leaf) in ratios]
        for leaf in leaves:
            value = ratios[name(leaf)]
            if value.shape not in ((), leaf.modules):
                allowed = f"one number or numbers of shape {leaf.modules}"
                raise reject(f"optim.ratios.{name(leaf)}", value.tolist(), allowed)
        return leaves, {a.name: np.broadcast_to(ratios[name(a)], a.modules) for a in leaves}

    def init(params):
        given(params)
        return optax.EmptyState()

    def update(updates, state, params=None, **extra):
        if params is None:
            raise ValueError(NO_PARAMS)
        if is_zero(weight_decay):
            return updates, state
        leaves, ratio = given(params)
        ratio = _as_wide(leaves, ratio)
        return decayed(updates, params, weight_decay, leaves, ratio, decay_rest), state

    return optax.GradientTransformationExtraArgs(init, update)


def _as_wide(leaves: list[Leaf], ratio: Mapping[str, Any]) -> dict[str, Array]:
    """Ratios in the dtype that is computed in for their leaf."""
    return {leaf.name: jnp.asarray(ratio[leaf.name], leaf.dtype) for leaf in leaves}
