"""Molecules through RDKit: files, conformers, force field, bonds and validity.

Hydrogens are explicit everywhere. Stereo is assigned from positions where there are some, so
that a conformer embedded anew is the same stereoisomer (section 8.3).
"""

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from rdkit import Chem, rdBase
from rdkit.Chem import AllChem, rdDetermineBonds, rdDistGeom
from rdkit.Geometry import Point3D

from common.errors import UserError
from geometry.data import checks, elements, symmetry
from geometry.records import Record

KINDS = {1: Chem.BondType.SINGLE, 2: Chem.BondType.DOUBLE, 3: Chem.BondType.TRIPLE}
KINDS[4] = Chem.BondType.AROMATIC
CLASSES = {kind: k for k, kind in KINDS.items()}
SEED = 1_000_003  # Of the bundled set: this plus the number of the molecule.


def to_rdkit(record: Record, positions: Float[np.ndarray, "atoms 3"] | None = None) -> Chem.Mol:
    """The molecule with one conformer.

    Bonds are the record's, or perceived where it has none. Charges are those that bonds ask
    for: N with four bonds is +1, O with one single bond -1; where that makes no molecule
    (aromatic S+), orders and charges are found anew from who is bonded to whom.

    Args:
      positions: by default the start.

    Raises:
      UserError: no Lewis structure fits.
    """
    positions = record.start if positions is None else positions
    if not len(record.bonds):
        return _perceived(record, positions)
    made = _bare(record, positions)
    for a, b, kind in record.bonds.tolist():
        made.AddBond(a, b, KINDS[kind])
        if kind == 4:
            for part in (made.GetBondBetweenAtoms(a, b), *map(made.GetAtomWithIdx, (a, b))):
                part.SetIsAromatic(True)
    _charge(made)
    try:
        with rdBase.BlockLogs():
            Chem.SanitizeMol(made)
    except ValueError:
        return _perceived(record, positions)
    molecule = made.GetMol()
    Chem.AssignStereochemistryFrom3D(molecule)
    return molecule


def from_rdkit(molecule: Chem.Mol, name: str, conformer: int = -1) -> Record:
    """A record whose start is a conformer.

    Its smiles are canonical with stereo, its group canonical without, so that stereoisomers
    stay in one split.
    """
    bare = Chem.RemoveAllHs(molecule)
    smiles = Chem.MolToSmiles(bare)
    group = Chem.MolToSmiles(bare, isomericSmiles=False)
    bonds = [
        (b.GetBeginAtomIdx(), b.GetEndAtomIdx(), CLASSES.get(b.GetBondType(), 1))
        for b in molecule.GetBonds()
    ]
    atoms = molecule.GetNumAtoms()
    return Record(
        id=name,
        numbers=np.array([a.GetAtomicNum() for a in molecule.GetAtoms()], np.int32),
        start=np.array(molecule.GetConformer(conformer).GetPositions(), np.float64),
        end=None,
        frames=None,
        bonds=np.array(bonds, np.int32).reshape(-1, 3),
        cell=np.zeros((3, 3)),
        pbc=np.zeros(3, bool),
        free=np.ones(atoms, bool),
        smiles=smiles,
        group=group,
    )


def read_sdf(path: str | Path) -> list[Record]:
    """The molecules of an .sdf or .mol file, with a warning where hydrogens are missing.

    Raises:
      UserError: no such file, an entry that cannot be read or has no positions.
    """
    if not Path(path).is_file():
        raise UserError(f"There is no file {path}.")
    records, lacking = [], 0
    supplier = Chem.SDMolSupplier(str(path), removeHs=False)
    for k, molecule in enumerate(supplier):
        if molecule is None:
            raise UserError(f"Molecule {k} of {path} cannot be read: see RDKit's message.")
        record, missing = of_entry(molecule, f"{Path(path).stem}-{k}", str(path))
        records.append(record)
        lacking += missing > 0
    if not records:
        raise UserError(f"The file {path} holds no molecule.")
    if lacking:
        warnings.warn(
            f"{lacking} of {len(records)} molecules of {path} lack hydrogens; positions are "
            "learned and predicted of the atoms that are there.",
            stacklevel=2,
        )
    return records


