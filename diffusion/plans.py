"""What an estimator does, block by block, so that a run can stop and go on between any two."""

import operator
from functools import partial
from typing import Any, NamedTuple

import jax

from common.errors import UserError, reject
from diffusion import draws
from diffusion.rows import Rows

ESTIMATORS = ("exact", "dol", "cdol", "snis", "knn", "corrected")
FORMS = ("trcov", "residual", "paired", "unpaired")
RULES = ("paper", "tapered", "ht")
BATCHES = 16  # Blocks at least, so that their spread can be told.
SUBSET = 2048  # Rows L of a subset where nothing else is said.


class Plan(NamedTuple):
    """What an estimator does, block by block. The first `few` blocks have exact sums.

    Attributes:
      estimator, form: names.
      rule, constant: of C.
      count, dim: N and D.
      subset, neighbours: L and K, 0 where there are none.
      block: draws in a block; what was asked for, or less, see `block_size`.
      steps: blocks in all.
      few: blocks with exact sums.
      fold: draws that share a row and a noise.
    """

    estimator: str
    form: str
    rule: str
    constant: float
    count: int
    dim: int
    subset: int
    neighbours: int
    block: int
    steps: int
    few: int
    fold: int


class Found(NamedTuple):
    """Moments of one block; None where they are not asked for."""

    exact: draws.Moments | None
    cheap: draws.Subset | None  # Of Moments.


def plan_of(
    count: int,
    dim: int,
    *,
    num_draws: int,
    estimator: str,
    form: str,
    subset_size: int,
    c_rule: str | float,
    neighbours: int,
    exact_draws: int,
    antithetic: bool,
    block: int,
) -> Plan:
    """The plan for N rows of D numbers; arguments as of `estimate_optimal_loss`.

    Raises:
      UserError: one of them cannot be, or leaves "corrected" fewer than `BATCHES` blocks of
        either kind.
    """
    num_draws = whole("num_draws", num_draws)
    if estimator not in ESTIMATORS:
        raise reject("estimator.name", estimator, f"one of {', '.join(ESTIMATORS)}")
    if form not in FORMS:
        raise reject("estimator.form", form, f"one of {', '.join(FORMS)}")
    rule, constant = _rule(estimator, c_rule, neighbours)
    size = k = 0
    if estimator != "exact":
        size = subset_size or min(SUBSET, count)
        k = (neighbours or max(1, size // 2 - 1)) if rule == "knn" else 0
        _check_subset(estimator, size, k, count)
    corrected = estimator == "corrected"
    if corrected:
        least = BATCHES * _fold(estimator, antithetic)
        exact_draws = whole("exact_draws", exact_draws or max(-(-num_draws // 8), least))
    block = block_size(block, num_draws, estimator, exact_draws, antithetic)
    many = -(-num_draws // block)
    few = {"exact": many, "corrected": -(-exact_draws // block)}.get(estimator, 0)
    if corrected and min(few, many) < BATCHES:
        raise UserError(
            f"config.estimator.exact_draws and num_draws give {few} and {many} blocks of "
            f"{block} draws, but the correction needs at least {BATCHES} of each."
        )
    steps = many + few if corrected else many
    fold = 2 if antithetic else 1
    fields = (estimator, form, rule, constant, count, dim, size, k, block, steps, few, fold)
    return Plan(*fields)


def whole(name: str, value: Any, least: int = 1) -> int:
    """A field of `config.estimator` that must be a whole number.

    Raises:
      UserError: it is none, or below `least`.
    """
    try:
        found = operator.index(value)
    except TypeError:
        found = least - 1
    if found < least:
        raise reject(f"estimator.{name}", value, f"a whole number from {least} up")
    return found


def block_size(
    block: int, num_draws: int, estimator: str, exact_draws: int, antithetic: bool
) -> int:
    """Draws of a block: no more than are asked for.

    Of subsets it is at most a 16th of the draws, and of the exact ones, so that there are
    blocks whose spread can be told; and a multiple of the devices, which share it.
    """
    block = min(whole("block", block), num_draws)
    if estimator != "exact":
        block = min(block, num_draws // BATCHES)
    if estimator == "corrected":
        block = min(block, exact_draws // BATCHES)
    fold = _fold(estimator, antithetic)
    return max(block - block % fold, fold)


def block_of(plan: Plan, step: int, seed: int) -> draws.Block:
    """The draws of a plan's block."""
    twins = plan.fold == 2
    return draws.block(step, plan.block, plan.count, seed, subset=plan.subset, antithetic=twins)


def measured(
    plan: Plan,
    with_exact: bool,
    data: Rows,
    part: draws.Block,
    key: jax.Array,
    levels: jax.Array,
    near: jax.Array | None,
    precision: str,
    label: jax.Array | None = None,
) -> Found:
    """Moments of one block. One program for all plans of a rule, whatever C, s and the key.

    `label`, the class of each draw, is for exact sums alone.
    """
    rule = "" if plan.estimator == "exact" else plan.rule
    return _measured(
        rule, with_exact, precision, data, part, key, levels, near, plan.constant, label
    )


@partial(jax.jit, static_argnums=(0, 1, 2))
def _measured(
    rule, with_exact, precision, data, part, key, levels, near, constant, label
) -> Found:
    exact = cheap = None
    if with_exact:
        exact = draws.moments(draws.exact(data, part, key, levels, precision, label))
    if rule:
        found = draws.by_subset(data, part, key, levels, rule, constant, near, precision)
        cheap = draws.Subset(*(draws.moments(each) for each in found))
    return Found(exact, cheap)


def _rule(estimator, c_rule, neighbours):
    if estimator == "knn" or (estimator == "corrected" and neighbours):
        return "knn", 1.0
    if estimator == "snis":
        return "snis", 1.0
    if isinstance(c_rule, str) and c_rule in RULES:
        return c_rule, 1.0
    if isinstance(c_rule, int | float) and c_rule > 0:
        return ("snis", 1.0) if c_rule == float("inf") else ("constant", float(c_rule))
    raise reject("estimator.c_rule", c_rule, f"one of {', '.join(RULES)}, or C above 0")


def _check_subset(estimator, size, k, count):
    if count < 2:
        raise reject("estimator.name", estimator, "exact where there is one row")
    if not 2 <= whole("subset_size", size) <= count:
        raise reject("estimator.subset_size", size, f"from 2 to the {count} rows there are")
    if k and not 1 <= whole("neighbours", k) < size - 1:
        raise reject("estimator.neighbours", k, f"from 1 to {size - 2}, below L - 1")
    if k and k >= count - 1:
        raise reject("estimator.neighbours", k, f"below {count - 1}")


def _fold(estimator, antithetic):
    """What the draws of a block must be a multiple of."""
    devices = 1 if estimator == "exact" else draws.meshes.current()
    return devices * 2 if antithetic else devices
