"""AlphaDecay: weight decay per module, from the heavy tail of its spectrum.

He et al., "AlphaDecay: Module-wise Weight Decay for Heavy-Tailed Balancing in LLMs",
NeurIPS 2025, arXiv:2506.14562. Every `every` steps the eigenvalues of W^T W of each module
give its exponent (`exponents.hill_alpha`), and the exponents of the whole network are
mapped onto decay ratios between s1 and s2 (`assignment.assign_decay`). The transformation
adds decay * ratio * w to the updates, so its place in a chain decides the coupling:

    decoupled (AdamW)   clip, scale_by_adam, alphadecay, learning rate
    coupled (Adam, L2)  clip, alphadecay, scale_by_adam, learning rate

    tx = optax.chain(optax.scale_by_adam(), alphadecay(0.1, modules=modules), optax.scale(-lr))

State is arrays only, one alpha and one ratio per module, under the dotted path of its
leaf. The spectrum is that of the parameters before the update of the same step.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from optim import assignment as assign
from optim import exponents, scores
from optim.modules import NO_PARAMS, Leaf, absent, dotted, select, spread
from optim.settings import Settings, checked, require, settings
from optim.weight_decay import check, is_zero


class AlphaDecayState(NamedTuple):
    """Steps seen; of each module its score (usually alpha; NaN: none) and its ratio.

    In float32, or float64 where the parameters are.
    """

    count: Int[Array, ""]
    alpha: dict[str, Float[Array, "..."]]
    ratio: dict[str, Float[Array, "..."]]


# What `optax.inject_hyperparams(alphadecay, static_args=STATIC)` must leave as it is.
STATIC = Settings._fields


def alphadecay(
    weight_decay: Any,
    *,
    modules: Any,
    s1: float = 0.67,
    s2: float = 3.0,
    every: int = 500,
    offset: int = 0,
    decay_rest: str | Callable[[str], bool] = "base",
    min_eigs: int = 50,
    exclude: tuple[str, ...] = (),
    fit: str = "median",
    tail: float = 0.5,
    reference: str = "mle",
    assignment: str = "linear",
    score: str = "alpha",
    method: str = "auto",
    refresh: str = "inline",
    quantiles: tuple[float, float] = (0.0, 1.0),
    normalize_mean: bool = False,
    ema: float = 0.0,
    shape_correction: str = "none",
    slip: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Adds decay_i * w to the updates of every module i.

    Args:
      weight_decay: eta, a number or a schedule of the step; ratios multiply it.
      modules: which leaves hold modules: (dotted path, leaf) -> `modules.Dims`, True (a
        matrix), False or None, or a tree like the parameters of such.
        `optax.contrib.MuonDimensionNumbers` will do.
      s1, s2: ratios of the heaviest and of the lightest tail, 0 <= s1 <= s2.
      every, offset: refreshes at step 0 and where (step + offset) % every == 0; the paper
        has offset 0, its release 1.
      decay_rest: of all other floating leaves: "base", eta, as the release does with
        norms, embedding and head; "none"; or path -> bool.
      min_eigs: modules with fewer eigenvalues keep eta.
      exclude: modules that keep eta, by name, such as "blocks.q[0]"; the release leaves
        out the first linear layer.
      fit: "median", "goodness_of_fit" or "fix_finger"; slip: see `exponents`.
      tail, reference: of the median fit.
      assignment: "linear", "sqrt", "log2", "sigmoid" or "uniform".
      score: "alpha"; "grad_norm", "frobenius", "spectral", "stable_rank", "alpha_hat" are
        ablations. grad_norm reads the extra argument `gradient` of `update`, or else the
        updates. Unless this is first in the chain `gradient` must be passed, by
        `weight_decay.with_gradient`: the updates would be Adam's output.
      method: of `spectra.esd`.
      refresh: "inline", in the step, under a `lax.cond`; "external", the loop calls
        `refresher` every so often. A vmapped step would refresh at every step inline, and
        under `optax.MultiSteps` a refresh that is due is done in each mini-step.
      quantiles: of the scores that stand for the extremes; outliers are clipped.
      normalize_mean: rescale the ratios that are assigned so that the mean over all
        selected parameters is 1.
      ema: how much of the old scores stays at each refresh.
      shape_correction: "mp" subtracts what a random matrix of the same shape has;
        "subsample" fits pooled square windows (arXiv:2506.06280).

    Raises:
      UserError: a setting is out of range, or `modules` selects nothing or what is no
        matrix.
      ValueError: `update` without parameters (Optax's own), or a state of other modules.
    """
    given = locals()
    s = checked(Settings(**{name: given[name] for name in Settings._fields}))
    if not callable(weight_decay):
        check("weight_decay", weight_decay)

    def init(params):
        leaves, _ = chosen(s, params)
        one = lambda value: {a.name: jnp.full(a.modules, value, a.dtype) for a in leaves}
        return AlphaDecayState(jnp.zeros((), jnp.int32), one(jnp.nan), one(1.0))

    def update(updates, state, params=None, *, gradient=None, **extra):
        if params is None:
            raise ValueError(NO_PARAMS)
        leaves, small = chosen(s, params)
        _same_modules(leaves, state)
        count, alpha, ratio = state
        if s.refresh == "inline" and not is_zero(weight_decay):
            due = (count == 0) | ((count + s.offset % s.every) % s.every == 0)
            seen = updates if gradient is None else gradient
            alpha, ratio = jax.lax.cond(
                due,
                lambda: _refreshed(s, leaves, params, seen, count, alpha, ratio),
                lambda: (alpha, ratio),
            )
        base = weight_decay(count) if callable(weight_decay) else weight_decay
        if not is_zero(weight_decay):
            updates = decayed(updates, params, base, leaves, ratio, rest_of(s, small))
        return updates, AlphaDecayState(optax.safe_increment(count), alpha, ratio)

    return optax.GradientTransformationExtraArgs(init, update)