def of_entry(molecule: Chem.Mol, name: str, path: str) -> tuple[Record, int]:
    """The record of an SDF entry, and how many hydrogens it lacks.

    Raises:
      UserError: it has no positions, or flat ones of a drawing.
    """
    if not molecule.GetNumConformers():
        raise UserError(f"Molecule {name} of {path} has no positions.")
    missing = sum(atom.GetTotalNumHs() for atom in molecule.GetAtoms())
    flat = not np.any(molecule.GetConformer().GetPositions()[:, 2])
    if flat and missing and not molecule.GetConformer().Is3D():
        raise UserError(
            f"Molecule {name} of {path} is a drawing: flat and without hydrogens; give its "
            "SMILES or positions in space."
        )
    Chem.AssignStereochemistryFrom3D(molecule)
    return from_rdkit(molecule, name), missing


def read_smiles(path: str | Path, seed: int = SEED) -> list[Record]:
    """Conformers of a list of SMILES, one a line, with a name after a blank if there is one.

    Args:
      seed: of the embedding; that of molecule k is seed + k.

    Raises:
      UserError: no such file, a line that is no SMILES, or one that has no conformer.
    """
    if not Path(path).is_file():
        raise UserError(f"There is no file {path}.")
    records = []
    for k, line in enumerate(Path(path).read_text().splitlines()):
        smiles, _, name = line.strip().partition(" ")
        if not smiles or smiles.startswith("#"):
            continue
        records.append(of_smiles(smiles, seed + k, name.strip() or f"{Path(path).stem}-{k}"))
    if not records:
        raise UserError(f"The file {path} holds no SMILES.")
    return records


def of_smiles(smiles: str, seed: int, name: str = "") -> Record:
    """The ETKDGv3 conformer of a SMILES.

    Raises:
      UserError: no SMILES, or no conformer was found.
    """
    molecule = parsed(smiles)
    found = embedded(molecule, 1, seed)
    if not found.GetNumConformers():
        raise UserError(f"No conformer of {smiles!r} was found with seed {seed}.")
    return from_rdkit(found, name or smiles)


def parsed(smiles: str) -> Chem.Mol:
    """The molecule of a SMILES, with hydrogens.

    Raises:
      UserError: it is none.
    """
    with rdBase.BlockLogs():
        molecule = Chem.MolFromSmiles(smiles)
    if molecule is None or not molecule.GetNumAtoms():
        raise UserError(f"{smiles!r} is no valid SMILES of a molecule.")
    return Chem.AddHs(molecule)


def embedded(molecule: Chem.Mol, count: int, seed: int) -> Chem.Mol:
    """A copy with up to `count` ETKDGv3 conformers; fewer where embedding fails."""
    molecule = Chem.Mol(molecule)
    settings = rdDistGeom.ETKDGv3()
    settings.randomSeed = seed & 0x7FFFFFFF
    rdDistGeom.EmbedMultipleConfs(molecule, count, settings)
    return molecule


def conformers(record: Record, count: int, seed: int) -> Float[np.ndarray, "found atoms 3"]:
    """Centred ETKDGv3 conformers of the record's molecule, stereo as in its positions."""
    source = record.start if record.end is None else record.end
    found = embedded(to_rdkit(record, source), count, seed)
    x = np.array([c.GetPositions() for c in found.GetConformers()]).reshape(
        -1, len(record.numbers), 3
    )
    return x - x.mean(axis=1, keepdims=True)


def mmff94(
    molecule: Chem.Mol, steps: int = 2000, conformer: int = -1
) -> Float[np.ndarray, "atoms 3"] | None:
    """Positions after at most so many steps of MMFF94; None without parameters.

    The molecule is left as it is.
    """
    molecule = Chem.Mol(molecule)
    properties = AllChem.MMFFGetMoleculeProperties(molecule)
    if properties is None:
        return None
    field = AllChem.MMFFGetMoleculeForceField(molecule, properties, confId=conformer)
    field.Minimize(maxIts=steps)
    return np.array(molecule.GetConformer(conformer).GetPositions())


