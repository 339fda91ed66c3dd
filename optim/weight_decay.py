"""Rules of weight decay that AlphaDecay is compared with (its controls: `decay_controls`).

Each adds decay * w to the updates, so that its place in a chain decides the coupling:

    decoupled (AdamW)   clip, scale_by_adam, the rule, learning rate
    coupled (Adam, L2)  clip, the rule, scale_by_adam, learning rate

    awd, adadecay, gradient_ratio  read the gradient g of the loss, either coupling
    scheduled                      reads it too, decoupled
    cautious, adamc, norm_control  decoupled

The gradient is the extra argument `gradient` of `update`, or else the updates, which are
the gradient only where the rule comes first: elsewhere `gradient` must be passed, which no
rule can tell by itself. `with_gradient` hands it through a chain.

Leaves that are None, `optax.MaskedNode` or not floating pass through, and so do those whose
dotted path a `mask` turns down. Strengths are numbers; `optax.inject_hyperparams` makes
schedules of them, with what is a function of the path, or a rate, among its `static_args`.
A strength of 0 adds nothing. Every rule raises `UserError` for what is out of range, and
`update` without parameters ValueError.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from common.errors import reject
from optim.modules import NO_PARAMS, absent, dotted

Transformation = optax.GradientTransformationExtraArgs
Mask = Callable[[str], Any] | None


class AWDState(NamedTuple):
    average: Float[Array, ""]  # bar_t / strength; the dtype of the widest parameter.


class AdamCState(NamedTuple):
    count: Int[Array, ""]


class ScheduledState(NamedTuple):
    """Steps, and the uncorrected second moment's mean: the moment of the mean square."""

    count: Int[Array, ""]
    mean_square: Float[Array, ""]


def awd(strength: ArrayLike, *, mask: Mask = None) -> Transformation:
    """Adaptive weight decay: one value for the network, renewed at every step.

        l_t = strength ‖g‖ / (‖w‖ + 1e-8),  bar_t = 0.1 bar_{t-1} + 0.9 l_t,  bar_{-1} = 0
        updates + bar_t w

    Ghiasi, Shafahi, Ardekani, NeurIPS 2023, arXiv:2210.00094. Norms are over all floating
    leaves, also those that `mask` turns down. Unless this is first in the chain `gradient`
    must be passed, by `with_gradient`: g would be Adam's output.
    """
    check("strength", strength)

    def init(params):
        return AWDState(jnp.zeros((), _widest(params)))

    def update(updates, state, params=None, *, gradient=None, **extra):
        found = _parameters(updates, params, gradient)
        if not found:
            return updates, state
        now = _total([p.g for p in found]) / (_total([p.w for p in found]) + 1e-8)
        bar = (0.1 * state.average + 0.9 * now).astype(state.average.dtype)
        return _add(updates, found, strength, lambda p: bar, mask), AWDState(bar)

    return optax.GradientTransformationExtraArgs(init, update)


