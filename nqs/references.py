"""Energies per site that others have published, each with all that identifies it."""

from typing import NamedTuple

from nqs.lattice import Hubbard


class Reference(NamedTuple):
    """E/N in units of t."""

    energy_per_site: float
    source: str
    error: float | None = None
    exact: bool = False


ED = "exact diagonalisation"
VARBENCH = "exact diagonalisation, VarBench (Wu et al., Science 386, 296)"
AFQMC = "AFQMC (Qin, Shi, Zhang, Phys. Rev. B 94, 085103)"
PAPER = "Gu et al., arXiv:2507.02644"
HFPS = "HFPS (arXiv:2507.10705)"
HIERARCHICAL = "hierarchical backflow (arXiv:2606.00924)"
HFDS = "HFDS (arXiv:2111.10420)"
ACE = "ACE (arXiv:2604.25775)"
NNBF = "NNBF, 32 determinants (arXiv:2510.26906)"
FPEPS = "fPEPS, D >= 20 (Liu et al., Phys. Rev. Lett. 134, 256502)"

# (shape, boundary, electrons, U, t') -> references; shape and boundary by axis.
_P, _O = ("periodic",) * 2, ("open",) * 2
_DOPED = 8.0, 0.0
TABLE: dict[tuple, list[Reference]] = {
    ((4, 4), _P, (8, 8), 8.0, 0.0): [Reference(-0.529304688, ED, exact=True)],
    ((4, 4), _P, (8, 8), 4.0, 0.0): [Reference(-0.851365926, ED, exact=True)],
    ((4, 4), _P, (7, 7), 8.0, 0.0): [
        Reference(-0.741802223, ED, exact=True),
        Reference(-0.74177, HFPS, 5e-5),
        Reference(-0.7410, HIERARCHICAL, 3e-4),
    ],
    ((4, 4), _P, (7, 7), 8.0, -0.2): [Reference(-0.756155419, ED, exact=True)],
    ((4, 4), _P, (7, 7), 4.0, 0.0): [Reference(-0.984036776, ED, exact=True)],
    **{
        ((4, 4), _P, electrons, u, 0.0): [Reference(e, VARBENCH, exact=True)]
        for electrons, rows in {
            (5, 5): {
                2.0: -1.336059437,
                4.0: -1.223808595,
                6.0: -1.147397817,
                8.0: -1.094397918,
                10.0: -1.056472499,
            },
            (4, 4): {2.0: -1.155964789, 4.0: -1.095931112, 8.0: -1.028789172},
        }.items()
        for u, e in rows.items()
    },
    # Half filling: AFQMC has no sign problem and is exact within its error.
    ((8, 8), _P, (32, 32), *_DOPED): [
        Reference(-0.5262, AFQMC, 5e-4),
        Reference(-0.52582, PAPER),
    ],
    ((10, 10), _P, (50, 50), *_DOPED): [
        Reference(-0.5254, AFQMC, 3e-4),
        Reference(-0.52492, PAPER),
    ],
    ((12, 12), _P, (72, 72), *_DOPED): [
        Reference(-0.5246, AFQMC, 1e-4),
        Reference(-0.52440, PAPER),
    ],
    # One eighth doping, open.
    **{
        (shape, _O, (n, n), *_DOPED): [
            Reference(paper, PAPER),
            Reference(fpeps, FPEPS),
            *([Reference(dmrg, f"DMRG, in {PAPER}")] if dmrg else []),
        ]
        for shape, n, fpeps, dmrg, paper in [
            ((16, 4), 28, -0.68304, -0.68537, -0.68325),
            ((16, 6), 42, -0.7008, -0.70550, -0.70307),
            ((8, 8), 28, -0.69928, -0.69840, -0.69952),
            ((16, 8), 56, -0.7122, -0.71250, -0.71309),
            ((16, 12), 84, -0.7202, None, -0.72212),
            ((16, 16), 112, -0.7260, None, -0.72747),
        ]
    },
    # One eighth doping, periodic.
    ((8, 4), _P, (14, 14), *_DOPED): [
        Reference(-0.76690, HFPS, 1e-5),
        Reference(-0.7641, HIERARCHICAL, 3e-4),
        Reference(-0.76331, HFDS, 6e-5),
    ],
    ((16, 4), _P, (28, 28), *_DOPED): [
        Reference(-0.76298, PAPER),
        Reference(-0.76623, f"{ACE}, all symmetries", 1e-5),
        Reference(-0.76486, NNBF, 2e-5),
        Reference(-0.76464, ACE, 1e-5),
        Reference(-0.76413, HFPS, 3e-5),
    ],
    ((8, 8), _P, (28, 28), *_DOPED): [
        Reference(-0.7532, PAPER),
        Reference(-0.7469, "VAFQMC (Sorella, arXiv:2101.07045)", 2e-4),
    ],
    ((16, 8), _P, (56, 56), *_DOPED): [Reference(-0.7568, PAPER)],
    ((12, 12), _P, (63, 63), *_DOPED): [Reference(-0.7567, PAPER)],
    ((16, 12), _P, (84, 84), *_DOPED): [Reference(-0.7562, PAPER)],
    ((16, 16), _P, (112, 112), *_DOPED): [
        Reference(-0.7563, f"{PAPER}, as quoted by arXiv:2604.25775"),
        Reference(-0.7573, ACE),
        Reference(-0.7515, f"{HFPS}, with symmetry", 1e-4),
        Reference(-0.75865, "VAFQMC, stripe", 3e-5),
    ],
    # One eighth doping, t' = -0.2, periodic.
    **{
        (shape, _P, (n, n), 8.0, -0.2): [Reference(e, PAPER)]
        for shape, n, e in [
            ((8, 8), 28, -0.7447),
            ((10, 8), 35, -0.7427),
            ((12, 8), 42, -0.7456),
            ((18, 8), 63, -0.7421),
            ((20, 8), 70, -0.7433),
            ((24, 8), 84, -0.7423),
            ((12, 12), 63, -0.7414),
            ((16, 10), 70, -0.7434),
            ((16, 12), 84, -0.7440),
        ]
    },
}


def lookup(h: Hubbard) -> list[Reference]:
    """What is published for exactly this cluster, with axes or spins exchanged or not."""
    if h.t != 1 or h.field.any():
        return []
    found = []
    for turn in (slice(None), slice(None, None, -1)):
        for electrons in {(h.n_up, h.n_dn), (h.n_dn, h.n_up)}:
            key = (h.shape[turn], h.boundary[turn], electrons, h.U, h.tp)
            found += [r for r in TABLE.get(key, []) if r not in found]
    return found
