"""python main.py --config=configs/NAME.py[:SIZE] [--workdir=DIR] [--config.FIELD=VALUE]

Trains what the config says and ends in a report. The same command resumes a run that
was stopped. `--do=NAME` uses finished runs instead, `--input=...` gives it a file or a number.
"""

import sys
from pathlib import Path
from typing import NamedTuple

from common import config as configs
from common import runtime
from common.errors import UserError


class Flags(NamedTuple):
    """The command line, with the config's overrides still as text."""

    config: str
    workdir: str = ""
    do: str = ""
    input: str = ""
    overrides: tuple[tuple[str, str], ...] = ()


def parse(arguments: list[str]) -> Flags:
    """The flags, in the forms `--name=value` and `--name value`.

    Raises:
      UserError: a flag is unknown, stands twice or has no value.
    """
    found: dict[str, str] = {}
    overrides = []
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        name, equals, value = flag.removeprefix("--").partition("=")
        known = name in Flags._fields[:4] or name.startswith("config.")
        if not flag.startswith("--") or not known:
            raise UserError(
                f"Unknown argument {flag!r}; known are --config, --workdir, --do, "
                "--input and --config.FIELD=VALUE."
            )
        if not equals:
            if not rest:
                raise UserError(f"The flag {flag} needs a value: {flag}=...")
            value = rest.pop(0)
        if name.startswith("config."):
            overrides.append((name.removeprefix("config."), value))
        elif name in found:
            raise UserError(f"The flag --{name} stands twice.")
        else:
            found[name] = value
    if "config" not in found:
        raise UserError("Say what to run: --config=configs/NAME.py[:SIZE].")
    return Flags(**found, overrides=tuple(overrides))


def usage() -> str:
    """The docstring above and one line per config."""
    rows = [f"  {p!s:32} {configs.headline(p)}" for p in configs.listed()]
    return "\n".join([__doc__.strip(), "", "Configs:", *rows])


def default_workdir(flags: Flags) -> str:
    """`runs/NAME`, with the size where it is not the default one."""
    path, _, size = flags.config.partition(":")
    name = Path(path).stem
    return f"runs/{name}" if size in ("", "small") else f"runs/{name}_{size}"


def main(arguments: list[str]) -> int:
    """Runs one command. Returns the exit code: 0 done, 2 the user's input."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    try:
        flags = parse(arguments)
        config = configs.load(flags.config)
        for field, text in flags.overrides:
            configs.override(config, field, text)
        configs.check_heard(config, flags.overrides)
        runtime.start(config.x64)
        from common import runner  # Loads JAX.

        workdir = flags.workdir or default_workdir(flags)
        return runner.main(config, workdir, flags.do, flags.input, flags.overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
