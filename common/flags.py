"""Flags `--name=value` of commands other than `main.py`, checked in one sentence each."""

from collections.abc import Sequence
from typing import Any

from common.errors import UserError


def parse(
    arguments: Sequence[str],
    known: Sequence[str],
    required: Sequence[str],
    whole: dict[str, int],
) -> dict[str, Any]:
    """The flags that are there.

    Args:
      known: names of all flags.
      required: those that must be there.
      whole: those that are whole numbers, with the least one allowed.

    Raises:
      UserError: a flag is unknown, missing, stands twice or has no proper value.
    """
    found: dict[str, Any] = {}
    for argument in arguments:
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or name not in known or not (equals and value):
            listed = ", ".join(f"--{n}=..." for n in known)
            raise UserError(f"Unknown argument {argument!r}; known are {listed}.")
        if name in found:
            raise UserError(f"The flag --{name} stands twice.")
        found[name] = value
    for name in required:
        if name not in found:
            raise UserError(f"The flag --{name}=... is missing.")
    for name, least in whole.items():
        if name not in found:
            continue
        text = found[name]
        if not text.isascii() or not text.isdigit() or int(text) < least:
            raise UserError(
                f"--{name} is {text!r}, but must be a whole number of at least {least}."
            )
        found[name] = int(text)
    return found
