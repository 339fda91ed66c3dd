"""What a network of geometric states is: F_theta of section 7, whoever computes it.

It sees the state now and every known one, and says a displacement for each atom. Turned
(rotations and reflections) inputs give the turned output, a permutation of atoms permutes it,
and a common translation of all states changes nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from geometry.graphs import Graph


class Inputs(NamedTuple):
    """What changes along a bridge.

    Attributes:
      x: R_t, angstrom.
      known: known states: the start of the bridge first; of a chain then R^0, or earlier
        frames. Their number is static.
      scale: c_in, of the displacement x - known[0], 1/angstrom; distances stay in angstrom.
      time: t / T in [0, 1).
      segment: i / K of a chain; 0 of a single bridge.
    """

    x: Float[Array, "atoms 3"]
    known: Float[Array, "known atoms 3"]
    scale: Float[Array, " graphs"]
    time: Float[Array, " graphs"]
    segment: Float[Array, " graphs"]


class Network(NamedTuple):
    """Pure functions.

    Attributes:
      init: key -> params, a pytree of arrays.
      apply: (params, graph, inputs) -> F [atoms, 3], projected as `graphs.project` does; 0 of
        fresh parameters, as the last layer starts at zero. Dimensionless.
    """

    init: Callable[[jax.Array], Any]
    apply: Callable[[Any, Graph, Inputs], Float[Array, "atoms 3"]]
