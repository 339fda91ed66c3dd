"""How others name what our networks have: tensors in their files, settings in config.json."""

import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import UserError
from lm.model import Model
from lm.transformer import transformer


class Config(NamedTuple):
    """What a config.json says."""

    file: Path
    values: dict


class Layout(NamedTuple):
    """The files of one kind of model.

    Attributes:
      rest: path of our leaf -> name of their tensor.
      blocks: the same below `blocks`; `{}` in the name stands for the layer. Their layers
        are tensors of their own, ours are stacked along axis 0.
      model: fields -> the model; our kernels are [in, out], theirs [out, in].
      ours: their config -> fields; raises UserError where the model is none of ours.
      theirs: fields -> their config.
      harmless: (name, fields) -> whether a tensor may be passed over.
    """

    rest: dict[str, str]
    blocks: dict[str, str]
    model: Callable[..., Model]
    ours: Callable[[Config], dict]
    theirs: Callable[[dict], dict]
    harmless: Callable[[str, dict], bool]


class Tensor(NamedTuple):
    """One tensor of theirs: its name, our leaf, the layer in it, whether transposed."""

    name: str
    leaf: tuple[str, ...]
    layer: int | None
    transposed: bool


def tensors(layout: Layout, fields: dict) -> Iterator[Tensor]:
    """All tensors of a model of these fields, in their order."""
    for path, name in layout.rest.items():
        if path != "head/kernel" or not fields.get("tie", False):
            leaf = tuple(path.split("/"))
            yield Tensor(name, leaf, None, leaf[-1] == "kernel")
    for layer in range(fields["depth"]):
        for path, name in layout.blocks.items():
            leaf = ("blocks", *path.split("/"))
            yield Tensor(name.format(layer), leaf, layer, leaf[-1] == "kernel")


def field(fields: dict, name: str) -> Any:
    """A field, or what `transformer` takes where it is not given."""
    return fields.get(name, inspect.signature(transformer).parameters[name].default)


def wrong(config: Config, name: str, value: Any, allowed: str) -> UserError:
    """The error for a setting that has no place in ours."""
    return UserError(f"{config.file}: {name} is {value!r}, but must be {allowed}.")


def require(config: Config, required: dict[str, tuple]) -> None:
    """Refuses settings that change the function; where they are left out, the first holds."""
    for name, allowed in required.items():
        if config.values.get(name, allowed[0]) not in allowed:
            raise wrong(config, name, config.values[name], repr(allowed[0]))


def setting(
    config: Config, name: str, allowed: str, right: Callable[[Any], bool], *default: Any
) -> Any:
    """A setting of the right kind."""
    if name not in config.values and not default:
        raise UserError(f"{config.file} lacks {name}.")
    value = config.values.get(name, *default)
    if not right(value):
        raise wrong(config, name, value, allowed)
    return value


def whole(config: Config, name: str, *default: int) -> int:
    """A setting that is a whole number."""
    return setting(config, name, "a whole number", _is_whole, *default)


def maybe_whole(config: Config, name: str) -> int | None:
    """A setting that is a whole number, null or left out."""
    right = lambda value: value is None or _is_whole(value)
    return setting(config, name, "a whole number, or null", right, None)


def number(config: Config, name: str, *default: float) -> float:
    """A setting that is a finite number."""
    return float(setting(config, name, "a finite number", _is_number, *default))


def flag(config: Config, name: str, *default: bool) -> bool:
    """A setting that is true or false."""
    return setting(config, name, "true or false", lambda v: isinstance(v, bool), *default)


def checked(config: Config, model: Callable[..., Model], fields: dict) -> dict:
    """The fields, if there is such a model."""
    try:
        model(**fields)
    except UserError as error:
        raise UserError(f"{config.file}: {error}") from error
    return fields


def _is_whole(value: Any) -> bool:
    """An integer that the axis of an array may have; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31


def _is_number(value: Any) -> bool:
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return real and abs(value) <= sys.float_info.max  # JSON's integers have no end.
