"""FLOPs of a function: its products and convolutions, counted in the program itself.

XLA's own count takes the body of a loop once; here a scan counts as often as it runs.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import jax


def flops(function: Callable, *arguments: Any) -> float:
    """Multiplications and additions of matrix products and convolutions.

    Args:
      function: traced, not run.
      *arguments: pytrees of arrays, or of `ShapeDtypeStruct`s.
    """
    return _of(jax.make_jaxpr(function)(*arguments).jaxpr)


def _of(jaxpr) -> float:
    return sum((_one(equation) for equation in jaxpr.eqns), 0.0)


def _one(equation) -> float:
    name, params = equation.primitive.name, equation.params
    shapes = [getattr(v.aval, "shape", ()) for v in equation.invars]
    out = getattr(equation.outvars[0].aval, "shape", ()) if equation.outvars else ()
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2.0 * prod(out) * prod(shapes[0][i] for i in contracted)
    if name == "conv_general_dilated":
        kernel = params["dimension_numbers"].rhs_spec
        # Each output sums over the window and the input channels of its group.
        window = prod(shapes[1][i] for i in kernel[1:])
        # Zeros that dilation puts between the inputs are not multiplied.
        return 2.0 * prod(out) * window / prod(params["lhs_dilation"])
    times = params["length"] if name == "scan" else 1
    if name == "cond":
        return max(_of(branch.jaxpr) for branch in params["branches"])
    inner = [v for v in params.values() if hasattr(v, "eqns") or hasattr(v, "jaxpr")]
    return times * sum((_of(getattr(v, "jaxpr", v)) for v in inner), 0.0)
