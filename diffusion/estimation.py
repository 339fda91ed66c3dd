"""The moments that an estimation run keeps, and the curve that they make.

Training runs take the curve over from such a state, see `config.init_from`.
"""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from diffusion import draws
from diffusion.block_means import OptimalLoss, curve_of
from diffusion.plans import Plan


class State(NamedTuple):
    """Moments of all blocks so far.

    Attributes:
      sigmas: [S], the added levels last; equal to the largest until they are chosen.
      exact: moments [few, S]; zeros where the plan has none.
      cheap: moments [steps, S] by subsets; None where the plan has none.
      square, variance: A and V of the data, sums over coordinates; V is the limit of large s,
        within classes where they are told.
      done: blocks so far.
      block, dim: draws in a block, coordinates of a row.
      first: [S], the block from which on a level counts.
      source: [8], `dataset.fingerprint` of the data.
    """

    sigmas: Float[Array, " s"]
    exact: draws.Moments
    cheap: draws.Subset | None
    square: Float[Array, ""]
    variance: Float[Array, ""]
    done: Int[Array, ""]
    block: Int[Array, ""]
    dim: Int[Array, ""]
    first: Int[Array, " s"]
    source: UInt32[Array, " 8"]


def result(estimator: str, form: str, fold: int, state: State) -> OptimalLoss:
    """The curve of a state, levels ascending; without those that were not yet chosen.

    Args:
      estimator, form: of the run, `plans.ESTIMATORS` and `plans.FORMS`.
      fold: 2 where draws come in pairs, else 1.
      state: after one block at least.
    """
    state = jax.device_get(state)
    done, few = int(state.done), len(state.exact.mean.trcov)
    few = 0 if estimator not in ("exact", "corrected") else min(few, done)
    plan = Plan(
        estimator, form, "", 1.0, 0, int(state.dim), 0, 0, int(state.block), done, few, fold
    )
    parts = []
    # Added levels have no meaning before they were chosen, and are no levels yet.
    for start in np.unique(state.first[state.first < done]):
        some = state.first == start
        cut = lambda tree, n, a=start, w=some: jax.tree.map(
            lambda v: np.asarray(v[a:n, w], np.float64), tree
        )
        parts.append(
            curve_of(
                plan._replace(few=few - int(start) if few else 0),
                state.sigmas[some],
                cut(state.exact, few) if few else None,
                cut(state.cheap, done),
                float(state.square),
                float(state.variance),
            )
        )
    joined = lambda name: np.concatenate([getattr(p, name) for p in parts])
    order = np.argsort(joined("sigmas"), kind="stable")
    whole = ("variance", "num_draws", "dim", "cheap_draws")
    named = {n: joined(n)[order] for n in OptimalLoss._fields if n not in whole}
    return parts[0]._replace(**named)