def refresher(*, modules: Any, **given) -> Callable[[Any, Any], Any]:
    """(optimizer state, parameters) -> the state with fresh exponents and ratios.

    For `refresh="external"`, with the settings of `alphadecay`. Jit it apart from the step;
    the loop calls it before step 0 and then every `every` steps.

    Raises:
      UserError: a setting is unknown or out of range, or the score needs gradients.
      ValueError: `refresh` of a state of other modules.
    """
    s = settings(modules, **given)
    require("score", s.score, s.score != "grad_norm", "computed from parameters alone")

    def refresh(opt_state, params):
        leaves, _ = chosen(s, params)

        def one(state):
            if not isinstance(state, AlphaDecayState):
                return state
            _same_modules(leaves, state)
            found = _refreshed(s, leaves, params, None, *state)
            return AlphaDecayState(state.count, *found)

        is_ours = lambda x: isinstance(x, AlphaDecayState)
        return jax.tree.map(one, opt_state, is_leaf=is_ours)

    return refresh


def diagnostics(
    state: AlphaDecayState, leaves: list[Leaf], every: int, offset: int = 0
) -> dict[str, Array]:
    """Scalars for a log: exponents and ratios by module type, their range, the mean ratio.

    Keys are alpha_TYPE, alpha_min_TYPE, ..., ratio_TYPE; types are the last name of a path
    that says something. Modules without an exponent do not count; alpha is 0 where a type
    has none. Leaves that the state does not know, being too small, are passed over.

    Raises:
      ValueError: the state knows none of the leaves.
    """
    known = [leaf for leaf in leaves if leaf.name in state.ratio]
    if not known:
        _same_modules(leaves, state)
    leaves = known
    kinds: dict[str, list[str]] = {}
    for leaf in leaves:
        kinds.setdefault(leaf.kind, []).append(leaf.name)
    found = {}
    for kind, names in kinds.items():
        for what, values in (("alpha", state.alpha), ("ratio", state.ratio)):
            each = jnp.concatenate([values[name].ravel() for name in names])
            for how, reduce in (("", jnp.nanmean), ("min_", jnp.nanmin), ("max_", jnp.nanmax)):
                found[f"{what}_{how}{kind}"] = jnp.nan_to_num(reduce(each))
    every_alpha = _flat(leaves, state.alpha)
    found["alpha_undefined"] = jnp.sum(jnp.isnan(every_alpha))
    for name, reduce in (("alpha_min", jnp.nanmin), ("alpha_max", jnp.nanmax)):
        found[name] = jnp.nan_to_num(reduce(every_alpha))
    found["alpha_spread"] = found["alpha_max"] - found["alpha_min"]
    sizes = _sizes(leaves)
    found["ratio_mean"] = jnp.sum(sizes * _flat(leaves, state.ratio)) / sizes.sum()
    last = state.count - 1  # The step that this is the state after.
    found["since_refresh"] = jnp.minimum((last + offset % every) % every, last)
    return found