def adadecay(
    weight_decay: ArrayLike, alpha: ArrayLike = 4.0, *, mask: Mask = None, stacked: Mask = None
) -> Transformation:
    """Decay per coordinate j of a layer l, by the size of its gradient among its layer's.

        z_j = (|g_j| - mean_l |g|) / std_l |g|,  theta_j = 2 / (1 + exp(-alpha z_j))
        updates + weight_decay theta_j w_j

    Nakamura, Hong, 2019, arXiv:1907.08931. The deviation is the population's; where all
    |g_j| of a layer are equal theta is 1. What the AlphaDecay paper calls AdaDecay has one
    value per module: `alphadecay(score="grad_norm", assignment="sigmoid")`. Unless this is
    first in the chain `gradient` must be passed, as in `awd`.

    Args:
      weight_decay: decays lie between 0 and twice this.
      stacked: path -> how many leading axes of the leaf count layers; none by default.
    """
    check("weight_decay", weight_decay)
    check("alpha", alpha)

    def theta(p):
        axes = _axes(p, stacked)
        over = lambda f, x, **start: f(x, axes, keepdims=True, **start)
        size = jnp.abs(_wide(p.g))
        largest = over(jnp.max, size, initial=0)
        size = size / jnp.where(largest > 0, largest, 1)  # Squares stay in range.
        # The deviation of equal numbers is rounding and not always 0.
        varied = over(jnp.min, size, initial=1) < over(jnp.max, size, initial=0)
        apart = jnp.where(varied, size - over(jnp.mean, size), 0)
        z = apart / jnp.where(varied, over(jnp.std, size), 1)
        return 2 * jax.nn.sigmoid(alpha * z)

    def update(updates, state, params=None, *, gradient=None, **extra):
        found = _parameters(updates, params, gradient)
        return _add(updates, found, weight_decay, theta, mask), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def cautious(weight_decay: ArrayLike, *, mask: Mask = None) -> Transformation:
    """Decay where the step already makes the coordinate smaller.

        w <- w - lr (u + weight_decay 1[u w >= 0] w)

    Chen et al., ICLR 2026, arXiv:2510.12402. Decoupled: u are the updates at this place,
    before `optax.scale_by_learning_rate` turns their sign. There they point along the
    gradient, uphill, so that u w >= 0 says that -lr u moves w towards zero or leaves it.
    After the learning rate the rule would pick the opposite half.
    """
    check("weight_decay", weight_decay)

    def aligned(p):
        # Signs, since a product of small numbers would round to 0, which counts as aligned.
        product = jnp.conj(jnp.sign(p.u)) * jnp.sign(p.w)
        return (jnp.real(product) >= 0).astype(jnp.finfo(p.w.dtype).dtype)

    def update(updates, state, params=None, **extra):
        found = _parameters(updates, params)
        return _add(updates, found, weight_decay, aligned, mask), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def adamc(
    weight_decay: ArrayLike,
    learning_rate: ArrayLike | optax.Schedule,
    *,
    peak: ArrayLike,
    normalised: Callable[[str], Any],
    mask: Mask = None,
) -> Transformation:
    """Corrected AdamW: layers before a normalisation decay with the square of the rate.

        updates + weight_decay (lr_t / peak) w   where normalised(path)
        updates + weight_decay w                 elsewhere

    Defazio 2025, arXiv:2506.02285. Decoupled: with the learning rate applied afterwards the
    shrinkage of a normalised layer is lr_t^2 / peak * weight_decay.

    Args:
      learning_rate: the one of the chain, a number or a schedule of the step from 0 on.
      peak: its largest value.
      normalised: dotted path -> whether the output of that layer is normalised.
    """
    check("weight_decay", weight_decay)
    check("peak", peak, positive=True)
    if not callable(learning_rate):
        check("learning_rate", learning_rate)

    def init(params):
        del params
        return AdamCState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, **extra):
        found = _parameters(updates, params)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        share = lambda p: rate / peak if normalised(p.path) else 1
        updates = _add(updates, found, weight_decay, share, mask)
        return updates, AdamCState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def scheduled(
    weight_decay: ArrayLike, eps: ArrayLike = 1e-8, *, b2: ArrayLike = 0.999, mask: Mask = None
) -> Transformation:
    """Scheduled weight decay (SWD); after `scale_by_adam` this is AdamS.

        v_t = b2 v_{t-1} + (1 - b2) g_t^2,  vbar_t = mean over coordinates of v_t / (1 - b2^t)
        updates + weight_decay / (sqrt(vbar_t) + eps) w

    Xie et al., NeurIPS 2023, arXiv:2011.11152. Decoupled. The mean is over all floating
    leaves. The mean of v is the moving average of the mean of g^2, so one number is kept
    here, not a second copy of Adam's tree. Without a gradient and eps nothing is added.

    Args:
      b2: Adam's.

    Raises:
      ValueError: `update` without the extra argument `gradient`, which is what Adam got:
        the updates after Adam would do silently and be wrong.
    """
    check("weight_decay", weight_decay)
    check("eps", eps)
    if not isinstance(b2, jax.Array) and not 0 <= b2 < 1:
        raise reject("optim.b2", b2, "at least 0 and below 1")

    def init(params):
        return ScheduledState(jnp.zeros((), jnp.int32), jnp.zeros((), _widest(params)))

    def update(updates, state, params=None, *, gradient=None, **extra):
        if gradient is None:
            raise ValueError("Scheduled weight decay needs `gradient`; see with_gradient.")
        found = _parameters(updates, params, gradient)
        count = optax.safe_increment(state.count)
        squares = sum(jnp.sum(jnp.abs(_wide(p.g)) ** 2) for p in found)
        mean = squares / max(sum(p.w.size for p in found), 1)
        moment = (b2 * state.mean_square + (1 - b2) * mean).astype(state.mean_square.dtype)
        root = jnp.sqrt(moment / (1 - b2 ** count.astype(moment.dtype))) + eps
        scale = jnp.where(root > 0, 1 / jnp.where(root > 0, root, 1), 0)
        updates = _add(updates, found, weight_decay, lambda p: scale, mask)
        return updates, ScheduledState(count, moment)

    return optax.GradientTransformationExtraArgs(init, update)


