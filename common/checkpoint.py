"""Checkpoints by Orbax: saved whole or not at all, checked when read, on any mesh."""

import errno
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from common import mesh as meshes
from common.errors import UserError

FULL = ("No space left", "quota exceeded", "File too large", "Read-only file system")
ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
UNREADABLE = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)
# What Orbax and TensorStore raise for files that are missing, torn or not theirs.
DAMAGE = (OSError, LookupError, ValueError, TypeError, EOFError, MemoryError)


class Checkpoints:
    """The checkpoints of one run. A context manager: leaving waits for the disk.

    Args:
      folder: made if absent; holds one subfolder per step.
      keep: how many of the newest stay; 0 to only read. A writer removes what a killed
        one left half written, so there may be only one; a reader touches nothing.
    """

    def __init__(self, folder: Path, keep: int = 1):
        self.folder = folder.absolute()
        policies = ocp.training.preservation_policies
        self._manager = ocp.training.Checkpointer(
            self.folder,
            preservation_policy=policies.LatestN(keep) if keep else policies.PreserveAll(),
            cleanup_tmp_directories=keep > 0,
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self) -> None:
        with _disk(self.folder):
            self._manager.close()

    def steps(self) -> list[int]:
        """The steps that can be restored, ascending."""
        return [c.step for c in self._manager.checkpoints]

    def save(self, step: int, state: Any) -> None:
        """Copies `state` and writes it in the background."""
        with _disk(self.folder):
            self._manager.wait()  # A failed write is reported here, not lost.
            mark = {"digest": int(digest(state)), "shapes": described(state)}
            self._manager.save_async(step, state, force=True, custom_metadata=mark)

    def wait(self) -> None:
        with _disk(self.folder):
            self._manager.wait()

    def restore(self, step: int, shapes: Any) -> Any:
        """The state at a step.

        Args:
          step: one of `steps()`.
          shapes: `ShapeDtypeStruct`s with today's shardings, as `mesh.place` makes.

        Raises:
          UserError: the checkpoint belongs to another model, is damaged, or cannot be
            read at all; the sentence says what to do.
        """
        try:
            mark = self._manager.metadata(step).custom_metadata
            saved, expected = mark["shapes"], mark["digest"]
        except DAMAGE as error:
            raise self._unusable(step, error) from error
        _compare(saved, described(shapes), self.folder / str(step))
        try:
            state = self._manager.load(step, shapes)
        except DAMAGE as error:
            raise self._unusable(step, error) from error
        if int(digest(state)) != expected:
            raise self._damaged(step, "its contents do not match its digest")
        return state

    def _unusable(self, step: int, error: Exception) -> UserError:
        """What a failed read means: damage, or a disk that cannot be read. No memory is
        neither, and raised again."""
        for each in _chain(error):
            if isinstance(each, MemoryError) or "RESOURCE_EXHAUSTED" in str(each):
                raise error
            for number in UNREADABLE:
                reason = os.strerror(number)
                # TensorStore has the reason in its text only.
                if getattr(each, "errno", None) == number or reason in str(each):
                    return UserError(f"Cannot read {self.folder / str(step)}: {reason}.")
        return self._damaged(step, error)

    def _damaged(self, step: int, why: Any) -> UserError:
        older = [s for s in self.steps() if s < step]
        where = f"step {older[-1]}" if older else "the beginning"
        reason = str(why).strip().partition("\n")[0][:120] or type(why).__name__
        return UserError(
            f"The checkpoint {self.folder / str(step)} is damaged ({reason}); "
            f"delete that folder to continue from {where}."
        )


@jax.jit
def digest(tree: Any) -> jax.Array:
    """A uint32 that changes when a bit of the tree does, on any mesh the same.

    Sums the 32-bit words, each times an odd number that depends on its place, modulo
    2^32. Integer sums do not depend on their order, hence not on the placement.
    """
    total = jnp.uint32(0)
    for i, leaf in enumerate(jax.tree.leaves(tree)):
        words = _words(leaf)
        place = jax.lax.iota(jnp.uint32, words.size).reshape(words.shape)
        weighted = jnp.sum(words * (2 * place + 1), dtype=jnp.uint32)
        total = total + weighted * jnp.uint32(2 * i + 1)
    return total


def _words(leaf: jax.Array) -> jax.Array:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    size = leaf.dtype.itemsize
    if leaf.dtype == bool:
        return leaf.astype(jnp.uint32)
    if size >= 4:
        return jax.lax.bitcast_convert_type(leaf, jnp.uint32)
    small = jnp.uint8 if size == 1 else jnp.uint16
    return jax.lax.bitcast_convert_type(leaf, small).astype(jnp.uint32)


def described(tree: Any) -> dict[str, str]:
    """Path -> shape and dtype."""
    return {
        path: f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in zip(meshes.paths(tree), jax.tree.leaves(tree), strict=True)
    }


def _compare(saved: dict, wanted: dict, folder: Path) -> None:
    differing = [
        f"{k} is {saved.get(k, 'absent')} there and {wanted.get(k, 'absent')} here"
        for k in sorted({*saved, *wanted})
        if saved.get(k) != wanted.get(k)
    ]
    if differing:
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise UserError(
            f"The checkpoint {folder} was made by another model: {differing[0]}{more}."
        )


class _disk:
    """Turns what a full or read-only disk makes libraries raise into one sentence."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        reason = disk_error(error)
        if reason:
            raise UserError(
                f"Cannot write to {self.folder}: {reason}. The checkpoints before are "
                "intact; mend this and run the same command again."
            ) from error
        return False


def disk_error(error: BaseException | None) -> str | None:
    """What is wrong with the disk, if that is what an exception is about."""
    for each in _chain(error):
        if isinstance(each, OSError) and each.errno in ERRNOS:
            return each.strerror
        for sign in FULL:
            if sign.lower() in str(each).lower():
                return sign
    return None


def _chain(error: BaseException | None) -> list[BaseException]:
    """An exception, what caused it, what caused that."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found