def decayed(
    updates: Any, params: Any, base: Any, leaves: list[Leaf], ratio: dict, rest: Any = "base"
) -> Any:
    """updates + base * ratio * params; `rest` as `decay_rest` of `alphadecay`.

    What is no floating number, and what has no update, is passed through.
    """
    by_name = {leaf.name: leaf for leaf in leaves}

    def one(path, p, u):
        name = dotted(path)
        if absent(p) or absent(u) or not jnp.issubdtype(p.dtype, jnp.inexact):
            return u
        if name in by_name:
            factor = base * spread(by_name[name], ratio[name])
        elif _rest(rest, name):
            factor = base
        else:
            return u
        # In the type of the parameter, as Optax does it: ratios of 1 change no bit.
        return (u + jnp.asarray(factor).astype(p.dtype) * p).astype(u.dtype)

    return jax.tree_util.tree_map_with_path(one, params, updates, is_leaf=absent)


def _refreshed(s, leaves, params, gradients, count, alpha, ratio):
    every = jax.tree.leaves(params)
    weights = [jnp.asarray(every[leaf.index]) for leaf in leaves]
    raw, read = weights, weights
    if s.score == "grad_norm":
        raw, there = _gradients(leaves, weights, params, gradients)
        read = weights + there
    fitted = scores.of_modules(s, leaves, weights, raw)
    fresh = {a.name: v for a, v in zip(leaves, fitted, strict=True)}
    # What is read is not all numbers: whatever is decided about that is not decided here.
    sane = jnp.all(jnp.stack([jnp.isfinite(w).all() for w in read]))
    old, new = _flat(leaves, alpha), _flat(leaves, fresh)
    smooth = s.ema * old + (1 - s.ema) * new
    new = jnp.where(jnp.isfinite(old) & jnp.isfinite(new) & (count > 0), smooth, new)
    judged = jnp.where(_excluded(s, leaves), jnp.nan, new)
    layer, layers = _layers(leaves)
    given = assign.assign_decay(
        judged,
        s.assignment,
        s.s1,
        s.s2,
        quantiles=s.quantiles,
        layer=jnp.asarray(layer),
        layers=layers,
    )
    if s.normalize_mean:
        # The others are at 1 already. Ratios that are all 0 have the limit of equal ones.
        there = jnp.isfinite(judged)
        sizes = jnp.where(there, _sizes(leaves), 0)
        total = jnp.sum(sizes * given)
        scaled = given * sizes.sum() / jnp.where(total > 0, total, 1)
        given = jnp.where(there & (total > 0), scaled, 1)
    keep = lambda fresh, old: jnp.where(sane, fresh, old)
    found = (keep(new, old), keep(given, _flat(leaves, ratio)))
    return tuple(_unflat(leaves, v) for v in found)