def perceived_bonds(
    record: Record, positions: Float[np.ndarray, "atoms 3"] | None = None
) -> Int[np.ndarray, "bonds 3"]:
    """Bonds with classes from distances: connectivity, then orders of a neutral molecule.

    Raises:
      UserError: no orders fit.
    """
    x = record.start if positions is None else positions
    made = _perceived(record._replace(bonds=record.bonds[:0]), x)
    rows = [
        (b.GetBeginAtomIdx(), b.GetEndAtomIdx(), CLASSES.get(b.GetBondType(), 1))
        for b in made.GetBonds()
    ]
    return np.array(rows, np.int32).reshape(-1, 3)


def valid(record: Record, positions: Float[np.ndarray, "atoms 3"]) -> bool:
    """Are exactly the bonded pairs near each other? Of a record without bonds: as at start."""
    near = elements.bonded(record.numbers, np.asarray(positions, float))
    if not len(record.bonds):
        return bool(np.array_equal(near, elements.bonded(record.numbers, record.start)))
    wanted = np.zeros_like(near)
    a, b, _ = record.bonds.T
    wanted[a, b] = wanted[b, a] = True
    return bool(np.array_equal(near, wanted))


def validity(records: Sequence[Record], positions: Sequence[np.ndarray]) -> float:
    """Share of structures that are `valid`."""
    return float(np.mean([valid(r, x) for r, x in zip(records, positions, strict=True)]))


def write_sdf(
    path: str | Path, records: Iterable[Record], positions: Iterable[np.ndarray]
) -> None:
    """One entry per record, named by its id."""
    with Chem.SDWriter(str(path)) as writer:
        for record, x in zip(records, positions, strict=True):
            molecule = to_rdkit(record, x)
            molecule.SetProp("_Name", record.id)
            Chem.Kekulize(molecule)
            writer.write(molecule)


def pair(molecule: Chem.Mol, name: str, seed: int) -> Record | None:
    """From a molecule with a target geometry: start ETKDGv3, end that geometry, aligned.

    None where embedding fails or gives another stereoisomer.
    """
    target = Chem.Mol(molecule)
    Chem.AssignStereochemistryFrom3D(target)
    found = embedded(target, 1, seed)
    if not found.GetNumConformers():
        return None
    end = np.array(target.GetConformer().GetPositions(), np.float64)
    record = checks.checked(from_rdkit(found, name)._replace(end=end))
    if symmetry.stereo(record.numbers, record.bonds, record.start, record.end) != "same":
        return None
    return record


def _bare(record: Record, positions: np.ndarray) -> Chem.RWMol:
    """Atoms at their places, without bonds."""
    made = Chem.RWMol()
    conformer = Chem.Conformer(len(record.numbers))
    for k, x in enumerate(np.asarray(positions, float).tolist()):
        atom = Chem.Atom(int(record.numbers[k]))
        atom.SetNoImplicit(True)
        made.AddAtom(atom)
        conformer.SetAtomPosition(k, Point3D(*x))
    made.AddConformer(conformer, assignId=True)
    return made


def _perceived(record: Record, positions: np.ndarray) -> Chem.Mol:
    """Orders and charges of a neutral molecule, of its bonds or else of near atoms."""
    made = _bare(record, positions)
    pairs = record.bonds[:, :2]
    if not len(pairs):
        pairs = np.argwhere(np.triu(elements.bonded(record.numbers, positions)))
    for a, b in pairs.tolist():
        made.AddBond(a, b, KINDS[1])
    try:
        with rdBase.BlockLogs():
            rdDetermineBonds.DetermineBondOrders(made, charge=0, embedChiral=False)
            Chem.SanitizeMol(made)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"No bond orders of a neutral molecule {elements.formula(record.numbers)} fit "
            f"record {record.id}."
        ) from error
    molecule = made.GetMol()
    Chem.AssignStereochemistryFrom3D(molecule)
    return molecule


def _charge(molecule: Chem.RWMol) -> None:
    """Formal charges where the sum of bond orders differs from a usual valence."""
    for atom in molecule.GetAtoms():
        order = sum(b.GetBondTypeAsDouble() for b in atom.GetBonds())
        z, order = atom.GetAtomicNum(), int(order + 0.1)
        usual = {6: 4, 7: 3, 8: 2}.get(z)
        if usual is None or atom.GetIsAromatic():
            continue
        if order == usual - 1:  # Carbon as in isonitriles.
            atom.SetFormalCharge(-1)
        elif order == usual + 1 and z != 6:
            atom.SetFormalCharge(1)
