"""Small molecules of C, N, O and F, all of them, as canonical SMILES (section 8.2).

Graphs with single, double and triple bonds, filled up with hydrogen, in which

    no two of N, O, F are bonded, at most one ring, no triple bond in a ring and no double
    bond in one of three or four atoms, no atom with two multiple bonds (cumulenes).

Chains grow by an atom at a time, as taking a leaf away breaks no rule; rings are chains of the
same atoms with one bond more.
"""

from collections.abc import Iterator
from itertools import combinations

from rdkit import Chem, rdBase

from common.errors import reject

VALENCE = {"C": 4, "N": 3, "O": 2, "F": 1}
Graph = tuple[tuple[str, ...], tuple[tuple[int, int, int], ...]]  # Elements; (a, b, order).


def smiles(heavy: int) -> list[str]:
    """All molecules with so many heavy atoms, sorted: 9, 36, 175, 938, 5849 for 2 to 6.

    Raises:
      UserError: fewer than 2.
    """
    if heavy < 2:
        raise reject("prepare.heavy", heavy, "a number of heavy atoms from 2 on")
    chains: dict[str, Graph] = {"C": (("C",), ()), "N": (("N",), ()), "O": (("O",), ())}
    chains["F"] = (("F",), ())
    for _ in range(heavy - 1):
        grown = (g for chain in chains.values() for g in _grown(chain))
        chains = _distinct(grown)
    rings = _distinct(g for chain in chains.values() for g in _closed(chain))
    return sorted({*chains, *rings})


def _grown(graph: Graph) -> Iterator[Graph]:
    elements, bonds = graph
    for a in range(len(elements)):
        for new in VALENCE:
            for order in (1, 2, 3):
                made = ((*elements, new), (*bonds, (a, len(elements), order)))
                if _allowed(made):
                    yield made


def _closed(graph: Graph) -> Iterator[Graph]:
    elements, bonds = graph
    joined = {(a, b) for a, b, _ in bonds}
    for a, b in combinations(range(len(elements)), 2):
        if (a, b) in joined:
            continue
        inside = [order for *_, order in _between(bonds, a, b)]
        most = 1 if len(inside) < 4 else 2
        if max(inside) > most:
            continue
        for order in range(1, most + 1):
            made = (elements, (*bonds, (a, b, order)))
            if _allowed(made):
                yield made


def _allowed(graph: Graph) -> bool:
    elements, bonds = graph
    used, several = [0] * len(elements), [0] * len(elements)
    for a, b, order in bonds:
        if elements[a] != "C" and elements[b] != "C":
            return False
        for atom in (a, b):
            used[atom] += order
            several[atom] += order > 1
    return max(several, default=0) < 2 and all(
        u <= VALENCE[e] for u, e in zip(used, elements, strict=True)
    )


def _between(bonds, a: int, b: int) -> list[tuple[int, int, int]]:
    """The bonds of the chain from a to b."""
    ways = {a: []}
    pending = [a]
    while pending:
        at = pending.pop()
        for bond in bonds:
            other = bond[1] if bond[0] == at else bond[0] if bond[1] == at else None
            if other is not None and other not in ways:
                ways[other] = [*ways[at], bond]
                pending.append(other)
    return ways[b]


def _distinct(graphs: Iterator[Graph]) -> dict[str, Graph]:
    orders = {1: Chem.BondType.SINGLE, 2: Chem.BondType.DOUBLE, 3: Chem.BondType.TRIPLE}
    found: dict[str, Graph] = {}
    for elements, bonds in graphs:
        made = Chem.RWMol()
        for e in elements:
            made.AddAtom(Chem.Atom(e))
        for a, b, order in bonds:
            made.AddBond(a, b, orders[order])
        with rdBase.BlockLogs():
            Chem.SanitizeMol(made)
        found.setdefault(Chem.MolToSmiles(made), (elements, bonds))
    return found
