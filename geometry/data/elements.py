"""Elements: names and sizes (covalent radii of Cordero et al. 2008, angstrom)."""

from collections.abc import Collection

import numpy as np
from ase.data import chemical_symbols, covalent_radii
from jaxtyping import Bool, Float, Int

RADII = np.array(covalent_radii)
BONDED = 1.25  # Times the sum of two radii, section 8.2.


def names(numbers: Collection[int]) -> str:
    """Symbols, a run of more than three as "H to Xe"."""
    found, runs = sorted({int(z) for z in numbers}), []
    for z in found:
        if runs and runs[-1][-1] == z - 1:
            runs[-1].append(z)
        else:
            runs.append([z])
    words = [
        f"{symbol(run[0])} to {symbol(run[-1])}"
        if len(run) > 3
        else ", ".join(symbol(z) for z in run)
        for run in runs
    ]
    return ", ".join(words)


def symbol(number: int) -> str:
    """For instance "C"; numbers that are no element's stay numbers."""
    return chemical_symbols[number] if 0 < number < len(chemical_symbols) else str(number)


def formula(numbers: Int[np.ndarray, " atoms"]) -> str:
    """Composition, carbon and hydrogen first: "C2H6O"."""
    count = {symbol(int(z)): int(np.sum(numbers == z)) for z in np.unique(numbers)}
    order = sorted(count, key=lambda s: (s != "C", s != "H", s))
    return "".join(s + (str(count[s]) if count[s] > 1 else "") for s in order)


def bonded(
    numbers: Int[np.ndarray, " atoms"], positions: Float[np.ndarray, "atoms 3"]
) -> Bool[np.ndarray, "atoms atoms"]:
    """Pairs nearer than 1.25 times the sum of their covalent radii."""
    distance = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    radii = RADII[numbers]
    near = distance < BONDED * (radii[:, None] + radii[None])
    np.fill_diagonal(near, False)
    return near
