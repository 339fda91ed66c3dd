"""Makes sets of pairs, start and target, for training.

    python -m geometry.prepare --method=gfn2 --out=data/relax.npz --heavy=6 --count=2000
    python -m geometry.prepare --method=mmff94 --out=data/mine.npz --source=mine.smi
    python -m geometry.prepare --method=slabs --out=data/slabs.npz --count=1000
    python -m geometry.prepare --method=qm9 --out=data/qm9.npz --source=raw/qm9
    python -m geometry.prepare --method=molecule3d --out=data/train --source=raw/molecule3d \\
        --split=random --part=train

    --method   mmff94, gfn2: conformer and the minimum that the force field or GFN2-xTB (extra
               `xtb`) relaxes it to, with the path; slabs, clusters: see geometry/data/slabs.py;
               qm9, molecule3d: conformer and DFT minimum; oc22: an LMDB (extra `oc22`)
    --out      a packed set NAME.npz, or a folder that keeps the pieces, for sets larger than
               the memory
    --source   SMILES list (mmff94, gfn2), folder of the raw files, or .lmdb; without one
               mmff94 and gfn2 take all small molecules of geometry/data/enumeration.py
    --heavy    of those, up to so many heavy atoms (6)
    --count    of molecules to try (0: all; slabs and clusters: 1000)
    --seed     of conformers, choice and places (1000003)
    --split, --part   of molecule3d: random or scaffold; train, valid or test
    --workers  processes at once (1)

Stopped by whatever, the same command goes on at the first piece that is missing, and what it
leaves is bitwise what an undisturbed run leaves, whatever the number of workers: each pair
depends on its number and the seed only.
"""

import json
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import flags, metrics
from common.errors import UserError
from common.progress import Progress
from geometry.data import packed
from geometry.records import Record

METHODS = ("mmff94", "gfn2", "slabs", "clusters", "qm9", "molecule3d", "oc22")
LARGE = ("qm9", "molecule3d")
PIECE, LARGE_PIECE = 64, 4096  # Molecules between two savings.


class Flags(NamedTuple):
    """The command line."""

    method: str
    out: str
    source: str = ""
    heavy: int = 6
    count: int = 0
    seed: int = 1_000_003
    split: str = "random"
    part: str = "train"
    workers: int = 1


class Job(NamedTuple):
    """A piece: molecules `first` to `first + len(names)`; names are SMILES or empty."""

    flags: Flags
    folder: str
    first: int
    names: tuple[str, ...]


def parse(arguments: list[str]) -> Flags:
    """The flags, in the form `--name=value`.

    Raises:
      UserError: a flag is unknown, missing, stands twice or has no proper value.
    """
    found = flags.parse(
        arguments, Flags._fields, ("method", "out"), dict(heavy=2, count=0, seed=0, workers=1)
    )
    for name, allowed in (
        ("method", METHODS),
        ("split", ("random", "scaffold")),
        ("part", ("train", "valid", "test")),
    ):
        if name in found and found[name] not in allowed:
            raise UserError(
                f"--{name} is {found[name]!r}, but must be one of {', '.join(allowed)}."
            )
    made = Flags(**found)
    if made.method in ("qm9", "molecule3d", "oc22") and not made.source:
        raise UserError(f"The method {made.method} needs --source=..., the raw files.")
    return made


