"""One structure with its two ends, as it comes from a file: NumPy, on the host."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int


class Record(NamedTuple):
    """A system S = (Z, E, C; R), section 1. Positions in angstrom, float64.

    Attributes:
      id: name in its file, for messages.
      numbers: Z, atomic numbers, int32.
      start: R^0.
      end: R^T; None where it is to be predicted.
      frames: R^0 ... R^K of a path from start to end; None without one.
      bonds: rows of atom, atom, class (1, 2, 3, 4 aromatic), int32, each pair once; no rows
        where they are not known.
      cell: rows are lattice vectors; zeros without one.
      pbc: directions that repeat.
      free: atoms that may move.
      smiles: canonical; "" where there is none.
      group: structures of one group never come into two splits.
    """

    id: str
    numbers: Int[np.ndarray, " atoms"]
    start: Float[np.ndarray, "atoms 3"]
    end: Float[np.ndarray, "atoms 3"] | None
    frames: Float[np.ndarray, "frames atoms 3"] | None
    bonds: Int[np.ndarray, "bonds 3"]
    cell: Float[np.ndarray, "3 3"]
    pbc: Bool[np.ndarray, " 3"]
    free: Bool[np.ndarray, " atoms"]
    smiles: str
    group: str