def gradient_ratio(
    weight_decay: ArrayLike, *, mask: Mask = None, stacked: Mask = None
) -> Transformation:
    """Decay per layer in proportion to its gradient over its weights.

        r_l = ‖g_l‖ / ‖w_l‖,  updates + weight_decay r_l / mean_l(r_l) w

    Ishii, Sato 2017 (layer-wise weight decay); that the mean over layers is `weight_decay`
    is ours. Layers are leaves that `mask` admits. Those of norm 0 do not count and have
    nothing to decay; without any gradient all take `weight_decay`. Unless this is first in
    the chain `gradient` must be passed, as in `awd`.

    Args:
      stacked: path -> how many leading axes of the leaf count layers; none by default.
    """
    check("weight_decay", weight_decay)

    def rate(p):
        axes = _axes(p, stacked)
        length = _norm(p.w, axes)
        safe = jnp.where(length > 0, length, 1)
        return jnp.where(length > 0, _norm(p.g, axes) / safe, 0), length > 0

    def update(updates, state, params=None, *, gradient=None, **extra):
        found = _parameters(updates, params, gradient)
        rates = {p.path: rate(p) for p in found if mask is None or mask(p.path)}
        count = sum(jnp.sum(there) for _, there in rates.values())
        mean = sum(jnp.sum(r) for r, _ in rates.values()) / jnp.maximum(count, 1)
        safe = jnp.where(mean > 0, mean, 1)
        factor = lambda p: jnp.where(mean > 0, rates[p.path][0] / safe, 1)
        return _add(updates, found, weight_decay, factor, mask), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def norm_control(
    weight_decay: ArrayLike,
    rho: ArrayLike | Callable[[str], float] = 0.0,
    *,
    mask: Mask = None,
    stacked: Mask = None,
) -> Transformation:
    """Pulls the norm of every tensor to a target instead of to zero.

        w <- w - lr weight_decay (1 - rho / ‖w‖) w

    Loshchilov 2023, arXiv:2311.11446. Decoupled; rho = 0 is AdamW. A tensor of zeros has no
    direction to grow in and stays.

    Args:
      rho: the target norm, of all tensors alike or dotted path -> norm.
      stacked: path -> how many leading axes of the leaf count tensors; none by default.
    """
    check("weight_decay", weight_decay)
    if not callable(rho):
        check("rho", rho)

    def pull(p):
        target = rho(p.path) if callable(rho) else rho
        check("rho", target)
        length = _norm(p.w, _axes(p, stacked))
        return 1 - target / jnp.where(length > 0, length, 1)

    def update(updates, state, params=None, **extra):
        found = _parameters(updates, params)
        return _add(updates, found, weight_decay, pull, mask), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def independent(weight_decay: float, peak: float) -> float:
    """The strength weight_decay / peak: decay independent of the learning rate's size.

    The decoupled shrinkage per step is then weight_decay lr_t / peak, whatever the peak
    (Wortsman et al., arXiv:2309.14322; Loshchilov, Hutter, arXiv:1711.05101).
    """
    check("weight_decay", weight_decay)
    check("peak", peak, positive=True)
    return weight_decay / peak


