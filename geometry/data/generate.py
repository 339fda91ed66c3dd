"""Pairs made on the spot: conformer and the minimum it relaxes to, with the path (section 8.2).

    mmff94   ETKDGv3 -> MMFF94, by short minimisations; about 12 ms a molecule
    gfn2     ETKDGv3 -> GFN2-xTB, BFGS to 0.02 eV/A; 0.15-0.4 CPU-s; needs tblite

A pair is a function of its molecule and a seed. Where the relaxed geometry has other bonds or
another handedness than the molecule, there is no pair.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from common.errors import UserError, reject
from geometry.chain import resample
from geometry.data import checks, molecules
from geometry.records import Record

FMAX, STEP, STEPS = 0.02, 0.1, 500  # eV/A, A and number, of BFGS.
BURST = 5  # Steps of MMFF94 between two frames.


def methods() -> dict[str, Callable[[Any], list[np.ndarray] | None]]:
    """Name -> (molecule with a conformer -> positions along its path, or None)."""
    return {"mmff94": by_mmff94, "gfn2": by_gfn2}


def pair(
    smiles: str, number: int, method: str, seed: int = molecules.SEED, segments: int = 8
) -> Record | str:
    """The pair of a molecule, or a sentence that says why there is none.

    Args:
      smiles: of the molecule.
      number: of the molecule in its list; the conformer's seed is seed + number.
      method: "mmff94" or "gfn2".
      segments: of the path, K.

    Raises:
      UserError: no SMILES, unknown method, or its package is missing.
    """
    if method not in methods():
        raise reject("prepare.method", method, f"one of {', '.join(methods())}")
    found = molecules.embedded(molecules.parsed(smiles), 1, seed + number)
    if not found.GetNumConformers():
        return "no conformer was found"
    path = methods()[method](found)
    if path is None:
        return f"{method} did not relax it"
    record = molecules.from_rdkit(found, str(number))
    x = np.stack(path) - np.mean(path, axis=1, keepdims=True)
    record = record._replace(end=x[-1], frames=resample(x, segments))
    if not molecules.valid(record, record.end):
        return "its relaxed geometry has other bonds"
    record = checks.checked(record)
    return checks.other_hand(record) or record


def by_mmff94(molecule: Any) -> list[np.ndarray] | None:
    """Positions after every few steps of MMFF94; None without parameters or an end."""
    from rdkit.Chem import AllChem, Mol

    molecule = Mol(molecule)
    properties = AllChem.MMFFGetMoleculeProperties(molecule)
    if properties is None:
        return None
    field = AllChem.MMFFGetMoleculeForceField(molecule, properties)
    path = [np.array(molecule.GetConformer().GetPositions())]
    for _ in range(STEPS):
        left = field.Minimize(maxIts=BURST)
        path.append(np.array(molecule.GetConformer().GetPositions()))
        if not left:
            return path
    return None


def by_gfn2(molecule: Any) -> list[np.ndarray] | None:
    """Positions at every step of BFGS with GFN2-xTB; None where it did not come to an end.

    Raises:
      UserError: tblite is missing.
    """
    try:
        from tblite.ase import TBLite
    except ImportError as error:
        raise UserError(
            "The method gfn2 needs the package tblite: `uv sync --extra xtb`."
        ) from error
    from ase import Atoms
    from threadpoolctl import threadpool_limits

    numbers = [a.GetAtomicNum() for a in molecule.GetAtoms()]
    atoms = Atoms(numbers=numbers, positions=molecule.GetConformer().GetPositions())
    atoms.calc = TBLite(method="GFN2-xTB", verbosity=0)
    with threadpool_limits(1):  # More threads only wait for each other on small molecules.
        return relaxed(atoms, FMAX, STEPS)


def relaxed(atoms: Any, fmax: float, steps: int) -> list[np.ndarray] | None:
    """Positions at every step of ASE's BFGS; None where it did not come to an end.

    Args:
      atoms: ASE's, with calculator and constraints; they are moved.
      fmax: largest force at the end, eV/A.
    """
    from ase.optimize import BFGS

    path: list[np.ndarray] = []
    with BFGS(atoms, logfile=None, maxstep=STEP) as optimiser:
        optimiser.attach(lambda: path.append(atoms.get_positions()))
        try:
            done = optimiser.run(fmax=fmax, steps=steps)
        except (RuntimeError, ArithmeticError, np.linalg.LinAlgError):
            return None  # The electrons did not converge.
    return path if done else None
