"""Config files, command-line overrides and their mistakes. Never loads JAX."""

import ast
import difflib
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from common.errors import UserError

# What a resumed run may change: how long and how often, never what is computed.
MUTABLE = ("steps", "log_every", "eval_every", "save_every", "keep", "n_seeds", "mesh")


def load(spec: str) -> ConfigDict:
    """The locked config of `configs/NAME.py` or `configs/NAME.py:SIZE`.

    Raises:
      UserError: no such file, no `get_config`, or no such size.
    """
    path, _, size = spec.partition(":")
    if not Path(path).is_file():
        near = difflib.get_close_matches(path, map(str, listed()), n=1)
        hint = f" Did you mean {near[0]}?" if near else f" Known: {_names()}."
        raise UserError(f"There is no config file {path!r}.{hint}")
    source = importlib.util.spec_from_file_location(f"config_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(source) if source else None
    if module is None or Path(path).suffix != ".py":
        raise UserError(f"The config {path!r} is not a Python file.")
    source.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"The config {path!r} has no function get_config(size).")
    try:
        return module.get_config(size) if size else module.get_config()
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def listed(folder: str = "configs") -> list[Path]:
    """The config files, `base.py` apart, in alphabetical order."""
    return sorted(p for p in Path(folder).glob("*.py") if p.stem not in ("base",))


def headline(path: Path) -> str:
    """The first line of a config file's docstring: what it runs."""
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    return docstring.partition("\n")[0]


def override(config: ConfigDict, field: str, text: str) -> None:
    """Sets `config.field` from the text of a flag, in place.

    Args:
      field: dotted name, for instance `optim.damping`.
      text: a Python literal; a string needs no quotes.

    Raises:
      UserError: there is no such field, or the value has another type.
    """
    *parents, name = field.split(".")
    node = config
    for i, part in enumerate(parents):
        node = _child(node, part, parents[:i])
        if not isinstance(node, ConfigDict):
            raise UserError(
                f"config.{'.'.join(parents[: i + 1])} is a plain value and has no "
                f"field {field.split('.')[i + 1]!r}."
            )
    old = _child(node, name, parents)
    if field == "size":
        raise UserError(
            "config.size cannot be set: say the size after the colon, "
            f"--config=configs/NAME.py:{text}."
        )
    if isinstance(old, ConfigDict):
        fields = f"set one of its fields: {', '.join(old)}"
        way = fields if old else "it is empty here and filled in the config file only"
        raise UserError(f"config.{field} is a group; {way}.")
    with node.ignore_type():
        node[name] = _typed(field, text, old)


def apply(config: ConfigDict, changes: Any, prefix: str = "") -> None:
    """Merges nested `changes` (a variant of `runs`) into `config`, in place.

    Raises:
      UserError: as `override` does.
    """
    for name, value in changes.items():
        field = f"{prefix}{name}"
        if isinstance(value, ConfigDict | dict):
            _child_at(config, field)
            apply(config, value, f"{field}.")
        else:
            override(config, field, value if isinstance(value, str) else repr(value))


def check_heard(config: ConfigDict, overrides: tuple[tuple[str, str], ...]) -> None:
    """Refuses a flag that changes nothing, as every variant of `runs` sets the field itself.

    Raises:
      UserError: there is such a flag.
    """
    variants = [flat(changes.to_dict()) for changes in config.runs.values()]
    for field, _ in overrides:
        if variants and all(field in changes for changes in variants):
            name = next(iter(config.runs))
            raise UserError(
                f"config.{field} has no effect, as every run sets it: set "
                f"config.runs.{name}.{field}, and so on for each."
            )


def read(path: Path) -> dict:
    """The fields in a workdir's `config.json`.

    Raises:
      UserError: it cannot be read, or holds something else.
    """
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"The file {path} is damaged: {error}.") from error
    if not isinstance(found, dict):
        raise UserError(f"The file {path} is damaged: it holds no fields.")
    return found


def differences(new: ConfigDict, old: dict) -> list[str]:
    """What a workdir's config has otherwise, `MUTABLE` fields apart, in words."""
    ours, theirs = flat(to_dict(new)), flat(old)
    kept = [k for k in {**ours, **theirs} if k.partition(".")[0] not in MUTABLE]
    return [
        f"{k} is {ours.get(k, 'absent')!r} here and {theirs.get(k, 'absent')!r} there"
        for k in kept
        if ours.get(k, "absent") != theirs.get(k, "absent")
    ]


def to_dict(config: ConfigDict) -> dict:
    """The config as JSON would hold it: tuples are lists."""
    return json.loads(json.dumps(config.to_dict()))


def restore(config: ConfigDict, saved: dict) -> ConfigDict:
    """A copy of `config` with the values of a workdir's `config.json`."""
    copy = ConfigDict(config.to_dict())
    for field, value in flat(saved).items():
        if field.startswith("runs."):
            continue
        *parents, name = field.split(".")
        node = copy
        for part in parents:
            node = _child(node, part, parents)
        old = _child(node, name, parents)
        with node.ignore_type():
            node[name] = tuple(value) if isinstance(old, tuple) else value
    copy.runs = ConfigDict(saved.get("runs", {}))
    copy.lock()
    return copy


def flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Nested dict -> dotted names."""
    leaves = {}
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            leaves |= flat(value, f"{prefix}{name}.")
        elif not isinstance(value, dict):
            leaves[f"{prefix}{name}"] = value
    return leaves


def _child_at(config: ConfigDict, field: str) -> Any:
    node = config
    parts = field.split(".")
    for i, part in enumerate(parts):
        node = _child(node, part, parts[:i])
    return node


def _child(node: ConfigDict, name: str, parents: list[str]) -> Any:
    if name in node:
        return node[name]
    where = ".".join(["config", *parents])
    near = difflib.get_close_matches(name, list(node), n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else f" It has {', '.join(node)}."
    raise UserError(f"{where} has no field {name!r}.{hint}")


def _typed(field: str, text: str, old: Any) -> Any:
    if isinstance(old, str):
        quoted = re.fullmatch(r"(['\"])(.*)\1", text)
        return quoted[2] if quoted else text
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        # Python has no literals for these two; the experiment says if they may be.
        value = float(text) if re.fullmatch(r"[+-]?(nan|inf)", text) else text
    if isinstance(old, tuple) and isinstance(value, list):
        value = tuple(value)
    if type(old) is float and type(value) is int:
        value = float(value)
    if type(value) is not type(old):
        kinds = {int: "a whole number", float: "a number", bool: "True or False"}
        kind = kinds.get(type(old), f"a {type(old).__name__}")
        raise UserError(f"config.{field} is {text!r}, but must be {kind}.")
    return value


def _names() -> str:
    return ", ".join(map(str, listed()))
