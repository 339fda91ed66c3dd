"""Optimizers of language-model pre-training, from a config's `optim`.

    adamw   clip, scale_by_adam, decay, learning rate            decoupled
    adam    clip, decay, scale_by_adam, learning rate            coupled, L2
    lion    clip, scale_by_lion, decay, learning rate            decoupled
    muon    clip, Muon on the modules and Adam on the rest, decay, learning rate

`decay` is one of `RULES`: AlphaDecay, its controls and its baselines. Linear warm-up, then
a cosine to `final` times the peak (arXiv:2506.14562, section 4).
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from common.errors import reject
from optim import decay_controls as controls
from optim import weight_decay as wd
from optim.alphadecay import alphadecay
from optim.modules import dotted

FITTED = ("alphadecay", "shuffled", "adadecay_module")
RULES = (
    "none",
    "uniform",
    "uniform_matched",
    "static_by_type",
    *FITTED,
    "awd",
    "adadecay",
    "cautious",
    "adamc",
    "scheduled",
    "gradient_ratio",
    "norm_control",
)
OPTIMIZERS = ("adamw", "adam", "lion", "muon")


def pretraining(
    name: str,
    *,
    steps: int,
    modules: Any,
    learning_rate: float,
    warmup: float,
    final: float,
    b1: float,
    b2: float,
    eps: float,
    clip: float,
    weight_decay: float,
    rule: str,
    independent: bool,
    decay_rest: str,
    matched: float,
    ratios: Any,
    shuffle_seed: int,
    rho: float,
    awd_factor: float,
    alphadecay: Any,
) -> optax.GradientTransformationExtraArgs:
    """The chain of a config. Its input is the raw gradient of the loss.

    Args:
      name: of `OPTIMIZERS`.
      steps: of the whole run, for the schedule.
      modules: (dotted path, leaf) -> `optim.modules.Dims` or None. Leaves under "blocks."
        are taken for layers stacked along axis 0, as `lm.transformer` has them.
      learning_rate: the peak.
      warmup, final: share of the steps, and of the peak at the end.
      clip: largest global norm of the raw gradient; 0: none.
      weight_decay: eta.
      rule: of `RULES`. "uniform_matched" decays all modules at `matched` times eta,
        "static_by_type" at `ratios[type]` times eta; the rest is at eta.
      matched, ratios: time means of an AlphaDecay run of the same recipe; 0: not known.
      independent: divide eta by the peak, so that shrinkage does not depend on it.
      decay_rest: "base" or "none", for what is no module.
      rho: target norm of norm_control.
      awd_factor: the strength of awd is this times eta; 100 in the AlphaDecay release.
      alphadecay: the settings of `alphadecay`, s1, s2, every, ...

    Raises:
      UserError: a field is out of range.
    """
    if decay_rest not in ("base", "none"):
        raise reject("optim.decay_rest", decay_rest, "base or none")
    if name not in OPTIMIZERS:
        raise reject("optim.name", name, f"one of {', '.join(OPTIMIZERS)}")
    if rule not in RULES:
        raise reject("optim.rule", rule, f"one of {', '.join(RULES)}")
    coupled = name == "adam"
    if coupled and rule in ("cautious", "adamc", "scheduled", "norm_control"):
        raise reject("optim.rule", rule, "a rule that couples, or optim.name adamw")
    for field, value in (("warmup", warmup), ("final", final)):
        if not 0 <= value <= 1:
            raise reject(f"optim.{field}", value, "a share from 0 to 1")
    for field, value in (("b1", b1), ("b2", b2)):
        if not 0 <= value < 1:
            raise reject(f"optim.{field}", value, "at least 0 and below 1")
    for field, value in (("learning_rate", learning_rate), ("eps", eps)):
        if not 0 < value < float("inf"):
            raise reject(f"optim.{field}", value, "a finite number above 0")
    if not 0 <= clip < float("inf"):
        raise reject("optim.clip", clip, "a finite number from 0 (none) up")
    means = "the mean of an AlphaDecay run of this recipe, in its summary.json as "
    if rule == "uniform_matched" and not 0 < matched < float("inf"):
        raise reject("optim.matched", matched, means + "ratio_mean")
    if rule == "static_by_type" and not any(dict(ratios).values()):
        raise reject("optim.ratios", dict(ratios), means + "ratios")
    rate = schedule(learning_rate, steps, warmup, final)
    strength = wd.independent(weight_decay, learning_rate) if independent else weight_decay
    decay = _rule(
        rule, strength, rate, learning_rate, b2, modules, decay_rest, matched, ratios,
        shuffle_seed, rho, awd_factor, dict(alphadecay),
    )  # fmt: skip
    direction = {
        "adam": lambda: optax.scale_by_adam(b1, b2, eps),
        "adamw": lambda: optax.scale_by_adam(b1, b2, eps),
        "lion": lambda: optax.scale_by_lion(b1, b2),
        "muon": lambda: _muon(modules, b1, b2, eps),
    }[name]()
    order = (decay, direction) if coupled else (direction, decay)
    inner = optax.chain(*order, optax.scale_by_learning_rate(rate))
    clipped = optax.clip_by_global_norm(clip) if clip else optax.identity()
    if rule == "awd":  # By the norm of the loss's own gradient.
        return wd.with_gradient(optax.chain(clipped, inner))
    # What Adam sees: `scheduled` needs the same second moment.
    return optax.chain(clipped, wd.with_gradient(inner))


def schedule(peak: float, steps: int, warmup: float, final: float) -> Callable:
    """step -> learning rate: 0 to the peak in warmup * steps, a cosine to final * peak."""
    rise = round(warmup * steps)
    return optax.warmup_cosine_decay_schedule(
        0.0, peak, rise, max(steps, rise + 1), final * peak
    )


def _rule(
    rule, eta, rate, peak, b2, modules, rest, matched, ratios, seed, rho, awd, settings
) -> optax.GradientTransformation:
    admitted = (lambda path: True) if rest == "base" else _selects(modules)
    layered = lambda path: int(path.startswith("blocks."))  # Stacked along axis 0.
    shared = dict(modules=modules, decay_rest=rest)
    gradients = dict(score="grad_norm", assignment="sigmoid")
    made = {
        "none": lambda: optax.identity(),
        "uniform": lambda: _uniform(eta, admitted),
        "uniform_matched": lambda: controls.uniform_modules(eta, matched, **shared),
        "static_by_type": lambda: controls.static_by_type(eta, dict(ratios), **shared),
        "alphadecay": lambda: alphadecay(eta, **shared, **settings),
        "shuffled": lambda: controls.shuffled(eta, seed, **shared, **settings),
        "adadecay_module": lambda: alphadecay(eta, **shared, **settings | gradients),
        "awd": lambda: wd.awd(awd * eta, mask=admitted),
        "adadecay": lambda: wd.adadecay(eta, mask=admitted, stacked=layered),
        "cautious": lambda: wd.cautious(eta, mask=admitted),
        "adamc": lambda: wd.adamc(
            eta, rate, peak=peak, normalised=_selects(modules), mask=admitted
        ),
        "scheduled": lambda: wd.scheduled(eta, b2=b2, mask=admitted),
        "gradient_ratio": lambda: wd.gradient_ratio(eta, mask=admitted, stacked=layered),
        "norm_control": lambda: wd.norm_control(eta, rho, mask=admitted, stacked=layered),
    }
    return made[rule]()


def _uniform(eta: float, admitted: Callable[[str], bool]) -> optax.GradientTransformation:
    """updates + eta w where the path is admitted: AdamW's decay, or L2."""
    wd.check("weight_decay", eta)
    mask = lambda params: jax.tree_util.tree_map_with_path(
        lambda path, _: admitted(dotted(path)), params
    )
    return optax.add_decayed_weights(eta, mask=mask)


def _selects(modules) -> Callable[[str], bool]:
    return lambda path: modules(path, None) is not None


def _muon(modules, b1, b2, eps) -> optax.GradientTransformation:
    """Orthogonalised momentum for the modules, Adam for embeddings, head and norms."""

    def dims(params):
        def one(path, leaf):
            found = modules(dotted(path), leaf)
            if found is None:
                return None
            if found.parts > 1:
                raise reject("optim.name", "muon", "another one for fused matrices")
            axes = (np.atleast_1d(a) for a in (found.reduction_axis, found.output_axis))
            whole = (tuple(int(a) % leaf.ndim for a in axis) for axis in axes)
            return optax.contrib.MuonDimensionNumbers(*whole)

        return jax.tree_util.tree_map_with_path(one, params)

    muon = optax.contrib.scale_by_muon(weight_dimension_numbers=dims)
    labels = lambda params: jax.tree_util.tree_map_with_path(
        lambda path, leaf: "muon" if modules(dotted(path), leaf) is not None else "adam", params
    )
    return optax.partition({"muon": muon, "adam": optax.scale_by_adam(b1, b2, eps)}, labels)
