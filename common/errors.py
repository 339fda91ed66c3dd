"""The exceptions for mistakes a user can mend: one sentence, exit code 2."""

from typing import Any


class UserError(Exception):
    """The user's input cannot be used. `main` prints the sentence and exits with 2."""


class Unfit(UserError):
    """An action's input is for other runs of the workdir, which may be there, too."""


def reject(field: str, value: Any, allowed: str) -> UserError:
    """The error for a config field that holds what it must not.

    Args:
      field: dotted name below `config`, for instance `model.n_up`.
      value: what the user gave.
      allowed: what may stand there, for instance `a whole number from 0 to 8`.
    """
    return UserError(f"config.{field} is {value!r}, but must be {allowed}.")
