"""metrics.jsonl: one row per step and split, exact on resume."""

import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from common.errors import UserError


def read(path: Path) -> list[dict]:
    """The rows of a metrics file; a last line torn by a kill does not count.

    Raises:
      UserError: another line is no row, or the file cannot be read.
    """
    if not path.exists():
        return []
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    rows: list[dict] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            whole = isinstance(row, dict) and {"step", "split"} <= row.keys()
        except ValueError:  # UnicodeDecodeError is one.
            whole = False
        if whole and line.endswith(b"\n"):
            rows.append(row)
        elif number < len(lines) or line.endswith(b"\n"):
            raise UserError(
                f"The file {path} is damaged: line {number} is no row of metrics. Delete the "
                "line to go on without it."
            )
    return rows


def select(rows: list[dict], name: str, split: str = "train") -> tuple[Any, Any]:
    """Steps and values of one metric, as arrays."""
    found = [(r["step"], r[name]) for r in rows if r["split"] == split and name in r]
    return np.array([s for s, _ in found]), np.array([v for _, v in found])


def to_row(step: int, split: str, metrics: dict) -> dict:
    """Arrays fetched to the host as plain numbers and nested lists."""
    values = {k: np.asarray(v).tolist() for k, v in jax.device_get(metrics).items()}
    return {"step": step, "split": split, **values}


def first_bad(row: dict) -> str | None:
    """The name of a metric that is not finite, if there is one."""
    for name, value in row.items():
        if name not in ("step", "split") and not np.all(np.isfinite(value)):
            return name
    return None


class Log:
    """Appends rows to a file, on the first process only.

    Rows after `step`, left by a run that was killed, are dropped, so that no step
    stands twice. No wall-clock time goes in: a resumed file equals an undisturbed one.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        self.rows = [r for r in read(path) if r["step"] <= step]
        self._file = None
        if jax.process_index() == 0:
            write(path, "".join(_line(r) for r in self.rows))
            self._file = path.open("a")

    def append(self, row: dict) -> None:
        self.rows.append(row)
        if self._file:
            self._file.write(_line(row))
            self._file.flush()

    def sync(self) -> None:
        """Returns when the rows are on the disk; called before each checkpoint."""
        if self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file:
            self._file.close()


def write(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"Cannot write {path}: {error.strerror}.") from error


def _line(row: dict) -> str:
    return json.dumps(row) + "\n"
