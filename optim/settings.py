"""Settings of `alphadecay` and what they may be.

They are checked when a transformation is built. An error names the field below
`config.optim.alphadecay`; weight_decay and decay_rest stand one higher, in `config.optim`.
"""

from typing import Any, NamedTuple

import numpy as np

from common.errors import reject
from optim import assignment as assign
from optim import exponents, scores, spectra

CORRECTIONS = ("none", "mp", "subsample")
MOST = 2**31 - 1  # Steps are counted in int32.


class Settings(NamedTuple):
    """The arguments of `alphadecay`, which explains them, but for weight_decay."""

    modules: Any
    s1: Any = 0.67
    s2: Any = 3.0
    every: Any = 500
    offset: Any = 0
    decay_rest: Any = "base"
    min_eigs: Any = 50
    exclude: Any = ()
    fit: Any = "median"
    tail: Any = 0.5
    reference: Any = "mle"
    assignment: Any = "linear"
    score: Any = "alpha"
    method: Any = "auto"
    refresh: Any = "inline"
    quantiles: Any = (0.0, 1.0)
    normalize_mean: Any = False
    ema: Any = 0.0
    shape_correction: Any = "none"
    slip: Any = False


def settings(modules: Any, **given) -> Settings:
    """The settings `given` and the defaults of the others, checked.

    Raises:
      UserError: one has an unknown name or is out of range.
    """
    names = Settings._fields[1:]
    for name in given:
        if name not in names:
            raise reject("optim.alphadecay", name, f"settings named {', '.join(names)}")
    return checked(Settings(modules, **given))


def checked(s: Settings) -> Settings:
    """The settings, if all are in range."""
    assign.check_ends(s.s1, s.s2)
    for name, least, most in (("every", 1, MOST), ("offset", 0, MOST), ("min_eigs", 3, MOST)):
        value = getattr(s, name)
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        allowed = f"a whole number from {least} up"
        if whole and value > most:
            allowed = f"a whole number from {least} to {most}"
        require(name, value, whole and least <= value <= most, allowed)
    require("tail", s.tail, _real(s.tail) and 0 < s.tail < 1, "between 0 and 1")
    require("ema", s.ema, _real(s.ema) and 0 <= s.ema < 1, "at least 0 and below 1")
    ends = s.quantiles if isinstance(s.quantiles, tuple | list) else ()
    two = len(ends) == 2 and all(map(_real, ends)) and 0 <= ends[0] < ends[1] <= 1
    require("quantiles", s.quantiles, two, "two shares, ascending, from 0 to 1")
    several = isinstance(s.exclude, tuple | list) and all(type(a) is str for a in s.exclude)
    require("exclude", s.exclude, several, "a tuple of names of modules")
    for name in ("normalize_mean", "slip"):
        value = getattr(s, name)
        require(name, value, isinstance(value, bool | np.bool_), "True or False")
    choices = dict(
        fit=exponents.FITS,
        reference=("mle", "hill"),
        assignment=assign.ASSIGNMENTS,
        score=scores.SCORES,
        method=spectra.METHODS,
        refresh=("inline", "external"),
        shape_correction=CORRECTIONS,
    )
    for name, known in choices.items():
        value = getattr(s, name)
        listed = isinstance(value, str) and value in known
        require(name, value, listed, f"one of {', '.join(known)}")
    ratios = s.assignment in ("sqrt", "log2")
    shifted = s.shape_correction == "mp"
    require(
        "shape_correction",
        s.shape_correction,
        not (shifted and ratios),
        "none with sqrt and log2",
    )
    # The limit that is subtracted is that of the median fit.
    require(
        "shape_correction",
        s.shape_correction,
        not shifted or s.fit == "median",
        f"none or subsample with fit {s.fit}",
    )
    inline = s.refresh == "inline" or s.score != "grad_norm"
    require("refresh", s.refresh, inline, "inline with score grad_norm")
    above_one = s.assignment != "log2" or s.score in ("alpha", "stable_rank")
    require("assignment", s.assignment, above_one, "log2 for alpha and stable_rank alone")
    check_rest(s.decay_rest)
    return s._replace(quantiles=tuple(map(float, ends)), exclude=tuple(s.exclude))


def check_rest(rest: Any) -> None:
    """Rejects what is no `decay_rest`."""
    if not callable(rest) and not (isinstance(rest, str) and rest in ("base", "none")):
        raise reject("optim.decay_rest", rest, "base, none, or a function of the path")


def require(name: str, value: Any, holds: Any, allowed: str) -> None:
    """Rejects the setting `name` unless it `holds`."""
    if not holds:
        raise reject(f"optim.alphadecay.{name}", value, allowed)


def _real(value) -> bool:
    return isinstance(value, int | float | np.integer | np.floating)