def _gradients(leaves, weights, params, gradients) -> tuple[list, list]:
    """Gradients of the leaves, NaN for one that is not there; and those that are there."""
    flat, tree = jax.tree.flatten(params, is_leaf=absent)
    beside = tree.flatten_up_to(gradients)
    every = [g for p, g in zip(flat, beside, strict=True) if not absent(p)]
    found = [every[leaf.index] for leaf in leaves]
    there = [jnp.asarray(g) for g in found if not absent(g)]
    fill = lambda g, w: jnp.full_like(w, jnp.nan) if absent(g) else jnp.asarray(g)
    return [fill(g, w) for g, w in zip(found, weights, strict=True)], there


def chosen(s: Settings, params: Any) -> tuple[list[Leaf], set[str]]:
    """The selected leaves that are large enough, and the names of those that are not."""
    large = found = select(params, s.modules)
    if s.score != "grad_norm":
        large = [leaf for leaf in found if leaf.rank >= s.min_eigs]
        most = max(leaf.rank for leaf in found)
        allowed = f"at most {most}, the most eigenvalues that a module has"
        require("min_eigs", s.min_eigs, large, allowed)
        _check_tail(s, min(leaf.rank for leaf in large))
    _excluded(s, large)
    return large, {leaf.name for leaf in found} - {leaf.name for leaf in large}


def _check_tail(s, least):
    """A tail of one value has no exponent; `scores` reads the value below a tail as well."""
    if s.fit != "median" or s.score in ("frobenius", "stable_rank"):
        return
    start = exponents.tail_start(least, s.tail)
    allowed = f"above {1 / least:.4g}, for two values of {least} to lie in the tail"
    require("tail", s.tail, start <= least - 2, allowed)
    allowed = f"at most {1 - 1 / least:.4g}, for a value of {least} to lie below the tail"
    require("tail", s.tail, start >= 1, allowed)


def rest_of(s: Settings, small: set[str]) -> Callable[[str], bool]:
    """Whether a leaf that has no ratios decays at the base; modules too small always do."""
    return lambda path: path in small or _rest(s.decay_rest, path)


def _excluded(s, leaves):
    names = [name for leaf in leaves for name in leaf.names()]
    for name in s.exclude:
        require("exclude", name, name in names, f"module names such as {names[0]}")
    return np.array([name in s.exclude for name in names])


def _layers(leaves) -> tuple[np.ndarray, int]:
    """The layer of every module: its first batch index, or else the number in its path.

    Such a number is a part of the path by itself, `layers.3.q`, or ends one after a line,
    `block_3.q`. Modules without one, say a head, are a layer together.
    """
    found = []
    for leaf in leaves:
        inside = np.full(leaf.modules, _number(leaf.name))
        if leaf.batch:
            inside = np.indices(leaf.modules)[0]
        found.append(inside.ravel())
    _, layer = np.unique(np.concatenate(found), return_inverse=True)
    return layer, int(layer.max()) + 1


def _number(name: str) -> int:
    numbers = (re.fullmatch(r"(?:.*_)?(\d+)", part) for part in name.split("."))
    return next((int(found[1]) for found in numbers if found), -1)


def _sizes(leaves):
    """Parameters of every module."""
    each = [np.full(int(np.prod(a.modules)), float(np.prod(a.sides))) for a in leaves]
    return np.concatenate(each).astype(np.float32)


def _flat(leaves, values):
    return jnp.concatenate([values[leaf.name].ravel() for leaf in leaves])


def _unflat(leaves, vector):
    ends = np.cumsum([int(np.prod(leaf.modules)) for leaf in leaves])
    parts = jnp.split(vector, ends[:-1])
    return {
        a.name: v.reshape(a.modules).astype(a.dtype) for a, v in zip(leaves, parts, strict=True)
    }


def _same_modules(leaves, state):
    ours = {leaf.name: leaf.modules for leaf in leaves}
    theirs = {name: value.shape for name, value in state.ratio.items()}
    differing = [n for n in sorted({*ours, *theirs}) if ours.get(n) != theirs.get(n)]
    if differing:
        raise ValueError(f"The state is of other modules; differing: {', '.join(differing)}.")


def _rest(rest, path):
    return rest(path) if callable(rest) else rest == "base"
