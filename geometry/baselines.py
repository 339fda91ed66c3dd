"""What a bridge is compared with: nothing at all, and a force field."""

from collections.abc import Sequence

import numpy as np

from common.errors import reject
from geometry import evaluation, metrics
from geometry.records import Record

BASELINES = ("identity", "mmff94")


def rows(config, records: Sequence[Record]) -> dict[str, dict]:
    """Metrics of each of `config.eval.baselines`, over all of the records.

    Raises:
      UserError: an unknown name.
    """
    found = [metrics.symmetries(record) for record in records]
    made = {}
    for name in config.eval.baselines:
        if name not in BASELINES:
            raise reject("eval.baselines", name, f"some of {', '.join(BASELINES)}")
        if name == "mmff94" and any(r.pbc.any() or not len(r.bonds) for r in records):
            continue  # A force field of molecules.
        x = [r.start if name == "identity" else mmff94(r) for r in records]
        title = {"identity": "start, unchanged", "mmff94": "start, relaxed by MMFF94"}[name]
        made[title] = evaluation.scored(config, list(records), x, found)
    return made


def mmff94(record: Record) -> np.ndarray:
    """The start relaxed by RDKit's MMFF94; itself where it has no parameters."""
    from geometry.data import molecules

    molecule = molecules.to_rdkit(record, record.start)
    found = molecules.mmff94(molecule, 2000)
    return record.start if found is None else np.asarray(found, float)