def main(arguments: list[str]) -> int:
    """Runs the command. Returns the exit code: 0 done, 2 the user's input, 130 Ctrl-C."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0
    try:
        print(prepare(parse(arguments)))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped; the same command goes on from the last piece.", file=sys.stderr)
        return 130
    return 0


def prepare(flags: Flags) -> str:
    """Makes the set, or goes on with it.

    Returns:
      One line that says what is there now.

    Raises:
      UserError: see the module; also an output that is there already, or was begun with
        other flags.
    """
    out = Path(flags.out)
    single = out.suffix == ".npz"
    pieces = out.with_name(f"{out.name}.pieces") if single else out
    if single and out.exists() and not pieces.exists():
        raise UserError(f"{out} is there already; delete it or choose another --out.")
    if flags.method == "oc22":
        return _oc22(flags, out)
    jobs = _jobs(flags, str(pieces))
    try:
        pieces.mkdir(parents=True, exist_ok=True)
        _agree(pieces, flags, jobs)
        _work(jobs, flags, out.name)
        rejected: Counter = Counter()
        for job in jobs:
            rejected.update(json.loads(_done(job).read_text()))
        made = rejected.pop("made", 0)
        if not made:
            reasons = "; ".join(f"{n}: {reason}" for reason, n in rejected.most_common(3))
            raise UserError(f"No pair was made. {reasons}")
        if single:
            records = list(packed.stream(pieces))
            packed.write(out, records)
            shutil.rmtree(pieces)
    except OSError as error:
        raise UserError(f"Cannot write {out}: {error.strerror}.") from error
    left = sum(rejected.values())
    reasons = "; ".join(f"{n}: {reason}" for reason, n in rejected.most_common(5))
    return f"{out}: {made} pairs" + (f", {left} left out ({reasons})" if left else "")


def piece(job: Job) -> None:
    """Makes the pairs of a piece and writes them; the count of them, last, marks it done."""
    from threadpoolctl import threadpool_limits

    records, rejected = [], Counter()
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for made in _made(job):
            if isinstance(made, Record):
                records.append(made)
            else:
                rejected[made] += 1
    lost = len(job.names) - len(records) - rejected.total()
    if lost:
        rejected["it cannot be read or embedded, or is to be dropped"] = lost
    path = _done(job)
    if records:
        packed.write(path.with_suffix(".npz"), records)
    metrics.write(path, json.dumps({"made": len(records), **rejected}) + "\n")


def _made(job: Job) -> Iterator[Record | str]:
    """Pairs of a piece, and reasons why there is none."""
    from geometry.data import generate, molecule3d, qm9, slabs

    flags, first = job.flags, job.first
    if flags.method == "qm9":
        return qm9.read(flags.source, flags.seed, first, len(job.names))
    if flags.method == "molecule3d":
        return molecule3d.read(
            flags.source, flags.split, flags.part, flags.seed, first, len(job.names)
        )
    numbers = range(first, first + len(job.names))
    if flags.method == "slabs":
        return (slabs.slab(k, flags.seed) for k in numbers)
    if flags.method == "clusters":
        return (slabs.cluster(k, flags.seed) for k in numbers)
    return (
        generate.pair(name, k, flags.method, flags.seed)
        for k, name in zip(numbers, job.names, strict=True)
    )


def _jobs(flags: Flags, folder: str) -> list[Job]:
    names, size = _names(flags), LARGE_PIECE if flags.method in LARGE else PIECE
    return [
        Job(flags, folder, k, tuple(names[k : k + size])) for k in range(0, len(names), size)
    ]


def _names(flags: Flags) -> list[str]:
    """One per pair to try: its SMILES, or nothing where the number says it all."""
    if flags.method in ("slabs", "clusters"):
        return [""] * (flags.count or 1000)
    if flags.method in ("mmff94", "gfn2"):
        from geometry.data import enumeration

        if flags.source:
            found = _listed(flags.source)
        else:
            found = [s for k in range(2, flags.heavy + 1) for s in enumeration.smiles(k)]
            order = np.random.default_rng(flags.seed).permutation(len(found))
            found = [found[k] for k in order]
        return found[: flags.count or None]
    if flags.method == "qm9":
        from geometry.data import qm9

        total = qm9.entries(flags.source)
    else:
        from geometry.data import molecule3d

        total = len(molecule3d.split(flags.source, flags.split, flags.part))
        molecule3d.shards(flags.source)  # Indexed once, before the workers start.
    return [""] * (min(total, flags.count) if flags.count else total)


def _listed(path: str) -> list[str]:
    from geometry.data import molecules

    try:
        lines = Path(path).read_text().splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    found = [line.split()[0] for line in lines if line.strip() and line[0] != "#"]
    for smiles in found:
        molecules.parsed(smiles)
    if not found:
        raise UserError(f"The file {path} holds no SMILES.")
    return found


def _agree(folder: Path, flags: Flags, jobs: list[Job]) -> None:
    """Pieces of another command must not be mixed in."""
    mine = flags._replace(out="", workers=1)._asdict()
    mine["tried"] = sum(len(job.names) for job in jobs)
    path = folder / "flags.json"
    if path.exists():
        found = json.loads(path.read_text())
        for name, value in mine.items():
            if found.get(name) != value:
                raise UserError(
                    f"{folder} was begun with another {name}: {found.get(name)!r}, not "
                    f"{value!r}; delete it or choose another --out."
                )
    elif any(folder.iterdir()):
        raise UserError(f"The folder {folder} is not empty and holds no set.")
    else:
        metrics.write(path, json.dumps(mine) + "\n")


def _work(jobs: list[Job], flags: Flags, name: str) -> None:
    left = [job for job in jobs if not _done(job).exists()]
    progress = Progress(name, len(jobs) - len(left), len(jobs))
    done, said = progress.done, f"{len(jobs[0].names)} molecules a step"
    try:
        if flags.workers == 1:
            for job in left:
                piece(job)
                done += 1
                progress.step(done)
                progress.show(said)
            return
        context = get_context("spawn")
        with ProcessPoolExecutor(flags.workers, mp_context=context) as pool:
            for result in as_completed([pool.submit(piece, job) for job in left]):
                result.result()
                done += 1
                progress.step(done)
                progress.show(said)
    finally:
        progress.close()


def _done(job: Job) -> Path:
    return Path(job.folder) / f"piece-{job.first:08d}.json"


def _oc22(flags: Flags, out: Path) -> str:
    from geometry.data import oc22

    number = oc22.convert(flags.source, out, ("train", "valid", "test").index(flags.part))
    return f"{out}: {number} structures"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