def with_gradient(inner: optax.GradientTransformation) -> Transformation:
    """`inner`, with what it is given as the extra argument `gradient` for all its parts.

        chain(clip, with_gradient(chain(scale_by_adam(), scheduled(0.1), scale(-lr))))

    Inside `optax.MultiSteps` that is the accumulated gradient, which a loop cannot give.
    """
    inner = optax.with_extra_args_support(inner)

    def update(updates, state, params=None, **extra):
        return inner.update(updates, state, params, **{**extra, "gradient": updates})

    return optax.GradientTransformationExtraArgs(inner.init, update)


class _Parameter(NamedTuple):
    """A floating leaf: its place in the tree of updates, weights, update and gradient."""

    index: int
    path: str
    w: Array
    u: Array
    g: Array


def _parameters(updates, params, gradient=None) -> list[_Parameter]:
    if params is None:
        raise ValueError(NO_PARAMS)
    named, tree = jax.tree_util.tree_flatten_with_path(updates, is_leaf=absent)
    raw = tree.flatten_up_to(updates if gradient is None else gradient)
    every = enumerate(zip(named, tree.flatten_up_to(params), raw, strict=True))
    return [
        _Parameter(i, dotted(path), w, u, g)
        for i, ((path, u), w, g) in every
        if not (absent(u) or absent(w)) and jnp.issubdtype(w.dtype, jnp.inexact)
    ]


def _add(updates, found: list[_Parameter], strength, factor: Callable, mask: Mask):
    """updates + strength * factor(parameter) * w where `mask` admits the path."""
    if is_zero(strength):
        return updates
    flat, tree = jax.tree.flatten(updates, is_leaf=absent)
    for p in found:
        if mask is None or mask(p.path):
            flat[p.index] = (p.u + strength * factor(p) * p.w).astype(p.u.dtype)
    return tree.unflatten(flat)


def _axes(p: _Parameter, stacked: Mask) -> tuple[int, ...]:
    """The axes within one layer of a leaf."""
    leading = int(stacked(p.path)) if stacked else 0
    if not 0 <= leading <= p.w.ndim:
        raise reject("optim.stacked", leading, f"from 0 to {p.w.ndim} for {p.path}")
    return tuple(range(leading, p.w.ndim))


def _norm(x, axes=None):
    """Euclidean, axes kept. The largest entry is taken out so that no square overflows."""
    x = jnp.abs(_wide(x))
    largest = jnp.max(x, axes, keepdims=True, initial=0)
    unit = jnp.where(largest > 0, largest, 1)
    return jnp.sqrt(jnp.sum((x / unit) ** 2, axes, keepdims=True)) * unit


def _total(leaves):
    """The norm over all leaves together."""
    return jnp.squeeze(_norm(jnp.stack([_norm(x).reshape(()) for x in leaves])))


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _widest(params):
    """The real dtype that holds numbers of all leaves, float32 or wider."""
    kinds = [p.dtype for p in jax.tree.leaves(params) if jnp.issubdtype(p.dtype, jnp.inexact)]
    return jnp.finfo(jnp.result_type(jnp.float32, *kinds)).dtype


def is_zero(strength) -> bool:
    known = not callable(strength) and not isinstance(strength, jax.Array)
    return known and bool(strength == 0)


def check(name: str, value: Any, positive: bool = False) -> None:
    """Rejects what is no finite number from 0, or above 0. Arrays are known only later."""
    if isinstance(value, jax.Array):
        return
    number = isinstance(value, int | float | np.integer | np.floating)
    if not number or not 0 <= value < np.inf or (positive and value == 0):
        where = "above 0" if positive else "from 0 up"
        raise reject(f"optim.{name}", value, f"a finite number {where}")
