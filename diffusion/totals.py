"""What the losses of the field come to at their optimum, and the best linear denoiser.

    J*_total = E_{log s ~ p}[w(s) J*(s)]     (Xu et al., arXiv:2506.13763, Theorem 1)

for the densities p of log s and weights w that published models train with, in VE coordinates.
A training loss of that family cannot fall below its total. Only a curve of J* is needed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from diffusion import curve, diagnosis
from diffusion.estimators import OptimalLoss
from diffusion.findings import bracketed, digits

REACH = 8.0  # Standard deviations of a normal density that are integrated.
TOLERANCE = 2.0  # Standard errors by which J* may lie above the linear bound.
ROUNDING = 1e-6  # Of J* in float32, relative.
WIDEST = 4096  # Coordinates of a covariance matrix that is still worth its time.


class Family(NamedTuple):
    """A loss of the field.

    Attributes:
      name: a key for files.
      words: density and weight, for tables.
      density: s [P] -> [P], of log s, not normalised.
      weight: s [P] -> [P], of |D(x; s) - x_0|^2.
      low, high: range of s.
    """

    name: str
    words: tuple[str, str]
    density: Callable
    weight: Callable
    low: float
    high: float


def families(sigma_data: float = 0.5) -> tuple[Family, ...]:
    """The losses of EDM, EDM2, flow matching, VP and VE with their published constants.

    Densities of EDM2 without its learned u(s).

    Args:
      sigma_data: standard deviation of the data, of the weights of EDM and EDM2.
    """
    edm = lambda s: diagnosis.edm_weight(s, sigma_data)
    flow = lambda s: ((1 + s) / s) ** 2
    eps = lambda s: 1 / s**2
    edm_words, flow_words = f"EDM, σ_data {sigma_data:g}", "((1 + s) / s)²"
    # t = (sqrt(c^2 + 2 b log(1 + s^2)) - c) / b; its slope in log s is the density.
    b, c = 19.9, 0.1
    vp = lambda s: 2 * s**2 / (1 + s**2) / np.sqrt(c**2 + 2 * b * np.log1p(s**2))
    vp_s = lambda t: float(np.sqrt(np.expm1(b * t**2 / 2 + c * t)))
    return (
        _normal("edm", -1.2, 1.2, edm_words, edm),
        _normal("edm2_latents", -0.4, 1.0, edm_words, edm),
        _normal("edm2_pixels", -0.8, 1.6, edm_words, edm),
        Family(
            "fm_uniform",
            ("t uniform, s = t / (1 − t)", flow_words),
            lambda s: s / (1 + s) ** 2,
            flow,
            1e-5,
            1e5,
        ),
        _normal("fm_logit_normal", 0.0, 1.0, flow_words, flow),
        Family("vp", ("t of VP uniform", "1 / s²"), vp, eps, vp_s(1e-5), vp_s(1.0)),
        Family("ve", ("uniform, 0.02 to 100", "1 / s²"), np.ones_like, eps, 0.02, 100.0),
    )


def _normal(name: str, mean: float, std: float, words: str, weight: Callable) -> Family:
    density = lambda s: np.exp(-0.5 * ((np.log(s) - mean) / std) ** 2)
    low, high = (float(np.exp(mean + end * REACH * std)) for end in (-1, 1))
    return Family(name, (f"N({mean:g}, {std:g}²)", words), density, weight, low, high)


def totals(found: OptimalLoss, sigma_data: float = 0.5) -> dict[str, dict]:
    """{family: {value, error}} per coordinate, with lower and upper where found has bounds.

    J* is smoothed, counts as 0 below its first level and tends to the variance beyond its
    last. Levels share their draws: the errors of all add up, not in squares, which is an
    upper bound of the error. It is NaN where errors of the curve are.

    Args:
      found: a curve, sums over coordinates.
      sigma_data: as of `families`.
    """
    bounds = {"value": ("value", "stderr")}
    if bracketed(found):
        bounds |= {n: (n, f"{n}_err") for n in ("lower", "upper")}
    dim = float(found.dim)
    rows: dict[str, dict] = {}
    for what, (value, error) in bounds.items():
        one = found._replace(value=getattr(found, value), stderr=getattr(found, error))
        smoothed = curve.smooth(one)
        for f in families(sigma_data):
            given = (f.weight, f.density, f.low, f.high)
            row = rows.setdefault(f.name, {})
            row[what] = curve.weighted_total(smoothed, *given) / dim
            if what == "value":
                row["error"] = float("nan")
                if np.isfinite(one.stderr).all():
                    errors = _errors(one, smoothed)
                    row["error"] = curve.weighted_total(errors, *given) / dim
    return rows


def _errors(found: OptimalLoss, smoothed: curve.Curve) -> curve.Curve:
    """Standard errors as a curve. They vanish beyond the last level, where J* does not
    matter: V - J* falls as 1 / s^2, and V is known."""
    order = np.argsort(found.sigmas)
    error = np.interp(smoothed.log_sigma, np.log(found.sigmas[order]), found.stderr[order])
    return curve.Curve(smoothed.log_sigma, error, np.zeros(0), 0.0)


def table(rows: dict[str, dict], sigma_data: float = 0.5) -> str:
    """`totals` as Markdown."""
    bounds = "lower" in next(iter(rows.values()))
    head = ["loss", "density of log s", "weight", "optimum"]
    head += ["lower", "upper"] if bounds else []
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for f in families(sigma_data):
        row = rows[f.name]
        cells = [f.name, *f.words, digits(row["value"], row["error"])]
        cells += [digits(row[n]) for n in ("lower", "upper")] if bounds else []
        lines.append(f"| {' | '.join(cells)} |")
    lines.append(
        "\nE[w J*] per coordinate, below which the training loss of each family cannot fall "
        "(EDM2: before its learned u(s)). Errors are those of draws, and add up over levels, "
        "not in squares; few levels add one of interpolation. J* counts as 0 below the first."
    )
    return "\n".join(lines)


def beside_linear(
    found: OptimalLoss, eigenvalues: Float[np.ndarray, " k"]
) -> tuple[np.ndarray, dict[str, Any]]:
    """The loss of the best linear denoiser, which J* cannot exceed, and whether it does.

    Args:
      found: a curve of rows without classes, sums over coordinates.
      eigenvalues: of the covariance of these rows.

    Returns:
      bound [S], a sum over coordinates; and `within`, whether J* lies below it within 2
      standard errors at every level, `above`, at how many it does not, `levels`, of how many,
      and `errors` and `sigma`, where it comes closest, None where errors are not known.
    """
    bound = curve.linear_bound(eigenvalues, found.sigmas)
    error = np.nan_to_num(found.stderr, nan=0.0)
    over = found.value - bound
    above = over > TOLERANCE * error + ROUNDING * bound
    errors = over / (error + ROUNDING * bound + np.finfo(float).tiny)
    at = int(np.argmax(errors))
    # Where all draws agree there is nothing but rounding to count in.
    known = np.isfinite(found.stderr).all() and error[at] > ROUNDING * bound[at]
    return bound, {
        "within": not bool(above.any()),
        "above": int(above.sum()),
        "levels": len(bound),
        "errors": float(errors[at]) if known else None,
        "sigma": float(found.sigmas[at]) if known else None,
    }


def linear_words(said: dict[str, Any]) -> str:
    """A sentence of the second result of `beside_linear`."""
    what = "the linear bound, Σ λ s² / (λ + s²) over eigenvalues λ of the data's covariance"
    at = ""
    if said["errors"] is not None:
        at = f", at most {said['errors']:+.1f} of them, at s = {said['sigma']:.3g}"
    if said["within"]:
        return (
            f"J* stays below {what}, within {TOLERANCE:g} standard errors at every level{at}."
        )
    return (
        f"J* is above {what}, by more than {TOLERANCE:g} standard errors at {said['above']} of "
        f"{said['levels']} levels{at}: the estimate is too high there."
    )
